// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=ioctl -Wl,--wrap=open
/*
 * Who is let in: strangers of all kinds at a real destination engine, after each of whom the
 * real source must still be served; and impostors at a real source.
 */
#include <sys/resource.h>

#include "kselftest_harness.h"
#include "lib_fake.h"
#include "lib_peer.h"

#define GUEST_BYTES (4 * MIB)

FIXTURE(door) {
	struct victim victim;
	struct peer peer;
};

FIXTURE_SETUP(door)
{
	memset(&self->victim, 0, sizeof(self->victim));
	ASSERT_EQ(0, victim_start(&self->victim, GUEST_BYTES));
	self->peer = (struct peer){ .port = self->victim.port, .control = -1, .channel = { -1, -1 } };
}

FIXTURE_TEARDOWN(door)
{
	peer_end(&self->peer);
	victim_end(&self->victim);
}

/* After whatever has happened, the real source comes through to the first round. */
#define EXPECT_SOURCE_SERVED() do {							\
	struct peer source;								\
											\
	EXPECT_TRUE(peer_begin(&source, self->victim.port, GUEST_BYTES));		\
	peer_end(&source);								\
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);	\
} while (0)

TEST_F(door, wrong_secret)
{
	struct peer_proof proof;

	ASSERT_TRUE(peer_greet(&self->peer));
	peer_make_proof(&self->peer, "another secret of sixteen bytes", &proof);
	ASSERT_TRUE(put(self->peer.control, &proof, sizeof(proof)));
	/* Not a word; and what is said after it is not heard. */
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_FALSE(self->victim.prepared);
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, no_second_guess)
{
	struct peer_proof wrong, right;

	ASSERT_TRUE(peer_greet(&self->peer));
	peer_make_proof(&self->peer, "another secret of sixteen bytes", &wrong);
	peer_make_proof(&self->peer, SECRET, &right);
	put(self->peer.control, &wrong, sizeof(wrong));
	put(self->peer.control, &right, sizeof(right));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, one_bit_of_the_proof)
{
	struct peer_proof proof;

	ASSERT_TRUE(peer_greet(&self->peer));
	peer_make_proof(&self->peer, SECRET, &proof);
	proof.proof.mac[31] ^= 0x80;
	kmig_message_encode(LMTRACK_MSG_PROOF, &proof.proof, sizeof(proof.proof), &proof.header);
	put(self->peer.control, &proof, sizeof(proof));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_SOURCE_SERVED();
}

/* What a real source said once, said again: the destination's nonce is another. */
TEST_F(door, replayed_proof)
{
	struct peer_proof proof;
	struct peer replay;

	ASSERT_TRUE(peer_greet(&self->peer));
	peer_make_proof(&self->peer, SECRET, &proof);
	replay = self->peer;
	replay.control = peer_socket(self->victim.port);
	ASSERT_TRUE(put(replay.control, &self->peer.transcript.source, sizeof(self->peer.transcript.source)));
	ASSERT_TRUE(get(replay.control, &replay.transcript.destination, sizeof(replay.transcript.destination)));
	EXPECT_NE(0, memcmp(replay.transcript.destination.body.nonce, self->peer.transcript.destination.body.nonce, 32));
	put(replay.control, &proof, sizeof(proof));
	EXPECT_TRUE(hung_up(replay.control));
	close(replay.control);
	EXPECT_SOURCE_SERVED();
}

/* The destination's own proof, sent back to it. */
TEST_F(door, reflected_proof)
{
	struct peer_proof proof;

	ASSERT_TRUE(peer_greet(&self->peer));
	kmig_auth_proof(SECRET, strlen(SECRET), "lmtrack destination", &self->peer.transcript, &proof.proof);
	kmig_message_encode(LMTRACK_MSG_PROOF, &proof.proof, sizeof(proof.proof), &proof.header);
	put(self->peer.control, &proof, sizeof(proof));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, migration_without_proof)
{
	ASSERT_TRUE(peer_greet(&self->peer));
	peer_send(&self->peer, LMTRACK_MSG_CAPACITY, &(struct lmtrack_wire_capacity){ .bytes = htole64(GUEST_BYTES) },
		  sizeof(struct lmtrack_wire_capacity));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_FALSE(self->victim.prepared);
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, not_a_kmig)
{
	static const char http[] = "GET / HTTP/1.1\r\nHost: destination\r\nUser-Agent: curious\r\n\r\n";

	self->peer.control = peer_socket(self->victim.port);
	put(self->peer.control, http, sizeof(http));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, long_greeting)
{
	struct lmtrack_wire_message header;
	uint8_t body[512] = { 0 };

	kmig_message_encode(LMTRACK_MSG_HELLO, body, sizeof(body), &header);
	self->peer.control = peer_socket(self->victim.port);
	put(self->peer.control, &header, sizeof(header));
	put(self->peer.control, body, sizeof(body));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_SOURCE_SERVED();
}

/* Each side is told what the other speaks. */
static void greet_in_version(struct __test_metadata *_metadata, FIXTURE_DATA(door) *self, uint16_t version)
{
	struct lmtrack_wire_message answer;
	char text[64];

	kmig_auth_hello(PAGE_BYTES, &self->peer.transcript.source);
	self->peer.transcript.source.header.version = htole16(version);
	self->peer.control = peer_socket(self->victim.port);
	put(self->peer.control, &self->peer.transcript.source, sizeof(self->peer.transcript.source));
	ASSERT_TRUE(get(self->peer.control, &answer, sizeof(answer)));
	EXPECT_EQ(LMTRACK_WIRE_MESSAGE_MAGIC, le32toh(answer.magic));
	EXPECT_EQ(LMTRACK_WIRE_VERSION, le16toh(answer.version));
	EXPECT_EQ(LMTRACK_MSG_ABORT, le16toh(answer.type));
	EXPECT_SOURCE_SERVED();
	snprintf(text, sizeof(text), "version %u of the protocol, we speak %u", version, LMTRACK_WIRE_VERSION);
	EXPECT_NE(NULL, strstr(self->victim.warning, text)) TH_LOG("%s", self->victim.warning);
}

TEST_F(door, a_later_version)
{
	greet_in_version(_metadata, self, LMTRACK_WIRE_VERSION + 1);
}

TEST_F(door, an_earlier_version)
{
	greet_in_version(_metadata, self, LMTRACK_WIRE_VERSION - 1);
}

/* More than there are slots for, none of whom says a word. */
/* One that would have to notice, and does not: it knows the secret, but has other pages. */
TEST_F(door, other_pages)
{
	struct kmig_hello *hello = &self->peer.transcript.source;

	self->peer.control = peer_socket(self->peer.port);
	ASSERT_LE(0, self->peer.control);
	ASSERT_EQ(0, kmig_auth_hello(4 * PAGE_BYTES, hello));
	ASSERT_TRUE(put(self->peer.control, hello, sizeof(*hello)));
	ASSERT_TRUE(get(self->peer.control, &self->peer.transcript.destination, sizeof(*hello)));
	EXPECT_TRUE(peer_prove(&self->peer));
	EXPECT_TRUE(hung_up(self->peer.control));
	EXPECT_FALSE(self->victim.prepared);
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, silent_strangers)
{
	int strangers[100];

	for (int i = 0; i < 100; i++)
		strangers[i] = peer_socket(self->victim.port);
	EXPECT_SOURCE_SERVED();
	for (int i = 0; i < 100; i++)
		close(strangers[i]);
}

TEST_F(door, slow_stranger)
{
	int stranger = peer_socket(self->victim.port);
	uint32_t magic = htole32(LMTRACK_WIRE_MESSAGE_MAGIC);

	put(stranger, &magic, sizeof(magic));
	EXPECT_SOURCE_SERVED();
	close(stranger);
}

TEST_F(door, silence_ends)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct victim quick = { .opts = opts };
	int stranger;

	quick.opts.timeout_ms = 300;
	ASSERT_EQ(0, victim_start(&quick, GUEST_BYTES));
	stranger = peer_socket(quick.port);
	EXPECT_TRUE(hung_up(stranger));
	close(stranger);
	kmig_destination_abort(quick.destination);
	EXPECT_EQ(-ECANCELED, victim_join(&quick));
	victim_end(&quick);
	kmig_destination_abort(self->victim.destination);
	EXPECT_EQ(-ECANCELED, victim_join(&self->victim));
}

/* Processor time of the destination's thread, in seconds. */
static double victim_seconds(const struct victim *victim)
{
	struct timespec used;
	clockid_t clock;

	pthread_getcpuclockid(victim->thread, &clock);
	clock_gettime(clock, &used);
	return used.tv_sec + used.tv_nsec * 1e-9;
}

/*
 * The process has no descriptor left. Who knocks waits meanwhile, the destination does not go round
 * and round, and says once what is wanting.
 */
TEST_F(door, no_descriptor_left)
{
	struct rlimit before, few;
	int taken[256], count = 0, stranger;
	double used;

	stranger = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &before));
	few = before;
	few.rlim_cur = 256;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &few));
	while ((taken[count] = dup(stranger)) >= 0)
		count++;
	EXPECT_EQ(EMFILE, errno);
	EXPECT_EQ(0, connect(stranger, (struct sockaddr *)&(struct sockaddr_in){
		.sin_family = AF_INET, .sin_port = htons(self->victim.port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) }, sizeof(struct sockaddr_in)));
	used = victim_seconds(&self->victim);
	usleep(1000000);
	used = victim_seconds(&self->victim) - used;
	EXPECT_GT(0.1, used) TH_LOG("%.3f s", used);
	EXPECT_EQ(0, strcmp(self->victim.warning, "no connection can be taken in for now: Too many open files"))
		TH_LOG("%s", self->victim.warning);
	while (count)
		close(taken[--count]);
	setrlimit(RLIMIT_NOFILE, &before);
	EXPECT_SOURCE_SERVED();
	close(stranger);
}

/* Data channels: those who do not have the session's key are turned away, and the real ones come. */
TEST_F(door, strangers_at_the_channels)
{
	struct peer_channel_frame wire;
	struct peer forger;
	int stranger[3];

	ASSERT_TRUE(peer_greet(&self->peer));
	ASSERT_TRUE(peer_prove(&self->peer));
	ASSERT_TRUE(peer_announce(&self->peer, GUEST_BYTES));
	stranger[0] = peer_socket(self->victim.port);	/* says nothing */
	forger = self->peer;
	forger.session.key[0] ^= 1;
	peer_make_channel(&forger, 0, &wire);
	stranger[1] = peer_socket(self->victim.port);
	put(stranger[1], &wire, sizeof(wire));
	EXPECT_TRUE(hung_up(stranger[1]));
	/* The proof of one channel is none for another. */
	peer_make_channel(&self->peer, 0, &wire);
	wire.frame.channel = htole32(1);
	stranger[2] = peer_socket(self->victim.port);
	put(stranger[2], &wire, sizeof(wire));
	EXPECT_TRUE(hung_up(stranger[2]));
	EXPECT_TRUE(peer_open_channels(&self->peer));
	for (int i = 0; i < 3; i++)
		close(stranger[i]);
	peer_end(&self->peer);
	self->peer = (struct peer){ .control = -1, .channel = { -1, -1 } };
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim));
}

/* The source lives, but one of its channels was lost on the way. */
TEST_F(door, channel_that_does_not_come)
{
	struct victim quick = { .opts = KMIG_DESTINATION_OPTS_INIT };
	struct peer_channel_frame wire;
	struct peer peer = { 0 };
	int signs = 0;

	quick.opts.timeout_ms = 400;
	ASSERT_EQ(0, victim_start(&quick, GUEST_BYTES));
	peer = (struct peer){ .port = quick.port, .channel = { -1, -1 } };
	ASSERT_TRUE(peer_greet(&peer));
	ASSERT_TRUE(peer_prove(&peer));
	ASSERT_TRUE(peer_announce(&peer, GUEST_BYTES));
	peer.channel[1] = peer_socket(quick.port);
	peer_make_channel(&peer, 1, &wire);
	ASSERT_TRUE(put(peer.channel[1], &wire, sizeof(wire)));
	while (signs < 40 && peer_send(&peer, LMTRACK_MSG_KEEPALIVE, NULL, 0)) {
		usleep(100000);
		signs++;
	}
	EXPECT_GT(40, signs);
	EXPECT_EQ(-ETIMEDOUT, victim_join(&quick));
	EXPECT_NE(NULL, strstr(quick.error, "1 of 2 data channels")) TH_LOG("%s", quick.error);
	peer_end(&peer);
	victim_end(&quick);
	EXPECT_SOURCE_SERVED();
}

TEST_F(door, channel_twice)
{
	struct peer_channel_frame wire;
	int first, second;

	ASSERT_TRUE(peer_greet(&self->peer));
	ASSERT_TRUE(peer_prove(&self->peer));
	ASSERT_TRUE(peer_announce(&self->peer, GUEST_BYTES));
	peer_make_channel(&self->peer, 0, &wire);
	first = peer_socket(self->victim.port);
	put(first, &wire, sizeof(wire));
	usleep(100000);
	second = peer_socket(self->victim.port);
	put(second, &wire, sizeof(wire));
	EXPECT_TRUE(hung_up(second));
	peer_end(&self->peer);
	self->peer.control = -1;
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim));
	close(first);
	close(second);
}

/* ---- With the secret, but without sense ---- */

/* The errno of the destination's ABORT. */
static uint32_t refusal(struct peer *peer)
{
	struct lmtrack_wire_abort abort = { 0 };

	return peer_recv(peer, &abort, sizeof(abort)) == LMTRACK_MSG_ABORT ? le32toh(abort.error) : 0;
}

TEST_F(door, more_memory_than_there_is)
{
	struct lmtrack_wire_capacity capacity = { .bytes = htole64(1ull << 45) };

	ASSERT_TRUE(peer_greet(&self->peer));
	ASSERT_TRUE(peer_prove(&self->peer));
	peer_send(&self->peer, LMTRACK_MSG_CAPACITY, &capacity, sizeof(capacity));
	EXPECT_EQ(ENOMEM, refusal(&self->peer));
	EXPECT_EQ(-ENOMEM, victim_join(&self->victim));
	EXPECT_FALSE(self->victim.prepared);
}

#define WRONG_TABLE(name, channels_, count_, first, rest)			\
TEST_F(door, name)								\
{										\
	struct lmtrack_wire_capacity capacity = { .bytes = htole64(GUEST_BYTES) };	\
	struct {								\
		struct lmtrack_wire_regions head;				\
		__le64 bytes[2];						\
	} table = {								\
		.head = { .count = htole32(count_), .channels = htole32(channels_) },	\
		.bytes = { htole64(first), htole64(rest) },			\
	};									\
										\
	ASSERT_TRUE(peer_greet(&self->peer));					\
	ASSERT_TRUE(peer_prove(&self->peer));					\
	peer_send(&self->peer, LMTRACK_MSG_CAPACITY, &capacity, sizeof(capacity));	\
	ASSERT_EQ(LMTRACK_MSG_CAPACITY_OK, peer_recv(&self->peer, NULL, 0));	\
	peer_send(&self->peer, LMTRACK_MSG_REGIONS, &table, sizeof(table));	\
	EXPECT_EQ(EPROTO, refusal(&self->peer));				\
	EXPECT_EQ(-EPROTO, victim_join(&self->victim));				\
	EXPECT_FALSE(self->victim.prepared);					\
}
WRONG_TABLE(no_channels, 0, 2, GUEST_BYTES / 2, GUEST_BYTES / 2)
WRONG_TABLE(too_many_channels, 65, 2, GUEST_BYTES / 2, GUEST_BYTES / 2)
WRONG_TABLE(no_regions, 1, 0, GUEST_BYTES / 2, GUEST_BYTES / 2)
WRONG_TABLE(fewer_regions_than_it_says, 1, 64, GUEST_BYTES / 2, GUEST_BYTES / 2)
WRONG_TABLE(more_regions_than_there_can_be, 1, 0xffffffff, GUEST_BYTES / 2, GUEST_BYTES / 2)
WRONG_TABLE(empty_region, 1, 2, GUEST_BYTES, 0)
WRONG_TABLE(half_a_page, 1, 2, GUEST_BYTES - 2048, 2048)
WRONG_TABLE(sizes_that_wrap, 1, 2, GUEST_BYTES + PAGE_BYTES, -(uint64_t)PAGE_BYTES)
WRONG_TABLE(more_than_announced, 1, 2, GUEST_BYTES, GUEST_BYTES)

/* ---- A real source, and whoever listens where it connects to ---- */

static int vmm_nothing(void *data)
{
	(void)data;
	return 0;
}

struct listener {
	int fd, port;
	pthread_t thread;
	enum { SILENT, HANGS_UP, LATER_VERSION, EARLIER_VERSION, NO_SECRET, NO_SENSE } kind;
};

static void *listener_main(void *data)
{
	struct listener *listener = data;
	struct kmig_transcript transcript;
	struct peer_proof proof;
	int fd = accept(listener->fd, NULL, NULL);

	if (!get(fd, &transcript.source, sizeof(transcript.source)))
		goto out;
	switch (listener->kind) {
	case SILENT:
		hung_up(fd);
		break;
	case HANGS_UP:
		break;
	case EARLIER_VERSION: {
		struct lmtrack_wire_abort why = { .error = htole32(EPROTONOSUPPORT) };
		struct lmtrack_wire_message header;

		kmig_message_encode(LMTRACK_MSG_ABORT, &why, sizeof(why), &header);
		header.version = htole16(LMTRACK_WIRE_VERSION - 1);
		put(fd, &header, sizeof(header));
		put(fd, &why, sizeof(why));
		break;
	}
	case LATER_VERSION:
		kmig_auth_hello(PAGE_BYTES, &transcript.destination);
		transcript.destination.header.version = htole16(7);
		put(fd, &transcript.destination, sizeof(transcript.destination));
		hung_up(fd);
		break;
	case NO_SECRET:
		kmig_auth_hello(PAGE_BYTES, &transcript.destination);
		put(fd, &transcript.destination, sizeof(transcript.destination));
		get(fd, &proof, sizeof(proof));
		/* The best it can do: say back what it heard. */
		put(fd, &proof, sizeof(proof));
		hung_up(fd);
		break;
	case NO_SENSE:
		memset(&transcript, 0x41, sizeof(transcript));
		put(fd, &transcript, sizeof(transcript));
		hung_up(fd);
		break;
	}
out:
	close(fd);
	return NULL;
}

FIXTURE(impostor) {
	struct listener listener;
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_source *source;
};

FIXTURE_VARIANT(impostor) {
	int kind, error;
	const char *says;
};
FIXTURE_VARIANT_ADD(impostor, silent) { .kind = SILENT, .error = -ETIMEDOUT };
FIXTURE_VARIANT_ADD(impostor, hangs_up) { .kind = HANGS_UP, .error = -ECONNRESET };
FIXTURE_VARIANT_ADD(impostor, later_version) {
	.kind = LATER_VERSION, .error = -EPROTONOSUPPORT, .says = "version 7 of the protocol",
};
FIXTURE_VARIANT_ADD(impostor, earlier_version) {
	.kind = EARLIER_VERSION, .error = -EPROTONOSUPPORT, .says = "version 1 of the protocol, we speak 2: install the same",
};
FIXTURE_VARIANT_ADD(impostor, no_secret) { .kind = NO_SECRET, .error = -EKEYREJECTED };
FIXTURE_VARIANT_ADD(impostor, no_sense) { .kind = NO_SENSE, .error = -EPROTO };

static const struct kmig_source_ops source_ops = {
	.size = sizeof(source_ops),
	.pause = vmm_nothing,
	.resume = vmm_nothing,
};

FIXTURE_SETUP(impostor)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct kmig_region_opts region = KMIG_REGION_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	socklen_t length = sizeof(address);

	self->listener.kind = variant->kind;
	self->listener.fd = socket(AF_INET, SOCK_STREAM, 0);
	ASSERT_EQ(0, bind(self->listener.fd, (struct sockaddr *)&address, sizeof(address)));
	ASSERT_EQ(0, listen(self->listener.fd, 1));
	getsockname(self->listener.fd, (struct sockaddr *)&address, &length);
	pthread_create(&self->listener.thread, NULL, listener_main, &self->listener);

	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	region.bytes = GUEST_BYTES;
	region.kind = KMIG_REGION_LMTRACK;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &region, &self->region));
	opts.host = "localhost";
	opts.port = ntohs(address.sin_port);
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = 500;
	ASSERT_EQ(0, kmig_source_new(self->ctx, &opts, &source_ops, NULL, &self->source));
	ASSERT_EQ(0, kmig_source_add_region(self->source, self->region));
}

FIXTURE_TEARDOWN(impostor)
{
	kmig_source_free(self->source);
	kmig_region_free(self->region);
	kmig_ctx_free(self->ctx);
	close(self->listener.fd);
}

TEST_F(impostor, learns_nothing)
{
	struct kmig_report report = { .size = sizeof(report) };

	EXPECT_EQ(variant->error, kmig_source_run(self->source));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), variant->says ?: " "));
	TH_LOG("%s", kmig_ctx_error(self->ctx));
	kmig_source_report(self->source, &report);
	EXPECT_EQ(KMIG_FAILED, report.verdict);
	EXPECT_EQ(KMIG_STATE_HELLO, report.state);
	pthread_join(self->listener.thread, NULL);
}

TEST(nobody_listens)
{
	struct kmig_region_opts region_opts = KMIG_REGION_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_region *region;
	struct kmig_source *source;
	struct kmig_ctx *ctx;

	ASSERT_EQ(0, kmig_ctx_new(&ctx));
	region_opts.bytes = GUEST_BYTES;
	region_opts.kind = KMIG_REGION_LMTRACK;
	ASSERT_EQ(0, kmig_region_create(ctx, &region_opts, &region));
	opts.host = "127.0.0.1";
	opts.port = 1;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	ASSERT_EQ(0, kmig_source_new(ctx, &opts, &source_ops, NULL, &source));
	ASSERT_EQ(0, kmig_source_add_region(source, region));
	EXPECT_EQ(-ECONNREFUSED, kmig_source_run(source));
	EXPECT_EQ(-EALREADY, kmig_source_run(source));
	kmig_source_free(source);
	kmig_region_free(region);
	kmig_ctx_free(ctx);
}

/* A real source with another secret at a real destination. */
TEST_F(door, real_source_wrong_secret)
{
	struct kmig_region_opts region_opts = KMIG_REGION_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_region *region;
	struct kmig_source *source;
	struct kmig_ctx *ctx;

	ASSERT_EQ(0, kmig_ctx_new(&ctx));
	region_opts.bytes = GUEST_BYTES;
	region_opts.kind = KMIG_REGION_LMTRACK;
	ASSERT_EQ(0, kmig_region_create(ctx, &region_opts, &region));
	opts.host = "127.0.0.1";
	opts.port = self->victim.port;
	opts.secret = "another secret of sixteen bytes";
	opts.secret_len = 31;
	ASSERT_EQ(0, kmig_source_new(ctx, &opts, &source_ops, NULL, &source));
	ASSERT_EQ(0, kmig_source_add_region(source, region));
	EXPECT_EQ(-EKEYREJECTED, kmig_source_run(source));
	TH_LOG("%s", kmig_ctx_error(ctx));
	kmig_source_free(source);
	kmig_region_free(region);
	kmig_ctx_free(ctx);
	EXPECT_SOURCE_SERVED();
}

TEST_HARNESS_MAIN
