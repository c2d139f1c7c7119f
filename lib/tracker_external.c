// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The tracker that is the VMM: it notes writes itself, in KVM's dirty log or otherwise, and is
 * asked for what it has.
 *
 * It is asked on the engine's thread only, when a round begins and when somebody looks; what it
 * gave is kept in @pending until a round takes it along. The round's threads take it out of @round,
 * each for its own chunks; what one that was lost has left there is pending again when the round
 * has ended. The VMM forgets what it gives, and begins to notice anew
 * before it gives it: so before anything of it is read here.
 */
#include "sender.h"

struct external {
	struct kmig_tracker tracker;
	bool started;
	uint64_t *pending[LMTRACK_REGIONS_MAX];	/* dirty, and in no round yet; whole chunks */
	uint64_t *round[LMTRACK_REGIONS_MAX];	/* dirty, and the round that is sent has not come to it */
};

static struct external *external_of(const struct kmig_tracker *tracker)
{
	return (struct external *)tracker;
}

static int external_start(struct kmig_tracker *tracker)
{
	const struct kmig_tracker_config *config = &tracker->config;
	int err;

	if (!config->track)
		return 0;
	err = config->track(true, config->data);
	if (err)
		return kmig_fail(config->ctx, err, "the VMM could not begin to note writes: %s", strerror(-err));
	external_of(tracker)->started = true;
	return 0;
}

static void external_free(struct kmig_tracker *tracker)
{
	struct external *external = external_of(tracker);

	kmig_sender_free(tracker);
	if (external->started)
		tracker->config.track(false, tracker->config.data);
	for (unsigned int i = 0; i < tracker->config.count; i++) {
		free(external->pending[i]);
		free(external->round[i]);
	}
	free(external);
}

/* Ask the VMM. */
static int collect(struct external *external, unsigned int index)
{
	const struct kmig_tracker_config *config = &external->tracker.config;
	uint64_t pages = kmig_region_pages(config->regions[index]);
	int err;

	if (!kmig_sender_sends(&external->tracker)) {
		for (uint64_t word = 0; word < kmig_words(pages); word++) {
			external->pending[index][word] |= external->round[index][word];
			external->round[index][word] = 0;
		}
	}
	err = config->dirty(index, 0, pages, external->pending[index], config->data);

	if (err)
		return kmig_fail(config->ctx, err, "region %s: the VMM could not tell what was written: %s",
				 config->regions[index]->name, strerror(-err));
	/* Bits behind the last page would never go. */
	if (pages % 64)
		external->pending[index][pages / 64] &= (1ULL << (pages % 64)) - 1;
	return 0;
}

static int harvest_chunk(struct kmig_tracker *tracker, struct kmig_harvest *harvest)
{
	struct external *external = external_of(tracker);
	bool look = harvest->mode == KMIG_HARVEST_LOOK;
	uint64_t *dirty = (look ? external->pending : external->round)[harvest->region] + harvest->chunk * KMIG_CHUNK_WORDS;
	int err = kmig_region_exists(tracker->config.regions[harvest->region], harvest->chunk, harvest->exists);

	kmig_harvest_select(tracker, harvest, dirty);
	if (!look)
		memset(dirty, 0, KMIG_CHUNK_WORDS * sizeof(*dirty));
	return err;
}

static int external_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what, unsigned int flags)
{
	struct external *external = external_of(tracker);

	for (unsigned int i = 0; i < tracker->config.count; i++) {
		uint64_t words = kmig_region_chunks(tracker->config.regions[i]) * KMIG_CHUNK_WORDS;
		const uint64_t *hold = kmig_sender_left_out(tracker, i, what, flags);
		int err = collect(external, i);

		if (err)
			return err;
		for (uint64_t word = 0; word < words; word++) {
			uint64_t kept = hold ? external->pending[i][word] & hold[word] : 0;

			/* All: the VMM tells of writes only, and a channel that is lost leaves chunks here. */
			external->round[i][word] = what == KMIG_SEND_ALL ? ~0ull :
						   external->pending[i][word] & ~kept;
			external->pending[i][word] = kept;
		}
	}
	return kmig_sender_send(tracker, round, what, flags);
}

static int external_peek(struct kmig_tracker *tracker, unsigned int index, uint64_t *bitmap, uint64_t *found)
{
	int err = collect(external_of(tracker), index);

	return err ? err : kmig_sender_peek(tracker, index, bitmap, found);
}

static const struct kmig_tracker_ops external_ops = {
	.name = "external",
	.start = external_start,
	.add_channel = kmig_sender_add_channel,
	.lost = kmig_sender_lost,
	.drop_channel = kmig_sender_drop_channel,
	.replace_channel = kmig_sender_replace_channel,
	.send = external_send,
	.fd = kmig_sender_fd,
	.wait = kmig_sender_wait,
	.times = kmig_sender_times,
	.cancel = kmig_sender_cancel,
	.peek = external_peek,
	.held = kmig_sender_held,
	.channel_stats = kmig_sender_channel_stats,
	.free = external_free,
	.hold = kmig_sender_hold,
	.cap = kmig_sender_cap,
	.width = kmig_sender_width,
};

int kmig_tracker_new_external(const struct kmig_tracker_config *config, struct kmig_tracker **out)
{
	struct external *external = calloc(1, sizeof(*external));
	bool ok = external;
	int err = -ENOMEM;

	if (!ok)
		return kmig_fail(config->ctx, -ENOMEM, "tracker: out of memory");
	external->tracker = (struct kmig_tracker){ .ops = &external_ops, .config = *config };
	for (unsigned int i = 0; i < config->count && ok; i++) {
		uint64_t chunks = kmig_region_chunks(config->regions[i]);

		external->pending[i] = calloc(chunks, KMIG_CHUNK_WORDS * sizeof(uint64_t));
		external->round[i] = calloc(chunks, KMIG_CHUNK_WORDS * sizeof(uint64_t));
		ok = external->pending[i] && external->round[i];
	}
	if (ok)
		err = kmig_sender_new(&external->tracker, harvest_chunk);
	if (!err) {
		*out = &external->tracker;
		return 0;
	}
	external_free(&external->tracker);
	return ok ? err : kmig_fail(config->ctx, -ENOMEM, "tracker: out of memory");
}
