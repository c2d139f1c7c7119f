/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The sender in user space: what the kernel's stream does, for trackers that are not the
 * kernel's. A thread for each channel comes for one chunk after the other, has each harvested by the
 * tracker, and sends what that gives at once.
 */
#ifndef KMIG_SENDER_H
#define KMIG_SENDER_H

#include "tracker.h"

enum kmig_harvest_mode {
	KMIG_HARVEST_LOOK,	/* what is dirty; nothing changes */
	KMIG_HARVEST_DIRTY,	/* take that */
	KMIG_HARVEST_ALL,	/* take all that exists, and what the destination has too much */
};

/* One chunk; the bitmaps have a bit for each of its pages. */
struct kmig_harvest {
	/* asked */
	enum kmig_harvest_mode mode;
	unsigned int region;
	uint64_t chunk;
	uint64_t sent[KMIG_CHUNK_WORDS];	/* of these the destination may have something */
	uint64_t hold[KMIG_CHUNK_WORDS];	/* to be left as they are */
	/* answered */
	uint64_t take[KMIG_CHUNK_WORDS];	/* to be sent */
	uint64_t exists[KMIG_CHUNK_WORDS];	/* pages that are there; others in @take are holes */
};

/*
 * Called by the sender's threads, for each chunk by one of them; to look, by the engine's at any time.
 * From its return on, a write to what was taken is noticed anew: only then is memory read. 0 or
 * a negative errno, with the message set.
 */
typedef int (*kmig_harvest_fn)(struct kmig_tracker *tracker, struct kmig_harvest *harvest);

/* Sets @tracker->sender. */
int kmig_sender_new(struct kmig_tracker *tracker, kmig_harvest_fn harvest);
/* Cancels, and waits for the threads. Harmless when there is none. */
void kmig_sender_free(struct kmig_tracker *tracker);

/* These are the functions of the same names in the tracker's table. */
int kmig_sender_add_channel(struct kmig_tracker *tracker, int sock);
uint64_t kmig_sender_lost(struct kmig_tracker *tracker);
int kmig_sender_drop_channel(struct kmig_tracker *tracker, uint32_t channel, int *why);
int kmig_sender_replace_channel(struct kmig_tracker *tracker, uint32_t channel, int sock);
int kmig_sender_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what, unsigned int flags);
int kmig_sender_width(struct kmig_tracker *tracker, unsigned int channels);
int kmig_sender_fd(const struct kmig_tracker *tracker);
int kmig_sender_wait(struct kmig_tracker *tracker, struct kmig_round *round);
void kmig_sender_times(struct kmig_tracker *tracker, struct kmig_round_times *times);
void kmig_sender_cancel(struct kmig_tracker *tracker);
int kmig_sender_peek(struct kmig_tracker *tracker, unsigned int region, uint64_t *bitmap, uint64_t *found);
bool kmig_sender_sends(const struct kmig_tracker *tracker);	/* a round has not ended */
uint64_t kmig_sender_held(struct kmig_tracker *tracker);	/* none: it is not known here */
int kmig_sender_channel_stats(struct kmig_tracker *tracker, uint32_t channel, struct kmig_channel_stats *stats);
int kmig_sender_cap(struct kmig_tracker *tracker, uint64_t bytes_per_second);
int kmig_sender_hold(struct kmig_tracker *tracker, unsigned int region, const uint64_t *bitmap);

/* The pages of a region that a round of this kind leaves out, whole chunks; NULL: none. */
const uint64_t *kmig_sender_left_out(const struct kmig_tracker *tracker, unsigned int region,
				     enum kmig_send_what what, unsigned int flags);

/*
 * What is to be sent, by what is known to be @dirty and what @exists: holes only where the
 * destination may have something; discarded pages are dirty.
 */
void kmig_harvest_select(struct kmig_tracker *tracker, struct kmig_harvest *harvest,
			 const uint64_t dirty[KMIG_CHUNK_WORDS]);

#endif /* KMIG_SENDER_H */
