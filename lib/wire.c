// SPDX-License-Identifier: LGPL-2.1-or-later
/* Frames and messages: bytes to values, every field checked on the way. */
#include "wire.h"

#include <errno.h>
#include <isa-l/crc.h>
#include <string.h>

#define CRC_SEED 0xffffffffu

static uint32_t crc_add(uint32_t crc, const void *data, size_t length)
{
	/* The library's prototype lacks a const; it does not write. */
	return length ? crc32_iscsi((unsigned char *)data, length, crc) : crc;
}

uint32_t kmig_crc32c(const void *data, size_t length)
{
	return ~crc_add(CRC_SEED, data, length);
}

/* ---- Frames ---- */

static size_t table_bytes(uint32_t extents)
{
	return extents * sizeof(struct lmtrack_wire_extent);
}

static int malformed(const char **why, const char *what)
{
	*why = what;
	return -EPROTO;
}

int kmig_frame_decode(const struct lmtrack_wire_frame *raw, uint32_t page_size, struct kmig_frame *frame,
		      const char **why)
{
	*frame = (struct kmig_frame){
		.type = raw->type,
		.extents = le32toh(raw->extents),
		.stream = le64toh(raw->stream),
		.channel = le32toh(raw->channel),
		.round = le32toh(raw->round),
		.region = le32toh(raw->region),
		.payload = le32toh(raw->payload),
		.seq = le64toh(raw->seq),
		.arg = le64toh(raw->arg),
	};

	if (le32toh(raw->magic) != LMTRACK_WIRE_MAGIC)
		return malformed(why, "no frame begins here");
	if (le16toh(raw->version) < LMTRACK_WIRE_VERSION_FRAMES || le16toh(raw->version) > LMTRACK_WIRE_VERSION) {
		*why = "its version is not spoken here";
		return -EPROTONOSUPPORT;
	}
	if (raw->flags || raw->reserved)
		return malformed(why, "a field that must be zero is not");
	if (frame->extents > LMTRACK_WIRE_EXTENTS_MAX)
		return malformed(why, "it has more extents than a chunk has pages");

	switch (frame->type) {
	case LMTRACK_FRAME_CHANNEL:
		if (frame->extents || frame->payload != sizeof(struct lmtrack_wire_channel) || frame->round ||
		    frame->region || frame->seq)
			return malformed(why, "it is no proper start of a channel");
		return 0;
	case LMTRACK_FRAME_DATA:
		if (!frame->payload || frame->payload % page_size ||
		    frame->payload / page_size > LMTRACK_CHUNK_PAGES)
			return malformed(why, "its payload is not one to 512 whole pages");
		if (!frame->extents || frame->arg)
			return malformed(why, "it has no extents, or an argument");
		return 0;
	case LMTRACK_FRAME_ZERO:
		if (!frame->extents || frame->payload || frame->arg)
			return malformed(why, "it has no extents, or a payload or argument");
		return 0;
	case LMTRACK_FRAME_ROUND_END:
		if (frame->extents || frame->payload || frame->region)
			return malformed(why, "the end of a round has extents, payload or region");
		return 0;
	}
	return malformed(why, "its type is unknown");
}

int kmig_frame_check_crc(struct lmtrack_wire_frame *raw, const struct lmtrack_wire_extent *table,
			 const char **why)
{
	uint32_t wanted = le32toh(raw->crc);
	uint32_t crc;

	raw->crc = 0;
	crc = crc_add(CRC_SEED, raw, sizeof(*raw));
	crc = ~crc_add(crc, table, table_bytes(le32toh(raw->extents)));
	if (crc == wanted)
		return 0;
	*why = "its checksum is wrong";
	return -EBADMSG;
}

int kmig_frame_check_extents(const struct kmig_frame *frame, const struct lmtrack_wire_extent *table,
			     uint64_t region_pages, uint32_t page_size, uint64_t *chunk, uint32_t *pages,
			     const char **why)
{
	uint64_t end = 0, limit = 0;
	uint32_t total = 0;

	for (uint32_t i = 0; i < frame->extents; i++) {
		uint64_t first = le64toh(table[i].first);
		uint32_t count = le32toh(table[i].pages);

		if (table[i].reserved)
			return malformed(why, "an extent's reserved field is not zero");
		if (first >= region_pages || !count || count > region_pages - first)
			return malformed(why, "an extent is empty or lies outside the region");
		if (!i) {
			*chunk = first / LMTRACK_CHUNK_PAGES;
			limit = (*chunk + 1) * LMTRACK_CHUNK_PAGES;
		}
		if (first < end)
			return malformed(why, "its extents overlap or do not ascend");
		end = first + count;
		if (end > limit)
			return malformed(why, "its extents lie in several chunks");
		total += count;
	}
	if (frame->type == LMTRACK_FRAME_DATA && (uint64_t)total * page_size != frame->payload)
		return malformed(why, "its payload is not what its extents hold");
	*pages = total;
	return 0;
}

void kmig_frame_encode(const struct kmig_frame *frame, const struct lmtrack_wire_extent *table,
		       struct lmtrack_wire_frame *raw)
{
	uint32_t crc;

	*raw = (struct lmtrack_wire_frame){
		.magic = htole32(LMTRACK_WIRE_MAGIC),
		.version = htole16(LMTRACK_WIRE_VERSION),
		.type = frame->type,
		.extents = htole32(frame->extents),
		.stream = htole64(frame->stream),
		.channel = htole32(frame->channel),
		.round = htole32(frame->round),
		.region = htole32(frame->region),
		.payload = htole32(frame->payload),
		.seq = htole64(frame->seq),
		.arg = htole64(frame->arg),
	};
	crc = crc_add(CRC_SEED, raw, sizeof(*raw));
	crc = crc_add(crc, table, table_bytes(frame->extents));
	raw->crc = htole32(~crc);
}

/* ---- Messages ---- */

static const struct {
	const char *name;
	uint32_t least, most;	/* bytes of the body */
} types[] = {
	[LMTRACK_MSG_HELLO] = { "HELLO", sizeof(struct lmtrack_wire_hello), sizeof(struct lmtrack_wire_hello) },
	[LMTRACK_MSG_PROOF] = { "PROOF", sizeof(struct lmtrack_wire_proof), sizeof(struct lmtrack_wire_proof) },
	[LMTRACK_MSG_CAPACITY] = { "CAPACITY", sizeof(struct lmtrack_wire_capacity),
				   sizeof(struct lmtrack_wire_capacity) },
	[LMTRACK_MSG_CAPACITY_OK] = { "CAPACITY_OK", 0, 0 },
	[LMTRACK_MSG_REGIONS] = { "REGIONS", sizeof(struct lmtrack_wire_regions) + 8,
				  sizeof(struct lmtrack_wire_regions) + 8 * LMTRACK_REGIONS_MAX },
	[LMTRACK_MSG_DEVICES_READY] = { "DEVICES_READY", 0, 0 },
	[LMTRACK_MSG_CHANNELS_READY] = { "CHANNELS_READY", 0, 0 },
	[LMTRACK_MSG_ROUND_ACK] = { "ROUND_ACK", sizeof(struct lmtrack_wire_round_ack),
				    sizeof(struct lmtrack_wire_round_ack) },
	[LMTRACK_MSG_UNVERIFIED] = { "UNVERIFIED", sizeof(struct lmtrack_wire_unverified) + 8,
				     sizeof(struct lmtrack_wire_unverified) + 8 * KMIG_WIRE_BITMAP_WORDS },
	[LMTRACK_MSG_DIGESTS] = { "DIGESTS", sizeof(struct lmtrack_wire_digest),
				  sizeof(struct lmtrack_wire_digest) * KMIG_WIRE_DIGESTS_MAX },
	[LMTRACK_MSG_COMPARED] = { "COMPARED", sizeof(struct lmtrack_wire_compared),
				   sizeof(struct lmtrack_wire_compared) },
	[LMTRACK_MSG_PAUSED] = { "PAUSED", 0, 0 },
	[LMTRACK_MSG_STATE] = { "STATE", sizeof(struct lmtrack_wire_state) + 1, LMTRACK_WIRE_BODY_MAX },
	[LMTRACK_MSG_PREPARE] = { "PREPARE", sizeof(struct lmtrack_wire_prepare),
				  sizeof(struct lmtrack_wire_prepare) },
	[LMTRACK_MSG_NEED] = { "NEED", 0, 0 },
	[LMTRACK_MSG_READY] = { "READY", sizeof(struct lmtrack_wire_ready), sizeof(struct lmtrack_wire_ready) },
	[LMTRACK_MSG_COMMIT] = { "COMMIT", 0, 0 },
	[LMTRACK_MSG_RUNNING] = { "RUNNING", sizeof(struct lmtrack_wire_running), sizeof(struct lmtrack_wire_running) },
	[LMTRACK_MSG_DONE] = { "DONE", 0, 0 },
	[LMTRACK_MSG_ABORT] = { "ABORT", sizeof(struct lmtrack_wire_abort),
				sizeof(struct lmtrack_wire_abort) + LMTRACK_ABORT_TEXT_MAX },
	[LMTRACK_MSG_KEEPALIVE] = { "KEEPALIVE", 0, 0 },
	[LMTRACK_MSG_CHANNEL_LOST] = { "CHANNEL_LOST", sizeof(struct lmtrack_wire_channel_change),
				       sizeof(struct lmtrack_wire_channel_change) },
	[LMTRACK_MSG_CHANNEL_CLOSED] = { "CHANNEL_CLOSED", sizeof(struct lmtrack_wire_channel_change),
					 sizeof(struct lmtrack_wire_channel_change) },
	[LMTRACK_MSG_CHANNEL_JOINED] = { "CHANNEL_JOINED", sizeof(struct lmtrack_wire_channel_change),
					 sizeof(struct lmtrack_wire_channel_change) },
	[LMTRACK_MSG_RESUMED] = { "RESUMED", 0, 0 },
	[LMTRACK_MSG_RDMA_ASK] = { "RDMA_ASK", 0, 0 },
	[LMTRACK_MSG_RDMA_OFFER] = { "RDMA_OFFER", sizeof(struct lmtrack_wire_rdma_offer),
				     sizeof(struct lmtrack_wire_rdma_offer) },
	[LMTRACK_MSG_WINDOW_WANTED] = { "WINDOW_WANTED", sizeof(struct lmtrack_wire_window),
					sizeof(struct lmtrack_wire_window) },
	[LMTRACK_MSG_WINDOW] = { "WINDOW", sizeof(struct lmtrack_wire_window), sizeof(struct lmtrack_wire_window) },
};

#define RESERVED(type) { offsetof(struct type, reserved), sizeof(((struct type *)0)->reserved) }

/* Bytes of a body that are zero. */
static const struct {
	uint32_t first, count;
} reserved[sizeof(types) / sizeof(types[0])] = {
	[LMTRACK_MSG_HELLO] = RESERVED(lmtrack_wire_hello),
	[LMTRACK_MSG_ROUND_ACK] = RESERVED(lmtrack_wire_round_ack),
	[LMTRACK_MSG_PREPARE] = RESERVED(lmtrack_wire_prepare),
	[LMTRACK_MSG_CHANNEL_LOST] = RESERVED(lmtrack_wire_channel_change),
	[LMTRACK_MSG_CHANNEL_CLOSED] = RESERVED(lmtrack_wire_channel_change),
	[LMTRACK_MSG_CHANNEL_JOINED] = RESERVED(lmtrack_wire_channel_change),
	[LMTRACK_MSG_RDMA_OFFER] = RESERVED(lmtrack_wire_rdma_offer),
};

const char *kmig_message_name(uint16_t type)
{
	if (type < sizeof(types) / sizeof(types[0]) && types[type].name)
		return types[type].name;
	return "(unknown)";
}

static uint32_t message_crc(const struct lmtrack_wire_message *raw, const void *body)
{
	struct lmtrack_wire_message header = *raw;
	uint32_t crc;

	header.crc = 0;
	memset(header.mac, 0, sizeof(header.mac));
	crc = crc_add(CRC_SEED, &header, sizeof(header));
	return ~crc_add(crc, body, le32toh(raw->length));
}

void kmig_message_encode(uint16_t type, const void *body, uint32_t length, struct lmtrack_wire_message *raw)
{
	*raw = (struct lmtrack_wire_message){
		.magic = htole32(LMTRACK_WIRE_MESSAGE_MAGIC),
		.version = htole16(LMTRACK_WIRE_VERSION),
		.type = htole16(type),
		.length = htole32(length),
	};
	raw->crc = htole32(message_crc(raw, body));
}

int kmig_message_check(const struct lmtrack_wire_message *raw, const char **why)
{
	uint16_t type = le16toh(raw->type);
	uint32_t length = le32toh(raw->length);

	if (le32toh(raw->magic) != LMTRACK_WIRE_MESSAGE_MAGIC)
		return malformed(why, "no message begins here: is the peer a kmig?");
	if (le16toh(raw->version) != LMTRACK_WIRE_VERSION) {
		*why = "its version is not spoken here";
		return -EPROTONOSUPPORT;
	}
	if (type >= sizeof(types) / sizeof(types[0]) || !types[type].name)
		return malformed(why, "its type is unknown");
	if (length < types[type].least || length > types[type].most)
		return malformed(why, "its length is not one its type can have");
	return 0;
}

int kmig_message_check_body(const struct lmtrack_wire_message *raw, const void *body, const char **why)
{
	uint16_t type = le16toh(raw->type);

	if (le32toh(raw->crc) != message_crc(raw, body)) {
		*why = "its checksum is wrong";
		return -EBADMSG;
	}
	for (uint32_t i = 0; i < reserved[type].count; i++)
		if (((const uint8_t *)body)[reserved[type].first + i])
			return malformed(why, "a field that must be zero is not");
	return 0;
}
