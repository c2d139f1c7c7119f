// SPDX-License-Identifier: GPL-2.0
/*
 * No write is lost, whoever writes and whatever happens to the pages meanwhile.
 *
 * Writers in two processes write through mappings of their own. The harvester copies each page
 * that a harvest reports into a shadow. When the writers have stopped, after a last harvest,
 * the shadow must equal the region byte by byte: a write that came after its page was copied,
 * and was not reported, shows as a difference. That is checked many times in each test, so that
 * a page which is lost is not healed by a later write. In parallel an actor does something to
 * the pages that can make a write escape: moves them, changes protections, punches holes,
 * writes by way of the kernel.
 *
 * LMTRACK_HARVESTS sets the number of harvests of the first test (10000).
 */
#include <numaif.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "lmtrack_test.h"

#define PAGES		2048UL
#define BYTES		(PAGES * PAGE)
#define PROCESSES	2
#define THREADS		2
#define WORDS		(PAGE / sizeof(uint64_t))

/* Shared by the processes: the harvester stops all writers to compare. */
struct control {
	volatile int pause;		/* writers wait while it is set */
	volatile int stop;
	int waiting;			/* writers that do */
	uint64_t writes;
};

struct writer {
	struct control *control;
	volatile uint64_t *memory;
	unsigned int slot;		/* word in each page that only this writer writes */
	unsigned int seed;
};

static unsigned int next_random(unsigned int *seed)
{
	*seed = *seed * 1664525 + 1013904223;
	return *seed >> 8;
}

static void writer_pause(struct control *control)
{
	__atomic_add_fetch(&control->waiting, 1, __ATOMIC_SEQ_CST);
	while (control->pause && !control->stop)
		sched_yield();
	__atomic_sub_fetch(&control->waiting, 1, __ATOMIC_SEQ_CST);
}

static void *writer_thread(void *data)
{
	struct writer *w = data;
	uint64_t value = 0;

	while (!w->control->stop) {
		unsigned int page = next_random(&w->seed) % PAGES;

		if (w->control->pause)
			writer_pause(w->control);
		/* Bursts on neighbours and single pages, as programs do. */
		for (unsigned int n = next_random(&w->seed) % 8; n-- && page < PAGES; page++)
			w->memory[page * WORDS + w->slot] = ++value;
		if (!(value & 63))
			__atomic_add_fetch(&w->control->writes, 64, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void writer_process(struct control *control, int fd, unsigned int number)
{
	struct writer writers[THREADS];
	pthread_t threads[THREADS];
	void *memory = lmt_map(fd, BYTES);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (memory == MAP_FAILED)
		_exit(1);
	for (unsigned int i = 0; i < THREADS; i++) {
		writers[i] = (struct writer){
			.control = control, .memory = memory,
			.slot = 1 + number * THREADS + i, .seed = number * 100 + i + 1,
		};
		pthread_create(&threads[i], NULL, writer_thread, &writers[i]);
	}
	for (unsigned int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	_exit(0);
}

FIXTURE(race) {
	int fd;
	uint64_t *memory;
	uint64_t *shadow;
	uint64_t *bitmap;
	struct control *control;
	pid_t children[PROCESSES];
	uint32_t start_flags;
	unsigned long harvests;
	unsigned long reported;
};

FIXTURE_SETUP(race)
{
	self->control = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(self->control, MAP_FAILED);
	self->fd = lmt_region(BYTES);
	ASSERT_GE(self->fd, 0);
	self->memory = lmt_map(self->fd, BYTES);
	ASSERT_NE((void *)self->memory, MAP_FAILED);
	self->shadow = calloc(1, BYTES);
	self->bitmap = calloc(PAGES / 64, 8);
	ASSERT_NE(self->shadow, NULL);
	ASSERT_NE(self->bitmap, NULL);
	/* Some pages exist and are writable when tracking starts, others not. */
	for (unsigned long page = 0; page < PAGES; page += 1 + page % 3)
		self->memory[page * WORDS] = page + 1;
	for (unsigned int i = 0; i < PROCESSES; i++) {
		self->children[i] = fork();
		if (!self->children[i])
			writer_process(self->control, self->fd, i);
	}
}

FIXTURE_TEARDOWN(race)
{
	self->control->stop = 1;
	for (unsigned int i = 0; i < PROCESSES; i++)
		waitpid(self->children[i], NULL, 0);
	free(self->shadow);
	free(self->bitmap);
	munmap(self->memory, BYTES);
	close(self->fd);
}

static long harvest(FIXTURE_DATA(race) *self)
{
	long dirty = lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap);

	for (unsigned long page = 0; dirty > 0 && page < PAGES; page++)
		if (lmt_bit(self->bitmap, page))
			memcpy(self->shadow + page * WORDS, self->memory + page * WORDS, PAGE);
	self->harvests++;
	if (dirty > 0)
		self->reported += dirty;
	return dirty;
}

/* Stop the writers; with all at rest, what is left is harvested and all must be equal. */
static long compare(FIXTURE_DATA(race) *self, unsigned int others)
{
	unsigned long differing = 0;
	long dirty;

	self->control->pause = 1;
	while (__atomic_load_n(&self->control->waiting, __ATOMIC_SEQ_CST) <
	       (int)(PROCESSES * THREADS + others))
		sched_yield();
	dirty = harvest(self);
	if (dirty < 0)
		return dirty;
	for (unsigned long page = 0; page < PAGES; page++) {
		if (!memcmp(self->shadow + page * WORDS, self->memory + page * WORDS, PAGE))
			continue;
		if (!differing++)
			fprintf(stderr, "# page %lu differs first\n", page);
	}
	self->control->pause = 0;
	/* Who has not left yet would count as at rest in the next comparison. */
	while (__atomic_load_n(&self->control->waiting, __ATOMIC_SEQ_CST))
		sched_yield();
	return differing;
}

/*
 * Harvest @count times, compare after every @every of them. Actors count as writers: they
 * come to rest for a comparison, too.
 */
static void run(struct __test_metadata *_metadata, FIXTURE_DATA(race) *self,
		unsigned long count, unsigned long every, unsigned int others)
{
	uint64_t before = self->control->writes;

	ASSERT_EQ(lmt_start(self->fd, self->start_flags, NULL), 0);
	for (unsigned long i = 1; i <= count; i++) {
		ASSERT_GE(harvest(self), 0);
		if (i % every == 0)
			ASSERT_EQ(compare(self, others), 0);
	}
	ASSERT_EQ(compare(self, others), 0);
	/* A test whose writers slept has shown nothing. */
	EXPECT_GT(self->control->writes - before, count);
	EXPECT_GT(self->reported, count);
	fprintf(stderr, "# %lu harvests, %lu pages reported, %lu writes, 0 lost\n", self->harvests,
		self->reported, (unsigned long)(self->control->writes - before));
	ASSERT_EQ(lmt_stop(self->fd), 0);
}

TEST_F_TIMEOUT(race, writers, 600)
{
	const char *wish = getenv("LMTRACK_HARVESTS");

	run(_metadata, self, wish ? strtoul(wish, NULL, 0) : 10000, 250, 0);
}

/* An actor runs in a thread of the harvester's process, over its mapping. */
struct actor {
	struct control *control;
	char *memory;
	int fd;
	const pid_t *writers;
	unsigned int seed;
	bool (*act)(struct actor *actor);	/* false: cannot be done here */
	unsigned long done;
	bool failed;
};

static void *actor_thread(void *data)
{
	struct actor *actor = data;

	while (!actor->control->stop) {
		if (actor->control->pause)
			writer_pause(actor->control);
		if (!actor->failed && actor->act(actor))
			actor->done++;
		else if (!actor->done)
			actor->failed = true;
		sched_yield();
	}
	return NULL;
}

static bool run_actor(struct __test_metadata *_metadata, FIXTURE_DATA(race) *self,
		      bool (*act)(struct actor *), unsigned long count)
{
	struct actor actor = {
		.control = self->control, .memory = (char *)self->memory, .fd = self->fd,
		.writers = self->children, .seed = 7, .act = act,
	};
	pthread_t thread;

	pthread_create(&thread, NULL, actor_thread, &actor);
	run(_metadata, self, count, 20, 1);
	self->control->stop = 1;
	pthread_join(thread, NULL);
	fprintf(stderr, "# the actor acted %lu times\n", actor.done);
	return !actor.failed && actor.done;
}

static unsigned int some_page(struct actor *actor, unsigned int span)
{
	return next_random(&actor->seed) % (PAGES - span);
}

/*
 * Read-only and back: may a shared page become writable without being noticed? The protection
 * changes while pages are written and harvested, so at any instant of a harvest.
 */
static bool act_mprotect(struct actor *actor)
{
	unsigned int span = 16 << next_random(&actor->seed) % 4;
	unsigned int page = some_page(actor, span);
	char *memory = actor->memory + page * PAGE;

	for (unsigned int i = 0; i < 8; i++) {
		if (mprotect(memory, span * PAGE, PROT_READ) ||
		    mprotect(memory, span * PAGE, PROT_READ | PROT_WRITE))
			return false;
		for (unsigned int n = 0; n < span; n++)
			((volatile uint64_t *)(memory + n * PAGE))[WORDS - 1]++;
	}
	return true;
}

TEST_F_TIMEOUT(race, mprotect, 180)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_mprotect, 150));
}

static bool act_punch(struct actor *actor)
{
	unsigned int span = 1 + next_random(&actor->seed) % 40;

	return !lmt_punch(actor->fd, some_page(actor, span) * PAGE, span * PAGE);
}

TEST_F_TIMEOUT(race, punch_hole, 120)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_punch, 300));
}

static bool act_fork(struct actor *actor)
{
	volatile uint64_t *word = (uint64_t *)(actor->memory + some_page(actor, 1) * PAGE);
	int status;
	pid_t child = fork();

	if (!child) {
		word[WORDS - 2]++;
		_exit(0);
	}
	return child > 0 && waitpid(child, &status, 0) == child && !status;
}

TEST_F_TIMEOUT(race, fork, 180)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_fork, 60));
}

static bool act_remap(struct actor *actor)
{
	unsigned int page = some_page(actor, 16);
	volatile uint64_t *word;
	void *map, *moved;

	map = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, actor->fd, page * PAGE);
	if (map == MAP_FAILED)
		return false;
	word = map;
	word[WORDS - 3]++;
	moved = mremap(map, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	if (moved == MAP_FAILED)
		moved = map;
	word = moved;
	word[WORDS - 3]++;
	munmap((char *)moved + 4 * PAGE, 4 * PAGE);
	word[WORDS - 3]++;
	if (moved != map)
		munmap(moved, 16 * PAGE);
	munmap(map, 16 * PAGE);
	return true;
}

TEST_F_TIMEOUT(race, map_and_move, 120)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_remap, 300));
}

/* Pages move while their entries are dirty. Compaction moves them on any machine. */
static bool act_compact(struct actor *actor)
{
	int fd = open("/proc/sys/vm/compact_memory", O_WRONLY);
	bool done;

	(void)actor;
	if (fd < 0)
		return false;
	done = write(fd, "1", 1) == 1;
	close(fd);
	return done;
}

TEST_F_TIMEOUT(race, compaction, 180)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_compact, 200));
}

static int nodes(void)
{
	int count = 0;
	char path[64];

	while (snprintf(path, sizeof(path), "/sys/devices/system/node/node%d", count),
	       !access(path, F_OK))
		count++;
	return count;
}

static bool act_move_pages(struct actor *actor)
{
	unsigned int page = some_page(actor, 64);
	void *pages[64];
	int to[64], status[64];

	for (unsigned int i = 0; i < 64; i++) {
		pages[i] = actor->memory + (page + i) * PAGE;
		to[i] = next_random(&actor->seed) % 2;
	}
	return syscall(SYS_move_pages, 0, 64, pages, to, status, MPOL_MF_MOVE_ALL) >= 0;
}

TEST_F_TIMEOUT(race, move_pages, 180)
{
	if (nodes() < 2)
		SKIP(return, "one NUMA node only: boot with numa=fake=2");
	EXPECT_TRUE(run_actor(_metadata, self, act_move_pages, 300));
}

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	int ret = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;

	if (fd >= 0)
		close(fd);
	return ret;
}

/* The balancer unmaps pages to see who touches them, and from where. */
static bool act_numa(struct actor *actor)
{
	volatile uint64_t *word = (uint64_t *)(actor->memory + some_page(actor, 1) * PAGE);
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(next_random(&actor->seed) % sysconf(_SC_NPROCESSORS_ONLN), &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
	word[WORDS - 4]++;
	return true;
}

TEST_F_TIMEOUT(race, numa_balancing, 180)
{
	const char *scan = "/sys/kernel/debug/sched/numa_balancing";
	char path[96];

	if (nodes() < 2)
		SKIP(return, "one NUMA node only: boot with numa=fake=2");
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	ASSERT_EQ(write_file("/proc/sys/kernel/numa_balancing", "1"), 0);
	snprintf(path, sizeof(path), "%s/scan_period_min_ms", scan);
	EXPECT_EQ(write_file(path, "10"), 0);
	snprintf(path, sizeof(path), "%s/scan_period_max_ms", scan);
	EXPECT_EQ(write_file(path, "20"), 0);
	snprintf(path, sizeof(path), "%s/scan_delay_ms", scan);
	EXPECT_EQ(write_file(path, "1"), 0);
	EXPECT_TRUE(run_actor(_metadata, self, act_numa, 300));
	write_file("/proc/sys/kernel/numa_balancing", "0");
}

/* A processor goes with all its bits, its threads' accounts and its lists of pages, and returns. */
#define SECOND_CPU	"/sys/devices/system/cpu/cpu1/online"

static bool act_hotplug(struct actor *actor)
{
	(void)actor;
	return !write_file(SECOND_CPU, "0") && !write_file(SECOND_CPU, "1");
}

TEST_F_TIMEOUT(race, cpu_hotplug, 300)
{
	if (access(SECOND_CPU, W_OK))
		SKIP(return, "there is no second processor that can be taken away");
	EXPECT_TRUE(run_actor(_metadata, self, act_hotplug, 200));
}

/* Writers stand still in the middle of whatever they do, faults included, and go on. */
static bool act_stop(struct actor *actor)
{
	pid_t writer = actor->writers[next_random(&actor->seed) % PROCESSES];

	if (kill(writer, SIGSTOP))
		return false;
	usleep(next_random(&actor->seed) % 4000);
	return !kill(writer, SIGCONT);
}

TEST_F_TIMEOUT(race, stopped_writers, 180)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_stop, 300));
}

/* Memory is short: all that can be taken away is, and what a region's pages lie on is looked at. */
static bool act_pressure(struct actor *actor)
{
	size_t bytes = 64 * MIB;
	void *memory;

	(void)actor;
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		return false;
	munmap(memory, bytes);
	return !write_file("/proc/sys/vm/drop_caches", "3") &&
	       !write_file("/proc/sys/vm/compact_memory", "1");
}

/* So much is set aside that the rest is scarce, and the reclaimer runs. */
TEST_F_TIMEOUT(race, memory_pressure, 300)
{
	const char *reserve = "/proc/sys/vm/min_free_kbytes";
	char before[32] = "", much[32];
	FILE *meminfo = fopen("/proc/meminfo", "r");
	unsigned long total = 0;
	int fd = open(reserve, O_RDONLY | O_CLOEXEC);

	ASSERT_NE(NULL, meminfo);
	ASSERT_EQ(1, fscanf(meminfo, "MemTotal: %lu", &total));
	fclose(meminfo);
	ASSERT_LT(0, read(fd, before, sizeof(before) - 1));
	close(fd);
	snprintf(much, sizeof(much), "%lu", total / 3);
	ASSERT_EQ(0, write_file(reserve, much));
	EXPECT_TRUE(run_actor(_metadata, self, act_pressure, 100));
	EXPECT_EQ(0, write_file(reserve, before));
}

/* The kernel writes for us, through a pin that needs no page table entry any more. */
static bool act_direct_io(struct actor *actor)
{
	static int disk = -1;

	if (disk < 0)
		disk = open("/dev/ram0", O_RDONLY | O_DIRECT | O_CLOEXEC);
	/* The first bytes of the disk change from time to time, or nothing would be written. */
	return pread(disk, actor->memory + some_page(actor, 8) * PAGE, 8 * PAGE,
		     next_random(&actor->seed) % 256 * PAGE) == (ssize_t)(8 * PAGE);
}

TEST_F_TIMEOUT(race, direct_io, 180)
{
	char *noise = malloc(4 * MIB);
	unsigned int seed = 3;
	int disk;

	if (system("modprobe brd rd_nr=1 rd_size=4096"))
		SKIP(return, "no ram disk");
	disk = open("/dev/ram0", O_WRONLY);
	ASSERT_GE(disk, 0);
	for (unsigned long i = 0; i < 4 * MIB; i++)
		noise[i] = next_random(&seed);
	ASSERT_EQ(write(disk, noise, 4 * MIB), 4 * MIB);
	ASSERT_EQ(fsync(disk), 0);
	close(disk);
	free(noise);
	/* The actor is at work already, and may hold pages just then. */
	self->start_flags = LMTRACK_TRACK_ALLOW_PINNED;
	EXPECT_TRUE(run_actor(_metadata, self, act_direct_io, 300));
}

static bool act_process_vm(struct actor *actor)
{
	uint64_t value[4 * WORDS];
	struct iovec local = { value, sizeof(value) };
	struct iovec remote = { actor->memory + some_page(actor, 4) * PAGE, sizeof(value) };

	memset(value, next_random(&actor->seed), sizeof(value));
	return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == sizeof(value);
}

TEST_F_TIMEOUT(race, process_vm_writev, 120)
{
	/* As above: the kernel pins them for that. */
	self->start_flags = LMTRACK_TRACK_ALLOW_PINNED;
	EXPECT_TRUE(run_actor(_metadata, self, act_process_vm, 300));
}

static bool act_proc_mem(struct actor *actor)
{
	static int mem = -1;
	uint64_t value[WORDS];

	if (mem < 0)
		mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	memset(value, next_random(&actor->seed), sizeof(value));
	return pwrite(mem, value, sizeof(value),
		      (uintptr_t)actor->memory + some_page(actor, 1) * PAGE) == sizeof(value);
}

TEST_F_TIMEOUT(race, proc_mem, 120)
{
	EXPECT_TRUE(run_actor(_metadata, self, act_proc_mem, 300));
}

/* Harvests of parts of the region by two threads at once: each page to exactly one of them. */
static void *half_thread(void *data)
{
	FIXTURE_DATA(race) *self = data;
	uint64_t bitmap[PAGES / 2 / 64];

	while (!self->control->stop) {
		if (self->control->pause)
			writer_pause(self->control);
		if (lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, PAGES / 2, PAGES / 2, bitmap) < 0)
			continue;
		for (unsigned long page = 0; page < PAGES / 2; page++)
			if (lmt_bit(bitmap, page))
				memcpy(self->shadow + (PAGES / 2 + page) * WORDS,
				       self->memory + (PAGES / 2 + page) * WORDS, PAGE);
	}
	return NULL;
}

TEST_F_TIMEOUT(race, two_harvesters, 120)
{
	pthread_t thread;

	/* The other half belongs to the thread, but for the comparison, when it rests. */
	pthread_create(&thread, NULL, half_thread, self);
	ASSERT_EQ(lmt_start(self->fd, 0, NULL), 0);
	for (unsigned int i = 1; i <= 500; i++) {
		ASSERT_GE(lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES / 2, self->bitmap), 0);
		for (unsigned long page = 0; page < PAGES / 2; page++)
			if (lmt_bit(self->bitmap, page))
				memcpy(self->shadow + page * WORDS, self->memory + page * WORDS,
				       PAGE);
		if (i % 50 == 0)
			ASSERT_EQ(compare(self, 1), 0);
	}
	self->control->stop = 1;
	pthread_join(thread, NULL);
}

/* A mapping that grows is not in the tree of mappings for a moment. It is the only one here. */
struct resizer {
	struct control *control;
	char *memory;
	unsigned long done;
};

static void *resizer_thread(void *data)
{
	struct resizer *resizer = data;

	while (!resizer->control->stop) {
		if (mremap(resizer->memory, BYTES, BYTES + PAGE, 0) == MAP_FAILED)
			break;
		munmap(resizer->memory + BYTES, PAGE);
		resizer->done++;
	}
	return NULL;
}

FIXTURE(resized) {
	int fd;
};

FIXTURE_SETUP(resized)
{
	self->fd = lmt_region(BYTES + PAGE);
	ASSERT_GE(self->fd, 0);
}

FIXTURE_TEARDOWN(resized)
{
	close(self->fd);
}

TEST_F_TIMEOUT(resized, only_mapping, 180)
{
	uint64_t *shadow = calloc(1, BYTES), bitmap[(PAGES + 64) / 64];
	struct control *control = calloc(1, sizeof(*control));
	struct resizer resizer = { .control = control };
	struct writer writer = { .control = control, .slot = 1, .seed = 1 };
	pthread_t write, resize;
	int fd = self->fd;
	char *memory;

	/* Room to grow in place. */
	memory = mmap(NULL, BYTES + CHUNK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE((void *)memory, MAP_FAILED);
	munmap(memory, BYTES + CHUNK);
	ASSERT_EQ((void *)mmap(memory, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
			       0), (void *)memory);
	writer.memory = (uint64_t *)memory;
	resizer.memory = memory;
	pthread_create(&write, NULL, writer_thread, &writer);
	pthread_create(&resize, NULL, resizer_thread, &resizer);
	ASSERT_EQ(lmt_start(fd, 0, NULL), 0);
	for (unsigned int i = 1; i <= 1000; i++) {
		bool rest = i % 50 == 0;

		if (rest) {
			control->pause = 1;
			while (!__atomic_load_n(&control->waiting, __ATOMIC_SEQ_CST))
				sched_yield();
		}
		ASSERT_GE(lmt_dirty(fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap), 0);
		for (unsigned long page = 0; page < PAGES; page++)
			if (lmt_bit(bitmap, page))
				memcpy(shadow + page * WORDS, memory + page * PAGE, PAGE);
		if (rest) {
			ASSERT_EQ(memcmp(shadow, memory, BYTES), 0);
			control->pause = 0;
			while (__atomic_load_n(&control->waiting, __ATOMIC_SEQ_CST))
				sched_yield();
		}
	}
	control->stop = 1;
	pthread_join(write, NULL);
	pthread_join(resize, NULL);
	EXPECT_GT(resizer.done, 100);
	fprintf(stderr, "# resized %lu times\n", resizer.done);
	munmap(memory, BYTES + PAGE);
	free(shadow);
	free(control);
}

TEST_HARNESS_MAIN
