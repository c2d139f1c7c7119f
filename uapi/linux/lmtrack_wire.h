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
#define LMTRACK_WIRE_VERSION		2
#define LMTRACK_WIRE_VERSION_FRAMES	1		/* the oldest whose frames are understood */
#define LMTRACK_WIRE_EXTENTS_MAX	512		/* one chunk in extents of one page */

/**
 * enum lmtrack_wire_frame_type - frames on a data channel
 * @LMTRACK_FRAME_CHANNEL:	first frame of a channel, from user space: the payload is
 *				struct lmtrack_wire_channel; no extents. @arg is the number of
 *				connections that were made for the channel before
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
 * @version:	LMTRACK_WIRE_VERSION. From LMTRACK_WIRE_VERSION_FRAMES on any will do: a frame may
 *		be written by a kernel module that is older than the program
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
 * @seq:	frames sent before this one on this connection, LMTRACK_FRAME_CHANNEL not counted
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

/**
 * struct lmtrack_wire_channel - payload of LMTRACK_FRAME_CHANNEL
 * @mac:	HMAC-SHA256 under the session key over the text "lmtrack channel", the stream's id
 *		(8 bytes), the channel's number (4 bytes) and the frame's @arg (8 bytes)
 */
struct lmtrack_wire_channel {
	__u8 mac[32];
};

/**
 * struct lmtrack_wire_token - private data of a request for an RDMA connection
 * @stream:	the stream's id
 * @channel:	the channel's number
 * @reserved:	zero
 * @mac:	HMAC-SHA256 under the session key over the text "lmtrack rdma", the stream's id
 *		(8 bytes), the channel's number (4 bytes) and 8 bytes of zero
 *
 * A channel over RDMA has no LMTRACK_FRAME_CHANNEL. Each frame is a message (SEND) with header and
 * table; the pages of a DATA frame were written before it into the windows that WINDOW named.
 */
struct lmtrack_wire_token {
	__le64 stream;
	__le32 channel;
	__le32 reserved;
	__u8 mac[32];
};

/**
 * struct lmtrack_wire_credit - how many more messages may be sent over an RDMA connection
 * @magic:	LMTRACK_WIRE_MAGIC
 * @frames:	so many, beside those that were allowed before
 *
 * Private data of the destination's answer to the request for a connection, at least one; and of
 * each message (SEND) that it sends on it. For each there is a buffer; a message without one would
 * have to be sent again, or with iWARP end the connection.
 */
struct lmtrack_wire_credit {
	__le32 magic;
	__le32 frames;
};

/*
 * The control connection. The source speaks first:
 *
 *	source				destination
 *	HELLO				HELLO
 *	PROOF				PROOF
 *	CAPACITY			CAPACITY_OK
 *	REGIONS				DEVICES_READY
 *	RDMA_ASK (if wanted)		RDMA_OFFER
 *	(data channels connect)		CHANNELS_READY
 *	DIGESTS ...			UNVERIFIED ..., ROUND_ACK (each round), COMPARED
 *	PAUSED, STATE ..., DIGESTS ...
 *	PREPARE				NEED (then DIGESTS and PREPARE again) or READY
 *	COMMIT				RUNNING
 *	DONE
 *
 * From CHANNELS_READY to PREPARE a data channel may break:
 *
 *	source				destination
 *					CHANNEL_LOST (if it notices first)
 *	CHANNEL_LOST			CHANNEL_CLOSED
 *	(connects again)		CHANNEL_JOINED
 *	RESUMED (if none was left after PAUSED)
 *
 * While a round is under way, an RDMA channel may come to pages whose place is not known yet:
 *
 *	source				destination
 *	WINDOW_WANTED			WINDOW
 *
 * Either side sends KEEPALIVE while it has nothing else to say, and ABORT at any time before
 * COMMIT. Until both proofs are given, only HELLO, PROOF and the ABORT of a version that is not
 * spoken are sent or read.
 */
#define LMTRACK_WIRE_MESSAGE_MAGIC	0x43544d4c	/* "LMTC" */
#define LMTRACK_WIRE_BODY_MAX		(256 << 10)	/* longest body of any message */
#define LMTRACK_WIRE_STATE_MAX		(1 << 30)	/* longest device state, all pieces */

enum lmtrack_wire_message_type {
	LMTRACK_MSG_HELLO = 1,
	LMTRACK_MSG_PROOF = 2,
	LMTRACK_MSG_CAPACITY = 3,
	LMTRACK_MSG_CAPACITY_OK = 4,
	LMTRACK_MSG_REGIONS = 5,
	LMTRACK_MSG_DEVICES_READY = 6,
	LMTRACK_MSG_CHANNELS_READY = 7,
	LMTRACK_MSG_ROUND_ACK = 8,
	LMTRACK_MSG_UNVERIFIED = 9,
	LMTRACK_MSG_DIGESTS = 10,
	LMTRACK_MSG_COMPARED = 11,
	LMTRACK_MSG_PAUSED = 12,
	LMTRACK_MSG_STATE = 13,
	LMTRACK_MSG_PREPARE = 14,
	LMTRACK_MSG_NEED = 15,
	LMTRACK_MSG_READY = 16,
	LMTRACK_MSG_COMMIT = 17,
	LMTRACK_MSG_RUNNING = 18,
	LMTRACK_MSG_DONE = 19,
	LMTRACK_MSG_ABORT = 20,
	LMTRACK_MSG_KEEPALIVE = 21,
	LMTRACK_MSG_CHANNEL_LOST = 22,
	LMTRACK_MSG_CHANNEL_CLOSED = 23,
	LMTRACK_MSG_CHANNEL_JOINED = 24,
	LMTRACK_MSG_RESUMED = 25,
	LMTRACK_MSG_RDMA_ASK = 26,
	LMTRACK_MSG_RDMA_OFFER = 27,
	LMTRACK_MSG_WINDOW_WANTED = 28,
	LMTRACK_MSG_WINDOW = 29,
};

/**
 * struct lmtrack_wire_message - header of a control message
 * @magic:	LMTRACK_WIRE_MESSAGE_MAGIC
 * @version:	LMTRACK_WIRE_VERSION; these two stay where they are in every version
 * @type:	enum lmtrack_wire_message_type
 * @crc:	CRC32C of this header, with this field and @mac zero, and the body
 * @length:	bytes of the body, LMTRACK_WIRE_BODY_MAX at most
 * @mac:	zero until the proofs are given. After them, the first 16 bytes of HMAC-SHA256
 *		under the sender's key over: the number of messages this side has sent since the
 *		proofs (8 bytes), this header with this field zero, and the body; the body of
 *		STATE is left out, bulk is covered by checksum alone, as guest memory is
 */
struct lmtrack_wire_message {
	__le32 magic;
	__le16 version;
	__le16 type;
	__le32 crc;
	__le32 length;
	__u8 mac[16];
};

/**
 * struct lmtrack_wire_hello - HELLO
 * @features:	bits both sides must understand; none yet
 * @page_size:	bytes
 * @chunk_pages: LMTRACK_CHUNK_PAGES
 * @nonce:	random
 * @reserved:	zero
 */
struct lmtrack_wire_hello {
	__le64 features;
	__le32 page_size;
	__le32 chunk_pages;
	__u8 nonce[32];
	__le64 reserved[2];
};

/**
 * struct lmtrack_wire_proof - PROOF
 * @mac:	HMAC-SHA256 under the shared secret over a text, a NUL, both HELLO messages with
 *		their headers, the source's first. The text is "lmtrack source" or "lmtrack
 *		destination"; with "lmtrack session" the result is the session key
 *
 * HMAC-SHA256 under the session key over "lmtrack source" and "lmtrack destination" gives the
 * keys with which each side's later messages are sealed. A destination that cannot verify a
 * proof closes the connection without a word.
 */
struct lmtrack_wire_proof {
	__u8 mac[32];
};

/**
 * struct lmtrack_wire_capacity - CAPACITY
 * @bytes:	size of all regions
 * @resident:	of them, bytes that exist now
 */
struct lmtrack_wire_capacity {
	__le64 bytes;
	__le64 resident;
};

/**
 * struct lmtrack_wire_regions - REGIONS
 * @stream:	stream id that the frames carry
 * @count:	regions, 1 to LMTRACK_REGIONS_MAX
 * @channels:	data channels, 1 to LMTRACK_CHANNELS_MAX
 * @bytes:	size of each region; their sum is the one CAPACITY named
 */
struct lmtrack_wire_regions {
	__le64 stream;
	__le32 count;
	__le32 channels;
	__le64 bytes[];
};

/**
 * struct lmtrack_wire_round_ack - ROUND_ACK: the round is stored, up to the ROUND_END of every
 * channel that is in it and was not closed
 * @round:	the round
 * @reserved:	zero
 * @pages:	pages stored in it
 */
struct lmtrack_wire_round_ack {
	__le32 round;
	__le32 reserved;
	__le64 pages;
};

/**
 * struct lmtrack_wire_channel_change - CHANNEL_LOST, CHANNEL_CLOSED, CHANNEL_JOINED
 * @channel:	the channel's number
 * @round:	CHANNEL_LOST, from the source: the last round it has begun. CHANNEL_JOINED: the
 *		first round that the channel is in. Else zero
 * @attempt:	CHANNEL_JOINED: the connection's @arg in LMTRACK_FRAME_CHANNEL. Else zero
 * @error:	CHANNEL_LOST, from the destination: a positive errno, for people. Else zero
 * @reserved:	zero
 *
 * CHANNEL_LOST, from the destination: nothing more can be received on the channel; it counts on it
 * until the source says the same. From the source: nothing is sent on it any more, and what it
 * carried in @round will be sent again. The destination closes its end, so that nothing of it can
 * be stored any more, and only then answers CHANNEL_CLOSED; before that, the source begins no
 * other round. A round that no channel is left in is acknowledged all the same.
 *
 * After CHANNEL_CLOSED the source may connect again with a higher @arg. The channel is in no round
 * before @round of CHANNEL_JOINED, which is not the next unless there is no other channel. If that
 * comes true later, CHANNEL_JOINED is said again, before CHANNEL_CLOSED of the last other.
 *
 * RESUMED takes PAUSED back, and what was sent of the device state.
 */
struct lmtrack_wire_channel_change {
	__le32 channel;
	__le32 round;
	__le64 attempt;
	__le32 error;
	__le32 reserved;
};

/**
 * struct lmtrack_wire_rdma_offer - RDMA_OFFER: may data channels connect by RDMA?
 * @error:	a positive errno: they may not, and connect by TCP. Else zero
 * @port:	where RDMA's connection manager listens, at the address that the control connection
 *		goes to
 * @window_pages: length of a window, a multiple of LMTRACK_CHUNK_PAGES; the last of a region may
 *		be shorter
 * @reserved:	zero
 */
struct lmtrack_wire_rdma_offer {
	__le32 error;
	__le32 port;
	__le32 window_pages;
	__le32 reserved;
};

/**
 * struct lmtrack_wire_window - WINDOW_WANTED, WINDOW
 * @channel:	an RDMA channel's number
 * @region:	the region's index
 * @first:	the window's first page, a multiple of the offer's @window_pages
 * @address:	WINDOW: of that page, at the destination. Else zero
 * @rkey:	WINDOW: the key for that memory, good on this channel. Else zero
 * @error:	WINDOW: a positive errno, there is no window. Else zero
 *
 * The keys become void when the channel is closed, and all of them before READY.
 */
struct lmtrack_wire_window {
	__le32 channel;
	__le32 region;
	__le64 first;
	__le64 address;
	__le32 rkey;
	__le32 error;
};

/**
 * struct lmtrack_wire_unverified - UNVERIFIED: chunks that lack a digest; what the ROUND_ACK or
 * NEED that follows speaks of
 * @region:	the region's index
 * @words:	words in @bitmap
 * @first:	first chunk, a multiple of 64
 * @bitmap:	bit n % 64 of word n / 64 is chunk @first + n
 */
struct lmtrack_wire_unverified {
	__le32 region;
	__le32 words;
	__le64 first;
	__le64 bitmap[];
};

/**
 * struct lmtrack_wire_digest - one entry of DIGESTS, whose body is an array of them
 * @region:	the region's index
 * @round:	every page that was dirty in this round or before it is in the digest. The digest
 *		is void once a later round stores into the chunk
 * @chunk:	the chunk's number in the region
 * @digest:	XXH64, seed 0, of the chunk's bytes; holes read as zero; the last chunk of a
 *		region may be short
 */
struct lmtrack_wire_digest {
	__le32 region;
	__le32 round;
	__le64 chunk;
	__le64 digest;
};

/**
 * struct lmtrack_wire_compared - COMPARED: nothing is left to be compared
 * @digests:	entries of DIGESTS received so far
 */
struct lmtrack_wire_compared {
	__le64 digests;
};

/**
 * struct lmtrack_wire_state - STATE: a piece of the device state
 * @total:	bytes of the whole
 * @offset:	where this piece belongs; pieces come in order
 * @bytes:	the piece
 */
struct lmtrack_wire_state {
	__le64 total;
	__le64 offset;
	__u8 bytes[];
};

/**
 * struct lmtrack_wire_prepare - PREPARE: everything has been sent
 * @round:	the last round
 * @reserved:	zero
 */
struct lmtrack_wire_prepare {
	__le32 round;
	__le32 reserved;
};

/**
 * struct lmtrack_wire_ready - READY: memory is equal, device state is loaded
 * @compared:	chunks whose digests agreed
 * @load_ns:	time that loading the device state took
 */
struct lmtrack_wire_ready {
	__le64 compared;
	__le64 load_ns;
};

/**
 * struct lmtrack_wire_running - RUNNING: the guest runs at the destination
 * @resume_ns:	time that running it took
 */
struct lmtrack_wire_running {
	__le64 resume_ns;
};

/**
 * struct lmtrack_wire_abort - ABORT
 * @error:	positive errno
 * @flags:	LMTRACK_ABORT_NOT_RUN
 * @text:	what happened, for people; no NUL at the end
 */
struct lmtrack_wire_abort {
	__le32 error;
	__le32 flags;
	__u8 text[];
};

/* From a destination: it never ran the guest and never will; the source may, even after COMMIT. */
#define LMTRACK_ABORT_NOT_RUN	(1U << 0)
#define LMTRACK_ABORT_TEXT_MAX	256

#endif /* _UAPI_LINUX_LMTRACK_WIRE_H */
