/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A far end of RDMA channels that nobody should trust, for the fuzzer: it takes whoever comes, or
 * refuses him, or says nothing; promises buffers that it has or has not; sends what is no credit;
 * and ends connections whenever it likes. Its memory is lent as a whole, to all.
 *
 * It is a process of its own: the fuzzer maps what it likes wherever something was mapped.
 */
#ifndef RDMA_HOSTILE_H
#define RDMA_HOSTILE_H

#include <arpa/inet.h>
#include <endian.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <rdma/rdma_cma.h>
#include <linux/lmtrack_wire.h>

#include "rdma_link.h"
#include "uapi_common.h"

#define HOSTILE_CONNECTIONS	8
#define HOSTILE_BUFFERS		16
#define HOSTILE_BUFFER_BYTES	(sizeof(struct lmtrack_wire_frame) +				\
				 LMTRACK_WIRE_EXTENTS_MAX * sizeof(struct lmtrack_wire_extent))

struct hostile_connection {
	struct rdma_cm_id *id;		/* NULL: the slot is free */
	struct ibv_cq *cq;
	unsigned int taken;		/* messages that came since the last credit */
	bool broken;
};

/**
 * struct hostile - that end, in memory that both processes see
 * @address:	where it listens
 * @memory:	what it lends, of @bytes: an address there
 * @rkey:	the key to it
 * @ready:	all that is above may be used
 */
struct hostile {
	struct sockaddr_in address;
	unsigned char *memory;
	size_t bytes;
	uint32_t rkey;
	volatile bool ready;
	unsigned long accepted, ended;

	/* Its own. */
	struct rdma_event_channel *events;
	struct rdma_cm_id *listener;
	struct ibv_pd *pd;
	struct ibv_mr *mr;
	/* What is received: nobody reads it, so all connections share the buffer. */
	unsigned char *scratch;
	struct ibv_mr *scratch_mr;
	struct hostile_connection connections[HOSTILE_CONNECTIONS];
	uint64_t random;
	pid_t pid;
};

/* One of so many. */
static inline unsigned int hostile_dice(struct hostile *host, unsigned int sides)
{
	host->random ^= host->random << 13;
	host->random ^= host->random >> 7;
	host->random ^= host->random << 17;
	return host->random * 0x2545f4914f6cdd1dULL % sides;
}

static inline struct ibv_sge hostile_scratch(struct hostile *host, uint32_t length)
{
	return (struct ibv_sge){
		.addr = (uintptr_t)host->scratch, .length = length, .lkey = host->scratch_mr->lkey,
	};
}

static inline void hostile_post(struct hostile *host, struct hostile_connection *connection)
{
	struct ibv_sge sge = hostile_scratch(host, HOSTILE_BUFFER_BYTES);
	struct ibv_recv_wr wr = { .sg_list = &sge, .num_sge = 1 }, *bad;

	ibv_post_recv(connection->id->qp, &wr, &bad);
}

/* Credit as it should be for so many messages, or something else. */
static inline struct lmtrack_wire_credit hostile_credit(struct hostile *host, uint32_t frames)
{
	static const uint32_t lies[] = { 0, 1, 1000, 1U << 31, ~0U };
	bool lie = !hostile_dice(host, 8);

	return (struct lmtrack_wire_credit){
		.magic = htole32(hostile_dice(host, 32) ? LMTRACK_WIRE_MAGIC : host->random),
		.frames = htole32(lie ? lies[hostile_dice(host, 5)] : frames),
	};
}

static inline void hostile_grant(struct hostile *host, struct hostile_connection *connection)
{
	struct lmtrack_wire_credit credit = hostile_credit(host, connection->taken);
	uint32_t length = hostile_dice(host, 16) ? sizeof(credit) : hostile_dice(host, 64);
	struct ibv_sge sge = hostile_scratch(host, length);
	struct ibv_send_wr wr = {
		.sg_list = &sge, .num_sge = !!length, .opcode = IBV_WR_SEND,
		.send_flags = IBV_SEND_SIGNALED,
	}, *bad;

	memcpy(host->scratch, &credit, sizeof(credit));
	if (!ibv_post_send(connection->id->qp, &wr, &bad))
		connection->taken = 0;
}

/* Politely, or as who dies does. */
static inline void hostile_drop(struct hostile *host, struct hostile_connection *connection)
{
	if (hostile_dice(host, 2))
		rdma_disconnect(connection->id);
	if (connection->id->qp)
		rdma_destroy_qp(connection->id);
	if (connection->cq)
		ibv_destroy_cq(connection->cq);
	rdma_destroy_id(connection->id);
	memset(connection, 0, sizeof(*connection));
	host->ended++;
}

/* Of what the device gives at once; the connection is dropped later if that is not enough. */
static inline bool hostile_accept(struct hostile *host, struct hostile_connection *connection)
{
	struct lmtrack_wire_credit credit = hostile_credit(host, HOSTILE_BUFFERS);
	struct rdma_conn_param param = {
		.private_data = &credit,
		.private_data_len = hostile_dice(host, 16) ? sizeof(credit) : hostile_dice(host, sizeof(credit)),
		.rnr_retry_count = hostile_dice(host, 8), .retry_count = 7,
	};
	struct ibv_qp_init_attr init = {
		.qp_type = IBV_QPT_RC,
		.cap = {
			.max_send_wr = HOSTILE_BUFFERS, .max_recv_wr = HOSTILE_BUFFERS,
			.max_send_sge = 1, .max_recv_sge = 1,
		},
	};
	unsigned int i;

	connection->cq = ibv_create_cq(connection->id->verbs, 2 * HOSTILE_BUFFERS, NULL, NULL, 0);
	init.send_cq = connection->cq;
	init.recv_cq = connection->cq;
	if (!connection->cq || rdma_create_qp(connection->id, host->pd, &init))
		return false;
	for (i = 0; i < HOSTILE_BUFFERS && hostile_dice(host, 64); i++)
		hostile_post(host, connection);
	return !rdma_accept(connection->id, &param);
}

static inline void hostile_request(struct hostile *host, struct rdma_cm_id *id)
{
	struct hostile_connection *connection = host->connections;

	while (connection < host->connections + HOSTILE_CONNECTIONS && connection->id)
		connection++;
	if (connection == host->connections + HOSTILE_CONNECTIONS || !hostile_dice(host, 8)) {
		rdma_reject(id, host->scratch, hostile_dice(host, 64));
		rdma_destroy_id(id);
		return;
	}
	connection->id = id;
	id->context = connection;
	/* Whoever is not answered gives up, or is dropped some time. */
	if (hostile_dice(host, 16) && hostile_accept(host, connection))
		host->accepted++;
}

static inline void hostile_events(struct hostile *host)
{
	struct hostile_connection *connection;
	struct rdma_cm_event *event;
	struct rdma_cm_id *id;
	bool request, over;

	while (!rdma_get_cm_event(host->events, &event)) {
		id = event->id;
		request = event->event == RDMA_CM_EVENT_CONNECT_REQUEST;
		over = event->event == RDMA_CM_EVENT_DISCONNECTED ||
		       event->event == RDMA_CM_EVENT_CONNECT_ERROR;
		rdma_ack_cm_event(event);
		connection = id == host->listener ? NULL : id->context;
		if (request)
			hostile_request(host, id);
		else if (over && connection)
			connection->broken = true;
	}
}

static inline void hostile_serve(struct hostile *host, struct hostile_connection *connection)
{
	struct ibv_wc wc[HOSTILE_BUFFERS];
	int n = connection->cq ? ibv_poll_cq(connection->cq, HOSTILE_BUFFERS, wc) : 0;

	for (int i = 0; i < n; i++) {
		if (wc[i].status) {
			connection->broken = true;
		} else if (wc[i].opcode == IBV_WC_RECV) {
			hostile_post(host, connection);
			connection->taken++;
		}
	}
	if (connection->taken >= HOSTILE_BUFFERS / 2 || (connection->id->qp && !hostile_dice(host, 2000)))
		hostile_grant(host, connection);
	if (!hostile_dice(host, connection->broken ? 20 : 4000))
		hostile_drop(host, connection);
}

static inline bool hostile_listen(struct hostile *host)
{
	host->address.sin_family = AF_INET;
	inet_pton(AF_INET, RDMA_IPV4, &host->address.sin_addr);
	host->memory = mmap(NULL, host->bytes + HOSTILE_BUFFER_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	host->scratch = host->memory + host->bytes;
	host->events = rdma_create_event_channel();
	if (host->memory == MAP_FAILED || !host->events || fcntl(host->events->fd, F_SETFL, O_NONBLOCK) ||
	    rdma_create_id(host->events, &host->listener, NULL, RDMA_PS_TCP) ||
	    rdma_bind_addr(host->listener, (void *)&host->address) || rdma_listen(host->listener, 16))
		return false;
	host->address.sin_port = rdma_get_src_port(host->listener);
	host->pd = ibv_alloc_pd(host->listener->verbs);
	if (!host->pd)
		return false;
	host->mr = ibv_reg_mr(host->pd, host->memory, host->bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	host->scratch_mr = ibv_reg_mr(host->pd, host->scratch, HOSTILE_BUFFER_BYTES, IBV_ACCESS_LOCAL_WRITE);
	if (!host->mr || !host->scratch_mr)
		return false;
	host->rkey = host->mr->rkey;
	return true;
}

/* Until it is killed, as peers are. */
static inline void hostile_main(struct hostile *host)
{
	struct hostile_connection *connection;

	host->ready = hostile_listen(host);
	if (!host->ready)
		printf("# no RDMA: the peer cannot listen: %s\n", strerror(errno));
	fflush(stdout);
	while (host->ready) {
		hostile_events(host);
		for (connection = host->connections; connection < host->connections + HOSTILE_CONNECTIONS; connection++)
			if (connection->id)
				hostile_serve(host, connection);
		usleep(500);
	}
}

/* Before there are threads. NULL where there is no soft-RoCE. */
static inline struct hostile *hostile_start(size_t bytes, uint64_t seed)
{
	struct hostile *host;
	pid_t pid;

	if (!rdma_module_load() || !rdma_link_up()) {
		printf("# no RDMA: neither module nor device\n");
		return NULL;
	}
	host = mmap(NULL, sizeof(*host), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (host == MAP_FAILED)
		return NULL;
	host->random = seed | 1;
	host->bytes = bytes;
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		hostile_main(host);
		_exit(1);
	}
	host->pid = pid;
	while (pid > 0 && !host->ready && !waitpid(pid, NULL, WNOHANG))
		usleep(1000);
	return host->ready ? host : NULL;
}

static inline void hostile_end(struct hostile *host)
{
	kill(host->pid, SIGKILL);
	waitpid(host->pid, NULL, 0);
}

#endif /* RDMA_HOSTILE_H */
