// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * How many data channels it takes. It begins with one for each path. What they carry is measured
 * while the guest's memory is sent, in the first pass and later, not with anything made up for it;
 * then more are let carry, one for each path, and it is measured again. When that carried no more
 * than GROWTH of what was there, it was not worth it: back to what there was before, until the cap on
 * the bandwidth changes.
 *
 * Measured is what has arrived: what is taken from the guest would also fill the new connections'
 * buffers. A measurement begins only when the new channels have come up to speed: TCP takes some round trips
 * for that.
 */
#include "width.h"

#include <stddef.h>

#define SETTLE_NS 200000000ull
#define SETTLE_TRIPS 10
#define MEASURE_NS 300000000ull
#define GROWTH 1.05

void kmig_width_start(struct kmig_width *width, unsigned int step, unsigned int most, uint64_t trip_ns)
{
	*width = (struct kmig_width){
		.channels = step,
		.step = step,
		.most = most,
		.settle_ns = SETTLE_NS + SETTLE_TRIPS * trip_ns,
	};
	if (step >= most)
		width->why = "there are no more processors";
}

void kmig_width_pause(struct kmig_width *width)
{
	width->measuring = false;
	width->since_ns = width->bytes = 0;
}

void kmig_width_restart(struct kmig_width *width)
{
	kmig_width_pause(width);
	width->before = 0;
	if (width->channels < width->most)
		width->why = NULL;
}

/* So many bytes a second with as many channels as there are. */
static bool measured(struct kmig_width *width, double rate)
{
	if (width->before && rate < width->rate * GROWTH) {
		width->channels = width->before;
		width->why = "more of them carried no more";
		return true;
	}
	width->before = width->channels;
	width->rate = rate;
	if (width->channels == width->most) {
		width->why = "there are no more processors";
		return false;
	}
	width->channels += width->step;
	if (width->channels > width->most)
		width->channels = width->most;
	return true;
}

bool kmig_width_look(struct kmig_width *width, uint64_t now_ns, uint64_t bytes)
{
	uint64_t took = now_ns - width->since_ns;
	double rate;

	if (width->why)
		return false;
	/* A channel was lost meanwhile. */
	if (bytes < width->bytes)
		kmig_width_pause(width);
	if (width->since_ns && took < (width->measuring ? MEASURE_NS : width->settle_ns))
		return false;
	rate = (bytes - width->bytes) * 1e9 / took;
	if (!width->since_ns || !width->measuring) {
		width->measuring = width->since_ns;
		width->since_ns = now_ns;
		width->bytes = bytes;
		return false;
	}
	kmig_width_pause(width);
	return measured(width, rate);
}
