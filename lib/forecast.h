/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The working-set curve of a guest: how many distinct pages it writes within an interval. It
 * says what a round of that length leaves behind, and with the rate of the wire what a whole
 * migration will cost.
 */
#ifndef KMIG_FORECAST_H
#define KMIG_FORECAST_H

#include "private.h"

struct kmig_curve {
	unsigned int count;
	struct kmig_curve_point points[KMIG_CURVE_POINTS];	/* intervals grow */
};

/* Take a measurement in. One that is near an interval known already replaces it. */
void kmig_curve_add(struct kmig_curve *curve, uint64_t interval_ns, uint64_t pages);

/* Distinct pages written within the interval: between the measurements a power law. */
double kmig_curve_pages(const struct kmig_curve *curve, double interval_ns);

/* kmig_forecast() with options that are known to be right. */
void kmig_forecast_play(const struct kmig_forecast_opts *opts, struct kmig_forecast *out);

#define KMIG_PROBE_MS_MIN 10
#define KMIG_PROBE_MS_MAX 60000

/* kmig_probe() that ends with ECANCELED when @abort_fd, unless it is -1, becomes readable. */
int kmig_probe_until(struct kmig_ctx *ctx, struct kmig_region *const *regions, unsigned int count,
		     uint32_t duration_ms, int abort_fd, struct kmig_curve_point *points, unsigned int *npoints);

#endif /* KMIG_FORECAST_H */
