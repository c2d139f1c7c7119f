// SPDX-License-Identifier: GPL-2.0
/*
 * A client of QEMU's machine protocol (QMP) over a unix socket.
 *
 * One command at a time. Events that arrive meanwhile are queued, the newest EVENTS_MAX of
 * them. What the other side sends is bounded in size and depth, and must be JSON objects;
 * anything else ends the connection for good (q->broken).
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <json-c/json.h>

#include "tool.h"

#define MESSAGE_MAX (4u << 20)
#define DEPTH_MAX 32
#define EVENTS_MAX 256

struct qmp {
	int fd;
	int timeout_ms;
	bool deaf;			/* to interrupts */
	int broken;			/* the errno that ended the connection */
	struct json_tokener *tokener;
	size_t partial;			/* bytes of the message that the tokener holds */
	struct json_object *events;	/* array, oldest first */
	struct json_object *greeting;
	struct json_object *reply;	/* to command number @id */
	int64_t id;
};

static int broken(struct qmp *q, int err, const char *what)
{
	q->broken = err;
	return fail(err, "QMP: %s", what);
}

static struct json_object *member(struct json_object *object, const char *key, enum json_type type)
{
	struct json_object *value;

	if (!json_object_object_get_ex(object, key, &value) || !json_object_is_type(value, type))
		return NULL;
	return value;
}

static bool answers(const struct qmp *q, struct json_object *message)
{
	struct json_object *id = member(message, "id", json_type_int);
	bool has_error = json_object_object_get_ex(message, "error", NULL);

	if (!has_error && !json_object_object_get_ex(message, "return", NULL))
		return false;
	/* An error without id: QEMU could not even read the command. */
	return id ? json_object_get_int64(id) == q->id :
		    has_error && !json_object_object_get_ex(message, "id", NULL);
}

/* Takes @message. */
static void dispatch(struct qmp *q, struct json_object *message)
{
	if (member(message, "event", json_type_string)) {
		if (json_object_array_length(q->events) == EVENTS_MAX)
			json_object_array_del_idx(q->events, 0, 1);
		json_object_array_add(q->events, message);
	} else if (!q->greeting && member(message, "QMP", json_type_object)) {
		q->greeting = message;
	} else if (!q->reply && answers(q, message)) {
		q->reply = message;
	} else {
		/* The answer to a command that was given up. */
		json_object_put(message);
	}
}

static int feed(struct qmp *q, const char *data, size_t length)
{
	struct json_object *message;
	size_t used;

	/* json-c takes a NUL for the end of its input. */
	if (memchr(data, '\0', length))
		return broken(q, EPROTO, "NUL byte received");
	while (length) {
		if (!q->partial) {
			used = 0;
			while (used < length && strchr(" \t\r\n", data[used]))
				used++;
			data += used;
			length -= used;
			if (!length)
				break;
			if (*data != '{')
				return broken(q, EPROTO, "what answers is not a QMP server");
		}
		message = json_tokener_parse_ex(q->tokener, data, (int)length);
		used = json_tokener_get_parse_end(q->tokener);
		if (message) {
			data += used;
			length -= used;
			q->partial = 0;
			json_tokener_reset(q->tokener);
			dispatch(q, message);
			continue;
		}
		if (json_tokener_get_error(q->tokener) != json_tokener_continue)
			return broken(q, EPROTO, "malformed message received");
		q->partial += used;
		if (q->partial > MESSAGE_MAX)
			return broken(q, EMSGSIZE, "message too large");
		break;
	}
	return 0;
}

int qmp_pump(struct qmp *q)
{
	char buffer[16384];
	ssize_t n;
	int ret;

	if (q->broken)
		return -q->broken;
	for (;;) {
		n = recv(q->fd, buffer, sizeof(buffer), MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return 0;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return broken(q, errno, strerror(errno));
		if (n == 0)
			return broken(q, ECONNRESET, "QEMU closed the connection");
		ret = feed(q, buffer, (size_t)n);
		if (ret)
			return ret;
	}
}

int qmp_wait(struct qmp *q, int64_t deadline)
{
	struct pollfd p = { .fd = q->fd, .events = POLLIN };
	int64_t left;
	int n;

	if (q->broken)
		return -q->broken;
	if (interrupted && !q->deaf)
		return fail(ECANCELED, "interrupted");
	left = deadline - now_ms();
	if (left <= 0)
		return fail(ETIMEDOUT, "QMP: no answer from QEMU in time");
	n = poll(&p, 1, left > 100 ? 100 : (int)left);
	if (n < 0 && errno != EINTR)
		return fail(errno, "poll: %s", strerror(errno));
	return n > 0 ? qmp_pump(q) : 0;
}

static void put_fd(struct msghdr *msg, char *control, size_t size, int fd)
{
	struct cmsghdr *c;

	msg->msg_control = control;
	msg->msg_controllen = size;
	c = CMSG_FIRSTHDR(msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
}

static int transmit(struct qmp *q, const char *text, size_t length, int send_fd, int64_t deadline)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct pollfd p = { .fd = q->fd, .events = POLLOUT };

	while (length) {
		struct iovec iov = { .iov_base = (char *)text, .iov_len = length };
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
		ssize_t n;

		if (send_fd >= 0)
			put_fd(&msg, control, sizeof(control), send_fd);
		n = sendmsg(q->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n > 0) {
			text += n;
			length -= (size_t)n;
			send_fd = -1;
			continue;
		}
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return broken(q, errno, strerror(errno));
		/* Half a command cannot be taken back: no stop here for an interrupt. */
		if (now_ms() >= deadline)
			return broken(q, ETIMEDOUT, "QEMU takes no commands");
		poll(&p, 1, 100);
	}
	return 0;
}

static int refused(const char *command, struct json_object *error)
{
	struct json_object *text = member(error, "desc", json_type_string);

	return fail(EREMOTEIO, "QEMU refused '%s': %s", command,
		    text ? json_object_get_string(text) : "no reason given");
}

int qmp_execute(struct qmp *q, const char *command, struct json_object *args, int send_fd,
		struct json_object **ret)
{
	struct json_object *request = json_object_new_object(), *value;
	int64_t deadline = now_ms() + q->timeout_ms;
	const char *text;
	size_t length;
	int err;

	if (ret)
		*ret = NULL;
	json_object_put(q->reply);
	q->reply = NULL;
	json_object_object_add(request, "execute", json_object_new_string(command));
	if (args)
		json_object_object_add(request, "arguments", args);
	json_object_object_add(request, "id", json_object_new_int64(++q->id));
	text = json_object_to_json_string_length(request, JSON_C_TO_STRING_PLAIN, &length);
	if (q->broken)
		err = -q->broken;
	else
		err = transmit(q, text, length, send_fd, deadline);
	json_object_put(request);
	while (!err && !q->reply)
		err = qmp_wait(q, deadline);
	if (err)
		return err;
	if (json_object_object_get_ex(q->reply, "error", &value))
		return refused(command, value);
	if (ret && json_object_object_get_ex(q->reply, "return", &value))
		*ret = json_object_get(value);
	return 0;
}

int qmp_run(struct qmp *q, const char *command, struct json_object *args)
{
	return qmp_execute(q, command, args, -1, NULL);
}

int qmp_getfd(struct qmp *q, const char *name, int fd)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "fdname", json_object_new_string(name));
	return qmp_execute(q, "getfd", args, fd, NULL);
}

struct json_object *qmp_next_event(struct qmp *q)
{
	struct json_object *event;

	if (!json_object_array_length(q->events))
		return NULL;
	event = json_object_get(json_object_array_get_idx(q->events, 0));
	json_object_array_del_idx(q->events, 0, 1);
	return event;
}

void qmp_forget_events(struct qmp *q)
{
	size_t n = json_object_array_length(q->events);

	if (n)
		json_object_array_del_idx(q->events, 0, n);
}

int qmp_fd(const struct qmp *q)
{
	return q->fd;
}

pid_t qmp_peer(const struct qmp *q)
{
	struct ucred cred;
	socklen_t length = sizeof(cred);

	if (getsockopt(q->fd, SOL_SOCKET, SO_PEERCRED, &cred, &length))
		return 0;
	return cred.pid;
}

void qmp_set_timeout(struct qmp *q, int timeout_ms)
{
	q->timeout_ms = timeout_ms;
}

void qmp_ignore_interrupt(struct qmp *q)
{
	q->deaf = true;
}

void qmp_close(struct qmp *q)
{
	if (!q)
		return;
	close(q->fd);
	if (q->tokener)
		json_tokener_free(q->tokener);
	json_object_put(q->events);
	json_object_put(q->greeting);
	json_object_put(q->reply);
	free(q);
}

static int greet(struct qmp *q)
{
	int64_t deadline = now_ms() + q->timeout_ms;
	int ret = 0;

	while (!ret && !q->greeting)
		ret = qmp_wait(q, deadline);
	if (ret == -ETIMEDOUT) {
		failure_clear();
		fail(ETIMEDOUT, "QMP: QEMU sends no greeting: is another client connected?");
	}
	return ret ? ret : qmp_run(q, "qmp_capabilities", NULL);
}

int qmp_attach(int fd, int timeout_ms, struct qmp **qmp)
{
	struct qmp *q = calloc(1, sizeof(*q));
	int ret;

	if (!q)
		abort();
	q->fd = fd;
	q->timeout_ms = timeout_ms;
	q->tokener = json_tokener_new_ex(DEPTH_MAX);
	q->events = json_object_new_array();
	if (!q->tokener || !q->events)
		abort();
	json_tokener_set_flags(q->tokener, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS);
	ret = greet(q);
	if (ret)
		qmp_close(q);
	else
		*qmp = q;
	return ret;
}

int qmp_connect(const char *path, int timeout_ms, struct qmp **qmp)
{
	struct timeval limit = { timeout_ms / 1000, timeout_ms % 1000 * 1000 };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd, err;

	if (strlen(path) >= sizeof(address.sun_path))
		return fail(ENAMETOOLONG, "%s: longer than the path of a socket can be", path);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fail(errno, "socket: %s", strerror(errno));
	/* QEMU takes one client at a time; where too many wait for their turn, connect() waits, too. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		err = errno;
		close(fd);
		if (err == EINTR && interrupted)
			return fail(ECANCELED, "interrupted");
		if (err == EAGAIN)
			return fail(ETIMEDOUT, "%s: QEMU takes one client at a time, and other clients wait already", path);
		return fail(err, "%s: %s", path, err == ECONNREFUSED ? "no QEMU listens there" : strerror(err));
	}
	return qmp_attach(fd, timeout_ms, qmp);
}
