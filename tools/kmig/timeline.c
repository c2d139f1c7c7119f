// SPDX-License-Identifier: GPL-2.0
/* What happened when, in bounded memory: for the report that is looked at. */
#include <stdlib.h>

#include "tool.h"

/* Every other sample goes, but not the first, and the next come half as often. */
static void thin(struct timeline *t)
{
	size_t from, to = 1;

	for (from = 2; from < t->count; from += 2)
		t->sample[to++] = t->sample[from];
	t->count = to;
	t->spacing_ns = 2 * (t->sample[to - 1].at_ns - t->sample[0].at_ns) / TIMELINE_MAX;
}

void timeline_add(struct timeline *t, const struct kmig_report *r)
{
	struct sample now = {
		.at_ns = r->total_ns,
		.transferred_bytes = r->transferred_bytes,
		.remaining_bytes = r->remaining_bytes,
		.held_pages = r->held_pages,
		.ceiling = r->stun_pages_per_second,
	};
	bool replace;

	if (t->count && now.at_ns < t->sample[t->count - 1].at_ns)
		return;
	replace = t->count > 1 && now.at_ns - t->sample[t->count - 2].at_ns < t->spacing_ns;
	if (!replace && t->count == TIMELINE_MAX)
		thin(t);
	/* The last one always tells how things stand: who comes too soon after the one before takes its place. */
	if (replace)
		t->count--;
	t->sample[t->count++] = now;
}

void timeline_round(struct timeline *t, const struct kmig_report *r, const struct kmig_round_report *round)
{
	struct timed_round *rounds = realloc(t->round, (t->rounds + 1) * sizeof(*rounds));

	timeline_add(t, r);
	if (!rounds)
		return;
	t->round = rounds;
	t->round[t->rounds++] = (struct timed_round){
		.begin_ns = r->total_ns > round->duration_ns ? r->total_ns - round->duration_ns : 0,
		.end_ns = r->total_ns,
		.report = *round,
	};
}

void timeline_free(struct timeline *t)
{
	free(t->round);
	t->round = NULL;
	t->rounds = 0;
}
