/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Curves of pages against an interval. There are two: the working set, how many distinct pages
 * a guest writes within an interval; and what a round of that length leaves dirty. With the
 * rate of the wire, the latter says what a whole migration will cost.
 */
#ifndef KMIG_FORECAST_H
#define KMIG_FORECAST_H

#include "private.h"

struct kmig_curve {
	unsigned int count;
	bool flat;	/* shorter than the shortest interval is taken to be no less, not in proportion */
	struct kmig_curve_point points[KMIG_CURVE_POINTS];	/* intervals grow */
};

/* Take a measurement in. One that is near an interval known already replaces it. */
void kmig_curve_add(struct kmig_curve *curve, uint64_t interval_ns, uint64_t pages);

/* Between the measurements a power law. */
double kmig_curve_pages(const struct kmig_curve *curve, double interval_ns);

/*
 * What rounds leave dirty, of a guest with this working set. A page is protected just before it
 * is sent, somewhere between the beginning of the round and the trip before its end: it was open
 * to writes for the rest of it.
 */
void kmig_curve_left(const struct kmig_curve *working_set, uint64_t trip_ns, struct kmig_curve *left);

/* kmig_forecast() with options that are known to be right, but for @opts->curve by what is left. */
void kmig_forecast_play(const struct kmig_forecast_opts *opts, const struct kmig_curve *left,
			struct kmig_forecast *out);

/*
 * What of the downtime is set aside for everything but pages: what that is expected to take, but
 * a quarter of the limit at least, as much of it comes unforeseen; and half of it at most, or a
 * slow peer would forbid the blackout for ever.
 */
double kmig_blackout_reserve(double limit_ns, double expected_ns);

#define KMIG_PROBE_MS_MIN 10
#define KMIG_PROBE_MS_MAX 60000

/* kmig_probe() that ends with ECANCELED when @abort_fd, unless it is -1, becomes readable. */
int kmig_probe_until(struct kmig_ctx *ctx, struct kmig_region *const *regions, unsigned int count,
		     uint32_t duration_ms, int abort_fd, struct kmig_curve_point *points, unsigned int *npoints);

#endif /* KMIG_FORECAST_H */
