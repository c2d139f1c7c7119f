// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=socket,--wrap=connect,--wrap=bind,--wrap=listen,--wrap=accept4,--wrap=shutdown -Wl,--wrap=getsockopt,--wrap=setsockopt,--wrap=getsockname,--wrap=getpeername,--wrap=getaddrinfo,--wrap=getnameinfo -Wl,--wrap=send,--wrap=sendmsg,--wrap=recv,--wrap=recvmsg,--wrap=poll,--wrap=ppoll -Wl,--wrap=eventfd,--wrap=eventfd_read,--wrap=fcntl,--wrap=open,--wrap=fopen,--wrap=opendir -Wl,--wrap=memfd_create,--wrap=pread,--wrap=ioctl,--wrap=syscall,--wrap=fallocate,--wrap=fstat,--wrap=fstatfs -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup,--wrap=free,--wrap=mmap,--wrap=madvise,--wrap=mincore -Wl,--wrap=pthread_create,--wrap=RAND_bytes
/*
 * Whatever the engines ask of the C library and the kernel fails, one call at a time: each call of
 * the network, each descriptor, each allocation, each thread, at either side. After each fault
 * both engines have ended and said what failed; exactly one side has the guest, or none of them
 * knows; where it runs every byte is right; and no descriptor, thread or memory is left. What a call
 * may say at any time, that it was interrupted, would block, or did a part, costs nothing at all.
 *
 * Calls that are made often fail at as many places as LMTRACK_FAULTS says (6), spread evenly; 0: all.
 */
#define SOURCE_REGION KMIG_REGION_MEMFD
#include "kselftest_harness.h"
#include "lib_pair.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>

#define GUEST_BYTES (6 * MIB + 5 * PAGE_BYTES)
#define HANGS_S 40
#define SOME 6

/* What fails instead of an errno: the call does a part of it, or the other side has closed. */
enum { PART = 10000, CLOSED };

enum kind {
	SOCKET, CONNECT, BIND, LISTEN, ACCEPT, SHUTDOWN, GETSOCKOPT, SETSOCKOPT, GETSOCKNAME,
	GETPEERNAME, GETADDRINFO, GETNAMEINFO, SEND, SENDMSG, RECV, RECVMSG, POLL, PPOLL,
	EVENTFD, EVENTFD_READ, FCNTL, OPEN, FOPEN, OPENDIR, MEMFD, PREAD, IOCTL,
	SYSCALL, FALLOCATE, FSTAT, FSTATFS,
	MALLOC, CALLOC, REALLOC, STRDUP, MMAP, MADVISE, MINCORE,
	THREAD, RANDOM, KINDS
};

/* Each kind's errors, up to a 0. Those before @harmless must cost nothing. */
static const struct {
	const char *name;
	unsigned int harmless;
	int errors[8];
} kinds[KINDS] = {
	[SOCKET] = { "socket", 0, { EMFILE } },
	[CONNECT] = { "connect", 0, { ECONNREFUSED, ENETUNREACH, EADDRNOTAVAIL } },
	[BIND] = { "bind", 0, { EADDRINUSE } },
	[LISTEN] = { "listen", 0, { EADDRINUSE } },
	[ACCEPT] = { "accept4", 3, { EINTR, EAGAIN, ECONNABORTED, EMFILE } },
	[SHUTDOWN] = { "shutdown", 0, { ENOTCONN } },
	[GETSOCKOPT] = { "getsockopt", 0, { ENOBUFS } },
	[SETSOCKOPT] = { "setsockopt", 0, { ENOPROTOOPT } },
	[GETSOCKNAME] = { "getsockname", 0, { ENOBUFS } },
	[GETPEERNAME] = { "getpeername", 0, { ENOTCONN } },
	[GETADDRINFO] = { "getaddrinfo", 0, { EAI_AGAIN, EAI_MEMORY } },
	[GETNAMEINFO] = { "getnameinfo", 0, { EAI_MEMORY } },
	[SEND] = { "send", 3, { EINTR, EAGAIN, PART, ENOBUFS, ECONNRESET } },
	[SENDMSG] = { "sendmsg", 3, { EINTR, EAGAIN, PART, ENOMEM, EPIPE } },
	[RECV] = { "recv", 3, { EINTR, EAGAIN, PART, CLOSED, ECONNRESET } },
	[RECVMSG] = { "recvmsg", 1, { EINTR, ENOMEM } },
	[POLL] = { "poll", 1, { EINTR, ENOMEM } },
	[PPOLL] = { "ppoll", 1, { EINTR, ENOMEM } },
	[EVENTFD] = { "eventfd", 0, { EMFILE } },
	[EVENTFD_READ] = { "eventfd_read", 2, { EAGAIN, EINTR } },
	[FCNTL] = { "fcntl", 0, { EMFILE } },
	[OPEN] = { "open", 0, { EMFILE, EACCES } },
	[FOPEN] = { "fopen", 0, { EMFILE } },
	[OPENDIR] = { "opendir", 0, { ENOMEM } },
	[MEMFD] = { "memfd_create", 0, { EMFILE } },
	[PREAD] = { "pread", 0, { EIO } },
	[IOCTL] = { "ioctl", 0, { ENOMEM } },
	[SYSCALL] = { "syscall", 0, { EPERM } },
	[FALLOCATE] = { "fallocate", 0, { ENOSPC } },
	[FSTAT] = { "fstat", 0, { EIO } },
	[FSTATFS] = { "fstatfs", 0, { EIO } },
	[MALLOC] = { "malloc", 0, { ENOMEM } },
	[CALLOC] = { "calloc", 0, { ENOMEM } },
	[REALLOC] = { "realloc", 0, { ENOMEM } },
	[STRDUP] = { "strdup", 0, { ENOMEM } },
	[MMAP] = { "mmap", 0, { ENOMEM } },
	[MADVISE] = { "madvise", 0, { ENOMEM } },
	[MINCORE] = { "mincore", 0, { EAGAIN } },
	[THREAD] = { "pthread_create", 0, { EAGAIN } },
	[RANDOM] = { "RAND_bytes", 0, { EIO } },
};

enum who { NOBODY, THE_SOURCE, THE_DESTINATION, SIDES };
static const char *const names[SIDES] = { "nobody", "the source", "the destination" };

/* ---- The calls ---- */

/* Whose thread this is: an engine's threads beget its threads. */
static __thread enum who who;

static _Atomic unsigned int calls[SIDES][KINDS];
static _Atomic long blocks;		/* of memory, not freed yet */

static struct {
	enum who who;
	enum kind kind;
	unsigned int at;		/* the first call is 1 */
	int error;
	_Atomic bool done;
} fault;

/* The error this call ends with; 0: it is made. */
static int fails(enum kind kind)
{
	if (who == NOBODY || ++calls[who][kind] != fault.at || fault.kind != kind || fault.who != who)
		return 0;
	fault.done = true;
	errno = fault.error;
	return fault.error;
}

#define CALL(type, name, kind, failed, params, args)						\
	type __real_##name params;								\
	type __wrap_##name params;								\
	type __wrap_##name params { return fails(kind) ? (failed) : __real_##name args; }

CALL(int, socket, SOCKET, -1, (int d, int t, int p), (d, t, p))
CALL(int, connect, CONNECT, -1, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
CALL(int, bind, BIND, -1, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
CALL(int, listen, LISTEN, -1, (int fd, int n), (fd, n))
CALL(int, accept4, ACCEPT, -1, (int fd, struct sockaddr *a, socklen_t *n, int f), (fd, a, n, f))
CALL(int, shutdown, SHUTDOWN, -1, (int fd, int how), (fd, how))
CALL(int, getsockopt, GETSOCKOPT, -1, (int fd, int l, int o, void *v, socklen_t *n), (fd, l, o, v, n))
CALL(int, setsockopt, SETSOCKOPT, -1, (int fd, int l, int o, const void *v, socklen_t n), (fd, l, o, v, n))
CALL(int, getsockname, GETSOCKNAME, -1, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n))
CALL(int, getpeername, GETPEERNAME, -1, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n))
CALL(int, getaddrinfo, GETADDRINFO, fault.error,
     (const char *h, const char *s, const struct addrinfo *i, struct addrinfo **r), (h, s, i, r))
CALL(int, getnameinfo, GETNAMEINFO, fault.error,
     (const struct sockaddr *a, socklen_t n, char *h, socklen_t hn, char *s, socklen_t sn, int f),
     (a, n, h, hn, s, sn, f))
CALL(ssize_t, recvmsg, RECVMSG, -1, (int fd, struct msghdr *m, int f), (fd, m, f))
CALL(int, poll, POLL, -1, (struct pollfd *f, nfds_t n, int t), (f, n, t))
CALL(int, ppoll, PPOLL, -1, (struct pollfd *f, nfds_t n, const struct timespec *t, const sigset_t *s), (f, n, t, s))
CALL(int, eventfd, EVENTFD, -1, (unsigned int n, int f), (n, f))
CALL(int, eventfd_read, EVENTFD_READ, -1, (int fd, eventfd_t *v), (fd, v))
CALL(FILE *, fopen, FOPEN, NULL, (const char *p, const char *m), (p, m))
CALL(DIR *, opendir, OPENDIR, NULL, (const char *p), (p))
CALL(int, memfd_create, MEMFD, -1, (const char *n, unsigned int f), (n, f))
CALL(ssize_t, pread, PREAD, -1, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
CALL(int, fallocate, FALLOCATE, -1, (int fd, int m, off_t o, off_t n), (fd, m, o, n))
CALL(int, fstat, FSTAT, -1, (int fd, struct stat *s), (fd, s))
CALL(int, fstatfs, FSTATFS, -1, (int fd, struct statfs *s), (fd, s))
CALL(void *, mmap, MMAP, MAP_FAILED, (void *a, size_t n, int p, int f, int fd, off_t o), (a, n, p, f, fd, o))
CALL(int, madvise, MADVISE, -1, (void *a, size_t n, int v), (a, n, v))
CALL(int, mincore, MINCORE, -1, (void *a, size_t n, unsigned char *v), (a, n, v))
CALL(int, RAND_bytes, RANDOM, 0, (unsigned char *b, int n), (b, n))

/* Those with an argument that may be there. */
#define CALL_MORE(name, kind, params, last, args)						\
	int __real_##name params;								\
	int __wrap_##name params;								\
	int __wrap_##name params								\
	{											\
		va_list list;									\
		long arg;									\
												\
		va_start(list, last);								\
		arg = va_arg(list, long);							\
		va_end(list);									\
		return fails(kind) ? -1 : __real_##name args;					\
	}

CALL_MORE(fcntl, FCNTL, (int fd, int cmd, ...), cmd, (fd, cmd, arg))
CALL_MORE(open, OPEN, (const char *path, int flags, ...), flags, (path, flags, arg))
CALL_MORE(ioctl, IOCTL, (int fd, unsigned long cmd, ...), cmd, (fd, cmd, arg))

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...)
{
	va_list list;
	long a[6];

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	return fails(SYSCALL) ? -1 : __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* Those that may do a part. */
ssize_t __real_send(int fd, const void *bytes, size_t n, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t n, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t n, int flags)
{
	int error = fails(SEND);

	return error == PART ? __real_send(fd, bytes, (n + 1) / 2, flags) :
	       error ? -1 : __real_send(fd, bytes, n, flags);
}

ssize_t __real_recv(int fd, void *bytes, size_t n, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t n, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t n, int flags)
{
	int error = fails(RECV);

	return error == PART ? __real_recv(fd, bytes, (n + 1) / 2, flags) :
	       error == CLOSED ? 0 : error ? -1 : __real_recv(fd, bytes, n, flags);
}

ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	int error = fails(SENDMSG);
	struct iovec half;
	struct msghdr some;

	if (error != PART)
		return error ? -1 : __real_sendmsg(fd, msg, flags);
	half = (struct iovec){ msg->msg_iov[0].iov_base, (msg->msg_iov[0].iov_len + 1) / 2 };
	some = *msg;
	some.msg_iov = &half;
	some.msg_iovlen = 1;
	return __real_sendmsg(fd, &some, flags);
}

/* Memory is counted, whoever it belongs to. */
void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_malloc(size_t n)
{
	void *p = fails(MALLOC) ? NULL : __real_malloc(n);

	blocks += !!p;
	return p;
}

void *__real_calloc(size_t n, size_t m);
void *__wrap_calloc(size_t n, size_t m);
void *__wrap_calloc(size_t n, size_t m)
{
	void *p = fails(CALLOC) ? NULL : __real_calloc(n, m);

	blocks += !!p;
	return p;
}

void *__real_realloc(void *old, size_t n);
void *__wrap_realloc(void *old, size_t n);
void *__wrap_realloc(void *old, size_t n)
{
	void *p = fails(REALLOC) ? NULL : __real_realloc(old, n);

	blocks += p && !old;
	return p;
}

char *__real_strdup(const char *text);
char *__wrap_strdup(const char *text);
char *__wrap_strdup(const char *text)
{
	char *p = fails(STRDUP) ? NULL : __real_strdup(text);

	blocks += !!p;
	return p;
}

void __real_free(void *p);
void __wrap_free(void *p);
void __wrap_free(void *p)
{
	blocks -= !!p;
	__real_free(p);
}

struct begun {
	enum who who;
	void *(*run)(void *data);
	void *data;
};

static void *begin_thread(void *data)
{
	struct begun begun = *(struct begun *)data;

	__real_free(data);
	who = begun.who;
	return begun.run(begun.data);
}

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data)
{
	struct begun *begun;
	int err = fails(THREAD);

	if (err)
		return err;
	begun = __real_malloc(sizeof(*begun));
	*begun = (struct begun){ who, run, data };
	err = __real_pthread_create(thread, attr, begin_thread, begun);
	if (err)
		__real_free(begun);
	return err;
}

/* ---- What is left ---- */

static unsigned int entries(const char *path)
{
	DIR *dir = __real_opendir(path);
	unsigned int count = 0;

	while (dir && readdir(dir))
		count++;
	if (dir)
		closedir(dir);
	return count;
}

/* A thread that was joined may still be seen for a moment. */
static unsigned int threads(unsigned int expected)
{
	unsigned int count;

	for (int i = 0; i < 1000; i++) {
		count = entries("/proc/self/task");
		if (count == expected)
			break;
		usleep(1000);
	}
	return count;
}

/* ---- A migration with a fault ---- */

FIXTURE(faults) {
	struct world *world;
	struct side source, destination;
	uint8_t *ram;
};

FIXTURE_VARIANT(faults) {
	enum who who;
	enum kind first, last;
};

#define VARIANTS(name, ...)									\
	FIXTURE_VARIANT_ADD(faults, source_##name) { THE_SOURCE, __VA_ARGS__ };			\
	FIXTURE_VARIANT_ADD(faults, destination_##name) { THE_DESTINATION, __VA_ARGS__ }

VARIANTS(connections, SOCKET, GETNAMEINFO);
VARIANTS(transfer, SEND, PPOLL);
VARIANTS(descriptors, EVENTFD, FSTATFS);
VARIANTS(memory, MALLOC, MINCORE);
VARIANTS(threads, THREAD, RANDOM);

FIXTURE_SETUP(faults)
{
	(void)self;
	(void)variant;
}

FIXTURE_TEARDOWN(faults)
{
	(void)self;
	(void)variant;
}

static void *faulty_destination(void *data)
{
	struct side *side = data;

	who = THE_DESTINATION;
	destination_main(side);
	who = NOBODY;
	/* Nobody is to wait for a port of one that did not come to listen. */
	if (!side->world->port)
		side->world->port = 1;
	return NULL;
}

/* How far the destination has come. */
static _Atomic int reached;

static void note_state(struct side *side, int at)
{
	(void)side;
	if (at < KMIG_STATES)
		reached = at;
}

static _Atomic uint64_t began_s;

static uint64_t now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

/* Says which fault it was that an engine hangs after; the test has no time to. */
static void *watch(void *data)
{
	(void)data;
	for (;;) {
		uint64_t began = began_s;

		usleep(500000);
		if (!began || began != began_s || now_s() - began < HANGS_S * lmt_slower())
			continue;
		printf("# it hangs: %s, call %u of %s ends with %d\n", names[fault.who], fault.at,
		       kinds[fault.kind].name, fault.error);
		fflush(stdout);
		abort();
	}
	return NULL;
}

static void move(FIXTURE_DATA(faults) *self)
{
	pthread_t thread;

	memset(calls, 0, sizeof(calls));
	fault.done = false;
	self->world = new_world();
	side_init(&self->source, self->world, true, GUEST_BYTES);
	side_init(&self->destination, self->world, false, GUEST_BYTES);
	self->ram = kmig_region_map(self->source.region);
	for (uint64_t at = 0; at < GUEST_BYTES; at += 512)
		*(uint64_t *)(self->ram + at) = at * 0x9e3779b97f4a7c15 + 1;
	kmig_region_map(self->destination.region);
	self->source.guest = &self->world->guest;
	self->source.channels = 2;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	self->source.max_rounds = 3;
	self->source.state_length = self->destination.state_length = 70000;
	/* For a channel, and for the peer. */
	self->source.channel_wait_ms = 500;
	/* A machine that has other things to do is no silent peer. */
	self->source.timeout_ms = self->destination.timeout_ms = 2 * TIMEOUT_MS;
	self->destination.hook = note_state;
	reached = KMIG_STATE_HELLO;
	self->world->source_result = self->world->destination_result = 1;
	began_s = now_s();
	guest_start(&self->world->guest, self->ram, -1, GUEST_BYTES, MIB, 100);
	__real_pthread_create(&thread, NULL, faulty_destination, &self->destination);
	while (!self->world->port)
		usleep(500);
	who = THE_SOURCE;
	if (source_main(&self->source) && self->world->source_result == 1)
		self->world->source_result = -EINVAL;
	who = NOBODY;
	/* As long as no source has greeted it, it waits for one. */
	for (int i = 0; i < 100 && self->world->source_result && self->world->destination_result == 1; i++)
		usleep(1000);
	if (self->world->destination_result == 1 && reached == KMIG_STATE_HELLO)
		kmig_destination_abort(self->destination.engine);
	pthread_join(thread, NULL);
	guest_end(&self->world->guest);
	began_s = 0;
}

static void end(FIXTURE_DATA(faults) *self)
{
	side_end(&self->source);
	side_end(&self->destination);
	munmap(self->world, sizeof(*self->world));
}

static bool says_why(const struct side *side, int result)
{
	const char *text = side->error[0] ? side->error : kmig_ctx_error(side->ctx);

	return !result || (text[0] && !strstr(text, "Success"));
}

/* What must be so after any fault: what is not, or NULL. */
static const char *wrong(FIXTURE_DATA(faults) *self, bool harmless)
{
	struct world *world = self->world;
	bool here = world->source_runs, there = world->destination_runs;

	if (here && there)
		return "the guest runs at both sides";
	if (world->source_verdict == KMIG_COMPLETED && !there)
		return "the source says that it has moved, and it has not";
	if (world->source_verdict != KMIG_COMPLETED && world->source_verdict != KMIG_UNKNOWN && !here)
		return "the source has not moved the guest, and does not run it";
	if (!says_why(&self->source, world->source_result))
		return "the source does not say what is wrong";
	if (!says_why(&self->destination, world->destination_result))
		return "the destination does not say what is wrong";
	if (there && !self->destination.state_right)
		return "the device state is wrong";
	if (there && memcmp(self->ram, kmig_region_map(self->destination.region), GUEST_BYTES))
		return "memory is wrong";
	if (harmless && (world->source_result || world->destination_result))
		return "it did not move, for no reason";
	return NULL;
}

static unsigned int places(unsigned int count)
{
	const char *value = getenv("LMTRACK_FAULTS");
	unsigned int most = value ? atoi(value) : SOME;

	return most && most < count ? most : count;
}

TEST_F_TIMEOUT(faults, each_call_once, 600)
{
	unsigned int usual[KINDS], injected = 0, moved = 0, fds, tasks;
	pthread_t watcher;
	long held;

	__real_pthread_create(&watcher, NULL, watch, NULL);
	fault.who = NOBODY;
	/* Twice: what is set up once, as in libcrypto, is no leak. */
	for (int i = 0; i < 2; i++) {
		move(self);
		if (self->world->source_result == -EOPNOTSUPP)
			SKIP(return, "this kernel has no PAGEMAP_SCAN");
		ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);
		ASSERT_EQ(NULL, wrong(self, true)) TH_LOG("%s", wrong(self, true));
		end(self);
	}
	for (int i = 0; i < KINDS; i++)
		usual[i] = calls[variant->who][i];
	tasks = threads(2);
	fds = entries("/proc/self/fd");
	held = blocks;

	for (enum kind kind = variant->first; kind <= variant->last; kind++) {
		unsigned int count = places(usual[kind]);

		for (unsigned int i = 0; i < count; i++) {
			for (unsigned int e = 0; e < 8 && kinds[kind].errors[e]; e++) {
				char outcome[2048];
				const char *what;

				fault.who = variant->who;
				fault.kind = kind;
				fault.at = 1 + (uint64_t)i * usual[kind] / count;
				fault.error = kinds[kind].errors[e];
				move(self);
				what = wrong(self, e < kinds[kind].harmless);
				injected += fault.done;
				moved += self->world->source_verdict == KMIG_COMPLETED;
				snprintf(outcome, sizeof(outcome), "source %d \"%s\", destination %d \"%s\"",
					 self->world->source_result, self->source.error,
					 self->world->destination_result, self->destination.error);
				end(self);
				if (!what && threads(tasks) != tasks)
					what = "threads are left";
				if (!what && entries("/proc/self/fd") != fds)
					what = "descriptors are left";
				if (!what && blocks != held)
					what = "memory is left";
				EXPECT_EQ(NULL, what) {
					TH_LOG("%s, call %u of %u of %s ends with %d: %s; %s", names[fault.who],
					       fault.at, usual[kind], kinds[kind].name, fault.error, what, outcome);
					fds = entries("/proc/self/fd");
					held = blocks;
					tasks = entries("/proc/self/task");
				}
			}
		}
	}
	TH_LOG("%u faults, in spite of %u of them the guest has moved", injected, moved);
	EXPECT_LT(0, injected);
}

TEST_HARNESS_MAIN
