/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A cap on how fast the sender in user space sends, as kmod/pace.c is one for the kernel's stream. */
#ifndef KMIG_PACE_H
#define KMIG_PACE_H

#include "private.h"

struct kmig_pace {
	pthread_mutex_t lock;
	pthread_cond_t change;		/* of the rate, or somebody shall not wait any more */
	_Atomic uint64_t rate;		/* bytes a second; 0: no cap */
	_Atomic uint64_t due_ns;	/* when what was sent would have left at that rate */
};

void kmig_pace_init(struct kmig_pace *pace);
void kmig_pace_destroy(struct kmig_pace *pace);
void kmig_pace_set(struct kmig_pace *pace, uint64_t bytes_per_second);
/* Whoever waits looks at what its function says. */
void kmig_pace_wake(struct kmig_pace *pace);

/* So many bytes may be sent at once. */
uint64_t kmig_pace_piece(const struct kmig_pace *pace);
/* Of a link with this rate some would still be under way. */
bool kmig_pace_busy(const struct kmig_pace *pace);
/* Wait until so much may be sent: 0, or what @ended has returned, which is called with the lock held. */
int kmig_pace_pay(struct kmig_pace *pace, uint64_t bytes, int (*ended)(const void *data), const void *data);

#endif /* KMIG_PACE_H */
