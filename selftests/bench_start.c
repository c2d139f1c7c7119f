// SPDX-License-Identifier: GPL-2.0
/*
 * bench_start [kvm]: what it costs to begin tracking memory of which every page exists and was
 * written; and to begin and to make the first harvest, after which every page is protected. For
 * KVM's dirty log as it is, and with all pages reported as dirty at first, as QEMU has it; a guest
 * maps the memory then, with either side.
 */
#include "bench_trackers.h"

static bool kvm;

static double start(struct worker *worker)
{
	double took;

	/* Whoever is tracked wrote everything before: there is something to protect. */
	ask(worker, WRITE, everything);
	took = ask(worker, START, everything);
	ask(worker, FORGET, everything);
	ask(worker, WRITE, everything);
	ask(worker, STOP, everything);
	return took;
}

static double start_and_harvest(struct worker *worker)
{
	double took;

	ask(worker, WRITE, everything);
	took = ask(worker, START, everything);
	took += ask(worker, FORGET, everything);
	ask(worker, WRITE, everything);
	ask(worker, STOP, everything);
	return took;
}

static void compare(const char *name, double target, double (*measure)(struct worker *worker),
		    struct worker *ours, struct worker *theirs)
{
	struct bench bench = {
		.row = kvm ? "start_kvm" : "start", .peer = theirs->method->name, .unit = "ns",
		.target = target, .pairs = BENCH_PAIRS,
	};

	snprintf(bench.name, sizeof(bench.name), "%s, %lu MiB", name, theirs->bytes / MIB);
	measure(ours);
	measure(theirs);
	for (unsigned int i = 0; i < bench.pairs; i++) {
		bench.ours[i] = measure(ours);
		bench.theirs[i] = measure(theirs);
	}
	bench_print(&bench);
}

int main(int argc, char **argv)
{
	static const struct method *const peers[] = {
		&method_wp, &method_kvm, &method_kvm_initially_set,
	};
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1, .populate = everything,
	};

	kvm = argc > 1 && !strcmp(argv[1], "kvm");
	ours.guest = kvm;
	ours.bytes = (kvm ? 16 : 64) * (bench_quick() ? 1 : 16) * MIB;
	worker_start(&ours);
	for (size_t p = 0; p < 3; p++) {
		struct worker theirs = ours;

		if ((peers[p] == &method_wp) == kvm)
			continue;
		theirs.method = peers[p];
		worker_start(&theirs);
		compare("start", peers[p] == &method_kvm_initially_set ? 0 : 0.05, start, &ours,
			&theirs);
		compare("start and first harvest", 0, start_and_harvest, &ours, &theirs);
		worker_end(&theirs);
	}
	worker_end(&ours);
	return 0;
}
