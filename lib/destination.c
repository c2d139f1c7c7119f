// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The destination engine. It reads top-down at the end of the file: kmig_destination_run()
 * goes through the ten states on the caller's thread; data channels, digests and signs of
 * life have threads of their own. The guest runs after COMMIT was received, never before.
 */
#include "acceptor.h"
#include "control.h"
#include "net.h"
#include "rdma.h"
#include "receiver.h"
#include "report.h"
#include "verify.h"

#include <netinet/in.h>
#include <sys/eventfd.h>

#define TICK_MS 200
#define RDMA_TICK_MS 20			/* while RDMA's connections come, which are not polled for */
#define NEED_ROUNDS_MAX 4
/* The source's VMM may take so many time-outs to hear that the guest runs here; it lives meanwhile. */
#define DONE_TIMEOUTS 6

struct kmig_destination {
	struct kmig_ctx *ctx;
	struct kmig_destination_opts opts;
	struct kmig_destination_ops ops;
	void *data;
	void *secret;
	int listen_fds[KMIG_LISTEN_MAX];
	unsigned int listens;
	int abort_fd;
	bool used;

	struct kmig_acceptor acceptor;
	struct kmig_session session;
	struct kmig_control control;
	uint64_t stream;
	unsigned int channels;
	uint64_t announced;		/* bytes, by CAPACITY */
	struct kmig_region *regions[LMTRACK_REGIONS_MAX];
	struct kmig_chunks chunks;
	struct kmig_rdma *rdma;		/* NULL: the source has not asked for it, or cannot have it */
	struct kmig_receiver receiver;
	struct kmig_verify verify;

	uint8_t *state;			/* device state, @state_have of @state_total bytes */
	uint64_t state_total, state_have;
	uint64_t told_compared;
	uint64_t acked_pages;
	uint32_t prepare_round;		/* 0: not asked yet */
	unsigned int needs;
	bool prepared;			/* @ops.prepare was called */
	bool asked;			/* RDMA_ASK has come */

	struct kmig_clock clock;
	struct kmig_report report;
};

/* On the first address, then on the others. */
static int listen_on(struct kmig_destination *destination, const struct kmig_destination_opts *opts)
{
	struct kmig_address at = { opts->host ? opts->host : "127.0.0.1", opts->port };
	struct sockaddr_storage first;
	socklen_t length = sizeof(first);

	for (;;) {
		int fd = kmig_net_listen(destination->ctx, at.host, at.port);

		if (fd < 0)
			return fd;
		destination->listen_fds[destination->listens++] = fd;
		if (destination->listens > opts->more_count)
			return 0;
		at = opts->more[destination->listens - 1];
		if (at.port)
			continue;
		if (getsockname(destination->listen_fds[0], (struct sockaddr *)&first, &length))
			return kmig_fail(destination->ctx, -errno, "listening: %s", strerror(errno));
		at.port = ntohs(first.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&first)->sin6_port :
							      ((struct sockaddr_in *)&first)->sin_port);
	}
}

static void stop_listening(struct kmig_destination *destination)
{
	while (destination->listens)
		close(destination->listen_fds[--destination->listens]);
}

int kmig_destination_new(struct kmig_ctx *ctx, const struct kmig_destination_opts *given,
			 const struct kmig_destination_ops *ops, void *data,
			 struct kmig_destination **out)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_destination *destination;
	int err;

	err = kmig_copy_sized(ctx, &opts, sizeof(opts), offsetof(struct kmig_destination_opts, rdma_window_bytes), given,
			      "destination options");
	if (err)
		return err;
	if (!opts.secret || opts.secret_len < KMIG_SECRET_MIN)
		return kmig_fail(ctx, -EINVAL, "destination: the shared secret has %zu bytes, at least %d are needed",
				 opts.secret ? opts.secret_len : 0, KMIG_SECRET_MIN);
	if (opts.timeout_ms < 100)
		return kmig_fail(ctx, -EINVAL, "destination: a time-out of %u ms is too short, give at least 100", opts.timeout_ms);
	if (opts.more_count >= KMIG_LISTEN_MAX || (opts.more_count && !opts.more))
		return kmig_fail(ctx, -EINVAL, "destination: %u addresses more, give %d at most", opts.more_count, KMIG_LISTEN_MAX - 1);

	destination = calloc(1, sizeof(*destination));
	if (!destination)
		return kmig_fail(ctx, -ENOMEM, "destination: out of memory");
	destination->ctx = ctx;
	destination->opts = opts;
	destination->data = data;
	destination->control.fd = -1;
	destination->report.size = sizeof(destination->report);
	err = kmig_copy_sized(ctx, &destination->ops, sizeof(destination->ops), sizeof(destination->ops), ops,
			      "destination functions");
	if (!err && (!destination->ops.prepare || !destination->ops.run))
		err = kmig_fail(ctx, -EINVAL, "destination: the functions prepare and run are needed");
	if (!err) {
		destination->abort_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		destination->secret = malloc(opts.secret_len);
		if (destination->abort_fd < 0 || !destination->secret)
			err = kmig_fail(ctx, -ENOMEM, "destination: out of memory or descriptors");
		else
			memcpy(destination->secret, opts.secret, opts.secret_len);
	}
	if (!err && kmig_auth_init())
		err = kmig_fail(ctx, -EIO, "destination: no randomness or no HMAC-SHA256 to be had from OpenSSL");
	if (!err)
		err = listen_on(destination, &opts);
	/* They are the caller's, and may be gone when the engine runs. */
	destination->opts.secret = NULL;
	destination->opts.host = NULL;
	destination->opts.more = NULL;
	if (err) {
		kmig_destination_free(destination);
		return err;
	}
	*out = destination;
	return 0;
}

int kmig_destination_address(struct kmig_destination *destination, struct sockaddr_storage *address,
			     socklen_t *length)
{
	if (!destination->listens || getsockname(destination->listen_fds[0], (struct sockaddr *)address, length) < 0)
		return kmig_fail(destination->ctx, -EBADF, "destination: it does not listen any more");
	return 0;
}

void kmig_destination_abort(struct kmig_destination *destination)
{
	eventfd_write(destination->abort_fd, 1);
}

/* ---- Report ---- */

static void update_report(struct kmig_destination *destination)
{
	struct kmig_report *report = &destination->report;
	uint64_t bytes = destination->state_have, written = 0, data = 0, zero = 0;

	for (unsigned int i = 0; i < destination->receiver.channels; i++) {
		struct kmig_receiver_channel *channel = &destination->receiver.channel[i];

		/* In this order, as the former is a part of the latter. */
		written += atomic_load(&channel->written);
		bytes += atomic_load(&channel->bytes);
		data += atomic_load(&channel->data_pages);
		zero += atomic_load(&channel->zero_pages);
	}
	report->total_ns = kmig_now_ns() - destination->clock.start_ns;
	if (destination->receiver.channels) {
		report->transferred_bytes = bytes;
		report->data_pages = data;
		report->zero_pages = zero;
		report->copied_bytes = bytes - written;
		report->zerocopy_bytes = written;
		report->rounds = atomic_load(&destination->receiver.acked);
	}
}

static void tell(struct kmig_destination *destination)
{
	update_report(destination);
	if (destination->ops.progress)
		destination->ops.progress(&destination->report, destination->data);
}

static void enter(struct kmig_destination *destination, enum kmig_state state)
{
	kmig_report_enter(&destination->report, &destination->clock, state);
	tell(destination);
}

int kmig_destination_report(struct kmig_destination *destination, struct kmig_report *report)
{
	return kmig_fill_sized(destination->ctx, report, &destination->report, sizeof(destination->report), "report");
}

/* ---- Before the first pass ---- */

static int hello(struct kmig_destination *destination)
{
	int fd;

	kmig_acceptor_init(&destination->acceptor, destination->ctx, destination->listen_fds, destination->listens,
			   destination->abort_fd, destination->opts.timeout_ms, destination->report.page_size,
			   destination->secret, destination->opts.secret_len);
	fd = kmig_acceptor_source(&destination->acceptor, &destination->session);
	if (fd < 0)
		return fd;
	kmig_net_tune(fd, destination->opts.timeout_ms);
	return kmig_control_open(&destination->control, destination->ctx, "source", fd, destination->abort_fd,
				 destination->opts.timeout_ms, destination->session.destination,
				 destination->session.source);
}

static int capacity(struct kmig_destination *destination)
{
	const struct lmtrack_wire_capacity *wire;
	uint64_t bytes, needed, available;
	struct kmig_message message;
	int err;

	err = kmig_control_expect(&destination->control, LMTRACK_MSG_CAPACITY, &message);
	if (err)
		return err;
	wire = message.body;
	bytes = le64toh(wire->bytes);
	needed = le64toh(wire->resident);
	destination->announced = bytes;
	if (destination->opts.max_bytes && bytes > destination->opts.max_bytes)
		return kmig_fail(destination->ctx, -ENOMEM, "the guest has %llu MiB of memory, this destination accepts %llu MiB",
				 (unsigned long long)bytes >> 20, (unsigned long long)destination->opts.max_bytes >> 20);
	/* A limit that was set is somebody's decision that the guest may grow up to its size here. */
	if (!destination->opts.max_bytes || needed > bytes)
		needed = bytes;
	available = kmig_memory_available();
	if (needed > available)
		return kmig_fail(destination->ctx, -ENOMEM, "the guest needs %llu MiB, the destination has %llu MiB available",
				 (unsigned long long)needed >> 20, (unsigned long long)available >> 20);
	return kmig_control_send(&destination->control, LMTRACK_MSG_CAPACITY_OK, NULL, 0);
}

static int regions(struct kmig_destination *destination, uint64_t *bytes, unsigned int *count)
{
	struct kmig_ctx *ctx = destination->ctx;
	const struct lmtrack_wire_regions *wire;
	struct kmig_message message;
	uint64_t sum = 0;
	int err;

	err = kmig_control_expect(&destination->control, LMTRACK_MSG_REGIONS, &message);
	if (err)
		return err;
	wire = message.body;
	destination->stream = le64toh(wire->stream);
	destination->channels = le32toh(wire->channels);
	*count = le32toh(wire->count);
	if (!*count || *count > LMTRACK_REGIONS_MAX || message.length != sizeof(*wire) + *count * 8)
		return kmig_fail(ctx, -EPROTO, "region table: %u regions in %u bytes", *count, message.length);
	if (!destination->channels || destination->channels > LMTRACK_CHANNELS_MAX)
		return kmig_fail(ctx, -EPROTO, "region table: %u channels", destination->channels);
	for (unsigned int i = 0; i < *count; i++) {
		bytes[i] = le64toh(wire->bytes[i]);
		if (!bytes[i] || bytes[i] % destination->report.page_size || bytes[i] > LMTRACK_REGION_SIZE_MAX)
			return kmig_fail(ctx, -EPROTO, "region table: region %u has %llu bytes", i, (unsigned long long)bytes[i]);
		sum += bytes[i];
	}
	if (sum != destination->announced)
		return kmig_fail(ctx, -EPROTO, "region table: %llu bytes in all, %llu were announced",
				 (unsigned long long)sum, (unsigned long long)destination->announced);
	destination->report.ram_bytes = sum;
	return 0;
}

static int devices(struct kmig_destination *destination, const uint64_t *bytes, unsigned int count)
{
	int err;

	destination->prepared = true;
	err = destination->ops.prepare(bytes, count, destination->regions, destination->data);
	if (err)
		return kmig_fail(destination->ctx, err, "the destination's VM could not be set up: %s", strerror(-err));
	for (unsigned int i = 0; i < count; i++) {
		struct kmig_region *region = destination->regions[i];

		if (!region || region->bytes != bytes[i])
			return kmig_fail(destination->ctx, -EINVAL, "the destination's region %u has %llu bytes, the source's %llu", i,
					 region ? (unsigned long long)region->bytes : 0, (unsigned long long)bytes[i]);
		/* A starting VM writes firmware into it, and holes are never sent. */
		err = kmig_region_clear(region);
		if (err)
			return err;
		if (!kmig_region_map(region))
			return -ENOMEM;
	}
	kmig_chunks_init(&destination->chunks, destination->regions, count);
	return kmig_control_send(&destination->control, LMTRACK_MSG_DEVICES_READY, NULL, 0);
}

/* ---- RDMA ---- */

/* Why it cannot be had is for people here; the source goes on without. */
static int offer_rdma(struct kmig_destination *destination)
{
	char why[KMIG_ERROR_MAX] = "it was told not to";
	struct lmtrack_wire_rdma_offer offer = { 0 };
	int err = -EPERM;

	if (!destination->opts.no_rdma)
		err = kmig_rdma_listen(destination->ctx, &destination->chunks, &destination->session, destination->stream,
				       destination->channels, destination->control.fd, destination->opts.rdma_window_bytes,
				       &destination->rdma, why);
	if (err) {
		kmig_log(destination->ctx, KMIG_LOG_INFO, "no RDMA for the source, which has asked for it: %s", why);
		offer.error = htole32(-err);
	} else {
		offer.port = htole32(kmig_rdma_port(destination->rdma));
		offer.window_pages = htole32(kmig_rdma_window_pages(destination->rdma));
	}
	return kmig_control_send(&destination->control, LMTRACK_MSG_RDMA_OFFER, &offer, sizeof(offer));
}

/* The source waits with a channel until it has an answer. */
static int lend_window(struct kmig_destination *destination, const struct kmig_message *message)
{
	const struct lmtrack_wire_window *wanted = message->body;
	struct lmtrack_wire_window window = *wanted;
	uint64_t address;
	uint32_t rkey;
	int err;

	if (!destination->rdma)
		return kmig_control_unexpected(&destination->control, message);
	err = kmig_rdma_window(destination->rdma, le32toh(wanted->channel), le32toh(wanted->region),
			       le64toh(wanted->first), &address, &rkey);
	if (err == -ENOENT || wanted->address || wanted->rkey || wanted->error)
		return kmig_fail(destination->ctx, -EPROTO, "the source wants a window at page %llu of region %u for channel %u, which cannot be",
				 (unsigned long long)le64toh(wanted->first), le32toh(wanted->region), le32toh(wanted->channel));
	if (err)
		kmig_log(destination->ctx, KMIG_LOG_WARNING, "memory of region %u could not be registered for RDMA: %s%s",
			 le32toh(wanted->region), strerror(-err), err == -ENOMEM ? " (is RLIMIT_MEMLOCK too small?)" : "");
	window.address = htole64(err ? 0 : address);
	window.rkey = htole32(err ? 0 : rkey);
	window.error = htole32(-err);
	return kmig_control_send(&destination->control, LMTRACK_MSG_WINDOW, &window, sizeof(window));
}

/* Memory is as it came: no device may write to it any more, nor hold pages of it. */
static void close_rdma(struct kmig_destination *destination)
{
	kmig_rdma_close(destination->rdma);
	destination->rdma = NULL;
	destination->receiver.rdma = NULL;
}

/* ---- Channels ---- */

/*
 * While the channels come, the control connection is only listened to for RDMA_ASK and an abort. The
 * former, in @last_ns, is when they can begin to come.
 */
static int idle_control(struct kmig_destination *destination, uint64_t *last_ns)
{
	struct kmig_message message;
	int n = kmig_control_next(&destination->control, &message);

	if (n > 0 && message.type == LMTRACK_MSG_RDMA_ASK && !destination->asked) {
		destination->asked = true;
		*last_ns = kmig_now_ns();
		return offer_rdma(destination);
	}
	if (n > 0)
		return kmig_control_unexpected(&destination->control, &message);
	return n < 0 ? n : kmig_control_check_silence(&destination->control);
}

/* A bit for each channel that has come by RDMA. */
static uint64_t by_rdma(struct kmig_destination *destination)
{
	uint64_t channels = 0;

	if (!destination->rdma)
		return 0;
	kmig_rdma_step(destination->rdma);
	for (unsigned int i = 0; i < destination->channels; i++)
		if (kmig_rdma_connected(destination->rdma, i))
			channels |= 1ULL << i;
	return channels;
}

static int close_sockets(int *sockets, unsigned int count, int err)
{
	for (unsigned int i = 0; i < count; i++)
		if (sockets[i] >= 0)
			close(sockets[i]);
	return err;
}

static int channels(struct kmig_destination *destination)
{
	struct kmig_acceptor *acceptor = &destination->acceptor;
	uint64_t last_ns = kmig_now_ns();
	uint64_t attempts[LMTRACK_CHANNELS_MAX];
	int sockets[LMTRACK_CHANNELS_MAX];
	uint64_t there = 0, come;
	int err = 0;

	for (unsigned int i = 0; i < LMTRACK_CHANNELS_MAX; i++)
		sockets[i] = -1;
	for (;;) {
		come = there | by_rdma(destination);
		come |= kmig_acceptor_channels(acceptor, &destination->session, destination->stream,
					       destination->channels, come, sockets, attempts);
		if (come != there)
			last_ns = kmig_now_ns();
		there = come;
		if (__builtin_popcountll(there) == (int)destination->channels)
			break;
		/* One that was lost, or turned away, does not come again; the source may not know. */
		if (kmig_now_ns() - last_ns > kmig_ms(destination->opts.timeout_ms)) {
			err = kmig_fail(destination->ctx, -ETIMEDOUT, "%d of %u data channels have come, and no other within %u ms",
					__builtin_popcountll(there), destination->channels, destination->opts.timeout_ms);
			break;
		}
		err = kmig_acceptor_poll(acceptor, destination->control.fd, destination->rdma ? RDMA_TICK_MS : TICK_MS);
		if (!err)
			err = idle_control(destination, &last_ns);
		if (err)
			break;
	}
	for (unsigned int i = 0; i < destination->channels && !err; i++) {
		if (sockets[i] < 0) {
			destination->report.rdma_channels++;
			continue;
		}
		err = kmig_net_set_blocking(sockets[i], true);
		if (err)
			kmig_fail(destination->ctx, err, "data channel %u: %s", i, strerror(-err));
		/* The source has given up on RDMA for this one: nobody else has its token. */
		if (destination->rdma)
			kmig_rdma_disconnect(destination->rdma, i);
	}
	if (err)
		return close_sockets(sockets, destination->channels, err);
	kmig_acceptor_close(acceptor);
	if (destination->rdma)
		kmig_rdma_close_door(destination->rdma);

	err = kmig_receiver_start(&destination->receiver, destination->ctx, &destination->chunks, destination->stream,
				  sockets, destination->channels, destination->rdma);
	if (!err)
		err = kmig_verify_start(&destination->verify, &destination->receiver);
	if (!err)
		err = kmig_control_send(&destination->control, LMTRACK_MSG_CHANNELS_READY, NULL, 0);
	return err;
}

/* ---- Rounds ---- */

static int state_piece(struct kmig_destination *destination, const struct kmig_message *message)
{
	const struct lmtrack_wire_state *wire = message->body;
	uint64_t total = le64toh(wire->total), offset = le64toh(wire->offset);
	uint64_t length = message->length - sizeof(*wire);
	uint8_t *state;

	if (!destination->ops.load_state)
		return kmig_fail(destination->ctx, -EOPNOTSUPP, "the source sent device state, and this destination has no use for any");
	if (!total || total > LMTRACK_WIRE_STATE_MAX || (destination->state_total && total != destination->state_total) ||
	    offset != destination->state_have || length > total - offset)
		return kmig_fail(destination->ctx, -EPROTO, "device state from the source: a piece that does not fit");
	/* Memory is taken for what has come, not for what was promised. */
	state = realloc(destination->state, offset + length);
	if (!state)
		return kmig_fail(destination->ctx, -ENOMEM, "device state: out of memory");
	memcpy(state + offset, wire->bytes, length);
	destination->state = state;
	destination->state_total = total;
	destination->state_have = offset + length;
	destination->report.device_state_bytes = destination->state_have;
	return 0;
}

static int round_done(struct kmig_destination *destination)
{
	struct kmig_receiver *receiver = &destination->receiver;
	uint32_t round = atomic_load(&receiver->acked) + 1;
	struct lmtrack_wire_round_ack ack = { .round = htole32(round) };
	uint64_t pages, lacking;
	int err;

	/* Before the source hears of it: the next round's frames may follow at once. */
	kmig_receiver_next_round(receiver);
	kmig_verify_round_done(&destination->verify);

	update_report(destination);
	pages = destination->report.data_pages + destination->report.zero_pages;
	ack.pages = htole64(pages - destination->acked_pages);
	destination->acked_pages = pages;
	/* After the last round the source has no time to read what it need not know. */
	if (destination->report.state < KMIG_STATE_BLACKOUT) {
		err = kmig_verify_send_unverified(&destination->verify, &destination->control, false, &lacking);
		if (err)
			return err;
	}
	err = kmig_control_send(&destination->control, LMTRACK_MSG_ROUND_ACK, &ack, sizeof(ack));
	if (!err && destination->report.state == KMIG_STATE_FIRST_PASS)
		enter(destination, KMIG_STATE_ITERATION);
	return err;
}

/* ---- Channels that break ---- */

static int tell_channel(struct kmig_destination *destination, uint16_t type, uint32_t number, int err)
{
	struct kmig_receiver_channel *channel = &destination->receiver.channel[number];
	struct lmtrack_wire_channel_change change = { .channel = htole32(number) };

	if (type == LMTRACK_MSG_CHANNEL_LOST)
		change.error = htole32(-err);
	if (type == LMTRACK_MSG_CHANNEL_JOINED) {
		change.round = htole32(atomic_load(&channel->from));
		change.attempt = htole64(channel->attempt);
	}
	return kmig_control_send(&destination->control, type, &change, sizeof(change));
}

/* The round to come needs no channel that is not there. */
static int advance(struct kmig_destination *destination)
{
	int err = 0;

	if (!kmig_receiver_advance(&destination->receiver))
		return 0;
	for (unsigned int i = 0; i < destination->channels && !err; i++)
		if (destination->receiver.channel[i].runs)
			err = tell_channel(destination, LMTRACK_MSG_CHANNEL_JOINED, i, 0);
	return err;
}

/* The source sends nothing on it any more. What it sent is not stored any more before we say so. */
static int channel_lost(struct kmig_destination *destination, const struct lmtrack_wire_channel_change *wire)
{
	uint32_t number = le32toh(wire->channel), round = le32toh(wire->round);
	uint32_t acked = atomic_load(&destination->receiver.acked);
	int err;

	if (number >= destination->channels || round < acked || round - acked > 1 || destination->prepare_round ||
	    wire->attempt || wire->error)
		return kmig_fail(destination->ctx, -EPROTO, "the source has lost channel %u in round %u, which cannot be", number, round);
	if (destination->receiver.channel[number].runs) {
		destination->report.channels_lost++;
		kmig_log(destination->ctx, KMIG_LOG_WARNING, "data channel %u is lost", number);
	}
	err = kmig_receiver_drop(&destination->receiver, number, round);
	if (!err)
		err = advance(destination);
	return err ? err : tell_channel(destination, LMTRACK_MSG_CHANNEL_CLOSED, number, 0);
}

static int tell_lost(struct kmig_destination *destination)
{
	int number, why, err = 0;

	while (!err && (number = kmig_receiver_lost(&destination->receiver, destination->opts.timeout_ms, &why)) >= 0)
		err = tell_channel(destination, LMTRACK_MSG_CHANNEL_LOST, number, why);
	return err;
}

static bool channels_missing(const struct kmig_destination *destination)
{
	for (unsigned int i = 0; i < destination->channels; i++)
		if (!destination->receiver.channel[i].runs)
			return !destination->receiver.closed;
	return false;
}

/* Take in those that were lost and have come back. */
static int rejoin(struct kmig_destination *destination)
{
	struct kmig_receiver *receiver = &destination->receiver;
	uint64_t attempts[LMTRACK_CHANNELS_MAX];
	int sockets[LMTRACK_CHANNELS_MAX];
	uint64_t there = 0, come;
	int err = 0;

	for (unsigned int i = 0; i < destination->channels; i++)
		if (receiver->channel[i].runs)
			there |= 1ULL << i;
	come = kmig_acceptor_channels(&destination->acceptor, &destination->session, destination->stream,
				      destination->channels, there, sockets, attempts);
	for (unsigned int i = 0; i < destination->channels; i++) {
		if (!(come >> i & 1))
			continue;
		/* An attempt used before: of somebody who has listened, or given up long ago. */
		if (err || attempts[i] <= receiver->channel[i].attempt || kmig_net_set_blocking(sockets[i], true)) {
			close(sockets[i]);
			continue;
		}
		/* If it cannot be had now it is closed, as the source sees, which comes back later. */
		if (kmig_receiver_join(receiver, i, sockets[i], attempts[i]))
			continue;
		destination->report.channels_rejoined++;
		kmig_receiver_advance(receiver);
		err = tell_channel(destination, LMTRACK_MSG_CHANNEL_JOINED, i, 0);
	}
	return err;
}

static int resumed(struct kmig_destination *destination)
{
	free(destination->state);
	destination->state = NULL;
	destination->state_total = destination->state_have = 0;
	destination->report.device_state_bytes = 0;
	kmig_log(destination->ctx, KMIG_LOG_WARNING, "the source had no data channel left: the guest runs on there for now");
	enter(destination, KMIG_STATE_ITERATION);
	return 0;
}

/* ---- What the source says ---- */

static int handle(struct kmig_destination *destination, const struct kmig_message *message)
{
	const struct lmtrack_wire_prepare *prepare = message->body;
	uint32_t acked = atomic_load(&destination->receiver.acked);

	switch (message->type) {
	case LMTRACK_MSG_DIGESTS:
		return kmig_verify_add(&destination->verify, message);
	case LMTRACK_MSG_STATE:
		return state_piece(destination, message);
	case LMTRACK_MSG_PAUSED:
		if (destination->report.state == KMIG_STATE_BLACKOUT)
			break;
		enter(destination, KMIG_STATE_BLACKOUT);
		return 0;
	case LMTRACK_MSG_CHANNEL_LOST:
		return channel_lost(destination, message->body);
	case LMTRACK_MSG_WINDOW_WANTED:
		return lend_window(destination, message);
	case LMTRACK_MSG_RESUMED:
		if (destination->report.state != KMIG_STATE_BLACKOUT || destination->prepare_round)
			break;
		return resumed(destination);
	case LMTRACK_MSG_PREPARE:
		if (destination->prepare_round || destination->report.state != KMIG_STATE_BLACKOUT)
			break;
		destination->prepare_round = le32toh(prepare->round);
		if (!destination->prepare_round || destination->prepare_round < acked || destination->prepare_round - 1 > acked)
			return kmig_fail(destination->ctx, -EPROTO, "the source wants round %u checked, which is not the last",
					 destination->prepare_round);
		return 0;
	}
	return kmig_control_unexpected(&destination->control, message);
}

static int tell_compared(struct kmig_destination *destination)
{
	struct lmtrack_wire_compared compared = { .digests = htole64(destination->verify.received) };

	if (destination->told_compared == destination->verify.received)
		return 0;
	destination->told_compared = destination->verify.received;
	return kmig_control_send(&destination->control, LMTRACK_MSG_COMPARED, &compared, sizeof(compared));
}

/* Everything has come and was compared: 1 when all agrees, 0 when digests are missing. */
static int check(struct kmig_destination *destination)
{
	uint64_t lacking;
	int err;

	if (destination->state_have != destination->state_total)
		return kmig_fail(destination->ctx, -EPROTO, "device state from the source: %llu of %llu bytes have come",
				 (unsigned long long)destination->state_have, (unsigned long long)destination->state_total);
	/* What is compared must stay as it is from here on, whatever the source still sends. */
	kmig_receiver_close(&destination->receiver);
	close_rdma(destination);
	err = kmig_verify_outcome(&destination->verify, &destination->report.digests_compared);
	if (err)
		return err;
	err = kmig_verify_send_unverified(&destination->verify, &destination->control, true, &lacking);
	if (err || !lacking)
		return err ? err : 1;
	if (++destination->needs > NEED_ROUNDS_MAX)
		return kmig_fail(destination->ctx, -EPROTO, "the source does not deliver the digests of %llu chunks",
				 (unsigned long long)lacking);
	destination->prepare_round = 0;
	return kmig_control_send(&destination->control, LMTRACK_MSG_NEED, NULL, 0);
}

/* Receive rounds, digests and device state until all of it is here and agrees. */
static int receive(struct kmig_destination *destination)
{
	struct kmig_control *control = &destination->control;
	struct kmig_message message;
	int n, err;

	for (;;) {
		struct pollfd fds[5 + KMIG_ACCEPTOR_FDS] = {
			{ .fd = control->fd, .events = POLLIN },
			{ .fd = destination->abort_fd, .events = POLLIN },
			{ .fd = destination->receiver.event_fd, .events = POLLIN },
			{ .fd = destination->verify.workers.event_fd, .events = POLLIN },
			{ .fd = destination->rdma ? kmig_rdma_fd(destination->rdma) : -1, .events = POLLIN },
		};
		bool missing = channels_missing(destination);

		if (missing)
			kmig_acceptor_fds(&destination->acceptor, fds + 5);
		if (poll(fds, missing ? 5 + KMIG_ACCEPTOR_FDS : 5, TICK_MS) < 0 && errno != EINTR)
			return kmig_fail(destination->ctx, -errno, "waiting: %s", strerror(errno));
		if (fds[1].revents)
			return kmig_fail(destination->ctx, -ECANCELED, "aborted");
		if (fds[4].revents)
			kmig_rdma_step(destination->rdma);
		if (kmig_receiver_round_done(&destination->receiver)) {
			err = round_done(destination);
			if (err)
				return err;
		}
		for (int i = 0; i < KMIG_CONTROL_BATCH && (n = kmig_control_next(control, &message)) > 0; i++) {
			err = handle(destination, &message);
			if (err)
				return err;
		}
		if (n < 0)
			return n;
		err = kmig_receiver_check(&destination->receiver);
		if (!err)
			err = tell_lost(destination);
		if (!err && missing)
			err = rejoin(destination);
		if (err)
			return err;
		err = kmig_control_check_silence(control);
		if (err)
			return err;
		if (!kmig_workers_busy(&destination->verify.workers)) {
			if (destination->report.state < KMIG_STATE_BLACKOUT) {
				err = tell_compared(destination);
				if (err)
					return err;
			}
			if (destination->prepare_round &&
			    destination->prepare_round == atomic_load(&destination->receiver.acked)) {
				n = check(destination);
				if (n)
					return n < 0 ? n : 0;
			}
		}
		if (kmig_report_due(&destination->clock))
			tell(destination);
	}
}

/* ---- The end ---- */

static int load(struct kmig_destination *destination)
{
	struct lmtrack_wire_ready ready = { .compared = htole64(destination->report.digests_compared) };
	uint64_t begin = kmig_now_ns();
	int err = 0;

	enter(destination, KMIG_STATE_CHECK);
	if (destination->state_total)
		err = destination->ops.load_state(destination->state, destination->state_total, destination->data);
	if (err)
		return kmig_fail(destination->ctx, err, "the destination could not load the device state: %s", strerror(-err));
	ready.load_ns = htole64(kmig_now_ns() - begin);
	/* The last chance: the source may commit as soon as it hears of it. */
	err = kmig_control_check_abort(&destination->control);
	if (err)
		return err;
	return kmig_control_send(&destination->control, LMTRACK_MSG_READY, &ready, sizeof(ready));
}

static int migrate(struct kmig_destination *destination)
{
	uint64_t bytes[LMTRACK_REGIONS_MAX];
	struct kmig_message message;
	unsigned int count;
	int err;

	enter(destination, KMIG_STATE_HELLO);
	err = hello(destination);
	if (err)
		return err;
	enter(destination, KMIG_STATE_CAPACITY);
	err = capacity(destination);
	if (err)
		return err;
	enter(destination, KMIG_STATE_REGIONS);
	err = regions(destination, bytes, &count);
	if (err)
		return err;
	enter(destination, KMIG_STATE_DEVICES);
	err = devices(destination, bytes, count);
	if (err)
		return err;
	enter(destination, KMIG_STATE_CHANNELS);
	err = channels(destination);
	if (err)
		return err;
	enter(destination, KMIG_STATE_FIRST_PASS);
	err = receive(destination);
	if (err)
		return err;
	err = load(destination);
	if (err)
		return err;
	return kmig_control_expect(&destination->control, LMTRACK_MSG_COMMIT, &message);
}

/* The source has committed: it will not run the guest again, so nothing stops us any more. */
static int take_over(struct kmig_destination *destination)
{
	struct kmig_report *report = &destination->report;
	struct lmtrack_wire_running running;
	uint64_t begin = kmig_now_ns();
	struct kmig_message message;
	int err;

	destination->control.abort_fd = -1;
	err = destination->ops.run(destination->data);
	running.resume_ns = htole64(kmig_now_ns() - begin);
	report->total_ns = kmig_now_ns() - destination->clock.start_ns;
	report->downtime_ns = report->total_ns - report->state_ns[KMIG_STATE_BLACKOUT];
	if (err) {
		report->verdict = KMIG_UNKNOWN;
		kmig_fail(destination->ctx, err, "the guest has arrived whole, but could not be started: %s", strerror(-err));
		kmig_control_send_abort(&destination->control, err, 0, kmig_ctx_error(destination->ctx));
		return err;
	}
	report->verdict = KMIG_COMPLETED;
	/* The guest runs here whether or not the source gets to know. */
	if (!kmig_control_send(&destination->control, LMTRACK_MSG_RUNNING, &running, sizeof(running))) {
		enter(destination, KMIG_STATE_CLEANUP);
		if (kmig_control_expect_until(&destination->control, LMTRACK_MSG_DONE, kmig_now_ns() +
					      DONE_TIMEOUTS * kmig_ms(destination->opts.timeout_ms), &message))
			kmig_log(destination->ctx, KMIG_LOG_WARNING, "the source did not say that it knows the guest runs here");
	}
	return 0;
}

static void give_up(struct kmig_destination *destination, int err)
{
	struct kmig_report *report = &destination->report;

	report->verdict = err == -ECANCELED ? KMIG_CANCELLED : KMIG_FAILED;
	report->total_ns = kmig_now_ns() - destination->clock.start_ns;
	if (!destination->control.peer_aborted)
		kmig_control_send_abort(&destination->control, err, LMTRACK_ABORT_NOT_RUN, kmig_ctx_error(destination->ctx));
}

int kmig_destination_run(struct kmig_destination *destination)
{
	char text[KMIG_ERROR_MAX];
	int err;

	if (destination->used)
		return kmig_fail(destination->ctx, -EALREADY, "a destination receives one migration: make another");
	destination->used = true;
	destination->report.page_size = sysconf(_SC_PAGESIZE);
	kmig_report_start(&destination->report, &destination->clock);

	err = migrate(destination);
	if (err)
		err = kmig_control_last_words(&destination->control, err);
	kmig_copy_error(destination->ctx, text);
	if (err)
		give_up(destination, err);
	else
		err = take_over(destination);

	if (destination->report.verdict != KMIG_UNKNOWN)
		kmig_restore_error(destination->ctx, text);
	update_report(destination);
	kmig_acceptor_close(&destination->acceptor);
	kmig_verify_stop(&destination->verify);
	kmig_receiver_stop(&destination->receiver);
	close_rdma(destination);
	kmig_control_close(&destination->control);
	kmig_auth_forget(&destination->session, sizeof(destination->session));
	stop_listening(destination);
	free(destination->state);
	destination->state = NULL;
	/* Last: nothing touches the VM's memory any more. */
	if (destination->report.verdict > KMIG_COMPLETED && destination->report.verdict != KMIG_UNKNOWN &&
	    destination->prepared && destination->ops.discard)
		destination->ops.discard(destination->data);
	if (destination->ops.progress)
		destination->ops.progress(&destination->report, destination->data);
	return err;
}

void kmig_destination_free(struct kmig_destination *destination)
{
	if (!destination)
		return;
	stop_listening(destination);
	if (destination->abort_fd > 0)
		close(destination->abort_fd);
	if (destination->secret)
		kmig_auth_forget(destination->secret, destination->opts.secret_len);
	free(destination->secret);
	free(destination);
}
