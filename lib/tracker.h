/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Trackers: who knows which pages were written, and sends them.
 *
 * The source engine works through this interface only. A tracker notes writes from
 * kmig_tracker_start() on, sends rounds over the channels it was given, each on threads that
 * the engine does not see, and tells what is dirty. It belongs to the engine's thread.
 *
 * What every tracker holds to:
 *
 * - A write that happened before a page was read for a round is in what is sent; one that
 *   happened later is found dirty afterwards. A range punched out is dirty if the destination
 *   may have something there.
 * - A round sends a page over one channel. Which it is, a round decides anew: so the next begins only
 *   when the destination has acknowledged the last, or a newer copy could land before an older one.
 * - A channel whose connection breaks is lost, and no more: the round goes on over the others. What
 *   it has sent in the last round begun is dirty again when it was dropped.
 * - Once a round has failed otherwise or was cancelled, nothing is ever sent again: what was
 *   harvested and not delivered is known to nobody.
 */
#ifndef KMIG_TRACKER_H
#define KMIG_TRACKER_H

#include "private.h"

/* What a tracker is made of; the arrays have to outlive it. */
struct kmig_tracker_config {
	struct kmig_ctx *ctx;
	enum kmig_tracker_kind kind;
	struct kmig_region **regions;	/* their place is their number in the frames */
	unsigned int count;
	uint64_t stream;		/* in the frames */
	bool no_zero_detection;
	bool allow_pinned;
	int abort_fd;			/* ends what start waits for */
	/* The VMM's, for KMIG_TRACKER_EXTERNAL: see struct kmig_source_ops. */
	int (*track)(bool on, void *data);
	int (*dirty)(unsigned int region, uint64_t first_page, uint64_t pages, uint64_t *bitmap, void *data);
	void *data;
};

/* A round goes out whole with this, held-back pages included; else without them. */
#define KMIG_SEND_HELD (1u << 0)

#define KMIG_TRACKER_THREADS 16

/* What the guest felt. A tracker that cannot know leaves zeroes. */
struct kmig_tracker_stats {
	uint64_t write_faults, fault_ns;
	uint64_t stuns, stun_ns, stun_max_ns;
	unsigned int threads;		/* entries in @thread, those who were stunned longest */
	struct kmig_tracker_thread {
		pid_t id;
		uint64_t stuns, stun_ns;
	} thread[KMIG_TRACKER_THREADS];
};

struct kmig_tracker {
	const struct kmig_tracker_ops *ops;
	struct kmig_tracker_config config;
	struct kmig_sender *sender;	/* sender.h; not of those that bring their own */
};

/*
 * All return 0 or a negative errno, with the message set unless said otherwise. Those from
 * @stun on may be missing: the engine then gets EOPNOTSUPP, without a message.
 */
struct kmig_tracker_ops {
	const char *name;
	/* From its return on every write is noticed; all that exists is dirty. Aborted: ECANCELED. */
	int (*start)(struct kmig_tracker *tracker);
	/* A connected, blocking socket, which stays the caller's. Before the first round only. */
	int (*add_channel)(struct kmig_tracker *tracker, int sock);
	/*
	 * Without messages. Over RDMA, also before the first round only; EOPNOTSUPP where it is missing, as what follows
	 * it is. While a channel waits for a window, fd has POLLPRI; EAGAIN: it waits for none.
	 */
	int (*add_rdma)(struct kmig_tracker *tracker, const struct kmig_rdma_peer *peer);
	int (*rdma_wanted)(struct kmig_tracker *tracker, uint32_t channel, uint32_t *region, uint64_t *first);
	int (*rdma_window)(struct kmig_tracker *tracker, uint32_t channel, uint32_t region, uint64_t first,
			   uint64_t address, uint32_t rkey);
	/* Begin a round; returns at once. */
	int (*send)(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what, unsigned int flags);
	/*
	 * POLLIN: the round has ended. POLLIN or POLLPRI: a channel is lost that was not dropped, or
	 * waits for a window.
	 */
	int (*fd)(const struct kmig_tracker *tracker);
	/* A bit for each of those. */
	uint64_t (*lost)(struct kmig_tracker *tracker);
	/*
	 * At any time, and for a channel that is not lost as well: shut it down, wait until nothing is
	 * sent on it any more, and make dirty what it has sent in the round. The socket may be closed
	 * then. @why: how it was lost, a negative errno; ECANCELED: it was not. EPIPE: the tracker has
	 * failed, of which the end of the round tells. No round begins while
	 * a lost channel was not dropped, or none is left (EPIPE).
	 */
	int (*drop_channel)(struct kmig_tracker *tracker, uint32_t channel, int *why);
	/* Another connection for one that was dropped, between two rounds. */
	int (*replace_channel)(struct kmig_tracker *tracker, uint32_t channel, int sock);
	/*
	 * What came of the round, losses apart; ETIMEDOUT or EINTR, without a message: it has not
	 * ended.
	 */
	int (*wait)(struct kmig_tracker *tracker, struct kmig_round *round);
	/* What the round that ended last, and was waited for, spent its time on. */
	void (*times)(struct kmig_tracker *tracker, struct kmig_round_times *times);
	/* Shut the channels down, and so end the round. */
	void (*cancel)(struct kmig_tracker *tracker);
	/*
	 * Set the bits of what is dirty, clear none, change nothing. @found: how many. Pages held
	 * back are among them.
	 */
	int (*peek)(struct kmig_tracker *tracker, unsigned int region, uint64_t *bitmap, uint64_t *found);
	/* Pages that harvests have left dirty because somebody held them for I/O, all told. */
	uint64_t (*held)(struct kmig_tracker *tracker);
	int (*channel_stats)(struct kmig_tracker *tracker, uint32_t channel, struct kmig_channel_stats *stats);
	/* Cancels, waits for the threads, stops tracking. */
	void (*free)(struct kmig_tracker *tracker);

	/*
	 * Let so many pages a second become dirty, in all regions together; 0: as many as will.
	 * @delay_us: no thread is delayed for longer at once; 0: as the tracker sees fit.
	 */
	int (*stun)(struct kmig_tracker *tracker, uint64_t pages_per_second, unsigned int delay_us);
	/*
	 * Pages of a region that rounds leave out, and leave dirty, until one is sent with
	 * KMIG_SEND_HELD. Replaces what was said before; NULL: none. Between rounds only.
	 */
	int (*hold)(struct kmig_tracker *tracker, unsigned int region, const uint64_t *bitmap);
	/*
	 * At any time: so many of the channels carry pages, also of the round under way, those with the
	 * lowest numbers; the others end each round with nothing. All of them, until this was said.
	 */
	int (*width)(struct kmig_tracker *tracker, unsigned int channels);
	/* Since the start. */
	int (*stats)(struct kmig_tracker *tracker, struct kmig_tracker_stats *stats);
	/*
	 * All channels together send so many bytes a second at most; 0: no cap. At any time after the
	 * start. EOPNOTSUPP, with the message set: it cannot.
	 */
	int (*cap)(struct kmig_tracker *tracker, uint64_t bytes_per_second);
};

/* Can @region be migrated from with this kind of tracker, beside the @count @regions there are? */
int kmig_tracker_accepts(enum kmig_tracker_kind kind, struct kmig_region *const *regions, unsigned int count,
			 const struct kmig_region *region);
int kmig_tracker_pagemap_accepts(const struct kmig_region *region);

/* Nothing is tracked yet. */
int kmig_tracker_new(const struct kmig_tracker_config *config, struct kmig_tracker **tracker);
int kmig_tracker_new_lmtrack(const struct kmig_tracker_config *config, struct kmig_tracker **tracker);
int kmig_tracker_new_pagemap(const struct kmig_tracker_config *config, struct kmig_tracker **tracker);
int kmig_tracker_new_external(const struct kmig_tracker_config *config, struct kmig_tracker **tracker);

static inline int kmig_tracker_start(struct kmig_tracker *tracker)
{
	return tracker->ops->start(tracker);
}

static inline int kmig_tracker_add_channel(struct kmig_tracker *tracker, int sock)
{
	return tracker->ops->add_channel(tracker, sock);
}

static inline int kmig_tracker_add_rdma(struct kmig_tracker *tracker, const struct kmig_rdma_peer *peer)
{
	return tracker->ops->add_rdma ? tracker->ops->add_rdma(tracker, peer) : -EOPNOTSUPP;
}

static inline int kmig_tracker_rdma_wanted(struct kmig_tracker *tracker, uint32_t channel, uint32_t *region,
					   uint64_t *first)
{
	return tracker->ops->rdma_wanted(tracker, channel, region, first);
}

static inline int kmig_tracker_rdma_window(struct kmig_tracker *tracker, uint32_t channel, uint32_t region,
					   uint64_t first, uint64_t address, uint32_t rkey)
{
	return tracker->ops->rdma_window(tracker, channel, region, first, address, rkey);
}

static inline uint64_t kmig_tracker_lost(struct kmig_tracker *tracker)
{
	return tracker->ops->lost(tracker);
}

static inline int kmig_tracker_drop_channel(struct kmig_tracker *tracker, uint32_t channel, int *why)
{
	return tracker->ops->drop_channel(tracker, channel, why);
}

static inline int kmig_tracker_replace_channel(struct kmig_tracker *tracker, uint32_t channel, int sock)
{
	return tracker->ops->replace_channel(tracker, channel, sock);
}

static inline int kmig_tracker_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what,
				    unsigned int flags)
{
	return tracker->ops->send(tracker, round, what, flags);
}

static inline int kmig_tracker_fd(const struct kmig_tracker *tracker)
{
	return tracker->ops->fd(tracker);
}

static inline int kmig_tracker_wait(struct kmig_tracker *tracker, struct kmig_round *round)
{
	return tracker->ops->wait(tracker, round);
}

static inline void kmig_tracker_times(struct kmig_tracker *tracker, struct kmig_round_times *times)
{
	tracker->ops->times(tracker, times);
}

static inline void kmig_tracker_cancel(struct kmig_tracker *tracker)
{
	tracker->ops->cancel(tracker);
}

static inline int kmig_tracker_peek(struct kmig_tracker *tracker, unsigned int region, uint64_t *bitmap,
				    uint64_t *found)
{
	return tracker->ops->peek(tracker, region, bitmap, found);
}

static inline uint64_t kmig_tracker_held(struct kmig_tracker *tracker)
{
	return tracker->ops->held(tracker);
}

static inline int kmig_tracker_channel_stats(struct kmig_tracker *tracker, uint32_t channel,
					     struct kmig_channel_stats *stats)
{
	return tracker->ops->channel_stats(tracker, channel, stats);
}

static inline void kmig_tracker_free(struct kmig_tracker *tracker)
{
	if (tracker)
		tracker->ops->free(tracker);
}

static inline int kmig_tracker_stun(struct kmig_tracker *tracker, uint64_t pages_per_second,
				    unsigned int delay_us)
{
	return tracker->ops->stun ? tracker->ops->stun(tracker, pages_per_second, delay_us) : -EOPNOTSUPP;
}

static inline int kmig_tracker_hold(struct kmig_tracker *tracker, unsigned int region, const uint64_t *bitmap)
{
	return tracker->ops->hold ? tracker->ops->hold(tracker, region, bitmap) : -EOPNOTSUPP;
}

static inline int kmig_tracker_width(struct kmig_tracker *tracker, unsigned int channels)
{
	return tracker->ops->width ? tracker->ops->width(tracker, channels) : -EOPNOTSUPP;
}

static inline int kmig_tracker_stats(struct kmig_tracker *tracker, struct kmig_tracker_stats *stats)
{
	return tracker->ops->stats ? tracker->ops->stats(tracker, stats) : -EOPNOTSUPP;
}

static inline int kmig_tracker_cap(struct kmig_tracker *tracker, uint64_t bytes_per_second)
{
	return tracker->ops->cap(tracker, bytes_per_second);
}

#endif /* KMIG_TRACKER_H */
