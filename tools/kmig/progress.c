// SPDX-License-Identifier: GPL-2.0
/* How a migration comes along: one line on a terminal, or lines with -v. */
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "tool.h"

#define INTERVAL_MS 200
#define COLUMNS 80

void progress_init(struct progress *p, bool source, bool verbose)
{
	*p = (struct progress){ .source = source, .verbose = verbose, .terminal = isatty(STDERR_FILENO) };
}

/* Add it, after a comma, if it fits. */
static void __attribute__((format(printf, 3, 4))) add(char *text, unsigned int columns, const char *fmt, ...)
{
	size_t have = strlen(text);
	va_list args;
	char part[64];

	va_start(args, fmt);
	vsnprintf(part, sizeof(part), fmt, args);
	va_end(args);
	if (have + 2 + strlen(part) < columns)
		snprintf(text + have, PROGRESS_MAX - have, "%s%s", have ? ", " : "", part);
}

/* Two digits at least. */
static const char *digits(double value, char text[32])
{
	snprintf(text, 32, value < 9.95 ? "%.1f" : "%.0f", value);
	return text;
}

static void add_stage(const struct kmig_report *r, unsigned int columns, char *text)
{
	if (r->state == KMIG_STATE_FIRST_PASS)
		add(text, columns, "first pass");
	else
		add(text, columns, "round %u", r->rounds);
}

static void add_bytes(uint64_t bytes, const char *what, unsigned int columns, char *text)
{
	char human[32];

	format_bytes(bytes, human);
	add(text, columns, "%s %s", human, what);
}

/* A rate is measured at the end of a round: until the first one's, what was sent so far. */
static void add_first_pass(const struct kmig_report *r, unsigned int columns, char *text)
{
	double seconds = (double)(r->total_ns - r->state_ns[KMIG_STATE_FIRST_PASS]) / 1e9;
	uint64_t done = (r->data_pages + r->zero_pages) * r->page_size;
	char number[32];

	if (!done || !r->remaining_bytes || seconds <= 0)
		return;
	add_bytes(r->remaining_bytes, "left", columns, text);
	add(text, columns, "%s MB/s", digits((double)r->transferred_bytes / seconds / 1e6, number));
	add(text, columns, "done in %s s", digits((double)r->remaining_bytes * seconds / (double)done, number));
}

static void add_round(const struct kmig_report *r, unsigned int columns, char *text)
{
	double page = r->page_size;
	char number[32];

	add_bytes(r->remaining_bytes, "left", columns, text);
	if (r->bytes_per_second > 0)
		add(text, columns, "%s MB/s", digits(r->bytes_per_second / 1e6, number));
	if (r->dirty_pages_per_second > 0)
		add(text, columns, "dirty %s", digits(r->dirty_pages_per_second * page / 1e6, number));
	if (r->stun_pages_per_second > 0)
		add(text, columns, "max %s", digits(r->stun_pages_per_second * page / 1e6, number));
	if (r->eta_ns)
		add(text, columns, "ETA %s s", digits((double)r->eta_ns / 1e9, number));
	if (r->forecast.downtime_ns)
		add(text, columns, "downtime %.0f ms", (double)r->forecast.downtime_ns / 1e6);
}

/* What matters most comes first: what does not fit is left out. */
void progress_text(const struct kmig_report *r, bool source, unsigned int columns, char text[PROGRESS_MAX])
{
	text[0] = '\0';
	if (columns > PROGRESS_MAX)
		columns = PROGRESS_MAX;
	add_stage(r, columns, text);
	if (!source)
		add_bytes(r->transferred_bytes, "received", columns, text);
	else if (r->state == KMIG_STATE_FIRST_PASS)
		add_first_pass(r, columns, text);
	else
		add_round(r, columns, text);
}

static unsigned int columns_of_terminal(void)
{
	struct winsize size;

	if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) || !size.ws_col)
		return COLUMNS;
	return size.ws_col;
}

static void print_line(struct progress *p, const struct kmig_report *r)
{
	char text[PROGRESS_MAX];

	progress_text(r, p->source, p->terminal ? columns_of_terminal() : PROGRESS_MAX, text);
	if (p->terminal)
		status_line(text);
	else
		fprintf(stderr, "%s\n", text);
}

void progress_say(struct progress *p, const char *what)
{
	if (p->terminal)
		status_line(what);
}

static const char *doing(enum kmig_state state)
{
	switch (state) {
	case KMIG_STATE_FIRST_PASS:
	case KMIG_STATE_ITERATION:
		return NULL;
	case KMIG_STATE_BLACKOUT:
		return "the guest is paused, the rest is sent";
	case KMIG_STATE_CHECK:
		return "the guest is paused, both sides compare";
	case KMIG_STATE_CLEANUP:
		return "the guest runs at the destination";
	default:
		return "the destination is set up";
	}
}

void progress_update(struct progress *p, const struct kmig_report *r)
{
	bool changed = !p->begun || p->state != r->state;

	if (changed && p->verbose) {
		status_line(NULL);
		fprintf(stderr, "state: %s at %.1f ms\n", kmig_state_name(r->state), (double)r->total_ns / 1e6);
	}
	p->begun = true;
	p->state = r->state;
	if (!p->terminal && !p->verbose)
		return;
	if (doing(r->state)) {
		progress_say(p, r->verdict == KMIG_RUNNING ? doing(r->state) : NULL);
		return;
	}
	if (now_ms() - p->last < (p->terminal ? INTERVAL_MS : 5 * INTERVAL_MS))
		return;
	p->last = now_ms();
	print_line(p, r);
}

/* How long it scanned is told if there is room for it, the rest in any case. */
void progress_round_text(const struct kmig_round_report *r, unsigned int columns, char text[PROGRESS_MAX])
{
	snprintf(text, PROGRESS_MAX, "round %u: %" PRIu64 " pages dirty, %" PRIu64 " sent, %" PRIu64 " zero, %.3f s, %.1f MB/s",
		 r->round, r->dirty_pages, r->data_pages, r->zero_pages,
		 (double)r->duration_ns / 1e9, r->bytes_per_second / 1e6);
	if (r->held_pages)
		add(text, PROGRESS_MAX, "%" PRIu64 " held back", r->held_pages);
	if (r->stun_pages_per_second > 0)
		add(text, PROGRESS_MAX, "stunned to %.0f pages/s", r->stun_pages_per_second);
	if (r->scan_ns >= 500000)
		add(text, columns + 1, "scan %.3f s", (double)r->scan_ns / 1e9);
}

void progress_round(struct progress *p, const struct kmig_round_report *r)
{
	char text[PROGRESS_MAX];

	if (!p->verbose)
		return;
	status_line(NULL);
	progress_round_text(r, COLUMNS, text);
	fprintf(stderr, "%s\n", text);
}
