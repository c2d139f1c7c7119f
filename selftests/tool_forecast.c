// SPDX-License-Identifier: GPL-2.0
/* 'kmig forecast' from figures alone: what it says, and how it ends. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

/* The example of Documentation/convergence.rst. */
#define EXAMPLE "--memory 2048M --dirty-rate 51.2MiB/s --bandwidth 128MiB/s "
#define EXAMPLE_COMMAND "forecast " EXAMPLE
#define MIB 1048576.0

FIXTURE(forecast)
{
	char kmig[PATH_MAX];
	char out[1 << 16];
	int status;
};

/* kmig lies beside us in the build directory: build/selftests/NAME, build/tools/kmig. */
FIXTURE_SETUP(forecast)
{
	ssize_t n = readlink("/proc/self/exe", self->kmig, sizeof(self->kmig) - 64);
	char *slash;

	ASSERT_LT(0, n);
	self->kmig[n] = '\0';
	slash = strrchr(self->kmig, '/');
	strcpy(slash, "/../tools/kmig");
	ASSERT_EQ(0, access(self->kmig, X_OK));
}

FIXTURE_TEARDOWN(forecast)
{
}

static void run_command(FIXTURE_DATA(forecast) *self, const char *command)
{
	FILE *pipe = popen(command, "r");
	size_t n = pipe ? fread(self->out, 1, sizeof(self->out) - 1, pipe) : 0;

	self->out[n] = '\0';
	self->status = pipe ? WEXITSTATUS(pclose(pipe)) : -1;
}

static void run(FIXTURE_DATA(forecast) *self, const char *options)
{
	char command[PATH_MAX + 512];

	snprintf(command, sizeof(command), "%s forecast %s 2>&1", self->kmig, options);
	run_command(self, command);
}

static struct json_object *run_json(FIXTURE_DATA(forecast) *self, const char *options)
{
	char more[256];

	snprintf(more, sizeof(more), "%s -j", options);
	run(self, more);
	return json_tokener_parse(self->out);
}

static struct json_object *at(struct json_object *root, const char *key)
{
	struct json_object *value = NULL;

	json_object_object_get_ex(root, key, &value);
	return value;
}

static double number(struct json_object *root, const char *key)
{
	struct json_object *value = at(root, key);

	return value ? json_object_get_double(value) : -1;
}

static bool near(double value, double wanted)
{
	return value > wanted * 0.999 - 1 && value < wanted * 1.001 + 1;
}

/* A quarter of each round goes out again: 2048, 512, 128 MiB; 25.6 MiB are left, 0.2 s. */
TEST_F(forecast, example)
{
	static const double sent[] = { 2048, 512, 128 }, left[] = { 409.6, 102.4, 25.6 };
	struct json_object *root = run_json(self, EXAMPLE "--downtime 300 --devices 0"), *rounds, *round;

	ASSERT_NE(NULL, root) TH_LOG("%s", self->out);
	EXPECT_EQ(EXIT_DONE, self->status);
	EXPECT_TRUE(json_object_get_boolean(at(root, "converges")));
	EXPECT_EQ(0, number(root, "stun-pages-rate"));
	EXPECT_EQ(3, number(root, "dirty-sync-count"));
	EXPECT_TRUE(near(number(root, "transferred"), (2048 + 512 + 128 + 25.6) * MIB));
	EXPECT_TRUE(near(number(root, "downtime"), 200));
	EXPECT_TRUE(near(number(root, "total-time"), 21200));
	EXPECT_EQ(128 * MIB, number(root, "bandwidth"));
	rounds = at(root, "rounds");
	ASSERT_EQ(3, json_object_array_length(rounds));
	for (int i = 0; i < 3; i++) {
		round = json_object_array_get_idx(rounds, i);
		EXPECT_EQ(i + 1, number(round, "round"));
		EXPECT_TRUE(near(number(round, "bytes"), sent[i] * MIB)) TH_LOG("%f", number(round, "bytes"));
		EXPECT_TRUE(near(number(round, "dirty-bytes"), left[i] * MIB)) TH_LOG("%f", number(round, "dirty-bytes"));
		EXPECT_TRUE(near(1000 * number(round, "seconds"), 1000 * sent[i] / 128));
	}
	json_object_put(root);
}

/* A quarter of the downtime is for devices and digests unless told otherwise. */
TEST_F(forecast, devices_have_their_share)
{
	struct json_object *root = run_json(self, EXAMPLE "--downtime 270");

	ASSERT_NE(NULL, root);
	EXPECT_EQ(3, number(root, "dirty-sync-count"));
	EXPECT_TRUE(near(number(root, "downtime"), 67.5 + 200));
	json_object_put(root);
	root = run_json(self, EXAMPLE "--downtime 260");
	EXPECT_EQ(4, number(root, "dirty-sync-count"));
	EXPECT_TRUE(near(number(root, "downtime"), 65 + 50));
	json_object_put(root);
}

#define FASTER "--memory 4G --dirty-rate 640MB/s --bandwidth 128MB/s "

/* Five times the link's rate: rounds shrink once the guest is slowed down. */
TEST_F(forecast, stun)
{
	struct json_object *root = run_json(self, FASTER), *rounds;
	double before, after;

	ASSERT_NE(NULL, root);
	EXPECT_EQ(EXIT_DONE, self->status);
	EXPECT_TRUE(json_object_get_boolean(at(root, "converges")));
	EXPECT_EQ(128e6 / 4096 / 2, number(root, "stun-pages-rate"));
	EXPECT_LE(number(root, "downtime"), 300);
	rounds = at(root, "rounds");
	EXPECT_EQ(number(root, "dirty-sync-count"), json_object_array_length(rounds));
	for (size_t i = 2; i < json_object_array_length(rounds); i++) {
		before = number(json_object_array_get_idx(rounds, i - 1), "bytes");
		after = number(json_object_array_get_idx(rounds, i), "bytes");
		EXPECT_TRUE(near(after, before / 3)) TH_LOG("%f after %f", after, before);
	}
	EXPECT_LT(640e6, number(at(root, "without-stun"), "bandwidth"));
	json_object_put(root);
}

/* Whatever time there is, no more is dirty than the working set. */
TEST_F(forecast, working_set)
{
	struct json_object *root = run_json(self, FASTER "--no-stun --working-set 256M"), *round;

	ASSERT_NE(NULL, root);
	EXPECT_EQ(EXIT_DIVERGES, self->status);
	round = json_object_array_get_idx(at(root, "rounds"), 0);
	EXPECT_LT(240 * MIB, number(round, "dirty-bytes"));
	EXPECT_LT(number(round, "dirty-bytes"), 256 * MIB);
	json_object_put(root);
}

/* What it says would help, does. */
TEST_F(forecast, diverges_and_says_what_would_help)
{
	char options[256];
	struct json_object *root = run_json(self, FASTER "--no-stun"), *help;

	ASSERT_NE(NULL, root);
	EXPECT_EQ(EXIT_DIVERGES, self->status);
	EXPECT_FALSE(json_object_get_boolean(at(root, "converges")));
	help = at(root, "would-help");
	ASSERT_NE(NULL, help);
	EXPECT_TRUE(json_object_get_boolean(at(help, "stun")));
	snprintf(options, sizeof(options), FASTER "--no-stun --downtime %.0f", number(help, "downtime"));
	run(self, options);
	EXPECT_EQ(EXIT_DONE, self->status) TH_LOG("%s", options);
	snprintf(options, sizeof(options), FASTER "--no-stun --bandwidth %.0f", number(help, "bandwidth"));
	run(self, options);
	EXPECT_EQ(EXIT_DONE, self->status) TH_LOG("%s", options);
	json_object_put(root);

	root = run_json(self, FASTER "--max-time 60");
	ASSERT_NE(NULL, root);
	EXPECT_EQ(EXIT_DIVERGES, self->status);
	snprintf(options, sizeof(options), FASTER "--max-time %.0f", number(at(root, "would-help"), "max-time") / 1000 + 1);
	run(self, options);
	EXPECT_EQ(EXIT_DONE, self->status) TH_LOG("%s", options);
	json_object_put(root);
}

TEST_F(forecast, text)
{
	static const char *const said[] = {
		"memory 2.0 GiB, 1.0 GiB in use\n", "dirties 53.69 MB/s (429.5 Mbit/s), 13107 pages/s, of 16.0 MiB\n",
		"link: 134.2 MB/s (1.074 Gbit/s)\n", "limits: downtime 300 ms, 30 rounds, 60000 ms in all\n",
		"    1     1.0 GiB     8.000    15.7 MiB  ",
		"converges\n1 round, 1.0 GiB, 8.2 s, downtime ",
	};
	size_t i;

	run(self, EXAMPLE "--used 1G --working-set 16M --max-time 60");
	EXPECT_EQ(EXIT_DONE, self->status);
	for (i = 0; i < sizeof(said) / sizeof(said[0]); i++)
		EXPECT_NE(NULL, strstr(self->out, said[i])) TH_LOG("line %zu is not said, but:\n%s", i, self->out);
	/* A guest that writes nothing. */
	run(self, "--memory 1G --dirty-rate 0 --bandwidth 1Gbit");
	EXPECT_EQ(EXIT_DONE, self->status);
	EXPECT_NE(NULL, strstr(self->out, "converges\n1 round")) TH_LOG("%s", self->out);
}

#define NINES "99999999999999999999999999999999999999999999999999"

/* A rate at which all of the set is dirty at once: no less is left than of a slower guest. */
TEST_F(forecast, dirty_at_once)
{
	struct json_object *root = run_json(self, "--memory 1G --working-set 8K --dirty-rate 1000000TB/s --bandwidth 1MB/s");

	ASSERT_NE(NULL, root);
	EXPECT_LT(8000, number(json_object_array_get_idx(at(root, "rounds"), 0), "dirty-bytes"));
	json_object_put(root);
}

TEST_F(forecast, errors)
{
	static const struct { const char *options; int status; const char *message; } bad[] = {
		{ "", EXIT_USAGE, "--bandwidth is needed" },
		{ "--bandwidth 0 --memory 1G --dirty-rate 1M", EXIT_USAGE, "--bandwidth must be more than nothing" },
		{ "--bandwidth fast", EXIT_USAGE, "'fast' is not a rate" },
		{ "--bandwidth 1G", EXIT_USAGE, "either a guest" },
		{ "--bandwidth 1G --pid 1 --memory 1G --dirty-rate 1M", EXIT_USAGE, "either a guest" },
		{ "--bandwidth 1G --pid 1 --qmp x", EXIT_USAGE, "either a guest" },
		{ "--bandwidth 1G --memory 1G", EXIT_USAGE, "--memory and --dirty-rate are needed" },
		{ "--bandwidth 1G --dirty-rate 1M", EXIT_USAGE, "--memory and --dirty-rate are needed" },
		{ EXAMPLE "--downtime 0", EXIT_USAGE, "--downtime must be a number from 1 to 60000, not '0'" },
		{ EXAMPLE "--used 3G", EXIT_FAILED, "bytes in use of" },
		{ EXAMPLE "--used 0", EXIT_USAGE, "--used must be more than nothing" },
		{ EXAMPLE "--working-set 0K", EXIT_USAGE, "--working-set must be more than nothing" },
		{ EXAMPLE "--fd 3", EXIT_USAGE, "--fd goes with --pid" },
		{ "--bandwidth 1G --qmp /nonexistent --fd 3", EXIT_USAGE, "--fd goes with --pid" },
		{ "--bandwidth " NINES " --memory 1G --dirty-rate 1M", EXIT_USAGE, "is more than any link or memory" },
		{ "--bandwidth 1G --memory 1G --dirty-rate 9" NINES "TB/s", EXIT_USAGE, "is more than any link or memory" },
		{ "--bandwidth 0.0000001B/s --memory 1G --dirty-rate 1M", EXIT_FAILED, "longer than 584 years" },
		{ EXAMPLE "more", EXIT_USAGE, "unexpected argument 'more'" },
		{ "--bandwidth 1G --qmp /nonexistent", EXIT_FAILED, "/nonexistent: No such file or directory" },
	};
	size_t i;

	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		run(self, bad[i].options);
		EXPECT_EQ(bad[i].status, self->status) TH_LOG("%s", bad[i].options);
		EXPECT_NE(NULL, strstr(self->out, bad[i].message)) TH_LOG("%s: %s", bad[i].options, self->out);
	}
}

/* Who reads JSON gets some, also of what failed; and what cannot be written is not done. */
TEST_F(forecast, json_of_failures)
{
	static const char *const commands[] = {
		"forecast --bandwidth 1G --qmp /nonexistent -j", "forecast --bandwidth 1G --pid 2147483647 -j",
		EXAMPLE_COMMAND "--used 3G -j", "region show --pid 2147483647 -j",
	};
	char command[2 * PATH_MAX];
	struct json_object *root;
	size_t i;

	for (i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		snprintf(command, sizeof(command), "%s %s 2>/dev/null", self->kmig, commands[i]);
		run_command(self, command);
		EXPECT_EQ(EXIT_FAILED, self->status) TH_LOG("%s", command);
		root = json_tokener_parse(self->out);
		EXPECT_NE(NULL, at(root, "error")) TH_LOG("%s: '%s'", command, self->out);
		json_object_put(root);
	}
	snprintf(command, sizeof(command), "%s " EXAMPLE_COMMAND "2>&1 >/dev/full", self->kmig);
	run_command(self, command);
	EXPECT_EQ(EXIT_FAILED, self->status);
	EXPECT_NE(NULL, strstr(self->out, "standard output: No space left")) TH_LOG("%s", self->out);
}

TEST_HARNESS_MAIN
