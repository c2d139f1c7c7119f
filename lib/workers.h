/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A few threads that work through a set of chunks: one in the background, at a lower priority than
 * the guest has, which runs meanwhile; or all the others, when there is a hurry.
 */
#ifndef KMIG_WORKERS_H
#define KMIG_WORKERS_H

#include "private.h"

#define KMIG_WORKERS_MAX 2	/* that work at once */

struct kmig_workers {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	uint64_t *set;			/* chunks waiting, under @lock */
	uint64_t total;			/* chunks there are */
	uint64_t waiting, cursor;
	unsigned int active;		/* threads at work */
	bool hurry;			/* they are to be those that are not in the background */
	bool undrained;			/* work was done since @drained was last called */
	bool stop;
	void (*work)(void *data, uint64_t chunk);
	void (*drained)(void *data);	/* by the last thread, when the set has become empty; or NULL */
	void *data;
	int event_fd;			/* readable after the set has become empty */
	unsigned int threads;
	struct kmig_worker {
		struct kmig_workers *workers;
		pthread_t thread;
		bool background;
	} worker[KMIG_WORKERS_MAX + 1];
};

int kmig_workers_start(struct kmig_workers *workers, uint64_t total, void (*work)(void *, uint64_t),
		       void (*drained)(void *), void *data);
/* What waits is dropped, what is at work is waited for. Harmless when not started. */
void kmig_workers_stop(struct kmig_workers *workers);
void kmig_workers_add(struct kmig_workers *workers, uint64_t chunk);
/* There is a hurry from now on, or no longer. */
void kmig_workers_hurry(struct kmig_workers *workers, bool hurry);
/* How many work at once when there is one. */
unsigned int kmig_workers_hurried(const struct kmig_workers *workers);
/* Chunks waiting or at work; resets the event. */
uint64_t kmig_workers_busy(struct kmig_workers *workers);

#endif /* KMIG_WORKERS_H */
