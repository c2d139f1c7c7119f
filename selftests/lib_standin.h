/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A tracker that tracks and sends nothing, in place of lib/tracker.c: for tests of what a source's
 * engine says and hears. A round ends as soon as no channel waits for a window.
 */
#ifndef LIB_STANDIN_H
#define LIB_STANDIN_H

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../lib/tracker.h"

static struct {
	bool no_rdma;			/* none can be set up */
	unsigned int channels, rdma, windows;	/* added, of them over RDMA; windows that were set */
	uint64_t wanting;		/* a bit for each channel that waits for a window */
	uint32_t want_region;		/* this one */
	uint64_t want_first;
	uint64_t lost, dropped;		/* a bit for each channel */
	uint64_t address;		/* of the last window that was set */
	uint32_t rkey;
	_Atomic uint32_t round;		/* the last that was begun */
	bool sending, cancelled;
	int event_fd;
	void (*wrong)(const char *what);	/* what no engine may do */
} standin;

static bool standin_has(uint32_t channel)
{
	if (channel >= standin.channels)
		standin.wrong("a channel that there is not");
	return channel < standin.channels;
}

static void standin_look(void)
{
	if (standin.lost || standin.wanting || standin.sending)
		eventfd_write(standin.event_fd, 1);
}

static int standin_start(struct kmig_tracker *tracker)
{
	(void)tracker;
	return 0;
}

static int standin_add_channel(struct kmig_tracker *tracker, int sock)
{
	(void)tracker, (void)sock;
	standin.channels++;
	return 0;
}

static int standin_add_rdma(struct kmig_tracker *tracker, const struct kmig_rdma_peer *peer)
{
	(void)tracker;
	if (!peer->window_pages || peer->window_pages % LMTRACK_CHUNK_PAGES)
		standin.wrong("windows of no chunks");
	if (standin.no_rdma)
		return -EPROTONOSUPPORT;
	standin.channels++;
	standin.rdma++;
	return 0;
}

static int standin_wanted(struct kmig_tracker *tracker, uint32_t channel, uint32_t *region, uint64_t *first)
{
	(void)tracker;
	if (!standin_has(channel) || !(standin.wanting >> channel & 1))
		return -EAGAIN;
	*region = standin.want_region;
	*first = standin.want_first;
	return 0;
}

static int standin_window(struct kmig_tracker *tracker, uint32_t channel, uint32_t region, uint64_t first,
			  uint64_t address, uint32_t rkey)
{
	(void)tracker;
	if (!standin_has(channel) || region != standin.want_region || first != standin.want_first)
		standin.wrong("a window that nobody wants");
	if (standin.dropped >> channel & 1)
		standin.wrong("a window for a channel that was dropped");
	standin.wanting &= ~(1ULL << channel);
	standin.windows++;
	standin.address = address;
	standin.rkey = rkey;
	standin_look();
	return 0;
}

static int standin_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what, unsigned int flags)
{
	(void)tracker, (void)what, (void)flags;
	if (standin.sending || round != standin.round + 1)
		standin.wrong("a round out of turn");
	standin.round = round;
	standin.sending = true;
	standin_look();
	return 0;
}

static int standin_fd(const struct kmig_tracker *tracker)
{
	(void)tracker;
	return standin.event_fd;
}

static uint64_t standin_lost(struct kmig_tracker *tracker)
{
	(void)tracker;
	return standin.lost;
}

static int standin_drop(struct kmig_tracker *tracker, uint32_t channel, int *why)
{
	(void)tracker;
	if (!standin_has(channel) || standin.dropped >> channel & 1)
		standin.wrong("a channel dropped twice");
	standin.lost &= ~(1ULL << channel);
	standin.wanting &= ~(1ULL << channel);
	standin.dropped |= 1ULL << channel;
	*why = -ECONNRESET;
	return 0;
}

static int standin_replace(struct kmig_tracker *tracker, uint32_t channel, int sock)
{
	(void)tracker, (void)sock;
	if (!standin_has(channel) || !(standin.dropped >> channel & 1) || standin.sending)
		standin.wrong("a channel replaced that was not dropped, or in a round");
	standin.dropped &= ~(1ULL << channel);
	return 0;
}

static int standin_wait(struct kmig_tracker *tracker, struct kmig_round *round)
{
	eventfd_t count;

	(void)tracker;
	eventfd_read(standin.event_fd, &count);
	if (!standin.sending || standin.wanting)
		return -ETIMEDOUT;
	standin.sending = false;
	*round = (struct kmig_round){ .round = standin.round, .channel = -1, .duration_ns = 1000000, .pages = 1 };
	return 0;
}

static void standin_times(struct kmig_tracker *tracker, struct kmig_round_times *times)
{
	(void)tracker;
	*times = (struct kmig_round_times){ .wire_ns = 1000000 };
}

static void standin_cancel(struct kmig_tracker *tracker)
{
	(void)tracker;
	standin.cancelled = true;
}

static int standin_peek(struct kmig_tracker *tracker, unsigned int region, uint64_t *bitmap, uint64_t *found)
{
	(void)tracker, (void)region, (void)bitmap;
	*found = 0;
	return 0;
}

static uint64_t standin_held(struct kmig_tracker *tracker)
{
	(void)tracker;
	return 0;
}

static int standin_stats(struct kmig_tracker *tracker, uint32_t channel, struct kmig_channel_stats *stats)
{
	(void)tracker, (void)channel;
	*stats = (struct kmig_channel_stats){ 0 };
	return 0;
}

static int standin_cap(struct kmig_tracker *tracker, uint64_t bytes_per_second)
{
	(void)tracker, (void)bytes_per_second;
	return 0;
}

static void standin_free(struct kmig_tracker *tracker)
{
	close(standin.event_fd);
	free(tracker);
}

static const struct kmig_tracker_ops standin_ops = {
	.name = "stand-in",
	.start = standin_start,
	.add_channel = standin_add_channel,
	.add_rdma = standin_add_rdma,
	.rdma_wanted = standin_wanted,
	.rdma_window = standin_window,
	.send = standin_send,
	.fd = standin_fd,
	.lost = standin_lost,
	.drop_channel = standin_drop,
	.replace_channel = standin_replace,
	.wait = standin_wait,
	.times = standin_times,
	.cancel = standin_cancel,
	.peek = standin_peek,
	.held = standin_held,
	.channel_stats = standin_stats,
	.free = standin_free,
	.cap = standin_cap,
};

int kmig_tracker_new(const struct kmig_tracker_config *config, struct kmig_tracker **tracker)
{
	*tracker = calloc(1, sizeof(**tracker));
	(*tracker)->ops = &standin_ops;
	(*tracker)->config = *config;
	standin.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return 0;
}

int kmig_tracker_accepts(enum kmig_tracker_kind kind, struct kmig_region *const *regions, unsigned int count,
			 const struct kmig_region *region)
{
	(void)kind, (void)regions, (void)count, (void)region;
	return 0;
}

#endif /* LIB_STANDIN_H */
