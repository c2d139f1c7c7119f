// SPDX-License-Identifier: LGPL-2.1-or-later
/* Regions: guest memory as a file, an lmtrack region or a memfd. */
#include "private.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define DEVICE "/dev/lmtrack"
#define LINK_PREFIX "/lmtrack:"

static int check_opts(struct kmig_ctx *ctx, const struct kmig_region_opts *opts)
{
	long page = sysconf(_SC_PAGESIZE);
	size_t length;

	if (!opts->bytes || opts->bytes % page || opts->bytes > LMTRACK_REGION_SIZE_MAX)
		return kmig_fail(ctx, -EINVAL, "region: size %llu: give a multiple of the page size (%ld bytes), up to %llu",
				 (unsigned long long)opts->bytes, page, LMTRACK_REGION_SIZE_MAX);
	if (opts->node < -1)
		return kmig_fail(ctx, -EINVAL, "region: NUMA node %d: give a node number, or -1 for none", opts->node);
	length = opts->name ? strlen(opts->name) : 0;
	if (!length || length >= LMTRACK_NAME_MAX)
		return kmig_fail(ctx, -EINVAL, "region: its name has %zu characters, give 1 to %d",
				 length, LMTRACK_NAME_MAX - 1);
	for (const char *c = opts->name; *c; c++)
		if (!isascii(*c) || !isprint(*c) || *c == '/')
			return kmig_fail(ctx, -EINVAL, "region: its name may hold printable characters without '/' only");
	return 0;
}

static int region_new(struct kmig_ctx *ctx, int fd, enum kmig_region_kind kind, uint64_t bytes,
		      const char *name, struct kmig_region **out)
{
	struct kmig_region *region = calloc(1, sizeof(*region));

	if (!region) {
		close(fd);
		return kmig_fail(ctx, -ENOMEM, "region %s: out of memory", name);
	}
	region->ctx = ctx;
	region->fd = fd;
	region->kind = kind;
	region->bytes = bytes;
	region->page_size = sysconf(_SC_PAGESIZE);
	snprintf(region->name, sizeof(region->name), "%s", name);
	region->discarded = calloc(kmig_region_chunks(region), KMIG_CHUNK_WORDS * sizeof(uint64_t));
	if (!region->discarded) {
		kmig_region_free(region);
		return kmig_fail(ctx, -ENOMEM, "region %s: out of memory", name);
	}
	*out = region;
	return 0;
}

static int create_lmtrack(struct kmig_ctx *ctx, int device, const struct kmig_region_opts *opts)
{
	struct lmtrack_region_create create = {
		.size = sizeof(create),
		.region_size = opts->bytes,
		.node = opts->node,
	};
	int fd;

	snprintf(create.name, sizeof(create.name), "%s", opts->name);
	fd = ioctl(device, LMTRACK_REGION_CREATE, &create);
	if (fd < 0)
		return kmig_fail(ctx, -errno, "region %s: the kernel did not create it: %s", opts->name, strerror(errno));
	return fd;
}

static int create_memfd(struct kmig_ctx *ctx, const struct kmig_region_opts *opts)
{
	int fd = memfd_create(opts->name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int err;

	/* Sealed: a shorter file would turn the receiver's stores into SIGBUS. */
	if (fd >= 0 && !ftruncate(fd, opts->bytes) &&
	    !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return fd;
	err = -errno;
	if (fd >= 0)
		close(fd);
	return kmig_fail(ctx, err, "region %s: memfd of %llu bytes: %s", opts->name,
			 (unsigned long long)opts->bytes, strerror(-err));
}

int kmig_region_create(struct kmig_ctx *ctx, const struct kmig_region_opts *given, struct kmig_region **out)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	enum kmig_region_kind kind = KMIG_REGION_LMTRACK;
	int device = -1;
	int fd, err;

	err = kmig_copy_sized(ctx, &opts, sizeof(opts), sizeof(opts), given, "region options");
	if (err)
		return err;
	err = check_opts(ctx, &opts);
	if (err)
		return err;

	switch (opts.kind) {
	case KMIG_REGION_AUTO:
	case KMIG_REGION_LMTRACK:
		device = open(DEVICE, O_RDWR | O_CLOEXEC);
		if (device >= 0)
			break;
		err = -errno;
		if (err != -ENOENT && err != -ENXIO && err != -ENODEV)
			return kmig_fail(ctx, err, "%s: %s; members of group kvm may open it", DEVICE, strerror(-err));
		if (opts.kind == KMIG_REGION_LMTRACK)
			return kmig_fail(ctx, err, "%s: %s; load the module with: modprobe lmtrack", DEVICE, strerror(-err));
		kind = KMIG_REGION_MEMFD;
		break;
	case KMIG_REGION_MEMFD:
		kind = KMIG_REGION_MEMFD;
		break;
	default:
		return kmig_fail(ctx, -EINVAL, "region %s: kind %d is not known", opts.name, opts.kind);
	}

	if (kind == KMIG_REGION_LMTRACK) {
		fd = create_lmtrack(ctx, device, &opts);
		close(device);
	} else {
		fd = create_memfd(ctx, &opts);
	}
	if (fd < 0)
		return fd;
	return region_new(ctx, fd, kind, opts.bytes, opts.name, out);
}

static int lmtrack_info(int fd, struct lmtrack_region_info *info)
{
	*info = (struct lmtrack_region_info){ .size = sizeof(*info) };
	return ioctl(fd, LMTRACK_REGION_INFO, info) < 0 ? -errno : 0;
}

int kmig_region_adopt(struct kmig_ctx *ctx, int given, struct kmig_region **out)
{
	struct lmtrack_region_info info;
	char path[40];
	struct stat st;
	int fd, err;

	/* Only regular files are opened anew: opening a device can have effects. */
	if (fstat(given, &st) < 0)
		return kmig_fail(ctx, -errno, "descriptor %d: %s", given, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return kmig_fail(ctx, -EINVAL, "descriptor %d is no memory file", given);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", given);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return kmig_fail(ctx, -errno, "descriptor %d: cannot be opened anew: %s", given, strerror(errno));

	err = lmtrack_info(fd, &info);
	if (!err)
		return region_new(ctx, fd, KMIG_REGION_LMTRACK, info.region_size, info.name, out);
	if (err == -ENOTTY && st.st_size > 0 && st.st_size % sysconf(_SC_PAGESIZE) == 0)
		return region_new(ctx, fd, KMIG_REGION_MEMFD, st.st_size, "memfd", out);
	close(fd);
	if (err == -ENOTTY)
		return kmig_fail(ctx, -EINVAL, "descriptor %d: a file of %lld bytes; guest memory is a multiple of the page size",
				 given, (long long)st.st_size);
	return kmig_fail(ctx, err, "descriptor %d: %s", given, strerror(-err));
}

/* Is descriptor @name of @pid a region? Then @id tells which, whatever number it has. */
static bool is_region_link(int dir, const char *name, struct stat *id)
{
	char target[sizeof(LINK_PREFIX)] = "";

	if (readlinkat(dir, name, target, sizeof(target) - 1) < 0)
		return false;
	return !strcmp(target, LINK_PREFIX) && !fstatat(dir, name, id, 0);
}

/* The number of the only region @pid holds. A region open under several numbers is one. */
static int only_region_of(struct kmig_ctx *ctx, pid_t pid)
{
	int found = -ENOENT;
	struct stat first, id;
	struct dirent *entry;
	char path[40];
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	dir = opendir(path);
	if (!dir)
		return kmig_fail(ctx, errno == ENOENT ? -ESRCH : -errno, "process %d: %s", pid,
				 errno == ENOENT ? "no such process" : strerror(errno));
	while ((entry = readdir(dir))) {
		if (!is_region_link(dirfd(dir), entry->d_name, &id))
			continue;
		if (found < 0) {
			found = atoi(entry->d_name);
			first = id;
		} else if (id.st_ino != first.st_ino || id.st_dev != first.st_dev) {
			found = -EMLINK;
			break;
		}
	}
	closedir(dir);
	if (found == -ENOENT)
		return kmig_fail(ctx, found, "process %d holds no lmtrack region; was its memory created with 'kmig qemu run'?", pid);
	if (found == -EMLINK)
		return kmig_fail(ctx, found, "process %d holds several lmtrack regions: name the descriptor", pid);
	return found;
}

int kmig_region_find(struct kmig_ctx *ctx, pid_t pid, int number, struct kmig_region **out)
{
	struct kmig_region *region;
	int pidfd, fd, err;

	if (pid <= 0)
		return kmig_fail(ctx, -EINVAL, "process %d: give a process number", pid);
	if (number < 0) {
		number = only_region_of(ctx, pid);
		if (number < 0)
			return number;
	}

	pidfd = syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0)
		return kmig_fail(ctx, -errno, "process %d: %s", pid, strerror(errno));
	fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
	err = -errno;
	close(pidfd);
	if (fd < 0)
		return kmig_fail(ctx, err, "process %d, descriptor %d: %s%s", pid, number, strerror(-err),
				 err == -EPERM ? "; run as root, or as its owner with permission to trace it" : "");

	err = kmig_region_adopt(ctx, fd, &region);
	close(fd);
	if (err)
		return err;
	if (region->kind != KMIG_REGION_LMTRACK) {
		kmig_region_free(region);
		return kmig_fail(ctx, -ENOENT, "process %d, descriptor %d is no lmtrack region", pid, number);
	}
	*out = region;
	return 0;
}

int kmig_region_fd(const struct kmig_region *region)
{
	return region->fd;
}

uint64_t kmig_region_bytes(const struct kmig_region *region)
{
	return region->bytes;
}

/* At a multiple of the chunk size, so that a chunk is a page table. */
static void *map_aligned(const struct kmig_region *region)
{
	uint64_t align = kmig_chunk_bytes(region);
	uint8_t *space = mmap(NULL, region->bytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t before = -(uintptr_t)space % align;
	void *map;
	int err;

	if (space == MAP_FAILED)
		return MAP_FAILED;
	map = mmap(space + before, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED,
		   region->fd, 0);
	err = errno;
	if (map == MAP_FAILED) {
		munmap(space, region->bytes + align);
	} else {
		if (before)
			munmap(space, before);
		if (align > before)
			munmap(space + before + region->bytes, align - before);
	}
	errno = err;
	return map;
}

void *kmig_region_map(struct kmig_region *region)
{
	void *map;

	if (region->map)
		return region->map;
	map = map_aligned(region);
	if (map == MAP_FAILED) {
		kmig_fail(region->ctx, -errno, "region %s: mapping %llu bytes: %s", region->name,
			  (unsigned long long)region->bytes, strerror(errno));
		return NULL;
	}
	region->map = map;
	return map;
}

uint64_t kmig_region_resident(struct kmig_region *region)
{
	struct lmtrack_region_stats stats = { .size = sizeof(stats) };
	struct stat st;

	if (region->kind == KMIG_REGION_LMTRACK && !ioctl(region->fd, LMTRACK_REGION_STATS, &stats))
		return stats.resident_pages * region->page_size;
	if (!fstat(region->fd, &st))
		return (uint64_t)st.st_blocks * 512;
	return region->bytes;
}

/* Pages that harvests have left dirty because somebody held them, all told. */
uint64_t kmig_region_held(struct kmig_region *region)
{
	struct lmtrack_region_stats stats = { .size = sizeof(stats) };

	return ioctl(region->fd, LMTRACK_REGION_STATS, &stats) ? 0 : stats.repinned_pages;
}

int kmig_region_get_info(struct kmig_region *region, struct kmig_region_info *out)
{
	struct kmig_region_info info = {
		.kind = region->kind,
		.bytes = region->bytes,
		.page_size = region->page_size,
		.node = -1,
	};
	struct lmtrack_region_stats stats = { .size = sizeof(stats) };
	struct lmtrack_region_info kernel;
	struct stat st;
	int err;

	snprintf(info.name, sizeof(info.name), "%s", region->name);
	if (region->kind == KMIG_REGION_LMTRACK) {
		err = lmtrack_info(region->fd, &kernel);
		if (!err && ioctl(region->fd, LMTRACK_REGION_STATS, &stats) < 0)
			err = -errno;
		if (err)
			return kmig_fail(region->ctx, err, "region %s: %s", region->name, strerror(-err));
		info.id = kernel.region_id;
		info.node = kernel.node;
		info.tracked = kernel.state != LMTRACK_IDLE;
		info.resident_bytes = stats.resident_pages * region->page_size;
		info.mappers = stats.mappers;
		info.write_faults = stats.write_faults;
	} else {
		if (fstat(region->fd, &st) < 0)
			return kmig_fail(region->ctx, -errno, "region %s: %s", region->name, strerror(errno));
		info.id = st.st_ino;
		info.resident_bytes = (uint64_t)st.st_blocks * 512;
	}
	return kmig_fill_sized(region->ctx, out, &info, sizeof(info), "region information");
}

/*
 * Asking mincore() first: SEEK_HOLE walks on to the first hole, which in a guest that uses its
 * memory is at the far end. But a page that is swapped out exists, and is not in core.
 */
int kmig_region_exists(const struct kmig_region *region, uint64_t chunk, uint64_t bits[KMIG_CHUNK_WORDS])
{
	uint64_t begin = chunk * kmig_chunk_bytes(region);
	uint64_t bytes = region->bytes - begin < kmig_chunk_bytes(region) ? region->bytes - begin : kmig_chunk_bytes(region);
	uint64_t pages = bytes / region->page_size;
	unsigned char core[LMTRACK_CHUNK_PAGES];
	off_t first;

	memset(bits, 0, KMIG_CHUNK_WORDS * sizeof(*bits));
	first = lseek(region->fd, begin, SEEK_DATA);
	if (first < 0 ? errno == ENXIO : (uint64_t)first >= begin + bytes)
		return 0;
	if (mincore((uint8_t *)region->map + begin, bytes, core))
		return kmig_fail(region->ctx, -errno, "region %s: looking for its pages: %s", region->name, strerror(errno));
	for (uint64_t page = 0; page < pages; page++) {
		if (!(core[page] & 1)) {
			off_t at = lseek(region->fd, begin + page * region->page_size, SEEK_DATA);
			uint64_t next = at < 0 ? pages : (at - begin) / region->page_size;

			if (at < 0 && errno != ENXIO)
				return kmig_fail(region->ctx, -errno, "region %s: looking for its pages: %s", region->name, strerror(errno));
			while (page < pages && page < next && !(core[page] & 1))
				page++;
			if (page == pages)
				break;
		}
		kmig_bit_set(bits, page);
	}
	return 0;
}

int kmig_region_punch(struct kmig_region *region, uint64_t offset, uint64_t length)
{
	if (fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0)
		return -errno;
	return 0;
}

int kmig_region_discard(struct kmig_region *region, uint64_t first_byte, uint64_t bytes)
{
	int err;

	if (first_byte % region->page_size || bytes % region->page_size || first_byte > region->bytes ||
	    bytes > region->bytes - first_byte)
		return kmig_fail(region->ctx, -EINVAL, "region %s: discarding %llu+%llu bytes: give whole pages of it", region->name,
				 (unsigned long long)first_byte, (unsigned long long)bytes);
	err = bytes ? kmig_region_punch(region, first_byte, bytes) : 0;
	if (err)
		return kmig_fail(region->ctx, err, "region %s: discarding %llu+%llu bytes: %s", region->name,
				 (unsigned long long)first_byte, (unsigned long long)bytes, strerror(-err));
	/* After it: a round that takes the bit along reads what is left. */
	for (uint64_t page = first_byte / region->page_size; page < (first_byte + bytes) / region->page_size; page++)
		__atomic_fetch_or(&region->discarded[page / 64], 1ULL << (page % 64), __ATOMIC_RELEASE);
	return 0;
}

int kmig_region_clear(struct kmig_region *region)
{
	int err = kmig_region_punch(region, 0, region->bytes);

	if (err)
		return kmig_fail(region->ctx, err, "region %s: cannot be emptied: %s", region->name, strerror(-err));
	return 0;
}

int kmig_region_try_track(struct kmig_region *region, bool allow_pinned, uint64_t *pinned_pages)
{
	struct lmtrack_track_start start = {
		.size = sizeof(start),
		.flags = allow_pinned ? LMTRACK_TRACK_ALLOW_PINNED : 0,
	};
	int err = ioctl(region->fd, LMTRACK_TRACK_START, &start) < 0 ? -errno : 0;

	if (!err)
		region->tracked = true;
	*pinned_pages = start.pinned;
	return err;
}

int kmig_region_track_failed(struct kmig_region *region, int err, uint64_t pinned_pages)
{
	if (err == -EBUSY && pinned_pages)
		return kmig_fail(region->ctx, err, "region %s: %llu pages are pinned for device I/O, whose writes are not noticed; detach the device, or allow pinned pages",
				 region->name, (unsigned long long)pinned_pages);
	if (err == -EBUSY)
		return kmig_fail(region->ctx, err, "region %s is tracked already: is another migration under way?", region->name);
	return kmig_fail(region->ctx, err, "region %s: tracking did not start: %s", region->name, strerror(-err));
}

int kmig_region_track_start(struct kmig_region *region, uint64_t *pinned_pages)
{
	uint64_t pinned;
	int err;

	if (region->kind != KMIG_REGION_LMTRACK)
		return kmig_fail(region->ctx, -EOPNOTSUPP, "region %s is a memfd: only an lmtrack region can be tracked", region->name);
	err = kmig_region_try_track(region, pinned_pages, &pinned);
	if (err)
		return kmig_region_track_failed(region, err, pinned);
	if (pinned_pages)
		*pinned_pages = pinned;
	return 0;
}

int kmig_region_track_stop(struct kmig_region *region)
{
	struct lmtrack_track_stop stop = { .size = sizeof(stop) };

	if (ioctl(region->fd, LMTRACK_TRACK_STOP, &stop) < 0)
		return kmig_fail(region->ctx, -errno, "region %s: tracking did not stop: %s", region->name, strerror(errno));
	region->tracked = false;
	return 0;
}

int kmig_region_dirty_get(struct kmig_region *region, bool clear, uint64_t first_page, uint64_t pages,
			  uint64_t *bitmap, uint64_t *dirty)
{
	struct lmtrack_dirty_get get = {
		.size = sizeof(get),
		.flags = clear ? LMTRACK_DIRTY_CLEAR : 0,
		.first = first_page,
		.pages = pages,
		.bitmap = (uintptr_t)bitmap,
	};
	int err = 0;

	if (ioctl(region->fd, LMTRACK_DIRTY_GET, &get) < 0)
		err = kmig_fail(region->ctx, -errno, "region %s: dirty pages %llu+%llu: %s", region->name,
				(unsigned long long)first_page, (unsigned long long)pages, strerror(errno));
	if (dirty)
		*dirty = get.dirty;
	return err;
}

void kmig_region_free(struct kmig_region *region)
{
	if (!region)
		return;
	if (region->map)
		munmap(region->map, region->bytes);
	close(region->fd);
	free(region->discarded);
	free(region);
}
