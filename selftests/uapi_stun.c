// SPDX-License-Identifier: GPL-2.0
/*
 * The ceiling on dirty pages: who may set it, who is delayed and who is not, what ends a delay,
 * what the figures say. A thread that is to sleep long has a ceiling of one page per second and
 * delays of 100 ms; nothing here depends on how late a timer is.
 */
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "kselftest_harness.h"
#include "uapi_common.h"

#define PAGES		(16 * LMTRACK_CHUNK_PAGES)
#define BYTES		(PAGES * PAGE)
#define WORDS		(PAGES / 64)
#define MAX_US		LMTRACK_STUN_DELAY_MAX_US
#define MAX_NS		(MAX_US * 1000ULL)
#define THREADS_MAX	1024	/* accounts, see kmod/stun.c */

FIXTURE(stun) {
	int fd;
	unsigned char *mem;
	uint64_t bitmap[WORDS];
};

/* All pages exist, are clean and protected. */
FIXTURE_SETUP(stun)
{
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	touch(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(PAGES, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
}

FIXTURE_TEARDOWN(stun)
{
	munmap(self->mem, BYTES);
	close(self->fd);
}

#define STUN_TEST(name) TEST_F_TIMEOUT(stun, name, TEST_SECONDS)

static long stun_set(int fd, uint64_t rate, uint32_t max_delay_us)
{
	struct lmtrack_stun_set set = {
		.size = sizeof(set), .rate = rate, .max_delay_us = max_delay_us,
	};

	return lmt_ioctl(fd, LMTRACK_STUN_SET, &set);
}

static struct lmtrack_stun_stats stun_stats(int fd, struct lmtrack_stun_thread *threads,
					    uint32_t count)
{
	struct lmtrack_stun_stats stats = {
		.size = sizeof(stats), .threads = (uintptr_t)threads, .thread_count = count,
	};

	if (lmt_ioctl(fd, LMTRACK_STUN_STATS, &stats))
		memset(&stats, 0xff, sizeof(stats));
	return stats;
}

static uint64_t histogram_sum(const struct lmtrack_stun_stats *stats)
{
	uint64_t sum = 0;
	int i;

	for (i = 0; i < LMTRACK_STUN_BUCKETS; i++)
		sum += stats->histogram[i];
	return sum;
}

/* ---- Writers ---- */

/**
 * struct writer - a thread that writes one byte of each of its pages
 * @tid:	known once it runs
 * @done:	pages written
 */
struct writer {
	pthread_t thread;
	unsigned char *mem;
	size_t first;
	size_t pages;
	const char *name;
	_Atomic pid_t tid;
	_Atomic size_t done;
};

static void *writer_run(void *arg)
{
	struct writer *writer = arg;
	size_t i;

	if (writer->name)
		prctl(PR_SET_NAME, writer->name);
	writer->tid = gettid();
	for (i = 0; i < writer->pages; i++) {
		touch(writer->mem, writer->first + i, 1, 2);
		writer->done = i + 1;
	}
	return NULL;
}

static int writer_start(struct writer *writer, unsigned char *mem, size_t first, size_t pages)
{
	writer->mem = mem;
	writer->first = first;
	writer->pages = pages;
	writer->tid = 0;
	writer->done = 0;
	return pthread_create(&writer->thread, NULL, writer_run, writer);
}

/* The state letter of a thread, or 0 if there is none. */
static char thread_state(pid_t pid, pid_t tid)
{
	char path[64], text[256] = "", *paren;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof(text) - 1) < 0)
		text[0] = 0;
	close(fd);
	paren = strrchr(text, ')');
	return paren ? paren[2] : 0;
}

/* In a sleep that signals do not end. */
static bool thread_sleeps(pid_t pid, pid_t tid)
{
	char state = thread_state(pid, tid);

	return state == 'D' || state == 'I';
}

/* A thread that dirties one page and sleeps for it; true once it does, false if it is over. */
static bool sleeper_start(struct writer *sleeper, unsigned char *mem, size_t page)
{
	double end = lmt_seconds() + 10;

	if (writer_start(sleeper, mem, page, 1))
		return false;
	while (!sleeper->done && lmt_seconds() < end)
		if (sleeper->tid && thread_sleeps(getpid(), sleeper->tid))
			return true;
	return false;
}

/* ---- Requests ---- */

STUN_TEST(settings)
{
	struct lmtrack_stun_set set = { .size = sizeof(set) };
	int other = lmt_reopen(self->fd), readonly = region_open(self->fd, O_RDONLY);
	unsigned int bit;

	ASSERT_LE(0, other);
	ASSERT_LE(0, readonly);
	EXPECT_EQ(0, stun_set(self->fd, 1000, 0));
	EXPECT_EQ(-EPERM, stun_set(other, 1000, 0));
	EXPECT_EQ(-EPERM, stun_set(readonly, 0, 0));
	EXPECT_EQ(1000, stun_stats(other, NULL, 0).rate);

	EXPECT_EQ(0, stun_set(self->fd, LMTRACK_STUN_RATE_MAX, MAX_US));
	EXPECT_EQ(LMTRACK_STUN_RATE_MAX, stun_stats(self->fd, NULL, 0).rate);
	EXPECT_EQ(-EINVAL, stun_set(self->fd, LMTRACK_STUN_RATE_MAX + 1, 0));
	EXPECT_EQ(-EINVAL, stun_set(self->fd, ~0ULL, 0));
	EXPECT_EQ(-EINVAL, stun_set(self->fd, 1, MAX_US + 1));
	EXPECT_EQ(-EINVAL, stun_set(self->fd, 1, ~0U));
	set.rate = 5;
	set.burst = LMTRACK_STUN_BURST_MAX + 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	set.burst = LMTRACK_STUN_BURST_MAX;
	EXPECT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	set.floor = LMTRACK_STUN_RATE_MAX + 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	set.floor = 0;
	set.reserved = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	set.reserved = 0;
	for (bit = 0; bit < 32; bit++) {
		set.flags = 1U << bit;
		EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	}
	/* What failed has changed nothing. */
	EXPECT_EQ(5, stun_stats(self->fd, NULL, 0).rate);

	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(-EINVAL, stun_set(self->fd, 1000, 0));
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).rate);
}

STUN_TEST(floor_raises_the_rate)
{
	struct lmtrack_stun_set set = { .size = sizeof(set), .rate = 3, .floor = 500 };

	EXPECT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	EXPECT_EQ(500, set.rate);
	EXPECT_EQ(500, stun_stats(self->fd, NULL, 0).rate);
	set.rate = 501;
	EXPECT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	EXPECT_EQ(501, set.rate);
	/* No ceiling is no ceiling. */
	set.rate = 0;
	EXPECT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	EXPECT_EQ(0, set.rate);
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).rate);
}

STUN_TEST(stats_arguments)
{
	struct lmtrack_stun_thread threads[2];
	struct lmtrack_stun_stats stats = { .size = sizeof(stats), .reserved = 1 };
	int fresh = lmt_region(PAGE);

	ASSERT_LE(0, fresh);
	touch(self->mem, 0, 1, 2);
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.reserved = 0;
	stats.flags = 1;
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.flags = 0;
	stats.thread_count = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.threads = (uintptr_t)threads;
	stats.thread_count = 0;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.thread_count = 1;
	stats.threads = 8;
	EXPECT_EQ(-EFAULT, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.threads = 1ULL << 63;
	stats.thread_count = ~0U;
	EXPECT_EQ(-EFAULT, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	stats.threads = (uintptr_t)threads;
	stats.thread_count = 2;
	EXPECT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats));
	EXPECT_EQ(1, stats.thread_count);
	EXPECT_EQ(1, stats.threads_known);

	/* A region that was never tracked. */
	stats = stun_stats(fresh, threads, 2);
	EXPECT_EQ(0, stats.thread_count);
	EXPECT_EQ(0, stats.threads_known);
	EXPECT_EQ(0, stats.stuns);
}

/* ---- Who is delayed ---- */

STUN_TEST(no_ceiling_no_delay)
{
	struct lmtrack_stun_stats stats;

	touch(self->mem, 0, PAGES, 2);
	stats = stun_stats(self->fd, NULL, 0);
	EXPECT_EQ(0, stats.stuns);
	EXPECT_EQ(0, stats.total_ns);
	EXPECT_EQ(PAGES, lmt_stats(self->fd).write_faults);
	EXPECT_LT(0, lmt_stats(self->fd).fault_ns);
}

/* However busy the machine is, never faster than this. */
STUN_TEST(ceiling_is_kept)
{
	double begin, seconds;

	ASSERT_EQ(0, stun_set(self->fd, 2000, MAX_US));
	begin = lmt_seconds();
	touch(self->mem, 0, 1000, 2);
	seconds = lmt_seconds() - begin;
	EXPECT_LE(0.49, seconds);
	EXPECT_LT(0, stun_stats(self->fd, NULL, 0).stuns);

	/* The burst is saved up in times with fewer pages, and spent at once. */
	pause_ms(500);
	begin = lmt_seconds();
	touch(self->mem, 2000, 21, 2);
	seconds = lmt_seconds() - begin;
	touch(self->mem, 3000, 500, 2);
	EXPECT_LE(0.24, lmt_seconds() - begin);
	printf("# 21 pages after a pause: %.1f ms\n", seconds * 1e3);
}

STUN_TEST(burst)
{
	struct lmtrack_stun_set set = {
		.size = sizeof(set), .rate = 1000, .burst = 300, .max_delay_us = MAX_US,
	};
	uint64_t stuns;

	ASSERT_EQ(0, lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set));
	/* A setting brings no burst. */
	touch(self->mem, 0, 100, 2);
	EXPECT_LT(0, stun_stats(self->fd, NULL, 0).stuns);
	/* It takes 300 ms to fill. */
	pause_ms(400);
	stuns = stun_stats(self->fd, NULL, 0).stuns;
	touch(self->mem, 100, 299, 2);
	EXPECT_EQ(stuns, stun_stats(self->fd, NULL, 0).stuns);
	/* Filled to the brim, and no further, after a second. */
	pause_ms(1000);
	stuns = stun_stats(self->fd, NULL, 0).stuns;
	touch(self->mem, 1000, 2000, 2);
	EXPECT_LT(stuns, stun_stats(self->fd, NULL, 0).stuns);
}

/* What is in excess is not carried further than the longest delay. */
STUN_TEST(debt_is_bounded)
{
	struct lmtrack_stun_stats stats;
	struct writer writers[8];
	unsigned int i;

	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 100, 3));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		pthread_join(writers[i].thread, NULL);
	stats = stun_stats(self->fd, NULL, 0);
	/* A thread that comes to its delay late has less of it, or none. */
	EXPECT_LT(0, stats.stuns);
	EXPECT_GE(24, stats.stuns);
	EXPECT_GE(stats.stuns * MAX_NS, stats.requested_ns);
	EXPECT_EQ(0, stats.failed);
}

STUN_TEST(default_delay)
{
	struct lmtrack_stun_stats stats;

	ASSERT_EQ(0, stun_set(self->fd, 1, 0));
	touch(self->mem, 0, 10, 2);
	stats = stun_stats(self->fd, NULL, 0);
	EXPECT_LT(0, stats.stuns);
	EXPECT_GE(stats.stuns * LMTRACK_STUN_DELAY_DEFAULT_US * 1000, stats.requested_ns);
}

STUN_TEST(readers_and_rewriters_run_free)
{
	volatile unsigned char *byte;
	unsigned int pass;

	touch(self->mem, 0, 100, 2);
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	for (pass = 0; pass < 100; pass++)
		touch(self->mem, 0, 100, pass);
	for (byte = self->mem; byte < self->mem + BYTES; byte += PAGE)
		(void)*byte;
	/* Reported but not cleared: still dirty. */
	ASSERT_EQ(100, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
	touch(self->mem, 0, 100, 3);
	/* Faults on pages that are dirty: a fresh mapping has no entries. */
	ASSERT_EQ(0, munmap(self->mem, BYTES));
	ASSERT_EQ(self->mem, mmap(self->mem, BYTES, PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_FIXED, self->fd, 0));
	touch(self->mem, 0, 100, 4);
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).stuns);
	EXPECT_EQ(200, lmt_stats(self->fd).write_faults);
}

/* Who writes another's memory is the one who is delayed. */
STUN_TEST(process_vm_writev_delays_the_writer)
{
	struct lmtrack_stun_thread threads[2];
	struct lmtrack_stun_stats stats;
	char bytes[4 * PAGE] = { 0 };
	struct iovec local = { bytes, sizeof(bytes) };
	struct iovec remote = { self->mem, sizeof(bytes) };
	pid_t target, parent = getpid();
	int try;

	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	target = fork();
	if (!target) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pause();
		_exit(0);
	}
	for (try = 1; try <= 10; try++) {
		ASSERT_EQ(sizeof(bytes), process_vm_writev(target, &local, 1, &remote, 1, 0));
		stats = stun_stats(self->fd, threads, 2);
		EXPECT_GE(try, stats.stuns);
		EXPECT_EQ(1, stats.thread_count);
		EXPECT_EQ(parent, threads[0].pid);
		EXPECT_EQ(4 * try, threads[0].write_faults);
		ASSERT_EQ(4, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	}
	EXPECT_LT(0, stats.stuns);
	kill(target, SIGKILL);
	EXPECT_EQ(-SIGKILL, child_status(target));
}

/* read(2) into the region dirties many pages on one way to user mode: one delay at its end. */
STUN_TEST(many_pages_in_one_call)
{
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	struct lmtrack_stun_stats stats;
	int try;

	ASSERT_LE(0, zero);
	ASSERT_EQ(0, stun_set(self->fd, 1000, 20000));
	for (try = 1; try <= 10; try++) {
		ASSERT_EQ(256 * PAGE, read(zero, self->mem, 256 * PAGE));
		stats = stun_stats(self->fd, NULL, 0);
		EXPECT_GE(try, stats.stuns);
		EXPECT_GE(try * 20000 * 1000, stats.requested_ns);
		ASSERT_EQ(256, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	}
	EXPECT_LT(0, stats.stuns);
}

/* ---- What ends a delay ---- */

/*
 * A delay of 100 ms that was cut short took less than it should have; one that was slept to
 * its end never did. On a busy machine the sleeper may be through before we get to wake it:
 * try again.
 */
#define WOKEN_BY(self, action) ({						\
	int _figures = lmt_reopen((self)->fd), _try;				\
	struct lmtrack_stun_stats _stats = { 0 };				\
	bool _woken = false;							\
										\
	for (_try = 0; !_woken && _try < 50; _try++) {				\
		struct writer _sleeper = { 0 };					\
		bool _asleep;							\
										\
		if ((self)->fd < 0)						\
			(self)->fd = lmt_reopen(_figures);			\
		if (region_info(_figures).state == LMTRACK_IDLE)		\
			lmt_start((self)->fd, 0, NULL);				\
		lmt_dirty((self)->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES,		\
			  (self)->bitmap);					\
		stun_set((self)->fd, 1, MAX_US);				\
		_stats = stun_stats(_figures, NULL, 0);				\
		_asleep = sleeper_start(&_sleeper, (self)->mem, 5);		\
		action;								\
		pthread_join(_sleeper.thread, NULL);				\
		if (_asleep) {							\
			uint64_t _asked = _stats.requested_ns, _took = _stats.total_ns; \
										\
			_stats = stun_stats(_figures, NULL, 0);			\
			_woken = _stats.requested_ns - _asked >			\
				 _stats.total_ns - _took + 1000000;		\
		}								\
	}									\
	close(_figures);							\
	_woken;									\
})

STUN_TEST(setting_off_wakes)
{
	EXPECT_TRUE(WOKEN_BY(self, EXPECT_EQ(0, stun_set(self->fd, 0, 0))));
}

STUN_TEST(another_setting_wakes)
{
	EXPECT_TRUE(WOKEN_BY(self, EXPECT_EQ(0, stun_set(self->fd, 1, MAX_US))));
}

STUN_TEST(stop_wakes)
{
	EXPECT_TRUE(WOKEN_BY(self, EXPECT_EQ(0, lmt_stop(self->fd))));
}

STUN_TEST(close_wakes)
{
	/* The mapping keeps the file it was made with: track with another. */
	int other = lmt_reopen(self->fd);

	ASSERT_LE(0, other);
	ASSERT_EQ(0, lmt_stop(self->fd));
	close(self->fd);
	self->fd = other;
	EXPECT_TRUE(WOKEN_BY(self, { close(self->fd); self->fd = -1; }));
	if (self->fd < 0)
		self->fd = lmt_region(PAGE);
}

static int stream_of(int fd)
{
	struct lmtrack_stream_create create = { .size = sizeof(create) };
	struct lmtrack_stream_add_region add = { .size = sizeof(add), .fd = fd };
	int device = device_open();
	int stream = lmt_ioctl(device, LMTRACK_STREAM_CREATE, &create);

	close(device);
	if (stream >= 0 && lmt_ioctl(stream, LMTRACK_STREAM_ADD_REGION, &add))
		return -1;
	return stream;
}

STUN_TEST(stream_cancel_wakes)
{
	struct lmtrack_stream_cancel cancel = { .size = sizeof(cancel) };
	int stream = stream_of(self->fd);

	ASSERT_LE(0, stream);
	EXPECT_TRUE(WOKEN_BY(self, {
		EXPECT_EQ(0, lmt_ioctl(stream, LMTRACK_STREAM_CANCEL, &cancel));
		EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).rate);
		close(stream);
		stream = stream_of(self->fd);
	}));
	close(stream);
}

STUN_TEST(stream_close_wakes)
{
	int stream = stream_of(self->fd);

	ASSERT_LE(0, stream);
	EXPECT_TRUE(WOKEN_BY(self, {
		close(stream);
		EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).rate);
		stream = stream_of(self->fd);
	}));
	close(stream);
}

/* A stream that was given another open file has no say. */
STUN_TEST(stream_of_another_file)
{
	int other = lmt_reopen(self->fd), stream;

	ASSERT_LE(0, other);
	stream = stream_of(other);
	ASSERT_LE(0, stream);
	ASSERT_EQ(0, stun_set(self->fd, 1000, 0));
	close(stream);
	EXPECT_EQ(1000, stun_stats(self->fd, NULL, 0).rate);
}

/* All of them: who was woken has no more delays, either. */
STUN_TEST(off_wakes_all)
{
	struct writer writers[16];
	unsigned int i;
	double begin;

	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 500, 500));
	ASSERT_TRUE(EVENTUALLY(30, stun_stats(self->fd, NULL, 0).stuns >= 16));
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	begin = lmt_seconds();
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		pthread_join(writers[i].thread, NULL);
	/* It would have been 50 seconds. */
	EXPECT_GT(25, lmt_seconds() - begin);
}

/* A child process with a sleeper, as soon as it sleeps; it may be over. */
static pid_t sleeping_child(unsigned char *mem, bool *asleep)
{
	double end = lmt_seconds() + 10;
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			touch(mem, 7, 1, 9);
	}
	*asleep = false;
	while (!*asleep && lmt_seconds() < end)
		*asleep = thread_sleeps(pid, pid);
	return pid;
}

STUN_TEST(sigkill_ends_a_delay)
{
	struct lmtrack_stun_stats before, after;
	bool woken = false, asleep;
	pid_t pid;
	int try;

	for (try = 0; !woken && try < 50; try++) {
		lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap);
		before = stun_stats(self->fd, NULL, 0);
		ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
		pid = sleeping_child(self->mem, &asleep);
		kill(pid, SIGKILL);
		EXPECT_EQ(-SIGKILL, child_status(pid));
		after = stun_stats(self->fd, NULL, 0);
		woken = asleep && after.requested_ns - before.requested_ns >
				  after.total_ns - before.total_ns + 1000000;
	}
	EXPECT_TRUE(woken);
}

static void *exec_true(void *arg)
{
	char *const argv[] = { "true", NULL };

	(void)arg;
	execv("/bin/true", argv);
	_exit(1);
}

/* exec and the end of the process kill the other threads, the sleepers too. */
STUN_TEST(exec_and_exit_beside_sleepers)
{
	struct writer writers[8];
	pthread_t thread;
	unsigned int i;
	int how;
	pid_t pid;

	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	for (how = 0; how < 3; how++) {
		pid = fork();
		if (!pid) {
			for (i = 0; i < ARRAY_SIZE(writers); i++)
				writer_start(&writers[i], self->mem, i * 1000, 1000);
			while (writers[7].done < 2)
				pause_ms(1);
			if (how == 0)
				_exit(0);
			if (how == 1)
				exec_true(NULL);
			/* By a thread that is not the first: it takes over the first one's id. */
			pthread_create(&thread, NULL, exec_true, NULL);
			pause();
		}
		EXPECT_EQ(0, child_status(pid));
		ASSERT_LE(0, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	}
	EXPECT_LT(0, stun_stats(self->fd, NULL, 0).stuns);
}

static _Atomic int signals;

static void on_signal(int signal)
{
	(void)signal;
	signals++;
}

/* Other signals are served after the delay; none is lost, and neither is the write. */
STUN_TEST(signals_while_asleep)
{
	struct writer writer;
	struct sigaction action = { .sa_handler = on_signal };
	int sent = 0;

	sigaction(SIGUSR1, &action, NULL);
	ASSERT_EQ(0, stun_set(self->fd, 1, 20000));
	ASSERT_EQ(0, writer_start(&writer, self->mem, 0, 20));
	while (writer.done < 19) {
		if (signals == sent && !pthread_kill(writer.thread, SIGUSR1))
			sent++;
		pause_ms(1);
	}
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	pthread_join(writer.thread, NULL);
	EXPECT_LT(0, signals);
	EXPECT_EQ(20, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap));
}

/* ---- Beside sleepers ---- */

static int compare_doubles(const void *a, const void *b)
{
	double difference = *(const double *)a - *(const double *)b;

	return difference < 0 ? -1 : difference > 0;
}

static double median(double *values, size_t count)
{
	qsort(values, count, sizeof(*values), compare_doubles);
	return values[count / 2];
}

enum { MMAP, MUNMAP, FORK, CHANGES };

/* How long changes of the address space take: medians, in seconds. */
static void time_changes(struct __test_metadata *_metadata, int fd, double medians[CHANGES])
{
	double took[CHANGES][30];
	double begin;
	void *mem;
	pid_t pid;

	for (unsigned int i = 0; i < ARRAY_SIZE(took[0]); i++) {
		begin = lmt_seconds();
		mem = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		took[MMAP][i] = lmt_seconds() - begin;
		ASSERT_NE(MAP_FAILED, mem);
		begin = lmt_seconds();
		munmap(mem, BYTES);
		took[MUNMAP][i] = lmt_seconds() - begin;
		begin = lmt_seconds();
		pid = fork();
		if (!pid)
			_exit(0);
		took[FORK][i] = lmt_seconds() - begin;
		EXPECT_EQ(0, child_status(pid));
	}
	for (unsigned int i = 0; i < CHANGES; i++)
		medians[i] = median(took[i], ARRAY_SIZE(took[i]));
}

/*
 * With a lock held by one of eight sleepers, half of these would take some 100 ms longer than
 * without any.
 */
STUN_TEST(address_space_is_not_held)
{
	static const char *const names[CHANGES] = { "mmap", "munmap", "fork" };
	double without[CHANGES], with[CHANGES];
	struct writer writers[8];
	unsigned int i;

	time_changes(_metadata, self->fd, without);
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 1000, 1000));
	ASSERT_TRUE(EVENTUALLY(30, stun_stats(self->fd, NULL, 0).stuns >= 8));
	time_changes(_metadata, self->fd, with);
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		pthread_join(writers[i].thread, NULL);
	for (i = 0; i < CHANGES; i++) {
		printf("# %s: %.2f ms, %.2f without sleepers\n", names[i], with[i] * 1e3, without[i] * 1e3);
		EXPECT_GT(without[i] + 0.05, with[i]);
	}
}

/* Harvests, settings and figures from several threads while others dirty pages and sleep. */
static void *harvester_run(void *arg)
{
	int fd = *(int *)arg;
	uint64_t *bitmap = calloc(WORDS, 8);
	double end = lmt_seconds() + 3;

	while (lmt_seconds() < end)
		lmt_dirty(fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap);
	free(bitmap);
	return NULL;
}

static void *setter_run(void *arg)
{
	static const uint64_t rates[] = { 1, 100, 0, 50000, 3, LMTRACK_STUN_RATE_MAX };
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
	double end = lmt_seconds() + 3;
	int fd = *(int *)arg, i = 0;

	while (lmt_seconds() < end) {
		stun_set(fd, rates[i % ARRAY_SIZE(rates)], i % 3 ? MAX_US : 100);
		stun_stats(fd, threads, LMTRACK_STUN_THREADS);
		i++;
	}
	stun_set(fd, 0, 0);
	return NULL;
}

/* A page may be harvested while the thread sleeps that is about to write it. */
STUN_TEST(writers_get_on_while_harvests_are_short)
{
	struct writer writers[4];
	bool done = false;
	double end = lmt_seconds() + 60;
	unsigned int i;

	ASSERT_EQ(0, stun_set(self->fd, 1, 50000));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 1000, 10));
	while (!done && lmt_seconds() < end) {
		ASSERT_LE(0, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
		for (i = 0, done = true; i < ARRAY_SIZE(writers); i++)
			done &= writers[i].done == 10;
	}
	EXPECT_TRUE(done);
	/* Two for each write; more where a page was harvested just when it was to be written. */
	EXPECT_GE(4 * 40, stun_stats(self->fd, NULL, 0).stuns);
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		pthread_join(writers[i].thread, NULL);
}

/* One store whose bytes lie in two pages; it gets on when both are writable at once. */
static void *straddler_run(void *arg)
{
	struct writer *writer = arg;
	size_t i;

	for (i = 0; i < writer->pages; i++) {
		unsigned char *end = writer->mem + (writer->first + 2 * i + 1) * PAGE;

		*(volatile uint64_t *)(end - 4) = ~0ULL;
		writer->done = i + 1;
	}
	return NULL;
}

STUN_TEST(a_store_to_two_pages_gets_on_while_harvests_are_short)
{
	struct writer writer = { .mem = self->mem, .first = 0, .pages = 10 };
	double end = lmt_seconds() + 60;
	uint64_t faults, stuns;

	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	ASSERT_EQ(0, pthread_create(&writer.thread, NULL, straddler_run, &writer));
	while (writer.done < writer.pages && lmt_seconds() < end)
		ASSERT_LE(0, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	faults = lmt_stats(self->fd).write_faults;
	stuns = stun_stats(self->fd, NULL, 0).stuns;
	printf("# %zu stores, %llu faults, %llu delays\n", writer.done,
	       (unsigned long long)faults, (unsigned long long)stuns);
	EXPECT_EQ(writer.pages, writer.done);
	/* Two for each page, and two more each time that it has faulted 64 times. */
	EXPECT_GE(2 * 2 * writer.pages + 2 * faults / 64, stuns);
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	pthread_join(writer.thread, NULL);
}

STUN_TEST(all_at_once)
{
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
	pthread_t harvester, setters[2];
	struct lmtrack_stun_stats stats;
	uint64_t faults = 0, ns = 0, stuns = 0, slept = 0;
	struct writer writers[6];
	unsigned int i;

	ASSERT_EQ(0, pthread_create(&harvester, NULL, harvester_run, &self->fd));
	ASSERT_EQ(0, pthread_create(&setters[0], NULL, setter_run, &self->fd));
	ASSERT_EQ(0, pthread_create(&setters[1], NULL, setter_run, &self->fd));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 1000, 1000));
	pthread_join(setters[0], NULL);
	pthread_join(setters[1], NULL);
	pthread_join(harvester, NULL);
	ASSERT_EQ(0, stun_set(self->fd, 0, 0));
	for (i = 0; i < ARRAY_SIZE(writers); i++)
		pthread_join(writers[i].thread, NULL);

	stats = stun_stats(self->fd, threads, LMTRACK_STUN_THREADS);
	ASSERT_EQ(ARRAY_SIZE(writers), stats.thread_count);
	EXPECT_EQ(ARRAY_SIZE(writers), stats.threads_known);
	for (i = 0; i < stats.thread_count; i++) {
		/* A page that was harvested before the write itself takes another fault. */
		EXPECT_LE(1000, threads[i].write_faults);
		EXPECT_LE(threads[i].longest_ns, stats.longest_ns);
		EXPECT_LE(threads[i].longest_ns, threads[i].stun_ns);
		faults += threads[i].write_faults;
		ns += threads[i].fault_ns;
		stuns += threads[i].stuns;
		slept += threads[i].stun_ns;
	}
	EXPECT_EQ(lmt_stats(self->fd).write_faults, faults);
	EXPECT_EQ(lmt_stats(self->fd).fault_ns, ns);
	EXPECT_EQ(stats.stuns, stuns);
	EXPECT_EQ(stats.total_ns, slept);
	EXPECT_EQ(stats.stuns, histogram_sum(&stats));
	EXPECT_LE(stats.longest_ns, stats.total_ns);
	EXPECT_EQ(0, stats.failed);
}

/* ---- Figures ---- */

STUN_TEST(figures_add_up)
{
	struct lmtrack_stun_stats stats;
	uint64_t least = 0, most = 0;
	int i;

	ASSERT_EQ(0, stun_set(self->fd, 100, MAX_US));
	touch(self->mem, 0, 30, 2);
	stats = stun_stats(self->fd, NULL, 0);
	EXPECT_LT(0, stats.stuns);
	EXPECT_EQ(stats.stuns, histogram_sum(&stats));
	/* Timers are late, never early. */
	EXPECT_LE(stats.requested_ns, stats.total_ns);
	EXPECT_LE(stats.total_ns / stats.stuns, stats.longest_ns);
	for (i = 0; i < LMTRACK_STUN_BUCKETS; i++) {
		least += i ? stats.histogram[i] * (1000ULL << (i - 1)) : 0;
		most += stats.histogram[i] * (1000ULL << i);
	}
	EXPECT_LE(least, stats.total_ns);
	EXPECT_GE(most, stats.total_ns);
	EXPECT_LE(1, stats.threads_known);

	/* They stay when tracking ends, and begin anew with it. */
	ASSERT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(stats.stuns, stun_stats(self->fd, NULL, 0).stuns);
	EXPECT_EQ(stats.total_ns, stun_stats(self->fd, NULL, 0).total_ns);
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).rate);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).stuns);
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).threads_known);
	EXPECT_EQ(30, lmt_stats(self->fd).write_faults);
}

static const struct lmtrack_stun_thread *by_pid(const struct lmtrack_stun_thread *threads,
						unsigned int count, pid_t pid)
{
	unsigned int i;

	for (i = 0; i < count; i++)
		if ((pid_t)threads[i].pid == pid)
			return &threads[i];
	return NULL;
}

STUN_TEST(threads)
{
	static const char *const names[] = { "CPU 0/KVM", "CPU 1/KVM", "worker" };
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
	struct lmtrack_stun_stats stats;
	struct writer writers[3];
	unsigned int i;

	for (i = 0; i < 3; i++) {
		writers[i].name = names[i];
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 1000, (i + 1) * 100));
		pthread_join(writers[i].thread, NULL);
	}
	/* Also when they are gone, and tracking has ended. */
	ASSERT_EQ(0, lmt_stop(self->fd));
	stats = stun_stats(self->fd, threads, LMTRACK_STUN_THREADS);
	EXPECT_EQ(3, stats.threads_known);
	ASSERT_EQ(3, stats.thread_count);
	for (i = 0; i < 3; i++) {
		const struct lmtrack_stun_thread *thread = by_pid(threads, 3, writers[i].tid);

		ASSERT_NE(NULL, thread);
		EXPECT_STREQ(names[i], thread->comm);
		EXPECT_EQ((i + 1) * 100, thread->write_faults);
		EXPECT_LT(0, thread->fault_ns);
		EXPECT_EQ(0, thread->stuns);
	}
	/* The worst first. */
	EXPECT_GE(threads[0].fault_ns, threads[1].fault_ns);
	EXPECT_GE(threads[1].fault_ns, threads[2].fault_ns);
	threads[1].pid = ~0U;
	stats = stun_stats(self->fd, threads, 1);
	EXPECT_EQ(1, stats.thread_count);
	EXPECT_EQ(3, stats.threads_known);
	EXPECT_EQ(~0U, threads[1].pid);
}

STUN_TEST(more_threads_than_asked_for)
{
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS + 4];
	struct lmtrack_stun_stats stats;
	struct writer writers[20] = { 0 };
	unsigned int i, delayed = 0;

	for (i = 0; i < 20; i++) {
		/* The last four are delayed, and so the worst. */
		if (i == 16)
			ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
		ASSERT_EQ(0, writer_start(&writers[i], self->mem, i * 10, 4));
		pthread_join(writers[i].thread, NULL);
	}
	stats = stun_stats(self->fd, threads, ARRAY_SIZE(threads));
	EXPECT_EQ(20, stats.threads_known);
	ASSERT_EQ(LMTRACK_STUN_THREADS, stats.thread_count);
	for (i = 0; i < 4; i++)
		delayed += !!by_pid(threads, 4, writers[16 + i].tid);
	EXPECT_EQ(4, delayed);
	for (i = 1; i < LMTRACK_STUN_THREADS; i++)
		EXPECT_GE(threads[i - 1].fault_ns + threads[i - 1].stun_ns,
			  threads[i].fault_ns + threads[i].stun_ns);
}

/* One after the other, more than there is room for: those that are gone make room. */
STUN_TEST(threads_that_are_gone_make_room)
{
	struct lmtrack_stun_thread threads[LMTRACK_STUN_THREADS];
	struct lmtrack_stun_stats stats;
	struct writer writer = { 0 };
	unsigned int i;

	for (i = 0; i < THREADS_MAX + 100; i++) {
		ASSERT_EQ(0, writer_start(&writer, self->mem, i, 1));
		pthread_join(writer.thread, NULL);
	}
	stats = stun_stats(self->fd, NULL, 0);
	EXPECT_EQ(THREADS_MAX, stats.threads_known);
	EXPECT_EQ(THREADS_MAX + 100, lmt_stats(self->fd).write_faults);

	/* A new one is delayed as ever, and known. */
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	ASSERT_EQ(0, writer_start(&writer, self->mem, 4000, 2));
	pthread_join(writer.thread, NULL);
	stats = stun_stats(self->fd, threads, LMTRACK_STUN_THREADS);
	EXPECT_EQ(THREADS_MAX, stats.threads_known);
	EXPECT_LT(0, stats.stuns);
	EXPECT_EQ(writer.tid, threads[0].pid);
	EXPECT_EQ(2, threads[0].write_faults);
	EXPECT_EQ(0, stats.failed);
}

static pthread_barrier_t all_have_written;

static void *crowd_run(void *arg)
{
	touch(arg, 0, 1, 2);
	pthread_barrier_wait(&all_have_written);
	pthread_barrier_wait(&all_have_written);
	return NULL;
}

/* All alive: the next one has no account. It is not delayed, and that is said. */
STUN_TEST(too_many_threads_alive)
{
	static pthread_t crowd[THREADS_MAX];
	struct lmtrack_stun_stats stats;
	struct writer writer = { 0 };
	pthread_attr_t attr;
	unsigned int i;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 << 10);
	pthread_barrier_init(&all_have_written, NULL, THREADS_MAX + 1);
	for (i = 0; i < THREADS_MAX; i++)
		ASSERT_EQ(0, pthread_create(&crowd[i], &attr, crowd_run, self->mem + i * PAGE));
	pthread_barrier_wait(&all_have_written);
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	ASSERT_EQ(0, writer_start(&writer, self->mem, 4000, 10));
	pthread_join(writer.thread, NULL);
	stats = stun_stats(self->fd, NULL, 0);
	EXPECT_EQ(THREADS_MAX, stats.threads_known);
	EXPECT_EQ(10, stats.failed);
	EXPECT_EQ(0, stats.stuns);
	EXPECT_EQ(THREADS_MAX + 10, lmt_stats(self->fd).write_faults);
	pthread_barrier_wait(&all_have_written);
	for (i = 0; i < THREADS_MAX; i++)
		pthread_join(crowd[i], NULL);
}

/* Ids are those of the pid namespace of who asks. */
STUN_TEST(pid_namespace)
{
	struct lmtrack_stun_thread threads[2];
	struct lmtrack_stun_stats stats;
	pid_t pid;

	touch(self->mem, 0, 1, 2);
	ASSERT_EQ(0, unshare(CLONE_NEWPID));
	pid = fork();
	if (!pid) {
		touch(self->mem, 1, 1, 2);
		stats = stun_stats(self->fd, threads, 2);
		if (stats.thread_count != 2)
			_exit(1);
		/* Ours is 1; the other is not of this namespace. */
		_exit(threads[0].pid + threads[1].pid == 1 ? 0 : 2);
	}
	EXPECT_EQ(0, child_status(pid));
	stats = stun_stats(self->fd, threads, 2);
	ASSERT_EQ(2, stats.thread_count);
	EXPECT_NE(NULL, by_pid(threads, 2, getpid()));
	EXPECT_NE(NULL, by_pid(threads, 2, pid));
}

/* ---- Work that waits for its thread ---- */

struct receiver {
	pthread_t thread;
	int fd;
	unsigned char *to;
	_Atomic bool ready;
	_Atomic ssize_t got;
};

/* Blocks in the kernel with a page of the region written: its delay is still to come. */
static void *receiver_run(void *arg)
{
	struct receiver *receiver = arg;

	receiver->ready = true;
	receiver->got = recv(receiver->fd, receiver->to, 4 * PAGE, MSG_WAITALL);
	return NULL;
}

/* The region may be gone long before; the work outlives it and is over at once. */
STUN_TEST(work_outlives_the_region)
{
	struct receiver receiver = { .got = -1 };
	char bytes[2 * PAGE] = { 7 };
	double begin;
	int pair[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	receiver.fd = pair[0];
	receiver.to = self->mem;
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	ASSERT_EQ(0, pthread_create(&receiver.thread, NULL, receiver_run, &receiver));
	ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
	ASSERT_TRUE(EVENTUALLY(10, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap) == 2));
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).stuns);

	ASSERT_EQ(0, munmap(self->mem, BYTES));
	ASSERT_EQ(0, close(self->fd));
	begin = lmt_seconds();
	ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
	pthread_join(receiver.thread, NULL);
	EXPECT_GT(20, lmt_seconds() - begin);
	/* For the tear-down. */
	self->fd = lmt_region(BYTES);
	self->mem = lmt_map(self->fd, BYTES);
}

STUN_TEST(killed_with_work_to_come)
{
	char bytes[2 * PAGE] = { 7 };
	int pair[2];
	pid_t pid;

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	pid = fork();
	if (!pid) {
		recv(pair[0], self->mem, 4 * PAGE, MSG_WAITALL);
		_exit(0);
	}
	ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
	ASSERT_TRUE(EVENTUALLY(10, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap) == 2));
	kill(pid, SIGKILL);
	EXPECT_EQ(-SIGKILL, child_status(pid));
	EXPECT_EQ(0, stun_stats(self->fd, NULL, 0).stuns);
	ASSERT_EQ(0, lmt_stop(self->fd));
}

/* A new tracking knows nothing of the work that the last one has left. */
STUN_TEST(work_of_the_last_tracking)
{
	struct receiver receiver = { .got = -1 };
	char bytes[2 * PAGE] = { 7 };
	int pair[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	receiver.fd = pair[0];
	receiver.to = self->mem;
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	ASSERT_EQ(0, pthread_create(&receiver.thread, NULL, receiver_run, &receiver));
	ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
	ASSERT_TRUE(EVENTUALLY(10, lmt_dirty(self->fd, 0, 0, PAGES, self->bitmap) == 2));
	ASSERT_EQ(0, lmt_stop(self->fd));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_LE(0, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	ASSERT_EQ(0, stun_set(self->fd, 1, MAX_US));
	/* Two works of the same thread now: one for either. */
	ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
	pthread_join(receiver.thread, NULL);
	EXPECT_EQ(4 * PAGE, receiver.got);
	EXPECT_EQ(1, stun_stats(self->fd, NULL, 0).stuns);
}

/* ---- The module ---- */

static long module_unload(void)
{
	return E(syscall(SYS_delete_module, "lmtrack", O_NONBLOCK));
}

static int module_load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), ret;

	ret = E(syscall(SYS_finit_module, fd, "", 0));
	close(fd);
	return ret;
}

/* It stays for as long as a thread has a delay to come, and goes at once when none has. */
TEST(unload_after_sleepers)
{
	const char *module = getenv("LMTRACK_MODULE");
	char bytes[2 * PAGE] = { 7 };
	struct receiver receiver = { .got = -1 };
	struct writer writers[8];
	uint64_t bitmap[WORDS];
	unsigned char *mem;
	int pair[2], fd, round;
	unsigned int i;

	if (!module)
		SKIP(return, "LMTRACK_MODULE does not say where the module is");
	for (round = 0; round < 3; round++) {
		fd = lmt_region(BYTES);
		ASSERT_LE(0, fd);
		mem = lmt_map(fd, BYTES);
		ASSERT_NE(MAP_FAILED, mem);
		ASSERT_EQ(0, lmt_start(fd, 0, NULL));
		ASSERT_EQ(0, stun_set(fd, 1, MAX_US));
		for (i = 0; i < ARRAY_SIZE(writers); i++)
			ASSERT_EQ(0, writer_start(&writers[i], mem, 100 + i * 100, 2));
		ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
		receiver.fd = pair[0];
		receiver.to = mem;
		ASSERT_EQ(0, pthread_create(&receiver.thread, NULL, receiver_run, &receiver));
		ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
		ASSERT_TRUE(EVENTUALLY(10, lmt_dirty(fd, 0, 0, 64, bitmap) == 2));
		for (i = 0; i < ARRAY_SIZE(writers); i++)
			ASSERT_TRUE(EVENTUALLY(10, writers[i].done));
		/* Asleep or not, they write no more to it. */
		close(fd);
		for (i = 0; i < ARRAY_SIZE(writers); i++)
			ASSERT_TRUE(EVENTUALLY(10, writers[i].done == 2));
		munmap(mem, BYTES);
		/* The region is gone soon; the work of the receiver is not. */
		pause_ms(300);
		EXPECT_EQ(-EAGAIN, module_unload());
		ASSERT_EQ(sizeof(bytes), write(pair[1], bytes, sizeof(bytes)));
		EXPECT_TRUE(EVENTUALLY(10, !module_unload()));
		for (i = 0; i < ARRAY_SIZE(writers); i++)
			pthread_join(writers[i].thread, NULL);
		pthread_join(receiver.thread, NULL);
		close(pair[0]);
		close(pair[1]);
		ASSERT_EQ(0, module_load(module));
	}
}

TEST_HARNESS_MAIN
