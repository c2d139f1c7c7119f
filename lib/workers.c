// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A few threads that work through a set of chunks, in ascending order and round again. A set
 * and no queue: a chunk that is added twice before its turn is worked on once, and the memory
 * it takes is bounded by the number of chunks, whatever the peer sends.
 *
 * A thread that has made itself nicer cannot take that back without privilege. So there is one
 * for the time in which the guest runs, and others for when it stands and waits for them. They
 * share a condition, so each change wakes them all.
 */
#include "workers.h"

#include <sys/eventfd.h>
#include <sys/resource.h>

#define BACKGROUND_NICE 10	/* a tenth of what a vCPU gets, where there is no idle processor */

static void *worker_main(void *data)
{
	struct kmig_worker *worker = data;
	struct kmig_workers *workers = worker->workers;

	/* Where that is not allowed it is as nice as all. */
	if (worker->background)
		setpriority(PRIO_PROCESS, gettid(), getpriority(PRIO_PROCESS, gettid()) + BACKGROUND_NICE);
	pthread_mutex_lock(&workers->lock);
	while (!workers->stop) {
		uint64_t chunk;

		if (!workers->waiting || worker->background == workers->hurry) {
			pthread_cond_wait(&workers->wake, &workers->lock);
			continue;
		}
		chunk = kmig_bit_next(workers->set, workers->total, workers->cursor);
		if (chunk == workers->total)
			chunk = kmig_bit_next(workers->set, workers->total, 0);
		kmig_bit_clear(workers->set, chunk);
		workers->cursor = chunk + 1;
		workers->waiting--;
		workers->active++;
		pthread_mutex_unlock(&workers->lock);

		workers->work(workers->data, chunk);

		pthread_mutex_lock(&workers->lock);
		workers->undrained = true;
		/* Still counted as active meanwhile: whoever sees the set idle sees it drained. */
		while (workers->undrained && !workers->waiting && workers->active == 1 && !workers->stop) {
			workers->undrained = false;
			pthread_mutex_unlock(&workers->lock);
			if (workers->drained)
				workers->drained(workers->data);
			pthread_mutex_lock(&workers->lock);
		}
		workers->active--;
		if (!workers->waiting && !workers->active)
			eventfd_write(workers->event_fd, 1);
	}
	pthread_mutex_unlock(&workers->lock);
	return NULL;
}

static int start(struct kmig_workers *workers, unsigned int number)
{
	struct kmig_worker *worker = &workers->worker[number];

	*worker = (struct kmig_worker){ .workers = workers, .background = !number };
	return kmig_thread_start(&worker->thread, worker_main, worker);
}

int kmig_workers_start(struct kmig_workers *workers, uint64_t total, void (*work)(void *, uint64_t),
		       void (*drained)(void *), void *data)
{
	unsigned int wanted = 1 + (kmig_cpus() < KMIG_WORKERS_MAX ? 1 : KMIG_WORKERS_MAX);

	*workers = (struct kmig_workers){
		.total = total,
		.work = work,
		.drained = drained,
		.data = data,
	};
	workers->set = calloc(kmig_words(total), sizeof(uint64_t));
	if (!workers->set)
		return -ENOMEM;
	pthread_mutex_init(&workers->lock, NULL);
	pthread_cond_init(&workers->wake, NULL);
	workers->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (workers->event_fd >= 0)
		while (workers->threads < wanted && !start(workers, workers->threads))
			workers->threads++;
	/* One of each kind at least. */
	if (workers->threads > 1)
		return 0;
	kmig_workers_stop(workers);
	return -ENOMEM;
}

void kmig_workers_stop(struct kmig_workers *workers)
{
	if (!workers->set)
		return;
	pthread_mutex_lock(&workers->lock);
	workers->stop = true;
	pthread_cond_broadcast(&workers->wake);
	pthread_mutex_unlock(&workers->lock);
	for (unsigned int i = 0; i < workers->threads; i++)
		pthread_join(workers->worker[i].thread, NULL);
	if (workers->event_fd >= 0)
		close(workers->event_fd);
	free(workers->set);
	workers->set = NULL;
	pthread_cond_destroy(&workers->wake);
	pthread_mutex_destroy(&workers->lock);
}

void kmig_workers_add(struct kmig_workers *workers, uint64_t chunk)
{
	pthread_mutex_lock(&workers->lock);
	if (!kmig_bit(workers->set, chunk)) {
		kmig_bit_set(workers->set, chunk);
		workers->waiting++;
		pthread_cond_broadcast(&workers->wake);
	}
	pthread_mutex_unlock(&workers->lock);
}

void kmig_workers_hurry(struct kmig_workers *workers, bool hurry)
{
	pthread_mutex_lock(&workers->lock);
	workers->hurry = hurry;
	pthread_cond_broadcast(&workers->wake);
	pthread_mutex_unlock(&workers->lock);
}

unsigned int kmig_workers_hurried(const struct kmig_workers *workers)
{
	return workers->threads - 1;
}

uint64_t kmig_workers_busy(struct kmig_workers *workers)
{
	eventfd_t count;
	uint64_t busy;

	pthread_mutex_lock(&workers->lock);
	eventfd_read(workers->event_fd, &count);
	busy = workers->waiting + workers->active;
	pthread_mutex_unlock(&workers->lock);
	return busy;
}
