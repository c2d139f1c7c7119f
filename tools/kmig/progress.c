// SPDX-License-Identifier: GPL-2.0
/* How a migration comes along: one line on a terminal, or lines with -v. */
#include <inttypes.h>
#include <unistd.h>

#include "tool.h"

#define INTERVAL_MS 200

void progress_init(struct progress *p, bool verbose)
{
	*p = (struct progress){ .verbose = verbose, .terminal = isatty(STDERR_FILENO) };
}

static void clear_line(struct progress *p)
{
	if (p->line)
		fputs("\r\033[K", stderr);
	p->line = false;
}

static void print_line(struct progress *p, const struct kmig_report *r)
{
	char left[32], sent[32], eta[48] = "";

	format_bytes(r->remaining_bytes, left);
	format_bytes(r->transferred_bytes, sent);
	if (r->eta_ns)
		snprintf(eta, sizeof(eta), ", ETA %.1f s", (double)r->eta_ns / 1e9);
	clear_line(p);
	fprintf(stderr, "%s: round %u, transferred %s, remaining %s, %.1f MB/s, dirty %.0f pages/s%s",
		kmig_state_name(r->state), r->rounds, sent, left, r->bytes_per_second / 1e6,
		r->dirty_pages_per_second, eta);
	p->line = p->terminal;
	if (!p->terminal)
		fputc('\n', stderr);
	fflush(stderr);
}

void progress_update(struct progress *p, const struct kmig_report *r)
{
	bool changed = !p->begun || p->state != r->state;

	if (changed && p->verbose) {
		clear_line(p);
		fprintf(stderr, "state: %s at %.1f ms\n", kmig_state_name(r->state), (double)r->total_ns / 1e6);
	}
	p->begun = true;
	p->state = r->state;
	if (!p->terminal && !p->verbose)
		return;
	if (r->state != KMIG_STATE_FIRST_PASS && r->state != KMIG_STATE_ITERATION)
		return;
	if (now_ms() - p->last < (p->terminal ? INTERVAL_MS : 5 * INTERVAL_MS))
		return;
	p->last = now_ms();
	print_line(p, r);
}

void progress_round(struct progress *p, const struct kmig_round_report *r)
{
	if (!p->verbose)
		return;
	clear_line(p);
	fprintf(stderr, "round %u: %" PRIu64 " pages dirty, %" PRIu64 " sent, %" PRIu64 " zero, %.3f s, %.1f MB/s\n",
		r->round, r->dirty_pages, r->data_pages, r->zero_pages,
		(double)r->duration_ns / 1e9, r->bytes_per_second / 1e6);
}

void progress_end(struct progress *p)
{
	clear_line(p);
	fflush(stderr);
}
