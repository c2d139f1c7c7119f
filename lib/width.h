/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How many data channels it takes, found out by measuring what is sent. */
#ifndef KMIG_WIDTH_H
#define KMIG_WIDTH_H

#include <stdbool.h>
#include <stdint.h>

struct kmig_width {
	unsigned int channels;		/* that carry */
	unsigned int step, most;
	const char *why;		/* it is settled; NULL: it is not */
	/* Not settled: */
	uint64_t settle_ns;
	unsigned int before;		/* channels, and what they carried; 0: there was no measurement */
	double rate;
	bool measuring;			/* since @since_ns, when @bytes had been sent */
	uint64_t since_ns, bytes;	/* 0: not begun */
};

/* From @step channels on, in steps of that, to @most. @trip_ns: to the destination and back. */
void kmig_width_start(struct kmig_width *width, unsigned int step, unsigned int most, uint64_t trip_ns);
/* What was found out does not hold any more. */
void kmig_width_restart(struct kmig_width *width);
/* Nothing is sent between two rounds: what was begun to be measured is void. */
void kmig_width_pause(struct kmig_width *width);
/* While a round is sent; so much has arrived, all told: true when @channels has changed. */
bool kmig_width_look(struct kmig_width *width, uint64_t now_ns, uint64_t bytes);

#endif /* KMIG_WIDTH_H */
