/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the fuzzers share: an input is a script. Bytes say what is sent, and which fields are
 * wrong; the others are right, checksums included, as no fuzzer would guess those.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/wire.h"

#define FUZZ_PAGE 4096u
#define FUZZ_PAYLOAD_MAX (64 * FUZZ_PAGE)	/* that is really sent */

/* The fuzzer calls this; what is wrong ends the process. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct script {
	const uint8_t *at, *end;
};

static inline bool script_ended(const struct script *script)
{
	return script->at == script->end;
}

static inline uint64_t script_number(struct script *script, size_t bytes)
{
	uint64_t number = 0;

	for (size_t i = 0; i < bytes && script->at < script->end; i++)
		number |= (uint64_t)*script->at++ << (8 * i);
	return number;
}

static inline const uint8_t *script_bytes(struct script *script, size_t most, size_t *length)
{
	const uint8_t *bytes = script->at;

	*length = script->end - script->at;
	if (*length > most)
		*length = most;
	script->at += *length;
	return bytes;
}

/* What may be wrong with a frame. */
enum {
	WRONG_TYPE = 1 << 0, WRONG_STREAM = 1 << 1, WRONG_CHANNEL = 1 << 2, WRONG_ROUND = 1 << 3,
	WRONG_SEQ = 1 << 4, WRONG_PAYLOAD = 1 << 5, WRONG_BYTES = 1 << 6, WIDE = 1 << 7,
};

struct fuzz_frame {
	struct kmig_frame frame;
	struct lmtrack_wire_frame raw;
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	size_t payload;			/* bytes to send */
	bool bytes_right;		/* the checksum fits */
};

/* A frame from the script; the fields of @right that are not said to be wrong stay as they are. */
static inline void fuzz_frame_make(struct script *script, const struct kmig_frame *right, uint64_t end_pages,
				   struct fuzz_frame *out)
{
	uint8_t wrong = script_number(script, 1), kind = script_number(script, 1);
	bool wide = wrong & WIDE;
	uint64_t pages = 0;

	out->frame = *right;
	out->frame.type = wrong & WRONG_TYPE ? kind : kind % 3 == 0 ? LMTRACK_FRAME_DATA :
			  kind % 3 == 1 ? LMTRACK_FRAME_ZERO : LMTRACK_FRAME_ROUND_END;
	if (wrong & WRONG_STREAM)
		out->frame.stream ^= script_number(script, 8);
	if (wrong & WRONG_CHANNEL)
		out->frame.channel = script_number(script, 4);
	if (wrong & WRONG_ROUND)
		out->frame.round = script_number(script, 4);
	if (wrong & WRONG_SEQ)
		out->frame.seq = script_number(script, 8);
	out->frame.region = script_number(script, wide ? 4 : 1) % (wide ? UINT32_MAX : 3);
	out->frame.extents = out->frame.type == LMTRACK_FRAME_ROUND_END ? 0 : script_number(script, 1) % 9;
	for (uint32_t i = 0; i < out->frame.extents; i++) {
		uint64_t first = script_number(script, wide ? 8 : 2);
		uint32_t count = script_number(script, wide ? 4 : 1);

		out->table[i] = (struct lmtrack_wire_extent){ .first = htole64(first), .pages = htole32(count) };
		pages += count;
	}
	out->frame.payload = out->frame.type == LMTRACK_FRAME_DATA ? (uint32_t)pages * FUZZ_PAGE : 0;
	out->frame.arg = out->frame.type == LMTRACK_FRAME_ROUND_END ? end_pages : 0;
	if (wrong & WRONG_PAYLOAD) {
		out->frame.payload = script_number(script, 4);
		out->frame.arg = script_number(script, 8);
	}
	kmig_frame_encode(&out->frame, out->table, &out->raw);
	out->bytes_right = !(wrong & WRONG_BYTES);
	if (wrong & WRONG_BYTES)
		((uint8_t *)&out->raw)[script_number(script, 1) % sizeof(out->raw)] ^= script_number(script, 1);
	out->payload = out->frame.payload < FUZZ_PAYLOAD_MAX ? out->frame.payload : FUZZ_PAYLOAD_MAX;
}

#endif /* FUZZ_H */
