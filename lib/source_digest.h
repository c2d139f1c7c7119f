/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The source's half of the final check. */
#ifndef KMIG_SOURCE_DIGEST_H
#define KMIG_SOURCE_DIGEST_H

#include "control.h"
#include "digest.h"
#include "workers.h"

/*
 * What a digest is worth: taken after round @acked was acknowledged, it covers every page that
 * was dirty in that round or before. If the chunk is written afterwards, a later round sends
 * it, and the destination drops the digest; so nothing here needs to know when it was written.
 *
 * @wanted and @coming belong to the engine's thread, the batch to whoever holds @lock.
 */
struct kmig_source_digest {
	struct kmig_ctx *ctx;
	struct kmig_control *control;
	struct kmig_chunks chunks;
	struct kmig_workers workers;
	uint64_t *coming;		/* named by UNVERIFIED since the last ROUND_ACK or NEED */
	uint64_t *wanted;		/* lack a digest, as of that */
	uint64_t *taken;		/* a digest was taken of them at least once */
	uint64_t *dirty_chunks;		/* scratch */
	uint64_t *frozen;		/* sent in @frozen_round at the latest, memory being at rest */
	_Atomic uint32_t acked, frozen_round;
	_Atomic uint64_t sent;		/* entries */
	_Atomic int error;		/* negative errno: some could not be sent */
	uint64_t compared;		/* entries the destination has compared, or found void */
	_Atomic uint64_t busy_ns, digested;	/* for the rate */
	pthread_mutex_t lock;
	unsigned int batched;
	struct lmtrack_wire_digest batch[KMIG_WIRE_DIGESTS_MAX];
};

int kmig_source_digest_start(struct kmig_source_digest *digest, struct kmig_ctx *ctx, struct kmig_control *control,
			     struct kmig_region **regions, unsigned int count);
void kmig_source_digest_stop(struct kmig_source_digest *digest);
/* An UNVERIFIED or COMPARED message. */
int kmig_source_digest_message(struct kmig_source_digest *digest, const struct kmig_message *message);
/* @round was acknowledged; what UNVERIFIED named before is what it lacks. */
void kmig_source_digest_acked(struct kmig_source_digest *digest, uint32_t round);
/*
 * Begin to digest what lacks one and is not dirty now; @dirty has a bitmap of pages for each
 * region. Returns the number of chunks begun.
 */
uint64_t kmig_source_digest_pass(struct kmig_source_digest *digest, uint64_t *const *dirty);
/* Memory is at rest, what is @dirty is sent in @round at the latest: digest that and all that lacks one. */
void kmig_source_digest_freeze(struct kmig_source_digest *digest, uint64_t *const *dirty, uint32_t round);
/* The guest runs again. What was digested holds as any digest does: until its chunk is sent again. */
void kmig_source_digest_thaw(struct kmig_source_digest *digest);
/* The destination answered NEED: digest what it named, the guest being paused. */
void kmig_source_digest_need(struct kmig_source_digest *digest);
/* Why digests could not be sent, which has its message; 0. */
int kmig_source_digest_error(const struct kmig_source_digest *digest);
/* Everything that was begun has been sent; and has been compared? */
bool kmig_source_digest_sent(struct kmig_source_digest *digest);
bool kmig_source_digest_compared(struct kmig_source_digest *digest);
/* Chunks in which something is dirty: those that are left for the blackout. */
uint64_t kmig_source_digest_dirty(struct kmig_source_digest *digest, uint64_t *const *dirty);
/* Nanoseconds that digesting so many chunks takes in the blackout, by what was measured. */
uint64_t kmig_source_digest_cost(struct kmig_source_digest *digest, uint64_t chunks);

#endif /* KMIG_SOURCE_DIGEST_H */
