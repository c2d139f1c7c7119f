// SPDX-License-Identifier: LGPL-2.1-or-later
/* Sockets: every wait has a deadline and ends when the abort descriptor is readable. */
#include "net.h"
#include "private.h"

#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/uio.h>

#define LISTEN_BACKLOG 128
#define FIRST_WORDS_MS 100

int kmig_net_wait(int fd, short events, uint64_t deadline_ns, int abort_fd)
{
	for (;;) {
		struct pollfd fds[2] = {
			{ .fd = fd, .events = events },
			{ .fd = abort_fd, .events = POLLIN },
		};
		uint64_t now = kmig_now_ns();
		int n;

		if (now >= deadline_ns)
			return -ETIMEDOUT;
		n = poll(fds, 2, (int)((deadline_ns - now) / 1000000) + 1);
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0 && fds[1].revents)
			return -ECANCELED;
		if (n > 0)
			return 0;
	}
}

int kmig_net_set_blocking(int fd, int blocking)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -errno;
	flags = blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK;
	return fcntl(fd, F_SETFL, flags) < 0 ? -errno : 0;
}

void kmig_iov_advance(struct iovec **vec, unsigned int *count, size_t bytes)
{
	while (*count && bytes >= (*vec)->iov_len) {
		bytes -= (*vec)->iov_len;
		++*vec;
		--*count;
	}
	if (*count) {
		(*vec)->iov_base = (uint8_t *)(*vec)->iov_base + bytes;
		(*vec)->iov_len -= bytes;
	}
}

void kmig_net_tune(int fd, uint32_t timeout_ms)
{
	int one = 1;
	unsigned int timeout = timeout_ms;

	/* Both are improvements, not conditions: a socket that refuses them still works. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout));
}

void kmig_net_queue_at_most(int fd, uint64_t bytes)
{
	unsigned int most = bytes < INT_MAX ? bytes : INT_MAX;

	/* As above. A writer is woken when half of it has left. */
	setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &most, sizeof(most));
}

static int set_mark(int fd, int family, const struct kmig_net_mark *mark)
{
	int tos, err = 0;

	if (mark && mark->dscp >= 0) {
		tos = mark->dscp << 2;	/* the rest is ECN's, which TCP keeps to itself */
		/* An IPv6 socket may turn out to speak IPv4. */
		err = setsockopt(fd, IPPROTO_IP, IP_TOS, &tos, sizeof(tos));
		if (family == AF_INET6)
			err = setsockopt(fd, IPPROTO_IPV6, IPV6_TCLASS, &tos, sizeof(tos));
	}
	/* Last: IP_TOS sets it as well. */
	if (!err && mark && mark->priority >= 0)
		err = setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &mark->priority, sizeof(mark->priority));
	return err ? -errno : 0;
}

int kmig_net_error(int fd)
{
	int err = 0;
	socklen_t length = sizeof(err);

	return getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &length) ? errno : err;
}

static socklen_t address_length(const struct sockaddr_storage *address)
{
	return address->ss_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
}

static in_port_t *address_port(struct sockaddr_storage *address)
{
	return address->ss_family == AF_INET6 ? &((struct sockaddr_in6 *)address)->sin6_port :
						&((struct sockaddr_in *)address)->sin_port;
}

/* What the resolver says; of what the system told it, it says nothing itself. */
static const char *resolver_error(int err)
{
	return err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err);
}

/* No name is looked up: that may take long, and paths are the business of who knows the hosts. */
static int numeric(struct kmig_ctx *ctx, const char *text, struct sockaddr_storage *address)
{
	struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST };
	struct addrinfo *list;
	int err;

	err = getaddrinfo(text, NULL, &hints, &list);
	if (err == EAI_MEMORY || err == EAI_SYSTEM)
		return kmig_fail(ctx, err == EAI_SYSTEM ? -errno : -ENOMEM, "path: '%s': %s", text, resolver_error(err));
	if (err)
		return kmig_fail(ctx, -EINVAL, "path: '%s' is no address", text);
	memcpy(address, list->ai_addr, list->ai_addrlen);
	freeaddrinfo(list);
	return 0;
}

int kmig_net_path(struct kmig_ctx *ctx, const struct kmig_path *given, struct kmig_net_path *path)
{
	int err = 0;

	*path = (struct kmig_net_path){ .local.ss_family = AF_UNSPEC };
	if (given->local)
		err = numeric(ctx, given->local, &path->local);
	if (!err && given->remote)
		err = numeric(ctx, given->remote, &path->remote);
	if (err)
		return err;
	if (given->local && given->remote && path->local.ss_family != path->remote.ss_family)
		return kmig_fail(ctx, -EINVAL, "path: from %s to %s no connection can be made", given->local, given->remote);
	if (given->port && !given->remote)
		return kmig_fail(ctx, -EINVAL, "path: a port, and no address that it is of");
	if (given->remote)
		*address_port(&path->remote) = htons(given->port);
	if (given->device && strlen(given->device) >= sizeof(path->device))
		return kmig_fail(ctx, -EINVAL, "path: '%s' is no network device's name", given->device);
	if (given->device)
		strcpy(path->device, given->device);
	return 0;
}

int kmig_net_path_complete(struct kmig_net_path *path, int connected)
{
	struct sockaddr_storage peer;
	socklen_t length = sizeof(peer);

	if (getpeername(connected, (struct sockaddr *)&peer, &length))
		return -errno;
	if (path->remote.ss_family == AF_UNSPEC)
		path->remote = peer;
	else if (!*address_port(&path->remote))
		*address_port(&path->remote) = *address_port(&peer);
	return 0;
}

void kmig_net_path_text(const struct kmig_net_path *path, char text[KMIG_NET_PATH_TEXT])
{
	char local[INET6_ADDRSTRLEN] = "", remote[INET6_ADDRSTRLEN] = "?";

	if (path->local.ss_family != AF_UNSPEC)
		getnameinfo((const struct sockaddr *)&path->local, address_length(&path->local), local, sizeof(local), NULL, 0,
			    NI_NUMERICHOST);
	getnameinfo((const struct sockaddr *)&path->remote, address_length(&path->remote), remote, sizeof(remote), NULL, 0,
		    NI_NUMERICHOST);
	snprintf(text, KMIG_NET_PATH_TEXT, "%s%s%s%s%s", local, *path->device ? "%" : "", path->device,
		 *local || *path->device ? " to " : "", remote);
}

int kmig_net_begin(const struct kmig_net_path *path, uint32_t timeout_ms, const struct kmig_net_mark *mark)
{
	int fd = socket(path->remote.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int err = 0;

	if (fd < 0)
		return -errno;
	err = set_mark(fd, path->remote.ss_family, mark);
	/*
	 * An address alone does not say by which device a connection leaves, where several routes lead
	 * to its end.
	 */
	if (!err && *path->device)
		err = setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, path->device, strlen(path->device));
	if (!err && path->local.ss_family != AF_UNSPEC)
		err = bind(fd, (const struct sockaddr *)&path->local, address_length(&path->local));
	if (!err && connect(fd, (const struct sockaddr *)&path->remote, address_length(&path->remote)) &&
	    errno != EINPROGRESS)
		err = -1;
	if (err == -1)
		err = -errno;
	if (err) {
		close(fd);
		return err;
	}
	kmig_net_tune(fd, timeout_ms);
	return fd;
}

static int connect_one(const struct addrinfo *address, uint64_t deadline_ns, int abort_fd,
		       const struct kmig_net_mark *mark)
{
	int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int err;
	socklen_t length = sizeof(err);

	if (fd < 0)
		return -errno;
	err = set_mark(fd, address->ai_family, mark);
	if (!err && connect(fd, address->ai_addr, address->ai_addrlen) < 0) {
		err = -errno;
		if (err == -EINPROGRESS)
			err = kmig_net_wait(fd, POLLOUT, deadline_ns, abort_fd);
		if (!err) {
			getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &length);
			err = -err;
		}
	}
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

static int resolve(struct kmig_ctx *ctx, const char *host, uint16_t port, int flags, struct addrinfo **list)
{
	struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = flags };
	char service[8];
	int err;

	snprintf(service, sizeof(service), "%u", port);
	err = getaddrinfo(host, service, &hints, list);
	if (err)
		return kmig_fail(ctx, -EHOSTUNREACH, "%s: %s", host, resolver_error(err));
	return 0;
}

int kmig_net_connect(struct kmig_ctx *ctx, const char *host, uint16_t port, uint32_t timeout_ms, int abort_fd,
		     const struct kmig_net_mark *mark)
{
	uint64_t deadline = kmig_now_ns() + kmig_ms(timeout_ms), now;
	struct addrinfo *list;
	unsigned int left = 0;
	int fd;

	fd = resolve(ctx, host, port, AI_ADDRCONFIG, &list);
	if (fd)
		return fd;
	for (struct addrinfo *one = list; one; one = one->ai_next)
		left++;
	fd = -EHOSTUNREACH;
	/* One that does not answer leaves the others their share of the time. */
	for (struct addrinfo *one = list; one && fd < 0 && fd != -ECANCELED; one = one->ai_next, left--) {
		now = kmig_now_ns();
		fd = connect_one(one, now < deadline ? now + (deadline - now) / left : deadline, abort_fd, mark);
	}
	freeaddrinfo(list);
	if (fd == -ECANCELED)
		return kmig_fail(ctx, fd, "aborted");
	if (fd < 0)
		return kmig_fail(ctx, fd, "connecting to %s port %u: %s; is 'kmig receive' running there, and reachable?",
				 host, port, strerror(-fd));
	kmig_net_tune(fd, timeout_ms);
	return fd;
}

int kmig_net_listen(struct kmig_ctx *ctx, const char *host, uint16_t port)
{
	struct addrinfo *list;
	int one = 1;
	int fd, err;

	err = resolve(ctx, host, port, AI_PASSIVE, &list);
	if (err)
		return err;
	fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0 ||
	    bind(fd, list->ai_addr, list->ai_addrlen) < 0 || listen(fd, LISTEN_BACKLOG) < 0) {
		err = kmig_fail(ctx, -errno, "listening on %s port %u: %s", host, port, strerror(errno));
		if (fd >= 0)
			close(fd);
		fd = err;
	}
	freeaddrinfo(list);
	return fd;
}

int kmig_net_send(int fd, const void *data, size_t length, uint64_t deadline_ns, int abort_fd)
{
	const uint8_t *at = data;

	while (length) {
		ssize_t n = send(fd, at, length, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n >= 0) {
			at += n;
			length -= n;
		} else if (errno == EAGAIN) {
			int err = kmig_net_wait(fd, POLLOUT, deadline_ns, abort_fd);

			if (err)
				return err;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
	return 0;
}

int kmig_net_send_first(int fd, const void *data, size_t length)
{
	return kmig_net_send(fd, data, length, kmig_now_ns() + kmig_ms(FIRST_WORDS_MS), -1);
}

int kmig_net_recv(int fd, void *data, size_t length, uint64_t deadline_ns, int abort_fd)
{
	uint8_t *at = data;

	while (length) {
		ssize_t n = recv(fd, at, length, MSG_DONTWAIT);

		if (n > 0) {
			at += n;
			length -= n;
		} else if (!n) {
			return -ECONNRESET;
		} else if (errno == EAGAIN) {
			int err = kmig_net_wait(fd, POLLIN, deadline_ns, abort_fd);

			if (err)
				return err;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
	return 0;
}
