/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Digests of chunks, and the chunks of several regions under one number each. */
#ifndef KMIG_DIGEST_H
#define KMIG_DIGEST_H

#include "private.h"

/* Chunks of all regions in a row: region @i's begin at @first[i]; @first[count] is their number. */
struct kmig_chunks {
	struct kmig_region **regions;
	unsigned int count;
	uint64_t first[LMTRACK_REGIONS_MAX + 1];
};

void kmig_chunks_init(struct kmig_chunks *chunks, struct kmig_region **regions, unsigned int count);
unsigned int kmig_chunks_region(const struct kmig_chunks *chunks, uint64_t number);

static inline uint64_t kmig_chunks_total(const struct kmig_chunks *chunks)
{
	return chunks->first[chunks->count];
}

/*
 * The digest of a chunk of a mapped region. Holes are taken as zero and not touched: reading
 * one through the mapping would make it a page.
 */
uint64_t kmig_digest_chunk(const struct kmig_region *region, uint64_t chunk);

#endif /* KMIG_DIGEST_H */
