/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The control connection once both sides have proven themselves. */
#ifndef KMIG_CONTROL_H
#define KMIG_CONTROL_H

#include <pthread.h>

#include "auth.h"
#include "private.h"
#include "wire.h"

/*
 * Any thread may send: @send_lock keeps messages whole and their numbers in order. Only the
 * engine's thread receives.
 */
struct kmig_control {
	struct kmig_ctx *ctx;
	const char *peer;		/* "source" or "destination", for messages */
	int fd;
	_Atomic int abort_fd;		/* ends every wait; -1: nothing does any more */
	uint32_t timeout_ms;

	pthread_mutex_t send_lock;
	uint8_t send_key[KMIG_KEY_SIZE];
	uint64_t sent;
	bool aborted;			/* ABORT was sent: the peer is given time to read it */
	bool broken;			/* a message may have left half: nothing more can be sent */

	uint8_t recv_key[KMIG_KEY_SIZE];
	uint64_t received;
	uint64_t heard_ns;		/* when the peer was last heard */
	struct lmtrack_wire_message header;
	uint8_t *body;
	size_t have;			/* bytes of header and body read so far */
	bool peer_aborted;
	uint32_t abort_flags;

	pthread_t keepalive;
	bool keepalive_runs;
	pthread_mutex_t stop_lock;
	pthread_cond_t stop_cond;
	bool stop;
};

/*
 * Takes @fd over, also on failure. From here on a thread keeps telling the peer that we live,
 * so that the engine's may be busy in the VMM's functions.
 */
int kmig_control_open(struct kmig_control *control, struct kmig_ctx *ctx, const char *peer, int fd,
		      int abort_fd, uint32_t timeout_ms, const uint8_t *send_key, const uint8_t *recv_key);
void kmig_control_close(struct kmig_control *control);

/* 0 only when the whole message was given to the network. */
int kmig_control_send(struct kmig_control *control, uint16_t type, const void *body, size_t length);
/* Tell the peer that it is over; failures do not matter any more. */
void kmig_control_send_abort(struct kmig_control *control, int err, uint32_t flags, const char *text);

/*
 * The next message: 1, 0 when none is there yet or it was a keepalive, or an error: the peer's
 * ABORT is the errno it carries. Nothing is read beyond the message, so poll() tells whether
 * there is more. A loop takes no more than KMIG_CONTROL_BATCH at once: a peer that sends
 * without end must not keep the engine from its limits, or from an abort.
 */
#define KMIG_CONTROL_BATCH 64
int kmig_control_next(struct kmig_control *control, struct kmig_message *message);
/* Wait for a message of this type; any other is EPROTO. */
int kmig_control_expect(struct kmig_control *control, uint16_t type, struct kmig_message *message);
/* Likewise, and ETIMEDOUT at @deadline_ns, though the peer lives. */
int kmig_control_expect_until(struct kmig_control *control, uint16_t type, uint64_t deadline_ns,
			      struct kmig_message *message);
/* ETIMEDOUT when the peer has been silent for too long. */
int kmig_control_check_silence(struct kmig_control *control);
/* ECANCELED when an abort was asked for. */
int kmig_control_check_abort(struct kmig_control *control);
/*
 * @err is the failure of a connection: often the consequence of an abort by the peer, whose
 * message is there or on its way. Then the errno is the one it carries.
 */
int kmig_control_last_words(struct kmig_control *control, int err);
int kmig_control_unexpected(struct kmig_control *control, const struct kmig_message *message);

#endif /* KMIG_CONTROL_H */
