/* SPDX-License-Identifier: GPL-2.0 */
/* The requests to a stream, one function each: 0 or more, or a negative errno. */
#ifndef UAPI_REQUESTS_H
#define UAPI_REQUESTS_H

#include <netinet/in.h>
#include <poll.h>
#include <sched.h>

#include "uapi_common.h"

static inline int stream_open(uint64_t id, uint32_t flags)
{
	struct lmtrack_stream_create args = { .size = sizeof(args), .flags = flags, .stream_id = id };
	int dev = device_open();
	int fd;

	if (dev < 0)
		return dev;
	fd = lmt_ioctl(dev, LMTRACK_STREAM_CREATE, &args);
	close(dev);
	return fd;
}

static inline long stream_add_region(int stream, int fd, uint32_t index)
{
	struct lmtrack_stream_add_region args = { .size = sizeof(args), .fd = fd, .index = index };

	return lmt_ioctl(stream, LMTRACK_STREAM_ADD_REGION, &args);
}

static inline long stream_send_flags(int stream, uint32_t round, uint32_t what, uint32_t flags)
{
	struct lmtrack_stream_send args = {
		.size = sizeof(args), .flags = flags, .round = round, .what = what,
	};

	return lmt_ioctl(stream, LMTRACK_STREAM_SEND, &args);
}

static inline long stream_send(int stream, uint32_t round, uint32_t what)
{
	return stream_send_flags(stream, round, what, 0);
}

static inline long stream_wait(int stream, int timeout_ms, struct lmtrack_stream_wait *result)
{
	struct lmtrack_stream_wait args = { .size = sizeof(args), .timeout_ms = timeout_ms };
	long ret = lmt_ioctl(stream, LMTRACK_STREAM_WAIT, &args);

	if (result)
		*result = args;
	return ret;
}

static inline long stream_cancel(int stream)
{
	struct lmtrack_stream_cancel args = { .size = sizeof(args) };

	return lmt_ioctl(stream, LMTRACK_STREAM_CANCEL, &args);
}

static inline struct lmtrack_channel_stats channel_stats(int stream, uint32_t channel)
{
	struct lmtrack_channel_stats stats = { .size = sizeof(stats), .channel = channel };

	if (lmt_ioctl(stream, LMTRACK_CHANNEL_STATS, &stats))
		memset(&stats, 0xff, sizeof(stats));
	return stats;
}

/* Bytes per second; 0: no cap. */
static inline long stream_rate(int stream, uint64_t rate)
{
	struct lmtrack_stream_rate_set args = { .size = sizeof(args), .rate = rate };

	return lmt_ioctl(stream, LMTRACK_STREAM_RATE_SET, &args);
}

/* What its channels have handed to the network since it was made. */
static inline uint64_t stream_sent(int stream, unsigned int channels)
{
	uint64_t bytes = 0;
	unsigned int i;

	for (i = 0; i < channels; i++) {
		struct lmtrack_channel_stats stats = channel_stats(stream, i);

		bytes += stats.header_bytes + stats.zerocopy_bytes + stats.copied_bytes;
	}
	return bytes;
}

static inline long stream_width(int stream, uint32_t channels)
{
	struct lmtrack_stream_width args = { .size = sizeof(args), .channels = channels };

	return lmt_ioctl(stream, LMTRACK_STREAM_WIDTH, &args);
}

static inline int stream_events(int stream, int timeout_ms)
{
	struct pollfd poll_fd = { .fd = stream, .events = POLLIN | POLLPRI };

	return poll(&poll_fd, 1, timeout_ms) < 0 ? -errno : poll_fd.revents;
}

/*
 * What was received stays with the processor that it was sent on, to be freed when that one has
 * traffic again: here it has.
 */
static inline void sockets_run(void)
{
	struct sockaddr_in in = {
		.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), cpu;
	socklen_t length = sizeof(in);
	cpu_set_t before, one;

	sched_getaffinity(0, sizeof(before), &before);
	if (!bind(fd, (void *)&in, sizeof(in)) && !getsockname(fd, (void *)&in, &length)) {
		for (cpu = 0; cpu < CPU_SETSIZE; cpu++) {
			if (!CPU_ISSET(cpu, &before))
				continue;
			CPU_ZERO(&one);
			CPU_SET(cpu, &one);
			if (!sched_setaffinity(0, sizeof(one), &one))
				sendto(fd, "", 1, 0, (void *)&in, sizeof(in));
		}
	}
	sched_setaffinity(0, sizeof(before), &before);
	close(fd);
}

#endif /* UAPI_REQUESTS_H */
