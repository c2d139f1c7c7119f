/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The destination's RDMA: connections of data channels, and windows of guest memory for them. */
#ifndef KMIG_RDMA_H
#define KMIG_RDMA_H

#include "auth.h"
#include "digest.h"
#include "private.h"

struct kmig_rdma;
struct kmig_rdma_conn;

/*
 * Listen where @control, the control connection, has come in. The regions of @chunks are mapped.
 * @window_bytes: length of a window, 0: as the device's limits have it. What is wrong is put into
 * @why, as it may be no failure.
 */
int kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
		     uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
		     struct kmig_rdma **rdma, char why[KMIG_ERROR_MAX]);
uint16_t kmig_rdma_port(const struct kmig_rdma *rdma);
uint32_t kmig_rdma_window_pages(const struct kmig_rdma *rdma);

/*
 * Who asks for a connection is let in or turned away, and a connection that is over is told to its
 * thread. When kmig_rdma_fd() is readable, by the engine's thread; never waits.
 */
int kmig_rdma_fd(const struct kmig_rdma *rdma);
void kmig_rdma_step(struct kmig_rdma *rdma);
/* All have come who were to come: nobody else is let in. */
void kmig_rdma_close_door(struct kmig_rdma *rdma);
/* Whether a channel has connected; and its connection, which stays @rdma's. */
bool kmig_rdma_connected(const struct kmig_rdma *rdma, uint32_t channel);
struct kmig_rdma_conn *kmig_rdma_conn(struct kmig_rdma *rdma, uint32_t channel);

/*
 * Lend a window to a channel, the same again if it is asked for again. ENOENT: no such channel,
 * region or window. By the engine's thread.
 */
int kmig_rdma_window(struct kmig_rdma *rdma, uint32_t channel, uint32_t region, uint64_t first,
		     uint64_t *address, uint32_t *rkey);
/*
 * A page that is lent must not be punched out, or the source would go on writing to what is no
 * part of the region any more. Is this one's chunk? It stays so until kmig_rdma_hole_end(). By any
 * thread.
 */
bool kmig_rdma_hole_begin(struct kmig_rdma *rdma, uint32_t region, uint64_t page);
void kmig_rdma_hole_end(struct kmig_rdma *rdma);
/* Does the page lie in a window that is lent? By any thread. */
static inline bool kmig_rdma_lent(struct kmig_rdma *rdma, uint32_t region, uint64_t page)
{
	bool lent = kmig_rdma_hole_begin(rdma, region, page);

	kmig_rdma_hole_end(rdma);
	return lent;
}

/*
 * The next message, waited for; it stays until kmig_rdma_release(). Negative errno: the connection
 * is over, or was stopped. By one thread.
 */
int kmig_rdma_next(struct kmig_rdma_conn *conn, void **bytes, size_t *length);
int kmig_rdma_release(struct kmig_rdma_conn *conn, void *bytes);
/* From any thread: kmig_rdma_next() ends, also if the source keeps on sending. */
void kmig_rdma_stop(struct kmig_rdma_conn *conn);
/*
 * By the engine's thread, no other uses it: nothing is written by the source any more, on this
 * connection or another for the channel.
 */
void kmig_rdma_disconnect(struct kmig_rdma *rdma, uint32_t channel);

/* Every key is void on return, and the memory is nobody's but ours. */
void kmig_rdma_close(struct kmig_rdma *rdma);

#endif /* KMIG_RDMA_H */
