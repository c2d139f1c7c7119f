// SPDX-License-Identifier: LGPL-2.1-or-later
/* The destination's half of the final check. */
#include "verify.h"

enum { WAITING, EQUAL, DIFFERENT };

static bool holds(struct kmig_verify *verify, uint64_t chunk, const struct kmig_verify_entry *entry)
{
	return entry->round && atomic_load(&verify->receiver->last_round[chunk]) <= entry->round;
}

static void compare(void *data, uint64_t chunk)
{
	struct kmig_verify *verify = data;
	unsigned int index = kmig_chunks_region(verify->chunks, chunk);
	struct kmig_verify_entry entry, *now = &verify->entries[chunk];
	uint64_t digest;

	pthread_mutex_lock(&verify->lock);
	entry = *now;
	pthread_mutex_unlock(&verify->lock);
	/* One for a round still under way has replaced what this was to compare: its turn comes. */
	if (!holds(verify, chunk, &entry) || entry.round > atomic_load(&verify->receiver->acked))
		return;
	digest = kmig_digest_chunk(verify->chunks->regions[index], chunk - verify->chunks->first[index]);

	pthread_mutex_lock(&verify->lock);
	/* A newer digest may have come: it is in the set again, and this comparison is of no use. */
	if (now->round == entry.round && now->digest == entry.digest)
		now->state = digest == entry.digest ? EQUAL : DIFFERENT;
	pthread_mutex_unlock(&verify->lock);
}

int kmig_verify_start(struct kmig_verify *verify, struct kmig_receiver *receiver)
{
	uint64_t total = kmig_chunks_total(receiver->chunks);

	*verify = (struct kmig_verify){
		.ctx = receiver->ctx,
		.receiver = receiver,
		.chunks = receiver->chunks,
		.entries = calloc(total, sizeof(*verify->entries)),
		.deferred = calloc(kmig_words(total), sizeof(uint64_t)),
	};
	pthread_mutex_init(&verify->lock, NULL);
	if (verify->entries && verify->deferred &&
	    !kmig_workers_start(&verify->workers, total, compare, NULL, verify)) {
		kmig_workers_hurry(&verify->workers, true);
		return 0;
	}
	kmig_verify_stop(verify);
	return kmig_fail(receiver->ctx, -ENOMEM, "digests: out of memory, threads or descriptors");
}

void kmig_verify_stop(struct kmig_verify *verify)
{
	if (!verify->receiver)
		return;
	kmig_workers_stop(&verify->workers);
	free(verify->entries);
	free(verify->deferred);
	pthread_mutex_destroy(&verify->lock);
	verify->receiver = NULL;
}

int kmig_verify_add(struct kmig_verify *verify, const struct kmig_message *message)
{
	const struct lmtrack_wire_digest *wire = message->body;
	uint32_t acked = atomic_load(&verify->receiver->acked);

	if (message->length % sizeof(*wire))
		return kmig_fail(verify->ctx, -EPROTO, "digests from the source: half an entry");
	for (uint32_t i = 0; i < message->length / sizeof(*wire); i++) {
		uint32_t region = le32toh(wire[i].region), round = le32toh(wire[i].round);
		uint64_t chunk = le64toh(wire[i].chunk);

		if (region >= verify->chunks->count || chunk >= kmig_region_chunks(verify->chunks->regions[region]))
			return kmig_fail(verify->ctx, -EPROTO, "digest from the source: of a chunk outside the regions");
		if (!round || round > acked + 1)
			return kmig_fail(verify->ctx, -EPROTO, "digest from the source: of a round that was not sent");
		chunk += verify->chunks->first[region];

		pthread_mutex_lock(&verify->lock);
		verify->entries[chunk] = (struct kmig_verify_entry){
			.digest = le64toh(wire[i].digest),
			.round = round,
			.state = WAITING,
		};
		pthread_mutex_unlock(&verify->lock);
		verify->received++;
		if (round <= acked)
			kmig_workers_add(&verify->workers, chunk);
		else
			kmig_bit_set(verify->deferred, chunk);
	}
	return 0;
}

void kmig_verify_round_done(struct kmig_verify *verify)
{
	uint64_t total = kmig_chunks_total(verify->chunks);

	for (uint64_t chunk = kmig_bit_next(verify->deferred, total, 0); chunk < total;
	     chunk = kmig_bit_next(verify->deferred, total, chunk + 1)) {
		kmig_bit_clear(verify->deferred, chunk);
		kmig_workers_add(&verify->workers, chunk);
	}
}

/*
 * Something is known of the chunk, and no digest of it holds, or the last comparison failed.
 * One that waits to be compared will do, until everything was: then nobody will compare it.
 */
static bool lacks(struct kmig_verify *verify, uint64_t chunk, bool all_compared)
{
	const struct kmig_verify_entry *entry = &verify->entries[chunk];

	if (!entry->round && !atomic_load(&verify->receiver->last_round[chunk]))
		return false;
	return !holds(verify, chunk, entry) || entry->state == DIFFERENT || (all_compared && entry->state != EQUAL);
}

static int send_words(struct kmig_control *control, uint32_t region, const uint64_t *map, uint64_t first, uint64_t words)
{
	struct {
		struct lmtrack_wire_unverified head;
		uint64_t bitmap[KMIG_WIRE_BITMAP_WORDS];
	} message;

	message.head.region = htole32(region);
	message.head.words = htole32(words);
	message.head.first = htole64(first * 64);
	for (uint64_t i = 0; i < words; i++)
		message.bitmap[i] = htole64(map[first + i]);
	return kmig_control_send(control, LMTRACK_MSG_UNVERIFIED, &message, sizeof(message.head) + words * 8);
}

int kmig_verify_send_unverified(struct kmig_verify *verify, struct kmig_control *control, bool all_compared,
				uint64_t *lacking)
{
	int err = 0;

	*lacking = 0;
	for (unsigned int i = 0; i < verify->chunks->count && !err; i++) {
		uint64_t chunks = kmig_region_chunks(verify->chunks->regions[i]);
		uint64_t *map = calloc(kmig_words(chunks), sizeof(uint64_t));
		uint64_t at;

		if (!map)
			return kmig_fail(verify->ctx, -ENOMEM, "digests: out of memory");
		pthread_mutex_lock(&verify->lock);
		for (uint64_t chunk = 0; chunk < chunks; chunk++) {
			if (lacks(verify, verify->chunks->first[i] + chunk, all_compared)) {
				kmig_bit_set(map, chunk);
				++*lacking;
			}
		}
		pthread_mutex_unlock(&verify->lock);

		for (at = kmig_bit_next(map, chunks, 0); at < chunks && !err;) {
			uint64_t word = at / 64;
			uint64_t words = kmig_words(chunks) - word;

			if (words > KMIG_WIRE_BITMAP_WORDS)
				words = KMIG_WIRE_BITMAP_WORDS;
			while (!map[word + words - 1])
				words--;
			err = send_words(control, i, map, word, words);
			at = kmig_bit_next(map, chunks, (word + words) * 64);
		}
		free(map);
	}
	return err;
}

int kmig_verify_outcome(struct kmig_verify *verify, uint64_t *equal)
{
	uint64_t total = kmig_chunks_total(verify->chunks);

	*equal = 0;
	for (uint64_t chunk = 0; chunk < total; chunk++) {
		const struct kmig_verify_entry *entry = &verify->entries[chunk];
		unsigned int index;

		if (!holds(verify, chunk, entry))
			continue;
		if (entry->state == EQUAL)
			++*equal;
		if (entry->state != DIFFERENT)
			continue;
		index = kmig_chunks_region(verify->chunks, chunk);
		return kmig_fail(verify->ctx, -EBADMSG, "guest memory differs after the last round, first in region %u, chunk %llu: please report this; the guest stays at the source",
				 index, (unsigned long long)(chunk - verify->chunks->first[index]));
	}
	return 0;
}
