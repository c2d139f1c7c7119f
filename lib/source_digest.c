// SPDX-License-Identifier: LGPL-2.1-or-later
/* The source's half of the final check. */
#include "source_digest.h"

/*
 * With @lock held. The engine's thread has to be told of a failure: it may be one of this host's, which
 * the connection does not show, and what was not sent will never be compared.
 */
static void flush(struct kmig_source_digest *digest)
{
	int err;

	if (!digest->batched)
		return;
	/* Counted first: COMPARED must not overtake the count. */
	atomic_fetch_add(&digest->sent, digest->batched);
	err = kmig_control_send(digest->control, LMTRACK_MSG_DIGESTS, digest->batch,
				digest->batched * sizeof(digest->batch[0]));
	if (err)
		atomic_store(&digest->error, err);
	digest->batched = 0;
}

static void drained(void *data)
{
	struct kmig_source_digest *digest = data;

	pthread_mutex_lock(&digest->lock);
	flush(digest);
	pthread_mutex_unlock(&digest->lock);
}

/* Of this thread: in the blackout it does not have to wait for the guest's, as it does now. */
static uint64_t processor_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static void digest_chunk(void *data, uint64_t number)
{
	struct kmig_source_digest *digest = data;
	unsigned int index = kmig_chunks_region(&digest->chunks, number);
	uint64_t chunk = number - digest->chunks.first[index];
	uint64_t begin = processor_ns();
	uint32_t round, frozen;
	uint64_t value;

	/* What it covers is settled before the first byte is read. */
	round = atomic_load(&digest->acked);
	frozen = atomic_load(&digest->frozen_round);
	if (frozen && kmig_bit(digest->frozen, number))
		round = frozen;
	value = kmig_digest_chunk(digest->chunks.regions[index], chunk);
	atomic_fetch_add(&digest->busy_ns, processor_ns() - begin);
	atomic_fetch_add(&digest->digested, 1);

	pthread_mutex_lock(&digest->lock);
	digest->batch[digest->batched++] = (struct lmtrack_wire_digest){
		.region = htole32(index),
		.round = htole32(round),
		.chunk = htole64(chunk),
		.digest = htole64(value),
	};
	if (digest->batched == KMIG_WIRE_DIGESTS_MAX)
		flush(digest);
	pthread_mutex_unlock(&digest->lock);
}

int kmig_source_digest_start(struct kmig_source_digest *digest, struct kmig_ctx *ctx, struct kmig_control *control,
			     struct kmig_region **regions, unsigned int count)
{
	uint64_t words;

	digest->ctx = ctx;
	digest->control = control;
	kmig_chunks_init(&digest->chunks, regions, count);
	words = kmig_words(kmig_chunks_total(&digest->chunks));
	pthread_mutex_init(&digest->lock, NULL);
	digest->coming = calloc(words, sizeof(uint64_t));
	digest->wanted = calloc(words, sizeof(uint64_t));
	digest->taken = calloc(words, sizeof(uint64_t));
	digest->dirty_chunks = calloc(words, sizeof(uint64_t));
	digest->frozen = calloc(words, sizeof(uint64_t));
	if (digest->coming && digest->wanted && digest->taken && digest->dirty_chunks && digest->frozen &&
	    !kmig_workers_start(&digest->workers, kmig_chunks_total(&digest->chunks), digest_chunk, drained, digest))
		return 0;
	kmig_source_digest_stop(digest);
	return kmig_fail(ctx, -ENOMEM, "digests: out of memory, threads or descriptors");
}

void kmig_source_digest_stop(struct kmig_source_digest *digest)
{
	if (!digest->ctx)
		return;
	kmig_workers_stop(&digest->workers);
	free(digest->coming);
	free(digest->wanted);
	free(digest->taken);
	free(digest->dirty_chunks);
	free(digest->frozen);
	pthread_mutex_destroy(&digest->lock);
	digest->ctx = NULL;
}

static int unverified(struct kmig_source_digest *digest, const struct kmig_message *message)
{
	const struct lmtrack_wire_unverified *wire = message->body;
	uint32_t region = le32toh(wire->region), words = le32toh(wire->words);
	uint64_t first = le64toh(wire->first), chunks;

	if (region >= digest->chunks.count || message->length != sizeof(*wire) + (size_t)words * 8)
		return kmig_fail(digest->ctx, -EPROTO, "list of chunks from the destination: region or length is wrong");
	chunks = kmig_region_chunks(digest->chunks.regions[region]);
	if (first % 64 || first >= chunks || words > kmig_words(chunks - first))
		return kmig_fail(digest->ctx, -EPROTO, "list of chunks from the destination: outside the region");
	for (uint32_t i = 0; i < words; i++) {
		for (uint64_t word = le64toh(wire->bitmap[i]); word; word &= word - 1) {
			uint64_t chunk = first + (uint64_t)i * 64 + __builtin_ctzll(word);

			if (chunk < chunks)
				kmig_bit_set(digest->coming, digest->chunks.first[region] + chunk);
		}
	}
	return 0;
}

int kmig_source_digest_message(struct kmig_source_digest *digest, const struct kmig_message *message)
{
	const struct lmtrack_wire_compared *compared = message->body;

	if (message->type == LMTRACK_MSG_UNVERIFIED)
		return unverified(digest, message);
	digest->compared = le64toh(compared->digests);
	return 0;
}

static void take_coming(struct kmig_source_digest *digest)
{
	uint64_t *wanted = digest->wanted;

	digest->wanted = digest->coming;
	digest->coming = wanted;
	memset(digest->coming, 0, kmig_words(kmig_chunks_total(&digest->chunks)) * sizeof(uint64_t));
}

void kmig_source_digest_acked(struct kmig_source_digest *digest, uint32_t round)
{
	atomic_store(&digest->acked, round);
	take_coming(digest);
}

/* Chunks that exist here and of which no digest was ever taken, whatever the destination knows. */
static void want_resident(struct kmig_source_digest *digest)
{
	for (unsigned int i = 0; i < digest->chunks.count; i++) {
		struct kmig_region *region = digest->chunks.regions[i];
		uint64_t step = kmig_chunk_bytes(region);
		off_t at = 0;

		while ((uint64_t)at < region->bytes && (at = lseek(region->fd, at, SEEK_DATA)) >= 0) {
			uint64_t number = digest->chunks.first[i] + at / step;

			if (!kmig_bit(digest->taken, number))
				kmig_bit_set(digest->wanted, number);
			at = (at / step + 1) * step;
		}
	}
}

static void find_dirty_chunks(struct kmig_source_digest *digest, uint64_t *const *dirty)
{
	uint64_t total = kmig_chunks_total(&digest->chunks);

	memset(digest->dirty_chunks, 0, kmig_words(total) * sizeof(uint64_t));
	for (unsigned int i = 0; i < digest->chunks.count; i++) {
		uint64_t pages = kmig_region_pages(digest->chunks.regions[i]);

		for (uint64_t page = kmig_bit_next(dirty[i], pages, 0); page < pages;) {
			uint64_t chunk = page / LMTRACK_CHUNK_PAGES;

			kmig_bit_set(digest->dirty_chunks, digest->chunks.first[i] + chunk);
			page = kmig_bit_next(dirty[i], pages, (chunk + 1) * LMTRACK_CHUNK_PAGES);
		}
	}
}

static void begin(struct kmig_source_digest *digest, uint64_t number)
{
	kmig_bit_clear(digest->wanted, number);
	kmig_bit_set(digest->taken, number);
	kmig_workers_add(&digest->workers, number);
}

uint64_t kmig_source_digest_pass(struct kmig_source_digest *digest, uint64_t *const *dirty)
{
	uint64_t total = kmig_chunks_total(&digest->chunks);
	uint64_t begun = 0;

	want_resident(digest);
	find_dirty_chunks(digest, dirty);
	for (uint64_t n = kmig_bit_next(digest->wanted, total, 0); n < total;
	     n = kmig_bit_next(digest->wanted, total, n + 1)) {
		/* One being written is tried once: that maps it here, which saves time when paused. */
		if (kmig_bit(digest->dirty_chunks, n) && kmig_bit(digest->taken, n))
			continue;
		begin(digest, n);
		begun++;
	}
	return begun;
}

void kmig_source_digest_freeze(struct kmig_source_digest *digest, uint64_t *const *dirty, uint32_t round)
{
	uint64_t total = kmig_chunks_total(&digest->chunks);

	find_dirty_chunks(digest, dirty);
	/* A worker that still has a chunk from before looks at these: bits first, then the round. */
	atomic_store(&digest->frozen_round, 0);
	for (uint64_t i = 0; i < kmig_words(total); i++) {
		digest->frozen[i] = digest->dirty_chunks[i];
		digest->wanted[i] |= digest->dirty_chunks[i];
	}
	atomic_store(&digest->frozen_round, round);
	kmig_workers_hurry(&digest->workers, true);
	for (uint64_t n = kmig_bit_next(digest->wanted, total, 0); n < total;
	     n = kmig_bit_next(digest->wanted, total, n + 1))
		begin(digest, n);
}

void kmig_source_digest_thaw(struct kmig_source_digest *digest)
{
	atomic_store(&digest->frozen_round, 0);
	kmig_workers_hurry(&digest->workers, false);
}

void kmig_source_digest_need(struct kmig_source_digest *digest)
{
	uint64_t total = kmig_chunks_total(&digest->chunks);

	take_coming(digest);
	for (uint64_t n = kmig_bit_next(digest->wanted, total, 0); n < total;
	     n = kmig_bit_next(digest->wanted, total, n + 1))
		begin(digest, n);
}

uint64_t kmig_source_digest_dirty(struct kmig_source_digest *digest, uint64_t *const *dirty)
{
	uint64_t total = kmig_chunks_total(&digest->chunks), chunks = 0;

	find_dirty_chunks(digest, dirty);
	for (uint64_t i = 0; i < kmig_words(total); i++)
		chunks += __builtin_popcountll(digest->dirty_chunks[i]);
	return chunks;
}

int kmig_source_digest_error(const struct kmig_source_digest *digest)
{
	return atomic_load(&digest->error);
}

bool kmig_source_digest_sent(struct kmig_source_digest *digest)
{
	return !kmig_workers_busy(&digest->workers);
}

bool kmig_source_digest_compared(struct kmig_source_digest *digest)
{
	return kmig_source_digest_sent(digest) && digest->compared == atomic_load(&digest->sent);
}

uint64_t kmig_source_digest_cost(struct kmig_source_digest *digest, uint64_t chunks)
{
	uint64_t done = atomic_load(&digest->digested);

	/* Before the first was timed, it is not known: that is no reason to take it for free. */
	if (!done)
		return chunks ? UINT64_MAX : 0;
	return atomic_load(&digest->busy_ns) / done * chunks / kmig_workers_hurried(&digest->workers);
}
