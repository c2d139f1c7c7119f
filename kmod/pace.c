// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: a cap on how fast a stream sends.
 *
 * A token bucket in the form of one time stamp, pace->due: when all that was handed to the
 * network would have left, had it gone at the rate. Who finds it ahead of the clock waits until
 * it is not, then sends and moves it on by what that takes at the rate. A time stamp that lies
 * behind the clock is the credit of those whose timer was late or who had to look for pages
 * first; more than PACE_CREDIT_NS of it is forgotten. It is one for all channels of the stream, so
 * it does not matter which of them have something to send.
 *
 * Frames are cut to what takes PACE_PIECE_NS (lmtrack_pace_pages()), so that a low rate is an even
 * trickle and no burst of whole chunks. What leaves in any second exceeds the rate by credit and
 * one piece at most, which is 1.5 %, or more where a page takes more than PACE_PIECE_NS.
 *
 * The wait has an absolute end. Whoever wakes looks at everything anew, so a new setting and the
 * end of a channel only have to wake the sleepers.
 *
 * Locks: pace->lock (spin, innermost). The rate is read without it by those who only want to know
 * whether there is one, or how long a piece is. Nothing else is held by who waits, but for
 * the references to the folios that it is about to send.
 *
 * Lifetimes: it is a part of the stream; only its channels' threads sleep here.
 */
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/wait.h>

#include "lmtrack.h"

#define PACE_PIECE_NS	(5 * NSEC_PER_MSEC)
#define PACE_CREDIT_NS	(10 * NSEC_PER_MSEC)
/* How late a wait may end for the sake of one timer interrupt less. */
#define PACE_SLACK_NS	(50 * NSEC_PER_USEC)

void lmtrack_pace_init(struct lmtrack_pace *pace)
{
	spin_lock_init(&pace->lock);
	init_waitqueue_head(&pace->sleepers);
}

/* Bytes per second; 0: as fast as may be. */
void lmtrack_pace_set(struct lmtrack_pace *pace, u64 rate)
{
	spin_lock(&pace->lock);
	/* What was sent stays paid for: who sets it often sends no more for it. */
	WRITE_ONCE(pace->rate, rate);
	spin_unlock(&pace->lock);
	/* Whoever sleeps shall look whether there is still reason to. */
	wake_up_all(&pace->sleepers);
}

static unsigned int pace_pages(u64 rate)
{
	if (likely(!rate))
		return LMTRACK_CHUNK_PAGES;
	return clamp_t(u64, div_u64(rate, NSEC_PER_SEC / PACE_PIECE_NS) >> PAGE_SHIFT, 1,
		       LMTRACK_CHUNK_PAGES);
}

/* How many pages may be sent at once. */
unsigned int lmtrack_pace_pages(const struct lmtrack_pace *pace)
{
	return pace_pages(READ_ONCE(pace->rate));
}

/* Of a link with this rate some would still be under way. */
bool lmtrack_pace_busy(const struct lmtrack_pace *pace)
{
	return READ_ONCE(pace->rate) && READ_ONCE(pace->due) > (s64)ktime_get_ns();
}

/*
 * 0: it is time to send so many bytes. EAGAIN: too many pages at once, by the rate they would be
 * charged at. EBUSY: not before *@due.
 */
static int pace_take(struct lmtrack_pace *pace, unsigned int pages, size_t bytes, ktime_t *due)
{
	s64 now = ktime_get_ns();
	int ret = 0;

	spin_lock(&pace->lock);
	if (pages > pace_pages(pace->rate)) {
		ret = -EAGAIN;
	} else if (pace->rate && pace->due > now) {
		*due = ns_to_ktime(pace->due);
		ret = -EBUSY;
	} else if (pace->rate) {
		WRITE_ONCE(pace->due, max_t(s64, pace->due, now - PACE_CREDIT_NS) +
			   (s64)div64_u64(bytes * NSEC_PER_SEC, pace->rate));
	}
	spin_unlock(&pace->lock);
	return ret;
}

/**
 * lmtrack_pace_pay() - wait until so much may be sent
 * @pace:	of the channel's stream
 * @channel:	whose thread this is
 * @pages:	to be sent now
 * @bytes:	that is all of it
 *
 * Return: 0; what has ended the channel or its stream; EAGAIN: the cap was lowered meanwhile, and
 * so many pages are too much at once.
 */
int lmtrack_pace_pay(struct lmtrack_pace *pace, const struct lmtrack_channel *channel,
		     unsigned int pages, size_t bytes)
{
	DEFINE_WAIT(wait);
	ktime_t due;
	int ret;

	if (likely(!READ_ONCE(pace->rate)))
		return 0;
	for (;;) {
		prepare_to_wait(&pace->sleepers, &wait, TASK_IDLE);
		ret = lmtrack_channel_error(channel);
		if (!ret)
			ret = pace_take(pace, pages, bytes, &due);
		if (ret != -EBUSY)
			break;
		schedule_hrtimeout_range(&due, PACE_SLACK_NS, HRTIMER_MODE_ABS);
	}
	finish_wait(&pace->sleepers, &wait);
	return ret;
}
