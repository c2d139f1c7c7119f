/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The ways to find out which pages were written, side by side: lmtrack, and what the kernel has:
 * userfaultfd's asynchronous write protection with PAGEMAP_SCAN, soft-dirty bits, KVM's dirty log.
 *
 * Each has a process of its own, a worker, which has nothing else mapped that the method would
 * have to walk over; who measures asks them in turn. Every harvest is checked: it reports as many
 * pages as were written, or the benchmark ends.
 */
#ifndef BENCH_TRACKERS_H
#define BENCH_TRACKERS_H

#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "bench_guest.h"

/* Kernel headers before 6.7 do not know these. */
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef PAGEMAP_SCAN
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_SOFT_DIRTY (1 << 7)
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

#define VEC_MAX		65536
#define REGIONS_MAX	64

/* Of every @stride pages, the first @run. */
struct pattern {
	uint64_t run, stride;
};

static const struct pattern everything = { 1, 1 };

#define for_each_page(page, pattern, pages)						\
	for (uint64_t _from = 0; _from < (pages); _from += (pattern).stride)		\
		for (uint64_t page = _from; page < _from + (pattern).run && page < (pages); page++)

static inline uint64_t pattern_pages(struct pattern pattern, uint64_t pages)
{
	uint64_t rest = pages % pattern.stride;

	return pages / pattern.stride * pattern.run + (rest < pattern.run ? rest : pattern.run);
}

struct memory {
	const struct method *method;
	uint64_t bytes, pages;
	bool sparse;
	int fd, uffd;
	unsigned char *mem;
	uint64_t *bitmap;
	struct guest *guest;
};

struct method {
	const char *name;
	bool region;				/* of lmtrack's, not a memfd */
	bool initially_set;			/* KVM: at first all is dirty, nothing protected */
	void (*start)(struct memory *memory);	/* every write from here on is noticed */
	uint64_t (*harvest)(struct memory *memory);
	void (*stop)(struct memory *memory);
};

static int pagemap_fd, clear_refs_fd;
static struct page_region *vec;

/* ---- lmtrack ---- */

static inline void lmtrack_start(struct memory *memory)
{
	if (lmt_start(memory->fd, 0, NULL))
		errx(1, "LMTRACK_TRACK_START");
}

static inline void lmtrack_stop(struct memory *memory)
{
	if (lmt_stop(memory->fd))
		errx(1, "LMTRACK_TRACK_STOP");
}

/* The caller has zeroed the bitmap. */
static inline uint64_t lmtrack_harvest(struct memory *memory)
{
	struct lmtrack_dirty_get get = {
		.size = sizeof(get), .flags = LMTRACK_DIRTY_CLEAR, .pages = memory->pages,
		.bitmap = (uintptr_t)memory->bitmap,
	};

	if (lmt_ioctl(memory->fd, LMTRACK_DIRTY_GET, &get))
		errx(1, "LMTRACK_DIRTY_GET");
	return get.dirty;
}

static const struct method method_lmtrack = {
	"lmtrack", true, false, lmtrack_start, lmtrack_harvest, lmtrack_stop,
};

/* ---- PAGEMAP_SCAN ---- */

static inline uint64_t pagemap_scan(struct memory *memory, uint64_t category, uint64_t flags)
{
	uint64_t begin = (uintptr_t)memory->mem, found = 0;
	struct pm_scan_arg arg = {
		.size = sizeof(arg), .flags = flags, .start = begin, .end = begin + memory->bytes,
		.vec = (uintptr_t)vec, .vec_len = VEC_MAX,
		.category_mask = category, .return_mask = category,
	};

	int n;

	/* 6.12 says of a scan that came to its end that it ended where its own buffer was last full. */
	do {
		n = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);
		if (n < 0)
			err(1, "PAGEMAP_SCAN");
		for (int i = 0; i < n; i++)
			found += (vec[i].end - vec[i].start) / PAGE;
		arg.start = arg.walk_end;
	} while (n == VEC_MAX);
	return found;
}

static inline void wp_start(struct memory *memory)
{
	struct uffdio_range range = { .start = (uintptr_t)memory->mem, .len = memory->bytes };
	struct uffdio_register reg = { .range = range, .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP };

	if (ioctl(memory->uffd, UFFDIO_REGISTER, &reg))
		err(1, "UFFDIO_REGISTER");
	/* It would fill page tables for all that does not exist. The first harvest protects, too. */
	if (!memory->sparse && ioctl(memory->uffd, UFFDIO_WRITEPROTECT, &wp))
		err(1, "UFFDIO_WRITEPROTECT");
}

static inline void wp_stop(struct memory *memory)
{
	struct uffdio_range range = { .start = (uintptr_t)memory->mem, .len = memory->bytes };

	if (ioctl(memory->uffd, UFFDIO_UNREGISTER, &range))
		err(1, "UFFDIO_UNREGISTER");
}

static inline uint64_t wp_harvest(struct memory *memory)
{
	return pagemap_scan(memory, PAGE_IS_WRITTEN, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC);
}

static const struct method method_wp = {
	"PAGEMAP_SCAN, WP_ASYNC", false, false, wp_start, wp_harvest, wp_stop,
};

/* ---- Soft-dirty ---- */

static inline void soft_dirty_start(struct memory *memory)
{
	(void)memory;
	if (pwrite(clear_refs_fd, "4", 1, 0) != 1)
		err(1, "/proc/self/clear_refs");
}

static inline uint64_t soft_dirty_harvest(struct memory *memory)
{
	uint64_t found = pagemap_scan(memory, PAGE_IS_SOFT_DIRTY, 0);

	soft_dirty_start(memory);
	return found;
}

static inline void soft_dirty_stop(struct memory *memory)
{
	(void)memory;
}

static const struct method method_soft_dirty = {
	"soft-dirty", false, false, soft_dirty_start, soft_dirty_harvest, soft_dirty_stop,
};

/* ---- KVM's dirty log ---- */

static inline void kvm_log(struct memory *memory, bool on)
{
	memory->guest->slot.flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	if (ioctl(memory->guest->vm, KVM_SET_USER_MEMORY_REGION, &memory->guest->slot))
		err(1, "KVM_SET_USER_MEMORY_REGION");
}

static inline void kvm_start(struct memory *memory)
{
	kvm_log(memory, true);
}

static inline void kvm_stop(struct memory *memory)
{
	kvm_log(memory, false);
}

static inline uint64_t kvm_harvest(struct memory *memory)
{
	struct kvm_dirty_log get = { .dirty_bitmap = memory->bitmap };
	struct kvm_clear_dirty_log clear = {
		.num_pages = memory->pages, .dirty_bitmap = memory->bitmap,
	};

	if (ioctl(memory->guest->vm, KVM_GET_DIRTY_LOG, &get) ||
	    ioctl(memory->guest->vm, KVM_CLEAR_DIRTY_LOG, &clear))
		err(1, "KVM_CLEAR_DIRTY_LOG");
	return ~0UL;
}

static const struct method method_kvm = {
	"KVM's dirty log", false, false, kvm_start, kvm_harvest, kvm_stop,
};

static const struct method method_kvm_initially_set = {
	"KVM's dirty log, initially set", false, true, kvm_start, kvm_harvest, kvm_stop,
};

/* ---- Memory ---- */

static inline bool is_kvm(const struct method *method)
{
	return method->harvest == kvm_harvest;
}

static inline void *buffer_new(uint64_t bytes)
{
	void *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (buffer == MAP_FAILED)
		err(1, "mmap");
	return buffer;
}

static inline void touch_pages(const struct memory *memory, struct pattern pattern)
{
	for_each_page(page, pattern, memory->pages)
		++*(volatile uint32_t *)(memory->mem + page * PAGE);
}

static inline void memory_new(struct memory *memory, const struct method *method, uint64_t bytes,
		       struct pattern populate, bool with_guest)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};

	*memory = (struct memory){
		.method = method, .bytes = bytes, .pages = bytes / PAGE,
		.sparse = populate.run < populate.stride,
	};
	memory->fd = method->region ? lmt_region(bytes) : memfd_create("bench", MFD_CLOEXEC);
	if (memory->fd < 0 || (!method->region && ftruncate(memory->fd, bytes)))
		errx(1, "no memory of %s: is the module loaded?", method->name);
	memory->mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			   memory->fd, 0);
	if (memory->mem == MAP_FAILED)
		err(1, "mmap");
	touch_pages(memory, populate);
	if (method->start == wp_start) {
		memory->uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		if (memory->uffd < 0 || ioctl(memory->uffd, UFFDIO_API, &api))
			err(1, "userfaultfd");
	}
	if (method->region || is_kvm(method))
		memory->bitmap = buffer_new((memory->pages + 63) / 64 * 8);
	if (with_guest) {
		struct kvm_enable_cap cap = {
			.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
				   (method->initially_set ? KVM_DIRTY_LOG_INITIALLY_SET : 0),
		};

		memory->guest = calloc(1, sizeof(*memory->guest));
		guest_new(memory->guest, memory->mem, bytes);
		if (is_kvm(method) && ioctl(memory->guest->vm, KVM_ENABLE_CAP, &cap))
			err(1, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
	}
}

/* Read or write a word of each page; the time. */
static inline double memory_access(struct memory *memory, struct pattern pattern, bool write)
{
	double begin;

	if (memory->guest) {
		uint32_t *list = guest_list(memory->guest, 0), count = 0;

		for_each_page(page, pattern, memory->pages)
			list[count++] = page * PAGE;
		begin = bench_ns();
		guest_pass(memory->guest, 0, 0, count, write);
		return bench_ns() - begin;
	}
	begin = bench_ns();
	if (write)
		touch_pages(memory, pattern);
	else
		for_each_page(page, pattern, memory->pages)
			(void)*(volatile uint32_t *)(memory->mem + page * PAGE);
	return bench_ns() - begin;
}

static inline uint64_t bits(const uint64_t *bitmap, uint64_t pages)
{
	uint64_t count = 0;

	for (uint64_t word = 0; word < (pages + 63) / 64; word++)
		if (bitmap[word])
			count += __builtin_popcountl(bitmap[word]);
	return count;
}

static inline double memory_harvest(struct memory *memory, uint64_t *found)
{
	double begin, took;
	uint64_t pages;

	if (memory->bitmap)
		memset(memory->bitmap, 0, (memory->pages + 63) / 64 * 8);
	begin = bench_ns();
	pages = memory->method->harvest(memory);
	took = bench_ns() - begin;
	*found += is_kvm(memory->method) ? bits(memory->bitmap, memory->pages) : pages;
	return took;
}

/* ---- Workers ---- */

enum order {
	STOP,		/* tracking; the time */
	START,		/* the time */
	WRITE,		/* a word in each page of the pattern; the time */
	READ,
	HARVEST,	/* exactly the pages of the pattern must be dirty; the time */
	FORGET,		/* harvest whatever there is, until nothing is; the time of the first */
	WRITERS,	/* threads that write while harvests are made: writes per second */
	KERNEL_BYTES,	/* what the module says it holds */
};

struct request {
	enum order order;
	struct pattern pattern;
	unsigned int threads;		/* WRITERS: */
	unsigned int intervals;
	bool zipf;
	bool harvest;
};

struct worker {
	const struct method *method;
	unsigned int regions;
	uint64_t bytes;			/* of each */
	struct pattern populate;
	bool guest;
	double (*writers)(struct memory *memory, const struct request *request);
	pid_t pid;
	int ask, answer;
};

static inline double worker_do(struct worker *worker, struct memory *memory, const struct request *request)
{
	double took = 0, begin;
	uint64_t found = 0, expected = 0;

	if (request->order == WRITERS)
		return worker->writers(memory, request);
	for (unsigned int i = 0; i < worker->regions; i++) {
		switch (request->order) {
		case START:
		case STOP:
			begin = bench_ns();
			if (request->order == START)
				worker->method->start(&memory[i]);
			else
				worker->method->stop(&memory[i]);
			took += bench_ns() - begin;
			break;
		case WRITE:
		case READ:
			took += memory_access(&memory[i], request->pattern, request->order == WRITE);
			break;
		case KERNEL_BYTES:
			took += lmt_stats(memory[i].fd).kernel_bytes;
			break;
		default:
			took += memory_harvest(&memory[i], &found);
			expected += pattern_pages(request->pattern, memory[i].pages);
		}
	}
	if (request->order == HARVEST && found != expected)
		errx(1, "%s: %lu pages are dirty, not %lu", worker->method->name, found, expected);
	for (int i = 0; request->order == FORGET && found; i++) {
		found = 0;
		if (i == 10)
			errx(1, "%s: pages stay dirty", worker->method->name);
		for (unsigned int n = 0; n < worker->regions; n++)
			memory_harvest(&memory[n], &found);
	}
	return took;
}

static inline void worker_main(struct worker *worker, int ask, int answer)
{
	struct memory *memory = calloc(worker->regions, sizeof(*memory));
	struct request request;
	double value = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	clear_refs_fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
	if (pagemap_fd < 0 || clear_refs_fd < 0 || !memory)
		err(1, "/proc/self/pagemap");
	vec = buffer_new(VEC_MAX * sizeof(*vec));
	for (unsigned int i = 0; i < worker->regions; i++)
		memory_new(&memory[i], worker->method, worker->bytes, worker->populate, worker->guest);
	while (write(answer, &value, sizeof(value)) == sizeof(value) &&
	       read(ask, &request, sizeof(request)) == sizeof(request))
		value = worker_do(worker, memory, &request);
}

static inline double worker_answer(struct worker *worker)
{
	double value;

	if (read(worker->answer, &value, sizeof(value)) != sizeof(value))
		errx(1, "the worker of %s has died", worker->method->name);
	return value;
}

static inline void worker_start(struct worker *worker)
{
	int ask[2], answer[2];

	if (pipe2(ask, O_CLOEXEC) || pipe2(answer, O_CLOEXEC))
		err(1, "pipe");
	fflush(stdout);
	worker->pid = fork();
	if (worker->pid < 0)
		err(1, "fork");
	if (!worker->pid) {
		close(ask[1]);
		close(answer[0]);
		worker_main(worker, ask[0], answer[1]);
		_exit(0);
	}
	close(ask[0]);
	close(answer[1]);
	worker->ask = ask[1];
	worker->answer = answer[0];
	worker_answer(worker);
}

static inline void worker_end(struct worker *worker)
{
	close(worker->ask);
	close(worker->answer);
	waitpid(worker->pid, NULL, 0);
}

static inline double worker_ask(struct worker *worker, struct request request)
{
	if (write(worker->ask, &request, sizeof(request)) != sizeof(request))
		errx(1, "the worker of %s has died", worker->method->name);
	return worker_answer(worker);
}

static inline double ask(struct worker *worker, enum order order, struct pattern pattern)
{
	return worker_ask(worker, (struct request){ .order = order, .pattern = pattern });
}

/* Tracked, mapped by the guest as far as there is one, and clean. */
static inline void worker_track(struct worker *worker)
{
	worker_start(worker);
	ask(worker, WRITE, worker->populate);
	ask(worker, START, everything);
	ask(worker, FORGET, everything);
}

#endif /* BENCH_TRACKERS_H */
