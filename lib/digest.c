// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Digests of chunks: XXH64. It is plain 64-bit arithmetic, as fast as memory on a real machine
 * and still so under an emulator, where vector code is not; and it has to find accidents, not
 * forgers: whoever can alter guest memory under way can alter digests too.
 */
#include "digest.h"

/* The state lives on the stack: nothing to allocate, nothing to fail. */
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

static const uint8_t zeroes[64 << 10];

void kmig_chunks_init(struct kmig_chunks *chunks, struct kmig_region **regions, unsigned int count)
{
	chunks->regions = regions;
	chunks->count = count;
	chunks->first[0] = 0;
	for (unsigned int i = 0; i < count; i++)
		chunks->first[i + 1] = chunks->first[i] + kmig_region_chunks(regions[i]);
}

unsigned int kmig_chunks_region(const struct kmig_chunks *chunks, uint64_t number)
{
	unsigned int i = 0;

	while (number >= chunks->first[i + 1])
		i++;
	return i;
}

static void add_zeroes(XXH64_state_t *state, uint64_t length)
{
	while (length) {
		size_t n = length < sizeof(zeroes) ? length : sizeof(zeroes);

		XXH64_update(state, zeroes, n);
		length -= n;
	}
}

/* The first page at or after @page that exists, or that does not. */
static uint64_t next_page(const uint64_t *exists, uint64_t pages, uint64_t page, bool wanted)
{
	while (page < pages && kmig_bit(exists, page) != wanted)
		page++;
	return page;
}

uint64_t kmig_digest_chunk(const struct kmig_region *region, uint64_t chunk)
{
	uint64_t begin = chunk * kmig_chunk_bytes(region), size = region->page_size, page = 0;
	const uint8_t *map = (const uint8_t *)region->map + begin;
	uint64_t pages = LMTRACK_CHUNK_PAGES;
	uint64_t exists[KMIG_CHUNK_WORDS];
	XXH64_state_t state;

	if (pages > (region->bytes - begin) / size)
		pages = (region->bytes - begin) / size;
	/* To read a hole of a memfd would fill it; where nothing is known, that is the lesser evil. */
	if (kmig_region_exists(region, chunk, exists) || next_page(exists, pages, 0, false) == pages)
		return XXH64(map, pages * size, 0);

	XXH64_reset(&state, 0);
	while (page < pages) {
		uint64_t data = next_page(exists, pages, page, true);
		uint64_t hole = next_page(exists, pages, data, false);

		add_zeroes(&state, (data - page) * size);
		XXH64_update(&state, map + data * size, (hole - data) * size);
		page = hole;
	}
	return XXH64_digest(&state);
}
