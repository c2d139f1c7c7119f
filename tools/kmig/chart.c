// SPDX-License-Identifier: GPL-2.0
/*
 * The charts of the report that is looked at. Each section is HTML with an SVG in it; classes
 * give colours, see html.c. What a chart shows of a round or a stage, its tooltip says in words.
 */
#include <inttypes.h>
#include <string.h>

#include "html.h"

#define WIDTH 820
#define LEFT 58
#define RIGHT 12
#define TOP 40		/* two lines above the picture: the pause; the stages */
#define BOTTOM 26
#define CAPS_SHOWN 6	/* in words */

struct chart {
	FILE *f;
	double height;		/* of what is inside the axes */
	double begin, end;	/* ns, at the left edge: when sending began; and at the right one */
	double max;		/* at the upper edge */
};

static double x_of(const struct chart *c, double ns)
{
	return LEFT + (WIDTH - LEFT - RIGHT) * fmin(fmax((ns - c->begin) / (c->end - c->begin), 0), 1);
}

static double y_of(const struct chart *c, double value)
{
	return TOP + c->height * (1 - fmin(fmax(finite_or_0(value) / c->max, 0), 1));
}

/* The distance of ticks: 1, 2 or 5 times a power of ten, at most @ticks of them. */
static double tick_step(double max, int ticks)
{
	double step = pow(10, floor(log10(max / ticks)));

	if (step * ticks >= max)
		return step;
	if (2 * step * ticks >= max)
		return 2 * step;
	return 5 * step * ticks >= max ? 5 * step : 10 * step;
}

static int decimals(double step)
{
	return step < 1 ? (int)ceil(-log10(step) - 1e-9) : 0;
}

static void begin_chart(struct chart *c, const char *name)
{
	fprintf(c->f, "<svg class=\"chart\" viewBox=\"0 0 %d %.0f\" role=\"img\" aria-label=\"%s\">\n",
		WIDTH, TOP + c->height + BOTTOM, name);
}

static void put_value_axis(const struct chart *c, double per_unit, const char *unit)
{
	double max = c->max / per_unit, step = tick_step(max, 5), value;

	for (value = 0; value <= max * 1.0001; value += step) {
		double y = y_of(c, value * per_unit);

		fprintf(c->f, "<line class=\"%s\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>"
			"<text class=\"end\" x=\"%d\" y=\"%.1f\">%.*f</text>\n", value > 0 ? "grid" : "axis",
			LEFT, WIDTH - RIGHT, y, y, LEFT - 8, y + 4, decimals(step), value);
	}
	fprintf(c->f, "<text class=\"end\" x=\"%d\" y=\"%d\">%s</text>\n", LEFT - 8, TOP - 14, unit);
}

static void put_time_axis(const struct chart *c)
{
	double per_unit = c->end < 2e9 ? 1e6 : c->end < 6e11 ? 1e9 : 6e10;
	const char *unit = c->end < 2e9 ? "ms" : c->end < 6e11 ? "s" : "min";
	double max = c->end / per_unit, min = c->begin / per_unit, step = tick_step(max - min, 10), value;

	for (value = ceil(min / step) * step; value <= max * 1.0001; value += step) {
		double x = x_of(c, value * per_unit), y = TOP + c->height;
		bool last = value + step > max * 1.0001;

		fprintf(c->f, "<line class=\"axis\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>"
			"<text class=\"mid\" x=\"%.1f\" y=\"%.1f\">%.*f%s%s</text>\n", x, x, y, y + 4,
			last && x > WIDTH - RIGHT - 16 ? x - 8 : x, y + 18, decimals(step), value,
			last ? " " : "", last ? unit : "");
	}
}

/* The upper edge of a chart lies on a tick, so that the highest line has one above it. */
static double edge(double max, double per_unit)
{
	double step;

	if (max <= 0)
		return per_unit;
	step = tick_step(max / per_unit, 5) * per_unit;
	return step * ceil(max / step);
}

static void put_rect(const struct chart *c, const char *class, double begin, double end, double least)
{
	double x = x_of(c, begin), width = fmax(x_of(c, end) - x, least);

	fprintf(c->f, "<rect class=\"%s\" x=\"%.2f\" y=\"%d\" width=\"%.2f\" height=\"%.0f\"", class,
		fmin(x, WIDTH - RIGHT - width), TOP, width, c->height);
}

/* The stages, above the picture; the pause as a band through it. */
struct stage {
	double begin, end;
	char name[48];
};

static void put_stage(const struct chart *c, const struct stage *s)
{
	double from = x_of(c, s->begin), to = x_of(c, s->end);

	if (s->end <= s->begin)
		return;
	fprintf(c->f, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%d\" y2=\"%.0f\"/>\n", from, from,
		TOP - 18, TOP + c->height);
	/* As wide as these letters are, or not at all. */
	if (to - from > 6.6 * (double)strlen(s->name) + 4)
		fprintf(c->f, "<text class=\"mid\" x=\"%.1f\" y=\"%d\">%s</text>\n", (from + to) / 2, TOP - 6, s->name);
}

static void put_stages(const struct chart *c, const struct story *story)
{
	const struct account *a = story->account;
	const uint64_t *at = a->report.state_ns;
	double first = (double)at[KMIG_STATE_FIRST_PASS], more = (double)at[KMIG_STATE_ITERATION];
	double pause = (double)at[KMIG_STATE_BLACKOUT], end = (double)a->report.total_ns;
	double runs = pause + (double)a->report.downtime_ns;
	struct stage stage = { first, more > 0 ? more : pause > 0 ? pause : end, "first pass" };
	char text[32];

	put_stage(c, &stage);
	if (more > 0) {
		stage = (struct stage){ more, pause > 0 ? pause : end, "rounds" };
		if (a->precopy > 2)
			snprintf(stage.name, sizeof(stage.name), "rounds 2 to %zu", a->precopy);
		else if (a->precopy == 2)
			strcpy(stage.name, "round 2");
		put_stage(c, &stage);
	}
	if (pause <= 0)
		return;
	if (a->report.verdict != KMIG_COMPLETED)
		runs = end;
	put_rect(c, "paused", pause, runs, 2);
	fprintf(c->f, "><title>the guest is paused for %s</title></rect>\n", duration((uint64_t)(runs - pause), text));
	fprintf(c->f, "<text class=\"pause %s\" x=\"%.1f\" y=\"%d\">guest paused %s</text>\n",
		x_of(c, runs) > WIDTH / 2 ? "end" : "", x_of(c, x_of(c, runs) > WIDTH / 2 ? runs : pause), TOP - 24, text);
}

static void put_round_title(const struct story *story, FILE *f, const struct timed_round *t)
{
	char size[32], took[32], wire[32];

	fprintf(f, "<title>round %u: %s in %s, %s MB/s", t->report.round, bytes(t->report.bytes, size),
		duration(t->report.duration_ns, took), rate(t->report.bytes_per_second, wire));
	if (t->report.held_pages)
		fprintf(f, ", %s held back", bytes(t->report.held_pages * story->account->report.page_size, size));
	if (t->report.stun_pages_per_second > 0)
		fprintf(f, ", ceiling %s MB/s",
			rate(t->report.stun_pages_per_second * story->account->report.page_size, wire));
	fputs("</title>", f);
}

static struct chart chart(FILE *f, const struct story *story, double height)
{
	const struct kmig_report *r = &story->account->report;
	double begin = (double)r->state_ns[KMIG_STATE_FIRST_PASS];

	return (struct chart){ .f = f, .height = height, .begin = begin, .end = fmax((double)r->total_ns, begin + 1e6) };
}

/* Every other round lies on a band of its own. Those too narrow to be seen are left out. */
static void put_rounds_behind(const struct chart *c, const struct story *story)
{
	size_t i;

	for (i = 0; i < story->timeline->rounds; i++) {
		const struct timed_round *t = &story->timeline->round[i];
		double begin = (double)t->begin_ns, end = (double)t->end_ns;

		if (x_of(c, end) - x_of(c, begin) < 3)
			continue;
		put_rect(c, i % 2 ? "clear" : "band", begin, end, 0);
		fputc('>', c->f);
		put_round_title(story, c->f, t);
		fputs("</rect>\n", c->f);
	}
}

/*
 * What went over the wire from sample to sample, taken together until they are far enough
 * apart to be seen. A slow wire's count stands still while a chunk is under way: where it does
 * for long, nothing was sent. Calls @fn with each, if there is one; returns the highest.
 */
static double each_wire_rate(const struct timeline *t, const struct chart *c,
			     void (*fn)(const struct chart *c, double begin, double end, double value))
{
	double max = 0, width_ns = (c->end - c->begin) / 200, idle_ns = (c->end - c->begin) / 25;
	size_t from = 0, to;

	while (from < t->count && (double)t->sample[from].at_ns < c->begin)
		from++;
	for (to = from + 1; to < t->count; to++) {
		double begin = (double)t->sample[from].at_ns, end = (double)t->sample[to].at_ns;
		double sent = (double)t->sample[to].transferred_bytes - (double)t->sample[from].transferred_bytes;

		if (end - begin < width_ns || (sent <= 0 && end - begin < idle_ns && to + 1 < t->count))
			continue;
		sent = fmax(sent, 0) / (end - begin) * 1e9;
		max = fmax(max, sent);
		if (fn)
			fn(c, begin, end, sent);
		from = to;
	}
	return max;
}

static void put_wire_step(const struct chart *c, double begin, double end, double value)
{
	fprintf(c->f, "L%.1f %.1fH%.1f", x_of(c, begin), y_of(c, value), x_of(c, end));
}

/*
 * The rate of dirtying is known of the time between two looks, so each round tells it of the
 * one before it, and the report of the last.
 */
static double dirty_rate(const struct story *story, size_t round, double *begin, double *end)
{
	const struct timeline *t = story->timeline;
	const struct kmig_report *r = &story->account->report;
	double pause = (double)r->state_ns[KMIG_STATE_BLACKOUT];
	bool last = round + 1 == t->rounds;

	*begin = (double)t->round[round].begin_ns;
	*end = (double)(last ? t->round[round].end_ns : t->round[round + 1].begin_ns);
	if (pause > 0)
		*end = fmin(*end, pause);
	return (last ? r->dirty_pages_per_second : t->round[round + 1].report.dirty_pages_per_second) * r->page_size;
}

static void put_dirty_rate(const struct chart *c, const struct story *story)
{
	double begin, end, value;
	bool drawn = false;
	size_t i;

	fputs("<path class=\"line dirty\" d=\"", c->f);
	for (i = 0; i < story->timeline->rounds; i++) {
		value = dirty_rate(story, i, &begin, &end);
		if (end <= begin)
			break;
		fprintf(c->f, "%c%.1f %.1fH%.1f", drawn ? 'L' : 'M', x_of(c, begin), y_of(c, value), x_of(c, end));
		drawn = true;
	}
	fputs("\"/>\n", c->f);
}

/* It is taken away when the pause begins; what the samples tell is what would go on. */
static void put_ceiling(const struct chart *c, const struct story *story)
{
	const struct timeline *t = story->timeline;
	const struct kmig_report *r = &story->account->report;
	uint64_t pause = r->state_ns[KMIG_STATE_BLACKOUT];
	bool drawing = false;
	size_t i;

	fputs("<path class=\"line ceiling\" d=\"", c->f);
	for (i = 0; i < t->count; i++) {
		const struct sample *s = &t->sample[i];

		/* It holds until a sample tells otherwise. */
		if (drawing)
			fprintf(c->f, "H%.1f", fmin(x_of(c, (double)s->at_ns), pause ? x_of(c, (double)pause) : WIDTH));
		if (pause && s->at_ns >= pause)
			break;
		if (s->ceiling > 0)
			fprintf(c->f, "%c%.1f %.1f", drawing ? 'L' : 'M', x_of(c, (double)s->at_ns),
				y_of(c, s->ceiling * r->page_size));
		drawing = s->ceiling > 0;
	}
	fputs("\"/>\n", c->f);
}

static bool any_ceiling(const struct timeline *t)
{
	size_t i;

	for (i = 0; i < t->count; i++)
		if (t->sample[i].ceiling > 0)
			return true;
	return false;
}

/*
 * The cap on the bandwidth holds to the end, while the guest is paused, too. Changes that are too
 * close to be seen are taken together; a cap above the picture is not in it.
 */
static void put_caps(const struct chart *c, const struct account *a)
{
	bool drawing = false;
	double from, to;
	size_t i;

	from = (double)a->caps[0].at_ns;
	fputs("<path class=\"line cap\" d=\"", c->f);
	for (i = 0; i < a->cap_count; i++, from = to) {
		double value = (double)a->caps[i].bytes_per_second;

		to = i + 1 < a->cap_count ? (double)a->caps[i + 1].at_ns : c->end;
		if (i + 1 < a->cap_count && x_of(c, to) - x_of(c, from) < 0.5) {
			to = from;
			continue;
		}
		if (value > 0 && value <= c->max)
			fprintf(c->f, "%c%.1f %.1fH%.1f", drawing ? 'L' : 'M', x_of(c, from), y_of(c, value), x_of(c, to));
		drawing = value > 0 && value <= c->max;
	}
	fputs("\"/>\n", c->f);
}

/* In words, as one that is far above what was sent is not in the picture. */
static void put_caps_text(FILE *f, const struct account *a)
{
	char text[32];
	size_t i;

	fputs("<p><small>What might be sent: ", f);
	for (i = 0; i < a->cap_count && i < CAPS_SHOWN; i++) {
		const struct cap *cap = &a->caps[i];

		if (i)
			fputs("; ", f);
		if (cap->at_ns > a->report.state_ns[KMIG_STATE_FIRST_PASS])
			fprintf(f, "from %s on ", duration(cap->at_ns, text));
		if (cap->bytes_per_second)
			fprintf(f, "no more than %s MB/s", rate((double)cap->bytes_per_second, text));
		else
			fputs("what the network takes", f);
	}
	if (i < a->cap_count)
		fprintf(f, "; and %zu changes more", a->cap_count - i);
	fputs(".</small></p>\n", f);
}

static void put_key(FILE *f, const char *class, const char *text)
{
	fprintf(f, "<span><svg viewBox=\"0 0 22 10\"><path class=\"line %s\" d=\"M0 5H22\"/></svg>%s</span>", class, text);
}

void put_rates(FILE *f, const struct story *story)
{
	const struct timeline *t = story->timeline;
	const struct account *a = story->account;
	double page = a->report.page_size, begin, end, max, most;
	struct chart c = chart(f, story, 210);
	bool ceiling = any_ceiling(t);
	size_t i;

	max = each_wire_rate(t, &c, NULL);
	for (i = 0; i < t->rounds; i++)
		max = fmax(max, finite_or_0(dirty_rate(story, i, &begin, &end)));
	for (i = 0; i < t->count; i++)
		max = fmax(max, finite_or_0(t->sample[i].ceiling * page));
	/* One far away would make everything else small. */
	for (i = 0, most = 2 * max; i < a->cap_count; i++)
		if ((double)a->caps[i].bytes_per_second <= most)
			max = fmax(max, (double)a->caps[i].bytes_per_second);
	c.max = edge(max, 1e6);

	fputs("<section><h2>What was sent, what was written</h2>\n<div class=\"key\">", f);
	put_key(f, "wire", "sent, over the wire");
	if (t->rounds)
		put_key(f, "dirty", "dirtied by the guest");
	if (ceiling)
		put_key(f, "ceiling", "the most it was let dirty (stun)");
	if (a->cap_count)
		put_key(f, "cap", "the most that might be sent (--max-bandwidth)");
	fputs("</div>\n", f);
	if (a->cap_count)
		put_caps_text(f, a);
	begin_chart(&c, "Rates over time");
	put_rounds_behind(&c, story);
	put_value_axis(&c, 1e6, "MB/s");
	put_time_axis(&c);
	put_stages(&c, story);
	fprintf(f, "<path class=\"area wire\" d=\"M%.1f %.1f", x_of(&c, c.begin), y_of(&c, 0));
	each_wire_rate(t, &c, put_wire_step);
	fprintf(f, "V%.1f\"/>\n", y_of(&c, 0));
	if (t->rounds)
		put_dirty_rate(&c, story);
	if (ceiling)
		put_ceiling(&c, story);
	if (a->cap_count)
		put_caps(&c, a);
	fputs("</svg></section>\n", f);
}

/* ---- what was left ------------------------------------------------------------------------- */

static double pages_of(const struct story *story, uint64_t pages)
{
	return (double)pages * story->account->report.page_size;
}

/* Each round begins with all that was dirty, and ends with nothing left of it. */
static void put_left(const struct chart *c, const struct story *story)
{
	const struct timeline *t = story->timeline;
	size_t i, s = 0;

	while (s < t->count && (double)t->sample[s].at_ns < c->begin)
		s++;
	fprintf(c->f, "<path class=\"area left\" d=\"M%.1f %.1f", x_of(c, c->begin), y_of(c, 0));
	for (i = 0; i < t->rounds; i++) {
		const struct timed_round *r = &t->round[i];

		while (s < t->count && t->sample[s].at_ns <= r->begin_ns)
			s++;
		fprintf(c->f, "H%.1fV%.1f", x_of(c, (double)r->begin_ns), y_of(c, pages_of(story, r->report.dirty_pages)));
		for (; s < t->count && t->sample[s].at_ns <= r->end_ns; s++)
			fprintf(c->f, "L%.1f %.1f", x_of(c, (double)t->sample[s].at_ns),
				y_of(c, (double)t->sample[s].remaining_bytes));
		fprintf(c->f, "L%.1f %.1f", x_of(c, (double)r->end_ns), y_of(c, 0));
	}
	/* What came after the last round that was stored: all there is of a run that failed. */
	if (story->account->report.verdict != KMIG_COMPLETED && s < t->count) {
		fprintf(c->f, "V%.1f", y_of(c, (double)t->sample[s].remaining_bytes));
		for (; s < t->count; s++)
			fprintf(c->f, "L%.1f %.1f", x_of(c, (double)t->sample[s].at_ns),
				y_of(c, (double)t->sample[s].remaining_bytes));
	}
	fprintf(c->f, "V%.1f\"/>\n", y_of(c, 0));
}

static void put_held(const struct chart *c, const struct story *story)
{
	const struct timeline *t = story->timeline;
	size_t i;

	fputs("<path class=\"line held\" d=\"", c->f);
	for (i = 0; i < t->count; i++)
		fprintf(c->f, i ? "H%.1fV%.1f" : "M%.1f %.1f", x_of(c, (double)t->sample[i].at_ns),
			y_of(c, pages_of(story, t->sample[i].held_pages)));
	fputs("\"/>\n", c->f);
}

void put_remaining(FILE *f, const struct story *story)
{
	const struct timeline *t = story->timeline;
	struct chart c = chart(f, story, 150);
	double max = 0, held = 0, per_unit = 1;
	char size[32], text[96];
	int unit = 0;
	static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB" };
	size_t i;

	for (i = 0; i < t->count; i++) {
		max = fmax(max, (double)t->sample[i].remaining_bytes);
		held = fmax(held, pages_of(story, t->sample[i].held_pages));
	}
	for (i = 0; i < t->rounds; i++)
		max = fmax(max, pages_of(story, t->round[i].report.dirty_pages));
	max = fmax(max, held);
	for (; unit < 4 && max / per_unit >= 2048; unit++)
		per_unit *= 1024;
	c.max = edge(max, per_unit);

	fputs("<section><h2>What was left to send in each round</h2>\n<div class=\"key\">", f);
	put_key(f, "left", "left of the round");
	if (held > 0) {
		format_bytes((uint64_t)held, size);
		snprintf(text, sizeof(text), "held back until the pause, since always dirty: %s at most", size);
		put_key(f, "held", text);
	}
	fputs("</div>\n", f);
	begin_chart(&c, "What was left to send, over time");
	put_rounds_behind(&c, story);
	put_value_axis(&c, per_unit, units[unit]);
	put_time_axis(&c);
	put_stages(&c, story);
	put_left(&c, story);
	if (held > 0)
		put_held(&c, story);
	fputs("</svg></section>\n", f);
}

/* ---- the downtime ---------------------------------------------------------------------------- */

struct part {
	const char *name, *what;
	uint64_t ns;
	bool vmm;		/* its doing, not ours */
};

#define PART_LABEL 130
#define PART_TOP 22
#define PART_ROW 24

static void put_part(FILE *f, const struct part *part, double x, double y, double width)
{
	fprintf(f, "<g><title>%s: %s</title><text class=\"end ink\" x=\"%d\" y=\"%.1f\">%s</text>", part->name, part->what,
		PART_LABEL - 8, y + 12, part->name);
	fprintf(f, "<rect class=\"%s\" x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"16\"/>", part->vmm ? "vmm" : "ours",
		x, y, fmax(width, 1));
	fprintf(f, "<text x=\"%.1f\" y=\"%.1f\">%.1f ms</text></g>\n", x + width + 6, y + 12, ms(part->ns));
}

static void put_mark(FILE *f, const char *class, double x, double top, double foot)
{
	fprintf(f, "<line class=\"%s\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.0f\" y2=\"%.0f\"/>\n", class, x, x, top, foot);
}

/* One after the other, as they were: each begins where the one before it ends. */
void put_downtime(FILE *f, const struct story *story)
{
	const struct kmig_report *r = &story->account->report;
	const struct kmig_downtime *d = &r->downtime;
	const struct part part[] = {
		{ "pause", "QEMU pauses the guest", d->pause_ns, true },
		{ "device state out", "while the last round is looked for and sent", d->save_ns, true },
		{ "last harvest", "of the last round, beyond that: looking for what is to be sent", r->memory_harvest_ns, false },
		{ "last copy", "and sending it, until the destination has stored it", r->memory_copy_ns, false },
		{ "digests", "both sides compare what it carried", d->digest_ns, false },
		{ "device state in", "QEMU at the destination loads it", d->load_ns, true },
		{ "commit", "the last word, there and back", d->commit_ns, false },
		{ "resume", "QEMU at the destination runs the guest", d->resume_ns, true },
	};
	const size_t parts = sizeof(part) / sizeof(part[0]);
	const double foot = PART_TOP + PART_ROW * (double)parts;
	double total = ms(story->account->report.downtime_ns), limit = story->downtime_ms, x = PART_LABEL, scale;
	/* A limit far away would make everything else small. */
	bool show_limit = limit > 0 && limit < 2 * total;
	size_t i;

	if (story->account->report.verdict != KMIG_COMPLETED || total <= 0)
		return;
	/* To the right of the longest there is room for its figure. */
	scale = (WIDTH - PART_LABEL - 90) / fmax(total, show_limit ? limit : 0);
	fputs("<section><h2>What the downtime was made of</h2>\n<div class=\"key\"><span><svg viewBox=\"0 0 22 10\">"
	      "<rect class=\"ours\" width=\"22\" height=\"10\"/></svg>memory and agreement</span>"
	      "<span><svg viewBox=\"0 0 22 10\"><rect class=\"vmm\" width=\"22\" height=\"10\"/></svg>QEMU</span></div>\n", f);
	fprintf(f, "<svg class=\"chart\" viewBox=\"0 0 %d %.0f\" role=\"img\" aria-label=\"The downtime by its causes\">\n",
		WIDTH, foot + 18);
	put_mark(f, "axis", PART_LABEL, PART_TOP - 4, foot);
	put_mark(f, "grid", PART_LABEL + total * scale, PART_TOP - 4, foot);
	if (show_limit) {
		put_mark(f, "ceiling", PART_LABEL + limit * scale, PART_TOP - 8, foot);
		fprintf(f, "<text class=\"mid\" x=\"%.1f\" y=\"10\">limit %.0f ms</text>\n", PART_LABEL + limit * scale, limit);
	}
	for (i = 0; i < parts; i++) {
		put_part(f, &part[i], x, PART_TOP + PART_ROW * (double)i, ms(part[i].ns) * scale);
		x += ms(part[i].ns) * scale;
	}
	fprintf(f, "<text class=\"ink end\" x=\"%.1f\" y=\"%.0f\">%.1f ms in all</text>\n", PART_LABEL + total * scale,
		foot + 14, total);
	fputs("</svg></section>\n", f);
}
