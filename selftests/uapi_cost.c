// SPDX-License-Identifier: GPL-2.0
/*
 * What regions and tracking cost, counted rather than timed: a huge region costs what was
 * touched of it, an idle one costs no more than memfd.
 *
 * The four requests are measured in instructions where the processor counts them, which an
 * emulated one does not; else by the clock, the fastest of many, with a limit so generous that
 * only a cost in proportion to the region's size can exceed it.
 */
#include <math.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <linux/perf_event.h>

#include "kselftest_harness.h"
#include "uapi_common.h"

#define CLEAR		LMTRACK_DIRTY_CLEAR
#define TOUCHED		(64 * MIB)
#define CHUNKS		(TOUCHED / CHUNK)
#define HUGE_REGION	(1ULL << 40)
#define REPEAT		15

FIXTURE(cost) {
	int fd;
};

FIXTURE_SETUP(cost)
{
	self->fd = -1;
}

FIXTURE_TEARDOWN(cost)
{
	close(self->fd);
}

#define COST_TEST(name) TEST_F_TIMEOUT(cost, name, 2 * TEST_SECONDS)

/* ---- A huge region ---- */

static int instructions_fd = -1;

static void count_begin(void)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_HARDWARE, .size = sizeof(attr),
		.config = PERF_COUNT_HW_INSTRUCTIONS,
	};

	instructions_fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
	printf("# counted in %s\n", instructions_fd < 0 ? "milliseconds" : "1000 instructions");
}

/* Now, in the unit of the measurement. */
static double count_now(void)
{
	uint64_t instructions;

	if (instructions_fd < 0)
		return lmt_seconds() * 1e3;
	if (read(instructions_fd, &instructions, sizeof(instructions)) != sizeof(instructions))
		return NAN;
	return instructions * 1e-3;
}

/* Kernel memory that is not somebody's pages, in bytes. */
static long kernel_memory(void)
{
	static const char *const keys[] = {
		"Slab:", "KernelStack:", "Percpu:", "VmallocUsed:", "PageTables:",
	};
	char line[128];
	long total = 0;
	size_t i;
	FILE *f;

	f = fopen("/proc/meminfo", "r");
	while (f && fgets(line, sizeof(line), f))
		for (i = 0; i < ARRAY_SIZE(keys); i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				total += atol(line + strlen(keys[i])) * 1024;
	if (f)
		fclose(f);
	return total;
}

struct cost {
	double create, start, first, sparse, none, stop;
	long memory;
	uint64_t kernel_bytes;
};

static void keep_least(double *least, double value)
{
	if (!*least || value < *least)
		*least = value;
}

/*
 * One region of @size with TOUCHED bytes touched, in whole chunks evenly spread. What a
 * request does is checked, too, or a failure would count as cheap.
 */
static void measure_once(struct __test_metadata *_metadata, uint64_t size, uint64_t *bitmap,
			 struct cost *cost)
{
	const uint64_t pages = size / PAGE, stride = size / CHUNKS;
	struct lmtrack_region_stats stats;
	long memory = kernel_memory();
	uint64_t dirty, chunk;
	unsigned char *mem;
	double begin;
	int fd;

	begin = count_now();
	fd = lmt_region(size);
	keep_least(&cost->create, count_now() - begin);
	ASSERT_LE(0, fd);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	ASSERT_NE(MAP_FAILED, mem);
	for (chunk = 0; chunk < CHUNKS; chunk++)
		touch(mem + chunk * stride, 0, LMTRACK_CHUNK_PAGES, 1);

	begin = count_now();
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	keep_least(&cost->start, count_now() - begin);

	begin = count_now();
	ASSERT_EQ(0, dirty_get(fd, CLEAR, 0, pages, bitmap, &dirty));
	keep_least(&cost->first, count_now() - begin);
	ASSERT_EQ(TOUCHED / PAGE, dirty);
	memory = kernel_memory() - memory;
	/* The most of all turns: later ones find memory that earlier ones have left in caches. */
	if (memory > cost->memory)
		cost->memory = memory;
	stats = lmt_stats(fd);
	cost->kernel_bytes = stats.kernel_bytes;
	EXPECT_EQ(TOUCHED / PAGE, stats.resident_pages);
	EXPECT_EQ(CHUNKS, stats.chunks);

	for (chunk = 0; chunk < CHUNKS; chunk++)
		touch(mem + chunk * stride, 7, 1, 2);
	begin = count_now();
	ASSERT_EQ(0, dirty_get(fd, CLEAR, 0, pages, bitmap, &dirty));
	keep_least(&cost->sparse, count_now() - begin);
	ASSERT_EQ(CHUNKS, dirty);

	begin = count_now();
	ASSERT_EQ(0, dirty_get(fd, CLEAR, 0, pages, bitmap, &dirty));
	keep_least(&cost->none, count_now() - begin);
	ASSERT_EQ(0, dirty);

	begin = count_now();
	ASSERT_EQ(0, lmt_stop(fd));
	keep_least(&cost->stop, count_now() - begin);
	ASSERT_EQ(0, munmap(mem, size));
	close(fd);
}

static struct cost measure(struct __test_metadata *_metadata, uint64_t size)
{
	uint64_t bytes = size / PAGE / 8;
	struct cost cost = { };
	uint64_t *bitmap;
	int i;

	/* Its own page tables are there before anything is measured. */
	bitmap = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	ASSERT_NE(MAP_FAILED, bitmap);
	for (i = 0; i < REPEAT; i++)
		measure_once(_metadata, size, bitmap, &cost);
	munmap(bitmap, bytes);
	printf("# %llu MiB: create %.3f, start %.3f, first harvest %.3f, sparse %.3f, none %.3f, "
	       "stop %.3f\n", (unsigned long long)(size / MIB), cost.create, cost.start,
	       cost.first, cost.sparse, cost.none, cost.stop);
	printf("# %llu MiB: %ld KiB of kernel memory beside the pages, %llu KiB the module's\n",
	       (unsigned long long)(size / MIB), cost.memory / 1024,
	       (unsigned long long)cost.kernel_bytes / 1024);
	return cost;
}

COST_TEST(size_is_free)
{
	struct cost small, huge;

	count_begin();
	huge = measure(_metadata, HUGE_REGION);
	small = measure(_metadata, TOUCHED);
#define EXPECT_NEAR(what) EXPECT_LE(huge.what, 5 * small.what + 5)
	EXPECT_NEAR(create);
	EXPECT_NEAR(start);
	EXPECT_NEAR(first);
	EXPECT_NEAR(sparse);
	EXPECT_NEAR(none);
	EXPECT_NEAR(stop);
	EXPECT_GT(2L * (long)MIB, huge.memory);
	EXPECT_GT(256UL * 1024, huge.kernel_bytes);
	EXPECT_EQ(small.kernel_bytes, huge.kernel_bytes);
}

/* Nothing touched, nothing counted: the largest region there is costs what the smallest does. */
COST_TEST(untouched_is_free)
{
	struct lmtrack_region_stats small, huge;
	int fd;

	self->fd = lmt_region(LMTRACK_REGION_SIZE_MAX);
	fd = lmt_region(PAGE);
	ASSERT_LE(0, self->fd);
	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, mmap(NULL, LMTRACK_REGION_SIZE_MAX, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_NORESERVE, self->fd, 0));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	small = lmt_stats(fd);
	huge = lmt_stats(self->fd);
	EXPECT_EQ(small.kernel_bytes, huge.kernel_bytes);
	EXPECT_EQ(0, huge.chunks);
	EXPECT_EQ(0, huge.resident_pages);
}

/* ---- An idle region ---- */

#define IDLE_BYTES	(16 * MIB)
#define IDLE_PAGES	(IDLE_BYTES / PAGE)

static long faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_minflt + usage.ru_majflt;
}

enum pattern { WRITE, READ_THEN_WRITE, SCATTERED, REWRITE, OTHER_MAPPING, PATTERNS };

static const char *const pattern_names[PATTERNS] = {
	"write", "read, then write", "scattered writes", "write again", "another mapping",
};

/* The faults that each kind of access to a fresh file takes. */
static bool count_faults(int fd, long *taken)
{
	unsigned char *mem, *other;
	volatile unsigned char *byte;
	enum pattern pattern;
	size_t i;
	long begin;

	for (pattern = 0; pattern < PATTERNS; pattern++) {
		mem = lmt_map(fd, IDLE_BYTES);
		other = lmt_map(fd, IDLE_BYTES);
		if (mem == MAP_FAILED || other == MAP_FAILED)
			return false;
		if (pattern == REWRITE)
			touch(mem, 0, IDLE_PAGES, 1);
		begin = faults();
		switch (pattern) {
		case READ_THEN_WRITE:
			for (byte = mem; byte < mem + IDLE_BYTES; byte += PAGE)
				(void)*byte;
			touch(mem, 0, IDLE_PAGES, 1);
			break;
		case SCATTERED:
			for (i = 0; i < IDLE_PAGES; i++)
				touch(mem, i * 1031 % IDLE_PAGES, 1, 1);
			break;
		case OTHER_MAPPING:
			touch(mem, 0, IDLE_PAGES, 1);
			touch(other, 0, IDLE_PAGES, 1);
			touch(mem, 0, IDLE_PAGES, 1);
			break;
		default:
			touch(mem, 0, IDLE_PAGES, 1);
		}
		taken[pattern] = faults() - begin;
		munmap(mem, IDLE_BYTES);
		munmap(other, IDLE_BYTES);
		if (lmt_punch(fd, 0, IDLE_BYTES))
			return false;
	}
	return true;
}

COST_TEST(idle_faults_as_memfd_does)
{
	long with[PATTERNS], without[PATTERNS];
	int memfd = memfd_create("yardstick", MFD_CLOEXEC);
	int i;

	self->fd = lmt_region(IDLE_BYTES);
	ASSERT_LE(0, self->fd);
	ASSERT_LE(0, memfd);
	ASSERT_EQ(0, ftruncate(memfd, IDLE_BYTES));
	ASSERT_TRUE(count_faults(memfd, without));
	ASSERT_TRUE(count_faults(self->fd, with));
	for (i = 0; i < PATTERNS; i++) {
		printf("# %s: %ld faults, memfd %ld\n", pattern_names[i], with[i], without[i]);
		EXPECT_LE(with[i], without[i]);
	}
	EXPECT_EQ(0, with[REWRITE]);
	EXPECT_EQ(0, lmt_stats(self->fd).write_faults);
	EXPECT_EQ(0, lmt_stats(self->fd).dirtied_pages);
}

/* Tracked once and stopped: a page that was protected is opened once, then never again. */
COST_TEST(idle_again_after_stop)
{
	uint64_t bitmap[IDLE_PAGES / 64], write_faults;
	unsigned char *mem;
	long begin;

	self->fd = lmt_region(IDLE_BYTES);
	ASSERT_LE(0, self->fd);
	mem = lmt_map(self->fd, IDLE_BYTES);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, IDLE_PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(IDLE_PAGES, lmt_dirty(self->fd, CLEAR, 0, IDLE_PAGES, bitmap));
	touch(mem, 0, 16, 2);
	ASSERT_EQ(0, lmt_stop(self->fd));
	write_faults = lmt_stats(self->fd).write_faults;
	EXPECT_EQ(16, write_faults);

	begin = faults();
	touch(mem, 0, IDLE_PAGES, 3);
	EXPECT_GE((long)IDLE_PAGES, faults() - begin);
	begin = faults();
	touch(mem, 0, IDLE_PAGES, 4);
	EXPECT_EQ(0, faults() - begin);
	EXPECT_EQ(write_faults, lmt_stats(self->fd).write_faults);
}

/* While tracked, a page costs one write fault between two harvests, whoever writes how often. */
COST_TEST(one_fault_per_page_and_harvest)
{
	uint64_t bitmap[IDLE_PAGES / 64];
	unsigned char *mem;
	int round;

	self->fd = lmt_region(IDLE_BYTES);
	ASSERT_LE(0, self->fd);
	mem = lmt_map(self->fd, IDLE_BYTES);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, IDLE_PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(IDLE_PAGES, lmt_dirty(self->fd, CLEAR, 0, IDLE_PAGES, bitmap));
	for (round = 1; round <= 3; round++) {
		touch(mem, 100, 1000, 2);
		touch(mem, 100, 1000, 3);
		EXPECT_EQ(round * 1000, lmt_stats(self->fd).write_faults);
		EXPECT_EQ(round * 1000, lmt_stats(self->fd).dirtied_pages);
		ASSERT_EQ(1000, lmt_dirty(self->fd, CLEAR, 0, IDLE_PAGES, bitmap));
		ASSERT_EQ(0, lmt_dirty(self->fd, CLEAR, 0, IDLE_PAGES, bitmap));
	}
}

TEST_HARNESS_MAIN
