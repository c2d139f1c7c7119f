/* SPDX-License-Identifier: GPL-2.0 */
/*
 * /dev/lmtrack in user space, for tests that run libkmig without the module: link with
 * -Wl,--wrap=ioctl -Wl,--wrap=open. A region is a memfd; what is dirty is found by comparing
 * it with a copy of what was last sent; a stream sends that copy from a thread. Slow, and
 * exact: whatever is written after it was copied differs from the copy, and is dirty.
 */
#ifndef LIB_FAKE_H
#define LIB_FAKE_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <linux/lmtrack.h>

#include "../lib/wire.h"

#define FAKE_PAGE 4096u
#define FAKE_CHUNK (LMTRACK_CHUNK_PAGES * FAKE_PAGE)
#define FAKE_REGIONS 8
#define FAKE_STREAMS 8

struct fake_region {
	ino_t ino;
	uint64_t bytes;
	uint8_t *map, *copy;
	bool tracked;
	char name[LMTRACK_NAME_MAX];
};

struct fake_stream {
	int fd;
	uint64_t id;
	bool detect_zero;
	struct fake_region *regions[LMTRACK_REGIONS_MAX];
	unsigned int nregions;
	int sockets[LMTRACK_CHANNELS_MAX];
	unsigned int nsockets;
	struct lmtrack_channel_stats stats[LMTRACK_CHANNELS_MAX];
	uint64_t seq[LMTRACK_CHANNELS_MAX];
	uint64_t round_pages[LMTRACK_CHANNELS_MAX];
	uint32_t round, what;
	struct lmtrack_stream_wait result;
	_Atomic bool busy;
	_Atomic bool cancelled;
	pthread_t thread;
	bool thread_runs;
};

/* Faults to be injected. */
static struct {
	_Atomic bool no_device;
	_Atomic uint64_t lose_page;	/* this page plus 1: when dirty, it is taken for clean and not sent */
	_Atomic uint32_t cut_round;	/* at its end channel 0 is lost, which only this side knows */
	_Atomic uint64_t bytes_per_second;	/* 0: as fast as it goes */
	_Atomic unsigned int scan_us;		/* that a round of what is dirty looks before it sends */
	_Atomic bool no_times;			/* as a module that does not know what a round spent its time on */
} fake;

static struct fake_region fake_regions[FAKE_REGIONS];
static struct fake_stream fake_streams[FAKE_STREAMS];
static pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
/* Of the device: any inode will do. */
static ino_t fake_device_ino;

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);
int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);

static ino_t fake_ino(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? 0 : st.st_ino;
}

int __wrap_open(const char *path, int flags, ...)
{
	va_list args;
	int mode;
	int fd;

	va_start(args, flags);
	mode = flags & O_CREAT ? va_arg(args, int) : 0;
	va_end(args);
	if (strcmp(path, "/dev/lmtrack"))
		return __real_open(path, flags, mode);
	if (fake.no_device) {
		errno = ENOENT;
		return -1;
	}
	fd = memfd_create("fake-device", MFD_CLOEXEC);
	fake_device_ino = fake_ino(fd);
	return fd;
}

static int fake_error(int err)
{
	errno = err;
	return -1;
}

static struct fake_region *fake_region_of(int fd)
{
	ino_t ino = fake_ino(fd);

	for (int i = 0; i < FAKE_REGIONS; i++)
		if (fake_regions[i].ino && fake_regions[i].ino == ino)
			return &fake_regions[i];
	return NULL;
}

static int fake_region_create(const struct lmtrack_region_create *create)
{
	for (int i = 0; i < FAKE_REGIONS; i++) {
		struct fake_region *region = &fake_regions[i];
		int fd;

		if (region->ino)
			continue;
		fd = memfd_create(create->name, MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, create->region_size))
			return -1;
		region->map = mmap(NULL, create->region_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		region->copy = mmap(NULL, create->region_size, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		region->ino = fake_ino(fd);
		region->bytes = create->region_size;
		memcpy(region->name, create->name, sizeof(region->name));
		return fd;
	}
	return fake_error(ENOMEM);
}

/* Forget all regions: of tests that are over. */
static void __attribute__((unused)) fake_reset(void)
{
	for (int i = 0; i < FAKE_REGIONS; i++) {
		struct fake_region *region = &fake_regions[i];

		if (!region->ino)
			continue;
		munmap(region->map, region->bytes);
		munmap(region->copy, region->bytes);
		*region = (struct fake_region){ 0 };
	}
	for (int i = 0; i < FAKE_STREAMS; i++)
		if (!fake_streams[i].busy)
			fake_streams[i] = (struct fake_stream){ 0 };
	fake.no_device = false;
	fake.lose_page = 0;
	fake.cut_round = 0;
	fake.bytes_per_second = 0;
	fake.scan_us = 0;
	fake.no_times = false;
}

/* Which pages of a chunk exist: reading one that does not would make it exist. */
static void fake_present(const struct fake_region *region, uint64_t first, unsigned char *present)
{
	uint64_t left = region->bytes / FAKE_PAGE - first;

	memset(present, 0, LMTRACK_CHUNK_PAGES);
	if (left > LMTRACK_CHUNK_PAGES)
		left = LMTRACK_CHUNK_PAGES;
	mincore(region->map + first * FAKE_PAGE, left * FAKE_PAGE, present);
}

static bool fake_zero(const uint8_t *page)
{
	static const uint8_t zeroes[FAKE_PAGE];

	return !memcmp(page, zeroes, FAKE_PAGE);
}

static bool fake_dirty(const struct fake_region *region, uint64_t page, bool present)
{
	const uint8_t *copy = region->copy + page * FAKE_PAGE;

	return present ? memcmp(region->map + page * FAKE_PAGE, copy, FAKE_PAGE) : !fake_zero(copy);
}

static void fake_take(struct fake_region *region, uint64_t page, bool present)
{
	uint8_t *copy = region->copy + page * FAKE_PAGE;

	if (present)
		memcpy(copy, region->map + page * FAKE_PAGE, FAKE_PAGE);
	else
		memset(copy, 0, FAKE_PAGE);
}

static int fake_dirty_get(struct fake_region *region, struct lmtrack_dirty_get *get)
{
	uint64_t *bitmap = (uint64_t *)(uintptr_t)get->bitmap;
	unsigned char present[LMTRACK_CHUNK_PAGES];

	if (!region->tracked || get->first % LMTRACK_CHUNK_PAGES || get->first + get->pages > region->bytes / FAKE_PAGE)
		return fake_error(EINVAL);
	get->dirty = 0;
	for (uint64_t n = 0; n < get->pages; n++) {
		uint64_t page = get->first + n, at = page % LMTRACK_CHUNK_PAGES;

		if (!at)
			fake_present(region, page, present);
		if (!fake_dirty(region, page, present[at]))
			continue;
		bitmap[n / 64] |= 1ULL << (n % 64);
		get->dirty++;
		if (get->flags & LMTRACK_DIRTY_CLEAR)
			fake_take(region, page, present[at]);
	}
	return 0;
}

/* ---- The sender ---- */

static void fake_pace(uint64_t bytes)
{
	struct timespec wait;
	uint64_t ns;

	if (!fake.bytes_per_second)
		return;
	ns = bytes * 1000000000 / fake.bytes_per_second;
	wait = (struct timespec){ .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
	nanosleep(&wait, NULL);
}

static int fake_send(int fd, struct iovec *vec, unsigned int count)
{
	while (count) {
		struct msghdr msg = { .msg_iov = vec, .msg_iovlen = count };
		ssize_t n = sendmsg(fd, &msg, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		while (count && (size_t)n >= vec->iov_len) {
			n -= vec->iov_len;
			vec++;
			count--;
		}
		if (count) {
			vec->iov_base = (uint8_t *)vec->iov_base + n;
			vec->iov_len -= n;
		}
	}
	return 0;
}

/* Send pages of one chunk, all as data or all as zero. */
static int fake_send_pages(struct fake_stream *stream, uint32_t index, const uint64_t *pages, unsigned int count,
			   bool data)
{
	struct fake_region *region = stream->regions[index];
	static _Thread_local struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	static _Thread_local struct iovec vec[LMTRACK_WIRE_EXTENTS_MAX + 2];
	uint32_t channel = pages[0] / LMTRACK_CHUNK_PAGES % stream->nsockets;
	struct lmtrack_channel_stats *stats = &stream->stats[channel];
	struct lmtrack_wire_frame raw;
	struct kmig_frame frame = {
		.type = data ? LMTRACK_FRAME_DATA : LMTRACK_FRAME_ZERO,
		.stream = stream->id,
		.channel = channel,
		.round = stream->round,
		.region = index,
		.payload = data ? count * FAKE_PAGE : 0,
		.seq = stream->seq[channel]++,
	};
	unsigned int nvec = 2, extents = 0;

	for (unsigned int i = 0; i < count;) {
		unsigned int run = 1;

		while (i + run < count && pages[i + run] == pages[i] + run)
			run++;
		table[extents++] = (struct lmtrack_wire_extent){ .first = htole64(pages[i]), .pages = htole32(run) };
		if (data)
			vec[nvec++] = (struct iovec){ region->copy + pages[i] * FAKE_PAGE, (size_t)run * FAKE_PAGE };
		i += run;
	}
	frame.extents = extents;
	kmig_frame_encode(&frame, table, &raw);
	vec[0] = (struct iovec){ &raw, sizeof(raw) };
	vec[1] = (struct iovec){ table, extents * sizeof(table[0]) };
	stats->frames++;
	stats->header_bytes += sizeof(raw) + extents * sizeof(table[0]);
	stats->copied_bytes += frame.payload;
	stream->result.bytes += sizeof(raw) + extents * sizeof(table[0]) + frame.payload;
	stream->round_pages[channel] += count;
	*(data ? &stats->data_pages : &stats->zero_pages) += count;
	*(data ? &stream->result.data_pages : &stream->result.zero_pages) += count;
	stream->result.pages += count;
	fake_pace(frame.payload);
	return fake_send(stream->sockets[channel], vec, nvec);
}

static int fake_send_chunk(struct fake_stream *stream, uint32_t index, uint64_t first)
{
	struct fake_region *region = stream->regions[index];
	uint64_t data[LMTRACK_CHUNK_PAGES], zero[LMTRACK_CHUNK_PAGES];
	unsigned char present[LMTRACK_CHUNK_PAGES];
	unsigned int ndata = 0, nzero = 0;
	int err = 0;

	fake_present(region, first, present);
	for (unsigned int i = 0; i < LMTRACK_CHUNK_PAGES && first + i < region->bytes / FAKE_PAGE; i++) {
		bool all = stream->what == LMTRACK_SEND_ALL;

		if (all ? !present[i] : !fake_dirty(region, first + i, present[i]))
			continue;
		fake_take(region, first + i, present[i]);
		if (!all && fake.lose_page == first + i + 1)
			continue;
		if (!present[i] || (stream->detect_zero && fake_zero(region->copy + (first + i) * FAKE_PAGE)))
			zero[nzero++] = first + i;
		else
			data[ndata++] = first + i;
	}
	if (ndata)
		err = fake_send_pages(stream, index, data, ndata, true);
	if (nzero && !err)
		err = fake_send_pages(stream, index, zero, nzero, false);
	return err;
}

static int fake_end_round(struct fake_stream *stream, uint32_t channel)
{
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_ROUND_END,
		.stream = stream->id,
		.channel = channel,
		.round = stream->round,
		.seq = stream->seq[channel]++,
		.arg = stream->round_pages[channel],
	};
	struct lmtrack_wire_frame raw;
	struct iovec vec = { &raw, sizeof(raw) };

	if (!channel && fake.cut_round == stream->round)
		return shutdown(stream->sockets[channel], SHUT_RD);
	kmig_frame_encode(&frame, NULL, &raw);
	stream->round_pages[channel] = 0;
	return fake_send(stream->sockets[channel], &vec, 1);
}

static uint64_t fake_ns_between(const struct timespec *from, const struct timespec *to)
{
	return (to->tv_sec - from->tv_sec) * 1000000000ll + to->tv_nsec - from->tv_nsec;
}

static void *fake_round(void *data)
{
	struct fake_stream *stream = data;
	unsigned int scan_us = stream->what == LMTRACK_SEND_DIRTY ? fake.scan_us : 0;
	struct timespec begin, found, end;
	int err = 0;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	usleep(scan_us);
	clock_gettime(CLOCK_MONOTONIC, &found);
	for (unsigned int i = 0; i < stream->nregions && !err; i++) {
		struct fake_region *region = stream->regions[i];

		for (uint64_t page = 0; page < region->bytes / FAKE_PAGE && !err; page += LMTRACK_CHUNK_PAGES)
			err = stream->cancelled ? -ECANCELED : fake_send_chunk(stream, i, page);
	}
	for (unsigned int i = 0; i < stream->nsockets && !err; i++)
		err = fake_end_round(stream, i);
	clock_gettime(CLOCK_MONOTONIC, &end);
	stream->result.round = stream->round;
	stream->result.error = -err;
	stream->result.channel = err ? 0 : -1;
	stream->result.duration_ns = fake_ns_between(&begin, &end);
	if (!fake.no_times) {
		stream->result.harvest_ns = fake_ns_between(&begin, &found);
		stream->result.send_ns = stream->result.wire_ns = fake_ns_between(&found, &end);
	}
	stream->busy = false;
	eventfd_write(stream->fd, 1);
	return NULL;
}

static struct fake_stream *fake_stream_of(int fd)
{
	for (int i = 0; i < FAKE_STREAMS; i++)
		if (fake_streams[i].fd == fd && fd)
			return &fake_streams[i];
	return NULL;
}

static int fake_stream_create(const struct lmtrack_stream_create *create)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct fake_stream *stream = fake_stream_of(fd);

	for (int i = 0; i < FAKE_STREAMS && !stream; i++)
		if (!fake_streams[i].fd)
			stream = &fake_streams[i];
	if (!stream)
		return fake_error(ENOMEM);
	*stream = (struct fake_stream){
		.fd = fd,
		.id = create->stream_id,
		.detect_zero = !(create->flags & LMTRACK_STREAM_NO_ZERO_DETECT),
	};
	return fd;
}

static int fake_stream_send(struct fake_stream *stream, const struct lmtrack_stream_send *send)
{
	eventfd_t count;

	if (stream->cancelled)
		return fake_error(EPIPE);
	if (stream->busy)
		return fake_error(EBUSY);
	if (!stream->nregions || !stream->nsockets || send->round <= stream->round)
		return fake_error(EINVAL);
	if (stream->thread_runs)
		pthread_join(stream->thread, NULL);
	eventfd_read(stream->fd, &count);
	stream->round = send->round;
	stream->what = send->what;
	stream->result = (struct lmtrack_stream_wait){ .channel = -1 };
	stream->busy = true;
	stream->thread_runs = !pthread_create(&stream->thread, NULL, fake_round, stream);
	return 0;
}

static int fake_stream_ioctl(struct fake_stream *stream, unsigned long request, void *arg)
{
	struct lmtrack_stream_add_region *add_region = arg;
	struct lmtrack_stream_add_channel *add_channel = arg;
	struct lmtrack_channel_stats *stats = arg;
	struct lmtrack_stream_wait *wait = arg;

	switch (request) {
	case LMTRACK_STREAM_ADD_REGION:
		stream->regions[add_region->index] = fake_region_of(add_region->fd);
		stream->nregions++;
		return stream->regions[add_region->index] ? 0 : fake_error(EINVAL);
	case LMTRACK_STREAM_ADD_CHANNEL:
		add_channel->channel = stream->nsockets;
		stream->sockets[stream->nsockets++] = add_channel->fd;
		return 0;
	case LMTRACK_STREAM_SEND:
		return fake_stream_send(stream, arg);
	case LMTRACK_STREAM_WAIT:
		if (stream->busy)
			return fake_error(ETIMEDOUT);
		*wait = stream->result;
		return 0;
	case LMTRACK_STREAM_CANCEL:
		stream->cancelled = true;
		for (unsigned int i = 0; i < stream->nsockets; i++)
			shutdown(stream->sockets[i], SHUT_RDWR);
		/* The module's threads are gone when the descriptor is; ours end here. */
		if (stream->thread_runs)
			pthread_join(stream->thread, NULL);
		stream->thread_runs = false;
		return 0;
	case LMTRACK_CHANNEL_STATS:
		*stats = stream->stats[stats->channel];
		return 0;
	}
	return fake_error(ENOTTY);
}

static int fake_region_ioctl(int fd, struct fake_region *region, unsigned long request, void *arg)
{
	struct lmtrack_region_info *info = arg;
	struct lmtrack_region_stats *stats = arg;
	struct stat st;

	switch (request) {
	case LMTRACK_REGION_INFO:
		info->region_size = region->bytes;
		info->region_id = region->ino;
		info->page_size = FAKE_PAGE;
		info->node = -1;
		info->state = region->tracked ? LMTRACK_TRACKED : LMTRACK_IDLE;
		memcpy(info->name, region->name, sizeof(info->name));
		return 0;
	case LMTRACK_REGION_STATS:
		fstat(fd, &st);
		stats->resident_pages = st.st_blocks * 512 / FAKE_PAGE;
		stats->mappers = 1;
		return 0;
	case LMTRACK_TRACK_START:
		if (region->tracked)
			return fake_error(EBUSY);
		region->tracked = true;
		return 0;
	case LMTRACK_TRACK_STOP:
		if (!region->tracked)
			return fake_error(EINVAL);
		region->tracked = false;
		return 0;
	case LMTRACK_DIRTY_GET:
		return fake_dirty_get(region, arg);
	}
	return fake_error(ENOTTY);
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	struct fake_stream *stream;
	struct fake_region *region;
	va_list args;
	void *arg;
	int ret;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	if (_IOC_TYPE(request) != LMTRACK_IOC_TYPE)
		return __real_ioctl(fd, request, arg);

	pthread_mutex_lock(&fake_lock);
	stream = fake_stream_of(fd);
	region = fake_region_of(fd);
	if (region)
		ret = fake_region_ioctl(fd, region, request, arg);
	else if (fake_ino(fd) == fake_device_ino && request == LMTRACK_REGION_CREATE)
		ret = fake_region_create(arg);
	else if (fake_ino(fd) == fake_device_ino && request == LMTRACK_STREAM_CREATE)
		ret = fake_stream_create(arg);
	else if (stream)
		ret = fake_stream_ioctl(stream, request, arg);
	else
		ret = fake_error(ENOTTY);
	pthread_mutex_unlock(&fake_lock);
	return ret;
}

#endif /* LIB_FAKE_H */
