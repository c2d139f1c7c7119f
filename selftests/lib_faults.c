// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=mincore,--wrap=madvise,--wrap=fstat,--wrap=fstatfs,--wrap=pread
// LDFLAGS: -Wl,--wrap=ioctl,--wrap=open,--wrap=syscall,--wrap=fopen,--wrap=memfd_create,--wrap=ftruncate,--wrap=fallocate,--wrap=mmap,--wrap=munmap,--wrap=eventfd,--wrap=eventfd_read
// LDFLAGS: -Wl,--wrap=socket,--wrap=connect,--wrap=bind,--wrap=listen,--wrap=accept4,--wrap=getsockopt,--wrap=setsockopt,--wrap=getsockname,--wrap=getpeername,--wrap=shutdown,--wrap=fcntl
// LDFLAGS: -Wl,--wrap=getaddrinfo,--wrap=freeaddrinfo,--wrap=getnameinfo,--wrap=send,--wrap=sendmsg,--wrap=recv,--wrap=recvmsg,--wrap=poll,--wrap=ppoll
// LDFLAGS: -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup,--wrap=free,--wrap=__sched_cpualloc,--wrap=pthread_create,--wrap=pthread_join
// LDFLAGS: -Wl,--wrap=EVP_MAC_fetch,--wrap=EVP_MAC_free,--wrap=EVP_MAC_CTX_new,--wrap=EVP_MAC_CTX_free,--wrap=EVP_MAC_init,--wrap=RAND_bytes
// LDFLAGS: -Wl,--wrap=ibv_alloc_pd,--wrap=ibv_dealloc_pd,--wrap=ibv_reg_mr,--wrap=ibv_dereg_mr,--wrap=ibv_create_cq,--wrap=ibv_destroy_cq,--wrap=ibv_create_comp_channel,--wrap=ibv_destroy_comp_channel,--wrap=ibv_query_device
// LDFLAGS: -Wl,--wrap=rdma_create_event_channel,--wrap=rdma_destroy_event_channel,--wrap=rdma_create_id,--wrap=rdma_destroy_id,--wrap=rdma_bind_addr,--wrap=rdma_listen,--wrap=rdma_get_src_port
// LDFLAGS: -Wl,--wrap=rdma_get_cm_event,--wrap=rdma_ack_cm_event,--wrap=rdma_create_qp,--wrap=rdma_destroy_qp,--wrap=rdma_accept,--wrap=rdma_reject,--wrap=rdma_disconnect,--wrap=kmig_rdma_listen
/*
 * Every call of libkmig's to the network, and every one that takes memory, a descriptor or a thread,
 * fails once. Each time a small guest is moved over loopback, from making the contexts to freeing
 * them, and exactly one call fails: at a given place in the library, at a given side, the n-th time
 * that it comes there. n goes up until the place is not reached so often any more; places are found
 * as they are reached, so none has to be named here.
 *
 * Whatever fails: both engines end; the guest runs at one side, and both know at which; if it has
 * moved, every byte is there; who failed says why; no descriptor, thread or memory is left. What can
 * be tried again (EINTR, EAGAIN, half of what was asked for) is, and a data channel that is lost
 * comes back: then the guest has to arrive.
 *
 * A call tells whose it is by the thread that makes it, and where it is by its return address. Nothing
 * of the test's own fails: what is not made by an engine's thread, or is made in the stand-in for the
 * module.
 *
 * LMTRACK_FAULTS=all: each n, with each error that the call may give. Without it, beyond the first few only
 * some, and but for the first time one error that can be tried again and one that cannot, in turn.
 * LMTRACK_FAULTS=SIDE:PLACE:N:ERROR, as a failure is reported: that one only.
 */
static int source_kind;	/* of region */
#define SOURCE_REGION source_kind
#include "kselftest_harness.h"

#include <dirent.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/vfs.h>

/* It stands in for the module; its own calls are not the library's. */
#define __wrap_ioctl standin_ioctl
#define __wrap_open standin_open
#include "../lib/tracker.h"
#include "lib_fake.h"
#include "lib_verbs.h"
#undef __wrap_ioctl
#undef __wrap_open

static void *vmm_malloc(size_t bytes);	/* the library frees it */
#define malloc(bytes) vmm_malloc(bytes)
#include "lib_pair.h"
#undef malloc

#define GUEST_BYTES (6 * MIB + 5 * PAGE_BYTES)
#define GUEST_PAGES (GUEST_BYTES / PAGE_BYTES)
#define CHANNELS 3
/* An engine may wait for an answer for six time-outs. */
#define LIMIT_S (30 * lmt_slower())

/* ---- What can fail, and how ---- */

enum { NOBODY, SOURCE, DESTINATION, SIDES };
static const char *const side_names[SIDES] = { "nobody", "source", "destination" };

/* In place of an errno. */
#define HALF 1000	/* half of the bytes are sent or received */
#define CLOSED 1001	/* the other side has closed */

struct error {
	int error;
	bool again;	/* the guest has to arrive all the same */
};

#define ERRORS 10
struct call {
	const char *name;
	struct error errors[ERRORS];
	unsigned int each;	/* up to this time every one is made to fail */
};

/* To connect; the rest of the network; and from EVENTFD on what takes memory, a descriptor or a thread. */
enum { SOCKET, CONNECT, BIND, LISTEN, ACCEPT, GETSOCKOPT, SETSOCKOPT, TUNE, GETSOCKNAME, GETPEERNAME, GETADDRINFO,
       GETNAMEINFO, SEND, SENDMSG, RECV, RECVMSG, POLL, SHUTDOWN, FCNTL, EVENTFD_READ, VERBS,
       EVENTFD, ALLOCATE, MMAP, MINCORE, MADVISE, MEMFD, FALLOCATE, OPEN, LIMITS, STAT, PREAD, IOCTL,
       THREAD, CRYPTO, RANDOM, CALLS };

static const struct call calls[CALLS] = {
	[SOCKET] = { "socket", { { EMFILE }, { ENFILE }, { ENOBUFS }, { ENOMEM } } },
	[CONNECT] = { "connect", { { ECONNREFUSED }, { ENETUNREACH }, { EADDRNOTAVAIL }, { ETIMEDOUT } } },
	[BIND] = { "bind", { { EADDRINUSE }, { EADDRNOTAVAIL }, { ENOMEM } } },
	[LISTEN] = { "listen", { { EADDRINUSE } } },
	[ACCEPT] = { "accept4", { { EMFILE, true }, { ENFILE, true }, { ENOBUFS, true }, { ENOMEM, true },
				  { ECONNABORTED, true }, { EINTR, true }, { EAGAIN, true }, { EPROTO, true } } },
	[GETSOCKOPT] = { "getsockopt", { { ENOBUFS }, { ENOMEM } } },
	[SETSOCKOPT] = { "setsockopt", { { ENOMEM }, { ENOPROTOOPT } } },
	[TUNE] = { "setsockopt", { { ENOMEM, true }, { ENOPROTOOPT, true } } },
	[GETSOCKNAME] = { "getsockname", { { ENOBUFS } } },
	[GETPEERNAME] = { "getpeername", { { ENOBUFS }, { ENOTCONN } } },
	[GETADDRINFO] = { "getaddrinfo", { { EMFILE }, { ENOMEM } } },
	[GETNAMEINFO] = { "getnameinfo", { { ENOMEM, true } } },
	[SEND] = { "send", { { EINTR, true }, { EAGAIN, true }, { HALF, true }, { ECONNRESET }, { ENOBUFS }, { EPIPE },
			     { ENOMEM }, { ETIMEDOUT } }, .each = 200 },
	[SENDMSG] = { "sendmsg", { { EINTR, true }, { EAGAIN, true }, { HALF, true }, { ECONNRESET, true }, { EPIPE, true },
				   { ENOBUFS, true }, { ENOMEM, true }, { ETIMEDOUT, true }, { EHOSTUNREACH, true } } },
	[RECV] = { "recv", { { EINTR, true }, { EAGAIN, true }, { HALF, true }, { ECONNRESET }, { CLOSED }, { ENOMEM },
			     { ETIMEDOUT } } },
	[RECVMSG] = { "recvmsg", { { EINTR, true }, { HALF, true }, { ECONNRESET, true }, { CLOSED, true },
				   { ETIMEDOUT, true }, { ENOMEM }, { EFAULT } } },
	[POLL] = { "poll", { { EINTR, true }, { ENOMEM } } },
	[SHUTDOWN] = { "shutdown", { { ENOTCONN, true } } },
	[FCNTL] = { "fcntl", { { ENOMEM } } },
	[EVENTFD_READ] = { "eventfd_read", { { EAGAIN, true } } },
	/* Who cannot have RDMA has TCP. */
	[VERBS] = { "a call to the RDMA device", { { ENODEV, true }, { ENOMEM, true }, { EINVAL, true } } },
	[EVENTFD] = { "eventfd", { { EMFILE }, { ENFILE }, { ENOMEM } } },
	[ALLOCATE] = { "malloc", { { ENOMEM } }, .each = 20 },
	[MMAP] = { "mmap", { { ENOMEM } } },
	[MINCORE] = { "mincore", { { EAGAIN }, { ENOMEM } } },
	[MADVISE] = { "madvise", { { ENOMEM, true } } },
	[MEMFD] = { "memfd_create", { { EMFILE }, { ENFILE }, { ENOMEM } } },
	[FALLOCATE] = { "fallocate", { { ENOSPC }, { ENOMEM } } },
	[OPEN] = { "open", { { EMFILE }, { ENFILE }, { ENOMEM } } },
	/* What there is, is not known then: it is as if there were no limit. */
	[LIMITS] = { "fopen", { { EMFILE, true } } },
	[STAT] = { "fstat", { { EIO }, { EOVERFLOW } } },
	[PREAD] = { "pread", { { EIO }, { EINTR } } },
	[IOCTL] = { "ioctl", { { ENOMEM }, { EINTR } } },
	[THREAD] = { "pthread_create", { { EAGAIN } } },
	[CRYPTO] = { "EVP_MAC", { { ENOMEM } } },
	[RANDOM] = { "RAND_bytes", { { EIO } } },
};

/* ---- Places ---- */

struct place {
	int call, side;
	uintptr_t at;		/* return address */
	unsigned int times;	/* reached in this migration */
};

#define PLACES 1024
static struct place places[PLACES];
static unsigned int nplaces;
static pthread_mutex_t places_lock = PTHREAD_MUTEX_INITIALIZER;

/* What shall fail; none if @place is NULL. */
static struct {
	const struct place *place;
	unsigned int time;
	struct error error;
	_Atomic bool done;
} fault;

static bool counting;		/* whether places are, from now on */
static _Thread_local int on_side;
static _Atomic int64_t memory_left, threads_left, mapped_left;

extern char __executable_start[];

static struct place *place_of(int call, uintptr_t at)
{
	for (unsigned int i = 0; i < nplaces; i++)
		if (places[i].call == call && places[i].side == on_side && places[i].at == at)
			return &places[i];
	if (nplaces == PLACES)
		abort();
	places[nplaces] = (struct place){ .call = call, .side = on_side, .at = at };
	return &places[nplaces++];
}

/* The error that the call at this place shall give now, or 0. */
static int failing(int call, const void *caller)
{
	struct place *place;
	int error = 0;

	if (!on_side || !counting)
		return 0;
	pthread_mutex_lock(&places_lock);
	place = place_of(call, (uintptr_t)caller - (uintptr_t)__executable_start);
	place->times++;
	if (place == fault.place && place->times == fault.time) {
		error = fault.error.error;
		fault.done = true;
	}
	pthread_mutex_unlock(&places_lock);
	if (error)
		errno = error;
	return error;
}

#define CALLER __builtin_return_address(0)

#define WRAP(type, name, parameters, arguments, call, failed)		\
type __real_##name parameters;						\
type __wrap_##name parameters;						\
type __wrap_##name parameters						\
{									\
	return failing(call, CALLER) ? (failed) : __real_##name arguments;	\
}

WRAP(int, socket, (int domain, int type, int protocol), (domain, type, protocol), SOCKET, -1)
WRAP(int, bind, (int fd, const struct sockaddr *to, socklen_t length), (fd, to, length), BIND, -1)
WRAP(int, listen, (int fd, int backlog), (fd, backlog), LISTEN, -1)
WRAP(int, accept4, (int fd, struct sockaddr *from, socklen_t *length, int flags), (fd, from, length, flags), ACCEPT, -1)
WRAP(int, getsockopt, (int fd, int level, int name, void *value, socklen_t *length), (fd, level, name, value, length),
     GETSOCKOPT, -1)
WRAP(int, getsockname, (int fd, struct sockaddr *name, socklen_t *length), (fd, name, length), GETSOCKNAME, -1)
WRAP(int, getpeername, (int fd, struct sockaddr *name, socklen_t *length), (fd, name, length), GETPEERNAME, -1)
WRAP(int, getnameinfo, (const struct sockaddr *of, socklen_t length, char *host, socklen_t room, char *service,
			socklen_t service_room, int flags),
     (of, length, host, room, service, service_room, flags), GETNAMEINFO, EAI_MEMORY)
WRAP(int, poll, (struct pollfd *fds, nfds_t count, int ms), (fds, count, ms), POLL, -1)
WRAP(int, ppoll, (struct pollfd *fds, nfds_t count, const struct timespec *limit, const sigset_t *mask),
     (fds, count, limit, mask), POLL, -1)
WRAP(int, fcntl, (int fd, int command, long argument), (fd, command, argument), FCNTL, -1)
WRAP(int, eventfd_read, (int fd, eventfd_t *value), (fd, value), EVENTFD_READ, -1)
WRAP(int, eventfd, (unsigned int value, int flags), (value, flags), EVENTFD, -1)
WRAP(int, memfd_create, (const char *name, unsigned int flags), (name, flags), MEMFD, -1)
WRAP(int, ftruncate, (int fd, off_t length), (fd, length), FALLOCATE, -1)
WRAP(int, fallocate, (int fd, int mode, off_t offset, off_t length), (fd, mode, offset, length), FALLOCATE, -1)
WRAP(int, mincore, (void *at, size_t length, unsigned char *pages), (at, length, pages), MINCORE, -1)
WRAP(int, madvise, (void *at, size_t length, int advice), (at, length, advice), MADVISE, -1)
WRAP(int, fstat, (int fd, struct stat *st), (fd, st), STAT, -1)
WRAP(int, fstatfs, (int fd, struct statfs *st), (fd, st), STAT, -1)
WRAP(ssize_t, pread, (int fd, void *to, size_t length, off_t at), (fd, to, length, at), PREAD, -1)
WRAP(cpu_set_t *, __sched_cpualloc, (size_t count), (count), ALLOCATE, NULL)
WRAP(int, EVP_MAC_init, (EVP_MAC_CTX *mac, const unsigned char *key, size_t length, const OSSL_PARAM *params),
     (mac, key, length, params), CRYPTO, 0)
WRAP(int, RAND_bytes, (unsigned char *bytes, int count), (bytes, count), RANDOM, 0)

static int verbs_fails(const void *caller)
{
	return failing(VERBS, caller);
}

/* ---- Calls that need more ---- */

/* The source's connections in the order in which they were made; the control connection is the first. */
static int connections[64];
static _Atomic unsigned int nconnections;

int __real_connect(int fd, const struct sockaddr *to, socklen_t length);
int __wrap_connect(int fd, const struct sockaddr *to, socklen_t length);
int __wrap_connect(int fd, const struct sockaddr *to, socklen_t length)
{
	if (failing(CONNECT, CALLER))
		return -1;
	if (on_side == SOURCE && nconnections < 64)
		connections[nconnections++] = fd;
	return __real_connect(fd, to, length);
}

int __real_setsockopt(int fd, int level, int name, const void *value, socklen_t length);
int __wrap_setsockopt(int fd, int level, int name, const void *value, socklen_t length);
int __wrap_setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
	bool tunes = level == IPPROTO_TCP || name == SO_ZEROCOPY;

	return failing(tunes ? TUNE : SETSOCKOPT, CALLER) ? -1 : __real_setsockopt(fd, level, name, value, length);
}

int __real_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list);
int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list);
int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list)
{
	int error = failing(GETADDRINFO, CALLER);

	if (error)
		return error == ENOMEM ? EAI_MEMORY : EAI_SYSTEM;
	error = __real_getaddrinfo(host, service, hints, list);
	memory_left += !error;
	return error;
}

void __real_freeaddrinfo(struct addrinfo *list);
void __wrap_freeaddrinfo(struct addrinfo *list);
void __wrap_freeaddrinfo(struct addrinfo *list)
{
	memory_left--;
	__real_freeaddrinfo(list);
}

static bool breaks(int error)
{
	return error == ECONNRESET || error == EPIPE || error == ETIMEDOUT || error == EHOSTUNREACH || error == CLOSED;
}

/* A connection that breaks does so for both sides. */
static int break_off(int fd, int error)
{
	if (breaks(error)) {
		shutdown(fd, SHUT_RDWR);
		errno = error;
	}
	return -1;
}

ssize_t __real_send(int fd, const void *bytes, size_t length, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t length, int flags);
ssize_t __wrap_send(int fd, const void *bytes, size_t length, int flags)
{
	int error = failing(SEND, CALLER);

	if (error && error != HALF)
		return break_off(fd, error);
	return __real_send(fd, bytes, error && length > 1 ? length / 2 : length, flags);
}

/* One piece, and half of it. */
static struct iovec half_of(const struct msghdr *msg)
{
	size_t length = msg->msg_iov->iov_len;

	return (struct iovec){ msg->msg_iov->iov_base, length > 1 ? length / 2 : length };
}

ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	int error = failing(SENDMSG, CALLER);
	struct msghdr less = *msg;
	struct iovec half;

	if (error && error != HALF)
		return break_off(fd, error);
	if (error) {
		half = half_of(msg);
		less.msg_iov = &half;
		less.msg_iovlen = 1;
	}
	return __real_sendmsg(fd, &less, flags);
}

ssize_t __real_recv(int fd, void *bytes, size_t length, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t length, int flags);
ssize_t __wrap_recv(int fd, void *bytes, size_t length, int flags)
{
	int error = failing(RECV, CALLER);

	if (error == CLOSED)
		return break_off(fd, ECONNRESET) + 1;
	if (error && error != HALF)
		return break_off(fd, error);
	return __real_recv(fd, bytes, error && length > 1 ? length / 2 : length, flags);
}

ssize_t __real_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags)
{
	int error = failing(RECVMSG, CALLER);
	struct msghdr less = *msg;
	struct iovec half;

	if (error == CLOSED)
		return break_off(fd, ECONNRESET) + 1;
	if (error && error != HALF)
		return break_off(fd, error);
	if (error && msg->msg_iovlen) {
		half = half_of(msg);
		less.msg_iov = &half;
		less.msg_iovlen = 1;
		return __real_recvmsg(fd, &less, flags);
	}
	return __real_recvmsg(fd, msg, flags);
}

/* It fails only when there is nothing left to be shut down. */
int __real_shutdown(int fd, int how);
int __wrap_shutdown(int fd, int how);
int __wrap_shutdown(int fd, int how)
{
	int result = __real_shutdown(fd, how);

	return failing(SHUTDOWN, CALLER) ? -1 : result;
}

/* ---- Memory, threads ---- */

static void *counted(void *memory)
{
	memory_left += memory != NULL;
	return memory;
}

#define WRAP_COUNTED(type, name, parameters, arguments, call)		\
type *__real_##name parameters;						\
type *__wrap_##name parameters;						\
type *__wrap_##name parameters						\
{									\
	return failing(call, CALLER) ? NULL : counted(__real_##name arguments);	\
}

WRAP_COUNTED(void, malloc, (size_t bytes), (bytes), ALLOCATE)
WRAP_COUNTED(void, calloc, (size_t count, size_t bytes), (count, bytes), ALLOCATE)
WRAP_COUNTED(char, strdup, (const char *text), (text), ALLOCATE)
WRAP_COUNTED(EVP_MAC, EVP_MAC_fetch, (OSSL_LIB_CTX *context, const char *name, const char *properties),
	     (context, name, properties), CRYPTO)
WRAP_COUNTED(EVP_MAC_CTX, EVP_MAC_CTX_new, (EVP_MAC *mac), (mac), CRYPTO)

#define WRAP_FREE(type, name)						\
void __real_##name(type *memory);					\
void __wrap_##name(type *memory);					\
void __wrap_##name(type *memory)					\
{									\
	memory_left -= memory != NULL;					\
	__real_##name(memory);						\
}

WRAP_FREE(void, free)
WRAP_FREE(EVP_MAC, EVP_MAC_free)
WRAP_FREE(EVP_MAC_CTX, EVP_MAC_CTX_free)

void *__real_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes)
{
	if (failing(ALLOCATE, CALLER))
		return NULL;
	memory_left += !memory;
	return __real_realloc(memory, bytes);
}

static void *vmm_malloc(size_t bytes)
{
	return counted(__real_malloc(bytes));
}

static int64_t whole_pages(size_t length)
{
	return (length + PAGE_BYTES - 1) / PAGE_BYTES;
}

void *__real_mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
	void *map;

	if (failing(MMAP, CALLER))
		return MAP_FAILED;
	map = __real_mmap(at, length, protection, flags, fd, offset);
	if (on_side && map != MAP_FAILED && !(flags & MAP_FIXED))
		mapped_left += whole_pages(length);
	return map;
}

int __real_munmap(void *at, size_t length);
int __wrap_munmap(void *at, size_t length);
int __wrap_munmap(void *at, size_t length)
{
	if (on_side)
		mapped_left -= whole_pages(length);
	return __real_munmap(at, length);
}

/* A thread works for the side that started it. */
struct start {
	void *(*run)(void *);
	void *data;
	int side;
};

static void *run_on_side(void *data)
{
	struct start start = *(struct start *)data;

	__real_free(data);
	on_side = start.side;
	return start.run(start.data);
}

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *data)
{
	int error = failing(THREAD, CALLER);
	struct start *start;

	if (error)
		return error;
	start = __real_malloc(sizeof(*start));
	*start = (struct start){ run, data, on_side };
	threads_left += on_side != NOBODY;
	return __real_pthread_create(thread, attr, run_on_side, start);
}

int __real_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_join(pthread_t thread, void **result)
{
	threads_left -= on_side != NOBODY;
	return __real_pthread_join(thread, result);
}

/* ---- The stand-in for the module ---- */

int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
	int side = on_side, fd;

	if (failing(OPEN, CALLER))
		return -1;
	on_side = NOBODY;
	fd = standin_open(path, flags, 0);
	on_side = side;
	return fd;
}

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	int side = on_side, result;
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	if (failing(IOCTL, CALLER))
		return -1;
	on_side = NOBODY;
	result = standin_ioctl(fd, request, arg);
	on_side = side;
	return result;
}

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode)
{
	return failing(strcmp(path, "/proc/self/maps") ? LIMITS : OPEN, CALLER) ? NULL : __real_fopen(path, mode);
}

/* userfaultfd() is all that is asked for this way here. */
long __real_syscall(long number, long a, long b, long c);
long __wrap_syscall(long number, long a, long b, long c);
long __wrap_syscall(long number, long a, long b, long c)
{
	return failing(OPEN, CALLER) ? -1 : __real_syscall(number, a, b, c);
}

static void standin_forget(void)
{
	for (unsigned int i = 0; i < FAKE_REGIONS; i++) {
		if (!fake_regions[i].ino)
			continue;
		munmap(fake_regions[i].map, fake_regions[i].bytes);
		munmap(fake_regions[i].copy, fake_regions[i].bytes);
	}
	for (unsigned int i = 0; i < FAKE_STREAMS; i++)
		if (fake_streams[i].thread_runs)
			pthread_join(fake_streams[i].thread, NULL);
	memset(fake_regions, 0, sizeof(fake_regions));
	memset(fake_streams, 0, sizeof(fake_streams));
}

/* ---- A migration ---- */

struct scenario {
	enum kmig_region_kind region;
	enum kmig_tracker_kind tracker;
	bool paths;		/* over several, one of which leads nowhere; packets are marked */
	bool rdma;		/* is asked for; the destination has a device, the source has none */
	bool loses;		/* a data channel breaks, and comes back; only what comes after it fails */
};

static struct migration {
	const struct scenario *scenario;
	struct world *world;
	struct side side[SIDES];
	uint8_t *ram[SIDES];
	pthread_t thread[SIDES];
	_Atomic bool ended[SIDES];
	_Atomic int state[SIDES];
	bool lost;
	uint64_t dirty[GUEST_PAGES / 64 + 1];
} *move;

/* The guest writes on the engine's thread, so that each migration is like the one before. */
static void guest_writes(uint64_t page)
{
	uint8_t *ram = move->world->guest.ram;

	*(uint64_t *)(ram + page * PAGE_BYTES + 8) += page + 1;
	move->dirty[page / 64] |= 1ULL << (page % 64);
}

static void guest_clears(uint64_t page)
{
	memset(move->world->guest.ram + page * PAGE_BYTES, 0, PAGE_BYTES);
	move->dirty[page / 64] |= 1ULL << (page % 64);
}

static int take_dirty(uint64_t first, uint64_t pages, uint64_t *bitmap)
{
	for (uint64_t word = first / 64; word < (first + pages + 63) / 64; word++) {
		bitmap[word - first / 64] |= move->dirty[word];
		move->dirty[word] = 0;
	}
	return 0;
}

#define ROUNDS_BUSY 3
#define ROUNDS_LOST_MAX 400

/* It writes too much to be paused until the channel is back. */
static bool channel_is_away(struct side *side)
{
	struct kmig_report report = { .size = sizeof(report) };

	kmig_source_report(side->engine, &report);
	return !report.channels_rejoined && side->rounds < ROUNDS_LOST_MAX;
}

static void on_source(struct side *side, int at)
{
	if (at < KMIG_STATES)
		move->state[SOURCE] = at;
	if (at == AT_PAUSE || at == AT_SAVE)
		guest_writes(GUEST_PAGES - 1);
	if (at != AT_ROUND || !move->world->guest.running)
		return;
	if (move->scenario->loses && side->rounds == 2 && !move->lost) {
		move->lost = true;
		counting = true;
		__real_shutdown(connections[2], SHUT_RDWR);
	}
	if (move->lost ? channel_is_away(side) : side->rounds < ROUNDS_BUSY)
		for (unsigned int i = 0; i < 64; i++)
			guest_writes((i * 37 + side->rounds) % (GUEST_PAGES / 2));
	else if (side->rounds == ROUNDS_BUSY)
		guest_clears(8);	/* fill() has put something there */
}

static void on_destination(struct side *side, int at)
{
	(void)side;
	if (at < KMIG_STATES)
		move->state[DESTINATION] = at;
}

static void *source_thread(void *data)
{
	on_side = SOURCE;
	source_main(data);
	on_side = NOBODY;
	move->ended[SOURCE] = true;
	return NULL;
}

static void *destination_thread(void *data)
{
	on_side = DESTINATION;
	destination_main(data);
	on_side = NOBODY;
	move->ended[DESTINATION] = true;
	return NULL;
}

static unsigned int descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	unsigned int n = 0;

	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

static const struct kmig_address more = { .host = "127.0.0.2" };
static const struct kmig_path paths[] = {
	{ .local = "127.0.0.1", .device = "lo" },
	{ .local = "127.0.0.1", .remote = "127.0.0.2" },
	{ .remote = "127.0.0.3", .port = 1 },
};

static int begin_side(int number)
{
	const struct scenario *scenario = move->scenario;
	struct side *side = &move->side[number];
	int err;

	on_side = number;
	source_kind = scenario->region;
	err = side_init(side, move->world, number == SOURCE, GUEST_BYTES);
	if (!err)
		move->ram[number] = kmig_region_map(side->region);
	if (!err && !move->ram[number])
		err = -ENOMEM;
	on_side = NOBODY;
	if (err && side->ctx)
		snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
	side->hook = number == SOURCE ? on_source : on_destination;
	side->state_length = KMIG_WIRE_STATE_PIECE + 1000;
	side->tracker = scenario->tracker;
	side->dirty = take_dirty;
	side->transport = scenario->rdma ? KMIG_TRANSPORT_AUTO : KMIG_TRANSPORT_TCP;
	side->channels = CHANNELS;
	side->probe_ms = scenario->region == KMIG_REGION_LMTRACK ? 20 : 0;
	side->on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	side->max_rounds = 2 * ROUNDS_LOST_MAX;
	if (scenario->paths) {
		side->more = &more;
		side->more_count = 1;
		side->paths = paths;
		side->path_count = sizeof(paths) / sizeof(*paths);
		side->marked = true;
		side->dscp = 10;
		side->priority = 3;
	}
	if (scenario->loses) {
		side->downtime_ms = 1;
		side->max_bandwidth = 100 * MIB;
	}
	return err;
}

/* ---- What must hold ---- */

static const char *error_name(int error)
{
	return error == HALF ? "half" : error == CLOSED ? "closed" : strerrorname_np(error);
}

static unsigned int injected, wrong, moved, refused, unreached;

/* What failed, in the form that LMTRACK_FAULTS takes, and where that is. */
static void complain(const char *fmt, ...)
{
	const struct place *place = fault.place;
	char command[128], line[256];
	va_list args;
	FILE *where;

	wrong++;
	va_start(args, fmt);
	vsnprintf(line, sizeof(line), fmt, args);
	va_end(args);
	printf("# %s\n", line);
	for (int i = SOURCE; i < SIDES; i++)
		printf("#   %s: state %d, %d, verdict %d: %s\n", side_names[i], move->state[i],
		       i == SOURCE ? move->world->source_result : move->world->destination_result,
		       move->side[i].report.verdict, move->side[i].error);
	if (place) {
		printf("#   LMTRACK_FAULTS=%s:%#lx:%u:%s is %s() at\n", side_names[place->side], (unsigned long)place->at,
		       fault.time, error_name(fault.error.error), calls[place->call].name);
		snprintf(command, sizeof(command), "addr2line -fise /proc/%d/exe %#lx", getpid(), (unsigned long)place->at - 1);
		where = popen(command, "r");
		while (where && fgets(line, sizeof(line), where))
			printf("#     %s", line);
		if (where)
			pclose(where);
	}
	fflush(stdout);
}

static bool says_nothing(const char *text)
{
	return !*text || strstr(text, "Success") || strstr(text, "(null)") || strstr(text, "Unknown error") ||
	       strstr(text, "error 0") || text[strlen(text) - 1] == ' ';
}

static void check(bool began)
{
	const struct world *world = move->world;
	const struct side *source = &move->side[SOURCE], *destination = &move->side[DESTINATION];
	enum kmig_verdict here = source->report.verdict, there = destination->report.verdict;
	bool again = !fault.place || fault.error.again;

	/*
	 * A thread for a channel that comes back is tried for again; memory is asked for by others as well.
	 * Before all channels are there, the loss of one is a failure to begin.
	 */
	if (fault.place && move->scenario->loses && fault.place->call >= EVENTFD)
		again = fault.place->call == THREAD;
	if (fault.place && breaks(fault.error.error) && source->report.state <= KMIG_STATE_CHANNELS)
		again = false;

	if (world->source_runs && world->destination_runs)
		complain("the guest runs on both sides");
	if (again && (!began || world->source_result || world->destination_result))
		complain("it should have arrived");
	for (int i = SOURCE; i < SIDES && began; i++) {
		int result = i == SOURCE ? world->source_result : world->destination_result;

		if (result && says_nothing(move->side[i].error))
			complain("the %s failed and says nothing", side_names[i]);
		if (move->ended[i] && !result != (move->side[i].report.verdict == KMIG_COMPLETED))
			complain("the %s's verdict is another than its result", side_names[i]);
	}
	if (!began && !fault.done)
		complain("it could not begin");
	if (!began && move->side[fault.place->side].ctx && says_nothing(move->side[fault.place->side].error))
		complain("the %s could not begin and says nothing", side_names[fault.place->side]);
	if (!began)
		return;
	if (here != KMIG_COMPLETED && here != KMIG_UNKNOWN && !world->source_runs)
		complain("the guest should run at the source");
	if ((here == KMIG_COMPLETED || here == KMIG_UNKNOWN) && world->source_runs)
		complain("the guest should not run at the source");
	if ((here == KMIG_COMPLETED || there == KMIG_COMPLETED) != world->destination_runs)
		complain("the guest %s at the destination", world->destination_runs ? "should not run" : "should run");
	if (here == KMIG_UNKNOWN && !strstr(source->error, "told to run"))
		complain("the source does not say that it does not know");
	if (world->destination_runs && !destination->state_right)
		complain("device state is wrong");
	if (world->destination_runs && memcmp(move->ram[SOURCE], move->ram[DESTINATION], GUEST_BYTES))
		complain("memory is not the same");
	if (destination->report.state >= KMIG_STATE_DEVICES && !world->destination_runs && !world->discarded)
		complain("the destination was not told to discard");
	if (move->lost && here == KMIG_COMPLETED && (!source->report.channels_lost || !source->report.channels_rejoined))
		complain("the channel did not come back");
	moved += world->destination_runs;
	refused += !world->destination_runs;
}

/* An engine that does not end: nothing can be done but say so. */
static void await_end(int number)
{
	struct timespec limit;

	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += LIMIT_S;
	if (!pthread_timedjoin_np(move->thread[number], NULL, &limit))
		return;
	complain("the %s does not end", side_names[number]);
	abort();
}

/* One migration, in which @place fails the @time-th time it is reached; false: it was not. */
static bool migrate(const struct scenario *scenario, const struct place *place, unsigned int time, struct error error)
{
	unsigned int fds = descriptors();
	bool began;

	fault.place = place;
	fault.time = time;
	fault.error = error;
	fault.done = false;
	for (unsigned int i = 0; i < nplaces; i++)
		places[i].times = 0;
	memory_left = threads_left = mapped_left = 0;
	nconnections = 0;
	memset(&verbs, 0, sizeof(verbs));
	counting = !scenario->loses;
	*move = (struct migration){ .scenario = scenario, .world = new_world() };
	began = !begin_side(SOURCE) && !begin_side(DESTINATION);
	if (began) {
		struct guest *guest = &move->world->guest;

		/* No thread of its own: it stands as soon as it is told to. */
		*guest = (struct guest){ .ram = move->ram[SOURCE], .bytes = GUEST_BYTES, .running = true, .parked = 2 };
		move->side[SOURCE].guest = guest;
		fill(guest->ram, GUEST_BYTES);
		memset(move->ram[DESTINATION], 0x55, MIB);
		pthread_create(&move->thread[DESTINATION], NULL, destination_thread, &move->side[DESTINATION]);
		while (!move->world->port && !move->ended[DESTINATION])
			usleep(200);
		if (move->world->port) {
			pthread_create(&move->thread[SOURCE], NULL, source_thread, &move->side[SOURCE]);
			await_end(SOURCE);
			/* Of a source that it has not greeted it knows nothing, and waits for another. */
			if (move->state[DESTINATION] <= KMIG_STATE_HELLO && move->side[DESTINATION].engine &&
			    !move->ended[DESTINATION])
				kmig_destination_abort(move->side[DESTINATION].engine);
		} else {
			move->side[SOURCE].report.verdict = KMIG_FAILED;
		}
		await_end(DESTINATION);
	}
	check(began);
	for (int i = SOURCE; i < SIDES; i++) {
		on_side = i;
		side_end(&move->side[i]);
		on_side = NOBODY;
	}
	counting = false;
	standin_forget();
	if (memory_left)
		complain("memory is left: %ld", (long)memory_left);
	if (mapped_left)
		complain("memory is left mapped: %ld pages", (long)mapped_left);
	if (verbs.left)
		complain("of the RDMA device %d objects are left", verbs.left);
	if (threads_left)
		complain("threads are left: %ld", (long)threads_left);
	if (descriptors() != fds)
		complain("descriptors are left: %u, of %u before", descriptors(), fds);
	munmap(move->world, sizeof(*move->world));
	injected += fault.done;
	return fault.done;
}

/* ---- All of them ---- */

static bool all_times, only_one;

static unsigned int next_time(const struct scenario *scenario, const struct call *call, unsigned int time)
{
	unsigned int each = call->each && !scenario->loses ? call->each : 2;

	return all_times || time < each ? time + 1 : 2 * time;
}

static unsigned int errors_of(const struct call *call)
{
	unsigned int n = 0;

	while (n < ERRORS && call->errors[n].error)
		n++;
	return n;
}

/* The next of the errors after @turn that can be tried again, or that cannot; NULL: there is none. */
static const struct error *next_error(const struct call *call, bool again, unsigned int turn)
{
	unsigned int n = errors_of(call);

	for (unsigned int i = 0; i < n; i++)
		if (call->errors[(turn + i) % n].again == again)
			return &call->errors[(turn + i) % n];
	return NULL;
}

/*
 * Everything that may go wrong there the first time, later one after the other, of either sort. And there
 * may be chance in it.
 */
static void fail_at(const struct scenario *scenario, const struct place *place)
{
	const struct call *call = &calls[place->call];
	unsigned int n = errors_of(call), time = 1, turn = 0;
	bool reached = true;

	for (unsigned int i = 0; i < n && reached; i++) {
		reached = migrate(scenario, place, 1, call->errors[i]);
		for (int tries = 0; !reached && tries < 2; tries++)
			reached = migrate(scenario, place, 1, call->errors[i]);
	}
	unreached += !reached;
	while (reached) {
		time = next_time(scenario, call, time);
		turn++;
		for (unsigned int i = 0; i < (all_times ? n : 2) && reached; i++) {
			const struct error *error = all_times ? &call->errors[i] : next_error(call, i, turn);

			if (error)
				reached = migrate(scenario, place, time, *error);
		}
	}
}

static void fail_one(const struct scenario *scenario, int side, const char *which)
{
	unsigned long at;
	unsigned int time;
	char error[32];

	if (sscanf(which, "%*[a-z]:%lx:%u:%31s", &at, &time, error) != 3 || strncmp(which, side_names[side], 6))
		return;
	for (unsigned int i = 0; i < nplaces; i++)
		for (unsigned int n = 0; n < errors_of(&calls[places[i].call]); n++)
			if (places[i].side == side && places[i].at == at &&
			    !strcmp(error, error_name(calls[places[i].call].errors[n].error)))
				migrate(scenario, &places[i], time, calls[places[i].call].errors[n]);
}

FIXTURE(faults) {
};

FIXTURE_VARIANT(faults) {
	struct scenario scenario;
	int side, first, last;	/* which calls */
};

#define FAULTS(name, side, first, last, ...)		\
FIXTURE_VARIANT_ADD(faults, name) { { __VA_ARGS__ }, side, first, last }

#define EXTERNAL .region = KMIG_REGION_MEMFD, .tracker = KMIG_TRACKER_EXTERNAL
FAULTS(network_source, SOURCE, SOCKET, EVENTFD_READ, EXTERNAL, .paths = true);
FAULTS(network_destination, DESTINATION, SOCKET, EVENTFD_READ, EXTERNAL, .paths = true);
FAULTS(connecting_without_paths, SOURCE, SOCKET, GETNAMEINFO, EXTERNAL);
FAULTS(network_source_comes_back, SOURCE, SOCKET, EVENTFD_READ, EXTERNAL, .loses = true);
FAULTS(network_destination_comes_back, DESTINATION, SOCKET, EVENTFD_READ, EXTERNAL, .loses = true);
FAULTS(network_rdma, DESTINATION, VERBS, VERBS, EXTERNAL, .rdma = true);
FAULTS(memory_source, SOURCE, EVENTFD, RANDOM, EXTERNAL, .paths = true);
FAULTS(memory_destination, DESTINATION, EVENTFD, RANDOM, EXTERNAL, .paths = true);
FAULTS(memory_source_comes_back, SOURCE, EVENTFD, RANDOM, EXTERNAL, .loses = true);
FAULTS(memory_destination_comes_back, DESTINATION, EVENTFD, RANDOM, EXTERNAL, .loses = true);
FAULTS(memory_rdma, DESTINATION, EVENTFD, RANDOM, EXTERNAL, .rdma = true);
FAULTS(memory_pagemap, SOURCE, EVENTFD, RANDOM, .region = KMIG_REGION_MEMFD, .tracker = KMIG_TRACKER_PAGEMAP);
FAULTS(memory_lmtrack, SOURCE, EVENTFD, RANDOM, .region = KMIG_REGION_LMTRACK, .tracker = KMIG_TRACKER_LMTRACK);

FIXTURE_SETUP(faults)
{
	const char *which = getenv("LMTRACK_FAULTS");

	all_times = which && !strcmp(which, "all");
	only_one = which && !all_times && *which;
	move = mmap(NULL, sizeof(*move), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

FIXTURE_TEARDOWN(faults)
{
}

static bool has_pagemap(void)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	struct kmig_region *region = NULL;
	struct kmig_ctx *ctx;
	bool has;

	opts.bytes = MIB;
	opts.kind = KMIG_REGION_MEMFD;
	has = !kmig_ctx_new(&ctx) && !kmig_region_create(ctx, &opts, &region) &&
	      kmig_region_map(region) && !kmig_tracker_accepts(KMIG_TRACKER_PAGEMAP, NULL, 0, region);
	kmig_region_free(region);
	kmig_ctx_free(ctx);
	return has;
}

TEST_F_TIMEOUT(faults, each_fails, 3000)
{
	const struct scenario *scenario = &variant->scenario;
	unsigned int where = 0;

	if (scenario->tracker == KMIG_TRACKER_PAGEMAP && !has_pagemap())
		SKIP(return, "this kernel has no PAGEMAP_SCAN");
	migrate(scenario, NULL, 0, (struct error){ 0 });
	ASSERT_EQ(0, wrong);
	ASSERT_EQ(scenario->rdma, verbs.accepted);
	if (only_one)
		fail_one(scenario, variant->side, getenv("LMTRACK_FAULTS"));
	for (unsigned int i = 0; i < nplaces && !only_one; i++) {
		if (places[i].side != variant->side || places[i].call < variant->first || places[i].call > variant->last)
			continue;
		where++;
		fail_at(scenario, &places[i]);
	}
	TH_LOG("%u calls failed, at %u places: %u times the guest moved, %u times it stayed; %u places were not reached again",
	       injected, where, moved, refused, unreached);
	EXPECT_EQ(0, wrong);
	EXPECT_LT(0, injected);
}

TEST_HARNESS_MAIN
