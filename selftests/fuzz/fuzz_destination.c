// SPDX-License-Identifier: GPL-2.0
/*
 * The destination's engine and what the source says to it, in every state, over TCP and RDMA. Beside
 * memory errors it looks for a guest that is run without a COMMIT, for RDMA that was forbidden, and for
 * memory that is still lent when the guest runs.
 */
#include "fuzz_engine.h"

#include "../../lib/acceptor.h"
#include "../../lib/digest.h"
#include "../lib_rdma.h"

#define GUEST_BYTES (3 * 512 * FUZZ_PAGE + 3 * FUZZ_PAGE)
#define GUEST_CHUNKS 4
#define CHANNELS 3
#define STREAM 0x1122334455667788ull

static struct kmig_ctx *ctx;
static struct kmig_region *region;
static struct kmig_destination *destination;
static bool runs_guest, committed;
static uint64_t attempts, seq[CHANNELS], pages[CHANNELS];
static int data[CHANNELS];		/* our ends of the data channels */
static struct kmig_acceptor *door;

/* ---- In place of the network ---- */

static int fuzz_listen(struct kmig_ctx *context, const char *host, uint16_t port)
{
	(void)context, (void)host, (void)port;
	return eventfd(0, EFD_CLOEXEC);
}

static int fuzz_source(struct kmig_acceptor *acceptor, struct kmig_session *session)
{
	door = acceptor;
	memset(session, 0, sizeof(*session));
	memset(fuzz_key, 0, sizeof(fuzz_key));
	return fuzz_theirs;
}

static int fuzz_acceptor_poll(struct kmig_acceptor *acceptor, int fd, int wait_ms)
{
	(void)acceptor, (void)fd, (void)wait_ms;
	fuzz_next();
	return 0;
}

#define kmig_net_listen fuzz_listen
#define kmig_acceptor_source fuzz_source
#define kmig_acceptor_poll fuzz_acceptor_poll

#include "../../lib/destination.c"

#undef poll

/* ---- The script ---- */

/* Somebody is at the door: a channel, with the right proof or not. */
static void connect_channel(unsigned int number, bool right)
{
	static const struct kmig_session session;
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_CHANNEL, .stream = STREAM, .channel = number, .arg = right ? attempts++ : 0,
		.payload = sizeof(struct lmtrack_wire_channel),
	};
	struct {
		struct lmtrack_wire_frame frame;
		struct lmtrack_wire_channel channel;
	} wire;
	int pair[2];

	if (!door)
		return;
	for (unsigned int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++) {
		if (door->guests[i].fd >= 0)
			continue;
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			abort();
		kmig_frame_encode(&frame, NULL, &wire.frame);
		kmig_auth_channel(&session, STREAM, number, frame.arg, &wire.channel);
		if (send(pair[0], &wire, sizeof(wire), MSG_NOSIGNAL) < 0)
			abort();
		/* Its data goes there from now on; the old end, if any, is lost by that. */
		if (data[number] >= 0)
			close(data[number]);
		data[number] = pair[0];
		seq[number] = pages[number] = 0;
		door->guests[i] = (struct kmig_guest){ .fd = pair[1], .since_ns = kmig_now_ns() };
		return;
	}
}

static void connected_by_rdma(unsigned int number, int fd)
{
	if (data[number] >= 0)
		close(data[number]);
	data[number] = fd;
}

static void send_frame(unsigned int channel)
{
	uint32_t round = destination ? atomic_load(&destination->receiver.acked) + 1 : 1;
	struct kmig_frame right = { .stream = STREAM, .channel = channel, .round = round, .seq = seq[channel]++ };
	bool by_packet = fake_rdma.there && fake_rdma.channels >> channel & 1;
	static uint8_t bytes[sizeof(struct lmtrack_wire_frame) + 8 * sizeof(struct lmtrack_wire_extent) + FUZZ_PAYLOAD_MAX];
	static struct fuzz_frame made;
	size_t head;

	fuzz_frame_make(&fuzz_script, &right, pages[channel], &made);
	for (uint32_t i = 0; i < made.frame.extents; i++)
		pages[channel] += le32toh(made.table[i].pages);
	if (made.frame.type == LMTRACK_FRAME_ROUND_END)
		pages[channel] = 0;
	head = sizeof(made.raw) + made.frame.extents * sizeof(made.table[0]);
	memcpy(bytes, &made.raw, sizeof(made.raw));
	memcpy(bytes + sizeof(made.raw), made.table, head - sizeof(made.raw));
	memset(bytes + head, 0xa5, made.payload);
	if (data[channel] >= 0)
		send(data[channel], bytes, head + (by_packet ? 0 : made.payload), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* The ends of a round, of all channels that are in it, so that a script gets to the next with a byte. */
static void end_round(void)
{
	uint32_t round = destination ? atomic_load(&destination->receiver.acked) + 1 : 1;

	for (unsigned int i = 0; i < CHANNELS; i++) {
		struct kmig_frame end = {
			.type = LMTRACK_FRAME_ROUND_END, .stream = STREAM, .channel = i, .round = round,
			.arg = pages[i],
		};
		struct lmtrack_wire_frame raw;

		if (data[i] < 0 || (destination && atomic_load(&destination->receiver.channel[i].from) > round))
			continue;
		end.seq = seq[i]++;
		kmig_frame_encode(&end, NULL, &raw);
		pages[i] = 0;
		send(data[i], &raw, sizeof(raw), MSG_NOSIGNAL | MSG_DONTWAIT);
	}
}

static void announce(void)
{
	struct lmtrack_wire_capacity capacity = { .bytes = htole64(GUEST_BYTES) };
	struct {
		struct lmtrack_wire_regions head;
		__le64 bytes;
	} regions = {
		.head = { .stream = htole64(STREAM), .count = htole32(1), .channels = htole32(CHANNELS) },
		.bytes = htole64(GUEST_BYTES),
	};

	fuzz_send(LMTRACK_MSG_CAPACITY, &capacity, sizeof(capacity));
	fuzz_send(LMTRACK_MSG_REGIONS, &regions, sizeof(regions));
}

/* Digests of all that there is, right as of now. */
static void send_digests(void)
{
	struct lmtrack_wire_digest digests[GUEST_CHUNKS];

	if (!destination || !destination->chunks.count)
		return;
	for (uint64_t i = 0; i < GUEST_CHUNKS; i++)
		digests[i] = (struct lmtrack_wire_digest){
			.round = htole32(atomic_load(&destination->receiver.acked)),
			.chunk = htole64(i),
			.digest = htole64(kmig_digest_chunk(region, i)),
		};
	fuzz_send(LMTRACK_MSG_DIGESTS, digests, sizeof(digests));
}

/* A window that there is, for a channel that may be. */
static void want_window(void)
{
	struct lmtrack_wire_window wanted = {
		.channel = htole32(script_number(&fuzz_script, 1)),
		.first = htole64(script_number(&fuzz_script, 1) % 8 * LMTRACK_CHUNK_PAGES),
	};

	fuzz_send(LMTRACK_MSG_WINDOW_WANTED, &wanted, sizeof(wanted));
}

static void lose_channel(unsigned int number)
{
	uint32_t acked = destination ? atomic_load(&destination->receiver.acked) : 0;
	struct lmtrack_wire_channel_change lost = {
		.channel = htole32(number), .round = htole32(acked + (script_number(&fuzz_script, 1) & 1)),
	};

	if (data[number] >= 0)
		close(data[number]);
	data[number] = -1;
	fuzz_send(LMTRACK_MSG_CHANNEL_LOST, &lost, sizeof(lost));
}

static void prepare(void)
{
	struct lmtrack_wire_prepare last = { .round = htole32(destination ? atomic_load(&destination->receiver.acked) : 1) };

	fuzz_send(LMTRACK_MSG_PREPARE, &last, sizeof(last));
}

static void fuzz_line(void)
{
	uint8_t what = script_number(&fuzz_script, 1);
	unsigned int channel = (what >> 4) % CHANNELS;
	struct pollfd event = { .fd = -1, .events = POLLIN };

	switch (what & 15) {
	case 0:
		announce();
		break;
	case 1:
		connect_channel(channel, what >> 6 != 3);
		break;
	case 2:
		for (unsigned int i = 0; i < CHANNELS; i++)
			if (!fake_rdma.there || !(fake_rdma.channels >> i & 1))
				connect_channel(i, true);
		break;
	case 3:
		send_frame(channel);
		break;
	case 4:
		end_round();
		/* fall through */
	case 5:
		if (destination && destination->receiver.channels)
			event.fd = destination->receiver.event_fd;
		poll(&event, 1, 1);
		break;
	case 6:
		send_digests();
		break;
	case 7:
		want_window();
		break;
	case 8:
		lose_channel(channel);
		break;
	case 9:
		prepare();
		break;
	case 10:
		fuzz_send(LMTRACK_MSG_PAUSED, NULL, 0);
		break;
	case 11:
		committed = true;
		fuzz_send(LMTRACK_MSG_COMMIT, NULL, 0);
		break;
	case 12:
		fuzz_send(LMTRACK_MSG_RDMA_ASK, NULL, 0);
		break;
	default:
		/* What it is is not looked at here. */
		committed |= fuzz_script.at < fuzz_script.end &&
			     *fuzz_script.at % (LMTRACK_MSG_WINDOW + 2) == LMTRACK_MSG_COMMIT;
		fuzz_message();
	}
}

static int vmm_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions_, void *unused)
{
	(void)unused;
	if (count != 1 || bytes[0] != GUEST_BYTES)
		return -EINVAL;
	regions_[0] = region;
	return 0;
}

static int vmm_load(const void *state, size_t length, void *unused)
{
	(void)state, (void)length, (void)unused;
	return 0;
}

static int vmm_run(void *unused)
{
	(void)unused;
	fuzz_log(KMIG_LOG_INFO, "the guest runs", NULL);
	runs_guest = true;
	if (!committed || destination->rdma || destination->receiver.rdma)
		abort();
	return 0;
}

static const struct kmig_destination_ops vmm = {
	.size = sizeof(vmm), .prepare = vmm_prepare, .load_state = vmm_load, .run = vmm_run,
};

static void set_up(void)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

	opts.kind = KMIG_REGION_MEMFD;
	opts.bytes = GUEST_BYTES;
	if (kmig_ctx_new(&ctx) || kmig_region_create(ctx, &opts, &region) || !kmig_region_map(region))
		abort();
	kmig_ctx_set_log(ctx, fuzz_log, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	uint8_t flags;

	if (!ctx)
		set_up();
	fuzz_script = (struct script){ bytes, bytes + size };
	fuzz_connect();
	flags = script_number(&fuzz_script, 1);
	memset(&fake_rdma, 0, sizeof(fake_rdma));
	fake_rdma.there = flags & 2;
	fake_rdma.channels = flags >> 2 & 7;
	fake_rdma.scarce = LMTRACK_CHUNK_PAGES;
	fake_rdma.on_connect = connected_by_rdma;
	runs_guest = committed = false;
	attempts = 0;
	door = NULL;
	for (unsigned int i = 0; i < CHANNELS; i++) {
		data[i] = -1;
		seq[i] = pages[i] = 0;
	}
	opts.secret = FUZZ_SECRET;
	opts.secret_len = strlen(FUZZ_SECRET);
	opts.timeout_ms = FUZZ_TIMEOUT_MS;
	opts.no_rdma = flags & 1;
	if (kmig_destination_new(ctx, &opts, &vmm, NULL, &destination))
		abort();
	/* What follows a greeting that is in order. */
	if (flags & 32)
		announce();
	kmig_destination_run(destination);
	kmig_destination_free(destination);
	destination = NULL;
	if (fake_rdma.listened && flags & 1)
		abort();
	close(fuzz_ours);
	for (unsigned int i = 0; i < CHANNELS; i++)
		if (data[i] >= 0)
			close(data[i]);
	return 0;
}
