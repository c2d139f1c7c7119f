// SPDX-License-Identifier: GPL-2.0
/*
 * bench_memory [kvm]: what memory it takes to track memory, per GiB of it, all of which exists,
 * is mapped by one process and has been harvested: everything the kernel holds beside the pages
 * themselves; what of it is there for tracking; and what the caller needs to learn in one call
 * which pages are dirty, whichever they are.
 */
#include "bench_trackers.h"

static bool kvm;

/* Kernel memory that is not somebody's pages, in bytes. */
static double kernel_memory(void)
{
	static const char *const keys[] = {
		"Slab:", "KernelStack:", "Percpu:", "VmallocUsed:", "PageTables:", "SecPageTables:",
	};
	char line[128];
	double total = 0;
	FILE *f = fopen("/proc/meminfo", "r");

	if (!f)
		err(1, "/proc/meminfo");
	while (fgets(line, sizeof(line), f))
		for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				total += atol(line + strlen(keys[i])) * 1024.0;
	fclose(f);
	return total;
}

struct cost {
	double all, tracking;
};

static struct cost measure(struct worker *worker)
{
	double before = kernel_memory(), idle;
	double per_gib = (double)(1UL << 30) / worker->bytes;
	struct cost cost;

	worker_start(worker);
	ask(worker, WRITE, everything);
	idle = kernel_memory();
	ask(worker, START, everything);
	ask(worker, FORGET, everything);
	ask(worker, WRITE, everything);
	ask(worker, FORGET, everything);
	ask(worker, READ, everything);
	cost.all = (kernel_memory() - before) * per_gib;
	/* lmtrack has made room for the bits when a page of the chunk was first touched. */
	if (worker->method->region)
		cost.tracking = ask(worker, KERNEL_BYTES, everything) * per_gib;
	else
		cost.tracking = (kernel_memory() - idle) * per_gib;
	worker_end(worker);
	return cost;
}

static void compare(const struct method *peer, uint64_t bytes)
{
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1, .bytes = bytes, .populate = everything,
		.guest = kvm,
	};
	struct bench all = {
		.row = kvm ? "memory_kvm" : "memory", .peer = peer->name, .unit = "bytes/GiB",
		.name = "the kernel, all beside the pages", .pairs = BENCH_PAIRS,
	};
	struct bench tracking = all, user = all;
	struct worker theirs = ours;

	strcpy(tracking.name, "the kernel, for tracking");
	strcpy(user.name, "the caller");
	theirs.method = peer;
	measure(&ours);
	measure(&theirs);
	for (unsigned int i = 0; i < all.pairs; i++) {
		struct cost cost = measure(&ours);

		all.ours[i] = cost.all;
		tracking.ours[i] = cost.tracking;
		cost = measure(&theirs);
		all.theirs[i] = cost.all;
		tracking.theirs[i] = cost.tracking;
		user.ours[i] = (1UL << 30) / PAGE / 8;
		/* A bitmap, or an entry for every other page. */
		user.theirs[i] = is_kvm(peer) ? user.ours[i] :
						(1UL << 30) / PAGE / 2 * sizeof(struct page_region);
	}
	bench_print(&all);
	bench_print(&tracking);
	bench_print(&user);
}

int main(int argc, char **argv)
{
	kvm = argc > 1 && !strcmp(argv[1], "kvm");
	compare(kvm ? &method_kvm : &method_wp, (kvm ? 32 : 64) * (bench_quick() ? 1 : 4) * MIB);
	return 0;
}
