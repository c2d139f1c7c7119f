/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The far end of an RDMA channel, for tests: it takes a connection whose token it knows, lends its
 * memory out window by window, and checks every field of every frame. What it has at the end must
 * equal the region. One region per peer.
 */
#ifndef RDMA_PEER_H
#define RDMA_PEER_H

#include <arpa/inet.h>
#include <endian.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <rdma/rdma_cma.h>
#include <linux/lmtrack_wire.h>

#include "uapi_common.h"

#define PEER_STREAM	0x1122334455667788ULL
#define PEER_SENDS	8
#define PEER_RECVS	16
#define PEER_WINDOWS	512
#define PEER_RECV_BYTES	(sizeof(struct lmtrack_wire_frame) +				\
			 LMTRACK_WIRE_EXTENTS_MAX * sizeof(struct lmtrack_wire_extent))

enum { PEER_NOTHING, PEER_DATA, PEER_ZERO };

/**
 * struct peer_memory - the copy of the region, shared by the peers of its channels
 * @mem:	the bytes
 * @pages:	length
 * @got:	what came last for each page
 * @owner:	of each chunk, the last round that brought it (32 bits up), and the channel it came on
 */
struct peer_memory {
	unsigned char *mem;
	size_t pages;
	unsigned char *got;
	uint64_t *owner;
};

/**
 * struct peer - one end
 * @memory:	where pages go
 * @number:	of the channel
 * @token:	the one it takes
 * @silent:	neither accepts nor refuses
 * @mute:	does not say how many buffers it has
 * @poor:	says that it has none
 * @starved:	has none, and says otherwise
 * @ended:	last round whose end has come, as are @data_pages and so on under @lock
 * @done:	the connection is
 * @error:	what is wrong with the frames, or empty
 */
struct peer {
	struct peer_memory *memory;
	uint32_t number;
	uint8_t token[LMTRACK_RDMA_TOKEN_MAX];
	bool silent, mute, poor, starved;
	struct sockaddr_storage address;

	struct rdma_event_channel *events;
	struct rdma_cm_id *listener, *id;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_mr *recv_mr, *credit_mr;
	struct ibv_mr *windows[PEER_WINDOWS];
	unsigned int window_count;
	unsigned char *recv;
	struct lmtrack_wire_credit *credit;
	unsigned int free;		/* buffers that are not granted yet */
	pthread_t thread;
	bool stop;			/* under @lock */

	pthread_mutex_t lock;
	pthread_cond_t change;
	uint64_t seq, round_pages, data_pages, zero_pages, frames;
	uint32_t ended;
	bool done;
	char error[200];
};

static inline uint32_t peer_crc(const void *data, size_t bytes)
{
	const unsigned char *p = data;
	uint32_t crc = ~0U;

	while (bytes--) {
		crc ^= *p++;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
	}
	return ~crc;
}

static inline bool __attribute__((format(printf, 2, 3)))
peer_wrong(struct peer *peer, const char *format, ...)
{
	va_list args;
	int n = snprintf(peer->error, sizeof(peer->error), "channel %u, frame %llu: ",
			 peer->number, (unsigned long long)peer->seq);

	va_start(args, format);
	vsnprintf(peer->error + n, sizeof(peer->error) - n, format, args);
	va_end(args);
	return false;
}

static inline bool peer_memory_init(struct peer_memory *memory, size_t pages)
{
	memory->pages = pages;
	memory->mem = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	memory->got = calloc(pages, 1);
	memory->owner = calloc(pages / LMTRACK_CHUNK_PAGES + 1, sizeof(*memory->owner));
	return memory->mem != MAP_FAILED && memory->got && memory->owner;
}

/* ---- Frames ---- */

static inline bool peer_extents(struct peer *peer, const struct lmtrack_wire_frame *head)
{
	const struct lmtrack_wire_extent *table = (const void *)(head + 1);
	struct peer_memory *memory = peer->memory;
	bool data = head->type == LMTRACK_FRAME_DATA;
	uint64_t end = 0, total = 0, chunk = le64toh(table[0].first) / LMTRACK_CHUNK_PAGES;
	uint64_t us = (uint64_t)le32toh(head->round) << 32 | peer->number, before;

	if (!head->extents || le32toh(head->region) || head->arg)
		return peer_wrong(peer, "no extents, region or argument");
	for (uint32_t i = 0; i < le32toh(head->extents); i++) {
		uint64_t first = le64toh(table[i].first), pages = le32toh(table[i].pages);

		if (table[i].reserved || !pages || (i && first <= end - 1) ||
		    first + pages > memory->pages)
			return peer_wrong(peer, "extent %u at %llu", i,
					  (unsigned long long)first);
		end = first + pages;
		if ((end - 1) / LMTRACK_CHUNK_PAGES != chunk)
			return peer_wrong(peer, "extents in several chunks");
		total += pages;
		memset(memory->got + first, data ? PEER_DATA : PEER_ZERO, pages);
		if (!data)
			memset(memory->mem + first * PAGE, 0, pages * PAGE);
	}
	if (le32toh(head->payload) != (data ? total * PAGE : 0))
		return peer_wrong(peer, "payload of %u bytes", le32toh(head->payload));
	before = __atomic_exchange_n(&memory->owner[chunk], us, __ATOMIC_RELAXED);
	if (before >> 32 == us >> 32 && before != us)
		return peer_wrong(peer, "its chunk was on channel %u in this round", (uint32_t)before);
	peer->round_pages += total;
	*(data ? &peer->data_pages : &peer->zero_pages) += total;
	return true;
}

static inline bool peer_frame(struct peer *peer, struct lmtrack_wire_frame *head, size_t bytes)
{
	uint32_t crc = head->crc;

	if (bytes < sizeof(*head) || le32toh(head->magic) != LMTRACK_WIRE_MAGIC ||
	    le16toh(head->version) != LMTRACK_WIRE_VERSION || head->flags || head->reserved)
		return peer_wrong(peer, "no header");
	if (bytes != sizeof(*head) + le32toh(head->extents) * sizeof(struct lmtrack_wire_extent))
		return peer_wrong(peer, "%zu bytes", bytes);
	head->crc = 0;
	if (peer_crc(head, bytes) != le32toh(crc))
		return peer_wrong(peer, "CRC");
	if (le64toh(head->stream) != PEER_STREAM || le32toh(head->channel) != peer->number ||
	    le64toh(head->seq) != peer->seq || le32toh(head->round) <= peer->ended)
		return peer_wrong(peer, "stream, channel, sequence or round");
	peer->seq++;
	peer->frames++;
	switch (head->type) {
	case LMTRACK_FRAME_DATA:
	case LMTRACK_FRAME_ZERO:
		return peer_extents(peer, head);
	case LMTRACK_FRAME_ROUND_END:
		if (head->extents || head->payload || le64toh(head->arg) != peer->round_pages)
			return peer_wrong(peer, "round end");
		peer->round_pages = 0;
		peer->ended = le32toh(head->round);
		pthread_cond_broadcast(&peer->change);
		return true;
	}
	return peer_wrong(peer, "type %u", head->type);
}

/* ---- The connection ---- */

static inline bool peer_post(struct peer *peer, unsigned int slot)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)peer->recv + slot * PEER_RECV_BYTES,
		.length = PEER_RECV_BYTES,
		.lkey = peer->recv_mr->lkey,
	};
	struct ibv_recv_wr wr = { .wr_id = slot, .sg_list = &sge, .num_sge = 1 }, *bad;

	return !ibv_post_recv(peer->id->qp, &wr, &bad);
}

/* The source may send so many frames more: in a message of so many bytes. */
static inline bool peer_grant(struct peer *peer, uint32_t magic, uint32_t frames, uint32_t bytes)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)peer->credit, .length = bytes, .lkey = peer->credit_mr->lkey,
	};
	struct ibv_send_wr wr = {
		.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED,
	}, *bad;

	peer->credit->magic = htole32(magic);
	peer->credit->frames = htole32(frames);
	return !ibv_post_send(peer->id->qp, &wr, &bad);
}

static inline bool peer_accept(struct peer *peer, struct rdma_cm_event *event)
{
	struct ibv_qp_init_attr init = {
		.qp_type = IBV_QPT_RC,
		.cap = {
			.max_send_wr = PEER_SENDS, .max_recv_wr = PEER_RECVS,
			.max_send_sge = 1, .max_recv_sge = 1,
		},
	};
	struct lmtrack_wire_credit credit = {
		.magic = htole32(LMTRACK_WIRE_MAGIC), .frames = htole32(peer->poor ? 0 : PEER_RECVS),
	};
	struct rdma_conn_param param = {
		.private_data = &credit, .private_data_len = sizeof(credit),
		.rnr_retry_count = 7, .retry_count = 7,
	};

	if (event->param.conn.private_data_len < sizeof(peer->token) ||
	    memcmp(event->param.conn.private_data, peer->token, sizeof(peer->token))) {
		rdma_reject(event->id, &credit, sizeof(credit));
		return false;
	}
	if (peer->silent)
		return true;
	peer->id = event->id;
	peer->pd = ibv_alloc_pd(peer->id->verbs);
	peer->cq = ibv_create_cq(peer->id->verbs, PEER_RECVS + PEER_SENDS, NULL, NULL, 0);
	peer->recv = calloc(PEER_RECVS, PEER_RECV_BYTES);
	peer->credit = malloc(sizeof(*peer->credit));
	if (!peer->pd || !peer->cq || !peer->recv || !peer->credit)
		return peer_wrong(peer, "no PD, CQ or memory");
	peer->credit_mr = ibv_reg_mr(peer->pd, peer->credit, sizeof(credit), 0);
	peer->recv_mr = ibv_reg_mr(peer->pd, peer->recv, PEER_RECVS * PEER_RECV_BYTES,
				   IBV_ACCESS_LOCAL_WRITE);
	init.send_cq = peer->cq;
	init.recv_cq = peer->cq;
	if (peer->mute)
		param.private_data_len = 0;
	if (!peer->recv_mr || !peer->credit_mr || rdma_create_qp(peer->id, peer->pd, &init))
		return peer_wrong(peer, "no MR or QP: %s", strerror(errno));
	for (unsigned int i = 0; i < PEER_RECVS && !peer->starved; i++)
		if (!peer_post(peer, i))
			return peer_wrong(peer, "no receive");
	if (rdma_accept(peer->id, &param))
		return peer_wrong(peer, "accept: %s", strerror(errno));
	return true;
}

/* One event, if there is one: false when the connection is over. */
static inline bool peer_event(struct peer *peer)
{
	struct rdma_cm_event *event;
	bool goes_on = true;

	if (rdma_get_cm_event(peer->events, &event))
		return errno == EAGAIN;
	if (event->event == RDMA_CM_EVENT_CONNECT_REQUEST)
		peer_accept(peer, event);
	else if (event->event == RDMA_CM_EVENT_DISCONNECTED ||
		 event->event == RDMA_CM_EVENT_DEVICE_REMOVAL)
		goes_on = false;
	rdma_ack_cm_event(event);
	return goes_on;
}

static inline bool peer_completions(struct peer *peer)
{
	struct ibv_wc wc[PEER_RECVS];
	int n = ibv_poll_cq(peer->cq, PEER_RECVS, wc);

	for (int i = 0; i < n; i++) {
		if (wc[i].status)
			return false;
		if (wc[i].opcode == IBV_WC_SEND)
			continue;
		if (!peer_frame(peer, (void *)(peer->recv + wc[i].wr_id * PEER_RECV_BYTES),
				wc[i].byte_len) || !peer_post(peer, wc[i].wr_id))
			return false;
		if (++peer->free == PEER_RECVS / 2) {
			peer->free = 0;
			if (!peer_grant(peer, LMTRACK_WIRE_MAGIC, PEER_RECVS / 2, sizeof(*peer->credit)))
				return false;
		}
	}
	return n >= 0;
}

static inline void *peer_main(void *data)
{
	struct peer *peer = data;
	bool goes_on = true;

	while (goes_on) {
		pthread_mutex_lock(&peer->lock);
		goes_on = !peer->stop && peer_event(peer) &&
			  (!peer->cq || peer_completions(peer)) && !peer->error[0];
		pthread_mutex_unlock(&peer->lock);
		usleep(200);
	}
	pthread_mutex_lock(&peer->lock);
	if (peer->error[0] && peer->id)
		rdma_disconnect(peer->id);
	peer->done = true;
	pthread_cond_broadcast(&peer->change);
	pthread_mutex_unlock(&peer->lock);
	return NULL;
}

/* Listen on an address of the test's link; a thread does the rest. */
static inline bool peer_start(struct peer *peer, struct peer_memory *memory, uint32_t number,
			      const char *address)
{
	struct sockaddr_in6 *in6 = (void *)&peer->address;
	struct sockaddr_in *in = (void *)&peer->address;

	peer->memory = memory;
	peer->number = number;
	memset(peer->token, 0x40 + number, sizeof(peer->token));
	pthread_mutex_init(&peer->lock, NULL);
	pthread_cond_init(&peer->change, NULL);
	if (strchr(address, ':')) {
		in6->sin6_family = AF_INET6;
		inet_pton(AF_INET6, address, &in6->sin6_addr);
	} else {
		in->sin_family = AF_INET;
		inet_pton(AF_INET, address, &in->sin_addr);
	}
	peer->events = rdma_create_event_channel();
	if (!peer->events || fcntl(peer->events->fd, F_SETFL, O_NONBLOCK) ||
	    rdma_create_id(peer->events, &peer->listener, NULL, RDMA_PS_TCP) ||
	    rdma_bind_addr(peer->listener, (void *)&peer->address) ||
	    rdma_listen(peer->listener, 4))
		return false;
	/* At the same place in both. */
	in->sin_port = rdma_get_src_port(peer->listener);
	return !pthread_create(&peer->thread, NULL, peer_main, peer);
}

/* Lend the pages of a window out; its key. */
static inline bool peer_window(struct peer *peer, uint64_t first, uint64_t pages,
			       uint64_t *address, uint32_t *rkey)
{
	unsigned char *mem = peer->memory->mem + first * PAGE;
	struct ibv_mr *mr = NULL;

	pthread_mutex_lock(&peer->lock);
	if (peer->window_count < PEER_WINDOWS && peer->pd)
		mr = ibv_reg_mr(peer->pd, mem, pages * PAGE,
				IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	if (mr)
		peer->windows[peer->window_count++] = mr;
	pthread_mutex_unlock(&peer->lock);
	*address = (uintptr_t)mem;
	*rkey = mr ? mr->rkey : 0;
	return mr;
}

static inline bool peer_wait(struct peer *peer, uint32_t round)
{
	struct timespec limit;
	int ret = 0;

	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += 60;
	pthread_mutex_lock(&peer->lock);
	while (peer->ended < round && !peer->done && !ret)
		ret = pthread_cond_timedwait(&peer->change, &peer->lock, &limit);
	ret = peer->ended >= round;
	pthread_mutex_unlock(&peer->lock);
	return ret;
}

/* End it as a dying peer would: connection and keys go at once. Its complaint, or NULL. */
static inline const char *peer_end(struct peer *peer)
{
	pthread_mutex_lock(&peer->lock);
	peer->stop = true;
	pthread_mutex_unlock(&peer->lock);
	pthread_join(peer->thread, NULL);
	if (peer->id && peer->id->qp)
		rdma_destroy_qp(peer->id);
	for (unsigned int i = 0; i < peer->window_count; i++)
		ibv_dereg_mr(peer->windows[i]);
	if (peer->recv_mr)
		ibv_dereg_mr(peer->recv_mr);
	if (peer->credit_mr)
		ibv_dereg_mr(peer->credit_mr);
	if (peer->cq)
		ibv_destroy_cq(peer->cq);
	if (peer->pd)
		ibv_dealloc_pd(peer->pd);
	if (peer->id)
		rdma_destroy_id(peer->id);
	rdma_destroy_id(peer->listener);
	rdma_destroy_event_channel(peer->events);
	free(peer->recv);
	free(peer->credit);
	return peer->error[0] ? peer->error : NULL;
}

#endif /* RDMA_PEER_H */
