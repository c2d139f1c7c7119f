// SPDX-License-Identifier: GPL-2.0
/*
 * Hostile frames and messages at a real destination engine: each is refused with the right
 * error, the guest never runs, and nothing is stored but what was in order before.
 */
#include "kselftest_harness.h"
#include "lib_peer.h"

#include "../lib/digest.h"

#define GUEST_BYTES (8 * MIB + 3 * PAGE_BYTES)	/* a short last chunk */
#define GUEST_PAGES (GUEST_BYTES / PAGE_BYTES)

FIXTURE(wire) {
	struct victim victim;
	struct peer peer;
	uint8_t *ram;
	uint8_t *payload;
};

FIXTURE_SETUP(wire)
{
	memset(&self->victim, 0, sizeof(self->victim));
	ASSERT_EQ(0, victim_start(&self->victim, GUEST_BYTES));
	ASSERT_TRUE(peer_begin(&self->peer, self->victim.port, GUEST_BYTES));
	self->ram = kmig_region_map(self->victim.region);
	self->payload = malloc(3 * MIB);
	memset(self->payload, 0xa5, 3 * MIB);
}

FIXTURE_TEARDOWN(wire)
{
	peer_end(&self->peer);
	victim_end(&self->victim);
	free(self->payload);
}

/* A frame that is in order: @pages pages from @first of round 1 on channel 0. */
static struct kmig_frame good(struct peer *peer, uint64_t first, uint32_t pages, struct lmtrack_wire_extent *extent)
{
	*extent = (struct lmtrack_wire_extent){ .first = htole64(first), .pages = htole32(pages) };
	return (struct kmig_frame){
		.type = LMTRACK_FRAME_DATA,
		.extents = 1,
		.stream = PEER_STREAM,
		.round = 1,
		.payload = pages * PAGE_BYTES,
		.seq = peer->seq[0],
	};
}

static bool put_frame(struct peer *peer, int channel, const struct kmig_frame *frame,
		      const struct lmtrack_wire_extent *table, const void *payload)
{
	struct lmtrack_wire_frame raw;

	kmig_frame_encode(frame, table, &raw);
	peer->seq[channel]++;
	return put(peer->channel[channel], &raw, sizeof(raw)) &&
	       (!frame->extents || put(peer->channel[channel], table, frame->extents * sizeof(*table))) &&
	       (!frame->payload || !payload || put(peer->channel[channel], payload, frame->payload));
}

static bool all_zero(const uint8_t *bytes, size_t length)
{
	return !length || (!bytes[0] && !memcmp(bytes, bytes + 1, length - 1));
}

/* The destination has refused with this, and memory is as it was. */
#define EXPECT_REFUSED(errno_) do {							\
	EXPECT_EQ(errno_, reason(&self->peer));						\
	EXPECT_EQ(errno_, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);	\
	EXPECT_FALSE(self->victim.runs_guest);						\
	EXPECT_TRUE(self->victim.discarded);						\
	EXPECT_TRUE(all_zero(self->ram, GUEST_BYTES));					\
} while (0)

TEST_F(wire, good_frames_are_stored)
{
	struct lmtrack_wire_extent table[2], one;
	struct lmtrack_wire_round_ack ack;
	struct kmig_frame frame;

	frame = good(&self->peer, 3, 2, &table[0]);
	table[1] = (struct lmtrack_wire_extent){ .first = htole64(511), .pages = htole32(1) };
	frame.extents = 2;
	frame.payload = 3 * PAGE_BYTES;
	ASSERT_TRUE(put_frame(&self->peer, 0, &frame, table, self->payload));
	/* The last page there is. */
	frame = good(&self->peer, GUEST_PAGES - 1, 1, &one);
	ASSERT_TRUE(put_frame(&self->peer, 0, &frame, &one, self->payload));
	/* Two pages of zero, of which one was stored. */
	frame = good(&self->peer, 4, 2, &one);
	frame.type = LMTRACK_FRAME_ZERO;
	frame.payload = 0;
	ASSERT_TRUE(put_frame(&self->peer, 0, &frame, &one, NULL));
	for (uint32_t i = 0; i < PEER_CHANNELS; i++) {
		struct kmig_frame end = {
			.type = LMTRACK_FRAME_ROUND_END,
			.stream = PEER_STREAM,
			.channel = i,
			.round = 1,
			.seq = self->peer.seq[i],
			.arg = i ? 0 : 6,
		};

		ASSERT_TRUE(put_frame(&self->peer, i, &end, NULL, NULL));
	}
	/* What it lacks: chunk 0, and the last one. */
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, &ack, sizeof(ack)));
	EXPECT_EQ(1, le32toh(ack.round));
	EXPECT_EQ(6, le64toh(ack.pages));
	peer_end(&self->peer);
	self->peer.control = self->peer.channel[0] = self->peer.channel[1] = -1;
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim));
	EXPECT_TRUE(all_zero(self->ram, 3 * PAGE_BYTES));
	EXPECT_EQ(0, memcmp(self->ram + 3 * PAGE_BYTES, self->payload, PAGE_BYTES));
	EXPECT_TRUE(all_zero(self->ram + 4 * PAGE_BYTES, 507 * PAGE_BYTES));
	EXPECT_EQ(0, memcmp(self->ram + 511 * PAGE_BYTES, self->payload, PAGE_BYTES));
	EXPECT_TRUE(all_zero(self->ram + 512 * PAGE_BYTES, GUEST_BYTES - 513 * PAGE_BYTES));
	EXPECT_EQ(0, memcmp(self->ram + GUEST_BYTES - PAGE_BYTES, self->payload, PAGE_BYTES));
}

/* One thing wrong with an otherwise good frame of one page. */
#define WRONG(name, error, change)						\
TEST_F(wire, name)								\
{										\
	struct lmtrack_wire_extent table[520] = { 0 };				\
	struct kmig_frame frame = good(&self->peer, 7, 1, table);		\
										\
	change;									\
	put_frame(&self->peer, 0, &frame, table, self->payload);		\
	EXPECT_REFUSED(error);							\
}
#define EXTENT(n, f, p) (table[n] = (struct lmtrack_wire_extent){ .first = htole64(f), .pages = htole32(p) })

WRONG(type_unknown, -EPROTO, frame.type = 77)
WRONG(type_zero, -EPROTO, frame.type = 0)
WRONG(channel_begins_again, -EPROTO, (frame = (struct kmig_frame){ .type = LMTRACK_FRAME_CHANNEL,
	.stream = PEER_STREAM, .payload = 32 }))
WRONG(stream_of_another, -EPROTO, frame.stream++)
WRONG(channel_of_another, -EPROTO, frame.channel = 1)
WRONG(channel_beyond_all, -EPROTO, frame.channel = 0xffffffff)
WRONG(round_zero, -EPROTO, frame.round = 0)
WRONG(round_too_early, -EPROTO, frame.round = 2)
WRONG(round_last, -EPROTO, frame.round = 0xffffffff)
WRONG(region_not_announced, -EPROTO, frame.region = 1)
WRONG(region_beyond_all, -EPROTO, frame.region = 0xffffffff)
WRONG(frame_missing, -EPROTO, frame.seq++)
WRONG(seq_negative, -EPROTO, frame.seq = -1)
WRONG(argument_set, -EPROTO, frame.arg = 1)
WRONG(payload_none, -EPROTO, frame.payload = 0)
WRONG(payload_half_a_page, -EPROTO, frame.payload = PAGE_BYTES / 2)
WRONG(payload_too_short, -EPROTO, EXTENT(0, 7, 2))
WRONG(payload_too_long, -EPROTO, frame.payload = 2 * PAGE_BYTES)
WRONG(payload_over_a_chunk, -EPROTO, frame.payload = 513 * PAGE_BYTES)
WRONG(payload_of_4_gib, -EPROTO, (frame.payload = 0xfffff000, EXTENT(0, 0, 0xfffff)))
WRONG(extents_none, -EPROTO, frame.extents = 0)
WRONG(extents_too_many, -EPROTO, frame.extents = 513)
WRONG(extent_empty, -EPROTO, EXTENT(0, 7, 0))
WRONG(extent_beyond_the_region, -EPROTO, EXTENT(0, GUEST_PAGES, 1))
WRONG(extent_across_the_end, -EPROTO, (EXTENT(0, GUEST_PAGES - 1, 2), frame.payload = 2 * PAGE_BYTES))
WRONG(extent_at_the_end_of_numbers, -EPROTO, EXTENT(0, ~0ull, 1))
WRONG(extent_wraps, -EPROTO, (EXTENT(0, ~0ull - 1, 4), frame.payload = 4 * PAGE_BYTES))
WRONG(extent_across_chunks, -EPROTO, (EXTENT(0, 511, 2), frame.payload = 2 * PAGE_BYTES))
WRONG(extent_of_4_g_pages, -EPROTO, EXTENT(0, 0, 0xffffffff))
WRONG(extent_reserved, -EPROTO, table[0].reserved = 1)
WRONG(extents_in_two_chunks, -EPROTO, (frame.extents = 2, EXTENT(1, 600, 1), frame.payload = 2 * PAGE_BYTES))
WRONG(extents_overlap, -EPROTO, (frame.extents = 2, EXTENT(1, 7, 1), frame.payload = 2 * PAGE_BYTES))
WRONG(extents_descend, -EPROTO, (frame.extents = 2, EXTENT(1, 6, 1), frame.payload = 2 * PAGE_BYTES))
WRONG(zero_with_payload, -EPROTO, frame.type = LMTRACK_FRAME_ZERO)
WRONG(zero_without_extents, -EPROTO, (frame.type = LMTRACK_FRAME_ZERO, frame.payload = 0, frame.extents = 0))
WRONG(zero_beyond_the_region, -EPROTO, (frame.type = LMTRACK_FRAME_ZERO, frame.payload = 0, EXTENT(0, GUEST_PAGES, 1)))
WRONG(end_with_extents, -EPROTO, (frame.type = LMTRACK_FRAME_ROUND_END, frame.payload = 0))
WRONG(end_with_payload, -EPROTO, (frame.type = LMTRACK_FRAME_ROUND_END, frame.extents = 0))
WRONG(end_that_lies, -EPROTO, (frame.type = LMTRACK_FRAME_ROUND_END, frame.extents = 0, frame.payload = 0, frame.arg = 1))

/* What kmig_frame_encode() would not write. */
#define WRONG_BYTES(name, error, change)					\
TEST_F(wire, name)								\
{										\
	struct lmtrack_wire_extent table[1];					\
	struct kmig_frame frame = good(&self->peer, 7, 1, table);		\
	struct lmtrack_wire_frame raw;						\
										\
	kmig_frame_encode(&frame, table, &raw);					\
	change;									\
	put(self->peer.channel[0], &raw, sizeof(raw));				\
	put(self->peer.channel[0], table, sizeof(table));			\
	put(self->peer.channel[0], self->payload, PAGE_BYTES);			\
	EXPECT_REFUSED(error);							\
}
WRONG_BYTES(no_magic, -EPROTO, raw.magic = 0)
WRONG_BYTES(a_later_version, -EPROTONOSUPPORT, raw.version = htole16(LMTRACK_WIRE_VERSION + 1))
WRONG_BYTES(no_version, -EPROTONOSUPPORT, raw.version = 0)
WRONG_BYTES(flags_set, -EPROTO, raw.flags = 1)
WRONG_BYTES(reserved_set, -EPROTO, raw.reserved = 1)
WRONG_BYTES(crc_wrong, -EBADMSG, raw.crc ^= 1)
WRONG_BYTES(header_bit_flipped, -EBADMSG, raw.seq ^= htole64(1ull << 40))
WRONG_BYTES(table_bit_flipped, -EBADMSG, table[0].first ^= htole64(1))

/* The source goes, and the destination after it. */
#define EXPECT_ENDS() do {								\
	peer_end(&self->peer);								\
	self->peer.control = self->peer.channel[0] = self->peer.channel[1] = -1;		\
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);	\
} while (0)

/* That is no failure: the source is told, and says so itself; then the channel is closed. */
#define EXPECT_CHANNEL_LOST() do {							\
	struct lmtrack_wire_channel_change _change = { 0 };				\
											\
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_LOST, peer_recv(&self->peer, &_change, sizeof(_change)));	\
	EXPECT_EQ(0, le32toh(_change.channel));						\
	EXPECT_EQ(ECONNRESET, le32toh(_change.error));					\
	_change = (struct lmtrack_wire_channel_change){ .round = htole32(1) };		\
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_CHANNEL_LOST, &_change, sizeof(_change)));	\
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&self->peer, &_change, sizeof(_change)));	\
	EXPECT_EQ(0, le32toh(_change.channel));						\
	EXPECT_TRUE(all_zero(self->ram, 7 * PAGE_BYTES));				\
	EXPECT_ENDS();									\
} while (0)

/* Cut short after so many bytes of header, table and payload. */
#define CUT(name, bytes)							\
TEST_F(wire, name)								\
{										\
	struct lmtrack_wire_extent table[1];					\
	struct kmig_frame frame = good(&self->peer, 7, 1, table);		\
	struct lmtrack_wire_frame raw;						\
	uint8_t whole[sizeof(raw) + sizeof(table) + PAGE_BYTES] = { 0 };	\
										\
	kmig_frame_encode(&frame, table, &raw);					\
	memcpy(whole, &raw, sizeof(raw));					\
	memcpy(whole + sizeof(raw), table, sizeof(table));			\
	put(self->peer.channel[0], whole, bytes);				\
	shutdown(self->peer.channel[0], SHUT_WR);				\
	EXPECT_CHANNEL_LOST();							\
}
CUT(closed_at_once, 0)
CUT(cut_in_the_header, 63)
CUT(cut_before_the_table, 64)
CUT(cut_in_the_table, 79)
CUT(cut_before_the_payload, 80)
CUT(cut_in_the_payload, 80 + 4095)

/* From a kernel module that is older than the library at its side. */
TEST_F(wire, earlier_version_of_a_frame)
{
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1, .seq = 1, .arg = 1 };
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame = good(&self->peer, 7, 1, &extent);
	struct lmtrack_wire_frame raw;
	uint8_t both[sizeof(raw) + sizeof(extent)];

	kmig_frame_encode(&frame, &extent, &raw);
	raw.version = htole16(LMTRACK_WIRE_VERSION_FRAMES);
	raw.crc = 0;
	memcpy(both, &raw, sizeof(raw));
	memcpy(both + sizeof(raw), &extent, sizeof(extent));
	raw.crc = htole32(kmig_crc32c(both, sizeof(both)));
	ASSERT_TRUE(put(self->peer.channel[0], &raw, sizeof(raw)));
	ASSERT_TRUE(put(self->peer.channel[0], &extent, sizeof(extent)));
	ASSERT_TRUE(put(self->peer.channel[0], self->payload, PAGE_BYTES));
	ASSERT_TRUE(put_frame(&self->peer, 0, &end, NULL, NULL));
	end.channel = 1;
	end.seq = end.arg = 0;
	ASSERT_TRUE(put_frame(&self->peer, 1, &end, NULL, NULL));
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, NULL, 0));
	EXPECT_EQ(0, memcmp(self->ram + 7 * PAGE_BYTES, self->payload, PAGE_BYTES));
	EXPECT_ENDS();
}

TEST_F(wire, frame_twice)
{
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame = good(&self->peer, 7, 1, &extent);

	memset(self->payload, 0, PAGE_BYTES);
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	EXPECT_REFUSED(-EPROTO);
}

TEST_F(wire, chunk_on_two_channels)
{
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame = good(&self->peer, 7, 1, &extent);
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1 };
	struct lmtrack_wire_round_ack ack;

	memset(self->payload, 0, PAGE_BYTES);
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	end.seq = 1;
	end.arg = 1;
	put_frame(&self->peer, 0, &end, NULL, NULL);
	end.channel = 1;
	end.seq = 0;
	end.arg = 0;
	put_frame(&self->peer, 1, &end, NULL, NULL);
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, &ack, sizeof(ack)));
	/* In another round it may come on any channel. */
	frame = good(&self->peer, 8, 1, &extent);
	frame.channel = 1;
	frame.round = 2;
	frame.seq = 1;
	put_frame(&self->peer, 1, &frame, &extent, self->payload);
	end.round = 2;
	end.seq = 2;
	end.arg = 1;
	put_frame(&self->peer, 1, &end, NULL, NULL);
	end.channel = 0;
	end.seq = 2;
	end.arg = 0;
	put_frame(&self->peer, 0, &end, NULL, NULL);
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, &ack, sizeof(ack)));
	/* But not on two: another page of it. */
	frame = good(&self->peer, 7, 1, &extent);
	frame.round = 3;
	frame.seq = 3;
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	frame = good(&self->peer, 8, 1, &extent);
	frame.channel = 1;
	frame.round = 3;
	frame.seq = 3;
	put_frame(&self->peer, 1, &frame, &extent, self->payload);
	EXPECT_REFUSED(-EPROTO);
}

/* Between two rounds: the next one needs no other to be told from it. */
TEST_F(wire, chunk_of_a_lost_channel)
{
	struct lmtrack_wire_channel_change lost = { .channel = htole32(0), .round = htole32(1) };
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame = good(&self->peer, 7, 1, &extent);
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1 };
	struct lmtrack_wire_round_ack ack;

	ASSERT_TRUE(put_frame(&self->peer, 0, &frame, &extent, self->payload));
	end.seq = 1;
	end.arg = 1;
	ASSERT_TRUE(put_frame(&self->peer, 0, &end, NULL, NULL));
	end.channel = 1;
	end.seq = 0;
	end.arg = 0;
	ASSERT_TRUE(put_frame(&self->peer, 1, &end, NULL, NULL));
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, &ack, sizeof(ack)));
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_CHANNEL_LOST, &lost, sizeof(lost)));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&self->peer, NULL, 0));
	frame = good(&self->peer, 7, 1, &extent);
	frame.channel = 1;
	frame.round = 2;
	frame.seq = 1;
	ASSERT_TRUE(put_frame(&self->peer, 1, &frame, &extent, self->payload));
	end.round = 2;
	end.seq = 2;
	end.arg = 1;
	ASSERT_TRUE(put_frame(&self->peer, 1, &end, NULL, NULL));
	ASSERT_EQ(LMTRACK_MSG_UNVERIFIED, peer_recv(&self->peer, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_ROUND_ACK, peer_recv(&self->peer, &ack, sizeof(ack)));
	EXPECT_EQ(2, le32toh(ack.round));
	EXPECT_ENDS();
}

/* Who has listened can say again what the source said, and is no channel by that. */
TEST_F(wire, lost_channel_replayed)
{
	struct lmtrack_wire_channel_change lost = { .channel = htole32(0), .round = htole32(1) };
	struct peer_channel_frame again;
	int fd;

	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_CHANNEL_LOST, &lost, sizeof(lost)));
	ASSERT_EQ(LMTRACK_MSG_CHANNEL_CLOSED, peer_recv(&self->peer, NULL, 0));
	fd = peer_socket(self->victim.port);
	ASSERT_LE(0, fd);
	peer_make_channel(&self->peer, 0, &again);
	ASSERT_TRUE(put(fd, &again, sizeof(again)));
	EXPECT_TRUE(hung_up(fd));
	close(fd);
	EXPECT_ENDS();
}

TEST_F(wire, frame_after_the_end)
{
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1 };
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame;

	put_frame(&self->peer, 0, &end, NULL, NULL);
	/* The other channel has not ended the round, so it is not acknowledged. */
	frame = good(&self->peer, 7, 1, &extent);
	frame.round = 2;
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	EXPECT_REFUSED(-EPROTO);
}

/* ---- Messages ---- */

#define WRONG_MESSAGE(name, error, type, ...)					\
TEST_F(wire, name)								\
{										\
	uint64_t body[] = { __VA_ARGS__ };					\
										\
	peer_send(&self->peer, type, body, sizeof(body));			\
	EXPECT_REFUSED(error);							\
}
WRONG_MESSAGE(message_unknown, -EPROTO, 999, 0)
WRONG_MESSAGE(message_of_the_destination, -EPROTO, LMTRACK_MSG_READY, 0)
WRONG_MESSAGE(message_too_long, -EPROTO, LMTRACK_MSG_COMMIT, 0)
WRONG_MESSAGE(message_too_short, -EPROTO, LMTRACK_MSG_DIGESTS, 0)
WRONG_MESSAGE(prepare_while_running, -EPROTO, LMTRACK_MSG_PREPARE, 1)
WRONG_MESSAGE(digest_outside, -EPROTO, LMTRACK_MSG_DIGESTS, 1ull << 32, 1u << 30, 0)
WRONG_MESSAGE(digest_of_no_region, -EPROTO, LMTRACK_MSG_DIGESTS, 1ull << 32 | 9, 0, 0)
WRONG_MESSAGE(digest_of_round_zero, -EPROTO, LMTRACK_MSG_DIGESTS, 0, 0, 0)
WRONG_MESSAGE(digest_of_a_later_round, -EPROTO, LMTRACK_MSG_DIGESTS, 5ull << 32, 0, 0)
WRONG_MESSAGE(digest_and_a_half, -EPROTO, LMTRACK_MSG_DIGESTS, 1ull << 32, 0, 0, 1ull << 32)
WRONG_MESSAGE(state_with_a_gap, -EPROTO, LMTRACK_MSG_STATE, 1000, 8, 0)
WRONG_MESSAGE(state_longer_than_it_says, -EPROTO, LMTRACK_MSG_STATE, 7, 0, 0)
WRONG_MESSAGE(state_of_a_terabyte, -EPROTO, LMTRACK_MSG_STATE, 1ull << 40, 0, 0)

TEST_F(wire, commit_out_of_turn)
{
	peer_send(&self->peer, LMTRACK_MSG_COMMIT, NULL, 0);
	EXPECT_REFUSED(-EPROTO);
}

TEST_F(wire, commit_before_ready)
{
	peer_send(&self->peer, LMTRACK_MSG_PAUSED, NULL, 0);
	peer_send(&self->peer, LMTRACK_MSG_COMMIT, NULL, 0);
	EXPECT_REFUSED(-EPROTO);
}

TEST_F(wire, message_replayed)
{
	self->peer.sent--;
	peer_send(&self->peer, LMTRACK_MSG_KEEPALIVE, NULL, 0);
	EXPECT_REFUSED(-EBADMSG);
}

TEST_F(wire, message_without_the_key)
{
	self->peer.session.source[0] ^= 1;
	peer_send(&self->peer, LMTRACK_MSG_KEEPALIVE, NULL, 0);
	EXPECT_REFUSED(-EBADMSG);
}

TEST_F(wire, message_damaged)
{
	struct lmtrack_wire_message header;
	uint64_t body = 0;

	kmig_message_encode(LMTRACK_MSG_PREPARE, &body, sizeof(body), &header);
	kmig_auth_seal(self->peer.session.source, self->peer.sent, &header, &body, sizeof(body), header.mac);
	body = 1;
	put(self->peer.control, &header, sizeof(header));
	put(self->peer.control, &body, sizeof(body));
	EXPECT_REFUSED(-EBADMSG);
}

/* ---- The final check ---- */

/* A first round of one page, stored; and the guest paused after it. */
static bool paused_after_a_round(struct peer *peer, uint8_t *payload)
{
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END, .stream = PEER_STREAM, .round = 1, .seq = 1, .arg = 1 };
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame = good(peer, 7, 1, &extent);

	if (!put_frame(peer, 0, &frame, &extent, payload) || !put_frame(peer, 0, &end, NULL, NULL))
		return false;
	end.channel = 1;
	end.seq = end.arg = 0;
	return put_frame(peer, 1, &end, NULL, NULL) &&
	       peer_recv(peer, NULL, 0) == LMTRACK_MSG_UNVERIFIED &&
	       peer_recv(peer, NULL, 0) == LMTRACK_MSG_ROUND_ACK &&
	       peer_send(peer, LMTRACK_MSG_PAUSED, NULL, 0);
}

/* A digest of chunk 0 that names @round, and PREPARE for round 1. */
static bool digest_and_prepare(struct peer *peer, uint32_t round, uint64_t value)
{
	struct lmtrack_wire_digest digest = { .round = htole32(round), .digest = htole64(value) };
	struct lmtrack_wire_prepare prepare = { .round = htole32(1) };

	return peer_send(peer, LMTRACK_MSG_DIGESTS, &digest, sizeof(digest)) &&
	       peer_send(peer, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));
}

/* The next message that is not about what was compared so far. */
static uint16_t answer(struct peer *peer)
{
	uint16_t type;

	do {
		type = peer_recv(peer, NULL, 0);
	} while (type == LMTRACK_MSG_COMPARED);
	return type;
}

/* Nobody will ever compare it: the round it waits for does not come. */
TEST_F(wire, digest_of_a_round_that_never_comes)
{
	ASSERT_TRUE(paused_after_a_round(&self->peer, self->payload));
	ASSERT_TRUE(digest_and_prepare(&self->peer, 2, 0));
	EXPECT_EQ(LMTRACK_MSG_UNVERIFIED, answer(&self->peer));
	EXPECT_EQ(LMTRACK_MSG_NEED, answer(&self->peer));
	/* Asked again, it may still give the right one. */
	ASSERT_TRUE(digest_and_prepare(&self->peer, 1, kmig_digest_chunk(self->victim.region, 0)));
	EXPECT_EQ(LMTRACK_MSG_READY, answer(&self->peer));
	peer_end(&self->peer);
	self->peer.control = self->peer.channel[0] = self->peer.channel[1] = -1;
	EXPECT_EQ(-ECONNRESET, victim_join(&self->victim));
	EXPECT_FALSE(self->victim.runs_guest);
}

TEST_F(wire, digest_that_differs)
{
	ASSERT_TRUE(paused_after_a_round(&self->peer, self->payload));
	ASSERT_TRUE(digest_and_prepare(&self->peer, 1, kmig_digest_chunk(self->victim.region, 0) ^ 1));
	EXPECT_EQ(-EBADMSG, reason(&self->peer));
	EXPECT_EQ(-EBADMSG, victim_join(&self->victim));
	EXPECT_FALSE(self->victim.runs_guest);
}

/* What was compared stays as it was: while it is loaded, and when the guest runs in it. */
TEST_F(wire, frame_after_the_check)
{
	struct lmtrack_wire_extent extent;
	struct kmig_frame frame;

	ASSERT_TRUE(paused_after_a_round(&self->peer, self->payload));
	ASSERT_TRUE(digest_and_prepare(&self->peer, 1, kmig_digest_chunk(self->victim.region, 0)));
	ASSERT_EQ(LMTRACK_MSG_READY, answer(&self->peer));
	frame = good(&self->peer, 9, 1, &extent);
	frame.round = 2;
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	usleep(100000);
	EXPECT_TRUE(all_zero(self->ram + 9 * PAGE_BYTES, PAGE_BYTES));
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_COMMIT, NULL, 0));
	ASSERT_EQ(LMTRACK_MSG_RUNNING, answer(&self->peer));
	frame = good(&self->peer, 10, 1, &extent);
	frame.round = 2;
	put_frame(&self->peer, 0, &frame, &extent, self->payload);
	ASSERT_TRUE(peer_send(&self->peer, LMTRACK_MSG_DONE, NULL, 0));
	EXPECT_EQ(0, victim_join(&self->victim)) TH_LOG("%s", self->victim.error);
	EXPECT_TRUE(self->victim.runs_guest);
	EXPECT_TRUE(all_zero(self->ram + 8 * PAGE_BYTES, GUEST_BYTES - 8 * PAGE_BYTES));
}

/* ---- At random ---- */

static uint64_t random_state;

static uint64_t roll(void)
{
	/* xorshift64 */
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

/* Some frames that are in order, as bytes. */
static size_t some_frames(struct peer *peer, const uint8_t *payload, uint8_t *to)
{
	size_t length = 0;

	for (int i = 0; i < 4; i++) {
		uint32_t pages = 1 + roll() % 4;
		struct lmtrack_wire_extent extent;
		struct kmig_frame frame = good(peer, roll() % (GUEST_PAGES - 516), pages, &extent);
		struct lmtrack_wire_frame raw;

		if (roll() % 3 == 0) {
			frame.type = LMTRACK_FRAME_ZERO;
			frame.payload = 0;
		}
		kmig_frame_encode(&frame, &extent, &raw);
		memcpy(to + length, &raw, sizeof(raw));
		memcpy(to + length + sizeof(raw), &extent, sizeof(extent));
		length += sizeof(raw) + sizeof(extent);
		memcpy(to + length, payload, frame.payload);
		length += frame.payload;
		peer->seq[0]++;
	}
	return length;
}

/* Give the first header a right checksum again, so that what lies behind it is reached. */
static void mend(uint8_t *bytes)
{
	struct lmtrack_wire_frame raw;
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	uint32_t extents;

	memcpy(&raw, bytes, sizeof(raw));
	extents = le32toh(raw.extents);
	if (extents > LMTRACK_WIRE_EXTENTS_MAX)
		return;
	memcpy(table, bytes + sizeof(raw), extents * sizeof(table[0]));
	raw.crc = 0;
	/* The checksum goes over both in a row. */
	uint8_t both[sizeof(raw) + sizeof(table)];

	memcpy(both, &raw, sizeof(raw));
	memcpy(both + sizeof(raw), table, extents * sizeof(table[0]));
	raw.crc = htole32(kmig_crc32c(both, sizeof(raw) + extents * sizeof(table[0])));
	memcpy(bytes, &raw, sizeof(raw));
}

TEST_F_TIMEOUT(wire, random_frames, 120)
{
	const char *given = getenv("SEED");
	uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL) * 2654435761u + getpid();
	uint8_t *bytes = calloc(1, MIB);

	TH_LOG("SEED=%#llx", (unsigned long long)seed);
	random_state = seed | 1;
	for (int n = 0; n < 300; n++) {
		struct victim victim = { 0 };
		struct peer peer;
		size_t length;

		ASSERT_EQ(0, victim_start(&victim, GUEST_BYTES));
		ASSERT_TRUE(peer_begin(&peer, victim.port, GUEST_BYTES));
		length = some_frames(&peer, self->payload, bytes);
		switch (roll() % 4) {
		case 0:	/* anything at all */
			for (size_t i = 0; i < length; i++)
				bytes[i] = roll();
			break;
		case 1:	/* bits of header and table, checksum right */
			for (int i = roll() % 4; i >= 0; i--)
				bytes[8 + roll() % 72] ^= 1 << roll() % 8;
			mend(bytes);
			break;
		case 2:	/* bytes of header and table, checksum right */
			for (int i = roll() % 3; i >= 0; i--)
				bytes[roll() % 80] = roll();
			mend(bytes);
			break;
		default: /* a piece is missing */
			length -= 100;
			memmove(bytes + 80, bytes + 81 + roll() % 100, length - 80);
		}
		put(peer.channel[0], bytes, length);
		if (roll() % 8 == 0)
			peer_send(&peer, roll() % 24, bytes, roll() % 4096);
		peer_end(&peer);
		EXPECT_NE(0, victim_join(&victim));
		EXPECT_FALSE(victim.runs_guest);
		victim_end(&victim);
	}
	free(bytes);
	peer_end(&self->peer);
	self->peer.control = self->peer.channel[0] = self->peer.channel[1] = -1;
	victim_join(&self->victim);
}

TEST_HARNESS_MAIN
