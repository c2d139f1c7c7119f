// SPDX-License-Identifier: GPL-2.0
/*
 * bench_writers [kvm]: how much threads get written while their memory is harvested ten times a
 * second: harvests, faults and all. Each goes through a list of random pages again and again, the
 * pages all alike, or by Zipf's law; with kvm the threads are processors of a guest. The limit is
 * what they write when nobody tracks.
 */
#include "bench_trackers.h"

#define THREADS_MAX	GUEST_VCPUS
#define LIST		32768u
#define PASS		2048u		/* between two looks at the clock and the counter */
#define INTERVAL_NS	100e6

static bool kvm;

struct writer {
	pthread_t thread;
	struct memory *memory;
	unsigned int number;
	uint32_t *list;			/* addresses in the memory */
	_Atomic uint64_t *written;
	_Atomic bool *stop;
};

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* The n-th page by Zipf's law is asked for 1/n times as often as the first, wherever it lies. */
static void list_fill(uint32_t *list, uint64_t pages, bool zipf, uint64_t seed)
{
	double *sums = malloc(pages * sizeof(*sums)), sum = 0;

	if (!sums)
		err(1, "malloc");
	for (uint64_t i = 0; i < pages; i++) {
		sum += zipf ? 1.0 / (i + 1) : 1;
		sums[i] = sum;
	}
	for (uint32_t i = 0; i < LIST; i++) {
		double at = (random_next(&seed) >> 11) * 0x1p-53 * sum;
		uint64_t low = 0, high = pages - 1;

		while (low < high) {
			uint64_t middle = (low + high) / 2;

			if (sums[middle] > at)
				high = middle;
			else
				low = middle + 1;
		}
		/* The number of pages is a power of two: an odd factor leads each elsewhere. */
		list[i] = low * 40503 % pages * PAGE;
	}
	free(sums);
}

static void *writer_main(void *arg)
{
	struct writer *writer = arg;
	struct memory *memory = writer->memory;

	for (uint32_t first = 0; !*writer->stop; first = (first + PASS) % LIST) {
		if (memory->guest)
			guest_pass(memory->guest, writer->number, first, PASS, true);
		else
			for (uint32_t i = first; i < first + PASS; i++)
				++*(volatile uint32_t *)(memory->mem + writer->list[i]);
		*writer->written += PASS;
	}
	return NULL;
}

static void sleep_until(double when)
{
	struct timespec at = { .tv_sec = when / 1e9, .tv_nsec = fmod(when, 1e9) };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
		;
}

/* In the worker. Writes per second, after a first interval; the harvest is left out if untracked. */
static double writers(struct memory *memory, const struct request *request)
{
	struct writer writer[THREADS_MAX] = { };
	_Atomic uint64_t written = 0;
	_Atomic bool stop = false;
	uint64_t found = 0, before = 0;
	double begin, now;

	for (unsigned int i = 0; i < request->threads; i++) {
		writer[i] = (struct writer){
			.memory = memory, .number = i, .written = &written, .stop = &stop,
		};
		writer[i].list = memory->guest ? guest_list(memory->guest, i) :
						 buffer_new(LIST * sizeof(uint32_t));
		list_fill(writer[i].list, memory->pages, request->zipf, 0x9e3779b97f4a7c15 + i);
	}
	for (unsigned int i = 0; i < request->threads; i++)
		if (pthread_create(&writer[i].thread, NULL, writer_main, &writer[i]))
			err(1, "pthread_create");
	begin = bench_ns();
	for (unsigned int i = 0; i <= request->intervals; i++) {
		if (i == 1)
			before = written;
		sleep_until(begin + (i + 1) * INTERVAL_NS);
		if (request->harvest)
			memory_harvest(memory, &found);
	}
	now = bench_ns();
	found = written - before;
	stop = true;
	for (unsigned int i = 0; i < request->threads; i++) {
		pthread_join(writer[i].thread, NULL);
		if (!memory->guest)
			munmap(writer[i].list, LIST * sizeof(uint32_t));
	}
	return found / (now - begin - INTERVAL_NS) * 1e9;
}

static double throughput(struct worker *worker, bool zipf, unsigned int threads, bool tracked)
{
	struct request request = {
		.order = WRITERS, .threads = threads, .zipf = zipf, .harvest = tracked,
		.intervals = !bench_quick() ? 4 : kvm ? 1 : 2,
	};
	double rate;

	if (!tracked)
		ask(worker, STOP, everything);
	rate = worker_ask(worker, request);
	if (!tracked)
		ask(worker, START, everything);
	ask(worker, FORGET, everything);
	return rate;
}

static void compare(bool zipf, unsigned int threads, struct worker *ours, struct worker *theirs)
{
	struct bench bench = {
		.row = kvm ? "writers_kvm" : "writers", .peer = theirs->method->name,
		.unit = "writes/s", .higher = true, .target = 1, .pairs = BENCH_PAIRS,
		.limit_is = "without tracking",
	};

	snprintf(bench.name, sizeof(bench.name), "%s, %u %s%s, %lu MiB", zipf ? "Zipf" : "uniform",
		 threads, kvm ? "processor" : "thread", threads == 1 ? "" : "s",
		 theirs->bytes / MIB);
	bench.limit = throughput(ours, zipf, threads, false);
	for (unsigned int i = 0; i < bench.pairs; i++) {
		bench.ours[i] = throughput(ours, zipf, threads, true);
		bench.theirs[i] = throughput(theirs, zipf, threads, true);
	}
	bench_print(&bench);
}

int main(int argc, char **argv)
{
	struct worker ours = {
		.method = &method_lmtrack, .regions = 1, .populate = everything,
		.writers = writers,
	};
	unsigned int most;

	kvm = argc > 1 && !strcmp(argv[1], "kvm");
	ours.guest = kvm;
	/* As many as the VM has, or QEMU's emulator does not get on. */
	most = kvm ? fmin(sysconf(_SC_NPROCESSORS_ONLN), THREADS_MAX) : THREADS_MAX;
	/* A guest's faults cost so much that they would leave no time for anything else. */
	ours.bytes = (kvm ? 16 : 64) * MIB;
	worker_track(&ours);
	for (int p = 0; p <= kvm; p++) {
		struct worker theirs = ours;

		theirs.method = p ? &method_kvm : &method_wp;
		worker_track(&theirs);
		/* Guests of a guest are slow to emulate. */
		for (int zipf = 0; zipf <= !(kvm && bench_quick()); zipf++)
			for (unsigned int threads = 1; threads <= most; threads *= 2)
				if (threads != 2 || !bench_quick())
					compare(zipf, threads, &ours, &theirs);
		worker_end(&theirs);
	}
	worker_end(&ours);
	return 0;
}
