// SPDX-License-Identifier: GPL-2.0
/*
 * What may befall the process that runs and sends a guest, and the machine under it: it is
 * stopped and goes on, processors go and come, its memory is used up, or breaks. The region stays
 * usable, and what was sent is what is there.
 */
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "kselftest_harness.h"
#include "uapi_common.h"
#include "uapi_sink.h"

#define BYTES		(16 * MIB)
#define PAGES		(BYTES / PAGE)
#define SECOND_CPU	"/sys/devices/system/cpu/cpu1/online"

static int file_write(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int ret = fd < 0 || write(fd, text, strlen(text)) < 0 ? -errno : 0;

	if (fd >= 0)
		close(fd);
	return ret;
}

FIXTURE(pressure) {
	int fd;
	unsigned char *mem;
	uint64_t *bitmap;
};

FIXTURE_SETUP(pressure)
{
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	self->bitmap = calloc(PAGES / 64, 8);
	ASSERT_NE(NULL, self->bitmap);
}

FIXTURE_TEARDOWN(pressure)
{
	munmap(self->mem, BYTES);
	close(self->fd);
	free(self->bitmap);
}

/* ---- A source that sends while its guest writes ---- */

struct source {
	volatile bool stop;
	volatile bool failed;
	volatile uint32_t rounds;	/* the last one sent */
	volatile unsigned long writes;
};

struct guest {
	struct source *source;
	volatile uint64_t *mem;
	volatile bool stop;
	unsigned int seed;
};

static void *guest_run(void *arg)
{
	struct guest *guest = arg;

	while (!guest->stop) {
		guest->mem[rand_r(&guest->seed) % PAGES * (PAGE / 8) + guest->seed % 512]++;
		guest->source->writes++;
	}
	return NULL;
}

/* A wait that a signal ends is begun again. */
static bool round_over(int stream)
{
	long ret;

	do
		ret = round_error(stream);
	while (ret == -EINTR);
	return !ret;
}

/* Rounds until told to stop; then the guest stands still, and the last ones. */
static bool source_run(struct source *source, int fd, int connection)
{
	struct lmtrack_stun_set stun = { .size = sizeof(stun), .rate = 20000, .floor = 1000 };
	struct guest guest = { .source = source, .mem = lmt_map(fd, BYTES), .seed = 1 };
	int stream = stream_open(1, 0), last = 0;
	pthread_t thread;

	if (guest.mem == MAP_FAILED || stream < 0 || lmt_start(fd, 0, NULL) ||
	    lmt_ioctl(fd, LMTRACK_STUN_SET, &stun) || stream_add_region(stream, fd, 0) ||
	    stream_add_channel(stream, connection, 1) ||
	    pthread_create(&thread, NULL, guest_run, &guest))
		return false;
	while (last < 20) {
		if (stream_send(stream, source->rounds + 1,
				source->rounds ? LMTRACK_SEND_DIRTY : LMTRACK_SEND_ALL) ||
		    !round_over(stream))
			return false;
		source->rounds++;
		if (source->stop && !last++) {
			guest.stop = true;
			pthread_join(thread, NULL);
		}
		/* A page that the network still holds is sent again; give it time to let go. */
		if (last)
			pause_ms(20);
	}
	close(stream);
	return true;
}

/* @act is done to the source for @seconds; what it sent in the end must be what is there. */
static void send_under(struct __test_metadata *_metadata, FIXTURE_DATA(pressure) *self,
		       double seconds, bool (*act)(pid_t source))
{
	struct source *source = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct sink sink = { };
	unsigned long acts = 0;
	double end;
	int pair[2];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, source);
	sink.copy = calloc(1, BYTES);
	ASSERT_NE(NULL, sink.copy);
	touch(self->mem, 0, PAGES / 2, 1);
	ASSERT_EQ(0, tcp_pair(pair));
	sink.fd = pair[1];
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(!source_run(source, lmt_reopen(self->fd), pair[0]));
	}
	close(pair[0]);
	ASSERT_EQ(0, pthread_create(&sink.thread, NULL, sink_run, &sink));
	ASSERT_TRUE(EVENTUALLY(60, source->rounds));
	/* Long enough for things to have happened, however slow the machine is. */
	for (end = lmt_seconds() + seconds; lmt_seconds() < end || acts < 20; acts++)
		ASSERT_TRUE(act(pid));
	source->stop = true;
	EXPECT_EQ(0, child_status(pid));
	ASSERT_EQ(0, pthread_join(sink.thread, NULL));
	EXPECT_EQ(source->rounds, sink.ended);
	EXPECT_EQ(0, memcmp(self->mem, sink.copy, BYTES));
	EXPECT_LT(1000, source->writes);
	TH_LOG("%u rounds, %lu writes, %lu acts", source->rounds, source->writes, acts);
	/* The source's descriptors are gone, and its tracking with them. */
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	close(pair[1]);
	free(sink.copy);
}

static bool act_stop(pid_t source)
{
	if (kill(source, SIGSTOP))
		return false;
	pause_ms(30);
	if (kill(source, SIGCONT))
		return false;
	pause_ms(20);
	return true;
}

TEST_F_TIMEOUT(pressure, source_is_stopped, 600)
{
	send_under(_metadata, self, 5, act_stop);
}

static bool act_hotplug(pid_t source)
{
	(void)source;
	return !file_write(SECOND_CPU, "0") && !file_write(SECOND_CPU, "1");
}

/* The channel's thread is to run on the processor that goes. */
TEST_F_TIMEOUT(pressure, processor_goes_and_comes, 600)
{
	if (access(SECOND_CPU, W_OK))
		SKIP(return, "there is no second processor that can be taken away");
	send_under(_metadata, self, 5, act_hotplug);
}

/* ---- Memory that is used up ---- */

/* A memory cgroup of the test's own, @dir; -errno where there can be none. */
struct cgroup {
	char root[32];
	char dir[64];
};

static int cgroup_file(const struct cgroup *group, const char *name, const char *text)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/%s", group->dir, name);
	return file_write(path, text);
}

/* Who is in it still goes back to where all others are. */
static bool cgroup_end(struct cgroup *group)
{
	char path[64];
	bool gone;

	snprintf(path, sizeof(path), "%s/cgroup.procs", group->root);
	gone = !file_write(path, "0") && EVENTUALLY(10, !rmdir(group->dir));
	return !umount2(group->root, MNT_DETACH) && !rmdir(group->root) && gone;
}

static int cgroup_begin(struct cgroup *group, const char *name)
{
	char control[64];
	int ret;

	strcpy(group->root, "/tmp/lmtrack-cgroup-XXXXXX");
	if (!mkdtemp(group->root) || mount("none", group->root, "cgroup2", 0, NULL))
		return -errno;
	snprintf(group->dir, sizeof(group->dir), "%s/%s", group->root, name);
	snprintf(control, sizeof(control), "%s/cgroup.subtree_control", group->root);
	ret = file_write(control, "+memory");
	ret = ret ?: E(mkdir(group->dir, 0755));
	ret = ret ?: cgroup_file(group, "memory.max", "max");
	if (ret)
		cgroup_end(group);
	return ret;
}

/* A line of memory.stat. */
static long cgroup_stat(const struct cgroup *group, const char *name)
{
	char path[128], line[128];
	long value = -1;
	FILE *file;

	snprintf(path, sizeof(path), "%s/memory.stat", group->dir);
	file = fopen(path, "re");
	while (file && value < 0 && fgets(line, sizeof(line), file))
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ' ')
			value = atol(line + strlen(name));
	if (file)
		fclose(file);
	return value;
}

/*
 * The limit of a memory cgroup is hit within a fault: who touches the page is killed, and nobody
 * else. selftests/run knows the cgroup's name: the kernel's report is wanted.
 */
TEST_F_TIMEOUT(pressure, cgroup_out_of_memory, TEST_SECONDS)
{
	struct cgroup group;
	uint64_t resident;
	pid_t pid;
	int ret;

	ret = cgroup_begin(&group, "lmtrack-oom");
	if (ret)
		SKIP(return, "no memory controller in cgroup v2: %s", strerror(-ret));
	ASSERT_EQ(0, cgroup_file(&group, "memory.max", "8388608"));
	touch(self->mem, 0, 16, 1);

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = lmt_reopen(self->fd);

		if (cgroup_file(&group, "cgroup.procs", "0") || lmt_start(fd, 0, NULL))
			_exit(1);
		touch(self->mem, 16, PAGES - 16, 2);
		_exit(0);
	}
	EXPECT_EQ(-SIGKILL, child_status(pid));
	resident = lmt_stats(self->fd).resident_pages;
	EXPECT_LT(16, resident);
	EXPECT_GT(PAGES, resident);

	/* Its tracking is gone with it. Nothing else is. */
	EXPECT_TRUE(EVENTUALLY(10, region_info(self->fd).state == LMTRACK_IDLE));
	EXPECT_TRUE(EVENTUALLY(10, lmt_stats(self->fd).mappers == 1));
	EXPECT_EQ(1, self->mem[15 * PAGE]);
	EXPECT_EQ(2, self->mem[16 * PAGE]);
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ((long)resident,
		  lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	touch(self->mem, 0, PAGES, 3);
	EXPECT_EQ((long)PAGES, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_EQ(PAGES, lmt_stats(self->fd).resident_pages);

	EXPECT_TRUE(cgroup_end(&group));
}

/*
 * What a stream keeps of each chunk is made by its threads, and charged to who made the stream: with
 * a large region, or many, it could use up the host's memory otherwise.
 */
#define CHUNKS		2048UL
#define CHUNK_BYTES	(LMTRACK_CHUNK_PAGES * PAGE)
#define CHUNK_NOTE	64L		/* at least the bitmap of its pages */

TEST_F_TIMEOUT(pressure, stream_is_charged, TEST_SECONDS)
{
	struct sink sink = { };
	struct cgroup group;
	int pair[2], stream, fd, ret;
	long before, after;
	char *mem;

	ret = cgroup_begin(&group, "lmtrack-charge");
	if (ret)
		SKIP(return, "no memory controller in cgroup v2: %s", strerror(-ret));
	ASSERT_EQ(0, tcp_pair(pair));
	sink.fd = pair[1];
	sink.copy = mmap(NULL, CHUNKS * CHUNK_BYTES, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)sink.copy);
	ASSERT_EQ(0, pthread_create(&sink.thread, NULL, sink_run, &sink));

	/* All its threads, of whom the other one makes no streams. */
	ASSERT_EQ(0, cgroup_file(&group, "cgroup.procs", "0"));
	fd = lmt_region(CHUNKS * CHUNK_BYTES);
	ASSERT_LE(0, fd);
	mem = lmt_map(fd, CHUNKS * CHUNK_BYTES);
	ASSERT_NE(MAP_FAILED, (void *)mem);
	for (unsigned long chunk = 0; chunk < CHUNKS; chunk++)
		mem[chunk * CHUNK_BYTES] = 1;
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	stream = stream_open(1, 0);
	ASSERT_LE(0, stream);
	ASSERT_EQ(0, stream_add_region(stream, fd, 0));
	ASSERT_EQ(0, stream_add_channel(stream, pair[0], 0));
	before = cgroup_stat(&group, "slab");
	ASSERT_LT(0, before);
	ASSERT_EQ(0, stream_send(stream, 1, LMTRACK_SEND_ALL));
	ASSERT_EQ(0, round_error(stream));
	after = cgroup_stat(&group, "slab");
	TH_LOG("%ld bytes before the round, %ld after it", before, after);
	EXPECT_LT(before + (long)CHUNKS * CHUNK_NOTE, after);

	close(stream);
	close(pair[0]);
	close(pair[1]);
	pthread_join(sink.thread, NULL);
	munmap(sink.copy, CHUNKS * CHUNK_BYTES);
	munmap(mem, CHUNKS * CHUNK_BYTES);
	close(fd);
	EXPECT_TRUE(cgroup_end(&group));
}

/* ---- Memory that breaks ---- */

/* A page is broken: who touches it is killed, and it is not read in order to be sent. */
TEST_F_TIMEOUT(pressure, broken_page, TEST_SECONDS)
{
	struct sink sink = { };
	int pair[2], stream;
	pid_t pid;
	int ret;

	touch(self->mem, 0, 64, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	/* Who is about to use the page when it breaks may get SIGBUS at once. */
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(E(madvise(self->mem + 7 * PAGE, PAGE, MADV_HWPOISON)) == -EINVAL);
	ret = child_status(pid);
	if (ret == 1)
		SKIP(return, "this kernel knows no broken memory");
	ASSERT_TRUE(!ret || ret == -SIGBUS);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		touch(self->mem, 6, 1, 2);
		touch(self->mem, 7, 1, 2);
		_exit(0);
	}
	EXPECT_EQ(-SIGBUS, child_status(pid));

	ASSERT_EQ(0, tcp_pair(pair));
	sink.fd = pair[1];
	sink.copy = calloc(1, BYTES);
	ASSERT_NE(NULL, sink.copy);
	ASSERT_EQ(0, pthread_create(&sink.thread, NULL, sink_run, &sink));
	stream = stream_open(1, 0);
	ASSERT_LE(0, stream);
	ASSERT_EQ(0, stream_add_region(stream, self->fd, 0));
	ASSERT_EQ(0, stream_add_channel(stream, pair[0], 0));
	ASSERT_EQ(0, stream_send(stream, 1, LMTRACK_SEND_ALL));
	EXPECT_EQ(EHWPOISON, round_error(stream));
	close(stream);
	pthread_join(sink.thread, NULL);

	/* The guest's other pages are what they were, and tracked. */
	touch(self->mem, 100, 3, 2);
	EXPECT_LE(3, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap));
	EXPECT_TRUE(lmt_bit(self->bitmap, 101));
	EXPECT_EQ(2, self->mem[6 * PAGE]);
	close(pair[0]);
	close(pair[1]);
	free(sink.copy);
}

TEST_HARNESS_MAIN
