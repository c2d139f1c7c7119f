// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * Measuring a guest's working-set curve before it is moved: its pages are protected once, and
 * then looked at, without protecting them again, after intervals that double. Each look counts
 * the distinct pages written since the beginning, which is a point of the curve.
 *
 * Of a large guest a sample of its chunks is watched, chosen with equal chances, and what is
 * found is scaled up: the cost does not grow with the guest.
 */
#include "forecast.h"

#include <poll.h>
#include <sys/random.h>

#define LOOKS 8
#define SAMPLE_CHUNKS 512	/* 1 GiB */

struct probe {
	struct kmig_ctx *ctx;
	struct kmig_region *const *regions;
	unsigned int count;
	unsigned int tracked;			/* of the regions, by us */
	struct {
		unsigned int region;
		uint64_t chunk;
	} sample[SAMPLE_CHUNKS];
	uint64_t chosen;		/* of @sample */
	uint64_t chunks;		/* that exist */
};

/* Of a sequence of unknown length, each member with the same chance. */
static void choose(struct probe *probe, unsigned int region, uint64_t chunk)
{
	uint64_t place = probe->chunks++;

	if (place >= SAMPLE_CHUNKS) {
		if (getrandom(&place, sizeof(place), 0) != sizeof(place))
			return;
		place %= probe->chunks;
		if (place >= SAMPLE_CHUNKS)
			return;
	} else {
		probe->chosen++;
	}
	probe->sample[place].region = region;
	probe->sample[place].chunk = chunk;
}

static void choose_chunks(struct probe *probe)
{
	for (unsigned int i = 0; i < probe->count; i++) {
		struct kmig_region *region = probe->regions[i];
		uint64_t step = kmig_chunk_bytes(region);
		off_t at = 0;

		while ((uint64_t)at < region->bytes && (at = lseek(region->fd, at, SEEK_DATA)) >= 0) {
			choose(probe, i, at / step);
			at = (at / step + 1) * step;
		}
	}
}

static int track(struct probe *probe)
{
	uint64_t pinned;
	int err;

	for (unsigned int i = 0; i < probe->count; i++) {
		struct kmig_region *region = probe->regions[i];

		if (region->kind != KMIG_REGION_LMTRACK)
			return kmig_fail(probe->ctx, -EOPNOTSUPP, "region %s is a memfd: what is written to it cannot be watched", region->name);
		/* The first look harvests: whoever else tracks it would never hear of those writes. */
		if (region->tracked)
			return kmig_region_track_failed(region, -EBUSY, 0);
		/* Those written by devices are dirty in every look, as they are in every round. */
		err = kmig_region_try_track(region, true, &pinned);
		if (err)
			return kmig_region_track_failed(region, err, pinned);
		probe->tracked++;
	}
	return 0;
}

/* Count the pages of the sample that are dirty, and protect them again if told so. */
static int look(struct probe *probe, bool clear, uint64_t *dirty)
{
	*dirty = 0;
	for (uint64_t i = 0; i < probe->chosen; i++) {
		struct kmig_region *region = probe->regions[probe->sample[i].region];
		uint64_t first = probe->sample[i].chunk * LMTRACK_CHUNK_PAGES;
		uint64_t pages = kmig_region_pages(region) - first, found;
		uint64_t bitmap[LMTRACK_CHUNK_PAGES / 64] = { 0 };
		int err;

		if (pages > LMTRACK_CHUNK_PAGES)
			pages = LMTRACK_CHUNK_PAGES;
		err = kmig_region_dirty_get(region, clear, first, pages, bitmap, &found);
		if (err)
			return err;
		*dirty += found;
	}
	return 0;
}

static int wait_until(struct probe *probe, uint64_t when_ns, int abort_fd)
{
	struct pollfd abort = { .fd = abort_fd, .events = POLLIN };
	uint64_t now;

	while ((now = kmig_now_ns()) < when_ns) {
		struct timespec left = { (when_ns - now) / 1000000000, (when_ns - now) % 1000000000 };

		if (ppoll(&abort, 1, &left, NULL) > 0)
			return kmig_fail(probe->ctx, -ECANCELED, "aborted");
	}
	return 0;
}

static int measure(struct probe *probe, uint32_t duration_ms, int abort_fd, struct kmig_curve_point *points,
		   unsigned int *npoints)
{
	uint64_t begin = kmig_now_ns(), dirty, interval = kmig_ms(duration_ms) >> (LOOKS - 1);
	int err;

	err = look(probe, true, &dirty);
	/* Chunks were protected one after the other: half of them before the middle of it. */
	begin += (kmig_now_ns() - begin) / 2;
	for (int i = 0; i < LOOKS && !err; i++, interval *= 2) {
		uint64_t looked;

		err = wait_until(probe, begin + interval, abort_fd);
		looked = kmig_now_ns();
		if (!err)
			err = look(probe, false, &dirty);
		if (err)
			break;
		looked += (kmig_now_ns() - looked) / 2;
		points[*npoints].interval_ns = looked - begin;
		points[*npoints].pages = probe->chosen ? dirty * ((double)probe->chunks / probe->chosen) : 0;
		++*npoints;
	}
	return err;
}

int kmig_probe_until(struct kmig_ctx *ctx, struct kmig_region *const *regions, unsigned int count,
		     uint32_t duration_ms, int abort_fd, struct kmig_curve_point *points, unsigned int *npoints)
{
	struct probe *probe;
	int err;

	*npoints = 0;
	if (!count || count > LMTRACK_REGIONS_MAX)
		return kmig_fail(ctx, -EINVAL, "probe: %u regions, give 1 to %d", count, LMTRACK_REGIONS_MAX);
	if (duration_ms < KMIG_PROBE_MS_MIN || duration_ms > KMIG_PROBE_MS_MAX)
		return kmig_fail(ctx, -EINVAL, "probe: %u ms, give %d to %d", duration_ms, KMIG_PROBE_MS_MIN, KMIG_PROBE_MS_MAX);
	probe = calloc(1, sizeof(*probe));
	if (!probe)
		return kmig_fail(ctx, -ENOMEM, "probe: out of memory");
	probe->ctx = ctx;
	probe->regions = regions;
	probe->count = count;
	err = track(probe);
	if (!err) {
		choose_chunks(probe);
		err = measure(probe, duration_ms, abort_fd, points, npoints);
	}
	for (unsigned int i = 0; i < probe->tracked; i++)
		kmig_region_track_stop(regions[i]);
	free(probe);
	return err;
}

int kmig_probe(struct kmig_ctx *ctx, struct kmig_region *const *regions, unsigned int count, uint32_t duration_ms,
	       struct kmig_curve_point *points, unsigned int *npoints)
{
	return kmig_probe_until(ctx, regions, count, duration_ms, -1, points, npoints);
}
