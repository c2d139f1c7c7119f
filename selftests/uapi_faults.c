// SPDX-License-Identifier: GPL-2.0
/*
 * Every allocation of every request, and of every fault, fails once.
 *
 * A kernel with fault injection lets a thread name the allocation that is to fail:
 * /proc/thread-self/fail-nth, counted from the write on. Each test does the same again and again,
 * with the first, the second, ... allocation failing, until there are fewer than that. Every
 * time, what was asked for is done or is refused with ENOMEM; and afterwards the region is what it
 * was before or what was asked for, nothing in between: no mapping is forgotten, no write is lost,
 * no memory stays behind (for that, selftests/run asks kmemleak).
 *
 * Stock kernels cannot: all is skipped there. The kernel's own words about allocations that fail
 * are announced in its log, where selftests/run would take them for a complaint.
 */
#include <dirent.h>

#include "kselftest_harness.h"
#include "uapi_common.h"
#include "uapi_sink.h"

#define CHUNKS		1024UL		/* enough for a fresh one each time */
#define BYTES		(CHUNKS * CHUNK)
#define PAGES		(BYTES / PAGE)
#define SOME		(4 * LMTRACK_CHUNK_PAGES)	/* pages that a harvest looks at */
#define MOST		3000		/* no call allocates that often */

/* ---- To let allocations fail ---- */

static void log_line(const char *line)
{
	int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, line, strlen(line)) < 0)
		fprintf(stderr, "# cannot write to the kernel's log\n");
	close(fd);
}

static int setting(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int ret = fd < 0 ? -errno : 0;

	if (!ret && write(fd, value, strlen(value)) < 0)
		ret = -errno;
	if (fd >= 0)
		close(fd);
	return ret;
}

/* All kinds of allocations, silently, but only those that fail-nth names. */
static int faults_prepare(void)
{
#define KNOBS	"/sys/kernel/debug/"
	return setting(KNOBS "failslab/ignore-gfp-wait", "N") ?:
	       setting(KNOBS "failslab/verbose", "0") ?:
	       setting(KNOBS "fail_page_alloc/ignore-gfp-wait", "N") ?:
	       setting(KNOBS "fail_page_alloc/ignore-gfp-highmem", "N") ?:
	       setting(KNOBS "fail_page_alloc/min-order", "0") ?:
	       setting(KNOBS "fail_page_alloc/verbose", "0");
}

/* The @nth allocation from now on fails. By descriptor: nothing is allocated for that itself. */
static void arm(int fail_nth, unsigned int nth)
{
	char text[16];
	int n = snprintf(text, sizeof(text), "%u", nth);

	if (pwrite(fail_nth, text, n, 0) != n)
		abort();
}

/* Has it? */
static bool disarm(int fail_nth)
{
	char text[16] = "";

	if (pread(fail_nth, text, sizeof(text) - 1, 0) <= 0)
		abort();
	arm(fail_nth, 0);
	return atoi(text) == 0;
}

/* ---- A region ---- */

FIXTURE(faults) {
	int fail_nth;
	int dev;
	int fd;
	unsigned char *mem;
	uint64_t *bitmap;
	long long users;
	struct lmtrack_region_stats before;
	/* What the call at hand works on, and what it made. */
	unsigned int nth;
	long made;
	void *where;
	int other;
	int stream;
	int pair[2];
};

FIXTURE_SETUP(faults)
{
	self->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	if (self->fail_nth < 0)
		SKIP(return, "this kernel lets no allocation fail");
	ASSERT_EQ(0, faults_prepare());
	self->users = module_users();
	self->dev = device_open();
	ASSERT_LE(0, self->dev);
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	self->bitmap = calloc(PAGES / 64, 8);
	ASSERT_NE(NULL, self->bitmap);
	self->other = self->stream = -1;
	log_line("selftests: allocations fail from here on");
}

FIXTURE_TEARDOWN(faults)
{
	log_line("selftests: allocations fail no more");
	close(self->stream);
	close(self->other);
	close(self->fd);
	close(self->dev);
	munmap(self->mem, BYTES);
	free(self->bitmap);
	/* Whatever was refused half-way has let go of everything. */
	EXPECT_TRUE(EVENTUALLY(10, module_users() == self->users)) {
		TH_LOG("users of the module: %lld, before %lld", module_users(), self->users);
	}
}

typedef FIXTURE_DATA(faults) faults;

/*
 * @call once for each of its allocations. It returns a negative errno or anything else; @begin
 * makes ready for it, @end (told what it returned) judges and undoes.
 */
static void each(struct __test_metadata *_metadata, faults *self, void (*begin)(faults *self),
		 long (*call)(faults *self),
		 void (*end)(struct __test_metadata *_metadata, faults *self, long ret))
{
	unsigned int refused = 0;
	bool failed = true;
	long ret;

	for (self->nth = 1; failed && self->nth < MOST; self->nth++) {
		if (begin)
			begin(self);
		arm(self->fail_nth, self->nth);
		ret = call(self);
		failed = disarm(self->fail_nth);
		refused += ret < 0;
		EXPECT_TRUE(ret >= 0 || (failed && ret == -ENOMEM));
		end(_metadata, self, ret);
		ASSERT_NE(KSFT_FAIL, _metadata->exit_code) {
			TH_LOG("allocation %u %s, the call returned %ld", self->nth,
			       failed ? "failed" : "did not come", ret);
		}
	}
	ASSERT_GT((unsigned int)MOST, self->nth);
	TH_LOG("%u allocations, %u of them needed", self->nth - 2, refused);
}

/* One byte of each page from @first on is written, and the next harvest says so. */
#define EXPECT_NOTICED(first, pages) do {						\
	size_t _first = (first), _pages = (pages);					\
											\
	touch(self->mem, _first, _pages, self->nth);					\
	EXPECT_LE((long)_pages, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES,	\
					  self->bitmap));				\
	EXPECT_TRUE(lmt_bit(self->bitmap, _first));					\
	EXPECT_TRUE(lmt_bit(self->bitmap, _first + _pages - 1));			\
} while (0)

#define FAULTS_TEST(name)	TEST_F_TIMEOUT(faults, name, 1200)

/* ---- Regions ---- */

static long create(faults *self)
{
	struct lmtrack_region_create args = region_args(BYTES);

	self->made = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &args);
	return self->made;
}

static void create_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)self;
	if (ret < 0)
		return;
	EXPECT_EQ(BYTES, region_info(ret).region_size);
	close(ret);
}

FAULTS_TEST(region_create)
{
	each(_metadata, self, NULL, create, create_end);
}

/* The first region's file system has to be mounted, too: none may be left from the last time. */
static void create_first_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	create_end(_metadata, self, ret);
	EXPECT_TRUE(EVENTUALLY(10, module_users() == self->users + 1));
}

FAULTS_TEST(first_region_create)
{
	munmap(self->mem, BYTES);
	self->mem = MAP_FAILED;
	close(self->fd);
	self->fd = -1;
	ASSERT_TRUE(EVENTUALLY(10, module_users() == self->users + 1));
	each(_metadata, self, NULL, create, create_first_end);
}

static long reopen(faults *self)
{
	self->made = lmt_reopen(self->fd);
	/* So says procfs when it has no memory for an inode. */
	return self->made == -ENOENT ? -ENOMEM : self->made;
}

static void reopen_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	if (ret >= 0)
		close(ret);
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
}

/* An open file that came to nothing is not taken for the one that tracks. */
FAULTS_TEST(open_again)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, reopen, reopen_end);
}

/* ---- Mappings ---- */

static long map(faults *self)
{
	self->where = lmt_map(self->fd, BYTES);
	return self->where == MAP_FAILED ? -errno : 0;
}

static void map_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(!ret, lmt_stats(self->fd).mappers);
	if (ret)
		return;
	self->mem = self->where;
	EXPECT_NOTICED(7, 1);
	munmap(self->where, BYTES);
	EXPECT_EQ(0, lmt_stats(self->fd).mappers);
}

/* The first mapping of a process is remembered, or there is none. */
FAULTS_TEST(mmap_first)
{
	munmap(self->mem, BYTES);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, map, map_end);
	self->mem = MAP_FAILED;
}

static long split(faults *self)
{
	return E(mprotect(self->mem + self->nth * PAGE, PAGE, PROT_READ));
}

static void split_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)ret;
	EXPECT_EQ(0, mprotect(self->mem, BYTES, PROT_READ | PROT_WRITE));
	EXPECT_EQ(1, lmt_stats(self->fd).mappers);
	EXPECT_NOTICED(self->nth, 1);
}

/* A mapping is split in three, or in two, or stays whole: all parts are tracked. */
FAULTS_TEST(mprotect_splits)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, split, split_end);
	munmap(self->mem, BYTES);
	self->mem = MAP_FAILED;
	EXPECT_EQ(0, lmt_stats(self->fd).mappers);
}

/* To and fro between two places, each a chunk long, with tables of their own. */
static long move(faults *self)
{
	self->where = mremap(self->mem, CHUNK, CHUNK, MREMAP_MAYMOVE | MREMAP_FIXED,
			     self->where);
	return self->where == MAP_FAILED ? -errno : 0;
}

static void move_begin(faults *self)
{
	self->where = (void *)((uintptr_t)self->mem ^ CHUNK);
}

static void move_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(1, lmt_stats(self->fd).mappers);
	if (!ret)
		self->mem = self->where;
	EXPECT_NOTICED(0, 1);
}

FAULTS_TEST(mremap_moves)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	munmap(self->mem, BYTES);
	/* Where the big mapping was there is room, beginning at an even chunk. */
	self->mem = (void *)(((uintptr_t)self->mem | (2 * CHUNK - 1)) + 1);
	ASSERT_EQ(self->mem, mmap(self->mem, CHUNK, PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_FIXED, self->fd, 0));
	touch(self->mem, 0, LMTRACK_CHUNK_PAGES, 1);
	ASSERT_EQ((long)LMTRACK_CHUNK_PAGES,
		  lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	each(_metadata, self, move_begin, move, move_end);
	munmap(self->mem, CHUNK);
	EXPECT_EQ(0, lmt_stats(self->fd).mappers);
	self->mem = MAP_FAILED;
}

static long fork_exit(faults *self)
{
	self->made = fork();
	if (!self->made)
		_exit(0);
	/* fork(2) may say EAGAIN, too. */
	return self->made < 0 ? (errno == EAGAIN ? -ENOMEM : -errno) : self->made;
}

static void fork_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	if (ret > 0)
		EXPECT_EQ(0, child_status(ret));
	/* What fork() had made of the child's mappings is taken down later. */
	EXPECT_TRUE(EVENTUALLY(10, lmt_stats(self->fd).mappers == 1));
	EXPECT_NOTICED(3, 2);
	if (self->nth % 16)
		return;
	/* Both flips find their way through the processes that are left. */
	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_LE(2, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
}

/* A process that maps the region, in three pieces, forks; the child comes into being or not. */
FAULTS_TEST(fork_of_a_mapper)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, mprotect(self->mem + 64 * PAGE, 64 * PAGE, PROT_READ));
	touch(self->mem, 0, 64, 1);
	ASSERT_EQ(64, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	each(_metadata, self, NULL, fork_exit, fork_end);
}

/* ---- Faults ---- */

static long populate_write(faults *self)
{
	return E(madvise(self->mem + self->nth * CHUNK, PAGE, MADV_POPULATE_WRITE));
}

static void populate_idle_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	unsigned char *page = self->mem + self->nth * CHUNK;

	EXPECT_LE(self->nth - !!ret, lmt_stats(self->fd).resident_pages);
	EXPECT_EQ(0, page[100]);
	page[0] = self->nth;
	EXPECT_EQ(self->nth, lmt_stats(self->fd).resident_pages);
}

/* The first page of a chunk, with all the tables it needs: it comes into being or does not. */
FAULTS_TEST(fault_idle)
{
	each(_metadata, self, NULL, populate_write, populate_idle_end);
}

static void populate_tracked_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)ret;
	EXPECT_NOTICED(self->nth * LMTRACK_CHUNK_PAGES, 1);
	/* It was clean for all that the tracker knows: it is noticed again. */
	EXPECT_NOTICED(self->nth * LMTRACK_CHUNK_PAGES, 1);
}

FAULTS_TEST(fault_tracked)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, populate_write, populate_tracked_end);
}

static long populate_read(faults *self)
{
	return E(madvise(self->mem + self->nth * CHUNK, PAGE, MADV_POPULATE_READ));
}

static void populate_read_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)ret;
	/* A page that came into being by a read is new to whoever has a copy. */
	EXPECT_NOTICED(self->nth * LMTRACK_CHUNK_PAGES, 1);
}

FAULTS_TEST(fault_read)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, populate_read, populate_read_end);
}

static long store(faults *self)
{
	self->mem[self->nth * CHUNK] = self->nth;
	return 0;
}

static void store_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)ret;
	EXPECT_EQ((unsigned char)self->nth, self->mem[self->nth * CHUNK]);
	EXPECT_LE(1, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_TRUE(lmt_bit(self->bitmap, self->nth * LMTRACK_CHUNK_PAGES));
}

/* A program that merely writes does not see that memory was short: it is tried again. */
FAULTS_TEST(store_goes_on)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, store, store_end);
}

/* Tracking begins anew, with no account of this thread, and page 5 is clean. */
static void first_write_begin(faults *self)
{
	self->mem[5 * PAGE] = 1;
	lmt_stop(self->fd);
	lmt_start(self->fd, 0, NULL);
	lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap);
}

static long first_write(faults *self)
{
	self->mem[5 * PAGE] = self->nth;
	return 0;
}

static void first_write_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	(void)ret;
	EXPECT_LE(1, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_TRUE(lmt_bit(self->bitmap, 5));
	EXPECT_NOTICED(5, 1);
}

/* No memory to remember the thread by: its write counts all the same. */
FAULTS_TEST(first_write_of_a_thread)
{
	each(_metadata, self, first_write_begin, first_write, first_write_end);
}

static void punch_begin(faults *self)
{
	touch(self->mem, 0, SOME, 1);
	lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap);
}

static long punch(faults *self)
{
	return lmt_punch(self->fd, PAGE, (SOME - 2) * PAGE);
}

static void punch_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(ret ? SOME : 2, lmt_stats(self->fd).resident_pages);
	EXPECT_LE(ret ? 0 : (long)SOME - 2,
		  lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
}

FAULTS_TEST(punch_hole)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, punch_begin, punch, punch_end);
}

/* ---- Tracking ---- */

static long start(faults *self)
{
	return lmt_start(self->fd, 0, NULL);
}

static void start_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(ret ? LMTRACK_IDLE : LMTRACK_TRACKED, region_info(self->fd).state);
	if (ret) {
		EXPECT_EQ(-EINVAL, lmt_stop(self->fd));
		EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	}
	EXPECT_EQ((long)SOME, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_NOTICED(9, 4);
	EXPECT_EQ(0, lmt_stop(self->fd));
}

FAULTS_TEST(track_start)
{
	touch(self->mem, 0, SOME, 1);
	each(_metadata, self, NULL, start, start_end);
}

static void stop_begin(faults *self)
{
	lmt_start(self->fd, 0, NULL);
}

static long stop(faults *self)
{
	return lmt_stop(self->fd);
}

static void stop_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(0, ret);
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
}

FAULTS_TEST(track_stop)
{
	touch(self->mem, 0, SOME, 1);
	each(_metadata, self, stop_begin, stop, stop_end);
}

static void close_begin(faults *self)
{
	self->other = lmt_reopen(self->fd);
	lmt_start(self->other, 0, NULL);
}

static long close_tracker(faults *self)
{
	return E(close(self->other));
}

static void close_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(0, ret);
	self->other = -1;
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_LE((long)SOME, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_NOTICED(1, 1);
	EXPECT_EQ(0, lmt_stop(self->fd));
}

FAULTS_TEST(close_of_the_tracker)
{
	touch(self->mem, 0, SOME, 1);
	each(_metadata, self, close_begin, close_tracker, close_end);
}

static void dirty_begin(faults *self)
{
	touch(self->mem, 0, SOME, self->nth);
}

static long peek(faults *self)
{
	return lmt_dirty(self->fd, 0, 0, SOME, self->bitmap);
}

static long harvest(faults *self)
{
	return lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, SOME, self->bitmap);
}

static void dirty_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	size_t word;

	if (ret >= 0)
		EXPECT_EQ((long)SOME, ret);
	for (word = 0; ret < 0 && word < SOME / 64; word++)
		EXPECT_EQ(0, self->bitmap[word]);
	/* A harvest that was refused has harvested nothing. */
	if (ret < 0)
		EXPECT_EQ((long)SOME, harvest(self));
	touch(self->mem, 0, SOME, self->nth);
}

FAULTS_TEST(dirty_get)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, dirty_begin, peek, dirty_end);
	each(_metadata, self, dirty_begin, harvest, dirty_end);
}

static long hold(faults *self)
{
	return hold_set(self->fd, 0, 0, SOME, self->bitmap, (uint64_t *)&self->made);
}

static void hold_begin(faults *self)
{
	memset(self->bitmap, 0x55, SOME / 8);
	self->before = lmt_stats(self->fd);
}

static void hold_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	uint64_t held;

	/* Chunks before the one that was refused have been set; each whole. */
	EXPECT_EQ(0, self->made % (LMTRACK_CHUNK_PAGES / 2));
	EXPECT_GE((long)SOME / 2, self->made);
	if (!ret)
		EXPECT_EQ((long)SOME / 2, self->made);
	EXPECT_EQ(0, hold_set(self->fd, LMTRACK_HOLD_CLEAR_ALL, 0, 0, NULL, &held));
	EXPECT_EQ(0, held);
	EXPECT_EQ(self->before.kernel_bytes, lmt_stats(self->fd).kernel_bytes);
}

FAULTS_TEST(hold)
{
	touch(self->mem, 0, SOME, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	/* The first write of this thread has its own account. */
	touch(self->mem, 0, 1, 1);
	each(_metadata, self, hold_begin, hold, hold_end);
}

static long stun_set(faults *self)
{
	struct lmtrack_stun_set args = { .size = sizeof(args), .rate = 1000000 };

	return lmt_ioctl(self->fd, LMTRACK_STUN_SET, &args);
}

static void stun_set_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(0, ret);
	EXPECT_NOTICED(5, 3);
}

static long stun_stats(faults *self)
{
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
	struct lmtrack_stun_stats args = {
		.size = sizeof(args), .threads = (uintptr_t)threads,
		.thread_count = LMTRACK_STUN_THREADS,
	};
	long ret = lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &args);

	self->made = args.thread_count;
	return ret;
}

static void stun_stats_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	if (!ret)
		EXPECT_EQ(1, self->made);
}

FAULTS_TEST(stun)
{
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	each(_metadata, self, NULL, stun_set, stun_set_end);
	each(_metadata, self, NULL, stun_stats, stun_stats_end);
}

/* ---- Streams ---- */

static long stream_create(faults *self)
{
	struct lmtrack_stream_create args = { .size = sizeof(args), .stream_id = 1 };

	self->stream = lmt_ioctl(self->dev, LMTRACK_STREAM_CREATE, &args);
	return self->stream;
}

static void stream_create_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	if (ret >= 0)
		EXPECT_EQ(0, close(self->stream));
	self->stream = -1;
}

FAULTS_TEST(create_stream)
{
	each(_metadata, self, NULL, stream_create, stream_create_end);
}

static long add_region(faults *self)
{
	return stream_add_region(self->stream, self->fd, 0);
}

static long add_channel(faults *self)
{
	return stream_add_channel(self->stream, self->pair[0], 0);
}

static void stream_begin(faults *self)
{
	if (tcp_pair(self->pair) || stream_create(self) < 0)
		abort();
}

static void stream_over(faults *self)
{
	close(self->stream);
	self->stream = -1;
	close(self->pair[0]);
	close(self->pair[1]);
}

static void add_region_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	EXPECT_EQ(0, ret);
	EXPECT_EQ(-EEXIST, add_region(self));
	stream_over(self);
}

FAULTS_TEST(add_region)
{
	each(_metadata, self, stream_begin, add_region, add_region_end);
}

static void add_channel_end(struct __test_metadata *_metadata, faults *self, long ret)
{
	/* The socket is what it was, or the stream's. */
	EXPECT_EQ(ret ? 0 : -EEXIST, add_channel(self));
	stream_over(self);
}

FAULTS_TEST(add_channel)
{
	each(_metadata, self, stream_begin, add_channel, add_channel_end);
}

/* fail-nth of the only channel's thread. */
static int channel_fail_nth(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	char path[64], comm[32];
	int found = -1, fd;
	ssize_t n;

	while (found < 0 && (entry = readdir(proc))) {
		if (!strtoul(entry->d_name, NULL, 10))
			continue;
		snprintf(path, sizeof(path), "/proc/%.16s/comm", entry->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		n = fd < 0 ? 0 : read(fd, comm, sizeof(comm));
		close(fd);
		if (n < 9 || strncmp(comm, "lmtrack-0", 9))
			continue;
		snprintf(path, sizeof(path), "/proc/%.16s/task/%.16s/fail-nth", entry->d_name,
			 entry->d_name);
		found = open(path, O_RDWR | O_CLOEXEC);
	}
	closedir(proc);
	return found;
}

/*
 * The allocations of the thread that harvests and sends. Memory that the network lacks is
 * waited for: the round ends well, and the copy is right byte by byte; anything else would
 * have to be an error that ends the stream.
 */
FAULTS_TEST(send)
{
	unsigned int round, broken = 0;
	struct sink sink = { };
	bool failed = true;
	long error;
	int fail_nth = -1;

	sink.copy = mmap(NULL, BYTES, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(MAP_FAILED, sink.copy);
	touch(self->mem, 0, SOME, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (round = 1; failed && round < MOST; round++) {
		if (self->stream < 0) {
			stream_begin(self);
			ASSERT_EQ(0, add_region(self));
			ASSERT_EQ(0, add_channel(self));
			sink.fd = self->pair[1];
			ASSERT_EQ(0, pthread_create(&sink.thread, NULL, sink_run, &sink));
			ASSERT_TRUE(EVENTUALLY(10, (fail_nth = channel_fail_nth()) >= 0));
		}
		/* Full and partial runs, zeroes and data. */
		touch(self->mem, round % 8 * LMTRACK_CHUNK_PAGES / 4, 64, round);
		touch(self->mem, SOME / 2 + round % 16, 3, round % 2);
		arm(fail_nth, round);
		ASSERT_EQ(0, stream_send(self->stream, round,
					 broken ? LMTRACK_SEND_ALL : LMTRACK_SEND_DIRTY));
		error = round_error(self->stream);
		failed = disarm(fail_nth);
		if (!error) {
			ASSERT_TRUE(sink_has(&sink, round));
			ASSERT_EQ(0, memcmp(sink.copy, self->mem, SOME * PAGE));
			continue;
		}
		ASSERT_TRUE(failed);
		ASSERT_TRUE(error == ENOMEM || error == ENOBUFS) {
			TH_LOG("allocation %u ended the round with %ld", round, error);
		}
		broken++;
		close(fail_nth);
		close(self->stream);
		self->stream = -1;
		pthread_join(sink.thread, NULL);
		close(self->pair[0]);
		close(self->pair[1]);
	}
	ASSERT_GT((unsigned int)MOST, round);
	TH_LOG("%u allocations, %u of them ended the stream", round - 2, broken);
	close(self->stream);
	self->stream = -1;
	pthread_join(sink.thread, NULL);
	munmap(sink.copy, BYTES);
}

TEST_HARNESS_MAIN
