/* SPDX-License-Identifier: GPL-2.0 */
/*
 * For tests that need somebody to send to: a connection, and a thread at its end that stores the
 * pages. Whether the frames are right is for uapi_stream to check.
 */
#ifndef UAPI_SINK_H
#define UAPI_SINK_H

#include <endian.h>
#include <netinet/in.h>
#include <pthread.h>
#include <linux/lmtrack_wire.h>

#include "uapi_requests.h"

/* pair[0] is the sender's end. */
static inline int tcp_pair(int pair[2])
{
	struct sockaddr_in in = {
		.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	socklen_t length = sizeof(in);
	int ret = 0;

	pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(listener, (void *)&in, sizeof(in)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&in, &length) ||
	    connect(pair[0], (void *)&in, sizeof(in)))
		ret = -errno;
	pair[1] = ret ? -1 : accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	close(listener);
	return ret;
}

/**
 * struct sink - one connection that pages of one region come over
 * @thread:	reads them, until the connection ends
 * @fd:		its end of it
 * @copy:	of the region
 * @ended:	the last round whose end has come
 */
struct sink {
	pthread_t thread;
	int fd;
	unsigned char *copy;
	uint32_t ended;
};

static inline bool sink_read(int fd, void *to, size_t bytes)
{
	return recv(fd, to, bytes, MSG_WAITALL) == (ssize_t)bytes;
}

static inline bool sink_frame(struct sink *sink, const struct lmtrack_wire_frame *frame)
{
	struct lmtrack_wire_extent extents[LMTRACK_WIRE_EXTENTS_MAX];
	uint32_t count = le32toh(frame->extents), i;

	if (le32toh(frame->magic) != LMTRACK_WIRE_MAGIC || count > LMTRACK_WIRE_EXTENTS_MAX ||
	    (count && !sink_read(sink->fd, extents, count * sizeof(*extents))))
		return false;
	for (i = 0; i < count; i++) {
		unsigned char *at = sink->copy + le64toh(extents[i].first) * PAGE;
		size_t bytes = le32toh(extents[i].pages) * PAGE;

		if (frame->type == LMTRACK_FRAME_ZERO)
			memset(at, 0, bytes);
		else if (!sink_read(sink->fd, at, bytes))
			return false;
	}
	if (frame->type == LMTRACK_FRAME_ROUND_END)
		__atomic_store_n(&sink->ended, le32toh(frame->round), __ATOMIC_RELEASE);
	return true;
}

static inline void *sink_run(void *arg)
{
	struct sink *sink = arg;
	struct lmtrack_wire_frame frame;

	while (sink_read(sink->fd, &frame, sizeof(frame)) && sink_frame(sink, &frame))
		;
	return NULL;
}

/* Has all of the round come? */
static inline bool sink_has(struct sink *sink, uint32_t round)
{
	return EVENTUALLY(60, __atomic_load_n(&sink->ended, __ATOMIC_ACQUIRE) == round);
}

/* ---- A stream of one region and one channel ---- */

/* Its thread shall run on this CPU. */
static inline long stream_add_channel(int stream, int fd, unsigned int cpu)
{
	uint64_t cpus = 1ULL << cpu;
	struct lmtrack_stream_add_channel args = {
		.size = sizeof(args), .fd = fd, .cpumask = (uintptr_t)&cpus,
		.cpumask_bytes = sizeof(cpus),
	};

	return lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &args);
}

/* The errno that ended the round, 0, or what the request returned. */
static inline long round_error(int stream)
{
	struct lmtrack_stream_wait result;
	long ret = stream_wait(stream, 120000, &result);

	return ret ?: (long)result.error;
}

#endif /* UAPI_SINK_H */
