// SPDX-License-Identifier: GPL-2.0
/*
 * kmig limit: who is taken for a migration, and the way of a rate from there through the process
 * that was started to the one that does the work.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kselftest_harness.h"
#include "tool.h"

#define PATIENCE_MS 20000

#define EVENTUALLY(condition) ({						\
	int64_t _end = now_ms() + PATIENCE_MS;					\
										\
	while (!(condition) && now_ms() < _end)					\
		usleep(5000);							\
	(condition);								\
})

FIXTURE(limit)
{
	char kmig[PATH_MAX], dir[64], secret[80], qmp[80];
	int listener;
	pid_t migration;
	char said[4096];	/* by the last 'kmig limit', on standard error */
};

/* A QMP socket where nobody says anything: who connects waits for a greeting. */
FIXTURE_SETUP(limit)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	ssize_t n = readlink("/proc/self/exe", self->kmig, sizeof(self->kmig) - 64);
	int fd;

	ASSERT_LT(0, n);
	self->kmig[n] = '\0';
	strcpy(strrchr(self->kmig, '/'), "/../tools/kmig");
	ASSERT_EQ(0, access(self->kmig, X_OK));
	strcpy(self->dir, "/tmp/kmig-limit.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->dir));
	snprintf(self->secret, sizeof(self->secret), "%s/secret", self->dir);
	snprintf(self->qmp, sizeof(self->qmp), "%s/qmp", self->dir);
	fd = open(self->secret, O_CREAT | O_WRONLY, 0600);
	ASSERT_EQ(16, write(fd, "0123456789abcdef", 16));
	close(fd);
	strcpy(address.sun_path, self->qmp);
	self->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_EQ(0, bind(self->listener, (struct sockaddr *)&address, sizeof(address)));
	ASSERT_EQ(0, listen(self->listener, 4));
	self->migration = 0;
}

FIXTURE_TEARDOWN(limit)
{
	if (self->migration > 0) {
		kill(self->migration, SIGTERM);
		waitpid(self->migration, NULL, 0);
	}
	close(self->listener);
	unlink(self->secret);
	unlink(self->qmp);
	rmdir(self->dir);
}

static pid_t start(const FIXTURE_DATA(limit) *self, char *const *argv, int err)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	dup2(err, STDERR_FILENO);
	execv(self->kmig, argv);
	_exit(127);
}

/* 'kmig limit' with these operands: its exit status. */
static int limit_with(FIXTURE_DATA(limit) *self, const char *pid, const char *rate)
{
	char *argv[] = { "kmig", "limit", (char *)pid, (char *)rate, NULL };
	int err[2], status = -1;
	size_t have = 0;
	pid_t child;
	ssize_t n;

	if (pipe2(err, O_CLOEXEC))
		return -1;
	child = start(self, argv, err[1]);
	close(err[1]);
	while ((n = read(err[0], self->said + have, sizeof(self->said) - 1 - have)) > 0)
		have += (size_t)n;
	self->said[have] = '\0';
	close(err[0]);
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int limit_process(FIXTURE_DATA(limit) *self, pid_t pid, const char *rate)
{
	char text[16];

	snprintf(text, sizeof(text), "%d", pid);
	return limit_with(self, text, rate);
}

#define EXPECT_SAID(words) EXPECT_NE(NULL, strstr(self->said, words)) TH_LOG("%s", self->said)

TEST_F(limit, usage)
{
	EXPECT_EQ(EXIT_USAGE, limit_with(self, NULL, NULL));
	EXPECT_SAID("usage: kmig limit PID RATE");
	EXPECT_EQ(EXIT_USAGE, limit_with(self, "1", NULL));
	EXPECT_EQ(EXIT_USAGE, limit_with(self, "x", "1MB/s"));
	EXPECT_SAID("PID must be a number");
	EXPECT_EQ(EXIT_USAGE, limit_with(self, "0", "1MB/s"));
	EXPECT_EQ(EXIT_USAGE, limit_with(self, "4294967297", "1MB/s"));
	EXPECT_EQ(EXIT_USAGE, limit_process(self, getpid(), "fast"));
	EXPECT_SAID("'fast' is not a rate");
	EXPECT_EQ(EXIT_USAGE, limit_process(self, getpid(), "10"));
	EXPECT_SAID("RATE must be from 64KiB/s to 1000GB/s, or none, not '10'");
	EXPECT_EQ(EXIT_USAGE, limit_process(self, getpid(), "1001GB/s"));
	EXPECT_EQ(EXIT_USAGE, limit_process(self, getpid(), "0"));
}

/* To none of them it may be sent: it would be their end. */
TEST_F(limit, what_is_no_migration)
{
	char *argv[] = { "kmig", "receive", "--listen", "127.0.0.1:0", "--secret", self->secret, "--memory", "4M",
			 "--qmp", "/nowhere", "--", "sh", "-c", "sleep 100", NULL };
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC), status;
	pid_t pid;

	EXPECT_EQ(EXIT_FAILED, limit_with(self, "2147483647", "1MB/s"));
	EXPECT_SAID("there is no process 2147483647");
	pid = fork();
	if (!pid) {
		pause();
		_exit(0);
	}
	EXPECT_EQ(EXIT_FAILED, limit_process(self, pid, "1MB/s"));
	EXPECT_SAID("is no 'kmig qemu migrate'");
	EXPECT_EQ(0, waitpid(pid, &status, WNOHANG));
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);

	pid = start(self, argv, null);
	usleep(300000);
	EXPECT_EQ(EXIT_FAILED, limit_process(self, pid, "1MB/s"));
	EXPECT_SAID("is no 'kmig qemu migrate'");
	EXPECT_EQ(0, waitpid(pid, &status, WNOHANG));
	kill(pid, SIGTERM);
	waitpid(pid, &status, 0);
	close(null);
}

/* Another program of that name and with those words, as an older kmig would be one. */
TEST_F(limit, who_does_not_expect_it)
{
	char script[80], *argv[] = { script, "qemu", "migrate", NULL };
	int status;
	pid_t pid;

	snprintf(script, sizeof(script), "%s/kmig", self->dir);
	ASSERT_EQ(0, symlink("/bin/cat", script));
	pid = fork();
	if (!pid) {
		int fd[2];

		/* It reads for ever what comes before its operands: nothing. */
		if (pipe(fd) || dup2(fd[0], STDIN_FILENO) < 0)
			_exit(1);
		argv[1] = "qemu";
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (chdir(self->dir) || mkfifo("qemu", 0600))
			_exit(2);
		execv(script, argv);
		_exit(127);
	}
	EXPECT_TRUE(EVENTUALLY((limit_process(self, pid, "1MB/s"), strstr(self->said, "takes no limit"))))
		TH_LOG("%s", self->said);
	EXPECT_EQ(EXIT_FAILED, limit_process(self, pid, "1MB/s"));
	EXPECT_EQ(0, waitpid(pid, &status, WNOHANG));
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	snprintf(script, sizeof(script), "%s/qemu", self->dir);
	unlink(script);
	snprintf(script, sizeof(script), "%s/kmig", self->dir);
	unlink(script);
}

TEST_F(limit, a_migration)
{
	char *argv[] = { "kmig", "qemu", "migrate", "--qmp", self->qmp, "--to", "127.0.0.1:1", "--secret", self->secret,
			 "--max-bandwidth", "1Gbit/s", "--dscp", "10", "--priority", "1", NULL };
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC), status;

	self->migration = start(self, argv, null);
	EXPECT_TRUE(EVENTUALLY(!limit_process(self, self->migration, "50MB/s"))) TH_LOG("%s", self->said);
	EXPECT_EQ(0, limit_process(self, self->migration, "none"));
	EXPECT_EQ(0, limit_process(self, self->migration, "8Mbit"));
	usleep(100000);
	EXPECT_EQ(0, waitpid(self->migration, &status, WNOHANG));
	close(null);
}

/* Its groups alone are more in /proc than a page holds, and come before the signals. */
TEST_F(limit, a_migration_of_many_groups)
{
	char *argv[] = { "kmig", "qemu", "migrate", "--qmp", self->qmp, "--to", "127.0.0.1:1", "--secret", self->secret,
			 NULL };
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	gid_t groups[2000];

	for (unsigned int i = 0; i < 2000; i++)
		groups[i] = 100000 + i;
	if (setgroups(2000, groups))
		SKIP(return, "groups cannot be set");
	self->migration = start(self, argv, null);
	EXPECT_TRUE(EVENTUALLY(!limit_process(self, self->migration, "50MB/s"))) TH_LOG("%s", self->said);
	close(null);
}

/* ---- From the front to the worker ---- */

struct shared {
	_Atomic bool waiting, ready;
	_Atomic unsigned int calls;
	_Atomic uint64_t first, last;
};

static struct shared *shared;

static void take_limit(uint64_t bytes_per_second)
{
	if (!shared->calls++)
		shared->first = bytes_per_second;
	shared->last = bytes_per_second;
}

static int work(void *data)
{
	(void)data;
	shared->waiting = true;
	while (!shared->ready)
		usleep(1000);
	on_limit(take_limit);
	return EVENTUALLY(shared->last == 77) ? 0 : 1;
}

static int died(void *data)
{
	(void)data;
	return 2;
}

static void send_rate(pid_t pid, uint64_t rate)
{
	sigqueue(pid, LIMIT_SIGNAL, (union sigval){ .sival_ptr = (void *)(uintptr_t)rate });
}

/* Also what came before the worker was ready for it; of many, in their order; and from nobody but sigqueue(). */
TEST(a_rate_reaches_the_worker)
{
	void *memory;
	const struct supervised job = { .work = work, .died = died, .shared = &memory, .shared_size = 4096 };
	int status;
	pid_t front;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)shared);
	front = fork();
	if (!front)
		_exit(supervise(&job));
	ASSERT_TRUE(EVENTUALLY(shared->waiting));
	send_rate(front, 65536);
	send_rate(front, 1000000000000);
	usleep(200000);
	EXPECT_EQ(0, (int)shared->calls);
	shared->ready = true;
	EXPECT_TRUE(EVENTUALLY(shared->last == 1000000000000));
	EXPECT_EQ(1000000000000, (uint64_t)shared->first);
	kill(front, LIMIT_SIGNAL);
	for (uint64_t rate = 70; rate <= 77; rate++)
		send_rate(front, rate);
	EXPECT_EQ(front, waitpid(front, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(9, (int)shared->calls);
}

TEST_HARNESS_MAIN
