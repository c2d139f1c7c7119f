// SPDX-License-Identifier: GPL-2.0
/*
 * Forecast and policy against a simulated guest and wire: time is a variable, so what they
 * promise can be checked to the digit, and the same every time.
 */
#include "kselftest_harness.h"

#include <math.h>

#include <kmig.h>

#include "../lib/hot.h"
#include "../lib/policy.h"

#define PAGE 4096u
#define MIB (1u << 20)
#define SECOND 1000000000.0

/* ---- A guest that writes, a wire that carries ---- */

struct world {
	double now;			/* seconds */
	double wire;			/* bytes a second */
	double trip;			/* seconds that a round takes at least */
	double scan;			/* and those that it looks for pages meanwhile */
	double pages;			/* of the guest */
	double dirty;
	double writes;			/* distinct pages a second, until all of the set are dirty */
	double set;			/* pages of the working set */
	double ceiling;			/* pages a second, 0: none */
	bool lost;			/* a channel, in the round that was sent last */
	double bytes;
	struct kmig_policy policy;
};

static double written(const struct world *world, double seconds)
{
	double pages = fmin(world->writes * seconds, world->set);

	return world->ceiling > 0 ? fmin(pages, world->ceiling * seconds) : pages;
}

/* Pages are protected one after the other, evenly over the round, the last one a trip before it ends. */
static double left(const struct world *world, double seconds)
{
	double sum = 0;

	for (int i = 0; i < 1000; i++)
		sum += written(world, world->trip + (seconds - world->trip) * (i + 0.5) / 1000);
	return sum / 1000;
}

static struct kmig_policy_opts usual(const struct world *world)
{
	return (struct kmig_policy_opts){
		.ram_bytes = world->pages * PAGE,
		.page_size = PAGE,
		.downtime_ms = 300,
		.max_rounds = 30,
		.trip_ns = world->trip * SECOND,
		.convergence = 0.5,
		.stun_floor = 256,
		.can_stun = true,
	};
}

static void send_round(struct world *world)
{
	double pages = world->dirty, took;

	/* What is written before its turn comes goes along. */
	for (int i = 0; i < 50; i++) {
		took = pages * PAGE / world->wire + world->trip + world->scan;
		if (world->policy.rounds)
			pages = fmin(world->dirty + left(world, took), world->pages);
	}
	kmig_policy_sent(&world->policy, pages * PAGE, took * SECOND, (took - world->scan) * SECOND);
	world->bytes += pages * PAGE;
	world->now += took;
	world->dirty = left(world, took);
}

/* The pre-copy of a whole migration; the wire may change on the way. */
static enum kmig_decision run(struct world *world, const struct kmig_policy_opts *opts,
			      void (*change)(struct world *, uint32_t round))
{
	enum kmig_decision decision;
	struct kmig_look look;
	double begun;

	kmig_policy_start(&world->policy, opts);
	world->dirty = world->pages;
	for (;;) {
		begun = world->now;
		send_round(world);
		world->lost = false;
		if (change)
			change(world, world->policy.rounds);
		look = (struct kmig_look){
			.dirty = world->dirty,
			.interval_ns = (world->now - begun) * SECOND,
			.elapsed_ns = world->now * SECOND,
			.stunned = world->ceiling > 0 && world->ceiling < world->writes,
			.lost = world->lost,
		};
		decision = kmig_policy_look(&world->policy, &look);
		if (decision != KMIG_GO_ON || world->policy.rounds > 1000)
			return decision;
		world->ceiling = world->policy.ceiling;
	}
}

static double blackout(const struct world *world)
{
	return world->dirty * PAGE / world->wire + world->trip + world->scan;
}

/* How often the guest was slowed down that was not before. */
static int ceilings;

static void count_ceilings(struct world *world, uint32_t round)
{
	static double before;

	if (round > 1 && world->ceiling > 0 && !before)
		ceilings++;
	before = round > 1 ? world->ceiling : 0;
}

/* ---- Curve ---- */

TEST(curve_between_measurements)
{
	struct kmig_curve curve = { 0 };

	EXPECT_EQ(0, kmig_curve_pages(&curve, 1e9));
	kmig_curve_add(&curve, 1000000000, 1000);
	EXPECT_EQ(500, kmig_curve_pages(&curve, 0.5e9));
	EXPECT_EQ(3000, kmig_curve_pages(&curve, 3e9));
	kmig_curve_add(&curve, 4000000000, 2000);
	/* Twice the pages in four times the time: their number grows with the root. */
	EXPECT_LT(fabs(kmig_curve_pages(&curve, 2e9) - 1414.2), 1);
	EXPECT_LT(fabs(kmig_curve_pages(&curve, 16e9) - 4000), 1);
	EXPECT_EQ(100, kmig_curve_pages(&curve, 0.1e9));
}

TEST(curve_measured_again)
{
	struct kmig_curve curve = { 0 };

	for (int i = 0; i < 100; i++)
		kmig_curve_add(&curve, 1000000000 + i * 1000, 1000 + i);
	EXPECT_EQ(1, curve.count);
	EXPECT_EQ(1099, curve.points[0].pages);
	kmig_curve_add(&curve, 0, 5);
	EXPECT_EQ(1, curve.count);
}

TEST(curve_that_is_full_forgets_the_shortest)
{
	struct kmig_curve curve = { 0 };

	for (unsigned int i = 0; i < 3 * KMIG_CURVE_POINTS; i++)
		kmig_curve_add(&curve, 1000 * pow(2, i), i + 1);
	EXPECT_EQ(KMIG_CURVE_POINTS, curve.count);
	EXPECT_EQ(3 * KMIG_CURVE_POINTS, curve.points[KMIG_CURVE_POINTS - 1].pages);
	EXPECT_EQ(2 * KMIG_CURVE_POINTS + 1, curve.points[0].pages);
	/* Out of order, too; and shorter than all of them is not worth a place. */
	kmig_curve_add(&curve, 10, 7);
	EXPECT_EQ(2 * KMIG_CURVE_POINTS + 1, curve.points[0].pages);
	for (unsigned int i = 1; i < KMIG_CURVE_POINTS; i++)
		EXPECT_LT(curve.points[i - 1].interval_ns, curve.points[i].interval_ns);
}

/* Near two at once: it takes the place of both. */
TEST(curve_stays_in_order)
{
	struct kmig_curve curve = { 0 };

	kmig_curve_add(&curve, 100, 1);
	kmig_curve_add(&curve, 126, 2);
	kmig_curve_add(&curve, 400, 3);
	kmig_curve_add(&curve, 124, 4);
	kmig_curve_add(&curve, 130, 5);
	for (unsigned int i = 1; i < curve.count; i++)
		EXPECT_LT(curve.points[i - 1].interval_ns, curve.points[i].interval_ns);
	EXPECT_EQ(2, curve.count);
	EXPECT_EQ(5, kmig_curve_pages(&curve, 130));
	EXPECT_EQ(3, kmig_curve_pages(&curve, 400));
}

/* 1000 pages, written within a second: half of a round of one second, all of a long one. */
TEST(what_rounds_leave)
{
	struct kmig_curve set = { 0 }, left;

	kmig_curve_left(&set, 0, &left);
	EXPECT_EQ(0, left.count);
	kmig_curve_add(&set, 500000000, 500);
	kmig_curve_add(&set, 1000000000, 1000);
	kmig_curve_add(&set, 2000000000, 1000);
	kmig_curve_left(&set, 0, &left);
	EXPECT_LT(fabs(kmig_curve_pages(&left, 1e9) - 500), 5);
	EXPECT_LT(fabs(kmig_curve_pages(&left, 2e9) - 750), 5);
	EXPECT_LT(fabs(kmig_curve_pages(&left, 32e9) - 984), 5);
	EXPECT_LE(kmig_curve_pages(&left, 1000e9), 1010);
	/* What is under way for half a second is open to writes that long at least. */
	kmig_curve_left(&set, 500000000, &left);
	EXPECT_LT(fabs(kmig_curve_pages(&left, 0.5e9) - 500), 5);
	EXPECT_LT(fabs(kmig_curve_pages(&left, 1e9) - 750), 5);
	EXPECT_LE(kmig_curve_pages(&left, 1000e9), 1010);
}

TEST(curve_that_is_flat_or_steep)
{
	struct kmig_curve flat = { 0 }, steep = { 0 };

	kmig_curve_add(&flat, 1000000000, 500);
	kmig_curve_add(&flat, 2000000000, 400);
	EXPECT_EQ(400, kmig_curve_pages(&flat, 100e9));
	kmig_curve_add(&steep, 1000000000, 1);
	kmig_curve_add(&steep, 2000000000, 1000);
	EXPECT_LT(kmig_curve_pages(&steep, 4e9), 2001);
}

/* ---- Forecast ---- */

FIXTURE(forecast) {
	struct kmig_ctx *ctx;
	struct kmig_forecast_opts opts;
	struct kmig_forecast out;
	struct kmig_curve_point curve[1];
};

FIXTURE_SETUP(forecast)
{
	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	self->opts = (struct kmig_forecast_opts)KMIG_FORECAST_OPTS_INIT;
	self->out = (struct kmig_forecast)KMIG_FORECAST_INIT;
	/* 2 GiB in use at 128 MiB/s. */
	self->opts.ram_bytes = 2048ull * MIB;
	self->opts.bytes = 2048ull * MIB;
	self->opts.bytes_per_second = 128.0 * MIB;
	self->opts.curve = self->curve;
	self->opts.points = 1;
	self->curve[0].interval_ns = 1000000000;
}

FIXTURE_TEARDOWN(forecast)
{
	kmig_ctx_free(self->ctx);
}

/*
 * The classical table: rounds shrink by four. A guest that writes at 0.4 of the wire's rate
 * leaves a fifth of the first round dirty; with what it writes ahead of the second, that is a
 * quarter.
 */
TEST_F(forecast, rounds_shrink_by_four)
{
	self->curve[0].pages = 0.4 * 128 * MIB / PAGE;
	self->opts.downtime_ms = 500;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_TRUE(self->out.converges);
	EXPECT_EQ(0, self->out.stun_pages_per_second);
	/* 2048, 512, 128 MiB; then 25.6 MiB are left: 0.2 s. */
	EXPECT_EQ(3, self->out.rounds);
	EXPECT_LT(fabs(self->out.downtime_ns - 0.2e9), 1e5);
	EXPECT_LT(fabs(self->out.total_ns - 21.2e9), 1e7);
	EXPECT_LT(fabs(self->out.bytes - 2713.6 * MIB), MIB);
	EXPECT_LT(fabs(self->out.next_pages - 409.6 * MIB / PAGE), 20);
}

TEST_F(forecast, an_idle_guest)
{
	self->opts.points = 0;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_TRUE(self->out.converges);
	EXPECT_EQ(1, self->out.rounds);
	EXPECT_EQ(0, self->out.downtime_ns);
	EXPECT_EQ(16000000000ull, self->out.total_ns);
}

TEST_F(forecast, faster_than_the_wire)
{
	self->curve[0].pages = 512 * MIB / PAGE;
	self->opts.no_stun = true;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_FALSE(self->out.converges);
	EXPECT_EQ(30, self->out.rounds);
	EXPECT_EQ(16000000000ull, self->out.downtime_ns);

	self->opts.no_stun = false;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_TRUE(self->out.converges);
	/* Half of the wire: the second round sends all once more, then they shrink by half. */
	EXPECT_EQ(0.5 * 128 * MIB / PAGE, self->out.stun_pages_per_second);
	EXPECT_LE(self->out.downtime_ns, 300000000);
	EXPECT_LT(self->out.rounds, 12);
}

TEST_F(forecast, a_time_limit_asks_for_more_stun)
{
	double relaxed;

	self->curve[0].pages = 512 * MIB / PAGE;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	relaxed = self->out.stun_pages_per_second;
	self->opts.max_time_ms = 37000;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_TRUE(self->out.converges);
	EXPECT_LT(self->out.stun_pages_per_second, relaxed);
	EXPECT_LE(self->out.total_ns, 37000000000ull);
	/* Two passes alone take longer than this. */
	self->opts.max_time_ms = 20000;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_FALSE(self->out.converges);
	EXPECT_EQ(256, self->out.stun_pages_per_second);
}

TEST_F(forecast, what_the_blackout_costs_beside_its_pages)
{
	uint64_t without;

	self->curve[0].pages = 32 * MIB / PAGE;
	self->opts.downtime_ms = 500;
	self->opts.blackout_ns = 300000000;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_EQ(3, self->out.rounds);
	without = self->out.downtime_ns;
	self->opts.held_pages = 16 * MIB / PAGE;
	ASSERT_EQ(0, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_EQ(3, self->out.rounds);
	EXPECT_EQ(without + 125000000, self->out.downtime_ns);
	EXPECT_LT(self->out.downtime_ns, 500000000);
}

TEST_F(forecast, options)
{
#define REFUSED(member, value, word) do { \
	struct kmig_forecast_opts bad = self->opts; \
	bad.member = value; \
	EXPECT_EQ(-EINVAL, kmig_forecast(self->ctx, &bad, &self->out)); \
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), word)); \
} while (0)
	REFUSED(page_size, 0, "page size");
	REFUSED(bytes_per_second, 0, "rate");
	REFUSED(bytes_per_second, NAN, "rate");
	REFUSED(bytes_per_second, INFINITY, "rate");
	REFUSED(stun_floor, INFINITY, "floor");
	REFUSED(bytes, 4096ull * MIB, "in use");
	REFUSED(points, KMIG_CURVE_POINTS + 1, "points");
	REFUSED(curve, NULL, "points");
	REFUSED(downtime_ms, 0, "downtime");
	REFUSED(max_rounds, 0, "round");
	REFUSED(convergence, 0, "fraction");
	REFUSED(convergence, 1, "fraction");
	REFUSED(convergence, NAN, "fraction");
	REFUSED(size, 4, "size");
	self->curve[0].interval_ns = 0;
	REFUSED(points, 1, "interval");
}

/* More nanoseconds, or bytes, than there are numbers for. */
TEST_F(forecast, beyond_all_numbers)
{
	self->curve[0].pages = 1000;
	self->opts.bytes_per_second = 1e-3;
	EXPECT_EQ(-ERANGE, kmig_forecast(self->ctx, &self->opts, &self->out));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), "584 years")) TH_LOG("%s", kmig_ctx_error(self->ctx));
	self->opts.bytes_per_second = 1e-308;
	EXPECT_EQ(-ERANGE, kmig_forecast(self->ctx, &self->opts, &self->out));
	self->opts.bytes_per_second = 1e18;
	self->opts.ram_bytes = self->opts.bytes = UINT64_MAX - PAGE + 1;
	self->curve[0].pages = UINT64_MAX;
	self->opts.no_stun = true;
	EXPECT_EQ(-ERANGE, kmig_forecast(self->ctx, &self->opts, &self->out));
}

/* What is drawn on beyond the longest interval stays in order, too. */
TEST(longest_of_all_intervals)
{
	struct kmig_curve set = { 0 }, left;

	kmig_curve_add(&set, UINT64_MAX / 3, UINT64_MAX / 2);
	kmig_curve_add(&set, UINT64_MAX / 2, UINT64_MAX);
	kmig_curve_left(&set, 0, &left);
	ASSERT_LE(2, left.count);
	for (unsigned int i = 1; i < left.count; i++)
		EXPECT_LT(left.points[i - 1].interval_ns, left.points[i].interval_ns);
}

/* ---- Policy ---- */

TEST(a_quiet_guest_is_left_alone)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 2560, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_EQ(0, world.policy.ceiling);
	EXPECT_LE(blackout(&world), 0.3);
	EXPECT_LT(world.policy.rounds, 5);
}

/* Half of the guest goes twice, because of the network. */
static void lose_channel(struct world *world, uint32_t round)
{
	world->lost = round == 1;
	if (world->lost)
		world->dirty += world->pages / 2;
}

TEST(a_guest_is_not_slowed_down_for_a_lost_channel)
{
	struct world world = { .wire = 40e6, .trip = 0.002, .pages = 65536, .writes = 1000, .set = 4000 };
	struct kmig_policy_opts opts = usual(&world);

	ASSERT_EQ(KMIG_PAUSE, run(&world, &opts, lose_channel));
	EXPECT_EQ(0, world.policy.ceiling);
	EXPECT_GT(6, world.policy.rounds);
}

TEST(a_working_set_that_fits_is_left_alone)
{
	struct world world = { .wire = 100 * MIB, .pages = 262144, .writes = 1000000, .set = 5000 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_EQ(0, world.policy.ceiling);
	EXPECT_EQ(1, world.policy.rounds);
}

/* Three times as fast as the wire: it converges, in a time that is known before. */
/* No round of it is large enough to tell the wire's rate by, and none leaves nothing. */
TEST(a_small_guest_comes_to_an_end)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 100, .writes = 100000, .set = 50 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_LE(world.policy.rounds, 2);
	EXPECT_EQ(0, world.ceiling);

	/* Nor when its downtime cannot be kept: the limits hold for it, too. */
	world = (struct world){ .wire = 0.1 * MIB, .trip = 0.01, .pages = 100, .writes = 100000, .set = 50 };
	opts.can_stun = false;
	opts.on_timeout = KMIG_TIMEOUT_ABORT;
	EXPECT_EQ(KMIG_GIVE_UP, run(&world, &opts, NULL));
	EXPECT_EQ(opts.max_rounds, world.policy.rounds);
}

/* The first pass over zeroes takes long and carries nothing: that is no reason to slow anyone down. */
TEST(zeroes_are_no_slow_link)
{
	struct kmig_policy_opts opts = { .ram_bytes = 1ull << 36, .page_size = PAGE, .downtime_ms = 300, .max_rounds = 30,
					 .convergence = 0.5, .stun_floor = 256, .can_stun = true };
	struct kmig_look look = { .dirty = 20000, .interval_ns = 60 * SECOND, .elapsed_ns = 60 * SECOND };
	struct kmig_policy policy;

	kmig_policy_start(&policy, &opts);
	kmig_policy_sent(&policy, 900000, 60 * SECOND, 60 * SECOND);
	EXPECT_EQ(KMIG_GO_ON, kmig_policy_look(&policy, &look));
	EXPECT_EQ(0, policy.ceiling);
	/* What is measured then is not averaged with that. */
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND);
	EXPECT_EQ(100.0 * MIB, policy.rate);
}

TEST(a_busy_guest_is_slowed_down_until_it_fits)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 3 * 25600, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_LE(blackout(&world), 0.3);
	EXPECT_GE(world.ceiling, 0.4 * 25600);
	EXPECT_LE(world.ceiling, 0.5 * 25600 + 1);
	EXPECT_LT(world.bytes, 3.2 * 1024 * MIB);
	EXPECT_LT(world.policy.rounds, 12);
	EXPECT_LT(world.policy.error, 0.15);
}

/* A small set, written over and over in no time: it looks slow in a long round. */
TEST(the_ceiling_is_not_lifted_and_set_again)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 5 * 25600, .set = 131072 };
	struct kmig_policy_opts opts = usual(&world);

	ceilings = 0;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, count_ceilings));
	EXPECT_LE(blackout(&world), 0.3);
	EXPECT_EQ(1, ceilings);
}

static void wire_drops(struct world *world, uint32_t round)
{
	if (round == 2)
		world->wire /= 4;
}

TEST(the_ceiling_follows_the_link)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 3 * 25600, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, wire_drops));
	EXPECT_LE(blackout(&world), 0.3 * 1.1);
	EXPECT_LE(world.ceiling, 0.5 * 25600 / 4 * 1.6);
}

/* Scanning neither passes for a slow wire nor is forgotten in what the blackout takes. */
TEST(scanning_is_no_part_of_the_wire)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .scan = 0.1, .pages = 262144, .writes = 10000, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_LT(fabs(world.policy.rate / world.wire - 1), 0.02);
	EXPECT_EQ(100, world.policy.scan_ns / 1000000);
	EXPECT_LE(blackout(&world), 0.3);
}

/* A link that is never kept busy: what little is sent is gone at once, and says nothing of it. */
TEST(a_round_that_scans_shows_no_faster_wire)
{
	struct kmig_policy_opts opts = { .page_size = PAGE, .downtime_ms = 300 };
	struct kmig_policy policy;

	kmig_policy_start(&policy, &opts);
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND);
	EXPECT_EQ(0, policy.scan_ns);
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND / 10);
	EXPECT_EQ(100.0 * MIB, policy.rate);
	EXPECT_EQ(SECOND * 9 / 10, policy.scan_ns);
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND / 2);
	EXPECT_EQ(150.0 * MIB, policy.rate);
	/* Slower in what was sent: that it is. */
	kmig_policy_sent(&policy, 2 * MIB, SECOND, SECOND / 10);
	EXPECT_EQ(20.0 * MIB, policy.rate);
	/* Of a small round, what is beside bytes and scan is the trip. */
	kmig_policy_sent(&policy, MIB / 2, SECOND / 2, SECOND / 4);
	EXPECT_EQ(SECOND / 4 - SECOND / 40, policy.trip_ns);
	EXPECT_EQ(SECOND / 4, policy.scan_ns);
}

static void guest_calms_down(struct world *world, uint32_t round)
{
	if (round == 2)
		world->writes = 3000;
}

/* What fits the downtime is known at once when the cap is lowered, and soon when it is raised. */
TEST(the_rate_follows_the_cap)
{
	struct kmig_policy_opts opts = { .ram_bytes = 1 << 30, .page_size = PAGE, .downtime_ms = 400 };
	struct kmig_policy policy;

	kmig_policy_start(&policy, &opts);
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND);
	EXPECT_EQ(100 * MIB, policy.rate);
	EXPECT_TRUE(kmig_policy_fits(&policy, 20 * MIB / PAGE));
	kmig_policy_cap(&policy, 10 * MIB);
	EXPECT_EQ(10 * MIB, policy.rate);
	EXPECT_FALSE(kmig_policy_fits(&policy, 20 * MIB / PAGE));
	EXPECT_TRUE(kmig_policy_fits(&policy, 2 * MIB / PAGE));
	/* Of a round that began before it. */
	kmig_policy_sent(&policy, 50 * MIB, SECOND, SECOND);
	EXPECT_EQ(10 * MIB, policy.rate);
	kmig_policy_cap(&policy, 60 * MIB);
	EXPECT_EQ(10 * MIB, policy.rate);
	kmig_policy_sent(&policy, 60 * MIB, SECOND, SECOND);
	EXPECT_EQ(60 * MIB, policy.rate);
	kmig_policy_cap(&policy, 0);
	kmig_policy_sent(&policy, 100 * MIB, SECOND, SECOND);
	EXPECT_EQ(100 * MIB, policy.rate);
	kmig_policy_cap(&policy, 200 * MIB);
	EXPECT_EQ(100 * MIB, policy.rate);
}

TEST(a_guest_that_calms_down_is_released)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 3 * 25600, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	opts.downtime_ms = 30;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, guest_calms_down));
	EXPECT_EQ(0, world.policy.ceiling);
}

TEST(the_floor_holds)
{
	struct world world = { .wire = 100 * 1024, .trip = 0.01, .pages = 2621, .writes = 10000, .set = 2621 };
	struct kmig_policy_opts opts = usual(&world);

	/* The floor alone is ten times what the wire carries. */
	EXPECT_EQ(KMIG_GIVE_UP, run(&world, &opts, NULL));
	EXPECT_EQ(256, world.ceiling);
	EXPECT_NE(NULL, strstr(world.policy.why, "stopped shrinking"));
	EXPECT_LT(world.policy.rounds, 20);

	/* Who would rather have a longer downtime need not wait for a limit. */
	world = (struct world){ .wire = 100 * 1024, .trip = 0.01, .pages = 2621, .writes = 10000, .set = 2621 };
	opts.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_NE(NULL, strstr(world.policy.why, "stopped shrinking"));
	EXPECT_LT(world.policy.rounds, 20);
}

TEST(limits_without_stun)
{
	struct world start = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 3 * 25600, .set = 262144 };
	struct world world = start;
	struct kmig_policy_opts opts = usual(&world);

	opts.can_stun = false;
	opts.max_rounds = 7;
	EXPECT_EQ(KMIG_GIVE_UP, run(&world, &opts, NULL));
	EXPECT_EQ(7, world.policy.rounds);
	EXPECT_NE(NULL, strstr(world.policy.why, "cannot be slowed down"));

	world = start;
	opts.on_timeout = KMIG_TIMEOUT_ABORT;
	EXPECT_EQ(KMIG_GIVE_UP, run(&world, &opts, NULL));

	world = start;
	opts.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_EQ(7, world.policy.rounds);

	world = start;
	opts.max_rounds = 10000;
	opts.max_time_ms = 60000;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, NULL));
	EXPECT_GE(world.now, 60);
	EXPECT_LT(world.now, 75);
}

/* A limit that cannot be kept by the usual stun, and the answer is to stun harder. */
TEST(stunned_harder_at_the_limit)
{
	struct world world = { .wire = 100 * MIB, .trip = 0.01, .pages = 262144, .writes = 3 * 25600, .set = 262144 };
	struct kmig_policy_opts opts = usual(&world);

	opts.max_rounds = 3;
	EXPECT_EQ(KMIG_PAUSE, run(&world, &opts, wire_drops));
	EXPECT_LE(blackout(&world), 0.3);
	EXPECT_TRUE(world.policy.timed_out);
	EXPECT_GT(world.policy.rounds, 3);
	EXPECT_LE(world.ceiling, 0.25 * 25600);
}

/* ---- Pages held back ---- */

struct looks {
	struct kmig_hot hot;
	struct kmig_region region;
	struct kmig_region *regions[1];
	uint64_t dirty[4];
	uint64_t *bitmaps[1];
};

static void looks_start(struct looks *looks)
{
	memset(looks, 0, sizeof(*looks));
	looks->region.bytes = 200 * PAGE;
	looks->region.page_size = PAGE;
	looks->regions[0] = &looks->region;
	looks->bitmaps[0] = looks->dirty;
	kmig_hot_start(&looks->hot, looks->regions, 1);
}

static void look(struct looks *looks, uint64_t word)
{
	looks->dirty[1] = word;
	kmig_hot_look(&looks->hot, looks->bitmaps);
}

TEST(held_pages_are_those_dirty_longest)
{
	struct looks looks;
	int held = 0;

	looks_start(&looks);
	look(&looks, 0xff);
	kmig_hot_choose(&looks.hot, 100);
	EXPECT_EQ(0, looks.hot.held);
	look(&looks, 0x0f);
	kmig_hot_choose(&looks.hot, 100);
	EXPECT_EQ(4, looks.hot.held);
	EXPECT_EQ(0x0f, looks.hot.hold[0][1]);
	look(&looks, 0xf3);
	/* 0x03 three times, 0xf0 once after a pause. */
	kmig_hot_choose(&looks.hot, 100);
	EXPECT_EQ(0x03, looks.hot.hold[0][1]);
	look(&looks, 0xf3);
	kmig_hot_choose(&looks.hot, 3);
	EXPECT_EQ(3, looks.hot.held);
	EXPECT_EQ(0x03, looks.hot.hold[0][1] & 0x03);
	for (int i = 0; i < 10; i++)
		look(&looks, 0xf3);
	kmig_hot_choose(&looks.hot, 100);
	EXPECT_EQ(0xf3, looks.hot.hold[0][1]);
	/* An eighth of the words goes along with each round, in turn. */
	for (int i = 0; i < 8; i++) {
		look(&looks, 0xf3);
		kmig_hot_choose(&looks.hot, 100);
		held += looks.hot.held == 6;
	}
	EXPECT_EQ(7, held);
	kmig_hot_choose(&looks.hot, 0);
	EXPECT_EQ(0, looks.hot.held);
	EXPECT_EQ(0, looks.hot.hold[0][1]);
	kmig_hot_stop(&looks.hot);
}

TEST_HARNESS_MAIN
