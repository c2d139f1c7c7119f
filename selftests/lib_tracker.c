// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=recvmsg -Wl,--wrap=sendmsg
/*
 * Trackers. First each by itself, over TCP to a receiver that notes what comes on which channel
 * in which round: what is sent, what is not, and that no write is lost to racing writers. Then
 * whole migrations with those that need no module. libmod_tracker.c is the first part of this,
 * with the module.
 */
#include "lib_tracker.h"

static unsigned int entries_of(const char *path)
{
	DIR *dir = opendir(path);
	unsigned int n = 0;

	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* A thread that was joined is still there for a moment. */
static unsigned int threads_left(unsigned int wanted)
{
	unsigned int n = entries_of("/proc/self/task");

	for (int i = 0; i < 1000 && n > wanted; i++) {
		usleep(1000);
		n = entries_of("/proc/self/task");
	}
	return n;
}

/* ---- A tracker by itself ---- */

static void log_page(unsigned int region, uint64_t page)
{
	__atomic_fetch_or(&dirty_log[region][page / 64], 1ULL << (page % 64), __ATOMIC_SEQ_CST);
}

/* Who writes with this, writes first: the bit promises that a read later finds it. */
static void store(struct kmig_region **regions, unsigned int region, uint64_t at, uint64_t value)
{
	*(volatile uint64_t *)((uint8_t *)regions[region]->map + at) = value;
	log_page(region, at / PAGE_BYTES);
}

FIXTURE(tracker) {
	struct kmig_ctx *ctx;
	struct kmig_region *regions[REGIONS];
	struct kmig_tracker *tracker;
	struct world_of_pages world;
	int socks[CHANNELS_MAX];
	uint32_t number;
	struct kmig_round round;
	int error;		/* of the last round */
	unsigned int fds, threads;
};

FIXTURE_VARIANT(tracker) {
	enum kmig_tracker_kind kind;
	unsigned int channels;
};

#ifdef ON_MODULE
FIXTURE_VARIANT_ADD(tracker, lmtrack_1) { .kind = KMIG_TRACKER_LMTRACK, .channels = 1 };
FIXTURE_VARIANT_ADD(tracker, lmtrack_3) { .kind = KMIG_TRACKER_LMTRACK, .channels = 3 };
#else
FIXTURE_VARIANT_ADD(tracker, pagemap_1) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 1 };
FIXTURE_VARIANT_ADD(tracker, pagemap_3) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 3 };
FIXTURE_VARIANT_ADD(tracker, external_2) { .kind = KMIG_TRACKER_EXTERNAL, .channels = 2 };
#endif

FIXTURE_SETUP(tracker)
{
	self->fds = entries_of("/proc/self/fd");
	self->threads = entries_of("/proc/self/task");
	SET_UP_REGIONS();
}

FIXTURE_TEARDOWN(tracker)
{
	STOP();
	EXPECT_FALSE(logging);
	for (unsigned int i = 0; i < REGIONS; i++)
		kmig_region_free(self->regions[i]);
	kmig_ctx_free(self->ctx);
	EXPECT_EQ(self->fds, entries_of("/proc/self/fd"));
	EXPECT_EQ(self->threads, threads_left(self->threads));
}

#define MAP(i) ((uint8_t *)self->regions[i]->map)
#define STORE(i, at, value) store(self->regions, i, at, value)
/* What the VMM did behind its own mapping, or knows besides. */
#define LOG(i, page) log_page(i, page)

/* How many pages are dirty, and whether these are. */
static uint64_t peek(struct kmig_tracker *tracker, unsigned int region, uint64_t *bitmap)
{
	uint64_t found;

	memset(bitmap, 0, (sizes[region] / PAGE_BYTES + 63) / 64 * 8);
	return kmig_tracker_peek(tracker, region, bitmap, &found) ? UINT64_MAX : found;
}

#define PEEK(region) ({ uint64_t _bitmap[8192]; peek(self->tracker, region, _bitmap); })
#define IS_DIRTY(region, page) ({								\
	uint64_t _bitmap[8192];									\
												\
	peek(self->tracker, region, _bitmap);							\
	(bool)(_bitmap[(page) / 64] >> ((page) % 64) & 1);					\
})

/* Did the page come in the last round? */
#define CAME(region, page) (self->world.round[region][page] == self->number)
#define CAME_AS_ZERO(region, page) (CAME(region, page) && self->world.zero[region][page])

/* Something in every 8th page of the lower half, zeroes beside it, a page at the end. */
#define FILL() do {										\
	fill(MAP(0), sizes[0]);									\
	MAP(1)[CHUNK_BYTES + 7 * PAGE_BYTES] = 1;						\
	MAP(2)[0] = 1;										\
} while (0)
/* The first of the eighths is zero, too. */
#define FILL_DATA (8 * MIB / PAGE_BYTES / 8 + 1 + 1 + 1)
#define FILL_PAGES (8 * MIB / PAGE_BYTES + 3 + 1 + 1 + 1)

TEST_F(tracker, first_round_is_all_that_exists)
{
	uint64_t before[REGIONS];
	struct kmig_channel_stats stats;
	uint64_t data = 0, zero = 0, bytes = 0;

	FILL();
	for (unsigned int i = 0; i < REGIONS; i++)
		before[i] = resident(self->regions[i]);
	START();
	SEND_ALL();
	EXPECT_EQ(FILL_PAGES, self->round.pages);
	EXPECT_EQ(FILL_DATA, self->round.data_pages);
	EXPECT_EQ(self->round.pages, self->round.data_pages + self->round.zero_pages);
	EXPECT_TRUE(CAME(1, 512 + 7));
	EXPECT_FALSE(CAME(1, 512 + 8));
	/* Neither sending nor looking filled a hole. */
	EXPECT_PAGES(0, PEEK(0));
	for (unsigned int i = 0; i < REGIONS; i++)
		EXPECT_EQ(before[i], resident(self->regions[i]));
	EXPECT_SAME();
	for (unsigned int i = 0; i < variant->channels; i++) {
		ASSERT_EQ(0, kmig_tracker_channel_stats(self->tracker, i, &stats));
		data += stats.data_pages;
		zero += stats.zero_pages;
		bytes += stats.copied_bytes + stats.zerocopy_bytes;
		EXPECT_LT(0, stats.header_bytes);
		/* Loopback copies, and says so. */
		if (!ON_LMTRACK)
			EXPECT_EQ(0, stats.zerocopy_bytes);
	}
	EXPECT_EQ(self->round.data_pages, data);
	EXPECT_EQ(self->round.zero_pages, zero);
	EXPECT_EQ(data * PAGE_BYTES, bytes);
}

/*
 * The wire is busy no longer than the round lasts, and for as long as any channel sends; a channel
 * scans or sends for no longer than the round lasts.
 */
static void check_times(struct __test_metadata *_metadata, struct kmig_tracker *tracker, const struct kmig_round *round,
			unsigned int channels, struct kmig_round_times *times)
{
	kmig_tracker_times(tracker, times);
	EXPECT_LT(0, times->harvest_ns);
	EXPECT_LT(0, times->send_ns);
	EXPECT_LE(times->wire_ns, round->duration_ns);
	EXPECT_GE(times->wire_ns, times->send_ns / channels);
	EXPECT_LE(times->harvest_ns + times->send_ns, channels * round->duration_ns);
}

TEST_F(tracker, times_of_rounds)
{
	struct kmig_round_times times;
	bool dominates = false;

	FILL();
	START();
	SEND_ALL();
	check_times(_metadata, self->tracker, &self->round, variant->channels, &times);
	/* Nothing but looking, and the round's end. */
	for (int i = 0; i < 3; i++) {
		SEND_DIRTY();
		check_times(_metadata, self->tracker, &self->round, variant->channels, &times);
		dominates |= times.harvest_ns > times.send_ns;
	}
	/* The module does not look where nothing was written. */
	if (!ON_LMTRACK && variant->channels == 1)
		EXPECT_TRUE(dominates);
}

TEST_F(tracker, then_what_was_written)
{
	FILL();
	START();
	SEND_ALL();
	EXPECT_PAGES(0, PEEK(0) + PEEK(1) + PEEK(2));
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);

	STORE(0, 8 * PAGE_BYTES, 1);		/* over data */
	STORE(0, 1 * PAGE_BYTES, 2);		/* over zeroes */
	STORE(0, 3000 * PAGE_BYTES, 3);		/* where nothing was */
	STORE(0, sizes[0] - 8, 4);
	STORE(1, 0, 5);
	STORE(1, 700 * PAGE_BYTES, 0);		/* a page now, but all zero */
	EXPECT_PAGES(4, PEEK(0));
	EXPECT_PAGES(2, PEEK(1));
	/* Looking changes nothing. */
	EXPECT_PAGES(4, PEEK(0));
	EXPECT_PAGES(2, PEEK(1));
	EXPECT_TRUE(IS_DIRTY(0, 3000));
	EXPECT_FALSE(IS_DIRTY(0, 3001));
	SEND_DIRTY();
	EXPECT_PAGES(6, self->round.pages);
	EXPECT_PAGES(5, self->round.data_pages);
	EXPECT_TRUE(CAME_AS_ZERO(1, 700));
	EXPECT_PAGES(0, PEEK(0) + PEEK(1) + PEEK(2));
	EXPECT_SAME();
}

/* Every other page, and so more runs than are protected one by one. */
TEST_F(tracker, many_runs)
{
	FILL();
	START();
	SEND_ALL();
	for (int turn = 1; turn < 4; turn++) {
		for (uint64_t page = 0; page < 2048; page += 2)
			STORE(0, page * PAGE_BYTES + 16, turn);
		EXPECT_PAGES(1024, PEEK(0));
		SEND_DIRTY();
		EXPECT_PAGES(1024, self->round.pages);
		EXPECT_PAGES(0, PEEK(0));
		EXPECT_SAME();
	}
}

TEST_F(tracker, reading_dirties_nothing)
{
	unsigned int sum = 0;

	FILL();
	START();
	SEND_ALL();
	for (uint64_t at = 0; at < 8 * MIB; at += PAGE_BYTES)
		sum += *(volatile uint8_t *)(MAP(0) + at + 7);
	EXPECT_PAGES(0, PEEK(0));
	/* Nor does being taken out of the page table. */
	ASSERT_EQ(0, madvise(MAP(0), 8 * MIB, MADV_DONTNEED));
	EXPECT_PAGES(0, PEEK(0));
	for (uint64_t at = 0; at < 8 * MIB; at += PAGE_BYTES)
		sum += *(volatile uint8_t *)(MAP(0) + at + 7);
	EXPECT_PAGES(0, PEEK(0));
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
	EXPECT_LT(0, sum);
}

TEST_F(tracker, written_and_taken_out_of_the_page_table)
{
	FILL();
	START();
	SEND_ALL();
	for (int turn = 0; turn < 2; turn++) {
		STORE(0, 8 * PAGE_BYTES, 77 + turn);
		STORE(0, 2048 * PAGE_BYTES, 78 + turn);
		ASSERT_EQ(0, madvise(MAP(0), 16 * MIB, MADV_DONTNEED));
		EXPECT_TRUE(IS_DIRTY(0, 8));
		EXPECT_TRUE(IS_DIRTY(0, 2048));
		/* The second turn asks without having looked. */
		if (turn) {
			SEND_DIRTY();
			EXPECT_SAME();
		}
	}
	/* It may take one round more until its entry is there again, and protected. */
	SEND_DIRTY();
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
}

/* What is swapped out exists, though it is in no page table and not in core. */
TEST_F(tracker, swapped_out)
{
	unsigned char core[16];
	unsigned int out = 0;

	memset(MAP(0) + MIB, 0x66, sizeof(core) * PAGE_BYTES);
	START();
	for (int turn = 0; turn < 3; turn++) {
		STORE(0, MIB + 8, turn);
		madvise(MAP(0) + MIB, sizeof(core) * PAGE_BYTES, MADV_PAGEOUT);
		ASSERT_EQ(0, mincore(MAP(0) + MIB, sizeof(core) * PAGE_BYTES, core));
		for (unsigned int i = 0; i < sizeof(core); i++)
			out += !(core[i] & 1);
		if (!out)
			SKIP(return, "nothing can be swapped out here");
		EXPECT_TRUE(IS_DIRTY(0, MIB / PAGE_BYTES));
		if (turn)
			SEND_DIRTY();
		else
			SEND_ALL();
		EXPECT_TRUE(CAME(0, MIB / PAGE_BYTES));
		EXPECT_FALSE(CAME_AS_ZERO(0, MIB / PAGE_BYTES));
		EXPECT_SAME();
	}
}

/* Memory that this process has filled, but never touched through its mapping. */
TEST_F(tracker, never_mapped)
{
	uint8_t page[PAGE_BYTES];

	if (ON_LMTRACK)
		SKIP(return, "a region has no write()");
	memset(page, 0x5a, sizeof(page));
	for (uint64_t at = MIB; at < 5 * MIB; at += PAGE_BYTES)
		ASSERT_EQ((ssize_t)sizeof(page), pwrite(kmig_region_fd(self->regions[0]), page, sizeof(page), at));
	START();
	SEND_ALL();
	EXPECT_PAGES(1024, self->round.data_pages);
	STORE(0, 2 * MIB, 1);
	EXPECT_PAGES(1, PEEK(0));
	SEND_DIRTY();
	EXPECT_PAGES(1, self->round.pages);
	EXPECT_SAME();
}

TEST_F(tracker, huge_pages)
{
	uint8_t *huge = (uint8_t *)(((uintptr_t)MAP(0) + CHUNK_BYTES - 1) & ~(uintptr_t)(CHUNK_BYTES - 1));
	uint64_t first = (huge - MAP(0)) / PAGE_BYTES;

	memset(MAP(0), 0x33, 8 * MIB);
	if (madvise(huge, 2 * CHUNK_BYTES, MADV_COLLAPSE))
		SKIP(return, "no huge pages in shared memory");
	START();
	for (int turn = 0; turn < 3; turn++) {
		/* In the first turn, what was written before counts as dirty anyway. */
		STORE(0, (first + 5) * PAGE_BYTES, turn);
		STORE(0, (first + 800) * PAGE_BYTES, turn);
		EXPECT_TRUE(IS_DIRTY(0, first + 5));
		if (turn)
			SEND_DIRTY();
		else
			SEND_ALL();
		EXPECT_TRUE(CAME(0, first + 5));
		EXPECT_TRUE(CAME(0, first + 800));
		EXPECT_SAME();
	}
	SEND_DIRTY();
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
}

/* ---- Holes ---- */

#define PUNCH(i, page, count) do {								\
	ASSERT_EQ(0, fallocate(kmig_region_fd(self->regions[i]), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,	\
			       (page) * PAGE_BYTES, (count) * PAGE_BYTES));			\
	for (uint64_t _page = page; _page < (page) + (count); _page++)				\
		LOG(i, _page);									\
} while (0)

TEST_F(tracker, punched_is_zero_there)
{
	uint64_t before;

	FILL();
	START();
	SEND_ALL();
	PUNCH(0, 8, 9);
	PUNCH(2, 0, 1);
	/* Of these nine, two hold something there; the module does not remember which. */
	EXPECT_EQ(ON_LMTRACK ? 9 : 2, PEEK(0));
	EXPECT_PAGES(1, PEEK(2));
	before = resident(self->regions[0]);
	SEND_DIRTY();
	EXPECT_PAGES(ON_LMTRACK ? 10 : 3, self->round.zero_pages);
	EXPECT_PAGES(self->round.zero_pages, self->round.pages);
	EXPECT_EQ(before, resident(self->regions[0]));
	EXPECT_PAGES(0, PEEK(0) + PEEK(1) + PEEK(2));
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
	EXPECT_SAME();
}

TEST_F(tracker, punched_and_written)
{
	FILL();
	START();
	SEND_ALL();
	PUNCH(0, 8, 1);
	STORE(0, 8 * PAGE_BYTES + 64, 1);
	PUNCH(0, 16, 1);
	EXPECT_PAGES(2, PEEK(0));
	SEND_DIRTY();
	EXPECT_PAGES(2, self->round.pages);
	EXPECT_TRUE(CAME_AS_ZERO(0, 16));
	STORE(0, 16 * PAGE_BYTES, 2);
	SEND_DIRTY();
	EXPECT_PAGES(1, self->round.data_pages);
	EXPECT_SAME();
}

/* A protected entry says nothing of a page that went and came back in between. */
TEST_F(tracker, discarded_and_read)
{
	FILL();
	START();
	SEND_ALL();
	ASSERT_EQ(0, kmig_region_discard(self->regions[0], 8 * PAGE_BYTES, 4 * PAGE_BYTES));
	EXPECT_EQ(0, *(volatile uint64_t *)(MAP(0) + 8 * PAGE_BYTES));
	EXPECT_TRUE(IS_DIRTY(0, 8));
	SEND_DIRTY();
	EXPECT_TRUE(CAME_AS_ZERO(0, 8));
	EXPECT_PAGES(0, PEEK(0));
	EXPECT_SAME();

	EXPECT_EQ(-EINVAL, kmig_region_discard(self->regions[0], 1, PAGE_BYTES));
	EXPECT_EQ(-EINVAL, kmig_region_discard(self->regions[0], sizes[0], PAGE_BYTES));
	EXPECT_EQ(-EINVAL, kmig_region_discard(self->regions[0], PAGE_BYTES, UINT64_MAX - PAGE_BYTES + 1));
}

/* ---- Held-back pages ---- */

TEST_F(tracker, held_back)
{
	uint64_t hold[(16 * MIB / PAGE_BYTES + 5 + 63) / 64] = { 0 };

	FILL();
	START();
	SEND_ALL();
	hold[0] = 1ULL << 8 | 1ULL << 9;
	ASSERT_EQ(0, kmig_tracker_hold(self->tracker, 0, hold));
	/* Beside them many others of the same chunk, and one elsewhere. */
	for (uint64_t page = 0; page < 64; page += 2)
		STORE(0, page * PAGE_BYTES, 1);
	STORE(1, 0, 1);
	EXPECT_PAGES(32, PEEK(0));
	SEND_DIRTY();
	EXPECT_PAGES(31 + 1, self->round.pages);
	EXPECT_FALSE(CAME(0, 8));
	EXPECT_PAGES(1, PEEK(0));
	EXPECT_TRUE(IS_DIRTY(0, 8));
	STORE(0, 8 * PAGE_BYTES, 2);
	STORE(0, 9 * PAGE_BYTES, 2);
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
	SEND_FLAGS(KMIG_SEND_DIRTY, KMIG_SEND_HELD);
	EXPECT_PAGES(2, self->round.pages);
	EXPECT_PAGES(0, PEEK(0));
	EXPECT_SAME();

	/* Others, then none. */
	STORE(0, 8 * PAGE_BYTES, 3);
	hold[0] = 1ULL << 10;
	ASSERT_EQ(0, kmig_tracker_hold(self->tracker, 0, hold));
	SEND_DIRTY();
	EXPECT_PAGES(1, self->round.pages);
	STORE(0, 10 * PAGE_BYTES, 3);
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
	ASSERT_EQ(0, kmig_tracker_hold(self->tracker, 0, NULL));
	SEND_DIRTY();
	EXPECT_PAGES(1, self->round.pages);
	EXPECT_SAME();
}

/* ---- Racing writers ---- */

struct racer {
	struct kmig_region **regions;
	pthread_t thread;
	unsigned int seed;
	_Atomic bool *stop;
	bool discards;
};

/*
 * A write that was lost shows only if none to the same page comes after it. So one writes each
 * odd page once in a long while, and the others keep the chunks busy with a few even ones.
 */
static void *race_once(void *data)
{
	const uint64_t odd = sizes[0] / PAGE_BYTES / 2;
	struct racer *racer = data;

	for (uint64_t n = 1; !*racer->stop; n++) {
		store(racer->regions, 0, (n * 769 % odd * 2 + 1) * PAGE_BYTES + n % 512 * 8, n);
		usleep(100);
	}
	return NULL;
}

static void *race_even(void *data)
{
	struct racer *racer = data;

	for (uint64_t n = 1; !*racer->stop; n++) {
		racer->seed = racer->seed * 1103515245 + 12345;
		store(racer->regions, 0, (racer->seed >> 8) % (sizes[0] / PAGE_BYTES) / 64 * 64 * PAGE_BYTES, n);
	}
	return NULL;
}

static void *race(void *data)
{
	struct racer *racer = data;
	uint64_t n = 0;

	while (!*racer->stop) {
		unsigned int region;
		uint64_t at;

		racer->seed = racer->seed * 1103515245 + 12345;
		region = racer->seed >> 28 & 1;
		/* Some pages often, the others now and then. */
		at = (uint64_t)(racer->seed >> 8) % (racer->seed >> 29 ? 64 * PAGE_BYTES : sizes[region]) & ~7ULL;
		if (racer->discards && !(racer->seed >> 4 & 15)) {
			at &= ~(uint64_t)(PAGE_BYTES - 1);
			kmig_region_discard(racer->regions[region], at, PAGE_BYTES);
			log_page(region, at / PAGE_BYTES);
			/* Read, and thereby a page again. */
			n += *(volatile uint64_t *)((uint8_t *)racer->regions[region]->map + at);
		} else {
			store(racer->regions, region, at, ++n);
		}
	}
	return NULL;
}

#define RACERS 3

#define RACE(first, others, with_discards, ms) do {						\
	struct racer racers[RACERS];								\
	_Atomic bool stop = false;								\
	uint64_t end;										\
												\
	for (int _i = 0; _i < RACERS; _i++) {							\
		racers[_i] = (struct racer){ self->regions, 0, _i + 1, &stop, (with_discards) && !_i };	\
		pthread_create(&racers[_i].thread, NULL, _i ? others : first, &racers[_i]);	\
	}											\
	SEND_ALL();										\
	for (end = kmig_now_ns() + kmig_ms(ms); kmig_now_ns() < end;)				\
		SEND_DIRTY();									\
	stop = true;										\
	for (int _i = 0; _i < RACERS; _i++)							\
		pthread_join(racers[_i].thread, NULL);						\
	SEND_DIRTY();										\
	SEND_DIRTY();										\
	EXPECT_PAGES(0, self->round.pages);							\
	EXPECT_PAGES(0, PEEK(0) + PEEK(1) + PEEK(2));						\
	EXPECT_SAME();										\
	TH_LOG("%u rounds", self->number);							\
} while (0)

TEST_F(tracker, no_write_is_lost)
{
	FILL();
	START();
	RACE(race, race, false, 1000);
}

TEST_F(tracker, no_discard_is_lost)
{
	FILL();
	START();
	RACE(race, race, true, 1000);
}

TEST_F(tracker, no_single_write_is_lost)
{
	FILL();
	START();
	RACE(race_once, race_even, false, 1500);
}

#ifdef ON_MODULE
TEST_F(tracker, stun_and_what_was_felt)
{
	struct kmig_tracker_stats stats;
	uint64_t begin;

	FILL();
	START();
	SEND_ALL();
	ASSERT_EQ(0, kmig_tracker_stun(self->tracker, 1000, 0));
	begin = kmig_now_ns();
	for (uint64_t page = 0; page < 510; page++)
		STORE(0, page * PAGE_BYTES, page);
	EXPECT_LT(kmig_ms(400), kmig_now_ns() - begin);
	ASSERT_EQ(0, kmig_tracker_stun(self->tracker, 0, 0));
	ASSERT_EQ(0, kmig_tracker_stats(self->tracker, &stats));
	EXPECT_LE(510, stats.write_faults);
	EXPECT_GT(1000, stats.write_faults);
	EXPECT_LT(0, stats.fault_ns);
	EXPECT_LT(0, stats.stuns);
	EXPECT_LT(kmig_ms(300), stats.stun_ns);
	EXPECT_LE(1, stats.threads);
	EXPECT_EQ(gettid(), stats.thread[0].id);
	EXPECT_EQ(stats.stuns, stats.thread[0].stuns);
	begin = kmig_now_ns();
	for (uint64_t page = 510; page < 1020; page++)
		STORE(0, page * PAGE_BYTES, page);
	EXPECT_GT(kmig_ms(400), kmig_now_ns() - begin);
}
#else

/* ---- The network ---- */

/* The kernel counts pages out by reference as locked, and has no room above the limit. */
static bool may_pin(uint64_t bytes)
{
	struct rlimit limit;

	return !geteuid() || (!getrlimit(RLIMIT_MEMLOCK, &limit) && limit.rlim_cur > bytes);
}

TEST_F(tracker, by_reference)
{
	struct kmig_channel_stats stats;
	uint64_t zerocopy = 0, copied = 0;

	if (!may_pin(8 * MIB))
		SKIP(return, "RLIMIT_MEMLOCK is too low");
	network.reference = true;
	memset(MAP(0), 0x44, 8 * MIB);		/* long runs */
	MAP(1)[0] = 1;				/* not worth it */
	START();
	SEND_ALL();
	STORE(0, 0, 1);
	SEND_DIRTY();
	EXPECT_SAME();
	for (unsigned int i = 0; i < variant->channels; i++) {
		ASSERT_EQ(0, kmig_tracker_channel_stats(self->tracker, i, &stats));
		zerocopy += stats.zerocopy_bytes;
		copied += stats.copied_bytes;
	}
	EXPECT_LE(8 * MIB - variant->channels * CHUNK_BYTES, zerocopy);
	EXPECT_LE(2 * PAGE_BYTES, copied);
	EXPECT_EQ(8 * MIB + 2 * PAGE_BYTES, zerocopy + copied);
	EXPECT_LT(0, network.calls);
}

/* Loopback copies: it is tried on a channel until that is known, and then no more. */
TEST_F(tracker, copied_after_all)
{
	struct kmig_channel_stats stats;
	bool all_tried = true;
	unsigned int calls;

	memset(MAP(0), 0x44, 8 * MIB);
	START();
	SEND_ALL();
	calls = network.calls;
	EXPECT_LT(0, calls);
	/* One that came for no chunk has not found out yet. */
	for (unsigned int i = 0; i < variant->channels; i++) {
		ASSERT_EQ(0, kmig_tracker_channel_stats(self->tracker, i, &stats));
		all_tried = all_tried && stats.data_pages;
	}
	memset(MAP(0), 0x45, 8 * MIB);
	for (uint64_t page = 0; page < 2048; page++)
		LOG(0, page);
	SEND_DIRTY();
	EXPECT_EQ(2048, self->round.data_pages);
	if (all_tried)
		EXPECT_EQ(calls, network.calls);
	EXPECT_SAME();
	for (unsigned int i = 0; i < variant->channels; i++) {
		ASSERT_EQ(0, kmig_tracker_channel_stats(self->tracker, i, &stats));
		EXPECT_EQ(0, stats.zerocopy_bytes);
		EXPECT_EQ(stats.data_pages * PAGE_BYTES, stats.copied_bytes);
	}
}

TEST_F(tracker, no_room_for_notices)
{
	struct kmig_channel_stats stats;

	network.reference = true;
	network.full = true;
	memset(MAP(0), 0x44, 8 * MIB);
	START();
	SEND_ALL();
	EXPECT_EQ(2048, self->round.data_pages);
	EXPECT_SAME();
	for (unsigned int i = 0; i < variant->channels; i++) {
		ASSERT_EQ(0, kmig_tracker_channel_stats(self->tracker, i, &stats));
		EXPECT_EQ(0, stats.zerocopy_bytes);
	}
	/* Where there is room for none, it is not tried again. */
	EXPECT_GE(variant->channels, network.calls);
}

#endif /* ON_MODULE */

/* ---- Failures ---- */

#define PEERS_DEAF(yes) do {									\
	for (unsigned int _i = 0; _i < variant->channels; _i++)					\
		self->world.peer[_i].deaf = yes;						\
} while (0)

TEST_F(tracker, cancelled_while_it_waits_for_room)
{
	uint64_t begin;

	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	EXPECT_EQ(-EBUSY, kmig_tracker_send(self->tracker, 2, KMIG_SEND_ALL, 0));
	usleep(200000);
	EXPECT_EQ(-ETIMEDOUT, kmig_tracker_wait(self->tracker, &self->round));
	begin = kmig_now_ns();
	kmig_tracker_cancel(self->tracker);
	EXPECT_EQ(-ECANCELED, await(self->tracker, &self->round));
	EXPECT_GT(kmig_ms(3000), kmig_now_ns() - begin);
	EXPECT_EQ(-1, self->round.channel);
	EXPECT_EQ(-EPIPE, kmig_tracker_send(self->tracker, 2, KMIG_SEND_ALL, 0));
	PEERS_DEAF(false);
}

/* A slow wire: sending is nearly all of the round. */
TEST_F(tracker, times_of_a_slow_wire)
{
	struct kmig_round_times times;

	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(300000);
	EXPECT_EQ(-ETIMEDOUT, kmig_tracker_wait(self->tracker, &self->round));
	PEERS_DEAF(false);
	EXPECT_EQ(0, await(self->tracker, &self->round));
	check_times(_metadata, self->tracker, &self->round, variant->channels, &times);
	EXPECT_LT(kmig_ms(200), times.wire_ns);
	EXPECT_LT(self->round.duration_ns / 2, times.wire_ns);
	EXPECT_LT(kmig_ms(200), times.send_ns);
}

TEST_F(tracker, freed_while_it_sends)
{
	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(50000);
	kmig_tracker_free(self->tracker);
	self->tracker = NULL;
	PEERS_DEAF(false);
	/* Writing is as it was. */
	STORE(0, 0, 1);
}

static uint64_t carried(struct kmig_tracker *tracker, unsigned int channel)
{
	struct kmig_channel_stats stats;

	return kmig_tracker_channel_stats(tracker, channel, &stats) ? UINT64_MAX : stats.data_pages;
}

/* Those that are not to carry end the round with nothing; in the middle of one they are let carry. */
TEST_F(tracker, width)
{
	unsigned int last = variant->channels - 1;

	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	ASSERT_EQ(0, kmig_tracker_width(self->tracker, 1));
	SEND_ALL();
	EXPECT_SAME();
	for (unsigned int i = 1; i < variant->channels; i++)
		EXPECT_EQ(0, carried(self->tracker, i));
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 2, KMIG_SEND_ALL, 0));
	usleep(100000);
	if (last)
		EXPECT_EQ(0, carried(self->tracker, last));
	ASSERT_EQ(0, kmig_tracker_width(self->tracker, variant->channels));
	self->world.peer[last].deaf = false;
	for (int i = 0; i < 5000 && !carried(self->tracker, last); i++)
		usleep(1000);
	EXPECT_LT(0, carried(self->tracker, last));
	PEERS_DEAF(false);
	EXPECT_EQ(0, await(self->tracker, &self->round));
	/* Freed while some wait for the end of a round. */
	ASSERT_EQ(0, kmig_tracker_width(self->tracker, 1));
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 3, KMIG_SEND_ALL, 0));
	usleep(50000);
	kmig_tracker_free(self->tracker);
	self->tracker = NULL;
	PEERS_DEAF(false);
}

/* Nobody else would carry the rest of the round. */
TEST_F(tracker, another_carries_in_place_of_one_that_is_lost)
{
	uint64_t *bitmap = calloc(sizes[0] / PAGE_BYTES / 64 + 1, sizeof(uint64_t)), found;
	int why;

	if (variant->channels == 1)
		SKIP(return, "there is no other");
	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	ASSERT_EQ(0, kmig_tracker_width(self->tracker, 1));
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(100000);
	shutdown(self->world.peer[0].sock, SHUT_RDWR);
	PEERS_DEAF(false);
	for (int i = 0; i < 5000 && !kmig_tracker_lost(self->tracker); i++)
		usleep(1000);
	ASSERT_EQ(0, kmig_tracker_drop_channel(self->tracker, 0, &why));
	ASSERT_EQ(0, await(self->tracker, &self->round));
	EXPECT_LT(0, carried(self->tracker, 1));
	for (unsigned int i = 2; i < variant->channels; i++)
		EXPECT_EQ(0, carried(self->tracker, i));
	ASSERT_EQ(0, kmig_tracker_peek(self->tracker, 0, bitmap, &found));
	EXPECT_LT(0, found);
	free(bitmap);
}

TEST_F(tracker, peer_gone)
{
	uint64_t *bitmap = calloc(sizes[0] / PAGE_BYTES / 64 + 1, sizeof(uint64_t)), found;
	unsigned int last = variant->channels - 1;
	int why;

	network.narrow = true;
	memset(MAP(0), 0x44, sizes[0]);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(100000);
	/* What comes after this is answered with a reset. */
	shutdown(self->world.peer[last].sock, SHUT_RDWR);
	self->world.peer[last].deaf = false;
	/* One is lost, and no more; what it took is dirty again. */
	for (int i = 0; i < 5000 && !kmig_tracker_lost(self->tracker); i++)
		usleep(1000);
	ASSERT_EQ(1ull << last, kmig_tracker_lost(self->tracker));
	PEERS_DEAF(false);
	EXPECT_EQ(-EINVAL, kmig_tracker_drop_channel(self->tracker, variant->channels, &why));
	ASSERT_EQ(0, kmig_tracker_drop_channel(self->tracker, last, &why));
	EXPECT_TRUE(why == -EPIPE || why == -ECONNRESET) TH_LOG("%d", why);
	EXPECT_EQ(0, kmig_tracker_lost(self->tracker));
	EXPECT_GT(0, kmig_tracker_drop_channel(self->tracker, last, &why));
	ASSERT_EQ(0, await(self->tracker, &self->round));
	ASSERT_EQ(0, kmig_tracker_peek(self->tracker, 0, bitmap, &found));
	EXPECT_LE(variant->channels == 1 ? 1 : CHUNK_BYTES / PAGE_BYTES, found);
	if (variant->channels == 1) {
		EXPECT_EQ(-EPIPE, kmig_tracker_send(self->tracker, 2, KMIG_SEND_DIRTY, 0));
	} else {
		/* Chunks may move when all of the round is there. */
		for (unsigned int i = 0; i < last; i++)
			while (self->world.peer[i].ended != 1)
				usleep(1000);
		ASSERT_EQ(0, kmig_tracker_send(self->tracker, 2, KMIG_SEND_DIRTY, 0));
		ASSERT_EQ(0, await(self->tracker, &self->round));
		EXPECT_EQ(found, self->round.pages);
		/* Also what the lost one had not come to in the round that sends all. */
		for (unsigned int i = 0; i < last; i++)
			while (self->world.peer[i].ended != 2)
				usleep(1000);
		EXPECT_EQ(0, memcmp(self->world.copy[0], MAP(0), sizes[0]));
	}
	free(bitmap);
}

TEST_F(tracker, wrong_order)
{
	struct kmig_channel_stats stats;

	FILL();
	START();
	EXPECT_EQ(-EINVAL, kmig_tracker_send(self->tracker, 0, KMIG_SEND_ALL, 0));
	SEND_ALL();
	EXPECT_EQ(-EINVAL, kmig_tracker_send(self->tracker, 1, KMIG_SEND_DIRTY, 0));
	EXPECT_EQ(-EINVAL, kmig_tracker_channel_stats(self->tracker, variant->channels, &stats));
	EXPECT_EQ(0, kmig_tracker_held(self->tracker));
	EXPECT_EQ(ON_LMTRACK ? 0 : -EOPNOTSUPP, kmig_tracker_stun(self->tracker, 1, 0));
}

#ifndef ON_MODULE
/* The same with pages that are out by reference, which nobody will ever acknowledge. */
TEST_F(tracker, cancelled_while_it_waits_for_notices)
{
	if (!may_pin(CHUNK_BYTES))
		SKIP(return, "RLIMIT_MEMLOCK is too low");
	network.reference = true;
	network.narrow = true;
	memset(MAP(0), 0x44, CHUNK_BYTES);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(200000);
	kmig_tracker_cancel(self->tracker);
	EXPECT_EQ(-ECANCELED, await(self->tracker, &self->round));
	PEERS_DEAF(false);
}

/* ---- What pagemap cannot see, it refuses ---- */

static uint8_t *map_again(const struct kmig_region *region)
{
	return mmap(NULL, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
}

FIXTURE(refused) {
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_tracker *tracker;
	struct kmig_tracker_config config;
	int pair[2];
};

FIXTURE_SETUP(refused)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	int err;

	opts.bytes = 4 * MIB;
	opts.kind = KMIG_REGION_MEMFD;
	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	/* The VMM has not mapped it, or not so that anyone knows. */
	EXPECT_EQ(-EOPNOTSUPP, kmig_tracker_accepts(KMIG_TRACKER_PAGEMAP, NULL, 0, self->region));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), "kmig_region_map"));
	kmig_region_map(self->region);
	err = kmig_tracker_accepts(KMIG_TRACKER_AUTO, NULL, 0, self->region);
	if (err == -EOPNOTSUPP)
		SKIP(return, "%s", kmig_ctx_error(self->ctx));
	ASSERT_EQ(0, err) TH_LOG("%s", kmig_ctx_error(self->ctx));
	self->config = (struct kmig_tracker_config){
		.ctx = self->ctx, .kind = KMIG_TRACKER_AUTO, .regions = &self->region, .count = 1,
		.stream = STREAM, .abort_fd = -1,
	};
	ASSERT_EQ(0, kmig_tracker_new(&self->config, &self->tracker));
	EXPECT_STREQ("pagemap", self->tracker->ops->name);
}

FIXTURE_TEARDOWN(refused)
{
	kmig_tracker_free(self->tracker);
	kmig_region_free(self->region);
	kmig_ctx_free(self->ctx);
}

TEST_F(refused, mapped_twice)
{
	uint8_t *again = map_again(self->region);

	ASSERT_NE(MAP_FAILED, again);
	EXPECT_EQ(-EBUSY, kmig_tracker_start(self->tracker));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), "second time")) TH_LOG("%s", kmig_ctx_error(self->ctx));
	/* One that is only read is no harm. */
	ASSERT_EQ(0, mprotect(again, self->region->bytes, PROT_READ));
	EXPECT_EQ(0, kmig_tracker_start(self->tracker));
	munmap(again, self->region->bytes);
}

TEST_F(refused, tracked_already)
{
	struct kmig_tracker *other;

	ASSERT_EQ(0, kmig_tracker_start(self->tracker));
	ASSERT_EQ(0, kmig_tracker_new(&self->config, &other));
	EXPECT_EQ(-EBUSY, kmig_tracker_start(other));
	kmig_tracker_free(other);
}

/* Seen when its pages are about to be sent. */
TEST_F(refused, mapped_by_another_process)
{
	struct kmig_round round = { 0 };
	int pair[2], ready[2];
	char byte;
	pid_t pid;

	((uint8_t *)self->region->map)[MIB] = 1;
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	if (!pid) {
		uint8_t *again = map_again(self->region);

		again[MIB] = 2;
		if (write(ready[1], "", 1) == 1)
			pause();
		_exit(0);
	}
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	ASSERT_EQ(0, connect_pair(pair));
	ASSERT_EQ(0, kmig_tracker_start(self->tracker));
	ASSERT_EQ(0, kmig_tracker_add_channel(self->tracker, pair[0]));
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	EXPECT_EQ(-EBUSY, await(self->tracker, &round));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), "another process")) TH_LOG("%s", kmig_ctx_error(self->ctx));
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static int status_of_child_that_writes(uint8_t *to)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		signal(SIGSEGV, SIG_DFL);
		*(volatile uint8_t *)to = 1;
		_exit(0);
	}
	waitpid(pid, &status, 0);
	return status;
}

TEST_F(refused, child_gets_no_mapping)
{
	ASSERT_EQ(0, kmig_tracker_start(self->tracker));
	EXPECT_NE(0, status_of_child_that_writes(self->region->map));
	kmig_tracker_free(self->tracker);
	EXPECT_EQ(0, status_of_child_that_writes(self->region->map));
	ASSERT_EQ(0, kmig_tracker_new(&self->config, &self->tracker));
}

TEST_F(refused, no_memfd)
{
	char name[] = "/var/tmp/lib_tracker.XXXXXX";
	struct kmig_region *file;
	struct statfs fs;
	int fd = mkstemp(name);

	ASSERT_LE(0, fd);
	unlink(name);
	ASSERT_EQ(0, ftruncate(fd, MIB));
	ASSERT_EQ(0, kmig_region_adopt(self->ctx, fd, &file));
	ASSERT_NE(NULL, kmig_region_map(file));
	ASSERT_EQ(0, fstatfs(fd, &fs));
	if (fs.f_type == TMPFS_MAGIC)
		SKIP(return, "/var/tmp is in memory");
	EXPECT_EQ(-EOPNOTSUPP, kmig_tracker_accepts(KMIG_TRACKER_PAGEMAP, NULL, 0, file));
	EXPECT_EQ(-EOPNOTSUPP, kmig_tracker_accepts(KMIG_TRACKER_LMTRACK, NULL, 0, file));
	EXPECT_EQ(0, kmig_tracker_accepts(KMIG_TRACKER_EXTERNAL, NULL, 0, file));
	EXPECT_EQ(-EINVAL, kmig_tracker_accepts(77, NULL, 0, file));
	kmig_region_free(file);
	close(fd);
}

/* ---- Whole migrations ---- */

/* One side; both are threads of this process, or the destination is another. */
struct end {
	struct kmig_ctx *ctx;
	struct kmig_region *regions[REGIONS];
	void *engine;
	struct kmig_report report;
	int result;
	_Atomic bool runs, discarded;
	char error[KMIG_ERROR_MAX];

	/* the source's */
	enum kmig_tracker_kind kind;
	unsigned int channels;
	int abort_at;		/* state, or -1 */
	pid_t kill;		/* at the first round's end, or 0 */
	struct racer racers[RACERS];
	_Atomic bool stop;
	/* the destination's */
	_Atomic int *port;
};

static void end_init(struct end *end)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

	kmig_ctx_new(&end->ctx);
	opts.kind = KMIG_REGION_MEMFD;
	for (unsigned int i = 0; i < REGIONS; i++) {
		opts.bytes = sizes[i];
		kmig_region_create(end->ctx, &opts, &end->regions[i]);
		kmig_region_map(end->regions[i]);
	}
	end->abort_at = -1;
}

static void end_free(struct end *end)
{
	for (unsigned int i = 0; i < REGIONS; i++)
		kmig_region_free(end->regions[i]);
	kmig_ctx_free(end->ctx);
}

static void vm_go(struct end *end)
{
	end->stop = false;
	for (int i = 0; i < RACERS; i++) {
		end->racers[i] = (struct racer){ end->regions, 0, i + 1, &end->stop, !i };
		pthread_create(&end->racers[i].thread, NULL, race, &end->racers[i]);
	}
	end->runs = true;
}

static void vm_stop(struct end *end)
{
	end->stop = true;
	for (int i = 0; i < RACERS && end->runs; i++)
		pthread_join(end->racers[i].thread, NULL);
	end->runs = false;
}

static int vm_pause(void *data)
{
	vm_stop(data);
	return 0;
}

static int vm_resume(void *data)
{
	struct end *end = data;

	if (!end->runs)
		vm_go(end);
	return 0;
}

static int vm_save(void **state, size_t *length, void *data)
{
	struct end *end = data;

	store(end->regions, 2, 0, 0xdef1ce);
	*state = strdup("devices");
	*length = 7;
	return 0;
}

static void vm_progress(const struct kmig_report *report, void *data)
{
	struct end *end = data;

	if ((int)report->state == end->abort_at)
		kmig_source_abort(end->engine);
}

static void vm_round(const struct kmig_round_report *round, void *data)
{
	struct end *end = data;

	(void)round;
	if (end->kill)
		kill(end->kill, SIGKILL);
	end->kill = 0;
}

static int vm_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	struct end *end = data;

	if (count != REGIONS || memcmp(bytes, sizes, sizeof(sizes)))
		return -EINVAL;
	memcpy(regions, end->regions, sizeof(end->regions));
	return 0;
}

static int vm_load(const void *state, size_t length, void *data)
{
	(void)data;
	return length == 7 && !memcmp(state, "devices", 7) ? 0 : -EINVAL;
}

static int vm_run(void *data)
{
	((struct end *)data)->runs = true;
	return 0;
}

static void vm_discard(void *data)
{
	((struct end *)data)->discarded = true;
}

static void *destination_end(void *data)
{
	static const struct kmig_destination_ops ops = {
		.size = sizeof(ops), .prepare = vm_prepare, .load_state = vm_load, .run = vm_run, .discard = vm_discard,
	};
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_destination *destination;
	struct sockaddr_in address;
	socklen_t length = sizeof(address);
	struct end *end = data;

	opts.port = 0;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	end->result = kmig_destination_new(end->ctx, &opts, &ops, end, &destination);
	if (end->result)
		return NULL;
	end->engine = destination;
	kmig_destination_address(destination, (struct sockaddr_storage *)&address, &length);
	*end->port = ntohs(address.sin_port);
	end->result = kmig_destination_run(destination);
	kmig_copy_error(end->ctx, end->error);
	end->report.size = sizeof(end->report);
	kmig_destination_report(destination, &end->report);
	kmig_destination_free(destination);
	return NULL;
}

static void source_end(struct end *end, int port)
{
	struct kmig_source_ops ops = {
		.size = sizeof(ops), .pause = vm_pause, .resume = vm_resume, .save_state = vm_save,
		.progress = vm_progress, .round = vm_round, .dirty = give_dirty, .track = give_track,
	};
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;

	opts.host = "127.0.0.1";
	opts.port = port;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.channels = end->channels;
	opts.tracker = end->kind;
	opts.max_rounds = 6;
	opts.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	end->result = kmig_source_new(end->ctx, &opts, &ops, end, &source);
	if (end->result)
		return;
	end->engine = source;
	for (unsigned int i = 0; i < REGIONS && !end->result; i++)
		end->result = kmig_source_add_region(source, end->regions[i]);
	if (!end->result)
		end->result = kmig_source_run(source);
	kmig_copy_error(end->ctx, end->error);
	end->report.size = sizeof(end->report);
	kmig_source_report(source, &end->report);
	kmig_source_free(source);
}

FIXTURE(move) {
	struct end source, destination;
	_Atomic int *port;
	unsigned int fds, threads;
	pthread_t thread;
};

FIXTURE_VARIANT(move) {
	enum kmig_tracker_kind kind;
	unsigned int channels;
};

FIXTURE_VARIANT_ADD(move, auto_1) { .kind = KMIG_TRACKER_AUTO, .channels = 1 };
FIXTURE_VARIANT_ADD(move, pagemap_5) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 5 };
FIXTURE_VARIANT_ADD(move, external_2) { .kind = KMIG_TRACKER_EXTERNAL, .channels = 2 };

FIXTURE_SETUP(move)
{
	int err;

	self->fds = entries_of("/proc/self/fd");
	self->threads = entries_of("/proc/self/task");
	self->port = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (unsigned int i = 0; i < REGIONS; i++)
		dirty_log[i] = calloc(sizes[i] / PAGE_BYTES / 64 + 1, sizeof(uint64_t));
	end_init(&self->source);
	end_init(&self->destination);
	self->source.kind = variant->kind;
	self->source.channels = variant->channels;
	self->destination.port = self->port;
	err = kmig_tracker_accepts(variant->kind, NULL, 0, self->source.regions[0]);
	if (err == -EOPNOTSUPP)
		SKIP(return, "%s", kmig_ctx_error(self->source.ctx));
	fill(self->source.regions[0]->map, sizes[0]);
	vm_go(&self->source);
}

FIXTURE_TEARDOWN(move)
{
	vm_stop(&self->source);
	end_free(&self->source);
	end_free(&self->destination);
	EXPECT_EQ(self->fds, entries_of("/proc/self/fd"));
	EXPECT_EQ(self->threads, threads_left(self->threads));
	EXPECT_FALSE(logging);
}

#define MOVE() do {										\
	*self->port = 0;									\
	pthread_create(&self->thread, NULL, destination_end, &self->destination);		\
	while (!*self->port)									\
		usleep(1000);									\
	source_end(&self->source, *self->port);							\
	/* Before it was greeted, it knows of no source, and waits for another. */		\
	if (self->source.abort_at == KMIG_STATE_HELLO)						\
		kmig_destination_abort(self->destination.engine);				\
	pthread_join(self->thread, NULL);							\
} while (0)

#define EXPECT_MOVED() do {									\
	ASSERT_EQ(0, self->source.result) TH_LOG("%s", self->source.error);			\
	ASSERT_EQ(0, self->destination.result) TH_LOG("%s", self->destination.error);		\
	EXPECT_FALSE(self->source.runs);							\
	EXPECT_TRUE(self->destination.runs);							\
	for (unsigned int _i = 0; _i < REGIONS; _i++) {						\
		EXPECT_GE(resident(self->source.regions[_i]), resident(self->destination.regions[_i]));	\
		EXPECT_EQ(-1, first_difference(self->source.regions[_i], self->destination.regions[_i]->map));	\
	}											\
} while (0)

TEST_F(move, a_guest_that_writes_all_the_time)
{
	struct kmig_report *report = &self->source.report;

	MOVE();
	EXPECT_MOVED();
	EXPECT_LT(1, report->rounds);
	EXPECT_EQ(report->digests_compared, self->destination.report.digests_compared);
	EXPECT_EQ(report->data_pages * PAGE_BYTES, report->zerocopy_bytes + report->copied_bytes);
	TH_LOG("%u rounds, %.1f ms, downtime %.1f ms", report->rounds, report->total_ns / 1e6, report->downtime_ns / 1e6);
}

/* Another attempt knows nothing of the one before. */
TEST_F_TIMEOUT(move, aborted_in_each_state_and_again, 120)
{
	for (int state = KMIG_STATE_HELLO; state < KMIG_STATE_CLEANUP; state++) {
		self->source.abort_at = state;
		MOVE();
		EXPECT_EQ(-ECANCELED, self->source.result) TH_LOG("%s: %s", kmig_state_name(state), self->source.error);
		EXPECT_EQ(KMIG_CANCELLED, self->source.report.verdict);
		EXPECT_TRUE(self->source.runs);
		EXPECT_FALSE(self->destination.runs);
		EXPECT_FALSE(logging);
	}
	self->source.abort_at = -1;
	MOVE();
	EXPECT_MOVED();
}

TEST_F(move, destination_killed)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		destination_end(&self->destination);
		_exit(0);
	}
	while (!*self->port)
		usleep(1000);
	self->source.kill = pid;
	source_end(&self->source, *self->port);
	waitpid(pid, &status, 0);
	EXPECT_TRUE(WIFSIGNALED(status));
	EXPECT_GT(0, self->source.result);
	EXPECT_EQ(KMIG_FAILED, self->source.report.verdict);
	EXPECT_TRUE(self->source.runs);
	MOVE();
	EXPECT_MOVED();
}

/* What is wrong is said in words, to the last. */
TEST_F(move, not_the_only_process)
{
	int ready[2];
	char byte;
	pid_t pid;

	if (variant->kind == KMIG_TRACKER_EXTERNAL)
		return;
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	if (!pid) {
		uint8_t *again = map_again(self->source.regions[0]);

		again[MIB] = 2;
		if (write(ready[1], "", 1) == 1)
			pause();
		_exit(0);
	}
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	store(self->source.regions, 0, MIB, 3);
	MOVE();
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	close(ready[0]);
	close(ready[1]);
	EXPECT_EQ(-EBUSY, self->source.result);
	EXPECT_NE(NULL, strstr(self->source.error, "another process")) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->source.runs);
}

TEST_F(move, vmm_does_not_know)
{
	if (variant->kind != KMIG_TRACKER_EXTERNAL)
		return;
	log_error = EXDEV;
	MOVE();
	log_error = 0;
	EXPECT_EQ(-EXDEV, self->source.result);
	EXPECT_NE(NULL, strstr(self->source.error, "could not tell")) TH_LOG("%s", self->source.error);
	EXPECT_TRUE(self->source.runs);
}

TEST(external_needs_its_function)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = vm_pause, .resume = vm_resume };
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;
	struct kmig_ctx *ctx;

	ASSERT_EQ(0, kmig_ctx_new(&ctx));
	opts.host = "127.0.0.1";
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.tracker = KMIG_TRACKER_EXTERNAL;
	EXPECT_EQ(-EINVAL, kmig_source_new(ctx, &opts, &ops, NULL, &source));
	EXPECT_NE(NULL, strstr(kmig_ctx_error(ctx), "dirty"));
	kmig_ctx_free(ctx);
}
#endif /* ON_MODULE */

TEST_HARNESS_MAIN
