/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pages that are dirty round after round. Sending them in each is in vain: they are held back
 * until the blackout, as many as its budget carries, the most persistent first.
 *
 * Of a page that is held nothing new is known: it stays dirty. So an eighth of them goes along
 * with each round, in turn, and has to prove itself again.
 */
#ifndef KMIG_HOT_H
#define KMIG_HOT_H

#include "private.h"

#define KMIG_HOT_BITS 4

struct kmig_hot {
	unsigned int count;
	uint64_t pages[LMTRACK_REGIONS_MAX];
	/*
	 * For every page, in how many looks on end it was dirty, up to 15: the bits of the number
	 * in as many bitmaps, the lowest first.
	 */
	uint64_t *looks[KMIG_HOT_BITS][LMTRACK_REGIONS_MAX];
	uint64_t *hold[LMTRACK_REGIONS_MAX];
	uint64_t held;		/* pages in @hold */
	unsigned int turn;	/* of those that prove themselves */
};

int kmig_hot_start(struct kmig_hot *hot, struct kmig_region *const *regions, unsigned int count);
void kmig_hot_stop(struct kmig_hot *hot);

/* What is dirty now, a bitmap for each region. */
void kmig_hot_look(struct kmig_hot *hot, uint64_t *const *dirty);

/* Put into @hold the pages that were dirty longest, @budget at most. */
void kmig_hot_choose(struct kmig_hot *hot, uint64_t budget);

#endif /* KMIG_HOT_H */
