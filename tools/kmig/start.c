// SPDX-License-Identifier: GPL-2.0
/* Start a stock QEMU whose memory is a file that it inherits as descriptor 10. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tool.h"

#define MIB (1ull << 20)

int qemu_check_start(const struct qemu_start *start)
{
	if (!start->bytes || start->bytes % MIB)
		return fail(EINVAL, "--memory must be a whole number of MiB, not %" PRIu64 " bytes", start->bytes);
	if (strlen(start->qmp) >= sizeof(((struct sockaddr_un *)0)->sun_path))
		return fail(EINVAL, "%s: longer than the path of a socket can be", start->qmp);
	return 0;
}

/* A comma ends a value in QEMU's options unless it is doubled. */
static char *double_commas(const char *text)
{
	char *out = calloc(2, strlen(text) + 1), *p = out;

	if (!out)
		abort();
	for (; *text; text++) {
		*p++ = *text;
		if (*text == ',')
			*p++ = ',';
	}
	return out;
}

static char * __attribute__((format(printf, 1, 2))) text(const char *fmt, ...)
{
	va_list args;
	char *out;

	va_start(args, fmt);
	if (vasprintf(&out, fmt, args) < 0)
		abort();
	va_end(args);
	return out;
}

char **qemu_arguments(const struct qemu_start *start)
{
	char *qmp = double_commas(start->qmp);
	char **argv, **p;
	size_t n = 0;

	while (start->argv[n])
		n++;
	argv = calloc(n + 16, sizeof(*argv));
	if (!argv)
		abort();
	for (p = argv, n = 0; start->argv[n]; n++)
		*p++ = text("%s", start->argv[n]);
	*p++ = text("-object");
	*p++ = text("memory-backend-file,id=lmtrack,size=%" PRIu64 ",mem-path=/proc/self/fd/%d,share=on",
		    start->bytes, QEMU_FD);
	*p++ = text("-machine");
	*p++ = text("memory-backend=lmtrack");
	*p++ = text("-m");
	*p++ = text("%" PRIu64 "M", (uint64_t)(start->bytes / MIB));
	*p++ = text("-qmp");
	*p++ = text("unix:%s,server=on,wait=off", qmp);
	if (start->incoming) {
		*p++ = text("-incoming");
		*p++ = text("defer");
		/* Whatever the stream says: only kmig makes the guest run. */
		*p++ = text("-S");
	}
	free(qmp);
	return argv;
}

void qemu_arguments_free(char **argv)
{
	char **p;

	for (p = argv; *p; p++)
		free(*p);
	free(argv);
}

int qemu_exec(char **argv, int region_fd)
{
	/* dup2() onto itself would leave close-on-exec set. */
	if (region_fd == QEMU_FD)
		fcntl(region_fd, F_SETFD, 0);
	else if (dup2(region_fd, QEMU_FD) < 0)
		return fail(errno, "dup2: %s", strerror(errno));
	execvp(argv[0], argv);
	return fail(errno, "%s: %s", argv[0], strerror(errno));
}
