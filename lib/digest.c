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

uint64_t kmig_digest_chunk(const struct kmig_region *region, uint64_t chunk)
{
	const uint8_t *map = region->map;
	off_t at = chunk * kmig_chunk_bytes(region);
	off_t end = at + kmig_chunk_bytes(region);
	off_t data = lseek(region->fd, at, SEEK_DATA);
	off_t hole = data < 0 ? data : lseek(region->fd, data, SEEK_HOLE);
	XXH64_state_t state;

	if ((uint64_t)end > region->bytes)
		end = region->bytes;
	if (data == at && hole >= end)
		return XXH64(map + at, end - at, 0);

	XXH64_reset(&state, 0);
	while (at < end) {
		data = lseek(region->fd, at, SEEK_DATA);
		if (data < 0 || data > end)
			data = end;
		add_zeroes(&state, data - at);
		if (data == end)
			break;
		hole = lseek(region->fd, data, SEEK_HOLE);
		if (hole < 0 || hole > end)
			hole = end;
		XXH64_update(&state, map + data, hole - data);
		at = hole;
	}
	return XXH64_digest(&state);
}
