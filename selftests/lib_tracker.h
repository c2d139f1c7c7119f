/* SPDX-License-Identifier: GPL-2.0 */
/*
 * For tests of a tracker by itself: regions, a receiver that notes what comes on which channel in
 * which round, and rounds. What the macros call self is a fixture with ctx, regions, tracker,
 * world, socks, number and round, its variant has kind and channels. Needs the linker to wrap
 * recvmsg and sendmsg.
 */
#ifndef LIB_TRACKER_H
#define LIB_TRACKER_H

#include "kselftest_harness.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/vfs.h>
#include <sys/wait.h>

#include "../lib/sender.h"
#include "../lib/wire.h"
#include "lib_pair.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define REGIONS 3
#define CHANNELS_MAX 8
#define CHUNK_BYTES (LMTRACK_CHUNK_PAGES * PAGE_BYTES)
#define STREAM 0x1234567890abcdefULL

/* Of different sizes, the last chunk short; the second begins on another channel. */
static const uint64_t sizes[REGIONS] = { 16 * MIB + 5 * PAGE_BYTES, 6 * MIB, PAGE_BYTES };

/* ---- The network, as it could be ---- */

static struct {
	_Atomic bool reference;		/* it can take pages by reference, unlike loopback */
	_Atomic bool full;		/* it has no room for notices */
	bool narrow;			/* a peer that does not read soon holds it up */
	_Atomic unsigned int calls;	/* that asked for zero-copy */
} network;

ssize_t __real_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);

ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags)
{
	ssize_t n = __real_recvmsg(fd, msg, flags);
	struct cmsghdr *at = n < 0 || !(flags & MSG_ERRQUEUE) ? NULL : CMSG_FIRSTHDR(msg);

	if (at && network.reference)
		((struct sock_extended_err *)CMSG_DATA(at))->ee_code = 0;
	return n;
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	if (flags & MSG_ZEROCOPY) {
		network.calls++;
		if (network.full) {
			errno = ENOBUFS;
			return -1;
		}
	}
	return __real_sendmsg(fd, msg, flags);
}

/* ---- A receiver ---- */

struct peer {
	struct world_of_pages *to;
	unsigned int number;
	int sock;			/* its end */
	pthread_t thread;
	_Atomic bool deaf;
	_Atomic uint32_t ended;		/* round */
	_Atomic int error;
	uint64_t seq, round_pages;
};

struct world_of_pages {
	uint8_t *copy[REGIONS];
	uint32_t *round[REGIONS];	/* of each page: the last in which it came */
	bool *zero[REGIONS];		/* it came as zero then */
	uint64_t *owner[REGIONS];	/* of each chunk: the last round that brought it (32 bits up), and its channel */
	uint64_t pages[REGIONS];
	struct peer peer[CHANNELS_MAX];
	unsigned int channels;
};

static bool get(struct peer *peer, void *to, size_t length)
{
	while (peer->deaf)
		usleep(1000);
	return !length || recv(peer->sock, to, length, MSG_WAITALL) == (ssize_t)length;
}

/* Take a frame in; what is wrong with it, or NULL; "" at the end. */
static const char *take_frame(struct peer *peer)
{
	struct world_of_pages *to = peer->to;
	static _Thread_local struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	struct lmtrack_wire_frame raw;
	struct kmig_frame frame;
	const char *why = NULL;
	uint64_t chunk;
	uint32_t pages;

	if (!get(peer, &raw, sizeof(raw)))
		return "";
	if (kmig_frame_decode(&raw, PAGE_BYTES, &frame, &why) || !get(peer, table, frame.extents * sizeof(table[0])) ||
	    kmig_frame_check_crc(&raw, table, &why))
		return why ? why : "";
	if (frame.stream != STREAM || frame.channel != peer->number || frame.seq != peer->seq++)
		return "stream, channel or sequence";
	if (frame.type == LMTRACK_FRAME_ROUND_END) {
		if (frame.arg != peer->round_pages)
			return "pages of the round";
		peer->round_pages = 0;
		peer->ended = frame.round;
		return NULL;
	}
	if (frame.region >= REGIONS ||
	    kmig_frame_check_extents(&frame, table, to->pages[frame.region], PAGE_BYTES, &chunk, &pages, &why))
		return why ? why : "region";
	if (to->owner[frame.region][chunk] >> 32 == frame.round && (uint32_t)to->owner[frame.region][chunk] != peer->number)
		return "a chunk changed its channel in a round";
	to->owner[frame.region][chunk] = (uint64_t)frame.round << 32 | peer->number;
	peer->round_pages += pages;
	for (uint32_t i = 0; i < frame.extents; i++) {
		for (uint64_t page = le64toh(table[i].first); page < le64toh(table[i].first) + le32toh(table[i].pages); page++) {
			uint8_t *copy = to->copy[frame.region] + page * PAGE_BYTES;

			if (to->round[frame.region][page] == frame.round)
				return "a page came twice in a round";
			to->round[frame.region][page] = frame.round;
			to->zero[frame.region][page] = frame.type == LMTRACK_FRAME_ZERO;
			if (frame.type == LMTRACK_FRAME_ZERO)
				memset(copy, 0, PAGE_BYTES);
			else if (!get(peer, copy, PAGE_BYTES))
				return "";
		}
	}
	return NULL;
}

static void *peer_main(void *data)
{
	struct peer *peer = data;
	const char *wrong;

	do
		wrong = take_frame(peer);
	while (!wrong);
	if (*wrong) {
		fprintf(stderr, "# channel %u: %s\n", peer->number, wrong);
		peer->error = EPROTO;
	}
	return NULL;
}

/* A TCP connection over loopback. */
static int connect_pair(int pair[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	/* What was not read is thrown away at the end, and the pages with it. */
	struct linger at_once = { .l_onoff = 1 };
	int narrow = 16 << 10;
	int err;

	if (network.narrow)
		setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &narrow, sizeof(narrow));
	pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	err = bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
	      getsockname(listener, (struct sockaddr *)&address, &length) ||
	      connect(pair[0], (struct sockaddr *)&address, length);
	pair[1] = err ? -1 : accept(listener, NULL, NULL);
	close(listener);
	for (int i = 0; i < 2; i++)
		setsockopt(pair[i], SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	return err || pair[1] < 0 ? -1 : 0;
}

/* ---- A VMM that knows itself what it wrote ---- */

static uint64_t *dirty_log[REGIONS];
static _Atomic bool logging;
static _Atomic int log_error;

static int give_dirty(unsigned int region, uint64_t first, uint64_t pages, uint64_t *bitmap, void *data)
{
	(void)data;
	if (log_error)
		return -log_error;
	for (uint64_t word = 0; word < (pages + 63) / 64; word++)
		bitmap[word] |= __atomic_exchange_n(&dirty_log[region][first / 64 + word], 0, __ATOMIC_SEQ_CST);
	return 0;
}

static int give_track(bool on, void *data)
{
	(void)data;
	logging = on;
	return 0;
}

static int (*ask_dirty)(unsigned int, uint64_t, uint64_t, uint64_t *, void *) = give_dirty;
static int (*ask_track)(bool, void *) = give_track;

#define ON_LMTRACK (variant->kind == KMIG_TRACKER_LMTRACK)
/* The module sends a page once more that was held, be it by the network, when it was harvested. */
#define EXPECT_PAGES(n, pages) do {								\
	if (ON_LMTRACK) {									\
		EXPECT_LE(n, pages);								\
	} else {										\
		EXPECT_EQ(n, pages);								\
	}											\
} while (0)

static void setup_pages(struct world_of_pages *world, unsigned int i)
{
	world->pages[i] = sizes[i] / PAGE_BYTES;
	world->copy[i] = mmap(NULL, sizes[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	world->round[i] = calloc(world->pages[i], sizeof(uint32_t));
	world->zero[i] = calloc(world->pages[i], sizeof(bool));
	world->owner[i] = calloc(sizes[i] / CHUNK_BYTES + 1, sizeof(uint64_t));
	dirty_log[i] = calloc((world->pages[i] + 63) / 64, sizeof(uint64_t));
}

#define SET_UP_REGIONS() do {									\
	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));							\
	for (unsigned int i = 0; i < REGIONS; i++) {						\
		struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;				\
		int err;									\
												\
		opts.bytes = sizes[i];								\
		opts.kind = ON_LMTRACK ? KMIG_REGION_LMTRACK : KMIG_REGION_MEMFD;		\
		if (ON_LMTRACK && access("/dev/lmtrack", F_OK))					\
			SKIP(return, "no /dev/lmtrack");					\
		ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->regions[i]));		\
		ASSERT_NE(NULL, kmig_region_map(self->regions[i]));				\
		setup_pages(&self->world, i);							\
		err = kmig_tracker_accepts(variant->kind, self->regions, i, self->regions[i]);	\
		if (err == -EOPNOTSUPP)								\
			SKIP(return, "%s", kmig_ctx_error(self->ctx));				\
		ASSERT_EQ(0, err) TH_LOG("%s", kmig_ctx_error(self->ctx));			\
	}											\
} while (0)

/* A tracker at work, and those who receive from it. */
#define START() do {										\
	struct kmig_tracker_config config = {							\
		.ctx = self->ctx, .kind = variant->kind, .regions = self->regions,		\
		.count = REGIONS, .stream = STREAM, .abort_fd = -1,				\
		.dirty = ask_dirty, .track = ask_track,						\
	};											\
												\
	ASSERT_EQ(0, kmig_tracker_new(&config, &self->tracker));				\
	ASSERT_EQ(0, kmig_tracker_start(self->tracker)) TH_LOG("%s", kmig_ctx_error(self->ctx));	\
	self->world.channels = variant->channels;						\
	for (unsigned int _i = 0; _i < variant->channels; _i++) {				\
		struct peer *peer = &self->world.peer[_i];					\
		int pair[2];									\
												\
		ASSERT_EQ(0, connect_pair(pair));						\
		self->socks[_i] = pair[0];							\
		*peer = (struct peer){ .to = &self->world, .number = _i, .sock = pair[1] };	\
		pthread_create(&peer->thread, NULL, peer_main, peer);				\
		ASSERT_EQ(0, kmig_tracker_add_channel(self->tracker, pair[0]));			\
	}											\
} while (0)

#define WAIT_MS_MAX 20000

/* The round's end, not its arrival. */
static int await(struct kmig_tracker *tracker, struct kmig_round *round)
{
	struct pollfd fd = { .fd = kmig_tracker_fd(tracker), .events = POLLIN };

	/* That something went wrong is known before the round has ended. */
	for (int ms = 0; !(fd.revents & POLLIN); ms++, usleep(1000))
		if (poll(&fd, 1, WAIT_MS_MAX) != 1 || ms == WAIT_MS_MAX)
			return -ETIME;
	return kmig_tracker_wait(tracker, round) ?: round->error;
}

static bool arrived(struct world_of_pages *world, uint32_t round)
{
	for (unsigned int i = 0; i < world->channels; i++)
		for (int ms = 0; world->peer[i].ended != round; ms++, usleep(1000))
			if (ms == WAIT_MS_MAX || world->peer[i].error)
				return false;
	return true;
}

#define SEND_FLAGS(what, flags) do {								\
	ASSERT_EQ(0, kmig_tracker_send(self->tracker, ++self->number, what, flags));		\
	ASSERT_EQ(0, await(self->tracker, &self->round)) TH_LOG("%s", kmig_ctx_error(self->ctx));	\
	ASSERT_EQ(self->number, self->round.round);						\
	ASSERT_TRUE(arrived(&self->world, self->number));					\
} while (0)
#define SEND_ALL() SEND_FLAGS(KMIG_SEND_ALL, 0)
#define SEND_DIRTY() SEND_FLAGS(KMIG_SEND_DIRTY, 0)

/* The first page that differs, or -1; a hole is not touched, or it would be one no more. */
static int64_t first_difference(const struct kmig_region *region, const uint8_t *copy)
{
	static const uint8_t zeroes[PAGE_BYTES];
	uint64_t exists[KMIG_CHUNK_WORDS];

	for (uint64_t page = 0; page < region->bytes / PAGE_BYTES; page++) {
		uint64_t at = page % LMTRACK_CHUNK_PAGES;

		if (!at && kmig_region_exists(region, page / LMTRACK_CHUNK_PAGES, exists))
			return page;
		if (memcmp(kmig_bit(exists, at) ? (uint8_t *)region->map + page * PAGE_BYTES : zeroes,
			   copy + page * PAGE_BYTES, PAGE_BYTES))
			return page;
	}
	return -1;
}

#define EXPECT_SAME() do {									\
	for (unsigned int _i = 0; _i < REGIONS; _i++)						\
		EXPECT_EQ(-1, first_difference(self->regions[_i], self->world.copy[_i]));	\
} while (0)

#define STOP() do {										\
	kmig_tracker_free(self->tracker);							\
	self->tracker = NULL;									\
	for (unsigned int _i = 0; _i < self->world.channels; _i++) {				\
		shutdown(self->socks[_i], SHUT_RDWR);						\
		shutdown(self->world.peer[_i].sock, SHUT_RDWR);					\
		pthread_join(self->world.peer[_i].thread, NULL);				\
		EXPECT_EQ(0, (int)self->world.peer[_i].error);					\
		close(self->socks[_i]);								\
		close(self->world.peer[_i].sock);						\
	}											\
	self->world.channels = 0;								\
} while (0)

#endif
