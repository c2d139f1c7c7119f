// SPDX-License-Identifier: GPL-2.0
/*
 * What 'kmig receive' and 'kmig qemu migrate' say when nothing comes of it: one JSON object,
 * whatever went wrong, and a message that names the cause. QEMU is selftests/fake_qemu.py.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

#define FAKE "selftests/fake_qemu.py"
#define PATIENCE_MS 20000

FIXTURE(outcome)
{
	char kmig[PATH_MAX], dir[64], secret[80], qmp[80];
	pid_t front, qemu;
	int out, err;		/* of the command, to be read */
	char said[1 << 16];	/* on standard error, so far */
};

FIXTURE_SETUP(outcome)
{
	ssize_t n = readlink("/proc/self/exe", self->kmig, sizeof(self->kmig) - 64);
	int fd;

	ASSERT_LT(0, n);
	self->kmig[n] = '\0';
	strcpy(strrchr(self->kmig, '/'), "/../tools/kmig");
	ASSERT_EQ(0, access(self->kmig, X_OK));
	ASSERT_EQ(0, access(FAKE, X_OK)) TH_LOG("to be run where " FAKE " is");
	strcpy(self->dir, "/tmp/kmig-outcome.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->dir));
	snprintf(self->secret, sizeof(self->secret), "%s/secret", self->dir);
	snprintf(self->qmp, sizeof(self->qmp), "%s/qmp", self->dir);
	fd = open(self->secret, O_CREAT | O_WRONLY, 0600);
	ASSERT_EQ(16, write(fd, "0123456789abcdef", 16));
	close(fd);
	self->front = 0;
	self->out = self->err = -1;
	self->said[0] = '\0';
}

FIXTURE_TEARDOWN(outcome)
{
	if (self->front) {
		kill(self->front, SIGTERM);
		waitpid(self->front, NULL, 0);
	}
	close(self->out);
	close(self->err);
	unlink(self->secret);
	unlink(self->qmp);
	rmdir(self->dir);
}

/* @out: where its standard output goes, -1: to us. */
static void start(FIXTURE_DATA(outcome) *self, char **argv, int out)
{
	int outs[2], errs[2];

	if (pipe2(outs, O_CLOEXEC) || pipe2(errs, O_CLOEXEC))
		abort();
	self->front = fork();
	if (!self->front) {
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		dup2(out < 0 ? outs[1] : out, STDOUT_FILENO);
		dup2(errs[1], STDERR_FILENO);
		execv(self->kmig, argv);
		_exit(127);
	}
	close(outs[1]);
	close(errs[1]);
	self->out = outs[0];
	self->err = errs[0];
}

static void receive(FIXTURE_DATA(outcome) *self, int out)
{
	char *argv[] = { "kmig", "receive", "-j", "--listen", "127.0.0.1:0", "--secret", self->secret, "--memory", "4M",
			 "--qmp", self->qmp, "--", FAKE, "refuse", NULL };

	start(self, argv, out);
}

/* Until these words were said; NULL: until nobody can say any more. */
static bool hear(FIXTURE_DATA(outcome) *self, const char *words)
{
	int64_t deadline = now_ms() + PATIENCE_MS;
	struct pollfd p = { .fd = self->err, .events = POLLIN };
	size_t have = strlen(self->said);
	ssize_t n;

	while (!words || !strstr(self->said, words)) {
		if (now_ms() > deadline || poll(&p, 1, 100) < 0)
			return false;
		if (!p.revents)
			continue;
		n = read(self->err, self->said + have, sizeof(self->said) - 1 - have);
		if (n <= 0)
			return !words;
		have += (size_t)n;
		self->said[have] = '\0';
	}
	return true;
}

/* The exit status, and the only JSON object on standard output, if that is what there is. */
static int end(FIXTURE_DATA(outcome) *self, struct json_object **root)
{
	struct json_tokener *tokener = json_tokener_new();
	char text[1 << 16];
	size_t have = 0, used;
	int status = -1;
	ssize_t n;

	while ((n = read(self->out, text + have, sizeof(text) - 1 - have)) > 0)
		have += (size_t)n;
	text[have] = '\0';
	*root = json_tokener_parse_ex(tokener, text, (int)have);
	used = json_tokener_get_parse_end(tokener);
	json_tokener_free(tokener);
	if (*root && text[used + strspn(text + used, " \n")])
		*root = NULL;
	waitpid(self->front, &status, 0);
	self->front = 0;
	hear(self, NULL);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static const char *word(struct json_object *root, const char *key)
{
	struct json_object *value = NULL;

	if (!root || !json_object_object_get_ex(root, key, &value))
		return "";
	return json_object_get_string(value);
}

#define ENDS(code, state, why) do { \
	struct json_object *root; \
	EXPECT_EQ(code, end(self, &root)) TH_LOG("%s", self->said); \
	EXPECT_NE(NULL, root) TH_LOG("no JSON"); \
	EXPECT_STREQ(state, word(root, "status")); \
	EXPECT_NE(NULL, strstr(word(root, "error"), why)) TH_LOG("%s", word(root, "error")); \
	EXPECT_NE(NULL, strstr(self->said, why)) TH_LOG("%s", self->said); \
	json_object_put(root); \
} while (0)

static pid_t child_of(pid_t pid)
{
	char path[64];
	FILE *file;
	int child = 0;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", pid, pid);
	file = fopen(path, "r");
	if (!file || fscanf(file, "%d", &child) != 1)
		child = 0;
	if (file)
		fclose(file);
	return child;
}

TEST_F(outcome, no_secret)
{
	char *away[] = { "kmig", "qemu", "migrate", "-j", "--qmp", self->qmp, "--to", "127.0.0.1:1", "--secret", "/nonexistent", NULL };
	char *in[] = { "kmig", "receive", "-j", "--qmp", self->qmp, "--memory", "4M", "--secret", "/nonexistent", "--", FAKE, NULL };

	start(self, away, -1);
	ENDS(EXIT_FAILED, "failed", "secret /nonexistent: No such file");
	start(self, in, -1);
	ENDS(EXIT_FAILED, "failed", "secret /nonexistent: No such file");
}

TEST_F(outcome, no_qemu)
{
	char *argv[] = { "kmig", "qemu", "migrate", "-j", "--qmp", self->qmp, "--to", "127.0.0.1:1", "--secret", self->secret, NULL };

	start(self, argv, -1);
	ENDS(EXIT_FAILED, "failed", "No such file");
}

TEST_F(outcome, probe_too_short)
{
	char *argv[] = { "kmig", "qemu", "migrate", "--qmp", self->qmp, "--to", "127.0.0.1:1", "--secret", self->secret,
			 "--probe", "9", NULL };
	struct json_object *root;

	start(self, argv, -1);
	EXPECT_EQ(EXIT_USAGE, end(self, &root));
	EXPECT_NE(NULL, strstr(self->said, "--probe must be 0 or a number from 10 to 60000, not '9'")) TH_LOG("%s", self->said);
}

TEST_F(outcome, wrong_channels)
{
	static char *const bad[] = { "0", "65", "Auto", "" };

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *argv[] = { "kmig", "qemu", "migrate", "--channels", bad[i], NULL };
		struct json_object *root;
		char want[96];

		snprintf(want, sizeof(want), "--channels must be auto or a number from 1 to 64, not '%s'", bad[i]);
		start(self, argv, -1);
		EXPECT_EQ(EXIT_USAGE, end(self, &root));
		EXPECT_NE(NULL, strstr(self->said, want)) TH_LOG("%s", self->said);
	}
}

TEST_F(outcome, interrupted)
{
	struct json_object *root;

	receive(self, -1);
	ASSERT_TRUE(hear(self, "listening on ")) TH_LOG("%s", self->said);
	kill(self->front, SIGINT);
	EXPECT_EQ(EXIT_INTERRUPTED, end(self, &root)) TH_LOG("%s", self->said);
	EXPECT_STREQ("cancelled", word(root, "status"));
	json_object_put(root);
}

TEST_F(outcome, worker_killed)
{
	pid_t worker, qemu;

	receive(self, -1);
	ASSERT_TRUE(hear(self, "listening on ")) TH_LOG("%s", self->said);
	worker = child_of(self->front);
	qemu = child_of(worker);
	ASSERT_LT(0, qemu);
	kill(worker, SIGKILL);
	ENDS(EXIT_FAILED, "failed", "was killed: nothing was received");
	EXPECT_EQ(-1, kill(qemu, 0));
}

TEST_F(outcome, qemu_killed)
{
	receive(self, -1);
	ASSERT_TRUE(hear(self, "listening on ")) TH_LOG("%s", self->said);
	kill(child_of(child_of(self->front)), SIGKILL);
	ENDS(EXIT_FAILED, "failed", "QEMU was ended by signal 9");
}

/* ---- A source, in this process ---- */

static int nothing(void *data)
{
	(void)data;
	return 0;
}

static int no_writes(unsigned int region, uint64_t first, uint64_t pages, uint64_t *bitmap, void *data)
{
	(void)region;
	(void)first;
	(void)pages;
	(void)bitmap;
	(void)data;
	return 0;
}

/* And wait until all is over there. */
static void kill_in_first_pass(const struct kmig_report *report, void *data)
{
	FIXTURE_DATA(outcome) *self = data;

	if (report->state != KMIG_STATE_FIRST_PASS || !self->qemu)
		return;
	kill(self->qemu, SIGKILL);
	self->qemu = 0;
	hear(self, "nothing was received");
}

/* Its end is told as the cause, and not what followed from it. */
TEST_F(outcome, qemu_killed_while_it_receives)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = nothing, .resume = nothing, .dirty = no_writes,
				       .progress = kill_in_first_pass };
	struct kmig_region_opts memory = KMIG_REGION_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_region *region;
	struct kmig_source *source;
	struct kmig_ctx *ctx;
	unsigned int port;

	receive(self, -1);
	ASSERT_TRUE(hear(self, "listening on 127.0.0.1:")) TH_LOG("%s", self->said);
	ASSERT_TRUE(hear(self, "\n"));
	ASSERT_EQ(1, sscanf(strstr(self->said, "127.0.0.1:"), "127.0.0.1:%u", &port));
	self->qemu = child_of(child_of(self->front));
	ASSERT_LT(0, self->qemu);

	ASSERT_EQ(0, kmig_ctx_new(&ctx));
	memory.kind = KMIG_REGION_MEMFD;
	memory.bytes = 4 << 20;
	ASSERT_EQ(0, kmig_region_create(ctx, &memory, &region));
	memset(kmig_region_map(region), 1, memory.bytes);
	opts.host = "127.0.0.1";
	opts.port = port;
	opts.secret = "0123456789abcdef";
	opts.secret_len = 16;
	opts.tracker = KMIG_TRACKER_EXTERNAL;
	ASSERT_EQ(0, kmig_source_new(ctx, &opts, &ops, self, &source));
	ASSERT_EQ(0, kmig_source_add_region(source, region));
	EXPECT_NE(0, kmig_source_run(source));
	EXPECT_EQ(0, self->qemu);
	ENDS(EXIT_FAILED, "failed", "QEMU was ended by signal 9");
	kmig_source_free(source);
	kmig_region_free(region);
	kmig_ctx_free(ctx);
}

TEST_F(outcome, full)
{
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
	struct json_object *root;

	receive(self, full);
	ASSERT_TRUE(hear(self, "listening on ")) TH_LOG("%s", self->said);
	kill(self->front, SIGTERM);
	end(self, &root);
	EXPECT_NE(NULL, strstr(self->said, "could not be written to standard output")) TH_LOG("%s", self->said);
	close(full);
}

TEST_HARNESS_MAIN
