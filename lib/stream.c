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

int kmig_stream_lost(struct kmig_stream *stream, uint64_t *lost)
{
	struct lmtrack_stream_wait wait = { .size = sizeof(wait) };

	*lost = 0;
	/* EINVAL: no round was sent yet, and so nothing was lost. */
	if (ioctl(stream->fd, LMTRACK_STREAM_WAIT, &wait) < 0 && errno != ETIMEDOUT && errno != EINVAL)
		return kmig_fail(stream->ctx, -errno, "stream: looking for lost channels: %s", strerror(errno));
	*lost = wait.lost;
	return 0;
}

int kmig_stream_drop_channel(struct kmig_stream *stream, uint32_t channel, int *why)
{
	struct lmtrack_stream_drop_channel drop = { .size = sizeof(drop), .channel = channel };

	if (ioctl(stream->fd, LMTRACK_STREAM_DROP_CHANNEL, &drop) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: dropping channel %u: %s", channel, strerror(errno));
	*why = -(int)drop.error;
	return 0;
}

int kmig_stream_replace_channel(struct kmig_stream *stream, uint32_t channel, int sock)
{
	struct lmtrack_stream_add_channel add = {
		.size = sizeof(add),
		.flags = LMTRACK_CHANNEL_REPLACE,
		.fd = sock,
		.channel = channel,
	};

	if (ioctl(stream->fd, LMTRACK_STREAM_ADD_CHANNEL, &add) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: channel %u on socket %d: %s", channel, sock, strerror(errno));
	return 0;
}

int kmig_stream_add_rdma(struct kmig_stream *stream, const struct kmig_rdma_peer *peer)
{
	struct lmtrack_stream_add_rdma add = {
		.size = sizeof(add),
		.token_bytes = peer->token_bytes,
		.timeout_ms = peer->timeout_ms < LMTRACK_RDMA_TIMEOUT_MAX_MS ? peer->timeout_ms : LMTRACK_RDMA_TIMEOUT_MAX_MS,
		.window_pages = peer->window_pages,
	};

	if (peer->address_length > sizeof(add.remote) || peer->token_bytes > sizeof(add.token))
		return -EINVAL;
	memcpy(add.remote, peer->address, peer->address_length);
	memcpy(add.token, peer->token, peer->token_bytes);
	if (ioctl(stream->fd, LMTRACK_STREAM_ADD_RDMA, &add) < 0)
		return -errno;
	return add.channel;
}

int kmig_stream_rdma_wanted(struct kmig_stream *stream, uint32_t channel, uint32_t *region, uint64_t *first)
{
	struct lmtrack_stream_rdma_wanted wanted = { .size = sizeof(wanted), .channel = channel };

	if (ioctl(stream->fd, LMTRACK_STREAM_RDMA_WANTED, &wanted) < 0)
		return -errno;
	*region = wanted.region;
	*first = wanted.first;
	return 0;
}

int kmig_stream_rdma_window(struct kmig_stream *stream, uint32_t channel, uint32_t region, uint64_t first,
			    uint64_t address, uint32_t rkey)
{
	struct lmtrack_stream_rdma_window window = {
		.size = sizeof(window),
		.channel = channel,
		.region = region,
		.first = first,
		.address = address,
		.rkey = rkey,
	};

	return ioctl(stream->fd, LMTRACK_STREAM_RDMA_WINDOW, &window) < 0 ? -errno : 0;
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

int kmig_stream_width(struct kmig_stream *stream, uint32_t channels)
{
	struct lmtrack_stream_width set = { .size = sizeof(set), .channels = channels };

	if (ioctl(stream->fd, LMTRACK_STREAM_WIDTH, &set) < 0)
		return kmig_fail(stream->ctx, -errno, "stream: %u channels are to carry: %s", channels, strerror(errno));
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

int kmig_stream_cap(struct kmig_stream *stream, uint64_t bytes_per_second)
{
	struct lmtrack_stream_rate_set set = { .size = sizeof(set), .rate = bytes_per_second };

	if (!ioctl(stream->fd, LMTRACK_STREAM_RATE_SET, &set))
		return 0;
	if (errno == ENOTTY)
		return kmig_fail(stream->ctx, -EOPNOTSUPP, "the module lmtrack that is loaded is too old for a cap on the bandwidth: load a newer one, or go without the cap");
	return kmig_fail(stream->ctx, -errno, "stream: a cap of %llu bytes a second: %s", (unsigned long long)bytes_per_second,
			 strerror(errno));
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
