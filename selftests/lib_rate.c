// SPDX-License-Identifier: GPL-2.0
/*
 * A cap on the bandwidth of a migration, and what marks its packets: both engines over loopback,
 * with the tracker and the sender in user space.
 */
#define SOURCE_REGION KMIG_REGION_MEMFD
#include "kselftest_harness.h"
#include "lib_pair.h"

#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "../lib/net.h"

#define RAM_BYTES (8 * MIB)

FIXTURE(rate) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
	pthread_t thread;
};

FIXTURE_VARIANT(rate) {
	unsigned int channels;
};

FIXTURE_VARIANT_ADD(rate, one_channel) { .channels = 1 };
FIXTURE_VARIANT_ADD(rate, three_channels) { .channels = 3 };

FIXTURE_SETUP(rate)
{
	self->world = new_world();
	ASSERT_EQ(0, side_init(&self->source, self->world, true, RAM_BYTES));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, RAM_BYTES));
	self->ram = kmig_region_map(self->source.region);
	ASSERT_NE(NULL, self->ram);
	memset(self->ram, 0x5a, RAM_BYTES);
	self->source.channels = variant->channels;
}

FIXTURE_TEARDOWN(rate)
{
	side_end(&self->source);
	side_end(&self->destination);
}

#define MIGRATE() do {										\
	pthread_create(&self->thread, NULL, destination_main, &self->destination);		\
	while (!self->world->port)								\
		usleep(1000);									\
	source_main(&self->source);								\
	pthread_join(self->thread, NULL);							\
} while (0)

#define EXPECT_MOVED() do {									\
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);		\
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);	\
	EXPECT_EQ(0, memcmp(self->ram, kmig_region_map(self->destination.region), RAM_BYTES));	\
} while (0)

/* From the beginning of the first pass to its end. */
static double pass_ns(const struct side *source)
{
	return source->report.state_ns[KMIG_STATE_ITERATION] - source->report.state_ns[KMIG_STATE_FIRST_PASS];
}

/* How well, bench_rate measures on the module: here a machine may be as slow as it likes. */
TEST_F(rate, is_held)
{
	double rate;

	self->source.max_bandwidth = 4000000;
	MIGRATE();
	EXPECT_MOVED();
	rate = RAM_BYTES * 1e9 / pass_ns(&self->source);
	TH_LOG("%.2f MB/s, on the wire %.2f", rate / 1e6, self->source.report.bytes_per_second / 1e6);
	EXPECT_GT(4.2e6, rate);
	EXPECT_LT(2e6, rate);
	/* By which is judged what fits the downtime. */
	EXPECT_GE(4e6, self->source.report.bytes_per_second);
	EXPECT_EQ(4000000, self->source.report.max_bandwidth);
}

/* A guest that is paused has just written so much. */
static void write_a_mib(struct side *side, int at)
{
	if (at == AT_PAUSE)
		memset(kmig_region_map(side->region), 0xa5, MIB);
}

TEST_F(rate, holds_in_the_blackout)
{
	self->source.max_bandwidth = 4000000;
	self->source.hook = write_a_mib;
	MIGRATE();
	EXPECT_MOVED();
	TH_LOG("%.0f ms for 1 MiB", self->source.report.downtime.memory_ns / 1e6);
	EXPECT_LT(200000000, self->source.report.downtime.memory_ns + self->source.report.downtime.save_ns);
}

/* ---- Changed while it runs ---- */

static struct kmig_source *volatile running;
static volatile uint64_t wanted;

static void set_wanted(int signal)
{
	(void)signal;
	if (kmig_source_set_max_bandwidth(running, wanted))
		abort();
}

static void abort_running(int signal)
{
	(void)signal;
	kmig_source_abort(running);
}

static void in_ms(void (*handler)(int), unsigned int ms)
{
	struct itimerval timer = { .it_value = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 } };
	struct sigaction sa = { .sa_handler = handler };

	sigaction(SIGALRM, &sa, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
}

static void raise_soon(struct side *side, int at)
{
	running = side->engine;
	if (at == KMIG_STATE_FIRST_PASS && !wanted) {
		wanted = 1000000000;
		in_ms(set_wanted, 500);
	}
}

TEST_F(rate, is_raised_by_a_signal_handler)
{
	wanted = 0;
	self->source.max_bandwidth = 500000;	/* 16 s */
	self->source.hook = raise_soon;
	MIGRATE();
	EXPECT_MOVED();
	EXPECT_LT(500000000, pass_ns(&self->source));
	EXPECT_GT(8e9, pass_ns(&self->source));
	EXPECT_EQ(1000000000, self->source.report.max_bandwidth);
}

static void lower_soon(struct side *side, int at)
{
	running = side->engine;
	if (at == KMIG_STATE_FIRST_PASS && !wanted) {
		wanted = 2000000;
		in_ms(set_wanted, 300);
	}
}

TEST_F(rate, is_lowered_by_a_signal_handler)
{
	wanted = 0;
	self->source.max_bandwidth = 10000000;	/* 3 MB in the first 0.3 s */
	self->source.hook = lower_soon;
	MIGRATE();
	EXPECT_MOVED();
	EXPECT_LT(2.2e9, pass_ns(&self->source));
	EXPECT_GE(2e6, self->source.report.bytes_per_second);
}

static void abort_soon(struct side *side, int at)
{
	running = side->engine;
	if (at == KMIG_STATE_FIRST_PASS)
		in_ms(abort_running, 300);
}

TEST_F(rate, ends_at_once_when_aborted)
{
	self->source.max_bandwidth = KMIG_BANDWIDTH_MIN;
	self->source.hook = abort_soon;
	MIGRATE();
	EXPECT_EQ(-ECANCELED, (int)self->world->source_result);
	EXPECT_GT(3e9, self->source.report.total_ns);
	EXPECT_TRUE(self->world->source_runs);
}

/* ---- Marks ---- */

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t length = sizeof(value);

	return getsockopt(fd, level, name, &value, &length) ? -1 : value;
}

static unsigned int marked_sockets(int dscp, int priority)
{
	unsigned int n = 0;

	for (int fd = 0; fd < 256; fd++)
		n += option(fd, IPPROTO_IP, IP_TOS) == dscp << 2 && option(fd, SOL_SOCKET, SO_PRIORITY) == priority;
	return n;
}

static unsigned int marked;

/* Both sides are in this process. */
static void count_marked(struct side *side, int at)
{
	if (at == KMIG_STATE_FIRST_PASS)
		marked = marked_sockets(side->dscp, side->priority);
}

TEST_F(rate, all_connections_are_marked)
{
	self->source.marked = true;
	self->source.dscp = 10;
	self->source.priority = 1;
	self->source.hook = count_marked;
	MIGRATE();
	EXPECT_MOVED();
	EXPECT_EQ(variant->channels + 1, marked);
}

FIXTURE(mark) {
	struct kmig_ctx *ctx;
	int listener, port;
};

FIXTURE_VARIANT(mark) {
	const char *address;
};

FIXTURE_VARIANT_ADD(mark, ipv4) { .address = "127.0.0.1" };
FIXTURE_VARIANT_ADD(mark, ipv6) { .address = "::1" };
FIXTURE_VARIANT_ADD(mark, mapped) { .address = "::ffff:127.0.0.1" };

FIXTURE_SETUP(mark)
{
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	int one = 1;

	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	self->listener = kmig_net_listen(self->ctx, variant->address, 0);
	if (self->listener < 0)
		SKIP(return, "%s", kmig_ctx_error(self->ctx));
	ASSERT_EQ(0, setsockopt(self->listener, IPPROTO_TCP, TCP_SAVE_SYN, &one, sizeof(one)));
	ASSERT_EQ(0, kmig_net_set_blocking(self->listener, true));
	ASSERT_EQ(0, getsockname(self->listener, (struct sockaddr *)&address, &length));
	/* At the same place in both. */
	self->port = ntohs(((struct sockaddr_in *)&address)->sin_port);
}

FIXTURE_TEARDOWN(mark)
{
	close(self->listener);
	kmig_ctx_free(self->ctx);
}

/* The DSCP of the first packet of a connection, as its receiver has seen it. */
static int dscp_of_syn(int listener)
{
	int fd = accept(listener, NULL, NULL);
	uint8_t packet[256];
	socklen_t length = sizeof(packet);
	int err = getsockopt(fd, IPPROTO_TCP, TCP_SAVED_SYN, packet, &length);

	close(fd);
	if (err || length < sizeof(struct iphdr))
		return -1;
	if (packet[0] >> 4 == 4)
		return ((struct iphdr *)packet)->tos >> 2;
	return ntohl(((struct ip6_hdr *)packet)->ip6_flow) >> 22 & 0x3f;
}

#define EXPECT_MARK(fd, wanted_dscp, wanted_priority) do {					\
	EXPECT_EQ(wanted_dscp, dscp_of_syn(self->listener));					\
	if (strchr(variant->address, ':')) {							\
		EXPECT_EQ((wanted_dscp) << 2, option(fd, IPPROTO_IPV6, IPV6_TCLASS));		\
	}											\
	EXPECT_EQ((wanted_dscp) << 2, option(fd, IPPROTO_IP, IP_TOS));				\
	EXPECT_EQ(wanted_priority, option(fd, SOL_SOCKET, SO_PRIORITY));			\
} while (0)

TEST_F(mark, is_on_the_first_packet)
{
	static const struct kmig_net_mark marks[] = { { 63, 6 }, { 0, 0 }, { 10, 3 }, { -1, 5 }, { -1, -1 } };

	for (unsigned int i = 0; i < 5; i++) {
		int dscp = marks[i].dscp < 0 ? 0 : marks[i].dscp;
		int priority = marks[i].priority < 0 ? 0 : marks[i].priority;
		int fd = kmig_net_connect(self->ctx, variant->address, self->port, 1000, -1, &marks[i]), again;
		struct kmig_net_path path = { .local.ss_family = AF_UNSPEC };

		ASSERT_LE(0, fd) TH_LOG("%s", kmig_ctx_error(self->ctx));
		EXPECT_MARK(fd, dscp, priority);
		ASSERT_EQ(0, kmig_net_path_complete(&path, fd));
		again = kmig_net_begin(&path, 1000, &marks[i]);
		ASSERT_LE(0, again);
		EXPECT_MARK(again, dscp, priority);
		close(again);
		close(fd);
	}
}

TEST_HARNESS_MAIN
