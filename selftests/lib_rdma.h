/* SPDX-License-Identifier: GPL-2.0 */
/*
 * lib/rdma.h without a device, in place of lib/rdma.c: a connection is a pair of sockets over which
 * frames come as packets, and a window is lent by saying so. A window has one chunk.
 */
#ifndef LIB_RDMA_H
#define LIB_RDMA_H

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../lib/rdma.h"
#include "../lib/wire.h"

#define FAKE_FRAME_BYTES (sizeof(struct lmtrack_wire_frame) + LMTRACK_WIRE_EXTENTS_MAX * sizeof(struct lmtrack_wire_extent))
#define FAKE_WINDOWS 64

static struct {
	bool there;			/* or listening fails */
	uint64_t channels;		/* a bit for each that connects at once */
	uint64_t scarce;		/* the window with this first page, if not 0, cannot be registered */
	void (*on_connect)(unsigned int channel, int fd);	/* takes the other end over */
	unsigned int listened, lent, closed;	/* so many times */
} fake_rdma;

struct kmig_rdma_conn {
	int fd;
	uint64_t bytes[FAKE_FRAME_BYTES / 8];
};

struct kmig_rdma {
	const struct kmig_chunks *chunks;
	unsigned int channels;
	struct kmig_rdma_conn *conn[LMTRACK_CHANNELS_MAX];
	pthread_rwlock_t lock;
	bool lent[LMTRACK_REGIONS_MAX][FAKE_WINDOWS];
};

static void fake_rdma_connect(struct kmig_rdma *rdma, unsigned int channel)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		abort();
	rdma->conn[channel] = calloc(1, sizeof(*rdma->conn[channel]));
	rdma->conn[channel]->fd = pair[1];
	fake_rdma.on_connect(channel, pair[0]);
}

int kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
		     uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
		     struct kmig_rdma **out, char why[KMIG_ERROR_MAX])
{
	struct kmig_rdma *rdma;

	(void)ctx, (void)session, (void)stream, (void)control, (void)window_bytes;
	fake_rdma.listened++;
	snprintf(why, KMIG_ERROR_MAX, "there is none");
	if (!fake_rdma.there)
		return -ENODEV;
	rdma = calloc(1, sizeof(*rdma));
	rdma->chunks = chunks;
	rdma->channels = channels;
	pthread_rwlock_init(&rdma->lock, NULL);
	for (unsigned int i = 0; i < channels; i++)
		if (fake_rdma.channels >> i & 1)
			fake_rdma_connect(rdma, i);
	*out = rdma;
	return 0;
}

uint16_t kmig_rdma_port(const struct kmig_rdma *rdma)
{
	(void)rdma;
	return 7;
}

uint32_t kmig_rdma_window_pages(const struct kmig_rdma *rdma)
{
	(void)rdma;
	return LMTRACK_CHUNK_PAGES;
}

int kmig_rdma_fd(const struct kmig_rdma *rdma)
{
	(void)rdma;
	return -1;
}

void kmig_rdma_step(struct kmig_rdma *rdma)
{
	(void)rdma;
}

void kmig_rdma_close_door(struct kmig_rdma *rdma)
{
	(void)rdma;
}

bool kmig_rdma_connected(const struct kmig_rdma *rdma, uint32_t channel)
{
	return rdma->conn[channel];
}

struct kmig_rdma_conn *kmig_rdma_conn(struct kmig_rdma *rdma, uint32_t channel)
{
	return rdma->conn[channel];
}

int kmig_rdma_window(struct kmig_rdma *rdma, uint32_t channel, uint32_t region, uint64_t first,
		     uint64_t *address, uint32_t *rkey)
{
	if (channel >= rdma->channels || !rdma->conn[channel] || region >= rdma->chunks->count ||
	    first % LMTRACK_CHUNK_PAGES || first >= kmig_region_pages(rdma->chunks->regions[region]))
		return -ENOENT;
	if (first && first == fake_rdma.scarce)
		return -ENOMEM;
	pthread_rwlock_wrlock(&rdma->lock);
	rdma->lent[region][first / LMTRACK_CHUNK_PAGES] = true;
	pthread_rwlock_unlock(&rdma->lock);
	fake_rdma.lent++;
	*address = (uintptr_t)rdma->chunks->regions[region]->map + first * rdma->chunks->regions[region]->page_size;
	*rkey = 0x1000 + first / LMTRACK_CHUNK_PAGES;
	return 0;
}

bool kmig_rdma_hole_begin(struct kmig_rdma *rdma, uint32_t region, uint64_t page)
{
	pthread_rwlock_rdlock(&rdma->lock);
	return rdma->lent[region][page / LMTRACK_CHUNK_PAGES];
}

void kmig_rdma_hole_end(struct kmig_rdma *rdma)
{
	pthread_rwlock_unlock(&rdma->lock);
}

int kmig_rdma_next(struct kmig_rdma_conn *conn, void **bytes, size_t *length)
{
	ssize_t n = recv(conn->fd, conn->bytes, sizeof(conn->bytes), 0);

	if (n <= 0)
		return -ECONNRESET;
	*bytes = conn->bytes;
	*length = n;
	return 0;
}

int kmig_rdma_release(struct kmig_rdma_conn *conn, void *bytes)
{
	(void)conn, (void)bytes;
	return 0;
}

void kmig_rdma_stop(struct kmig_rdma_conn *conn)
{
	shutdown(conn->fd, SHUT_RDWR);
}

void kmig_rdma_disconnect(struct kmig_rdma *rdma, uint32_t channel)
{
	struct kmig_rdma_conn *conn = rdma->conn[channel];

	rdma->conn[channel] = NULL;
	if (conn)
		close(conn->fd);
	free(conn);
}

void kmig_rdma_close(struct kmig_rdma *rdma)
{
	if (!rdma)
		return;
	for (unsigned int i = 0; i < rdma->channels; i++)
		kmig_rdma_disconnect(rdma, i);
	pthread_rwlock_destroy(&rdma->lock);
	free(rdma);
	fake_rdma.closed++;
}

#endif /* LIB_RDMA_H */
