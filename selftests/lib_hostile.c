// SPDX-License-Identifier: GPL-2.0
/*
 * Control messages and RDMA's frames that are in order by themselves, and out of place: at a real
 * destination, which lends windows without a device, and at a real source, whose tracker sends
 * nothing. Whatever is out of place ends the migration with EPROTO, and the guest runs at the source.
 */
#include "kselftest_harness.h"
#include "lib_peer.h"
#include "lib_rdma.h"
#include "lib_standin.h"

#include "../lib/digest.h"

#define GUEST_BYTES (4 * 512 * PAGE_BYTES + 3 * PAGE_BYTES)
#define REGION_BEYOND 1

/* ================ The destination ================ */

FIXTURE(destination) {
	struct victim victim;
	struct peer peer;
};

FIXTURE_VARIANT(destination) {
	bool there, forbidden;
	int error;		/* that the offer has */
};
FIXTURE_VARIANT_ADD(destination, with_rdma) { .there = true };
FIXTURE_VARIANT_ADD(destination, without_a_device) { .error = ENODEV };
FIXTURE_VARIANT_ADD(destination, told_not_to) { .there = true, .forbidden = true, .error = EPERM };

static struct peer *peer_by_rdma;

static void by_rdma(unsigned int channel, int fd)
{
	peer_by_rdma->channel[channel] = fd;
}

/* Both are there, and have proven themselves. */
static bool meet(struct victim *victim, struct peer *peer, bool there, bool forbidden)
{
	*victim = (struct victim){ .opts = KMIG_DESTINATION_OPTS_INIT };
	victim->opts.no_rdma = forbidden;
	memset(&fake_rdma, 0, sizeof(fake_rdma));
	fake_rdma.there = there;
	fake_rdma.channels = 1;
	fake_rdma.on_connect = by_rdma;
	fake_rdma.scarce = 2 * LMTRACK_CHUNK_PAGES;
	if (victim_start(victim, GUEST_BYTES))
		return false;
	*peer = (struct peer){ .port = victim->port, .channel = { -1, -1 } };
	peer_by_rdma = peer;
	return peer_greet(peer) && peer_prove(peer);
}

FIXTURE_SETUP(destination)
{
	ASSERT_TRUE(meet(&self->victim, &self->peer, variant->there, variant->forbidden));
}

FIXTURE_TEARDOWN(destination)
{
	peer_end(&self->peer);
	victim_end(&self->victim);
}

#define EXPECT_REFUSED() do {								\
	EXPECT_EQ(-EPROTO, reason(&self->peer));					\
	EXPECT_EQ(-EPROTO, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);	\
	EXPECT_FALSE(self->victim.runs_guest);						\
	EXPECT_EQ(fake_rdma.listened && fake_rdma.there, fake_rdma.closed);		\
} while (0)

/* The source goes, and the destination after it. */
#define EXPECT_ENDS() do {								\
	peer_end(&self->peer);								\
	self->peer.control = self->peer.channel[0] = self->peer.channel[1] = -1;	\
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);	\
} while (0)

static int ask(struct peer *peer)
{
	struct lmtrack_wire_rdma_offer offer = { .error = htole32(4096) };

	if (!peer_send(peer, LMTRACK_MSG_RDMA_ASK, NULL, 0) ||
	    peer_recv(peer, &offer, sizeof(offer)) != LMTRACK_MSG_RDMA_OFFER)
		return -1;
	return le32toh(offer.error);
}

static bool open_channels(struct peer *peer)
{
	struct peer_channel_frame wire;

	for (uint32_t i = 0; i < PEER_CHANNELS; i++) {
		if (peer->channel[i] >= 0)
			continue;
		peer->channel[i] = peer_socket(peer->port);
		peer_make_channel(peer, i, &wire);
		if (peer->channel[i] < 0 || !put(peer->channel[i], &wire, sizeof(wire)))
			return false;
	}
	return peer_recv(peer, NULL, 0) == LMTRACK_MSG_CHANNELS_READY;
}

/* As far as round 1; channel 0 is by RDMA where that can be had. */
static bool begin_rounds(struct peer *peer, int error)
{
	return peer_announce(peer, GUEST_BYTES) && ask(peer) == error && open_channels(peer);
}

static struct lmtrack_wire_window wish(uint32_t channel, uint32_t region, uint64_t first)
{
	return (struct lmtrack_wire_window){
		.channel = htole32(channel), .region = htole32(region), .first = htole64(first),
	};
}

static bool want(struct peer *peer, struct lmtrack_wire_window wanted)
{
	return peer_send(peer, LMTRACK_MSG_WINDOW_WANTED, &wanted, sizeof(wanted));
}

TEST_F(destination, asked_once)
{
	ASSERT_TRUE(begin_rounds(&self->peer, variant->error));
	EXPECT_EQ(!variant->forbidden, fake_rdma.listened);
	EXPECT_ENDS();
}

TEST_F(destination, asked_twice)
{
	ASSERT_TRUE(peer_announce(&self->peer, GUEST_BYTES));
	ASSERT_EQ(variant->error, ask(&self->peer));
	peer_send(&self->peer, LMTRACK_MSG_RDMA_ASK, NULL, 0);
	EXPECT_REFUSED();
	EXPECT_GE(1, fake_rdma.listened);
}

/* One message where it has no place: after the proof, the regions, the answer, and when paused. */
enum { PROVEN, ANNOUNCED, OFFERED, READY, PAUSED, AFTER_NEED };

static bool go_to(struct peer *peer, int error, int where)
{
	struct lmtrack_wire_digest digest = { .round = htole32(1) };
	struct kmig_frame frame = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1 };
	struct lmtrack_wire_prepare prepare = { .round = htole32(1) };
	struct lmtrack_wire_frame raw;
	uint16_t type;

	if ((where >= ANNOUNCED && !peer_announce(peer, GUEST_BYTES)) || (where >= OFFERED && ask(peer) != error) ||
	    (where >= READY && !open_channels(peer)))
		return false;
	for (uint32_t i = 0; where == AFTER_NEED && i < PEER_CHANNELS; i++) {
		frame.channel = i;
		kmig_frame_encode(&frame, NULL, &raw);
		if (!put(peer->channel[i], &raw, sizeof(raw)))
			return false;
	}
	if (where == AFTER_NEED && peer_recv(peer, NULL, 0) != LMTRACK_MSG_ROUND_ACK)
		return false;
	if (where >= PAUSED && !peer_send(peer, LMTRACK_MSG_PAUSED, NULL, 0))
		return false;
	if (where != AFTER_NEED)
		return true;
	/* A digest of a round that does not come: it lacks that chunk. */
	digest.round = htole32(2);
	peer_send(peer, LMTRACK_MSG_DIGESTS, &digest, sizeof(digest));
	peer_send(peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));
	do {
		type = peer_recv(peer, NULL, 0);
	} while (type == LMTRACK_MSG_COMPARED || type == LMTRACK_MSG_UNVERIFIED);
	return type == LMTRACK_MSG_NEED;
}

#define OUT_OF_PLACE(name, where, type, ...)						\
TEST_F(destination, name)								\
{											\
	struct { __VA_ARGS__ } body;							\
											\
	memset(&body, 0, sizeof(body));							\
	ASSERT_TRUE(go_to(&self->peer, variant->error, where));				\
	peer_send(&self->peer, type, &body, sizeof(body));				\
	EXPECT_REFUSED();								\
	EXPECT_EQ(0, fake_rdma.lent);							\
}
#define WINDOW struct lmtrack_wire_window window;
#define OFFER struct lmtrack_wire_rdma_offer offer;
OUT_OF_PLACE(ask_after_the_proof, PROVEN, LMTRACK_MSG_RDMA_ASK)
OUT_OF_PLACE(ask_when_ready, READY, LMTRACK_MSG_RDMA_ASK)
OUT_OF_PLACE(ask_when_paused, PAUSED, LMTRACK_MSG_RDMA_ASK)
OUT_OF_PLACE(ask_after_the_check, AFTER_NEED, LMTRACK_MSG_RDMA_ASK)
OUT_OF_PLACE(ask_with_a_body, ANNOUNCED, LMTRACK_MSG_RDMA_ASK, uint64_t more;)
OUT_OF_PLACE(wanted_after_the_proof, PROVEN, LMTRACK_MSG_WINDOW_WANTED, WINDOW)
OUT_OF_PLACE(wanted_before_the_offer, ANNOUNCED, LMTRACK_MSG_WINDOW_WANTED, WINDOW)
OUT_OF_PLACE(wanted_before_channels, OFFERED, LMTRACK_MSG_WINDOW_WANTED, WINDOW)
OUT_OF_PLACE(wanted_after_the_check, AFTER_NEED, LMTRACK_MSG_WINDOW_WANTED, WINDOW)
OUT_OF_PLACE(wanted_cut_short, READY, LMTRACK_MSG_WINDOW_WANTED, uint64_t half[2];)
OUT_OF_PLACE(wanted_too_long, READY, LMTRACK_MSG_WINDOW_WANTED, WINDOW uint64_t more;)
OUT_OF_PLACE(offer_to_the_destination, ANNOUNCED, LMTRACK_MSG_RDMA_OFFER, OFFER)
OUT_OF_PLACE(offer_in_a_round, READY, LMTRACK_MSG_RDMA_OFFER, OFFER)
OUT_OF_PLACE(window_to_the_destination, READY, LMTRACK_MSG_WINDOW, WINDOW)
OUT_OF_PLACE(closed_to_the_destination, READY, LMTRACK_MSG_CHANNEL_CLOSED, struct lmtrack_wire_channel_change change;)
OUT_OF_PLACE(joined_to_the_destination, PAUSED, LMTRACK_MSG_CHANNEL_JOINED, struct lmtrack_wire_channel_change change;)

/* Never asked, though it could be had. */
TEST_F(destination, wanted_without_asking)
{
	ASSERT_TRUE(peer_announce(&self->peer, GUEST_BYTES));
	ASSERT_TRUE(open_channels(&self->peer));
	want(&self->peer, wish(0, 0, 0));
	EXPECT_REFUSED();
	EXPECT_EQ(0, fake_rdma.listened);
}

/* ---- Windows ---- */

#define WRONG_WISH(name, ...)								\
TEST_F(destination, name)								\
{											\
	struct lmtrack_wire_window wanted = wish(0, 0, 512);				\
											\
	ASSERT_TRUE(begin_rounds(&self->peer, variant->error));				\
	__VA_ARGS__;									\
	want(&self->peer, wanted);							\
	EXPECT_REFUSED();								\
}
WRONG_WISH(wish_of_no_channel, wanted.channel = htole32(PEER_CHANNELS))
WRONG_WISH(wish_of_a_channel_beyond_all, wanted.channel = htole32(0xffffffff))
WRONG_WISH(wish_of_a_channel_over_tcp, wanted.channel = htole32(1))
WRONG_WISH(wish_in_no_region, wanted.region = htole32(REGION_BEYOND))
WRONG_WISH(wish_in_a_region_beyond_all, wanted.region = htole32(0xffffffff))
WRONG_WISH(wish_behind_the_region, wanted.first = htole64(5 * 512))
WRONG_WISH(wish_at_the_end_of_numbers, wanted.first = htole64(~511ull))
WRONG_WISH(wish_within_a_window, wanted.first = htole64(513))
WRONG_WISH(wish_with_an_address, wanted.address = htole64(1))
WRONG_WISH(wish_with_a_key, wanted.rkey = htole32(1))
WRONG_WISH(wish_with_an_error, wanted.error = htole32(ENOMEM))

TEST_F(destination, wish_of_a_lost_channel)
{
	struct lmtrack_wire_channel_change lost = { .channel = htole32(0), .round = htole32(1) };

	ASSERT_TRUE(begin_rounds(&self->peer, variant->error));
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_CHANNEL_LOST, &lost, sizeof(lost)));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&self->peer, NULL, 0));
	want(&self->peer, wish(0, 0, 0));
	EXPECT_REFUSED();
}

/* ---- Fields that are zero ---- */

#define SET_FIELD(name, type, kind, ...)						\
TEST_F(destination, name)								\
{											\
	struct kind body = { __VA_ARGS__ };						\
											\
	ASSERT_TRUE(begin_rounds(&self->peer, variant->error));				\
	peer_send(&self->peer, type, &body, sizeof(body));				\
	EXPECT_REFUSED();								\
}
SET_FIELD(lost_with_reserved, LMTRACK_MSG_CHANNEL_LOST, lmtrack_wire_channel_change, .round = htole32(1), .reserved = 1)
SET_FIELD(lost_with_an_attempt, LMTRACK_MSG_CHANNEL_LOST, lmtrack_wire_channel_change, .round = htole32(1), .attempt = 1)
SET_FIELD(lost_with_an_error, LMTRACK_MSG_CHANNEL_LOST, lmtrack_wire_channel_change, .round = htole32(1), .error = 1)

TEST_F(destination, prepare_with_reserved)
{
	struct lmtrack_wire_prepare prepare = { .round = htole32(1), .reserved = 1 };

	ASSERT_TRUE(go_to(&self->peer, variant->error, AFTER_NEED));
	peer_send(&self->peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));
	EXPECT_REFUSED();
}

/* ---- The end of rounds ---- */

#define WRONG_ROUND(name, number)							\
TEST_F(destination, name)								\
{											\
	struct lmtrack_wire_prepare prepare = { .round = htole32(number) };		\
											\
	ASSERT_TRUE(go_to(&self->peer, variant->error, AFTER_NEED));			\
	peer_send(&self->peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));		\
	EXPECT_REFUSED();								\
}
/* Round 1 has come, and 2 may be on its way. */
WRONG_ROUND(prepare_of_no_round, 0)
WRONG_ROUND(prepare_of_a_round_to_come, 3)
WRONG_ROUND(prepare_of_the_last_of_numbers, 0xffffffff)

/* The chunk's digest is of a later round each time: it is asked for again, but not for ever. */
TEST_F(destination, never_the_right_digest)
{
	struct lmtrack_wire_prepare prepare = { .round = htole32(1) };
	unsigned int needs = 1;
	uint16_t type;

	ASSERT_TRUE(go_to(&self->peer, variant->error, AFTER_NEED));
	for (;;) {
		struct lmtrack_wire_abort abort = { 0 };

		ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare)));
		do {
			type = peer_recv(&self->peer, &abort, sizeof(abort));
		} while (type == LMTRACK_MSG_COMPARED || type == LMTRACK_MSG_UNVERIFIED);
		if (type != LMTRACK_MSG_NEED) {
			EXPECT_EQ(LMTRACK_MSG_ABORT, type);
			EXPECT_EQ(EPROTO, le32toh(abort.error));
			break;
		}
		ASSERT_GE(100, ++needs);
	}
	EXPECT_LE(2, needs);
	EXPECT_EQ(-EPROTO, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);
	EXPECT_FALSE(self->victim.runs_guest);
}

struct state_piece {
	struct lmtrack_wire_state head;
	uint8_t bytes[16];
};

TEST_F(destination, half_of_the_state)
{
	struct state_piece piece = { .head.total = htole64(17) };
	struct lmtrack_wire_prepare prepare = { .round = htole32(1) };

	ASSERT_TRUE(go_to(&self->peer, variant->error, AFTER_NEED));
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_STATE, &piece, sizeof(piece)));
	peer_send(&self->peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));
	EXPECT_REFUSED();
	EXPECT_NE(NULL, strstr(self->victim.error, "16 of 17 bytes")) TH_LOG("%s", self->victim.error);
}

TEST(state_that_nobody_loads)
{
	struct state_piece piece = { .head.total = htole64(sizeof(piece.bytes)) };
	struct victim victim = { .no_state = true };
	struct peer peer;

	ASSERT_EQ(0, victim_start(&victim, GUEST_BYTES));
	ASSERT_TRUE(peer_begin(&peer, victim.port, GUEST_BYTES));
	ASSERT_TRUE(peer_send(&peer, LMTRACK_MSG_PAUSED, NULL, 0));
	peer_send(&peer, LMTRACK_MSG_STATE, &piece, sizeof(piece));
	EXPECT_EQ(-EOPNOTSUPP, reason(&peer));
	EXPECT_EQ(-EOPNOTSUPP, victim_join(&victim)) TH_LOG("%s", victim.error);
	EXPECT_FALSE(victim.runs_guest);
	peer_end(&peer);
	victim_end(&victim);
}

/* ---- Channels that come back ---- */

static bool end_round(struct peer *peer, uint32_t channel, uint32_t round)
{
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .channel = channel, .round = round,
		.seq = peer->seq[channel]++,
	};
	struct lmtrack_wire_frame raw;

	kmig_frame_encode(&frame, NULL, &raw);
	return put(peer->channel[channel], &raw, sizeof(raw));
}

static bool lose_channel(struct peer *peer, uint32_t channel, uint32_t round)
{
	struct lmtrack_wire_channel_change lost = { .channel = htole32(channel), .round = htole32(round) };

	return peer_send(peer, LMTRACK_MSG_CHANNEL_LOST, &lost, sizeof(lost));
}

/*
 * Channel 0 has come back while 1 might have begun round 2 already: so it is in from round 3 on. But
 * 1 is lost before it began that, and then nobody would be in round 2: it is told anew.
 */
TEST(joined_and_then_alone)
{
	struct lmtrack_wire_channel_change joined = { 0 };
	struct lmtrack_wire_round_ack ack = { 0 };
	struct peer_channel_frame wire = { 0 };
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_CHANNEL, .stream = PEER_STREAM, .payload = sizeof(wire.channel), .arg = 1,
	};
	struct victim victim = { 0 };
	struct peer peer;

	ASSERT_EQ(0, victim_start(&victim, GUEST_BYTES));
	ASSERT_TRUE(peer_begin(&peer, victim.port, GUEST_BYTES));
	ASSERT_TRUE(end_round(&peer, 0, 1));
	ASSERT_TRUE(end_round(&peer, 1, 1));
	while (le32toh(ack.round) != 1)
		ASSERT_NE(0, peer_recv(&peer, &ack, sizeof(ack)));
	ASSERT_TRUE(lose_channel(&peer, 0, 1));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&peer, NULL, 0));
	close(peer.channel[0]);
	peer.channel[0] = peer_socket(peer.port);
	peer.seq[0] = 0;
	kmig_frame_encode(&frame, NULL, &wire.frame);
	kmig_auth_channel(&peer.session, PEER_STREAM, 0, 1, &wire.channel);
	ASSERT_TRUE(put(peer.channel[0], &wire, sizeof(wire)));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_JOINED, peer_recv(&peer, &joined, sizeof(joined)));
	EXPECT_EQ(3, le32toh(joined.round));
	ASSERT_TRUE(lose_channel(&peer, 1, 1));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_JOINED, peer_recv(&peer, &joined, sizeof(joined)));
	EXPECT_EQ(0, le32toh(joined.channel));
	EXPECT_EQ(2, le32toh(joined.round));
	EXPECT_EQ(1, le64toh(joined.attempt));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&peer, NULL, 0));
	ASSERT_TRUE(end_round(&peer, 0, 2));
	while (le32toh(ack.round) != 2)
		ASSERT_NE(0, peer_recv(&peer, &ack, sizeof(ack)));
	peer_end(&peer);
	EXPECT_EQ(-ECONNRESET, victim_join(&victim)) TH_LOG("%s", victim.error);
	victim_end(&victim);
}

/* ---- Connections that are no channels ---- */

/* They are shown out, each by itself; the migration goes on. */
#define NO_CHANNEL(name, text, ...)							\
TEST_F(destination, name)								\
{											\
	struct peer_channel_frame wire = { 0 };						\
	struct kmig_frame frame = {							\
		.type = LMTRACK_FRAME_CHANNEL, .stream = PEER_STREAM,			\
		.payload = sizeof(wire.channel),					\
	};										\
	int fd;										\
											\
	ASSERT_TRUE(peer_announce(&self->peer, GUEST_BYTES));				\
	ASSERT_EQ(variant->error, ask(&self->peer));					\
	__VA_ARGS__;									\
	kmig_frame_encode(&frame, NULL, &wire.frame);					\
	kmig_auth_channel(&self->peer.session, frame.stream, frame.channel, 0, &wire.channel);	\
	fd = peer_socket(self->peer.port);						\
	ASSERT_LE(0, fd);								\
	ASSERT_TRUE(put(fd, &wire, sizeof(wire)));					\
	EXPECT_TRUE(hung_up(fd));							\
	close(fd);									\
	ASSERT_TRUE(open_channels(&self->peer));					\
	EXPECT_NE(NULL, strstr(self->victim.warning, text)) TH_LOG("%s", self->victim.warning);	\
	EXPECT_ENDS();									\
}
NO_CHANNEL(begins_with_a_round_end, "does not begin as a channel",
	   frame.type = LMTRACK_FRAME_ROUND_END; frame.payload = 0)
NO_CHANNEL(channel_of_another_stream, "no channel of this migration", frame.stream++)
NO_CHANNEL(channel_beyond_all, "no channel of this migration", frame.channel = PEER_CHANNELS)

/* ---- RDMA was agreed ---- */

FIXTURE(rdma) {
	struct victim victim;
	struct peer peer;
};

FIXTURE_SETUP(rdma)
{
	ASSERT_TRUE(meet(&self->victim, &self->peer, true, false));
	ASSERT_TRUE(begin_rounds(&self->peer, 0));
}

FIXTURE_TEARDOWN(rdma)
{
	peer_end(&self->peer);
	victim_end(&self->victim);
}

TEST_F(rdma, lent_twice)
{
	struct lmtrack_wire_window first = { 0 }, second = { 0 };

	uint8_t *ram = kmig_region_map(self->victim.region);

	ASSERT_TRUE(want(&self->peer, wish(0, 0, 512)));
	ASSERT_EQ(LMTRACK_MSG_WINDOW, peer_recv(&self->peer, &first, sizeof(first)));
	EXPECT_EQ(0, le32toh(first.error));
	EXPECT_EQ((uintptr_t)ram + 512 * PAGE_BYTES, le64toh(first.address));
	EXPECT_EQ(0x1001, le32toh(first.rkey));
	ASSERT_TRUE(want(&self->peer, wish(0, 0, 512)));
	ASSERT_EQ(LMTRACK_MSG_WINDOW, peer_recv(&self->peer, &second, sizeof(second)));
	EXPECT_EQ(0, memcmp(&first, &second, sizeof(first)));
	/* What cannot be registered is no breach: the source gives the channel up. */
	ASSERT_TRUE(want(&self->peer, wish(0, 0, fake_rdma.scarce)));
	ASSERT_EQ(LMTRACK_MSG_WINDOW, peer_recv(&self->peer, &second, sizeof(second)));
	EXPECT_EQ(ENOMEM, le32toh(second.error));
	EXPECT_EQ(0, le64toh(second.address));
	EXPECT_EQ(0, le32toh(second.rkey));
	EXPECT_ENDS();
	EXPECT_EQ(1, fake_rdma.closed);
}

struct packet {
	struct lmtrack_wire_frame raw;
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX + 1];
};

#define WRONG_PACKET(name, change, bytes)						\
TEST_F(rdma, name)									\
{											\
	struct packet packet = { 0 };							\
	struct lmtrack_wire_extent *table = packet.table;				\
	struct kmig_frame frame = {							\
		.type = LMTRACK_FRAME_DATA, .extents = 1, .stream = PEER_STREAM, .round = 1,	\
		.payload = PAGE_BYTES,							\
	};										\
											\
	table[0] = (struct lmtrack_wire_extent){ .first = htole64(600), .pages = htole32(1) };	\
	ASSERT_TRUE(want(&self->peer, wish(0, 0, 512)));				\
	ASSERT_EQ(LMTRACK_MSG_WINDOW, peer_recv(&self->peer, NULL, 0));			\
	change;										\
	kmig_frame_encode(&frame, table, &packet.raw);					\
	ASSERT_TRUE(put(self->peer.channel[0], &packet, bytes));			\
	EXPECT_REFUSED();								\
}
#define WHOLE (sizeof(struct lmtrack_wire_frame) + sizeof(struct lmtrack_wire_extent))
WRONG_PACKET(packet_of_a_byte, , 1)
WRONG_PACKET(packet_cut_in_the_header, , 63)
WRONG_PACKET(packet_without_its_table, , 64)
WRONG_PACKET(packet_cut_in_its_table, , WHOLE - 1)
WRONG_PACKET(packet_longer_than_its_table, , WHOLE + 1)
WRONG_PACKET(packet_with_an_extent_more, , WHOLE + sizeof(struct lmtrack_wire_extent))
WRONG_PACKET(packet_of_a_table_beyond_all, frame.extents = 513, WHOLE)
WRONG_PACKET(packet_in_no_window, table[0].first = htole64(0), WHOLE)
WRONG_PACKET(packet_of_another_channel, frame.channel = 1, WHOLE)
WRONG_PACKET(packet_of_a_channel, (frame = (struct kmig_frame){ .type = LMTRACK_FRAME_CHANNEL, .stream = PEER_STREAM,
	.payload = 32 }), 64)
WRONG_PACKET(packet_out_of_order, frame.seq = 1, WHOLE)
WRONG_PACKET(packet_that_lies, frame.payload = 2 * PAGE_BYTES, WHOLE)

/* Of a module that speaks only what is said over TCP: it knows nothing of the buffers here. */
TEST_F(rdma, packet_of_an_older_module)
{
	struct packet packet = { 0 };
	struct kmig_frame frame = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1 };

	if (LMTRACK_WIRE_VERSION_FRAMES == LMTRACK_WIRE_VERSION)
		SKIP(return, "there is no older version whose frames are read");
	kmig_frame_encode(&frame, NULL, &packet.raw);
	packet.raw.version = htole16(LMTRACK_WIRE_VERSION_FRAMES);
	ASSERT_TRUE(put(self->peer.channel[0], &packet, sizeof(packet.raw)));
	EXPECT_EQ(-EPROTONOSUPPORT, reason(&self->peer));
	EXPECT_EQ(-EPROTONOSUPPORT, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);
	EXPECT_NE(NULL, strstr(self->victim.error, "another version")) TH_LOG("%s", self->victim.error);
	EXPECT_FALSE(self->victim.runs_guest);
}

/* ================ The source ================ */

/* A destination written by hand. */
FIXTURE(source) {
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_source *source;
	struct kmig_report report;
	pthread_t thread;
	int listener, control, result;
	int channel[8];		/* of data, in the order they came */
	unsigned int channels;
	struct kmig_transcript transcript;
	struct kmig_session session;
	uint64_t sent;
	_Atomic bool guest_runs, resumed;
	_Atomic int resume_error;
	_Atomic bool stuck;	/* it was said that the guest could not be resumed */
	size_t state_length;
	char error[512];
};

FIXTURE_SETUP(source)
{
}

FIXTURE_TEARDOWN(source)
{
}

static FIXTURE_DATA(source) *us;

static int vmm_pause(void *data)
{
	(void)data;
	us->guest_runs = false;
	return 0;
}

static int vmm_resume(void *data)
{
	(void)data;
	if (us->resume_error)
		return us->resume_error;
	us->guest_runs = us->resumed = true;
	return 0;
}

/* There is none; a length that is refused is not looked behind. */
static int vmm_save(void **state, size_t *length, void *data)
{
	(void)data;
	*state = NULL;
	*length = us->state_length;
	return 0;
}

static const struct kmig_source_ops vmm = {
	.size = sizeof(vmm),
	.pause = vmm_pause,
	.resume = vmm_resume,
	.save_state = vmm_save,
};

static void *source_main(void *data)
{
	FIXTURE_DATA(source) *self = data;

	self->result = kmig_source_run(self->source);
	self->report = (struct kmig_report){ .size = sizeof(self->report) };
	kmig_source_report(self->source, &self->report);
	snprintf(self->error, sizeof(self->error), "%s", kmig_ctx_error(self->ctx));
	return NULL;
}

static void source_log(enum kmig_log_level level, const char *text, void *data)
{
	(void)data;
	if (level == KMIG_LOG_ERROR && strstr(text, "could not be resumed"))
		us->stuck = true;
	if (getenv("LOG"))
		fprintf(stderr, "# source %d: %s\n", level, text);
}

static void source_wrong(const char *what)
{
	fprintf(stderr, "# the tracker was asked for %s\n", what);
	abort();
}

static bool say(FIXTURE_DATA(source) *self, uint16_t type, const void *body, size_t length)
{
	struct lmtrack_wire_message header;
	uint8_t bytes[1024];

	kmig_message_encode(type, body, length, &header);
	kmig_auth_seal(self->session.destination, self->sent++, &header, body, length, header.mac);
	memcpy(bytes, &header, sizeof(header));
	if (length)
		memcpy(bytes + sizeof(header), body, length);
	return put(self->control, bytes, sizeof(header) + length);
}

/* The next message that is neither a keepalive nor digests; 0: it has hung up. */
static uint16_t hear(FIXTURE_DATA(source) *self, void *body, size_t room)
{
	static uint8_t bytes[LMTRACK_WIRE_BODY_MAX];
	struct lmtrack_wire_message header;
	uint16_t type;

	do {
		if (!get(self->control, &header, sizeof(header)) || !get(self->control, bytes, le32toh(header.length)))
			return 0;
		type = le16toh(header.type);
	} while (type == LMTRACK_MSG_KEEPALIVE || type == LMTRACK_MSG_DIGESTS);
	memcpy(body, bytes, room < le32toh(header.length) ? room : le32toh(header.length));
	return type;
}

static int accept_one(FIXTURE_DATA(source) *self)
{
	struct timeval limit = { .tv_sec = 20 };
	int fd = accept4(self->listener, NULL, NULL, SOCK_CLOEXEC);

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	return fd;
}

static bool accept_channel(FIXTURE_DATA(source) *self)
{
	struct peer_channel_frame wire;
	int fd = accept_one(self);

	self->channel[self->channels++] = fd;
	return get(fd, &wire, sizeof(wire));
}

/* It has connected, and said its name. */
static bool meet_source(FIXTURE_DATA(source) *self, enum kmig_transport transport, uint32_t timeout_ms, uint32_t wait_ms)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct kmig_region_opts region = KMIG_REGION_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	socklen_t length = sizeof(address);

	memset(self, 0, sizeof(*self));
	memset(&standin, 0, sizeof(standin));
	standin.wrong = source_wrong;
	us = self;
	self->guest_runs = true;
	self->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(self->listener, (struct sockaddr *)&address, sizeof(address)) || listen(self->listener, 8) ||
	    getsockname(self->listener, (struct sockaddr *)&address, &length) || kmig_ctx_new(&self->ctx))
		return false;
	kmig_ctx_set_log(self->ctx, source_log, NULL);
	region.bytes = GUEST_BYTES;
	region.kind = KMIG_REGION_MEMFD;
	opts.host = "127.0.0.1";
	opts.port = ntohs(address.sin_port);
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.transport = transport;
	opts.timeout_ms = timeout_ms;
	opts.channel_wait_ms = wait_ms;
	opts.channels = 2;
	if (kmig_region_create(self->ctx, &region, &self->region) || !kmig_region_map(self->region) ||
	    kmig_source_new(self->ctx, &opts, &vmm, NULL, &self->source) ||
	    kmig_source_add_region(self->source, self->region) ||
	    pthread_create(&self->thread, NULL, source_main, self))
		return false;
	self->control = accept_one(self);
	return get(self->control, &self->transcript.source, sizeof(self->transcript.source));
}

/* Say ours, with pages of @page_size, and prove that we know the secret. */
static bool prove(FIXTURE_DATA(source) *self, uint32_t page_size)
{
	struct peer_proof proof;

	if (kmig_auth_hello(page_size, &self->transcript.destination) ||
	    !put(self->control, &self->transcript.destination, sizeof(self->transcript.destination)) ||
	    !get(self->control, &proof, sizeof(proof)))
		return false;
	kmig_auth_proof(SECRET, strlen(SECRET), "lmtrack destination", &self->transcript, &proof.proof);
	kmig_auth_session(SECRET, strlen(SECRET), &self->transcript, &self->session);
	kmig_message_encode(LMTRACK_MSG_PROOF, &proof.proof, sizeof(proof.proof), &proof.header);
	return put(self->control, &proof, sizeof(proof));
}

/* As far as DEVICES_READY. */
static bool begin(FIXTURE_DATA(source) *self, enum kmig_transport transport, uint32_t timeout_ms, uint32_t wait_ms)
{
	return meet_source(self, transport, timeout_ms, wait_ms) && prove(self, PAGE_BYTES) &&
	       hear(self, NULL, 0) == LMTRACK_MSG_CAPACITY && say(self, LMTRACK_MSG_CAPACITY_OK, NULL, 0) &&
	       hear(self, NULL, 0) == LMTRACK_MSG_REGIONS && say(self, LMTRACK_MSG_DEVICES_READY, NULL, 0);
}

static bool offer(FIXTURE_DATA(source) *self)
{
	struct lmtrack_wire_rdma_offer rdma = { .port = htole32(7), .window_pages = htole32(LMTRACK_CHUNK_PAGES) };

	return hear(self, NULL, 0) == LMTRACK_MSG_RDMA_ASK && say(self, LMTRACK_MSG_RDMA_OFFER, &rdma, sizeof(rdma));
}

/* The round is under way: what comes before it is a failure to begin. */
static bool begun(uint32_t round)
{
	for (int i = 0; i < 5000 && standin.round < round; i++)
		usleep(2000);
	return standin.round == round;
}

static bool acknowledge(FIXTURE_DATA(source) *self, uint32_t round)
{
	struct lmtrack_wire_round_ack ack = { .round = htole32(round), .pages = htole64(1) };

	return begun(round) && say(self, LMTRACK_MSG_ROUND_ACK, &ack, sizeof(ack));
}

static void finish(FIXTURE_DATA(source) *self)
{
	close(self->control);
	pthread_join(self->thread, NULL);
	for (unsigned int i = 0; i < self->channels; i++)
		close(self->channel[i]);
	close(self->listener);
	kmig_source_free(self->source);
	kmig_region_free(self->region);
	kmig_ctx_free(self->ctx);
}

/* Why the source gives up, by its ABORT. */
static int why(FIXTURE_DATA(source) *self)
{
	struct lmtrack_wire_abort abort = { 0 };
	uint16_t type;

	do {
		type = hear(self, &abort, sizeof(abort));
	} while (type && type != LMTRACK_MSG_ABORT);
	return type ? -(int)le32toh(abort.error) : 0;
}

#define EXPECT_GIVES_UP(errno_) do {							\
	EXPECT_EQ(errno_, why(self));							\
	finish(self);									\
	EXPECT_EQ(errno_, self->result) TH_LOG("%s", self->error);			\
	EXPECT_TRUE(self->guest_runs);							\
	EXPECT_EQ(KMIG_FAILED, self->report.verdict);					\
} while (0)

/* Over TCP, as far as round 1. */
static bool begin_tcp(FIXTURE_DATA(source) *self, uint32_t timeout_ms, uint32_t wait_ms)
{
	return begin(self, KMIG_TRANSPORT_TCP, timeout_ms, wait_ms) && accept_channel(self) && accept_channel(self) &&
	       say(self, LMTRACK_MSG_CHANNELS_READY, NULL, 0);
}

/* Over RDMA, with a window that the first channel waits for. */
static bool begin_rdma(FIXTURE_DATA(source) *self, struct lmtrack_wire_window *window)
{
	if (!begin(self, KMIG_TRANSPORT_AUTO, 5000, 5000))
		return false;
	/* Before the first round: so it does not end without. */
	standin.wanting = 1;
	standin.want_first = 512;
	return offer(self) && say(self, LMTRACK_MSG_CHANNELS_READY, NULL, 0) &&
	       hear(self, window, sizeof(*window)) == LMTRACK_MSG_WINDOW_WANTED;
}

/* ---- The greeting ---- */

#define EXPECT_NO_GREETING(errno_, text) do {						\
	EXPECT_EQ(0, hear(self, NULL, 0));						\
	finish(self);									\
	EXPECT_EQ(errno_, self->result) TH_LOG("%s", self->error);			\
	EXPECT_NE(NULL, strstr(self->error, text)) TH_LOG("%s", self->error);		\
	EXPECT_TRUE(self->guest_runs);							\
} while (0)

TEST_F(source, greeted_with_something_else)
{
	struct lmtrack_wire_message header;

	ASSERT_TRUE(meet_source(self, KMIG_TRANSPORT_TCP, 5000, 5000));
	kmig_message_encode(LMTRACK_MSG_DEVICES_READY, NULL, 0, &header);
	ASSERT_TRUE(put(self->control, &header, sizeof(header)));
	EXPECT_NO_GREETING(-EPROTO, "does not belong here");
}

/* It knows the secret, and is another kind of machine. */
TEST_F(source, other_pages)
{
	ASSERT_TRUE(meet_source(self, KMIG_TRANSPORT_TCP, 5000, 5000));
	ASSERT_TRUE(prove(self, 4 * PAGE_BYTES));
	EXPECT_NO_GREETING(-EPROTONOSUPPORT, "pages of 16384 bytes");
}

/* ---- The offer ---- */

TEST_F(source, offer_unasked)
{
	struct lmtrack_wire_rdma_offer rdma = { .port = htole32(7), .window_pages = htole32(512) };

	ASSERT_TRUE(begin(self, KMIG_TRANSPORT_TCP, 5000, 5000));
	say(self, LMTRACK_MSG_RDMA_OFFER, &rdma, sizeof(rdma));
	EXPECT_GIVES_UP(-EPROTO);
}

TEST_F(source, offer_twice)
{
	struct lmtrack_wire_rdma_offer rdma = { .port = htole32(7), .window_pages = htole32(512) };

	ASSERT_TRUE(begin(self, KMIG_TRANSPORT_AUTO, 5000, 5000));
	ASSERT_TRUE(offer(self));
	say(self, LMTRACK_MSG_RDMA_OFFER, &rdma, sizeof(rdma));
	EXPECT_GIVES_UP(-EPROTO);
}

#define WRONG_OFFER(name, ...)								\
TEST_F(source, name)									\
{											\
	struct lmtrack_wire_rdma_offer rdma = { __VA_ARGS__ };				\
											\
	ASSERT_TRUE(begin(self, KMIG_TRANSPORT_AUTO, 5000, 5000));			\
	ASSERT_EQ(LMTRACK_MSG_RDMA_ASK, hear(self, NULL, 0));				\
	say(self, LMTRACK_MSG_RDMA_OFFER, &rdma, sizeof(rdma));				\
	EXPECT_GIVES_UP(-EPROTO);							\
}
WRONG_OFFER(offer_of_no_port, .window_pages = htole32(512))
WRONG_OFFER(offer_of_no_such_port, .port = htole32(65536), .window_pages = htole32(512))
WRONG_OFFER(offer_of_no_window, .port = htole32(7))
WRONG_OFFER(offer_of_half_a_chunk, .port = htole32(7), .window_pages = htole32(256))
WRONG_OFFER(offer_with_reserved, .port = htole32(7), .window_pages = htole32(512), .reserved = 1)
WRONG_OFFER(offer_with_no_such_error, .error = htole32(4096))

/* It would not have known yet that the channels had to be watched. */
TEST_F(source, ready_before_the_offer)
{
	ASSERT_TRUE(begin(self, KMIG_TRANSPORT_AUTO, 5000, 5000));
	ASSERT_EQ(LMTRACK_MSG_RDMA_ASK, hear(self, NULL, 0));
	say(self, LMTRACK_MSG_CHANNELS_READY, NULL, 0);
	EXPECT_GIVES_UP(-EPROTO);
}

TEST_F(source, ready_twice)
{
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	say(self, LMTRACK_MSG_CHANNELS_READY, NULL, 0);
	EXPECT_GIVES_UP(-EPROTO);
}

/* ---- Windows ---- */

TEST_F(source, window_over_tcp)
{
	struct lmtrack_wire_window window = { .address = htole64(1), .rkey = htole32(1) };

	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	EXPECT_GIVES_UP(-EPROTO);
}

TEST_F(source, window_that_was_wanted)
{
	struct lmtrack_wire_window window;

	ASSERT_TRUE(begin_rdma(self, &window));
	EXPECT_EQ(0, le32toh(window.channel));
	EXPECT_EQ(512, le64toh(window.first));
	EXPECT_EQ(0, window.address | window.rkey | window.error);
	window.address = htole64(0x1234000);
	window.rkey = htole32(0x77);
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	/* Once: then it is not asked for. */
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	EXPECT_GIVES_UP(-EPROTO);
	EXPECT_EQ(1, standin.windows);
	EXPECT_EQ(0x1234000, standin.address);
	EXPECT_EQ(0x77, standin.rkey);
}

#define WRONG_WINDOW(name, change)							\
TEST_F(source, name)									\
{											\
	struct lmtrack_wire_window window;						\
											\
	ASSERT_TRUE(begin_rdma(self, &window));						\
	change;										\
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));				\
	EXPECT_GIVES_UP(-EPROTO);							\
	EXPECT_EQ(0, standin.windows);							\
}
WRONG_WINDOW(window_for_no_channel, window.channel = htole32(2))
WRONG_WINDOW(window_for_a_channel_beyond_all, window.channel = htole32(0xffffffff))
WRONG_WINDOW(window_for_one_that_waits_for_none, window.channel = htole32(1))
WRONG_WINDOW(window_of_another_region, window.region = htole32(1))
WRONG_WINDOW(window_of_other_pages, window.first = htole64(0))
WRONG_WINDOW(window_with_no_such_error, window.error = htole32(4096))

/* A channel that cannot have one is lost, and no more. */
TEST_F(source, window_refused)
{
	struct lmtrack_wire_channel_change change = { 0 };
	struct lmtrack_wire_window window;

	ASSERT_TRUE(begin_rdma(self, &window));
	window.error = htole32(ENOMEM);
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_LOST, hear(self, &change, sizeof(change)));
	EXPECT_EQ(0, le32toh(change.channel));
	/* Its window was answered. */
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	EXPECT_GIVES_UP(-EPROTO);
	EXPECT_EQ(1, self->report.channels_lost);
}

/* The answer crosses the loss of its channel, and is of no use then. */
TEST_F(source, window_for_one_that_is_lost)
{
	struct lmtrack_wire_channel_change change = { .error = htole32(EIO) };
	struct lmtrack_wire_window window;

	ASSERT_TRUE(begin_rdma(self, &window));
	say(self, LMTRACK_MSG_CHANNEL_LOST, &change, sizeof(change));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_LOST, hear(self, NULL, 0));
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	change.error = 0;
	say(self, LMTRACK_MSG_CHANNEL_CLOSED, &change, sizeof(change));
	/* It tries to come back, over TCP. */
	ASSERT_TRUE(accept_channel(self));
	EXPECT_EQ(0, standin.windows);
	say(self, LMTRACK_MSG_WINDOW, &window, sizeof(window));
	EXPECT_GIVES_UP(-EPROTO);
}

#define TO_THE_SOURCE(name, type, ...)							\
TEST_F(source, name)									\
{											\
	struct { __VA_ARGS__ } body;							\
											\
	memset(&body, 0, sizeof(body));							\
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));					\
	say(self, type, &body, sizeof(body));						\
	EXPECT_GIVES_UP(-EPROTO);							\
}
TO_THE_SOURCE(asked_by_the_destination, LMTRACK_MSG_RDMA_ASK)
TO_THE_SOURCE(wanted_by_the_destination, LMTRACK_MSG_WINDOW_WANTED, WINDOW)
TO_THE_SOURCE(window_cut_short, LMTRACK_MSG_WINDOW, uint64_t half[2];)
TO_THE_SOURCE(closed_that_was_not_lost, LMTRACK_MSG_CHANNEL_CLOSED, struct lmtrack_wire_channel_change change;)
TO_THE_SOURCE(joined_that_is_there, LMTRACK_MSG_CHANNEL_JOINED, struct lmtrack_wire_channel_change change;)

#define WRONG_CHANGE(name, type, ...)							\
TEST_F(source, name)									\
{											\
	struct lmtrack_wire_channel_change change = { __VA_ARGS__ };			\
											\
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));					\
	ASSERT_TRUE(begun(1));								\
	say(self, type, &change, sizeof(change));					\
	EXPECT_GIVES_UP(-EPROTO);							\
	EXPECT_NE(NULL, strstr(self->error, "which there is not")) TH_LOG("%s", self->error);	\
}
WRONG_CHANGE(no_such_channel_is_lost, LMTRACK_MSG_CHANNEL_LOST, .channel = htole32(2))
WRONG_CHANGE(channel_beyond_all_is_lost, LMTRACK_MSG_CHANNEL_LOST, .channel = htole32(0xffffffff))
WRONG_CHANGE(no_such_channel_is_closed, LMTRACK_MSG_CHANNEL_CLOSED, .channel = htole32(2))
WRONG_CHANGE(no_such_channel_has_joined, LMTRACK_MSG_CHANNEL_JOINED, .channel = htole32(2))
WRONG_CHANGE(lost_with_no_such_error, LMTRACK_MSG_CHANNEL_LOST, .error = htole32(4096))

/* Of a region with 5 chunks. */
#define WRONG_LIST(name, ...)								\
TEST_F(source, name)									\
{											\
	struct {									\
		struct lmtrack_wire_unverified head;					\
		__le64 bitmap[2];							\
	} list = { .head.words = htole32(1), .bitmap = { ~0ull, ~0ull } };		\
	size_t length = sizeof(list.head) + 8;						\
											\
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));					\
	ASSERT_TRUE(begun(1));								\
	__VA_ARGS__;									\
	say(self, LMTRACK_MSG_UNVERIFIED, &list, length);				\
	EXPECT_GIVES_UP(-EPROTO);							\
	EXPECT_NE(NULL, strstr(self->error, "list of chunks")) TH_LOG("%s", self->error);	\
}
WRONG_LIST(list_of_no_region, list.head.region = htole32(REGION_BEYOND))
WRONG_LIST(list_of_a_region_beyond_all, list.head.region = htole32(0xffffffff))
WRONG_LIST(list_shorter_than_it_says, list.head.words = htole32(2))
WRONG_LIST(list_longer_than_it_says, length += 8)
WRONG_LIST(list_of_more_words_than_there_are, list.head.words = htole32(0xffffffff))
WRONG_LIST(list_within_a_word, list.head.first = htole64(1))
WRONG_LIST(list_behind_the_region, list.head.first = htole64(64))
WRONG_LIST(list_at_the_end_of_numbers, list.head.first = htole64(~63ull))
WRONG_LIST(list_that_goes_on_behind_the_region, list.head.words = htole32(2); length += 8)

/* Whatever reason it has, it does not make the outcome unknown. */
#define STRANGE_ABORT(name, errno_)							\
TEST_F(source, name)									\
{											\
	struct lmtrack_wire_abort abort = { .error = htole32(errno_) };			\
											\
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));					\
	say(self, LMTRACK_MSG_ABORT, &abort, sizeof(abort));				\
	EXPECT_EQ(0, why(self));							\
	finish(self);									\
	EXPECT_EQ(-EPROTO, self->result) TH_LOG("%s", self->error);			\
	EXPECT_EQ(KMIG_FAILED, self->report.verdict);					\
	EXPECT_TRUE(self->guest_runs);							\
}
STRANGE_ABORT(aborted_for_no_reason, 0)
STRANGE_ABORT(aborted_for_no_such_reason, 4096)
STRANGE_ABORT(aborted_for_the_reason_that_is_ours, EINPROGRESS)

TEST_F(source, acknowledged_with_reserved)
{
	struct lmtrack_wire_round_ack ack = { .round = htole32(1), .reserved = 1 };

	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	say(self, LMTRACK_MSG_ROUND_ACK, &ack, sizeof(ack));
	EXPECT_GIVES_UP(-EPROTO);
}

/* ---- Losses ---- */

static bool lose(FIXTURE_DATA(source) *self, uint32_t number)
{
	struct lmtrack_wire_channel_change change = { .channel = htole32(number), .error = htole32(EIO) };

	return say(self, LMTRACK_MSG_CHANNEL_LOST, &change, sizeof(change)) &&
	       hear(self, &change, sizeof(change)) == LMTRACK_MSG_CHANNEL_LOST && le32toh(change.channel) == number;
}

/* Nothing was dirty, and nothing had to be digested: it pauses the guest after round 1. */
static bool until_paused(FIXTURE_DATA(source) *self)
{
	return acknowledge(self, 1) && hear(self, NULL, 0) == LMTRACK_MSG_PAUSED;
}

TEST_F(source, all_lost_and_no_wait)
{
	ASSERT_TRUE(begin_tcp(self, 5000, 0));
	ASSERT_TRUE(begun(1));
	ASSERT_TRUE(lose(self, 0));
	ASSERT_TRUE(lose(self, 1));
	EXPECT_GIVES_UP(-ENOTCONN);
	EXPECT_EQ(2, self->report.channels_lost);
	EXPECT_NE(NULL, strstr(self->error, "within 0 ms")) TH_LOG("%s", self->error);
}

/* The last round is through but for this: there is an end to waiting for it, and the guest runs again. */
TEST_F_TIMEOUT(source, never_closed_while_paused, 60)
{
	ASSERT_TRUE(begin_tcp(self, 1000, 5000));
	ASSERT_TRUE(until_paused(self));
	ASSERT_TRUE(lose(self, 0));
	ASSERT_TRUE(acknowledge(self, 2));
	/* It lives meanwhile. */
	for (int i = 0; i < 500 && !self->resumed; i++) {
		say(self, LMTRACK_MSG_KEEPALIVE, NULL, 0);
		usleep(100000);
	}
	EXPECT_GIVES_UP(-ETIMEDOUT);
	EXPECT_NE(NULL, strstr(self->error, "did not answer within 6000 ms")) TH_LOG("%s", self->error);
	EXPECT_TRUE(self->resumed);
}

/* The guest is to run on until a channel is back, and does not: there is no use in waiting then. */
TEST_F(source, all_lost_and_not_resumed)
{
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	ASSERT_TRUE(until_paused(self));
	self->resume_error = -EXDEV;
	ASSERT_TRUE(lose(self, 0));
	ASSERT_TRUE(lose(self, 1));
	EXPECT_EQ(-EXDEV, why(self));
	finish(self);
	EXPECT_EQ(-EXDEV, self->result) TH_LOG("%s", self->error);
	EXPECT_TRUE(self->stuck);
	EXPECT_FALSE(self->guest_runs);
	EXPECT_EQ(KMIG_FAILED, self->report.verdict);
}

TEST_F(source, more_state_than_can_be_moved)
{
	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	self->state_length = LMTRACK_WIRE_STATE_MAX + 1ul;
	ASSERT_TRUE(until_paused(self));
	EXPECT_GIVES_UP(-EFBIG);
	EXPECT_TRUE(self->resumed);
}

/* Its digests have come, and it says that it needs them: not for ever. */
TEST_F(source, never_content_with_the_digests)
{
	unsigned int prepared = 0;
	uint16_t type;

	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	ASSERT_TRUE(until_paused(self));
	ASSERT_TRUE(acknowledge(self, 2));
	while ((type = hear(self, NULL, 0)) == LMTRACK_MSG_PREPARE && prepared < 100) {
		prepared++;
		say(self, LMTRACK_MSG_NEED, NULL, 0);
	}
	EXPECT_EQ(LMTRACK_MSG_ABORT, type);
	EXPECT_LE(2, prepared);
	finish(self);
	EXPECT_EQ(-EPROTO, self->result) TH_LOG("%s", self->error);
	EXPECT_TRUE(self->guest_runs);
	EXPECT_EQ(KMIG_FAILED, self->report.verdict);
}

/* It has come back, and breaks before the first round that it is in. */
TEST_F(source, joined_and_lost_before_its_round)
{
	struct lmtrack_wire_channel_change change = { 0 };
	struct lmtrack_wire_ready ready = { 0 };
	struct lmtrack_wire_running running = { 0 };

	ASSERT_TRUE(begin_tcp(self, 5000, 5000));
	ASSERT_TRUE(begun(1));
	ASSERT_TRUE(lose(self, 0));
	ASSERT_TRUE(say(self, LMTRACK_MSG_CHANNEL_CLOSED, &change, sizeof(change)));
	ASSERT_TRUE(accept_channel(self));
	change.round = htole32(2);
	change.attempt = htole64(1);
	ASSERT_TRUE(say(self, LMTRACK_MSG_CHANNEL_JOINED, &change, sizeof(change)));
	close(self->channel[2]);
	self->channel[2] = -1;
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_LOST, hear(self, &change, sizeof(change)));
	EXPECT_EQ(0, le32toh(change.channel));
	EXPECT_EQ(1, le32toh(change.round));
	/* No round begins until it is closed. */
	ASSERT_TRUE(acknowledge(self, 1));
	usleep(300000);
	EXPECT_TRUE(self->guest_runs);
	EXPECT_EQ(1, standin.round);
	change = (struct lmtrack_wire_channel_change){ 0 };
	ASSERT_TRUE(say(self, LMTRACK_MSG_CHANNEL_CLOSED, &change, sizeof(change)));
	ASSERT_EQ(LMTRACK_MSG_PAUSED, hear(self, NULL, 0));
	ASSERT_TRUE(acknowledge(self, 2));
	ASSERT_EQ(LMTRACK_MSG_PREPARE, hear(self, NULL, 0));
	ASSERT_TRUE(say(self, LMTRACK_MSG_READY, &ready, sizeof(ready)));
	ASSERT_EQ(LMTRACK_MSG_COMMIT, hear(self, NULL, 0));
	ASSERT_TRUE(say(self, LMTRACK_MSG_RUNNING, &running, sizeof(running)));
	ASSERT_EQ(LMTRACK_MSG_DONE, hear(self, NULL, 0));
	finish(self);
	EXPECT_EQ(0, self->result) TH_LOG("%s", self->error);
	EXPECT_EQ(1, self->report.channels_lost);
	EXPECT_EQ(0, self->report.channels_rejoined);
}

/* The destination closes them at PREPARE: what it says of them then decides nothing. */
TEST_F(source, lost_together_with_ready)
{
	struct lmtrack_wire_channel_change change = { .channel = htole32(1), .error = htole32(ECONNRESET) };
	struct lmtrack_wire_ready ready = { 0 };
	struct lmtrack_wire_running running = { 0 };

	ASSERT_TRUE(begin_tcp(self, 5000, 0));
	ASSERT_TRUE(until_paused(self));
	ASSERT_TRUE(acknowledge(self, 2));
	ASSERT_EQ(LMTRACK_MSG_PREPARE, hear(self, NULL, 0));
	for (unsigned int i = 0; i < 2; i++)
		shutdown(self->channel[i], SHUT_RDWR);
	ASSERT_TRUE(say(self, LMTRACK_MSG_CHANNEL_LOST, &change, sizeof(change)));
	ASSERT_TRUE(say(self, LMTRACK_MSG_READY, &ready, sizeof(ready)));
	ASSERT_EQ(LMTRACK_MSG_COMMIT, hear(self, NULL, 0));
	ASSERT_TRUE(say(self, LMTRACK_MSG_RUNNING, &running, sizeof(running)));
	ASSERT_EQ(LMTRACK_MSG_DONE, hear(self, NULL, 0));
	finish(self);
	EXPECT_EQ(0, self->result) TH_LOG("%s", self->error);
	EXPECT_EQ(0, self->report.channels_lost);
	EXPECT_FALSE(self->guest_runs);
}

TEST_HARNESS_MAIN
