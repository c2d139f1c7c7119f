// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The destination's RDMA. Its listener is there for one migration and takes a connection only with
 * a token made from the session's key, once for each channel. On a connection come messages, the
 * frames; the pages themselves the source has written before, into windows of guest memory that
 * were lent to it: registered when they are first asked for, so that a guest of which little exists
 * does not become memory as a whole.
 *
 * Devices, connections and windows belong to the engine's thread, but a connection's queue, which is
 * its channel's thread's. @lock guards @lent alone, which threads of channels read: it is set
 * before the pages are registered, and holes are punched under it.
 *
 * The source may write into its windows until the connection's queue pair is gone; its kernel does
 * so only between the begin of a round and the frames that tell of it.
 */
#include "rdma.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <rdma/rdma_cma.h>
#include <stdarg.h>
#include <sys/eventfd.h>

#define RECVS 32			/* frames that may wait for their thread */
#define RECV_BYTES (sizeof(struct lmtrack_wire_frame) + \
		    LMTRACK_WIRE_EXTENTS_MAX * sizeof(struct lmtrack_wire_extent))
#define CONN_BYTES (RECVS * RECV_BYTES + sizeof(struct lmtrack_wire_credit))
#define BACKLOG 16
#define EVENTS_MAX 16			/* in one step: the engine has other things to do */
#define DEVICES_MAX 8
#define CREDIT_FRAMES (RECVS / 2)	/* the source is told of so many buffers at a time */
#define SENDS 8				/* messages that do so, more than can be under way */
#define RETRIES 7			/* without an answer; no limit without a buffer, but none is missing */
#define WINDOW_BYTES (16u << 20)
#define WINDOW_BYTES_MAX (1u << 30)

/* Keys are a protection domain's, and it is a device's. */
struct device {
	struct ibv_pd *pd;
	struct ibv_mr **mr[LMTRACK_REGIONS_MAX];	/* by window; NULL: not lent */
};

struct kmig_rdma_conn {
	struct rdma_cm_id *id;
	struct device *device;
	struct ibv_comp_channel *events;
	struct ibv_cq *cq;
	struct ibv_mr *mr;		/* of @bytes */
	uint8_t *bytes;			/* RECVS buffers, and the one message that is sent */
	unsigned int free;		/* buffers the source has not been told of */
	int stop_fd;
	bool established;
	bool armed;			/* the next completion is an event; the thread's */
	_Atomic bool over;		/* nothing more is to be taken, whatever has come */
};

struct kmig_rdma {
	struct kmig_ctx *ctx;
	const struct kmig_chunks *chunks;
	const struct kmig_session *session;
	uint64_t stream;
	unsigned int channels;
	uint32_t window_pages;
	struct rdma_event_channel *events;
	struct rdma_cm_id *listener;
	struct device devices[DEVICES_MAX];
	struct kmig_rdma_conn *conn[LMTRACK_CHANNELS_MAX];
	bool used[LMTRACK_CHANNELS_MAX];	/* its token is of no more use */
	pthread_rwlock_t lock;
	uint64_t *lent[LMTRACK_REGIONS_MAX];	/* a bit for each window */
	char *why;			/* while it begins to listen: KMIG_ERROR_MAX, for what is wrong */
};

__attribute__((format(printf, 3, 4)))
static int refuse(struct kmig_rdma *rdma, int err, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(rdma->why, KMIG_ERROR_MAX, fmt, args);
	va_end(args);
	return err;
}

static uint64_t windows(const struct kmig_rdma *rdma, unsigned int region)
{
	return (kmig_region_pages(rdma->chunks->regions[region]) + rdma->window_pages - 1) / rdma->window_pages;
}

/* ---- Devices ---- */

static struct device *device_of(struct kmig_rdma *rdma, struct ibv_context *verbs)
{
	struct device *device;
	unsigned int i;

	for (i = 0; i < DEVICES_MAX && rdma->devices[i].pd; i++)
		if (rdma->devices[i].pd->context == verbs)
			return &rdma->devices[i];
	if (i == DEVICES_MAX)
		return NULL;
	device = &rdma->devices[i];
	for (unsigned int r = 0; r < rdma->chunks->count; r++) {
		if (!device->mr[r])
			device->mr[r] = calloc(windows(rdma, r), sizeof(device->mr[r][0]));
		if (!device->mr[r])
			return NULL;
	}
	device->pd = ibv_alloc_pd(verbs);
	return device->pd ? device : NULL;
}

static struct ibv_mr *lend(const struct device *device, const struct kmig_region *region, uint64_t first, uint64_t pages)
{
	return ibv_reg_mr(device->pd, (uint8_t *)region->map + first * region->page_size, pages * region->page_size,
			  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
}

/* Memory that is written through a file system's eyes, as an lmtrack region's is, cannot be lent. */
static int try_to_lend(struct kmig_rdma *rdma, const struct device *device)
{
	for (unsigned int i = 0; i < rdma->chunks->count; i++) {
		struct kmig_region *region = rdma->chunks->regions[i];
		struct ibv_mr *mr = lend(device, region, 0, 1);

		if (!mr)
			return refuse(rdma, -errno ?: -EIO, "memory of region %s cannot be registered: %s%s", region->name,
					 strerror(errno), errno == ENOMEM ? " (is RLIMIT_MEMLOCK too small?)" : "");
		ibv_dereg_mr(mr);
	}
	return 0;
}

/* A power of two, so that the last of all windows stays within twice of what the device can have. */
static int choose_window(struct kmig_rdma *rdma, struct ibv_context *verbs, uint64_t bytes)
{
	uint64_t page_size = sysconf(_SC_PAGESIZE), chunk = LMTRACK_CHUNK_PAGES * page_size, total = 0;
	struct ibv_device_attr attr;

	if (!bytes) {
		bytes = WINDOW_BYTES > chunk ? WINDOW_BYTES : chunk;
		for (unsigned int i = 0; i < rdma->chunks->count; i++)
			total += rdma->chunks->regions[i]->bytes;
		if (ibv_query_device(verbs, &attr))
			return refuse(rdma, -EIO, "the device does not say what it can do");
		while (bytes < WINDOW_BYTES_MAX && total / bytes > (uint64_t)attr.max_mr / 2)
			bytes *= 2;
		while (bytes > attr.max_mr_size && bytes > chunk)
			bytes /= 2;
	}
	if (bytes % chunk || bytes > WINDOW_BYTES_MAX)
		return refuse(rdma, -EINVAL, "a window of %llu bytes: it has to be a multiple of %llu, and at most %u",
				 (unsigned long long)bytes, (unsigned long long)chunk, WINDOW_BYTES_MAX);
	rdma->window_pages = bytes / page_size;
	return 0;
}

/* ---- Listening ---- */

/* Of the address of a connection, as a device knows it. */
static void any_port(struct sockaddr_storage *address)
{
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)address;
	struct sockaddr_in in = { .sin_family = AF_INET };

	/* That of an IPv4 connection to a socket of both families is IPv6. */
	if (address->ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) {
		memcpy(&in.sin_addr, in6->sin6_addr.s6_addr + 12, sizeof(in.sin_addr));
		memcpy(address, &in, sizeof(in));
	}
	/* At the same place in both. */
	in6->sin6_port = 0;
}

static int listen_at(struct kmig_rdma *rdma, struct sockaddr_storage *address, uint64_t window_bytes)
{
	struct device *device;
	int err;

	rdma->events = rdma_create_event_channel();
	if (!rdma->events || fcntl(rdma->events->fd, F_SETFL, O_NONBLOCK) ||
	    fcntl(rdma->events->fd, F_SETFD, FD_CLOEXEC) ||
	    rdma_create_id(rdma->events, &rdma->listener, NULL, RDMA_PS_TCP))
		return refuse(rdma, -errno ?: -EIO, "%s: is there a device, and are rdma_ucm and ib_uverbs loaded?", strerror(errno));
	any_port(address);
	if (rdma_bind_addr(rdma->listener, (struct sockaddr *)address))
		return refuse(rdma, -errno ?: -EIO, "binding to the address that the source has come to: %s", strerror(errno));
	if (!rdma->listener->verbs)
		return refuse(rdma, -ENODEV, "no device has the address that the source has come to");
	err = choose_window(rdma, rdma->listener->verbs, window_bytes);
	if (err)
		return err;
	for (unsigned int i = 0; i < rdma->chunks->count; i++) {
		rdma->lent[i] = calloc(kmig_words(windows(rdma, i)), sizeof(uint64_t));
		if (!rdma->lent[i])
			return refuse(rdma, -ENOMEM, "out of memory");
	}
	device = device_of(rdma, rdma->listener->verbs);
	if (!device)
		return refuse(rdma, -ENOMEM, "no protection domain: %s", strerror(errno));
	err = try_to_lend(rdma, device);
	if (err)
		return err;
	if (rdma_listen(rdma->listener, BACKLOG))
		return refuse(rdma, -errno ?: -EIO, "listening: %s", strerror(errno));
	return 0;
}

int kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
		     uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
		     struct kmig_rdma **out, char why[KMIG_ERROR_MAX])
{
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	pthread_rwlockattr_t writer_first;
	struct kmig_rdma *rdma;
	int err;

	snprintf(why, KMIG_ERROR_MAX, "out of memory");
	if (getsockname(control, (struct sockaddr *)&address, &length))
		return -errno;
	rdma = calloc(1, sizeof(*rdma));
	if (!rdma)
		return -ENOMEM;
	rdma->why = why;
	rdma->ctx = ctx;
	rdma->chunks = chunks;
	rdma->session = session;
	rdma->stream = stream;
	rdma->channels = channels;
	/* Many channels with zeroes must not keep the engine waiting. */
	pthread_rwlockattr_init(&writer_first);
	pthread_rwlockattr_setkind_np(&writer_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&rdma->lock, &writer_first);
	pthread_rwlockattr_destroy(&writer_first);
	err = listen_at(rdma, &address, window_bytes);
	rdma->why = NULL;
	if (err)
		kmig_rdma_close(rdma);
	else
		*out = rdma;
	return err;
}

uint16_t kmig_rdma_port(const struct kmig_rdma *rdma)
{
	return ntohs(rdma_get_src_port(rdma->listener));
}

uint32_t kmig_rdma_window_pages(const struct kmig_rdma *rdma)
{
	return rdma->window_pages;
}

int kmig_rdma_fd(const struct kmig_rdma *rdma)
{
	return rdma->events->fd;
}

/* ---- Connections ---- */

static int post(struct kmig_rdma_conn *conn, unsigned int slot)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)conn->bytes + slot * RECV_BYTES,
		.length = RECV_BYTES,
		.lkey = conn->mr->lkey,
	};
	struct ibv_recv_wr wr = { .wr_id = slot, .sg_list = &sge, .num_sge = 1 }, *bad;

	return -ibv_post_recv(conn->id->qp, &wr, &bad);
}

static struct lmtrack_wire_credit credit_for(uint32_t frames)
{
	return (struct lmtrack_wire_credit){ .magic = htole32(LMTRACK_WIRE_MAGIC), .frames = htole32(frames) };
}

/* The message with which buffers are given back, always the same one. */
static struct lmtrack_wire_credit *credit_of(struct kmig_rdma_conn *conn)
{
	return (void *)(conn->bytes + RECVS * RECV_BYTES);
}

static int send_credit(struct kmig_rdma_conn *conn)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)credit_of(conn),
		.length = sizeof(struct lmtrack_wire_credit),
		.lkey = conn->mr->lkey,
	};
	struct ibv_send_wr wr = {
		.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED,
	}, *bad;

	return -ibv_post_send(conn->id->qp, &wr, &bad);
}

/* What there is of it; the id is released by whoever acknowledges its event. */
static void release(struct kmig_rdma_conn *conn)
{
	if (conn->id->qp)
		rdma_destroy_qp(conn->id);
	if (conn->mr)
		ibv_dereg_mr(conn->mr);
	if (conn->cq)
		ibv_destroy_cq(conn->cq);
	if (conn->events)
		ibv_destroy_comp_channel(conn->events);
	if (conn->stop_fd >= 0)
		close(conn->stop_fd);
	free(conn->bytes);
	free(conn);
}

static bool set_up(struct kmig_rdma_conn *conn)
{
	struct ibv_qp_init_attr init = {
		.qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = SENDS, .max_recv_wr = RECVS, .max_send_sge = 1, .max_recv_sge = 1 },
	};

	conn->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	conn->bytes = malloc(CONN_BYTES);
	conn->events = ibv_create_comp_channel(conn->id->verbs);
	if (conn->stop_fd < 0 || !conn->bytes || !conn->events || fcntl(conn->events->fd, F_SETFL, O_NONBLOCK))
		return false;
	conn->cq = ibv_create_cq(conn->id->verbs, RECVS + SENDS, NULL, conn->events, 0);
	conn->mr = ibv_reg_mr(conn->device->pd, conn->bytes, CONN_BYTES, IBV_ACCESS_LOCAL_WRITE);
	if (!conn->cq || !conn->mr)
		return false;
	init.send_cq = init.recv_cq = conn->cq;
	if (rdma_create_qp(conn->id, conn->device->pd, &init))
		return false;
	for (unsigned int i = 0; i < RECVS; i++)
		if (post(conn, i))
			return false;
	*credit_of(conn) = credit_for(CREDIT_FRAMES);
	return true;
}

/* Whose request is it? -1: of nobody we know. */
static int channel_of(const struct kmig_rdma *rdma, const struct rdma_conn_param *param)
{
	struct lmtrack_wire_token token, expected;
	uint32_t channel;

	if (param->private_data_len < sizeof(token))
		return -1;
	memcpy(&token, param->private_data, sizeof(token));
	channel = le32toh(token.channel);
	if (channel >= rdma->channels || kmig_auth_token(rdma->session, rdma->stream, channel, &expected) ||
	    !kmig_auth_equal(&token, &expected, sizeof(token)))
		return -1;
	return channel;
}

/* The id is ours if it is let in; else it is to be destroyed. */
static bool let_in(struct kmig_rdma *rdma, struct rdma_cm_id *id, const struct rdma_conn_param *asked)
{
	struct lmtrack_wire_credit credit = credit_for(RECVS);
	struct rdma_conn_param param = {
		.private_data = &credit, .private_data_len = sizeof(credit),
		.retry_count = RETRIES, .rnr_retry_count = RETRIES,
	};
	int channel = channel_of(rdma, asked);
	struct kmig_rdma_conn *conn;

	if (channel < 0 || rdma->used[channel]) {
		kmig_log(rdma->ctx, KMIG_LOG_WARNING, "an RDMA connection was turned away: %s",
			 channel < 0 ? "it does not know the session's key" : "its channel was there already");
		return false;
	}
	conn = calloc(1, sizeof(*conn));
	if (!conn)
		return false;
	conn->stop_fd = -1;
	conn->id = id;
	conn->device = device_of(rdma, id->verbs);
	if (!conn->device || !set_up(conn) || rdma_accept(id, &param)) {
		kmig_log(rdma->ctx, KMIG_LOG_WARNING, "an RDMA connection could not be set up: %s", strerror(errno));
		release(conn);
		return false;
	}
	id->context = conn;
	rdma->conn[channel] = conn;
	rdma->used[channel] = true;
	return true;
}

void kmig_rdma_step(struct kmig_rdma *rdma)
{
	const struct lmtrack_wire_credit no = credit_for(0);
	struct rdma_cm_event *event;

	for (int i = 0; i < EVENTS_MAX && !rdma_get_cm_event(rdma->events, &event); i++) {
		struct rdma_cm_id *id = event->id, *refused = NULL;
		struct kmig_rdma_conn *conn = id->context;

		switch (event->event) {
		case RDMA_CM_EVENT_CONNECT_REQUEST:
			/* It has the listener's context. */
			id->context = NULL;
			if (!let_in(rdma, id, &event->param.conn))
				refused = id;
			break;
		case RDMA_CM_EVENT_ESTABLISHED:
			if (conn)
				conn->established = true;
			break;
		default:
			/* However it says so, this connection is over; what has come is still read. */
			if (conn)
				eventfd_write(conn->stop_fd, 1);
			break;
		}
		/* iWARP knows no reason: that it is said at all tells it from nobody listening. */
		if (refused)
			rdma_reject(refused, &no, sizeof(no));
		rdma_ack_cm_event(event);
		if (refused)
			rdma_destroy_id(refused);
	}
}

void kmig_rdma_close_door(struct kmig_rdma *rdma)
{
	rdma_destroy_id(rdma->listener);
	rdma->listener = NULL;
}

bool kmig_rdma_connected(const struct kmig_rdma *rdma, uint32_t channel)
{
	return rdma->conn[channel] && rdma->conn[channel]->established;
}

struct kmig_rdma_conn *kmig_rdma_conn(struct kmig_rdma *rdma, uint32_t channel)
{
	return rdma->conn[channel];
}

void kmig_rdma_stop(struct kmig_rdma_conn *conn)
{
	atomic_store(&conn->over, true);
	eventfd_write(conn->stop_fd, 1);
}

void kmig_rdma_disconnect(struct kmig_rdma *rdma, uint32_t channel)
{
	struct kmig_rdma_conn *conn = rdma->conn[channel];
	struct rdma_cm_id *id;

	/* Nor is one let in that comes later. */
	rdma->used[channel] = true;
	if (!conn)
		return;
	/* Events of it that were not read yet find nothing. */
	id = conn->id;
	id->context = NULL;
	rdma->conn[channel] = NULL;
	rdma_disconnect(id);
	release(conn);
	rdma_destroy_id(id);
}

/* ---- Messages ---- */

int kmig_rdma_next(struct kmig_rdma_conn *conn, void **bytes, size_t *length)
{
	struct pollfd fds[] = {
		{ .fd = conn->events->fd, .events = POLLIN },
		{ .fd = conn->stop_fd, .events = POLLIN },
	};
	struct ibv_cq *cq;
	struct ibv_wc wc;
	void *context;
	int n;

	for (;;) {
		if (atomic_load(&conn->over))
			return -ECONNRESET;
		n = ibv_poll_cq(conn->cq, 1, &wc);
		if (n < 0)
			return -EIO;
		if (n) {
			/* Of one that failed the opcode says nothing. */
			if (wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_SEND)
				continue;
			if (wc.status != IBV_WC_SUCCESS || wc.opcode != IBV_WC_RECV || wc.byte_len > RECV_BYTES)
				return -ECONNRESET;
			*bytes = conn->bytes + wc.wr_id * RECV_BYTES;
			*length = wc.byte_len;
			return 0;
		}
		/* What came between the look and the arming makes no event: look once more. */
		if (!conn->armed) {
			if (ibv_req_notify_cq(conn->cq, 0))
				return -EIO;
			conn->armed = true;
			continue;
		}
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return -errno;
		if (!ibv_get_cq_event(conn->events, &cq, &context)) {
			ibv_ack_cq_events(cq, 1);
			conn->armed = false;
		} else if (fds[1].revents) {
			return -ECONNRESET;
		}
	}
}

int kmig_rdma_release(struct kmig_rdma_conn *conn, void *bytes)
{
	int err = post(conn, ((uint8_t *)bytes - conn->bytes) / RECV_BYTES);

	if (err || ++conn->free < CREDIT_FRAMES)
		return err;
	conn->free = 0;
	return send_credit(conn);
}

/* ---- Windows ---- */

int kmig_rdma_window(struct kmig_rdma *rdma, uint32_t channel, uint32_t number, uint64_t first,
		     uint64_t *address, uint32_t *rkey)
{
	struct kmig_region *region;
	struct ibv_mr **mr;
	uint64_t pages;

	if (channel >= rdma->channels || !rdma->conn[channel] || number >= rdma->chunks->count ||
	    first % rdma->window_pages || first >= kmig_region_pages(rdma->chunks->regions[number]))
		return -ENOENT;
	region = rdma->chunks->regions[number];
	pages = kmig_region_pages(region) - first;
	if (pages > rdma->window_pages)
		pages = rdma->window_pages;
	mr = &rdma->conn[channel]->device->mr[number][first / rdma->window_pages];
	if (!*mr) {
		pthread_rwlock_wrlock(&rdma->lock);
		kmig_bit_set(rdma->lent[number], first / rdma->window_pages);
		pthread_rwlock_unlock(&rdma->lock);
		*mr = lend(rdma->conn[channel]->device, region, first, pages);
		if (!*mr)
			return -errno ?: -ENOMEM;
	}
	*address = (uintptr_t)region->map + first * region->page_size;
	*rkey = (*mr)->rkey;
	return 0;
}

bool kmig_rdma_hole_begin(struct kmig_rdma *rdma, uint32_t region, uint64_t page)
{
	pthread_rwlock_rdlock(&rdma->lock);
	return kmig_bit(rdma->lent[region], page / rdma->window_pages);
}

void kmig_rdma_hole_end(struct kmig_rdma *rdma)
{
	pthread_rwlock_unlock(&rdma->lock);
}

/* ---- The end ---- */

static void close_device(struct kmig_rdma *rdma, struct device *device)
{
	for (unsigned int r = 0; r < rdma->chunks->count; r++) {
		for (uint64_t i = 0; device->mr[r] && i < windows(rdma, r); i++)
			if (device->mr[r][i])
				ibv_dereg_mr(device->mr[r][i]);
		free(device->mr[r]);
	}
	if (device->pd)
		ibv_dealloc_pd(device->pd);
}

void kmig_rdma_close(struct kmig_rdma *rdma)
{
	if (!rdma)
		return;
	for (unsigned int i = 0; i < rdma->channels; i++)
		kmig_rdma_disconnect(rdma, i);
	/* Nobody has a device yet when no window was chosen. */
	for (unsigned int i = 0; i < DEVICES_MAX && rdma->window_pages; i++)
		close_device(rdma, &rdma->devices[i]);
	if (rdma->listener)
		rdma_destroy_id(rdma->listener);
	if (rdma->events)
		rdma_destroy_event_channel(rdma->events);
	for (unsigned int r = 0; r < rdma->chunks->count; r++)
		free(rdma->lent[r]);
	pthread_rwlock_destroy(&rdma->lock);
	free(rdma);
}
