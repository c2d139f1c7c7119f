// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The source's data channels. A connection that breaks is lost, and no more: these are the steps
 * from there to another in its place. selftests/model/channels.pml says why each is needed.
 *
 * 1. The tracker drops the channel: nothing is sent on it any more, and what it carried in the
 *    round is dirty again.
 * 2. CHANNEL_LOST tells the destination. It ends the thread that stores what comes on the channel
 *    and says CHANNEL_CLOSED. The round needs the other channels only; the next may not begin
 *    before, as it sends over others what was lost.
 * 3. A new connection is made, again and again if need be, and proven like the first: over the
 *    channel's own path, then over the others in turn.
 *    CHANNEL_JOINED says from which round on the destination counts on it. The next that begins is
 *    not it, as it may have begun already; unless there is no other channel.
 *
 * A channel over RDMA is connected by the tracker, from the address that the control connection
 * goes to, and the port that the destination has offered. It waits for windows, which are asked for
 * here. If it is lost it comes back over TCP.
 *
 * All of it is done by the engine's thread, and none of it waits but what comes before the first
 * round.
 */
#include "channels.h"
#include "net.h"

#include <linux/tcp.h>
#include <sys/socket.h>

#define QUEUE_BYTES_FIRST (256u << 10)	/* while the rate is not known */
#define PAUSE_MIN_MS 100
#define PAUSE_MAX_MS 2000
#define CONNECT_TICK_MS 20
#define RDMA_PATIENCE 3		/* so many times longer a connection over TCP may take */

static unsigned int there(const struct kmig_channels *channels)
{
	unsigned int n = 0;

	for (unsigned int i = 0; i < channels->count; i++)
		n += channels->channel[i].state == KMIG_CHANNEL_THERE;
	return n;
}

/* ---- Connecting ---- */

/* The first thing on a connection: whose it is. */
static int introduce(struct kmig_channels *channels, uint32_t number)
{
	struct kmig_channel *channel = &channels->channel[number];
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_CHANNEL,
		.stream = channels->stream,
		.channel = number,
		.payload = sizeof(struct lmtrack_wire_channel),
		.arg = channel->attempt,
	};
	struct {
		struct lmtrack_wire_frame frame;
		struct lmtrack_wire_channel channel;
	} wire;
	int err;

	kmig_net_queue_at_most(channel->fd, channels->queue_bytes);
	kmig_frame_encode(&frame, NULL, &wire.frame);
	err = kmig_auth_channel(channels->session, channels->stream, number, channel->attempt, &wire.channel);
	if (!err)
		err = kmig_net_send_first(channel->fd, &wire, sizeof(wire));
	/* From now on its only writer is the tracker, which may wait for room. */
	return err ? err : kmig_net_set_blocking(channel->fd, true);
}

/* Of several paths one that is dead must not use up the time in which the destination waits. */
static uint32_t patience_ms(const struct kmig_channels *channels)
{
	return channels->paths > 1 ? channels->timeout_ms / (channels->paths + 1) : channels->timeout_ms;
}

static int begin_connecting(struct kmig_channels *channels, uint32_t number)
{
	struct kmig_channel *channel = &channels->channel[number];
	int fd = kmig_net_begin(&channels->path[(number + channel->tries) % channels->paths], channels->timeout_ms,
				&channels->mark);

	if (fd < 0)
		return fd;
	channel->fd = fd;
	channel->state = KMIG_CHANNEL_CONNECTING;
	channel->at_ns = kmig_now_ns() + kmig_ms(patience_ms(channels));
	return 0;
}

/* Close it: the next attempt is over another path. Each path that is of no use is told of once. */
static void connect_failed(struct kmig_channels *channels, uint32_t number, int err)
{
	struct kmig_channel *channel = &channels->channel[number];
	unsigned int path = (number + channel->tries++) % channels->paths;
	char text[KMIG_NET_PATH_TEXT];

	if (channel->fd >= 0)
		close(channel->fd);
	channel->fd = -1;
	if (channels->paths == 1 || channels->failed_paths >> path & 1)
		return;
	channels->failed_paths |= 1ULL << path;
	kmig_net_path_text(&channels->path[path], text);
	kmig_log(channels->ctx, KMIG_LOG_WARNING, "data channels do not connect from %s: %s", text, strerror(-err));
}

/* Begin over the first path that does not refuse at once. @err: that of the attempt before, if any. */
static int connect_next(struct kmig_channels *channels, uint32_t number, int err)
{
	while (channels->channel[number].tries < channels->paths) {
		err = begin_connecting(channels, number);
		if (!err)
			return 0;
		connect_failed(channels, number, err);
	}
	return kmig_fail(channels->ctx, err, "data channel %u: connecting to %s: %s", number, channels->host, strerror(-err));
}

/* Something has happened to a first connection, or it has taken too long. */
static int connect_step(struct kmig_channels *channels, uint32_t number, bool happened)
{
	struct kmig_channel *channel = &channels->channel[number];
	int err = happened ? -kmig_net_error(channel->fd) : -ETIMEDOUT;

	if (err) {
		connect_failed(channels, number, err);
		return connect_next(channels, number, err);
	}
	channel->state = KMIG_CHANNEL_THERE;
	err = introduce(channels, number);
	return err ? kmig_fail(channels->ctx, err, "data channel %u: %s", number, strerror(-err)) : 0;
}

/* Those from @first on, all at once, however long the way. */
static int connect_from(struct kmig_channels *channels, uint32_t first)
{
	unsigned int waiting = 1;
	int err = 0;

	for (uint32_t i = first; i < channels->count && !err; i++)
		err = connect_next(channels, i, 0);
	while (waiting && !err) {
		struct pollfd fds[LMTRACK_CHANNELS_MAX + 1];

		kmig_channels_poll(channels, fds, false);
		fds[channels->count] = (struct pollfd){ .fd = channels->abort_fd, .events = POLLIN };
		if (poll(fds, channels->count + 1, CONNECT_TICK_MS) < 0 && errno != EINTR)
			return kmig_fail(channels->ctx, -errno, "waiting: %s", strerror(errno));
		if (fds[channels->count].revents)
			return kmig_fail(channels->ctx, -ECANCELED, "aborted");
		waiting = 0;
		for (uint32_t i = first; i < channels->count && !err; i++) {
			struct kmig_channel *channel = &channels->channel[i];

			if (channel->state != KMIG_CHANNEL_CONNECTING)
				continue;
			if (fds[i].revents || kmig_now_ns() >= channel->at_ns)
				err = connect_step(channels, i, fds[i].revents);
			waiting += channel->state == KMIG_CHANNEL_CONNECTING;
		}
	}
	return err;
}

int kmig_channels_connect(struct kmig_channels *channels)
{
	int err = 0;

	channels->queue_bytes = QUEUE_BYTES_FIRST;
	for (unsigned int i = 0; i < channels->paths && !err; i++)
		err = kmig_net_path_complete(&channels->path[i], channels->control->fd);
	if (err)
		return kmig_fail(channels->ctx, err, "the destination hung up: %s", strerror(-err));
	return channels->rdma_port ? 0 : connect_from(channels, 0);
}

int kmig_channels_offer(struct kmig_channels *channels, const struct kmig_message *message)
{
	const struct lmtrack_wire_rdma_offer *offer = message->body;
	uint32_t port = le32toh(offer->port), error = le32toh(offer->error);

	channels->window_pages = le32toh(offer->window_pages);
	if (error > 4095 || (!error && (!port || port > UINT16_MAX || !channels->window_pages ||
					channels->window_pages % LMTRACK_CHUNK_PAGES)))
		return kmig_fail(channels->ctx, -EPROTO, "the destination offers RDMA at port %u in windows of %u pages, which cannot be",
				 port, channels->window_pages);
	if (!error)
		channels->rdma_port = port;
	else if (channels->transport == KMIG_TRANSPORT_RDMA)
		return kmig_fail(channels->ctx, -(int)error, "the destination cannot do RDMA (%s), and nothing else is allowed",
				 strerror(error));
	else
		kmig_log(channels->ctx, KMIG_LOG_INFO, "the destination cannot do RDMA (%s): TCP is used", strerror(error));
	return 0;
}

static int add_rdma(struct kmig_channels *channels, struct kmig_tracker *tracker, uint32_t number)
{
	struct sockaddr_storage address;
	struct lmtrack_wire_token token;
	struct kmig_rdma_peer peer = {
		.address = (struct sockaddr *)&address,
		.address_length = sizeof(address),
		.token = &token,
		.token_bytes = sizeof(token),
		.window_pages = channels->window_pages,
		/* TCP has to have its turn while the destination still waits. */
		.timeout_ms = channels->timeout_ms / RDMA_PATIENCE,
	};
	int err;

	if (getpeername(channels->control->fd, (struct sockaddr *)&address, &peer.address_length))
		return -errno;
	/* At the same place in both. */
	((struct sockaddr_in *)&address)->sin_port = htons(channels->rdma_port);
	err = kmig_auth_token(channels->session, channels->stream, number, &token);
	if (!err)
		err = kmig_tracker_add_rdma(tracker, &peer);
	if (err)
		return err;
	channels->channel[number] = (struct kmig_channel){ .fd = -1, .rdma = true, .state = KMIG_CHANNEL_THERE };
	channels->over_rdma++;
	return 0;
}

static const char *rdma_error(int err)
{
	switch (err) {
	case -EOPNOTSUPP:
		return "only the tracker lmtrack can";
	case -ENOTTY:
		return "the lmtrack module is older than that";
	case -EPROTONOSUPPORT:
		return "lmtrack_rdma.ko cannot be loaded";
	default:
		return strerror(-err);
	}
}

/* What cannot be had for one cannot be had for those after it. */
static int add_any(struct kmig_channels *channels, struct kmig_tracker *tracker, uint32_t number)
{
	int err;

	if (channels->rdma_port) {
		err = add_rdma(channels, tracker, number);
		if (!err)
			return 0;
		if (channels->transport == KMIG_TRANSPORT_RDMA)
			return kmig_fail(channels->ctx, err, "data channel %u could not be connected by RDMA (%s), and nothing else is allowed",
					 number, rdma_error(err));
		kmig_log(channels->ctx, KMIG_LOG_WARNING, "data channel %u could not be connected by RDMA (%s): TCP is used", number,
			 rdma_error(err));
		channels->rdma_port = 0;
		err = connect_from(channels, number);
		if (err)
			return err;
	}
	return kmig_tracker_add_channel(tracker, channels->channel[number].fd);
}

void kmig_channels_close(struct kmig_channels *channels)
{
	for (unsigned int i = 0; i < channels->count; i++) {
		if (channels->channel[i].fd >= 0)
			close(channels->channel[i].fd);
		channels->channel[i].fd = -1;
	}
}

int kmig_channels_add(struct kmig_channels *channels, struct kmig_tracker *tracker)
{
	int err = 0;

	for (uint32_t i = 0; i < channels->count && !err; i++)
		err = add_any(channels, tracker, i);
	return err;
}

void kmig_channels_start(struct kmig_channels *channels, struct kmig_tracker *tracker)
{
	channels->tracker = tracker;
}

void kmig_channels_limit(struct kmig_channels *channels, uint64_t bytes)
{
	channels->queue_bytes = bytes;
	for (unsigned int i = 0; i < channels->count; i++)
		if (channels->channel[i].fd >= 0)
			kmig_net_queue_at_most(channels->channel[i].fd, bytes);
}

uint64_t kmig_channels_delivered(const struct kmig_channels *channels)
{
	uint64_t bytes = 0;

	for (unsigned int i = 0; i < channels->count; i++) {
		struct tcp_info info = { 0 };
		struct kmig_channel_stats stats;
		socklen_t length = sizeof(info);

		/* What a device was given is waited for at once; it is as good as arrived. */
		if (channels->channel[i].rdma) {
			if (!kmig_tracker_channel_stats(channels->tracker, i, &stats))
				bytes += stats.zerocopy_bytes + stats.header_bytes;
			continue;
		}
		if (channels->channel[i].state == KMIG_CHANNEL_THERE &&
		    !getsockopt(channels->channel[i].fd, IPPROTO_TCP, TCP_INFO, &info, &length))
			bytes += info.tcpi_bytes_acked;
	}
	return bytes;
}

/* ---- Losing ---- */

/* Later, and ever later. */
static void try_later(struct kmig_channel *channel)
{
	channel->state = KMIG_CHANNEL_AWAY;
	channel->at_ns = kmig_now_ns() + kmig_ms(channel->pause_ms);
	channel->pause_ms = channel->pause_ms * 2 < PAUSE_MAX_MS ? channel->pause_ms * 2 : PAUSE_MAX_MS;
}

/* The destination may have taken the connection in: it has to close it before all else. */
static int close_both_ends(struct kmig_channels *channels, uint32_t number, uint32_t round)
{
	struct lmtrack_wire_channel_change wire = { .channel = htole32(number), .round = htole32(round) };
	struct kmig_channel *channel = &channels->channel[number];

	if (channel->fd >= 0)
		close(channel->fd);
	channel->fd = -1;
	channel->state = KMIG_CHANNEL_CLOSING;
	return kmig_control_send(channels->control, LMTRACK_MSG_CHANNEL_LOST, &wire, sizeof(wire));
}

/* It was sent on, or would have been; @error: a positive errno. */
static int lose(struct kmig_channels *channels, uint32_t number, uint32_t round, int error)
{
	struct kmig_channel *channel = &channels->channel[number];
	bool was_there = channel->state == KMIG_CHANNEL_THERE;
	unsigned int left;
	int why = 0, err;

	if (!channels->tracker)
		return kmig_fail(channels->ctx, -error, "data channel %u was lost: %s", number, strerror(error));
	if (was_there) {
		err = kmig_tracker_drop_channel(channels->tracker, number, &why);
		/* It has failed as a whole, and shut them all down: what became of the round says why. */
		if (err == -EPIPE)
			return 0;
		/* A module that is older than this cannot. */
		if (err)
			return kmig_fail(channels->ctx, -error, "data channel %u was lost: %s", number, strerror(error));
		/* Who sends may know better what happened than who heard of it. */
		if (why && why != -ECANCELED)
			error = -why;
	}
	channel->pause_ms = PAUSE_MIN_MS;
	channel->rdma = false;
	channel->tries = 0;
	err = close_both_ends(channels, number, round);
	if (!was_there)
		return err;
	channels->lost++;
	left = there(channels);
	if (!left && channels->transport == KMIG_TRANSPORT_RDMA)
		return kmig_fail(channels->ctx, -error, "channel %u to %s is lost (%s), it was the last over RDMA, and nothing else is allowed",
				 number, channels->host, strerror(error));
	if (!left && !channels->gone_ns)
		channels->gone_ns = kmig_now_ns();
	if (left)
		kmig_log(channels->ctx, KMIG_LOG_WARNING, "channel %u to %s is lost (%s): going on over %u other%s",
			 number, channels->host, strerror(error), left, left == 1 ? "" : "s");
	else
		kmig_log(channels->ctx, KMIG_LOG_WARNING, "channel %u to %s is lost (%s), and no other is left: waiting for one to come back",
			 number, channels->host, strerror(error));
	return err;
}

/* ---- Coming back ---- */

static void begin_attempt(struct kmig_channels *channels, uint32_t number)
{
	struct kmig_channel *channel = &channels->channel[number];
	int err;

	channel->attempt++;
	err = begin_connecting(channels, number);
	if (err) {
		connect_failed(channels, number, err);
		try_later(channel);
	}
}

static void connected(struct kmig_channels *channels, uint32_t number, bool happened)
{
	struct kmig_channel *channel = &channels->channel[number];
	int err = happened ? -kmig_net_error(channel->fd) : -ETIMEDOUT;

	if (!err)
		err = introduce(channels, number);
	if (err) {
		connect_failed(channels, number, err);
		try_later(channel);
		return;
	}
	channel->state = KMIG_CHANNEL_CONNECTED;
	channel->at_ns = kmig_now_ns() + kmig_ms(channels->timeout_ms);
}

void kmig_channels_poll(const struct kmig_channels *channels, struct pollfd *fds, bool idle)
{
	for (unsigned int i = 0; i < channels->count; i++) {
		const struct kmig_channel *channel = &channels->channel[i];

		fds[i] = (struct pollfd){ .fd = channel->fd, .events = POLLRDHUP };
		if (channel->state == KMIG_CHANNEL_CONNECTING)
			fds[i].events = POLLOUT;
		if (channel->state == KMIG_CHANNEL_THERE && !idle)
			fds[i].fd = -1;
	}
}

/* ---- Windows ---- */

static int ask_window(struct kmig_channels *channels, uint32_t number)
{
	struct lmtrack_wire_window wire = { .channel = htole32(number) };
	uint64_t first;
	uint32_t region;

	/* It waits for none, or was lost just now, of which the tracker tells. */
	if (kmig_tracker_rdma_wanted(channels->tracker, number, &region, &first))
		return 0;
	channels->channel[number].asked = true;
	channels->channel[number].asked_region = region;
	channels->channel[number].asked_first = first;
	wire.region = htole32(region);
	wire.first = htole64(first);
	return kmig_control_send(channels->control, LMTRACK_MSG_WINDOW_WANTED, &wire, sizeof(wire));
}

int kmig_channels_window(struct kmig_channels *channels, const struct kmig_message *message, uint32_t round)
{
	const struct lmtrack_wire_window *wire = message->body;
	uint32_t number = le32toh(wire->channel), error = le32toh(wire->error);
	struct kmig_channel *channel;
	int err;

	if (number >= channels->count || error > 4095)
		return kmig_fail(channels->ctx, -EPROTO, "the destination speaks of channel %u, which there is not", number);
	channel = &channels->channel[number];
	if (!channel->asked || le32toh(wire->region) != channel->asked_region ||
	    le64toh(wire->first) != channel->asked_first)
		return kmig_control_unexpected(channels->control, message);
	channel->asked = false;
	/* It was lost meanwhile. */
	if (!channel->rdma)
		return 0;
	if (error)
		return lose(channels, number, round, error);
	err = kmig_tracker_rdma_window(channels->tracker, number, le32toh(wire->region), le64toh(wire->first),
				       le64toh(wire->address), le32toh(wire->rkey));
	/* The stream has ended, as the tracker will tell. */
	if (!err || err == -EPIPE)
		return 0;
	if (err == -ENOMEM || err == -EINTR)
		return kmig_fail(channels->ctx, err, "a window for channel %u: %s", number, strerror(-err));
	/* The rest would be the destination's mistake. */
	return kmig_fail(channels->ctx, -EPROTO, "the destination has lent a window that cannot be used: %s", strerror(-err));
}

bool kmig_channels_asked(const struct kmig_channels *channels)
{
	for (unsigned int i = 0; i < channels->count; i++)
		if (channels->channel[i].rdma && channels->channel[i].asked)
			return true;
	return false;
}

/*
 * The destination closes a data channel only when it is lost, or when it is told to PREPARE. A
 * round that has left is not sent again: nobody else would notice that it does not arrive.
 */
int kmig_channels_step(struct kmig_channels *channels, const struct pollfd *fds, uint32_t round)
{
	uint64_t now = kmig_now_ns(), lost = channels->tracker ? kmig_tracker_lost(channels->tracker) : 0;
	int err = 0;

	for (uint32_t i = 0; i < channels->count && !err; i++) {
		struct kmig_channel *channel = &channels->channel[i];
		bool happened = fds[i].fd == channel->fd && fds[i].revents;
		int error = happened ? kmig_net_error(channel->fd) : 0;

		switch (channel->state) {
		case KMIG_CHANNEL_AWAY:
			if (channels->tracker && now >= channel->at_ns && channels->transport != KMIG_TRANSPORT_RDMA)
				begin_attempt(channels, i);
			break;
		case KMIG_CHANNEL_CONNECTING:
			if (happened || now >= channel->at_ns)
				connected(channels, i, happened);
			break;
		case KMIG_CHANNEL_CONNECTED:
			if (happened || now >= channel->at_ns) {
				channel->tries++;
				err = close_both_ends(channels, i, round);
			}
			break;
		case KMIG_CHANNEL_JOINED:
		case KMIG_CHANNEL_THERE:
			if (happened || lost >> i & 1)
				err = lose(channels, i, round, error ? error : ECONNRESET);
			else if (channels->tracker && channel->rdma && !channel->asked)
				err = ask_window(channels, i);
			break;
		case KMIG_CHANNEL_CLOSING:
			break;
		}
	}
	return err;
}

int kmig_channels_message(struct kmig_channels *channels, const struct kmig_message *message, uint32_t round)
{
	const struct lmtrack_wire_channel_change *wire = message->body;
	uint32_t number = le32toh(wire->channel), error = le32toh(wire->error);
	struct kmig_channel *channel;

	if (number >= channels->count || error > 4095)
		return kmig_fail(channels->ctx, -EPROTO, "the destination speaks of channel %u, which there is not", number);
	channel = &channels->channel[number];
	switch (message->type) {
	case LMTRACK_MSG_CHANNEL_LOST:
		/* Otherwise it crossed ours. */
		if (channel->state == KMIG_CHANNEL_THERE || channel->state == KMIG_CHANNEL_JOINED)
			return lose(channels, number, round, error ? error : ECONNRESET);
		return 0;
	case LMTRACK_MSG_CHANNEL_CLOSED:
		if (channel->state != KMIG_CHANNEL_CLOSING)
			break;
		try_later(channel);
		return 0;
	case LMTRACK_MSG_CHANNEL_JOINED:
		if (channel->state == KMIG_CHANNEL_CLOSING)
			return 0;
		/* Said again when it is in an earlier round than was told, as no other channel is left. */
		if ((channel->state == KMIG_CHANNEL_CONNECTED || channel->state == KMIG_CHANNEL_JOINED) &&
		    le64toh(wire->attempt) == channel->attempt) {
			channel->state = KMIG_CHANNEL_JOINED;
			channel->from = le32toh(wire->round);
			return 0;
		}
		if (channel->state == KMIG_CHANNEL_THERE || channel->state == KMIG_CHANNEL_JOINED)
			break;
		/* An earlier attempt, which was given up, has arrived after all. */
		return close_both_ends(channels, number, round);
	}
	return kmig_control_unexpected(channels->control, message);
}

/* ---- Rounds ---- */

bool kmig_channels_usable(const struct kmig_channels *channels)
{
	for (unsigned int i = 0; i < channels->count; i++)
		if (channels->channel[i].state == KMIG_CHANNEL_THERE ||
		    channels->channel[i].state == KMIG_CHANNEL_JOINED)
			return true;
	return false;
}

bool kmig_channels_settled(const struct kmig_channels *channels)
{
	for (unsigned int i = 0; i < channels->count; i++)
		if (channels->channel[i].state == KMIG_CHANNEL_CLOSING)
			return false;
	return true;
}

int kmig_channels_begin(struct kmig_channels *channels, uint32_t round)
{
	int err = 0;

	for (uint32_t i = 0; i < channels->count && !err; i++) {
		struct kmig_channel *channel = &channels->channel[i];

		if (channel->state != KMIG_CHANNEL_JOINED || channel->from > round)
			continue;
		err = kmig_tracker_replace_channel(channels->tracker, i, channel->fd);
		if (err == -ENOTCONN || err == -ENOMEM || err == -EAGAIN) {
			/*
			 * It was lost again meanwhile, or there is no memory or thread for it now: the
			 * tracker does not have it, and the others go on.
			 */
			err = lose(channels, i, round - 1, -err);
			continue;
		}
		if (err)
			break;
		channel->state = KMIG_CHANNEL_THERE;
		channels->gone_ns = 0;
		channels->rejoined++;
		kmig_log(channels->ctx, KMIG_LOG_INFO, "channel %u to %s is back", i, channels->host);
	}
	return err;
}
