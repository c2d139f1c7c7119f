// SPDX-License-Identifier: LGPL-2.1-or-later
/* Which pages are held back until the blackout. */
#include "hot.h"

int kmig_hot_start(struct kmig_hot *hot, struct kmig_region *const *regions, unsigned int count)
{
	memset(hot, 0, sizeof(*hot));
	for (unsigned int i = 0; i < count; i++) {
		uint64_t words = kmig_words(kmig_region_pages(regions[i]));

		hot->count = i + 1;
		hot->pages[i] = kmig_region_pages(regions[i]);
		hot->ones[i] = calloc(words, sizeof(uint64_t));
		hot->twos[i] = calloc(words, sizeof(uint64_t));
		hot->hold[i] = calloc(words, sizeof(uint64_t));
		if (!hot->ones[i] || !hot->twos[i] || !hot->hold[i]) {
			kmig_hot_stop(hot);
			return -ENOMEM;
		}
	}
	return 0;
}

void kmig_hot_stop(struct kmig_hot *hot)
{
	for (unsigned int i = 0; i < hot->count; i++) {
		free(hot->ones[i]);
		free(hot->twos[i]);
		free(hot->hold[i]);
	}
	memset(hot, 0, sizeof(*hot));
}

void kmig_hot_look(struct kmig_hot *hot, uint64_t *const *dirty)
{
	for (unsigned int i = 0; i < hot->count; i++) {
		for (uint64_t w = 0; w < kmig_words(hot->pages[i]); w++) {
			uint64_t ones = hot->ones[i][w], twos = hot->twos[i][w];

			/* 64 counters at once: dirty adds one, up to three; clean is zero. */
			hot->ones[i][w] = dirty[i][w] & (~ones | twos);
			hot->twos[i][w] = dirty[i][w] & (ones | twos);
		}
	}
}

/* Of these pages as many as the budget still allows. */
static uint64_t take(struct kmig_hot *hot, uint64_t word, uint64_t budget)
{
	uint64_t taken = word;

	while (hot->held + __builtin_popcountll(taken) > budget)
		taken &= taken - 1;
	hot->held += __builtin_popcountll(taken);
	return taken;
}

void kmig_hot_choose(struct kmig_hot *hot, uint64_t budget)
{
	hot->held = 0;
	for (unsigned int i = 0; i < hot->count; i++)
		for (uint64_t w = 0; w < kmig_words(hot->pages[i]); w++)
			hot->hold[i][w] = take(hot, hot->ones[i][w] & hot->twos[i][w], budget);
	for (unsigned int i = 0; i < hot->count; i++)
		for (uint64_t w = 0; w < kmig_words(hot->pages[i]) && hot->held < budget; w++)
			hot->hold[i][w] |= take(hot, ~hot->ones[i][w] & hot->twos[i][w], budget);
}
