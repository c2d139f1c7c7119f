// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=ioctl -Wl,--wrap=open -Wl,--wrap=getaddrinfo -Wl,--wrap=sched_getaffinity
/*
 * libkmig's objects against a scripted kernel: which command is expected with which argument,
 * and what it answers. No module, no root. Every refusal leaves a message.
 */
#include "kselftest_harness.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <kmig.h>

#include "../lib/digest.h"
#include "../lib/net.h"
#include "../lib/private.h"
#include "../lib/wire.h"
#include "../lib/workers.h"

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#define MIB (1u << 20)

/* ---- The script ---- */

struct line {
	unsigned int request;
	int ret;		/* or a negative errno */
	void (*answer)(void *arg);	/* may look at the argument, and fill it in */
};

static struct {
	const struct line *lines;
	unsigned int count, at;
	int open_error;		/* what opening the device fails with, 0: it works */
	bool surprised;		/* something came that is not in the script */
} script;

/* The last argument seen. */
static union {
	struct lmtrack_region_create region_create;
	struct lmtrack_stream_create stream_create;
	struct lmtrack_track_start track_start;
	struct lmtrack_dirty_get dirty_get;
	struct lmtrack_stream_add_region add_region;
	struct lmtrack_stream_add_channel add_channel;
	struct lmtrack_stream_send send;
	struct lmtrack_stream_wait wait;
	struct lmtrack_channel_stats stats;
	uint8_t bytes[256];
} seen;

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);

int __wrap_open(const char *path, int flags, ...)
{
	va_list args;
	int mode;

	va_start(args, flags);
	mode = flags & O_CREAT ? va_arg(args, int) : 0;
	va_end(args);
	if (strcmp(path, "/dev/lmtrack"))
		return __real_open(path, flags, mode);
	if (script.open_error) {
		errno = script.open_error;
		return -1;
	}
	return __real_open("/dev/null", O_RDWR | O_CLOEXEC);
}

static size_t argument_size(unsigned int request)
{
	switch (request) {
	case LMTRACK_REGION_CREATE: return sizeof(struct lmtrack_region_create);
	case LMTRACK_STREAM_CREATE: return sizeof(struct lmtrack_stream_create);
	case LMTRACK_REGION_INFO: return sizeof(struct lmtrack_region_info);
	case LMTRACK_TRACK_START: return sizeof(struct lmtrack_track_start);
	case LMTRACK_TRACK_STOP: return sizeof(struct lmtrack_track_stop);
	case LMTRACK_DIRTY_GET: return sizeof(struct lmtrack_dirty_get);
	case LMTRACK_REGION_STATS: return sizeof(struct lmtrack_region_stats);
	case LMTRACK_STREAM_ADD_REGION: return sizeof(struct lmtrack_stream_add_region);
	case LMTRACK_STREAM_ADD_CHANNEL: return sizeof(struct lmtrack_stream_add_channel);
	case LMTRACK_STREAM_SEND: return sizeof(struct lmtrack_stream_send);
	case LMTRACK_STREAM_WAIT: return sizeof(struct lmtrack_stream_wait);
	case LMTRACK_STREAM_CANCEL: return sizeof(struct lmtrack_stream_cancel);
	case LMTRACK_CHANNEL_STATS: return sizeof(struct lmtrack_channel_stats);
	}
	return 0;
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	const struct line *line;
	uint32_t size;
	va_list args;
	void *arg;

	(void)fd;
	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	memcpy(&size, arg, sizeof(size));
	if (script.at == script.count || script.lines[script.at].request != request || size != argument_size(request)) {
		script.surprised = true;
		errno = ENOTTY;
		return -1;
	}
	line = &script.lines[script.at++];
	if (line->answer)
		line->answer(arg);
	memcpy(&seen, arg, size);
	if (line->ret >= 0)
		return line->ret;
	errno = -line->ret;
	return -1;
}

#define SCRIPT(...)								\
	static const struct line lines[] = { __VA_ARGS__ };			\
	script.lines = lines;							\
	script.count = sizeof(lines) / sizeof(lines[0]);			\
	script.at = 0

#define EXPECT_SCRIPT_DONE() do {						\
	EXPECT_FALSE(script.surprised);						\
	EXPECT_EQ(script.count, script.at);					\
} while (0)

/* It fails so, and the message holds this. */
#define EXPECT_FAILS(err, call, word) do {					\
	EXPECT_EQ(err, call);							\
	EXPECT_NE(NULL, strstr(kmig_ctx_error(self->ctx), word))		\
		TH_LOG("%s", kmig_ctx_error(self->ctx));			\
} while (0)

FIXTURE(unit) {
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_stream *stream;
};

FIXTURE_SETUP(unit)
{
	memset(&script, 0, sizeof(script));
	ASSERT_EQ(0, kmig_ctx_new(&self->ctx));
	EXPECT_STREQ("", kmig_ctx_error(self->ctx));
	self->region = NULL;
	self->stream = NULL;
}

FIXTURE_TEARDOWN(unit)
{
	kmig_stream_free(self->stream);
	kmig_region_free(self->region);
	kmig_ctx_free(self->ctx);
}

/* ---- Context ---- */

static void count_log(enum kmig_log_level level, const char *text, void *data)
{
	if (level == KMIG_LOG_ERROR && *text)
		++*(int *)data;
}

TEST_F(unit, failures_are_logged)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	int errors = 0;

	kmig_ctx_set_log(self->ctx, count_log, &errors);
	EXPECT_EQ(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region));
	EXPECT_EQ(1, errors);
	kmig_ctx_set_log(self->ctx, NULL, NULL);
	EXPECT_EQ(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region));
	EXPECT_EQ(1, errors);
	kmig_ctx_free(NULL);
}

TEST_F(unit, version)
{
	EXPECT_STREQ("0.1", kmig_version());
}

TEST_F(unit, sized_structures)
{
	struct {
		struct kmig_region_opts opts;
		uint64_t later;
	} newer = { .opts = KMIG_REGION_OPTS_INIT };
	struct {
		size_t size;
		enum kmig_region_kind kind;
		uint64_t bytes;
		uint64_t canary;
	} older = { .size = offsetof(struct kmig_region_info, id), .canary = 42 };

	newer.opts.size = sizeof(newer);
	newer.opts.bytes = MIB;
	newer.opts.kind = KMIG_REGION_MEMFD;
	newer.later = 1;
	EXPECT_FAILS(-E2BIG, kmig_region_create(self->ctx, &newer.opts, &self->region), "does not know");
	newer.later = 0;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &newer.opts, &self->region));
	newer.opts.size = 8;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &newer.opts, &self->region), "INIT");
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, NULL, &self->region), "missing");
	EXPECT_EQ(0, kmig_region_get_info(self->region, (struct kmig_region_info *)&older));
	EXPECT_EQ(MIB, older.bytes);
	EXPECT_EQ(42, older.canary);
}

/* ---- Region ---- */

TEST_F(unit, region_options)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	char name[65] = { 0 };

	opts.kind = KMIG_REGION_MEMFD;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "size 0");
	opts.bytes = 4095;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "4095");
	opts.bytes = LMTRACK_REGION_SIZE_MAX + 4096;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "size");
	opts.bytes = MIB;
	opts.node = -2;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "node");
	opts.node = -1;
	opts.name = "";
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "name");
	opts.name = NULL;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "name");
	opts.name = "a/b";
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "name");
	opts.name = "a\nb";
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "name");
	memset(name, 'x', 64);
	opts.name = name;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "64");
	opts.name = "ram";
	opts.kind = 17;
	EXPECT_FAILS(-EINVAL, kmig_region_create(self->ctx, &opts, &self->region), "17");
	name[63] = '\0';
	opts.name = name;
	opts.kind = KMIG_REGION_MEMFD;
	EXPECT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
}

TEST_F(unit, region_create)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	static int fd;

	SCRIPT({ LMTRACK_REGION_CREATE, -ENOMEM, NULL });
	opts.bytes = 4 * MIB;
	opts.node = 1;
	opts.name = "guest";
	EXPECT_FAILS(-ENOMEM, kmig_region_create(self->ctx, &opts, &self->region), "guest");
	EXPECT_EQ(4 * MIB, seen.region_create.region_size);
	EXPECT_EQ(1, seen.region_create.node);
	EXPECT_EQ(0, seen.region_create.flags);
	EXPECT_STREQ("guest", seen.region_create.name);
	EXPECT_SCRIPT_DONE();

	fd = memfd_create("kernel", 0);
	struct line good[] = { { LMTRACK_REGION_CREATE, fd, NULL } };

	script.lines = good;
	script.count = 1;
	script.at = 0;
	opts.kind = KMIG_REGION_LMTRACK;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	EXPECT_EQ(fd, kmig_region_fd(self->region));
	EXPECT_EQ(4 * MIB, kmig_region_bytes(self->region));
	EXPECT_SCRIPT_DONE();
}

TEST_F(unit, region_without_a_device)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

	opts.bytes = 4 * MIB;
	opts.kind = KMIG_REGION_LMTRACK;
	script.open_error = ENOENT;
	EXPECT_FAILS(-ENOENT, kmig_region_create(self->ctx, &opts, &self->region), "modprobe lmtrack");
	/* Not allowed is not the same as not there: no silent fall-back. */
	script.open_error = EACCES;
	EXPECT_FAILS(-EACCES, kmig_region_create(self->ctx, &opts, &self->region), "kvm");
	opts.kind = KMIG_REGION_AUTO;
	EXPECT_FAILS(-EACCES, kmig_region_create(self->ctx, &opts, &self->region), "kvm");
	script.open_error = ENOENT;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	ASSERT_EQ(0, kmig_region_get_info(self->region, &info));
	EXPECT_EQ(KMIG_REGION_MEMFD, info.kind);
	EXPECT_EQ(4 * MIB, info.bytes);
	EXPECT_EQ(0, info.resident_bytes);
	EXPECT_EQ(-1, info.node);
	EXPECT_FALSE(info.tracked);
	EXPECT_EQ(-1, ftruncate(kmig_region_fd(self->region), 0));
	EXPECT_FAILS(-EOPNOTSUPP, kmig_region_track_start(self->region, NULL), "memfd");
}

TEST_F(unit, region_memory)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	uint8_t *map;

	opts.bytes = 4 * MIB;
	opts.kind = KMIG_REGION_MEMFD;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	map = kmig_region_map(self->region);
	ASSERT_NE(NULL, map);
	EXPECT_EQ(map, kmig_region_map(self->region));
	memset(map, 1, MIB);
	kmig_region_get_info(self->region, &info);
	EXPECT_EQ(MIB, info.resident_bytes);
	EXPECT_EQ(0, kmig_region_clear(self->region));
	kmig_region_get_info(self->region, &info);
	EXPECT_EQ(0, info.resident_bytes);
	EXPECT_EQ(0, map[0]);
	EXPECT_EQ(4096, info.page_size);
}

static void answer_info(void *arg)
{
	struct lmtrack_region_info *info = arg;

	info->region_size = 8 * MIB;
	info->region_id = 99;
	info->node = 1;
	info->state = LMTRACK_TRACKED;
	strcpy(info->name, "found");
}

static void answer_stats(void *arg)
{
	struct lmtrack_region_stats *stats = arg;

	stats->resident_pages = 3;
	stats->mappers = 2;
	stats->write_faults = 1;
}

TEST_F(unit, region_adopt)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	int fd = memfd_create("adopted", 0);
	int pipes[2];

	SCRIPT({ LMTRACK_REGION_INFO, 0, answer_info },
	       { LMTRACK_REGION_INFO, 0, answer_info }, { LMTRACK_REGION_STATS, 0, answer_stats });
	ASSERT_EQ(0, kmig_region_adopt(self->ctx, fd, &self->region));
	/* The file is opened anew. */
	EXPECT_NE(fd, kmig_region_fd(self->region));
	EXPECT_EQ(8 * MIB, kmig_region_bytes(self->region));
	ASSERT_EQ(0, kmig_region_get_info(self->region, &info));
	EXPECT_EQ(KMIG_REGION_LMTRACK, info.kind);
	EXPECT_EQ(99, info.id);
	EXPECT_EQ(3 * 4096, info.resident_bytes);
	EXPECT_EQ(2, info.mappers);
	EXPECT_EQ(1, info.write_faults);
	EXPECT_TRUE(info.tracked);
	EXPECT_STREQ("found", info.name);
	EXPECT_SCRIPT_DONE();

	script.lines = (struct line[]){ { LMTRACK_REGION_INFO, -ENOTTY, NULL }, { LMTRACK_REGION_INFO, -ENOTTY, NULL } };
	script.count = 2;
	script.at = 0;
	EXPECT_FAILS(-EINVAL, kmig_region_adopt(self->ctx, fd, &self->region), "multiple");
	ASSERT_EQ(0, ftruncate(fd, MIB));
	kmig_region_free(self->region);
	ASSERT_EQ(0, kmig_region_adopt(self->ctx, fd, &self->region));
	EXPECT_EQ(MIB, kmig_region_bytes(self->region));

	struct kmig_region *none;

	EXPECT_FAILS(-EBADF, kmig_region_adopt(self->ctx, 9999, &none), "9999");
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_FAILS(-EINVAL, kmig_region_adopt(self->ctx, pipes[0], &none), "no memory file");
	close(fd);
}

TEST_F(unit, region_find)
{
	EXPECT_FAILS(-EINVAL, kmig_region_find(self->ctx, 0, -1, &self->region), "process number");
	EXPECT_FAILS(-ESRCH, kmig_region_find(self->ctx, 0x7ffffffe, -1, &self->region), "no such process");
	EXPECT_FAILS(-ENOENT, kmig_region_find(self->ctx, getpid(), -1, &self->region), "holds no lmtrack region");
	EXPECT_FAILS(-EBADF, kmig_region_find(self->ctx, getpid(), 9999, &self->region), "9999");
}

TEST_F(unit, region_find_by_number)
{
	int fd = memfd_create("not a region", MFD_CLOEXEC);

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ftruncate(fd, MIB));
	SCRIPT({ LMTRACK_REGION_INFO, -ENOTTY, NULL }, { LMTRACK_REGION_INFO, -EIO, NULL },
	       { LMTRACK_REGION_INFO, 0, answer_info });
	EXPECT_FAILS(-ENOENT, kmig_region_find(self->ctx, getpid(), fd, &self->region), "is no lmtrack region");
	EXPECT_FAILS(-EIO, kmig_region_find(self->ctx, getpid(), fd, &self->region), "descriptor");
	ASSERT_EQ(0, kmig_region_find(self->ctx, getpid(), fd, &self->region));
	EXPECT_EQ(8 * MIB, kmig_region_bytes(self->region));
	EXPECT_SCRIPT_DONE();
	close(fd);
}

/* What cannot be opened for writing: a program that runs. */
TEST_F(unit, region_read_only)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	ASSERT_LE(0, fd);
	EXPECT_FAILS(-ETXTBSY, kmig_region_adopt(self->ctx, fd, &self->region), "cannot be opened anew");
	close(fd);
}

static void answer_pinned(void *arg)
{
	((struct lmtrack_track_start *)arg)->pinned = 7;
}

static void answer_dirty(void *arg)
{
	struct lmtrack_dirty_get *get = arg;

	*(uint64_t *)(uintptr_t)get->bitmap = 5;
	get->dirty = 2;
}

/* A region that is lmtrack's as far as the script says. */
static struct kmig_region *scripted_region(struct kmig_ctx *ctx)
{
	static struct line line = { LMTRACK_REGION_INFO, 0, answer_info };
	struct kmig_region *region = NULL;
	int fd = memfd_create("scripted", 0);

	script.lines = &line;
	script.count = 1;
	script.at = 0;
	kmig_region_adopt(ctx, fd, &region);
	close(fd);
	return region;
}

TEST_F(unit, region_that_does_not_tell)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;

	self->region = scripted_region(self->ctx);
	ASSERT_NE(NULL, self->region);
	SCRIPT({ LMTRACK_REGION_INFO, -EIO, NULL },
	       { LMTRACK_REGION_INFO, 0, answer_info }, { LMTRACK_REGION_STATS, -ENXIO, NULL });
	EXPECT_FAILS(-EIO, kmig_region_get_info(self->region, &info), "region found");
	EXPECT_FAILS(-ENXIO, kmig_region_get_info(self->region, &info), "region found");
	EXPECT_SCRIPT_DONE();
}

TEST_F(unit, probe_options)
{
	struct kmig_region *regions[LMTRACK_REGIONS_MAX + 1] = { 0 };
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	struct kmig_curve_point points[KMIG_CURVE_POINTS];
	unsigned int count = 7;

	EXPECT_FAILS(-EINVAL, kmig_probe(self->ctx, regions, 0, 10, points, &count), "0 regions");
	EXPECT_EQ(0, count);
	EXPECT_FAILS(-EINVAL, kmig_probe(self->ctx, regions, LMTRACK_REGIONS_MAX + 1, 10, points, &count), "65 regions");
	EXPECT_FAILS(-EINVAL, kmig_probe(self->ctx, regions, 1, 9, points, &count), "9 ms");
	EXPECT_FAILS(-EINVAL, kmig_probe(self->ctx, regions, 1, 60001, points, &count), "60001 ms");
	opts.bytes = MIB;
	opts.kind = KMIG_REGION_MEMFD;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	EXPECT_FAILS(-EOPNOTSUPP, kmig_probe(self->ctx, &self->region, 1, 10, points, &count), "is a memfd");
}

TEST_F(unit, tracking)
{
	struct kmig_curve_point points[KMIG_CURVE_POINTS];
	uint64_t pinned = 0, dirty = 0, bitmap = 0;
	unsigned int count;

	self->region = scripted_region(self->ctx);
	ASSERT_NE(NULL, self->region);
	SCRIPT({ LMTRACK_TRACK_START, -EBUSY, NULL },
	       { LMTRACK_TRACK_START, -EBUSY, answer_pinned },
	       { LMTRACK_TRACK_START, -EINTR, NULL },
	       { LMTRACK_TRACK_START, 0, answer_pinned },
	       { LMTRACK_DIRTY_GET, 0, answer_dirty },
	       { LMTRACK_DIRTY_GET, 0, answer_dirty },
	       { LMTRACK_DIRTY_GET, -EFAULT, answer_dirty },
	       { LMTRACK_TRACK_STOP, -EPERM, NULL },
	       { LMTRACK_TRACK_STOP, 0, NULL });
	EXPECT_FAILS(-EBUSY, kmig_region_track_start(self->region, NULL), "another migration");
	EXPECT_FAILS(-EBUSY, kmig_region_track_start(self->region, NULL), "7 pages are pinned");
	EXPECT_EQ(0, seen.track_start.flags);
	EXPECT_FAILS(-EINTR, kmig_region_track_start(self->region, &pinned), "tracking");
	EXPECT_EQ(0, kmig_region_track_start(self->region, &pinned));
	EXPECT_EQ(LMTRACK_TRACK_ALLOW_PINNED, seen.track_start.flags);
	EXPECT_EQ(7, pinned);
	EXPECT_EQ(0, kmig_region_dirty_get(self->region, false, 64, 128, &bitmap, &dirty));
	EXPECT_EQ(0, seen.dirty_get.flags);
	EXPECT_EQ(64, seen.dirty_get.first);
	EXPECT_EQ(128, seen.dirty_get.pages);
	EXPECT_EQ(5, bitmap);
	EXPECT_EQ(2, dirty);
	EXPECT_EQ(0, kmig_region_dirty_get(self->region, true, 0, 64, &bitmap, NULL));
	EXPECT_EQ(LMTRACK_DIRTY_CLEAR, seen.dirty_get.flags);
	dirty = 0;
	EXPECT_FAILS(-EFAULT, kmig_region_dirty_get(self->region, true, 0, 64, &bitmap, &dirty), "0+64");
	/* What was delivered before the fault is told. */
	EXPECT_EQ(2, dirty);
	/* It would take away what the harvests are to find. */
	EXPECT_FAILS(-EBUSY, kmig_probe(self->ctx, &self->region, 1, 10, points, &count), "tracked already");
	EXPECT_FAILS(-EPERM, kmig_region_track_stop(self->region), "did not stop");
	EXPECT_EQ(0, kmig_region_track_stop(self->region));
	EXPECT_SCRIPT_DONE();
}

/* ---- Stream ---- */

static void answer_channel(void *arg)
{
	((struct lmtrack_stream_add_channel *)arg)->channel = 3;
}

static void answer_wait(void *arg)
{
	struct lmtrack_stream_wait *wait = arg;

	wait->round = 2;
	wait->error = ECONNRESET;
	wait->channel = 1;
	wait->duration_ns = 10;
	wait->pages = 20;
	wait->data_pages = 15;
	wait->zero_pages = 5;
	wait->bytes = 30;
	wait->harvest_ns = 4;
	wait->send_ns = 9;
	wait->wire_ns = 7;
}

static void answer_channel_stats(void *arg)
{
	struct lmtrack_channel_stats *stats = arg;

	stats->frames = 1;
	stats->data_pages = 2;
	stats->zero_pages = 3;
	stats->zero_extents = 4;
	stats->zerocopy_bytes = 5;
	stats->copied_bytes = 6;
	stats->header_bytes = 7;
	stats->blocked_ns = 8;
}

TEST_F(unit, stream)
{
	struct kmig_stream_opts opts = KMIG_STREAM_OPTS_INIT;
	struct kmig_round_times times = KMIG_ROUND_TIMES_INIT;
	struct kmig_channel_stats stats;
	struct kmig_round round;
	static int fd;

	script.open_error = ENOENT;
	EXPECT_FAILS(-ENOENT, kmig_stream_create(self->ctx, &opts, &self->stream), "module");
	script.open_error = 0;
	opts.size--;
	EXPECT_FAILS(-EINVAL, kmig_stream_create(self->ctx, &opts, &self->stream), "stream options");
	opts.size++;
	self->region = scripted_region(self->ctx);
	ASSERT_NE(NULL, self->region);

	fd = memfd_create("stream", 0);
	struct line lines[] = {
		{ LMTRACK_STREAM_CREATE, -ENOMEM, NULL },
		{ LMTRACK_STREAM_CREATE, fd, NULL },
		{ LMTRACK_STREAM_ADD_REGION, -EEXIST, NULL },
		{ LMTRACK_STREAM_ADD_REGION, 0, NULL },
		{ LMTRACK_STREAM_ADD_CHANNEL, -ENOTCONN, NULL },
		{ LMTRACK_STREAM_ADD_CHANNEL, 0, answer_channel },
		{ LMTRACK_STREAM_SEND, -EBUSY, NULL },
		{ LMTRACK_STREAM_SEND, 0, NULL },
		{ LMTRACK_STREAM_SEND, 0, NULL },
		{ LMTRACK_STREAM_WAIT, -ETIMEDOUT, NULL },
		{ LMTRACK_STREAM_WAIT, 0, answer_wait },
		{ LMTRACK_STREAM_CANCEL, 0, NULL },
		{ LMTRACK_STREAM_CANCEL, -EIO, NULL },
		{ LMTRACK_CHANNEL_STATS, -EINVAL, NULL },
		{ LMTRACK_CHANNEL_STATS, 0, answer_channel_stats },
	};

	script.lines = lines;
	script.count = sizeof(lines) / sizeof(lines[0]);
	script.at = 0;
	opts.id = 77;
	EXPECT_FAILS(-ENOMEM, kmig_stream_create(self->ctx, &opts, &self->stream), "stream");
	opts.no_zero_detection = true;
	ASSERT_EQ(0, kmig_stream_create(self->ctx, &opts, &self->stream));
	EXPECT_EQ(77, seen.stream_create.stream_id);
	EXPECT_EQ(LMTRACK_STREAM_NO_ZERO_DETECT, seen.stream_create.flags);
	EXPECT_EQ(fd, kmig_stream_fd(self->stream));
	EXPECT_FAILS(-EEXIST, kmig_stream_add_region(self->stream, self->region, 4), "found");
	EXPECT_EQ(0, kmig_stream_add_region(self->stream, self->region, 4));
	EXPECT_EQ(4, seen.add_region.index);
	EXPECT_EQ(kmig_region_fd(self->region), seen.add_region.fd);
	EXPECT_FAILS(-ENOTCONN, kmig_stream_add_channel(self->stream, 5), "socket 5");
	EXPECT_EQ(3, kmig_stream_add_channel(self->stream, 5));
	EXPECT_EQ(5, seen.add_channel.fd);
	EXPECT_EQ(0, seen.add_channel.cpumask);
	EXPECT_FAILS(-EBUSY, kmig_stream_send(self->stream, 1, KMIG_SEND_ALL), "round 1");
	EXPECT_EQ(0, kmig_stream_send(self->stream, 1, KMIG_SEND_ALL));
	EXPECT_EQ(LMTRACK_SEND_ALL, seen.send.what);
	EXPECT_EQ(0, kmig_stream_send(self->stream, 2, KMIG_SEND_DIRTY));
	EXPECT_EQ(LMTRACK_SEND_DIRTY, seen.send.what);
	EXPECT_EQ(2, seen.send.round);
	EXPECT_FAILS(-EINVAL, kmig_stream_send(self->stream, 3, 9), "9");
	EXPECT_FAILS(-ETIMEDOUT, kmig_stream_wait(self->stream, 5, &round), "waiting");
	EXPECT_EQ(5, seen.wait.timeout_ms);
	EXPECT_EQ(0, kmig_stream_wait(self->stream, -1, &round));
	EXPECT_EQ(2, round.round);
	EXPECT_EQ(-ECONNRESET, round.error);
	EXPECT_EQ(1, round.channel);
	EXPECT_EQ(10, round.duration_ns);
	EXPECT_EQ(20, round.pages);
	EXPECT_EQ(15, round.data_pages);
	EXPECT_EQ(5, round.zero_pages);
	EXPECT_EQ(30, round.bytes);
	EXPECT_EQ(0, kmig_stream_times(self->stream, &times));
	EXPECT_EQ(sizeof(times), times.size);
	EXPECT_EQ(4, times.harvest_ns);
	EXPECT_EQ(9, times.send_ns);
	EXPECT_EQ(7, times.wire_ns);
	/* No more than the caller has room for. */
	times = (struct kmig_round_times){ .size = offsetof(struct kmig_round_times, wire_ns) };
	EXPECT_EQ(0, kmig_stream_times(self->stream, &times));
	EXPECT_EQ(9, times.send_ns);
	EXPECT_EQ(0, times.wire_ns);
	times.size = 0;
	EXPECT_FAILS(-EINVAL, kmig_stream_times(self->stream, &times), "size");
	EXPECT_EQ(0, kmig_stream_cancel(self->stream));
	EXPECT_FAILS(-EIO, kmig_stream_cancel(self->stream), "cancel");
	EXPECT_FAILS(-EINVAL, kmig_stream_channel_stats(self->stream, 8, &stats), "channel 8");
	EXPECT_EQ(0, kmig_stream_channel_stats(self->stream, 0, &stats));
	EXPECT_EQ(1, stats.frames);
	EXPECT_EQ(4, stats.zero_extents);
	EXPECT_EQ(8, stats.blocked_ns);
	EXPECT_SCRIPT_DONE();
}

/* ---- Options of the engines ---- */

static int vmm_nothing(void *data)
{
	(void)data;
	return 0;
}

static int vmm_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	(void)bytes;
	(void)count;
	(void)regions;
	(void)data;
	return 0;
}

TEST_F(unit, source_options)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = vmm_nothing, .resume = vmm_nothing };
	struct kmig_source_opts good = KMIG_SOURCE_OPTS_INIT, opts;
	struct kmig_region_opts region_opts = KMIG_REGION_OPTS_INIT;
	struct kmig_source *source;
	struct kmig_region *other;

	good.host = "127.0.0.1";
	good.secret = "sixteen bytes...";
	good.secret_len = 16;
#define BAD(field, value, word) do {								\
	opts = good;										\
	opts.field = value;									\
	EXPECT_FAILS(-EINVAL, kmig_source_new(self->ctx, &opts, &ops, NULL, &source), word);	\
} while (0)
	BAD(host, NULL, "host");
	BAD(host, "", "host");
	BAD(secret, NULL, "secret");
	BAD(secret_len, 15, "15 bytes");
	BAD(channels, 65, "65");
	BAD(downtime_ms, 0, "downtime");
	BAD(downtime_ms, 60001, "60001");
	BAD(max_rounds, 0, "rounds");
	BAD(max_rounds, 10001, "10001");
	BAD(timeout_ms, 99, "time-out");
	BAD(on_timeout, 3, "number 3");
	BAD(convergence, 0, "fraction");
	BAD(convergence, 1, "fraction");
	BAD(stun_floor, 0, "floor");
	BAD(stun_floor, INFINITY, "floor");
	BAD(max_time_ms, UINT64_MAX, "18446744073709551615 ms");
	BAD(probe_ms, 9, "probe");
	BAD(probe_ms, 60001, "60001");
	BAD(transport, KMIG_TRANSPORT_RDMA + 1, "transport");
	BAD(dscp, -2, "DSCP of -2");
	BAD(dscp, 64, "DSCP of 64, give 0 to 63");
	BAD(priority, -2, "priority of -2");
	BAD(priority, 7, "priority of 7, give 0 to 6");
	BAD(max_bandwidth, KMIG_BANDWIDTH_MIN - 1, "65535 bytes a second");
	BAD(max_bandwidth, KMIG_BANDWIDTH_MAX + 1ULL, "1000000000001 bytes a second");
	BAD(size, offsetof(struct kmig_source_opts, max_bandwidth) - 1, "source options");
	BAD(size, 8, "source options");
#undef BAD
	ops.pause = NULL;
	EXPECT_FAILS(-EINVAL, kmig_source_new(self->ctx, &good, &ops, NULL, &source), "pause");
	ops.pause = vmm_nothing;
	ops.resume = NULL;
	EXPECT_FAILS(-EINVAL, kmig_source_new(self->ctx, &good, &ops, NULL, &source), "resume");
	ops.resume = vmm_nothing;
	EXPECT_FAILS(-EINVAL, kmig_source_new(self->ctx, &good, NULL, NULL, &source), "functions");
	/* Of a program that is older than what was added, nothing behind its options is looked at. */
	opts = good;
	opts.size = offsetof(struct kmig_source_opts, max_bandwidth);
	opts.max_bandwidth = 1;
	EXPECT_EQ(0, kmig_source_new(self->ctx, &opts, &ops, NULL, &source));
	kmig_source_free(source);
	ASSERT_EQ(0, kmig_source_new(self->ctx, &good, &ops, NULL, &source));
	EXPECT_FAILS(-EINVAL, kmig_source_run(source), "no region");
	EXPECT_EQ(-EINVAL, kmig_source_set_max_bandwidth(source, KMIG_BANDWIDTH_MIN - 1));
	EXPECT_EQ(-EINVAL, kmig_source_set_max_bandwidth(source, KMIG_BANDWIDTH_MAX + 1ULL));
	EXPECT_EQ(0, kmig_source_set_max_bandwidth(source, KMIG_BANDWIDTH_MIN));
	EXPECT_EQ(0, kmig_source_set_max_bandwidth(source, 0));
	self->region = scripted_region(self->ctx);
	EXPECT_EQ(0, kmig_source_add_region(source, self->region));
	EXPECT_FAILS(-EEXIST, kmig_source_add_region(source, self->region), "already");
	region_opts.bytes = MIB;
	region_opts.kind = KMIG_REGION_MEMFD;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &region_opts, &other));
	EXPECT_FAILS(-EOPNOTSUPP, kmig_source_add_region(source, other), "memfd");
	kmig_source_free(source);
	kmig_region_free(other);
	kmig_source_free(NULL);
}

TEST_F(unit, source_regions)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = vmm_nothing, .resume = vmm_nothing };
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_region *regions[LMTRACK_REGIONS_MAX];
	struct kmig_source *source;

	opts.host = "256.0.0.1";
	opts.secret = "sixteen bytes...";
	opts.secret_len = 16;
	ASSERT_EQ(0, kmig_source_new(self->ctx, &opts, &ops, NULL, &source));
	for (unsigned int i = 0; i < LMTRACK_REGIONS_MAX; i++) {
		regions[i] = scripted_region(self->ctx);
		ASSERT_NE(NULL, regions[i]);
		ASSERT_EQ(0, kmig_source_add_region(source, regions[i]));
	}
	self->region = scripted_region(self->ctx);
	EXPECT_FAILS(-ENOSPC, kmig_source_add_region(source, self->region), "64 regions");
	/* It fails at once, and has run. */
	EXPECT_GT(0, kmig_source_run(source));
	EXPECT_FAILS(-EBUSY, kmig_source_add_region(source, self->region), "before it runs");
	kmig_source_free(source);
	for (unsigned int i = 0; i < LMTRACK_REGIONS_MAX; i++)
		kmig_region_free(regions[i]);
}

TEST_F(unit, destination_options)
{
	struct kmig_destination_ops ops = { .size = sizeof(ops), .prepare = vmm_prepare, .run = vmm_nothing };
	struct kmig_destination_opts good = KMIG_DESTINATION_OPTS_INIT, opts;
	struct kmig_destination *destination, *second;
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);

	good.port = 0;
	good.secret = "sixteen bytes...";
	good.secret_len = 16;
#define BAD(field, value, word) do {								\
	opts = good;										\
	opts.field = value;									\
	EXPECT_FAILS(-EINVAL, kmig_destination_new(self->ctx, &opts, &ops, NULL, &destination), word);	\
} while (0)
	BAD(secret, NULL, "secret");
	BAD(secret_len, 15, "15 bytes");
	BAD(timeout_ms, 99, "time-out");
	BAD(size, 8, "destination options");
#undef BAD
	opts = good;
	opts.host = "no.such.host.invalid";
	EXPECT_FAILS(-EHOSTUNREACH, kmig_destination_new(self->ctx, &opts, &ops, NULL, &destination), "no.such.host");
	opts.host = "192.0.2.1";
	EXPECT_FAILS(-EADDRNOTAVAIL, kmig_destination_new(self->ctx, &opts, &ops, NULL, &destination), "192.0.2.1");
	ops.prepare = NULL;
	EXPECT_FAILS(-EINVAL, kmig_destination_new(self->ctx, &good, &ops, NULL, &destination), "prepare");
	ops.prepare = vmm_prepare;
	ops.run = NULL;
	EXPECT_FAILS(-EINVAL, kmig_destination_new(self->ctx, &good, &ops, NULL, &destination), "run");
	ops.run = vmm_nothing;
	ASSERT_EQ(0, kmig_destination_new(self->ctx, &good, &ops, NULL, &destination));
	ASSERT_EQ(0, kmig_destination_address(destination, &address, &length));
	/* Loopback, unless told otherwise. */
	EXPECT_EQ(htonl(INADDR_LOOPBACK), ((struct sockaddr_in *)&address)->sin_addr.s_addr);
	opts = good;
	opts.port = ntohs(((struct sockaddr_in *)&address)->sin_port);
	EXPECT_FAILS(-EADDRINUSE, kmig_destination_new(self->ctx, &opts, &ops, NULL, &second), "listening");
	kmig_destination_abort(destination);
	EXPECT_FAILS(-ECANCELED, kmig_destination_run(destination), "aborted");
	EXPECT_FAILS(-EALREADY, kmig_destination_run(destination), "one migration");
	kmig_destination_free(destination);
	kmig_destination_free(NULL);
}

/* ---- Connecting ---- */

#define TWO "two.example"
static char two_ports[2][8];

int __real_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list);
int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list);

/* A host that has two addresses, which are ports of this one. */
int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **list)
{
	int err;

	if (strcmp(host, TWO))
		return __real_getaddrinfo(host, service, hints, list);
	err = __real_getaddrinfo("127.0.0.1", two_ports[0], hints, list);
	return err ? err : __real_getaddrinfo("127.0.0.1", two_ports[1], hints, &(*list)->ai_next);
}

static int listen_at(int backlog, char port[8])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	socklen_t length = sizeof(address);

	if (bind(fd, (struct sockaddr *)&address, length) || listen(fd, backlog) ||
	    getsockname(fd, (struct sockaddr *)&address, &length))
		return -1;
	snprintf(port, 8, "%u", ntohs(address.sin_port));
	return fd;
}

/* One that swallows what is sent to it must not take all the time there is. */
TEST_F(unit, connects_to_the_second_address)
{
	int silent = listen_at(0, two_ports[0]), good = listen_at(1, two_ports[1]), filler, fd;

	ASSERT_LE(0, silent);
	ASSERT_LE(0, good);
	filler = kmig_net_connect(self->ctx, "127.0.0.1", atoi(two_ports[0]), 1000, -1, NULL);
	ASSERT_LE(0, filler);
	fd = kmig_net_connect(self->ctx, TWO, 1, 1000, -1, NULL);
	EXPECT_LE(0, fd) TH_LOG("%s", kmig_ctx_error(self->ctx));
	close(fd);
	close(good);
	/* And no longer than that for both. */
	EXPECT_GT(0, kmig_net_connect(self->ctx, TWO, 1, 500, -1, NULL));
	close(filler);
	close(silent);
}

TEST_F(unit, state_names)
{
	for (int i = 0; i < KMIG_STATES; i++)
		EXPECT_STRNE("unknown", kmig_state_name(i));
	EXPECT_STREQ("unknown", kmig_state_name(KMIG_STATES));
	EXPECT_STREQ("unknown", kmig_state_name(-1));
}

/* ---- What both sides must compute alike ---- */

TEST(checksum)
{
	/* The check value of CRC-32C. */
	EXPECT_EQ(0xe3069283, kmig_crc32c("123456789", 9));
	EXPECT_EQ(0, kmig_crc32c("", 0));
}

TEST(wire_layout)
{
	EXPECT_EQ(64, sizeof(struct lmtrack_wire_frame));
	EXPECT_EQ(16, sizeof(struct lmtrack_wire_extent));
	EXPECT_EQ(32, sizeof(struct lmtrack_wire_message));
	EXPECT_EQ(64, sizeof(struct lmtrack_wire_hello));
	EXPECT_EQ(24, sizeof(struct lmtrack_wire_digest));
}

TEST_F(unit, digests)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	uint8_t *whole = calloc(1, 2 * MIB), *map;

	opts.bytes = 6 * MIB + 4096;
	opts.kind = KMIG_REGION_MEMFD;
	ASSERT_EQ(0, kmig_region_create(self->ctx, &opts, &self->region));
	map = kmig_region_map(self->region);
	/* Chunk 0 is a hole, 1 has pages here and there, 2 is full, 3 is one page. */
	for (int page = 0; page < 512; page += 3) {
		memset(whole + page * 4096, page + 1, 4096);
		memcpy(map + 2 * MIB + page * 4096, whole + page * 4096, 4096);
	}
	memset(map + 4 * MIB, 9, 2 * MIB);
	EXPECT_EQ(XXH64(whole, 2 * MIB, 0), kmig_digest_chunk(self->region, 1));
	memset(whole, 9, 2 * MIB);
	EXPECT_EQ(XXH64(whole, 2 * MIB, 0), kmig_digest_chunk(self->region, 2));
	memset(whole, 0, 2 * MIB);
	EXPECT_EQ(XXH64(whole, 2 * MIB, 0), kmig_digest_chunk(self->region, 0));
	EXPECT_EQ(XXH64(whole, 4096, 0), kmig_digest_chunk(self->region, 3));
	/* No hole was filled. */
	kmig_region_get_info(self->region, &info);
	EXPECT_EQ(171 * 4096 + 2 * MIB, info.resident_bytes);
	free(whole);
}

/* How much a socket takes whose peer does not read; @most: what it is told to, or 0. */
static uint64_t taken_by_socket(uint64_t most)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	static const uint8_t page[4096];
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), sender = socket(AF_INET, SOCK_STREAM, 0), narrow = 4096, peer;
	uint64_t bytes = 0;
	ssize_t n;

	setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &narrow, sizeof(narrow));
	if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &length) ||
	    connect(sender, (struct sockaddr *)&address, length))
		return 0;
	peer = accept(listener, NULL, NULL);
	if (most)
		kmig_net_queue_at_most(sender, most);
	while ((n = send(sender, page, sizeof(page), MSG_DONTWAIT)) > 0)
		bytes += n;
	close(peer);
	close(sender);
	close(listener);
	return bytes;
}

/* The peer's buffer is a few pages, so what is taken is what waits. */
TEST(little_waits_in_a_socket)
{
	uint64_t whole = taken_by_socket(0), few = taken_by_socket(64 << 10);

	EXPECT_GE(few, 64 << 10);
	EXPECT_LE(few, 128 << 10);
	EXPECT_GT(whole, 2 * few);
}

static struct {
	struct kmig_workers workers;
	_Atomic unsigned int done[64];
	_Atomic unsigned int nice, ordinary;	/* chunks done by threads that are nicer than we, and as nice */
} labour;

static void note_nice(void *data, uint64_t chunk)
{
	(void)data;
	labour.done[chunk]++;
	if (getpriority(PRIO_PROCESS, gettid()) > getpriority(PRIO_PROCESS, getpid()))
		labour.nice++;
	else
		labour.ordinary++;
}

static bool all_done(void)
{
	struct pollfd event = { .fd = labour.workers.event_fd, .events = POLLIN };

	while (kmig_workers_busy(&labour.workers))
		if (poll(&event, 1, 10000) != 1)
			return false;
	return true;
}

/* While the guest runs it comes first; when it stands and waits, nobody does. */
TEST(workers_are_nice_until_there_is_a_hurry)
{
	ASSERT_EQ(0, kmig_workers_start(&labour.workers, 64, note_nice, NULL, NULL));
	for (uint64_t i = 0; i < 64; i++)
		kmig_workers_add(&labour.workers, i);
	ASSERT_TRUE(all_done());
	EXPECT_EQ(64, (int)labour.nice);
	EXPECT_EQ(0, (int)labour.ordinary);
	kmig_workers_hurry(&labour.workers, true);
	for (uint64_t i = 0; i < 64; i++)
		kmig_workers_add(&labour.workers, i);
	ASSERT_TRUE(all_done());
	EXPECT_EQ(64, (int)labour.nice);
	EXPECT_EQ(64, (int)labour.ordinary);
	kmig_workers_hurry(&labour.workers, false);
	for (uint64_t i = 0; i < 64; i++)
		kmig_workers_add(&labour.workers, i);
	ASSERT_TRUE(all_done());
	EXPECT_EQ(128, (int)labour.nice);
	EXPECT_EQ(64, (int)labour.ordinary);
	for (int i = 0; i < 64; i++)
		EXPECT_EQ(3, (int)labour.done[i]);
	kmig_workers_stop(&labour.workers);
}

TEST(bitmaps)
{
	uint64_t map[3] = { 0 };

	EXPECT_EQ(130, kmig_bit_next(map, 130, 0));
	kmig_bit_set(map, 0);
	kmig_bit_set(map, 63);
	kmig_bit_set(map, 129);
	EXPECT_EQ(0, kmig_bit_next(map, 130, 0));
	EXPECT_EQ(63, kmig_bit_next(map, 130, 1));
	EXPECT_EQ(129, kmig_bit_next(map, 130, 64));
	EXPECT_EQ(129, kmig_bit_next(map, 129, 64));
	EXPECT_EQ(130, kmig_bit_next(map, 130, 130));
	kmig_bit_clear(map, 63);
	EXPECT_FALSE(kmig_bit(map, 63));
	EXPECT_EQ(129, kmig_bit_next(map, 130, 1));
}

TEST(memory_available)
{
	EXPECT_LT(MIB, kmig_memory_available());
	EXPECT_GT(1ull << 50, kmig_memory_available());
}

/* A machine of so many processors, of which every other is ours; 0: it does not say. */
static int machine_cpus;

int __wrap_sched_getaffinity(pid_t pid, size_t size, cpu_set_t *set);

int __wrap_sched_getaffinity(pid_t pid, size_t size, cpu_set_t *set)
{
	(void)pid;
	if (!machine_cpus || size * 8 < (size_t)machine_cpus) {
		errno = machine_cpus ? EINVAL : EPERM;
		return -1;
	}
	CPU_ZERO_S(size, set);
	for (int i = 0; i < machine_cpus; i += 2)
		CPU_SET_S(i, size, set);
	return 0;
}

TEST(processors)
{
	static const int there[] = { 2, 1024, 1026, 8192 };

	for (unsigned int i = 0; i < sizeof(there) / sizeof(there[0]); i++) {
		machine_cpus = there[i];
		EXPECT_EQ(machine_cpus / 2, kmig_cpus());
	}
	machine_cpus = 0;
	EXPECT_EQ(1, kmig_cpus());
}

TEST_HARNESS_MAIN
