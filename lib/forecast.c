// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The forecast plays a migration through, round by round. By the guest's working-set curve it
 * writes W(t) distinct pages within t. A round protects each page just before it sends it, at
 * some point between its beginning and the trip before its end, when the last page has been sent
 * and has yet to arrive. So of those written meanwhile it leaves
 *
 *	M(t) = (integral of W(u) from trip to t) / (t - trip)
 *
 * dirty, and about as many again were written before their turn came and go along with it. A round
 * of d pages of p bytes at a rate of r bytes/s takes
 *
 *	t = (d + M(t)) * p / r + trip
 *
 * but for the first, which sends everything anyway. A ceiling of c pages/s makes W(t) at most
 * c * t, and so M(t) at most c * (t + trip) / 2. Pre-copy ends when what is left, and the pages held
 * back, fit the limit less a reserve for what else the blackout costs.
 */
#include "forecast.h"

#include <math.h>

#define NEAR 1.25		/* intervals that differ by no more say the same */
#define CEILING_STEP 0.7	/* of the ceiling, when it was still too high */
#define STEPS 64		/* of the integral */
#define BEYOND 4		/* points of what is left, beyond the longest interval measured */
#define TURNS 16		/* until the length of a round is that of what it carries */

/* Of a double what fits. */
static uint64_t whole(double value)
{
	if (!(value > 0))
		return 0;
	return value < 0x1p64 ? (uint64_t)value : UINT64_MAX;
}

static bool is_near(uint64_t a, uint64_t b)
{
	return a <= b * NEAR && b <= a * NEAR;
}

void kmig_curve_add(struct kmig_curve *curve, uint64_t interval_ns, uint64_t pages)
{
	struct kmig_curve_point *points = curve->points;
	struct kmig_curve_point point = { interval_ns, pages };
	unsigned int kept = 0, at = 0;

	if (!interval_ns)
		return;
	/* It may be near two of them, between which no place is left. */
	for (unsigned int i = 0; i < curve->count; i++)
		if (!is_near(points[i].interval_ns, interval_ns))
			points[kept++] = points[i];
	curve->count = kept;
	while (at < curve->count && points[at].interval_ns < interval_ns)
		at++;
	if (curve->count == KMIG_CURVE_POINTS) {
		/* The shortest interval says least about the rounds that count. */
		if (!at)
			return;
		memmove(points, points + 1, --at * sizeof(*points));
	} else {
		memmove(points + at + 1, points + at, (curve->count - at) * sizeof(*points));
		curve->count++;
	}
	points[at] = point;
}

/* A power law through two points, no steeper than proportional and never falling. */
static double power_law(struct kmig_curve_point a, struct kmig_curve_point b, double interval_ns)
{
	double slope;

	if (!a.pages || !b.pages)
		return b.pages * interval_ns / b.interval_ns;
	slope = log((double)b.pages / a.pages) / log((double)b.interval_ns / a.interval_ns);
	slope = fmin(fmax(slope, 0), 1);
	return b.pages * pow(interval_ns / b.interval_ns, slope);
}

double kmig_curve_pages(const struct kmig_curve *curve, double interval_ns)
{
	const struct kmig_curve_point *points = curve->points;
	unsigned int at = 0;

	if (!curve->count || interval_ns <= 0)
		return 0;
	while (at < curve->count && points[at].interval_ns < interval_ns)
		at++;
	if (!at && curve->flat)
		return points[0].pages;
	/* Shorter than anything measured, or only one measurement: in proportion. */
	if (!at || curve->count == 1) {
		unsigned int i = at ? at - 1 : 0;

		return points[i].pages * interval_ns / points[i].interval_ns;
	}
	if (at == curve->count)
		at--;
	return power_law(points[at - 1], points[at], interval_ns);
}

static double mean(const struct kmig_curve *curve, double from_ns, double to_ns)
{
	double sum = 0;

	if (from_ns > to_ns)
		from_ns = to_ns;
	for (int n = 0; n < STEPS; n++)
		sum += kmig_curve_pages(curve, from_ns + (n + 0.5) / STEPS * (to_ns - from_ns));
	return sum / STEPS;
}

void kmig_curve_left(const struct kmig_curve *working_set, uint64_t trip_ns, struct kmig_curve *left)
{
	*left = *working_set;
	for (unsigned int i = 0; i < left->count; i++)
		left->points[i].pages = whole(mean(working_set, trip_ns, left->points[i].interval_ns));
	/*
	 * Of a working set that is exhausted the mean still grows, ever more slowly: the law of its
	 * last two points would not know that.
	 */
	for (int i = 0; i < BEYOND && left->count && left->count < KMIG_CURVE_POINTS; i++) {
		struct kmig_curve_point last = left->points[left->count - 1];

		if (last.interval_ns > UINT64_MAX / 4)
			break;
		last.interval_ns *= 4;
		last.pages = whole(mean(working_set, trip_ns, last.interval_ns));
		left->points[left->count++] = last;
	}
}

/* ---- Playing it through ---- */

double kmig_blackout_reserve(double limit_ns, double expected_ns)
{
	return fmin(fmax(expected_ns, limit_ns / 4), limit_ns / 2);
}

static double transfer_ns(const struct kmig_forecast_opts *opts, double pages)
{
	return pages * opts->page_size / opts->bytes_per_second * 1e9;
}

struct play {
	const struct kmig_forecast_opts *opts;
	const struct kmig_curve *left;
	double total_pages;
	double ceiling;			/* pages a second, 0: none */
};

static double left(const struct play *play, double interval_ns, bool stunned)
{
	double pages = kmig_curve_pages(play->left, interval_ns);

	if (stunned && play->ceiling > 0)
		pages = fmin(pages, play->ceiling * (interval_ns + play->opts->trip_ns) / 1e9 / 2);
	return fmin(pages, play->total_pages);
}

/* How long a round takes that begins with so many dirty pages; @carried: those it sends. */
static double round_ns(const struct play *play, double pages, bool first, double *carried)
{
	double took, most = play->total_pages;

	*carried = pages;
	for (int i = 0; i < TURNS; i++) {
		took = transfer_ns(play->opts, *carried) + play->opts->trip_ns;
		if (first)
			break;
		*carried = fmin(pages + left(play, took, true), most);
	}
	return took;
}

/* Stun begins with the second round. */
static void play_through(const struct play *play, struct kmig_forecast *out)
{
	const struct kmig_forecast_opts *opts = play->opts;
	double pages = (double)opts->bytes / opts->page_size;
	bool first = !opts->under_way;
	double limit = opts->downtime_ms * 1e6, reserve = kmig_blackout_reserve(limit, opts->blackout_ns);
	double sent = 0, total = 0, took, rest, carried, pages_ns;

	out->rounds = 0;
	out->converges = false;
	out->stun_pages_per_second = play->ceiling;
	for (;;) {
		took = round_ns(play, pages, first, &carried);
		rest = left(play, took, !first);
		first = false;
		sent += carried;
		total += took;
		if (!out->rounds++)
			out->next_pages = whole(rest);
		pages_ns = transfer_ns(opts, rest + opts->held_pages);
		if (pages_ns <= limit - reserve) {
			out->converges = pages_ns + opts->blackout_ns <= limit &&
					 (!opts->max_time_ms || (total + pages_ns) / 1e6 <= opts->max_time_ms);
			break;
		}
		if (out->rounds >= opts->max_rounds)
			break;
		if (opts->max_time_ms && total / 1e6 > opts->max_time_ms)
			break;
		pages = rest;
	}
	out->bytes = whole((sent + rest + opts->held_pages) * opts->page_size);
	out->downtime_ns = whole(pages_ns + opts->blackout_ns);
	out->total_ns = whole(total + out->downtime_ns);
}

void kmig_forecast_play(const struct kmig_forecast_opts *opts, const struct kmig_curve *curve,
			struct kmig_forecast *out)
{
	double floor = fmax(opts->stun_floor, 1);
	struct play play = {
		.opts = opts,
		.left = curve,
		.total_pages = (double)opts->ram_bytes / opts->page_size,
	};

	play_through(&play, out);
	play.ceiling = opts->convergence * opts->bytes_per_second / opts->page_size;
	while (!out->converges && !opts->no_stun) {
		play.ceiling = fmax(play.ceiling, floor);
		play_through(&play, out);
		if (play.ceiling <= floor)
			break;
		play.ceiling *= CEILING_STEP;
	}
}

static int check(struct kmig_ctx *ctx, const struct kmig_forecast_opts *opts)
{
	if (!opts->page_size || !(opts->bytes_per_second > 0) || isinf(opts->bytes_per_second))
		return kmig_fail(ctx, -EINVAL, "forecast: the page size and the rate of the link must be given");
	if (opts->bytes > opts->ram_bytes)
		return kmig_fail(ctx, -EINVAL, "forecast: %llu bytes in use of %llu bytes of memory",
				 (unsigned long long)opts->bytes, (unsigned long long)opts->ram_bytes);
	if (opts->points > KMIG_CURVE_POINTS || (opts->points && !opts->curve))
		return kmig_fail(ctx, -EINVAL, "forecast: %u points of a curve, at most %d can be given", opts->points,
				 KMIG_CURVE_POINTS);
	if (!opts->downtime_ms || !opts->max_rounds)
		return kmig_fail(ctx, -EINVAL, "forecast: downtime limit and round limit must be at least 1");
	if (!(opts->convergence > 0 && opts->convergence < 1))
		return kmig_fail(ctx, -EINVAL, "forecast: rounds must shrink to a fraction between 0 and 1, not %g",
				 opts->convergence);
	if (!isfinite(opts->stun_floor))
		return kmig_fail(ctx, -EINVAL, "forecast: a floor of %g pages a second is no number", opts->stun_floor);
	for (unsigned int i = 0; i < opts->points; i++)
		if (!opts->curve[i].interval_ns)
			return kmig_fail(ctx, -EINVAL, "forecast: point %u of the curve has an interval of 0", i);
	return 0;
}

int kmig_forecast(struct kmig_ctx *ctx, const struct kmig_forecast_opts *given, struct kmig_forecast *forecast)
{
	struct kmig_forecast_opts opts = KMIG_FORECAST_OPTS_INIT;
	struct kmig_curve working_set = { 0 }, left_dirty;
	struct kmig_forecast out = { .size = sizeof(out) };
	int err;

	err = kmig_copy_sized(ctx, &opts, sizeof(opts), sizeof(opts), given, "forecast options");
	if (!err)
		err = check(ctx, &opts);
	if (err)
		return err;
	for (unsigned int i = 0; i < opts.points; i++)
		kmig_curve_add(&working_set, opts.curve[i].interval_ns, opts.curve[i].pages);
	kmig_curve_left(&working_set, opts.trip_ns, &left_dirty);
	kmig_forecast_play(&opts, &left_dirty, &out);
	if (out.total_ns == UINT64_MAX || out.bytes == UINT64_MAX)
		return kmig_fail(ctx, -ERANGE, "forecast: it would take longer than 584 years or send more than 16 EiB: are rate (%g bytes/s) and memory (%llu bytes) right?",
				 opts.bytes_per_second, (unsigned long long)opts.ram_bytes);
	return kmig_fill_sized(ctx, forecast, &out, sizeof(out), "forecast");
}
