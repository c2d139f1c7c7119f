// SPDX-License-Identifier: GPL-2.0
/* The QMP client against servers that are slow, wrong or hostile. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

#define GREETING "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7}}, \"capabilities\": []}}\r\n"
#define READY "{\"return\": {}, \"id\": 1}\r\n"

/* What the server says, in order; an answer is sent when a command has come in. */
struct script {
	int fd;
	const char *greeting;
	const char *answers[8];
	size_t piece;		/* send so many bytes at a time; 0: all */
	bool hang_up;		/* close at the end instead of staying silent */
	int passed_fd;		/* received with SCM_RIGHTS, or -1 */
	char last[4096];	/* last command */
};

static void send_all(const struct script *s, const char *text)
{
	size_t left = strlen(text), n;

	while (left) {
		n = s->piece && s->piece < left ? s->piece : left;
		if (send(s->fd, text, n, MSG_NOSIGNAL) != (ssize_t)n)
			return;
		text += n;
		left -= n;
		if (s->piece)
			usleep(50);
	}
}

static void take_command(struct script *s)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { s->last, sizeof(s->last) - 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	ssize_t n = recvmsg(s->fd, &msg, 0);

	s->last[n > 0 ? n : 0] = '\0';
	c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
	if (c)
		memcpy(&s->passed_fd, CMSG_DATA(c), sizeof(int));
}

static void *serve(void *data)
{
	struct script *s = data;
	char rest[256];
	int i;

	s->passed_fd = -1;
	send_all(s, s->greeting);
	for (i = 0; s->answers[i]; i++) {
		take_command(s);
		send_all(s, s->answers[i]);
	}
	while (!s->hang_up && read(s->fd, rest, sizeof(rest)) > 0)
		;
	close(s->fd);
	return NULL;
}

FIXTURE(qmp)
{
	struct script script;
	pthread_t thread;
	struct qmp *q;
	int fd;
};

FIXTURE_SETUP(qmp)
{
	int pair[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	self->script = (struct script){ .fd = pair[1], .greeting = GREETING, .answers = { READY } };
	self->fd = pair[0];
	self->q = NULL;
	failure_clear();
	interrupted = 0;
}

FIXTURE_TEARDOWN(qmp)
{
	qmp_close(self->q);
	pthread_join(self->thread, NULL);
}

#define START() ASSERT_EQ(0, pthread_create(&self->thread, NULL, serve, &self->script))
#define ATTACH() qmp_attach(self->fd, 500, &self->q)

TEST_F(qmp, greets)
{
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_NE(NULL, strstr(self->script.last, "qmp_capabilities"));
}

TEST_F(qmp, byte_by_byte_pretty)
{
	self->script.piece = 1;
	self->script.greeting = "{\n  \"QMP\": {\n \"version\": {} }\n}\n";
	self->script.answers[1] = "{\n\"return\": {\"status\": \"running\"},\n\"id\": 2\n}\n";
	struct json_object *ret, *status;

	START();
	ASSERT_EQ(0, ATTACH());
	ASSERT_EQ(0, qmp_execute(self->q, "query-status", NULL, -1, &ret));
	ASSERT_TRUE(json_object_object_get_ex(ret, "status", &status));
	EXPECT_STREQ("running", json_object_get_string(status));
	json_object_put(ret);
}

TEST_F(qmp, events_before_answer)
{
	struct json_object *e;

	self->script.answers[1] = "{\"event\": \"STOP\"}{\"event\": \"MIGRATION\", \"data\": {\"status\": \"setup\"}}\n"
				  "{\"return\": {}, \"id\": 2}";
	START();
	ASSERT_EQ(0, ATTACH());
	ASSERT_EQ(0, qmp_run(self->q, "stop", NULL));
	e = qmp_next_event(self->q);
	ASSERT_NE(NULL, e);
	EXPECT_NE(NULL, strstr(json_object_to_json_string(e), "STOP"));
	json_object_put(e);
	e = qmp_next_event(self->q);
	ASSERT_NE(NULL, e);
	EXPECT_NE(NULL, strstr(json_object_to_json_string(e), "setup"));
	json_object_put(e);
	EXPECT_EQ(NULL, qmp_next_event(self->q));
}

TEST_F(qmp, refusal_is_told)
{
	self->script.answers[1] = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no way\"}, \"id\": 2}\n";
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_EQ(-EREMOTEIO, qmp_run(self->q, "migrate", NULL));
	EXPECT_STREQ("QEMU refused 'migrate': no way", failure());
}

TEST_F(qmp, error_without_id_or_reason)
{
	self->script.answers[1] = "{\"error\": 5}\n";
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_EQ(-EREMOTEIO, qmp_run(self->q, "migrate", NULL));
}

TEST_F(qmp, late_answer_is_no_answer)
{
	self->script.answers[1] = "{\"return\": {}, \"id\": 1}\n{\"return\": {}, \"id\": \"2\"}\n";
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_EQ(-ETIMEDOUT, qmp_run(self->q, "cont", NULL));
}

TEST_F(qmp, passes_descriptor)
{
	int pipes[2];

	self->script.answers[1] = "{\"return\": {}, \"id\": 2}\n";
	START();
	ASSERT_EQ(0, ATTACH());
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, qmp_getfd(self->q, "state", pipes[1]));
	ASSERT_LE(0, self->script.passed_fd);
	EXPECT_EQ(1, write(self->script.passed_fd, "x", 1));
	EXPECT_EQ(1, read(pipes[0], (char[1]){ 0 }, 1));
	EXPECT_NE(NULL, strstr(self->script.last, "\"fdname\":\"state\""));
	close(self->script.passed_fd);
	close(pipes[0]);
	close(pipes[1]);
}

TEST_F(qmp, silence)
{
	self->script.greeting = "";
	self->script.answers[0] = NULL;
	START();
	EXPECT_EQ(-ETIMEDOUT, ATTACH());
	EXPECT_NE(NULL, strstr(failure(), "another client"));
}

TEST_F(qmp, hang_up)
{
	self->script.hang_up = true;
	self->script.answers[1] = "{\"return\": {}, \"i";
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_EQ(-ECONNRESET, qmp_run(self->q, "stop", NULL));
	/* For good. */
	EXPECT_EQ(-ECONNRESET, qmp_run(self->q, "stop", NULL));
}

TEST_F(qmp, interrupt)
{
	START();
	ASSERT_EQ(0, ATTACH());
	interrupted = 1;
	EXPECT_EQ(-ECANCELED, qmp_run(self->q, "stop", NULL));
	qmp_ignore_interrupt(self->q);
	EXPECT_EQ(-ETIMEDOUT, qmp_run(self->q, "stop", NULL));
	interrupted = 0;
}

/* Events without end must neither fill memory nor hide the answer; the newest are kept. */
TEST_F(qmp, flood_of_events)
{
	const char *event = "{\"event\": \"OLD\"}\n";
	size_t one = strlen(event), n = 20000, i, kept = 0;
	char *flood = malloc(n * one + 512), *at = flood;
	struct json_object *e;
	bool last = false;

	ASSERT_NE(NULL, flood);
	for (i = 0; i < n; i++, at += one)
		memcpy(at, event, one);
	sprintf(at, "%s", "{\"event\": \"NEW\"}\n{\"return\": {}, \"id\": 2}\n");
	self->script.answers[1] = flood;
	START();
	ASSERT_EQ(0, ATTACH());
	EXPECT_EQ(0, qmp_run(self->q, "stop", NULL));
	for (; (e = qmp_next_event(self->q)); kept++) {
		last = strstr(json_object_to_json_string(e), "NEW");
		json_object_put(e);
	}
	EXPECT_EQ(256, kept);
	EXPECT_TRUE(last);
	free(flood);
}

/* Not QMP at all: each must end the attempt with an error, at once. */
static const char *const nonsense[] = {
	"HTTP/1.1 400 Bad Request\r\n",
	"[]\n", "1\n", "null\n", "\"QMP\"\n", "}\n",
	"{\"QMP\": ]}\n", "{\"QMP\" {}}\n",
	"{\"QMP\": {} /* comment */ }\n", "{\"a\": nan}\n",
	"\377\377\377\377\n",
};

/* QEMU takes one client, and the next may wait; no more get in. */
TEST(no_room)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "/tmp/kmig-qmp.XXXXXX" };
	int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int waiting = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char *path = address.sun_path;
	struct qmp *q = NULL;
	int64_t begin;

	ASSERT_NE(NULL, mkdtemp(path));
	strcat(path, "/qmp");
	ASSERT_EQ(0, bind(listening, (struct sockaddr *)&address, sizeof(address)));
	ASSERT_EQ(0, listen(listening, 0));
	ASSERT_EQ(0, connect(waiting, (struct sockaddr *)&address, sizeof(address)));
	begin = now_ms();
	failure_clear();
	EXPECT_EQ(-ETIMEDOUT, qmp_connect(path, 300, &q));
	EXPECT_LE(300, now_ms() - begin);
	EXPECT_GT(3000, now_ms() - begin);
	EXPECT_NE(NULL, strstr(failure(), "other clients wait")) TH_LOG("%s", failure());
	failure_clear();
	close(waiting);
	close(listening);
	unlink(path);
	*strrchr(path, '/') = '\0';
	rmdir(path);
}

FIXTURE(bad) { int unused; };
FIXTURE_SETUP(bad) { (void)self; failure_clear(); interrupted = 0; }
FIXTURE_TEARDOWN(bad) { (void)self; }

static int attach_to(const char *data, size_t length)
{
	struct qmp *q = NULL;
	int pair[2], ret;
	size_t done = 0;
	ssize_t n;
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		return 0;
	child = fork();
	if (!child) {
		close(pair[0]);
		while (done < length) {
			n = send(pair[1], data + done, length - done, MSG_NOSIGNAL);
			if (n <= 0)
				break;
			done += (size_t)n;
		}
		pause();
	}
	close(pair[1]);
	ret = qmp_attach(pair[0], 3000, &q);
	if (!ret)
		qmp_close(q);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	return ret;
}

TEST_F(bad, nonsense)
{
	size_t i;

	for (i = 0; i < sizeof(nonsense) / sizeof(nonsense[0]); i++)
		if (attach_to(nonsense[i], strlen(nonsense[i])) != -EPROTO) {
			TH_LOG("not refused: %s", nonsense[i]);
			EXPECT_TRUE(false);
		}
}

TEST_F(bad, nul_byte)
{
	EXPECT_EQ(-EPROTO, attach_to("{\"QMP\"\0: {}}", 13));
}

TEST_F(bad, too_deep)
{
	char deep[512];
	int i, n = 0;

	for (i = 0; i < 60; i++)
		n += snprintf(deep + n, sizeof(deep) - (size_t)n, "{\"a\":");
	EXPECT_EQ(-EPROTO, attach_to(deep, (size_t)n));
}

TEST_F(bad, endless_message)
{
	size_t length = 6 << 20;
	char *data = malloc(length);

	ASSERT_NE(NULL, data);
	memset(data, 'x', length);
	memcpy(data, "{\"QMP\": \"", 9);
	EXPECT_EQ(-EMSGSIZE, attach_to(data, length));
	free(data);
}

TEST_F(bad, random_bytes)
{
	unsigned int seed = 1;
	char data[64];
	int round;
	size_t i;

	for (round = 0; round < 100; round++) {
		data[0] = '{';
		for (i = 1; i < sizeof(data); i++)
			data[i] = (char)rand_r(&seed);
		EXPECT_NE(0, attach_to(data, sizeof(data)));
		failure_clear();
	}
}

TEST_HARNESS_MAIN
