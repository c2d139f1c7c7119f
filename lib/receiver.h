/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The receiving end of the data channels: a thread for each, straight into guest memory. */
#ifndef KMIG_RECEIVER_H
#define KMIG_RECEIVER_H

#include "digest.h"
#include "private.h"
#include "wire.h"

struct kmig_receiver;

struct kmig_receiver_channel {
	struct kmig_receiver *receiver;
	uint32_t number;
	int fd;
	pthread_t thread;
	bool runs;
	uint64_t seq;			/* frames so far */
	uint64_t round_pages;		/* in the round under way */
	_Atomic uint32_t ended;		/* the last round whose end was seen */
	_Atomic uint64_t data_pages, zero_pages, bytes;
	/* Written once by the thread before @failed is set, read after. */
	int error;
	char text[192];
	_Atomic bool failed;
};

/*
 * Chunks are bound to the channel they first came on, so what is kept for the pages of a chunk
 * is only touched by that channel's thread. @last_round is read by the digest workers.
 */
struct kmig_receiver {
	struct kmig_ctx *ctx;
	const struct kmig_chunks *chunks;
	uint32_t page_size;
	uint64_t stream;
	unsigned int channels;
	bool closed;			/* nothing is stored any more */
	_Atomic uint32_t *last_round;	/* per chunk: the last round that stored into it, 0: none */
	_Atomic uint8_t *owner;		/* per chunk: its channel's number plus 1, 0: none yet */
	uint64_t *stored[LMTRACK_REGIONS_MAX];	/* bit per page: it may be no hole */
	_Atomic uint32_t acked;		/* rounds stored whole; the next may come */
	int event_fd;			/* readable when a channel ended a round or failed */
	struct kmig_receiver_channel channel[LMTRACK_CHANNELS_MAX];
};

/* Takes the @sockets over, also on failure. The regions are mapped and empty. */
int kmig_receiver_start(struct kmig_receiver *receiver, struct kmig_ctx *ctx, const struct kmig_chunks *chunks,
			uint64_t stream, const int *sockets, unsigned int channels);
/*
 * End the channels: on return nothing is stored any more, and what was stored after the last
 * acknowledged round shows in @last_round. The rest stays until kmig_receiver_stop().
 */
void kmig_receiver_close(struct kmig_receiver *receiver);
void kmig_receiver_stop(struct kmig_receiver *receiver);
/* Is the round after the last acknowledged one stored whole? Resets the event. */
bool kmig_receiver_round_done(struct kmig_receiver *receiver);
/* The first failure of a channel before it was closed, with its message in the context; 0: none. */
int kmig_receiver_check(struct kmig_receiver *receiver);

#endif /* KMIG_RECEIVER_H */
