/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the programs of `make bench` share. Each measures lmtrack beside a peer, in turn: ours,
 * theirs, ours, theirs, ... on one kernel, and prints one line of JSON per measurement on its
 * standard output; selftests/bench says what is in it. Lines that do not begin with '{' are
 * remarks.
 */
#ifndef BENCH_H
#define BENCH_H

#include <err.h>
#include <math.h>

#include "lmtrack_test.h"

#define BENCH_PAIRS	5
#define BENCH_PAIRS_MAX	32

/* Time as the machine's clock counts it: in a VM of --icount, a nanosecond is an instruction. */
static inline double bench_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

/* make bench QUICK=1: less memory, shorter times, the same cases. */
static inline bool bench_quick(void)
{
	const char *quick = getenv("BENCH_QUICK");

	return quick && *quick == '1';
}

struct bench {
	const char *row;
	char name[96];		/* the case: what was done, with its sizes */
	const char *peer;	/* what theirs is */
	const char *unit;
	bool higher;		/* a higher ratio is better */
	double target;		/* of the ratio ours / theirs; 0: none, for information */
	double limit;		/* what physics allows, in the unit; 0: not known */
	const char *limit_is;
	unsigned int pairs;
	double ours[BENCH_PAIRS_MAX], theirs[BENCH_PAIRS_MAX];
};

static inline void bench_print_values(const char *key, const double *values, unsigned int count)
{
	printf(", \"%s\": [", key);
	for (unsigned int i = 0; i < count; i++)
		printf("%s%.9g", i ? ", " : "", values[i]);
	printf("]");
}

/* Names hold no character that JSON would want escaped. */
static inline void bench_print(const struct bench *bench)
{
	printf("{\"row\": \"%s\", \"case\": \"%s\", \"peer\": \"%s\", \"unit\": \"%s\", \"better\": \"%s\"",
	       bench->row, bench->name, bench->peer, bench->unit, bench->higher ? "higher" : "lower");
	if (bench->target)
		printf(", \"target\": %g", bench->target);
	if (bench->limit)
		printf(", \"limit\": %.9g, \"limit_is\": \"%s\"", bench->limit, bench->limit_is);
	bench_print_values("ours", bench->ours, bench->pairs);
	bench_print_values("theirs", bench->theirs, bench->pairs);
	printf("}\n");
	fflush(stdout);
}

#endif /* BENCH_H */
