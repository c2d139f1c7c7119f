// SPDX-License-Identifier: GPL-2.0
/* Whatever comes from a QMP socket: the greeting, answers to three commands, events. */
#include "fuzz.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include <json-c/json.h>

#include "../../tools/kmig/tool.h"

#define PIECES 4

/* The input up to the next NUL, which would be refused by itself; sent before what it answers. */
static void send_piece(int fd, const uint8_t **at, const uint8_t *end)
{
	const uint8_t *nul = memchr(*at, 0, end - *at);
	size_t length = (nul ? nul : end) - *at;

	if (length && send(fd, *at, length, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EPIPE)
		abort();
	*at = nul ? nul + 1 : end;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const char greeting[] = "{\"QMP\": {\"version\": {}, \"capabilities\": []}} {\"return\": {}, \"id\": 1}";
	const uint8_t *at = data, *end = data + size;
	int pair[2], room = 8 << 20;
	struct json_object *ret;
	struct qmp *qmp;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		abort();
	setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	/* Half of the inputs are greeted in order: few would be otherwise. */
	if (size && *at++ & 1 && send(pair[0], greeting, sizeof(greeting) - 1, MSG_NOSIGNAL) < 0)
		abort();
	send_piece(pair[0], &at, end);
	if (at == end)
		shutdown(pair[0], SHUT_WR);
	if (!qmp_attach(pair[1], 20, &qmp)) {
		for (int i = 1; i < PIECES; i++) {
			struct json_object *event;

			send_piece(pair[0], &at, end);
			/* Only this direction ends: commands can still be sent. */
			if (at == end || i + 1 == PIECES)
				shutdown(pair[0], SHUT_WR);
			if (!qmp_execute(qmp, "query-status", NULL, -1, &ret))
				json_object_put(ret);
			while ((event = qmp_next_event(qmp)))
				json_object_put(event);
		}
		qmp_close(qmp);
	}
	close(pair[0]);
	return 0;
}
