/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of the raw ioctls share: thin wrappers that return what the kernel said, the
 * errno as a negative number, and never judge it.
 */
#ifndef LMTRACK_TEST_H
#define LMTRACK_TEST_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/lmtrack.h>

#define PAGE	4096UL
#define CHUNK	(LMTRACK_CHUNK_PAGES * PAGE)
#define MIB	(1UL << 20)

static inline long lmt_ioctl(int fd, unsigned int cmd, void *arg)
{
	long ret = ioctl(fd, cmd, arg);

	return ret < 0 ? -errno : ret;
}

/* A region's descriptor, or a negative errno. */
static inline int lmt_region(uint64_t bytes)
{
	struct lmtrack_region_create create = {
		.size = sizeof(create), .region_size = bytes, .node = -1, .name = "test",
	};
	int device = open("/dev/lmtrack", O_RDWR | O_CLOEXEC);
	int fd;

	if (device < 0)
		return -errno;
	fd = lmt_ioctl(device, LMTRACK_REGION_CREATE, &create);
	close(device);
	return fd;
}

static inline void *lmt_map(int fd, uint64_t bytes)
{
	return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

static inline int lmt_reopen(int fd)
{
	char path[64];
	int again;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	return again < 0 ? -errno : again;
}

static inline int lmt_start(int fd, uint32_t flags, uint64_t *pinned)
{
	struct lmtrack_track_start start = { .size = sizeof(start), .flags = flags };
	int ret = lmt_ioctl(fd, LMTRACK_TRACK_START, &start);

	if (pinned)
		*pinned = start.pinned;
	return ret;
}

static inline int lmt_stop(int fd)
{
	struct lmtrack_track_stop stop = { .size = sizeof(stop) };

	return lmt_ioctl(fd, LMTRACK_TRACK_STOP, &stop);
}

/* The number of dirty pages, or a negative errno; @bitmap is zeroed first. */
static inline long lmt_dirty(int fd, uint32_t flags, uint64_t first, uint64_t pages,
			     uint64_t *bitmap)
{
	struct lmtrack_dirty_get get = {
		.size = sizeof(get), .flags = flags, .first = first, .pages = pages,
		.bitmap = (uintptr_t)bitmap,
	};
	long ret;

	memset(bitmap, 0, (pages + 63) / 64 * 8);
	ret = lmt_ioctl(fd, LMTRACK_DIRTY_GET, &get);
	return ret < 0 ? ret : (long)get.dirty;
}

static inline struct lmtrack_region_stats lmt_stats(int fd)
{
	struct lmtrack_region_stats stats = { .size = sizeof(stats) };

	if (lmt_ioctl(fd, LMTRACK_REGION_STATS, &stats))
		memset(&stats, 0xff, sizeof(stats));
	return stats;
}

static inline int lmt_punch(int fd, uint64_t offset, uint64_t bytes)
{
	int ret = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);

	return ret < 0 ? -errno : 0;
}

static inline bool lmt_bit(const uint64_t *bitmap, uint64_t page)
{
	return bitmap[page / 64] >> page % 64 & 1;
}

static inline double lmt_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

#endif /* LMTRACK_TEST_H */
