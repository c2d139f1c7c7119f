// SPDX-License-Identifier: GPL-2.0
/*
 * Data channels that break: both engines over loopback, with a proxy between them that resets the
 * connections it is told to, lets them fall silent, keeps new ones out, and holds back what is on
 * its way. A guest that writes all the time is moved, and every byte compared.
 */
#ifndef ON_MODULE
#define SOURCE_REGION KMIG_REGION_MEMFD
#endif
#include "kselftest_harness.h"
#include "lib_pair.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#define GUEST_BYTES (24 * MIB + 5 * PAGE_BYTES)
#define CHANNELS 3
#define RELAYS 512
#define HELD_BYTES (4 * MIB)
/* An emulated machine is slow: more losses than it can send would only be a test of patience. */
#ifdef ON_MODULE
#define MIGRATIONS 4
#define LOSS_US 1500000
#else
#define MIGRATIONS 25
#define LOSS_US 120000
#endif
#define MIGRATIONS_MAX (4 * MIGRATIONS)	/* to see a channel come back */

/* ---- The proxy ---- */

enum order { PASS, RESET, SILENT, CUT };

struct relay {
	int source, destination;
	_Atomic enum order order;
	_Atomic bool over;
	_Atomic uint64_t passed;	/* bytes from the source */
	pthread_t thread;
	uint8_t *held;			/* CUT: what the source still sent */
	size_t held_bytes;
};

/* The first connection is the control connection, then come the channels in order. */
static struct proxy {
	int listener, port;
	_Atomic int *to;
	_Atomic bool stop, closed;	/* no new connection is let through */
	_Atomic bool release;		/* what was held back may go on */
	_Atomic ssize_t released;	/* bytes that the destination's socket took then */
	_Atomic unsigned int count;
	unsigned int bytes_per_ms;	/* of each connection */
	struct relay relay[RELAYS];
	pthread_t thread;
} proxy;

static void hang_up(int *fd)
{
	struct linger linger = { .l_onoff = 1 };

	if (*fd < 0)
		return;
	setsockopt(*fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	close(*fd);
	*fd = -1;
}

/* Pass on what there is; false when a side has gone. */
static bool pass(int from, int to, _Atomic uint64_t *passed, unsigned int most)
{
	uint8_t bytes[32768];
	ssize_t n = recv(from, bytes, most < sizeof(bytes) ? most : sizeof(bytes), MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN;
	if (passed)
		*passed += n;
	for (ssize_t at = 0, done; at < n; at += done) {
		done = send(to, bytes + at, n - at, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (done < 0 && errno != EAGAIN)
			return false;
		if (done < 0) {
			done = 0;
			usleep(500);
			if (proxy.stop)
				return false;
		}
	}
	return n;
}

/* What is in the pipe stays there when the source's connection breaks, and comes later. */
static void cut(struct relay *relay)
{
	ssize_t n;

	relay->held = malloc(HELD_BYTES);
	/* It comes in the middle of a frame's payload: there is more of it to come. */
	for (int i = 0; i < 100 && relay->held_bytes < HELD_BYTES; i++) {
		n = recv(relay->source, relay->held + relay->held_bytes, HELD_BYTES - relay->held_bytes, MSG_DONTWAIT);
		relay->held_bytes += n > 0 ? n : 0;
		if (n <= 0)
			usleep(1000);
	}
	hang_up(&relay->source);
	while (!proxy.release && !proxy.stop)
		usleep(1000);
	n = send(relay->destination, relay->held, relay->held_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
	proxy.released = n;
	/* The rest of it, as far as the destination takes it: it may be told by the first that it does not. */
	usleep(50000);
	if (n > 0)
		send(relay->destination, relay->held + n, relay->held_bytes - n, MSG_NOSIGNAL | MSG_DONTWAIT);
	free(relay->held);
}

static void *relay_main(void *data)
{
	struct relay *relay = data;

	while (!proxy.stop) {
		struct pollfd fds[2] = {
			{ .fd = relay->source, .events = POLLIN },
			{ .fd = relay->destination, .events = POLLIN },
		};
		unsigned int most = proxy.bytes_per_ms ? proxy.bytes_per_ms : UINT32_MAX;

		if (relay->order == RESET)
			break;
		if (relay->order == SILENT) {
			usleep(1000);
			continue;
		}
		if (relay->order == CUT) {
			cut(relay);
			break;
		}
		poll(fds, 2, 1);
		if (fds[0].revents && !pass(relay->source, relay->destination, &relay->passed, most))
			break;
		if (fds[1].revents && !pass(relay->destination, relay->source, NULL, UINT32_MAX))
			break;
		if (proxy.bytes_per_ms)
			usleep(1000);
	}
	/* An end that was orderly is passed on as one. */
	if (relay->order == PASS) {
		shutdown(relay->destination, SHUT_WR);
		shutdown(relay->source, SHUT_WR);
		usleep(1000);
		close(relay->source);
		close(relay->destination);
	} else {
		hang_up(&relay->source);
		hang_up(&relay->destination);
	}
	relay->over = true;
	return NULL;
}

static int connect_to(int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port),
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (connect(fd, (struct sockaddr *)&to, sizeof(to))) {
		close(fd);
		return -1;
	}
	return fd;
}

static void *proxy_main(void *data)
{
	(void)data;
	while (!proxy.stop) {
		struct pollfd fd = { .fd = proxy.listener, .events = POLLIN };
		struct relay *relay = &proxy.relay[proxy.count];
		int source;

		if (poll(&fd, 1, 20) != 1)
			continue;
		source = accept4(proxy.listener, NULL, NULL, SOCK_CLOEXEC);
		if (source < 0)
			continue;
		if (proxy.closed || proxy.count == RELAYS) {
			hang_up(&source);
			continue;
		}
		*relay = (struct relay){ .source = source, .destination = connect_to(*proxy.to) };
		pthread_create(&relay->thread, NULL, relay_main, relay);
		proxy.count++;
	}
	return NULL;
}

static void proxy_start(_Atomic int *to)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(at);

	proxy = (struct proxy){ .to = to };
	proxy.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bind(proxy.listener, (struct sockaddr *)&at, sizeof(at));
	listen(proxy.listener, 64);
	getsockname(proxy.listener, (struct sockaddr *)&at, &length);
	proxy.port = ntohs(at.sin_port);
	pthread_create(&proxy.thread, NULL, proxy_main, NULL);
}

static void proxy_end(void)
{
	proxy.stop = true;
	pthread_join(proxy.thread, NULL);
	for (unsigned int i = 0; i < proxy.count; i++)
		pthread_join(proxy.relay[i].thread, NULL);
	close(proxy.listener);
}

/* All connections that carry data now; those that are over are left alone. */
static void order_all(enum order order)
{
	for (unsigned int i = 1; i < proxy.count; i++)
		proxy.relay[i].order = order;
}

static unsigned int through = CHANNELS;	/* channels that begin through the proxy */

/* Until the first round is on its way: before that a loss is a failure to begin. */
static void await_first_round(void)
{
	while (!proxy.stop && (proxy.count <= through || proxy.relay[1].passed < 64 * 1024))
		usleep(200);
}

/* ---- A migration through it ---- */

/* A moment more, in which the hook is called: on a thread of its own. */
#define AT_FIRST_ROUND POINTS

FIXTURE(channels) {
	struct world *world;
	struct side source, destination;
	_Atomic int to;
	uint8_t *ram;
	pthread_t thread, chaos, first_round;
};

FIXTURE_SETUP(channels)
{
}

FIXTURE_TEARDOWN(channels)
{
}

static void begin(FIXTURE_DATA(channels) *self, unsigned int bytes_per_ms)
{
	self->world = new_world();
	side_init(&self->source, self->world, true, GUEST_BYTES);
	side_init(&self->destination, self->world, false, GUEST_BYTES);
	self->ram = kmig_region_map(self->source.region);
	for (uint64_t at = 0; at < GUEST_BYTES; at += 8)
		*(uint64_t *)(self->ram + at) = at * 0x9e3779b97f4a7c15 + 1;
	kmig_region_map(self->destination.region);
	self->source.guest = &self->world->guest;
	self->source.channels = CHANNELS;
	self->source.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	self->source.max_rounds = 8;
	self->to = 0;
	proxy_start(&self->to);
	proxy.bytes_per_ms = bytes_per_ms;
}

static uint16_t *around_to;	/* where to write the destination's own port */

static void *first_round_main(void *data)
{
	struct side *side = data;

	await_first_round();
	if (side->hook)
		side->hook(side, AT_FIRST_ROUND);
	return NULL;
}

static void move(FIXTURE_DATA(channels) *self)
{
	guest_start(&self->world->guest, self->ram, -1, GUEST_BYTES, 4 * MIB, 100);
	pthread_create(&self->thread, NULL, destination_main, &self->destination);
	while (!self->world->port)
		usleep(1000);
	self->to = self->world->port;
	if (around_to)
		*around_to = self->to;
	self->world->port = proxy.port;
	pthread_create(&self->first_round, NULL, first_round_main, &self->source);
	source_main(&self->source);
	pthread_join(self->thread, NULL);
	guest_end(&self->world->guest);
	proxy_end();
	pthread_join(self->first_round, NULL);
}

static void end(FIXTURE_DATA(channels) *self)
{
	side_end(&self->source);
	side_end(&self->destination);
	munmap(self->world, sizeof(*self->world));
}

#define EXPECT_MOVED() do {									\
	ASSERT_EQ(0, self->world->source_result) TH_LOG("%s", self->source.error);		\
	ASSERT_EQ(0, self->world->destination_result) TH_LOG("%s", self->destination.error);	\
	EXPECT_FALSE(self->world->source_runs);							\
	EXPECT_TRUE(self->world->destination_runs);						\
	EXPECT_TRUE(self->destination.state_right);						\
	EXPECT_EQ(0, memcmp(self->ram, kmig_region_map(self->destination.region), GUEST_BYTES));	\
} while (0)

#ifdef ON_MODULE
#define SKIP_WITHOUT_TRACKER() do {								\
	if (access("/dev/lmtrack", F_OK))							\
		SKIP(return, "no /dev/lmtrack");						\
} while (0)
#else
#define SKIP_WITHOUT_TRACKER() do {								\
	struct kmig_region *_region;								\
	struct kmig_ctx *_ctx;									\
	struct kmig_region_opts _opts = KMIG_REGION_OPTS_INIT;					\
	int _err;										\
												\
	_opts.bytes = MIB;									\
	_opts.kind = KMIG_REGION_MEMFD;								\
	ASSERT_EQ(0, kmig_ctx_new(&_ctx));							\
	ASSERT_EQ(0, kmig_region_create(_ctx, &_opts, &_region));				\
	_err = can_track(_ctx, _region);							\
	kmig_region_free(_region);								\
	kmig_ctx_free(_ctx);									\
	if (_err == -EOPNOTSUPP)								\
		SKIP(return, "this kernel has no PAGEMAP_SCAN");				\
} while (0)

static int can_track(struct kmig_ctx *ctx, struct kmig_region *region)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = on_pause, .resume = on_resume };
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;
	int err;

	opts.host = "127.0.0.1";
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.tracker = KMIG_TRACKER_PAGEMAP;
	if (!kmig_region_map(region))
		return -ENOMEM;
	err = kmig_source_new(ctx, &opts, &ops, NULL, &source);
	if (err)
		return err;
	err = kmig_source_add_region(source, region);
	kmig_source_free(source);
	return err;
}
#endif

/* ---- One of three ---- */

static _Atomic bool chaos_ends;

/* Any channel, at any time. */
static void *chaos_main(void *data)
{
	unsigned int seed = (uintptr_t)data;

	await_first_round();
	while (!chaos_ends) {
		unsigned int n = proxy.count;

		usleep(rand_r(&seed) % LOSS_US);
		if (n > CHANNELS)
			proxy.relay[1 + rand_r(&seed) % (n - 1)].order = RESET;
	}
	return NULL;
}

TEST_F_TIMEOUT(channels, reset_at_random, 300)
{
	unsigned int lost = 0, rejoined = 0;

	SKIP_WITHOUT_TRACKER();
	for (unsigned int i = 0; i < MIGRATIONS || ((!rejoined || lost <= MIGRATIONS / 3) && i < MIGRATIONS_MAX); i++) {
		begin(self, 32768);
		chaos_ends = false;
		pthread_create(&self->chaos, NULL, chaos_main, (void *)(uintptr_t)(i + 1));
		move(self);
		chaos_ends = true;
		pthread_join(self->chaos, NULL);
		EXPECT_MOVED();
		EXPECT_LE(self->source.report.channels_rejoined, self->source.report.channels_lost);
		lost += self->source.report.channels_lost;
		rejoined += self->source.report.channels_rejoined;
		end(self);
	}
	TH_LOG("%u channels lost, %u came back", lost, rejoined);
	EXPECT_LT(MIGRATIONS / 3, lost);
	EXPECT_LT(0, rejoined);
}

static int blackout_at;
static bool blackout_done;

/* In the blackout, with the last round on its way. */
static void reset_in_blackout(struct side *side, int at)
{
	(void)side;
	if (at != blackout_at || blackout_done)
		return;
	blackout_done = true;
	/* So long that something of the round has left. */
	usleep(3000);
	proxy.relay[2].order = RESET;
}

TEST_F_TIMEOUT(channels, reset_in_the_blackout, 120)
{
	static const int at[] = { AT_PAUSE, AT_SAVE, KMIG_STATE_CHECK };
	unsigned int lost = 0;

	SKIP_WITHOUT_TRACKER();
	for (unsigned int i = 0; i < 15; i++) {
		begin(self, 32768);
		blackout_at = at[i % 3];
		blackout_done = false;
		self->source.hook = reset_in_blackout;
		move(self);
		EXPECT_TRUE(blackout_done);
		EXPECT_MOVED();
		/* In the check they are not needed any more. On a busy machine it comes to that sooner. */
		EXPECT_GE(blackout_at != KMIG_STATE_CHECK, self->source.report.channels_lost);
		lost += self->source.report.channels_lost;
		end(self);
	}
	EXPECT_LT(0, lost);
}

static void silence(struct side *side, int at)
{
	(void)side;
	if (at == AT_FIRST_ROUND)
		proxy.relay[3].order = SILENT;
}

/* No reset comes, and everything that was sent on it was acknowledged. */
TEST_F_TIMEOUT(channels, silent, 60)
{
	SKIP_WITHOUT_TRACKER();
	begin(self, 32768);
	self->source.timeout_ms = self->destination.timeout_ms = 1000;
	self->source.hook = silence;
	move(self);
	EXPECT_MOVED();
	EXPECT_LE(1, self->source.report.channels_lost);
	end(self);
}

/* ---- Another path ---- */

static struct kmig_path around[] = { { .remote = NULL }, { .remote = "127.0.0.1" } };

/* The source's connections to the destination that do not go through the proxy. */
static void shut_down_direct(int port)
{
	for (int fd = 3; fd < 1024; fd++) {
		struct sockaddr_in peer = { 0 };
		socklen_t length = sizeof(peer);
		bool proxied = getpeername(fd, (struct sockaddr *)&peer, &length) || ntohs(peer.sin_port) != port;

		for (unsigned int i = 0; i < proxy.count && !proxied; i++)
			proxied = proxy.relay[i].destination == fd;
		if (!proxied)
			shutdown(fd, SHUT_RDWR);
	}
}

/*
 * All are lost at once, and whoever connects through the proxy is hung up on: from here on that is
 * no way to the destination.
 */
static void path_dies(struct side *side, int at)
{
	(void)side;
	if (at != AT_FIRST_ROUND)
		return;
	proxy.closed = true;
	order_all(RESET);
	shut_down_direct(*proxy.to);
}

TEST_F_TIMEOUT(channels, path_dies, 60)
{
	SKIP_WITHOUT_TRACKER();
	begin(self, 4096);
	self->source.paths = around;
	self->source.path_count = 2;
	self->source.hook = path_dies;
	around_to = &around[1].port;
	through = 2;
	move(self);
	around_to = NULL;
	through = CHANNELS;
	EXPECT_MOVED();
	EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
	EXPECT_LE(1, self->source.report.channels_rejoined);
	/* The control connection, channels 0 and 2: nothing that came later went that way. */
	EXPECT_EQ(3, proxy.count);
	end(self);
}

/* ---- All of them ---- */

static int gone_at;
static unsigned int gone_ms;
static _Atomic bool ran_meanwhile, was_gone;
static struct world *gone_world;

static void *come_back(void *data)
{
	uint64_t writes;

	(void)data;
	usleep(gone_ms * 500);
	writes = gone_world->guest.writes;
	usleep(gone_ms * 500);
	ran_meanwhile = gone_world->guest.writes > writes;
	proxy.closed = false;
	return NULL;
}

static pthread_t gone_thread;

static void lose_all(struct side *side, int at)
{
	if (at != gone_at || was_gone)
		return;
	was_gone = true;
	gone_world = side->world;
	proxy.closed = true;
	usleep(2000);
	order_all(RESET);
	if (gone_ms)
		pthread_create(&gone_thread, NULL, come_back, NULL);
}

TEST_F_TIMEOUT(channels, all_lost_and_back, 120)
{
	static const int at[] = { AT_FIRST_ROUND, KMIG_STATE_ITERATION, AT_PAUSE, AT_SAVE };

	SKIP_WITHOUT_TRACKER();
	gone_ms = 600 * lmt_slower();
	for (unsigned int i = 0; i < 8; i++) {
		gone_at = at[i % 4];
		was_gone = ran_meanwhile = false;
		begin(self, 32768);
		self->source.hook = lose_all;
		move(self);
		ASSERT_TRUE(was_gone);
		pthread_join(gone_thread, NULL);
		EXPECT_TRUE(ran_meanwhile) TH_LOG("%d", gone_at);
		EXPECT_MOVED();
		EXPECT_EQ(CHANNELS, self->source.report.channels_lost);
		EXPECT_LE(1, self->source.report.channels_rejoined);
		end(self);
	}
}

TEST_F_TIMEOUT(channels, all_lost_for_good, 60)
{
	static const int at[] = { AT_FIRST_ROUND, AT_SAVE };

	SKIP_WITHOUT_TRACKER();
	gone_ms = 0;
	for (unsigned int i = 0; i < 2; i++) {
		gone_at = at[i];
		was_gone = false;
		begin(self, 32768);
		self->source.channel_wait_ms = 500;
		self->source.hook = lose_all;
		move(self);
		EXPECT_EQ(-ENOTCONN, self->world->source_result) TH_LOG("%s", self->source.error);
		EXPECT_NE(NULL, strstr(self->source.error, "none has come back")) TH_LOG("%s", self->source.error);
		EXPECT_EQ(-ENOTCONN, self->world->destination_result) TH_LOG("%s", self->destination.error);
		EXPECT_TRUE(self->world->source_runs);
		EXPECT_FALSE(self->world->destination_runs);
		EXPECT_TRUE(self->world->discarded);
		end(self);
	}
}

/* ---- The late write ---- */

static void *cut_main(void *data)
{
	struct relay *relay = &proxy.relay[1];

	(void)data;
	/* In the middle of the payload of its first frames. */
	while (relay->passed < MIB)
		usleep(200);
	relay->order = CUT;
	return NULL;
}

static void release_at_pause(struct side *side, int at)
{
	(void)side;
	if (at != AT_PAUSE)
		return;
	proxy.release = true;
	usleep(100000);
}

/*
 * What a lost channel carried is still on its way when the pages have long been sent again over
 * others, and the rest of a frame at that, whose header was taken. It must not land.
 */
TEST_F_TIMEOUT(channels, late_write, 60)
{
	SKIP_WITHOUT_TRACKER();
	begin(self, 32768);
	self->source.hook = release_at_pause;
	pthread_create(&self->chaos, NULL, cut_main, NULL);
	move(self);
	pthread_join(self->chaos, NULL);
	EXPECT_MOVED();
	EXPECT_EQ(1, self->source.report.channels_lost);
	end(self);
}

TEST_HARNESS_MAIN
