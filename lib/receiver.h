/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The receiving end of the data channels: a thread for each, straight into guest memory. */
#ifndef KMIG_RECEIVER_H
#define KMIG_RECEIVER_H

#include "digest.h"
#include "private.h"
#include "rdma.h"
#include "wire.h"

struct kmig_receiver;

struct kmig_receiver_channel {
	struct kmig_receiver *receiver;
	uint32_t number;
	int fd;				/* -1: not over TCP, or not there */
	struct kmig_rdma_conn *rdma;	/* NULL likewise */
	pthread_t thread;
	bool runs;			/* it is there: neither lost and closed, nor never come */
	uint64_t attempt;		/* connections that were made for it before */
	_Atomic uint32_t from;		/* the first round it is in */
	uint64_t seq;			/* frames so far */
	uint64_t round_pages;		/* in the round under way */
	_Atomic uint32_t ended;		/* the last round whose end was seen */
	_Atomic uint64_t data_pages, zero_pages, bytes;
	_Atomic uint64_t written;	/* of @bytes, those that the device has put in their place */
	/* Written once by the thread before @failed is set, read after. */
	int error;
	bool lost;			/* the connection broke, nothing worse */
	char text[192];
	_Atomic bool failed;
	/* The engine's thread only. */
	bool told;			/* that it is lost */
	uint64_t seen_bytes, seen_ns;	/* when more had come */
};

/*
 * In a round a chunk is bound to the channel it first came on, so what is kept for its pages is only
 * touched by that channel's thread; the acknowledgement orders the threads of two rounds.
 * @last_round is read by the digest workers.
 */
struct kmig_receiver {
	struct kmig_ctx *ctx;
	const struct kmig_chunks *chunks;
	struct kmig_rdma *rdma;		/* whose the connections are; NULL: all is TCP */
	uint32_t page_size;
	uint64_t stream;
	unsigned int channels;
	bool closed;			/* nothing is stored any more */
	uint32_t begun;			/* the last round that is known to have begun */
	uint64_t ended_ns;		/* since then a channel has ended the round under way; 0: none has */
	_Atomic uint32_t *last_round;	/* per chunk: the last round that stored into it, 0: none */
	_Atomic uint64_t *owner;	/* per chunk: the last round that brought it (32 bits up) and the channel; 0: none */
	uint64_t *stored[LMTRACK_REGIONS_MAX];	/* bit per page: it may be no hole */
	_Atomic uint32_t acked;		/* rounds stored whole; the next may come */
	int event_fd;			/* readable when a channel ended a round or failed */
	struct kmig_receiver_channel channel[LMTRACK_CHANNELS_MAX];
};

/*
 * Takes the @sockets over, also on failure. A channel that has none is one of @rdma's, which stays
 * the caller's and has to be there until kmig_receiver_close(). The regions are mapped and empty.
 */
int kmig_receiver_start(struct kmig_receiver *receiver, struct kmig_ctx *ctx, const struct kmig_chunks *chunks,
			uint64_t stream, const int *sockets, unsigned int channels, struct kmig_rdma *rdma);
/*
 * End the channels: on return nothing is stored any more, and what was stored after the last
 * acknowledged round shows in @last_round. The rest stays until kmig_receiver_stop().
 */
void kmig_receiver_close(struct kmig_receiver *receiver);
void kmig_receiver_stop(struct kmig_receiver *receiver);
/*
 * Is the round after the last acknowledged one stored whole? So it is if it has begun and no channel
 * is left in it. Resets the event.
 */
bool kmig_receiver_round_done(struct kmig_receiver *receiver);
/* It is to be acknowledged: the next may come. */
void kmig_receiver_next_round(struct kmig_receiver *receiver);
/* The first failure of a channel before it was closed, with its message in the context; 0: none. */
int kmig_receiver_check(struct kmig_receiver *receiver);

/*
 * A channel whose connection broke, or which is silent for @timeout_ms while another has ended the
 * round: its number, once, and a negative errno; -1: none.
 */
int kmig_receiver_lost(struct kmig_receiver *receiver, uint32_t timeout_ms, int *why);
/*
 * The barrier: on return nothing of the channel is stored any more. @round: the last that the source
 * has begun. Harmless when it is not there. An error: what it sent was refused.
 */
int kmig_receiver_drop(struct kmig_receiver *receiver, uint32_t number, uint32_t round);
/* Another connection for one that is not there; takes @fd over. EAGAIN, without a message: not now. */
int kmig_receiver_join(struct kmig_receiver *receiver, uint32_t number, int fd, uint64_t attempt);
/* No channel is in the round to come: those that are there are in it. */
bool kmig_receiver_advance(struct kmig_receiver *receiver);

#endif /* KMIG_RECEIVER_H */
