/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What libkmig's files share. Nothing here is exported. */
#ifndef KMIG_PRIVATE_H
#define KMIG_PRIVATE_H

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/lmtrack.h>

#include <kmig.h>

#define KMIG_ERROR_MAX 512

/*
 * Engines run threads of their own that log and fail, so the message and the log callback are
 * under @lock. kmig_ctx_error() hands out @error itself: it is read when no engine runs.
 */
struct kmig_ctx {
	pthread_mutex_t lock;
	kmig_log_fn log;
	void *log_data;
	char error[KMIG_ERROR_MAX];
};

void kmig_log(struct kmig_ctx *ctx, enum kmig_log_level level, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

/* Record the message of a failure, log it, and return @err (negative). */
int kmig_fail(struct kmig_ctx *ctx, int err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int kmig_vfail(struct kmig_ctx *ctx, int err, const char *fmt, va_list args);

/*
 * Copy an option structure that begins with its size. What the caller's does not have keeps
 * the default that @to holds; what it has beyond ours must be zero.
 */
int kmig_copy_sized(struct kmig_ctx *ctx, void *to, size_t known, size_t least, const void *from,
		    const char *what);

/* Fill a structure of the caller's that begins with its size, as far as it reaches. */
int kmig_fill_sized(struct kmig_ctx *ctx, void *to, const void *from, size_t known, const char *what);

/* The message, while other threads may fail. */
void kmig_copy_error(struct kmig_ctx *ctx, char text[KMIG_ERROR_MAX]);

/* Put a message back that later, lesser failures have replaced. */
void kmig_restore_error(struct kmig_ctx *ctx, const char text[KMIG_ERROR_MAX]);

/* A thread that takes no signals: they are the program's, for its own threads. */
int kmig_thread_start(pthread_t *thread, void *(*run)(void *), void *data);

static inline uint64_t kmig_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline uint64_t kmig_ms(uint64_t ms)
{
	return ms * 1000000;
}

/* ---- Region and stream, as the engines see them ---- */

struct kmig_region {
	struct kmig_ctx *ctx;
	int fd;
	enum kmig_region_kind kind;
	uint64_t bytes;
	uint32_t page_size;
	void *map;
	bool tracked;
	uint64_t *discarded;		/* a bit for each page, whole chunks: to be sent, a tracker may not know */
	char name[LMTRACK_NAME_MAX];
};

uint64_t kmig_region_resident(struct kmig_region *region);
/* The pages of a chunk that exist, without touching one. */
#define KMIG_CHUNK_WORDS (LMTRACK_CHUNK_PAGES / 64)
int kmig_region_exists(const struct kmig_region *region, uint64_t chunk, uint64_t bits[KMIG_CHUNK_WORDS]);
/* Punch a range out: it reads as zero and costs nothing. */
int kmig_region_punch(struct kmig_region *region, uint64_t offset, uint64_t length);

int kmig_stream_width(struct kmig_stream *stream, uint32_t channels);
/* @flags: of struct lmtrack_stream_send */
int kmig_stream_send_flags(struct kmig_stream *stream, uint32_t round, enum kmig_send_what what, uint32_t flags);

/* Channels over RDMA; see LMTRACK_STREAM_ADD_RDMA and what follows it. No messages. */
struct kmig_rdma_peer {
	const struct sockaddr *address;
	socklen_t address_length;
	const void *token;
	size_t token_bytes;
	uint32_t window_pages;
	uint32_t timeout_ms;
};
int kmig_stream_add_rdma(struct kmig_stream *stream, const struct kmig_rdma_peer *peer);	/* the channel's number */
/* EAGAIN: it waits for no window. */
int kmig_stream_rdma_wanted(struct kmig_stream *stream, uint32_t channel, uint32_t *region, uint64_t *first);
int kmig_stream_rdma_window(struct kmig_stream *stream, uint32_t channel, uint32_t region, uint64_t first,
			    uint64_t address, uint32_t rkey);

/* Bytes a second of all channels together; 0: no cap. */
int kmig_stream_cap(struct kmig_stream *stream, uint64_t bytes_per_second);

/* Tracking for those who may try again: no message; and the message for when they do not. */
uint64_t kmig_region_held(struct kmig_region *region);
int kmig_region_try_track(struct kmig_region *region, bool allow_pinned, uint64_t *pinned_pages);
int kmig_region_track_failed(struct kmig_region *region, int err, uint64_t pinned_pages);

static inline uint64_t kmig_region_pages(const struct kmig_region *region)
{
	return region->bytes / region->page_size;
}

static inline uint64_t kmig_chunk_bytes(const struct kmig_region *region)
{
	return (uint64_t)LMTRACK_CHUNK_PAGES * region->page_size;
}

static inline uint64_t kmig_region_chunks(const struct kmig_region *region)
{
	return (region->bytes + kmig_chunk_bytes(region) - 1) / kmig_chunk_bytes(region);
}

/* ---- Bitmaps of 64-bit words ---- */

static inline uint64_t kmig_words(uint64_t bits)
{
	return (bits + 63) / 64;
}

static inline bool kmig_bit(const uint64_t *map, uint64_t bit)
{
	return map[bit / 64] >> (bit % 64) & 1;
}

static inline void kmig_bit_set(uint64_t *map, uint64_t bit)
{
	map[bit / 64] |= 1ULL << (bit % 64);
}

static inline void kmig_bit_clear(uint64_t *map, uint64_t bit)
{
	map[bit / 64] &= ~(1ULL << (bit % 64));
}

static inline uint64_t kmig_bit_next_clear(const uint64_t *map, uint64_t bits, uint64_t bit)
{
	while (bit < bits && kmig_bit(map, bit))
		bit++;
	return bit;
}

/* The first set bit at or after @bit, or @bits. */
uint64_t kmig_bit_next(const uint64_t *map, uint64_t bits, uint64_t bit);

/* Processors that the calling thread may run on; 1 when that is not known. */
unsigned int kmig_cpus(void);

/* What this machine can still give: MemAvailable, and the limits of this process's cgroups. */
uint64_t kmig_memory_available(void);

#endif /* KMIG_PRIVATE_H */
