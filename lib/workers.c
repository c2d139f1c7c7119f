// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * A few threads that work through a set of chunks, in ascending order and round again. A set
 * and no queue: a chunk that is added twice before its turn is worked on once, and the memory
 * it takes is bounded by the number of chunks, whatever the peer sends.
 */
#include "workers.h"

#include <sched.h>
#include <sys/eventfd.h>

static void *worker(void *data)
{
	struct kmig_workers *workers = data;

	pthread_mutex_lock(&workers->lock);
	while (!workers->stop) {
		uint64_t chunk;

		if (!workers->waiting || workers->active >= workers->width) {
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
		else if (workers->waiting)
			pthread_cond_signal(&workers->wake);
	}
	pthread_mutex_unlock(&workers->lock);
	return NULL;
}

static unsigned int cpus(void)
{
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof(set), &set))
		return 1;
	return CPU_COUNT(&set);
}

int kmig_workers_start(struct kmig_workers *workers, uint64_t total, void (*work)(void *, uint64_t),
		       void (*drained)(void *), void *data)
{
	unsigned int wanted = cpus() < KMIG_WORKERS_MAX ? 1 : KMIG_WORKERS_MAX;

	*workers = (struct kmig_workers){
		.total = total,
		.work = work,
		.drained = drained,
		.data = data,
		.width = 1,
	};
	pthread_mutex_init(&workers->lock, NULL);
	pthread_cond_init(&workers->wake, NULL);
	workers->set = calloc(kmig_words(total), sizeof(uint64_t));
	workers->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (workers->set && workers->event_fd >= 0)
		while (workers->threads < wanted &&
		       !kmig_thread_start(&workers->thread[workers->threads], worker, workers))
			workers->threads++;
	if (workers->threads)
		return 0;
	if (workers->event_fd >= 0)
		close(workers->event_fd);
	free(workers->set);
	workers->set = NULL;
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
		pthread_join(workers->thread[i], NULL);
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
		pthread_cond_signal(&workers->wake);
	}
	pthread_mutex_unlock(&workers->lock);
}

void kmig_workers_set_width(struct kmig_workers *workers, unsigned int width)
{
	pthread_mutex_lock(&workers->lock);
	workers->width = width;
	pthread_cond_broadcast(&workers->wake);
	pthread_mutex_unlock(&workers->lock);
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
