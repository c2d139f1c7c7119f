// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -lrdmacm -libverbs
/*
 * Signals in every wait of the module that a process can be in. The process is shown to be in the
 * wait by its kernel stack. Then it is told to handle a signal, is stopped and continued, is traced
 * and left alone again, and is killed: it must be gone while what it waited for lasts, all that it
 * held is free, and no write is lost.
 *
 * What is waited for is brought about so that it lasts as long as a test needs: a page fault that
 * holds the mmap_lock and waits for a device that stands; memory that userfaultfd does not
 * provide, for the caller or for another process, that is to send it over the channel's socket
 * and has the socket's lock; a peer that does not read, or does not answer.
 *
 * Waits that other programs kill: a delayed fault (uapi_stun); a thread of a channel that waits for
 * room (uapi_stream: owner_killed), for the rate (kill_ends_the_wait), for a window (uapi_rdma:
 * kill_while_sending), whose owner is killed.
 */
#include <arpa/inet.h>
#include <err.h>
#include <linux/userfaultfd.h>
#include <rdma/rdma_cma.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

#include "kselftest_harness.h"
#include "rdma_link.h"
#include "uapi_sink.h"

#define BYTES		(2 * CHUNK)
#define PAGES		(BYTES / PAGE)
#define PENDING		4711L

/* ---- Processes that wait ---- */

/**
 * struct shared - what this program and its children tell one another
 * @ret:	what the call returned; PENDING until then
 * @interrupted: how often it returned EINTR before, and was made again
 * @go:		provide the memory that was kept back
 */
struct shared {
	volatile long ret;
	volatile unsigned int interrupted;
	volatile bool go;
};

static struct shared *shared_make(void)
{
	struct shared *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	return shared == MAP_FAILED ? NULL : shared;
}

static void on_signal(int signal __attribute__((unused)))
{
}

/* What a child is to do. */
struct job {
	long (*call)(struct job *job);
	long (*then)(struct job *job);
	struct shared *shared;
	int fd;
	int socket;
	int other;
	int stream;
};

/* A child that makes the call, again if a signal ended it. Without one there is no test. */
static pid_t job_start(struct job *job)
{
	pid_t pid;

	job->shared = job->shared ?: shared_make();
	if (!job->shared)
		err(1, "mmap");
	job->shared->ret = PENDING;
	job->shared->interrupted = 0;
	pid = fork();
	if (!pid) {
		struct sigaction action = { .sa_handler = on_signal };
		long ret;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		sigaction(SIGUSR1, &action, NULL);
		while ((ret = job->call(job)) == -EINTR)
			job->shared->interrupted++;
		job->shared->ret = ret;
		_exit(0);
	}
	if (pid < 0)
		err(1, "fork");
	return pid;
}

static char state_of(pid_t pid)
{
	char path[64], text[512] = "", *at;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return 0;
	at = fgets(text, sizeof(text), file) ? strrchr(text, ')') : NULL;
	fclose(file);
	return at ? at[2] : 0;
}

/* Its kernel stack; "" if it has none any more. */
static void stack_of(pid_t pid, char *text, size_t room)
{
	char path[64];
	size_t length = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stack", pid);
	file = fopen(path, "re");
	if (file) {
		length = fread(text, 1, room - 1, file);
		fclose(file);
	}
	text[length] = 0;
}

/*
 * Does the process sleep in @wait, called by @function? What belongs to scheduler and locks is not
 * shown, so it is the module ("[lmtrack]") for whoever waits for a lock of its or on a queue.
 */
static bool sleeps_in(pid_t pid, const char *wait, const char *function)
{
	char before = state_of(pid), text[4096], *end, *at;

	stack_of(pid, text, sizeof(text));
	if ((before != 'S' && before != 'D') || state_of(pid) != before || !strstr(text, function))
		return false;
	end = strchr(text, '\n');
	at = strstr(text, wait);
	return end && at && at < end;
}

/* The same within some time; if not, what it does instead. */
static bool comes_to_sleep_in(pid_t pid, const char *wait, const char *function)
{
	bool there = EVENTUALLY(20 * lmt_slower(), sleeps_in(pid, wait, function));
	char text[4096];

	if (!there) {
		stack_of(pid, text, sizeof(text));
		printf("# not in %s of %s, but in state %c:\n%s", wait, function, state_of(pid), text);
	}
	return there;
}

/* The child, if it is at an end; else NOT_YET. */
#define NOT_YET		(-2000)

static int child_ended(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, WNOHANG) != pid)
		return NOT_YET;
	return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

/* How it ended, if it did so soon. */
static int ends(pid_t pid)
{
	int status = NOT_YET;

	EVENTUALLY(10 * lmt_slower(), (status = child_ended(pid)) != NOT_YET);
	return status;
}

static int killed(pid_t pid)
{
	return E(kill(pid, SIGKILL)) ?: ends(pid);
}

/*
 * Whatever does not kill it. Who traces it goes away, which ends that, too: who sleeps and can only be
 * killed does not stop for it before.
 */
static bool disturb(pid_t pid)
{
	pid_t tracer;

	if (kill(pid, SIGUSR1) || kill(pid, SIGSTOP))
		return false;
	pause_ms(50);
	if (kill(pid, SIGCONT))
		return false;
	tracer = fork();
	if (!tracer) {
		if (ptrace(PTRACE_SEIZE, pid, NULL, NULL))
			_exit(1);
		if (ptrace(PTRACE_INTERRUPT, pid, NULL, NULL))
			_exit(2);
		pause_ms(50);
		_exit(0);
	}
	return tracer > 0 && !child_status(tracer);
}

/* ---- A region ---- */

FIXTURE(signals) {
	long long users;
	int fd;
	unsigned char *mem;
	uint64_t bitmap[PAGES / 64];
};

FIXTURE_SETUP(signals)
{
	self->users = module_users();
	ASSERT_LE(0, self->users);
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	touch(self->mem, 0, PAGES, 1);
}

FIXTURE_TEARDOWN(signals)
{
	munmap(self->mem, BYTES);
	close(self->fd);
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), module_users() == self->users));
}

#define SIGNALS_TEST(name)	TEST_F_TIMEOUT(signals, name, TEST_SECONDS)

#define HARVEST()	lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap)

/* The region is idle, and all of it can be tracked. */
#define USABLE() do {									\
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), region_info(self->fd).state == LMTRACK_IDLE)); \
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));					\
	EXPECT_EQ((long)PAGES, HARVEST());						\
	TRACKED();									\
} while (0)

/*
 * It is tracked: what is written is dirty, and nothing else, once nobody holds pages any more who sent
 * them.
 */
#define TRACKED() do {									\
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), (sockets_run(), !HARVEST())));	\
	touch(self->mem, 17, 1, 2);							\
	EXPECT_EQ(1, HARVEST());							\
	EXPECT_TRUE(lmt_bit(self->bitmap, 17));						\
} while (0)

/* ---- Who waits for the mmap_lock of a process ---- */

#define DISK		"/dev/mapper/lmtrack-stands"

static bool shell(const char *command)
{
	return !system(command);
}

/* Not if one was left behind by a test that failed. */
static bool disk_make(void)
{
	return shell("! dmsetup info lmtrack-stands >/dev/null 2>&1 ||"
		     " { dmsetup resume lmtrack-stands; dmsetup remove --retry lmtrack-stands; };"
		     " modprobe brd rd_nr=1 rd_size=4096 2>/dev/null;"
		     " dmsetup create lmtrack-stands --table '0 8192 linear /dev/ram0 0' &&"
		     " dmsetup mknodes && dmsetup suspend --nolockfs --noflush lmtrack-stands");
}

static void disk_goes_on(void)
{
	shell("dmsetup resume lmtrack-stands");
}

static void disk_end(void)
{
	shell("dmsetup remove --retry lmtrack-stands");
}

/*
 * Pages are pinned for AF_XDP with the mmap_lock held, and unlike other faults this one does not
 * let go of it while the page is read.
 */
static long hold_mmap_lock(struct job *job __attribute__((unused)))
{
	int disk = open(DISK, O_RDONLY | O_CLOEXEC);
	char *mem = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, disk, 0);

	return mem == MAP_FAILED ? -errno : pin_pages(mem, PAGE);
}

#define HOLDS_MMAP_LOCK(pid)	comes_to_sleep_in(pid, "folio_", "xdp_umem")

static long start_call(struct job *job)
{
	return lmt_start(job->fd, 0, NULL);
}

static long stop_call(struct job *job)
{
	return lmt_stop(job->fd);
}

SIGNALS_TEST(track_start)
{
	struct job holder = { .call = hold_mmap_lock }, job = { .call = start_call, .fd = self->fd };
	pid_t held, first, second;

	if (!disk_make())
		SKIP(return, "needs brd and dmsetup");
	held = job_start(&holder);
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	first = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(first, "[lmtrack]", "lmtrack_track_start"));
	EXPECT_TRUE(disturb(first));
	EXPECT_TRUE(comes_to_sleep_in(first, "[lmtrack]", "lmtrack_track_start"));
	EXPECT_EQ(-SIGKILL, killed(first));
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), region_info(self->fd).state == LMTRACK_IDLE));
	/* A worker has its mappings follow, and waits in turn; who comes now waits for that. */
	first = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(first, "[lmtrack]", "lmtrack_track_start"));
	EXPECT_EQ(-SIGKILL, killed(first));
	second = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(second, "[lmtrack]", "lmtrack_track_start"));
	EXPECT_TRUE(disturb(second));
	EXPECT_TRUE(comes_to_sleep_in(second, "[lmtrack]", "lmtrack_track_start"));
	/* All the while that one has not moved. */
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	EXPECT_EQ(PENDING, holder.shared->ret);
	disk_goes_on();
	EXPECT_EQ(0, ends(second));
	EXPECT_EQ(0, job.shared->ret);
	EXPECT_EQ(0, job.shared->interrupted);
	EXPECT_EQ(0, ends(held));
	EXPECT_LE(0, holder.shared->ret);
	EXPECT_EQ((long)PAGES, HARVEST());
	TRACKED();
	disk_end();
}

SIGNALS_TEST(track_stop)
{
	struct job holder = { .call = hold_mmap_lock }, job = { .call = stop_call, .fd = self->fd };
	pid_t held, pid;

	if (!disk_make())
		SKIP(return, "needs brd and dmsetup");
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	held = job_start(&holder);
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack]", "lmtrack_track_stop"));
	EXPECT_TRUE(disturb(pid));
	EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack]", "lmtrack_track_stop"));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_EQ(LMTRACK_IDLE, region_info(self->fd).state);
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack]", "lmtrack_track_stop"));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	disk_goes_on();
	EXPECT_EQ(0, ends(held));
	USABLE();
	disk_end();
}

/* Closing does not wait for it at all, nor does who dies. */
static long track_and_wait(struct job *job)
{
	int fd = lmt_reopen(job->fd);
	long ret = lmt_start(fd, 0, NULL);

	job->shared->go = !ret;
	for (;;)
		pause();
	return ret;
}

SIGNALS_TEST(tracker_dies)
{
	struct job holder = { .call = hold_mmap_lock };
	struct job job = { .call = track_and_wait, .fd = self->fd };
	pid_t held, pid;

	if (!disk_make())
		SKIP(return, "needs brd and dmsetup");
	pid = job_start(&job);
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), job.shared->go));
	held = job_start(&holder);
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), region_info(self->fd).state == LMTRACK_IDLE));
	EXPECT_TRUE(HOLDS_MMAP_LOCK(held));
	disk_goes_on();
	EXPECT_EQ(0, ends(held));
	USABLE();
	disk_end();
}

/* ---- Who waits for memory of its own ---- */

struct provider {
	struct shared *shared;
	int fd;
	void *mem;
};

/* Memory that is not there until told so; then it is all ones. */
static void *provider_run(void *arg)
{
	struct provider *provider = arg;
	static uint64_t ones[PAGE / 8];
	struct uffdio_copy copy = {
		.dst = (uintptr_t)provider->mem, .src = (uintptr_t)ones, .len = PAGE,
	};
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	memset(ones, 0xff, sizeof(ones));
	while (!provider->shared->go)
		pause_ms(10);
	ioctl(provider->fd, UFFDIO_COPY, &copy);
	return NULL;
}

static void *memory_kept_back(struct shared *shared)
{
	static struct provider provider;
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	pthread_t thread;

	provider.shared = shared;
	provider.fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	provider.mem = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	range.range.start = (uintptr_t)provider.mem;
	range.range.len = PAGE;
	if (provider.fd < 0 || provider.mem == MAP_FAILED ||
	    ioctl(provider.fd, UFFDIO_API, &api) || ioctl(provider.fd, UFFDIO_REGISTER, &range) ||
	    pthread_create(&thread, NULL, provider_run, &provider))
		return NULL;
	return provider.mem;
}

static long dirty_call(struct job *job)
{
	struct lmtrack_dirty_get get = {
		.size = sizeof(get), .flags = LMTRACK_DIRTY_CLEAR, .pages = PAGES,
		.bitmap = (uintptr_t)memory_kept_back(job->shared),
	};
	long ret = lmt_ioctl(job->fd, LMTRACK_DIRTY_GET, &get);

	return ret ?: (long)get.dirty;
}

static long hold_call(struct job *job)
{
	uint64_t held;
	long ret = hold_set(job->fd, 0, 0, PAGES, memory_kept_back(job->shared), &held);

	return ret ?: (long)held;
}

/* What was harvested and could not be delivered is dirty again. */
SIGNALS_TEST(dirty_get_delivers)
{
	struct job job = { .call = dirty_call, .fd = self->fd };
	pid_t pid;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "handle_userfault", "lmtrack_dirty_get"));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_EQ((long)PAGES, HARVEST());
	TRACKED();

	touch(self->mem, 0, PAGES, 2);
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "handle_userfault", "lmtrack_dirty_get"));
	EXPECT_TRUE(disturb(pid));
	EXPECT_EQ(PENDING, job.shared->ret);
	job.shared->go = true;
	EXPECT_EQ(0, ends(pid));
	EXPECT_EQ((long)PAGES, job.shared->ret);
	EXPECT_EQ(0, HARVEST());
}

SIGNALS_TEST(hold_set_fetches)
{
	struct job job = { .call = hold_call, .fd = self->fd };
	uint64_t none[PAGES / 64] = { }, held;
	pid_t pid;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "handle_userfault", "lmtrack_hold_set"));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_EQ(0, hold_set(self->fd, 0, 0, PAGES, none, &held));
	EXPECT_EQ(0, held);

	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "handle_userfault", "lmtrack_hold_set"));
	EXPECT_TRUE(disturb(pid));
	EXPECT_EQ(PENDING, job.shared->ret);
	job.shared->go = true;
	EXPECT_EQ(0, ends(pid));
	EXPECT_EQ((long)PAGES, job.shared->ret);
	EXPECT_EQ(0, lmt_stop(self->fd));
	USABLE();
}

/* ---- Streams ---- */

/* A stream of the region over one connection. */
static bool stream_make(int fd, int *stream, int pair[2])
{
	*stream = stream_open(1, 0);
	return *stream >= 0 && !tcp_pair(pair) && !stream_add_region(*stream, fd, 0) &&
	       !stream_add_channel(*stream, pair[0], 1);
}

/* ---- Who waits for a round, or a channel ---- */

static long wait_call(struct job *job)
{
	struct lmtrack_stream_wait result;
	long ret = stream_wait(job->stream, -1, &result);

	return ret ?: (long)result.error;
}

static long drop_call(struct job *job)
{
	struct lmtrack_stream_drop_channel drop = { .size = sizeof(drop) };

	return lmt_ioctl(job->stream, LMTRACK_STREAM_DROP_CHANNEL, &drop);
}

static long channel_call(struct job *job)
{
	struct lmtrack_channel_stats stats = { .size = sizeof(stats) };

	return lmt_ioctl(job->stream, LMTRACK_CHANNEL_STATS, &stats);
}

static bool sink_start(struct sink *sink, int fd)
{
	*sink = (struct sink){ .fd = fd, .copy = calloc(1, BYTES) };
	return sink->copy && !pthread_create(&sink->thread, NULL, sink_run, sink);
}

static void sink_end(struct sink *sink)
{
	shutdown(sink->fd, SHUT_RDWR);
	pthread_join(sink->thread, NULL);
	close(sink->fd);
	free(sink->copy);
}

/*
 * Two processes wait for the same round in the same open file. One is killed; the other is the last
 * to have the stream, and hears of the end.
 */
SIGNALS_TEST(stream_wait)
{
	struct job job[2] = { { .call = wait_call }, { .call = wait_call } };
	int stream, pair[2], room = 65536;
	struct sink sink;
	pid_t pid[2];

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_TRUE(stream_make(self->fd, &stream, pair));
	ASSERT_EQ(0, setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)));
	ASSERT_EQ(0, setsockopt(pair[1], SOL_SOCKET, SO_RCVBUF, &room, sizeof(room)));
	ASSERT_EQ(0, stream_send(stream, 1, LMTRACK_SEND_ALL));
	for (int i = 0; i < 2; i++) {
		job[i].stream = stream;
		pid[i] = job_start(&job[i]);
		EXPECT_TRUE(comes_to_sleep_in(pid[i], "[lmtrack]", "stream_wait"));
	}
	/* Each signal ends the wait, also one that has no handler and only stops the process. */
	ASSERT_EQ(0, kill(pid[1], SIGUSR1));
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), job[1].shared->interrupted == 1));
	EXPECT_TRUE(disturb(pid[1]));
	EXPECT_TRUE(comes_to_sleep_in(pid[1], "[lmtrack]", "stream_wait"));
	EXPECT_LT(1, job[1].shared->interrupted);
	EXPECT_EQ(-SIGKILL, killed(pid[0]));
	EXPECT_EQ(PENDING, job[0].shared->ret);
	EXPECT_TRUE(comes_to_sleep_in(pid[1], "[lmtrack]", "stream_wait"));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(stream, 0, NULL));
	close(stream);
	close(pair[0]);
	/* Only now there is somebody who reads. */
	EXPECT_EQ(-EBUSY, lmt_stop(self->fd));
	EXPECT_EQ(PENDING, job[1].shared->ret);
	ASSERT_TRUE(sink_start(&sink, pair[1]));
	EXPECT_EQ(0, ends(pid[1]));
	EXPECT_EQ(0, job[1].shared->ret);
	pthread_join(sink.thread, NULL);
	EXPECT_EQ(1, sink.ended);
	EXPECT_EQ(0, memcmp(self->mem, sink.copy, BYTES));
	close(sink.fd);
	free(sink.copy);
	TRACKED();
	EXPECT_EQ(0, lmt_stop(self->fd));
	USABLE();
}

/* ---- Who waits for a connection, or what has it ---- */

/* It keeps the lock of the socket until it is killed. What it was to send never leaves. */
static long hold_socket(struct job *job)
{
	return send(job->fd, memory_kept_back(job->shared), PAGE, 0);
}

#define HOLDS_SOCKET(pid)	comes_to_sleep_in(pid, "handle_userfault", "tcp_sendmsg")

/* The kernel thread of a channel; no other test's is there any more. */
static pid_t thread_find(unsigned int channel)
{
	char command[64], text[16] = "";
	FILE *pipe;

	snprintf(command, sizeof(command), "pgrep -x lmtrack-%u", channel);
	pipe = popen(command, "re");
	if (!pipe || !fgets(text, sizeof(text), pipe))
		text[0] = 0;
	if (pipe)
		pclose(pipe);
	return atoi(text);
}

/* It waits for the lock of its socket. */
static bool stands(unsigned int channel)
{
	pid_t thread = 0;

	return EVENTUALLY(20 * lmt_slower(), (thread = thread_find(channel)) > 0) &&
	       comes_to_sleep_in(thread, "lock_sock", "channel_thread");
}

/*
 * A channel that is dropped is waited for until its thread has left the round. This one stands, and
 * with it who drops the channel, and who needs the stream meanwhile.
 */
SIGNALS_TEST(drop_channel)
{
	struct lmtrack_stream_drop_channel drop = { .size = sizeof(drop) };
	struct lmtrack_stream_add_channel add = {
		.size = sizeof(add), .flags = LMTRACK_CHANNEL_REPLACE,
	};
	struct job holder = { .call = hold_socket }, job = { .call = drop_call };
	struct job other = { .call = channel_call };
	struct lmtrack_stream_wait result;
	pid_t held, dropping, waiting;
	int stream, pair[2];
	struct sink sink;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_TRUE(stream_make(self->fd, &stream, pair));
	holder.fd = pair[0];
	held = job_start(&holder);
	EXPECT_TRUE(HOLDS_SOCKET(held));
	job.stream = stream;
	other.stream = stream;
	ASSERT_EQ(0, stream_send(stream, 1, LMTRACK_SEND_ALL));
	EXPECT_TRUE(stands(0));
	dropping = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(dropping, "[lmtrack]", "stream_drop_channel"));
	waiting = job_start(&other);
	EXPECT_TRUE(comes_to_sleep_in(waiting, "[lmtrack]", "stream_channel_stats"));
	EXPECT_TRUE(disturb(waiting));
	EXPECT_EQ(-SIGKILL, killed(waiting));
	EXPECT_TRUE(disturb(dropping));
	EXPECT_TRUE(comes_to_sleep_in(dropping, "[lmtrack]", "stream_drop_channel"));
	EXPECT_EQ(-SIGKILL, killed(dropping));
	/* Lost, but not dropped; the round has not ended. */
	EXPECT_EQ(-ETIMEDOUT, stream_wait(stream, 0, &result));
	EXPECT_EQ(1, result.lost);
	EXPECT_EQ(-EBUSY, stream_send(stream, 2, LMTRACK_SEND_DIRTY));
	add.fd = pair[0];
	EXPECT_EQ(-EBUSY, lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &add));
	EXPECT_TRUE(HOLDS_SOCKET(held));
	EXPECT_EQ(-SIGKILL, killed(held));
	EXPECT_EQ(0, stream_wait(stream, 10000 * lmt_slower(), &result));
	EXPECT_EQ(ECANCELED, result.error);
	EXPECT_EQ(-EPIPE, stream_send(stream, 2, LMTRACK_SEND_DIRTY));
	close(pair[0]);
	close(pair[1]);
	ASSERT_EQ(0, tcp_pair(pair));
	add.fd = pair[0];
	EXPECT_EQ(-EEXIST, lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &add));
	EXPECT_EQ(0, lmt_ioctl(stream, LMTRACK_STREAM_DROP_CHANNEL, &drop));
	EXPECT_EQ(ECANCELED, drop.error);
	/* The chunk that it had taken; the other it never got to. */
	EXPECT_EQ(CHUNK / PAGE, drop.pages);
	EXPECT_EQ(-EALREADY, lmt_ioctl(stream, LMTRACK_STREAM_DROP_CHANNEL, &drop));
	EXPECT_EQ(0, lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &add));
	ASSERT_TRUE(sink_start(&sink, pair[1]));
	EXPECT_EQ(0, stream_send(stream, 2, LMTRACK_SEND_DIRTY));
	EXPECT_EQ(0, round_error(stream));
	EXPECT_TRUE(sink_has(&sink, 2));
	EXPECT_EQ(0, memcmp(self->mem, sink.copy, BYTES));
	TRACKED();
	close(stream);
	close(pair[0]);
	sink_end(&sink);
	EXPECT_EQ(0, lmt_stop(self->fd));
	USABLE();
}

static long cancel_call(struct job *job)
{
	return stream_cancel(job->stream);
}

/* A stream of its own with two channels, of which one stands. */
static long own_and_wait(struct job *job)
{
	int fd = lmt_reopen(job->fd);
	long ret = lmt_start(fd, 0, NULL);

	job->stream = stream_open(1, 0);
	ret = ret ?: stream_add_region(job->stream, fd, 0);
	ret = ret ?: stream_add_channel(job->stream, job->socket, 1);
	ret = ret ?: stream_add_channel(job->stream, job->other, 1);
	ret = ret > 0 ? 0 : ret;
	ret = ret ?: stream_send(job->stream, 1, LMTRACK_SEND_ALL);
	close(fd);
	job->shared->go = !ret && stands(0);
	return job->then ? job->then(job) : pause();
}

static long close_call(struct job *job)
{
	return close(job->stream);
}

/* Another process waits for the channel to be dropped, and has the stream's lock. */
static long cancel_beside_drop(struct job *job)
{
	struct job drop = { .call = drop_call, .stream = job->stream };
	pid_t pid = job_start(&drop);

	if (!comes_to_sleep_in(pid, "[lmtrack]", "stream_drop_channel"))
		return -ETIME;
	return cancel_call(job) ?: killed(pid) == -SIGKILL ? 0 : -ECHILD;
}

/* Hand it to nobody: a worker of the kernel's closes what was on its way. */
static long close_on_the_way(struct job *job)
{
	char room[CMSG_SPACE(sizeof(int))] = { };
	struct iovec byte = { .iov_base = "", .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &byte, .msg_iovlen = 1, .msg_control = room,
		.msg_controllen = sizeof(room),
	};
	struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
	int pair[2], fds[2], i;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	/* The stream, and then the end that would have to be read for it. */
	fds[0] = job->stream;
	fds[1] = pair[1];
	for (i = 0; i < 2; i++) {
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(head), &fds[i], sizeof(int));
		if (sendmsg(pair[0], &msg, 0) != 1)
			return -errno;
	}
	close(job->stream);
	close(pair[0]);
	close(pair[1]);
	/* Who makes another one has the kernel look for what nobody can reach. */
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	close(pair[0]);
	close(pair[1]);
	return 0;
}

/*
 * Whoever has the stream dies, closes or cancels it, or is killed while it does: it does not stay for
 * the connection. When this is let go of, so is everything else.
 */
SIGNALS_TEST(stream_ends)
{
	long (*const ends_by[])(struct job *) = {
		NULL, close_call, cancel_call, cancel_beside_drop, close_on_the_way,
	};
	struct job holder = { .call = hold_socket };
	int pair[2], other[2];
	long long users;

	/* What tracking leaves, and the module as RDMA has it. */
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, lmt_stop(self->fd));
	users = module_users();
	for (unsigned int i = 0; i < ARRAY_SIZE(ends_by); i++) {
		struct job job = { .call = own_and_wait, .fd = self->fd, .then = ends_by[i] };
		struct sink sink;
		pid_t held, pid;

		TH_LOG("%u", i);
		ASSERT_EQ(0, tcp_pair(pair));
		ASSERT_EQ(0, tcp_pair(other));
		ASSERT_TRUE(sink_start(&sink, other[1]));
		holder.fd = pair[0];
		job.socket = pair[0];
		job.other = other[0];
		held = job_start(&holder);
		EXPECT_TRUE(HOLDS_SOCKET(held));
		pid = job_start(&job);
		EXPECT_TRUE(EVENTUALLY(30 * lmt_slower(), job.shared->go));
		if (ends_by[i] == close_call) {
			EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack]", "stream_release"));
			EXPECT_TRUE(disturb(pid));
			EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack]", "stream_release"));
			EXPECT_EQ(PENDING, job.shared->ret);
		}
		if (ends_by[i] && ends_by[i] != close_call) {
			EXPECT_EQ(0, ends(pid));
			EXPECT_EQ(0, job.shared->ret);
		} else {
			EXPECT_EQ(-SIGKILL, killed(pid));
		}
		/* All the while the thread of the channel has not moved: it, and its open file. */
		EXPECT_TRUE(HOLDS_SOCKET(held));
		EXPECT_TRUE(stands(0));
		EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
		EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), module_users() == users + 2))
			TH_LOG("%lld users, %lld before", module_users(), users);
		EXPECT_EQ(-SIGKILL, killed(held));
		close(pair[0]);
		close(pair[1]);
		close(other[0]);
		sink_end(&sink);
		USABLE();
		EXPECT_EQ(0, lmt_stop(self->fd));
	}
}

/* ---- What is closed when all is over ---- */

/* With bytes that nobody takes, on a socket that is to linger for them. */
static long own_lingering(struct job *job)
{
	struct linger linger = { .l_onoff = 1, .l_linger = 1000 };
	int fd = lmt_reopen(job->fd), room = 65536;
	long ret = lmt_start(fd, 0, NULL);

	ret = ret ?: E(setsockopt(job->socket, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)));
	ret = ret ?: E(setsockopt(job->socket, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)));
	job->stream = stream_open(1, 0);
	ret = ret ?: stream_add_region(job->stream, fd, 0);
	ret = ret ?: stream_add_channel(job->stream, job->socket, 1);
	ret = ret > 0 ? 0 : ret;
	ret = ret ?: stream_send(job->stream, 1, LMTRACK_SEND_ALL);
	close(job->socket);
	close(fd);
	pause_ms(200);
	job->shared->go = !ret;
	if (job->then)
		job->then(job);
	return pause();
}

/* It keeps neither whoever dies, nor a thread of the kernel's that nobody could end. */
SIGNALS_TEST(lingering)
{
	long (*const ends_by[])(struct job *) = { NULL, close_on_the_way };
	int pair[2], room = 65536;
	long long users;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, lmt_stop(self->fd));
	users = module_users();
	for (unsigned int i = 0; i < ARRAY_SIZE(ends_by); i++) {
		struct job job = { .call = own_lingering, .fd = self->fd, .then = ends_by[i] };
		pid_t pid;

		ASSERT_EQ(0, tcp_pair(pair));
		ASSERT_EQ(0, setsockopt(pair[1], SOL_SOCKET, SO_RCVBUF, &room, sizeof(room)));
		job.socket = pair[0];
		pid = job_start(&job);
		close(pair[0]);
		EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), job.shared->go));
		pause_ms(200);
		EXPECT_EQ(-SIGKILL, killed(pid));
		/* Nobody has read a byte. */
		EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(),
				       region_info(self->fd).state == LMTRACK_IDLE &&
				       module_users() == users))
			TH_LOG("%lld users, %lld before", module_users(), users);
		close(pair[1]);
		USABLE();
		EXPECT_EQ(0, lmt_stop(self->fd));
	}
}

/* ---- Who waits for a peer that does not answer ---- */

static long add_rdma_call(struct job *job)
{
	struct lmtrack_stream_add_rdma args = {
		.size = sizeof(args), .timeout_ms = LMTRACK_RDMA_TIMEOUT_MAX_MS,
		.window_pages = LMTRACK_CHUNK_PAGES,
	};
	struct sockaddr_in remote = {
		.sin_family = AF_INET, .sin_port = job->fd, .sin_addr.s_addr = inet_addr(RDMA_IPV4),
	};

	memcpy(args.remote, &remote, sizeof(remote));
	return lmt_ioctl(job->stream, LMTRACK_STREAM_ADD_RDMA, &args);
}

SIGNALS_TEST(add_rdma)
{
	struct sockaddr_in local = {
		.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(RDMA_IPV4),
	};
	struct rdma_event_channel *events;
	struct job job = { .call = add_rdma_call };
	struct rdma_cm_id *listener;
	pid_t pid;

	if (!rdma_link_up())
		SKIP(return, "no soft-RoCE here");
	/* It uses the module, too, and stays. */
	self->users += !!access("/sys/module/lmtrack_rdma", F_OK);
	ASSERT_TRUE(rdma_module_load());
	events = rdma_create_event_channel();
	ASSERT_NE(NULL, events);
	ASSERT_EQ(0, rdma_create_id(events, &listener, NULL, RDMA_PS_TCP));
	ASSERT_EQ(0, rdma_bind_addr(listener, (void *)&local));
	ASSERT_EQ(0, rdma_listen(listener, 4));
	job.fd = rdma_get_src_port(listener);
	job.stream = stream_open(1, 0);
	ASSERT_LE(0, job.stream);
	pid = job_start(&job);
	EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack_rdma]", "stream_add_rdma"))
		TH_LOG("%ld", job.shared->ret);
	EXPECT_TRUE(disturb(pid));
	EXPECT_TRUE(EVENTUALLY(10 * lmt_slower(), job.shared->interrupted));
	EXPECT_TRUE(comes_to_sleep_in(pid, "[lmtrack_rdma]", "stream_add_rdma"));
	EXPECT_EQ(-SIGKILL, killed(pid));
	EXPECT_EQ(PENDING, job.shared->ret);
	close(job.stream);
	rdma_destroy_id(listener);
	rdma_destroy_event_channel(events);
}

TEST_HARNESS_MAIN
