// SPDX-License-Identifier: GPL-2.0
/*
 * The source's engine and what the destination says to it, in every state, over TCP and RDMA. Beside
 * memory errors it looks for a guest that is left paused without a COMMIT, or runs after one; and for
 * windows, channels and rounds that the tracker has to do with out of turn.
 */
#include "fuzz_engine.h"
#include "../lib_standin.h"

#include "../../lib/source_digest.h"

#define GUEST_BYTES (3 * 512 * FUZZ_PAGE + 3 * FUZZ_PAGE)
#define CHANNELS 3

static struct kmig_ctx *ctx;
static struct kmig_region *region;
static struct kmig_source *source;
static struct kmig_transcript transcript;
static unsigned int read_so_far;	/* of the greeting */
static int data[2 * LMTRACK_CHANNELS_MAX];	/* the destination's ends of data channels, in the order they came */
static unsigned int data_count;
static bool guest_runs;

/* ---- In place of the network ---- */

static int fuzz_net_connect(struct kmig_ctx *context, const char *host, uint16_t port, uint32_t timeout_ms, int abort_fd,
			    const struct kmig_net_mark *mark)
{
	(void)context, (void)host, (void)port, (void)timeout_ms, (void)abort_fd, (void)mark;
	return fuzz_theirs;
}

/* The source greets and proves; what it proves is not looked at. */
static int fuzz_net_send(int fd, const void *bytes, size_t length, uint64_t deadline_ns, int abort_fd)
{
	(void)fd, (void)deadline_ns, (void)abort_fd;
	if (length == sizeof(transcript.source))
		memcpy(&transcript.source, bytes, length);
	return 0;
}

/* A greeting and a proof that are in order, piece by piece. */
static int fuzz_net_recv(int fd, void *to, size_t length, uint64_t deadline_ns, int abort_fd)
{
	static struct {
		struct lmtrack_wire_message header;
		struct lmtrack_wire_proof proof;
	} answer;
	struct kmig_session session;
	const void *from[] = { &transcript.destination, &transcript.destination.body, &answer, &answer.proof };

	(void)fd, (void)deadline_ns, (void)abort_fd;
	if (read_so_far == 0)
		kmig_auth_hello(FUZZ_PAGE, &transcript.destination);
	if (read_so_far == 2) {
		kmig_auth_proof(FUZZ_SECRET, strlen(FUZZ_SECRET), "lmtrack destination", &transcript, &answer.proof);
		kmig_message_encode(LMTRACK_MSG_PROOF, &answer.proof, sizeof(answer.proof), &answer.header);
		kmig_auth_session(FUZZ_SECRET, strlen(FUZZ_SECRET), &transcript, &session);
		memcpy(fuzz_key, session.destination, sizeof(fuzz_key));
	}
	memcpy(to, from[read_so_far++], length);
	return 0;
}

static int fuzz_net_begin(const struct kmig_net_path *path, uint32_t timeout_ms, const struct kmig_net_mark *mark)
{
	int pair[2];

	(void)path, (void)timeout_ms, (void)mark;
	if (data_count == sizeof(data) / sizeof(data[0]) ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair))
		return -ECONNREFUSED;
	data[data_count++] = pair[1];
	return pair[0];
}

#define kmig_net_connect fuzz_net_connect
#define kmig_net_send fuzz_net_send
#define kmig_net_recv fuzz_net_recv
#define kmig_net_begin fuzz_net_begin

#include "../../lib/channels.c"
#include "../../lib/source.c"

#undef poll

/* ---- The script ---- */

static void say_channel(uint16_t type, unsigned int number)
{
	struct lmtrack_wire_channel_change change = { .channel = htole32(number) };

	if (type == LMTRACK_MSG_CHANNEL_JOINED && source) {
		change.attempt = htole64(source->channels.channel[number].attempt);
		change.round = htole32(source->acked + script_number(&fuzz_script, 1) % 4);
	}
	fuzz_send(type, &change, sizeof(change));
}

static void acknowledge(void)
{
	struct lmtrack_wire_round_ack ack = { .round = htole32(source ? source->round : 1), .pages = htole64(1) };

	fuzz_send(LMTRACK_MSG_ROUND_ACK, &ack, sizeof(ack));
}

static void compared(void)
{
	struct lmtrack_wire_compared all = { .digests = htole64(source && source->digesting ? source->digest.sent : 0) };

	fuzz_send(LMTRACK_MSG_COMPARED, &all, sizeof(all));
}

static void unverified(void)
{
	struct {
		struct lmtrack_wire_unverified head;
		__le64 word;
	} message = { .head.words = htole32(1), .word = htole64(script_number(&fuzz_script, 1)) };

	fuzz_send(LMTRACK_MSG_UNVERIFIED, &message, sizeof(message));
}

static void offer(void)
{
	struct lmtrack_wire_rdma_offer rdma = {
		.port = htole32(script_number(&fuzz_script, 1)),
		.window_pages = htole32(script_number(&fuzz_script, 1) * LMTRACK_CHUNK_PAGES / 2),
	};

	fuzz_send(LMTRACK_MSG_RDMA_OFFER, &rdma, sizeof(rdma));
}

/* To a channel's wish, or to none. */
static void lend(unsigned int number)
{
	struct lmtrack_wire_window window = {
		.channel = htole32(number), .region = htole32(standin.want_region), .first = htole64(standin.want_first),
		.address = htole64(1 << 20), .rkey = htole32(7), .error = htole32(script_number(&fuzz_script, 1)),
	};

	fuzz_send(LMTRACK_MSG_WINDOW, &window, sizeof(window));
}

static void fuzz_line(void)
{
	static const struct lmtrack_wire_ready ready;
	static const struct lmtrack_wire_running running;
	uint8_t what = script_number(&fuzz_script, 1);
	unsigned int channel = (what >> 4) % CHANNELS;

	switch (what & 15) {
	case 0:
		fuzz_send(LMTRACK_MSG_CAPACITY_OK, NULL, 0);
		fuzz_send(LMTRACK_MSG_DEVICES_READY, NULL, 0);
		break;
	case 1:
		offer();
		break;
	case 2:
		fuzz_send(LMTRACK_MSG_CHANNELS_READY, NULL, 0);
		break;
	case 3:
		acknowledge();
		break;
	case 4:
		compared();
		break;
	case 5:
		unverified();
		break;
	case 6:
		say_channel(what & 64 ? LMTRACK_MSG_CHANNEL_LOST : LMTRACK_MSG_CHANNEL_CLOSED, channel);
		break;
	case 7:
		say_channel(LMTRACK_MSG_CHANNEL_JOINED, channel);
		break;
	case 8:
		/* In the tracker, of its own. */
		if (channel < standin.channels && !(standin.dropped >> channel & 1))
			standin.lost |= 1ULL << channel;
		standin_look();
		break;
	case 9:
		if (standin.sending && channel < standin.rdma && !((standin.dropped | standin.wanting) >> channel & 1)) {
			standin.want_first = (what >> 6) * LMTRACK_CHUNK_PAGES;
			standin.wanting |= 1ULL << channel;
		}
		standin_look();
		break;
	case 10:
		lend(channel);
		break;
	case 11:
		fuzz_send(LMTRACK_MSG_NEED, NULL, 0);
		break;
	case 12:
		fuzz_send(LMTRACK_MSG_READY, &ready, sizeof(ready));
		break;
	case 13:
		fuzz_send(LMTRACK_MSG_RUNNING, &running, sizeof(running));
		break;
	case 14:
		/* Data channels that break, in the order they came. */
		if (data_count)
			shutdown(data[what >> 4], SHUT_RDWR);
		break;
	default:
		fuzz_message();
	}
	/* There is no time to wait until a channel is tried again. */
	for (unsigned int i = 0; source && i < CHANNELS; i++)
		if (source->channels.channel[i].state == KMIG_CHANNEL_AWAY)
			source->channels.channel[i].at_ns = 0;
	/* Digests are taken meanwhile, by others. */
	if (what >> 7)
		usleep(300);
}

static int vmm_pause(void *unused)
{
	(void)unused;
	guest_runs = false;
	return 0;
}

static int vmm_resume(void *unused)
{
	(void)unused;
	if (source->committed && !(source->control.abort_flags & LMTRACK_ABORT_NOT_RUN))
		abort();
	guest_runs = true;
	return 0;
}

static int vmm_save(void **state, size_t *length, void *unused)
{
	(void)unused;
	*state = calloc(1, *length = 100);
	return 0;
}

static const struct kmig_source_ops vmm = {
	.size = sizeof(vmm), .pause = vmm_pause, .resume = vmm_resume, .save_state = vmm_save,
};

static void out_of_turn(const char *what)
{
	fprintf(stderr, "the tracker was asked for %s\n", what);
	abort();
}

static void set_up(void)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

	opts.kind = KMIG_REGION_MEMFD;
	opts.bytes = GUEST_BYTES;
	if (kmig_ctx_new(&ctx) || kmig_region_create(ctx, &opts, &region) || !kmig_region_map(region))
		abort();
	memset(kmig_region_map(region), 1, FUZZ_PAGE);
	kmig_ctx_set_log(ctx, fuzz_log, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	uint8_t flags;

	if (!ctx)
		set_up();
	fuzz_script = (struct script){ bytes, bytes + size };
	fuzz_connect();
	memset(&standin, 0, sizeof(standin));
	standin.wrong = out_of_turn;
	flags = script_number(&fuzz_script, 1);
	standin.no_rdma = flags & 4;
	read_so_far = data_count = 0;
	guest_runs = true;
	opts.host = "nowhere";
	opts.secret = FUZZ_SECRET;
	opts.secret_len = strlen(FUZZ_SECRET);
	opts.timeout_ms = FUZZ_TIMEOUT_MS;
	opts.channels = CHANNELS;
	opts.transport = (flags & 3) % 3;
	opts.channel_wait_ms = flags & 8 ? 0 : 100;
	if (kmig_source_new(ctx, &opts, &vmm, NULL, &source) || kmig_source_add_region(source, region))
		abort();
	kmig_source_run(source);
	if (guest_runs == (source->report.verdict == KMIG_COMPLETED || source->report.verdict == KMIG_UNKNOWN))
		abort();
	kmig_source_free(source);
	source = NULL;
	close(fuzz_ours);
	while (data_count)
		close(data[--data_count]);
	return 0;
}
