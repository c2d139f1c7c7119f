// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=ioctl -Wl,--wrap=open
/*
 * Both engines against each other over loopback, with the kernel's part done in user space:
 * whole migrations of a guest that writes all the time; and what is left when either side
 * aborts, or is killed, in each state.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

#include <kmig.h>

#include "kselftest_harness.h"
#include "lib_fake.h"

#include <netinet/in.h>

#define MIB (1u << 20)
#define SECRET "a secret of sixteen bytes and more"
#define TIMEOUT_MS 2000

/* ---- A guest: threads that write to a region while it runs ---- */

struct guest {
	uint8_t *ram;
	uint64_t bytes, hot;	/* writes go to the first @hot bytes */
	_Atomic bool running, stop;
	_Atomic int parked;
	pthread_t thread[2];
	unsigned int seed[2];
	unsigned int pause_us;
};

struct guest_arg {
	struct guest *guest;
	int number;
};

static struct guest_arg guest_args[2];

static void *guest_main(void *data)
{
	struct guest_arg *arg = data;
	struct guest *guest = arg->guest;
	unsigned int *seed = &guest->seed[arg->number];
	bool parked = false;

	while (!guest->stop) {
		uint64_t at;

		if (!guest->running) {
			if (!parked)
				guest->parked++;
			parked = true;
			usleep(100);
			continue;
		}
		if (parked) {
			guest->parked--;
			parked = false;
			continue;	/* look again: it may have been stopped meanwhile */
		}
		*seed = *seed * 1103515245 + 12345;
		at = ((uint64_t)*seed << 8) % (guest->hot / 8) * 8;
		*(volatile uint64_t *)(guest->ram + at) = *seed;
		if (guest->pause_us)
			usleep(guest->pause_us);
	}
	return NULL;
}

static void guest_start(struct guest *guest, uint8_t *ram, uint64_t bytes, uint64_t hot, unsigned int pause_us)
{
	*guest = (struct guest){ .ram = ram, .bytes = bytes, .hot = hot, .running = true, .pause_us = pause_us };
	for (int i = 0; i < 2; i++) {
		guest->seed[i] = i + 1;
		guest_args[i] = (struct guest_arg){ guest, i };
		pthread_create(&guest->thread[i], NULL, guest_main, &guest_args[i]);
	}
}

static void guest_pause(struct guest *guest)
{
	guest->running = false;
	while (guest->parked != 2)
		usleep(50);
}

static void guest_end(struct guest *guest)
{
	guest->stop = true;
	for (int i = 0; i < 2; i++)
		pthread_join(guest->thread[i], NULL);
}

/* ---- Both sides, in threads or processes ---- */

/* Shared by both sides, also when they are processes. */
struct world {
	_Atomic int port;
	_Atomic bool source_runs, destination_runs;	/* the guest, there */
	_Atomic bool discarded, completed;
	_Atomic int source_result, destination_result, source_verdict, destination_verdict;
};

enum act { NOTHING, ABORT, KILL };
/* Beside the ten states, the moments in which the VMM works for an engine. */
enum { AT_PAUSE = KMIG_STATES, AT_SAVE, AT_LOAD, AT_RUN, AT_PREPARE, POINTS };

struct side {
	struct world *world;
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct guest *guest;
	void *engine;
	bool is_source;
	uint64_t bytes;
	enum act act;
	int at;
	size_t state_length;
	bool state_right;
	unsigned int rounds;
	struct kmig_report report;
	char error[512];
	/* what to change about the options */
	uint32_t downtime_ms, max_rounds;
	unsigned int channels;
	int pause_error, save_error, load_error, run_error, prepare_error;
	uint64_t max_bytes;
	unsigned int delay_ms;		/* of each VMM function */
};

static void act(struct side *side, int at)
{
	if (side->at != at)
		return;
	if (side->act == KILL)
		kill(getpid(), SIGKILL);
	if (side->act == ABORT && side->is_source)
		kmig_source_abort(side->engine);
	else if (side->act == ABORT)
		kmig_destination_abort(side->engine);
}

static void on_progress(const struct kmig_report *report, void *data)
{
	act(data, report->state);
}

static uint8_t state_byte(size_t i)
{
	return i * 7 + (i >> 12);
}

static void delay(const struct side *side)
{
	usleep(side->delay_ms * 1000);
}

static int on_pause(void *data)
{
	struct side *side = data;

	act(side, AT_PAUSE);
	delay(side);
	if (side->guest)
		guest_pause(side->guest);
	side->world->source_runs = false;
	return side->pause_error;
}

static int on_resume(void *data)
{
	struct side *side = data;

	side->world->source_runs = true;
	if (side->guest)
		side->guest->running = true;
	return 0;
}

static int on_save(void **state, size_t *length, void *data)
{
	struct side *side = data;
	uint8_t *bytes = malloc(side->state_length);

	act(side, AT_SAVE);
	delay(side);
	if (side->save_error) {
		free(bytes);
		return side->save_error;
	}
	for (size_t i = 0; i < side->state_length; i++)
		bytes[i] = state_byte(i);
	/* Saving a device may still write to guest memory. */
	if (side->guest)
		memcpy(side->guest->ram + side->guest->bytes - 16, "written by save", 16);
	*state = bytes;
	*length = side->state_length;
	return 0;
}

static void on_completed(void *data)
{
	struct side *side = data;

	side->world->completed = true;
}

static void on_round(const struct kmig_round_report *round, void *data)
{
	struct side *side = data;

	if (round->round == side->rounds + 1)
		side->rounds++;
}

static int on_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	struct side *side = data;

	act(side, AT_PREPARE);
	delay(side);
	if (count != 1 || bytes[0] != side->bytes)
		return -EINVAL;
	regions[0] = side->region;
	return side->prepare_error;
}

static int on_load(const void *state, size_t length, void *data)
{
	const uint8_t *bytes = state;
	struct side *side = data;

	act(side, AT_LOAD);
	delay(side);
	side->state_right = length == side->state_length;
	for (size_t i = 0; i < length; i++)
		side->state_right = side->state_right && bytes[i] == state_byte(i);
	return side->load_error;
}

static int on_run(void *data)
{
	struct side *side = data;

	act(side, AT_RUN);
	delay(side);
	if (side->run_error)
		return side->run_error;
	side->world->destination_runs = true;
	return 0;
}

static void on_discard(void *data)
{
	struct side *side = data;

	side->world->discarded = true;
}

static const struct kmig_source_ops source_ops = {
	.size = sizeof(source_ops),
	.pause = on_pause,
	.resume = on_resume,
	.save_state = on_save,
	.completed = on_completed,
	.progress = on_progress,
	.round = on_round,
};

static const struct kmig_destination_ops destination_ops = {
	.size = sizeof(destination_ops),
	.prepare = on_prepare,
	.load_state = on_load,
	.run = on_run,
	.discard = on_discard,
	.progress = on_progress,
};

/* Listen, tell the port, receive. */
static void *destination_main(void *data)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_destination *destination;
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	struct side *side = data;
	int err;

	opts.port = 0;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = TIMEOUT_MS;
	opts.max_bytes = side->max_bytes;
	err = kmig_destination_new(side->ctx, &opts, &destination_ops, side, &destination);
	if (!err) {
		side->engine = destination;
		kmig_destination_address(destination, &address, &length);
		side->world->port = ntohs(((struct sockaddr_in *)&address)->sin_port);
		err = kmig_destination_run(destination);
		side->report = (struct kmig_report){ .size = sizeof(side->report) };
		kmig_destination_report(destination, &side->report);
		kmig_destination_free(destination);
	}
	snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
	side->world->destination_verdict = side->report.verdict;
	side->world->destination_result = err;
	return NULL;
}

static int source_main(struct side *side)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;
	int err;

	opts.host = "127.0.0.1";
	opts.port = side->world->port;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = TIMEOUT_MS;
	if (side->channels)
		opts.channels = side->channels;
	if (side->downtime_ms)
		opts.downtime_ms = side->downtime_ms;
	if (side->max_rounds)
		opts.max_rounds = side->max_rounds;
	err = kmig_source_new(side->ctx, &opts, &source_ops, side, &source);
	if (err)
		return err;
	side->engine = source;
	err = kmig_source_add_region(source, side->region);
	if (!err)
		err = kmig_source_run(source);
	side->report = (struct kmig_report){ .size = sizeof(side->report) };
	kmig_source_report(source, &side->report);
	snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
	side->world->source_verdict = side->report.verdict;
	side->world->source_result = err;
	kmig_source_free(source);
	return err;
}

static void log_line(enum kmig_log_level level, const char *text, void *data)
{
	if (getenv("LOG"))
		fprintf(stderr, "# %s %d: %s\n", (const char *)data, level, text);
}

static int side_init(struct side *side, struct world *world, bool is_source, uint64_t bytes)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	int err;

	*side = (struct side){
		.world = world,
		.is_source = is_source,
		.bytes = bytes,
		.at = -1,
		.state_length = 700000,
	};
	opts.bytes = bytes;
	opts.kind = is_source ? KMIG_REGION_LMTRACK : KMIG_REGION_MEMFD;
	err = kmig_ctx_new(&side->ctx);
	if (err)
		return err;
	kmig_ctx_set_log(side->ctx, log_line, is_source ? "source" : "destination");
	return kmig_region_create(side->ctx, &opts, &side->region);
}

static void side_end(struct side *side)
{
	kmig_region_free(side->region);
	kmig_ctx_free(side->ctx);
}

/* Something in every 8th page of the lower half, zeroes beside it, a page at the end. */
static void fill(uint8_t *ram, uint64_t bytes)
{
	for (uint64_t at = 0; at < bytes / 2; at += FAKE_PAGE) {
		uint64_t value = at / FAKE_PAGE % 8 ? 0 : at * 0x9e3779b97f4a7c15;

		for (unsigned int i = 0; i < FAKE_PAGE; i += 8)
			memcpy(ram + at + i, &value, 8);
	}
	ram[bytes - 1] = 1;
}

static uint64_t resident(struct kmig_region *region)
{
	struct stat st;

	fstat(kmig_region_fd(region), &st);
	return st.st_blocks * 512;
}

FIXTURE(pair) {
	struct world *world;
	struct side source, destination;
	struct guest guest;
	uint8_t *ram;
	pthread_t thread;
};

FIXTURE_SETUP(pair)
{
	uint64_t bytes = 64 * MIB + 5 * FAKE_PAGE;	/* a short last chunk */

	self->world = mmap(NULL, sizeof(*self->world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	self->world->source_runs = true;
	ASSERT_EQ(0, side_init(&self->source, self->world, true, bytes));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, bytes));
	self->ram = kmig_region_map(self->source.region);
	ASSERT_NE(NULL, self->ram);
	fill(self->ram, bytes);
	/* What a starting VM leaves in its memory must not survive. */
	memset(kmig_region_map(self->destination.region), 0x55, 3 * MIB);
	self->source.guest = &self->guest;
}

FIXTURE_TEARDOWN(pair)
{
	side_end(&self->source);
	side_end(&self->destination);
}

#define MIGRATE(hot, pause_us) do {								\
	guest_start(&self->guest, self->ram, self->source.bytes, hot, pause_us);		\
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
	EXPECT_LE(resident(self->source.region), before + FAKE_PAGE);
	guest_end(&self->guest);
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
	EXPECT_GT(300000000, self->source.report.downtime_ns);
	TH_LOG("total %.1f ms, downtime %.1f ms, %u rounds, %.0f MB/s",
	       self->source.report.total_ns / 1e6, self->source.report.downtime_ns / 1e6,
	       self->source.report.rounds, self->source.report.bytes_per_second / 1e6);
}

TEST_F(pair, ends_after_max_rounds)
{
	fake.bytes_per_second = 200 * MIB;
	self->source.downtime_ms = 1;
	self->source.max_rounds = 3;
	MIGRATE(30 * MIB, 1);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_LE(4, self->source.rounds);
	EXPECT_GE(20, self->source.rounds);
	guest_end(&self->guest);
	EXPECT_SAME_MEMORY();
}

TEST_F(pair, sixty_four_channels)
{
	self->source.channels = 64;
	MIGRATE(4 * MIB, 50);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->guest);
	EXPECT_SAME_MEMORY();
}

TEST_F(pair, slow_vmm_is_not_silence)
{
	self->source.delay_ms = TIMEOUT_MS + 500;
	self->destination.delay_ms = TIMEOUT_MS + 500;
	MIGRATE(MIB, 1000);
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);
	guest_end(&self->guest);
	EXPECT_SAME_MEMORY();
}

#define EXPECT_RUNS_AT_SOURCE() do {						\
	EXPECT_TRUE(self->world->source_runs);					\
	EXPECT_FALSE(self->world->destination_runs);				\
	EXPECT_FALSE(self->world->completed);					\
	EXPECT_EQ(self->destination.report.state >= KMIG_STATE_DEVICES, (bool)self->world->discarded);	\
	guest_end(&self->guest);						\
} while (0)

TEST_F(pair, lost_page_is_noticed)
{
	/* The last page, which saving the devices writes to. */
	fake.lose_page = self->source.bytes / FAKE_PAGE;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EBADMSG, self->world->source_result) TH_LOG("%s", self->source.error);
	EXPECT_EQ(-EBADMSG, self->world->destination_result) TH_LOG("%s", self->destination.error);
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
	guest_end(&self->guest);
}

TEST_F(pair, can_be_tried_again)
{
	self->destination.load_error = -EXDEV;
	MIGRATE(MIB, 100);
	EXPECT_EQ(-EXDEV, self->world->source_result);
	EXPECT_TRUE(self->world->source_runs);
	guest_end(&self->guest);
	self->destination.load_error = 0;
	self->world->port = 0;
	self->source.rounds = 0;
	/* A new tracker knows nothing of what was sent before. */
	memset(fake_regions[0].copy, 0, fake_regions[0].bytes);
	MIGRATE(MIB, 100);
	EXPECT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
	guest_end(&self->guest);
	EXPECT_SAME_MEMORY();
}

/* ---- An abort in each state ---- */

FIXTURE(aborted) {
	struct world *world;
	struct side source, destination;
	struct guest guest;
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

	self->world = mmap(NULL, sizeof(*self->world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	self->world->source_runs = true;
	ASSERT_EQ(0, side_init(&self->source, self->world, true, bytes));
	ASSERT_EQ(0, side_init(&self->destination, self->world, false, bytes));
	self->ram = kmig_region_map(self->source.region);
	fill(self->ram, bytes);
	self->source.guest = &self->guest;
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
	guest_start(&self->guest, self->ram, self->source.bytes, MIB, 100);
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
	guest_end(&self->guest);
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
	self->world = mmap(NULL, sizeof(*self->world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	self->world->source_runs = true;
}

FIXTURE_TEARDOWN(killed)
{
}

static pid_t start_side(struct world *world, bool is_source, int kill_at)
{
	struct side side;
	pid_t pid = fork();

	if (pid)
		return pid;
	if (side_init(&side, world, is_source, 16 * MIB))
		_exit(2);
	if (kill_at >= 0) {
		side.act = KILL;
		side.at = kill_at;
	}
	if (is_source) {
		struct guest guest;

		fill(kmig_region_map(side.region), side.bytes);
		guest_start(&guest, kmig_region_map(side.region), side.bytes, MIB, 100);
		side.guest = &guest;
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
	pid_t destination = start_side(self->world, false, variant->by_source ? -1 : variant->at);
	pid_t source;
	int status;

	/* Killed before it told its port: the source cannot even begin. */
	if (!variant->by_source && variant->at == KMIG_STATE_HELLO)
		waitpid(destination, &status, 0);
	while (!self->world->port)
		usleep(1000);
	source = start_side(self->world, true, variant->by_source ? variant->at : -1);
	if (variant->by_source && variant->at == KMIG_STATE_HELLO) {
		/* The destination goes on to wait for a source: one that comes is served. */
		waitpid(source, &status, 0);
		source = start_side(self->world, true, -1);
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

TEST_HARNESS_MAIN
