// SPDX-License-Identifier: GPL-2.0
/*
 * Regions as files: creation and its errors, mapping, holes, who may open them, what they are
 * charged to, and that an idle one is plain memory to everybody.
 */
#include <dirent.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <setjmp.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <linux/mempolicy.h>

#include "kselftest_harness.h"
#include "uapi_common.h"

#define NOBODY	65534

FIXTURE(region) {
	int dev;
};

FIXTURE_SETUP(region)
{
	self->dev = device_open();
	ASSERT_LE(0, self->dev);
}

FIXTURE_TEARDOWN(region)
{
	close(self->dev);
}

#define REGION_TEST(name) TEST_F_TIMEOUT(region, name, TEST_SECONDS)

static long create(int dev, const struct lmtrack_region_create *args)
{
	struct lmtrack_region_create copy = *args;
	long fd = lmt_ioctl(dev, LMTRACK_REGION_CREATE, &copy);

	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

/* ---- Creation ---- */

REGION_TEST(create_sizes)
{
	static const struct { uint64_t size; long ret; } table[] = {
		{ 0, -EINVAL },
		{ 1, -EINVAL },
		{ PAGE - 1, -EINVAL },
		{ PAGE, 0 },
		{ PAGE + 1, -EINVAL },
		{ 3 * CHUNK + PAGE, 0 },
		{ LMTRACK_REGION_SIZE_MAX, 0 },
		{ LMTRACK_REGION_SIZE_MAX + PAGE, -EINVAL },
		{ 1ULL << 63, -EINVAL },
		{ ~0ULL, -EINVAL },
		{ -PAGE, -EINVAL },
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(table); i++) {
		struct lmtrack_region_create args = region_args(table[i].size);

		EXPECT_EQ(table[i].ret, create(self->dev, &args)) {
			TH_LOG("size %#llx", (unsigned long long)table[i].size);
		}
	}
}

REGION_TEST(create_names)
{
	static const struct { const char *name; long ret; } table[] = {
		{ "", -EINVAL },
		{ "a", 0 },
		{ "vm-1:ram.0_[x]", 0 },
		{ "a/b", -EINVAL },
		{ "/", -EINVAL },
		{ "a\nb", -EINVAL },
		{ "\x7f", -EINVAL },
		{ "\x80", -EINVAL },
		{ "caf\xc3\xa9", -EINVAL },
	};
	struct lmtrack_region_create args;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(table); i++) {
		args = region_args(PAGE);
		strcpy(args.name, table[i].name);
		EXPECT_EQ(table[i].ret, create(self->dev, &args)) {
			TH_LOG("name \"%s\"", table[i].name);
		}
	}
	args = region_args(PAGE);
	memset(args.name, 'n', LMTRACK_NAME_MAX);
	EXPECT_EQ(-EINVAL, create(self->dev, &args));
	args.name[LMTRACK_NAME_MAX - 1] = 0;
	EXPECT_EQ(0, create(self->dev, &args));
}

/* What stands behind the name's end is the caller's stack, and nobody else's business. */
REGION_TEST(create_name_tail)
{
	struct lmtrack_region_create args = region_args(PAGE);
	struct lmtrack_region_info info;
	size_t i;
	int fd;

	memset(args.name, 'x', sizeof(args.name));
	strcpy(args.name, "short");
	fd = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &args);
	ASSERT_LE(0, fd);
	info = region_info(fd);
	EXPECT_STREQ("short", info.name);
	for (i = strlen("short"); i < sizeof(info.name); i++)
		EXPECT_EQ(0, info.name[i]);
}

REGION_TEST(create_nodes)
{
	static const struct { int32_t node; long ret; } table[] = {
		{ -1, 0 }, { 0, 0 },
		{ -2, -EINVAL }, { INT_MIN, -EINVAL }, { INT_MAX, -EINVAL }, { 1023, -EINVAL },
		{ 1 << 20, -EINVAL },
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(table); i++) {
		struct lmtrack_region_create args = region_args(PAGE);

		args.node = table[i].node;
		EXPECT_EQ(table[i].ret, create(self->dev, &args)) {
			TH_LOG("node %d", table[i].node);
		}
	}
}

REGION_TEST(create_reserved_and_flags)
{
	struct lmtrack_region_create args = region_args(PAGE);
	unsigned int bit;

	args.reserved = 1;
	EXPECT_EQ(-EINVAL, create(self->dev, &args));
	args.reserved = 0;
	for (bit = 0; bit < 32; bit++) {
		args.flags = 1U << bit;
		EXPECT_EQ(-EOPNOTSUPP, create(self->dev, &args));
	}
}

REGION_TEST(create_gives_close_on_exec)
{
	int fd = lmt_region(PAGE);

	ASSERT_LE(0, fd);
	EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
	EXPECT_EQ(O_RDWR, fcntl(fd, F_GETFL) & O_ACCMODE);
}

REGION_TEST(create_without_descriptors_left)
{
	struct lmtrack_region_create args = region_args(PAGE);
	struct rlimit old, none;
	long ret;

	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &old));
	none = old;
	none.rlim_cur = 0;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &none));
	ret = create(self->dev, &args);
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &old));
	EXPECT_EQ(-EMFILE, ret);
}

/* ---- Arguments of every request: size, tail, address ---- */

struct request_case {
	const char *name;
	unsigned int cmd;
	uint32_t size;
};

#define REQUEST(_cmd, _type) { #_cmd, LMTRACK_##_cmd, sizeof(struct _type) }

static const struct request_case device_requests[] = {
	REQUEST(REGION_CREATE, lmtrack_region_create),
	REQUEST(STREAM_CREATE, lmtrack_stream_create),
};

static const struct request_case region_requests[] = {
	REQUEST(REGION_INFO, lmtrack_region_info),
	REQUEST(TRACK_START, lmtrack_track_start),
	REQUEST(TRACK_STOP, lmtrack_track_stop),
	REQUEST(DIRTY_GET, lmtrack_dirty_get),
	REQUEST(REGION_STATS, lmtrack_region_stats),
};

static const struct request_case stream_requests[] = {
	REQUEST(STREAM_ADD_REGION, lmtrack_stream_add_region),
	REQUEST(STREAM_ADD_CHANNEL, lmtrack_stream_add_channel),
	REQUEST(STREAM_SEND, lmtrack_stream_send),
	REQUEST(STREAM_WAIT, lmtrack_stream_wait),
	REQUEST(STREAM_CANCEL, lmtrack_stream_cancel),
	REQUEST(STREAM_RATE_SET, lmtrack_stream_rate_set),
	REQUEST(CHANNEL_STATS, lmtrack_channel_stats),
};

/* All zero but for the size, and @extra bytes that the kernel does not know. */
static void check_sizes(struct __test_metadata *_metadata, int fd,
			const struct request_case *r)
{
	static unsigned char arg[3 * PAGE] __attribute__((aligned(PAGE)));
	uint32_t *size = (uint32_t *)arg;
	uint32_t *flags = size + 1;
	unsigned char *edge;
	uint32_t s;

	for (s = 0; s < r->size; s++) {
		memset(arg, 0, sizeof(arg));
		*size = s;
		EXPECT_EQ(-EINVAL, lmt_ioctl(fd, r->cmd, arg)) {
			TH_LOG("%s, size %u", r->name, s);
		}
	}

	memset(arg, 0, sizeof(arg));
	*size = r->size + 8;
	arg[r->size + 7] = 1;
	EXPECT_EQ(-E2BIG, lmt_ioctl(fd, r->cmd, arg)) {
		TH_LOG("%s, tail not zero", r->name);
	}
	memset(arg, 0, sizeof(arg));
	*size = PAGE + 1;
	EXPECT_EQ(-E2BIG, lmt_ioctl(fd, r->cmd, arg)) {
		TH_LOG("%s, longer than a page", r->name);
	}
	*size = ~0U;
	EXPECT_EQ(-E2BIG, lmt_ioctl(fd, r->cmd, arg)) {
		TH_LOG("%s, size ~0", r->name);
	}

	/* A flag nobody knows is refused; behind a long structure with a tail of zeroes, too. */
	memset(arg, 0, sizeof(arg));
	*size = PAGE;
	*flags = 1U << 31;
	EXPECT_EQ(-EOPNOTSUPP, lmt_ioctl(fd, r->cmd, arg)) {
		TH_LOG("%s, flag 31", r->name);
	}

	EXPECT_EQ(-EFAULT, lmt_ioctl(fd, r->cmd, NULL));
	EXPECT_EQ(-EFAULT, lmt_ioctl(fd, r->cmd, (void *)-8L));
	EXPECT_EQ(-EFAULT, lmt_ioctl(fd, r->cmd, (void *)(1UL << 63)));

	/* The size can be read, what follows cannot. */
	edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, edge);
	ASSERT_EQ(0, munmap(edge + PAGE, PAGE));
	size = (uint32_t *)(edge + PAGE - 4);
	*size = r->size;
	EXPECT_EQ(-EFAULT, lmt_ioctl(fd, r->cmd, size)) {
		TH_LOG("%s, at the edge of memory", r->name);
	}
	munmap(edge, PAGE);
}

static int stream_create(int dev)
{
	struct lmtrack_stream_create args = { .size = sizeof(args), .stream_id = 1 };

	return lmt_ioctl(dev, LMTRACK_STREAM_CREATE, &args);
}

REGION_TEST(argument_sizes)
{
	int stream = stream_create(self->dev);
	int fd = lmt_region(PAGE);
	size_t i;

	ASSERT_LE(0, stream);
	ASSERT_LE(0, fd);
	for (i = 0; i < ARRAY_SIZE(device_requests); i++)
		check_sizes(_metadata, self->dev, &device_requests[i]);
	for (i = 0; i < ARRAY_SIZE(region_requests); i++)
		check_sizes(_metadata, fd, &region_requests[i]);
	for (i = 0; i < ARRAY_SIZE(stream_requests); i++)
		check_sizes(_metadata, stream, &stream_requests[i]);
}

REGION_TEST(argument_longer_with_zero_tail)
{
	struct {
		struct lmtrack_region_create args;
		char tail[64];
	} create = { .args = region_args(PAGE) };
	struct {
		struct lmtrack_region_info args;
		char tail[64];
	} info = { };
	int fd;

	create.args.size = sizeof(create);
	fd = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &create);
	ASSERT_LE(0, fd);
	info.args.size = sizeof(info);
	ASSERT_EQ(0, lmt_ioctl(fd, LMTRACK_REGION_INFO, &info));
	EXPECT_EQ(PAGE, info.args.region_size);
	EXPECT_EQ(sizeof(info), info.args.size);
	info.tail[63] = 1;
	EXPECT_EQ(-E2BIG, lmt_ioctl(fd, LMTRACK_REGION_INFO, &info));
}

REGION_TEST(requests_on_the_wrong_object)
{
	static const struct request_case *const tables[] = {
		device_requests, region_requests, stream_requests,
	};
	static const size_t entries[] = {
		ARRAY_SIZE(device_requests), ARRAY_SIZE(region_requests),
		ARRAY_SIZE(stream_requests),
	};
	int fds[] = { self->dev, lmt_region(PAGE), stream_create(self->dev) };
	uint64_t arg[32] = { 8 };
	size_t object, table, i;

	for (object = 0; object < ARRAY_SIZE(fds); object++) {
		ASSERT_LE(0, fds[object]);
		for (table = 0; table < ARRAY_SIZE(tables); table++)
			for (i = 0; object != table && i < entries[table]; i++)
				EXPECT_EQ(-ENOTTY, lmt_ioctl(fds[object], tables[table][i].cmd,
							     arg));
		EXPECT_EQ(-ENOTTY, lmt_ioctl(fds[object], _IO(LMTRACK_IOC_TYPE, 0xff), arg));
		EXPECT_EQ(-ENOTTY, lmt_ioctl(fds[object], 0, arg));
		EXPECT_EQ(-ENOTTY, lmt_ioctl(fds[object], ~0U, arg));
	}
}

/* ---- The file ---- */

REGION_TEST(stat_is_a_regular_file)
{
	const uint64_t size = 5 * CHUNK + 3 * PAGE;
	struct stat st;
	int fd = lmt_region(size);

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, fstat(fd, &st));
	EXPECT_TRUE(S_ISREG(st.st_mode));
	EXPECT_EQ(0600, st.st_mode & 07777);
	EXPECT_EQ(size, (uint64_t)st.st_size);
	EXPECT_EQ(getuid(), st.st_uid);
	EXPECT_EQ(getgid(), st.st_gid);
	EXPECT_EQ(0, st.st_blocks);
}

REGION_TEST(reopen)
{
	int fd = lmt_region(CHUNK), again, readonly;
	unsigned char *one, *two;

	ASSERT_LE(0, fd);
	again = region_open(fd, O_RDWR);
	ASSERT_LE(0, again);
	one = lmt_map(fd, CHUNK);
	two = lmt_map(again, CHUNK);
	ASSERT_NE(MAP_FAILED, one);
	ASSERT_NE(MAP_FAILED, two);
	one[12345] = 77;
	EXPECT_EQ(77, two[12345]);
	EXPECT_EQ(region_info(fd).region_id, region_info(again).region_id);

	/* A mapping that cannot be written is one that the tracker could not protect. */
	readonly = region_open(fd, O_RDONLY);
	ASSERT_LE(0, readonly);
	EXPECT_EQ(-EACCES, E(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, readonly, 0)));
	EXPECT_EQ(-EACCES, E(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, readonly, 0)));
	EXPECT_EQ(-EINVAL, E(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, readonly, 0)));
	EXPECT_EQ(-EINVAL, E(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0)));
	EXPECT_EQ(-EINVAL, E(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, again, 0)));
	EXPECT_EQ(region_info(fd).region_id, region_info(readonly).region_id);
	/* Not readable, not mappable either way. */
	EXPECT_EQ(-EACCES, E(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED,
				  region_open(fd, O_WRONLY), 0)));
}

REGION_TEST(protection_can_change)
{
	int fd = lmt_region(CHUNK);
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = mmap(NULL, CHUNK, PROT_READ, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_EQ(0, mem[0]);
	EXPECT_EQ(0, mprotect(mem, CHUNK, PROT_READ | PROT_WRITE));
	mem[0] = 1;
	EXPECT_EQ(0, mprotect(mem, CHUNK, PROT_NONE));
	EXPECT_EQ(0, mprotect(mem, CHUNK, PROT_READ));
	EXPECT_EQ(1, mem[0]);
}

static int send_fd(int sock, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { };
	struct iovec iov = { .iov_base = "f", .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	return E(sendmsg(sock, &msg, 0));
}

static int receive_fd(int sock)
{
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	int fd;

	if (recvmsg(sock, &msg, 0) != 1 || !CMSG_FIRSTHDR(&msg))
		return -EPROTO;
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
	return fd;
}

REGION_TEST(pass_to_another_process)
{
	unsigned char *mem;
	int pair[2], fd;
	pid_t pid;

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		fd = receive_fd(pair[1]);
		mem = fd < 0 ? MAP_FAILED : lmt_map(fd, CHUNK);
		if (mem == MAP_FAILED)
			_exit(1);
		mem[CHUNK - 1] = 99;
		_exit(0);
	}
	fd = lmt_region(CHUNK);
	ASSERT_LE(0, fd);
	ASSERT_EQ(1, send_fd(pair[0], fd));
	ASSERT_EQ(0, child_status(pid));
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_EQ(99, mem[CHUNK - 1]);
}

REGION_TEST(no_resize)
{
	int fd = lmt_region(4 * PAGE);
	struct stat st;

	ASSERT_LE(0, fd);
	EXPECT_EQ(0, E(ftruncate(fd, 4 * PAGE)));
	EXPECT_EQ(-EINVAL, E(ftruncate(fd, 0)));
	EXPECT_EQ(-EINVAL, E(ftruncate(fd, 3 * PAGE)));
	EXPECT_EQ(-EINVAL, E(ftruncate(fd, 5 * PAGE)));
	EXPECT_EQ(-EINVAL, E(ftruncate(fd, 4 * PAGE - 1)));
	EXPECT_EQ(-EINVAL, region_open(fd, O_RDWR | O_TRUNC));
	ASSERT_EQ(0, fstat(fd, &st));
	EXPECT_EQ(4 * PAGE, (uint64_t)st.st_size);
}

/* A write that goes past the page tables would go past the tracker. */
REGION_TEST(no_read_and_write)
{
	int fd = lmt_region(4 * PAGE), again, file, pipes[2];
	char buf[16] = "";
	off_t offset = 0;

	ASSERT_LE(0, fd);
	again = region_open(fd, O_RDWR);
	ASSERT_LE(0, again);
	EXPECT_EQ(-EINVAL, E(read(fd, buf, sizeof(buf))));
	EXPECT_EQ(-EINVAL, E(write(fd, buf, sizeof(buf))));
	EXPECT_EQ(-EINVAL, E(read(again, buf, sizeof(buf))));
	EXPECT_EQ(-EINVAL, E(write(again, buf, sizeof(buf))));
	EXPECT_EQ(-EINVAL, E(pread(again, buf, sizeof(buf), 0)));
	EXPECT_EQ(-EINVAL, E(pwrite(again, buf, sizeof(buf), 0)));
	file = memfd_create("source", MFD_CLOEXEC);
	ASSERT_LE(0, file);
	ASSERT_EQ(sizeof(buf), write(file, buf, sizeof(buf)));
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(-EINVAL, E(sendfile(again, file, &offset, sizeof(buf))));
	ASSERT_EQ(1, write(pipes[1], "x", 1));
	EXPECT_EQ(-EINVAL, E(splice(pipes[0], NULL, again, NULL, 1, 0)));
	EXPECT_EQ(0, lmt_stats(fd).resident_pages);
}

static sigjmp_buf fault_return;

static void fault_handler(int sig)
{
	siglongjmp(fault_return, sig);
}

/* The signal that reading or writing the byte brings, or 0. */
static int access_signal(volatile unsigned char *byte, bool write)
{
	struct sigaction action = { .sa_handler = fault_handler }, old_bus, old_segv;
	int sig;

	sigaction(SIGBUS, &action, &old_bus);
	sigaction(SIGSEGV, &action, &old_segv);
	sig = sigsetjmp(fault_return, 1);
	if (!sig) {
		if (write)
			*byte = 1;
		else
			(void)*byte;
	}
	sigaction(SIGBUS, &old_bus, NULL);
	sigaction(SIGSEGV, &old_segv, NULL);
	return sig;
}

REGION_TEST(access_beyond_the_end)
{
	int fd = lmt_region(4 * PAGE);
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, 8 * PAGE);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_EQ(0, access_signal(mem + 4 * PAGE - 1, true));
	EXPECT_EQ(SIGBUS, access_signal(mem + 4 * PAGE, false));
	EXPECT_EQ(SIGBUS, access_signal(mem + 4 * PAGE, true));
	EXPECT_EQ(SIGBUS, access_signal(mem + 8 * PAGE - 1, true));
	EXPECT_EQ(1, lmt_stats(fd).resident_pages);
	/* The same while every page's first write goes through the tracker. */
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_EQ(SIGBUS, access_signal(mem + 4 * PAGE, true));
	EXPECT_EQ(0, access_signal(mem + 2 * PAGE, true));
}

REGION_TEST(link_and_maps)
{
	struct lmtrack_region_create args = region_args(PAGE);
	char path[64], link[128] = "", line[512];
	static const char want[] = "/lmtrack:guest-ram";
	bool seen = false;
	FILE *maps;
	int fd;

	strcpy(args.name, "guest-ram");
	fd = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &args);
	ASSERT_LE(0, fd);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	ASSERT_LT(0, readlink(path, link, sizeof(link) - 1));
	/* The kernel says of every file without a directory entry that it is deleted. */
	if (strcmp(link, want))
		EXPECT_STREQ("/lmtrack:guest-ram (deleted)", link);

	ASSERT_NE(MAP_FAILED, lmt_map(fd, PAGE));
	maps = fopen("/proc/self/maps", "r");
	ASSERT_NE(NULL, maps);
	while (fgets(line, sizeof(line), maps))
		seen |= strstr(line, want) && strstr(line, "rw-s");
	fclose(maps);
	EXPECT_TRUE(seen);
}

static bool fdinfo_has(int fd, const char *key, const char *value)
{
	char path[64], line[256], want[128];
	bool found = false;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	snprintf(want, sizeof(want), "lmtrack-%s:\t%s\n", key, value);
	f = fopen(path, "r");
	if (!f)
		return false;
	while (fgets(line, sizeof(line), f))
		found |= !strcmp(line, want);
	fclose(f);
	return found;
}

REGION_TEST(fdinfo)
{
	int fd = lmt_region(CHUNK);
	char id[32];
	void *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, 3, 1);
	snprintf(id, sizeof(id), "%llu", (unsigned long long)region_info(fd).region_id);
	EXPECT_TRUE(fdinfo_has(fd, "id", id));
	EXPECT_TRUE(fdinfo_has(fd, "size", "2097152"));
	EXPECT_TRUE(fdinfo_has(fd, "resident", "12288"));
	EXPECT_TRUE(fdinfo_has(fd, "state", "idle"));
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_TRUE(fdinfo_has(fd, "state", "tracked"));
}

/* ---- Holes ---- */

REGION_TEST(punch)
{
	const size_t pages = 2 * LMTRACK_CHUNK_PAGES;
	int fd = lmt_region(pages * PAGE);
	unsigned char *mem;
	size_t i;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, pages * PAGE);
	ASSERT_NE(MAP_FAILED, mem);
	memset(mem, 0xa5, pages * PAGE);
	EXPECT_EQ(pages, lmt_stats(fd).resident_pages);

	/* Across the border of two chunks. */
	ASSERT_EQ(0, lmt_punch(fd, 500 * PAGE, 24 * PAGE));
	EXPECT_EQ(pages - 24, lmt_stats(fd).resident_pages);
	for (i = 0; i < pages * PAGE; i++)
		if (mem[i] != (i / PAGE >= 500 && i / PAGE < 524 ? 0 : 0xa5))
			break;
	EXPECT_EQ(pages * PAGE, i);
	/* Looking at a hole through a mapping fills it. */
	EXPECT_EQ(pages, lmt_stats(fd).resident_pages);

	/* What begins within the region ends with it, what begins behind it is nothing. */
	EXPECT_EQ(0, lmt_punch(fd, (pages - 1) * PAGE, 100 * PAGE));
	EXPECT_EQ(pages - 1, lmt_stats(fd).resident_pages);
	EXPECT_EQ(0, lmt_punch(fd, pages * PAGE, PAGE));
	EXPECT_EQ(0, lmt_punch(fd, 1ULL << 40, CHUNK));
	EXPECT_EQ(pages - 1, lmt_stats(fd).resident_pages);
	EXPECT_EQ(0, lmt_punch(fd, 0, pages * PAGE));
	EXPECT_EQ(0, lmt_punch(fd, 0, pages * PAGE));
	EXPECT_EQ(0, lmt_stats(fd).resident_pages);
	mem[0] = 1;
	EXPECT_EQ(1, lmt_stats(fd).resident_pages);
}

REGION_TEST(punch_errors)
{
	static const struct { int mode; long offset, len; long ret; } table[] = {
		{ 3, 0, PAGE, 0 },
		{ 3, 1, PAGE, -EINVAL },
		{ 3, 0, PAGE - 1, -EINVAL },
		{ 3, 0, 1, -EINVAL },
		{ 3, PAGE / 2, PAGE / 2, -EINVAL },
		{ 3, 0, 0, -EINVAL },
		{ 3, -PAGE, PAGE, -EINVAL },
		{ 3, 0, -PAGE, -EINVAL },
		{ 3, PAGE, LONG_MAX & -PAGE, -EFBIG },
		{ 0, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_KEEP_SIZE, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_PUNCH_HOLE, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_ZERO_RANGE, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_COLLAPSE_RANGE, 0, PAGE, -EOPNOTSUPP },
		{ FALLOC_FL_INSERT_RANGE, 0, PAGE, -EOPNOTSUPP },
	};
	int fd = lmt_region(4 * PAGE), readonly;
	size_t i;

	ASSERT_LE(0, fd);
	for (i = 0; i < ARRAY_SIZE(table); i++)
		EXPECT_EQ(table[i].ret, E(fallocate(fd, table[i].mode, table[i].offset,
						    table[i].len))) {
			TH_LOG("mode %#x, %ld + %ld", table[i].mode, table[i].offset,
			       table[i].len);
		}
	readonly = region_open(fd, O_RDONLY);
	ASSERT_LE(0, readonly);
	EXPECT_EQ(-EBADF, lmt_punch(readonly, 0, PAGE));
}

REGION_TEST(seek)
{
	/* Pages 2, 3 and 6 of 8 exist. */
	static const struct { int whence; long offset, ret; } table[] = {
		{ SEEK_DATA, 0, 2 * PAGE },
		{ SEEK_DATA, 2 * PAGE - 1, 2 * PAGE },
		{ SEEK_DATA, 2 * PAGE, 2 * PAGE },
		{ SEEK_DATA, 2 * PAGE + 7, 2 * PAGE + 7 },
		{ SEEK_DATA, 4 * PAGE - 1, 4 * PAGE - 1 },
		{ SEEK_DATA, 4 * PAGE, 6 * PAGE },
		{ SEEK_DATA, 7 * PAGE - 1, 7 * PAGE - 1 },
		{ SEEK_DATA, 7 * PAGE, -ENXIO },
		{ SEEK_DATA, 8 * PAGE - 1, -ENXIO },
		{ SEEK_DATA, 8 * PAGE, -ENXIO },
		{ SEEK_DATA, LONG_MAX, -ENXIO },
		{ SEEK_DATA, -1, -ENXIO },
		{ SEEK_HOLE, 0, 0 },
		{ SEEK_HOLE, 5, 5 },
		{ SEEK_HOLE, 2 * PAGE - 1, 2 * PAGE - 1 },
		{ SEEK_HOLE, 2 * PAGE, 4 * PAGE },
		{ SEEK_HOLE, 3 * PAGE + 1, 4 * PAGE },
		{ SEEK_HOLE, 4 * PAGE + 9, 4 * PAGE + 9 },
		{ SEEK_HOLE, 6 * PAGE, 7 * PAGE },
		{ SEEK_HOLE, 8 * PAGE - 1, 8 * PAGE - 1 },
		{ SEEK_HOLE, 8 * PAGE, -ENXIO },
		{ SEEK_HOLE, -PAGE, -ENXIO },
		{ SEEK_SET, 5, 5 },
		{ SEEK_CUR, 3, 8 },
		{ SEEK_END, 0, 8 * PAGE },
		{ SEEK_END, -PAGE, 7 * PAGE },
		{ SEEK_SET, -1, -EINVAL },
		{ 99, 0, -EINVAL },
	};
	int fd = lmt_region(8 * PAGE);
	size_t i;
	void *mem;

	ASSERT_LE(0, fd);
	EXPECT_EQ(-ENXIO, E(lseek(fd, 0, SEEK_DATA)));
	EXPECT_EQ(0, E(lseek(fd, 0, SEEK_HOLE)));
	mem = lmt_map(fd, 8 * PAGE);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 2, 2, 1);
	touch(mem, 6, 1, 1);
	for (i = 0; i < ARRAY_SIZE(table); i++)
		EXPECT_EQ(table[i].ret, E(lseek(fd, table[i].offset, table[i].whence))) {
			TH_LOG("whence %d, offset %ld", table[i].whence, table[i].offset);
		}
	/* The end counts as a hole. */
	touch(mem, 7, 1, 1);
	EXPECT_EQ((long)(8 * PAGE), E(lseek(fd, 6 * PAGE, SEEK_HOLE)));
	/* Data from the first byte on. */
	touch(mem, 0, 2, 1);
	EXPECT_EQ((long)(4 * PAGE), E(lseek(fd, 0, SEEK_HOLE)));
	EXPECT_EQ(0, E(lseek(fd, 0, SEEK_DATA)));
	EXPECT_EQ((long)(4 * PAGE), E(lseek(fd, 1, SEEK_HOLE)));
}

REGION_TEST(seek_far)
{
	const uint64_t size = 1ULL << 40;
	const size_t run = 4 * 4096 + 5;
	int fd = lmt_region(size);
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_EQ(-ENXIO, E(lseek(fd, 0, SEEK_DATA)));
	mem[size - 1] = 1;
	EXPECT_EQ((long)(size - PAGE), E(lseek(fd, 0, SEEK_DATA)));
	EXPECT_EQ((long)size, E(lseek(fd, size - PAGE, SEEK_HOLE)));
	/* A long run of data, then a single page's hole in it. */
	touch(mem, 1000, run, 1);
	EXPECT_EQ((long)(1000 * PAGE), E(lseek(fd, 0, SEEK_DATA)));
	EXPECT_EQ((long)((1000 + run) * PAGE), E(lseek(fd, 1000 * PAGE, SEEK_HOLE)));
	ASSERT_EQ(0, lmt_punch(fd, 9000 * PAGE, PAGE));
	EXPECT_EQ((long)(9000 * PAGE), E(lseek(fd, 1000 * PAGE, SEEK_HOLE)));
	EXPECT_EQ((long)(9001 * PAGE), E(lseek(fd, 9000 * PAGE, SEEK_DATA)));
}

REGION_TEST(holes_cost_nothing)
{
	const uint64_t size = LMTRACK_REGION_SIZE_MAX;
	struct lmtrack_region_stats stats;
	int fd = lmt_region(size);

	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, mmap(NULL, size, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_NORESERVE, fd, 0));
	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_EQ(0, lmt_punch(fd, 0, size));
	stats = lmt_stats(fd);
	EXPECT_EQ(0, stats.resident_pages);
	EXPECT_EQ(0, stats.chunks);
	EXPECT_GE(4096, stats.kernel_bytes);
	EXPECT_EQ(0, lmt_stop(fd));
}

/* ---- Who may ---- */

static void become_nobody(void)
{
	if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) ||
	    setresuid(NOBODY, NOBODY, NOBODY))
		_exit(100);
}

REGION_TEST(ownership)
{
	int fd = lmt_region(PAGE);
	pid_t pid;

	ASSERT_LE(0, fd);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		struct stat st;
		int own;

		become_nobody();
		if (region_open(fd, O_RDWR) != -EACCES || region_open(fd, O_RDONLY) != -EACCES)
			_exit(1);
		if (device_open() != -EACCES)
			_exit(2);
		/* With the device's descriptor handed to it, it owns what it makes. */
		own = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE,
				&(struct lmtrack_region_create){
					.size = sizeof(struct lmtrack_region_create),
					.region_size = PAGE, .node = -1, .name = "own" });
		if (own < 0 || fstat(own, &st) || st.st_uid != NOBODY || st.st_gid != NOBODY)
			_exit(3);
		if (region_open(own, O_RDWR) < 0)
			_exit(4);
		_exit(0);
	}
	EXPECT_EQ(0, child_status(pid));
}

REGION_TEST(device_mode)
{
	struct stat st;

	ASSERT_EQ(0, stat("/dev/lmtrack", &st));
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(0660, st.st_mode & 07777);
}

/* ---- Memory ---- */

static int file_write(const char *dir, const char *name, const char *text)
{
	char path[256];
	int fd, ret;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = E(write(fd, text, strlen(text)));
	close(fd);
	return ret < 0 ? ret : 0;
}

/* The number after @key in a file of lines "KEY NUMBER", or the number that is the file. */
static long long file_number(const char *dir, const char *name, const char *key)
{
	char path[256], line[256];
	long long value = -1;
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "r");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (!key)
			value = atoll(line);
		else if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ' ')
			value = atoll(line + strlen(key));
	}
	fclose(f);
	return value;
}

/*
 * Pages are charged to who touches them, and the limit holds. The soft limit shows that: the
 * hard one ends in the kernel's out-of-memory report, which the test run takes for a crash.
 */
REGION_TEST(memory_cgroup)
{
	const size_t pages = 8 * MIB / PAGE;
	char root[] = "/tmp/lmtrack-cgroup-XXXXXX", group[64];
	long long before, after, high;
	int fd = lmt_region(pages * PAGE);
	int ready[2], go[2], ret;
	char byte;
	pid_t pid;

	ASSERT_LE(0, fd);
	ASSERT_NE(NULL, mkdtemp(root));
	ASSERT_EQ(0, mount("none", root, "cgroup2", 0, NULL));
	ret = file_write(root, "cgroup.subtree_control", "+memory");
	snprintf(group, sizeof(group), "%s/lmtrack-test", root);
	if (!ret)
		ret = E(mkdir(group, 0755));
	if (ret) {
		umount2(root, MNT_DETACH);
		rmdir(root);
		SKIP(return, "no memory controller in cgroup v2: %s", strerror(-ret));
	}

	ASSERT_EQ(0, pipe(ready));
	ASSERT_EQ(0, pipe(go));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		void *mem = lmt_map(fd, pages * PAGE);

		if (mem == MAP_FAILED || file_write(group, "cgroup.procs", "0"))
			_exit(1);
		if (write(ready[1], "r", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(2);
		touch(mem, 0, pages / 2, 1);
		if (write(ready[1], "r", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(3);
		touch(mem, pages / 2, 64, 1);
		_exit(0);
	}
	EXPECT_EQ(1, read(ready[0], &byte, 1));
	before = file_number(group, "memory.stat", "file");
	EXPECT_EQ(1, write(go[1], "g", 1));
	EXPECT_EQ(1, read(ready[0], &byte, 1));
	after = file_number(group, "memory.stat", "file");
	EXPECT_LE((long long)(pages / 2 * PAGE), after - before) {
		TH_LOG("file memory from %lld to %lld", before, after);
	}
	EXPECT_LE((long long)(pages / 2 * PAGE), file_number(group, "memory.current", NULL));

	high = file_number(group, "memory.events", "high");
	EXPECT_EQ(0, file_write(group, "memory.high", "4194304"));
	EXPECT_EQ(1, write(go[1], "g", 1));
	EXPECT_EQ(0, child_status(pid));
	EXPECT_LT(high, file_number(group, "memory.events", "high"));

	/* The last reference to the region gives the memory back. */
	close(fd);
	EXPECT_TRUE(EVENTUALLY(10, file_number(group, "memory.current", NULL) <
				   (long long)(pages / 4 * PAGE)));
	EXPECT_TRUE(EVENTUALLY(10, !rmdir(group)));
	file_write(root, "cgroup.subtree_control", "-memory");
	EXPECT_EQ(0, umount2(root, MNT_DETACH));
	EXPECT_EQ(0, rmdir(root));
}

REGION_TEST(reclaim_takes_nothing)
{
	const size_t pages = 3 * LMTRACK_CHUNK_PAGES;
	int fd = lmt_region(pages * PAGE);
	uint64_t *mem;
	size_t i;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, pages * PAGE);
	ASSERT_NE(MAP_FAILED, mem);
	for (i = 0; i < pages * PAGE / 8; i++)
		mem[i] = i * 0x9e3779b97f4a7c15;
	/* Only the page cache has it now. */
	ASSERT_EQ(0, madvise(mem, pages * PAGE, MADV_DONTNEED));
	ASSERT_EQ(0, file_write("/proc/sys/vm", "drop_caches", "3"));
	madvise(mem, pages * PAGE, MADV_PAGEOUT);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	ASSERT_EQ(0, file_write("/proc/sys/vm", "drop_caches", "3"));
	EXPECT_EQ(pages, lmt_stats(fd).resident_pages);
	for (i = 0; i < pages * PAGE / 8; i++)
		if (mem[i] != i * 0x9e3779b97f4a7c15)
			break;
	EXPECT_EQ(pages * PAGE / 8, i);
}

/* What VFIO, RDMA and fixed buffers need of memory. */
REGION_TEST(long_term_pins_when_idle)
{
	struct io_uring_params params = { };
	struct iovec iov = { .iov_len = 16 * PAGE };
	int fd = lmt_region(CHUNK);
	unsigned char *mem;
	int pin, ring;
	long ret;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	pin = pin_pages(mem + 8 * PAGE, 16 * PAGE);
	ASSERT_LE(0, pin);
	mem[8 * PAGE] = 3;
	EXPECT_EQ(16, lmt_stats(fd).resident_pages);
	close(pin);

	iov.iov_base = mem;
	ring = syscall(SYS_io_uring_setup, 2, &params);
	if (ring < 0)
		return;
	ret = E(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &iov, 1));
	/* Older kernels take no file's memory but that of tmpfs for fixed buffers. */
	if (ret != -EOPNOTSUPP)
		EXPECT_EQ(0, ret);
	close(ring);
}

static long node_of(void *addr)
{
	int node = -1;
	long ret = E(syscall(SYS_get_mempolicy, &node, NULL, 0, addr,
			     MPOL_F_NODE | MPOL_F_ADDR));

	return ret < 0 ? ret : node;
}

static bool node_has_memory(int node)
{
	char path[64], line[256];
	bool has = false;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo", node);
	f = fopen(path, "r");
	if (!f)
		return false;
	while (fgets(line, sizeof(line), f))
		has |= strstr(line, "MemTotal:") && atoll(strstr(line, ":") + 1) > 0;
	fclose(f);
	return has;
}

REGION_TEST(numa_placement)
{
	const size_t pages = 64;
	struct lmtrack_region_create args = region_args(pages * PAGE);
	unsigned int node, nodes = 0, i;
	unsigned char *mem;
	int fd;

	for (node = 0; node < 8; node++) {
		unsigned long mask = 1UL << node;

		if (!node_has_memory(node))
			continue;
		nodes++;
		args.node = node;
		fd = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &args);
		ASSERT_LE(0, fd);
		EXPECT_EQ((int)node, region_info(fd).node);
		mem = lmt_map(fd, pages * PAGE);
		ASSERT_NE(MAP_FAILED, mem);
		touch(mem, 0, pages, 1);
		for (i = 0; i < pages; i++)
			EXPECT_EQ(node, node_of(mem + i * PAGE));
		close(fd);

		/* Without a node of its own the region follows who touches it. */
		fd = lmt_region(pages * PAGE);
		ASSERT_LE(0, fd);
		mem = lmt_map(fd, pages * PAGE);
		ASSERT_NE(MAP_FAILED, mem);
		ASSERT_EQ(0, E(syscall(SYS_set_mempolicy, MPOL_BIND, &mask, 8 * sizeof(mask))));
		touch(mem, 0, pages, 1);
		ASSERT_EQ(0, E(syscall(SYS_set_mempolicy, MPOL_DEFAULT, NULL, 0)));
		for (i = 0; i < pages; i++)
			EXPECT_EQ(node, node_of(mem + i * PAGE));
		close(fd);
	}
	printf("# NUMA nodes with memory: %u\n", nodes);
	EXPECT_LE(1, nodes);
}

/* ---- Mappings ---- */

REGION_TEST(fork_inherits)
{
	int fd = lmt_region(CHUNK), go[2];
	unsigned char *mem;
	char byte;
	pid_t pid;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	ASSERT_EQ(0, pipe(go));
	mem[0] = 5;
	EXPECT_EQ(1, lmt_stats(fd).mappers);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		if (read(go[0], &byte, 1) != 1 || mem[0] != 5)
			_exit(1);
		mem[1] = 6;
		_exit(0);
	}
	EXPECT_EQ(2, lmt_stats(fd).mappers);
	ASSERT_EQ(1, write(go[1], "g", 1));
	EXPECT_EQ(0, child_status(pid));
	EXPECT_EQ(6, mem[1]);
	EXPECT_EQ(1, lmt_stats(fd).mappers);
}

REGION_TEST(remap_split_unmap)
{
	int fd = lmt_region(4 * CHUNK);
	unsigned char *mem, *moved;

	ASSERT_LE(0, fd);
	EXPECT_EQ(0, lmt_stats(fd).mappers);
	mem = mmap(NULL, 2 * CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, 2 * LMTRACK_CHUNK_PAGES, 9);
	EXPECT_EQ(1, lmt_stats(fd).mappers);

	moved = mremap(mem, 2 * CHUNK, 4 * CHUNK, MREMAP_MAYMOVE);
	ASSERT_NE(MAP_FAILED, moved);
	EXPECT_EQ(9, moved[2 * CHUNK - PAGE]);
	moved[4 * CHUNK - 1] = 1;
	EXPECT_EQ(1, lmt_stats(fd).mappers);

	/* In pieces, the last of which counts. */
	EXPECT_EQ(0, munmap(moved + CHUNK, CHUNK));
	EXPECT_EQ(0, mprotect(moved + 2 * CHUNK, PAGE, PROT_READ));
	EXPECT_EQ(1, lmt_stats(fd).mappers);
	EXPECT_EQ(0, munmap(moved, CHUNK));
	EXPECT_EQ(1, lmt_stats(fd).mappers);
	EXPECT_EQ(0, munmap(moved + 2 * CHUNK, 2 * CHUNK));
	EXPECT_EQ(0, lmt_stats(fd).mappers);

	mem = lmt_map(fd, 4 * CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_EQ(9, mem[CHUNK]);
	EXPECT_EQ(1, mem[4 * CHUNK - 1]);
}

/* The descriptor may go, the memory stays for who maps it. */
REGION_TEST(mapping_outlives_descriptor)
{
	int fd = lmt_region(CHUNK);
	unsigned char *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	close(fd);
	memset(mem, 0x77, CHUNK);
	EXPECT_EQ(0x77, mem[CHUNK - 1]);
	EXPECT_EQ(0, munmap(mem, CHUNK));
}

/* ---- Information ---- */

REGION_TEST(info_contents)
{
	struct lmtrack_region_create args = region_args(3 * CHUNK);
	struct lmtrack_region_info info;
	int one, two;

	strcpy(args.name, "first");
	args.node = 0;
	one = lmt_ioctl(self->dev, LMTRACK_REGION_CREATE, &args);
	two = lmt_region(PAGE);
	ASSERT_LE(0, one);
	ASSERT_LE(0, two);
	info = region_info(one);
	EXPECT_EQ(sizeof(info), info.size);
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(3 * CHUNK, info.region_size);
	EXPECT_EQ(PAGE, info.page_size);
	EXPECT_EQ(0, info.node);
	EXPECT_EQ(LMTRACK_IDLE, info.state);
	EXPECT_EQ(0, info.reserved);
	EXPECT_STREQ("first", info.name);
	EXPECT_EQ(-1, region_info(two).node);
	EXPECT_NE(0, info.region_id);
	EXPECT_LT(info.region_id, region_info(two).region_id);

	info.reserved = 1;
	EXPECT_EQ(-EINVAL, lmt_ioctl(one, LMTRACK_REGION_INFO, &info));
}

REGION_TEST(stats_contents)
{
	int fd = lmt_region(4 * CHUNK);
	struct lmtrack_region_stats stats;
	uint64_t bitmap[32];
	void *mem;

	ASSERT_LE(0, fd);
	mem = lmt_map(fd, 4 * CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	touch(mem, 0, 10, 1);
	touch(mem, 1030, 1, 1);
	stats = lmt_stats(fd);
	EXPECT_EQ(sizeof(stats), stats.size);
	EXPECT_EQ(11, stats.resident_pages);
	EXPECT_EQ(2, stats.chunks);
	EXPECT_LT(0, stats.kernel_bytes);
	EXPECT_EQ(0, stats.write_faults);
	EXPECT_EQ(0, stats.dirtied_pages);
	EXPECT_EQ(0, stats.harvests);
	EXPECT_EQ(0, stats.harvested_pages);
	EXPECT_EQ(0, stats.repinned_pages);
	EXPECT_EQ(1, stats.mappers);

	ASSERT_EQ(0, lmt_start(fd, 0, NULL));
	EXPECT_EQ(11, lmt_dirty(fd, 0, 0, 4 * LMTRACK_CHUNK_PAGES, bitmap));
	EXPECT_EQ(0, lmt_stats(fd).harvests);
	EXPECT_EQ(11, lmt_dirty(fd, LMTRACK_DIRTY_CLEAR, 0, 4 * LMTRACK_CHUNK_PAGES, bitmap));
	touch(mem, 5, 3, 2);
	touch(mem, 5, 3, 3);
	stats = lmt_stats(fd);
	EXPECT_EQ(1, stats.harvests);
	EXPECT_EQ(11, stats.harvested_pages);
	EXPECT_EQ(3, stats.dirtied_pages);
	EXPECT_EQ(3, stats.write_faults);
	EXPECT_EQ(0, stats.repinned_pages);
	EXPECT_EQ(0, lmt_stop(fd));
	/* Counters grow from the creation of the region. */
	EXPECT_EQ(1, lmt_stats(fd).harvests);
}

/* ---- The module ---- */

/* Whatever refers to its code keeps the module; who dares to ask gets EWOULDBLOCK. */
REGION_TEST(module_stays_while_used)
{
	long long users;
	unsigned char *mem;
	int fd, stream;

	users = module_users();
	fd = lmt_region(CHUNK);
	stream = stream_create(self->dev);
	ASSERT_LE(0, fd);
	ASSERT_LE(0, stream);
	mem = lmt_map(fd, CHUNK);
	ASSERT_NE(MAP_FAILED, mem);
	EXPECT_LT(users, module_users());
	close(self->dev);
	EXPECT_EQ(-EWOULDBLOCK, E(syscall(SYS_delete_module, "lmtrack", O_NONBLOCK)));
	close(stream);
	EXPECT_EQ(-EWOULDBLOCK, E(syscall(SYS_delete_module, "lmtrack", O_NONBLOCK)));
	close(fd);
	EXPECT_EQ(-EWOULDBLOCK, E(syscall(SYS_delete_module, "lmtrack", O_NONBLOCK)));
	mem[0] = 1;

	self->dev = device_open();
	ASSERT_LE(0, self->dev);
	ASSERT_EQ(0, munmap(mem, CHUNK));
	EXPECT_TRUE(EVENTUALLY(5, module_users() == users)) {
		TH_LOG("users: %lld, at first %lld", module_users(), users);
	}
}

TEST_HARNESS_MAIN
