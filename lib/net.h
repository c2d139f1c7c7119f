/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sockets: every wait has a deadline and ends when the abort descriptor is readable. */
#ifndef KMIG_NET_H
#define KMIG_NET_H

#include <net/if.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include <kmig.h>

/*
 * Wait for @events on @fd: 0, -ETIMEDOUT after @deadline_ns, -ECANCELED when @abort_fd (-1:
 * none) is readable.
 */
int kmig_net_wait(int fd, short events, uint64_t deadline_ns, int abort_fd);

/* What the network shall see on what is sent, from the first packet on. -1: as the system does. */
struct kmig_net_mark {
	int dscp;
	int priority;
};
#define KMIG_NET_DSCP_MAX 63
#define KMIG_NET_PRIORITY_MAX 6	/* more takes privilege */

/* Returns a connected, non-blocking socket. @mark: NULL for none */
int kmig_net_connect(struct kmig_ctx *ctx, const char *host, uint16_t port, uint32_t timeout_ms, int abort_fd,
		     const struct kmig_net_mark *mark);

/* From where to where; AF_UNSPEC, "": as the routes say. */
struct kmig_net_path {
	struct sockaddr_storage local, remote;
	char device[IFNAMSIZ];
};

int kmig_net_path(struct kmig_ctx *ctx, const struct kmig_path *given, struct kmig_net_path *path);
/* What it leaves open is as of @connected. */
int kmig_net_path_complete(struct kmig_net_path *path, int connected);
#define KMIG_NET_PATH_TEXT 160
void kmig_net_path_text(const struct kmig_net_path *path, char text[KMIG_NET_PATH_TEXT]);
/* Begin to connect: POLLOUT tells when it is done, or has failed. */
int kmig_net_begin(const struct kmig_net_path *path, uint32_t timeout_ms, const struct kmig_net_mark *mark);
/* Take the positive errno that waits in the socket, 0 if none does. */
int kmig_net_error(int fd);
int kmig_net_listen(struct kmig_ctx *ctx, const char *host, uint16_t port);

int kmig_net_send(int fd, const void *data, size_t length, uint64_t deadline_ns, int abort_fd);
/*
 * A few bytes on a connection that is new: its buffer has room for them, whatever the peer does. Where
 * the host itself is short of memory, a moment is waited for it.
 */
int kmig_net_send_first(int fd, const void *data, size_t length);
int kmig_net_recv(int fd, void *data, size_t length, uint64_t deadline_ns, int abort_fd);

struct iovec;

/* So many bytes of the vector were moved: what is left of it. */
void kmig_iov_advance(struct iovec **vec, unsigned int *count, size_t bytes);

/* No Nagle; a peer that acknowledges nothing for @timeout_ms ends the connection. */
void kmig_net_tune(int fd, uint32_t timeout_ms);

/*
 * Let no more than so many bytes wait in the socket. What waits there was taken from the guest,
 * which goes on writing: the later it is taken, the less is sent in vain.
 */
void kmig_net_queue_at_most(int fd, uint64_t bytes);
int kmig_net_set_blocking(int fd, int blocking);

#endif /* KMIG_NET_H */
