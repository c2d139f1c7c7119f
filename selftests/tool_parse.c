// SPDX-License-Identifier: GPL-2.0
/* What a user types, what a report says, what QEMU is given. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

TEST(sizes)
{
	static const struct { const char *text; uint64_t bytes; } good[] = {
		{ "0", 0 }, { "4096", 4096 }, { "4096B", 4096 }, { "1k", 1024 }, { "256M", 256ull << 20 },
		{ "2G", 2ull << 30 }, { "2GiB", 2ull << 30 }, { "1t", 1ull << 40 }, { "15E", 15ull << 60 },
	};
	static const char *const bad[] = {
		"", "M", "-1", "+1", " 1", "1 ", "1.5G", "1X", "1Mx", "1MiBB", "0x10", "16E",
		"18446744073709551616", "99999999999999999999999", "1\n",
	};
	uint64_t bytes;
	size_t i;

	for (i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		ASSERT_EQ(0, parse_size(good[i].text, &bytes)) TH_LOG("%s", good[i].text);
		EXPECT_EQ(good[i].bytes, bytes);
	}
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		failure_clear();
		EXPECT_EQ(-EINVAL, parse_size(bad[i], &bytes)) TH_LOG("accepted '%s'", bad[i]);
		EXPECT_NE('\0', failure()[0]);
	}
	failure_clear();
}

TEST(numbers)
{
	uint64_t v;

	EXPECT_EQ(0, parse_number("n", "64", 1, 64, &v));
	EXPECT_EQ(64, v);
	EXPECT_EQ(-EINVAL, parse_number("n", "0", 1, 64, &v));
	EXPECT_EQ(-EINVAL, parse_number("n", "65", 1, 64, &v));
	EXPECT_EQ(-EINVAL, parse_number("n", "", 1, 64, &v));
	EXPECT_EQ(-EINVAL, parse_number("n", "-1", 1, 64, &v));
	EXPECT_EQ(-EINVAL, parse_number("n", "2x", 1, 64, &v));
	EXPECT_EQ(-EINVAL, parse_number("n", "99999999999999999999999", 1, UINT64_MAX, &v));
	EXPECT_STREQ("n must be a number from 1 to 64, not '0'", failure());
	failure_clear();
}

TEST(addresses)
{
	static const struct { const char *text, *host; uint16_t port; } good[] = {
		{ "host", "host", 4760 }, { "host:1", "host", 1 }, { "10.0.0.1:65535", "10.0.0.1", 65535 },
		{ "[::1]:4761", "::1", 4761 }, { "[::1]", "::1", 4760 }, { "fe80::1", "fe80::1", 4760 },
		{ ":0", "", 0 }, { "::", "::", 4760 },
	};
	static const char *const bad[] = {
		"host:", "host:x", "host:65536", "host:-1", "[::1", "[::1]x", "[::1]:", "a b", "a/b:1",
	};
	char host[HOST_MAX], longer[HOST_MAX + 8];
	uint16_t port;
	size_t i;

	for (i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		port = 4760;
		ASSERT_EQ(0, parse_address(good[i].text, host, &port)) TH_LOG("%s", good[i].text);
		EXPECT_STREQ(good[i].host, host);
		EXPECT_EQ(good[i].port, port);
	}
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		EXPECT_EQ(-EINVAL, parse_address(bad[i], host, &port)) TH_LOG("accepted '%s'", bad[i]);
	memset(longer, 'a', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = '\0';
	EXPECT_EQ(-EINVAL, parse_address(longer, host, &port));
	failure_clear();
}

FIXTURE(secret)
{
	char path[64];
	char secret[SECRET_MAX];
	size_t length;
};

FIXTURE_SETUP(secret)
{
	strcpy(self->path, "/tmp/kmig-secret.XXXXXX");
	int fd = mkstemp(self->path);

	ASSERT_LE(0, fd);
	close(fd);
	failure_clear();
}

FIXTURE_TEARDOWN(secret)
{
	unlink(self->path);
}

static int with(const char *path, const char *text, size_t length, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_TRUNC);
	ssize_t n = write(fd, text, length);

	close(fd);
	return n == (ssize_t)length ? chmod(path, mode) : -1;
}

TEST_F(secret, one_newline_is_stripped)
{
	ASSERT_EQ(0, with(self->path, "0123456789abcdef\n", 17, 0600));
	ASSERT_EQ(0, read_secret(self->path, self->secret, &self->length));
	EXPECT_EQ(16, self->length);
	ASSERT_EQ(0, with(self->path, "0123456789abcde\n\n", 17, 0400));
	ASSERT_EQ(0, read_secret(self->path, self->secret, &self->length));
	EXPECT_EQ(16, self->length);
}

TEST_F(secret, too_short)
{
	ASSERT_EQ(0, with(self->path, "0123456789abcde\n", 16, 0600));
	EXPECT_EQ(-EINVAL, read_secret(self->path, self->secret, &self->length));
	EXPECT_NE(NULL, strstr(failure(), "shorter than 16 bytes"));
}

TEST_F(secret, readable_by_others)
{
	ASSERT_EQ(0, with(self->path, "0123456789abcdef", 16, 0640));
	EXPECT_EQ(-EPERM, read_secret(self->path, self->secret, &self->length));
	EXPECT_NE(NULL, strstr(failure(), "chmod 600"));
}

TEST_F(secret, too_long)
{
	char big[SECRET_MAX + 1] = { 0 };

	ASSERT_EQ(0, with(self->path, big, SECRET_MAX - 1, 0600));
	EXPECT_EQ(0, read_secret(self->path, self->secret, &self->length));
	ASSERT_EQ(0, with(self->path, big, sizeof(big), 0600));
	EXPECT_EQ(-EINVAL, read_secret(self->path, self->secret, &self->length));
}

TEST_F(secret, not_a_file)
{
	unlink(self->path);
	EXPECT_EQ(-ENOENT, read_secret(self->path, self->secret, &self->length));
	failure_clear();
	ASSERT_EQ(0, mkfifo(self->path, 0600));
	EXPECT_EQ(-EINVAL, read_secret(self->path, self->secret, &self->length));
	failure_clear();
	EXPECT_EQ(-EINVAL, read_secret("/dev", self->secret, &self->length));
}

TEST(command_line)
{
	char *argv[] = { "qemu", "-nodefaults", NULL };
	struct qemu_start start = { .bytes = 256 << 20, .qmp = "/tmp/a,b", .incoming = true, .argv = argv };
	static const char *const want[] = {
		"qemu", "-nodefaults", "-object",
		"memory-backend-file,id=lmtrack,size=268435456,mem-path=/proc/self/fd/10,share=on",
		"-machine", "memory-backend=lmtrack", "-m", "256M",
		"-qmp", "unix:/tmp/a,,b,server=on,wait=off", "-incoming", "defer", "-S",
	};
	char **got;
	size_t i;

	EXPECT_EQ(0, qemu_check_start(&start));
	got = qemu_arguments(&start);
	for (i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
		ASSERT_NE(NULL, got[i]);
		EXPECT_STREQ(want[i], got[i]);
	}
	EXPECT_EQ(NULL, got[i]);
	qemu_arguments_free(got);
	start.bytes = (256 << 20) + 4096;
	EXPECT_EQ(-EINVAL, qemu_check_start(&start));
	failure_clear();
}

/* Every field of the contract, in the file as in the text. */
TEST(output)
{
	struct json_object *root, *list, *item, *value;
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);
	struct out *o = out_new(file);

	out_object(o, NULL);
	out_string(o, "name", "name %s\n", "a \"b\"");
	out_array(o, "list");
	out_object(o, NULL);
	out_uint(o, "n", "n %" PRIu64 "\n", UINT64_MAX);
	out_bytes(o, "size", "size %s\n", 3 << 20);
	out_float(o, "x", "x %.1f\n", 1.25);
	out_end(o);
	out_end(o);
	out_bool(o, "yes", NULL, true);
	out_end(o);
	root = json_object_get(out_json(o));
	out_free(o);
	fclose(file);
	EXPECT_STREQ("name a \"b\"\nn 18446744073709551615\nsize 3.0 MiB\nx 1.2\n", text);
	free(text);
	ASSERT_TRUE(json_object_object_get_ex(root, "list", &list));
	item = json_object_array_get_idx(list, 0);
	ASSERT_TRUE(json_object_object_get_ex(item, "n", &value));
	EXPECT_EQ(UINT64_MAX, json_object_get_uint64(value));
	ASSERT_TRUE(json_object_object_get_ex(item, "size", &value));
	EXPECT_EQ(3 << 20, json_object_get_int64(value));
	ASSERT_TRUE(json_object_object_get_ex(item, "x", &value));
	EXPECT_STREQ("1.250", json_object_to_json_string(value));
	ASSERT_TRUE(json_object_object_get_ex(root, "yes", &value));
	EXPECT_TRUE(json_object_get_boolean(value));
	json_object_put(root);
}

TEST_HARNESS_MAIN
