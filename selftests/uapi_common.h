/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of single requests need beyond lmtrack_test.h: every argument at will, pins,
 * child processes, time.
 */
#ifndef UAPI_COMMON_H
#define UAPI_COMMON_H

#include <signal.h>
#include <linux/if_xdp.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "lmtrack_test.h"

/* The harness allows a test 30 seconds; the VMs may run under an emulator. */
#define TEST_SECONDS	120

/* -errno for a call that fails with -1. */
#define E(call)		({ long _ret = (long)(call); _ret == -1 ? -errno : _ret; })

static inline void pause_ms(unsigned int ms)
{
	struct timespec pause = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L };

	while (nanosleep(&pause, &pause) && errno == EINTR)
		;
}

/* Wait for a condition, at most LIMIT seconds; its last value. */
#define EVENTUALLY(limit, condition) ({						\
	double _end = lmt_seconds() + (limit);					\
	bool _met;								\
										\
	while (!(_met = (condition)) && lmt_seconds() < _end)			\
		pause_ms(10);							\
	_met;									\
})

/* What holds the module: descriptors, mappings, threads. */
static inline long long module_users(void)
{
	FILE *file = fopen("/sys/module/lmtrack/refcnt", "re");
	long long users = -1;

	if (file) {
		if (fscanf(file, "%lld", &users) != 1)
			users = -1;
		fclose(file);
	}
	return users;
}

static inline int device_open(void)
{
	return E(open("/dev/lmtrack", O_RDWR | O_CLOEXEC));
}

static inline struct lmtrack_region_create region_args(uint64_t bytes)
{
	return (struct lmtrack_region_create){
		.size = sizeof(struct lmtrack_region_create),
		.region_size = bytes,
		.node = -1,
		.name = "test",
	};
}

/* Another open file of the same region. */
static inline int region_open(int fd, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return E(open(path, flags | O_CLOEXEC));
}

static inline struct lmtrack_region_info region_info(int fd)
{
	struct lmtrack_region_info info = { .size = sizeof(info) };

	if (lmt_ioctl(fd, LMTRACK_REGION_INFO, &info))
		memset(&info, 0xff, sizeof(info));
	return info;
}

/* The bitmap as the caller made it, and what the kernel says in @dirty whatever it returns. */
static inline long dirty_get(int fd, uint32_t flags, uint64_t first, uint64_t pages,
			     void *bitmap, uint64_t *dirty)
{
	struct lmtrack_dirty_get get = {
		.size = sizeof(get), .flags = flags, .first = first, .pages = pages,
		.bitmap = (uintptr_t)bitmap, .dirty = ~0ULL,
	};
	long ret = lmt_ioctl(fd, LMTRACK_DIRTY_GET, &get);

	if (dirty)
		*dirty = get.dirty;
	return ret;
}

/* Hold back the pages in a bitmap. */
static inline long hold_set(int fd, uint32_t flags, uint64_t first, uint64_t pages,
			    const void *bitmap, uint64_t *held)
{
	struct lmtrack_hold_set set = {
		.size = sizeof(set), .flags = flags, .first = first, .pages = pages,
		.bitmap = (uintptr_t)bitmap, .held = ~0ULL,
	};
	long ret = lmt_ioctl(fd, LMTRACK_HOLD_SET, &set);

	if (held)
		*held = set.held;
	return ret;
}

/* One byte of each page. */
static inline void touch(void *mem, size_t first, size_t pages, unsigned char value)
{
	volatile unsigned char *byte = (unsigned char *)mem + first * PAGE;

	for (; pages; pages--, byte += PAGE)
		*byte = value;
}

/*
 * Pin pages as a device driver does, for writing and for as long as the returned descriptor
 * is open. The memory of an AF_XDP socket is the one thing for which every stock kernel pins
 * pages of a file, and without special hardware.
 */
static inline int pin_pages(void *mem, size_t bytes)
{
	struct xdp_umem_reg umem = {
		.addr = (uintptr_t)mem, .len = bytes, .chunk_size = PAGE,
	};
	int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	int ret;

	if (fd < 0)
		return -errno;
	ret = E(setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)));
	if (!ret)
		return fd;
	close(fd);
	return ret;
}

/* The exit status of a child, or minus the signal that killed it. */
static inline int child_status(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		return -1000;
	return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

#endif /* UAPI_COMMON_H */
