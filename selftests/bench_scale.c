// SPDX-License-Identifier: GPL-2.0
/*
 * bench_scale: many regions, and huge ones. The same memory, and in it the same number of dirty
 * pages, in 1, 4, 16 and 64 regions that one process tracks. Then a region of 1 TiB of which
 * little was touched, beside KVM's dirty log for as much memory: what each takes to begin, to
 * find that nothing was written, and to remember.
 */
#include "bench_trackers.h"

static const struct pattern percent = { 1, 100 };

static double harvest(struct worker *worker)
{
	ask(worker, WRITE, percent);
	return ask(worker, HARVEST, percent);
}

static void compare(struct bench *bench, const char *peer, double (*measure)(struct worker *worker),
		    struct worker *ours, struct worker *theirs)
{
	bench->peer = peer;
	bench->row = "scale";
	bench->pairs = BENCH_PAIRS;
	measure(ours);
	measure(theirs);
	for (unsigned int i = 0; i < bench->pairs; i++) {
		bench->ours[i] = measure(ours);
		bench->theirs[i] = measure(theirs);
	}
	bench_print(bench);
}

static void many(uint64_t bytes)
{
	struct worker one = {
		.method = &method_lmtrack, .regions = 1, .bytes = bytes, .populate = everything,
	};

	worker_track(&one);
	for (unsigned int regions = 1; regions <= REGIONS_MAX; regions *= 4) {
		struct bench bench = { .unit = "ns" };
		struct worker ours = one, theirs;

		snprintf(bench.name, sizeof(bench.name), "1 %% of %lu MiB in %u region%s", bytes / MIB,
			 regions, regions == 1 ? "" : "s");
		ours.regions = regions;
		ours.bytes = bytes / regions;
		theirs = ours;
		theirs.method = &method_wp;
		worker_track(&ours);
		worker_track(&theirs);
		compare(&bench, method_wp.name, harvest, &ours, &theirs);
		if (regions > 1)
			compare(&bench, "itself, in 1 region", harvest, &ours, &one);
		worker_end(&theirs);
		worker_end(&ours);
	}
	worker_end(&one);
}

/* ---- 1 TiB ---- */

static double start(struct worker *worker)
{
	double took = ask(worker, START, everything);

	ask(worker, FORGET, everything);
	ask(worker, STOP, everything);
	return took;
}

static double nothing(struct worker *worker)
{
	static const struct pattern none = { 0, 1 << 20 };

	return ask(worker, HARVEST, none);
}

/* KVM's two bitmaps are as long as the memory. */
static double remembered(struct worker *worker)
{
	return worker->method->region ? ask(worker, KERNEL_BYTES, everything) :
					2.0 * (worker->bytes / PAGE / 8);
}

static void huge(uint64_t touched)
{
	uint64_t bytes = 1UL << 40;
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1, .bytes = bytes,
		/* Whole chunks, evenly spread. */
		.populate = { LMTRACK_CHUNK_PAGES, LMTRACK_CHUNK_PAGES * (bytes / touched) },
	};
	struct worker theirs = ours;
	struct bench bench = { .unit = "ns" };

	theirs.method = &method_kvm;
	theirs.guest = true;
	worker_start(&ours);
	worker_start(&theirs);
	snprintf(bench.name, sizeof(bench.name), "1 TiB, %lu MiB touched: start", touched / MIB);
	compare(&bench, method_kvm.name, start, &ours, &theirs);
	ask(&ours, START, everything);
	ask(&ours, FORGET, everything);
	ask(&theirs, START, everything);
	ask(&theirs, FORGET, everything);
	snprintf(bench.name, sizeof(bench.name), "1 TiB, %lu MiB touched: harvest of nothing",
		 touched / MIB);
	compare(&bench, method_kvm.name, nothing, &ours, &theirs);
	bench.unit = "bytes";
	snprintf(bench.name, sizeof(bench.name), "1 TiB, %lu MiB touched: the kernel's bitmaps",
		 touched / MIB);
	compare(&bench, method_kvm.name, remembered, &ours, &theirs);
	worker_end(&theirs);
	worker_end(&ours);
}

int main(void)
{
	many((bench_quick() ? 64 : 256) * MIB);
	huge((bench_quick() ? 64 : 512) * MIB);
	return 0;
}
