/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * lmtrack on the wire: the frames of the data channels and the messages of the control
 * connection. All integers are little-endian, all structures have no padding.
 *
 * A data channel carries frames: a header of 64 bytes, a table of extents, then payload
 * straight from guest pages. The header's CRC32C covers header and table, never the payload:
 * a page may still change while the network holds it, and is then sent again.
 *
 * The control connection carries messages: a header of 32 bytes with a CRC32C over header and
 * body, then the body. Its messages are written and read by user space only.
 */
#ifndef _UAPI_LINUX_LMTRACK_WIRE_H
#define _UAPI_LINUX_LMTRACK_WIRE_H

#include <linux/types.h>

#define LMTRACK_WIRE_MAGIC		0x4b544d4c	/* "LMTK" */
#define LMTRACK_WIRE_VERSION		1
#define LMTRACK_WIRE_EXTENTS_MAX	512		/* one chunk in extents of one page */

/**
 * enum lmtrack_wire_frame_type - frames on a data channel
 * @LMTRACK_FRAME_CHANNEL:	first frame of a channel, from user space: the payload is
 *				struct lmtrack_wire_channel; no extents
 * @LMTRACK_FRAME_DATA:		extents of pages, their bytes follow in the same order
 * @LMTRACK_FRAME_ZERO:		extents of pages that read as zero; no payload
 * @LMTRACK_FRAME_ROUND_END:	the channel has nothing more in this round; @arg is the number
 *				of pages, data and zero, it carried in the round
 */
enum lmtrack_wire_frame_type {
	LMTRACK_FRAME_CHANNEL = 1,
	LMTRACK_FRAME_DATA = 2,
	LMTRACK_FRAME_ZERO = 3,
	LMTRACK_FRAME_ROUND_END = 4,
};

/**
 * struct lmtrack_wire_frame - header of a frame
 * @magic:	LMTRACK_WIRE_MAGIC
 * @version:	LMTRACK_WIRE_VERSION
 * @type:	enum lmtrack_wire_frame_type
 * @flags:	zero
 * @crc:	CRC32C (Castagnoli; initial value and final xor all ones) of this header, with
 *		this field zero, and the extent table
 * @extents:	entries in the table that follows, LMTRACK_WIRE_EXTENTS_MAX at most
 * @stream:	the stream's id, agreed on the control connection
 * @channel:	the channel's number
 * @round:	the round the frame belongs to; 0 for LMTRACK_FRAME_CHANNEL
 * @region:	the region's index; 0 where the type has none
 * @payload:	bytes that follow the table: pages * page size for DATA, else as the type says
 * @seq:	frames sent before this one on this channel, LMTRACK_FRAME_CHANNEL not counted
 * @arg:	as the type says, else zero
 * @reserved:	zero
 */
struct lmtrack_wire_frame {
	__le32 magic;
	__le16 version;
	__u8 type;
	__u8 flags;
	__le32 crc;
	__le32 extents;
	__le64 stream;
	__le32 channel;
	__le32 round;
	__le32 region;
	__le32 payload;
	__le64 seq;
	__le64 arg;
	__le64 reserved;
};

/**
 * struct lmtrack_wire_extent - consecutive pages
 * @first:	page number within the region
 * @pages:	count, at least 1. All extents of a frame lie in one chunk, in ascending order,
 *		without overlap
 * @reserved:	zero
 */
struct lmtrack_wire_extent {
	__le64 first;
	__le32 pages;
	__le32 reserved;
};

#endif /* _UAPI_LINUX_LMTRACK_WIRE_H */
