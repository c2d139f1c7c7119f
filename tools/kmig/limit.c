// SPDX-License-Identifier: GPL-2.0
/*
 * kmig limit: change what a migration may send in a second, while it runs.
 *
 * The rate travels as the value of a signal, see supervise.c. To a process that does not expect the
 * signal it would be the end, so it is sent only to one that is a migration and, by /proc, catches
 * it. All of this is done through one pidfd: the number may be another
 * process's by then.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tool.h"

/* The beginning of a file of /proc/PID; its length, or a negative errno. */
static ssize_t read_proc(pid_t pid, const char *name, char *text, size_t size)
{
	char path[48];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = read(fd, text, size - 1);
	n = n < 0 ? -errno : n;
	close(fd);
	text[n < 0 ? 0 : n] = '\0';
	return n;
}

/* Is that the command line of 'kmig qemu migrate'? Its words end with zeroes. */
static bool is_migrate(const char *command, size_t length)
{
	static const char words[] = "qemu\0migrate";	/* and its own zero */
	size_t first = strlen(command) + 1;

	return length >= first + sizeof(words) && !memcmp(command + first, words, sizeof(words));
}

/*
 * Blocked signals would not tell: those that are waited for do not count as such meanwhile. Before
 * the line that does may be one of any length, with the groups that the process is in.
 */
static bool catches(pid_t pid, int sig)
{
	unsigned long long caught = 0;
	char path[48], *line = NULL;
	size_t room = 0;
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	status = fopen(path, "re");
	if (!status)
		return false;
	while (getline(&line, &room, status) > 0 && sscanf(line, "SigCgt: %llx", &caught) != 1)
		;
	free(line);
	fclose(status);
	return caught >> (sig - 1) & 1;
}

static int check_migration(pid_t pid)
{
	char name[32], command[256];
	ssize_t length;

	if (read_proc(pid, "comm", name, sizeof(name)) < 0)
		return fail(ESRCH, "there is no process %d", pid);
	length = read_proc(pid, "cmdline", command, sizeof(command));
	if (strcmp(name, "kmig\n") || length < 0 || !is_migrate(command, (size_t)length))
		return fail(EINVAL, "process %d is no 'kmig qemu migrate'", pid);
	if (!catches(pid, LIMIT_SIGNAL))
		return fail(EOPNOTSUPP, "the migration of process %d takes no limit: it has not begun, has ended, "
			    "or its kmig is too old", pid);
	return 0;
}

static int send_limit(pid_t pid, uint64_t bytes_per_second)
{
	siginfo_t info = {
		.si_signo = LIMIT_SIGNAL,
		.si_code = SI_QUEUE,
	};
	int fd = (int)syscall(SYS_pidfd_open, pid, 0), ret;

	if (fd < 0)
		return fail(errno, errno == ESRCH ? "there is no process %d" : "process %d: %m", pid);
	ret = check_migration(pid);
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_ptr = (void *)(uintptr_t)bytes_per_second;
	if (!ret && syscall(SYS_pidfd_send_signal, fd, info.si_signo, &info, 0))
		ret = fail(errno, errno == EPERM ? "process %d belongs to somebody else" : "process %d: %m", pid);
	close(fd);
	return ret;
}

static int limit_main(const struct verb *verb, char **operands)
{
	uint64_t pid, rate;

	if (!operands[0] || !operands[1] || operands[2])
		return usage_error(verb, "a process and a rate are needed");
	if (parse_number("PID", operands[0], 1, INT32_MAX, &pid) || parse_bandwidth("RATE", operands[1], &rate))
		return usage_error(verb, "%s", failure());
	if (!send_limit((pid_t)pid, rate))
		return EXIT_DONE;
	say("%s", failure());
	return EXIT_FAILED;
}

static const struct opt no_options[] = { OPT_END };

const struct verb limit_verb = {
	.name = "limit",
	.arguments = "PID RATE",
	.help = "change the bandwidth of a migration while it runs",
	.options = no_options,
	.operands = true,
	.notes = "PID is the process of a 'kmig qemu migrate'. RATE is as that of its --max-bandwidth: 400Mbit/s,\n"
		"50MB/s, 48MiB/s...; or none.\n",
	.run = limit_main,
};
