// SPDX-License-Identifier: GPL-2.0
/*
 * Streams, request by request, against a receiver of the test's own that checks every field of
 * every frame and keeps a copy of the regions: it must be equal to them, byte for byte.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <endian.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/time.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <linux/tls.h>
#include <linux/lmtrack_wire.h>

#include "kselftest_harness.h"
#include "uapi_requests.h"

#define STREAM_ID	0x1122334455667788ULL
#define CHUNK_PAGES	LMTRACK_CHUNK_PAGES
#define ALL		LMTRACK_SEND_ALL
#define DIRTY		LMTRACK_SEND_DIRTY

#ifndef SOL_TLS
#define SOL_TLS		282
#endif

/* ---- Requests ---- */

/* The channel's number. */
static long add_channel_on(int stream, int fd, const void *cpumask, uint32_t bytes)
{
	struct lmtrack_stream_add_channel args = {
		.size = sizeof(args), .fd = fd, .cpumask = (uintptr_t)cpumask,
		.cpumask_bytes = bytes, .channel = ~0U,
	};
	long ret = lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &args);

	return ret ?: (long)args.channel;
}

static long add_channel(int stream, int fd)
{
	return add_channel_on(stream, fd, NULL, 0);
}

static long drop_channel(int stream, uint32_t channel, struct lmtrack_stream_drop_channel *out)
{
	struct lmtrack_stream_drop_channel args = { .size = sizeof(args), .channel = channel };
	long ret = lmt_ioctl(stream, LMTRACK_STREAM_DROP_CHANNEL, &args);

	if (out)
		*out = args;
	return ret;
}

static long replace_channel(int stream, uint32_t channel, int fd)
{
	struct lmtrack_stream_add_channel args = {
		.size = sizeof(args), .flags = LMTRACK_CHANNEL_REPLACE, .fd = fd, .channel = channel,
	};

	return lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &args);
}

/* ---- Connections ---- */

/* pair[0] is the sender's end. With @buffer, little fits between the two. */
static int tcp_pair_between(int pair[2], int buffer, int from_ns, int to_ns,
			    const char *address)
{
	struct sockaddr_in in = { .sin_family = AF_INET };
	socklen_t length = sizeof(in);
	int listener;

	inet_pton(AF_INET, address, &in.sin_addr);
	if (to_ns >= 0 && setns(to_ns, CLONE_NEWNET))
		return -errno;
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (buffer)
		setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
	if (listener < 0 || bind(listener, (void *)&in, sizeof(in)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&in, &length))
		return -errno;
	if (from_ns >= 0 && setns(from_ns, CLONE_NEWNET))
		return -errno;
	pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (buffer)
		setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
	if (pair[0] < 0 || connect(pair[0], (void *)&in, sizeof(in)))
		return -errno;
	pair[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (pair[1] < 0)
		return -errno;
	close(listener);
	return 0;
}

static int tcp_pair(int pair[2], int buffer)
{
	return tcp_pair_between(pair, buffer, -1, -1, "127.0.0.1");
}

/* ---- The receiver ---- */

#define REGIONS		2

enum { GOT_NOTHING, GOT_DATA, GOT_ZERO };

/**
 * struct shadow - the copy of a region
 * @mem:	the bytes
 * @pages:	length
 * @got:	what came last for each page
 * @owner:	of each chunk, the last round that brought it (32 bits up), and the channel it came on
 */
struct shadow {
	unsigned char *mem;
	size_t pages;
	unsigned char *got;
	uint64_t *owner;
};

struct receiver;

/**
 * struct rx_channel - one connection; only its thread writes this, apart from the set-up
 * @ended:	the last round whose end has come, under the receiver's lock
 * @done:	the thread has finished, under the receiver's lock
 * @error:	what is wrong with the frames, or empty
 */
struct rx_channel {
	struct receiver *rx;
	uint32_t number;
	int fd;
	pthread_t thread;
	uint64_t seq;
	uint64_t bytes;
	uint64_t head_bytes;
	uint64_t data_pages;
	uint64_t zero_pages;
	uint64_t zero_extents;
	uint64_t round_pages;
	uint32_t ended;
	bool done;
	char error[160];
};

struct receiver {
	struct shadow shadow[REGIONS];
	struct rx_channel *channels;
	unsigned int count;
	pthread_mutex_t lock;
	pthread_cond_t change;
};

static uint32_t crc_table[256];

static void __attribute__((constructor)) crc_init(void)
{
	uint32_t i, bit, crc;

	for (i = 0; i < 256; i++) {
		for (crc = i, bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
		crc_table[i] = crc;
	}
}

static uint32_t crc32c(const void *data, size_t bytes)
{
	const unsigned char *p = data;
	uint32_t crc = ~0U;

	while (bytes--)
		crc = crc >> 8 ^ crc_table[(crc ^ *p++) & 0xff];
	return ~crc;
}

static bool __attribute__((format(printf, 2, 3)))
wrong(struct rx_channel *ch, const char *format, ...)
{
	va_list args;
	int n = snprintf(ch->error, sizeof(ch->error), "channel %u, frame %llu: ", ch->number,
			 (unsigned long long)ch->seq);

	va_start(args, format);
	vsnprintf(ch->error + n, sizeof(ch->error) - n, format, args);
	va_end(args);
	return false;
}

static bool read_all(struct rx_channel *ch, void *to, size_t bytes)
{
	char *at = to;
	ssize_t n;

	while (bytes) {
		n = recv(ch->fd, at, bytes, 0);
		if (n <= 0)
			return false;
		at += n;
		bytes -= n;
		ch->bytes += n;
	}
	return true;
}

/* One frame with its table, in a buffer; le*toh() where it is used. */
struct frame {
	struct lmtrack_wire_frame head;
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
};

static bool check_head(struct rx_channel *ch, const struct lmtrack_wire_frame *head)
{
	if (le32toh(head->magic) != LMTRACK_WIRE_MAGIC)
		return wrong(ch, "magic %#x", le32toh(head->magic));
	if (le16toh(head->version) != LMTRACK_WIRE_VERSION)
		return wrong(ch, "version %u", le16toh(head->version));
	if (head->flags || head->reserved)
		return wrong(ch, "flags or reserved field not zero");
	if (le64toh(head->stream) != STREAM_ID)
		return wrong(ch, "stream %#llx", (unsigned long long)le64toh(head->stream));
	if (le32toh(head->channel) != ch->number)
		return wrong(ch, "says channel %u", le32toh(head->channel));
	if (le64toh(head->seq) != ch->seq)
		return wrong(ch, "sequence %llu", (unsigned long long)le64toh(head->seq));
	if (le32toh(head->round) <= ch->ended)
		return wrong(ch, "round %u after the end of %u", le32toh(head->round),
			     ch->ended);
	if (le32toh(head->extents) > LMTRACK_WIRE_EXTENTS_MAX)
		return wrong(ch, "%u extents", le32toh(head->extents));
	return true;
}

static bool check_crc(struct rx_channel *ch, struct frame *frame)
{
	uint32_t want = le32toh(frame->head.crc);
	uint32_t crc;

	frame->head.crc = 0;
	crc = crc32c(frame, sizeof(frame->head) +
			    le32toh(frame->head.extents) * sizeof(frame->table[0]));
	return crc == want || wrong(ch, "CRC %#x, should be %#x", want, crc);
}

/* Extents are in one chunk, ascending, within the region; their pages, or 0. */
static size_t check_extents(struct rx_channel *ch, const struct frame *frame)
{
	uint32_t region = le32toh(frame->head.region), i;
	uint64_t end = 0, first, pages, total = 0;
	struct shadow *shadow;
	uint64_t us = (uint64_t)le32toh(frame->head.round) << 32 | ch->number, before;

	if (region >= REGIONS || !ch->rx->shadow[region].mem)
		return wrong(ch, "region %u", region);
	if (!frame->head.extents)
		return wrong(ch, "no extents");
	shadow = &ch->rx->shadow[region];
	for (i = 0; i < le32toh(frame->head.extents); i++) {
		first = le64toh(frame->table[i].first);
		pages = le32toh(frame->table[i].pages);
		if (frame->table[i].reserved || !pages || pages > CHUNK_PAGES)
			return wrong(ch, "extent %u of %llu pages", i,
				     (unsigned long long)pages);
		if ((i && first < end) || first + pages > shadow->pages)
			return wrong(ch, "extent %u at page %llu", i, (unsigned long long)first);
		end = first + pages;
		if ((end - 1) / CHUNK_PAGES != le64toh(frame->table[0].first) / CHUNK_PAGES)
			return wrong(ch, "extents in several chunks");
		total += pages;
	}
	first = le64toh(frame->table[0].first) / CHUNK_PAGES;
	before = __atomic_exchange_n(&shadow->owner[first], us, __ATOMIC_RELAXED);
	if (before >> 32 == us >> 32 && before != us)
		return wrong(ch, "chunk %llu was on channel %u in this round",
			     (unsigned long long)first, (uint32_t)before);
	return total;
}

static bool store(struct rx_channel *ch, const struct frame *frame)
{
	bool data = frame->head.type == LMTRACK_FRAME_DATA;
	size_t pages = check_extents(ch, frame);
	struct shadow *shadow;
	uint64_t first, count;
	uint32_t i;

	if (!pages)
		return false;
	if (le32toh(frame->head.payload) != (data ? pages * PAGE : 0))
		return wrong(ch, "payload of %u bytes for %zu pages",
			     le32toh(frame->head.payload), pages);
	if (frame->head.arg)
		return wrong(ch, "argument is not zero");
	shadow = &ch->rx->shadow[le32toh(frame->head.region)];
	for (i = 0; i < le32toh(frame->head.extents); i++) {
		first = le64toh(frame->table[i].first);
		count = le32toh(frame->table[i].pages);
		if (!data)
			memset(shadow->mem + first * PAGE, 0, count * PAGE);
		else if (!read_all(ch, shadow->mem + first * PAGE, count * PAGE))
			return wrong(ch, "ends within the payload");
		memset(shadow->got + first, data ? GOT_DATA : GOT_ZERO, count);
	}
	ch->round_pages += pages;
	if (data) {
		ch->data_pages += pages;
	} else {
		ch->zero_pages += pages;
		ch->zero_extents += le32toh(frame->head.extents);
	}
	return true;
}

static bool round_end(struct rx_channel *ch, const struct lmtrack_wire_frame *head)
{
	if (head->extents || head->payload || head->region)
		return wrong(ch, "round end with more than its argument");
	if (le64toh(head->arg) != ch->round_pages)
		return wrong(ch, "round end says %llu pages, came %llu",
			     (unsigned long long)le64toh(head->arg),
			     (unsigned long long)ch->round_pages);
	ch->round_pages = 0;
	pthread_mutex_lock(&ch->rx->lock);
	ch->ended = le32toh(head->round);
	pthread_cond_broadcast(&ch->rx->change);
	pthread_mutex_unlock(&ch->rx->lock);
	return true;
}

static bool receive_frame(struct rx_channel *ch)
{
	struct frame frame;
	size_t table;

	/* Here, and nowhere else, a connection may end. */
	if (!read_all(ch, &frame.head, sizeof(frame.head)) || !check_head(ch, &frame.head))
		return false;
	table = le32toh(frame.head.extents) * sizeof(frame.table[0]);
	if (!read_all(ch, frame.table, table))
		return wrong(ch, "ends within the table");
	ch->head_bytes += sizeof(frame.head) + table;
	if (!check_crc(ch, &frame))
		return false;
	ch->seq++;
	switch (frame.head.type) {
	case LMTRACK_FRAME_DATA:
	case LMTRACK_FRAME_ZERO:
		if (!store(ch, &frame))
			return false;
		break;
	case LMTRACK_FRAME_ROUND_END:
		if (!round_end(ch, &frame.head))
			return false;
		break;
	default:
		return wrong(ch, "type %u", frame.head.type);
	}
	return true;
}

static void *receive(void *arg)
{
	struct rx_channel *ch = arg;

	while (receive_frame(ch))
		;
	/* With what was not read: after a wrong frame the sender must not wait for us. */
	close(ch->fd);
	pthread_mutex_lock(&ch->rx->lock);
	ch->done = true;
	pthread_cond_broadcast(&ch->rx->change);
	pthread_mutex_unlock(&ch->rx->lock);
	return NULL;
}

static bool shadow_init(struct shadow *shadow, size_t pages)
{
	shadow->pages = pages;
	shadow->mem = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	shadow->got = calloc(pages, 1);
	shadow->owner = calloc(pages / CHUNK_PAGES + 1, sizeof(*shadow->owner));
	return shadow->mem != MAP_FAILED && shadow->got && shadow->owner;
}

static bool receiver_init(struct receiver *rx, unsigned int channels)
{
	memset(rx, 0, sizeof(*rx));
	pthread_mutex_init(&rx->lock, NULL);
	pthread_cond_init(&rx->change, NULL);
	rx->channels = calloc(channels, sizeof(*rx->channels));
	return rx->channels;
}

static bool receiver_start(struct receiver *rx, int fd)
{
	struct rx_channel *ch = &rx->channels[rx->count];

	ch->rx = rx;
	ch->fd = fd;
	ch->number = rx->count++;
	return !pthread_create(&ch->thread, NULL, receive, ch);
}

/* Wait until the round has come in over every channel. */
static bool receiver_wait(struct receiver *rx, uint32_t round)
{
	struct timespec limit;
	bool complete = true;
	unsigned int i;
	int ret = 0;

	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += 60;
	pthread_mutex_lock(&rx->lock);
	for (i = 0; i < rx->count; i++) {
		struct rx_channel *ch = &rx->channels[i];

		while (ch->ended < round && !ch->done && !ret)
			ret = pthread_cond_timedwait(&rx->change, &rx->lock, &limit);
		complete &= ch->ended >= round;
	}
	pthread_mutex_unlock(&rx->lock);
	return complete;
}

/* Join the threads; the connections have ended. */
static const char *receiver_end(struct receiver *rx)
{
	const char *error = NULL;
	unsigned int i;

	for (i = 0; i < rx->count; i++) {
		pthread_join(rx->channels[i].thread, NULL);
		if (rx->channels[i].error[0])
			error = error ?: rx->channels[i].error;
	}
	return error;
}

#define RX_SUM(rx, field) ({					\
	uint64_t _sum = 0;					\
								\
	for (unsigned int _i = 0; _i < (rx)->count; _i++)	\
		_sum += (rx)->channels[_i].field;		\
	_sum;							\
})

/* ---- A region, a stream ---- */

#define BYTES	(8 * MIB)
#define PAGES	(BYTES / PAGE)

FIXTURE(stream) {
	int fd;
	unsigned char *mem;
	int stream;
	int pair[2];
};

FIXTURE_SETUP(stream)
{
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	self->stream = stream_open(STREAM_ID, 0);
	ASSERT_LE(0, self->stream);
	ASSERT_EQ(0, tcp_pair(self->pair, 0));
}

FIXTURE_TEARDOWN(stream)
{
	close(self->stream);
	close(self->fd);
}

#define STREAM_TEST(name) TEST_F_TIMEOUT(stream, name, TEST_SECONDS)

/* ---- Set-up ---- */

STREAM_TEST(create_flags)
{
	unsigned int bit;
	int fd;

	for (bit = 1; bit < 32; bit++)
		EXPECT_EQ(-EOPNOTSUPP, stream_open(STREAM_ID, 1U << bit));
	fd = stream_open(STREAM_ID, LMTRACK_STREAM_NO_ZERO_DETECT);
	EXPECT_LE(0, fd);
	EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
	EXPECT_EQ(-EINVAL, E(read(fd, &bit, sizeof(bit))));
}

STREAM_TEST(add_region_errors)
{
	struct lmtrack_stream_add_region args = { .size = sizeof(args) };
	int other = lmt_region(PAGE), again = lmt_reopen(self->fd);
	int file = memfd_create("no region", 0), dev = device_open(), pipes[2];

	ASSERT_LE(0, other);
	ASSERT_LE(0, again);
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(-EBADF, stream_add_region(self->stream, -1, 0));
	EXPECT_EQ(-EBADF, stream_add_region(self->stream, 9999, 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, file, 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, dev, 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, pipes[0], 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, self->pair[0], 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, self->stream, 0));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, self->fd, LMTRACK_REGIONS_MAX));
	EXPECT_EQ(-EINVAL, stream_add_region(self->stream, self->fd, ~0U));
	args.fd = self->fd;
	args.flags = 1;
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_ADD_REGION, &args));

	EXPECT_EQ(0, stream_add_region(self->stream, self->fd, 3));
	EXPECT_EQ(-EEXIST, stream_add_region(self->stream, self->fd, 3));
	EXPECT_EQ(-EEXIST, stream_add_region(self->stream, self->fd, 4));
	EXPECT_EQ(-EEXIST, stream_add_region(self->stream, again, 4));
	EXPECT_EQ(-EEXIST, stream_add_region(self->stream, other, 3));
	EXPECT_EQ(0, stream_add_region(self->stream, other, LMTRACK_REGIONS_MAX - 1));
}

STREAM_TEST(add_channel_errors)
{
	struct lmtrack_stream_add_channel args = { .size = sizeof(args) };
	struct sockaddr_in in = { .sin_family = AF_INET };
	int null = open("/dev/null", O_RDWR), tcp, udp, local[2], udp6;

	EXPECT_EQ(-EBADF, add_channel(self->stream, -1));
	EXPECT_EQ(-EBADF, add_channel(self->stream, 9999));
	EXPECT_EQ(-ENOTSOCK, add_channel(self->stream, null));
	EXPECT_EQ(-ENOTSOCK, add_channel(self->stream, self->fd));
	EXPECT_EQ(-ENOTSOCK, add_channel(self->stream, self->stream));

	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	in.sin_port = htons(9);
	udp = socket(AF_INET, SOCK_DGRAM, 0);
	ASSERT_EQ(0, connect(udp, (void *)&in, sizeof(in)));
	EXPECT_EQ(-EPROTOTYPE, add_channel(self->stream, udp));
	udp6 = socket(AF_INET6, SOCK_DGRAM, 0);
	if (udp6 >= 0)
		EXPECT_EQ(-EPROTOTYPE, add_channel(self->stream, udp6));
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, local));
	EXPECT_EQ(-EPROTOTYPE, add_channel(self->stream, local[0]));
	EXPECT_EQ(-EPROTOTYPE, add_channel(self->stream, socket(AF_NETLINK, SOCK_RAW, 0)));

	tcp = socket(AF_INET, SOCK_STREAM, 0);
	EXPECT_EQ(-ENOTCONN, add_channel(self->stream, tcp));
	ASSERT_EQ(0, listen(tcp, 1));
	EXPECT_EQ(-ENOTCONN, add_channel(self->stream, tcp));

	args.fd = self->pair[0];
	args.reserved = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_ADD_CHANNEL, &args));
	args.reserved = 0;
	args.flags = 2;
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_ADD_CHANNEL, &args));
	args.flags = LMTRACK_CHANNEL_REPLACE;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_ADD_CHANNEL, &args));

	EXPECT_EQ(0, add_channel(self->stream, self->pair[0]));
	EXPECT_EQ(-EEXIST, add_channel(self->stream, self->pair[0]));
	EXPECT_EQ(-EEXIST, add_channel(self->stream, dup(self->pair[0])));
	EXPECT_EQ(1, add_channel(self->stream, self->pair[1]));
}

#define CHANNELS_MAX_FILE "/sys/module/lmtrack/parameters/channels_max"

static bool set_channels_max(unsigned int most)
{
	FILE *file = fopen(CHANNELS_MAX_FILE, "w");
	bool done = file && fprintf(file, "%u", most) > 0;

	return file && !fclose(file) && done;
}

/* Each channel is a thread of the kernel's: of them there are no more than the host bears. */
STREAM_TEST(channels_of_all_streams)
{
	int other, pair[2];

	if (access(CHANNELS_MAX_FILE, W_OK))
		SKIP(return, "not root");
	other = stream_open(2, 0);
	ASSERT_LE(0, other);
	ASSERT_EQ(0, tcp_pair(pair, 0));
	ASSERT_TRUE(set_channels_max(2));
	EXPECT_EQ(0, add_channel(self->stream, self->pair[0]));
	EXPECT_EQ(0, add_channel(other, pair[0]));
	EXPECT_EQ(-ENOSPC, add_channel(self->stream, self->pair[1]));
	EXPECT_EQ(-ENOSPC, add_channel(other, pair[1]));
	close(other);
	/* What is gone does not count. */
	EXPECT_TRUE(EVENTUALLY(10, add_channel(self->stream, self->pair[1]) == 1));
	EXPECT_TRUE(set_channels_max(4096));
}

/* An answer that cannot be told: nothing is done, and it may be asked again. */
STREAM_TEST(answer_cannot_be_told)
{
	struct lmtrack_stream_add_channel *args = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
						       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, args);
	*args = (struct lmtrack_stream_add_channel){ .size = sizeof(*args), .fd = self->pair[0] };
	ASSERT_EQ(0, mprotect(args, PAGE, PROT_READ));
	EXPECT_EQ(-EFAULT, lmt_ioctl(self->stream, LMTRACK_STREAM_ADD_CHANNEL, args));
	EXPECT_EQ(0, add_channel(self->stream, self->pair[0]));
	munmap(args, PAGE);
}

/* A peer that has gone before the channel was added. */
STREAM_TEST(add_channel_closed)
{
	ASSERT_EQ(0, shutdown(self->pair[0], SHUT_RDWR));
	EXPECT_EQ(-ENOTCONN, add_channel(self->stream, self->pair[0]));
}

STREAM_TEST(add_channel_cpus)
{
	unsigned long none[16] = { 0 }, offline[16] = { 0 }, good[16] = { 1 };

	offline[1] = ~0UL;
	offline[15] = ~0UL;
	EXPECT_EQ(-EINVAL, add_channel_on(self->stream, self->pair[0], none, sizeof(none)));
	EXPECT_EQ(-EINVAL, add_channel_on(self->stream, self->pair[0], offline,
					  sizeof(offline)));
	EXPECT_EQ(-EINVAL, add_channel_on(self->stream, self->pair[0], good, 0));
	EXPECT_EQ(-EINVAL, add_channel_on(self->stream, self->pair[0], NULL, 8));
	EXPECT_EQ(-EFAULT, add_channel_on(self->stream, self->pair[0], (void *)8, 8));
	EXPECT_EQ(-EFAULT, add_channel_on(self->stream, self->pair[0], (void *)(1UL << 63), 8));
	EXPECT_EQ(0, add_channel_on(self->stream, self->pair[0], good, sizeof(good)));
	EXPECT_EQ(1, add_channel_on(self->stream, self->pair[1], good, 1));
}

STREAM_TEST(add_channel_limit)
{
	int pairs[LMTRACK_CHANNELS_MAX][2];
	unsigned int i;

	for (i = 0; i < LMTRACK_CHANNELS_MAX; i++) {
		ASSERT_EQ(0, tcp_pair(pairs[i], 0));
		ASSERT_EQ(i, add_channel(self->stream, pairs[i][0]));
	}
	EXPECT_EQ(-ENOSPC, add_channel(self->stream, self->pair[0]));
}

STREAM_TEST(width_errors)
{
	struct lmtrack_stream_width args = { .size = sizeof(args), .channels = 1, .reserved = 1 };

	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_WIDTH, &args));
	args.reserved = 0;
	args.flags = 1;
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_WIDTH, &args));
	EXPECT_EQ(-EINVAL, stream_width(self->stream, 0));
	EXPECT_EQ(0, stream_width(self->stream, 1));
	EXPECT_EQ(0, stream_width(self->stream, ~0U));
}

/* ---- Rounds that cannot be ---- */

/*
 * The wire is busy no longer than the round lasts, and for as long as any channel sends; a channel
 * scans or sends for no longer than the round lasts.
 */
static void check_times(struct __test_metadata *_metadata,
			const struct lmtrack_stream_wait *result, unsigned int channels)
{
	EXPECT_LT(0, result->harvest_ns);
	EXPECT_LT(0, result->send_ns);
	EXPECT_LE(result->wire_ns, result->duration_ns);
	EXPECT_GE(result->wire_ns, result->send_ns / channels);
	EXPECT_LE(result->harvest_ns + result->send_ns, channels * result->duration_ns);
}

/* A caller from before the times were added gets what it knows, and nothing behind it. */
STREAM_TEST(wait_of_an_older_caller)
{
	const size_t least = offsetof(struct lmtrack_stream_wait, held_pages) + sizeof(__u64);
	struct lmtrack_stream_wait args;
	size_t size;

	memset(self->mem, 0x5a, 3 * PAGE);
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(0, stream_wait(self->stream, 60000, NULL));
	for (size = least; size <= sizeof(args); size += sizeof(__u64)) {
		memset(&args, 0xee, sizeof(args));
		memset(&args, 0, size);
		args.size = size;
		EXPECT_EQ(0, lmt_ioctl(self->stream, LMTRACK_STREAM_WAIT, &args));
		EXPECT_EQ(size, args.size);
		EXPECT_EQ(3, args.pages);
		EXPECT_EQ(0, args.held_pages);
		EXPECT_EQ(size == sizeof(args), args.lost == 0);
		EXPECT_EQ(size >= offsetof(struct lmtrack_stream_wait, lost),
			  args.wire_ns != 0xeeeeeeeeeeeeeeeeULL);
		EXPECT_EQ(size == least, args.harvest_ns == 0xeeeeeeeeeeeeeeeeULL);
	}
	args.size = least - 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_WAIT, &args));
}

STREAM_TEST(send_errors)
{
	int other = lmt_region(PAGE), again = lmt_reopen(self->fd);
	struct lmtrack_stream_wait result;
	unsigned int bit;

	ASSERT_LE(0, other);
	ASSERT_LE(0, again);
	EXPECT_EQ(-EINVAL, stream_wait(self->stream, 0, NULL));
	EXPECT_EQ(0, stream_events(self->stream, 0));
	/* Neither channel nor region; no channel; not tracked. */
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, stream_add_region(self->stream, other, 1));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, ALL));
	/* The attempt has not taken hold of the one that is tracked. */
	EXPECT_EQ(0, lmt_stop(self->fd));
	ASSERT_EQ(0, lmt_start(other, 0, NULL));
	/* Tracked, but by another open file. */
	ASSERT_EQ(0, lmt_start(again, 0, NULL));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(0, lmt_stop(again));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));

	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, 2));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, ~0U));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 0, ALL));
	for (bit = 1; bit < 32; bit++)
		EXPECT_EQ(-EOPNOTSUPP, stream_send_flags(self->stream, 1, ALL, 1U << bit));
	EXPECT_EQ(-EINVAL, stream_wait(self->stream, 0, NULL));

	ASSERT_EQ(0, stream_send(self->stream, 5, ALL));
	ASSERT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(5, result.round);
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(-1, result.channel);
	EXPECT_EQ(sizeof(result), result.size);
	check_times(_metadata, &result, 1);
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 5, DIRTY));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 4, DIRTY));
	EXPECT_EQ(-EINVAL, stream_wait(self->stream, -2, NULL));
	EXPECT_EQ(-EINVAL, stream_wait(self->stream, INT_MIN, NULL));
	/* The same answer as often as it is asked for. */
	EXPECT_EQ(0, stream_wait(self->stream, -1, &result));
	EXPECT_EQ(5, result.round);
	EXPECT_EQ(POLLIN, stream_events(self->stream, 0));

	EXPECT_EQ(-EBUSY, add_channel(self->stream, self->pair[1]));
	EXPECT_EQ(-EBUSY, stream_add_region(self->stream, lmt_region(PAGE), 7));
	/* Between rounds tracking may stop; then there is nothing to send. */
	EXPECT_EQ(0, lmt_stop(other));
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 6, DIRTY));
	EXPECT_EQ(0, lmt_start(other, 0, NULL));
	EXPECT_EQ(0, stream_send(self->stream, ~0U, DIRTY));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(~0U, result.round);
	EXPECT_EQ(-EINVAL, stream_send(self->stream, 1, DIRTY));
}

STREAM_TEST(channel_stats_errors)
{
	struct lmtrack_channel_stats stats = { .size = sizeof(stats) };

	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	EXPECT_EQ(0, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
	EXPECT_EQ(0, stats.frames);
	stats.channel = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
	stats.channel = ~0U;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
	stats.channel = 0;
	stats.reserved = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
}

/* ---- What arrives ---- */

FIXTURE(rounds) {
	struct receiver rx;
	int stream;
	int fd[REGIONS];
	unsigned char *mem[REGIONS];
	size_t pages[REGIONS];
	unsigned char *state[REGIONS];
};

/* What a page has been through: such as only ever was a hole must never be sent as data. */
enum { UNTOUCHED, WRITTEN, HOLE_PUNCHED };

FIXTURE_VARIANT(rounds) {
	unsigned int channels;
	unsigned int regions;
	uint32_t flags;
	uint64_t rate;
};

FIXTURE_VARIANT_ADD(rounds, one_channel) { .channels = 1, .regions = 1 };
FIXTURE_VARIANT_ADD(rounds, two_channels_two_regions) { .channels = 2, .regions = 2 };
FIXTURE_VARIANT_ADD(rounds, all_channels) { .channels = LMTRACK_CHANNELS_MAX, .regions = 2 };
FIXTURE_VARIANT_ADD(rounds, no_zero_detection) {
	.channels = 3, .regions = 1, .flags = LMTRACK_STREAM_NO_ZERO_DETECT,
};
/* Frames of 97 pages. */
FIXTURE_VARIANT_ADD(rounds, capped) { .channels = 2, .regions = 2, .rate = 80000000 };

FIXTURE_SETUP(rounds)
{
	unsigned int i;

	ASSERT_TRUE(receiver_init(&self->rx, variant->channels));
	self->stream = stream_open(STREAM_ID, variant->flags);
	ASSERT_LE(0, self->stream);
	for (i = 0; i < variant->regions; i++) {
		/* The last chunk is not a whole one. */
		self->pages[i] = (i ? 3 : 9) * CHUNK_PAGES + 77;
		self->fd[i] = lmt_region(self->pages[i] * PAGE);
		ASSERT_LE(0, self->fd[i]);
		self->mem[i] = lmt_map(self->fd[i], self->pages[i] * PAGE);
		ASSERT_NE(MAP_FAILED, self->mem[i]);
		self->state[i] = calloc(self->pages[i], 1);
		ASSERT_NE(NULL, self->state[i]);
		ASSERT_TRUE(shadow_init(&self->rx.shadow[i], self->pages[i]));
		ASSERT_EQ(0, lmt_start(self->fd[i], 0, NULL));
		ASSERT_EQ(0, stream_add_region(self->stream, self->fd[i], i));
	}
	for (i = 0; i < variant->channels; i++) {
		int pair[2];

		ASSERT_EQ(0, tcp_pair(pair, 0));
		ASSERT_EQ(i, add_channel(self->stream, pair[0]));
		/* The stream keeps the connection, whoever closes his descriptor of it. */
		close(pair[0]);
		ASSERT_TRUE(receiver_start(&self->rx, pair[1]));
	}
	if (variant->rate)
		ASSERT_EQ(0, stream_rate(self->stream, variant->rate));
}

FIXTURE_TEARDOWN(rounds)
{
	if (self->stream >= 0)
		close(self->stream);
}

#define ROUNDS_TEST(name) TEST_F_TIMEOUT(rounds, name, TEST_SECONDS)

static void fill(unsigned char *mem, unsigned char *state, size_t page, unsigned char value)
{
	memset(mem + page * PAGE, value, PAGE);
	state[page] = WRITTEN;
}

/* A hole that is punched once more may travel as zero. */
static int punch_pages(int fd, unsigned char *state, size_t first, size_t pages)
{
	size_t page;

	for (page = first; page < first + pages; page++)
		if (state[page] == UNTOUCHED)
			state[page] = HOLE_PUNCHED;
	return lmt_punch(fd, first * PAGE, pages * PAGE);
}

/* Pages that never existed have not come; all others are equal to what is here. */
static void compare(struct __test_metadata *_metadata, const unsigned char *mem,
		    const struct shadow *shadow, const unsigned char *state)
{
	static const unsigned char zero[PAGE];
	size_t page, different = 0, invented = 0, first = 0;

	for (page = 0; page < shadow->pages; page++) {
		const unsigned char *want = state[page] == WRITTEN ? mem + page * PAGE : zero;

		if (memcmp(want, shadow->mem + page * PAGE, PAGE)) {
			first = different ? first : page;
			different++;
		}
		invented += (state[page] == UNTOUCHED && shadow->got[page] != GOT_NOTHING) ||
			    (state[page] == HOLE_PUNCHED && shadow->got[page] == GOT_DATA);
	}
	EXPECT_EQ(0, different) {
		TH_LOG("%zu pages differ, the first is %zu", different, first);
	}
	EXPECT_EQ(0, invented);
}

/* Send a round, wait at both ends, and check the sums the stream gives. */
static struct lmtrack_stream_wait round_trip_flags(struct __test_metadata *_metadata, int stream,
						   struct receiver *rx, uint32_t round,
						   uint32_t what, uint32_t flags)
{
	uint64_t data = RX_SUM(rx, data_pages), zero = RX_SUM(rx, zero_pages);
	uint64_t bytes = RX_SUM(rx, bytes);
	struct lmtrack_stream_wait result = { };
	unsigned int i;

	ASSERT_EQ(0, stream_send_flags(stream, round, what, flags));
	ASSERT_EQ(0, stream_wait(stream, 60000, &result));
	EXPECT_EQ(POLLIN, stream_events(stream, 0));
	EXPECT_EQ(round, result.round);
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(-1, result.channel);
	EXPECT_TRUE(receiver_wait(rx, round)) {
		for (i = 0; i < rx->count; i++)
			TH_LOG("%s", rx->channels[i].error);
	}
	EXPECT_EQ(result.data_pages, RX_SUM(rx, data_pages) - data);
	EXPECT_EQ(result.zero_pages, RX_SUM(rx, zero_pages) - zero);
	EXPECT_EQ(result.pages, result.data_pages + result.zero_pages);
	EXPECT_EQ(result.bytes, RX_SUM(rx, bytes) - bytes);
	EXPECT_LT(0, result.duration_ns);
	check_times(_metadata, &result, rx->count);
	return result;
}

static struct lmtrack_stream_wait round_trip(struct __test_metadata *_metadata, int stream,
					     struct receiver *rx, uint32_t round, uint32_t what)
{
	return round_trip_flags(_metadata, stream, rx, round, what, 0);
}

/*
 * Rounds until nothing is left. It may take some: a page that the network still holds when it
 * is harvested counts as held for I/O, and is sent once more.
 */
static void drain(struct __test_metadata *_metadata, int stream, struct receiver *rx,
		  uint32_t *round)
{
	unsigned int rounds = 0;

	while (round_trip(_metadata, stream, rx, ++*round, DIRTY).pages && ++rounds < 100) {
		pause_ms(20);
		sockets_run();
	}
	printf("# %u rounds until nothing was left\n", rounds);
	EXPECT_GT(100, rounds);
}

struct writer {
	pthread_t thread;
	unsigned char *mem;
	size_t pages;
	const unsigned char *state;
	volatile bool *stop;
	unsigned int seed;
};

/* Writes only to pages that exist, or did: what was never touched stays so. */
static void *write_pages(void *arg)
{
	struct writer *w = arg;
	size_t page;

	while (!*w->stop) {
		page = rand_r(&w->seed) % w->pages;
		if (w->state[page] != WRITTEN)
			continue;
		memset(w->mem + page * PAGE + w->seed % 2048, w->seed >> 8, 1500);
	}
	return NULL;
}

/*
 * To find zeroes takes much looking and little sending. Of several channels, threads of the kernel,
 * each waits for a processor while another has it, and most of all where it would send: what their
 * times add up to is no more than the channels were there for.
 */
ROUNDS_TEST(harvest_dominates)
{
	struct lmtrack_stream_wait result;
	bool dominates = false;
	unsigned int i;

	if (variant->flags & LMTRACK_STREAM_NO_ZERO_DETECT)
		SKIP(return, "nobody looks for zeroes");
	for (i = 0; i < variant->regions; i++)
		touch(self->mem[i], 0, self->pages[i], 0);
	/* Who is held up while it sends tries again. */
	for (i = 1; i <= 5 && !dominates; i++) {
		result = round_trip(_metadata, self->stream, &self->rx, i, ALL);
		EXPECT_EQ(result.pages, result.zero_pages);
		printf("# %.1f ms, harvest %.1f ms, send %.1f ms, wire %.1f ms\n",
		       result.duration_ns / 1e6, result.harvest_ns / 1e6, result.send_ns / 1e6,
		       result.wire_ns / 1e6);
		EXPECT_NE(0, result.harvest_ns);
		EXPECT_NE(0, result.send_ns);
		EXPECT_LE(result.wire_ns, result.duration_ns);
		EXPECT_LE(result.harvest_ns + result.send_ns,
			  result.duration_ns * variant->channels);
		dominates = variant->channels > 1 ||
			    (result.harvest_ns > result.send_ns &&
			     result.wire_ns < result.duration_ns / 2);
	}
	EXPECT_TRUE(dominates);
}

ROUNDS_TEST(equal_after_racing_writers)
{
	struct writer writers[2 * REGIONS];
	unsigned int i, n = 0, seed = 1;
	volatile bool stop = false;
	uint64_t resident[REGIONS];
	const char *error;
	uint32_t round;
	size_t page;

	for (i = 0; i < variant->regions; i++) {
		for (page = 0; page < self->pages[i]; page++) {
			/* Chunk 2 is a hole, every eighth page elsewhere is one, or is zero. */
			if (page / CHUNK_PAGES != 2 && page % 8)
				fill(self->mem[i], self->state[i], page,
				     page % 8 == 1 ? 0 : rand_r(&seed) | 1);
		}
		resident[i] = lmt_stats(self->fd[i]).resident_pages;
	}
	for (i = 0; i < 2 * variant->regions; i++) {
		writers[i] = (struct writer){
			.mem = self->mem[i / 2], .pages = self->pages[i / 2],
			.state = self->state[i / 2], .stop = &stop, .seed = i,
		};
		ASSERT_EQ(0, pthread_create(&writers[n++].thread, NULL, write_pages,
					    &writers[i]));
	}
	round_trip(_metadata, self->stream, &self->rx, 1, ALL);
	for (round = 2; round < 6; round++) {
		for (i = 0; i < variant->regions; i++)
			EXPECT_EQ(0, punch_pages(self->fd[i], self->state[i],
						 round * 100, 20));
		round_trip(_metadata, self->stream, &self->rx, round, DIRTY);
	}
	stop = true;
	while (n--)
		ASSERT_EQ(0, pthread_join(writers[n].thread, NULL));
	for (i = 0; i < variant->regions; i++)
		EXPECT_EQ(0, punch_pages(self->fd[i], self->state[i], 300, 5));
	round_trip(_metadata, self->stream, &self->rx, round, DIRTY);
	for (i = 0; i < variant->regions; i++) {
		/* Sending allocates nothing: fewer pages by what was punched, at most. */
		EXPECT_GE(resident[i], lmt_stats(self->fd[i]).resident_pages);
		compare(_metadata, self->mem[i], &self->rx.shadow[i], self->state[i]);
	}
	/* ALL sends it all once more. */
	drain(_metadata, self->stream, &self->rx, &round);
	for (i = 0; i < variant->regions; i++)
		memset(self->rx.shadow[i].mem, 0xee, self->pages[i] * PAGE);
	round_trip(_metadata, self->stream, &self->rx, ++round, ALL);
	for (i = 0; i < variant->regions; i++)
		for (page = 0; page < self->pages[i]; page++)
			if (E(lseek(self->fd[i], page * PAGE, SEEK_DATA)) ==
			    (long)(page * PAGE) &&
			    memcmp(self->rx.shadow[i].mem + page * PAGE,
				   self->mem[i] + page * PAGE, PAGE))
				break;
	EXPECT_EQ(self->pages[variant->regions - 1], page);

	close(self->stream);
	self->stream = -1;
	error = receiver_end(&self->rx);
	EXPECT_EQ(NULL, error) {
		TH_LOG("%s", error);
	}
}

/* ---- Pages held back ---- */

/* Held pages stay behind, and come with their newest contents when they are asked for. */
ROUNDS_TEST(held_pages_stay_behind)
{
	uint64_t hold[CHUNK_PAGES / 64] = { [1] = 0xff, [4] = 1 };
	unsigned char *got = self->rx.shadow[0].got;
	struct lmtrack_stream_wait result;
	uint32_t round = 1;
	size_t i;

	for (i = 0; i < 2 * CHUNK_PAGES; i++)
		fill(self->mem[0], self->state[0], i, 1);
	result = round_trip(_metadata, self->stream, &self->rx, round, ALL);
	EXPECT_EQ(2 * CHUNK_PAGES, result.pages);
	drain(_metadata, self->stream, &self->rx, &round);
	/* 64 to 71 and 256 of the second chunk. */
	ASSERT_EQ(0, hold_set(self->fd[0], 0, CHUNK_PAGES, CHUNK_PAGES, hold, NULL));

	memset(got, GOT_NOTHING, self->pages[0]);
	for (i = 0; i < 2 * CHUNK_PAGES; i++)
		fill(self->mem[0], self->state[0], i, 2);
	result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
	EXPECT_EQ(2 * CHUNK_PAGES - 9, result.pages);
	EXPECT_EQ(9, result.held_pages);
	EXPECT_EQ(GOT_DATA, got[CHUNK_PAGES + 63]);
	EXPECT_EQ(GOT_NOTHING, got[CHUNK_PAGES + 64]);
	EXPECT_EQ(GOT_NOTHING, got[CHUNK_PAGES + 71]);
	EXPECT_EQ(GOT_DATA, got[CHUNK_PAGES + 72]);
	EXPECT_EQ(GOT_NOTHING, got[CHUNK_PAGES + 256]);
	EXPECT_EQ(1, self->rx.shadow[0].mem[(CHUNK_PAGES + 64) * PAGE]);

	/* Nothing but held pages: a round is over at once, again and again. */
	drain(_metadata, self->stream, &self->rx, &round);
	for (i = 0; i < 3; i++) {
		result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
		EXPECT_EQ(0, result.pages);
		EXPECT_EQ(9, result.held_pages);
	}

	/* What is let go of is in the next round. */
	hold[4] = 0;
	ASSERT_EQ(0, hold_set(self->fd[0], 0, CHUNK_PAGES, CHUNK_PAGES, hold, NULL));
	fill(self->mem[0], self->state[0], CHUNK_PAGES + 256, 3);
	result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
	EXPECT_EQ(1, result.pages);
	EXPECT_EQ(8, result.held_pages);
	EXPECT_EQ(3, self->rx.shadow[0].mem[(CHUNK_PAGES + 256) * PAGE]);

	/* The newest contents, and held pages that are clean are none. */
	fill(self->mem[0], self->state[0], CHUNK_PAGES + 64, 4);
	result = round_trip_flags(_metadata, self->stream, &self->rx, ++round, DIRTY,
				  LMTRACK_SEND_HELD);
	EXPECT_LE(8, result.pages);
	EXPECT_EQ(0, result.held_pages);
	EXPECT_EQ(4, self->rx.shadow[0].mem[(CHUNK_PAGES + 64) * PAGE]);
	compare(_metadata, self->mem[0], &self->rx.shadow[0], self->state[0]);

	/* They are still held. */
	fill(self->mem[0], self->state[0], CHUNK_PAGES + 65, 5);
	while (result.pages)
		result = round_trip_flags(_metadata, self->stream, &self->rx, ++round, DIRTY,
					  LMTRACK_SEND_HELD);
	fill(self->mem[0], self->state[0], CHUNK_PAGES + 66, 6);
	result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
	EXPECT_EQ(0, result.pages);
	EXPECT_EQ(1, result.held_pages);

	/* All is all. */
	result = round_trip(_metadata, self->stream, &self->rx, ++round, ALL);
	EXPECT_EQ(2 * CHUNK_PAGES, result.pages);
	EXPECT_EQ(0, result.held_pages);
	compare(_metadata, self->mem[0], &self->rx.shadow[0], self->state[0]);
}

/* A held page is writable at no cost, also between pages that are sent; a hole can be held. */
ROUNDS_TEST(held_pages_cost_nothing)
{
	uint64_t hold[CHUNK_PAGES / 64], faults;
	struct lmtrack_stream_wait result;
	uint32_t round = 1;
	size_t i, pass;

	memset(hold, 0xaa, sizeof(hold));
	for (i = 0; i < CHUNK_PAGES; i++)
		fill(self->mem[0], self->state[0], i, 1);
	round_trip(_metadata, self->stream, &self->rx, round, ALL);
	drain(_metadata, self->stream, &self->rx, &round);
	ASSERT_EQ(0, hold_set(self->fd[0], 0, 0, CHUNK_PAGES, hold, NULL));
	for (i = 1; i < CHUNK_PAGES; i += 2)
		fill(self->mem[0], self->state[0], i, 2);
	faults = lmt_stats(self->fd[0]).write_faults;
	for (pass = 3; pass < 6; pass++) {
		for (i = 0; i < CHUNK_PAGES; i++)
			fill(self->mem[0], self->state[0], i, pass);
		result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
		EXPECT_LE(CHUNK_PAGES / 2, result.pages);
		EXPECT_EQ(CHUNK_PAGES / 2, result.held_pages);
		drain(_metadata, self->stream, &self->rx, &round);
	}
	/* Those that were sent cost a fault each time, the others none. */
	EXPECT_EQ(faults + 3 * CHUNK_PAGES / 2, lmt_stats(self->fd[0]).write_faults);

	EXPECT_EQ(0, punch_pages(self->fd[0], self->state[0], 0, 8));
	memset(self->state[0], HOLE_PUNCHED, 8);
	result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
	EXPECT_EQ(4, result.pages);
	EXPECT_EQ(4, result.zero_pages);
	EXPECT_EQ(CHUNK_PAGES / 2, result.held_pages);
	result = round_trip_flags(_metadata, self->stream, &self->rx, ++round, DIRTY,
				  LMTRACK_SEND_HELD);
	EXPECT_EQ(CHUNK_PAGES / 2, result.pages);
	EXPECT_EQ(4, result.zero_pages);
	compare(_metadata, self->mem[0], &self->rx.shadow[0], self->state[0]);
}

struct holder {
	pthread_t thread;
	int fd;
	size_t pages;
	volatile bool *stop;
	unsigned int seed;
};

static void *hold_pages(void *arg)
{
	struct holder *h = arg;
	uint64_t *hold = calloc((h->pages + 63) / 64, 8);
	size_t first, pages, i;

	while (!*h->stop) {
		first = rand_r(&h->seed) % h->pages / 64 * 64;
		pages = 1 + rand_r(&h->seed) % (h->pages - first);
		for (i = 0; i < (pages + 63) / 64; i++)
			hold[i] = rand_r(&h->seed) % 3 ? rand_r(&h->seed) * 0x100000001ULL : 0;
		hold_set(h->fd, rand_r(&h->seed) % 8 ? 0 : LMTRACK_HOLD_CLEAR_ALL, first, pages,
			 hold, NULL);
	}
	free(hold);
	return NULL;
}

ROUNDS_TEST(equal_after_racing_holders)
{
	struct writer writers[2 * REGIONS];
	struct holder holders[REGIONS];
	struct lmtrack_stream_wait result;
	unsigned int i, n, seed = 1;
	volatile bool stop = false;
	uint32_t round;
	size_t page;

	for (i = 0; i < variant->regions; i++)
		for (page = 0; page < self->pages[i]; page++)
			if (page % 16)
				fill(self->mem[i], self->state[i], page, rand_r(&seed) | 1);
	for (i = 0; i < 2 * variant->regions; i++) {
		writers[i] = (struct writer){
			.mem = self->mem[i / 2], .pages = self->pages[i / 2],
			.state = self->state[i / 2], .stop = &stop, .seed = i,
		};
		ASSERT_EQ(0, pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]));
	}
	for (i = 0; i < variant->regions; i++) {
		holders[i] = (struct holder){
			.fd = self->fd[i], .pages = self->pages[i], .stop = &stop, .seed = i,
		};
		ASSERT_EQ(0, pthread_create(&holders[i].thread, NULL, hold_pages, &holders[i]));
	}
	round_trip(_metadata, self->stream, &self->rx, 1, ALL);
	for (round = 2; round < 10; round++)
		round_trip(_metadata, self->stream, &self->rx, round, DIRTY);
	stop = true;
	for (n = 0; n < 2 * variant->regions; n++)
		ASSERT_EQ(0, pthread_join(writers[n].thread, NULL));
	for (n = 0; n < variant->regions; n++)
		ASSERT_EQ(0, pthread_join(holders[n].thread, NULL));
	result = round_trip_flags(_metadata, self->stream, &self->rx, round, DIRTY,
				  LMTRACK_SEND_HELD);
	EXPECT_EQ(0, result.held_pages);
	for (i = 0; i < variant->regions; i++)
		compare(_metadata, self->mem[i], &self->rx.shadow[i], self->state[i]);
}

/* ---- What else arrives ---- */

/* Which pages travel as zero. */
ROUNDS_TEST(zero_pages)
{
	bool detect = !(variant->flags & LMTRACK_STREAM_NO_ZERO_DETECT);
	unsigned char *got = self->rx.shadow[0].got;
	struct lmtrack_stream_wait result;
	uint32_t round = 2;
	size_t i;

	for (i = 0; i < 100; i++)
		fill(self->mem[0], self->state[0], i, i % 2);
	for (i = 1000; i < 1064; i++)
		fill(self->mem[0], self->state[0], i, 0);
	/* Not zero, only nearly. */
	self->mem[0][51 * PAGE - 1] = 1;
	result = round_trip(_metadata, self->stream, &self->rx, 1, ALL);
	EXPECT_EQ(164, result.pages);
	EXPECT_EQ(detect ? 113 : 0, result.zero_pages);
	EXPECT_EQ(detect ? GOT_ZERO : GOT_DATA, got[0]);
	EXPECT_EQ(GOT_DATA, got[1]);
	EXPECT_EQ(GOT_DATA, got[50]);
	EXPECT_EQ(detect ? GOT_ZERO : GOT_DATA, got[1063]);
	EXPECT_EQ(GOT_NOTHING, got[500]);
	/* The long run is in two chunks. */
	EXPECT_EQ(detect ? 49 + 2 : 0, RX_SUM(&self->rx, zero_extents));

	/* Data that becomes zero, zero that becomes data, and what is punched out. */
	fill(self->mem[0], self->state[0], 1, 0);
	fill(self->mem[0], self->state[0], 2, 9);
	EXPECT_EQ(0, lmt_punch(self->fd[0], 3 * PAGE, 2 * PAGE));
	result = round_trip(_metadata, self->stream, &self->rx, 2, DIRTY);
	EXPECT_EQ(4, result.pages);
	EXPECT_EQ(detect ? 3 : 2, result.zero_pages);
	EXPECT_EQ(detect ? GOT_ZERO : GOT_DATA, got[1]);
	EXPECT_EQ(GOT_DATA, got[2]);
	EXPECT_EQ(GOT_ZERO, got[3]);
	EXPECT_EQ(GOT_ZERO, got[4]);
	compare(_metadata, self->mem[0], &self->rx.shadow[0], self->state[0]);

	/* Holes that are told of are no news any more, in a full round. */
	drain(_metadata, self->stream, &self->rx, &round);
	EXPECT_EQ(0, lmt_punch(self->fd[0], 6 * PAGE, PAGE));
	result = round_trip(_metadata, self->stream, &self->rx, ++round, DIRTY);
	EXPECT_EQ(1, result.pages);
	EXPECT_EQ(1, result.zero_pages);
	memset(got, GOT_NOTHING, self->pages[0]);
	/* Comparing has looked at the holes of before, and filled them. */
	result = round_trip(_metadata, self->stream, &self->rx, ++round, ALL);
	EXPECT_EQ(lmt_stats(self->fd[0]).resident_pages, result.pages);
	EXPECT_EQ(GOT_NOTHING, got[6]);
}

/* Everything a channel says of itself, against what its peer has seen. */
ROUNDS_TEST(statistics)
{
	uint64_t data = 0, zero = 0, header = 0;
	struct lmtrack_channel_stats stats;
	const char *error;
	unsigned int i;

	for (i = 0; i < self->pages[0]; i++)
		if (i % 3)
			fill(self->mem[0], self->state[0], i, i % 3 - 1);
	round_trip(_metadata, self->stream, &self->rx, 1, ALL);
	fill(self->mem[0], self->state[0], 7, 3);
	round_trip(_metadata, self->stream, &self->rx, 2, DIRTY);
	for (i = 0; i < variant->channels; i++) {
		const struct rx_channel *ch = &self->rx.channels[i];

		stats = channel_stats(self->stream, i);
		EXPECT_EQ(sizeof(stats), stats.size);
		EXPECT_EQ(i, stats.channel);
		EXPECT_EQ(ch->seq, stats.frames);
		EXPECT_EQ(ch->data_pages, stats.data_pages);
		EXPECT_EQ(ch->zero_pages, stats.zero_pages);
		EXPECT_EQ(ch->zero_extents, stats.zero_extents);
		EXPECT_EQ(ch->head_bytes, stats.header_bytes);
		EXPECT_EQ(ch->data_pages * PAGE, stats.zerocopy_bytes + stats.copied_bytes);
		EXPECT_EQ(ch->bytes, stats.header_bytes + ch->data_pages * PAGE);
		/* The loopback device has scatter-gather. */
		EXPECT_LE(stats.data_pages * PAGE * 99, stats.zerocopy_bytes * 100);
		EXPECT_LT(0, stats.blocked_ns);
		data += stats.data_pages;
		zero += stats.zero_pages;
		header += stats.header_bytes;
	}
	EXPECT_EQ(data + zero, lmt_stats(self->fd[0]).harvested_pages);
	EXPECT_LE(variant->channels * 2 * sizeof(struct lmtrack_wire_frame), header);
	close(self->stream);
	self->stream = -1;
	error = receiver_end(&self->rx);
	EXPECT_EQ(NULL, error) {
		TH_LOG("%s", error);
	}
}

/* ---- A peer that does not read ---- */

FIXTURE(blocked) {
	int fd;
	int tracker;
	unsigned char *mem;
	int stream;
	int pair[2][2];
};

/* Two channels, each of which takes a little and then no more. */
FIXTURE_SETUP(blocked)
{
	int i;

	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	memset(self->mem, 0x5a, BYTES);
	self->tracker = lmt_reopen(self->fd);
	ASSERT_LE(0, self->tracker);
	self->stream = stream_open(STREAM_ID, 0);
	ASSERT_LE(0, self->stream);
	ASSERT_EQ(0, lmt_start(self->tracker, 0, NULL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->tracker, 0));
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, tcp_pair(self->pair[i], 65536));
		ASSERT_EQ(i, add_channel(self->stream, self->pair[i][0]));
	}
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 300, NULL));
}

FIXTURE_TEARDOWN(blocked)
{
	if (self->stream >= 0)
		close(self->stream);
	close(self->tracker);
	close(self->fd);
}

#define BLOCKED_TEST(name) TEST_F_TIMEOUT(blocked, name, TEST_SECONDS)

static void on_alarm(int sig)
{
	(void)sig;
}

static void alarm_in(unsigned int ms, int flags)
{
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = flags };
	struct itimerval timer = { .it_value = { ms / 1000, ms % 1000 * 1000 } };

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
}

BLOCKED_TEST(requests_meanwhile)
{
	EXPECT_EQ(-EBUSY, stream_send(self->stream, 2, DIRTY));
	EXPECT_EQ(-EBUSY, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(-EBUSY, lmt_stop(self->tracker));
	EXPECT_EQ(-EBUSY, stream_add_region(self->stream, lmt_region(PAGE), 1));
	EXPECT_EQ(-EBUSY, add_channel(self->stream, self->pair[0][1]));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 0, NULL));
	EXPECT_EQ(0, stream_events(self->stream, 0));
	EXPECT_EQ(0, stream_events(self->stream, 50));
	EXPECT_LT(0, channel_stats(self->stream, 0).frames + 1);
	/* The region is not: it can be written, read, harvested, asked about, punched. */
	memset(self->mem, 0xa5, BYTES);
	EXPECT_EQ(0, lmt_punch(self->fd, 0, PAGE));
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	EXPECT_EQ(PAGES - 1, lmt_stats(self->fd).resident_pages);
}

static void *read_to_the_end(void *arg)
{
	char buf[16384];

	while (recv(*(int *)arg, buf, sizeof(buf), 0) > 0)
		;
	return NULL;
}

/* A slow wire: sending takes nearly all of the round, and harvests are hidden behind it. */
BLOCKED_TEST(sending_dominates)
{
	struct lmtrack_stream_wait result;
	pthread_t reader[2];
	int i;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, pthread_create(&reader[i], NULL, read_to_the_end,
					    &self->pair[i][1]));
	ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(PAGES, result.data_pages);
	printf("# %.1f ms, harvest %.1f ms, send %.1f ms, wire %.1f ms\n",
	       result.duration_ns / 1e6, result.harvest_ns / 1e6, result.send_ns / 1e6,
	       result.wire_ns / 1e6);
	check_times(_metadata, &result, 2);
	EXPECT_GT(result.send_ns, 200000000);
	EXPECT_GT(result.wire_ns, 200000000);
	EXPECT_GT(result.wire_ns, result.duration_ns / 2);
	EXPECT_EQ(0, stream_cancel(self->stream));
	for (i = 0; i < 2; i++)
		pthread_join(reader[i], NULL);
}

BLOCKED_TEST(wait_is_interrupted)
{
	double begin = lmt_seconds();

	alarm_in(200, 0);
	EXPECT_EQ(-EINTR, stream_wait(self->stream, -1, NULL));
	alarm_in(200, SA_RESTART);
	EXPECT_EQ(-EINTR, stream_wait(self->stream, 60000, NULL));
	EXPECT_GT(30, lmt_seconds() - begin);
	/* That has changed nothing. */
	EXPECT_EQ(-EBUSY, stream_send(self->stream, 2, DIRTY));
}

BLOCKED_TEST(cancel)
{
	struct lmtrack_stream_wait result;
	double begin = lmt_seconds();
	uint64_t bitmap[PAGES / 64];

	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_GT(5, lmt_seconds() - begin);
	EXPECT_EQ(1, result.round);
	EXPECT_EQ(ECANCELED, result.error);
	EXPECT_EQ(-1, result.channel);
	EXPECT_EQ(POLLIN | POLLERR, stream_events(self->stream, 0));
	EXPECT_EQ(-EPIPE, stream_send(self->stream, 2, ALL));
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_wait(self->stream, 0, &result));
	EXPECT_EQ(ECANCELED, result.error);
	/* The region is free again, though tracked. */
	EXPECT_LE(0, lmt_dirty(self->tracker, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap));
	memset(self->mem, 0xa5, BYTES);
	EXPECT_EQ(PAGES, lmt_dirty(self->tracker, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap));
	EXPECT_EQ(0, lmt_stop(self->tracker));
}

static void *cancel_later(void *arg)
{
	pause_ms(300);
	stream_cancel(*(int *)arg);
	return NULL;
}

/* Who waits in WAIT, or in poll(), is told. */
BLOCKED_TEST(cancel_wakes)
{
	struct lmtrack_stream_wait result;
	double begin = lmt_seconds();
	pthread_t thread;

	ASSERT_EQ(0, pthread_create(&thread, NULL, cancel_later, &self->stream));
	EXPECT_NE(0, stream_events(self->stream, 30000));
	EXPECT_EQ(0, stream_wait(self->stream, -1, &result));
	EXPECT_EQ(ECANCELED, result.error);
	EXPECT_GT(10, lmt_seconds() - begin);
	ASSERT_EQ(0, pthread_join(thread, NULL));
}

BLOCKED_TEST(close_stream)
{
	double begin = lmt_seconds();

	close(self->stream);
	self->stream = -1;
	EXPECT_GT(5, lmt_seconds() - begin);
	EXPECT_EQ(0, lmt_stop(self->tracker));
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, lmt_stop(self->fd));
}

/* The region's file lives, and tracks, for as long as the stream has it. */
BLOCKED_TEST(close_region_first)
{
	close(self->tracker);
	self->tracker = -1;
	pause_ms(100);
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, NULL));
	EXPECT_EQ(LMTRACK_TRACKED, region_info(self->fd).state);
	close(self->stream);
	self->stream = -1;
	EXPECT_TRUE(EVENTUALLY(2, region_info(self->fd).state == LMTRACK_IDLE));
}

static int read_some(int fd, size_t bytes)
{
	char buf[65536];
	ssize_t n;

	while (bytes) {
		n = recv(fd, buf, bytes < sizeof(buf) ? bytes : sizeof(buf), 0);
		if (n <= 0)
			return -1;
		bytes -= n;
	}
	return 0;
}

/* One channel is lost: that is heard at once, the round goes on over the other. */
BLOCKED_TEST(peer_closes)
{
	struct lmtrack_stream_drop_channel drop;
	struct lmtrack_stream_wait result;
	uint64_t bitmap[PAGES / 64];
	pthread_t reader;
	long dirty;

	EXPECT_EQ(0, read_some(self->pair[1][1], 100000));
	close(self->pair[1][1]);
	EXPECT_EQ(POLLPRI, stream_events(self->stream, 10000));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 0, &result));
	EXPECT_EQ(2, result.lost);
	EXPECT_EQ(0, drop_channel(self->stream, 1, &drop));
	EXPECT_TRUE(drop.error == EPIPE || drop.error == ECONNRESET) {
		TH_LOG("error %u", drop.error);
	}
	/* One chunk had been harvested at least. */
	EXPECT_LE(CHUNK_PAGES, drop.pages);
	EXPECT_EQ(0, drop.pages % CHUNK_PAGES);
	EXPECT_EQ(0, stream_events(self->stream, 0));
	EXPECT_EQ(-EALREADY, drop_channel(self->stream, 1, NULL));
	EXPECT_EQ(-EBUSY, replace_channel(self->stream, 1, self->pair[0][1]));

	pthread_create(&reader, NULL, read_to_the_end, &self->pair[0][1]);
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(0, result.lost);
	/* What it had come for, and no more: the other has sent the rest. */
	dirty = lmt_dirty(self->tracker, 0, 0, PAGES, bitmap);
	EXPECT_EQ(drop.pages, dirty);
	EXPECT_EQ(0, stream_send(self->stream, 2, DIRTY));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(dirty, result.pages);
	EXPECT_EQ(0, stream_cancel(self->stream));
	pthread_join(reader, NULL);
	EXPECT_EQ(-EPIPE, drop_channel(self->stream, 0, NULL));
	EXPECT_EQ(0, lmt_stop(self->tracker));
}

/* The owner's socket is his no more, but nobody keeps him from shutting it down. */
BLOCKED_TEST(owner_shuts_down)
{
	struct lmtrack_stream_drop_channel drop;
	struct lmtrack_stream_wait result;
	int i;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(0, shutdown(self->pair[i][0], SHUT_RDWR));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(EPIPE, result.error);
	EXPECT_EQ(0, result.channel);
	EXPECT_EQ(3, result.lost);
	EXPECT_EQ(POLLIN | POLLPRI, stream_events(self->stream, 0));
	/* Not before they were dropped: what they took would be forgotten. */
	EXPECT_EQ(-EPIPE, stream_send(self->stream, 2, DIRTY));
	for (i = 0; i < 2; i++) {
		EXPECT_EQ(0, drop_channel(self->stream, i, &drop));
		EXPECT_EQ(EPIPE, drop.error);
	}
	EXPECT_EQ(-EPIPE, stream_send(self->stream, 2, DIRTY));
	EXPECT_EQ(0, stream_wait(self->stream, 0, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(POLLIN, stream_events(self->stream, 0));
	EXPECT_EQ(0, lmt_stop(self->tracker));
}

/* All of them are lost, one comes back, and has everything to carry. */
BLOCKED_TEST(all_lost_and_one_back)
{
	uint64_t frames, bitmap[PAGES / 64];
	struct lmtrack_stream_wait result;
	pthread_t reader;
	int pair[2], i;

	/* No loss, and dropped all the same: also in the middle of a round. */
	for (i = 0; i < 2; i++)
		EXPECT_EQ(0, drop_channel(self->stream, i, NULL));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	frames = channel_stats(self->stream, 1).frames;
	EXPECT_EQ(PAGES, lmt_dirty(self->tracker, 0, 0, PAGES, bitmap));
	ASSERT_EQ(0, tcp_pair(pair, 0));
	EXPECT_EQ(-EINVAL, replace_channel(self->stream, 2, pair[0]));
	EXPECT_EQ(-EINVAL, replace_channel(self->stream, ~0U, pair[0]));
	EXPECT_EQ(-ENOTSOCK, replace_channel(self->stream, 1, self->fd));
	EXPECT_EQ(0, replace_channel(self->stream, 1, pair[0]));
	EXPECT_EQ(-EEXIST, replace_channel(self->stream, 1, pair[1]));
	EXPECT_EQ(-EEXIST, replace_channel(self->stream, 0, pair[0]));
	pthread_create(&reader, NULL, read_to_the_end, &pair[1]);
	EXPECT_EQ(0, stream_send(self->stream, 2, DIRTY));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(PAGES, result.pages);
	/* Counted on. */
	EXPECT_LE(frames + PAGES / CHUNK_PAGES, channel_stats(self->stream, 1).frames);
	EXPECT_EQ(0, stream_cancel(self->stream));
	pthread_join(reader, NULL);
}

/* Closed with a channel that was dropped, and one that is lost. */
BLOCKED_TEST(closed_with_losses)
{
	EXPECT_EQ(0, drop_channel(self->stream, 0, NULL));
	ASSERT_EQ(0, shutdown(self->pair[1][0], SHUT_RDWR));
	close(self->stream);
	self->stream = -1;
	EXPECT_EQ(0, lmt_stop(self->tracker));
}

STREAM_TEST(drop_channel_errors)
{
	struct lmtrack_stream_drop_channel args = { .size = sizeof(args), .flags = 1 };

	EXPECT_EQ(-EINVAL, drop_channel(self->stream, 0, NULL));
	EXPECT_EQ(-EINVAL, drop_channel(self->stream, ~0U, NULL));
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_DROP_CHANNEL, &args));
	EXPECT_EQ(-ENOTTY, lmt_ioctl(self->fd, LMTRACK_STREAM_DROP_CHANNEL, &args));
	args.size = sizeof(args) - 8;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_DROP_CHANNEL, &args));
	/* Before the first round it is just as well. */
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	args = (struct lmtrack_stream_drop_channel){ .size = sizeof(args) };
	EXPECT_EQ(0, lmt_ioctl(self->stream, LMTRACK_STREAM_DROP_CHANNEL, &args));
	EXPECT_EQ(ECANCELED, args.error);
	EXPECT_EQ(0, args.pages);
}

/* How long a peer may be silent is for the caller to say, not for an option of the socket. */
STREAM_TEST(send_timeout_is_no_failure)
{
	struct timeval timeout = { .tv_usec = 20000 };
	struct lmtrack_stream_wait result;
	struct receiver rx;
	int pair[2];

	ASSERT_TRUE(receiver_init(&rx, 1));
	ASSERT_TRUE(shadow_init(&rx.shadow[0], PAGES));
	memset(self->mem, 0x66, BYTES);
	ASSERT_EQ(0, tcp_pair(pair, 65536));
	ASSERT_EQ(0, setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, pair[0]));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 500, NULL));
	ASSERT_TRUE(receiver_start(&rx, pair[1]));
	EXPECT_EQ(0, stream_wait(self->stream, 60000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_TRUE(receiver_wait(&rx, 1)) {
		TH_LOG("%s", rx.channels[0].error);
	}
	EXPECT_EQ(0, memcmp(self->mem, rx.shadow[0].mem, BYTES));
}

/* Take what comes until the end of the connection. */
static void *swallow_run(void *arg)
{
	char bytes[65536];

	while (recv(*(int *)arg, bytes, sizeof(bytes), 0) > 0)
		;
	return NULL;
}

/* Connect a socket anew, to a listener that does not accept; 0 or a negative errno. */
static int tcp_redirect(int fd, int listener)
{
	struct sockaddr_in in = { .sin_family = AF_UNSPEC };
	socklen_t length = sizeof(in);

	if (connect(fd, (void *)&in, sizeof(in)) ||
	    getsockname(listener, (void *)&in, &length) ||
	    connect(fd, (void *)&in, sizeof(in)))
		return -errno;
	return 0;
}

/*
 * The socket is the owner's, too: he can undo the shutdown that CANCEL made, before the channel
 * has noticed it, and lift the limit of its sends. The pages look like zero till their last
 * byte, so that most of a round is spent outside the socket.
 */
STREAM_TEST(connected_anew_after_cancel)
{
	struct timeval never = { };
	struct lmtrack_stream_wait result;
	unsigned int i, tries, redirected = 0;
	int pair[2], listener, stream, buffer = 4096;
	pthread_t swallow;

	for (i = 1; i <= PAGES; i++)
		self->mem[i * PAGE - 1] = 1;
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (tries = 0; tries < 60; tries++) {
		listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		ASSERT_LE(0, listener);
		setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
		ASSERT_EQ(0, listen(listener, 1));
		ASSERT_EQ(0, tcp_pair(pair, 65536));
		stream = stream_open(STREAM_ID, 0);
		ASSERT_LE(0, stream);
		ASSERT_EQ(0, stream_add_region(stream, self->fd, 0));
		ASSERT_EQ(0, add_channel(stream, pair[0]));
		ASSERT_EQ(0, setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &never, sizeof(never)));
		ASSERT_EQ(0, pthread_create(&swallow, NULL, swallow_run, &pair[1]));
		ASSERT_EQ(0, stream_send(stream, 1, ALL));
		EXPECT_EQ(-ETIMEDOUT, stream_wait(stream, 1 + tries % 8, NULL));

		ASSERT_EQ(0, stream_cancel(stream));
		redirected += !tcp_redirect(pair[0], listener);
		EXPECT_EQ(0, stream_wait(stream, 10000, &result)) {
			TH_LOG("try %u: the channel waits in the new connection", tries);
			tries = 1000;
		}
		/* Resets the new connection, should somebody still wait in it. */
		close(listener);
		EXPECT_EQ(0, stream_wait(stream, 10000, &result));
		EXPECT_EQ(ECANCELED, result.error);
		close(stream);
		close(pair[0]);
		pthread_join(swallow, NULL);
		close(pair[1]);
	}
	printf("# %u of %u connected anew\n", redirected, tries);
	EXPECT_LT(0, redirected);
}

struct looker {
	int stream;
	_Atomic bool stop;
	_Atomic unsigned int looks;
	unsigned int early;
};

/* A round that ended well has sent the end of the round at least. */
static void *looker_run(void *arg)
{
	struct looker *looker = arg;
	struct lmtrack_stream_wait result;

	while (!looker->stop) {
		if (stream_wait(looker->stream, 0, &result))
			continue;
		looker->looks++;
		looker->early += !result.error && result.bytes < sizeof(struct lmtrack_wire_frame);
	}
	return NULL;
}

/* WAIT never gives the figures of a round that is under way, whoever began it meanwhile. */
STREAM_TEST(wait_while_another_begins_rounds)
{
	struct looker looker = { .stream = self->stream };
	pthread_t swallow, thread;
	uint32_t round;

	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	ASSERT_EQ(0, pthread_create(&swallow, NULL, swallow_run, &self->pair[1]));
	ASSERT_EQ(0, pthread_create(&thread, NULL, looker_run, &looker));
	for (round = 1; round <= 1500; round++) {
		unsigned int looks = looker.looks;
		double end = lmt_seconds() + 10;

		ASSERT_EQ(0, stream_send(self->stream, round, DIRTY));
		ASSERT_EQ(0, stream_wait(self->stream, 10000, NULL));
		/* The next round begins while the other looks. */
		while (looker.looks == looks && lmt_seconds() < end)
			;
		ASSERT_NE(looks, looker.looks);
	}
	looker.stop = true;
	pthread_join(thread, NULL);
	EXPECT_EQ(0, looker.early);
	ASSERT_EQ(0, shutdown(self->pair[0], SHUT_RDWR));
	pthread_join(swallow, NULL);
}

BLOCKED_TEST(punch_while_blocked)
{
	struct lmtrack_stream_wait result;

	/* The network holds references to some of these pages. */
	EXPECT_EQ(0, lmt_punch(self->fd, 0, BYTES));
	EXPECT_EQ(0, lmt_stats(self->fd).resident_pages);
	memset(self->mem, 1, BYTES);
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_EQ(ECANCELED, result.error);
}

STREAM_TEST(cancel_before_the_first_round)
{
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(-EINVAL, stream_wait(self->stream, 0, NULL));
	EXPECT_EQ(-EPIPE, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(0, lmt_stop(self->fd));
}

/* Peers that have gone between two rounds. */
STREAM_TEST(peer_gone_before_the_round)
{
	struct lmtrack_stream_wait result;
	uint32_t round = 0;

	memset(self->mem, 1, BYTES);
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	close(self->pair[1]);
	/* The first bytes may still be taken before the refusal has come. */
	do {
		ASSERT_EQ(0, stream_send(self->stream, ++round, ALL));
		ASSERT_EQ(0, stream_wait(self->stream, 10000, &result));
	} while (!result.error && round < 3);
	EXPECT_TRUE(result.error == EPIPE || result.error == ECONNRESET);
	EXPECT_EQ(0, result.channel);
}

/* A process is killed in the middle of a round: everything it had is released. */
static void owner_run(int fd, unsigned char *mem, int tracker, int tell)
{
	int stream = stream_open(STREAM_ID, 0), pair[2];

	memset(mem, 3, BYTES);
	if (stream < 0 || tcp_pair(pair, 65536) || add_channel(stream, pair[0]))
		_exit(1);
	if (tracker < 0) {
		tracker = lmt_reopen(fd);
		if (tracker < 0 || lmt_start(tracker, 0, NULL))
			_exit(2);
	}
	if (stream_add_region(stream, tracker, 0) || stream_send(stream, 1, ALL) ||
	    stream_wait(stream, 200, NULL) != -ETIMEDOUT || write(tell, "s", 1) != 1)
		_exit(3);
	stream_wait(stream, -1, NULL);
	_exit(4);
}

STREAM_TEST(owner_killed)
{
	int tell[2], ours;
	double begin;
	char byte;
	pid_t pid;

	ASSERT_EQ(0, pipe(tell));
	/* It tracks by a file of its own. */
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		owner_run(self->fd, self->mem, -1, tell[1]);
	ASSERT_EQ(1, read(tell[0], &byte, 1));
	begin = lmt_seconds();
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_EQ(-SIGKILL, child_status(pid));
	EXPECT_TRUE(EVENTUALLY(5, region_info(self->fd).state == LMTRACK_IDLE));
	EXPECT_GT(5, lmt_seconds() - begin);

	/* It sends what another process tracks. */
	ours = lmt_reopen(self->fd);
	ASSERT_LE(0, ours);
	ASSERT_EQ(0, lmt_start(ours, 0, NULL));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		owner_run(self->fd, self->mem, ours, tell[1]);
	ASSERT_EQ(1, read(tell[0], &byte, 1));
	EXPECT_EQ(-EBUSY, lmt_stop(ours));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_EQ(-SIGKILL, child_status(pid));
	EXPECT_TRUE(EVENTUALLY(5, !lmt_stop(ours)));
}

struct canceller {
	pthread_t thread;
	int stream;
	unsigned int ms;
};

static void *canceller_run(void *arg)
{
	struct canceller *c = arg;

	pause_ms(c->ms);
	stream_cancel(c->stream);
	return NULL;
}

/* Streams that end at any point of a round, by cancelling, closing, or both. */
STREAM_TEST(many_ends)
{
	struct lmtrack_stream_wait result;
	struct canceller canceller;
	unsigned int turn;
	int pair[2];

	memset(self->mem, 7, BYTES);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (turn = 0; turn < 40; turn++) {
		canceller.stream = stream_open(STREAM_ID, 0);
		canceller.ms = turn % 8;
		ASSERT_LE(0, canceller.stream);
		ASSERT_EQ(0, tcp_pair(pair, turn % 2 ? 0 : 65536));
		ASSERT_EQ(0, stream_add_region(canceller.stream, self->fd, 0));
		ASSERT_EQ(0, add_channel(canceller.stream, pair[0]));
		ASSERT_EQ(0, stream_send(canceller.stream, 1, ALL));
		if (turn % 3) {
			ASSERT_EQ(0, pthread_create(&canceller.thread, NULL, canceller_run,
						    &canceller));
			EXPECT_EQ(0, stream_wait(canceller.stream, 20000, &result));
			EXPECT_TRUE(result.error == ECANCELED || !result.error);
			ASSERT_EQ(0, pthread_join(canceller.thread, NULL));
		}
		close(canceller.stream);
		close(pair[0]);
		close(pair[1]);
	}
	EXPECT_EQ(0, lmt_stop(self->fd));
}

static void *cancel_at_once(void *arg)
{
	struct canceller *c = arg;

	while (!__atomic_load_n(&c->ms, __ATOMIC_ACQUIRE))
		;
	for (volatile unsigned int i = 0; i < c->ms * 50; i++)
		;
	stream_cancel(c->stream);
	return NULL;
}

/* A channel is added and a round begins while another cancels: it begins and ends, or does not begin. */
STREAM_TEST(cancel_beside_set_up_and_send)
{
	unsigned int turn, begun = 0, refused = 0;
	struct lmtrack_stream_wait result;
	struct canceller canceller;
	int pair[2];

	memset(self->mem, 7, BYTES);
	for (turn = 0; turn < 200; turn++) {
		long ret;

		ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
		canceller.stream = stream_open(STREAM_ID, 0);
		canceller.ms = 0;
		ASSERT_LE(0, canceller.stream);
		ASSERT_EQ(0, tcp_pair(pair, 0));
		ASSERT_EQ(0, stream_add_region(canceller.stream, self->fd, 0));
		ASSERT_EQ(0, pthread_create(&canceller.thread, NULL, cancel_at_once, &canceller));
		__atomic_store_n(&canceller.ms, 1 + turn, __ATOMIC_RELEASE);
		ret = add_channel(canceller.stream, pair[0]);
		EXPECT_TRUE(!ret || ret == -EPIPE);
		ret = ret ?: stream_send(canceller.stream, 1, ALL);
		EXPECT_TRUE(!ret || ret == -EPIPE);
		ASSERT_EQ(0, pthread_join(canceller.thread, NULL));
		if (!ret) {
			EXPECT_EQ(0, stream_wait(canceller.stream, 20000, &result));
			EXPECT_TRUE(result.error == ECANCELED || !result.error);
			begun++;
		} else {
			refused++;
		}
		EXPECT_EQ(-EPIPE, stream_send(canceller.stream, 2, DIRTY));
		/* Without a round that was left behind. */
		EXPECT_EQ(0, lmt_stop(self->fd));
		close(canceller.stream);
		close(pair[0]);
		close(pair[1]);
	}
	printf("# %u rounds begun, %u refused\n", begun, refused);
}

/* ---- A cap on the rate ---- */

STREAM_TEST(rate_set_errors)
{
	struct lmtrack_stream_rate_set args = { .size = sizeof(args) };
	unsigned int bit;

	EXPECT_EQ(-EINVAL, stream_rate(self->stream, 1));
	EXPECT_EQ(-EINVAL, stream_rate(self->stream, LMTRACK_STREAM_RATE_MIN - 1));
	EXPECT_EQ(-EINVAL, stream_rate(self->stream, LMTRACK_STREAM_RATE_MAX + 1));
	EXPECT_EQ(-EINVAL, stream_rate(self->stream, ~0ULL));
	for (bit = 0; bit < 32; bit++) {
		args.flags = 1U << bit;
		EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_RATE_SET, &args));
	}
	EXPECT_EQ(-EFAULT, lmt_ioctl(self->stream, LMTRACK_STREAM_RATE_SET, (void *)8));
	EXPECT_EQ(-ENOTTY, stream_rate(self->fd, 0));
	/* With nothing there, while nothing is sent, and when all is over. */
	EXPECT_EQ(0, stream_rate(self->stream, 0));
	EXPECT_EQ(0, stream_rate(self->stream, LMTRACK_STREAM_RATE_MIN));
	EXPECT_EQ(0, stream_rate(self->stream, LMTRACK_STREAM_RATE_MAX));
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_rate(self->stream, LMTRACK_STREAM_RATE_MIN));
}

#define CAPPED_CHANNELS	3

FIXTURE(capped) {
	int fd;
	unsigned char *mem;
	int stream;
	struct receiver rx;
};

FIXTURE_VARIANT(capped) {
	unsigned int channels;
	size_t pages;
	uint64_t rate;
	unsigned int stride;	/* of this many chunks only the first has something in it */
};

#define CHUNKS(n)	((n) * (size_t)CHUNK_PAGES)
FIXTURE_VARIANT_ADD(capped, one_2_mb) { 1, CHUNKS(3), 2000000, 1 };
FIXTURE_VARIANT_ADD(capped, three_2_mb) { 3, CHUNKS(3), 2000000, 1 };
FIXTURE_VARIANT_ADD(capped, one_20_mb) { 1, CHUNKS(20), 20000000, 1 };
FIXTURE_VARIANT_ADD(capped, three_20_mb) { 3, CHUNKS(20), 20000000, 1 };
FIXTURE_VARIANT_ADD(capped, one_of_three_20_mb) { 3, CHUNKS(60), 20000000, 3 };
FIXTURE_VARIANT_ADD(capped, one_100_mb) { 1, CHUNKS(90), 100000000, 1 };
FIXTURE_VARIANT_ADD(capped, three_100_mb) { 3, CHUNKS(90), 100000000, 1 };

FIXTURE_SETUP(capped)
{
	size_t page;
	unsigned int i;

	self->fd = lmt_region(variant->pages * PAGE);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, variant->pages * PAGE);
	ASSERT_NE(MAP_FAILED, self->mem);
	for (page = 0; page < variant->pages; page++)
		if (!(page / CHUNK_PAGES % variant->stride))
			self->mem[page * PAGE] = 1;
	self->stream = stream_open(STREAM_ID, LMTRACK_STREAM_NO_ZERO_DETECT);
	ASSERT_LE(0, self->stream);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_TRUE(receiver_init(&self->rx, variant->channels));
	ASSERT_TRUE(shadow_init(&self->rx.shadow[0], variant->pages));
	for (i = 0; i < variant->channels; i++) {
		int pair[2];

		ASSERT_EQ(0, tcp_pair(pair, 0));
		ASSERT_EQ(i, add_channel(self->stream, pair[0]));
		close(pair[0]);
		ASSERT_TRUE(receiver_start(&self->rx, pair[1]));
	}
	ASSERT_EQ(0, stream_rate(self->stream, variant->rate));
}

FIXTURE_TEARDOWN(capped)
{
	close(self->stream);
	receiver_end(&self->rx);
	close(self->fd);
}

#define CAPPED_TEST(name) TEST_F_TIMEOUT(capped, name, TEST_SECONDS)

/* How well it holds is for bench_rate to measure: here a machine may be as slow as it likes. */
CAPPED_TEST(rate_is_held)
{
	double begin, now, sent, worst = 0, at[1000], bytes[1000];
	struct lmtrack_stream_wait result;
	unsigned int n = 0, from = 0;
	const char *error;

	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	begin = lmt_seconds();
	while (stream_wait(self->stream, 20, &result) == -ETIMEDOUT && n < 1000) {
		/* In this order no window looks shorter than it was. */
		at[n] = lmt_seconds();
		bytes[n] = stream_sent(self->stream, variant->channels);
		now = lmt_seconds();
		while (now - at[from] > 1 && from < n) {
			sent = bytes[n] - bytes[from];
			if (sent / (now - at[from]) > worst)
				worst = sent / (now - at[from]);
			from++;
		}
		n++;
	}
	now = lmt_seconds() - begin;
	ASSERT_GT(1000, n);
	EXPECT_EQ(0, result.error);
	EXPECT_TRUE(receiver_wait(&self->rx, 1));
	EXPECT_EQ(0, memcmp(self->mem, self->rx.shadow[0].mem, variant->pages * PAGE));
	TH_LOG("%.2f MB/s, in the worst second %.2f; on the wire %.2f", result.bytes / now / 1e6,
	       worst / 1e6, result.bytes * 1e3 / result.wire_ns);
	EXPECT_LT(worst, 1.05 * variant->rate);
	EXPECT_LT(result.bytes / now, 1.05 * variant->rate);
	/* Nor much less, as far as a slow machine can send. */
	EXPECT_GT(result.bytes / now, variant->rate < 10000000 ? 0.2 * variant->rate : 2e6);
	/* The wire is as fast as the cap, however long was harvested between. */
	EXPECT_LT(result.bytes * 1e9 / result.wire_ns, 1.2 * variant->rate);
	check_times(_metadata, &result, variant->channels);
	close(self->stream);
	error = receiver_end(&self->rx);
	EXPECT_EQ(NULL, error) {
		TH_LOG("%s", error);
	}
	self->rx.count = 0;
	self->stream = -1;
}

/* Down to a crawl, and then without a cap. */
CAPPED_TEST(rate_changes_in_a_round)
{
	struct lmtrack_stream_wait result;
	uint64_t sent;
	double begin;

	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	pause_ms(200);
	ASSERT_EQ(0, stream_rate(self->stream, LMTRACK_STREAM_RATE_MIN));
	/* What was begun is sent, and made up for. */
	pause_ms(200);
	sent = stream_sent(self->stream, variant->channels);
	EXPECT_LT(0, sent);
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 1000, NULL));
	EXPECT_GE(3 * LMTRACK_STREAM_RATE_MIN,
		  stream_sent(self->stream, variant->channels) - sent);
	begin = lmt_seconds();
	ASSERT_EQ(0, stream_rate(self->stream, 0));
	ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));
	EXPECT_EQ(0, result.error);
	TH_LOG("%.1f MB in %.2f s", (result.bytes - sent) / 1e6, lmt_seconds() - begin);
	/* The least cap would take ten minutes; how fast this machine is, is another matter. */
	if (variant->rate <= 2000000) {
		EXPECT_GT(variant->pages / variant->stride * PAGE / variant->rate,
			  lmt_seconds() - begin);
	}
	EXPECT_TRUE(receiver_wait(&self->rx, 1));
	EXPECT_EQ(0, memcmp(self->mem, self->rx.shadow[0].mem, variant->pages * PAGE));
}

FIXTURE(waiting) {
	int fd;
	int tracker;
	unsigned char *mem;
	int stream;
	struct receiver rx;
};

/* So many channels that each waits for seconds between two pages. */
FIXTURE_SETUP(waiting)
{
	unsigned int i;

	self->fd = lmt_region(CHUNK * LMTRACK_CHANNELS_MAX);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, CHUNK * LMTRACK_CHANNELS_MAX);
	ASSERT_NE(MAP_FAILED, self->mem);
	for (i = 0; i < LMTRACK_CHANNELS_MAX; i++)
		memset(self->mem + i * CHUNK, 1, 8 * PAGE);
	self->tracker = lmt_reopen(self->fd);
	ASSERT_LE(0, self->tracker);
	ASSERT_EQ(0, lmt_start(self->tracker, 0, NULL));
	self->stream = stream_open(STREAM_ID, 0);
	ASSERT_LE(0, self->stream);
	ASSERT_EQ(0, stream_add_region(self->stream, self->tracker, 0));
	ASSERT_TRUE(receiver_init(&self->rx, LMTRACK_CHANNELS_MAX));
	ASSERT_TRUE(shadow_init(&self->rx.shadow[0], CHUNK_PAGES * LMTRACK_CHANNELS_MAX));
	for (i = 0; i < LMTRACK_CHANNELS_MAX; i++) {
		int pair[2];

		ASSERT_EQ(0, tcp_pair(pair, 0));
		ASSERT_EQ(i, add_channel(self->stream, pair[0]));
		close(pair[0]);
		ASSERT_TRUE(receiver_start(&self->rx, pair[1]));
	}
	ASSERT_EQ(0, stream_rate(self->stream, LMTRACK_STREAM_RATE_MIN));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 300, NULL));
}

FIXTURE_TEARDOWN(waiting)
{
	if (self->stream >= 0)
		close(self->stream);
	receiver_end(&self->rx);
}

#define WAITING_TEST(name) TEST_F_TIMEOUT(waiting, name, TEST_SECONDS)

WAITING_TEST(cancel_ends_the_wait)
{
	struct lmtrack_stream_wait result;
	double begin = lmt_seconds();

	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(0, stream_wait(self->stream, -1, &result));
	EXPECT_GT(3, lmt_seconds() - begin);
	EXPECT_EQ(ECANCELED, result.error);
}

WAITING_TEST(drop_ends_the_wait)
{
	struct lmtrack_stream_drop_channel drop;
	double begin = lmt_seconds();
	unsigned int i;

	for (i = 0; i < LMTRACK_CHANNELS_MAX; i += 4)
		EXPECT_EQ(0, drop_channel(self->stream, i, &drop));
	EXPECT_GT(3, lmt_seconds() - begin);
	/* The others go on. */
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 100, NULL));
	EXPECT_EQ(0, stream_rate(self->stream, 0));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, NULL));
}

WAITING_TEST(close_ends_the_wait)
{
	double begin = lmt_seconds();

	close(self->stream);
	self->stream = -1;
	EXPECT_GT(3, lmt_seconds() - begin);
	EXPECT_EQ(0, lmt_stop(self->tracker));
}

WAITING_TEST(new_setting_ends_the_wait)
{
	struct lmtrack_stream_wait result;
	double begin = lmt_seconds();

	EXPECT_EQ(0, stream_rate(self->stream, 1000 * LMTRACK_STREAM_RATE_MIN));
	EXPECT_EQ(0, stream_wait(self->stream, 10000, &result));
	EXPECT_GT(5, lmt_seconds() - begin);
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(8 * LMTRACK_CHANNELS_MAX, result.pages);
}

/* The last to have the stream is killed, in the wait for the round. */
WAITING_TEST(kill_ends_the_wait)
{
	double begin;
	pid_t pid;

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		stream_wait(self->stream, -1, NULL);
		_exit(1);
	}
	close(self->stream);
	self->stream = -1;
	pause_ms(200);
	begin = lmt_seconds();
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_EQ(-SIGKILL, child_status(pid));
	EXPECT_TRUE(EVENTUALLY(5, !lmt_stop(self->tracker)));
	EXPECT_GT(3, lmt_seconds() - begin);
}

/* A frame for each chunk and one for the end of the round, as without a cap, also after one. */
STREAM_TEST(no_cap_no_change)
{
	uint32_t round;
	int i;

	for (i = 0; i < 2; i++) {
		int stream = i ? self->stream : stream_open(STREAM_ID, 0), pair[2];
		struct receiver rx;

		ASSERT_EQ(0, tcp_pair(pair, 0));
		ASSERT_TRUE(receiver_init(&rx, 1));
		ASSERT_TRUE(shadow_init(&rx.shadow[0], PAGES));
		memset(self->mem, 0x44, BYTES);
		if (!i)
			ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
		if (i) {
			ASSERT_EQ(0, stream_rate(stream, LMTRACK_STREAM_RATE_MIN));
			ASSERT_EQ(0, stream_rate(stream, 0));
		}
		ASSERT_EQ(0, stream_add_region(stream, self->fd, 0));
		ASSERT_EQ(0, add_channel(stream, pair[0]));
		ASSERT_TRUE(receiver_start(&rx, pair[1]));
		for (round = 1; round < 4; round++)
			round_trip(_metadata, stream, &rx, round, ALL);
		EXPECT_EQ(3 * (PAGES / CHUNK_PAGES + 1), channel_stats(stream, 0).frames);
		shutdown(pair[1], SHUT_RDWR);
		EXPECT_EQ(NULL, receiver_end(&rx));
		if (!i)
			close(stream);
	}
}

/* ---- Threads ---- */

/* The CPUs of the thread of a channel, as the kernel writes them. */
static bool thread_cpus(const char *thread, char *cpus, size_t size)
{
	struct dirent *entry;
	DIR *proc = opendir("/proc");
	bool found = false;

	while (proc && !found && (entry = readdir(proc))) {
		char path[300], line[256];
		bool ours = false;
		FILE *f;

		snprintf(path, sizeof(path), "/proc/%s/status", entry->d_name);
		f = atoi(entry->d_name) > 0 ? fopen(path, "r") : NULL;
		while (f && fgets(line, sizeof(line), f)) {
			line[strcspn(line, "\n")] = 0;
			if (!strncmp(line, "Name:\t", 6))
				ours = !strcmp(line + 6, thread);
			if (ours && !strncmp(line, "Cpus_allowed_list:\t", 19)) {
				found = snprintf(cpus, size, "%s", line + 19) < (int)size;
			}
		}
		if (f)
			fclose(f);
	}
	if (proc)
		closedir(proc);
	return found;
}

STREAM_TEST(cpus)
{
	unsigned long mask[32] = { };
	char cpus[64] = "";

	mask[0] = 1;
	ASSERT_EQ(0, add_channel_on(self->stream, self->pair[0], mask, 1));
	ASSERT_TRUE(thread_cpus("lmtrack-0", cpus, sizeof(cpus)));
	EXPECT_STREQ("0", cpus);
	if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
		/* Longer than the kernel's own, with CPUs in it that do not exist. */
		memset(mask, 0xff, sizeof(mask));
		mask[0] = 2;
		mask[1] = 0;
		ASSERT_EQ(1, add_channel_on(self->stream, self->pair[1], mask, sizeof(mask)));
		ASSERT_TRUE(thread_cpus("lmtrack-1", cpus, sizeof(cpus)));
		EXPECT_EQ(0, strncmp("1", cpus, 1));
		EXPECT_TRUE(!cpus[1] || cpus[1] == ',');
	}
	close(self->stream);
	self->stream = -1;
	EXPECT_FALSE(thread_cpus("lmtrack-0", cpus, sizeof(cpus)));
}

/* ---- Copied or not ---- */

/*
 * What the peer reads of a page that is written after its round has been handed over. If the
 * network has a reference, it is the new content: a page that goes by copy is the old one.
 */
static int late_write_seen(struct __test_metadata *_metadata, int fd, unsigned char *mem,
			   int stream, const int pair[2])
{
	struct rx_channel ch = { .fd = pair[1] };
	struct frame frame;
	static unsigned char page[PAGE];

	memset(mem, 1, PAGE);
	EXPECT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_EQ(0, stream_add_region(stream, fd, 0));
	EXPECT_EQ(0, add_channel(stream, pair[0]));
	EXPECT_EQ(0, stream_send(stream, 1, ALL));
	EXPECT_EQ(0, stream_wait(stream, 10000, NULL));
	memset(mem, 2, PAGE);
	EXPECT_TRUE(read_all(&ch, &frame.head, sizeof(frame.head)));
	EXPECT_TRUE(read_all(&ch, frame.table, sizeof(frame.table[0])));
	EXPECT_TRUE(read_all(&ch, page, PAGE));
	return page[PAGE - 1];
}

STREAM_TEST(pages_go_by_reference)
{
	struct lmtrack_channel_stats stats;

	EXPECT_EQ(2, late_write_seen(_metadata, self->fd, self->mem, self->stream,
				     self->pair));
	stats = channel_stats(self->stream, 0);
	EXPECT_EQ(PAGE, stats.zerocopy_bytes);
	EXPECT_EQ(0, stats.copied_bytes);
}

/* kTLS on both ends with the same fixed key. */
static int tls_enable(int fd, int direction)
{
	struct tls12_crypto_info_aes_gcm_128 info = {
		.info = { .version = TLS_1_2_VERSION, .cipher_type = TLS_CIPHER_AES_GCM_128 },
		.key = "0123456789abcde", .salt = "sal", .iv = "initial", .rec_seq = "",
	};
	int ret = E(setsockopt(fd, SOL_TCP, TCP_ULP, "tls", sizeof("tls")));

	return ret ?: E(setsockopt(fd, SOL_TLS, direction, &info, sizeof(info)));
}

STREAM_TEST(tls_is_copied)
{
	struct lmtrack_channel_stats stats;
	struct receiver rx;
	const char *error;
	int ret;

	ret = tls_enable(self->pair[0], TLS_TX) ?: tls_enable(self->pair[1], TLS_RX);
	if (ret)
		SKIP(return, "no TLS in the kernel: %s", strerror(-ret));
	ASSERT_TRUE(receiver_init(&rx, 1));
	ASSERT_TRUE(shadow_init(&rx.shadow[0], PAGES));
	memset(self->mem, 0x33, BYTES / 2);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_EQ(0, add_channel(self->stream, self->pair[0]));
	ASSERT_TRUE(receiver_start(&rx, self->pair[1]));
	round_trip(_metadata, self->stream, &rx, 1, ALL);
	EXPECT_EQ(0, memcmp(self->mem, rx.shadow[0].mem, BYTES));
	stats = channel_stats(self->stream, 0);
	EXPECT_EQ(0, stats.zerocopy_bytes);
	EXPECT_EQ(BYTES / 2, stats.copied_bytes);
	close(self->stream);
	self->stream = -1;
	/* The other end of a TLS connection is told by TLS, which nobody speaks here. */
	shutdown(self->pair[1], SHUT_RDWR);
	error = receiver_end(&rx);
	EXPECT_EQ(NULL, error) {
		TH_LOG("%s", error);
	}
}

/* Two network namespaces with a veth between them; this process ends up in @ns[0]. */
static int veth_make(int ns[2])
{
	char command[512];
	pid_t pid;
	int i, ret;

	for (i = 1; i >= 0; i--) {
		if (unshare(CLONE_NEWNET))
			return -errno;
		ns[i] = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
		if (ns[i] < 0)
			return -errno;
	}
	/* A process in the other namespace gives it a name. */
	pid = fork();
	if (!pid) {
		if (setns(ns[1], CLONE_NEWNET))
			_exit(1);
		pause();
		_exit(0);
	}
	pause_ms(100);
	snprintf(command, sizeof(command),
		 "ip link add lmt0 type veth peer name lmt1 netns %d && "
		 "ip addr add 10.99.0.1/24 dev lmt0 && ip link set lmt0 up", pid);
	ret = system(command);
	if (!ret && setns(ns[1], CLONE_NEWNET))
		ret = -errno;
	if (!ret)
		ret = system("ip addr add 10.99.0.2/24 dev lmt1 && ip link set lmt1 up");
	if (setns(ns[0], CLONE_NEWNET))
		ret = -errno;
	kill(pid, SIGKILL);
	child_status(pid);
	return ret;
}

static int ethtool(const char *device, uint32_t command, uint32_t value)
{
	struct ethtool_value data = { .cmd = command, .data = value };
	struct ifreq request = { .ifr_data = (void *)&data };
	int sock = socket(AF_INET, SOCK_DGRAM, 0);
	int ret;

	strcpy(request.ifr_name, device);
	ret = E(ioctl(sock, SIOCETHTOOL, &request));
	close(sock);
	return ret ?: (int)data.data;
}

static void over_veth(struct __test_metadata *_metadata, int fd, unsigned char *mem,
		      int stream, bool gather, struct lmtrack_channel_stats *stats)
{
	struct receiver rx;
	const char *error;
	int ns[2] = { -1, -1 }, pair[2];

	if (veth_make(ns))
		SKIP(return, "no veth, or no ip command");
	if (!gather)
		ASSERT_EQ(0, ethtool("lmt0", ETHTOOL_SSG, 0));
	ASSERT_EQ(gather, ethtool("lmt0", ETHTOOL_GSG, 0));
	ASSERT_EQ(0, tcp_pair_between(pair, 0, ns[0], ns[1], "10.99.0.2"));
	ASSERT_TRUE(receiver_init(&rx, 1));
	ASSERT_TRUE(shadow_init(&rx.shadow[0], PAGES));
	memset(mem, 0x44, BYTES / 2);
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	ASSERT_EQ(0, stream_add_region(stream, fd, 0));
	ASSERT_EQ(0, add_channel(stream, pair[0]));
	ASSERT_TRUE(receiver_start(&rx, pair[1]));
	round_trip(_metadata, stream, &rx, 1, ALL);
	EXPECT_EQ(0, memcmp(mem, rx.shadow[0].mem, BYTES));
	*stats = channel_stats(stream, 0);
	EXPECT_EQ(BYTES / 2, stats->zerocopy_bytes + stats->copied_bytes);
	shutdown(pair[1], SHUT_RDWR);
	error = receiver_end(&rx);
	EXPECT_EQ(NULL, error) {
		TH_LOG("%s", error);
	}
}

STREAM_TEST(veth_with_scatter_gather)
{
	struct lmtrack_channel_stats stats = { };

	over_veth(_metadata, self->fd, self->mem, self->stream, true, &stats);
	printf("# %llu bytes by reference, %llu copied\n",
	       (unsigned long long)stats.zerocopy_bytes, (unsigned long long)stats.copied_bytes);
	EXPECT_LE(99 * stats.copied_bytes, stats.zerocopy_bytes);
}

STREAM_TEST(veth_without_scatter_gather)
{
	struct lmtrack_channel_stats stats = { };

	over_veth(_metadata, self->fd, self->mem, self->stream, false, &stats);
	printf("# %llu bytes by reference, %llu copied\n",
	       (unsigned long long)stats.zerocopy_bytes, (unsigned long long)stats.copied_bytes);
	EXPECT_EQ(0, stats.zerocopy_bytes);
}

TEST_HARNESS_MAIN
