// SPDX-License-Identifier: GPL-2.0
/*
 * Tracking, request by request: who may start, stop and harvest, what a harvest reports and
 * clears, in which processes, and what becomes of it when somebody goes away.
 */
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "kselftest_harness.h"
#include "uapi_common.h"

#define PAGES	(4 * LMTRACK_CHUNK_PAGES)
#define BYTES	(PAGES * PAGE)
#define WORDS	(PAGES / 64)
#define CLEAR	LMTRACK_DIRTY_CLEAR

FIXTURE(track) {
	int fd;
	unsigned char *mem;
	uint64_t bitmap[WORDS];
};

FIXTURE_SETUP(track)
{
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
}

FIXTURE_TEARDOWN(track)
{
	munmap(self->mem, BYTES);
	close(self->fd);
}

#define TRACK_TEST(name) TEST_F_TIMEOUT(track, name, TEST_SECONDS)

static long harvest(int fd, uint64_t *bitmap)
{
	return lmt_dirty(fd, CLEAR, 0, PAGES, bitmap);
}

/* Are exactly these pages in the bitmap? */
static bool bits_are(const uint64_t *bitmap, size_t bits, const size_t *pages, size_t count)
{
	size_t bit, next = 0;

	for (bit = 0; bit < bits; bit++) {
		bool want = next < count && pages[next] == bit;

		if (lmt_bit(bitmap, bit) != want)
			return false;
		next += want;
	}
	return next == count;
}

#define EXPECT_PAGES(bitmap, ...) do {							\
	static const size_t _pages[] = { __VA_ARGS__ };					\
	EXPECT_TRUE(bits_are(bitmap, PAGES, _pages, ARRAY_SIZE(_pages)));		\
} while (0)

/* ---- Start and stop ---- */

TRACK_TEST(start_and_stop)
{
	uint64_t pinned;
	int again = lmt_reopen(self->fd);

	ASSERT_LE(0, again);
	EXPECT_EQ(-EINVAL, lmt_stop(self->fd));
	EXPECT_EQ(-EINVAL, harvest(self->fd, self->bitmap));
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);

	pinned = 7;
	EXPECT_EQ(0, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(0, pinned);
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	EXPECT_EQ(LMTRACK_TRACKED, region_info(again).state);

	pinned = 7;
	EXPECT_EQ(-EBUSY, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(0, pinned);
	pinned = 7;
	EXPECT_EQ(-EBUSY, lmt_start(again, LMTRACK_TRACK_ALLOW_PINNED, &pinned));
	EXPECT_EQ(0, pinned);

	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	EXPECT_EQ(-EINVAL, lmt_stop(self->fd));
	EXPECT_EQ(-EINVAL, harvest(self->fd, self->bitmap));
	EXPECT_EQ(0, lmt_start(again, 0, NULL));
	EXPECT_EQ(0, lmt_stop(again));
}

TRACK_TEST(only_the_file_that_started)
{
	int again = lmt_reopen(self->fd), copy = dup(self->fd);

	ASSERT_LE(0, again);
	ASSERT_LE(0, copy);
	touch(self->mem, 3, 1, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(-EPERM, harvest(again, self->bitmap));
	EXPECT_EQ(-EPERM, lmt_dirty(again, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(-EPERM, lmt_stop(again));
	/* Another descriptor of the same open file will do. */
	EXPECT_EQ(1, harvest(copy, self->bitmap));
	EXPECT_EQ(0, lmt_stop(copy));

	ASSERT_EQ(0, lmt_start(again, 0, NULL));
	EXPECT_EQ(-EPERM, lmt_stop(self->fd));
	EXPECT_EQ(1, harvest(again, self->bitmap));
}

/* Who may not write to the region may not make writing to it slow for others. */
TRACK_TEST(file_open_for_reading)
{
	int readonly = region_open(self->fd, O_RDONLY);

	ASSERT_LE(0, readonly);
	EXPECT_EQ(-EACCES, lmt_start(readonly, 0, NULL));
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	EXPECT_EQ(-EINVAL, lmt_stop(readonly));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(-EPERM, lmt_stop(readonly));
}

TRACK_TEST(flags)
{
	struct lmtrack_track_stop stop = { .size = sizeof(stop), .flags = 1 };
	unsigned int bit;

	for (bit = 1; bit < 32; bit++)
		EXPECT_EQ(-EOPNOTSUPP, lmt_start(self->fd, 1U << bit, NULL));
	ASSERT_EQ(0, lmt_start(self->fd, LMTRACK_TRACK_ALLOW_PINNED, NULL));
	for (bit = 1; bit < 32; bit++)
		EXPECT_EQ(-EOPNOTSUPP, dirty_get(self->fd, 1U << bit, 0, PAGES, self->bitmap,
						 NULL));
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->fd, LMTRACK_TRACK_STOP, &stop));
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
}

/* ---- What a harvest reports ---- */

TRACK_TEST(ranges)
{
	static const struct { uint64_t first, pages; long ret; } table[] = {
		{ 0, PAGES, 0 },
		{ 0, 1, 0 },
		{ 64, PAGES - 64, 0 },
		{ PAGES - 64, 64, 0 },
		{ PAGES - 64, 63, 0 },
		{ 128, 1, 0 },
		{ 0, 0, -EINVAL },
		{ 64, 0, -EINVAL },
		{ 1, 64, -EINVAL },
		{ 63, 1, -EINVAL },
		{ 65, PAGES - 65, -EINVAL },
		{ 0, PAGES + 1, -EINVAL },
		{ 64, PAGES - 63, -EINVAL },
		{ PAGES, 1, -EINVAL },
		{ PAGES, 0, -EINVAL },
		{ PAGES + 64, 64, -EINVAL },
		{ 0, ~0ULL, -EINVAL },
		{ 64, -64ULL, -EINVAL },
		{ 64, -63ULL, -EINVAL },
		{ 64, ~0ULL, -EINVAL },
		{ -64ULL, 64, -EINVAL },
		{ -64ULL, 128, -EINVAL },
		{ ~0ULL, 1, -EINVAL },
		{ 1ULL << 52, 64, -EINVAL },
	};
	uint64_t dirty;
	size_t i;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (i = 0; i < ARRAY_SIZE(table); i++) {
		dirty = 99;
		EXPECT_EQ(table[i].ret, dirty_get(self->fd, CLEAR, table[i].first,
						  table[i].pages, self->bitmap, &dirty)) {
			TH_LOG("%llu + %llu", (unsigned long long)table[i].first,
			       (unsigned long long)table[i].pages);
		}
		EXPECT_EQ(0, dirty);
	}
	EXPECT_PAGES(self->bitmap);
}

TRACK_TEST(peek_and_clear)
{
	/* From before the start: all that is resident counts as dirty. */
	touch(self->mem, 5, 2, 1);
	touch(self->mem, 600, 1, 1);
	touch(self->mem, PAGES - 1, 1, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(4, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_PAGES(self->bitmap, 5, 6, 600, PAGES - 1);
	EXPECT_EQ(4, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(4, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 5, 6, 600, PAGES - 1);
	EXPECT_EQ(0, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap);

	/* An old page, a new one, one that is only looked at. */
	touch(self->mem, 6, 1, 2);
	touch(self->mem, 513, 1, 2);
	EXPECT_EQ(0, self->mem[700 * PAGE]);
	EXPECT_EQ(2, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 6, 513);
	touch(self->mem, 700, 1, 2);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 700);
}

/* Only what was asked for is reported, and only that is cleared. */
TRACK_TEST(part_of_a_region)
{
	uint64_t bitmap[WORDS] = { };
	uint64_t dirty;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
	touch(self->mem, 0, PAGES, 1);
	EXPECT_EQ(0, dirty_get(self->fd, CLEAR, 64, 3, bitmap, &dirty));
	EXPECT_EQ(3, dirty);
	EXPECT_EQ(7, bitmap[0]);
	EXPECT_EQ(0, bitmap[1]);
	bitmap[0] = 0;
	/* Across two chunks, ending within a word. */
	EXPECT_EQ(0, dirty_get(self->fd, CLEAR, 448, 64 + 70, bitmap, &dirty));
	EXPECT_EQ(134, dirty);
	EXPECT_EQ(~0ULL, bitmap[0]);
	EXPECT_EQ(~0ULL, bitmap[1]);
	EXPECT_EQ(0x3f, bitmap[2]);
	EXPECT_EQ(0, bitmap[3]);
	EXPECT_EQ(PAGES - 137, harvest(self->fd, self->bitmap));
	EXPECT_FALSE(lmt_bit(self->bitmap, 64));
	EXPECT_TRUE(lmt_bit(self->bitmap, 67));
	EXPECT_FALSE(lmt_bit(self->bitmap, 581));
	EXPECT_TRUE(lmt_bit(self->bitmap, 582));
}

/* A region whose end is in the middle of a chunk and of a word. */
TRACK_TEST(odd_length)
{
	const size_t pages = LMTRACK_CHUNK_PAGES + 77;
	uint64_t bitmap[WORDS] = { };
	int fd = lmt_region(pages * PAGE);
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, pages * PAGE);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, pages, 1);
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_EQ(-EINVAL, dirty_get(fd, 0, 0, pages + 1, bitmap, NULL));
	EXPECT_EQ((long)pages, lmt_dirty(fd, CLEAR, 0, pages, bitmap));
	EXPECT_EQ((1ULL << 13) - 1, bitmap[pages / 64]);
	EXPECT_EQ(0, bitmap[pages / 64 + 1]);
	touch(mem, pages - 1, 1, 2);
	EXPECT_EQ(1, lmt_dirty(fd, CLEAR, 0, pages, bitmap));
	EXPECT_EQ(1ULL << 12, bitmap[pages / 64]);
}

/* The kernel sets bits, it does not clear them; words with nothing dirty it does not touch. */
TRACK_TEST(bitmap_is_only_added_to)
{
	uint64_t *clean = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t dirty;

	ASSERT_NE(MAP_FAILED, clean);
	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	EXPECT_EQ(0, dirty_get(self->fd, CLEAR, 0, PAGES, clean, &dirty));
	EXPECT_EQ(0, dirty);
	EXPECT_EQ(0, dirty_get(self->fd, 0, 0, PAGES, NULL, &dirty));

	memset(self->bitmap, 0, sizeof(self->bitmap));
	self->bitmap[0] = 0xf0;
	self->bitmap[1] = 0xf0;
	touch(self->mem, 1, 1, 2);
	EXPECT_EQ(0, dirty_get(self->fd, CLEAR, 0, PAGES, self->bitmap, &dirty));
	EXPECT_EQ(1, dirty);
	EXPECT_EQ(0xf2, self->bitmap[0]);
	EXPECT_EQ(0xf0, self->bitmap[1]);
}

TRACK_TEST(punched_pages)
{
	touch(self->mem, 0, 100, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(100, harvest(self->fd, self->bitmap));
	ASSERT_EQ(0, lmt_punch(self->fd, 10 * PAGE, 3 * PAGE));
	EXPECT_EQ(3, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 10, 11, 12);
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
	/* Looking at the hole brings an empty page, which is what the other side has. */
	EXPECT_EQ(0, self->mem[11 * PAGE]);
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
	touch(self->mem, 11, 1, 1);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 11);

	/* Dirty, then gone. */
	touch(self->mem, 20, 2, 2);
	ASSERT_EQ(0, lmt_punch(self->fd, 20 * PAGE, PAGE));
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 20, 21);

	/* Where no page ever was there is nothing to tell. */
	ASSERT_EQ(0, lmt_punch(self->fd, CHUNK, 3 * CHUNK));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
}

/* Punched before anybody looked at the chunk: the page existed when tracking started. */
TRACK_TEST(punched_before_the_first_harvest)
{
	touch(self->mem, 0, 4, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, lmt_punch(self->fd, PAGE, PAGE));
	EXPECT_EQ(4, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(4, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 0, 1, 2, 3);
}

/* Starting touches no page: until a chunk is harvested, writing to it costs nothing. */
TRACK_TEST(chunks_are_armed_lazily)
{
	const uint64_t chunk = LMTRACK_CHUNK_PAGES;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	touch(self->mem, 0, PAGES, 2);
	EXPECT_EQ(0, lmt_stats(self->fd).write_faults);
	EXPECT_EQ(chunk, (uint64_t)lmt_dirty(self->fd, CLEAR, chunk, chunk, self->bitmap));
	touch(self->mem, 0, PAGES, 3);
	EXPECT_EQ(chunk, lmt_stats(self->fd).write_faults);
	/* Peeking arms nothing. */
	EXPECT_EQ(PAGES, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	touch(self->mem, 0, PAGES, 4);
	EXPECT_EQ(chunk, lmt_stats(self->fd).write_faults);
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
}

TRACK_TEST(nothing_left_after_stop)
{
	uint64_t faults;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	touch(self->mem, 0, 10, 2);
	faults = lmt_stats(self->fd).write_faults;
	EXPECT_EQ(10, faults);
	ASSERT_EQ(0, lmt_stop(self->fd));
	touch(self->mem, 0, PAGES, 3);
	EXPECT_EQ(faults, lmt_stats(self->fd).write_faults);
	/* The next one begins as the first did: all that is resident is dirty. */
	ASSERT_EQ(0, lmt_punch(self->fd, 0, PAGE));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES - 1, harvest(self->fd, self->bitmap));
	EXPECT_FALSE(lmt_bit(self->bitmap, 0));
}

/* ---- Who writes ---- */

/*
 * The kernel maps a page that is read, and its neighbours, with the protection of the mapping:
 * in one that tracking has missed, they can be written from then on and nobody is told.
 */
static void look(const unsigned char *mem, size_t page)
{
	(void)*(const volatile unsigned char *)(mem + page * PAGE);
}

/*
 * A process that does what it is told: 'm' map, 'r' read page n, 'w' write it, 'u' unmap, 'q'
 * go.
 */
struct worker {
	pid_t pid;
	int to, from;
};

struct order {
	char what;
	uint32_t page;
};

static void worker_run(int in, int out, int fd, unsigned char *mem)
{
	struct order order;

	while (read(in, &order, sizeof(order)) == sizeof(order)) {
		switch (order.what) {
		case 'm':
			mem = lmt_map(fd, BYTES);
			break;
		case 'r':
			look(mem, order.page);
			break;
		case 'w':
			touch(mem, order.page, 1, 42);
			break;
		case 'u':
			munmap(mem, BYTES);
			break;
		default:
			_exit(0);
		}
		if (mem == MAP_FAILED || write(out, "k", 1) != 1)
			_exit(1);
	}
	_exit(2);
}

static int worker_start(struct worker *w, int fd, unsigned char *mem)
{
	int to[2], from[2];

	if (pipe(to) || pipe(from))
		return -errno;
	w->pid = fork();
	if (!w->pid)
		worker_run(to[0], from[1], fd, mem);
	close(to[0]);
	close(from[1]);
	w->to = to[1];
	w->from = from[0];
	return w->pid < 0 ? -errno : 0;
}

static bool worker_do(struct worker *w, char what, uint32_t page)
{
	struct order order = { what, page };
	char byte;

	return write(w->to, &order, sizeof(order)) == sizeof(order) &&
	       read(w->from, &byte, 1) == 1;
}

static int worker_end(struct worker *w)
{
	struct order order = { 'q', 0 };

	if (write(w->to, &order, sizeof(order)) != sizeof(order))
		return -errno;
	return child_status(w->pid);
}

/* Mapped by two processes, one before and one after the start; both write the same page. */
TRACK_TEST(two_processes)
{
	struct worker before, after;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, worker_start(&before, self->fd, NULL));
	ASSERT_TRUE(worker_do(&before, 'm', 0));
	ASSERT_TRUE(worker_do(&before, 'w', 3));
	ASSERT_EQ(0, worker_start(&after, self->fd, NULL));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_TRUE(worker_do(&after, 'm', 0));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));

	ASSERT_TRUE(worker_do(&before, 'w', 3));
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 3);
	ASSERT_TRUE(worker_do(&after, 'w', 3));
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 3);
	touch(self->mem, 3, 1, 5);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	ASSERT_TRUE(worker_do(&before, 'w', 3));
	ASSERT_TRUE(worker_do(&after, 'w', 4));
	touch(self->mem, 1000, 1, 5);
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 3, 4, 1000);

	/* Pages new to each of them, that are read first. */
	ASSERT_TRUE(worker_do(&before, 'r', 1500));
	ASSERT_TRUE(worker_do(&after, 'r', 1600));
	ASSERT_TRUE(worker_do(&before, 'w', 1500));
	ASSERT_TRUE(worker_do(&before, 'w', 1501));
	ASSERT_TRUE(worker_do(&after, 'w', 1600));
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 1500, 1501, 1600);

	/* One goes; its last write stays. */
	ASSERT_TRUE(worker_do(&before, 'w', 7));
	EXPECT_EQ(0, worker_end(&before));
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 7);
	ASSERT_TRUE(worker_do(&after, 'w', 8));
	ASSERT_TRUE(worker_do(&after, 'u', 0));
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 8);
	EXPECT_EQ(0, worker_end(&after));
	EXPECT_EQ(1, lmt_stats(self->fd).mappers);
}

TRACK_TEST(several_mappings_of_one_process)
{
	unsigned char *before, *after, *moved;

	before = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, before);
	touch(before, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	after = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, after);
	touch(after, 9, 1, 2);
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	touch(before, 1, 1, 2);
	touch(after, 2, 1, 2);
	touch(self->mem, 3, 1, 2);
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 1, 2, 3);

	look(before, 200);
	look(after, 200);
	touch(before, 201, 1, 2);
	touch(after, 202, 1, 2);
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 201, 202);

	/* Moved, with and without its pages dirty; split; protected and opened again. */
	touch(after, 4, 1, 2);
	moved = mremap(after, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED,
		       mmap(NULL, BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	ASSERT_NE(MAP_FAILED, moved);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 4);
	touch(moved, 4, 2, 3);
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 4, 5);
	ASSERT_EQ(0, mprotect(moved + 64 * PAGE, 64 * PAGE, PROT_READ));
	ASSERT_EQ(0, mprotect(moved + 64 * PAGE, 64 * PAGE, PROT_READ | PROT_WRITE));
	touch(moved, 63, 3, 3);
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 63, 64, 65);
	ASSERT_EQ(0, munmap(moved, 32 * PAGE));
	look(moved, 300);
	touch(moved, 32, 1, 3);
	touch(moved, 300, 1, 3);
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 32, 300);
}

/* A child has no mapping of its own making; it must be found all the same. */
TRACK_TEST(forked_before_and_after_start)
{
	struct worker before, after;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, worker_start(&before, self->fd, self->mem));
	ASSERT_TRUE(worker_do(&before, 'w', 0));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	ASSERT_EQ(0, worker_start(&after, self->fd, self->mem));
	EXPECT_EQ(3, lmt_stats(self->fd).mappers);
	ASSERT_TRUE(worker_do(&before, 'w', 10));
	ASSERT_TRUE(worker_do(&after, 'w', 20));
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 10, 20);
	/* The one that started no longer maps the region at all. */
	ASSERT_EQ(0, munmap(self->mem, BYTES));
	ASSERT_TRUE(worker_do(&before, 'w', 10));
	ASSERT_TRUE(worker_do(&after, 'w', 1025));
	ASSERT_TRUE(worker_do(&before, 'r', 300));
	ASSERT_TRUE(worker_do(&before, 'w', 300));
	ASSERT_TRUE(worker_do(&after, 'r', 900));
	ASSERT_TRUE(worker_do(&after, 'w', 901));
	EXPECT_EQ(4, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 10, 300, 901, 1025);
	EXPECT_EQ(0, worker_end(&before));
	EXPECT_EQ(0, worker_end(&after));
	self->mem = lmt_map(self->fd, BYTES);
}

/* The kernel writes for somebody: read() into the region, another process's memory. */
TRACK_TEST(writes_by_the_kernel)
{
	struct iovec local, remote;
	char data[64] = "data";
	int pipes[2];
	pid_t pid;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	ASSERT_EQ(4, write(pipes[1], data, 4));
	ASSERT_EQ(4, read(pipes[0], self->mem + 8 * PAGE - 2, 4));
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 7, 8);

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		local = (struct iovec){ data, sizeof(data) };
		remote = (struct iovec){ self->mem + 30 * PAGE, sizeof(data) };
		munmap(self->mem, BYTES);
		_exit(process_vm_writev(getppid(), &local, 1, &remote, 1, 0) != sizeof(data));
	}
	ASSERT_EQ(0, child_status(pid));
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 30);
	EXPECT_EQ('d', self->mem[30 * PAGE]);
}

TRACK_TEST(bitmap_within_the_region)
{
	uint64_t *bitmap = (uint64_t *)(self->mem + 3 * PAGE);
	uint64_t dirty;

	touch(self->mem, 0, PAGES, 1);
	memset(bitmap, 0, WORDS * 8);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, dirty_get(self->fd, CLEAR, 0, PAGES, bitmap, &dirty));
	EXPECT_EQ(PAGES, dirty);
	EXPECT_EQ(~0ULL, bitmap[0]);
	EXPECT_EQ(~0ULL, bitmap[WORDS - 1]);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 3);
}

/* ---- Bitmaps that fault: what was not delivered is still dirty ---- */

/* A region of which each bitmap page covers 128 MiB, and two pages to put the bitmap in. */
struct faulting {
	int fd;
	unsigned char *mem;
	size_t pages;
	unsigned char *edge;	/* the second page of the two cannot be accessed */
	uint64_t *good;
};

static bool faulting_setup(struct faulting *f)
{
	f->pages = 2 * 8 * PAGE;
	f->fd = lmt_region(f->pages * PAGE);
	if (f->fd < 0)
		return false;
	f->mem = lmt_map(f->fd, f->pages * PAGE);
	f->edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		       -1, 0);
	f->good = calloc(f->pages / 64, 8);
	if (f->mem == MAP_FAILED || f->edge == MAP_FAILED || !f->good)
		return false;
	f->edge += PAGE;
	return !mprotect(f->edge, PAGE, PROT_NONE);
}

TRACK_TEST(bitmap_faults_half_way)
{
	static const size_t pages[] = { 5, 32767, 32768, 40000, 65535 };
	struct faulting f;
	uint64_t dirty;
	size_t i;

	ASSERT_TRUE(faulting_setup(&f));
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		touch(f.mem, pages[i], 1, 1);
	ASSERT_EQ(0, lmt_start(f.fd, 0, NULL));
	for (i = 0; i < 3; i++) {
		uint64_t *bitmap = (uint64_t *)(f.edge - PAGE);

		memset(bitmap, 0, PAGE);
		EXPECT_EQ(-EFAULT, dirty_get(f.fd, CLEAR, 0, f.pages, bitmap, &dirty));
		/* The first time round the first page took what it could. */
		EXPECT_EQ(i ? 0 : 2, dirty);
		EXPECT_EQ(!i, lmt_bit(bitmap, 5));
		EXPECT_EQ(!i, lmt_bit(bitmap, 32767));
	}
	EXPECT_EQ(3, lmt_dirty(f.fd, 0, 0, f.pages, f.good));
	EXPECT_EQ(3, lmt_dirty(f.fd, CLEAR, 0, f.pages, f.good));
	EXPECT_TRUE(bits_are(f.good, f.pages, pages + 2, 3));
	EXPECT_EQ(0, lmt_dirty(f.fd, CLEAR, 0, f.pages, f.good));
	/* And protected again, each of them. */
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		touch(f.mem, pages[i], 1, 2);
	EXPECT_EQ(5, lmt_dirty(f.fd, CLEAR, 0, f.pages, f.good));
	EXPECT_TRUE(bits_are(f.good, f.pages, pages, 5));
}

/* The edge is in the middle of a chunk's words, and in the middle of a word. */
TRACK_TEST(bitmap_faults_within_a_chunk)
{
	static const unsigned int before[] = { 8, 24, 4, 60, 63 };
	struct faulting f;
	uint64_t dirty, *bitmap;
	size_t i, page, lost;

	ASSERT_TRUE(faulting_setup(&f));
	touch(f.mem, 0, 2 * LMTRACK_CHUNK_PAGES, 1);
	ASSERT_EQ(0, lmt_start(f.fd, 0, NULL));
	for (i = 0; i < ARRAY_SIZE(before); i++) {
		bitmap = (uint64_t *)(f.edge - before[i]);
		memset(bitmap, 0, before[i]);
		EXPECT_EQ(-EFAULT, dirty_get(f.fd, CLEAR, 0, f.pages, bitmap, &dirty));
		EXPECT_EQ(0, dirty);
		/* All that was not delivered is reported again; what was may be. */
		EXPECT_LE(0, lmt_dirty(f.fd, CLEAR, 0, f.pages, f.good));
		for (page = lost = 0; page < 2 * LMTRACK_CHUNK_PAGES; page++)
			lost += !lmt_bit(f.good, page) &&
				(page / 64 * 8 + 8 > before[i] || !lmt_bit(bitmap, page));
		EXPECT_EQ(0, lost) {
			TH_LOG("%zu pages lost with %u bytes of bitmap", lost, before[i]);
		}
		touch(f.mem, 0, 2 * LMTRACK_CHUNK_PAGES, i);
	}
}

TRACK_TEST(bitmap_cannot_be_written)
{
	static const unsigned long bad[] = {
		0, 8, 1UL << 63, 0x7ffffffff000, 0xffff888000000000, -8UL, -(WORDS * 8UL),
	};
	uint64_t *readonly = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *none = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t dirty;
	size_t i;

	ASSERT_NE(MAP_FAILED, readonly);
	ASSERT_NE(MAP_FAILED, none);
	touch(self->mem, 100, 3, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		EXPECT_EQ(-EFAULT, dirty_get(self->fd, CLEAR, 0, PAGES, (void *)bad[i],
					     &dirty)) {
			TH_LOG("bitmap at %#lx", bad[i]);
		}
	EXPECT_EQ(-EFAULT, dirty_get(self->fd, CLEAR, 0, PAGES, readonly, &dirty));
	EXPECT_EQ(-EFAULT, dirty_get(self->fd, CLEAR, 0, PAGES, none, &dirty));
	EXPECT_EQ(-EFAULT, dirty_get(self->fd, 0, 0, PAGES, none, &dirty));
	EXPECT_EQ(0, dirty);
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 100, 101, 102);
}

/* ---- Pages pinned for I/O ---- */

TRACK_TEST(pinned_pages)
{
	uint64_t pinned, repinned;
	int pin, round;

	touch(self->mem, 0, PAGES, 1);
	pin = pin_pages(self->mem + 510 * PAGE, 4 * PAGE);
	ASSERT_LE(0, pin);
	EXPECT_EQ(-EBUSY, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(4, pinned);
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	EXPECT_EQ(-EINVAL, harvest(self->fd, self->bitmap));
	/* The refusal left nothing behind. */
	touch(self->mem, 0, PAGES, 2);
	EXPECT_EQ(0, lmt_stats(self->fd).write_faults);

	ASSERT_EQ(0, lmt_start(self->fd, LMTRACK_TRACK_ALLOW_PINNED, &pinned));
	EXPECT_EQ(4, pinned);
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	for (round = 0; round < 3; round++) {
		EXPECT_EQ(4, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
		EXPECT_EQ(4, harvest(self->fd, self->bitmap));
		EXPECT_PAGES(self->bitmap, 510, 511, 512, 513);
	}
	repinned = lmt_stats(self->fd).repinned_pages;
	EXPECT_EQ(16, repinned);
	touch(self->mem, 1, 1, 3);
	EXPECT_EQ(5, harvest(self->fd, self->bitmap));

	/* The kernel lets go of them in its own time; each is reported once more after that. */
	close(pin);
	EXPECT_TRUE(EVENTUALLY(10, !harvest(self->fd, self->bitmap)));
	touch(self->mem, 511, 1, 3);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
	EXPECT_PAGES(self->bitmap, 511);
	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(0, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(0, pinned);
}

/* The mapping through which they were pinned, and its process, need not exist any more. */
TRACK_TEST(pins_outlive_the_mapping)
{
	unsigned char *other = lmt_map(self->fd, BYTES);
	uint64_t pinned;
	int pin;

	ASSERT_NE(MAP_FAILED, other);
	touch(other, 0, 8, 1);
	pin = pin_pages(other, 2 * PAGE);
	ASSERT_LE(0, pin);
	ASSERT_EQ(0, munmap(other, BYTES));
	ASSERT_EQ(0, munmap(self->mem, BYTES));
	EXPECT_EQ(-EBUSY, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(2, pinned);
	ASSERT_EQ(0, lmt_start(self->fd, LMTRACK_TRACK_ALLOW_PINNED, &pinned));
	EXPECT_EQ(2, pinned);
	EXPECT_EQ(8, harvest(self->fd, self->bitmap));
	EXPECT_EQ(2, harvest(self->fd, self->bitmap));
	close(pin);
	EXPECT_TRUE(EVENTUALLY(10, !harvest(self->fd, self->bitmap)));
	self->mem = lmt_map(self->fd, BYTES);
}

/* Pinned by another process than the one that tracks. */
TRACK_TEST(pins_of_another_process)
{
	int ready[2], go[2];
	uint64_t pinned;
	char byte;
	pid_t pid;

	ASSERT_EQ(0, pipe(ready));
	ASSERT_EQ(0, pipe(go));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int pin = pin_pages(self->mem, 3 * PAGE);

		if (pin < 0 || write(ready[1], "r", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(1);
		_exit(0);
	}
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	EXPECT_EQ(-EBUSY, lmt_start(self->fd, 0, &pinned));
	EXPECT_EQ(3, pinned);
	ASSERT_EQ(1, write(go[1], "g", 1));
	EXPECT_EQ(0, child_status(pid));
	EXPECT_TRUE(EVENTUALLY(10, !lmt_start(self->fd, 0, &pinned)));
}

/* Newer kernels refuse to pin a tracked page. Where they do not, every harvest has it. */
TRACK_TEST(pins_while_tracked)
{
	int pin, round;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	pin = pin_pages(self->mem + 100 * PAGE, 2 * PAGE);
	if (pin < 0) {
		printf("# a tracked page cannot be pinned: %s\n", strerror(-pin));
		EXPECT_EQ(-EFAULT, pin);
		EXPECT_GE(2, harvest(self->fd, self->bitmap));
		return;
	}
	printf("# a tracked page can be pinned\n");
	for (round = 0; round < 3; round++) {
		EXPECT_EQ(2, harvest(self->fd, self->bitmap));
		EXPECT_PAGES(self->bitmap, 100, 101);
	}
	close(pin);
	EXPECT_TRUE(EVENTUALLY(10, !harvest(self->fd, self->bitmap)));
}

/* ---- When somebody goes away ---- */

TRACK_TEST(closing_the_file_stops)
{
	int tracker = lmt_reopen(self->fd);
	int copy;

	ASSERT_LE(0, tracker);
	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(tracker, 0, NULL));
	EXPECT_EQ(PAGES, harvest(tracker, self->bitmap));
	copy = dup(tracker);
	close(tracker);
	/* Not the last descriptor of it. */
	pause_ms(50);
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	close(copy);
	EXPECT_TRUE(EVENTUALLY(1, region_info(self->fd).state == LMTRACK_IDLE));
	EXPECT_EQ(-EINVAL, harvest(self->fd, self->bitmap));

	/* The mappings follow without anybody waiting for it. */
	pause_ms(500);
	touch(self->mem, 0, PAGES, 2);
	EXPECT_EQ(0, lmt_stats(self->fd).write_faults);
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
}

TRACK_TEST(killing_the_tracker_stops)
{
	int ready[2];
	char byte;
	pid_t pid;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int tracker = lmt_reopen(self->fd);

		/* Its own mapping is of the region's first file, which stays open. */
		if (tracker < 0 || lmt_start(tracker, 0, NULL) ||
		    harvest(tracker, self->bitmap) != PAGES || write(ready[1], "r", 1) != 1)
			_exit(1);
		for (;;)
			harvest(tracker, self->bitmap);
	}
	ASSERT_EQ(1, read(ready[0], &byte, 1));
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_EQ(-SIGKILL, child_status(pid));
	EXPECT_TRUE(EVENTUALLY(1, region_info(self->fd).state == LMTRACK_IDLE));
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	touch(self->mem, 17, 1, 2);
	EXPECT_EQ(1, harvest(self->fd, self->bitmap));
}

static void requests_without_end(int fd)
{
	static uint64_t bitmap[WORDS], hold[WORDS];

	for (;;) {
		lmt_start(fd, 0, NULL);
		memset(hold, 0x0f, sizeof(hold));
		hold_set(fd, 0, 0, PAGES, hold, NULL);
		lmt_dirty(fd, CLEAR, 0, PAGES, bitmap);
		lmt_stop(fd);
	}
}

/*
 * SIGKILL comes at any moment of a request, which in two processes with a mapping for each page takes
 * its time. What it had begun is taken back, and who comes next finds nothing of it.
 */
TRACK_TEST(killed_in_a_request)
{
	struct lmtrack_region_stats stats;
	unsigned int round;
	size_t page;
	pid_t pid;

	for (page = 1; page < PAGES; page += 2)
		ASSERT_EQ(0, mprotect(self->mem + page * PAGE, PAGE, PROT_READ));
	for (round = 1; round <= 40; round++) {
		for (page = 0; page < PAGES; page += 2)
			self->mem[page * PAGE] = round;
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid)
			requests_without_end(lmt_reopen(self->fd));
		pause_ms(10 + 2 * round);
		ASSERT_EQ(0, kill(pid, SIGKILL));
		EXPECT_EQ(-SIGKILL, child_status(pid));
		EXPECT_TRUE(EVENTUALLY(10, region_info(self->fd).state == LMTRACK_IDLE));
		EXPECT_TRUE(EVENTUALLY(10, lmt_stats(self->fd).mappers == 1));
		ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
		EXPECT_EQ(PAGES / 2, harvest(self->fd, self->bitmap));
		self->mem[7 * 2 * PAGE]++;
		EXPECT_EQ(1, harvest(self->fd, self->bitmap));
		EXPECT_PAGES(self->bitmap, 14);
		EXPECT_EQ(0, lmt_stop(self->fd));
	}
	/* Nor do writes cost anything any more. */
	stats = lmt_stats(self->fd);
	for (page = 0; page < PAGES; page += 2)
		self->mem[page * PAGE] = 0;
	EXPECT_EQ(stats.write_faults, lmt_stats(self->fd).write_faults);
}

/* A region that is mapped, tracked and closed, in whatever order, goes. */
TRACK_TEST(everything_closed_at_once)
{
	int round;

	for (round = 0; round < 20; round++) {
		int fd = lmt_region(BYTES);
		int tracker;
		void *mem;

		ASSERT_LE(0, fd);
		tracker = lmt_reopen(fd);
		ASSERT_LE(0, tracker);
		mem = lmt_map(round & 1 ? fd : tracker, BYTES);
		ASSERT_NE(MAP_FAILED, mem);
		touch(mem, 0, PAGES / 4, 1);
		ASSERT_EQ(0, lmt_start(tracker, 0, NULL));
		if (round & 2)
			close(fd);
		close(tracker);
		if (!(round & 2))
			close(fd);
		touch(mem, 0, PAGES / 4, 2);
		ASSERT_EQ(0, munmap(mem, BYTES));
	}
}

/* ---- Many at once ---- */

#define HARVESTERS	8

struct harvester {
	pthread_t thread;
	int fd;
	pthread_barrier_t *begin;
	volatile bool *stop;
	uint64_t bitmap[WORDS];
	uint64_t total;
	long error;
};

static void *harvester_run(void *arg)
{
	struct harvester *h = arg;
	uint64_t dirty;
	bool last;

	pthread_barrier_wait(h->begin);
	do {
		last = *h->stop;
		h->error = dirty_get(h->fd, CLEAR, 0, PAGES, h->bitmap, &dirty);
		h->total += dirty;
	} while (!h->error && !last);
	return NULL;
}

/*
 * What is dirty is reported to exactly one of those who harvest at the same time. While pages
 * are being written it is one at least: a harvest between a write's fault and the write itself
 * reports the page, and the write faults once more.
 */
static void harvest_at_once(struct __test_metadata *_metadata, int fd, unsigned char *mem,
			    bool writing)
{
	struct harvester *all = calloc(HARVESTERS, sizeof(*all));
	volatile bool stop = !writing;
	pthread_barrier_t begin;
	uint64_t total = 0;
	unsigned int i, seen;
	size_t page;

	ASSERT_NE(NULL, all);
	ASSERT_EQ(0, pthread_barrier_init(&begin, NULL, HARVESTERS + 1));
	if (!writing)
		touch(mem, 0, PAGES, 3);
	for (i = 0; i < HARVESTERS; i++) {
		all[i].fd = fd;
		all[i].begin = &begin;
		all[i].stop = &stop;
		ASSERT_EQ(0, pthread_create(&all[i].thread, NULL, harvester_run, &all[i]));
	}
	pthread_barrier_wait(&begin);
	for (page = 0; writing && page < PAGES; page++)
		touch(mem, (page * 1031) % PAGES, 1, 2);
	stop = true;
	for (i = 0; i < HARVESTERS; i++) {
		ASSERT_EQ(0, pthread_join(all[i].thread, NULL));
		EXPECT_EQ(0, all[i].error);
		total += all[i].total;
	}
	for (page = 0; page < PAGES; page++) {
		for (i = seen = 0; i < HARVESTERS; i++)
			seen += lmt_bit(all[i].bitmap, page);
		if (!seen || (!writing && seen > 1))
			break;
	}
	EXPECT_EQ(PAGES, page);
	EXPECT_LE(PAGES, total);
	EXPECT_TRUE(writing || total == PAGES);
	pthread_barrier_destroy(&begin);
	free(all);
}

TRACK_TEST(harvests_at_once)
{
	int round;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	for (round = 0; round < 10; round++)
		harvest_at_once(_metadata, self->fd, self->mem, round & 1);
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
}

struct hammer {
	pthread_t thread;
	int fd;
	unsigned char *mem;
	volatile bool *stop;
	unsigned long turns;
	long error;
};

static void *hammer_write(void *arg)
{
	struct hammer *h = arg;
	unsigned int seed = 1;

	while (!*h->stop) {
		touch(h->mem, rand_r(&seed) % PAGES, 1, seed);
		h->turns++;
	}
	return NULL;
}

static void *hammer_map(void *arg)
{
	struct hammer *h = arg;
	unsigned int seed = 2;
	unsigned char *mem;

	while (!*h->stop && !h->error) {
		mem = lmt_map(h->fd, BYTES);
		if (mem == MAP_FAILED) {
			h->error = -errno;
			break;
		}
		touch(mem, rand_r(&seed) % PAGES, 1, seed);
		munmap(mem + CHUNK, CHUNK);
		touch(mem, rand_r(&seed) % LMTRACK_CHUNK_PAGES, 1, seed);
		munmap(mem, BYTES);
		h->turns++;
	}
	return NULL;
}

static void *hammer_fork(void *arg)
{
	struct hammer *h = arg;
	pid_t pid;

	while (!*h->stop && !h->error) {
		pid = fork();
		if (!pid) {
			touch(h->mem, 0, 16, 3);
			_exit(0);
		}
		h->error = pid < 0 ? -errno : child_status(pid);
		h->turns++;
	}
	return NULL;
}

static void *hammer_harvest(void *arg)
{
	struct hammer *h = arg;
	uint64_t bitmap[WORDS];
	long ret;

	while (!*h->stop && !h->error) {
		ret = harvest(h->fd, bitmap);
		if (ret < 0 && ret != -EINVAL)
			h->error = ret;
		h->turns++;
	}
	return NULL;
}

static void *hammer_punch(void *arg)
{
	struct hammer *h = arg;
	unsigned int seed = 3;

	while (!*h->stop && !h->error) {
		h->error = lmt_punch(h->fd, rand_r(&seed) % PAGES * PAGE, 8 * PAGE);
		h->turns++;
	}
	return NULL;
}

/* Start and stop with everything else going on at the same time; then it must still work. */
TRACK_TEST(start_and_stop_hammered)
{
	static void *(*const kinds[])(void *) = {
		hammer_write, hammer_write, hammer_map, hammer_fork, hammer_harvest, hammer_punch,
	};
	struct hammer all[ARRAY_SIZE(kinds)] = { };
	volatile bool stop = false;
	unsigned long turns = 0;
	double end;
	size_t i;

	touch(self->mem, 0, PAGES, 1);
	for (i = 0; i < ARRAY_SIZE(all); i++) {
		all[i].fd = self->fd;
		all[i].mem = self->mem;
		all[i].stop = &stop;
		ASSERT_EQ(0, pthread_create(&all[i].thread, NULL, kinds[i], &all[i]));
	}
	end = lmt_seconds() + 8;
	while (lmt_seconds() < end) {
		ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
		ASSERT_EQ(0, lmt_stop(self->fd));
		turns++;
	}
	/* The last of them stays: now with mappings that came in every state. */
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	pause_ms(200);
	stop = true;
	for (i = 0; i < ARRAY_SIZE(all); i++) {
		ASSERT_EQ(0, pthread_join(all[i].thread, NULL));
		EXPECT_EQ(0, all[i].error) {
			TH_LOG("thread %zu: %s", i, strerror(-all[i].error));
		}
		EXPECT_LT(0, all[i].turns);
	}
	printf("# %lu starts, %lu writes, %lu maps, %lu forks, %lu harvests, %lu punches\n",
	       turns, all[0].turns + all[1].turns, all[2].turns, all[3].turns, all[4].turns,
	       all[5].turns);
	touch(self->mem, 0, PAGES, 1);
	EXPECT_LE(0, harvest(self->fd, self->bitmap));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
	touch(self->mem, 0, PAGES, 2);
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	EXPECT_EQ(1, lmt_stats(self->fd).mappers);
}

/* Many starts at once: one wins each time, and nobody else can stop it. */
static void *hammer_start(void *arg)
{
	struct hammer *h = arg;
	int fd = lmt_reopen(h->fd);
	long ret;

	while (!*h->stop && !h->error) {
		ret = lmt_start(fd, 0, NULL);
		if (!ret) {
			h->turns++;
			ret = lmt_stop(fd);
		} else if (ret == -EBUSY) {
			ret = lmt_stop(fd);
			ret = ret == -EPERM || ret == -EINVAL ? 0 : ret ?: -EPROTO;
		}
		h->error = ret;
	}
	close(fd);
	return NULL;
}

TRACK_TEST(starts_at_once)
{
	struct hammer all[4] = { };
	volatile bool stop = false;
	unsigned long turns = 0;
	size_t i;

	touch(self->mem, 0, PAGES, 1);
	for (i = 0; i < ARRAY_SIZE(all); i++) {
		all[i].fd = self->fd;
		all[i].stop = &stop;
		ASSERT_EQ(0, pthread_create(&all[i].thread, NULL, hammer_start, &all[i]));
	}
	pause_ms(3000);
	stop = true;
	for (i = 0; i < ARRAY_SIZE(all); i++) {
		ASSERT_EQ(0, pthread_join(all[i].thread, NULL));
		EXPECT_EQ(0, all[i].error);
		turns += all[i].turns;
	}
	EXPECT_LT(0, turns);
	EXPECT_TRUE(EVENTUALLY(1, region_info(self->fd).state == LMTRACK_IDLE));
}

/* ---- Holding pages back ---- */

static uint64_t held(int fd)
{
	uint64_t count;

	return hold_set(fd, LMTRACK_HOLD_CLEAR_ALL, 0, 0, NULL, &count) ? ~0ULL : count;
}

TRACK_TEST(hold_errors)
{
	int other = lmt_reopen(self->fd);
	uint64_t *bitmap = self->bitmap, count;
	unsigned int bit;

	ASSERT_LE(0, other);
	touch(self->mem, 0, PAGES, 1);
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 0, PAGES, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, LMTRACK_HOLD_CLEAR_ALL, 0, 0, NULL, NULL));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(-EPERM, hold_set(other, 0, 0, PAGES, bitmap, NULL));
	EXPECT_EQ(-EPERM, hold_set(other, LMTRACK_HOLD_CLEAR_ALL, 0, 0, NULL, NULL));
	for (bit = 1; bit < 32; bit++)
		EXPECT_EQ(-EOPNOTSUPP, hold_set(self->fd, 1U << bit, 0, PAGES, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 0, 0, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 1, 64, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 63, 64, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 0, PAGES + 1, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, PAGES, 1, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, 64, ~0ULL, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, 0, ~0ULL - 63, 64, bitmap, NULL));
	EXPECT_EQ(-EINVAL, hold_set(self->fd, LMTRACK_HOLD_CLEAR_ALL, 0, PAGES + 1, bitmap,
				    NULL));
	EXPECT_EQ(-EFAULT, hold_set(self->fd, 0, 0, PAGES, (void *)8, &count));
	EXPECT_EQ(0, count);
	EXPECT_EQ(-EFAULT, hold_set(self->fd, 0, 0, PAGES, (void *)(1UL << 63), NULL));
	EXPECT_EQ(-EFAULT, hold_set(self->fd, 0, 0, PAGES, NULL, NULL));
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, PAGES, bitmap, &count));
	EXPECT_EQ(0, count);
}

/* What the range says replaces what it said before; beyond it nothing changes. */
TRACK_TEST(hold_ranges)
{
	uint64_t hold[WORDS], count;

	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	memset(hold, 0xff, sizeof(hold));
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, PAGES, hold, &count));
	EXPECT_EQ(PAGES, count);
	memset(hold, 0, sizeof(hold));
	EXPECT_EQ(0, hold_set(self->fd, 0, 64, 64, hold, &count));
	EXPECT_EQ(PAGES - 64, count);
	/* A range over two chunks, one that ends within a word, one of a single page. */
	EXPECT_EQ(0, hold_set(self->fd, 0, 448, 128, hold, &count));
	EXPECT_EQ(PAGES - 64 - 128, count);
	EXPECT_EQ(0, hold_set(self->fd, 0, 1024, 65, hold, &count));
	EXPECT_EQ(PAGES - 64 - 128 - 65, count);
	EXPECT_EQ(0, hold_set(self->fd, 0, PAGES - 64, 1, hold, &count));
	EXPECT_EQ(PAGES - 64 - 128 - 65 - 1, count);
	/* Bits beyond the range are not looked at. */
	hold[0] = ~0ULL;
	EXPECT_EQ(0, hold_set(self->fd, 0, 64, 3, hold, &count));
	EXPECT_EQ(PAGES - 64 - 128 - 65 - 1 + 3, count);
	/* All others are forgotten first. */
	hold[0] = 5;
	EXPECT_EQ(0, hold_set(self->fd, LMTRACK_HOLD_CLEAR_ALL, 128, 64, hold, &count));
	EXPECT_EQ(2, count);
	EXPECT_EQ(0, held(self->fd));
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, PAGES, hold, &count));
	EXPECT_EQ(2, count);

	/* The next tracking begins without. */
	ASSERT_EQ(0, lmt_stop(self->fd));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	hold[0] = 0;
	EXPECT_EQ(0, hold_set(self->fd, 0, PAGES - 64, 64, hold, &count));
	EXPECT_EQ(0, count);
}

/* The half that could be read is in effect. */
TRACK_TEST(hold_bitmap_faults_half_way)
{
	unsigned char *two = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t count;

	ASSERT_NE(MAP_FAILED, two);
	memset(two, 0xff, 2 * PAGE);
	ASSERT_EQ(0, munmap(two + PAGE, PAGE));
	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(-EFAULT, hold_set(self->fd, 0, 0, PAGES, two + PAGE - 2 * 64, &count));
	EXPECT_EQ(2 * LMTRACK_CHUNK_PAGES, count);
	EXPECT_EQ(0, held(self->fd));
}

/* DIRTY_GET knows nothing of it. */
TRACK_TEST(held_pages_are_reported)
{
	uint64_t hold[WORDS];

	memset(hold, 0xff, sizeof(hold));
	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, hold_set(self->fd, 0, 0, PAGES, hold, NULL));
	EXPECT_EQ(PAGES, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_EQ(PAGES, harvest(self->fd, self->bitmap));
	touch(self->mem, 700, 3, 2);
	EXPECT_EQ(3, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	EXPECT_PAGES(self->bitmap, 700, 701, 702);
	EXPECT_EQ(3, harvest(self->fd, self->bitmap));
	EXPECT_EQ(0, harvest(self->fd, self->bitmap));
}

/* Only chunks that have held pages pay, for as long as they have; untouched ones never do. */
TRACK_TEST(hold_memory)
{
	uint64_t hold[WORDS], count, before;

	memset(hold, 0xff, sizeof(hold));
	touch(self->mem, 0, 2 * LMTRACK_CHUNK_PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	before = lmt_stats(self->fd).kernel_bytes;
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, PAGES, hold, &count));
	EXPECT_EQ(2 * LMTRACK_CHUNK_PAGES, count);
	EXPECT_EQ(before + 2 * 64, lmt_stats(self->fd).kernel_bytes);
	EXPECT_EQ(2, lmt_stats(self->fd).chunks);
	memset(hold, 0, sizeof(hold));
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, LMTRACK_CHUNK_PAGES, hold, &count));
	EXPECT_EQ(before + 64, lmt_stats(self->fd).kernel_bytes);
	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(before, lmt_stats(self->fd).kernel_bytes);
}

/* ---- Two who harvest a chunk ---- */

struct first_half {
	int fd;
	unsigned char *mem;
	bool stop;
	long failed;
};

/* Pages of its own become dirty and are taken, again and again. */
static void *first_half_run(void *arg)
{
	struct first_half *half = arg;
	uint64_t bitmap[WORDS];

	while (!__atomic_load_n(&half->stop, __ATOMIC_RELAXED) && !half->failed) {
		touch(half->mem, 0, 64, 1);
		if (lmt_dirty(half->fd, CLEAR, 0, 64, bitmap) < 0)
			half->failed = 1;
	}
	return NULL;
}

/* A page that is dirty is reported, also while another part of its chunk is harvested. */
TRACK_TEST(two_parts_of_a_chunk)
{
	struct first_half half = { .fd = self->fd, .mem = self->mem };
	unsigned int missed = 0, i;
	pthread_t thread;

	touch(self->mem, 0, LMTRACK_CHUNK_PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ((long)LMTRACK_CHUNK_PAGES, harvest(self->fd, self->bitmap));
	ASSERT_EQ(0, pthread_create(&thread, NULL, first_half_run, &half));
	for (i = 0; i < 5000; i++) {
		touch(self->mem, 300, 1, i);
		ASSERT_LE(0, lmt_dirty(self->fd, CLEAR, 64, LMTRACK_CHUNK_PAGES - 64,
				       self->bitmap));
		/* Others may be reported, too: pages that were held when it began. */
		missed += !lmt_bit(self->bitmap, 300 - 64);
	}
	__atomic_store_n(&half.stop, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	EXPECT_EQ(0, half.failed);
	EXPECT_EQ(0, missed);
}

TEST_HARNESS_MAIN
