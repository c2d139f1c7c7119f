/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Frames and messages: bytes to values, every field checked on the way. */
#ifndef KMIG_WIRE_H
#define KMIG_WIRE_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/lmtrack.h>
#include <linux/lmtrack_wire.h>

#define KMIG_WIRE_DIGESTS_MAX 1024	/* entries in one DIGESTS message */
#define KMIG_WIRE_STATE_PIECE (LMTRACK_WIRE_BODY_MAX - sizeof(struct lmtrack_wire_state))
#define KMIG_WIRE_BITMAP_WORDS 4096	/* words in one UNVERIFIED message */

struct kmig_frame {
	uint8_t type;
	uint32_t extents;
	uint64_t stream;
	uint32_t channel;
	uint32_t round;
	uint32_t region;
	uint32_t payload;
	uint64_t seq;
	uint64_t arg;
};

uint32_t kmig_crc32c(const void *data, size_t length);

/*
 * All checks return 0 or a negative errno and, in @why, what was wrong: EPROTONOSUPPORT for
 * the version, EBADMSG for a checksum, EPROTO for the rest.
 */

/* The header by itself. The checksum comes later: the table has to be read for it, and its
 * length is known to be in bounds after this. */
int kmig_frame_decode(const struct lmtrack_wire_frame *raw, uint32_t page_size, struct kmig_frame *frame,
		      const char **why);
/* @raw is changed: its crc becomes zero. */
int kmig_frame_check_crc(struct lmtrack_wire_frame *raw, const struct lmtrack_wire_extent *table,
			 const char **why);
/* The table: ascending, in one chunk, within @region_pages, as many pages as the payload has.
 * @chunk and @pages are set. */
int kmig_frame_check_extents(const struct kmig_frame *frame, const struct lmtrack_wire_extent *table,
			     uint64_t region_pages, uint32_t page_size, uint64_t *chunk, uint32_t *pages,
			     const char **why);
/* Fill @raw in, checksum included; extents in @table are already in wire format. */
void kmig_frame_encode(const struct kmig_frame *frame, const struct lmtrack_wire_extent *table,
		       struct lmtrack_wire_frame *raw);

struct kmig_message {
	uint16_t type;
	uint32_t length;
	const void *body;
};

/* Header of a message without MAC, checksum included. */
void kmig_message_encode(uint16_t type, const void *body, uint32_t length, struct lmtrack_wire_message *raw);
/* The header by itself: magic, version, type, length within what the type allows. */
int kmig_message_check(const struct lmtrack_wire_message *raw, const char **why);
/* Then the body: its checksum, and that what is reserved is zero. */
int kmig_message_check_body(const struct lmtrack_wire_message *raw, const void *body, const char **why);
const char *kmig_message_name(uint16_t type);

#endif /* KMIG_WIRE_H */
