// SPDX-License-Identifier: GPL-2.0
/*
 * The report that is looked at: one HTML file with its style and its pictures (SVG) in it. No
 * script runs and nothing is fetched. It is well-formed XML as well, so that a program can
 * read it. What comes from outside, names and errors, goes through put_text() only.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include "html.h"

#define ROUNDS_SHOWN 50		/* in the table; of more, the first and the last of them */
#define THREADS_SHOWN 8

/* Colours that stay apart for the colour-blind: Okabe and Ito's. */
static const char head[] =
	"<!DOCTYPE html>\n"
	"<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
	"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
	"<meta name=\"viewport\" content=\"width=device-width\"/>\n"
	"<meta name=\"color-scheme\" content=\"light dark\"/>\n"
	"<title>kmig: report of a migration</title>\n"
	"<style>\n"
	":root { --back: #fff; --ink: #1c2024; --soft: #5b636b; --line: #dfe3e7; --band: #f3f5f7;\n"
	"  --wire: #0072b2; --dirty: #d55e00; --left: #00825f; --held: #aa4499; --paused: #d9a400;\n"
	"  --good: #00734f; --bad: #b3261e; --open: #8a5a00; }\n"
	"@media screen and (prefers-color-scheme: dark) {\n"
	":root { --back: #15181c; --ink: #e6e9ec; --soft: #9aa3ac; --line: #333a42; --band: #1d2228;\n"
	"  --wire: #56b4e9; --dirty: #ee7733; --left: #2bb58d; --held: #d98cc4; --paused: #f0c74a;\n"
	"  --good: #45c79b; --bad: #ff8a80; --open: #f0c74a; } }\n"
	"body { margin: 0 auto; padding: 24px 20px 40px; max-width: 860px; background: var(--back);\n"
	"  color: var(--ink); font: 15px/1.5 system-ui, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans', sans-serif;\n"
	"  font-variant-numeric: tabular-nums; }\n"
	"h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }\n"
	"h2 { font-size: 17px; margin: 34px 0 4px; }\n"
	"p { margin: 6px 0; } .soft, small { color: var(--soft); }\n"
	".good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }\n"
	".name { unicode-bidi: isolate; overflow-wrap: anywhere; }\n"
	".error { border-left: 4px solid var(--bad); background: var(--band); padding: 8px 12px;\n"
	"  white-space: pre-wrap; unicode-bidi: isolate; overflow-wrap: anywhere; }\n"
	".tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 0; }\n"
	".tile { flex: 1 1 104px; background: var(--band); border-radius: 8px; padding: 10px 14px; }\n"
	".tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; white-space: nowrap; }\n"
	".tile > span { color: var(--soft); font-size: 13px; display: block; line-height: 1.35; }\n"
	".key { display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 13px; color: var(--soft); margin: 0 0 4px; }\n"
	".key svg { width: 22px; height: 10px; margin-right: 6px; }\n"
	"svg.chart { display: block; width: 100%; height: auto; }\n"
	"svg text { fill: var(--soft); font-size: 12px; stroke: var(--back); stroke-width: 3px; paint-order: stroke; } svg text.ink { fill: var(--ink); }\n"
	"svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }\n"
	".grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }\n"
	".band { fill: var(--band); } .clear { fill: transparent; }\n"
	".paused { fill: var(--paused); opacity: .35; } svg text.pause { fill: var(--open); font-weight: 600; }\n"
	".area { stroke-width: 1.6; stroke-linejoin: round; }\n"
	".line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }\n"
	".wire { stroke: var(--wire); fill: var(--wire); fill-opacity: .2; }\n"
	".left { stroke: var(--left); fill: var(--left); fill-opacity: .25; }\n"
	".dirty { stroke: var(--dirty); } .held { stroke: var(--held); }\n"
	".ceiling { stroke: var(--ink); stroke-dasharray: 5 4; }\n"
	".cap { stroke: var(--ink); stroke-width: 2.4; stroke-dasharray: 0.1 5; stroke-linecap: round; }\n"
	".ours { fill: var(--wire); } .vmm { fill: var(--dirty); }\n"
	".wide { overflow-x: auto; }\n"
	"table { border-collapse: collapse; font-size: 13.5px; margin-top: 6px; width: 100%; }\n"
	"th, td { padding: 3px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }\n"
	"th { color: var(--soft); font-weight: 500; vertical-align: bottom; line-height: 1.25; }\n"
	"th:first-child, td:first-child { text-align: left; padding-left: 0; }\n"
	"td.bar { width: 22%; text-align: left; } td.bar i { display: block; height: 9px; min-width: 1px;\n"
	"  background: var(--wire); border-radius: 2px; } td.bar i.felt { background: var(--dirty); }\n"
	"footer { margin-top: 36px; font-size: 12.5px; color: var(--soft); }\n"
	"@media print { body { padding: 0; font-size: 12px; max-width: none; } section { break-inside: avoid; }\n"
	"  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }\n"
	"</style>\n</head>\n<body>\n";

/* ---- text -------------------------------------------------------------------------------- */

static void put_text(FILE *f, const char *text)
{
	const char *s = text;

	while (*s) {
		size_t length = character(s);

		if (!length)
			fputs("&#xfffd;", f);
		else if (*s == '&')
			fputs("&amp;", f);
		else if (*s == '<')
			fputs("&lt;", f);
		else if (*s == '>')
			fputs("&gt;", f);
		else if (*s == '"')
			fputs("&quot;", f);
		else if (*s == '\'')
			fputs("&#39;", f);
		else
			fwrite(s, 1, length, f);
		s += length ? length : 1;
	}
}

const char *duration(uint64_t ns, char text[32])
{
	double s = (double)ns / 1e9;

	if (s < 1)
		snprintf(text, 32, s < 0.01 ? "%.1f ms" : "%.0f ms", s * 1e3);
	else if (s < 120)
		snprintf(text, 32, s < 10 ? "%.2f s" : "%.1f s", s);
	else
		snprintf(text, 32, "%.0f min %.0f s", floor(s / 60), fmod(floor(s), 60));
	return text;
}

const char *bytes(uint64_t value, char text[32])
{
	format_bytes(value, text);
	return text;
}

const char *rate(double bytes_per_second, char text[32])
{
	double value = finite_or_0(bytes_per_second) / 1e6;

	snprintf(text, 32, value < 9.995 ? "%.2f" : value < 99.95 ? "%.1f" : "%.0f", value);
	return text;
}

/* ---- tables ------------------------------------------------------------------------------------ */

struct columns {
	bool zero, scan, held, ceiling, error;
};

static void put_round(FILE *f, const struct story *story, const struct timed_round *t, struct columns c,
		      uint64_t largest)
{
	uint64_t pause = story->account->report.state_ns[KMIG_STATE_BLACKOUT];
	const struct kmig_round_report *r = &t->report;
	double page = story->account->report.page_size;
	char text[32];

	fprintf(f, "<tr><td>%u%s</td><td class=\"bar\"><i style=\"width:%.1f%%\"></i></td><td>%s</td>", r->round,
		pause && t->begin_ns >= pause ? " <small>paused</small>" : "",
		largest ? 100.0 * (double)r->bytes / (double)largest : 0, bytes(r->bytes, text));
	fprintf(f, "<td>%" PRIu64 "</td><td>%" PRIu64 "</td>", r->dirty_pages, r->data_pages);
	if (c.zero)
		fprintf(f, "<td>%" PRIu64 "</td>", r->zero_pages);
	fprintf(f, "<td>%s</td>", duration(r->duration_ns, text));
	if (c.scan)
		fprintf(f, "<td>%s</td>", duration(r->scan_ns, text));
	fprintf(f, "<td>%s</td>", rate(r->bytes_per_second, text));
	/* Of the first nobody knows what was written before it. */
	fprintf(f, "<td>%s</td>", r->round > 1 ? rate(r->dirty_pages_per_second * page, text) : "");
	if (c.held)
		fprintf(f, "<td>%" PRIu64 "</td>", r->held_pages);
	if (c.ceiling)
		fprintf(f, "<td>%s</td>", r->stun_pages_per_second > 0 ? rate(r->stun_pages_per_second * page, text) : "");
	if (c.error && r->forecast_error > 0)
		fprintf(f, "<td>%.0f&#160;%%</td>", 100 * finite_or_0(r->forecast_error));
	else if (c.error)
		fputs("<td></td>", f);
	fputs("</tr>\n", f);
}

static void put_rounds(FILE *f, const struct story *story)
{
	const struct timeline *t = story->timeline;
	struct columns c = { 0 };
	uint64_t largest = 0;
	size_t i, out = t->rounds > ROUNDS_SHOWN ? t->rounds - ROUNDS_SHOWN : 0;

	if (!t->rounds)
		return;
	for (i = 0; i < t->rounds; i++) {
		const struct kmig_round_report *r = &t->round[i].report;

		largest = r->bytes > largest ? r->bytes : largest;
		c.zero |= r->zero_pages > 0;
		c.scan |= r->scan_ns > 0;
		c.held |= r->held_pages > 0;
		c.ceiling |= r->stun_pages_per_second > 0;
		c.error |= r->forecast_error > 0;
	}
	fprintf(f, "<section><h2>The rounds</h2>\n<div class=\"wide\"><table>\n<tr><th>round</th><th></th><th>size</th>"
		"<th>pages<br/>dirty</th><th>sent</th>%s<th>took</th>%s<th>MB/s</th><th>dirtied<br/>MB/s</th>%s%s%s</tr>\n",
		c.zero ? "<th>zero</th>" : "", c.scan ? "<th>of it<br/>scan</th>" : "", c.held ? "<th>held<br/>back</th>" : "",
		c.ceiling ? "<th>ceiling<br/>MB/s</th>" : "", c.error ? "<th>forecast<br/>off by</th>" : "");
	for (i = 0; i < t->rounds; i++) {
		if (out && i == ROUNDS_SHOWN / 2) {
			fprintf(f, "<tr><td colspan=\"%d\" class=\"soft\">%zu rounds are left out here</td></tr>\n",
				8 + c.zero + c.scan + c.held + c.ceiling + c.error, out);
			i += out;
		}
		put_round(f, story, &t->round[i], c, largest);
	}
	fputs("</table></div></section>\n", f);
}

static void put_guest(FILE *f, const struct story *story)
{
	const struct kmig_report *r = &story->account->report;
	const struct kmig_guest_cost *g = &r->guest;
	uint64_t begin = r->state_ns[KMIG_STATE_FIRST_PASS], end = r->state_ns[KMIG_STATE_BLACKOUT];
	char text[32], longest[32];
	unsigned int i;

	if (!g->write_faults && !g->stuns)
		return;
	if (!end)
		end = r->total_ns;
	fputs("<section><h2>What the guest felt</h2>\n", f);
	fprintf(f, "<p>%" PRIu64 " times it wrote a page that was watched: %s in all", g->write_faults,
		duration(g->fault_ns, text));
	if (g->write_faults)
		fprintf(f, ", %.1f &#181;s each", (double)g->fault_ns / (double)g->write_faults / 1e3);
	if (g->stuns)
		fprintf(f, ". %" PRIu64 " times it was held up (stun): %s in all, at most %s at a time", g->stuns,
			duration(g->stun_ns, text), duration(g->stun_max_ns, longest));
	else
		fputs(". It was not slowed down otherwise", f);
	fputs(".</p>\n", f);
	if (g->stuns && g->threads && end > begin) {
		fputs("<div class=\"wide\"><table>\n<tr><th>thread</th><th></th><th>of its time until the pause</th><th>held up</th>"
		      "<th>times</th></tr>\n", f);
		for (i = 0; i < g->threads && i < THREADS_SHOWN; i++) {
			double share = 100.0 * (double)g->thread[i].stun_ns / (double)(end - begin);

			fprintf(f, "<tr><td>%d</td><td class=\"bar\"><i class=\"felt\" style=\"width:%.1f%%\"></i></td>"
				"<td>%.1f&#160;%%</td><td>%s</td><td>%" PRIu64 "</td></tr>\n", (int)g->thread[i].id,
				fmin(share, 100), share, duration(g->thread[i].stun_ns, text), g->thread[i].stuns);
		}
		fputs("</table></div>\n", f);
	}
	fputs("</section>\n", f);
}

static void put_compared(FILE *f, const char *what, const char *expected, const char *came, double off)
{
	fprintf(f, "<tr><td>%s</td><td>%s</td><td>%s</td><td>", what, expected, came);
	if (isfinite(off))
		fprintf(f, "%+.0f&#160;%%", 100 * off);
	fputs("</td></tr>\n", f);
}

static void put_forecast(FILE *f, const struct story *story)
{
	const struct account *a = story->account;
	const struct kmig_forecast *e = &a->forecast.expected;
	struct kmig_forecast came;
	char one[32], two[32];

	if (!a->forecast.rounds)
		return;
	fprintf(f, "<section><h2>The forecast, and what came</h2>\n"
		"<p class=\"soft\">Made after round %zu, of what was then ahead", a->forecast.rounds);
	if (e->stun_pages_per_second > 0)
		fprintf(f, "; with the guest slowed down to %s MB/s", rate(e->stun_pages_per_second * a->report.page_size, one));
	if (!e->converges)
		fputs("; it expected that the limits would not be kept", f);
	fputs(".</p>\n", f);
	if (a->report.verdict != KMIG_COMPLETED) {
		fprintf(f, "<p>Expected: %u rounds, %s, %s, ", e->rounds, bytes(e->bytes, one), duration(e->total_ns, two));
		fprintf(f, "downtime %s.</p></section>\n", duration(e->downtime_ns, one));
		return;
	}
	came = account_came(a);
	fputs("<div class=\"wide\"><table>\n<tr><th></th><th>expected</th><th>came</th><th>off by</th></tr>\n", f);
	snprintf(one, sizeof(one), "%u", e->rounds);
	snprintf(two, sizeof(two), "%u", came.rounds);
	put_compared(f, "rounds", one, two, NAN);
	put_compared(f, "to send", bytes(e->bytes, one), bytes(came.bytes, two), (double)came.bytes / (double)e->bytes - 1);
	put_compared(f, "time", duration(e->total_ns, one), duration(came.total_ns, two),
		     (double)came.total_ns / (double)e->total_ns - 1);
	put_compared(f, "downtime", duration(e->downtime_ns, one), duration(came.downtime_ns, two),
		     (double)came.downtime_ns / (double)e->downtime_ns - 1);
	fputs("</table></div></section>\n", f);
}

/* ---- the page ------------------------------------------------------------------------------------ */

static void put_headline(FILE *f, const struct story *story)
{
	const struct kmig_report *r = &story->account->report;
	const char *class = "bad", *what = "Not moved";

	if (r->verdict == KMIG_COMPLETED) {
		class = "good";
		what = "Moved";
	} else if (r->verdict == KMIG_CANCELLED) {
		class = "open";
		what = "Cancelled";
	} else if (r->verdict == KMIG_UNKNOWN) {
		class = "open";
		what = "Unknown";
	}
	fprintf(f, "<header><h1><span class=\"%s\">%s:</span> <span class=\"name\">", class, what);
	put_text(f, story->guest);
	fputs("</span> to <span class=\"name\">", f);
	put_text(f, story->to);
	fputs("</span></h1>\n", f);
	if (r->verdict == KMIG_UNKNOWN)
		fputs("<p>It was committed, but the destination did not confirm. The guest is paused here and may run there: "
		      "look.</p>\n", f);
	if (story->error[0]) {
		fputs("<p class=\"error\">", f);
		put_text(f, story->error);
		fputs("</p>\n", f);
	}
	if (r->decision) {
		fputs("<p class=\"soft\">Sending while the guest runs ended, because: ", f);
		put_text(f, r->decision);
		fputs(".</p>\n", f);
	}
	fputs("</header>\n", f);
}

static void __attribute__((format(printf, 3, 4))) put_tile(FILE *f, const char *value, const char *fmt, ...)
{
	va_list args;

	fprintf(f, "<div class=\"tile\"><b>%s</b><span>", value);
	va_start(args, fmt);
	vfprintf(f, fmt, args);
	va_end(args);
	fputs("</span></div>\n", f);
}

static void put_tiles(FILE *f, const struct story *story)
{
	const struct kmig_report *r = &story->account->report;
	const struct timeline *t = story->timeline;
	double sent = 0, took = 0;
	char one[32], two[48];
	size_t i;

	fputs("<div class=\"tiles\">\n", f);
	put_tile(f, duration(r->total_ns, one), "in all, of it %s set-up", duration(r->setup_ns, two));
	if (r->verdict == KMIG_COMPLETED) {
		if (!story->downtime_ms)
			put_tile(f, duration(r->downtime_ns, one), "downtime");
		else
			put_tile(f, duration(r->downtime_ns, one), "downtime, <span class=\"%s\">%s the limit of %u ms</span>",
				 ms(r->downtime_ns) <= story->downtime_ms ? "good" : "bad",
				 ms(r->downtime_ns) <= story->downtime_ms ? "within" : "above", story->downtime_ms);
	}
	put_tile(f, bytes(r->transferred_bytes, one), "sent, of a guest with %s", bytes(r->ram_bytes, two));
	for (i = 0; i < t->rounds; i++) {
		sent += (double)t->round[i].report.bytes;
		took += (double)t->round[i].report.duration_ns;
	}
	if (took > 0) {
		snprintf(two, sizeof(two), "%s MB/s", rate(sent / took * 1e9, one));
		put_tile(f, two, "on the wire, over %zu round%s", t->rounds, t->rounds == 1 ? "" : "s");
	}
	if (r->guest.stuns)
		put_tile(f, duration(r->guest.stun_ns, one), "the guest was held up, all threads together");
	fputs("</div>\n", f);
}

static void put_page(FILE *f, const void *data)
{
	const struct story *story = data;
	const struct timeline *t = story->timeline;
	time_t now = time(NULL);
	struct tm tm;
	char date[64] = "";

	fputs(head, f);
	put_headline(f, story);
	if (t->count > 1 && story->account->report.state_ns[KMIG_STATE_FIRST_PASS]) {
		put_tiles(f, story);
		put_rates(f, story);
		put_remaining(f, story);
		put_downtime(f, story);
		put_rounds(f, story);
		put_forecast(f, story);
		put_guest(f, story);
	} else if (story->account->report.state_ns[KMIG_STATE_FIRST_PASS]) {
		fputs("<p>What was sent is not known any more.</p>\n", f);
	} else {
		fputs("<p>Nothing was sent.</p>\n", f);
	}
	if (localtime_r(&now, &tm))
		strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S %z", &tm);
	fprintf(f, "<footer>kmig %s, %s. MB are 1,000,000 bytes, MiB 1,048,576.</footer>\n</body>\n</html>\n",
		kmig_version(), date);
}

int html_write(const struct story *story, const char *path)
{
	return write_report(path, put_page, story);
}
