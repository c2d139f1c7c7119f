// SPDX-License-Identifier: GPL-2.0
/*
 * Both engines over loopback on the module: a guest of two processes that write all the time
 * is moved and every byte compared; and either side aborts, or is killed, on the way.
 */
#include "kselftest_harness.h"
#include "lib_pair.h"

#define GUEST_BYTES (64 * MIB + 5 * PAGE_BYTES)

FIXTURE(pair) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
	pthread_t thread;
};

FIXTURE_SETUP(pair)
{
	int err;

	self->world = new_world();
	err = side_init(&self->source, self->world, true, GUEST_BYTES);
	if (err == -ENOENT || err == -ENXIO)
		SKIP(return, "no /dev/lmtrack");
	ASSERT_EQ(0, err);
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, GUEST_BYTES));
	self->ram = kmig_region_map(self->source.region);
	ASSERT_NE(NULL, self->ram);
	fill(self->ram, GUEST_BYTES);
	memset(kmig_region_map(self->destination.region), 0x55, 3 * MIB);
	self->source.guest = &self->world->guest;
	self->source.timeout_ms = self->destination.timeout_ms = 20000;
}

FIXTURE_TEARDOWN(pair)
{
	side_end(&self->source);
	side_end(&self->destination);
}

#define MIGRATE(hot, pause_us) do {								\
	guest_start(&self->world->guest, self->ram, kmig_region_fd(self->source.region),	\
		    GUEST_BYTES, hot, pause_us);						\
	pthread_create(&self->thread, NULL, destination_main, &self->destination);		\
	while (!self->world->port)								\
		usleep(1000);									\
	source_main(&self->source);								\
	pthread_join(self->thread, NULL);							\
} while (0)

#define EXPECT_SAME_MEMORY() \
	EXPECT_EQ(0, memcmp(self->ram, kmig_region_map(self->destination.region), GUEST_BYTES))

#define TELL() do {										\
	struct kmig_report *r = &self->source.report;						\
												\
	TH_LOG("total %.1f ms, downtime %.1f ms, %u rounds, %.0f MB/s, zero-copy %llu of %llu bytes, %llu writes", \
	       r->total_ns / 1e6, r->downtime_ns / 1e6, r->rounds, r->bytes_per_second / 1e6,	\
	       (unsigned long long)r->zerocopy_bytes,						\
	       (unsigned long long)(r->zerocopy_bytes + r->copied_bytes),			\
	       (unsigned long long)self->world->guest.writes);					\
	for (int i = 0; i < KMIG_STATES; i++)							\
		TH_LOG("%10.1f ms %s", r->state_ns[i] / 1e6, kmig_state_name(i));		\
} while (0)

TEST_F_TIMEOUT(pair, moves_a_writing_guest, 120)
{
	uint64_t before = resident(self->source.region);

	MIGRATE(16 * MIB, 1000);
	TELL();
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);
	EXPECT_FALSE(self->world->source_runs);
	EXPECT_TRUE(self->world->destination_runs);
	EXPECT_TRUE(self->destination.state_right);
	guest_end(&self->world->guest);
	/* Neither sending nor digesting filled a hole; comparing does. */
	EXPECT_LE(resident(self->source.region), before + PAGE_BYTES);
	EXPECT_SAME_MEMORY();
	EXPECT_EQ(17 + 1, self->source.report.digests_compared);
	EXPECT_LE(2, self->source.rounds);
}

/* Writers that never rest: it ends by the limit of rounds, and nothing is lost. */
TEST_F_TIMEOUT(pair, racing_writers, 120)
{
	self->source.max_rounds = 6;
	self->source.downtime_ms = 1;
	self->source.channels = 4;
	MIGRATE(32 * MIB, 0);
	TELL();
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* After an abort in the blackout the guest writes on, and the next attempt moves it whole. */
TEST_F_TIMEOUT(pair, abort_and_again, 120)
{
	self->source.act = ABORT;
	self->source.at = KMIG_STATE_CHECK;
	MIGRATE(8 * MIB, 500);
	EXPECT_EQ(-ECANCELED, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->world->source_runs);
	EXPECT_FALSE(self->world->destination_runs);
	guest_end(&self->world->guest);

	self->source.at = -1;
	self->source.rounds = 0;
	self->world->port = 0;
	MIGRATE(8 * MIB, 500);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* The region of another process, found by its descriptor's link. */
TEST_F_TIMEOUT(pair, found_in_another_process, 60)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	struct kmig_region *found;
	int ready[2];
	char byte;
	pid_t pid;

	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	if (!pid) {
		/* Two numbers for one region are one region. */
		if (dup(kmig_region_fd(self->source.region)) < 0)
			_exit(1);
		byte = 1;
		if (write(ready[1], &byte, 1) == 1)
			pause();
		_exit(1);
	}
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	ASSERT_EQ(0, kmig_region_find(self->source.ctx, pid, -1, &found))
		TH_LOG("%s", kmig_ctx_error(self->source.ctx));
	EXPECT_EQ(0, kmig_region_get_info(found, &info));
	EXPECT_EQ(GUEST_BYTES, info.bytes);
	EXPECT_EQ(0, kmig_region_track_start(found, NULL));
	/* It is the finder's: another open file cannot stop it. */
	EXPECT_EQ(-EPERM, kmig_region_track_stop(self->source.region));
	EXPECT_EQ(-EBUSY, kmig_region_track_start(self->source.region, NULL));
	kmig_region_free(found);
	EXPECT_EQ(0, kmig_region_track_start(self->source.region, NULL))
		TH_LOG("%s", kmig_ctx_error(self->source.ctx));
	EXPECT_EQ(0, kmig_region_track_stop(self->source.region));
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

/* ---- Killed in each state ---- */

FIXTURE(killed) {
	struct world *world;
	struct side holder;
};

FIXTURE_VARIANT(killed) {
	bool by_source;
	int at;
};

#define POINT(side_name, flag, point) \
	FIXTURE_VARIANT_ADD(killed, side_name##_##point) { .by_source = flag, .at = point };
POINT(source, true, KMIG_STATE_CHANNELS)
POINT(source, true, KMIG_STATE_FIRST_PASS)
POINT(source, true, KMIG_STATE_ITERATION)
POINT(source, true, KMIG_STATE_BLACKOUT)
POINT(source, true, AT_SAVE)
POINT(source, true, KMIG_STATE_CHECK)
POINT(source, true, KMIG_STATE_CLEANUP)
POINT(destination, false, KMIG_STATE_CHANNELS)
POINT(destination, false, KMIG_STATE_FIRST_PASS)
POINT(destination, false, KMIG_STATE_ITERATION)
POINT(destination, false, KMIG_STATE_BLACKOUT)
POINT(destination, false, AT_LOAD)
POINT(destination, false, KMIG_STATE_CHECK)
POINT(destination, false, AT_RUN)
POINT(destination, false, KMIG_STATE_CLEANUP)

FIXTURE_SETUP(killed)
{
	int err;

	self->world = new_world();
	/* The VMM, which keeps the region whatever becomes of the engine. */
	err = side_init(&self->holder, self->world, true, 16 * MIB);
	if (err == -ENOENT || err == -ENXIO)
		SKIP(return, "no /dev/lmtrack");
	ASSERT_EQ(0, err);
	fill(kmig_region_map(self->holder.region), 16 * MIB);
	guest_start(&self->world->guest, kmig_region_map(self->holder.region),
		    kmig_region_fd(self->holder.region), 16 * MIB, MIB, 500);
}

FIXTURE_TEARDOWN(killed)
{
	guest_end(&self->world->guest);
	side_end(&self->holder);
}

static pid_t start_side(struct world *world, struct side *holder, bool is_source, int kill_at)
{
	struct side side;
	pid_t pid = fork();

	if (pid)
		return pid;
	if (side_init(&side, world, is_source, 16 * MIB))
		_exit(2);
	if (is_source) {
		kmig_region_free(side.region);
		if (kmig_region_find(side.ctx, getppid(), kmig_region_fd(holder->region), &side.region))
			_exit(3);
		side.guest = &world->guest;
	}
	if (kill_at >= 0) {
		side.act = KILL;
		side.at = kill_at;
	}
	side.timeout_ms = 20000;
	if (is_source)
		source_main(&side);
	else
		destination_main(&side);
	_exit(0);
}

TEST_F_TIMEOUT(killed, leaves_at_most_one_guest, 120)
{
	pid_t destination = start_side(self->world, &self->holder, false, variant->by_source ? -1 : variant->at);
	pid_t source;

	while (!self->world->port)
		usleep(1000);
	source = start_side(self->world, &self->holder, true, variant->by_source ? variant->at : -1);
	ASSERT_EQ(source, waitpid(source, NULL, 0));
	ASSERT_EQ(destination, waitpid(destination, NULL, 0));

	EXPECT_FALSE(self->world->source_runs && self->world->destination_runs);
	if (variant->at == KMIG_STATE_CLEANUP) {
		EXPECT_TRUE(self->world->destination_runs);
		EXPECT_FALSE(self->world->source_runs);
	} else if (variant->at == AT_RUN) {
		EXPECT_EQ(-EINPROGRESS, self->world->source_result);
		EXPECT_FALSE(self->world->source_runs);
	} else if (!variant->by_source) {
		EXPECT_TRUE(self->world->source_runs);
		EXPECT_NE(0, self->world->source_result);
	} else {
		EXPECT_EQ(variant->at != AT_SAVE && variant->at != KMIG_STATE_CHECK, (bool)self->world->source_runs);
		EXPECT_NE(0, self->world->destination_result);
	}
	/* Whatever happened, nothing of it holds the region: it can be tracked again. */
	EXPECT_EQ(0, kmig_region_track_start(self->holder.region, NULL))
		TH_LOG("%s", kmig_ctx_error(self->holder.ctx));
	EXPECT_EQ(0, kmig_region_track_stop(self->holder.region));
	/* A paused guest's writers have to be let go. */
	self->world->guest.running = true;
}

TEST_HARNESS_MAIN
