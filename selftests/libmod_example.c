// SPDX-License-Identifier: GPL-2.0
/*
 * The example of README and Documentation/examples: a toy VMM in 60 lines. It must build, move
 * its guest, find every page whole afterwards, and be what README shows.
 */
#define main example_main
#include "../Documentation/examples/vmm.c"
#undef main

#include <arpa/inet.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "kselftest_harness.h"

static pid_t start_example(const char *secret, const char *host)
{
	char *argv[] = { "vmm", (char *)secret, (char *)host, NULL };
	pid_t pid = fork();

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	dup2(STDERR_FILENO, STDOUT_FILENO);	/* standard output is for the test's own lines */
	exit(example_main(host ? 3 : 2, argv));
}

static int status_of(pid_t pid)
{
	int status;

	return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* A connection that proves nothing is turned away, and the destination goes on listening. */
static bool listens(void)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(KMIG_PORT),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bool connected = !connect(fd, (struct sockaddr *)&address, sizeof(address));

	close(fd);
	return connected;
}

TEST(moves)
{
	char path[] = "/tmp/example-secret-XXXXXX";
	int fd = mkstemp(path), tries = 0;
	pid_t destination, source;

	ASSERT_GE(fd, 0);
	ASSERT_EQ(write(fd, "not very secret at all\n", 23), 23);
	close(fd);

	destination = start_example(path, NULL);
	while (!listens() && tries++ < 200)
		usleep(50000);
	source = start_example(path, "127.0.0.1");
	EXPECT_EQ(status_of(source), 0);
	EXPECT_EQ(status_of(destination), 0);
	unlink(path);
}

/* README shows the program indented by four spaces, blank lines left blank. */
TEST(readme_shows_it)
{
	FILE *readme = fopen("README", "r");
	FILE *example = fopen("Documentation/examples/vmm.c", "r");
	char shown[256], line[252], wanted[256];
	unsigned int n = 0;

	if (!readme || !example)
		SKIP(return, "not started in the project's top directory");
	while (fgets(line, sizeof(line), example)) {
		snprintf(wanted, sizeof(wanted), "%s%s", *line == '\n' ? "" : "    ", line);
		n++;
		do {
			if (!fgets(shown, sizeof(shown), readme))
				break;
		} while (n == 1 && strcmp(shown, wanted));
		EXPECT_STREQ(shown, wanted);
	}
	fclose(readme);
	fclose(example);
}

TEST_HARNESS_MAIN
