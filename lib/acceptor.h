/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's door: strangers wait outside, each in a small slot and not for long. */
#ifndef KMIG_ACCEPTOR_H
#define KMIG_ACCEPTOR_H

#include <poll.h>

#include "auth.h"
#include "private.h"

#define KMIG_ACCEPTOR_SLOTS 64
/* The most that is read of anyone who has not proven the secret: header and HELLO. */
#define KMIG_ACCEPTOR_BYTES 128

struct kmig_guest {
	int fd;				/* -1: the slot is free */
	uint64_t since_ns;
	size_t have;
	uint8_t bytes[KMIG_ACCEPTOR_BYTES];
	bool greeted;			/* HELLOs were exchanged, the proof is next */
	struct kmig_transcript transcript;
};

struct kmig_acceptor {
	struct kmig_ctx *ctx;
	int listen_fd;
	int abort_fd;
	uint32_t patience_ms;		/* with one who has proven nothing */
	uint32_t page_size;
	const void *secret;
	size_t secret_len;
	struct kmig_guest guests[KMIG_ACCEPTOR_SLOTS];
};

void kmig_acceptor_init(struct kmig_acceptor *acceptor, struct kmig_ctx *ctx, int listen_fd, int abort_fd,
			uint32_t timeout_ms, uint32_t page_size, const void *secret, size_t secret_len);
/* Turn all away who still wait. The listening socket stays the caller's. */
void kmig_acceptor_close(struct kmig_acceptor *acceptor);

/* Wait for one who proves the secret: returns the socket and the session's keys. */
int kmig_acceptor_source(struct kmig_acceptor *acceptor, struct kmig_session *session);

/*
 * Take the data channels in, each into @sockets at its number (-1: not there yet). Looks at
 * who waits now and returns how many are there; the caller polls with kmig_acceptor_poll().
 */
int kmig_acceptor_channels(struct kmig_acceptor *acceptor, const struct kmig_session *session, uint64_t stream,
			   int *sockets, unsigned int count);
/* Wait for anything to happen at the door or on @fd; at most @wait_ms. */
int kmig_acceptor_poll(struct kmig_acceptor *acceptor, int fd, int wait_ms);

#endif /* KMIG_ACCEPTOR_H */
