// SPDX-License-Identifier: LGPL-2.1-or-later
/* The tracker that is the module: its regions notice writes, its stream sends. */
#include "tracker.h"

#include <poll.h>
#include <sys/ioctl.h>

#define PIN_WAIT_MS 1000	/* how long pinned pages may be I/O in flight */
#define PIN_LOOK_MS 20

struct lmtrack {
	struct kmig_tracker tracker;
	struct kmig_tracker_ops ops;
	unsigned int tracked;		/* regions, with tracking on */
	struct kmig_stream *stream;
	uint64_t found[LMTRACK_REGIONS_MAX];	/* dirty pages of each region, when last looked */
	/* When tracking began: the module counts from the creation of the region. */
	uint64_t write_faults[LMTRACK_REGIONS_MAX], fault_ns[LMTRACK_REGIONS_MAX];
};

static struct lmtrack *lmtrack_of(const struct kmig_tracker *tracker)
{
	return (struct lmtrack *)tracker;
}

static int region_stats(struct kmig_region *region, struct lmtrack_region_stats *stats)
{
	*stats = (struct lmtrack_region_stats){ .size = sizeof(*stats) };
	if (ioctl(region->fd, LMTRACK_REGION_STATS, stats) < 0)
		return kmig_fail(region->ctx, -errno, "region %s: statistics: %s", region->name, strerror(errno));
	return 0;
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
	struct lmtrack_region_stats stats;
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
	err = region_stats(region, &stats);
	lmtrack->write_faults[lmtrack->tracked] = stats.write_faults;
	lmtrack->fault_ns[lmtrack->tracked] = stats.fault_ns;
	lmtrack->tracked++;
	return err;
}

static int stun_stats(struct kmig_region *region, struct lmtrack_stun_stats *stats, struct lmtrack_stun_thread *threads,
		      unsigned int count)
{
	*stats = (struct lmtrack_stun_stats){
		.size = sizeof(*stats),
		.threads = (uintptr_t)threads,
		.thread_count = count,
	};
	if (ioctl(region->fd, LMTRACK_STUN_STATS, stats) < 0)
		return kmig_fail(region->ctx, -errno, "region %s: statistics of stuns: %s", region->name, strerror(errno));
	return 0;
}

/* What this module cannot is not in the table: it may be older than the library. */
static void probe(struct lmtrack *lmtrack)
{
	struct lmtrack_hold_set none = { .size = sizeof(none), .flags = LMTRACK_HOLD_CLEAR_ALL };
	struct lmtrack_stun_stats stats = { .size = sizeof(stats) };

	if (ioctl(lmtrack->tracker.config.regions[0]->fd, LMTRACK_STUN_STATS, &stats) < 0 && errno == ENOTTY) {
		lmtrack->ops.stun = NULL;
		lmtrack->ops.stats = NULL;
	}
	if (ioctl(lmtrack->tracker.config.regions[0]->fd, LMTRACK_HOLD_SET, &none) < 0 && errno == ENOTTY)
		lmtrack->ops.hold = NULL;
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
	probe(lmtrack);
	opts.id = config->stream;
	opts.no_zero_detection = config->no_zero_detection;
	err = kmig_stream_create(config->ctx, &opts, &lmtrack->stream);
	/* As in probe(); what it says is what holds anyway. */
	if (!err && kmig_stream_width(lmtrack->stream, LMTRACK_CHANNELS_MAX) == -ENOTTY)
		lmtrack->ops.width = NULL;
	for (unsigned int i = 0; i < config->count && !err; i++)
		err = kmig_stream_add_region(lmtrack->stream, config->regions[i], i);
	return err;
}

static int lmtrack_add_channel(struct kmig_tracker *tracker, int sock)
{
	int number = kmig_stream_add_channel(lmtrack_of(tracker)->stream, sock);

	return number < 0 ? number : 0;
}

static int lmtrack_add_rdma(struct kmig_tracker *tracker, const struct kmig_rdma_peer *peer)
{
	int number = kmig_stream_add_rdma(lmtrack_of(tracker)->stream, peer);

	return number < 0 ? number : 0;
}

static int lmtrack_rdma_wanted(struct kmig_tracker *tracker, uint32_t channel, uint32_t *region, uint64_t *first)
{
	return kmig_stream_rdma_wanted(lmtrack_of(tracker)->stream, channel, region, first);
}

static int lmtrack_rdma_window(struct kmig_tracker *tracker, uint32_t channel, uint32_t region, uint64_t first,
			       uint64_t address, uint32_t rkey)
{
	return kmig_stream_rdma_window(lmtrack_of(tracker)->stream, channel, region, first, address, rkey);
}

static uint64_t lmtrack_lost(struct kmig_tracker *tracker)
{
	uint64_t lost;

	kmig_stream_lost(lmtrack_of(tracker)->stream, &lost);
	return lost;
}

static int lmtrack_drop_channel(struct kmig_tracker *tracker, uint32_t channel, int *why)
{
	return kmig_stream_drop_channel(lmtrack_of(tracker)->stream, channel, why);
}

static int lmtrack_replace_channel(struct kmig_tracker *tracker, uint32_t channel, int sock)
{
	return kmig_stream_replace_channel(lmtrack_of(tracker)->stream, channel, sock);
}

static int lmtrack_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what,
			unsigned int flags)
{
	/* A module that cannot hold pages back does not know the flag. */
	uint32_t held = flags & KMIG_SEND_HELD && lmtrack_of(tracker)->ops.hold ? LMTRACK_SEND_HELD : 0;

	return kmig_stream_send_flags(lmtrack_of(tracker)->stream, round, what, held);
}

static int lmtrack_fd(const struct kmig_tracker *tracker)
{
	return kmig_stream_fd(lmtrack_of(tracker)->stream);
}

static int lmtrack_wait(struct kmig_tracker *tracker, struct kmig_round *round)
{
	struct kmig_stream *stream = lmtrack_of(tracker)->stream;
	uint64_t lost = 0;
	int err = kmig_stream_wait(stream, 0, round);

	if (!err && round->error && round->channel >= 0)
		err = kmig_stream_lost(stream, &lost);
	/* A channel that was lost is another matter, and none that ends the stream. */
	if (!err && round->channel >= 0 && lost >> round->channel & 1)
		round->error = 0;
	return err;
}

static void lmtrack_times(struct kmig_tracker *tracker, struct kmig_round_times *times)
{
	*times = (struct kmig_round_times)KMIG_ROUND_TIMES_INIT;
	kmig_stream_times(lmtrack_of(tracker)->stream, times);
}

static void lmtrack_cancel(struct kmig_tracker *tracker)
{
	kmig_stream_cancel(lmtrack_of(tracker)->stream);
}

static int lmtrack_peek(struct kmig_tracker *tracker, unsigned int index, uint64_t *bitmap, uint64_t *found)
{
	struct kmig_region *region = tracker->config.regions[index];
	int err = kmig_region_dirty_get(region, false, 0, kmig_region_pages(region), bitmap, found);

	lmtrack_of(tracker)->found[index] = *found;
	return err;
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

/*
 * The module's ceiling is a region's. Each gets the part of the whole that it had of what was
 * dirty, and a little in any case. A thread that does nothing but dirty pages always gets one
 * page per longest delay: with many threads and a low ceiling the delay has to be longer, or
 * the ceiling would not hold.
 */
static int lmtrack_stun(struct kmig_tracker *tracker, uint64_t pages_per_second, unsigned int delay_us)
{
	const struct kmig_tracker_config *config = &tracker->config;
	struct lmtrack *lmtrack = lmtrack_of(tracker);
	uint64_t total = 0;
	int err = 0;

	for (unsigned int i = 0; i < config->count; i++)
		total += lmtrack->found[i] + 1;
	for (unsigned int i = 0; i < config->count && !err; i++) {
		double part = (lmtrack->found[i] + 1.0) / total;
		struct lmtrack_stun_set set = { .size = sizeof(set), .rate = pages_per_second * part };
		struct lmtrack_stun_stats stats;

		if (pages_per_second && !set.rate)
			set.rate = 1;
		if (set.rate > LMTRACK_STUN_RATE_MAX)
			set.rate = LMTRACK_STUN_RATE_MAX;
		if (set.rate) {
			err = stun_stats(config->regions[i], &stats, NULL, 0);
			if (err)
				break;
			set.max_delay_us = delay_us ? delay_us : LMTRACK_STUN_DELAY_DEFAULT_US;
			if (!delay_us && stats.threads_known * 1000000 / set.rate > set.max_delay_us)
				set.max_delay_us = LMTRACK_STUN_DELAY_MAX_US;
		}
		if (ioctl(config->regions[i]->fd, LMTRACK_STUN_SET, &set) < 0)
			err = kmig_fail(config->ctx, -errno, "region %s: a ceiling of %llu pages a second: %s", config->regions[i]->name,
					(unsigned long long)set.rate, strerror(errno));
	}
	return err;
}

static int lmtrack_hold(struct kmig_tracker *tracker, unsigned int index, const uint64_t *bitmap)
{
	struct kmig_region *region = tracker->config.regions[index];
	struct lmtrack_hold_set set = {
		.size = sizeof(set),
		.flags = LMTRACK_HOLD_CLEAR_ALL,
		.pages = bitmap ? kmig_region_pages(region) : 0,
		.bitmap = (uintptr_t)bitmap,
	};

	if (ioctl(region->fd, LMTRACK_HOLD_SET, &set) < 0)
		return kmig_fail(region->ctx, -errno, "region %s: holding pages back: %s", region->name, strerror(errno));
	return 0;
}

static int lmtrack_width(struct kmig_tracker *tracker, unsigned int channels)
{
	return kmig_stream_width(lmtrack_of(tracker)->stream, channels);
}

static int by_stun(const void *one, const void *other)
{
	const struct kmig_tracker_thread *a = one, *b = other;

	return (a->stun_ns < b->stun_ns) - (a->stun_ns > b->stun_ns);
}

static int lmtrack_stats(struct kmig_tracker *tracker, struct kmig_tracker_stats *out)
{
	struct kmig_tracker_thread all[LMTRACK_REGIONS_MAX * LMTRACK_STUN_THREADS];
	unsigned int known = 0, n;

	*out = (struct kmig_tracker_stats){ 0 };
	for (unsigned int i = 0; i < tracker->config.count; i++) {
		struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
		struct lmtrack_region_stats stats;
		struct lmtrack_stun_stats stun;
		int err;

		err = region_stats(tracker->config.regions[i], &stats);
		if (!err)
			err = stun_stats(tracker->config.regions[i], &stun, threads, LMTRACK_STUN_THREADS);
		if (err)
			return err;
		out->write_faults += stats.write_faults - lmtrack_of(tracker)->write_faults[i];
		out->fault_ns += stats.fault_ns - lmtrack_of(tracker)->fault_ns[i];
		out->stuns += stun.stuns;
		out->stun_ns += stun.total_ns;
		if (stun.longest_ns > out->stun_max_ns)
			out->stun_max_ns = stun.longest_ns;
		for (unsigned int j = 0; j < stun.thread_count; j++) {
			for (n = 0; n < known && all[n].id != (pid_t)threads[j].pid; n++)
				;
			if (n == known)
				all[known++] = (struct kmig_tracker_thread){ .id = threads[j].pid };
			all[n].stuns += threads[j].stuns;
			all[n].stun_ns += threads[j].stun_ns;
		}
	}
	qsort(all, known, sizeof(all[0]), by_stun);
	out->threads = known < KMIG_TRACKER_THREADS ? known : KMIG_TRACKER_THREADS;
	memcpy(out->thread, all, out->threads * sizeof(all[0]));
	return 0;
}

static int lmtrack_cap(struct kmig_tracker *tracker, uint64_t bytes_per_second)
{
	return kmig_stream_cap(lmtrack_of(tracker)->stream, bytes_per_second);
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
	.add_rdma = lmtrack_add_rdma,
	.rdma_wanted = lmtrack_rdma_wanted,
	.rdma_window = lmtrack_rdma_window,
	.lost = lmtrack_lost,
	.drop_channel = lmtrack_drop_channel,
	.replace_channel = lmtrack_replace_channel,
	.send = lmtrack_send,
	.fd = lmtrack_fd,
	.wait = lmtrack_wait,
	.times = lmtrack_times,
	.cancel = lmtrack_cancel,
	.peek = lmtrack_peek,
	.held = lmtrack_held,
	.channel_stats = lmtrack_channel_stats,
	.free = lmtrack_free,
	.stun = lmtrack_stun,
	.hold = lmtrack_hold,
	.width = lmtrack_width,
	.stats = lmtrack_stats,
	.cap = lmtrack_cap,
};

int kmig_tracker_new_lmtrack(const struct kmig_tracker_config *config, struct kmig_tracker **out)
{
	struct lmtrack *lmtrack = calloc(1, sizeof(*lmtrack));

	if (!lmtrack)
		return kmig_fail(config->ctx, -ENOMEM, "tracker: out of memory");
	lmtrack->ops = lmtrack_ops;
	lmtrack->tracker = (struct kmig_tracker){ .ops = &lmtrack->ops, .config = *config };
	*out = &lmtrack->tracker;
	return 0;
}
