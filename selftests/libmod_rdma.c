// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=kmig_rdma_next -Wl,--wrap=kmig_auth_token -Wl,--wrap=kmig_rdma_step
/*
 * Migrations over RDMA: the module's channels write into windows that libkmig lends, on soft-RoCE.
 * A guest that writes all the time is moved, and every byte compared; the device goes in every
 * phase, and TCP carries the rest.
 */
#include "kselftest_harness.h"
#include "lib_pair.h"
#include "rdma_link.h"

#include <linux/lmtrack_wire.h>

struct kmig_rdma;
struct kmig_rdma_conn;
struct kmig_session;

#define GUEST_BYTES (48 * MIB + 5 * PAGE_BYTES)
#define WINDOW_BYTES (4 * MIB)
#define CHANNELS 2

FIXTURE(rdma) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram, *copy;
	pthread_t thread;
};

FIXTURE_SETUP(rdma)
{
	if (access("/dev/lmtrack", F_OK))
		SKIP(return, "no /dev/lmtrack");
	ASSERT_TRUE(rdma_module_load());
	ASSERT_TRUE(rdma_link_up()) TH_LOG("no soft-RoCE");
	self->world = new_world();
	ASSERT_EQ(0, side_init(&self->source, self->world, true, GUEST_BYTES));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, GUEST_BYTES));
	self->ram = kmig_region_map(self->source.region);
	self->copy = kmig_region_map(self->destination.region);
	for (uint64_t at = 0; at < GUEST_BYTES; at += 8)
		*(uint64_t *)(self->ram + at) = at * 0x9e3779b97f4a7c15 + 1;
	self->source.guest = &self->world->guest;
	self->source.host = self->destination.host = RDMA_IPV4;
	self->source.transport = KMIG_TRANSPORT_AUTO;
	self->source.channels = CHANNELS;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	self->source.max_rounds = 8;
	/* An emulated machine is slow. */
	self->source.timeout_ms = self->destination.timeout_ms = 10000;
	self->destination.rdma_window_bytes = WINDOW_BYTES;
}

FIXTURE_TEARDOWN(rdma)
{
	side_end(&self->source);
	side_end(&self->destination);
	munmap(self->world, sizeof(*self->world));
}

static void move(FIXTURE_DATA(rdma) *self)
{
	guest_start(&self->world->guest, self->ram, -1, GUEST_BYTES, 4 * MIB, 1000);
	pthread_create(&self->thread, NULL, destination_main, &self->destination);
	while (!self->world->port)
		usleep(1000);
	source_main(&self->source);
	pthread_join(self->thread, NULL);
	guest_end(&self->world->guest);
}

#define EXPECT_MOVED() do {									\
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);		\
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);	\
	EXPECT_FALSE(self->world->source_runs);							\
	EXPECT_TRUE(self->world->destination_runs);						\
	EXPECT_TRUE(self->destination.state_right);						\
	EXPECT_EQ(0, memcmp(self->ram, self->copy, GUEST_BYTES));				\
} while (0)

#define RDMA_TEST(name) TEST_F_TIMEOUT(rdma, name, 120)

RDMA_TEST(moved)
{
	self->source.transport = KMIG_TRANSPORT_RDMA;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.rdma_channels);
	EXPECT_EQ(CHANNELS, self->destination.report.rdma_channels);
	EXPECT_EQ(0, self->source.report.copied_bytes);
	EXPECT_LE(GUEST_BYTES, self->source.report.zerocopy_bytes);
	EXPECT_EQ(self->source.report.data_pages, self->destination.report.data_pages);
	EXPECT_EQ(self->source.report.data_pages * PAGE_BYTES, self->destination.report.zerocopy_bytes);
	EXPECT_EQ(0, self->source.report.channels_lost);
}

RDMA_TEST(moved_over_ipv6)
{
	self->source.transport = KMIG_TRANSPORT_RDMA;
	self->source.host = self->destination.host = RDMA_IPV6;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.rdma_channels);
}

/*
 * Pages that become zero or are given back while their windows are lent out, and when that has
 * arrived, hold something again: what the source writes to then must still be the region's.
 */
static unsigned int holes_step, holes_seen;

static void make_holes(struct side *side, int at)
{
	uint8_t *ram = side->guest->ram;

	if (at == AT_ROUND && holes_step == 0) {
		memset(ram + 8 * MIB, 0, MIB);
		kmig_region_discard(side->region, 12 * MIB + PAGE_BYTES, 2 * MIB);
		holes_seen = side->rounds;
		holes_step = 1;
	} else if (at == AT_ROUND && holes_step == 1 && side->rounds > holes_seen + 1) {
		memset(ram + 8 * MIB + 3 * PAGE_BYTES, 0x5a, PAGE_BYTES);
		memset(ram + 13 * MIB, 0x33, 3 * PAGE_BYTES);
		holes_step = 2;
	} else if (at == AT_SAVE) {
		kmig_region_discard(side->region, 20 * MIB, 5 * PAGE_BYTES);
	}
}

RDMA_TEST(holes_in_windows)
{
	self->source.hook = make_holes;
	/* So that there are rounds enough: nothing gets it down to a millisecond. */
	self->source.downtime_ms = 1;
	self->source.no_stun = true;
	self->source.max_rounds = 12;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(2, holes_step);
	EXPECT_EQ(CHANNELS, self->source.report.rdma_channels);
	EXPECT_EQ(0, self->source.report.channels_lost);
}

/* Memory that was never touched is not lent, and so is none at the destination, either. */
RDMA_TEST(sparse)
{
	ASSERT_EQ(0, kmig_region_discard(self->source.region, 0, GUEST_BYTES));
	for (uint64_t at = 32 * MIB; at < 33 * MIB; at += PAGE_BYTES)
		self->ram[at] = 1;
	move(self);
	/* The guest writes to the first window, we have to another, and pausing it to the last page. */
	EXPECT_GE(2 * WINDOW_BYTES + 5 * PAGE_BYTES, resident(self->destination.region));
	EXPECT_LT(MIB, resident(self->destination.region));
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.rdma_channels);
}

/* ---- Where it cannot be had ---- */

RDMA_TEST(no_device_there)
{
	self->source.host = self->destination.host = "127.0.0.1";
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(0, self->source.report.rdma_channels);
}

RDMA_TEST(no_device_there_and_nothing_else)
{
	self->source.transport = KMIG_TRANSPORT_RDMA;
	self->source.host = self->destination.host = "127.0.0.1";
	move(self);
	EXPECT_EQ(-ENODEV, self->world->source_result);
	EXPECT_NE(NULL, strstr(self->source.error, "cannot do RDMA")) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->world->source_runs);
	EXPECT_FALSE(self->world->destination_runs);
	EXPECT_TRUE(self->world->discarded);
}

RDMA_TEST(window_errors)
{
	self->destination.rdma_window_bytes = WINDOW_BYTES + PAGE_BYTES;
	self->source.transport = KMIG_TRANSPORT_RDMA;
	move(self);
	EXPECT_EQ(-EINVAL, self->world->source_result);
	EXPECT_TRUE(self->world->source_runs);
}

/* The source's tokens, which are made before the destination makes its own to compare. */
static enum { RIGHT, WRONG, THE_FIRST } tokens;
static _Atomic unsigned int tokens_made;

int __real_kmig_auth_token(const struct kmig_session *session, uint64_t stream, uint32_t channel,
			   struct lmtrack_wire_token *token);

int __wrap_kmig_auth_token(const struct kmig_session *session, uint64_t stream, uint32_t channel,
			   struct lmtrack_wire_token *token)
{
	bool source = !(tokens_made++ % 2);
	int err = __real_kmig_auth_token(session, stream, source && tokens == THE_FIRST ? 0 : channel, token);

	if (source && tokens == WRONG)
		token->mac[31] ^= 1;
	return err;
}

RDMA_TEST(wrong_token)
{
	tokens = WRONG;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(0, self->source.report.rdma_channels);
}

RDMA_TEST(token_of_another_channel)
{
	tokens = THE_FIRST;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(1, self->source.report.rdma_channels);
	EXPECT_EQ(1, self->destination.report.rdma_channels);
}

RDMA_TEST(wrong_token_and_nothing_else)
{
	tokens = WRONG;
	self->source.transport = KMIG_TRANSPORT_RDMA;
	move(self);
	EXPECT_EQ(-EACCES, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->world->source_runs);
}

/* Packets that get lost: the source hears nothing, and gives up in time for TCP. */
static bool deaf;

void __real_kmig_rdma_step(struct kmig_rdma *rdma);

void __wrap_kmig_rdma_step(struct kmig_rdma *rdma)
{
	if (!deaf)
		__real_kmig_rdma_step(rdma);
}

RDMA_TEST(no_answer)
{
	if (rdma_is_iwarp())
		SKIP(return, "the kernel's iWARP waits for ten seconds, whoever asks");
	deaf = true;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(0, self->source.report.rdma_channels);
}

/* ---- Losses ---- */

/*
 * What comes after this moment finds nobody at the destination, as after a failure of the device:
 * pages may be in their place, and no frame tells of them.
 */
static _Atomic bool broken;
static _Atomic unsigned int taken, break_at;

int __real_kmig_rdma_next(struct kmig_rdma_conn *conn, void **bytes, size_t *length);

int __wrap_kmig_rdma_next(struct kmig_rdma_conn *conn, void **bytes, size_t *length)
{
	int err = __real_kmig_rdma_next(conn, bytes, length);

	if (!err && ++taken == break_at)
		broken = true;
	return broken ? -ECONNRESET : err;
}

static int broken_at = -1;

static void break_at_state(struct side *side, int at)
{
	(void)side;
	if (at == broken_at)
		broken = true;
}

/* In the middle of the first round, whose chunks are a frame each. */
RDMA_TEST(lost_in_a_round)
{
	for (break_at = 1; break_at < 20; break_at += 6) {
		taken = 0;
		broken = false;
		if (break_at > 1) {
			self->world->port = 0;
			self->world->source_runs = true;
			kmig_region_clear(self->destination.region);
		}
		move(self);
		EXPECT_MOVED();
		EXPECT_EQ(CHANNELS, self->source.report.rdma_channels);
		EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
		EXPECT_LE(1, self->source.report.channels_rejoined);
	}
}

RDMA_TEST(lost_between_rounds)
{
	broken_at = KMIG_STATE_ITERATION;
	self->source.hook = break_at_state;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
	EXPECT_LE(1, self->source.report.channels_rejoined);
}

RDMA_TEST(lost_in_the_blackout)
{
	broken_at = AT_PAUSE;
	self->source.hook = break_at_state;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
}

RDMA_TEST(lost_while_saving)
{
	broken_at = AT_SAVE;
	self->source.hook = break_at_state;
	move(self);
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
}

/* The source learns of it from the destination alone. */
RDMA_TEST(lost_and_nothing_else)
{
	self->source.transport = KMIG_TRANSPORT_RDMA;
	broken_at = KMIG_STATE_ITERATION;
	self->source.hook = break_at_state;
	move(self);
	EXPECT_GT(0, self->world->source_result);
	EXPECT_NE(NULL, strstr(self->source.error, "nothing else is allowed")) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->world->source_runs);
	EXPECT_FALSE(self->world->destination_runs);
	EXPECT_TRUE(self->world->discarded);
}

TEST_HARNESS_MAIN
