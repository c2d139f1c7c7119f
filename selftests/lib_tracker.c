// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=recvmsg -Wl,--wrap=sendmsg
/*
 * The trackers that need no module. First each by itself, over TCP to a receiver that notes
 * what comes on which channel in which round: what is sent, what is not, and that no write is
 * lost to racing writers. Then whole migrations with them.
 */
#include "kselftest_harness.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "../lib/sender.h"
#include "../lib/wire.h"
#include "lib_pair.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define REGIONS 3
#define CHANNELS_MAX 8
#define CHUNK_BYTES (LMTRACK_CHUNK_PAGES * PAGE_BYTES)
#define STREAM 0x1234567890abcdefULL

/* Of different sizes, the last chunk short; the second begins on another channel. */
static const uint64_t sizes[REGIONS] = { 16 * MIB + 5 * PAGE_BYTES, 6 * MIB, PAGE_BYTES };

static unsigned int entries_of(const char *path)
{
	DIR *dir = opendir(path);
	unsigned int n = 0;

	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* ---- The network, as it could be ---- */

static struct {
	_Atomic bool reference;		/* it can take pages by reference, unlike loopback */
	_Atomic bool full;		/* it has no room for notices */
	_Atomic unsigned int calls;	/* that asked for zero-copy */
} network;

ssize_t __real_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);

ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags)
{
	ssize_t n = __real_recvmsg(fd, msg, flags);
	struct cmsghdr *at = n < 0 || !(flags & MSG_ERRQUEUE) ? NULL : CMSG_FIRSTHDR(msg);

	if (at && network.reference)
		((struct sock_extended_err *)CMSG_DATA(at))->ee_code = 0;
	return n;
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	if (flags & MSG_ZEROCOPY) {
		network.calls++;
		if (network.full) {
			errno = ENOBUFS;
			return -1;
		}
	}
	return __real_sendmsg(fd, msg, flags);
}

/* ---- A receiver ---- */

struct peer {
	struct world_of_pages *to;
	unsigned int number;
	int sock;			/* its end */
	pthread_t thread;
	_Atomic bool deaf;
	_Atomic uint32_t ended;		/* round */
	_Atomic int error;
	uint64_t seq, round_pages;
};

struct world_of_pages {
	uint8_t *copy[REGIONS];
	uint32_t *round[REGIONS];	/* of each page: the last in which it came */
	bool *zero[REGIONS];		/* it came as zero then */
	uint8_t *owner[REGIONS];	/* of each chunk: its channel plus 1 */
	uint64_t pages[REGIONS];
	struct peer peer[CHANNELS_MAX];
	unsigned int channels;
};

static bool get(struct peer *peer, void *to, size_t length)
{
	while (peer->deaf)
		usleep(1000);
	return !length || recv(peer->sock, to, length, MSG_WAITALL) == (ssize_t)length;
}

/* Take a frame in; what is wrong with it, or NULL; "" at the end. */
static const char *take_frame(struct peer *peer)
{
	struct world_of_pages *to = peer->to;
	static _Thread_local struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	struct lmtrack_wire_frame raw;
	struct kmig_frame frame;
	const char *why = NULL;
	uint64_t chunk;
	uint32_t pages;

	if (!get(peer, &raw, sizeof(raw)))
		return "";
	if (kmig_frame_decode(&raw, PAGE_BYTES, &frame, &why) || !get(peer, table, frame.extents * sizeof(table[0])) ||
	    kmig_frame_check_crc(&raw, table, &why))
		return why ? why : "";
	if (frame.stream != STREAM || frame.channel != peer->number || frame.seq != peer->seq++)
		return "stream, channel or sequence";
	if (frame.type == LMTRACK_FRAME_ROUND_END) {
		if (frame.arg != peer->round_pages)
			return "pages of the round";
		peer->round_pages = 0;
		peer->ended = frame.round;
		return NULL;
	}
	if (frame.region >= REGIONS ||
	    kmig_frame_check_extents(&frame, table, to->pages[frame.region], PAGE_BYTES, &chunk, &pages, &why))
		return why ? why : "region";
	if (to->owner[frame.region][chunk] && to->owner[frame.region][chunk] != peer->number + 1)
		return "a chunk changed its channel";
	to->owner[frame.region][chunk] = peer->number + 1;
	peer->round_pages += pages;
	for (uint32_t i = 0; i < frame.extents; i++) {
		for (uint64_t page = le64toh(table[i].first); page < le64toh(table[i].first) + le32toh(table[i].pages); page++) {
			uint8_t *copy = to->copy[frame.region] + page * PAGE_BYTES;

			if (to->round[frame.region][page] == frame.round)
				return "a page came twice in a round";
			to->round[frame.region][page] = frame.round;
			to->zero[frame.region][page] = frame.type == LMTRACK_FRAME_ZERO;
			if (frame.type == LMTRACK_FRAME_ZERO)
				memset(copy, 0, PAGE_BYTES);
			else if (!get(peer, copy, PAGE_BYTES))
				return "";
		}
	}
	return NULL;
}

static void *peer_main(void *data)
{
	struct peer *peer = data;
	const char *wrong;

	do
		wrong = take_frame(peer);
	while (!wrong);
	if (*wrong) {
		fprintf(stderr, "# channel %u: %s\n", peer->number, wrong);
		peer->error = EPROTO;
	}
	return NULL;
}

/* A TCP connection over loopback. */
static int connect_pair(int pair[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int err;

	pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	err = bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
	      getsockname(listener, (struct sockaddr *)&address, &length) ||
	      connect(pair[0], (struct sockaddr *)&address, length);
	pair[1] = err ? -1 : accept(listener, NULL, NULL);
	close(listener);
	return err || pair[1] < 0 ? -1 : 0;
}

/* ---- A VMM that knows itself what it wrote ---- */

static uint64_t *dirty_log[REGIONS];
static _Atomic bool logging;
static _Atomic int log_error;

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

static int give_dirty(unsigned int region, uint64_t first, uint64_t pages, uint64_t *bitmap, void *data)
{
	(void)data;
	if (log_error)
		return -log_error;
	for (uint64_t word = 0; word < (pages + 63) / 64; word++)
		bitmap[word] |= __atomic_exchange_n(&dirty_log[region][first / 64 + word], 0, __ATOMIC_SEQ_CST);
	return 0;
}

static int give_track(bool on, void *data)
{
	(void)data;
	logging = on;
	return 0;
}

/* ---- A tracker by itself ---- */

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

FIXTURE_VARIANT_ADD(tracker, pagemap_1) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 1 };
FIXTURE_VARIANT_ADD(tracker, pagemap_3) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 3 };
FIXTURE_VARIANT_ADD(tracker, external_2) { .kind = KMIG_TRACKER_EXTERNAL, .channels = 2 };

static void setup_pages(struct world_of_pages *world, unsigned int i)
{
	world->pages[i] = sizes[i] / PAGE_BYTES;
	world->copy[i] = mmap(NULL, sizes[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	world->round[i] = calloc(world->pages[i], sizeof(uint32_t));
	world->zero[i] = calloc(world->pages[i], sizeof(bool));
	world->owner[i] = calloc(sizes[i] / CHUNK_BYTES + 1, 1);
	dirty_log[i] = calloc((world->pages[i] + 63) / 64, sizeof(uint64_t));
}

FIXTURE_SETUP(tracker)
{
	self->fds = entries_of("/proc/self/fd");
	self->threads = entries_of("/proc/self/task");
	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	for (unsigned int i = 0; i < REGIONS; i++) {
		struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
		int err;

		opts.bytes = sizes[i];
		opts.kind = KMIG_REGION_MEMFD;
		ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->regions[i]));
		ASSERT_NE(NULL, kmig_region_map(self->regions[i]));
		setup_pages(&self->world, i);
		err = kmig_tracker_accepts(variant->kind, self->regions, i, self->regions[i]);
		if (err == -EOPNOTSUPP)
			SKIP(return, "%s", kmig_ctx_error(self->ctx));
		ASSERT_EQ(0, err) TH_LOG("%s", kmig_ctx_error(self->ctx));
	}
}

#define MAP(i) ((uint8_t *)self->regions[i]->map)
#define STORE(i, at, value) store(self->regions, i, at, value)
/* What the VMM did behind its own mapping, or knows besides. */
#define LOG(i, page) log_page(i, page)

/* A tracker at work, and those who receive from it. */
#define START() do {										\
	struct kmig_tracker_config config = {							\
		.ctx = self->ctx, .kind = variant->kind, .regions = self->regions,		\
		.count = REGIONS, .stream = STREAM, .abort_fd = -1,				\
		.dirty = give_dirty, .track = give_track,					\
	};											\
												\
	ASSERT_EQ(0, kmig_tracker_new(&config, &self->tracker));				\
	ASSERT_EQ(0, kmig_tracker_start(self->tracker)) TH_LOG("%s", kmig_ctx_error(self->ctx));	\
	self->world.channels = variant->channels;						\
	for (unsigned int _i = 0; _i < variant->channels; _i++) {				\
		struct peer *peer = &self->world.peer[_i];					\
		int pair[2];									\
												\
		ASSERT_EQ(0, connect_pair(pair));						\
		self->socks[_i] = pair[0];							\
		*peer = (struct peer){ .to = &self->world, .number = _i, .sock = pair[1] };	\
		pthread_create(&peer->thread, NULL, peer_main, peer);				\
		ASSERT_EQ(0, kmig_tracker_add_channel(self->tracker, pair[0]));			\
	}											\
} while (0)

#define WAIT_MS_MAX 20000

/* The round's end, not its arrival. */
static int await(struct kmig_tracker *tracker, struct kmig_round *round)
{
	struct pollfd fd = { .fd = kmig_tracker_fd(tracker), .events = POLLIN };

	if (poll(&fd, 1, WAIT_MS_MAX) != 1)
		return -ETIME;
	return kmig_tracker_wait(tracker, round) ?: round->error;
}

static bool arrived(struct world_of_pages *world, uint32_t round)
{
	for (unsigned int i = 0; i < world->channels; i++)
		for (int ms = 0; world->peer[i].ended != round; ms++, usleep(1000))
			if (ms == WAIT_MS_MAX || world->peer[i].error)
				return false;
	return true;
}

#define SEND_FLAGS(what, flags) do {								\
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, ++self->number, what, flags));		\
	ASSERT_EQ(0, await(self->tracker, &self->round)) TH_LOG("%s", kmig_ctx_error(self->ctx));	\
	ASSERT_EQ(self->number, self->round.round);						\
	ASSERT_TRUE(arrived(&self->world, self->number));					\
} while (0)
#define SEND_ALL() SEND_FLAGS(KMIG_SEND_ALL, 0)
#define SEND_DIRTY() SEND_FLAGS(KMIG_SEND_DIRTY, 0)

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

/* The first page that differs, or -1; a hole is not touched, or it would be one no more. */
static int64_t first_difference(const struct kmig_region *region, const uint8_t *copy)
{
	static const uint8_t zeroes[PAGE_BYTES];
	uint64_t exists[KMIG_CHUNK_WORDS];

	for (uint64_t page = 0; page < region->bytes / PAGE_BYTES; page++) {
		uint64_t at = page % LMTRACK_CHUNK_PAGES;

		if (!at && kmig_region_exists(region, page / LMTRACK_CHUNK_PAGES, exists))
			return page;
		if (memcmp(kmig_bit(exists, at) ? (uint8_t *)region->map + page * PAGE_BYTES : zeroes,
			   copy + page * PAGE_BYTES, PAGE_BYTES))
			return page;
	}
	return -1;
}

#define EXPECT_SAME() do {									\
	for (unsigned int _i = 0; _i < REGIONS; _i++)						\
		EXPECT_EQ(-1, first_difference(self->regions[_i], self->world.copy[_i]));	\
} while (0)

#define STOP() do {										\
	kmig_tracker_free(self->tracker);							\
	self->tracker = NULL;									\
	for (unsigned int _i = 0; _i < self->world.channels; _i++) {				\
		shutdown(self->socks[_i], SHUT_RDWR);						\
		shutdown(self->world.peer[_i].sock, SHUT_RDWR);					\
		pthread_join(self->world.peer[_i].thread, NULL);				\
		EXPECT_EQ(0, (int)self->world.peer[_i].error);					\
		close(self->socks[_i]);								\
		close(self->world.peer[_i].sock);						\
	}											\
	self->world.channels = 0;								\
} while (0)

FIXTURE_TEARDOWN(tracker)
{
	STOP();
	EXPECT_FALSE(logging);
	for (unsigned int i = 0; i < REGIONS; i++)
		kmig_region_free(self->regions[i]);
	kmig_ctx_free(self->ctx);
	EXPECT_EQ(self->fds, entries_of("/proc/self/fd"));
	EXPECT_EQ(self->threads, entries_of("/proc/self/task"));
}

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
	EXPECT_EQ(0, PEEK(0));
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
		EXPECT_EQ(0, stats.zerocopy_bytes);
	}
	EXPECT_EQ(self->round.data_pages, data);
	EXPECT_EQ(self->round.zero_pages, zero);
	EXPECT_EQ(data * PAGE_BYTES, bytes);
}

TEST_F(tracker, then_what_was_written)
{
	FILL();
	START();
	SEND_ALL();
	EXPECT_EQ(0, PEEK(0) + PEEK(1) + PEEK(2));
	SEND_DIRTY();
	EXPECT_EQ(0, self->round.pages);

	STORE(0, 8 * PAGE_BYTES, 1);		/* over data */
	STORE(0, 1 * PAGE_BYTES, 2);		/* over zeroes */
	STORE(0, 3000 * PAGE_BYTES, 3);		/* where nothing was */
	STORE(0, sizes[0] - 8, 4);
	STORE(1, 0, 5);
	STORE(1, 700 * PAGE_BYTES, 0);		/* a page now, but all zero */
	EXPECT_EQ(4, PEEK(0));
	EXPECT_EQ(2, PEEK(1));
	/* Looking changes nothing. */
	EXPECT_EQ(4, PEEK(0));
	EXPECT_EQ(2, PEEK(1));
	EXPECT_TRUE(IS_DIRTY(0, 3000));
	EXPECT_FALSE(IS_DIRTY(0, 3001));
	SEND_DIRTY();
	EXPECT_EQ(6, self->round.pages);
	EXPECT_EQ(5, self->round.data_pages);
	EXPECT_TRUE(CAME_AS_ZERO(1, 700));
	EXPECT_EQ(0, PEEK(0) + PEEK(1) + PEEK(2));
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
		EXPECT_EQ(1024, PEEK(0));
		SEND_DIRTY();
		EXPECT_EQ(1024, self->round.pages);
		EXPECT_EQ(0, PEEK(0));
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
	EXPECT_EQ(0, PEEK(0));
	/* Nor does being taken out of the page table. */
	ASSERT_EQ(0, madvise(MAP(0), 8 * MIB, MADV_DONTNEED));
	EXPECT_EQ(0, PEEK(0));
	for (uint64_t at = 0; at < 8 * MIB; at += PAGE_BYTES)
		sum += *(volatile uint8_t *)(MAP(0) + at + 7);
	EXPECT_EQ(0, PEEK(0));
	SEND_DIRTY();
	EXPECT_EQ(0, self->round.pages);
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
	EXPECT_EQ(0, self->round.pages);
}

/* Memory that this process has filled, but never touched through its mapping. */
TEST_F(tracker, never_mapped)
{
	uint8_t page[PAGE_BYTES];

	memset(page, 0x5a, sizeof(page));
	for (uint64_t at = MIB; at < 5 * MIB; at += PAGE_BYTES)
		ASSERT_EQ((ssize_t)sizeof(page), pwrite(kmig_region_fd(self->regions[0]), page, sizeof(page), at));
	START();
	SEND_ALL();
	EXPECT_EQ(1024, self->round.data_pages);
	STORE(0, 2 * MIB, 1);
	EXPECT_EQ(1, PEEK(0));
	SEND_DIRTY();
	EXPECT_EQ(1, self->round.pages);
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
	EXPECT_EQ(0, self->round.pages);
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
	/* Of these nine, two hold something there. */
	EXPECT_EQ(2, PEEK(0));
	EXPECT_EQ(1, PEEK(2));
	before = resident(self->regions[0]);
	SEND_DIRTY();
	EXPECT_EQ(3, self->round.zero_pages);
	EXPECT_EQ(3, self->round.pages);
	EXPECT_EQ(before, resident(self->regions[0]));
	EXPECT_EQ(0, PEEK(0) + PEEK(1) + PEEK(2));
	SEND_DIRTY();
	EXPECT_EQ(0, self->round.pages);
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
	EXPECT_EQ(2, PEEK(0));
	SEND_DIRTY();
	EXPECT_EQ(2, self->round.pages);
	EXPECT_TRUE(CAME_AS_ZERO(0, 16));
	STORE(0, 16 * PAGE_BYTES, 2);
	SEND_DIRTY();
	EXPECT_EQ(1, self->round.data_pages);
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
	EXPECT_EQ(0, PEEK(0));
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
	EXPECT_EQ(32, PEEK(0));
	SEND_DIRTY();
	EXPECT_EQ(31 + 1, self->round.pages);
	EXPECT_FALSE(CAME(0, 8));
	EXPECT_EQ(1, PEEK(0));
	EXPECT_TRUE(IS_DIRTY(0, 8));
	STORE(0, 8 * PAGE_BYTES, 2);
	STORE(0, 9 * PAGE_BYTES, 2);
	SEND_DIRTY();
	EXPECT_EQ(0, self->round.pages);
	SEND_FLAGS(KMIG_SEND_DIRTY, KMIG_SEND_HELD);
	EXPECT_EQ(2, self->round.pages);
	EXPECT_EQ(0, PEEK(0));
	EXPECT_SAME();

	/* Others, then none. */
	STORE(0, 8 * PAGE_BYTES, 3);
	hold[0] = 1ULL << 10;
	ASSERT_EQ(0, kmig_tracker_hold(self->tracker, 0, hold));
	SEND_DIRTY();
	EXPECT_EQ(1, self->round.pages);
	STORE(0, 10 * PAGE_BYTES, 3);
	SEND_DIRTY();
	EXPECT_EQ(0, self->round.pages);
	ASSERT_EQ(0, kmig_tracker_hold(self->tracker, 0, NULL));
	SEND_DIRTY();
	EXPECT_EQ(1, self->round.pages);
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

#define RACE(with_discards, ms) do {								\
	struct racer racers[RACERS];								\
	_Atomic bool stop = false;								\
	uint64_t end;										\
												\
	for (int _i = 0; _i < RACERS; _i++) {							\
		racers[_i] = (struct racer){ self->regions, 0, _i + 1, &stop, (with_discards) && !_i };	\
		pthread_create(&racers[_i].thread, NULL, race, &racers[_i]);			\
	}											\
	SEND_ALL();										\
	for (end = kmig_now_ns() + kmig_ms(ms); kmig_now_ns() < end;)				\
		SEND_DIRTY();									\
	stop = true;										\
	for (int _i = 0; _i < RACERS; _i++)							\
		pthread_join(racers[_i].thread, NULL);						\
	SEND_DIRTY();										\
	SEND_DIRTY();										\
	EXPECT_EQ(0, self->round.pages);							\
	EXPECT_EQ(0, PEEK(0) + PEEK(1) + PEEK(2));						\
	EXPECT_SAME();										\
	TH_LOG("%u rounds", self->number);							\
} while (0)

TEST_F(tracker, no_write_is_lost)
{
	FILL();
	START();
	RACE(false, 1500);
}

TEST_F(tracker, no_discard_is_lost)
{
	FILL();
	START();
	RACE(true, 1500);
}

/* ---- The network ---- */

TEST_F(tracker, by_reference)
{
	struct kmig_channel_stats stats;
	uint64_t zerocopy = 0, copied = 0;

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

/* Loopback copies: it is tried once or twice on a channel, and then no more. */
TEST_F(tracker, copied_after_all)
{
	struct kmig_channel_stats stats;
	unsigned int calls;

	memset(MAP(0), 0x44, 8 * MIB);
	START();
	SEND_ALL();
	calls = network.calls;
	EXPECT_LT(0, calls);
	memset(MAP(0), 0x45, 8 * MIB);
	for (uint64_t page = 0; page < 2048; page++)
		LOG(0, page);
	SEND_DIRTY();
	EXPECT_EQ(2048, self->round.data_pages);
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
}

/* ---- Failures ---- */

#define PEERS_DEAF(yes) do {									\
	for (unsigned int _i = 0; _i < variant->channels; _i++)					\
		self->world.peer[_i].deaf = yes;						\
} while (0)

TEST_F(tracker, cancelled_while_it_waits_for_room)
{
	uint64_t begin;

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
	EXPECT_GT(kmig_ms(500), kmig_now_ns() - begin);
	EXPECT_EQ(-1, self->round.channel);
	EXPECT_EQ(-EPIPE, kmig_tracker_send(self->tracker, 2, KMIG_SEND_ALL, 0));
	PEERS_DEAF(false);
}

/* The same with pages that are out by reference, which nobody will ever acknowledge. */
TEST_F(tracker, cancelled_while_it_waits_for_notices)
{
	network.reference = true;
	memset(MAP(0), 0x44, 2 * CHUNK_BYTES);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(200000);
	kmig_tracker_cancel(self->tracker);
	EXPECT_EQ(-ECANCELED, await(self->tracker, &self->round));
	PEERS_DEAF(false);
}

TEST_F(tracker, freed_while_it_sends)
{
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

TEST_F(tracker, peer_gone)
{
	unsigned int last = variant->channels - 1;

	memset(MAP(0), 0x44, sizes[0]);
	START();
	PEERS_DEAF(true);
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, 1, KMIG_SEND_ALL, 0));
	usleep(100000);
	/* What comes after this is answered with a reset. */
	shutdown(self->world.peer[last].sock, SHUT_RDWR);
	self->world.peer[last].deaf = false;
	EXPECT_GT(0, await(self->tracker, &self->round));
	EXPECT_EQ((int)last, self->round.channel);
	EXPECT_EQ(-EPIPE, kmig_tracker_send(self->tracker, 2, KMIG_SEND_DIRTY, 0));
	PEERS_DEAF(false);
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
	EXPECT_EQ(-EOPNOTSUPP, kmig_tracker_stun(self->tracker, 1));
}

TEST_HARNESS_MAIN
