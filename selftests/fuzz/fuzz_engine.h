/* SPDX-License-Identifier: GPL-2.0 */
/*
 * For fuzzers that run an engine on this thread, against a script: the engine's file is included,
 * and wherever it would wait for the other side, the next line of the script is carried out
 * instead. So there is no network, no device, and what comes in which state is the script's choice.
 */
#ifndef FUZZ_ENGINE_H
#define FUZZ_ENGINE_H

#include "fuzz.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "../../lib/control.h"
#include "../../lib/net.h"

#define FUZZ_SECRET "a secret of sixteen bytes and more"
#define FUZZ_TIMEOUT_MS 2000

static struct script fuzz_script;
static int fuzz_ours, fuzz_theirs;	/* ends of the control connection */
static uint64_t fuzz_sent;		/* messages to the engine */
static uint8_t fuzz_key[KMIG_KEY_SIZE];	/* that seals them */
static bool fuzz_over;			/* we have hung up */

/* LOG=1 and one input tell what an engine makes of it. */
static void fuzz_log(enum kmig_log_level level, const char *text, void *data)
{
	(void)data;
	if (getenv("LOG"))
		fprintf(stderr, "# %d: %s\n", level, text);
}

static void fuzz_connect(void)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		abort();
	fuzz_ours = pair[0];
	fuzz_theirs = pair[1];
	fuzz_sent = 0;
	fuzz_over = false;
}

/* What the engine says has no meaning here; but it must find room to say more. */
static void fuzz_drain(void)
{
	static char scrap[65536];

	while (recv(fuzz_ours, scrap, sizeof(scrap), MSG_DONTWAIT) > 0)
		;
}

static void fuzz_hang_up(void)
{
	fuzz_drain();
	if (!fuzz_over)
		shutdown(fuzz_ours, SHUT_WR);
	fuzz_over = true;
}

/* Whole and sealed: what is otherwise is fuzz_messages' affair. */
static void fuzz_send(uint16_t type, const void *body, size_t length)
{
	struct lmtrack_wire_message header;

	kmig_message_encode(type, body, length, &header);
	kmig_auth_seal(fuzz_key, fuzz_sent++, &header, body, type == LMTRACK_MSG_STATE ? 0 : length, header.mac);
	if (!fuzz_over && (send(fuzz_ours, &header, sizeof(header), MSG_NOSIGNAL) < 0 ||
			   (length && send(fuzz_ours, body, length, MSG_NOSIGNAL) < 0)))
		fuzz_hang_up();
}

/*
 * A message of the script: its type, how many bytes, and those of them that are not zero, each
 * with its place. So fields are reached, wherever they are.
 */
static void fuzz_message(void)
{
	static uint8_t body[1024];
	uint16_t type = script_number(&fuzz_script, 1) % (LMTRACK_MSG_WINDOW + 2);
	size_t length = script_number(&fuzz_script, 1) % 64 * 8;
	unsigned int bytes = script_number(&fuzz_script, 1) % 32;

	memset(body, 0, sizeof(body));
	for (unsigned int i = 0; i < bytes; i++) {
		size_t at = script_number(&fuzz_script, 1) * 2;

		at += script_number(&fuzz_script, 1) & 1;
		body[at] = script_number(&fuzz_script, 1);
	}
	fuzz_send(type, body, length);
}

/* The next line of the script; when there is none, we hang up. */
static void fuzz_line(void);

static void fuzz_next(void)
{
	fuzz_drain();
	if (script_ended(&fuzz_script))
		fuzz_hang_up();
	else
		fuzz_line();
}

/* ---- In place of what waits ---- */

static int fuzz_poll(struct pollfd *fds, nfds_t count, int wait_ms)
{
	(void)wait_ms;
	fuzz_next();
	return poll(fds, count, 0);
}

static int fuzz_expect(struct kmig_control *control, uint16_t type, struct kmig_message *message)
{
	int n;

	while (!(n = kmig_control_next(control, message)))
		fuzz_next();
	if (n < 0)
		return n;
	return message->type == type ? 0 : kmig_control_unexpected(control, message);
}

static int fuzz_expect_until(struct kmig_control *control, uint16_t type, uint64_t deadline_ns,
			     struct kmig_message *message)
{
	(void)deadline_ns;
	return fuzz_expect(control, type, message);
}

static void fuzz_send_abort(struct kmig_control *control, int err, uint32_t flags, const char *text)
{
	/* It waits for us to hang up. */
	fuzz_hang_up();
	kmig_control_send_abort(control, err, flags, text);
}

#define poll fuzz_poll
#define kmig_control_expect fuzz_expect
#define kmig_control_expect_until fuzz_expect_until
#define kmig_control_send_abort fuzz_send_abort

#endif /* FUZZ_ENGINE_H */
