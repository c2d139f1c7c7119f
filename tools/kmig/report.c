// SPDX-License-Identifier: GPL-2.0
/* The report of a migration: names as in QEMU's query-migrate, the same at both ends. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

static double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

void rounds_add(struct rounds *r, const struct kmig_round_report *round)
{
	struct kmig_round_report *table = realloc(r->table, (r->count + 1) * sizeof(*table));

	/* The table is for reading: a migration does not end for want of a line in it. */
	if (!table)
		return;
	r->table = table;
	r->table[r->count++] = *round;
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

static void put_ram(struct out *o, const struct kmig_report *r)
{
	uint64_t sent = r->zerocopy_bytes + r->copied_bytes;

	out_object(o, "ram");
	out_bytes(o, "total", "memory %s, ", r->ram_bytes);
	out_bytes(o, "transferred", "transferred %s, ", r->transferred_bytes);
	out_uint(o, "duplicate", "%" PRIu64 " zero pages, ", r->zero_pages);
	out_uint(o, "normal", "%" PRIu64 " data pages, ", r->data_pages);
	out_uint(o, "dirty-sync-count", "%" PRIu64 " rounds\n", r->rounds);
	out_uint(o, "page-size", NULL, r->page_size);
	out_bytes(o, "zero-copy-bytes", "zero-copied %s, ", r->zerocopy_bytes);
	out_bytes(o, "copied-bytes", "copied %s", r->copied_bytes);
	if (sent)
		out_text(o, " (%.1f %% zero-copied)", 100.0 * (double)r->zerocopy_bytes / (double)sent);
	out_text(o, "\n");
	/* Megabits, as QEMU's field of this name. */
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

static void put_rounds(struct out *o, const struct rounds *rounds)
{
	size_t i;

	if (rounds->count)
		out_text(o, "%6s %10s %10s %10s %12s %9s %9s %12s\n", "ROUND", "DIRTY", "SENT", "ZERO",
			 "BYTES", "SECONDS", "MB/s", "DIRTY/s");
	out_array(o, "rounds");
	for (i = 0; i < rounds->count; i++) {
		const struct kmig_round_report *r = &rounds->table[i];

		out_object(o, NULL);
		out_uint(o, "round", "%6" PRIu64, r->round);
		out_uint(o, "dirty", " %10" PRIu64, r->dirty_pages);
		out_uint(o, "sent", " %10" PRIu64, r->data_pages);
		out_uint(o, "zero", " %10" PRIu64, r->zero_pages);
		out_uint(o, "bytes", " %12" PRIu64, r->bytes);
		out_float(o, "seconds", " %9.3f", (double)r->duration_ns / 1e9);
		out_text(o, " %9.1f", r->bytes_per_second / 1e6);
		out_float(o, "mbps", NULL, r->bytes_per_second * 8 / 1e6);
		out_float(o, "dirty-pages-rate", " %12.0f\n", r->dirty_pages_per_second);
		out_end(o);
	}
	out_end(o);
}

void report_put(struct out *o, const struct kmig_report *r, const struct rounds *rounds,
		const char *error)
{
	out_object(o, NULL);
	put_rounds(o, rounds);
	out_string(o, "status", "%s: ", status_name(r->verdict));
	if (*error)
		out_string(o, "error", NULL, error);
	out_float(o, "total-time", "total time %.0f ms, ", ms(r->total_ns));
	out_float(o, "downtime", "downtime %.1f ms, ", ms(r->downtime_ns));
	out_float(o, "setup-time", "setup %.1f ms\n", ms(r->setup_ns));
	put_ram(o, r);
	out_bytes(o, "device-state", "device state %s, ", r->device_state_bytes);
	out_uint(o, "digests-compared", "%" PRIu64 " digests compared\n", r->digests_compared);
	put_states(o, r);
	out_end(o);
}

int report_finish(const struct kmig_report *report, const struct rounds *rounds,
		  const char *error, bool json, const char *path)
{
	struct out *o = out_new(json ? NULL : stdout);
	int ret = 0;

	report_put(o, report, rounds, error);
	if (json)
		out_print_json(o, stdout);
	if (path)
		ret = out_write_report(o, path);
	out_free(o);
	fflush(stdout);
	return ret;
}
