/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A source written by hand, byte by byte where that matters, to be as wrong as a test wants
 * at a real destination engine.
 */
#ifndef LIB_PEER_H
#define LIB_PEER_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <kmig.h>

#include "../lib/auth.h"
#include "../lib/wire.h"

#define PAGE_BYTES 4096u
#define MIB (1u << 20)
#define SECRET "a secret of sixteen bytes and more"
#define PEER_CHANNELS 2
#define PEER_STREAM 0x1122334455667788ull

/* ---- The destination under test, in a thread ---- */

struct victim {
	struct kmig_ctx *ctx;
	struct kmig_destination *destination;
	struct kmig_region *region;
	struct kmig_destination_opts opts;
	pthread_t thread;
	int port;
	int result;
	bool runs_guest, discarded, prepared;
	bool no_state;			/* it has no use for any */
	char error[512];
	char warning[512];		/* the last */
};

static inline int victim_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	struct victim *victim = data;

	victim->prepared = true;
	if (count != 1 || bytes[0] != kmig_region_bytes(victim->region))
		return -EINVAL;
	regions[0] = victim->region;
	return 0;
}

static inline int victim_load(const void *state, size_t length, void *data)
{
	(void)state;
	(void)length;
	(void)data;
	return 0;
}

static inline int victim_run(void *data)
{
	struct victim *victim = data;

	victim->runs_guest = true;
	return 0;
}

static inline void victim_discard(void *data)
{
	struct victim *victim = data;

	victim->discarded = true;
}

static inline void *victim_main(void *data)
{
	struct victim *victim = data;

	victim->result = kmig_destination_run(victim->destination);
	snprintf(victim->error, sizeof(victim->error), "%s", kmig_ctx_error(victim->ctx));
	return NULL;
}

static inline void victim_log(enum kmig_log_level level, const char *text, void *data)
{
	struct victim *victim = data;

	if (level == KMIG_LOG_WARNING)
		snprintf(victim->warning, sizeof(victim->warning), "%s", text);
	if (getenv("LOG"))
		fprintf(stderr, "# destination %d: %s\n", level, text);
}

static inline int victim_start(struct victim *victim, uint64_t bytes)
{
	const struct kmig_destination_ops ops = {
		.size = sizeof(ops),
		.prepare = victim_prepare,
		.load_state = victim->no_state ? NULL : victim_load,
		.run = victim_run,
		.discard = victim_discard,
	};
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	int err;

	opts.kind = KMIG_REGION_MEMFD;
	opts.bytes = bytes;
	if (!victim->opts.size)
		victim->opts = (struct kmig_destination_opts)KMIG_DESTINATION_OPTS_INIT;
	victim->opts.port = 0;
	victim->opts.secret = SECRET;
	victim->opts.secret_len = strlen(SECRET);
	victim->runs_guest = victim->discarded = victim->prepared = false;
	err = kmig_ctx_new(&victim->ctx);
	if (err)
		return err;
	kmig_ctx_set_log(victim->ctx, victim_log, victim);
	err = kmig_region_create(victim->ctx, &opts, &victim->region);
	if (!err)
		err = kmig_destination_new(victim->ctx, &victim->opts, &ops, victim, &victim->destination);
	if (!err)
		err = kmig_destination_address(victim->destination, &address, &length);
	if (err)
		return err;
	victim->port = ntohs(((struct sockaddr_in *)&address)->sin_port);
	return -pthread_create(&victim->thread, NULL, victim_main, victim);
}

static inline int victim_join(struct victim *victim)
{
	pthread_join(victim->thread, NULL);
	return victim->result;
}

static inline void victim_end(struct victim *victim)
{
	kmig_destination_free(victim->destination);
	kmig_region_free(victim->region);
	kmig_ctx_free(victim->ctx);
}

/* ---- The source by hand ---- */

struct peer {
	int port;
	int control;
	int channel[PEER_CHANNELS];
	uint64_t seq[PEER_CHANNELS];
	struct kmig_transcript transcript;
	struct kmig_session session;
	uint64_t sent, received;
	uint32_t page_size;
};

static inline int peer_socket(int port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	struct timeval limit = { .tv_sec = 10 };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int one = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	return fd;
}

static inline bool put(int fd, const void *data, size_t length)
{
	return send(fd, data, length, MSG_NOSIGNAL) == (ssize_t)length;
}

static inline bool get(int fd, void *data, size_t length)
{
	return recv(fd, data, length, MSG_WAITALL) == (ssize_t)length;
}

/* Has the other side closed, without another word? */
static inline bool hung_up(int fd)
{
	char byte;
	ssize_t n = recv(fd, &byte, 1, 0);

	return !n || (n < 0 && errno == ECONNRESET);
}

static inline bool peer_greet(struct peer *peer)
{
	peer->control = peer_socket(peer->port);
	return peer->control >= 0 && !kmig_auth_hello(PAGE_BYTES, &peer->transcript.source) &&
	       put(peer->control, &peer->transcript.source, sizeof(peer->transcript.source)) &&
	       get(peer->control, &peer->transcript.destination, sizeof(peer->transcript.destination));
}

struct peer_proof {
	struct lmtrack_wire_message header;
	struct lmtrack_wire_proof proof;
};

static inline void peer_make_proof(struct peer *peer, const char *secret, struct peer_proof *proof)
{
	kmig_auth_proof(secret, strlen(secret), "lmtrack source", &peer->transcript, &proof->proof);
	kmig_message_encode(LMTRACK_MSG_PROOF, &proof->proof, sizeof(proof->proof), &proof->header);
}

static inline bool peer_prove(struct peer *peer)
{
	struct peer_proof proof, answer;

	peer_make_proof(peer, SECRET, &proof);
	kmig_auth_session(SECRET, strlen(SECRET), &peer->transcript, &peer->session);
	peer->sent = peer->received = 0;
	return put(peer->control, &proof, sizeof(proof)) && get(peer->control, &answer, sizeof(answer));
}

static inline bool peer_send(struct peer *peer, uint16_t type, const void *body, size_t length)
{
	struct lmtrack_wire_message header;

	kmig_message_encode(type, body, length, &header);
	kmig_auth_seal(peer->session.source, peer->sent++, &header, body, type == LMTRACK_MSG_STATE ? 0 : length,
		       header.mac);
	return put(peer->control, &header, sizeof(header)) && (!length || put(peer->control, body, length));
}

/* The next message but keepalives: its type, its body in @body; 0 when there is none. */
static inline uint16_t peer_recv(struct peer *peer, void *body, size_t room)
{
	struct lmtrack_wire_message header;
	uint8_t scrap[4096];
	uint32_t length;

	do {
		if (!get(peer->control, &header, sizeof(header)))
			return 0;
		length = le32toh(header.length);
		for (uint32_t left = length, n; left; left -= n) {
			n = left < sizeof(scrap) ? left : sizeof(scrap);
			if (!get(peer->control, scrap, n))
				return 0;
			if (body && left == length)
				memcpy(body, scrap, n < room ? n : room);
		}
		peer->received++;
	} while (le16toh(header.type) == LMTRACK_MSG_KEEPALIVE);
	return le16toh(header.type);
}

static inline bool peer_announce(struct peer *peer, uint64_t bytes)
{
	struct lmtrack_wire_capacity capacity = { .bytes = htole64(bytes), .resident = 0 };
	struct {
		struct lmtrack_wire_regions head;
		__le64 bytes;
	} regions = {
		.head = {
			.stream = htole64(PEER_STREAM),
			.count = htole32(1),
			.channels = htole32(PEER_CHANNELS),
		},
		.bytes = htole64(bytes),
	};

	return peer_send(peer, LMTRACK_MSG_CAPACITY, &capacity, sizeof(capacity)) &&
	       peer_recv(peer, NULL, 0) == LMTRACK_MSG_CAPACITY_OK &&
	       peer_send(peer, LMTRACK_MSG_REGIONS, &regions, sizeof(regions)) &&
	       peer_recv(peer, NULL, 0) == LMTRACK_MSG_DEVICES_READY;
}

struct peer_channel_frame {
	struct lmtrack_wire_frame frame;
	struct lmtrack_wire_channel channel;
};

static inline void peer_make_channel(struct peer *peer, uint32_t number, struct peer_channel_frame *wire)
{
	struct kmig_frame frame = {
		.type = LMTRACK_FRAME_CHANNEL,
		.stream = PEER_STREAM,
		.channel = number,
		.payload = sizeof(wire->channel),
	};

	kmig_frame_encode(&frame, NULL, &wire->frame);
	kmig_auth_channel(&peer->session, PEER_STREAM, number, 0, &wire->channel);
}

static inline bool peer_open_channels(struct peer *peer)
{
	struct peer_channel_frame wire;

	for (uint32_t i = 0; i < PEER_CHANNELS; i++) {
		peer->channel[i] = peer_socket(peer->port);
		peer->seq[i] = 0;
		peer_make_channel(peer, i, &wire);
		if (peer->channel[i] < 0 || !put(peer->channel[i], &wire, sizeof(wire)))
			return false;
	}
	return peer_recv(peer, NULL, 0) == LMTRACK_MSG_CHANNELS_READY;
}

/* As far as the first frame. */
static inline bool peer_begin(struct peer *peer, int port, uint64_t bytes)
{
	*peer = (struct peer){ .port = port, .control = -1 };
	for (int i = 0; i < PEER_CHANNELS; i++)
		peer->channel[i] = -1;
	return peer_greet(peer) && peer_prove(peer) && peer_announce(peer, bytes) && peer_open_channels(peer);
}

static inline void peer_end(struct peer *peer)
{
	if (peer->control >= 0)
		close(peer->control);
	for (int i = 0; i < PEER_CHANNELS; i++)
		if (peer->channel[i] >= 0)
			close(peer->channel[i]);
}

/* What the destination gives as the reason for its ABORT, as a negative errno. */
static inline int reason(struct peer *peer)
{
	struct lmtrack_wire_abort abort = { 0 };
	uint16_t type;

	do {
		type = peer_recv(peer, &abort, sizeof(abort));
	} while (type && type != LMTRACK_MSG_ABORT);
	close(peer->control);
	peer->control = -1;
	return -(int)le32toh(abort.error);
}

#endif /* LIB_PEER_H */
