// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -lrdmacm -libverbs
/*
 * All that can be asked of regions and streams, in any order, right and wrong, by several threads
 * at once over descriptors that they share and close under each other's calls, while mappings come,
 * go and move, processes fork, holes are punched and connections end. Where there is soft-RoCE,
 * channels over RDMA are among them, to a peer that lies.
 *
 * Sequences of calls are made up from random numbers, or from one that reached new code before,
 * where the kernel says what was reached (KCOV). A crash shows in the kernel's log, where
 * selftests/run looks; a call that does not return is found here. And one region is tracked by
 * an open file that nobody else has: whatever is done to it, none of its writes may be lost.
 *
 * LMTRACK_FUZZ_SECONDS is how long (20), LMTRACK_FUZZ_SEED where it begins (the time),
 * LMTRACK_FUZZ_THREADS how many do it (3; with 1 the same seed does the same).
 */
#include <linux/kcov.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "kselftest_harness.h"
#include "rdma_hostile.h"
#include "uapi_common.h"
#include "uapi_sink.h"

#define THREADS_MAX	16
#define SLOTS		24	/* descriptors that are shared */
#define PLACES		12	/* where something can be mapped */
#define PLACE_BYTES	(2 * CHUNK)
#define CALLS		12	/* of a sequence, at most */
#define WORDS		8	/* random numbers that a call is made from */
#define CORPUS		512	/* sequences worth keeping */
#define BYTES		(8 * MIB)	/* of the region whose writes are looked after */
#define PAGES		(BYTES / PAGE)
#define PCS		(1U << 14)
#define KCOV_WORDS	(1UL << 16)
#define KICK_S		0.3	/* a call that takes longer is sent a signal */
#define HANG_S		120	/* one that takes longer hangs */

enum kind { NOTHING, DEVICE, REGION, STREAM, SOCKET, OTHER };

struct call {
	uint32_t op;
	uint64_t words[WORDS];
};

struct sequence {
	unsigned int count;
	struct call calls[CALLS];
};

/* Descriptor and kind in one word, so that they change together. */
static _Atomic uint64_t slots[SLOTS];
static char *arena;			/* PLACES * PLACE_BYTES; never a hole in it */
static int checked = -1;		/* the open file that tracks the region looked after */
static _Atomic uint32_t rounds = 1;
static struct hostile *peer;		/* the far end of channels over RDMA; NULL: there is none */
static _Atomic unsigned long requests_made[64], requests_done[64];

static struct sequence corpus[CORPUS];
static unsigned int corpus_count;
static pthread_mutex_t corpus_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t pcs[PCS];	/* places in the module that were reached */
static _Atomic unsigned int pc_count;

static volatile bool stop, rest;
static _Atomic unsigned int resting;

struct fuzzer {
	pthread_t thread;
	pid_t tid;
	uint64_t random;
	unsigned long sequences, calls;
	volatile double since;		/* when the call at hand began; 0: none */
	const char *volatile doing;
	uint64_t *kcov;			/* count and addresses, or NULL */
	/* What requests read and write of ours. Room for the bits of all that is ever touched. */
	uint64_t buffer[64 * 1024 / 8];
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1dULL;
}

/* A number that is likely to matter. */
static uint64_t number(uint64_t word)
{
	static const uint64_t list[] = {
		0, 1, 2, 3, 16, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, PAGES - 64, PAGES,
		1 << 20, BYTES, 1ULL << 31, (1ULL << 31) - 1, 1ULL << 32, (1ULL << 32) - 1,
		1000000000, LMTRACK_REGION_SIZE_MAX, LMTRACK_REGION_SIZE_MAX + PAGE,
		1ULL << 63, -1ULL, -2ULL, -64ULL, -4096ULL,
	};
	uint64_t rest_of_it = word >> 3;

	switch (word % 8) {
	case 0 ... 2: return list[rest_of_it % (sizeof(list) / sizeof(*list))];
	case 3: return rest_of_it % (2 * PAGES);
	case 4: return rest_of_it % 64 * 64;
	case 5: return rest_of_it % 2;
	case 6: return rest_of_it % 64 * PAGE;
	default: return rest_of_it;
	}
}

/* ---- Descriptors ---- */

static int slot_fd(unsigned int slot)
{
	return (int)(uint32_t)slots[slot] - 1;
}

static void slot_put(unsigned int slot, enum kind kind, int fd)
{
	uint64_t old = atomic_exchange(&slots[slot], fd < 0 ? 0 : (uint64_t)kind << 32 | (fd + 1));

	if ((uint32_t)old)
		close((int)(uint32_t)old - 1);
}

/* One of the kind, beginning anywhere; now and then, or if there is none, any. */
static unsigned int slot_of(enum kind kind, uint64_t word)
{
	unsigned int i, at = word % SLOTS;

	if (word >> 32 & 15)
		for (i = 0; i < SLOTS; i++)
			if (slots[(at + i) % SLOTS] >> 32 == kind)
				return (at + i) % SLOTS;
	return at;
}

static int fd_of(enum kind kind, uint64_t word)
{
	return slot_fd(slot_of(kind, word));
}

/* ---- Requests ---- */

/* An address that may be read and written, or one that must not be. */
static uint64_t address(struct fuzzer *f, uint64_t word)
{
	switch (word % 8) {
	case 0: return 0;
	case 1: return 1;
	case 2: return 0xffff888000000000ULL;
	case 3: return (uintptr_t)arena + (word >> 3) % (PLACES * PLACE_BYTES - sizeof(f->buffer));
	default: return (uintptr_t)f->buffer;
	}
}

static void fill_region_create(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_region_create *a = arg;

	(void)f;
	a->region_size = w[0] % 4 ? (1 + w[1] % 4) * BYTES : number(w[1]) * PAGE;
	a->node = w[2] % 4 ? -1 : (int)(w[2] >> 8) % 4;
	strcpy(a->name, "fuzz");
}

static void fill_stream_create(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	((struct lmtrack_stream_create *)arg)->stream_id = w[0];
}

static void fill_nothing(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	(void)arg;
	(void)w;
}

/* All that counts is within the first BYTES of a region; the buffer has room for its bits. */
static void fill_dirty_get(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_dirty_get *a = arg;

	a->first = w[0] % 2 ? 0 : number(w[1]);
	a->pages = w[0] / 2 % 2 ? PAGES : number(w[2]);
	a->bitmap = w[3] % 4 ? (uintptr_t)f->buffer : address(f, w[4]);
}

static void fill_hold_set(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_hold_set *a = arg;

	a->first = w[0] % 2 ? 0 : number(w[1]);
	a->pages = w[0] / 2 % 2 ? PAGES : number(w[2]);
	a->bitmap = w[3] % 4 ? (uintptr_t)f->buffer : address(f, w[4]);
	memset(f->buffer, w[5], PAGES / 8);
}

static void fill_stun_set(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stun_set *a = arg;

	(void)f;
	a->rate = w[0] % 4 ? 1000 + w[0] % 100000 : number(w[1]);
	a->burst = w[2] % 4 ? 0 : number(w[2] >> 2);
	a->floor = w[3] % 4 ? 0 : number(w[3] >> 2);
	a->max_delay_us = w[4] % 4 ? 0 : number(w[4] >> 2);
}

static void fill_stun_stats(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stun_stats *a = arg;

	if (w[0] % 2)
		return;
	a->threads = address(f, w[1]);
	a->thread_count = w[2] % 4 ? LMTRACK_STUN_THREADS : number(w[2] >> 2);
}

static void fill_add_region(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_add_region *a = arg;

	(void)f;
	a->fd = fd_of(REGION, w[0]);
	a->index = w[1] % 8 ? w[1] % 4 : number(w[1] >> 3);
}

static void fill_add_channel(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_add_channel *a = arg;

	a->fd = fd_of(SOCKET, w[0]);
	a->channel = w[0] >> 32 & 3 ? w[0] >> 34 & 1 : number(w[0] >> 34);
	if (w[1] % 2)
		return;
	a->cpumask = address(f, w[2]);
	a->cpumask_bytes = w[3] % 2 ? 8 : number(w[3] >> 1);
	f->buffer[0] = w[4] % 4;
}

static void fill_send(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_send *a = arg;

	(void)f;
	a->round = w[0] % 8 ? rounds++ : number(w[0] >> 3);
	a->what = w[1] % 8 ? w[1] % 2 : number(w[1] >> 3);
}

static void fill_wait(struct fuzzer *f, void *arg, const uint64_t *w)
{
	static const int timeouts[] = { 0, 1, 10, 100, -1, -2, 1 << 30, (int)(1U << 31) };

	(void)f;
	((struct lmtrack_stream_wait *)arg)->timeout_ms = timeouts[w[0] % 8];
}

static void fill_channel_stats(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	((struct lmtrack_channel_stats *)arg)->channel = w[0] % 2 ? 0 : number(w[0] >> 1);
}

static void fill_rate_set(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_rate_set *set = arg;

	(void)f;
	set->rate = w[0] % 4 ? LMTRACK_STREAM_RATE_MIN << w[1] % 24 : number(w[1]);
}

static void fill_width(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	((struct lmtrack_stream_width *)arg)->channels = w[0] % 4 ? w[0] % 5 : number(w[0] >> 2);
}

static void fill_drop_channel(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	((struct lmtrack_stream_drop_channel *)arg)->channel = w[0] % 4 ? w[0] % 3 : number(w[0] >> 2);
}

/* One that lasts for longer would be taken for one that hangs. */
static void fill_add_rdma(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_add_rdma *a = arg;
	unsigned int i;

	(void)f;
	if (w[0] % 16 == 0)
		a->remote[w[0] / 16 % 32] = w[0] >> 16;
	if (w[1] % 16 == 0)
		for (i = 0; i < sizeof(a->local); i++)
			a->local[i] = w[1] >> i;
	a->token_bytes = w[2] % 8 ? w[2] % LMTRACK_RDMA_TOKEN_MAX : number(w[2] >> 3);
	a->timeout_ms = w[3] % 8 ? 1 + w[3] % 500 : number(w[3] >> 3);
	if (a->timeout_ms > 2000 && a->timeout_ms <= LMTRACK_RDMA_TIMEOUT_MAX_MS)
		a->timeout_ms = 2000;
	a->window_pages = w[4] % 8 ? (1 + w[4] % 4) * LMTRACK_CHUNK_PAGES : number(w[4] >> 3);
	a->channel = w[4] >> 32 & 7 ? 0 : number(w[4] >> 35);
}

static void fill_rdma_window(struct fuzzer *f, void *arg, const uint64_t *w)
{
	struct lmtrack_stream_rdma_window *a = arg;

	(void)f;
	a->channel = w[0] % 8 ? w[0] % 3 : number(w[0] >> 3);
	a->region = w[1] % 8 ? 0 : number(w[1] >> 3);
	a->first = w[2] % 8 ? w[2] % (PAGES / LMTRACK_CHUNK_PAGES) * LMTRACK_CHUNK_PAGES : number(w[2] >> 3);
	a->address = peer && w[3] % 8 ? (uintptr_t)peer->memory + a->first * PAGE : number(w[3] >> 3);
	a->rkey = peer && w[4] % 8 ? peer->rkey : w[4];
}

static void fill_rdma_wanted(struct fuzzer *f, void *arg, const uint64_t *w)
{
	(void)f;
	((struct lmtrack_stream_rdma_wanted *)arg)->channel = w[0] % 4 ? w[0] % 3 : number(w[0] >> 2);
}

static const struct request {
	const char *name;
	unsigned int cmd;
	enum kind kind;
	uint32_t size;
	uint32_t flags;
	void (*fill)(struct fuzzer *f, void *arg, const uint64_t *w);
} requests[] = {
#define REQUEST(_cmd, _kind, _type, _flags, _fill) \
	{ #_cmd, LMTRACK_##_cmd, _kind, sizeof(struct lmtrack_##_type), _flags, fill_##_fill }
	REQUEST(REGION_CREATE, DEVICE, region_create, 0, region_create),
	REQUEST(STREAM_CREATE, DEVICE, stream_create, LMTRACK_STREAM_NO_ZERO_DETECT, stream_create),
	REQUEST(REGION_INFO, REGION, region_info, 0, nothing),
	REQUEST(REGION_STATS, REGION, region_stats, 0, nothing),
	REQUEST(TRACK_START, REGION, track_start, LMTRACK_TRACK_ALLOW_PINNED, nothing),
	REQUEST(TRACK_STOP, REGION, track_stop, 0, nothing),
	REQUEST(DIRTY_GET, REGION, dirty_get, LMTRACK_DIRTY_CLEAR, dirty_get),
	REQUEST(HOLD_SET, REGION, hold_set, LMTRACK_HOLD_CLEAR_ALL, hold_set),
	REQUEST(STUN_SET, REGION, stun_set, 0, stun_set),
	REQUEST(STUN_STATS, REGION, stun_stats, 0, stun_stats),
	REQUEST(STREAM_ADD_REGION, STREAM, stream_add_region, 0, add_region),
	REQUEST(STREAM_ADD_CHANNEL, STREAM, stream_add_channel, LMTRACK_CHANNEL_REPLACE, add_channel),
	REQUEST(STREAM_DROP_CHANNEL, STREAM, stream_drop_channel, 0, drop_channel),
	REQUEST(STREAM_ADD_RDMA, STREAM, stream_add_rdma, LMTRACK_CHANNEL_REPLACE, add_rdma),
	REQUEST(STREAM_RDMA_WINDOW, STREAM, stream_rdma_window, 0, rdma_window),
	REQUEST(STREAM_RDMA_WANTED, STREAM, stream_rdma_wanted, 0, rdma_wanted),
	REQUEST(STREAM_SEND, STREAM, stream_send, LMTRACK_SEND_HELD, send),
	REQUEST(STREAM_WAIT, STREAM, stream_wait, 0, wait),
	REQUEST(STREAM_CANCEL, STREAM, stream_cancel, 0, nothing),
	REQUEST(STREAM_RATE_SET, STREAM, stream_rate_set, 0, rate_set),
	REQUEST(CHANNEL_STATS, STREAM, channel_stats, 0, channel_stats),
	REQUEST(STREAM_WIDTH, STREAM, stream_width, 0, width),
};

#define REQUESTS	(sizeof(requests) / sizeof(*requests))

/* An argument as it should be, then, half of the time, with one thing wrong. */
static void spoil(const struct request *request, char *arg, uint64_t how, uint64_t word)
{
	uint32_t *head = (uint32_t *)arg;	/* size, flags */

	switch (how % 16) {
	case 0: head[0] = number(word); break;
	case 1: head[0] -= 1 + word % 16; break;
	case 2: head[0] += 1 + word % 64; break;
	case 3:
		head[0] += 8;
		arg[request->size + word % 8] = 1;
		break;
	case 4: head[1] = number(word); break;
	case 5: head[1] = 1U << word % 32; break;
	case 6:
		head[word % (request->size / 4)] = number(word >> 16);
		break;
	case 7:
		if (request->size > 16)
			((uint64_t *)arg)[1 + word % (request->size / 8 - 1)] = number(word >> 16);
		break;
	default: break;
	}
}

static void op_request(struct fuzzer *f, const uint64_t *w)
{
	unsigned int number_of = w[0] % REQUESTS;
	const struct request *request = &requests[number_of];
	_Alignas(8) char arg[2 * PAGE] = "";
	long ret;

	((uint32_t *)arg)[0] = request->size;
	((uint32_t *)arg)[1] = request->flags & w[0] >> 16;
	request->fill(f, arg, w + 3);
	spoil(request, arg, w[0] >> 48, w[2]);
	f->doing = request->name;
	requests_made[number_of]++;
	ret = ioctl(fd_of(request->kind, w[1]), request->cmd, arg);
	requests_done[number_of] += ret >= 0;
	if (request->kind == DEVICE && ret > 2)
		slot_put(w[1] >> 16 & 15, request->cmd == LMTRACK_REGION_CREATE ? REGION : STREAM, ret);
}

static void op_unknown_request(struct fuzzer *f, const uint64_t *w)
{
	ioctl(slot_fd(w[0] % SLOTS), _IOC(w[1] % 4, LMTRACK_IOC_TYPE, w[2] % 256, w[3] % 64), f->buffer);
}

/* ---- Everything else ---- */

static void op_close(struct fuzzer *f, const uint64_t *w)
{
	(void)f;
	slot_put(w[0] % SLOTS, NOTHING, -1);
}

static void op_open(struct fuzzer *f, const uint64_t *w)
{
	static const int flags[] = { O_RDWR, O_RDWR, O_RDWR, O_RDONLY, O_WRONLY, O_PATH };
	unsigned int to = w[0] % SLOTS;
	int fd, pair[2];

	(void)f;
	switch (w[1] % 8) {
	case 0:
		slot_put(to, DEVICE, device_open());
		break;
	case 1:
		slot_put(to, REGION, region_open(fd_of(REGION, w[2]), flags[w[3] % 6]));
		break;
	case 2:
		slot_put(to, REGION, region_open(checked, flags[w[3] % 4]));
		break;
	case 3:
		fd = fd_of(w[2] % 8, w[3]);
		slot_put(to, slots[slot_of(w[2] % 8, w[3])] >> 32, fcntl(fd, F_DUPFD_CLOEXEC, 3));
		break;
	case 4 ... 5:
		if (!tcp_pair(pair))
			slot_put(w[2] % SLOTS, SOCKET, pair[1]);
		slot_put(to, SOCKET, pair[0]);
		break;
	case 6:
		slot_put(to, SOCKET, socket(w[2] % 2 ? AF_INET : AF_UNIX,
					    (w[3] % 2 ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0));
		break;
	default:
		slot_put(to, OTHER, memfd_create("fuzz", MFD_CLOEXEC));
		break;
	}
}

/* A stream that could send at once: sequences seldom make one from its parts. */
static void op_stream(struct fuzzer *f, const uint64_t *w)
{
	struct lmtrack_stream_create create = { .size = sizeof(create), .stream_id = w[0] };
	struct lmtrack_stream_add_channel channel = { .size = sizeof(channel) };
	struct lmtrack_stream_add_region region = { .size = sizeof(region) };
	struct lmtrack_stream_add_rdma over_rdma = {
		.size = sizeof(over_rdma), .timeout_ms = 2000, .window_pages = LMTRACK_CHUNK_PAGES,
	};
	int dev = device_open(), fd = lmt_region(BYTES), stream, pair[2];
	unsigned int i;

	(void)f;
	stream = ioctl(dev, LMTRACK_STREAM_CREATE, &create);
	lmt_start(fd, 0, NULL);
	region.fd = fd;
	ioctl(stream, LMTRACK_STREAM_ADD_REGION, &region);
	if (peer)
		memcpy(over_rdma.remote, &peer->address, sizeof(peer->address));
	for (i = 0; i <= w[1] % 3; i++) {
		if (peer && w[1] >> (8 + i) & 1) {
			ioctl(stream, LMTRACK_STREAM_ADD_RDMA, &over_rdma);
			continue;
		}
		if (tcp_pair(pair)) {
			close(pair[0]);
			break;
		}
		channel.fd = pair[0];
		ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &channel);
		slot_put((w[2] + i) % SLOTS, SOCKET, pair[1]);
		slot_put((w[3] + i) % SLOTS, SOCKET, pair[0]);
	}
	mmap(arena + w[4] % PLACES * PLACE_BYTES, PLACE_BYTES, PROT_READ | PROT_WRITE,
	     MAP_SHARED | MAP_FIXED, fd, 0);
	slot_put(w[5] % SLOTS, REGION, fd);
	slot_put(w[6] % SLOTS, STREAM, stream);
	slot_put(0, DEVICE, dev);
}

/* The windows that a stream's channels wait for, as a source sets them. */
static void op_windows(struct fuzzer *f, const uint64_t *w)
{
	int stream = fd_of(STREAM, w[0]);
	unsigned int i;

	(void)f;
	for (i = 0; peer && i < 16; i++) {
		struct lmtrack_stream_rdma_wanted wanted = {
			.size = sizeof(wanted), .channel = (w[1] + i) % 3,
		};
		struct lmtrack_stream_rdma_window window = {
			.size = sizeof(window), .channel = wanted.channel, .rkey = peer->rkey,
		};

		if (ioctl(stream, LMTRACK_STREAM_RDMA_WANTED, &wanted)) {
			pause_ms(w[2] % 4);
			continue;
		}
		window.region = wanted.region;
		window.first = wanted.first;
		window.address = (uintptr_t)peer->memory + wanted.first * PAGE;
		ioctl(stream, LMTRACK_STREAM_RDMA_WINDOW, &window);
	}
}

static void op_socket(struct fuzzer *f, const uint64_t *w)
{
	struct sockaddr nobody = { .sa_family = AF_UNSPEC };
	int fd = fd_of(SOCKET, w[0]), size = number(w[2]), i;

	switch (w[1] % 8) {
	case 0:
		shutdown(fd, w[2] % 3);
		break;
	case 1:
		setsockopt(fd, SOL_SOCKET, w[3] % 2 ? SO_SNDBUF : SO_RCVBUF, &size, sizeof(size));
		break;
	case 2:
		connect(fd, &nobody, sizeof(nobody));
		break;
	case 3:
		send(fd, f->buffer, w[2] % sizeof(f->buffer), MSG_DONTWAIT | MSG_NOSIGNAL);
		break;
	case 4: {
		struct linger now = { .l_onoff = 1 };

		setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		break;
	}
	default:
		for (i = 0; i < 64; i++)
			if (recv(fd, f->buffer, sizeof(f->buffer), MSG_DONTWAIT) <= 0)
				break;
	}
}

/* Part of a place: where and how long. */
static char *part(uint64_t word, size_t *bytes)
{
	size_t pages = PLACE_BYTES / PAGE, first = (word >> 8) % pages;

	*bytes = (1 + (word >> 24) % (pages - first)) * PAGE;
	return arena + word % PLACES * PLACE_BYTES + first * PAGE;
}

static void op_map(struct fuzzer *f, const uint64_t *w)
{
	char *place = arena + w[0] % PLACES * PLACE_BYTES, *at;
	size_t bytes;

	(void)f;
	switch (w[1] % 8) {
	case 0:
		/* Never a hole: something that is not ours might come to lie in it. */
		at = part(w[0], &bytes);
		mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
		break;
	case 1:
		at = part(w[0], &bytes);
		mprotect(at, bytes, w[2] % 4);
		break;
	case 2:
		at = arena + w[2] % PLACES * PLACE_BYTES;
		/* Which may fail when it has made a hole already. */
		if (mremap(place, PLACE_BYTES, PLACE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			   at) == MAP_FAILED && at != place)
			mmap(at, PLACE_BYTES, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
		break;
	default:
		mmap(place, PLACE_BYTES, w[2] % 8 ? PROT_READ | PROT_WRITE : w[3] % 8,
		     (w[3] >> 8) % 16 ? MAP_SHARED | MAP_FIXED : MAP_PRIVATE | MAP_FIXED,
		     fd_of(REGION, w[4]), w[5] % 4 ? w[5] % 4 * PLACE_BYTES : 0);
	}
}

static void op_advise(struct fuzzer *f, const uint64_t *w)
{
	static const int advice[] = {
		MADV_NORMAL, MADV_DONTNEED, MADV_REMOVE, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
		MADV_PAGEOUT, MADV_COLD, MADV_WILLNEED, MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE,
		MADV_FREE,
	};
	size_t bytes;
	char *at = part(w[0], &bytes);

	(void)f;
	switch (w[1] % 4) {
	case 0: mlock(at, bytes); break;
	case 1: munlock(at, bytes); break;
	case 2: msync(at, bytes, MS_SYNC); break;
	default: madvise(at, bytes, advice[w[2] % (sizeof(advice) / sizeof(*advice))]);
	}
}

/* Pages are written by the kernel for us: what is not there or must not be, is an error only. */
static void op_write(struct fuzzer *f, const uint64_t *w)
{
	struct iovec from = { .iov_base = f->buffer, .iov_len = 64 }, to;
	size_t bytes, offset;
	char *at = part(w[0], &bytes);

	for (offset = 0; offset < bytes && offset < 16 * PAGE; offset += PAGE) {
		if (w[1] % 2) {
			getrandom(at + offset + w[2] % (PAGE - 64), 64, GRND_NONBLOCK);
			continue;
		}
		f->buffer[0] = next_random(&f->random);
		to = (struct iovec){ .iov_base = at + offset + w[2] % (PAGE - 64), .iov_len = 64 };
		process_vm_writev(getpid(), &from, 1, &to, 1, 0);
	}
}

/* A child writes as programs do; a signal that ends it is none of ours. */
static void op_fork(struct fuzzer *f, const uint64_t *w)
{
	size_t bytes, offset;
	char *at = part(w[0], &bytes);
	pid_t pid = fork();

	if (!pid) {
		for (offset = 0; offset < bytes && offset < 64 * PAGE; offset += PAGE)
			*(volatile uint64_t *)(at + offset + w[1] % 512 * 8) = next_random(&f->random);
		_exit(0);
	}
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

static void op_file(struct fuzzer *f, const uint64_t *w)
{
	int fd = fd_of(w[1] % 8 ? REGION : STREAM, w[0]);
	struct pollfd poll_fd = { .fd = fd_of(STREAM, w[0]), .events = POLLIN };
	char path[64];
	struct stat st;

	switch (w[1] % 11) {
	case 0 ... 3:
		fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, w[2] % (2 * PAGES) * PAGE,
			  (1 + w[3] % 64) * PAGE);
		break;
	case 4:
		fallocate(fd, w[2] % 128, number(w[3]), number(w[4]));
		break;
	case 5:
		lseek(fd, number(w[2]), w[3] % 6);
		break;
	case 6:
		if (ftruncate(fd, number(w[2])))
			fstat(fd, &st);
		break;
	case 7:
		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0 && read(fd, f->buffer, sizeof(f->buffer)) >= 0)
			close(fd);
		break;
	case 8:
		if (read(fd, f->buffer, 64) >= 0 || write(fd, f->buffer, 64) >= 0)
			break;
		/* The device's mode is others' matter, too. */
		if (!fstat(fd, &st) && !S_ISCHR(st.st_mode))
			fchmod(fd, w[2] & 0777);
		break;
	case 9:
		poll(&poll_fd, 1, 10);
		break;
	default:
		mincore(arena + w[2] % PLACES * PLACE_BYTES, PLACE_BYTES, (void *)f->buffer);
	}
}

/* Pages are pinned for as long as the descriptor is open. */
static void op_pin(struct fuzzer *f, const uint64_t *w)
{
	size_t bytes;
	char *at = part(w[0], &bytes);

	(void)f;
	slot_put(w[1] % SLOTS, OTHER, pin_pages(at, bytes));
}

static const struct op {
	const char *name;
	unsigned int weight;
	void (*run)(struct fuzzer *f, const uint64_t *w);
} ops[] = {
	{ "request", 40, op_request },
	{ "unknown request", 1, op_unknown_request },
	{ "close", 4, op_close },
	{ "open", 8, op_open },
	{ "stream", 3, op_stream },
	{ "windows", 4, op_windows },
	{ "socket", 6, op_socket },
	{ "map", 10, op_map },
	{ "advise", 5, op_advise },
	{ "write", 12, op_write },
	{ "fork", 1, op_fork },
	{ "file", 8, op_file },
	{ "pin", 1, op_pin },
};

#define OPS		(sizeof(ops) / sizeof(*ops))

/* ---- Sequences ---- */

static void call_random(struct fuzzer *f, struct call *call)
{
	unsigned int i, sum = 0, at;

	for (i = 0; i < OPS; i++)
		sum += ops[i].weight;
	at = next_random(&f->random) % sum;
	for (i = 0; at >= ops[i].weight; i++)
		at -= ops[i].weight;
	call->op = i;
	for (i = 0; i < WORDS; i++)
		call->words[i] = next_random(&f->random);
}

static void sequence_random(struct fuzzer *f, struct sequence *sequence)
{
	unsigned int i;

	sequence->count = 1 + next_random(&f->random) % CALLS;
	for (i = 0; i < sequence->count; i++)
		call_random(f, &sequence->calls[i]);
}

/* One that is worth keeping, with a call changed, exchanged, added or dropped; or a new one. */
static void sequence_next(struct fuzzer *f, struct sequence *sequence)
{
	unsigned int n = 1 + next_random(&f->random) % 3;
	struct call *call;
	bool any;

	pthread_mutex_lock(&corpus_lock);
	any = corpus_count && next_random(&f->random) % 3;
	if (any)
		*sequence = corpus[next_random(&f->random) % corpus_count];
	pthread_mutex_unlock(&corpus_lock);
	if (!any) {
		sequence_random(f, sequence);
		return;
	}
	while (n--) {
		call = &sequence->calls[next_random(&f->random) % sequence->count];
		switch (next_random(&f->random) % 4) {
		case 0:
			call_random(f, call);
			break;
		case 1:
			if (sequence->count < CALLS)
				call_random(f, &sequence->calls[sequence->count++]);
			break;
		case 2:
			if (sequence->count > 1)
				*call = sequence->calls[--sequence->count];
			break;
		default:
			call->words[next_random(&f->random) % WORDS] = next_random(&f->random);
		}
	}
}

static bool pc_add(uint64_t pc)
{
	unsigned int at = (pc * 0x9e3779b97f4a7c15ULL) >> 50;	/* 14 bits */
	unsigned int i;

	for (i = 0; i < PCS; i++, at = (at + 1) % PCS) {
		uint64_t none = 0;

		if (pcs[at] == pc)
			return false;
		if (!pcs[at] && atomic_compare_exchange_strong(&pcs[at], &none, pc)) {
			pc_count++;
			return true;
		}
		if (none == pc)
			return false;
	}
	return false;
}

static void sequence_run(struct fuzzer *f, const struct sequence *sequence)
{
	bool fresh = false;
	uint64_t n, count;
	unsigned int i;

	if (f->kcov)
		__atomic_store_n(&f->kcov[0], 0, __ATOMIC_RELAXED);
	for (i = 0; i < sequence->count; i++) {
		f->doing = ops[sequence->calls[i].op].name;
		f->since = lmt_seconds();
		ops[sequence->calls[i].op].run(f, sequence->calls[i].words);
		f->since = 0;
		f->calls++;
	}
	f->sequences++;
	if (!f->kcov)
		return;
	count = __atomic_load_n(&f->kcov[0], __ATOMIC_RELAXED);
	for (n = 0; n < count && n < KCOV_WORDS - 1; n++)
		fresh |= pc_add(f->kcov[n + 1]);
	if (!fresh)
		return;
	pthread_mutex_lock(&corpus_lock);
	corpus[corpus_count < CORPUS ? corpus_count++ : next_random(&f->random) % CORPUS] = *sequence;
	pthread_mutex_unlock(&corpus_lock);
}

static uint64_t *kcov_begin(void)
{
	int fd = open("/sys/kernel/debug/kcov", O_RDWR | O_CLOEXEC);
	uint64_t *area;

	if (fd < 0 || ioctl(fd, KCOV_INIT_TRACE, KCOV_WORDS))
		return NULL;
	area = mmap(NULL, KCOV_WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (area == MAP_FAILED || ioctl(fd, KCOV_ENABLE, KCOV_TRACE_PC))
		return NULL;
	/* The descriptor stays open, for as long as the thread lives. */
	return area;
}

static void *fuzz(void *arg)
{
	struct fuzzer *f = arg;
	struct sequence sequence;

	f->tid = gettid();
	f->kcov = kcov_begin();
	while (!stop) {
		if (rest) {
			resting++;
			while (rest && !stop)
				pause_ms(1);
			resting--;
			continue;
		}
		sequence_next(f, &sequence);
		sequence_run(f, &sequence);
	}
	return NULL;
}

/* ---- What is watched meanwhile ---- */

static void nothing(int signal)
{
	(void)signal;
}

/* Wakes whoever waits for long; false if somebody cannot be woken. */
static bool watch(struct fuzzer *fuzzers, unsigned int count)
{
	double now = lmt_seconds();
	char command[64];
	unsigned int i;

	for (i = 0; i < count; i++) {
		double since = fuzzers[i].since;

		if (since && now - since > HANG_S) {
			printf("# thread %u hangs in: %s\n", i, fuzzers[i].doing);
			fflush(stdout);
			snprintf(command, sizeof(command), "cat /proc/%d/task/%d/stack", getpid(),
				 fuzzers[i].tid);
			if (system(command))
				printf("# and does not say where\n");
			return false;
		}
		if (since && now - since > KICK_S)
			pthread_kill(fuzzers[i].thread, SIGUSR1);
	}
	return true;
}

/* What was written is in the next harvest: pages are copied after it says so. */
static long harvest(const char *memory, char *shadow)
{
	static uint64_t bitmap[PAGES / 64];
	long dirty = lmt_dirty(checked, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap);
	size_t page;

	for (page = 0; dirty > 0 && page < PAGES; page++)
		if (lmt_bit(bitmap, page))
			memcpy(shadow + page * PAGE, memory + page * PAGE, PAGE);
	return dirty;
}

/* ---- The test ---- */

static unsigned long wish(const char *name, unsigned long otherwise)
{
	const char *value = getenv(name);

	return value ? strtoul(value, NULL, 0) : otherwise;
}

FIXTURE(fuzz) {
};

FIXTURE_SETUP(fuzz)
{
	(void)self;
}

FIXTURE_TEARDOWN(fuzz)
{
	(void)self;
}

TEST_F_TIMEOUT(fuzz, anything, 100000)
{
	unsigned long seconds = wish("LMTRACK_FUZZ_SECONDS", 20);
	unsigned long seed = wish("LMTRACK_FUZZ_SEED", time(NULL));
	unsigned int count = wish("LMTRACK_FUZZ_THREADS", 3), i, comparisons = 0;
	unsigned long calls = 0, sequences = 0, lost = 0, harvested = 0, page;
	struct sigaction action = { .sa_handler = nothing };
	struct rlimit no_cores = { };
	long long users;
	struct fuzzer *fuzzers;
	char *memory, *shadow;
	double begin, end;

	ASSERT_TRUE(count && count <= THREADS_MAX);
	printf("# LMTRACK_FUZZ_SEED=%lu LMTRACK_FUZZ_THREADS=%u LMTRACK_FUZZ_SECONDS=%lu\n", seed, count,
	       seconds);
	fflush(stdout);
	setrlimit(RLIMIT_CORE, &no_cores);
	signal(SIGPIPE, SIG_IGN);
	sigaction(SIGUSR1, &action, NULL);
	peer = hostile_start(BYTES, seed);
	users = module_users();
	arena = mmap(NULL, PLACES * PLACE_BYTES, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(MAP_FAILED, arena);
	checked = lmt_region(BYTES);
	ASSERT_LE(0, checked);
	memory = lmt_map(checked, BYTES);
	shadow = calloc(1, BYTES);
	ASSERT_NE(MAP_FAILED, memory);
	ASSERT_NE(NULL, shadow);
	ASSERT_EQ(0, lmt_start(checked, 0, NULL));

	fuzzers = calloc(count, sizeof(*fuzzers));
	ASSERT_NE(NULL, fuzzers);
	begin = lmt_seconds();
	for (i = 0; i < count; i++) {
		fuzzers[i].random = (seed + i + 1) * 0x9e3779b97f4a7c15ULL;
		ASSERT_EQ(0, pthread_create(&fuzzers[i].thread, NULL, fuzz, &fuzzers[i]));
	}
	for (end = begin + seconds; lmt_seconds() < end && !lost;) {
		double until = lmt_seconds() + 1;
		long dirty;

		while (lmt_seconds() < until) {
			dirty = harvest(memory, shadow);
			ASSERT_LE(0, dirty);
			harvested += dirty;
			ASSERT_TRUE(watch(fuzzers, count));
			pause_ms(20);
		}
		rest = true;
		while (resting < count) {
			ASSERT_TRUE(watch(fuzzers, count));
			pause_ms(10);
		}
		ASSERT_LE(0, harvest(memory, shadow));
		for (page = 0; page < PAGES; page++)
			lost += !!memcmp(memory + page * PAGE, shadow + page * PAGE, PAGE);
		EXPECT_EQ(0, lost);
		comparisons++;
		rest = false;
		while (resting)
			pause_ms(1);
	}
	stop = true;
	for (i = 0; i < count; i++) {
		while (pthread_tryjoin_np(fuzzers[i].thread, NULL)) {
			ASSERT_TRUE(watch(fuzzers, count));
			pause_ms(10);
		}
		calls += fuzzers[i].calls;
		sequences += fuzzers[i].sequences;
	}
	for (i = 0; i < SLOTS; i++)
		slot_put(i, NOTHING, -1);
	if (peer)
		hostile_end(peer);
	close(checked);
	munmap(memory, BYTES);
	munmap(arena, PLACES * PLACE_BYTES);
	EXPECT_TRUE(EVENTUALLY(30, module_users() == users)) {
		TH_LOG("users of the module: %lld, before %lld", module_users(), users);
	}

	printf("# %lu calls in %lu sequences, %.0f s; %lu pages harvested, compared %u times, %lu lost\n",
	       calls, sequences, lmt_seconds() - begin, harvested, comparisons, lost);
	if (fuzzers[0].kcov)
		printf("# %u places of the module reached, by %u sequences\n", pc_count, corpus_count);
	if (peer)
		printf("# %lu connections over RDMA, %lu ended by the peer\n", peer->accepted, peer->ended);
	for (i = 0; i < REQUESTS; i++)
		printf("# %-20s %8lu, of them %lu well\n", requests[i].name, requests_made[i],
		       requests_done[i]);
	/* Who is refused everything has shown nothing. */
	EXPECT_LT(0, harvested);
	EXPECT_LT(0, requests_done[0]);
	free(fuzzers);
	free(shadow);
}

TEST_HARNESS_MAIN
