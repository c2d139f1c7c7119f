// SPDX-License-Identifier: LGPL-2.1-or-later
/* The tracker that is the module: its regions notice writes, its stream sends. */
#include "tracker.h"

#include <poll.h>

#define PIN_WAIT_MS 1000	/* how long pinned pages may be I/O in flight */
#define PIN_LOOK_MS 20

struct lmtrack {
	struct kmig_tracker tracker;
	unsigned int tracked;		/* regions, with tracking on */
	struct kmig_stream *stream;
};

static struct lmtrack *lmtrack_of(const struct kmig_tracker *tracker)
{
	return (struct lmtrack *)tracker;
}

/*
 * A pin is I/O in flight, which ends, or a device's for good. Only the latter is a reason to
 * refuse.
 */
static int track(struct lmtrack *lmtrack, struct kmig_region *region)
{
	const struct kmig_tracker_config *config = &lmtrack->tracker.config;
	struct pollfd abort = { .fd = config->abort_fd, .events = POLLIN };
	uint64_t deadline = kmig_now_ns() + kmig_ms(PIN_WAIT_MS);
	uint64_t pinned;
	int err;

	for (;;) {
		err = kmig_region_try_track(region, config->allow_pinned, &pinned);
		if (err != -EBUSY || !pinned || kmig_now_ns() > deadline)
			break;
		if (poll(&abort, 1, PIN_LOOK_MS) > 0)
			return kmig_fail(config->ctx, -ECANCELED, "aborted");
	}
	if (err)
		return kmig_region_track_failed(region, err, pinned);
	lmtrack->tracked++;
	return 0;
}

static int lmtrack_start(struct kmig_tracker *tracker)
{
	const struct kmig_tracker_config *config = &tracker->config;
	struct kmig_stream_opts opts = KMIG_STREAM_OPTS_INIT;
	struct lmtrack *lmtrack = lmtrack_of(tracker);
	int err = 0;

	for (unsigned int i = 0; i < config->count && !err; i++)
		err = track(lmtrack, config->regions[i]);
	if (err)
		return err;
	opts.id = config->stream;
	opts.no_zero_detection = config->no_zero_detection;
	err = kmig_stream_create(config->ctx, &opts, &lmtrack->stream);
	for (unsigned int i = 0; i < config->count && !err; i++)
		err = kmig_stream_add_region(lmtrack->stream, config->regions[i], i);
	return err;
}

static int lmtrack_add_channel(struct kmig_tracker *tracker, int sock)
{
	int number = kmig_stream_add_channel(lmtrack_of(tracker)->stream, sock);

	return number < 0 ? number : 0;
}

static int lmtrack_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what,
			unsigned int flags __attribute__((unused)))
{
	return kmig_stream_send(lmtrack_of(tracker)->stream, round, what);
}

static int lmtrack_fd(const struct kmig_tracker *tracker)
{
	return kmig_stream_fd(lmtrack_of(tracker)->stream);
}

static int lmtrack_wait(struct kmig_tracker *tracker, struct kmig_round *round)
{
	return kmig_stream_wait(lmtrack_of(tracker)->stream, 0, round);
}

static void lmtrack_cancel(struct kmig_tracker *tracker)
{
	kmig_stream_cancel(lmtrack_of(tracker)->stream);
}

static int lmtrack_peek(struct kmig_tracker *tracker, unsigned int index, uint64_t *bitmap, uint64_t *found)
{
	struct kmig_region *region = tracker->config.regions[index];

	return kmig_region_dirty_get(region, false, 0, kmig_region_pages(region), bitmap, found);
}

static uint64_t lmtrack_held(struct kmig_tracker *tracker)
{
	uint64_t held = 0;

	for (unsigned int i = 0; i < tracker->config.count; i++)
		held += kmig_region_held(tracker->config.regions[i]);
	return held;
}

static int lmtrack_channel_stats(struct kmig_tracker *tracker, uint32_t channel, struct kmig_channel_stats *stats)
{
	return kmig_stream_channel_stats(lmtrack_of(tracker)->stream, channel, stats);
}

static void lmtrack_free(struct kmig_tracker *tracker)
{
	struct lmtrack *lmtrack = lmtrack_of(tracker);

	/* Tracking cannot stop while a stream sends. */
	kmig_stream_free(lmtrack->stream);
	for (unsigned int i = 0; i < lmtrack->tracked; i++)
		kmig_region_track_stop(tracker->config.regions[i]);
	free(lmtrack);
}

static const struct kmig_tracker_ops lmtrack_ops = {
	.name = "lmtrack",
	.start = lmtrack_start,
	.add_channel = lmtrack_add_channel,
	.send = lmtrack_send,
	.fd = lmtrack_fd,
	.wait = lmtrack_wait,
	.cancel = lmtrack_cancel,
	.peek = lmtrack_peek,
	.held = lmtrack_held,
	.channel_stats = lmtrack_channel_stats,
	.free = lmtrack_free,
};

int kmig_tracker_new_lmtrack(const struct kmig_tracker_config *config, struct kmig_tracker **out)
{
	struct lmtrack *lmtrack = calloc(1, sizeof(*lmtrack));

	if (!lmtrack)
		return kmig_fail(config->ctx, -ENOMEM, "tracker: out of memory");
	lmtrack->tracker = (struct kmig_tracker){ .ops = &lmtrack_ops, .config = *config };
	*out = &lmtrack->tracker;
	return 0;
}
