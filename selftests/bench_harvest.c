// SPDX-License-Identifier: GPL-2.0
/*
 * bench_harvest [kvm]: what it costs to learn which pages were written and to protect them again,
 * for several densities of dirty pages, and for regions of several sizes with the same dirty
 * pages. With kvm a guest does the writing; what it then pays for reading all its memory again,
 * more than it pays when all is mapped, belongs to the harvest.
 */
#include "bench_trackers.h"

static bool kvm;

/* One harvest of a region whose pages were clean and are now dirty by the pattern. */
static double harvest(struct worker *worker, struct pattern pattern)
{
	double took, again;

	ask(worker, WRITE, pattern);
	if (!kvm)
		return ask(worker, HARVEST, pattern);
	ask(worker, READ, everything);
	took = ask(worker, HARVEST, pattern);
	again = ask(worker, READ, everything);
	return took + again - ask(worker, READ, everything);
}

static void size_name(char *name, size_t size, uint64_t bytes)
{
	if (bytes >= 1UL << 40)
		snprintf(name, size, "%lu TiB", bytes >> 40);
	else if (bytes >= 1UL << 30)
		snprintf(name, size, "%lu GiB", bytes >> 30);
	else
		snprintf(name, size, "%lu MiB", bytes >> 20);
}

static void compare(const char *name, uint64_t bytes, struct pattern pattern, double target,
		    struct worker *ours, struct worker *theirs)
{
	struct bench bench = {
		.row = kvm ? "harvest_kvm" : "harvest", .peer = theirs->method->name, .unit = "ns",
		.target = target, .pairs = BENCH_PAIRS,
	};
	char size[32];

	size_name(size, sizeof(size), bytes);
	snprintf(bench.name, sizeof(bench.name), "%s of %s", name, size);
	harvest(ours, pattern);
	harvest(theirs, pattern);
	for (unsigned int i = 0; i < bench.pairs; i++) {
		bench.ours[i] = harvest(ours, pattern);
		bench.theirs[i] = harvest(theirs, pattern);
	}
	bench_print(&bench);
}

static void densities(uint64_t bytes)
{
	static const struct {
		const char *name;
		struct pattern pattern;
		double target;
	} cases[] = {
		{ "every page", { 1, 1 }, 1.0 },
		{ "every tenth page", { 1, 10 }, 1.5 },
		{ "1 % evenly spread", { 1, 100 }, 0.7 },
		{ "1 % in runs of 32", { 32, 3200 }, 0.1 },
		{ "0.01 %", { 1, 10000 }, 0.02 },
		{ "nothing", { 0, 10000 }, 0 },
	};
	static const struct method *const peers[] = {
		&method_wp, &method_soft_dirty, &method_kvm,
	};
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1, .bytes = bytes, .populate = everything,
		.guest = kvm,
	};

	worker_track(&ours);
	for (size_t p = 0; p < 3; p++) {
		struct worker theirs = ours;

		/* A guest has a dirty log; one kind of protection by the page table is enough then. */
		if (peers[p] == (kvm ? &method_soft_dirty : &method_kvm))
			continue;
		theirs.method = peers[p];
		worker_track(&theirs);
		for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
			compare(cases[i].name, bytes, cases[i].pattern,
				peers[p] == &method_wp ? cases[i].target : 0, &ours, &theirs);
		worker_end(&theirs);
	}
	worker_end(&ours);
}

/*
 * The same 256 dirty pages, eight in each of 32 chunks that are spread over the region, against
 * those in a region of 64 MiB. The peer at the same size is a case of its own, but for the largest:
 * it makes page tables for all of that, and comes to no end.
 */
#define GROWTH_CHUNKS	32

static struct worker sized(const struct method *method, uint64_t bytes, bool sparse)
{
	struct worker worker = {
		.method = method, .regions = 1, .bytes = bytes, .populate = everything,
	};

	if (sparse)
		worker.populate = (struct pattern){ 8, bytes / PAGE / GROWTH_CHUNKS };
	worker_track(&worker);
	return worker;
}

static void growth(uint64_t most)
{
	struct worker base = sized(&method_lmtrack, 64 * MIB, false);
	struct bench bench = {
		.row = "harvest", .unit = "ns", .pairs = BENCH_PAIRS,
	};
	char size[32];

	for (uint64_t bytes = 256 * MIB; bytes <= 1UL << 40; bytes *= 4) {
		struct pattern small = { 8, 64 * MIB / PAGE / GROWTH_CHUNKS };
		struct pattern large = { 8, bytes / PAGE / GROWTH_CHUNKS };
		bool sparse = bytes > most;
		struct worker worker, theirs;

		if (sparse)
			bytes = 1UL << 40, large.stride = bytes / PAGE / GROWTH_CHUNKS;
		size_name(size, sizeof(size), bytes);
		worker = sized(&method_lmtrack, bytes, sparse);
		snprintf(bench.name, sizeof(bench.name), "256 dirty pages of %s%s", size,
			 sparse ? ", sparse" : "");
		bench.peer = "itself, of 64 MiB";
		bench.target = 1.2;
		harvest(&worker, large);
		harvest(&base, small);
		for (unsigned int i = 0; i < bench.pairs; i++) {
			bench.ours[i] = harvest(&worker, large);
			bench.theirs[i] = harvest(&base, small);
		}
		bench_print(&bench);
		if (sparse) {
			worker_end(&worker);
			break;
		}

		theirs = sized(&method_wp, bytes, false);
		bench.peer = method_wp.name;
		bench.target = 0;
		harvest(&theirs, large);
		for (unsigned int i = 0; i < bench.pairs; i++) {
			bench.ours[i] = harvest(&worker, large);
			bench.theirs[i] = harvest(&theirs, large);
		}
		bench_print(&bench);
		worker_end(&theirs);
		worker_end(&worker);
	}
	worker_end(&base);
}

int main(int argc, char **argv)
{
	uint64_t bytes = (bench_quick() ? 256 : 1024) * MIB;

	kvm = argc > 1 && !strcmp(argv[1], "kvm");
	densities(kvm ? bytes / 8 : bytes);
	if (!kvm)
		growth(bytes);
	return 0;
}
