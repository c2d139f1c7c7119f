// SPDX-License-Identifier: LGPL-2.1-or-later
/* The control connection once both sides have proven themselves. */
#include "control.h"
#include "net.h"

#include <poll.h>

#define HEADER sizeof(struct lmtrack_wire_message)
/* Within the time after which silence counts as death, so many signs of life. */
#define SIGNS_OF_LIFE 4
/* The peer's time-out may be shorter than ours, and is not known here. */
#define SIGN_OF_LIFE_MS 1000
#define ABORT_WAIT_MS 500
#define LAST_WORDS_MS 300

/* Bulk is not worth a MAC: guest memory, which is most of it, has none either. */
static size_t sealed_bytes(uint16_t type, size_t length)
{
	return type == LMTRACK_MSG_STATE ? 0 : length;
}

/* With @send_lock held. */
static int send_locked(struct kmig_control *control, uint16_t type, const void *body, size_t length,
		       uint64_t deadline_ns)
{
	struct lmtrack_wire_message header;
	int err;

	if (control->broken)
		return -EPIPE;
	kmig_message_encode(type, body, length, &header);
	err = kmig_auth_seal(control->send_key, control->sent, &header, body, sealed_bytes(type, length), header.mac);
	if (err)
		return err;
	err = kmig_net_send(control->fd, &header, sizeof(header), deadline_ns, control->abort_fd);
	if (!err && length)
		err = kmig_net_send(control->fd, body, length, deadline_ns, control->abort_fd);
	if (err)
		control->broken = true;
	else
		control->sent++;
	return err;
}

static void *keepalive(void *data)
{
	struct kmig_control *control = data;
	uint32_t interval_ms = control->timeout_ms / SIGNS_OF_LIFE;
	uint64_t interval = kmig_ms(interval_ms < SIGN_OF_LIFE_MS ? interval_ms : SIGN_OF_LIFE_MS);

	pthread_mutex_lock(&control->stop_lock);
	while (!control->stop) {
		uint64_t next = kmig_now_ns() + interval;
		struct timespec at = { .tv_sec = next / 1000000000, .tv_nsec = next % 1000000000 };
		struct pollfd room = { .fd = control->fd, .events = POLLOUT };

		pthread_cond_timedwait(&control->stop_cond, &control->stop_lock, &at);
		if (control->stop)
			break;
		/* Who holds the lock is sending: a sign of life. Where there is no room, the peer has some to read. */
		if (pthread_mutex_trylock(&control->send_lock))
			continue;
		if (poll(&room, 1, 0) == 1 && (room.revents & POLLOUT))
			send_locked(control, LMTRACK_MSG_KEEPALIVE, NULL, 0, kmig_now_ns() + interval);
		pthread_mutex_unlock(&control->send_lock);
	}
	pthread_mutex_unlock(&control->stop_lock);
	return NULL;
}

int kmig_control_open(struct kmig_control *control, struct kmig_ctx *ctx, const char *peer, int fd,
		      int abort_fd, uint32_t timeout_ms, const uint8_t *send_key, const uint8_t *recv_key)
{
	pthread_condattr_t attr;

	*control = (struct kmig_control){
		.ctx = ctx,
		.peer = peer,
		.fd = fd,
		.abort_fd = abort_fd,
		.timeout_ms = timeout_ms,
		.heard_ns = kmig_now_ns(),
	};
	memcpy(control->send_key, send_key, KMIG_KEY_SIZE);
	memcpy(control->recv_key, recv_key, KMIG_KEY_SIZE);
	pthread_mutex_init(&control->send_lock, NULL);
	pthread_mutex_init(&control->stop_lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&control->stop_cond, &attr);
	pthread_condattr_destroy(&attr);

	control->body = malloc(LMTRACK_WIRE_BODY_MAX);
	if (control->body)
		control->keepalive_runs = !kmig_thread_start(&control->keepalive, keepalive, control);
	if (!control->keepalive_runs) {
		kmig_control_close(control);
		return kmig_fail(ctx, -ENOMEM, "control connection: out of memory or threads");
	}
	return 0;
}

/* Closing while there is something unread would reset the connection, and lose our last words. */
static void await_hangup(int fd)
{
	uint64_t deadline = kmig_now_ns() + kmig_ms(LAST_WORDS_MS);
	char scrap[4096];
	ssize_t n;

	shutdown(fd, SHUT_WR);
	do {
		n = recv(fd, scrap, sizeof(scrap), MSG_DONTWAIT);
	} while ((n > 0 || (n < 0 && errno == EAGAIN)) && !kmig_net_wait(fd, POLLIN, deadline, -1));
}

void kmig_control_close(struct kmig_control *control)
{
	if (control->fd < 0)
		return;
	if (control->keepalive_runs) {
		pthread_mutex_lock(&control->stop_lock);
		control->stop = true;
		pthread_cond_signal(&control->stop_cond);
		pthread_mutex_unlock(&control->stop_lock);
		pthread_join(control->keepalive, NULL);
	}
	if (control->aborted)
		await_hangup(control->fd);
	close(control->fd);
	control->fd = -1;
	free(control->body);
	kmig_auth_forget(control->send_key, sizeof(control->send_key));
	kmig_auth_forget(control->recv_key, sizeof(control->recv_key));
	pthread_cond_destroy(&control->stop_cond);
	pthread_mutex_destroy(&control->stop_lock);
	pthread_mutex_destroy(&control->send_lock);
}

int kmig_control_send(struct kmig_control *control, uint16_t type, const void *body, size_t length)
{
	int err;

	pthread_mutex_lock(&control->send_lock);
	err = send_locked(control, type, body, length, kmig_now_ns() + kmig_ms(control->timeout_ms));
	pthread_mutex_unlock(&control->send_lock);
	if (err == -ECANCELED)
		return kmig_fail(control->ctx, err, "aborted");
	if (err)
		return kmig_fail(control->ctx, err, "sending %s to the %s: %s", kmig_message_name(type), control->peer,
				 strerror(-err));
	return 0;
}

void kmig_control_send_abort(struct kmig_control *control, int err, uint32_t flags, const char *text)
{
	uint8_t body[sizeof(struct lmtrack_wire_abort) + LMTRACK_ABORT_TEXT_MAX];
	struct lmtrack_wire_abort abort = { .error = htole32(-err), .flags = htole32(flags) };
	size_t length = strnlen(text, LMTRACK_ABORT_TEXT_MAX);
	uint64_t deadline = kmig_now_ns() + kmig_ms(ABORT_WAIT_MS);
	struct timespec limit = { .tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000 };

	if (control->fd < 0)
		return;
	memcpy(body, &abort, sizeof(abort));
	memcpy(body + sizeof(abort), text, length);
	/* Whoever holds it may be stuck half-way in a message: then there are no last words. */
	if (pthread_mutex_clocklock(&control->send_lock, CLOCK_MONOTONIC, &limit))
		return;
	/* An abort is often why we are here: it must not keep this last word from leaving. */
	control->abort_fd = -1;
	control->aborted = true;
	send_locked(control, LMTRACK_MSG_ABORT, body, sizeof(abort) + length, deadline);
	pthread_mutex_unlock(&control->send_lock);
}

static int peer_abort(struct kmig_control *control, const struct lmtrack_wire_abort *abort, size_t length)
{
	uint32_t err = le32toh(abort->error);
	char text[LMTRACK_ABORT_TEXT_MAX + 1];
	size_t n = length - sizeof(*abort);

	/* It goes to a terminal or a log: nothing but printable ASCII. */
	for (size_t i = 0; i < n; i++)
		text[i] = abort->text[i] >= ' ' && abort->text[i] < 127 ? abort->text[i] : '?';
	text[n] = '\0';
	control->peer_aborted = true;
	control->abort_flags = le32toh(abort->flags);
	/* EINPROGRESS is how we say that the outcome is unknown: no peer decides that. */
	if (!err || err > 4095 || err == EINPROGRESS)
		err = EPROTO;
	return kmig_fail(control->ctx, -(int)err, "the %s gave up: %s", control->peer, text);
}

/* A message is there whole: may it be believed? */
static int check_message(struct kmig_control *control)
{
	uint16_t type = le16toh(control->header.type);
	uint32_t length = le32toh(control->header.length);
	uint8_t seal[KMIG_SEAL_SIZE];
	const char *why;
	int err;

	err = kmig_message_check_body(&control->header, control->body, &why);
	if (err)
		return kmig_fail(control->ctx, err, "message %s from the %s: %s", kmig_message_name(type), control->peer, why);
	err = kmig_auth_seal(control->recv_key, control->received, &control->header, control->body,
			     sealed_bytes(type, length), seal);
	if (err)
		return kmig_fail(control->ctx, err, "message %s from the %s: its seal could not be computed here: %s",
				 kmig_message_name(type), control->peer, strerror(-err));
	if (!kmig_auth_equal(seal, control->header.mac, sizeof(seal)))
		return kmig_fail(control->ctx, -EBADMSG, "message %s from the %s: it is not sealed with the session's key",
				 kmig_message_name(type), control->peer);
	control->received++;
	return 0;
}

/* Read on: 1 when a message is there whole. */
static int read_message(struct kmig_control *control)
{
	const char *why;
	int err;

	for (;;) {
		size_t want = HEADER;
		uint8_t *to = (uint8_t *)&control->header + control->have;
		ssize_t n;

		if (control->have >= HEADER) {
			want += le32toh(control->header.length);
			to = control->body + (control->have - HEADER);
		}
		if (control->have == want)
			return 1;
		n = recv(control->fd, to, want - control->have, MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n <= 0) {
			err = n ? -errno : -ECONNRESET;
			return kmig_fail(control->ctx, err, "the %s closed the connection (%s): it failed or was ended; see its messages",
					 control->peer, strerror(-err));
		}
		control->have += n;
		control->heard_ns = kmig_now_ns();
		if (control->have != HEADER)
			continue;
		err = kmig_message_check(&control->header, &why);
		if (err)
			return kmig_fail(control->ctx, err, "message from the %s: %s", control->peer, why);
	}
}

int kmig_control_next(struct kmig_control *control, struct kmig_message *message)
{
	int n = read_message(control);

	if (n <= 0)
		return n;
	control->have = 0;
	n = check_message(control);
	if (n)
		return n;
	*message = (struct kmig_message){
		.type = le16toh(control->header.type),
		.length = le32toh(control->header.length),
		.body = control->body,
	};
	if (message->type == LMTRACK_MSG_ABORT)
		return peer_abort(control, message->body, message->length);
	/* Not the next one instead: who sends nothing else would keep us here. */
	return message->type != LMTRACK_MSG_KEEPALIVE;
}

int kmig_control_check_silence(struct kmig_control *control)
{
	if (kmig_now_ns() - control->heard_ns < kmig_ms(control->timeout_ms))
		return 0;
	return kmig_fail(control->ctx, -ETIMEDOUT, "the %s has been silent for %u ms: it hangs, or the network between is down",
			 control->peer, control->timeout_ms);
}

int kmig_control_check_abort(struct kmig_control *control)
{
	struct pollfd abort = { .fd = control->abort_fd, .events = POLLIN };

	return poll(&abort, 1, 0) == 1 ? kmig_fail(control->ctx, -ECANCELED, "aborted") : 0;
}

int kmig_control_last_words(struct kmig_control *control, int err)
{
	uint64_t deadline = kmig_now_ns() + kmig_ms(LAST_WORDS_MS);
	char text[KMIG_ERROR_MAX];
	struct kmig_message message;

	if (control->fd < 0 || control->peer_aborted ||
	    (err != -ECONNRESET && err != -EPIPE && err != -ECONNREFUSED && err != -ENOTCONN))
		return err;
	kmig_copy_error(control->ctx, text);
	/* The wait looks at the deadline before all else, however much there is to read. */
	do {
		int n = kmig_control_next(control, &message);

		if (control->peer_aborted)
			return n;
		if (n < 0)
			break;
	} while (!kmig_net_wait(control->fd, POLLIN, deadline, -1));
	kmig_restore_error(control->ctx, text);
	return err;
}

int kmig_control_unexpected(struct kmig_control *control, const struct kmig_message *message)
{
	return kmig_fail(control->ctx, -EPROTO, "the %s sent %s, which has no place here", control->peer,
			 kmig_message_name(message->type));
}

int kmig_control_expect_until(struct kmig_control *control, uint16_t type, uint64_t deadline_ns,
			      struct kmig_message *message)
{
	for (;;) {
		int n = kmig_control_next(control, message);
		uint64_t silence = control->heard_ns + kmig_ms(control->timeout_ms);

		if (n < 0)
			return n;
		if (n > 0)
			return message->type == type ? 0 : kmig_control_unexpected(control, message);
		n = kmig_net_wait(control->fd, POLLIN, silence < deadline_ns ? silence : deadline_ns, control->abort_fd);
		if (n == -ECANCELED)
			return kmig_fail(control->ctx, n, "aborted");
		if (n == -ETIMEDOUT)
			return kmig_control_check_silence(control) ?:
			       kmig_fail(control->ctx, n, "the %s lives, but did not say %s in time", control->peer,
					 kmig_message_name(type));
		if (n)
			return kmig_fail(control->ctx, n, "waiting for the %s: %s", control->peer, strerror(-n));
	}
}

int kmig_control_expect(struct kmig_control *control, uint16_t type, struct kmig_message *message)
{
	return kmig_control_expect_until(control, type, UINT64_MAX, message);
}
