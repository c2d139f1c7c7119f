// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Convergence. While the forecast keeps the limits, the guest is left alone. When it does not,
 * the pages it may dirty in a second are limited to a fraction of what the wire carries in one
 * (opts.convergence), so that each round leaves that fraction of itself behind and rounds
 * shrink geometrically, whatever the guest does. Less is allowed when a time limit asks for it
 * or when what is left stops shrinking, but never less than the floor.
 */
#include "policy.h"

#include <math.h>

#define RATE_BYTES_MIN (1u << 20)	/* a round below this says little about the wire */
#define HOLD_SHARE 0.7			/* of the blackout's budget, for pages held back */
#define PROGRESS 0.95			/* of the fewest pages left: less is progress */
#define STALLED_ROUNDS 3
#define HARDER 0.5			/* of the ceiling, when the guest has to be held harder */
#define CEILING_CHANGE 0.1		/* less than this is not worth a change */

void kmig_policy_start(struct kmig_policy *policy, const struct kmig_policy_opts *opts)
{
	*policy = (struct kmig_policy){ .opts = *opts, .trip_ns = opts->trip_ns, .predicted = -1, .best = UINT64_MAX };
}

void kmig_policy_cap(struct kmig_policy *policy, uint64_t bytes_per_second)
{
	bool lower = bytes_per_second && (!policy->cap || bytes_per_second < policy->cap);

	/* What was measured under a lower one says nothing of what the wire can do. */
	if (!lower && bytes_per_second != policy->cap)
		policy->rough = policy->rate > 0;
	policy->cap = bytes_per_second;
	if (policy->cap && policy->rate > policy->cap)
		policy->rate = policy->cap;
}

void kmig_policy_sent(struct kmig_policy *policy, uint64_t bytes, uint64_t took_ns, uint64_t sending_ns)
{
	/* The first pass looks at every page: that says nothing about those that follow. */
	if (policy->rounds++)
		policy->scan_ns = took_ns - sending_ns;
	/* A guest may be so small that there is nothing better: it has to come to an end, too. */
	if (sending_ns && bytes && (bytes >= RATE_BYTES_MIN || policy->rate <= 0 || policy->rough)) {
		double rate = bytes * 1e9 / fmax((double)sending_ns - policy->trip_ns, sending_ns / 2.0);
		bool faster = policy->rate > 0 && !policy->rough && rate > policy->rate;

		/* It may have been lowered within the round. */
		if (policy->cap)
			rate = fmin(rate, policy->cap);
		/*
		 * A link that got slower is believed at once, one that got faster by and by, and only
		 * if it was kept busy: what comes now and then is gone at once on any.
		 */
		if (!faster)
			policy->rate = rate;
		else if (sending_ns >= took_ns / 2)
			policy->rate = (policy->rate + rate) / 2;
		policy->rough = bytes < RATE_BYTES_MIN;
	}
	/* What is left of a small round beside its bytes is what every round costs. */
	if (bytes < RATE_BYTES_MIN && policy->rate > 0 && !policy->rough)
		policy->trip_ns = fmax(sending_ns - bytes / policy->rate * 1e9, 0);
}

/* What a round takes beside its pages, the last one too. */
static uint64_t round_cost_ns(const struct kmig_policy *policy)
{
	return policy->trip_ns + policy->scan_ns;
}

static double budget_ns(const struct kmig_policy *policy)
{
	double limit = kmig_ms(policy->opts.downtime_ms);

	return limit - kmig_blackout_reserve(limit, round_cost_ns(policy) + policy->digest_ns);
}

bool kmig_policy_fits(const struct kmig_policy *policy, uint64_t dirty)
{
	if (!dirty)
		return true;
	return policy->rate > 0 && dirty * policy->opts.page_size / policy->rate * 1e9 <= budget_ns(policy);
}

static void measure(struct kmig_policy *policy, const struct kmig_look *look)
{
	uint64_t dirty = look->dirty - look->held;
	double fits = budget_ns(policy) / 1e9 * policy->rate / policy->opts.page_size;

	if (look->lost)
		return;
	/* Below what fits the blackout, being wrong has no consequences. */
	if (policy->predicted >= 0 && dirty + fits > 0)
		policy->error = fabs(policy->predicted - dirty) / fmax(dirty, fits);
	/* What the ceiling allowed says nothing about what the guest would write without it. */
	if (look->stunned)
		return;
	/* Without the pages held back it is another guest. */
	if (look->held && !policy->holding)
		policy->left.count = 0;
	policy->holding = look->held > 0;
	kmig_curve_add(&policy->left, look->interval_ns, dirty);
}

/* From what is dirty now to the end. */
static void forecast(struct kmig_policy *policy, const struct kmig_look *look)
{
	const struct kmig_policy_opts *opts = &policy->opts;
	struct kmig_forecast_opts ahead = KMIG_FORECAST_OPTS_INIT;
	uint64_t elapsed_ms = look->elapsed_ns / 1000000;

	ahead.ram_bytes = opts->ram_bytes;
	ahead.bytes = (look->dirty - look->held) * opts->page_size;
	ahead.held_pages = look->held;
	ahead.page_size = opts->page_size;
	ahead.bytes_per_second = policy->rate;
	ahead.downtime_ms = opts->downtime_ms;
	ahead.trip_ns = round_cost_ns(policy);
	ahead.blackout_ns = round_cost_ns(policy) + policy->digest_ns;
	ahead.max_rounds = policy->rounds < opts->max_rounds ? opts->max_rounds - policy->rounds : 1;
	if (opts->max_time_ms)
		ahead.max_time_ms = elapsed_ms < opts->max_time_ms ? opts->max_time_ms - elapsed_ms : 1;
	ahead.convergence = opts->convergence;
	ahead.stun_floor = opts->stun_floor;
	ahead.no_stun = !opts->can_stun;
	ahead.under_way = true;
	/*
	 * A guest gets the benefit of the doubt: what it does in shorter intervals than have been
	 * seen is less in proportion. Not one that was too fast, as long as the ceiling holds it:
	 * it would be let go, and caught again, for ever.
	 */
	policy->left.flat = look->stunned;
	kmig_forecast_play(&ahead, &policy->left, &policy->forecast);
}

/* Too small a change would only wake those who wait. */
static void set_ceiling(struct kmig_policy *policy, double ceiling)
{
	if (ceiling > 0)
		ceiling = fmax(ceiling, fmax(policy->opts.stun_floor, 1));
	if (ceiling > 0 && policy->ceiling > 0 && fabs(ceiling - policy->ceiling) < policy->ceiling * CEILING_CHANGE)
		return;
	policy->ceiling = ceiling;
}

static enum kmig_decision give_up(struct kmig_policy *policy, const char *why)
{
	policy->why = why;
	return KMIG_GIVE_UP;
}

/* A limit is reached, or the guest dirties as fast as is sent. */
static enum kmig_decision too_long(struct kmig_policy *policy)
{
	switch (policy->opts.on_timeout) {
	case KMIG_TIMEOUT_SWITCHOVER:
		policy->why = "the limit for pre-copy is reached";
		return KMIG_PAUSE;
	case KMIG_TIMEOUT_STUN:
		if (policy->opts.can_stun) {
			policy->timed_out = true;
			return KMIG_GO_ON;
		}
		return give_up(policy, "what is dirty does not fit the downtime within the limits, and the guest cannot be slowed down here");
	default:
		return give_up(policy, "what is dirty does not fit the downtime within the limits");
	}
}

static void slow_down(struct kmig_policy *policy)
{
	double most = policy->opts.convergence * policy->rate / policy->opts.page_size;

	if (policy->stalled >= STALLED_ROUNDS && policy->ceiling > 0) {
		policy->stalled = 0;
		set_ceiling(policy, policy->ceiling * HARDER);
	} else if (policy->timed_out) {
		set_ceiling(policy, policy->ceiling > 0 ? fmin(policy->ceiling, most * HARDER) : most * HARDER);
	} else {
		set_ceiling(policy, policy->forecast.stun_pages_per_second);
	}
}

enum kmig_decision kmig_policy_look(struct kmig_policy *policy, const struct kmig_look *look)
{
	const struct kmig_policy_opts *opts = &policy->opts;
	bool at_floor = policy->ceiling > 0 && policy->ceiling <= fmax(opts->stun_floor, 1);
	enum kmig_decision decision = KMIG_GO_ON;

	measure(policy, look);
	policy->hold_budget = opts->can_hold && policy->rate > 0 ?
			      budget_ns(policy) / 1e9 * policy->rate / opts->page_size * HOLD_SHARE : 0;
	if (kmig_policy_fits(policy, look->dirty)) {
		policy->why = "what is left fits the downtime";
		return KMIG_PAUSE;
	}
	/* A first pass that has sent next to nothing has looked at zeroes: its rate is not the wire's. */
	if (policy->rate <= 0 || (policy->rough && policy->rounds == 1))
		return KMIG_GO_ON;

	if (look->dirty < policy->best * PROGRESS) {
		policy->best = look->dirty;
		policy->stalled = 0;
	} else if (!look->lost && ++policy->stalled >= STALLED_ROUNDS && at_floor) {
		policy->why = "what is dirty has stopped shrinking, though the guest is slowed down as far as is allowed";
		return opts->on_timeout == KMIG_TIMEOUT_SWITCHOVER ? KMIG_PAUSE : KMIG_GIVE_UP;
	}
	if (!policy->timed_out && (policy->rounds >= opts->max_rounds ||
				   (opts->max_time_ms && look->elapsed_ns >= kmig_ms(opts->max_time_ms))))
		decision = too_long(policy);
	forecast(policy, look);
	/* After a loss the ceiling stays as it was: it is not the guest that needs another. */
	if (opts->can_stun && decision == KMIG_GO_ON && !look->lost)
		slow_down(policy);
	policy->predicted = policy->forecast.next_pages;
	return decision;
}
