// SPDX-License-Identifier: GPL-2.0
/* What a user types, what a report says, what QEMU is given. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
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

TEST(rates)
{
	static const struct { const char *text; double rate; } good[] = {
		{ "0", 0 }, { "1000", 1000 }, { "10Gbit", 1.25e9 }, { "10Gbit/s", 1.25e9 }, { "10gbit", 1.25e9 },
		{ "10Gbps", 1.25e9 }, { "10Gb/s", 1.25e9 }, { "10 Gbits/s", 1.25e9 }, { "2.5Gbit", 312.5e6 },
		{ "400Mbit", 50e6 }, { "400mbit/s", 50e6 }, { "50MB/s", 50e6 }, { "50MBps", 50e6 },
		{ "50Mbytes/s", 50e6 }, { "48MiB/s", 48 << 20 }, { "48M", 48 << 20 }, { "48M/s", 48 << 20 },
		{ "48Mi", 48 << 20 }, { "1T", 1ull << 40 }, { "1Kibit", 128 }, { "100B/s", 100 },
		{ "1000pages/s", 4096000 }, { "1kpages", 4096000 }, { "1page/s", 4096 },
	};
	static const char *const bad[] = {
		"", "G", "-1M", "+1M", "1.2.3M", ".", "1e9", "0x10", "nan", "inf", "10Gbit/h", "10Xbit", "10G bit",
		"10Gbitt", "10GBit/s/s", "10bps/s", "10 ", "1M\n", "10Gbps2",
	};
	double rate;
	size_t i;

	for (i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		ASSERT_EQ(0, parse_rate("--bandwidth", good[i].text, &rate)) TH_LOG("%s", good[i].text);
		EXPECT_TRUE(rate > good[i].rate * 0.999999 - 1e-9 && rate < good[i].rate * 1.000001 + 1e-9)
			TH_LOG("%s: %f", good[i].text, rate);
	}
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		failure_clear();
		EXPECT_EQ(-EINVAL, parse_rate("--bandwidth", bad[i], &rate)) TH_LOG("accepted '%s'", bad[i]);
		EXPECT_EQ(0, strncmp(failure(), "--bandwidth: ", 13)) TH_LOG("%s", failure());
	}
	failure_clear();
}

static struct all_options {
	bool flag, other;
	const char *text;
	int number;
	uint32_t count;
	double amount, share, rate;
	uint64_t time_ms, size;
	unsigned int choice;
	struct endpoint to;
} all;

static const char *const actions[] = { "stun", "switchover", "abort", NULL };

static const struct opt table[] = {
	OPT_FLAG('f', "flag", &all.flag, "a flag"),
	OPT_FLAG(0, "other", &all.other, "another"),
	OPT_TEXT("text", "T", &all.text, "a text"),
	OPT_INT("number", "N", &all.number, 0, 9, "a number"),
	OPT_U32("count", "N", &all.count, 1, 60000, "a count"),
	OPT_DOUBLE("amount", "X", &all.amount, 1, 1000, "an amount"),
	OPT_PERCENT("share", "PERCENT", &all.share, 1, 99, "a share"),
	OPT_SECONDS("time", "SECONDS", &all.time_ms, 1, 1000, "a time"),
	OPT_SIZE("size", "SIZE", &all.size, "a size"),
	OPT_RATE("rate", "RATE", &all.rate, "a rate"),
	OPT_CHOICE("choice", "ACTION", &all.choice, actions, "a choice"),
	OPT_ENDPOINT("to", "HOST", &all.to, "an address"),
	OPT_END
};

static int parse_words(const char *line, int *operands)
{
	static char text[256];
	char *argv[32] = { "kmig" };
	int argc = 1, ret;

	all = (struct all_options){ 0 };
	failure_clear();
	snprintf(text, sizeof(text), "%s", line);
	for (char *word = strtok(text, " "); word; word = strtok(NULL, " "))
		argv[argc++] = word;
	ret = options_parse(table, argc, argv);
	*operands = argc - optind;
	return ret;
}

TEST(bandwidths)
{
	uint64_t rate = 1;

	EXPECT_EQ(0, parse_bandwidth("--max-bandwidth", "none", &rate));
	EXPECT_EQ(0, rate);
	EXPECT_EQ(0, parse_bandwidth("--max-bandwidth", "64KiB/s", &rate));
	EXPECT_EQ(KMIG_BANDWIDTH_MIN, rate);
	EXPECT_EQ(0, parse_bandwidth("--max-bandwidth", "1000GB/s", &rate));
	EXPECT_EQ(KMIG_BANDWIDTH_MAX, rate);
	EXPECT_EQ(0, parse_bandwidth("--max-bandwidth", "400Mbit", &rate));
	EXPECT_EQ(50000000, rate);
	EXPECT_EQ(-EINVAL, parse_bandwidth("--max-bandwidth", "0", &rate));
	EXPECT_EQ(-EINVAL, parse_bandwidth("--max-bandwidth", "65535", &rate));
	EXPECT_EQ(-EINVAL, parse_bandwidth("--max-bandwidth", "1001GB/s", &rate));
	EXPECT_EQ(-EINVAL, parse_bandwidth("--max-bandwidth", "None", &rate));
	EXPECT_EQ(-EINVAL, parse_bandwidth("--max-bandwidth", "", &rate));
	EXPECT_EQ(50000000, rate);
}

TEST(options)
{
	static const struct { const char *line, *message; } bad[] = {
		{ "--number 10", "--number must be a number from 0 to 9, not '10'" },
		{ "--count 0", "--count must be a number from 1 to 60000, not '0'" },
		{ "--count=1e3", "--count must be a number from 1 to 60000, not '1e3'" },
		{ "--amount 0.5", "--amount must be a number from 1 to 1000, not '0.5'" },
		{ "--share 100", "--share must be a number from 1 to 99, not '100'" },
		{ "--time 5s", "--time must be a number from 1 to 1000, not '5s'" },
		{ "--time -5", "--time must be a number from 1 to 1000, not '-5'" },
		{ "--choice pause", "--choice must be stun, switchover or abort, not 'pause'" },
		{ "--to a:b", "port must be a number from 0 to 65535, not 'b'" },
	};
	int operands;
	size_t i;

	ASSERT_EQ(0, parse_words("-f --text=x --number 9 --count 60000 --amount 2.5 --share 50 --time 1.5 --size 4K "
				 "--rate 8bit --choice abort --to [::1]:7 -- --other y", &operands)) TH_LOG("%s", failure());
	EXPECT_TRUE(all.flag);
	EXPECT_FALSE(all.other);
	EXPECT_STREQ("x", all.text);
	EXPECT_EQ(9, all.number);
	EXPECT_EQ(60000, all.count);
	EXPECT_EQ(2.5, all.amount);
	EXPECT_EQ(0.5, all.share);
	EXPECT_EQ(1500, all.time_ms);
	EXPECT_EQ(4096, all.size);
	EXPECT_EQ(1, all.rate);
	EXPECT_EQ(2, all.choice);
	EXPECT_STREQ("::1", all.to.host);
	EXPECT_EQ(7, all.to.port);
	EXPECT_EQ(2, operands);

	/* An absent port is the usual one, also after one was given. */
	ASSERT_EQ(0, parse_words("--to a:1 --to b x --flag", &operands));
	EXPECT_STREQ("b", all.to.host);
	EXPECT_EQ(KMIG_PORT, all.to.port);
	EXPECT_FALSE(all.flag);
	EXPECT_EQ(2, operands);

	EXPECT_EQ(OPTIONS_HELP, parse_words("-f -h", &operands));
	EXPECT_EQ(OPTIONS_HELP, parse_words("--help", &operands));
	EXPECT_EQ(OPTIONS_BAD, parse_words("--none", &operands));
	EXPECT_EQ(OPTIONS_BAD, parse_words("--text", &operands));
	EXPECT_EQ(OPTIONS_BAD, parse_words("--flag=1", &operands));
	EXPECT_EQ(OPTIONS_BAD, parse_words("-x", &operands));
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		EXPECT_EQ(-EINVAL, parse_words(bad[i].line, &operands)) TH_LOG("accepted %s", bad[i].line);
		EXPECT_STREQ(bad[i].message, failure());
	}
	failure_clear();
}

TEST(help)
{
	static const char want[] =
		"  -f, --flag       a flag\n"
		"  --other          another\n"
		"  --text T         a text\n";
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	options_help(table, file);
	fclose(file);
	EXPECT_EQ(0, strncmp(text, want, strlen(want))) TH_LOG("%s", text);
	free(text);
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

/* JSON has no word for them, and takes no bytes that are no text. */
TEST(output_of_what_json_cannot_have)
{
	struct json_object *root, *value;
	struct out *o = out_new(NULL);
	char *text = NULL;
	size_t length;
	FILE *file;

	out_object(o, NULL);
	out_float(o, "inf", NULL, INFINITY);
	out_float(o, "nan", NULL, NAN);
	out_string(o, "text", NULL, "a\xff\xc3\xa9\xe2\x82\x1b\"");
	out_end(o);
	file = open_memstream(&text, &length);
	out_print_json(o, file);
	fclose(file);
	out_free(o);
	root = json_tokener_parse(text);
	ASSERT_NE(NULL, root) TH_LOG("%s", text);
	EXPECT_EQ(NULL, strstr(text, "nf,")) TH_LOG("%s", text);
	ASSERT_TRUE(json_object_object_get_ex(root, "nan", &value));
	EXPECT_EQ(NULL, value);
	ASSERT_TRUE(json_object_object_get_ex(root, "text", &value));
	EXPECT_STREQ("a\xef\xbf\xbd\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"", json_object_get_string(value));
	json_object_put(root);
	free(text);
}

static struct out *small_report(void)
{
	struct out *o = out_new(NULL);

	out_object(o, NULL);
	out_uint(o, "n", NULL, 7);
	out_end(o);
	return o;
}

/* What a name leads to is written to; only a plain file is replaced. */
TEST(report_to_what_is_no_file)
{
	char dir[] = "/tmp/kmig-parse.XXXXXX", file[64], link[64], fifo[64], text[64];
	struct out *o = small_report();
	struct stat st;
	ssize_t n;
	int fd;

	ASSERT_NE(NULL, mkdtemp(dir));
	snprintf(file, sizeof(file), "%s/file", dir);
	snprintf(link, sizeof(link), "%s/link", dir);
	snprintf(fifo, sizeof(fifo), "%s/fifo", dir);
	EXPECT_EQ(0, out_write_report(o, file));
	ASSERT_EQ(0, truncate(file, 0));
	ASSERT_EQ(0, symlink("file", link));
	EXPECT_EQ(0, out_write_report(o, link));
	ASSERT_EQ(0, lstat(link, &st));
	EXPECT_TRUE(S_ISLNK(st.st_mode));
	ASSERT_EQ(0, stat(file, &st));
	EXPECT_LT(0, st.st_size);

	ASSERT_EQ(0, mkfifo(fifo, 0600));
	fd = open(fifo, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	EXPECT_EQ(0, out_write_report(o, fifo));
	n = read(fd, text, sizeof(text) - 1);
	EXPECT_LT(0, n);
	ASSERT_EQ(0, lstat(fifo, &st));
	EXPECT_TRUE(S_ISFIFO(st.st_mode));
	close(fd);
	out_free(o);
	unlink(fifo);
	unlink(link);
	unlink(file);
	EXPECT_EQ(0, rmdir(dir));
}

static double number_at(struct json_object *root, const char *first, const char *second)
{
	struct json_object *value = root;

	if (!json_object_object_get_ex(value, first, &value) ||
	    (second && !json_object_object_get_ex(value, second, &value)))
		return -1;
	return json_object_get_double(value);
}

/* One that was stunned, held pages back, and was forecast. */
static struct kmig_round_report round_reports[] = {
	{ .round = 1, .dirty_pages = 1000, .data_pages = 1000, .bytes = 4096000, .duration_ns = 1000000000 },
	{ .round = 2, .dirty_pages = 500, .data_pages = 500, .bytes = 2048000, .duration_ns = 500000000,
	  .held_pages = 40, .stun_pages_per_second = 600, .forecast_error = 0.125 },
	{ .round = 3, .dirty_pages = 90, .data_pages = 90, .bytes = 368640, .duration_ns = 90000000, .scan_ns = 20000000 },
};

static void tell(struct account *a)
{
	struct kmig_report r = {
		.size = sizeof(r), .verdict = KMIG_COMPLETED, .state = KMIG_STATE_CLEANUP,
		.total_ns = 2100000000, .downtime_ns = 28000000, .page_size = 4096, .ram_bytes = 4096000,
		.state_ns = { [KMIG_STATE_FIRST_PASS] = 100000000, [KMIG_STATE_BLACKOUT] = 1600000000,
			      [KMIG_STATE_CLEANUP] = 2000000000 },
		.downtime = { 1000000, 2000000, 3000000, 4000000, 5000000, 6000000, 7000000 },
		.guest = { .write_faults = 590, .fault_ns = 3000000, .stuns = 30, .stun_ns = 450000000,
			   .stun_max_ns = 20000000, .threads = 1, .thread = { { 77, 30, 300000000 } } },
		.decision = "what is left fits the downtime", .memory_harvest_ns = 1250000, .memory_copy_ns = 1750000,
		.channels = 4, .channels_why = "more of them carried no more",
	};
	struct kmig_report now = { .total_ns = 90000000, .state = KMIG_STATE_CHANNELS, .max_bandwidth = 4500000 };

	a->source = true;
	account_progress(a, &now);
	now.state = KMIG_STATE_FIRST_PASS;
	now.total_ns = 1100000000;
	a->report = now;
	account_progress(a, &now);
	account_round(a, &round_reports[0]);
	now.state = KMIG_STATE_ITERATION;
	now.total_ns = 1600000000;
	now.forecast = (struct kmig_forecast){ .converges = true, .rounds = 2, .bytes = 2500000, .total_ns = 800000000,
					       .downtime_ns = 30000000, .stun_pages_per_second = 600 };
	a->report = now;
	account_progress(a, &now);
	account_round(a, &round_reports[1]);
	now.max_bandwidth = 0;
	now.state = KMIG_STATE_BLACKOUT;
	now.forecast.rounds = 9;	/* a later one, which is not shown */
	a->report = now;
	account_progress(a, &now);
	account_round(a, &round_reports[2]);
	a->report = r;
}

static struct json_object *put(const struct account *a, char **text)
{
	struct json_object *root;
	size_t length;
	FILE *file = open_memstream(text, &length);
	struct out *o = out_new(file);

	report_put(o, a, "");
	root = json_object_get(out_json(o));
	out_free(o);
	fclose(file);
	return root;
}

TEST(report)
{
	static const char *const parts[] = {
		"pause", "device-state-out", "memory", "digests", "device-state-in", "commit", "resume",
	};
	static const char *const said[] = {
		"    HELD CEILING ERROR\n", "      40     600   12%\n",
		"downtime in ms: pause 1.0, device state out 2.0, memory 3.0 (harvest 1.2, copy 1.8), digests 4.0, device state in 5.0, commit 6.0, resume 7.0\n",
		"pre-copy ended: what is left fits the downtime\n",
		"4 data channels carried: more of them carried no more\n",
		"bandwidth limited to 4.500 MB/s, no more from 1.6 s on\n",
		"forecast, round 1: 2 rounds, 2.4 MiB, 0.8 s, downtime 30 ms, stun 600/s\n",
		"what came:         1 round, 2.3 MiB, 0.9 s, downtime 28 ms\n",
		"the guest felt: 590 write faults, 3.0 ms in them\n",
		"stunned 30 times, 450 ms, the longest 20.0 ms\n",
		"  thread 77: 30 stuns, 300 ms, 20 % of the time until the blackout\n",
	};
	struct account a = { 0 };
	struct json_object *root;
	double sum = 0;
	char *text;
	size_t i;

	tell(&a);
	root = put(&a, &text);
	for (i = 0; i < sizeof(said) / sizeof(said[0]); i++)
		EXPECT_NE(NULL, strstr(text, said[i])) TH_LOG("line %zu is not said, but:\n%s", i, text);
	for (i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		sum += number_at(root, "downtime-parts", parts[i]);
	EXPECT_EQ(number_at(root, "downtime", NULL), sum);
	EXPECT_EQ(number_at(root, "downtime-parts", "memory"),
		  number_at(root, "memory-parts", "harvest") + number_at(root, "memory-parts", "copy"));
	EXPECT_EQ(2, number_at(root, "forecast", "dirty-sync-count"));
	EXPECT_EQ(20, number_at(root, "guest", "cpu-throttle-percentage"));
	json_object_put(root);
	free(text);
	account_free(&a);
}

/* Each change of the cap, with its time; the text has the first of them. */
TEST(report_of_caps)
{
	static const uint64_t caps[] = { 1000000, 1000000, 500000, 0, 0, 2000000, 3000000, 4000000 };
	static const double told[][2] = { { 1, 1000000 }, { 3, 500000 }, { 4, 0 }, { 6, 2000000 }, { 7, 3000000 }, { 8, 4000000 } };
	struct account a = { .source = true, .report.state_ns[KMIG_STATE_FIRST_PASS] = 1000000 };
	struct kmig_report now = { 0 };
	struct json_object *root, *list;
	char *text;
	size_t i;

	for (i = 0; i < sizeof(caps) / sizeof(caps[0]); i++) {
		now.total_ns += 1000000;
		now.max_bandwidth = caps[i];
		account_progress(&a, &now);
	}
	root = put(&a, &text);
	EXPECT_NE(NULL, strstr(text, "bandwidth limited to 1.000 MB/s, to 0.500 MB/s from 0.0 s on, no more from 0.0 s on, "
				     "to 2.000 MB/s from 0.0 s on, and 2 changes more\n")) TH_LOG("%s", text);
	ASSERT_TRUE(json_object_object_get_ex(root, "max-bandwidth", &list));
	ASSERT_EQ(sizeof(told) / sizeof(told[0]), json_object_array_length(list));
	for (i = 0; i < sizeof(told) / sizeof(told[0]); i++) {
		EXPECT_EQ(told[i][0], number_at(json_object_array_get_idx(list, i), "ms", NULL));
		EXPECT_EQ(told[i][1], number_at(json_object_array_get_idx(list, i), "bytes-per-second", NULL));
	}
	json_object_put(root);
	free(text);
	account_free(&a);
}

/* How long rounds scanned is told where there is room; in the JSON always. */
TEST(report_of_scanning)
{
	static const char *const lines[] = {
		"ROUND    DIRTY     SENT     ZERO SECONDS    SCAN   MB/s  DIRTY/s    HELD CEILING\n",
		"    3       90       90        0    0.09    0.02    0.0        0       0       0\n",
	};
	struct json_object *root, *rounds, *value;
	struct account a = { 0 };
	char *text;
	size_t i;

	tell(&a);
	root = put(&a, &text);
	EXPECT_EQ(NULL, strstr(text, "SCAN"));
	ASSERT_TRUE(json_object_object_get_ex(root, "rounds", &rounds));
	ASSERT_TRUE(json_object_object_get_ex(json_object_array_get_idx(rounds, 2), "scan-seconds", &value));
	EXPECT_EQ(0.02, json_object_get_double(value));
	json_object_put(root);
	free(text);
	a.rounds[1].forecast_error = 0;
	root = put(&a, &text);
	for (i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		EXPECT_NE(NULL, strstr(text, lines[i])) TH_LOG("line %zu is not said, but:\n%s", i, text);
		EXPECT_GE(81, strlen(lines[i]));
	}
	json_object_put(root);
	free(text);
	account_free(&a);
}

/* What was not used, or cannot be known, is not told. */
TEST(report_leaves_out)
{
	static const char *const unsaid[] = {
		"HELD", "CEILING", "ERROR", "SCAN", "forecast", "guest", "Mbit", "copied", "ROUND", "downtime in", "bandwidth",
	};
	struct account a = { .report = { .verdict = KMIG_COMPLETED, .data_pages = 7, .copied_bytes = 7 << 12 } };
	struct json_object *root;
	char *text;
	size_t i;

	root = put(&a, &text);
	for (i = 0; i < sizeof(unsaid) / sizeof(unsaid[0]); i++)
		EXPECT_EQ(NULL, strstr(text, unsaid[i])) TH_LOG("word %zu is said:\n%s", i, text);
	EXPECT_EQ(-1, number_at(root, "rounds", NULL));
	EXPECT_EQ(-1, number_at(root, "ram", "mbps"));
	EXPECT_EQ(-1, number_at(root, "forecast", NULL));
	EXPECT_EQ(-1, number_at(root, "max-bandwidth", NULL));
	EXPECT_EQ(7, number_at(root, "ram", "normal"));
	json_object_put(root);
	free(text);
}

TEST(line_of_a_round)
{
	struct kmig_round_report r = {
		.round = 2, .dirty_pages = 1500, .data_pages = 1400, .zero_pages = 100, .duration_ns = 1250000000,
		.bytes_per_second = 4.7e6, .scan_ns = 31000000,
	};
	char text[PROGRESS_MAX];

	progress_round_text(&r, 79, text);
	EXPECT_STREQ("round 2: 1500 pages dirty, 1400 sent, 100 zero, 1.250 s, 4.7 MB/s, scan 0.031 s", text);
	/* It goes before anything else does. */
	progress_round_text(&r, 78, text);
	EXPECT_STREQ("round 2: 1500 pages dirty, 1400 sent, 100 zero, 1.250 s, 4.7 MB/s", text);
	r.held_pages = 7;
	r.stun_pages_per_second = 600;
	progress_round_text(&r, 80, text);
	EXPECT_STREQ("round 2: 1500 pages dirty, 1400 sent, 100 zero, 1.250 s, 4.7 MB/s, 7 held back, stunned to 600 pages/s", text);
	r.held_pages = 0;
	r.stun_pages_per_second = 0;
	r.scan_ns = 0;
	progress_round_text(&r, 80, text);
	EXPECT_STREQ("round 2: 1500 pages dirty, 1400 sent, 100 zero, 1.250 s, 4.7 MB/s", text);
}

TEST(progress_fits_the_line)
{
	struct kmig_report r = {
		.state = KMIG_STATE_ITERATION, .rounds = 12, .page_size = 4096, .remaining_bytes = 1023ull << 20,
		.bytes_per_second = 118e6, .dirty_pages_per_second = 54443, .stun_pages_per_second = 14404,
		.eta_ns = 12000000000, .forecast.downtime_ns = 280000000,
	};
	char text[PROGRESS_MAX];
	unsigned int columns;

	progress_text(&r, true, 80, text);
	EXPECT_STREQ("round 12, 1023.0 MiB left, 118 MB/s, dirty 223, max 59, ETA 12 s", text);
	progress_text(&r, true, 100, text);
	EXPECT_STREQ("round 12, 1023.0 MiB left, 118 MB/s, dirty 223, max 59, ETA 12 s, downtime 280 ms", text);
	r.rounds = 3;
	r.remaining_bytes = 1 << 20;
	r.stun_pages_per_second = 0;
	progress_text(&r, true, 80, text);
	EXPECT_STREQ("round 3, 1.0 MiB left, 118 MB/s, dirty 223, ETA 12 s, downtime 280 ms", text);
	for (columns = 0; columns < 300; columns++) {
		progress_text(&r, true, columns, text);
		EXPECT_TRUE(strlen(text) < columns || !*text) TH_LOG("%u columns: %s", columns, text);
	}
	/* No rate has been measured yet in the first pass: so far it was 30 MB/s, in 2 s of 6. */
	r = (struct kmig_report){
		.state = KMIG_STATE_FIRST_PASS, .rounds = 1, .page_size = 4096, .remaining_bytes = 64 << 20,
		.total_ns = 2500000000, .state_ns[KMIG_STATE_FIRST_PASS] = 500000000, .transferred_bytes = 60000000,
		.data_pages = 4 << 10, .zero_pages = 4 << 10,
	};
	progress_text(&r, true, 80, text);
	EXPECT_STREQ("first pass, 64.0 MiB left, 30 MB/s, done in 4.0 s", text);
	r = (struct kmig_report){ .state = KMIG_STATE_FIRST_PASS };
	progress_text(&r, true, 80, text);
	EXPECT_STREQ("first pass", text);
	r = (struct kmig_report){ .state = KMIG_STATE_ITERATION, .rounds = 2, .transferred_bytes = 64 << 20 };
	progress_text(&r, false, 80, text);
	EXPECT_STREQ("round 2, 64.0 MiB received", text);
}

TEST_HARNESS_MAIN
