// SPDX-License-Identifier: GPL-2.0
/* The report of a migration: names as in QEMU's query-migrate, the same at both ends. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

/* In the text; the JSON has all that are known. */
#define THREADS_TOLD 3
#define CAPS_TOLD 4
#define SCAN_SEEN_NS 5000000	/* with two decimals of a second it is more than nothing */

static double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

static void note_cap(struct account *a, const struct kmig_report *now)
{
	uint64_t last = a->cap_count ? a->caps[a->cap_count - 1].bytes_per_second : 0;
	struct cap *caps;

	if (now->max_bandwidth == last)
		return;
	caps = realloc(a->caps, (a->cap_count + 1) * sizeof(*caps));
	/* As with rounds. */
	if (!caps)
		return;
	a->caps = caps;
	a->caps[a->cap_count++] = (struct cap){ now->total_ns, now->max_bandwidth };
}

void account_progress(struct account *a, const struct kmig_report *now)
{
	note_cap(a, now);
	if (a->forecast.rounds || !a->count || !now->forecast.total_ns)
		return;
	a->forecast.expected = now->forecast;
	a->forecast.rounds = a->count;
	a->forecast.at_ns = a->acked_ns;
}

void account_round(struct account *a, const struct kmig_round_report *round)
{
	struct kmig_round_report *rounds = realloc(a->rounds, (a->count + 1) * sizeof(*rounds));

	/* The table is for reading: a migration does not end for want of a line in it. */
	if (!rounds)
		return;
	a->rounds = rounds;
	a->rounds[a->count++] = *round;
	a->precopy += a->report.state < KMIG_STATE_BLACKOUT;
	a->acked_ns = a->report.total_ns;
}

struct kmig_forecast account_came(const struct account *a)
{
	struct kmig_forecast came = {
		.rounds = (uint32_t)(a->precopy - a->forecast.rounds),
		.total_ns = a->report.state_ns[KMIG_STATE_CLEANUP] - a->forecast.at_ns,
		.downtime_ns = a->report.downtime_ns,
	};
	size_t i;

	for (i = a->forecast.rounds; i < a->count; i++)
		came.bytes += a->rounds[i].bytes;
	return came;
}

void account_free(struct account *a)
{
	free(a->rounds);
	a->rounds = NULL;
	a->count = 0;
	free(a->caps);
	a->caps = NULL;
	a->cap_count = 0;
}

static const char *status_name(enum kmig_verdict verdict)
{
	switch (verdict) {
	case KMIG_COMPLETED:
		return "completed";
	case KMIG_CANCELLED:
		return "cancelled";
	case KMIG_UNKNOWN:
		return "unknown";
	default:
		return "failed";
	}
}

static void put_payload(struct out *o, const struct kmig_report *r)
{
	uint64_t sent = r->zerocopy_bytes + r->copied_bytes;

	out_bytes(o, "zero-copy-bytes", "; zero-copied %s, ", r->zerocopy_bytes);
	out_bytes(o, "copied-bytes", "copied %s", r->copied_bytes);
	if (sent)
		out_text(o, " (%.1f %%)", 100.0 * (double)r->zerocopy_bytes / (double)sent);
}

static void put_ram(struct out *o, const struct account *a)
{
	const struct kmig_report *r = &a->report;

	out_object(o, "ram");
	out_bytes(o, "total", "memory %s, ", r->ram_bytes);
	out_bytes(o, "transferred", "transferred %s in ", r->transferred_bytes);
	out_uint(o, "dirty-sync-count", r->rounds == 1 ? "%" PRIu64 " round\n" : "%" PRIu64 " rounds\n", r->rounds);
	out_uint(o, "duplicate", "pages: %" PRIu64 " zero, ", r->zero_pages);
	out_uint(o, "normal", "%" PRIu64 " data", r->data_pages);
	out_uint(o, "page-size", NULL, r->page_size);
	if (a->source)
		put_payload(o, r);
	out_text(o, "\n");
	/* Megabits, as QEMU's field of this name. */
	if (a->source)
		out_float(o, "mbps", "%.1f Mbit/s on the wire, ", r->bytes_per_second * 8 / 1e6);
	out_end(o);
}

static void put_states(struct out *o, const struct kmig_report *r)
{
	int i;

	out_array(o, "states");
	for (i = 0; i < KMIG_STATES; i++) {
		if (i && !r->state_ns[i])
			continue;
		out_object(o, NULL);
		out_string(o, "state", NULL, kmig_state_name((enum kmig_state)i));
		out_float(o, "ms", NULL, ms(r->state_ns[i]));
		out_end(o);
	}
	out_end(o);
}

/* Columns that say nothing in any line are left out of the text. */
struct columns {
	bool held, ceiling, error, scan;
};

static struct columns columns_of(const struct account *a)
{
	struct columns c = { 0 };
	size_t i;

	for (i = 0; i < a->count; i++) {
		c.held |= a->rounds[i].held_pages > 0;
		c.ceiling |= a->rounds[i].stun_pages_per_second > 0;
		c.error |= a->rounds[i].forecast_error > 0;
		c.scan |= a->rounds[i].scan_ns >= SCAN_SEEN_NS;
	}
	/* All four would not fit eighty columns. */
	c.scan &= !(c.held && c.ceiling && c.error);
	return c;
}

static void put_round(struct out *o, const struct kmig_round_report *r, bool paused, struct columns c)
{
	out_object(o, NULL);
	out_uint(o, "round", "%5" PRIu64, r->round);
	out_uint(o, "dirty", " %8" PRIu64, r->dirty_pages);
	out_uint(o, "sent", " %8" PRIu64, r->data_pages);
	out_uint(o, "zero", " %8" PRIu64, r->zero_pages);
	out_uint(o, "bytes", NULL, r->bytes);
	out_float(o, "seconds", " %7.2f", (double)r->duration_ns / 1e9);
	out_float(o, "scan-seconds", c.scan ? " %7.2f" : NULL, (double)r->scan_ns / 1e9);
	out_text(o, " %6.1f", r->bytes_per_second / 1e6);
	out_float(o, "mbps", NULL, r->bytes_per_second * 8 / 1e6);
	out_float(o, "dirty-pages-rate", " %8.0f", r->dirty_pages_per_second);
	out_uint(o, "held", c.held ? " %7" PRIu64 : NULL, r->held_pages);
	out_float(o, "stun-pages-rate", c.ceiling ? " %7.0f" : NULL, r->stun_pages_per_second);
	out_float(o, "forecast-error", c.error ? " %4.0f%%" : NULL, 100 * r->forecast_error);
	out_bool(o, "paused", NULL, paused);
	out_text(o, "\n");
	out_end(o);
}

static void put_rounds(struct out *o, const struct account *a)
{
	struct columns c = columns_of(a);
	size_t i;

	if (a->count)
		out_text(o, "%5s %8s %8s %8s %7s%s %6s %8s%s%s%s\n", "ROUND", "DIRTY", "SENT", "ZERO",
			 "SECONDS", c.scan ? "    SCAN" : "", "MB/s", "DIRTY/s", c.held ? "    HELD" : "",
			 c.ceiling ? " CEILING" : "", c.error ? " ERROR" : "");
	out_array(o, "rounds");
	for (i = 0; i < a->count; i++)
		put_round(o, &a->rounds[i], i >= a->precopy, c);
	out_end(o);
}

/* What was let pass, and from when on: each change. */
static void put_caps(struct out *o, const struct account *a)
{
	size_t i;

	if (!a->cap_count)
		return;
	out_text(o, "bandwidth limited ");
	out_array(o, "max-bandwidth");
	for (i = 0; i < a->cap_count; i++) {
		const struct cap *cap = &a->caps[i];
		bool told = i < CAPS_TOLD;

		if (told && i)
			out_text(o, ", ");
		if (told && cap->bytes_per_second)
			out_text(o, "to %.3f MB/s", (double)cap->bytes_per_second / 1e6);
		else if (told)
			out_text(o, "no more");
		if (told && cap->at_ns > a->report.state_ns[KMIG_STATE_FIRST_PASS])
			out_text(o, " from %.1f s on", (double)cap->at_ns / 1e9);
		out_object(o, NULL);
		out_float(o, "ms", NULL, ms(cap->at_ns));
		out_uint(o, "bytes-per-second", NULL, cap->bytes_per_second);
		out_end(o);
	}
	out_end(o);
	if (i > CAPS_TOLD)
		out_text(o, ", and %zu changes more", i - CAPS_TOLD);
	out_text(o, "\n");
}

/* What the downtime was made of, one after the other; together they are the downtime. */
static void put_downtime(struct out *o, const struct kmig_report *r)
{
	const struct kmig_downtime *d = &r->downtime;

	out_object(o, "downtime-parts");
	out_float(o, "pause", "downtime in ms: pause %.1f, ", ms(d->pause_ns));
	out_float(o, "device-state-out", "device state out %.1f, ", ms(d->save_ns));
	out_float(o, "memory", "memory %.1f ", ms(d->memory_ns));
	out_text(o, "(harvest %.1f, copy %.1f), ", ms(r->memory_harvest_ns), ms(r->memory_copy_ns));
	out_float(o, "digests", "digests %.1f, ", ms(d->digest_ns));
	out_float(o, "device-state-in", "device state in %.1f, ", ms(d->load_ns));
	out_float(o, "commit", "commit %.1f, ", ms(d->commit_ns));
	out_float(o, "resume", "resume %.1f\n", ms(d->resume_ns));
	out_end(o);
	/* Beside them, and not among them: their sum is the downtime. */
	out_object(o, "memory-parts");
	out_float(o, "harvest", NULL, ms(r->memory_harvest_ns));
	out_float(o, "copy", NULL, ms(r->memory_copy_ns));
	out_end(o);
}

static void put_expected(struct out *o, const struct kmig_forecast *f)
{
	out_uint(o, "dirty-sync-count", f->rounds == 1 ? "%" PRIu64 " round, " : "%" PRIu64 " rounds, ", f->rounds);
	out_bytes(o, "transferred", "%s, ", f->bytes);
	out_float(o, "total-time", NULL, ms(f->total_ns));
	out_text(o, "%.1f s, ", (double)f->total_ns / 1e9);
	out_float(o, "downtime", "downtime %.0f ms", ms(f->downtime_ns));
}

/* The first forecast beside what came of it: both from then to the end. */
static void put_forecast(struct out *o, const struct account *a)
{
	const struct kmig_forecast *f = &a->forecast.expected;

	if (!a->forecast.rounds)
		return;
	out_object(o, "forecast");
	out_uint(o, "after-round", "forecast, round %" PRIu64 ": ", a->forecast.rounds);
	put_expected(o, f);
	out_bool(o, "converges", NULL, f->converges);
	out_float(o, "stun-pages-rate", f->stun_pages_per_second > 0 ? ", stun %.0f/s" : NULL,
		  f->stun_pages_per_second);
	out_text(o, "%s\n", f->converges ? "" : ": beyond limits");
	if (a->report.verdict == KMIG_COMPLETED) {
		struct kmig_forecast came = account_came(a);

		out_object(o, "came");
		out_text(o, "what came:         ");
		put_expected(o, &came);
		out_text(o, "\n");
		out_end(o);
	}
	out_end(o);
}

/* What the guest felt, where the tracker knows it. */
static void put_guest(struct out *o, const struct kmig_report *r)
{
	uint64_t begin = r->state_ns[KMIG_STATE_FIRST_PASS], end = r->state_ns[KMIG_STATE_BLACKOUT];
	const struct kmig_guest_cost *g = &r->guest;
	unsigned int i;

	if (!g->write_faults && !g->stuns)
		return;
	if (!end)
		end = r->total_ns;
	out_object(o, "guest");
	out_uint(o, "write-faults", "the guest felt: %" PRIu64 " write faults, ", g->write_faults);
	out_float(o, "write-fault-time", "%.1f ms in them\n", ms(g->fault_ns));
	out_uint(o, "stuns", g->stuns ? "stunned %" PRIu64 " times" : NULL, g->stuns);
	out_float(o, "stun-time", g->stuns ? ", %.0f ms" : NULL, ms(g->stun_ns));
	out_float(o, "stun-time-max", g->stuns ? ", the longest %.1f ms" : NULL, ms(g->stun_max_ns));
	if (g->stuns)
		out_text(o, "\n");
	/* QEMU's is of all processors; this one of the thread that was held most. */
	out_float(o, "cpu-throttle-percentage", NULL,
		  g->threads && end > begin ? 100.0 * (double)g->thread[0].stun_ns / (double)(end - begin) : 0);
	out_array(o, "threads");
	for (i = 0; i < g->threads; i++) {
		double share = end > begin ? 100.0 * (double)g->thread[i].stun_ns / (double)(end - begin) : 0;
		bool told = i < THREADS_TOLD && g->thread[i].stuns;

		out_object(o, NULL);
		out_int(o, "id", told ? "  thread %d: " : NULL, g->thread[i].id);
		out_uint(o, "stuns", told ? "%" PRIu64 " stuns, " : NULL, g->thread[i].stuns);
		out_float(o, "stun-time", told ? "%.0f ms, " : NULL, ms(g->thread[i].stun_ns));
		out_float(o, "percentage", told ? "%.0f %% of the time until the blackout\n" : NULL, share);
		out_end(o);
	}
	out_end(o);
	out_end(o);
}

void report_put(struct out *o, const struct account *a, const char *error)
{
	const struct kmig_report *r = &a->report;

	out_object(o, NULL);
	if (a->source)
		put_rounds(o, a);
	out_string(o, "status", "%s: ", status_name(r->verdict));
	if (*error)
		out_string(o, "error", NULL, error);
	out_float(o, "total-time", "total time %.0f ms, ", ms(r->total_ns));
	out_float(o, "downtime", r->downtime_ns ? "downtime %.1f ms, " : NULL, ms(r->downtime_ns));
	out_float(o, "setup-time", "setup %.1f ms\n", ms(r->setup_ns));
	if (a->source && r->verdict == KMIG_COMPLETED)
		put_downtime(o, r);
	if (r->decision)
		out_string(o, "precopy-ended", "pre-copy ended: %s\n", r->decision);
	if (r->channels)
		out_uint(o, "channels", r->channels_why ? "%" PRIu64 " data channels carried: " : NULL, r->channels);
	if (r->channels_why)
		out_string(o, "channels-why", "%s\n", r->channels_why);
	put_caps(o, a);
	out_uint(o, "rdma-channels", r->rdma_channels ? "%" PRIu64 " data channels over RDMA\n" : NULL, r->rdma_channels);
	out_uint(o, "channels-lost", r->channels_lost ? "%" PRIu64 " times a data channel was lost, " : NULL,
		 r->channels_lost);
	out_uint(o, "channels-rejoined", r->channels_lost ? "%" PRIu64 " times one came back\n" : NULL,
		 r->channels_rejoined);
	put_forecast(o, a);
	put_guest(o, r);
	put_ram(o, a);
	out_bytes(o, "device-state", "device state %s, ", r->device_state_bytes);
	out_uint(o, "digests-compared", "%" PRIu64 " digests compared\n", r->digests_compared);
	put_states(o, r);
	out_end(o);
}

int report_finish(const struct account *a, const char *error, bool json, const char *path)
{
	struct out *o = out_new(json ? NULL : stdout);
	int ret = 0;

	report_put(o, a, error);
	if (json)
		out_print_json(o, stdout);
	if (fflush(stdout) || ferror(stdout))
		ret = fail(EIO, "the report could not be written to standard output");
	if (path && out_write_report(o, path))
		ret = -EIO;
	out_free(o);
	return ret;
}
