// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The tracker without a module: userfaultfd protects the pages of the VMM's own mappings
 * against writing, and lifts that by itself at the first write (WP_ASYNC); PAGEMAP_SCAN tells
 * from which pages it was lifted, and protects them again.
 *
 * What a page table entry says, and what is made of it:
 *
 *   present or marker, protected	clean
 *   present, not protected		dirty
 *   nothing				not known: dirty, if the page exists
 *
 * The last is what a page looks like before it was first protected; and when the kernel took a
 * written one out of the page table (swap, MADV_DONTNEED, the split of a huge page), which not
 * every kernel tells. So nothing has to be protected at the start: all that exists is dirty
 * until the first round comes by, and memory that was never touched gets no page tables.
 *
 * A page is protected (and the TLBs are flushed) before it is read. What a write to it did
 * before is in what is read; one that comes later makes it dirty.
 *
 * A hole punched into the file leaves no trace in a protected entry. It is found because the
 * page does not exist any more, and the destination has it. A page that is touched again in
 * between, by reading, is missed; kmig_region_discard() is for that.
 *
 * Writes that do not go through the process's mapping are not seen: those of other processes,
 * write() to the file, devices that were given the page before. Another mapping in this
 * process is refused at the start, pages mapped by others are when they are first sent. A
 * child has no use for the guest's memory: fork does not hand the mapping on meanwhile.
 */
#include "sender.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

/* Kernel headers before 6.7 do not know these. */
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef PAGEMAP_SCAN
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)

struct page_region {
	__u64 start, end, categories;
};

struct pm_scan_arg {
	__u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
	__u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif

#define PAGEMAP_PRESENT (1ULL << 63)
#define PAGEMAP_EXCLUSIVE (1ULL << 56)	/* nobody else maps the page */

#define RUNS_MAX 4			/* more are protected together */

struct pagemap {
	struct kmig_tracker tracker;
	int uffd, scan_fd;
	unsigned int registered;		/* regions */
};

static struct pagemap *pagemap_of(const struct kmig_tracker *tracker)
{
	return (struct pagemap *)tracker;
}

/* ---- What the machine can ---- */

static int open_uffd(struct kmig_ctx *ctx)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};
	/* Nothing is ever handed to us to resolve, so the right to hold up the kernel is not needed. */
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	int err;

	if (fd < 0 && errno == ENOSYS)
		return kmig_fail(ctx, -EOPNOTSUPP, "tracker pagemap: this kernel has no userfaultfd");
	if (fd < 0)
		return kmig_fail(ctx, -errno, "tracker pagemap: userfaultfd: %s; a sandbox (seccomp) may forbid it", strerror(errno));
	if (!ioctl(fd, UFFDIO_API, &api))
		return fd;
	err = errno;
	close(fd);
	if (err == EINVAL)
		return kmig_fail(ctx, -EOPNOTSUPP, "tracker pagemap: this kernel's userfaultfd has no asynchronous write protection: it takes Linux 6.7 or newer");
	return kmig_fail(ctx, -err, "tracker pagemap: userfaultfd: %s", strerror(err));
}

int kmig_tracker_pagemap_accepts(const struct kmig_region *region)
{
	struct kmig_ctx *ctx = region->ctx;
	struct statfs fs;
	int fd;

	if (region->kind != KMIG_REGION_MEMFD)
		return kmig_fail(ctx, -EOPNOTSUPP, "region %s is no memfd: the tracker pagemap takes only these", region->name);
	if (!region->map)
		return kmig_fail(ctx, -EOPNOTSUPP, "region %s is a memfd that kmig_region_map() has not mapped: the tracker pagemap sees writes through that mapping only. From outside the VMM only an lmtrack region can be migrated",
				 region->name);
	if (fstatfs(region->fd, &fs) || fs.f_type != TMPFS_MAGIC)
		return kmig_fail(ctx, -EOPNOTSUPP, "region %s is a file that is not in plain shared memory: the tracker pagemap cannot watch it",
				 region->name);
	fd = open_uffd(ctx);
	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

/* A writable mapping of the region beside the one that is watched. */
static int check_mappings(const struct kmig_region *region)
{
	uintptr_t map = (uintptr_t)region->map;
	unsigned long begin, end, inode, major, minor;
	struct stat st;
	char line[512], mode[5];
	bool other = false;
	FILE *maps;

	maps = fopen("/proc/self/maps", "re");
	if (!maps || fstat(region->fd, &st)) {
		if (maps)
			fclose(maps);
		return kmig_fail(region->ctx, -errno, "/proc/self/maps: %s", strerror(errno));
	}
	while (!other && fgets(line, sizeof(line), maps))
		other = sscanf(line, "%lx-%lx %4s %*x %lx:%lx %lu", &begin, &end, mode, &major, &minor, &inode) == 6 &&
			inode == st.st_ino && makedev(major, minor) == st.st_dev && mode[1] == 'w' && mode[3] == 's' &&
			(begin < map || end > map + region->bytes);
	fclose(maps);
	if (other)
		return kmig_fail(region->ctx, -EBUSY, "region %s is mapped a second time at %#lx: writes there would not be noticed; use the mapping of kmig_region_map() only",
				 region->name, begin);
	return 0;
}

/* ---- Start and stop ---- */

static int pagemap_start(struct kmig_tracker *tracker)
{
	const struct kmig_tracker_config *config = &tracker->config;
	struct pagemap *pagemap = pagemap_of(tracker);
	int err = 0;

	pagemap->uffd = open_uffd(config->ctx);
	if (pagemap->uffd < 0)
		return pagemap->uffd;
	pagemap->scan_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap->scan_fd < 0)
		return kmig_fail(config->ctx, -errno, "tracker pagemap: /proc/self/pagemap: %s", strerror(errno));
	for (unsigned int i = 0; i < config->count && !err; i++) {
		struct kmig_region *region = config->regions[i];
		struct uffdio_register reg = {
			.range = { .start = (uintptr_t)region->map, .len = region->bytes },
			.mode = UFFDIO_REGISTER_MODE_WP,
		};

		err = check_mappings(region);
		if (err)
			break;
		if (ioctl(pagemap->uffd, UFFDIO_REGISTER, &reg)) {
			err = kmig_fail(config->ctx, -errno, "region %s: userfaultfd does not watch it: %s%s", region->name, strerror(errno),
					errno == EBUSY ? "; is another migration under way?" : "");
			break;
		}
		pagemap->registered++;
		madvise(region->map, region->bytes, MADV_DONTFORK);
	}
	return err;
}

static void pagemap_free(struct kmig_tracker *tracker)
{
	struct pagemap *pagemap = pagemap_of(tracker);

	kmig_sender_free(tracker);
	for (unsigned int i = 0; i < pagemap->registered; i++) {
		struct kmig_region *region = tracker->config.regions[i];
		struct uffdio_range range = { .start = (uintptr_t)region->map, .len = region->bytes };

		madvise(region->map, region->bytes, MADV_DOFORK);
		/* Lifts the protection of what still has it. */
		ioctl(pagemap->uffd, UFFDIO_UNREGISTER, &range);
	}
	if (pagemap->scan_fd >= 0)
		close(pagemap->scan_fd);
	if (pagemap->uffd >= 0)
		close(pagemap->uffd);
	free(pagemap);
}

/* ---- Harvest ---- */

/* What the page table says of a chunk. */
struct entries {
	uint64_t present[KMIG_CHUNK_WORDS];	/* the page exists */
	uint64_t clean[KMIG_CHUNK_WORDS];	/* it is protected */
};

static unsigned int chunk_pages(const struct kmig_region *region, uint64_t chunk)
{
	uint64_t left = kmig_region_pages(region) - chunk * LMTRACK_CHUNK_PAGES;

	return left < LMTRACK_CHUNK_PAGES ? left : LMTRACK_CHUNK_PAGES;
}

static uint64_t page_address(const struct kmig_region *region, uint64_t chunk, unsigned int page)
{
	return (uintptr_t)region->map + chunk * kmig_chunk_bytes(region) + (uint64_t)page * region->page_size;
}

static int scan_failed(const struct kmig_region *region)
{
	return kmig_fail(region->ctx, -errno, "region %s: PAGEMAP_SCAN: %s%s", region->name, strerror(errno),
			 errno == EPERM ? "; was its mapping moved or replaced?" : "");
}

static int look(struct pagemap *pagemap, const struct kmig_region *region, uint64_t chunk, struct entries *entries)
{
	struct page_region found[LMTRACK_CHUNK_PAGES];
	uint64_t begin = page_address(region, chunk, 0);
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = PM_SCAN_CHECK_WPASYNC,
		.start = begin,
		.end = begin + (uint64_t)chunk_pages(region, chunk) * region->page_size,
		.vec = (uintptr_t)found,
		.vec_len = LMTRACK_CHUNK_PAGES,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_WRITTEN,
	};
	int n = ioctl(pagemap->scan_fd, PAGEMAP_SCAN, &arg);

	if (n < 0)
		return scan_failed(region);
	memset(entries, 0, sizeof(*entries));
	for (int i = 0; i < n; i++) {
		for (uint64_t at = found[i].start; at < found[i].end; at += region->page_size) {
			unsigned int page = (at - begin) / region->page_size;

			if (found[i].categories & PAGE_IS_PRESENT)
				kmig_bit_set(entries->present, page);
			if (!(found[i].categories & PAGE_IS_WRITTEN))
				kmig_bit_set(entries->clean, page);
		}
	}
	return 0;
}

/* Protect the pages of a run, whatever their entries are. */
static int protect(struct pagemap *pagemap, const struct kmig_region *region, uint64_t chunk, unsigned int from,
		   unsigned int to)
{
	struct uffdio_writeprotect wp = {
		.range = {
			.start = page_address(region, chunk, from),
			.len = (uint64_t)(to - from) * region->page_size,
		},
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	if (ioctl(pagemap->uffd, UFFDIO_WRITEPROTECT, &wp))
		return kmig_fail(region->ctx, -errno, "region %s: protecting its pages: %s", region->name, strerror(errno));
	return 0;
}

/* What is to be taken of a chunk; nothing is changed. */
static int find(struct pagemap *pagemap, struct kmig_harvest *harvest, struct entries *entries)
{
	const struct kmig_region *region = pagemap->tracker.config.regions[harvest->region];
	unsigned int pages = chunk_pages(region, harvest->chunk);
	uint64_t dirty[KMIG_CHUNK_WORDS];
	int err;

	err = look(pagemap, region, harvest->chunk, entries);
	if (err)
		return err;
	memset(harvest->exists, 0, sizeof(harvest->exists));
	/* Where there is no entry, or only its marker, the file has to be asked. */
	if (kmig_bit_next_clear(entries->present, pages, 0) < pages)
		err = kmig_region_exists(region, harvest->chunk, harvest->exists);
	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++) {
		harvest->exists[i] |= entries->present[i];
		dirty[i] = ~entries->clean[i];
	}
	kmig_harvest_select(&pagemap->tracker, harvest, dirty);
	return err;
}

/* Protect what is taken and exists, run by run. */
static int protect_runs(struct pagemap *pagemap, const struct kmig_region *region, uint64_t chunk, const uint64_t *bits)
{
	int err = 0;

	for (uint64_t from = kmig_bit_next(bits, LMTRACK_CHUNK_PAGES, 0), to; from < LMTRACK_CHUNK_PAGES && !err;
	     from = kmig_bit_next(bits, LMTRACK_CHUNK_PAGES, to)) {
		to = kmig_bit_next_clear(bits, LMTRACK_CHUNK_PAGES, from);
		err = protect(pagemap, region, chunk, from, to);
	}
	return err;
}

/*
 * Many runs: protect all that is not, between the first and the last, in one call, which costs
 * one flush of the TLBs. What was written since we looked is taken, too.
 */
static int protect_span(struct pagemap *pagemap, const struct kmig_region *region, uint64_t from, uint64_t to,
			struct kmig_harvest *harvest)
{
	uint64_t chunk = harvest->chunk;
	struct page_region found[LMTRACK_CHUNK_PAGES];
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = page_address(region, chunk, from),
		.end = page_address(region, chunk, to),
		.vec = (uintptr_t)found,
		.vec_len = LMTRACK_CHUNK_PAGES,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	uint64_t more[KMIG_CHUNK_WORDS] = { 0 };
	bool came = false;
	int n, err;

	n = ioctl(pagemap->scan_fd, PAGEMAP_SCAN, &arg);
	if (n < 0)
		return scan_failed(region);
	for (int i = 0; i < n; i++)
		for (uint64_t at = found[i].start; at < found[i].end; at += region->page_size)
			kmig_bit_set(more, (at - page_address(region, chunk, 0)) / region->page_size);
	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++)
		came = came || more[i] & ~harvest->take[i];
	if (!came)
		return 0;
	err = kmig_region_exists(region, chunk, harvest->exists);
	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++)
		harvest->take[i] |= more[i] & harvest->exists[i];
	return err;
}

/* Pages that others map as well are written by them, or may be. */
static int check_exclusive(struct pagemap *pagemap, const struct kmig_region *region, uint64_t chunk)
{
	uint64_t entries[LMTRACK_CHUNK_PAGES];
	unsigned int pages = chunk_pages(region, chunk);
	ssize_t n = pread(pagemap->scan_fd, entries, pages * sizeof(entries[0]),
			  page_address(region, chunk, 0) / region->page_size * sizeof(entries[0]));

	if (n != (ssize_t)(pages * sizeof(entries[0])))
		return kmig_fail(region->ctx, n < 0 ? -errno : -EIO, "region %s: /proc/self/pagemap cannot be read", region->name);
	for (unsigned int i = 0; i < pages; i++)
		if ((entries[i] & (PAGEMAP_PRESENT | PAGEMAP_EXCLUSIVE)) == PAGEMAP_PRESENT)
			return kmig_fail(region->ctx, -EBUSY, "region %s: another process maps page %llu as well: what it writes would not be noticed. The tracker pagemap is for memory that one process writes; lmtrack regions have no such limit",
					 region->name, (unsigned long long)(chunk * LMTRACK_CHUNK_PAGES + i));
	return 0;
}

static int harvest_chunk(struct kmig_tracker *tracker, struct kmig_harvest *harvest)
{
	const struct kmig_region *region = tracker->config.regions[harvest->region];
	uint64_t written[KMIG_CHUNK_WORDS], unknown[KMIG_CHUNK_WORDS];
	struct pagemap *pagemap = pagemap_of(tracker);
	uint64_t chunk = harvest->chunk, from, to;
	struct entries entries;
	unsigned int runs = 0;
	bool held = false;
	int err;

	err = find(pagemap, harvest, &entries);
	if (err || harvest->mode == KMIG_HARVEST_LOOK)
		return err;
	if (harvest->mode == KMIG_HARVEST_ALL)
		err = check_exclusive(pagemap, region, chunk);
	if (err)
		return err;
	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++) {
		uint64_t taken = harvest->take[i] & harvest->exists[i] & ~entries.clean[i];

		written[i] = taken & entries.present[i];
		unknown[i] = taken & ~entries.present[i];
		held = held || harvest->hold[i];
	}
	err = protect_runs(pagemap, region, chunk, unknown);
	from = kmig_bit_next(written, LMTRACK_CHUNK_PAGES, 0);
	to = from;
	for (uint64_t at = from; at < LMTRACK_CHUNK_PAGES; at = kmig_bit_next(written, LMTRACK_CHUNK_PAGES, to), runs++)
		to = kmig_bit_next_clear(written, LMTRACK_CHUNK_PAGES, at);
	if (err || !runs)
		return err;
	if (runs <= RUNS_MAX || held)
		return protect_runs(pagemap, region, chunk, written);
	return protect_span(pagemap, region, from, to, harvest);
}

/* ---- The tracker ---- */

static const struct kmig_tracker_ops pagemap_ops = {
	.name = "pagemap",
	.start = pagemap_start,
	.add_channel = kmig_sender_add_channel,
	.lost = kmig_sender_lost,
	.drop_channel = kmig_sender_drop_channel,
	.replace_channel = kmig_sender_replace_channel,
	.send = kmig_sender_send,
	.fd = kmig_sender_fd,
	.wait = kmig_sender_wait,
	.times = kmig_sender_times,
	.cancel = kmig_sender_cancel,
	.peek = kmig_sender_peek,
	.held = kmig_sender_held,
	.channel_stats = kmig_sender_channel_stats,
	.free = pagemap_free,
	.hold = kmig_sender_hold,
	.cap = kmig_sender_cap,
	.width = kmig_sender_width,
};

int kmig_tracker_new_pagemap(const struct kmig_tracker_config *config, struct kmig_tracker **out)
{
	struct pagemap *pagemap = calloc(1, sizeof(*pagemap));
	int err;

	if (!pagemap)
		return kmig_fail(config->ctx, -ENOMEM, "tracker: out of memory");
	pagemap->tracker = (struct kmig_tracker){ .ops = &pagemap_ops, .config = *config };
	pagemap->uffd = pagemap->scan_fd = -1;
	err = kmig_sender_new(&pagemap->tracker, harvest_chunk);
	if (err) {
		free(pagemap);
		return err;
	}
	*out = &pagemap->tracker;
	return 0;
}
