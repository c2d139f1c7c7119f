// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -lrdmacm -libverbs
/*
 * Streams over RDMA, request by request, on soft-RoCE, against a peer of the test's own: the
 * copy it has must be equal to the region, byte for byte. Device, connection or peer go away at
 * every moment, and what is left must be an error, and nothing else.
 */
#include <sys/syscall.h>

#include "kselftest_harness.h"
#include "rdma_link.h"
#include "rdma_peer.h"
#include "uapi_requests.h"

#define BYTES		(8 * MIB)
#define PAGES		(BYTES / PAGE)
#define WINDOW		LMTRACK_CHUNK_PAGES
#define ALL		LMTRACK_SEND_ALL
#define DIRTY		LMTRACK_SEND_DIRTY
#define CHANNELS	2

/* ---- Requests ---- */

static struct lmtrack_stream_add_rdma rdma_args(const struct peer *peer)
{
	struct lmtrack_stream_add_rdma args = {
		.size = sizeof(args),
		.token_bytes = sizeof(peer->token),
		.timeout_ms = 20000,
		.window_pages = WINDOW,
		.channel = ~0U,
	};

	memcpy(args.remote, &peer->address, sizeof(args.remote));
	memcpy(args.token, peer->token, sizeof(args.token));
	return args;
}

static long add_rdma(int stream, struct lmtrack_stream_add_rdma args)
{
	long ret = lmt_ioctl(stream, LMTRACK_STREAM_ADD_RDMA, &args);

	return ret ?: (long)args.channel;
}

static long set_window(int stream, uint32_t channel, uint64_t first, uint64_t address,
		       uint32_t rkey)
{
	struct lmtrack_stream_rdma_window args = {
		.size = sizeof(args), .channel = channel, .first = first, .address = address,
		.rkey = rkey,
	};

	return lmt_ioctl(stream, LMTRACK_STREAM_RDMA_WINDOW, &args);
}

static long wanted(int stream, uint32_t channel, struct lmtrack_stream_rdma_wanted *args)
{
	*args = (struct lmtrack_stream_rdma_wanted){ .size = sizeof(*args), .channel = channel };
	return lmt_ioctl(stream, LMTRACK_STREAM_RDMA_WANTED, args);
}

/* Give each channel the window it waits for; how many there were, or an error. */
static long answer(int stream, struct peer *peers, unsigned int count)
{
	struct lmtrack_stream_rdma_wanted want;
	uint64_t address;
	uint32_t rkey;
	long given = 0;

	for (unsigned int i = 0; i < count; i++) {
		long ret = wanted(stream, i, &want);

		if (ret == -EAGAIN)
			continue;
		if (!ret && !peer_window(&peers[i], want.first, want.pages, &address, &rkey))
			ret = -ENOMEM;
		if (!ret)
			ret = set_window(stream, i, want.first, address, rkey);
		/* It may have been asked for twice: before it was set, and before that was seen. */
		if (ret && ret != -EEXIST)
			return ret;
		given++;
	}
	return given;
}

/* A whole round with all that is asked for meanwhile; 0, or what went wrong with it. */
static long round_run(int stream, struct peer *peers, unsigned int count, uint32_t round,
		      uint32_t what, struct lmtrack_stream_wait *result)
{
	long ret = stream_send(stream, round, what);

	while (ret >= 0) {
		int got = stream_events(stream, 60000);

		if (got <= 0)
			return got ?: -ETIMEDOUT;
		if (got & POLLPRI)
			ret = answer(stream, peers, count);
		if (got & POLLIN) {
			ret = stream_wait(stream, 0, result);
			break;
		}
	}
	return ret ?: -(long)result->error;
}

/* ---- A region, a stream, peers ---- */

FIXTURE(rdma) {
	int fd;
	unsigned char *mem;
	int stream;
	struct peer_memory memory;
	struct peer peers[CHANNELS];
	unsigned int count;
};

FIXTURE_VARIANT(rdma) {
	const char *address;
};

FIXTURE_VARIANT_ADD(rdma, ipv4) {
	.address = RDMA_IPV4,
};

FIXTURE_VARIANT_ADD(rdma, ipv6) {
	.address = RDMA_IPV6,
};

FIXTURE_SETUP(rdma)
{
	if (!rdma_link_up())
		SKIP(return, "no soft-RoCE here");
	ASSERT_TRUE(rdma_module_load());
	self->fd = lmt_region(BYTES);
	ASSERT_LE(0, self->fd);
	self->mem = lmt_map(self->fd, BYTES);
	ASSERT_NE(MAP_FAILED, self->mem);
	self->stream = stream_open(PEER_STREAM, 0);
	ASSERT_LE(0, self->stream);
	ASSERT_EQ(0, stream_add_region(self->stream, self->fd, 0));
	ASSERT_TRUE(peer_memory_init(&self->memory, PAGES));
}

FIXTURE_TEARDOWN(rdma)
{
	close(self->stream);
	for (unsigned int i = 0; i < self->count; i++)
		EXPECT_STREQ("", peer_end(&self->peers[i]) ?: "");
	close(self->fd);
}

#define RDMA_TEST(name) TEST_F_TIMEOUT(rdma, name, TEST_SECONDS)
#define PEERS(n) ({								\
	for (unsigned int _i = 0; _i < (n); _i++, self->count++) {		\
		ASSERT_TRUE(peer_start(&self->peers[_i], &self->memory, _i,	\
				       variant->address));			\
	}									\
})
#define CONNECT(n) ({								\
	PEERS(n);								\
	for (unsigned int _i = 0; _i < (n); _i++)				\
		ASSERT_EQ(_i, add_rdma(self->stream, rdma_args(&self->peers[_i])));	\
})
#define ROUND(number, what) ({							\
	ASSERT_EQ(0, round_run(self->stream, self->peers, self->count, number, what, &result));	\
	for (unsigned int _i = 0; _i < self->count; _i++)			\
		ASSERT_TRUE(peer_wait(&self->peers[_i], number));		\
})

static void pattern(unsigned char *mem, size_t first, size_t pages, unsigned char seed)
{
	for (size_t i = first * PAGE / 8; i < (first + pages) * PAGE / 8; i++)
		((uint64_t *)mem)[i] = (i + 1) * 0x9e3779b97f4a7c15ULL ^ seed;
}

/* ---- Rounds ---- */

RDMA_TEST(equal)
{
	struct lmtrack_stream_wait result;
	struct lmtrack_channel_stats stats;
	uint64_t data = 0, writes = 0;

	CONNECT(CHANNELS);
	/* Two chunks of data, one of them with holes and zeroes; one chunk that is not touched. */
	pattern(self->mem, 0, 700, 1);
	touch(self->mem, 800, 100, 0);
	pattern(self->mem, 3 * WINDOW + 5, 1, 2);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ROUND(1, ALL);
	EXPECT_EQ(801, result.pages);
	EXPECT_EQ(701, result.data_pages);
	EXPECT_EQ(100, result.zero_pages);
	EXPECT_LT(0, result.wire_ns);
	EXPECT_LE(result.wire_ns, result.duration_ns);
	EXPECT_EQ(0, memcmp(self->mem, self->memory.mem, BYTES));

	/* Single pages, a page that becomes zero, a hole. */
	for (size_t page = 0; page < 512; page += 3)
		pattern(self->mem, page, 1, 3);
	memset(self->mem + 600 * PAGE, 0, PAGE);
	ASSERT_EQ(0, lmt_punch(self->fd, 10 * PAGE, 20 * PAGE));
	ROUND(2, DIRTY);
	EXPECT_EQ(0, memcmp(self->mem, self->memory.mem, BYTES));
	ROUND(3, DIRTY);
	EXPECT_EQ(0, result.pages);
	EXPECT_EQ(0, lmt_dirty(self->fd, 0, 0, PAGES, (uint64_t[PAGES / 64]){ 0 }));

	for (unsigned int i = 0; i < CHANNELS; i++) {
		stats = channel_stats(self->stream, i);
		EXPECT_EQ(stats.data_pages * PAGE, stats.zerocopy_bytes);
		EXPECT_EQ(0, stats.copied_bytes);
		writes += stats.writes;
		EXPECT_EQ(self->peers[i].frames, stats.frames);
		EXPECT_EQ(self->peers[i].data_pages, stats.data_pages);
		EXPECT_EQ(self->peers[i].zero_pages, stats.zero_pages);
		data += stats.data_pages;
	}
	EXPECT_LT(701, data);
	EXPECT_LT(0, writes);
}

struct writer {
	unsigned char *mem;
	_Atomic bool stop;
	pthread_t thread;
};

static void *writer_main(void *data)
{
	struct writer *writer = data;
	uint64_t x = 88172645463325252ULL;

	while (!writer->stop) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		((volatile uint64_t *)writer->mem)[x % (BYTES / 8)] = x;
	}
	return NULL;
}

/* Somebody writes without pause, while rounds go; when he stops, one more makes it equal. */
RDMA_TEST(equal_under_writes)
{
	struct writer writer = { .mem = self->mem };
	struct lmtrack_stream_wait result;
	uint32_t round;

	CONNECT(CHANNELS);
	pattern(self->mem, 0, PAGES, 7);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, pthread_create(&writer.thread, NULL, writer_main, &writer));
	ROUND(1, ALL);
	for (round = 2; round < 12; round++)
		ROUND(round, DIRTY);
	writer.stop = true;
	pthread_join(writer.thread, NULL);
	ROUND(round, DIRTY);
	EXPECT_EQ(0, memcmp(self->mem, self->memory.mem, BYTES));
}

/* Neighbours go together: in a region that is all dirty, nearly no write has a single page. */
RDMA_TEST(gather)
{
	struct lmtrack_stream_wait result;
	struct lmtrack_channel_stats stats;

	CONNECT(1);
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ROUND(1, ALL);
	stats = channel_stats(self->stream, 0);
	TH_LOG("%llu pages in %llu writes, %llu of them of more than one page",
	       stats.data_pages, stats.writes, stats.gathered);
	EXPECT_EQ(PAGES, stats.data_pages);
	EXPECT_GE(stats.gathered, stats.writes * 95 / 100);
	/* As many as the device gathers: siw six, unless they are neighbours here, too. */
	EXPECT_LE(stats.writes, PAGES / (rdma_is_iwarp() ? 6 : 16));

	/* Where no page has a neighbour, none is made up. */
	for (size_t page = 0; page < PAGES; page += 2)
		touch(self->mem, page, 1, 0x11);
	ROUND(2, DIRTY);
	EXPECT_EQ(stats.gathered, channel_stats(self->stream, 0).gathered);
	EXPECT_EQ(stats.writes + PAGES / 2, channel_stats(self->stream, 0).writes);
	EXPECT_EQ(0, memcmp(self->mem, self->memory.mem, BYTES));
}

/* Lines of what RDMA knows of the module's objects of one kind; or -1. */
/* A cap holds for all channels together: pages go in smaller frames, and arrive all the same. */
RDMA_TEST(rate_is_held)
{
	const uint64_t rate = 2000000;
	struct lmtrack_stream_wait result;
	double begin;

	CONNECT(CHANNELS);
	pattern(self->mem, 0, 700, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_rate(self->stream, rate));
	begin = lmt_seconds();
	ROUND(1, ALL);
	TH_LOG("%.2f MB/s, on the wire %.2f", result.bytes * 1e3 / result.duration_ns,
	       result.bytes * 1e3 / result.wire_ns);
	EXPECT_GT(1.05 * rate, result.bytes / (lmt_seconds() - begin));
	EXPECT_GT(1.05 * rate, result.bytes * 1e9 / result.wire_ns);
	EXPECT_EQ(700, result.data_pages);
	/* Two pages each. */
	EXPECT_LE(350, self->peers[0].frames + self->peers[1].frames);
	EXPECT_EQ(0, memcmp(self->mem, self->memory.mem, BYTES));
}

static int resources(const char *kind)
{
	char command[128];
	int count = -1;
	FILE *list;

	snprintf(command, sizeof(command),
		 "rdma resource show %s | grep -c '\\[lmtrack_rdma\\]'", kind);
	list = popen(command, "re");
	if (list && fscanf(list, "%d", &count) != 1)
		count = -1;
	if (list)
		pclose(list);
	return count;
}

RDMA_TEST(nothing_registered)
{
	struct lmtrack_stream_wait result;

	CONNECT(CHANNELS);
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ROUND(1, ALL);
	EXPECT_EQ(CHANNELS, resources("pd"));
	EXPECT_EQ(0, resources("mr"));
	EXPECT_EQ(0, close(self->stream));
	self->stream = -1;
	EXPECT_EQ(0, resources("pd"));
}

/* Only what is sent needs a window. */
RDMA_TEST(windows_as_needed)
{
	const uint64_t bytes = 1024 * MIB;
	int fd = lmt_region(bytes), stream = stream_open(PEER_STREAM, 0);
	struct lmtrack_stream_add_rdma args;
	struct lmtrack_stream_wait result;
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, bytes);
	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_TRUE(peer_memory_init(&self->memory, bytes / PAGE));
	PEERS(1);
	args = rdma_args(&self->peers[0]);
	args.window_pages = 4 * WINDOW;
	ASSERT_EQ(0, stream_add_region(stream, fd, 0));
	ASSERT_EQ(0, add_rdma(stream, args));
	for (unsigned int i = 0; i < 5; i++)
		pattern(mem, i * 40000 + 3, 2, i);
	/* Next to the third, in the same window. */
	pattern(mem, 2 * 40000 + 300, 1, 9);
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	ASSERT_EQ(0, round_run(stream, self->peers, 1, 1, ALL, &result));
	ASSERT_TRUE(peer_wait(&self->peers[0], 1));
	EXPECT_EQ(5, self->peers[0].window_count);
	for (unsigned int i = 0; i < 5; i++)
		EXPECT_EQ(0, memcmp(mem + i * 40000 * PAGE, self->memory.mem + i * 40000 * PAGE,
				    400 * PAGE));
	EXPECT_EQ(0, close(stream));
	EXPECT_EQ(0, close(fd));
}

/* ---- Refusals ---- */

RDMA_TEST(add_errors)
{
	struct lmtrack_stream_add_rdma args, good;
	struct sockaddr_in *in = (void *)args.remote;
	unsigned long mask[16] = { 0 };

	PEERS(1);
	good = rdma_args(&self->peers[0]);
	for (unsigned int bit = 1; bit < 32; bit++) {
		args = good;
		args.flags = 1U << bit;
		EXPECT_EQ(-EOPNOTSUPP, add_rdma(self->stream, args));
	}
#define REFUSED(error, what) ({							\
	args = good;								\
	what;									\
	EXPECT_EQ(error, add_rdma(self->stream, args));				\
})
	REFUSED(-EINVAL, args.size--);
	REFUSED(-EINVAL, args.reserved = 1);
	REFUSED(-EINVAL, args.timeout_ms = 0);
	REFUSED(-EINVAL, args.timeout_ms = LMTRACK_RDMA_TIMEOUT_MAX_MS + 1);
	REFUSED(-EINVAL, args.token_bytes = LMTRACK_RDMA_TOKEN_MAX + 1);
	REFUSED(-EINVAL, args.window_pages = 0);
	REFUSED(-EINVAL, args.window_pages = LMTRACK_CHUNK_PAGES + 1);
	REFUSED(-EINVAL, memset(args.remote, 0, sizeof(args.remote)));
	REFUSED(-EINVAL, in->sin_family = AF_UNIX);
	REFUSED(-EINVAL, args.remote[LMTRACK_RDMA_ADDRESS_MAX - 1] = 1);
	REFUSED(-EINVAL, args.local[3] = 1);
	REFUSED(-EINVAL, args.cpumask_bytes = 8);
	REFUSED(-EINVAL, (args.cpumask = (uintptr_t)mask, args.cpumask_bytes = sizeof(mask)));
	REFUSED(-EFAULT, (args.cpumask = 8, args.cpumask_bytes = 8));
	/* Nobody listens. */
	REFUSED(-ECONNREFUSED, in->sin_port ^= htons(0x2222));
	/* One who does not know us. */
	REFUSED(-EACCES, args.token[55] ^= 1);
	REFUSED(-EACCES, args.token_bytes = 3);
	EXPECT_EQ(0, add_rdma(self->stream, rdma_args(&self->peers[0])));
}

RDMA_TEST(add_nowhere)
{
	struct lmtrack_stream_add_rdma args;
	struct sockaddr_in *in = (void *)args.remote;

	PEERS(1);
	args = rdma_args(&self->peers[0]);
	memset(args.remote, 0, sizeof(args.remote));
	in->sin_family = AF_INET;
	in->sin_port = htons(4000);
	/* Nothing routes there, as the VM has no default route. */
	inet_pton(AF_INET, "192.0.2.1", &in->sin_addr);
	args.timeout_ms = 3000;
	EXPECT_GT(0, add_rdma(self->stream, args));
	/* A neighbour that does not exist. */
	inet_pton(AF_INET, "10.76.0.77", &in->sin_addr);
	EXPECT_GT(0, add_rdma(self->stream, args));
}

/* He who neither takes nor refuses is waited for as long as was said. */
RDMA_TEST(add_silence)
{
	struct lmtrack_stream_add_rdma args;
	double begin;

	self->peers[0].silent = true;
	PEERS(1);
	args = rdma_args(&self->peers[0]);
	args.timeout_ms = 1500;
	begin = lmt_seconds();
	EXPECT_EQ(-ETIMEDOUT, add_rdma(self->stream, args));
	EXPECT_LE(1.4, lmt_seconds() - begin);
	EXPECT_GT(20, lmt_seconds() - begin);
}

static void ignore(int signal __attribute__((unused)))
{
}

RDMA_TEST(add_interrupted)
{
	struct sigaction action = { .sa_handler = ignore };
	struct lmtrack_stream_add_rdma args;

	self->peers[0].silent = true;
	PEERS(1);
	args = rdma_args(&self->peers[0]);
	sigaction(SIGUSR1, &action, NULL);
	if (!fork()) {
		pause_ms(1000);
		kill(getppid(), SIGUSR1);
		_exit(0);
	}
	EXPECT_EQ(-EINTR, add_rdma(self->stream, args));
}

RDMA_TEST(window_errors)
{
	struct lmtrack_stream_rdma_window args = { .size = sizeof(args) };
	struct lmtrack_stream_rdma_wanted want;
	struct lmtrack_stream_wait result;
	uint64_t address;
	uint32_t rkey;

	CONNECT(1);
	for (unsigned int bit = 0; bit < 32; bit++) {
		args.flags = 1U << bit;
		EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(self->stream, LMTRACK_STREAM_RDMA_WINDOW, &args));
	}
	args.flags = 0;
	args.reserved = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_RDMA_WINDOW, &args));
	args.reserved = 0;
	args.region = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_RDMA_WINDOW, &args));
	args.region = LMTRACK_REGIONS_MAX;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_STREAM_RDMA_WINDOW, &args));
	EXPECT_EQ(-EINVAL, set_window(self->stream, 1, 0, 0, 0));
	EXPECT_EQ(-EINVAL, set_window(self->stream, ~0U, 0, 0, 0));
	EXPECT_EQ(-EINVAL, set_window(self->stream, 0, 1, 0, 0));
	EXPECT_EQ(-EINVAL, set_window(self->stream, 0, PAGES, 0, 0));
	EXPECT_EQ(-EINVAL, set_window(self->stream, 0, ~0ULL - WINDOW + 1, 0, 0));
	EXPECT_EQ(-EINVAL, set_window(self->stream, 0, 0, ~0ULL - PAGE, 0));
	EXPECT_EQ(0, set_window(self->stream, 0, WINDOW, 0x1000, 1));
	EXPECT_EQ(-EEXIST, set_window(self->stream, 0, WINDOW, 0x1000, 1));

	EXPECT_EQ(-EINVAL, wanted(self->stream, 1, &want));
	EXPECT_EQ(-EAGAIN, wanted(self->stream, 0, &want));
	EXPECT_EQ(0, stream_events(self->stream, 0));
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	touch(self->mem, PAGES - 1, 1, 1);
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(POLLPRI, stream_events(self->stream, 20000));
	EXPECT_EQ(0, wanted(self->stream, 0, &want));
	EXPECT_EQ(0, want.region);
	EXPECT_EQ(PAGES - WINDOW, want.first);
	EXPECT_EQ(WINDOW, want.pages);
	EXPECT_EQ(-ETIMEDOUT, stream_wait(self->stream, 100, &result));
	/* Another window is not the one it waits for. */
	ASSERT_TRUE(peer_window(&self->peers[0], 0, WINDOW, &address, &rkey));
	EXPECT_EQ(0, set_window(self->stream, 0, 0, address, rkey));
	EXPECT_EQ(POLLPRI, stream_events(self->stream, 0));
	EXPECT_EQ(1, answer(self->stream, self->peers, 1));
	EXPECT_EQ(0, stream_wait(self->stream, 20000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(-EAGAIN, wanted(self->stream, 0, &want));
	EXPECT_EQ(POLLIN, stream_events(self->stream, 0));
}

/* A channel over TCP; the far end, or an error. */
static int add_tcp(int stream, uint32_t flags)
{
	struct lmtrack_stream_add_channel args = { .size = sizeof(args), .flags = flags };
	struct sockaddr_in in = { .sin_family = AF_INET };
	int listener = socket(AF_INET, SOCK_STREAM, 0), end;
	socklen_t length = sizeof(in);
	long ret;

	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	args.fd = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (void *)&in, sizeof(in)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&in, &length) ||
	    connect(args.fd, (void *)&in, sizeof(in)))
		return -errno;
	end = accept(listener, NULL, NULL);
	ret = lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &args);
	close(args.fd);
	close(listener);
	return ret ? (int)ret : end;
}

RDMA_TEST(windows_of_tcp)
{
	struct lmtrack_stream_rdma_wanted want;

	ASSERT_LE(0, add_tcp(self->stream, 0));
	EXPECT_EQ(-EOPNOTSUPP, set_window(self->stream, 0, 0, 0, 0));
	EXPECT_EQ(-EAGAIN, wanted(self->stream, 0, &want));
}

static void *drain(void *data)
{
	static char buffer[MIB];

	while (recv(*(int *)data, buffer, sizeof(buffer), 0) > 0)
		;
	return NULL;
}

/* Both kinds in one stream: each has the chunks that it comes for. */
RDMA_TEST(beside_tcp)
{
	struct lmtrack_stream_wait result;
	pthread_t thread;
	int end;

	CONNECT(1);
	end = add_tcp(self->stream, 0);
	ASSERT_LE(0, end);
	ASSERT_EQ(0, pthread_create(&thread, NULL, drain, &end));
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ROUND(1, ALL);
	EXPECT_EQ(PAGES, result.data_pages);
	EXPECT_EQ(PAGES, self->peers[0].data_pages + channel_stats(self->stream, 1).data_pages);
	EXPECT_EQ(0, channel_stats(self->stream, 1).writes);
	for (size_t page = 0; page < PAGES; page += LMTRACK_CHUNK_PAGES)
		EXPECT_TRUE(!self->memory.owner[page / LMTRACK_CHUNK_PAGES] ||
			    !memcmp(self->mem + page * PAGE, self->memory.mem + page * PAGE, CHUNK));
	EXPECT_EQ(0, stream_cancel(self->stream));
	pthread_join(thread, NULL);
}

/* ---- Ends ---- */

/* Until the round has ended, and then what it says. */
static int32_t round_error(int stream)
{
	struct lmtrack_stream_wait result;
	long ret = stream_wait(stream, 60000, &result);

	return ret ? (int32_t)ret : -(int32_t)result.error;
}

RDMA_TEST(wrong_key)
{
	struct lmtrack_stream_wait result;
	uint32_t rkey, round = 2;
	uint64_t address;

	CONNECT(1);
	pattern(self->mem, 0, 100, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_TRUE(peer_window(&self->peers[0], 0, WINDOW, &address, &rkey));
	ASSERT_EQ(0, set_window(self->stream, 0, 0, address, rkey ^ 0x55));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));
	/* iWARP's peer ends the connection, some time after the round, and no more is known. */
	if (rdma_is_iwarp()) {
		while (!result.error && !stream_send(self->stream, round++, DIRTY))
			ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));
		EXPECT_TRUE(!result.error || result.error == EIO || result.error == ECONNRESET);
	} else {
		EXPECT_EQ(EACCES, result.error);
		EXPECT_EQ(0, result.channel);
	}
	EXPECT_EQ(POLLIN | POLLPRI, stream_events(self->stream, 0));
	EXPECT_EQ(-EPIPE, stream_send(self->stream, round, DIRTY));
}

/* ---- The peer's buffers ---- */

/* It does not say how many it has, or none of ours answered. */
RDMA_TEST(no_word_of_buffers)
{
	self->peers[0].mute = true;
	PEERS(1);
	EXPECT_EQ(-EPROTO, add_rdma(self->stream, rdma_args(&self->peers[0])));
}

/* Nothing is sent until there is a buffer for it, and that is no error. */
RDMA_TEST(waits_for_buffers)
{
	struct peer *peer = &self->peers[0];
	struct lmtrack_stream_wait result;

	peer->poor = true;
	CONNECT(1);
	touch(self->mem, 0, PAGES, 0);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	EXPECT_EQ(0, stream_events(self->stream, 500));
	EXPECT_EQ(0, peer->frames);
	pthread_mutex_lock(&peer->lock);
	EXPECT_TRUE(peer_grant(peer, LMTRACK_WIRE_MAGIC, PEER_RECVS, sizeof(*peer->credit)));
	pthread_mutex_unlock(&peer->lock);
	EXPECT_EQ(0, stream_wait(self->stream, 60000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(PAGES, result.zero_pages);
	EXPECT_TRUE(peer_wait(peer, 1));
}

/* What it says of them does not add up: the channel is lost, though it waits. */
#define SAYS(magic, frames, bytes) ({						\
	struct peer *peer = &self->peers[0];					\
	struct lmtrack_stream_wait result;					\
										\
	peer->poor = true;							\
	CONNECT(1);								\
	touch(self->mem, 0, PAGES, 0);						\
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));				\
	pthread_mutex_lock(&peer->lock);					\
	EXPECT_TRUE(peer_grant(peer, magic, frames, bytes));			\
	pthread_mutex_unlock(&peer->lock);					\
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));			\
	ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));		\
	EXPECT_EQ(EPROTO, result.error);					\
})
RDMA_TEST(too_many_buffers) { SAYS(LMTRACK_WIRE_MAGIC, 0xffffffff, sizeof(*peer->credit)); }
RDMA_TEST(buffers_without_magic) { SAYS(LMTRACK_WIRE_MAGIC + 1, 1, sizeof(*peer->credit)); }
RDMA_TEST(half_a_word_of_buffers) { SAYS(LMTRACK_WIRE_MAGIC, 1, sizeof(*peer->credit) - 1); }

/*
 * A peer at which a round stands still, with requests in the queue: it has fewer buffers than it
 * said. iWARP would end the connection; there it says that it has none.
 */
static void starve(struct peer *peer)
{
	peer->starved = !rdma_is_iwarp();
	peer->poor = rdma_is_iwarp();
}

RDMA_TEST(peer_dies_in_round)
{
	int32_t error;

	starve(&self->peers[0]);
	CONNECT(1);
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	for (size_t first = 0; first < PAGES; first += WINDOW) {
		uint64_t address;
		uint32_t rkey;

		ASSERT_TRUE(peer_window(&self->peers[0], first, WINDOW, &address, &rkey));
		ASSERT_EQ(0, set_window(self->stream, 0, first, address, rkey));
	}
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	/* That is no error. */
	EXPECT_EQ(0, stream_events(self->stream, 1500));
	self->count = 0;
	EXPECT_EQ(NULL, peer_end(&self->peers[0]));
	error = round_error(self->stream);
	TH_LOG("%s", strerror(-error));
	EXPECT_TRUE(error == -ECONNRESET || error == -ETIMEDOUT || error == -EACCES ||
		    error == -EIO);
	EXPECT_EQ(POLLIN | POLLPRI, stream_events(self->stream, 0));
}

/* What the dead channel took is dirty again, and TCP carries all of it. */
RDMA_TEST(tcp_in_place_of_rdma)
{
	struct lmtrack_stream_drop_channel drop = { .size = sizeof(drop) };
	struct lmtrack_stream_wait result;
	struct lmtrack_stream_rdma_wanted want;
	pthread_t thread;
	uint64_t address;
	uint32_t rkey;
	int end;

	starve(&self->peers[0]);
	CONNECT(1);
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_TRUE(peer_window(&self->peers[0], 0, WINDOW, &address, &rkey));
	ASSERT_EQ(0, set_window(self->stream, 0, 0, address, rkey));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	/* The first window is full, or nearly; it waits for the next, or for room. */
	stream_events(self->stream, 3000);
	self->count = 0;
	EXPECT_EQ(NULL, peer_end(&self->peers[0]));
	EXPECT_GT(0, round_error(self->stream));
	EXPECT_EQ(-EPIPE, stream_send(self->stream, 2, DIRTY));
	ASSERT_EQ(0, lmt_ioctl(self->stream, LMTRACK_STREAM_DROP_CHANNEL, &drop));
	EXPECT_NE(0, drop.error);
	EXPECT_LT(0, drop.pages);
	EXPECT_GE(PAGES, drop.pages);
	EXPECT_EQ(-EINVAL, set_window(self->stream, 0, WINDOW, address, rkey));
	EXPECT_EQ(-EAGAIN, wanted(self->stream, 0, &want));
	EXPECT_EQ(POLLIN, stream_events(self->stream, 0));
	end = add_tcp(self->stream, LMTRACK_CHANNEL_REPLACE);
	ASSERT_LE(0, end);
	ASSERT_EQ(0, pthread_create(&thread, NULL, drain, &end));
	EXPECT_EQ(-EOPNOTSUPP, set_window(self->stream, 0, WINDOW, address, rkey));
	ASSERT_EQ(0, stream_send(self->stream, 2, DIRTY));
	ASSERT_EQ(0, stream_wait(self->stream, 60000, &result));
	EXPECT_EQ(0, result.error);
	EXPECT_EQ(PAGES, result.data_pages);
	EXPECT_EQ(0, stream_cancel(self->stream));
	pthread_join(thread, NULL);
}

RDMA_TEST(peer_dies_while_window_is_wanted)
{
	CONNECT(1);
	touch(self->mem, 0, 1, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(POLLPRI, stream_events(self->stream, 20000));
	self->count = 0;
	EXPECT_EQ(NULL, peer_end(&self->peers[0]));
	EXPECT_EQ(-ECONNRESET, round_error(self->stream));
	EXPECT_EQ(POLLIN | POLLPRI, stream_events(self->stream, 0));
}

RDMA_TEST(cancel_while_window_is_wanted)
{
	CONNECT(CHANNELS);
	pattern(self->mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(self->fd, 0, NULL));
	ASSERT_EQ(0, stream_send(self->stream, 1, ALL));
	ASSERT_EQ(POLLPRI, stream_events(self->stream, 20000));
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(-ECANCELED, round_error(self->stream));
}

RDMA_TEST(add_cancelled)
{
	PEERS(1);
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(-EPIPE, add_rdma(self->stream, rdma_args(&self->peers[0])));
}

/* The queue is full of what the peer has no buffers for. */
static void stuck(struct __test_metadata *_metadata, int stream, int fd, unsigned char *mem,
		  struct peer *peer)
{
	uint64_t address;
	uint32_t rkey;

	pattern(mem, 0, PAGES, 1);
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	for (size_t first = 0; first < PAGES; first += WINDOW) {
		ASSERT_TRUE(peer_window(peer, first, WINDOW, &address, &rkey));
		ASSERT_EQ(0, set_window(stream, 0, first, address, rkey));
	}
	ASSERT_EQ(0, stream_send(stream, 1, ALL));
	ASSERT_EQ(0, stream_events(stream, 500));
}

RDMA_TEST(cancel_while_sending)
{
	starve(&self->peers[0]);
	CONNECT(1);
	stuck(_metadata, self->stream, self->fd, self->mem, &self->peers[0]);
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(-ECANCELED, round_error(self->stream));
}

RDMA_TEST(close_while_sending)
{
	starve(&self->peers[0]);
	CONNECT(1);
	stuck(_metadata, self->stream, self->fd, self->mem, &self->peers[0]);
	EXPECT_EQ(0, close(self->stream));
	/* Tracking ended with the last open file of the stream's, too. */
	EXPECT_EQ(0, lmt_stop(self->fd));
	EXPECT_EQ(0, lmt_start(self->fd, 0, NULL));
	/* Nobody holds pages any more: what is harvested is clean. */
	EXPECT_LE(0, lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, (uint64_t[PAGES / 64]){ 0 }));
	EXPECT_EQ(0, lmt_dirty(self->fd, 0, 0, PAGES, (uint64_t[PAGES / 64]){ 0 }));
	self->stream = -1;
}

RDMA_TEST(kill_while_sending)
{
	int ready[2], status;
	char byte;
	pid_t pid;

	/* Only the child is to have it. */
	close(self->stream);
	self->stream = -1;
	starve(&self->peers[0]);
	PEERS(1);
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	if (!pid) {
		int stream = stream_open(PEER_STREAM, 0);

		touch(self->mem, 0, PAGES, 3);
		if (stream_add_region(stream, self->fd, 0) ||
		    add_rdma(stream, rdma_args(&self->peers[0])) ||
		    lmt_start(self->fd, 0, NULL) || stream_send(stream, 1, ALL) ||
		    stream_events(stream, 20000) != POLLPRI)
			_exit(1);
		if (write(ready[1], "x", 1) == 1)
			pause();
		_exit(2);
	}
	close(ready[1]);
	EXPECT_EQ(1, read(ready[0], &byte, 1));
	kill(pid, SIGKILL);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status));
	/* The peer hears of it. */
	EXPECT_TRUE(EVENTUALLY(30, ({
		pthread_mutex_lock(&self->peers[0].lock);
		bool done = self->peers[0].done;
		pthread_mutex_unlock(&self->peers[0].lock);
		done;
	})));
}

/* A caller from before the last fields were added gets what it knows. */
RDMA_TEST(stats_of_an_older_caller)
{
	struct lmtrack_channel_stats stats;
	size_t least = offsetof(struct lmtrack_channel_stats, writes);

	CONNECT(1);
	memset(&stats, 0xee, sizeof(stats));
	memset(&stats, 0, least);
	stats.size = least;
	EXPECT_EQ(0, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
	EXPECT_EQ(0xeeeeeeeeeeeeeeeeULL, stats.writes);
	stats.size = least - 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(self->stream, LMTRACK_CHANNEL_STATS, &stats));
}

/* ---- Device and module ---- */

static long unload(void)
{
	return E(syscall(SYS_delete_module, "lmtrack_rdma", O_NONBLOCK));
}

RDMA_TEST(unload)
{
	CONNECT(1);
	EXPECT_EQ(-EWOULDBLOCK, unload());
	EXPECT_EQ(0, stream_cancel(self->stream));
	EXPECT_EQ(-EWOULDBLOCK, unload());
	EXPECT_EQ(0, close(self->stream));
	EXPECT_EQ(0, unload());

	/* It is not where modprobe would find it. */
	self->stream = stream_open(PEER_STREAM, 0);
	EXPECT_EQ(-EPROTONOSUPPORT, add_rdma(self->stream, rdma_args(&self->peers[0])));
	ASSERT_TRUE(rdma_module_load());
}

/* Its round ends with ENODEV, and its stream can be closed; 0, or where it went wrong. */
static int lose_device(int region, unsigned char *mem, struct peer *peer,
		       struct peer_memory *memory, const char *address, int ready)
{
	struct lmtrack_stream_wait result;
	int stream = stream_open(PEER_STREAM, 0);

	if (stream < 0 || !peer_start(peer, memory, 0, address) || stream_add_region(stream, region, 0) ||
	    add_rdma(stream, rdma_args(peer)))
		return 1;
	touch(mem, 0, PAGES, 1);
	if (lmt_start(region, 0, NULL) || stream_send(stream, 1, ALL) ||
	    stream_events(stream, 20000) != POLLPRI || write(ready, "x", 1) != 1)
		return 2;
	if (stream_wait(stream, 60000, &result) || result.error != ENODEV)
		return 3;
	if (stream_send(stream, 2, DIRTY) != -EPIPE || stream_cancel(stream) || close(stream))
		return 4;
	return 0;
}

/*
 * While a round waits. In a process of its own: soft-RoCE does not go as long as a process has it
 * open, and librdmacm does until it exits.
 */
RDMA_TEST(device_goes)
{
	int ready[2], status;
	FILE *command;
	char byte;
	pid_t pid;

	/* Only the child is to have it. */
	close(self->stream);
	self->stream = -1;
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	if (!pid)
		_exit(lose_device(self->fd, self->mem, &self->peers[0], &self->memory,
				  variant->address, ready[1]));
	close(ready[1]);
	EXPECT_EQ(1, read(ready[0], &byte, 1));
	command = popen("rdma link delete lmt0", "re");
	ASSERT_NE(NULL, command);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(0, pclose(command));
	ASSERT_TRUE(rdma_link_up());
}

TEST_HARNESS_MAIN
