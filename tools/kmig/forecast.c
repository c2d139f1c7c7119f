// SPDX-License-Identifier: GPL-2.0
/*
 * kmig forecast: what a migration would take, of a guest that runs or from figures alone.
 *
 * The library plays it through. Here it is asked again with fewer rounds, to show each of them,
 * and with other limits, to say what would help.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

#define CONNECT_TIMEOUT_MS 10000
#define ROUNDS_TOLD 12		/* in the text */
#define SAME 0.01		/* a round that leaves as much as the one before tells nothing */
#define ROUNDS_MAX 100		/* in the JSON */
#define DOWNTIME_MAX_MS 60000
#define ROUNDS_LIMIT 10000
#define LATE 1.25		/* times the interval before: as long as that */
#define FASTER_MAX 1000.0	/* times the link given: beyond that it is no advice */
#define LONGEST_NS 1e18

/* ---- options ----------------------------------------------------------------------------- */

static struct forecast {
	struct kmig_ctx *ctx;
	const char *qmp;
	int pid, fd;
	uint32_t duration_ms;
	uint64_t memory, used, working_set;
	double dirty_rate, bandwidth;	/* bytes a second; < 0: not given */
	int devices_ms;			/* < 0: a quarter of the downtime */
	struct kmig_forecast_opts opts;
	struct kmig_curve_point curve[KMIG_CURVE_POINTS];
	char name[64];			/* of the region; "" when from figures */
	bool json;
} asked = {
	.fd = -1,
	.duration_ms = 2000,
	.dirty_rate = -1,
	.bandwidth = -1,
	.devices_ms = -1,
	.opts = KMIG_FORECAST_OPTS_INIT,
};

static const struct opt options[] = {
	OPT_RATE("bandwidth", "RATE", &asked.bandwidth, "of the link: 10Gbit/s, 400Mbit, 50MB/s, 48MiB/s"),
	OPT_TEXT("qmp", "PATH", &asked.qmp, "a running guest: its QEMU's QMP socket"),
	OPT_INT("pid", "PID", &asked.pid, 1, INT_MAX, "or the process that holds its region"),
	OPT_INT("fd", "N", &asked.fd, 0, INT_MAX, "and its descriptor there, when it holds several"),
	OPT_U32("duration", "MS", &asked.duration_ms, 10, 60000, "watch it for so long (2000)"),
	OPT_SIZE("memory", "SIZE", &asked.memory, "no guest, but figures: its memory"),
	OPT_SIZE("used", "SIZE", &asked.used, "how much of it is in use (all)"),
	OPT_RATE("dirty-rate", "RATE", &asked.dirty_rate, "what it dirties: 200MB/s, 50000pages/s"),
	OPT_SIZE("working-set", "SIZE", &asked.working_set, "and in how much memory (all)"),
	OPT_U32("downtime", "MS", &asked.opts.downtime_ms, 1, DOWNTIME_MAX_MS, "the longest downtime wanted (300)"),
	OPT_INT("devices", "MS", &asked.devices_ms, 0, 60000,
		"of it, what is not for memory: devices, digests (a quarter)"),
	OPT_SECONDS("max-time", "SECONDS", &asked.opts.max_time_ms, 1, 1000000, "the longest time for it all (no limit)"),
	OPT_U32("max-rounds", "N", &asked.opts.max_rounds, 1, ROUNDS_LIMIT, "the most rounds (30)"),
	OPT_PERCENT("convergence", "PERCENT", &asked.opts.convergence, 1, 99, "as for 'kmig qemu migrate' (50)"),
	OPT_DOUBLE("stun-floor", "PAGES/s", &asked.opts.stun_floor, 1, 1000000000, "likewise (256)"),
	OPT_FLAG(0, "no-stun", &asked.opts.no_stun, "likewise"),
	OPT_FLAG('j', "json", &asked.json, "as JSON"),
	OPT_END
};

/* ---- where the figures come from ------------------------------------------------------------ */

static int find_guest(struct forecast *f, struct kmig_region **region)
{
	struct vmm vmm = VMM_INIT;
	int ret, pidfd = -1;

	if (f->pid) {
		ret = kmig_region_find(f->ctx, f->pid, f->fd, region);
		return ret ? fail(-ret, "%s", kmig_ctx_error(f->ctx)) : 0;
	}
	ret = vmm_connect(&vmm, f->qmp, CONNECT_TIMEOUT_MS);
	if (!ret)
		ret = vmm_check_source(&vmm);
	if (!ret)
		ret = find_region(&vmm, f->ctx, f->qmp, region, &pidfd);
	vmm_close(&vmm);
	if (pidfd >= 0)
		close(pidfd);
	return ret;
}

/* Watch a guest that runs. */
static int watch(struct forecast *f)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	struct kmig_region *region = NULL;
	struct progress progress;
	int ret = find_guest(f, &region);

	if (ret)
		return ret;
	progress_init(&progress, true, false);
	progress_say(&progress, "the guest is watched");
	ret = kmig_probe(f->ctx, &region, 1, f->duration_ms, f->curve, &f->opts.points);
	status_line(NULL);
	if (!ret)
		ret = kmig_region_get_info(region, &info);
	kmig_region_free(region);
	if (ret)
		return fail(-ret, "%s", kmig_ctx_error(f->ctx));
	f->opts.ram_bytes = info.bytes;
	f->opts.bytes = info.resident_bytes;
	f->opts.page_size = info.page_size;
	strcpy(f->name, info.name);
	return 0;
}

/*
 * A guest that dirties new pages at one rate, until all of its working set is dirty. As many
 * points as there may be: the curve is to stay flat then, for as long as a round can last.
 */
static void imagine(struct forecast *f)
{
	uint64_t set = f->working_set && f->working_set < f->memory ? f->working_set : f->memory;
	double interval = fmin(fmax(1e9 * (double)set / f->dirty_rate, 1), LONGEST_NS);
	double pages = fmin(f->dirty_rate * interval / 1e9, (double)set) / f->opts.page_size;

	f->opts.ram_bytes = f->memory;
	f->opts.bytes = f->used ? f->used : f->memory;
	for (; f->dirty_rate > 0 && f->opts.points < KMIG_CURVE_POINTS && interval <= LONGEST_NS; interval *= 2)
		f->curve[f->opts.points++] = (struct kmig_curve_point){ (uint64_t)interval, (uint64_t)pages };
}

/* ---- playing it through ----------------------------------------------------------------------- */

/* What the blackout takes beside memory. */
static uint64_t devices_ns(const struct forecast *f)
{
	return f->devices_ms < 0 ? f->opts.downtime_ms * 250000ull : f->devices_ms * 1000000ull;
}

static int play(const struct forecast *f, struct kmig_forecast *out)
{
	struct kmig_forecast_opts opts = f->opts;
	int ret;

	*out = (struct kmig_forecast)KMIG_FORECAST_INIT;
	opts.bytes_per_second = f->bandwidth;
	opts.curve = f->curve;
	opts.blackout_ns = devices_ns(f);
	ret = kmig_forecast(f->ctx, &opts, out);
	return ret ? fail(-ret, "%s", kmig_ctx_error(f->ctx)) : 0;
}

static bool converges(const struct forecast *f)
{
	struct kmig_forecast out;

	return !play(f, &out) && out.converges;
}

/* The rounds of a forecast one by one: what a forecast of so many adds to that of one less. */
struct step {
	double sent, left;		/* bytes */
	uint64_t took_ns, downtime_ns;	/* the blackout's, if it came then */
};

static int play_steps(const struct forecast *given, const struct kmig_forecast *whole, struct step *steps, uint32_t count)
{
	double sent = 0, left;
	uint64_t took = 0;
	struct forecast f = *given;
	struct kmig_forecast now;
	uint32_t i;
	int ret;

	/* With just the ceiling that was found, or none. */
	f.opts.no_stun = whole->stun_pages_per_second <= 0;
	if (!f.opts.no_stun) {
		f.opts.stun_floor = whole->stun_pages_per_second;
		f.opts.convergence = 1e-12;
	}
	for (i = 0; i < count; i++) {
		f.opts.max_rounds = i + 1;
		ret = play(&f, &now);
		if (ret)
			return ret;
		/* The blackout carries what the last round left, and has no other figure for it. */
		left = (double)(now.downtime_ns - devices_ns(&f)) / 1e9 * f.bandwidth;
		steps[i].left = left;
		/* Of a round that sends next to nothing, the difference may be less than that. */
		steps[i].sent = fmax((double)now.bytes - left - sent, 0);
		steps[i].took_ns = now.total_ns - now.downtime_ns - took;
		steps[i].downtime_ns = now.downtime_ns;
		sent += steps[i].sent;
		took += steps[i].took_ns;
	}
	return 0;
}

/* ---- what would help -------------------------------------------------------------------------- */

/* Each would do alone; 0: not on its own. */
struct remedies {
	double bandwidth;
	uint32_t downtime_ms;
	uint64_t time_ms;
	uint32_t rounds;
	bool stun;
};

/* Nobody knows it better than to two digits. */
static double round_up(double value)
{
	double unit = pow(10, floor(log10(value)) - 1);

	return ceil(value / unit) * unit;
}

static double faster_link(struct forecast f)
{
	double low = f.bandwidth, high = low * FASTER_MAX;

	f.bandwidth = high;
	if (!converges(&f))
		return 0;
	while (high > low * 1.01) {
		f.bandwidth = sqrt(low * high);
		if (converges(&f))
			high = f.bandwidth;
		else
			low = f.bandwidth;
	}
	return round_up(high);
}

static uint32_t longer_downtime(struct forecast f)
{
	uint32_t low = f.opts.downtime_ms, high = DOWNTIME_MAX_MS;

	f.opts.downtime_ms = high;
	if (!converges(&f))
		return 0;
	while (high - low > 1) {
		f.opts.downtime_ms = low + (high - low) / 2;
		if (converges(&f))
			high = f.opts.downtime_ms;
		else
			low = f.opts.downtime_ms;
	}
	return (uint32_t)fmin(round_up(high), DOWNTIME_MAX_MS);
}

static void find_remedies(struct forecast f, struct remedies *r)
{
	struct kmig_forecast out;

	*r = (struct remedies){ .bandwidth = faster_link(f), .downtime_ms = longer_downtime(f) };
	if (f.opts.max_time_ms) {
		struct forecast longer = f;

		longer.opts.max_time_ms = 0;
		if (!play(&longer, &out) && out.converges)
			r->time_ms = (uint64_t)round_up((double)out.total_ns / 1e6);
	}
	if (f.opts.max_rounds < ROUNDS_LIMIT) {
		struct forecast more = f;

		more.opts.max_rounds = ROUNDS_LIMIT;
		if (!play(&more, &out) && out.converges)
			r->rounds = out.rounds;
	}
	if (f.opts.no_stun) {
		f.opts.no_stun = false;
		r->stun = converges(&f);
	}
}

/* ---- what is told ------------------------------------------------------------------------------- */

static double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

static void put_rate(struct out *o, const char *key, const char *fmt, double bytes_per_second)
{
	char text[64];

	format_rate(bytes_per_second, text);
	out_float(o, key, NULL, bytes_per_second);
	out_text(o, fmt, text);
}

static void put_curve(struct out *o, const struct forecast *f)
{
	unsigned int i;

	out_text(o, "%11s %10s %11s %10s %9s\n", "INTERVAL ms", "PAGES", "SIZE", "PAGES/s", "MB/s");
	out_array(o, "working-set");
	for (i = 0; i < f->opts.points; i++) {
		double seconds = (double)f->curve[i].interval_ns / 1e9, pages = (double)f->curve[i].pages;
		/* On a busy host the first looks are late, and follow one another at once. */
		bool told = i + 1 == f->opts.points || (double)f->curve[i + 1].interval_ns > LATE * 1e9 * seconds;

		out_object(o, NULL);
		out_float(o, "interval", told ? "%11.1f" : NULL, seconds * 1000);
		out_uint(o, "pages", told ? " %10" PRIu64 : NULL, f->curve[i].pages);
		out_bytes(o, "bytes", told ? " %11s" : NULL, f->curve[i].pages * f->opts.page_size);
		out_float(o, "dirty-pages-rate", told ? " %10.0f" : NULL, pages / seconds);
		if (told)
			out_text(o, " %9.1f\n", pages * f->opts.page_size / seconds / 1e6);
		out_end(o);
	}
	out_end(o);
}

/* What it is a forecast of, as it was understood. */
static void put_given(struct out *o, const struct forecast *f)
{
	if (f->name[0])
		out_string(o, "name", "guest %s: ", f->name);
	out_bytes(o, "memory", "memory %s, ", f->opts.ram_bytes);
	out_bytes(o, "used", "%s in use\n", f->opts.bytes);
	if (f->name[0]) {
		out_text(o, "watched for %u ms, in which it wrote\n", f->duration_ms);
		put_curve(o, f);
	} else {
		put_rate(o, "dirty-rate", "dirties %s", f->dirty_rate);
		out_float(o, "dirty-pages-rate", ", %.0f pages/s", f->dirty_rate / f->opts.page_size);
		if (f->working_set)
			out_bytes(o, "working-set-bytes", ", of %s", f->working_set);
		out_text(o, "\n");
	}
	put_rate(o, "bandwidth", "link: %s\n", f->bandwidth);
	out_object(o, "limits");
	out_uint(o, "downtime", "limits: downtime %" PRIu64 " ms, ", f->opts.downtime_ms);
	out_uint(o, "max-rounds", "%" PRIu64 " rounds", f->opts.max_rounds);
	if (f->opts.max_time_ms)
		out_uint(o, "max-time", ", %" PRIu64 " ms in all", f->opts.max_time_ms);
	out_text(o, "\n\n");
	out_end(o);
}

static bool is_told(const struct step *steps, uint32_t i, uint32_t count)
{
	if (!i || i == count - 1)
		return true;
	return i < ROUNDS_TOLD && fabs(steps[i].left - steps[i - 1].left) > SAME * steps[i - 1].left;
}

static void put_steps(struct out *o, const struct step *steps, uint32_t count)
{
	bool told = true, before;
	uint32_t i;

	out_text(o, "%5s %11s %9s %11s %9s\n", "ROUND", "SENT", "SECONDS", "THEN DIRTY", "PAUSE ms");
	out_array(o, "rounds");
	for (i = 0; i < count; i++) {
		const struct step *s = &steps[i];

		before = told;
		told = is_told(steps, i, count);
		if (before && !told)
			out_text(o, "  ...\n");
		out_object(o, NULL);
		out_uint(o, "round", told ? "%5" PRIu64 : NULL, i + 1);
		out_bytes(o, "bytes", told ? " %11s" : NULL, (uint64_t)llround(s->sent));
		out_float(o, "seconds", told ? " %9.3f" : NULL, (double)s->took_ns / 1e9);
		out_bytes(o, "dirty-bytes", told ? " %11s" : NULL, (uint64_t)llround(s->left));
		out_float(o, "downtime", told ? " %9.0f\n" : NULL, ms(s->downtime_ns));
		out_end(o);
	}
	out_end(o);
}

static void put_verdict(struct out *o, const struct forecast *f, const struct kmig_forecast *r)
{
	double stun = r->stun_pages_per_second;

	out_bool(o, "converges", NULL, r->converges);
	out_text(o, r->converges ? "converges" : "does not converge");
	out_float(o, "stun-pages-rate", stun > 0 ? ", with the guest slowed down to %.0f pages/s" : NULL, stun);
	if (stun > 0)
		out_text(o, " (%.1f MB/s)", stun * f->opts.page_size / 1e6);
	out_uint(o, "dirty-sync-count", r->rounds == 1 ? "\n%" PRIu64 " round, " : "\n%" PRIu64 " rounds, ", r->rounds);
	out_bytes(o, "transferred", "%s, ", r->bytes);
	out_float(o, "total-time", NULL, ms(r->total_ns));
	out_text(o, "%.1f s, ", (double)r->total_ns / 1e9);
	out_float(o, "downtime", "downtime %.0f ms\n", ms(r->downtime_ns));
}

static void put_remedies(struct out *o, const struct remedies *r, bool stunned)
{
	if (!r->bandwidth && !r->downtime_ms && !r->time_ms && !r->rounds && !r->stun) {
		if (!stunned)
			out_text(o, "no link, downtime or other limit alone would help\n");
		return;
	}
	out_object(o, stunned ? "without-stun" : "would-help");
	out_text(o, stunned ? "without slowing it down it would take one of\n" : "one of these would help\n");
	if (r->bandwidth)
		put_rate(o, "bandwidth", "  a link of %s\n", r->bandwidth);
	if (r->downtime_ms)
		out_uint(o, "downtime", "  --downtime %" PRIu64 "\n", r->downtime_ms);
	if (r->time_ms) {
		out_uint(o, "max-time", NULL, r->time_ms);
		out_text(o, "  --max-time %.0f\n", ceil((double)r->time_ms / 1000));
	}
	if (r->rounds)
		out_uint(o, "max-rounds", "  --max-rounds %" PRIu64 "\n", r->rounds);
	if (r->stun)
		out_bool(o, "stun", "  slowing the guest down: no --no-stun\n", true);
	out_end(o);
}

static int forecast(struct forecast *f)
{
	struct step steps[ROUNDS_MAX];
	struct kmig_forecast result;
	struct remedies remedies;
	uint32_t count;
	struct out *o;
	int ret;

	ret = play(f, &result);
	if (ret)
		return print_error(EXIT_FAILED, f->json);
	count = result.rounds < ROUNDS_MAX ? result.rounds : ROUNDS_MAX;
	play_steps(f, &result, steps, count);
	o = out_new(f->json ? NULL : stdout);
	out_object(o, NULL);
	put_given(o, f);
	put_steps(o, steps, count);
	put_verdict(o, f, &result);
	if (!result.converges || result.stun_pages_per_second > 0) {
		struct forecast free_running = *f;

		free_running.opts.no_stun |= result.converges;
		find_remedies(free_running, &remedies);
		remedies.stun &= !result.converges;
		put_remedies(o, &remedies, result.converges);
	}
	out_end(o);
	if (f->json)
		out_print_json(o, stdout);
	out_free(o);
	return result.converges ? EXIT_DONE : EXIT_DIVERGES;
}

static int forecast_main(const struct verb *verb, char **operands)
{
	bool figures = asked.memory || asked.used || asked.working_set || asked.dirty_rate >= 0;
	struct forecast *f = &asked;
	int ret = 0;

	(void)operands;
	if (f->bandwidth <= 0)
		return usage_error(verb, f->bandwidth < 0 ? "--bandwidth is needed" : "--bandwidth must be more than nothing");
	if (!!f->qmp + !!f->pid + figures != 1)
		return usage_error(verb, "give either a guest, by --qmp or --pid, or figures, by --memory and --dirty-rate");
	if (f->fd >= 0 && !f->pid)
		return usage_error(verb, "--fd goes with --pid");
	if (figures && (!f->memory || f->dirty_rate < 0))
		return usage_error(verb, "--memory and --dirty-rate are needed");
	if (open_context(&f->ctx, false))
		return print_error(EXIT_FAILED, f->json);
	if (figures)
		imagine(f);
	else
		ret = watch(f);
	ret = ret ? print_error(EXIT_FAILED, f->json) : forecast(f);
	kmig_ctx_free(f->ctx);
	return ret;
}

const struct verb forecast_verb = {
	.name = "forecast",
	.arguments = "--bandwidth RATE {--qmp PATH | --pid PID | --memory SIZE --dirty-rate RATE} [options]",
	.help = "what a migration would take, before it is begun",
	.options = options,
	.notes = "Rates are in bits, as 10Gbit/s or 10Gbps, or in bytes, as 50MB/s (10^6) or 48MiB/s or 48M (2^20).\n"
		"Exit status: 0 it converges; 1 failed; 2 usage; 4 it does not converge within the limits.\n",
	.run = forecast_main,
};
