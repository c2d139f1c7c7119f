/* SPDX-License-Identifier: GPL-2.0 */
/* What the page (html.c) and its charts (chart.c) share. */
#ifndef KMIG_HTML_H
#define KMIG_HTML_H

#include <math.h>

#include "tool.h"

static inline double finite_or_0(double value)
{
	return isfinite(value) ? value : 0;
}

static inline double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

/* As text; each returns @text. */
const char *duration(uint64_t ns, char text[32]);		/* "28 ms", "3.42 s", "12 min 5 s" */
const char *bytes(uint64_t value, char text[32]);		/* "1.5 GiB" */
const char *rate(double bytes_per_second, char text[32]);	/* in MB/s, three digits at least where there are some */

/* A section each: its heading, its key, its picture. Something was sent. */
void put_rates(FILE *f, const struct story *story);
void put_remaining(FILE *f, const struct story *story);
void put_downtime(FILE *f, const struct story *story);		/* or nothing, if it has not completed */

#endif /* KMIG_HTML_H */
