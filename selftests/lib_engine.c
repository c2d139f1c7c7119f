// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=ioctl -Wl,--wrap=open
/*
 * Both engines against each other over loopback, with the kernel's part done in user space:
 * whole migrations of a guest that writes all the time; and what is left when either side
 * aborts, or is killed, in each state.
 */
#include "kselftest_harness.h"
#include "lib_fake.h"
#include "lib_pair.h"

FIXTURE(pair) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
	pthread_t thread;
};

FIXTURE_SETUP(pair)
{
	uint64_t bytes = 64 * MIB + 5 * PAGE_BYTES;	/* a short last chunk */

	self->world = new_world();
	ASSERT_EQ(0, side_init(&self->source, self->world, true, bytes));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, bytes));
	self->ram = kmig_region_map(self->source.region);
	ASSERT_NE(NULL, self->ram);
	fill(self->ram, bytes);
	/* What a starting VM leaves in its memory must not survive. */
	memset(kmig_region_map(self->destination.region), 0x55, 3 * MIB);
	self->source.guest = &self->world->guest;
}

FIXTURE_TEARDOWN(pair)
{
	side_end(&self->source);
	side_end(&self->destination);
}

#define MIGRATE(hot, pause_us) do {								\
	guest_start(&self->world->guest, self->ram, -1, self->source.bytes, hot, pause_us);		\
	pthread_create(&self->thread, NULL, destination_main, &self->destination);		\
	while (!self->world->port)								\
		usleep(1000);									\
	source_main(&self->source);								\
	pthread_join(self->thread, NULL);							\
} while (0)

#define EXPECT_SAME_MEMORY() \
	EXPECT_EQ(0, memcmp(self->ram, kmig_region_map(self->destination.region), self->source.bytes))

TEST_F(pair, moves_a_writing_guest)
{
	uint64_t before = resident(self->source.region);
	const struct kmig_downtime *part;

	MIGRATE(16 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);
	EXPECT_EQ(KMIG_COMPLETED, (int)self->world->source_verdict);
	EXPECT_EQ(KMIG_COMPLETED, (int)self->world->destination_verdict);
	EXPECT_FALSE(self->world->source_runs);
	EXPECT_TRUE(self->world->destination_runs);
	EXPECT_TRUE(self->world->completed);
	EXPECT_FALSE(self->world->discarded);
	EXPECT_TRUE(self->destination.state_right);
	/* Neither sending nor digesting filled a hole. */
	EXPECT_LE(resident(self->source.region), before + PAGE_BYTES);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
	/* The lower half ends within a chunk; and there is the last page. */
	EXPECT_EQ(17 + 1, self->source.report.digests_compared);
	EXPECT_EQ(17 + 1, self->destination.report.digests_compared);
	EXPECT_EQ(self->source.state_length, self->source.report.device_state_bytes);
	EXPECT_LE(2, self->source.rounds);
	EXPECT_EQ(self->source.report.rounds, self->source.rounds);
	for (int i = 1; i < KMIG_STATES; i++) {
		EXPECT_LT(0, self->source.report.state_ns[i]);
		EXPECT_LT(0, self->destination.report.state_ns[i]);
		EXPECT_GE(self->source.report.state_ns[i], self->source.report.state_ns[i - 1]);
	}
	EXPECT_LT(0, self->source.report.downtime_ns);
	/* Its parts are all of it. */
	part = &self->source.report.downtime;
	EXPECT_EQ(self->source.report.downtime_ns, part->pause_ns + part->save_ns + part->memory_ns + part->digest_ns +
		  part->load_ns + part->commit_ns + part->resume_ns);
	EXPECT_LT(0, part->pause_ns);
	EXPECT_LT(0, part->load_ns);
	EXPECT_LT(0, part->resume_ns);
	EXPECT_EQ(part->memory_ns, self->source.report.memory_harvest_ns + self->source.report.memory_copy_ns);
	EXPECT_LT(0, self->source.report.memory_harvest_ns);
	EXPECT_LT(0, self->source.report.memory_copy_ns);
	EXPECT_STREQ("what is left fits the downtime", self->source.report.decision);
	TH_LOG("total %.1f ms, downtime %.1f ms, %u rounds, %.0f MB/s",
	       self->source.report.total_ns / 1e6, self->source.report.downtime_ns / 1e6,
	       self->source.report.rounds, self->source.report.bytes_per_second / 1e6);
}

TEST_F(pair, ends_after_max_rounds)
{
	fake.bytes_per_second = 200 * MIB;
	self->source.downtime_ms = 1;
	self->source.max_rounds = 3;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	MIGRATE(30 * MIB, 1);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_LE(4, self->source.rounds);
	EXPECT_GE(20, self->source.rounds);
	EXPECT_NE(NULL, strstr(self->source.report.decision, "limit for pre-copy"));
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* Rounds in which the wire waits longer for pages than it takes to carry them. */
TEST_F(pair, scanning_is_no_part_of_the_wire)
{
	const struct kmig_report *report = &self->source.report;

	fake.bytes_per_second = 100 * MIB;
	fake.scan_us = 800000;
	self->source.max_rounds = 3;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	MIGRATE(16 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	TH_LOG("%.0f MB/s; last round %.1f ms, of it scan %.1f; memory %.1f ms, of it harvest %.1f, copy %.1f",
	       report->bytes_per_second / 1e6, self->source.round.duration_ns / 1e6, self->source.round.scan_ns / 1e6,
	       report->downtime.memory_ns / 1e6, report->memory_harvest_ns / 1e6, report->memory_copy_ns / 1e6);
	EXPECT_LT(self->source.round.bytes * 1e9 / report->bytes_per_second, self->source.round.duration_ns - 400e6);
	EXPECT_GE(self->source.round.scan_ns, 800000000);
	EXPECT_LE(self->source.round.scan_ns, self->source.round.duration_ns);
	/* Saving devices takes next to no time here: the last round comes after it. */
	EXPECT_GE(report->memory_harvest_ns, 400000000);
	EXPECT_EQ(report->downtime.memory_ns, report->memory_harvest_ns + report->memory_copy_ns);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* A module that does not tell: all of a round counts as sending, as before. */
TEST_F(pair, module_without_times)
{
	fake.bytes_per_second = 100 * MIB;
	fake.scan_us = 200000;
	fake.no_times = true;
	self->source.max_rounds = 3;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	MIGRATE(16 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_GT(200000000, self->source.round.scan_ns);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

TEST_F(pair, sixty_four_channels)
{
	self->source.channels = 64;
	MIGRATE(4 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* Of a module that cannot have fewer of them carry, as this one, all do. */
TEST_F(pair, channels_as_it_takes)
{
	self->source.channels_auto = true;
	MIGRATE(4 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
	EXPECT_LE(1, self->source.report.channels);
}

TEST_F(pair, slow_vmm_is_not_silence)
{
	self->source.delay_ms = TIMEOUT_MS + 500;
	self->destination.delay_ms = TIMEOUT_MS + 500;
	MIGRATE(MIB, 1000);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* A page that is sent between two looks at what is dirty: nobody but the destination knows of it. */
TEST_F(pair, saving_writes_before_the_round_comes_by)
{
	fake.bytes_per_second = 20 * MIB;
	self->source.save_early = true;
	self->source.max_rounds = 2;
	MIGRATE(MIB, 20);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(1, self->source.needs);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

#define EXPECT_RUNS_AT_SOURCE() do {						\
	EXPECT_TRUE(self->world->source_runs);					\
	EXPECT_FALSE(self->world->destination_runs);				\
	EXPECT_FALSE(self->world->completed);					\
	EXPECT_EQ(self->destination.report.state >= KMIG_STATE_DEVICES, (bool)self->world->discarded);	\
	guest_end(&self->world->guest);						\
} while (0)

TEST_F(pair, gives_up_at_its_limits)
{
	fake.bytes_per_second = 200 * MIB;
	self->source.downtime_ms = 1;
	self->source.max_rounds = 3;
	self->source.on_timeout = KMIG_TIMEOUT_ABORT;
	MIGRATE(30 * MIB, 1);
	EXPECT_EQ(-ETIME, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(3, self->source.rounds);
	EXPECT_NE(NULL, strstr(self->source.error, "longer downtime")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_RUNS_AT_SOURCE();
}

/* One that cannot cap: asked for at first it is a failure, asked for later no reason to give up. */
TEST_F(pair, module_too_old_for_a_cap)
{
	self->source.max_bandwidth = 10 * MIB;
	MIGRATE(MIB, 1000);
	EXPECT_EQ(-EOPNOTSUPP, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_NE(NULL, strstr(self->source.error, "too old for a cap")) TH_LOG("%s", self->source.error);
	EXPECT_RUNS_AT_SOURCE();
}

static void cap_late(struct side *side, int at)
{
	if (at == KMIG_STATE_ITERATION)
		kmig_source_set_max_bandwidth(side->engine, 10 * MIB);
}

TEST_F(pair, module_too_old_for_a_cap_later)
{
	self->source.hook = cap_late;
	MIGRATE(MIB, 1000);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* It does not take the end of a round, of seconds here, to see that the time is over. */
TEST_F(pair, gives_up_in_time)
{
	fake.bytes_per_second = 10 * MIB;
	self->source.max_time_ms = 300;
	self->source.on_timeout = KMIG_TIMEOUT_ABORT;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-ETIME, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_NE(NULL, strstr(self->source.error, "300 ms")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(KMIG_STATE_FIRST_PASS, self->source.report.state);
	EXPECT_GT(2000000000, self->source.report.total_ns);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_RUNS_AT_SOURCE();
}

TEST_F(pair, lost_page_is_noticed)
{
	/* The last page, which the guest's last write goes to. */
	fake.lose_page = self->source.bytes / PAGE_BYTES;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EBADMSG, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(-EBADMSG, self->world->destination_result) TH_LOG("%s", self->destination.error);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_RUNS_AT_SOURCE();
}

/* The round has been sent, and will never be acknowledged; the control connection lives. */
TEST_F(pair, lost_channel_is_noticed)
{
	fake.cut_round = 2;
	self->source.max_rounds = 1;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-ECONNRESET, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_NE(NULL, strstr(self->source.error, "data channel 0")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(-ECONNRESET, self->world->destination_result) TH_LOG("%s", self->destination.error);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_RUNS_AT_SOURCE();
}

TEST_F(pair, destination_without_memory)
{
	self->destination.max_bytes = 32 * MIB;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-ENOMEM, self->world->source_result);
	EXPECT_EQ(-ENOMEM, self->world->destination_result);
	EXPECT_NE(NULL, strstr(self->source.error, "32 MiB")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(KMIG_STATE_CAPACITY, self->source.report.state);
	EXPECT_EQ(0, self->source.report.transferred_bytes);
	EXPECT_RUNS_AT_SOURCE();
}

/* What it has set up does not have the size of the source's. */
TEST_F(pair, destination_of_another_size)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

	opts.bytes = self->destination.bytes - PAGE_BYTES;
	opts.kind = KMIG_REGION_MEMFD;
	kmig_region_free(self->destination.region);
	ASSERT_EQ(0, kmig_region_create(self->destination.ctx, &opts, &self->destination.region));
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EINVAL, self->world->source_result);
	EXPECT_EQ(-EINVAL, self->world->destination_result);
	EXPECT_NE(NULL, strstr(self->source.error, "region 0 has")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(0, self->source.report.transferred_bytes);
	EXPECT_RUNS_AT_SOURCE();
}

/* The VMM says that the guest stands. It does not, and then its memory is never all there. */
TEST_F(pair, writes_go_on_after_the_pause)
{
	self->source.guest = NULL;
	MIGRATE(MIB, 50);
	EXPECT_EQ(-EBUSY, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_NE(NULL, strstr(self->source.error, "still being written")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(-EBUSY, self->world->destination_result);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_RUNS_AT_SOURCE();
}

/* It runs nowhere then. Only the source's VMM can help it, and is told. */
TEST_F(pair, load_and_resume_fail)
{
	self->destination.load_error = -EXDEV;
	self->source.resume_error = -ENXIO;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EXDEV, self->world->source_result);
	EXPECT_EQ(-EXDEV, self->world->destination_result);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_FALSE(self->world->source_runs);
	EXPECT_FALSE(self->world->destination_runs);
	EXPECT_TRUE(self->world->discarded);
	EXPECT_TRUE(self->source.stuck);
	guest_end(&self->world->guest);
}

#define VMM_FAILS(name, side, error)						\
TEST_F(pair, name)								\
{										\
	self->side.error = -EXDEV;						\
	MIGRATE(MIB, 100);							\
	EXPECT_EQ(-EXDEV, self->world->source_result);				\
	EXPECT_EQ(-EXDEV, self->world->destination_result);			\
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);		\
	EXPECT_EQ(KMIG_FAILED, (int)self->world->destination_verdict);		\
	EXPECT_RUNS_AT_SOURCE();						\
}

VMM_FAILS(pause_fails, source, pause_error)
VMM_FAILS(save_fails, source, save_error)
VMM_FAILS(prepare_fails, destination, prepare_error)
VMM_FAILS(load_fails, destination, load_error)

/* It has committed, and the destination cannot say that it does not run. */
TEST_F(pair, run_fails)
{
	self->destination.run_error = -EXDEV;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EINPROGRESS, self->world->source_result);
	EXPECT_EQ(-EXDEV, self->world->destination_result);
	EXPECT_EQ(KMIG_UNKNOWN, (int)self->world->source_verdict);
	EXPECT_EQ(KMIG_UNKNOWN, (int)self->world->destination_verdict);
	EXPECT_FALSE(self->world->source_runs);
	EXPECT_FALSE(self->world->discarded);
	guest_end(&self->world->guest);
}

TEST_F(pair, can_be_tried_again)
{
	self->destination.load_error = -EXDEV;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EXDEV, self->world->source_result);
	EXPECT_TRUE(self->world->source_runs);
	guest_end(&self->world->guest);
	self->destination.load_error = 0;
	self->world->port = 0;
	self->source.rounds = 0;
	/* A new tracker knows nothing of what was sent before. */
	memset(fake_regions[0].copy, 0, fake_regions[0].bytes);
	MIGRATE(MIB, 100);
	EXPECT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* Its engine's other thread says that it lives: the guest does not wait for that. */
TEST_F(pair, load_hangs)
{
	self->source.timeout_ms = self->destination.timeout_ms = HANG_MS / 8;
	self->destination.act = HANG;
	self->destination.at = AT_LOAD;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-ETIMEDOUT, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_NE(NULL, strstr(self->source.error, "lives")) TH_LOG("%s", self->source.error);
	EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	EXPECT_NE(0, self->world->destination_result);
	EXPECT_RUNS_AT_SOURCE();
}

TEST_F(pair, run_hangs)
{
	self->source.timeout_ms = self->destination.timeout_ms = HANG_MS / 8;
	self->destination.act = HANG;
	self->destination.at = AT_RUN;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EINPROGRESS, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(KMIG_UNKNOWN, (int)self->world->source_verdict);
	EXPECT_FALSE(self->world->source_runs);
	/* In the end it did what it was told. */
	EXPECT_TRUE(self->world->destination_runs);
	guest_end(&self->world->guest);
}

/* The source has all it wants to know: who runs the guest does not wait for it without end. */
TEST_F(pair, completed_hangs)
{
	const struct kmig_report *report = &self->destination.report;

	self->source.timeout_ms = self->destination.timeout_ms = HANG_MS / 8;
	self->source.act = HANG;
	self->source.at = KMIG_STATE_CLEANUP;
	MIGRATE(MIB, 100);
	EXPECT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);
	EXPECT_TRUE(self->world->destination_runs);
	EXPECT_GT(HANG_MS - HANG_MS / 8, (report->total_ns - report->state_ns[KMIG_STATE_CLEANUP]) / 1000000);
	guest_end(&self->world->guest);
	EXPECT_SAME_MEMORY();
}

/* ---- An abort in each state ---- */

FIXTURE(aborted) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
	pthread_t thread;
};

FIXTURE_VARIANT(aborted) {
	bool by_source;
	int at;
};

#define POINT(side_name, flag, point) \
	FIXTURE_VARIANT_ADD(aborted, side_name##_##point) { .by_source = flag, .at = point };
#define POINTS_OF(side_name, flag)					\
	POINT(side_name, flag, KMIG_STATE_HELLO)			\
	POINT(side_name, flag, KMIG_STATE_CAPACITY)			\
	POINT(side_name, flag, KMIG_STATE_REGIONS)			\
	POINT(side_name, flag, KMIG_STATE_DEVICES)			\
	POINT(side_name, flag, KMIG_STATE_CHANNELS)			\
	POINT(side_name, flag, KMIG_STATE_FIRST_PASS)			\
	POINT(side_name, flag, KMIG_STATE_ITERATION)			\
	POINT(side_name, flag, KMIG_STATE_BLACKOUT)			\
	POINT(side_name, flag, KMIG_STATE_CHECK)			\
	POINT(side_name, flag, KMIG_STATE_CLEANUP)
POINTS_OF(source, true)
POINT(source, true, AT_PAUSE)
POINT(source, true, AT_SAVE)
POINTS_OF(destination, false)
POINT(destination, false, AT_PREPARE)
POINT(destination, false, AT_LOAD)
POINT(destination, false, AT_RUN)

FIXTURE_SETUP(aborted)
{
	uint64_t bytes = 16 * MIB;

	self->world = new_world();
	ASSERT_EQ(0, side_init(&self->source, self->world, true, bytes));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, bytes));
	self->ram = kmig_region_map(self->source.region);
	fill(self->ram, bytes);
	self->source.guest = &self->world->guest;
}

FIXTURE_TEARDOWN(aborted)
{
	side_end(&self->source);
	side_end(&self->destination);
}

/* After COMMIT it is too late, and the migration completes. */
static bool too_late(bool by_source, int at)
{
	return at == KMIG_STATE_CLEANUP || (!by_source && at == AT_RUN);
}

TEST_F(aborted, leaves_one_guest)
{
	struct side *side = variant->by_source ? &self->source : &self->destination;
	bool late = too_late(variant->by_source, variant->at);

	side->act = ABORT;
	side->at = variant->at;
	guest_start(&self->world->guest, self->ram, -1, self->source.bytes, MIB, 100);
	pthread_create(&self->thread, NULL, destination_main, &self->destination);
	while (!self->world->port)
		usleep(1000);
	source_main(&self->source);
	/* Before it was greeted, the destination knows of no source, and waits for another. */
	if (variant->by_source && variant->at == KMIG_STATE_HELLO)
		kmig_destination_abort(self->destination.engine);
	pthread_join(self->thread, NULL);

	EXPECT_EQ(!late, (bool)self->world->source_runs);
	EXPECT_EQ(late, (bool)self->world->destination_runs);
	EXPECT_EQ(late, (bool)self->world->completed);
	if (late) {
		EXPECT_EQ(0, self->world->source_result);
		EXPECT_EQ(0, self->world->destination_result);
	} else {
		EXPECT_NE(0, self->world->source_result);
		EXPECT_NE(0, self->world->destination_result);
		EXPECT_EQ(-ECANCELED, variant->by_source ? self->world->source_result : self->world->destination_result);
		EXPECT_EQ(KMIG_CANCELLED, (int)(variant->by_source ? self->world->source_verdict :
						self->world->destination_verdict));
		if (variant->at != KMIG_STATE_HELLO) {
			EXPECT_EQ(-ECANCELED, self->world->source_result) TH_LOG("%s", self->source.error);
			EXPECT_EQ(-ECANCELED, self->world->destination_result) TH_LOG("%s", self->destination.error);
		}
	}
	guest_end(&self->world->guest);
}

/* ---- SIGKILL in each state: both sides are processes ---- */

FIXTURE(killed) {
	struct world *world;
};

FIXTURE_VARIANT(killed) {
	bool by_source;
	int at;
};

#undef POINT
#define POINT(side_name, flag, point) \
	FIXTURE_VARIANT_ADD(killed, side_name##_##point) { .by_source = flag, .at = point };
POINTS_OF(source, true)
POINT(source, true, AT_PAUSE)
POINT(source, true, AT_SAVE)
POINTS_OF(destination, false)
POINT(destination, false, AT_PREPARE)
POINT(destination, false, AT_LOAD)
POINT(destination, false, AT_RUN)

FIXTURE_SETUP(killed)
{
	self->world = new_world();
}

FIXTURE_TEARDOWN(killed)
{
}

static pid_t start_side(struct world *world, bool is_source, enum act what, int at)
{
	struct side side;
	pid_t pid = fork();

	if (pid)
		return pid;
	if (side_init(&side, world, is_source, 16 * MIB))
		_exit(2);
	side.act = what;
	side.at = at;
	if (is_source) {
		fill(kmig_region_map(side.region), side.bytes);
		guest_start(&world->guest, kmig_region_map(side.region), -1, side.bytes, MIB, 100);
		side.guest = &world->guest;
		source_main(&side);
	} else {
		destination_main(&side);
	}
	_exit(0);
}

/* Wait for both, 20 s at most; what still runs then is a hang. */
static int wait_all(pid_t one, pid_t other)
{
	int left = 2;

	for (int i = 0; i < 2000 && left; i++) {
		left = 2;
		left -= one < 0 || waitpid(one, NULL, WNOHANG) == one || (waitpid(one, NULL, WNOHANG) < 0);
		left -= other < 0 || waitpid(other, NULL, WNOHANG) == other || (waitpid(other, NULL, WNOHANG) < 0);
		usleep(10000);
	}
	return left;
}

TEST_F_TIMEOUT(killed, leaves_at_most_one_guest, 60)
{
	pid_t destination = start_side(self->world, false, KILL, variant->by_source ? -1 : variant->at);
	pid_t source;
	int status;

	/* Killed before it told its port: the source cannot even begin. */
	if (!variant->by_source && variant->at == KMIG_STATE_HELLO)
		waitpid(destination, &status, 0);
	while (!self->world->port)
		usleep(1000);
	source = start_side(self->world, true, KILL, variant->by_source ? variant->at : -1);
	if (variant->by_source && variant->at == KMIG_STATE_HELLO) {
		/* The destination goes on to wait for a source: one that comes is served. */
		waitpid(source, &status, 0);
		source = start_side(self->world, true, NOTHING, -1);
		ASSERT_EQ(0, wait_all(source, destination));
		EXPECT_TRUE(self->world->destination_runs);
		EXPECT_FALSE(self->world->source_runs);
		return;
	}
	ASSERT_EQ(0, wait_all(source, destination));

	EXPECT_FALSE(self->world->source_runs && self->world->destination_runs);
	if (variant->by_source) {
		bool paused = variant->at == AT_SAVE || variant->at == KMIG_STATE_CHECK;

		if (variant->at == KMIG_STATE_CLEANUP) {
			EXPECT_TRUE(self->world->destination_runs);
			EXPECT_FALSE(self->world->source_runs);
		} else {
			/* The VMM is another process: its guest is as the killed engine left it. */
			EXPECT_EQ(!paused, (bool)self->world->source_runs);
			EXPECT_FALSE(self->world->destination_runs);
			EXPECT_NE(0, self->world->destination_result);
		}
	} else if (variant->at == KMIG_STATE_CLEANUP) {
		EXPECT_TRUE(self->world->destination_runs);
		EXPECT_EQ(0, self->world->source_result);
	} else if (variant->at == AT_RUN) {
		EXPECT_FALSE(self->world->source_runs);
		EXPECT_EQ(-EINPROGRESS, self->world->source_result);
		EXPECT_EQ(KMIG_UNKNOWN, (int)self->world->source_verdict);
	} else {
		EXPECT_TRUE(self->world->source_runs);
		EXPECT_FALSE(self->world->destination_runs);
		EXPECT_NE(0, self->world->source_result);
		EXPECT_EQ(KMIG_FAILED, (int)self->world->source_verdict);
	}
}

/* ---- Silence: a side that is stopped, its connections open ---- */

FIXTURE(silent) {
	struct world *world;
};

FIXTURE_VARIANT(silent) {
	bool by_source;
	int at;
};

#undef POINT
#define POINT(side_name, flag, point) \
	FIXTURE_VARIANT_ADD(silent, side_name##_##point) { .by_source = flag, .at = point };
POINT(source, true, KMIG_STATE_DEVICES)
POINT(source, true, KMIG_STATE_CHANNELS)
POINT(source, true, KMIG_STATE_ITERATION)
POINT(source, true, AT_SAVE)
POINT(source, true, KMIG_STATE_CHECK)
POINT(destination, false, AT_PREPARE)
POINT(destination, false, KMIG_STATE_CHANNELS)
POINT(destination, false, KMIG_STATE_FIRST_PASS)
POINT(destination, false, KMIG_STATE_ITERATION)
POINT(destination, false, KMIG_STATE_BLACKOUT)
POINT(destination, false, AT_LOAD)
POINT(destination, false, AT_RUN)

FIXTURE_SETUP(silent)
{
	self->world = new_world();
}

FIXTURE_TEARDOWN(silent)
{
}

TEST_F_TIMEOUT(silent, is_noticed, 60)
{
	pid_t destination = start_side(self->world, false, STOP, variant->by_source ? -1 : variant->at);
	pid_t source, other;
	int status;

	while (!self->world->port)
		usleep(1000);
	source = start_side(self->world, true, STOP, variant->by_source ? variant->at : -1);
	other = variant->by_source ? destination : source;
	/* It comes to its end by itself. */
	for (int i = 0; i < 1500 && waitpid(other, &status, WNOHANG) != other; i++)
		usleep(10000);
	if (variant->by_source) {
		EXPECT_EQ(-ETIMEDOUT, self->world->destination_result);
		EXPECT_FALSE(self->world->destination_runs);
		EXPECT_TRUE(self->world->discarded);
		/* Awake again, it finds out, and the guest is its. */
		kill(source, SIGCONT);
		waitpid(source, &status, 0);
		EXPECT_TRUE(self->world->source_runs);
		EXPECT_FALSE(self->world->destination_runs);
		EXPECT_NE(0, self->world->source_result);
	} else if (variant->at == AT_RUN) {
		EXPECT_EQ(-EINPROGRESS, self->world->source_result);
		EXPECT_FALSE(self->world->source_runs);
		/* Awake again, it does what it was told. */
		kill(destination, SIGCONT);
		waitpid(destination, &status, 0);
		EXPECT_TRUE(self->world->destination_runs);
		EXPECT_FALSE(self->world->source_runs);
	} else {
		EXPECT_EQ(-ETIMEDOUT, self->world->source_result);
		EXPECT_TRUE(self->world->source_runs);
		kill(destination, SIGCONT);
		waitpid(destination, &status, 0);
		EXPECT_FALSE(self->world->destination_runs);
		EXPECT_NE(0, self->world->destination_result);
	}
}

TEST_HARNESS_MAIN
