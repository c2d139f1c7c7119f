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
	const int *listen_fds;		/* the caller's */
	unsigned int listens;
	int abort_fd;
	uint32_t patience_ms;		/* with one who has proven nothing */
	uint32_t page_size;
	const void *secret;
	size_t secret_len;
	uint64_t shut_until_ns;		/* nobody can be taken in for want of descriptors or memory */
	bool told_shut;
	struct kmig_guest guests[KMIG_ACCEPTOR_SLOTS];
};

void kmig_acceptor_init(struct kmig_acceptor *acceptor, struct kmig_ctx *ctx, const int *listen_fds,
			unsigned int listens, int abort_fd, uint32_t timeout_ms, uint32_t page_size, const void *secret, size_t secret_len);
/* Turn all away who still wait. */
void kmig_acceptor_close(struct kmig_acceptor *acceptor);

/* Wait for one who proves the secret: returns the socket and the session's keys. */
int kmig_acceptor_source(struct kmig_acceptor *acceptor, struct kmig_session *session);

/*
 * Take in those of @count data channels that are not @there, a bit for each: the socket into
 * @sockets at its number, and into @attempts how many connections were made for it before. Looks at
 * who waits now and returns a bit for each that has come; the caller polls with
 * kmig_acceptor_poll(), or for what kmig_acceptor_fds() says.
 */
uint64_t kmig_acceptor_channels(struct kmig_acceptor *acceptor, const struct kmig_session *session, uint64_t stream,
				unsigned int count, uint64_t there, int *sockets, uint64_t *attempts);
/* What to poll for: KMIG_ACCEPTOR_FDS entries. */
#define KMIG_ACCEPTOR_FDS (KMIG_ACCEPTOR_SLOTS + KMIG_LISTEN_MAX)
void kmig_acceptor_fds(const struct kmig_acceptor *acceptor, struct pollfd *fds);
/* Wait for anything to happen at the door or on @fd; at most @wait_ms. */
int kmig_acceptor_poll(struct kmig_acceptor *acceptor, int fd, int wait_ms);

#endif /* KMIG_ACCEPTOR_H */
