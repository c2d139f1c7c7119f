// SPDX-License-Identifier: LGPL-2.1-or-later
/* Which pages are held back until the blackout. */
#include "hot.h"

int kmig_hot_start(struct kmig_hot *hot, struct kmig_region *const *regions, unsigned int count)
{
	bool failed = false;

	memset(hot, 0, sizeof(*hot));
	for (unsigned int i = 0; i < count; i++) {
		uint64_t words = kmig_words(kmig_region_pages(regions[i]));

		hot->count = i + 1;
		hot->pages[i] = kmig_region_pages(regions[i]);
		hot->hold[i] = calloc(words, sizeof(uint64_t));
		for (int bit = 0; bit < KMIG_HOT_BITS; bit++) {
			hot->looks[bit][i] = calloc(words, sizeof(uint64_t));
			failed |= !hot->looks[bit][i];
		}
		failed |= !hot->hold[i];
	}
	if (failed)
		kmig_hot_stop(hot);
	return failed ? -ENOMEM : 0;
}

void kmig_hot_stop(struct kmig_hot *hot)
{
	for (unsigned int i = 0; i < hot->count; i++) {
		for (int bit = 0; bit < KMIG_HOT_BITS; bit++)
			free(hot->looks[bit][i]);
		free(hot->hold[i]);
	}
	memset(hot, 0, sizeof(*hot));
}

/* 64 counters at once: dirty adds one, up to the highest number; clean is zero. */
static void count(struct kmig_hot *hot, unsigned int region, uint64_t word, uint64_t dirty)
{
	uint64_t carry = dirty;

	for (int bit = 0; bit < KMIG_HOT_BITS; bit++) {
		uint64_t *looks = &hot->looks[bit][region][word];
		uint64_t sum = *looks ^ carry;

		carry &= *looks;
		*looks = sum & dirty;
	}
	for (int bit = 0; bit < KMIG_HOT_BITS; bit++)
		hot->looks[bit][region][word] |= carry;
}

void kmig_hot_look(struct kmig_hot *hot, uint64_t *const *dirty)
{
	for (unsigned int i = 0; i < hot->count; i++)
		for (uint64_t w = 0; w < kmig_words(hot->pages[i]); w++)
			count(hot, i, w, dirty[i][w]);
	hot->turn++;
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

/* Pages of a word that were dirty in at least so many looks on end. */
static uint64_t at_least(const struct kmig_hot *hot, unsigned int region, uint64_t word, unsigned int looks)
{
	uint64_t all = ~0ull, more = 0;

	for (int bit = KMIG_HOT_BITS - 1; bit >= 0; bit--) {
		uint64_t set = hot->looks[bit][region][word];

		if (looks >> bit & 1) {
			all &= set;
		} else {
			more |= all & set;
		}
	}
	return all | more;
}

void kmig_hot_choose(struct kmig_hot *hot, uint64_t budget)
{
	static const unsigned int levels[] = { 15, 14, 12, 8, 6, 4, 3, 2 };

	hot->held = 0;
	for (unsigned int i = 0; i < hot->count; i++)
		memset(hot->hold[i], 0, kmig_words(hot->pages[i]) * sizeof(uint64_t));
	for (unsigned int level = 0; level < sizeof(levels) / sizeof(*levels) && hot->held < budget; level++) {
		for (unsigned int i = 0; i < hot->count; i++) {
			for (uint64_t w = 0; w < kmig_words(hot->pages[i]) && hot->held < budget; w++) {
				if ((w + hot->turn) % 8)
					hot->hold[i][w] |= take(hot, at_least(hot, i, w, levels[level]) & ~hot->hold[i][w], budget);
			}
		}
	}
}
