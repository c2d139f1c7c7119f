/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's half of the final check. */
#ifndef KMIG_VERIFY_H
#define KMIG_VERIFY_H

#include "control.h"
#include "digest.h"
#include "receiver.h"
#include "workers.h"

struct kmig_verify_entry {
	uint64_t digest;
	uint32_t round;			/* 0: no digest was received */
	uint8_t state;			/* enum in verify.c */
};

/*
 * A digest holds as long as no round after the one it names has stored into the chunk. It is
 * compared when that round is stored whole, off the hot path; whether it still holds is asked
 * again at the end, so a chunk that changes later costs nothing but the work done.
 */
struct kmig_verify {
	struct kmig_ctx *ctx;
	struct kmig_receiver *receiver;
	const struct kmig_chunks *chunks;
	pthread_mutex_t lock;		/* entries */
	struct kmig_verify_entry *entries;
	uint64_t *deferred;		/* of a round that is not stored whole yet; the engine's thread only */
	uint64_t received;
	struct kmig_workers workers;
};

int kmig_verify_start(struct kmig_verify *verify, struct kmig_receiver *receiver);
void kmig_verify_stop(struct kmig_verify *verify);
/* A DIGESTS message. */
int kmig_verify_add(struct kmig_verify *verify, const struct kmig_message *message);
/* A round has been stored whole: what waited for it can be compared. */
void kmig_verify_round_done(struct kmig_verify *verify);
/*
 * Tell the source which chunks lack a digest that holds; @lacking is their number.
 * @all_compared: nothing is left to compare, so a digest that was not compared is none.
 */
int kmig_verify_send_unverified(struct kmig_verify *verify, struct kmig_control *control, bool all_compared,
				uint64_t *lacking);
/* With nothing left to compare, after the last round: EBADMSG when a digest differs. */
int kmig_verify_outcome(struct kmig_verify *verify, uint64_t *equal);

#endif /* KMIG_VERIFY_H */
