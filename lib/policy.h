/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What to do next in a migration's pre-copy: another round, the blackout or the end; how far
 * the guest has to be slowed down, and how many pages may wait for the blackout. It only
 * computes: what it decides is carried out by the source engine.
 */
#ifndef KMIG_POLICY_H
#define KMIG_POLICY_H

#include "forecast.h"

struct kmig_policy_opts {
	uint64_t ram_bytes;
	uint32_t page_size;
	uint32_t downtime_ms;
	uint32_t max_rounds;
	uint64_t trip_ns;		/* what a round takes beside its pages, before one was measured */
	uint64_t max_time_ms;		/* 0: none */
	enum kmig_timeout_action on_timeout;
	double convergence;
	double stun_floor;		/* pages a second */
	bool can_stun, can_hold;
};

enum kmig_decision {
	KMIG_GO_ON,	/* send another round */
	KMIG_PAUSE,	/* what is left fits, or the switchover was asked for */
	KMIG_GIVE_UP,	/* the limits cannot be kept */
};

struct kmig_policy {
	struct kmig_policy_opts opts;
	struct kmig_curve left;		/* what rounds leave dirty when the guest is not slowed down */
	double rate;			/* bytes a second, while sending */
	bool rough;			/* it is of rounds too small to tell */
	uint64_t cap;			/* of the rate; 0: none */
	uint64_t trip_ns;		/* what a round takes beside its pages */
	uint64_t scan_ns;		/* of the last round, but the first pass: the wire waited for pages to be found */
	uint64_t digest_ns;		/* that digests will take in the blackout, by the engine's estimate */
	uint32_t rounds;

	double ceiling;			/* pages a second that may be dirtied; 0: as the guest likes */
	uint64_t hold_budget;		/* pages */
	bool holding;			/* some are held back */
	struct kmig_forecast forecast;	/* from here to the end */
	double predicted;		/* pages that were expected to be dirty now, or < 0 */
	double error;			/* of that prediction, relative to what was */

	uint64_t best;			/* fewest pages left so far */
	unsigned int stalled;		/* rounds since it last shrank */
	bool timed_out;			/* a limit was reached, and the answer is to stun harder */
	const char *why;		/* of the last decision, when it is not to go on */
};

void kmig_policy_start(struct kmig_policy *policy, const struct kmig_policy_opts *opts);

/* No more than so many bytes a second will be sent, 0: as many as the wire takes. */
void kmig_policy_cap(struct kmig_policy *policy, uint64_t bytes_per_second);

/*
 * A round was acknowledged: its bytes, its whole duration, and what of that was spent sending, the
 * acknowledgement's way included: the rest was scanning.
 */
void kmig_policy_sent(struct kmig_policy *policy, uint64_t bytes, uint64_t took_ns, uint64_t sending_ns);

/* What is seen after a round. */
struct kmig_look {
	uint64_t dirty;		/* pages */
	uint64_t held;		/* of them, held back until the blackout */
	uint64_t interval_ns;	/* since the round began */
	uint64_t elapsed_ns;	/* since the migration did */
	bool stunned;		/* somebody had to wait for the ceiling meanwhile */
	bool lost;		/* a channel was: what it has sent is dirty again, and not by the guest */
};

enum kmig_decision kmig_policy_look(struct kmig_policy *policy, const struct kmig_look *look);

/* Would the blackout with so many pages keep the downtime? */
bool kmig_policy_fits(const struct kmig_policy *policy, uint64_t dirty);

#endif /* KMIG_POLICY_H */
