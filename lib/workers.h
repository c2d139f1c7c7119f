/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A few threads that work through a set of chunks. */
#ifndef KMIG_WORKERS_H
#define KMIG_WORKERS_H

#include "private.h"

#define KMIG_WORKERS_MAX 2

struct kmig_workers {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	uint64_t *set;			/* chunks waiting, under @lock */
	uint64_t total;			/* chunks there are */
	uint64_t waiting, cursor;
	unsigned int active;		/* threads at work */
	unsigned int width;		/* threads that may be */
	bool undrained;			/* work was done since @drained was last called */
	bool stop;
	void (*work)(void *data, uint64_t chunk);
	void (*drained)(void *data);	/* by the last thread, when the set has become empty; or NULL */
	void *data;
	int event_fd;			/* readable after the set has become empty */
	unsigned int threads;
	pthread_t thread[KMIG_WORKERS_MAX];
};

int kmig_workers_start(struct kmig_workers *workers, uint64_t total, void (*work)(void *, uint64_t),
		       void (*drained)(void *), void *data);
/* What waits is dropped, what is at work is waited for. Harmless when not started. */
void kmig_workers_stop(struct kmig_workers *workers);
void kmig_workers_add(struct kmig_workers *workers, uint64_t chunk);
void kmig_workers_set_width(struct kmig_workers *workers, unsigned int width);
/* Chunks waiting or at work; resets the event. */
uint64_t kmig_workers_busy(struct kmig_workers *workers);

#endif /* KMIG_WORKERS_H */
