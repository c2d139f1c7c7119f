// SPDX-License-Identifier: LGPL-2.1-or-later
/* The kernel's sender, as an object. */
#include "private.h"

#include <fcntl.h>
#include <sys/ioctl.h>

struct kmig_stream {
	struct kmig_ctx *ctx;
	int fd;
	struct kmig_round_times times;	/* of the round last waited for */
};

int kmig_stream_create(struct kmig_ctx *ctx, const struct kmig_stream_opts *given, struct kmig_stream **out)
{
	struct lmtrack_stream_create create = { .size = sizeof(create) };
	struct kmig_stream_opts opts = KMIG_STREAM_OPTS_INIT;
	struct kmig_stream *stream;
	int device, err;

	err = kmig_copy_sized(ctx, &opts, sizeof(opts), sizeof(opts), given, "stream options");
	if (err)
		return err;
	stream = calloc(1, sizeof(*stream));
	if (!stream)
		return kmig_fail(ctx, -ENOMEM, "stream: out of memory");

	device = open("/dev/lmtrack", O_RDWR | O_CLOEXEC);
	if (device < 0) {
		err = kmig_fail(ctx, -errno, "/dev/lmtrack: %s; a migration's source needs the module lmtrack",
				strerror(errno));
		free(stream);
		return err;
	}
	create.stream_id = opts.id;
	create.flags = opts.no_zero_detection ? LMTRACK_STREAM_NO_ZERO_DETECT : 0;
	stream->ctx = ctx;
	stream->fd = ioctl(device, LMTRACK_STREAM_CREATE, &create);
	err = -errno;
	close(device);
	if (stream->fd < 0) {
		free(stream);
		return kmig_fail(ctx, err, "stream: the kernel did not create it: %s", strerror(-err));
	}
	*out = stream;
	return 0;
}

int kmig_stream_fd(const struct kmig_stream *stream)
{
	return stream->fd;
}

int kmig_stream_add_region(struct kmig_stream *stream, struct kmig_region *region, uint32_t index)
{
	struct lmtrack_stream_add_region add = { .size = sizeof(add), .fd = region->fd, .index = index };

	if (ioctl(stream->fd, LMTRACK_STREAM_ADD_REGION, &add) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: region %s as number %u: %s", region->name, index,
				 strerror(errno));
	return 0;
}

int kmig_stream_add_channel(struct kmig_stream *stream, int sock)
{
	struct lmtrack_stream_add_channel add = { .size = sizeof(add), .fd = sock };

	if (ioctl(stream->fd, LMTRACK_STREAM_ADD_CHANNEL, &add) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: channel on socket %d: %s", sock, strerror(errno));
	return add.channel;
}

int kmig_stream_send(struct kmig_stream *stream, uint32_t round, enum kmig_send_what what)
{
	return kmig_stream_send_flags(stream, round, what, 0);
}

int kmig_stream_send_flags(struct kmig_stream *stream, uint32_t round, enum kmig_send_what what, uint32_t flags)
{
	struct lmtrack_stream_send send = { .size = sizeof(send), .flags = flags, .round = round };

	switch (what) {
	case KMIG_SEND_ALL:
		send.what = LMTRACK_SEND_ALL;
		break;
	case KMIG_SEND_DIRTY:
		send.what = LMTRACK_SEND_DIRTY;
		break;
	default:
		return kmig_fail(stream->ctx, -EINVAL, "stream: round %u: nothing known by number %d can be sent", round, what);
	}
	if (ioctl(stream->fd, LMTRACK_STREAM_SEND, &send) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: round %u could not begin: %s", round, strerror(errno));
	return 0;
}

int kmig_stream_wait(struct kmig_stream *stream, int timeout_ms, struct kmig_round *round)
{
	struct lmtrack_stream_wait wait = { .size = sizeof(wait), .timeout_ms = timeout_ms };

	if (ioctl(stream->fd, LMTRACK_STREAM_WAIT, &wait) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: waiting for a round: %s", strerror(errno));
	*round = (struct kmig_round){
		.round = wait.round,
		.error = -(int)wait.error,
		.channel = wait.channel,
		.duration_ns = wait.duration_ns,
		.pages = wait.pages,
		.data_pages = wait.data_pages,
		.zero_pages = wait.zero_pages,
		.bytes = wait.bytes,
	};
	stream->times = (struct kmig_round_times){
		.size = sizeof(stream->times),
		.harvest_ns = wait.harvest_ns,
		.send_ns = wait.send_ns,
		.wire_ns = wait.wire_ns,
	};
	return 0;
}

int kmig_stream_times(struct kmig_stream *stream, struct kmig_round_times *times)
{
	return kmig_fill_sized(stream->ctx, times, &stream->times, sizeof(stream->times), "times of a round");
}

int kmig_stream_cancel(struct kmig_stream *stream)
{
	struct lmtrack_stream_cancel cancel = { .size = sizeof(cancel) };

	if (ioctl(stream->fd, LMTRACK_STREAM_CANCEL, &cancel) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: cancel: %s", strerror(errno));
	return 0;
}

int kmig_stream_channel_stats(struct kmig_stream *stream, uint32_t channel, struct kmig_channel_stats *stats)
{
	struct lmtrack_channel_stats kernel = { .size = sizeof(kernel), .channel = channel };

	if (ioctl(stream->fd, LMTRACK_CHANNEL_STATS, &kernel) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: statistics of channel %u: %s", channel, strerror(errno));
	*stats = (struct kmig_channel_stats){
		.frames = kernel.frames,
		.data_pages = kernel.data_pages,
		.zero_pages = kernel.zero_pages,
		.zero_extents = kernel.zero_extents,
		.zerocopy_bytes = kernel.zerocopy_bytes,
		.copied_bytes = kernel.copied_bytes,
		.header_bytes = kernel.header_bytes,
		.blocked_ns = kernel.blocked_ns,
	};
	return 0;
}

void kmig_stream_free(struct kmig_stream *stream)
{
	if (!stream)
		return;
	close(stream->fd);
	free(stream);
}
