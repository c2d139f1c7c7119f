// SPDX-License-Identifier: GPL-2.0
/*
 * Data channels over several paths: both engines in a network namespace of their own, on several
 * addresses of its loopback device, with devices beside it that lead nowhere.
 */
#define SOURCE_REGION KMIG_REGION_MEMFD
#include "kselftest_harness.h"
#include "lib_pair.h"

#include <arpa/inet.h>
#include <sched.h>
#include <sys/socket.h>

#define GUEST_BYTES (24 * MIB)
#define CHANNELS 4

/* Nobody answers there, and nobody says that nobody does. */
#define SILENT "10.1.0.2"
static const char *const devices[] = {
	"ip link set lo up",
	"ip link add silent arp off type veth peer name nobody",
	"ip addr add 10.1.0.1/24 dev silent",
	"ip link set silent up",
	"ip link set nobody up",
};

/* ---- Who is connected to whom ---- */

struct connection {
	char local[16], remote[16];
	uint16_t port;			/* the remote one */
};

/* TCP connections that are established. */
static unsigned int connections(struct connection *list, unsigned int most)
{
	char line[256], local[16], remote[16];
	unsigned int port, state, n = 0;
	FILE *file = fopen("/proc/self/net/tcp", "r");

	while (file && n < most && fgets(line, sizeof(line), file)) {
		struct in_addr a, b;

		if (sscanf(line, " %*u: %8[0-9A-F]:%*x %8[0-9A-F]:%x %x", local, remote, &port, &state) != 4 || state != 1)
			continue;
		a.s_addr = strtoul(local, NULL, 16);
		b.s_addr = strtoul(remote, NULL, 16);
		inet_ntop(AF_INET, &a, list[n].local, sizeof(list[n].local));
		inet_ntop(AF_INET, &b, list[n].remote, sizeof(list[n].remote));
		list[n++].port = port;
	}
	if (file)
		fclose(file);
	return n;
}

static struct connection seen[64];
static unsigned int seen_count;

static void look(struct side *side, int at)
{
	(void)side;
	if (at == KMIG_STATE_FIRST_PASS)
		seen_count = connections(seen, 64);
}

/* To the destination's port: the other ends of these connections have another. */
static unsigned int over(const char *local, const char *remote, uint16_t port)
{
	unsigned int n = 0;

	for (unsigned int i = 0; i < seen_count; i++)
		n += seen[i].port == port && !strcmp(seen[i].local, local) && !strcmp(seen[i].remote, remote);
	return n;
}

/* ---- A migration ---- */

FIXTURE(paths) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
};

FIXTURE_SETUP(paths)
{
	if (unshare(CLONE_NEWNET | (geteuid() ? CLONE_NEWUSER : 0)))
		SKIP(return, "no network namespace to be had");
	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++)
		ASSERT_EQ(0, system(devices[i]));
	self->world = new_world();
	side_init(&self->source, self->world, true, GUEST_BYTES);
	side_init(&self->destination, self->world, false, GUEST_BYTES);
	self->ram = kmig_region_map(self->source.region);
	for (uint64_t at = 0; at < GUEST_BYTES; at += 8)
		*(uint64_t *)(self->ram + at) = at * 0x9e3779b97f4a7c15 + 1;
	kmig_region_map(self->destination.region);
	self->source.guest = &self->world->guest;
	self->source.channels = CHANNELS;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	self->source.hook = look;
	seen_count = 0;
}

FIXTURE_TEARDOWN(paths)
{
	if (!self->world)
		return;
	side_end(&self->source);
	side_end(&self->destination);
	munmap(self->world, sizeof(*self->world));
}

static void move(FIXTURE_DATA(paths) *self)
{
	pthread_t thread;

	guest_start(&self->world->guest, self->ram, -1, GUEST_BYTES, MIB, 1000);
	pthread_create(&thread, NULL, destination_main, &self->destination);
	while (!self->world->port)
		usleep(1000);
	source_main(&self->source);
	pthread_join(thread, NULL);
	guest_end(&self->world->guest);
}

/* A kernel without a tracker for memfds cannot begin. */
#define MOVE() do {										\
	move(self);										\
	if (self->world->source_result == -EOPNOTSUPP)						\
		SKIP(return, "this kernel has no PAGEMAP_SCAN");				\
} while (0)

#define EXPECT_MOVED() do {									\
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);		\
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);	\
	EXPECT_EQ(0, memcmp(self->ram, kmig_region_map(self->destination.region), GUEST_BYTES));	\
} while (0)

static const struct kmig_address more[] = { { .host = "127.0.0.12" }, { .host = "127.0.0.13" } };

TEST_F(paths, channels_are_spread_over_them)
{
	static const struct kmig_path paths[] = {
		{ .local = "127.0.0.2", .remote = "127.0.0.12" },
		{ .local = "127.0.0.3", .device = "lo", .remote = "127.0.0.13" },
		{ .local = "127.0.0.4" },
	};

	self->source.paths = paths;
	self->source.path_count = 3;
	self->destination.more = more;
	self->destination.more_count = 2;
	MOVE();
	EXPECT_MOVED();
	EXPECT_EQ(2, over("127.0.0.2", "127.0.0.12", self->world->port));
	EXPECT_EQ(1, over("127.0.0.3", "127.0.0.13", self->world->port));
	EXPECT_EQ(1, over("127.0.0.4", "127.0.0.1", self->world->port));
	/* The control connection. */
	EXPECT_EQ(1, over("127.0.0.1", "127.0.0.1", self->world->port));
}

/* One that refuses, one that has not the device, one that is silent: the last is left. */
TEST_F(paths, all_but_one_dead)
{
	static const struct kmig_path paths[] = {
		{ .local = "127.0.0.2", .remote = "127.0.0.99" },
		{ .device = "missing" },
		{ .remote = SILENT },
		{ .local = "127.0.0.4" },
	};

	self->source.paths = paths;
	self->source.path_count = 4;
	MOVE();
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, over("127.0.0.4", "127.0.0.1", self->world->port));
	EXPECT_EQ(0, self->source.report.channels_lost);
}

TEST_F(paths, all_dead)
{
	static const struct kmig_path paths[] = { { .remote = SILENT }, { .remote = "127.0.0.99" } };

	self->source.paths = paths;
	self->source.path_count = 2;
	self->source.timeout_ms = 1000;
	MOVE();
	EXPECT_NE(0, self->world->source_result);
	EXPECT_NE(NULL, strstr(self->source.error, ": connecting to 127.0.0.1: ")) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->world->source_runs);
	EXPECT_FALSE(self->world->destination_runs);
}

/* An address of the other family does not lead to where the control connection goes. */
TEST_F(paths, wrong_ones_are_refused)
{
	static const struct {
		struct kmig_path path;
		const char *message;
	} bad[] = {
		{ { .local = "localhost" }, "path: 'localhost' is no address" },
		{ { .remote = "127.0.0.256" }, "path: '127.0.0.256' is no address" },
		{ { .local = "127.0.0.1", .remote = "::1" }, "path: from 127.0.0.1 to ::1 no connection can be made" },
		{ { .local = "127.0.0.1", .port = 7 }, "path: a port, and no address that it is of" },
		{ { .device = "a-name-of-16-char" }, "path: 'a-name-of-16-char' is no network device's name" },
	};
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_path good = { .local = NULL };
	struct kmig_source *source;

	opts.host = "127.0.0.1";
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.path_count = 1;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		opts.paths = &bad[i].path;
		EXPECT_EQ(-EINVAL, kmig_source_new(self->source.ctx, &opts, &source_ops, NULL, &source));
		EXPECT_STREQ(bad[i].message, kmig_ctx_error(self->source.ctx));
	}
	opts.paths = NULL;
	EXPECT_EQ(-EINVAL, kmig_source_new(self->source.ctx, &opts, &source_ops, NULL, &source));
	opts.paths = &good;
	opts.path_count = KMIG_PATHS_MAX + 1;
	EXPECT_EQ(-EINVAL, kmig_source_new(self->source.ctx, &opts, &source_ops, NULL, &source));
}

TEST_F(paths, listens_on_several)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_address other[KMIG_LISTEN_MAX] = { { .host = "127.0.0.2" }, { .host = "::1" } };
	struct kmig_destination *destination;

	opts.port = 0;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.more = other;
	opts.more_count = 2;
	ASSERT_EQ(0, kmig_destination_new(self->destination.ctx, &opts, &destination_ops, NULL, &destination))
		TH_LOG("%s", kmig_ctx_error(self->destination.ctx));
	kmig_destination_free(destination);
	other[0].host = "10.1.0.77";
	EXPECT_EQ(-EADDRNOTAVAIL, kmig_destination_new(self->destination.ctx, &opts, &destination_ops, NULL, &destination));
	opts.more_count = KMIG_LISTEN_MAX;
	EXPECT_EQ(-EINVAL, kmig_destination_new(self->destination.ctx, &opts, &destination_ops, NULL, &destination));
}

TEST_HARNESS_MAIN
