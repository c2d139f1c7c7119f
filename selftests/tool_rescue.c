// SPDX-License-Identifier: GPL-2.0
/*
 * The worker of 'kmig qemu migrate' was killed, at each point of its way: what the front does
 * with QEMU, and what it says. QEMU is a thread that knows the commands for it.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"

FIXTURE(rescue)
{
	struct footprint f;
	pthread_t thread;
	int listening;
	char dir[64], path[80];
	const char *status;		/* of the guest */
	bool refuses;			/* to let it go on */
	char heard[1024];		/* the commands that change something */
};

static void answer(FIXTURE_DATA(rescue) *self, int fd, struct json_object *request)
{
	const char *command = json_object_get_string(json_object_object_get(request, "execute"));
	int64_t id = json_object_get_int64(json_object_object_get(request, "id"));
	struct json_object *arguments = json_object_object_get(request, "arguments");
	size_t have = strlen(self->heard);

	if (strncmp(command, "q", 1) || !strcmp(command, "quit"))
		snprintf(self->heard + have, sizeof(self->heard) - have, "%s%s%s;", command, arguments ? " " : "",
			 arguments ? json_object_to_json_string_ext(arguments, JSON_C_TO_STRING_PLAIN) : "");
	if (!strcmp(command, "cont") && self->refuses) {
		dprintf(fd, "{\"error\": {\"desc\": \"will not\"}, \"id\": %ld}\r\n", (long)id);
		return;
	}
	if (!strcmp(command, "cont"))
		self->status = "running";
	if (!strcmp(command, "query-status"))
		dprintf(fd, "{\"return\": {\"status\": \"%s\"}, \"id\": %ld}\r\n", self->status, (long)id);
	else
		dprintf(fd, "{\"return\": {}, \"id\": %ld}\r\n", (long)id);
}

static void *qemu(void *data)
{
	FIXTURE_DATA(rescue) *self = data;
	char text[4096];
	ssize_t n;
	int fd;

	while ((fd = accept(self->listening, NULL, NULL)) >= 0) {
		dprintf(fd, GREETING);
		while ((n = read(fd, text, sizeof(text) - 1)) > 0) {
			struct json_object *request;

			text[n] = '\0';
			request = json_tokener_parse(text);
			answer(self, fd, request);
			json_object_put(request);
		}
		close(fd);
	}
	return NULL;
}

FIXTURE_SETUP(rescue)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strcpy(self->dir, "/tmp/kmig-rescue.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->dir));
	snprintf(self->path, sizeof(self->path), "%s/qmp", self->dir);
	strcpy(address.sun_path, self->path);
	self->listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_EQ(0, bind(self->listening, (struct sockaddr *)&address, sizeof(address)));
	ASSERT_EQ(0, listen(self->listening, 4));
	self->status = "paused";
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, qemu, self));
	failure_clear();
}

FIXTURE_TEARDOWN(rescue)
{
	shutdown(self->listening, SHUT_RDWR);
	pthread_join(self->thread, NULL);
	close(self->listening);
	unlink(self->path);
	rmdir(self->dir);
}

#define RESCUED(code, words) do { \
	EXPECT_EQ(code, rescue(&self->f, self->path)); \
	EXPECT_NE(NULL, strstr(failure(), words)) TH_LOG("%s", failure()); \
} while (0)

TEST_F(rescue, before_anything)
{
	self->status = "running";
	RESCUED(EXIT_FAILED, "was killed: the guest runs on here");
	EXPECT_STREQ("", self->heard);
}

/* What was set is set back: to what it was, not to what QEMU has by default. */
TEST_F(rescue, settings)
{
	static const char *const set[] = {
		"migrate-set-capabilities {\"capabilities\":[{\"capability\":\"multifd\",\"state\":true}]};",
		"migrate-set-parameters {\"max-bandwidth\":1234};",
	};

	self->status = "running";
	self->f.state = KMIG_STATE_FIRST_PASS;
	strcpy(self->f.capabilities, "[{\"capability\": \"multifd\", \"state\": true}]");
	strcpy(self->f.parameters, "{\"max-bandwidth\": 1234}");
	RESCUED(EXIT_FAILED, "the guest runs on here");
	for (size_t i = 0; i < 2; i++)
		EXPECT_NE(NULL, strstr(self->heard, set[i])) TH_LOG("%s", self->heard);
}

TEST_F(rescue, in_the_blackout)
{
	self->f.paused = true;
	self->f.state = KMIG_STATE_BLACKOUT;
	RESCUED(EXIT_FAILED, "the guest runs on here");
	EXPECT_STREQ("running", self->status);
}

/* It may have been committed: the guest is left as it is. */
TEST_F(rescue, near_the_commit)
{
	self->f.paused = true;
	self->f.state = KMIG_STATE_CHECK;
	self->status = "postmigrate";
	RESCUED(EXIT_UNKNOWN, "the guest is 'postmigrate' here, says QEMU, and may run at the destination");
	EXPECT_STREQ("", self->heard);
}

/* Which only happens when the destination will not run it. */
TEST_F(rescue, when_it_was_let_go_on)
{
	self->f.paused = self->f.resuming = true;
	self->f.state = KMIG_STATE_CHECK;
	/* QEMU had done it, and the worker did not live to note that. */
	self->status = "running";
	RESCUED(EXIT_FAILED, "the guest runs on here");
	EXPECT_EQ(NULL, strstr(self->heard, "cont"));
	/* QEMU had not. */
	self->status = "paused";
	RESCUED(EXIT_FAILED, "the guest runs on here");
	EXPECT_NE(NULL, strstr(self->heard, "cont;"));
}

/* Once, for want of a channel; and was paused again and committed. */
TEST_F(rescue, when_it_had_been_let_go_on_before)
{
	footprint_pause(&self->f);
	self->f.resuming = true;
	self->f.paused = false;
	footprint_pause(&self->f);
	self->f.state = KMIG_STATE_CHECK;
	RESCUED(EXIT_UNKNOWN, "may run at the destination");
	EXPECT_STREQ("", self->heard);
}

TEST_F(rescue, refused)
{
	self->f.paused = true;
	self->f.state = KMIG_STATE_BLACKOUT;
	self->refuses = true;
	RESCUED(EXIT_UNKNOWN, "QEMU refused 'cont': will not");
	EXPECT_NE(NULL, strstr(failure(), "does not run at the destination"));
}

/* Somebody else has paused it. */
TEST_F(rescue, not_running)
{
	self->f.state = KMIG_STATE_FIRST_PASS;
	RESCUED(EXIT_UNKNOWN, "the guest is 'paused' here, says QEMU, and does not run at the destination");
}

TEST_F(rescue, completed)
{
	self->f.paused = self->f.completed = true;
	self->f.state = KMIG_STATE_CHECK;
	RESCUED(EXIT_DONE, "the guest runs at the destination");
	EXPECT_STREQ("quit;", self->heard);
}

TEST_F(rescue, without_qemu)
{
	unlink(self->path);
	RESCUED(EXIT_UNKNOWN, "QEMU does not answer");
	self->f.paused = true;
	self->f.state = KMIG_STATE_CHECK;
	RESCUED(EXIT_UNKNOWN, "QEMU here cannot be asked");
	self->f.completed = true;
	RESCUED(EXIT_DONE, "the guest runs at the destination");
}

TEST_HARNESS_MAIN
