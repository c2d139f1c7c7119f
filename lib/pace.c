// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The cap is a time stamp, due: when all that was sent would have left at the rate. Who finds it
 * ahead of the clock waits until it is not, then sends and moves it on by what that takes. Behind
 * the clock it is the credit of those who were late, CREDIT_NS of it at most. There is one for all
 * channels, so it does not matter which of them have something to send. Whoever wakes looks at
 * everything anew. Without a cap no lock is taken.
 */
#include "pace.h"

#define PIECE_NS 5000000u
#define CREDIT_NS 10000000u

void kmig_pace_init(struct kmig_pace *pace)
{
	pthread_condattr_t attr;

	pthread_mutex_init(&pace->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&pace->change, &attr);
	pthread_condattr_destroy(&attr);
}

void kmig_pace_destroy(struct kmig_pace *pace)
{
	pthread_cond_destroy(&pace->change);
	pthread_mutex_destroy(&pace->lock);
}

void kmig_pace_set(struct kmig_pace *pace, uint64_t bytes_per_second)
{
	pthread_mutex_lock(&pace->lock);
	/* What was sent stays paid for: who sets it often sends no more for it. */
	pace->rate = bytes_per_second;
	pthread_cond_broadcast(&pace->change);
	pthread_mutex_unlock(&pace->lock);
}

void kmig_pace_wake(struct kmig_pace *pace)
{
	pthread_mutex_lock(&pace->lock);
	pthread_cond_broadcast(&pace->change);
	pthread_mutex_unlock(&pace->lock);
}

uint64_t kmig_pace_piece(const struct kmig_pace *pace)
{
	uint64_t rate = pace->rate;

	return rate ? rate / (1000000000u / PIECE_NS) : UINT64_MAX;
}

bool kmig_pace_busy(const struct kmig_pace *pace)
{
	return pace->rate && pace->due_ns > kmig_now_ns();
}

int kmig_pace_pay(struct kmig_pace *pace, uint64_t bytes, int (*ended)(const void *data), const void *data)
{
	uint64_t now, from;
	int err;

	if (!pace->rate)
		return 0;
	pthread_mutex_lock(&pace->lock);
	for (;;) {
		struct timespec due = { pace->due_ns / 1000000000, pace->due_ns % 1000000000 };

		now = kmig_now_ns();
		err = ended(data);
		if (err || !pace->rate || pace->due_ns <= now)
			break;
		pthread_cond_timedwait(&pace->change, &pace->lock, &due);
	}
	if (!err && pace->rate) {
		from = pace->due_ns > now - CREDIT_NS ? pace->due_ns : now - CREDIT_NS;
		pace->due_ns = from + bytes * 1000000000 / pace->rate;
	}
	pthread_mutex_unlock(&pace->lock);
	return err;
}
