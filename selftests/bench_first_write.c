// SPDX-License-Identifier: GPL-2.0
/*
 * bench_first_write [kvm]: what a page that was harvested costs whoever writes it next, beyond
 * what a write costs. With kvm the writer is a guest; and what it pays for reading the pages that
 * were clean in the harvest, which it need not pay if nobody harvests, is counted, too.
 */
#include "bench_trackers.h"

static bool kvm;

/* One write to each page of the pattern, all of which are clean and, as far as read, mapped. */
static double first_write(struct worker *worker, struct pattern pattern)
{
	double took = ask(worker, WRITE, pattern) - ask(worker, WRITE, pattern);

	ask(worker, HARVEST, pattern);
	return took / pattern_pages(pattern, worker->bytes / PAGE);
}

/* The same, and before it every page is read, after a harvest in which the pattern was dirty. */
static double read_and_write(struct worker *worker, struct pattern pattern)
{
	double took;

	ask(worker, READ, everything);
	took = ask(worker, WRITE, pattern) - ask(worker, WRITE, pattern);
	ask(worker, HARVEST, pattern);
	took += ask(worker, READ, everything);
	took -= ask(worker, READ, everything);
	return took / pattern_pages(pattern, worker->bytes / PAGE);
}

static void compare(const char *name, struct pattern pattern, double target,
		    double (*measure)(struct worker *worker, struct pattern pattern),
		    struct worker *ours, struct worker *theirs)
{
	struct bench bench = {
		.row = kvm ? "first_write_kvm" : "first_write", .peer = theirs->method->name,
		.unit = "ns", .target = target, .pairs = BENCH_PAIRS,
	};

	snprintf(bench.name, sizeof(bench.name), "%s of %lu MiB", name, theirs->bytes / MIB);
	measure(ours, pattern);
	measure(theirs, pattern);
	for (unsigned int i = 0; i < bench.pairs; i++) {
		bench.ours[i] = measure(ours, pattern);
		bench.theirs[i] = measure(theirs, pattern);
	}
	bench_print(&bench);
}

int main(int argc, char **argv)
{
	static const struct method *const peers[] = {
		&method_wp, &method_soft_dirty, &method_kvm,
	};
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1,
		.populate = everything,
	};

	kvm = argc > 1 && !strcmp(argv[1], "kvm");
	ours.guest = kvm;
	ours.bytes = (kvm ? 8 : 32) * (bench_quick() ? 1 : 4) * MIB;
	worker_track(&ours);
	for (size_t p = 0; p < 3; p++) {
		struct worker theirs = ours;
		double target = peers[p] == &method_soft_dirty ? 0 : 1.0;

		if (peers[p] == (kvm ? &method_soft_dirty : &method_kvm))
			continue;
		theirs.method = peers[p];
		worker_track(&theirs);
		compare("every page", everything, target, first_write, &ours, &theirs);
		compare("every tenth page", (struct pattern){ 1, 10 }, target, first_write, &ours,
			&theirs);
		if (kvm)
			compare("every tenth page, all read", (struct pattern){ 1, 10 }, target,
				read_and_write, &ours, &theirs);
		worker_end(&theirs);
	}
	worker_end(&ours);
	return 0;
}
