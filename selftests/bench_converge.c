// SPDX-License-Identifier: GPL-2.0
/*
 * Does what the forecast promises come true? A process with a tracked region as its guest is
 * moved over a link of known rate: loopback in a network namespace of its own, shaped by tc.
 * Run in the VM with the module, as root:
 *
 *   quarter	the classical table: each round is a quarter of the one before. 2048 MB at 128 MB/s
 *		take 16 s; here the link is as much slower as the guest is smaller (-l is not heeded)
 *   overload	dirties at five times the link's rate; without stun, then with it, many runs
 *   zipf	a skewed writer who is not slowed down, with pages held back and without
 *
 * -g MIB, -l MBIT: of the guest, of the link. -n RUNS: of overload, 20 unless given. -w TIMES: zipf
 * writes so many times as many pages as the link carries, 2.4 unless given. -p: with the tracker
 * pagemap; needs no VM, no module.
 *
 * It prints figures and, at the end of each, whether the bounds were kept.
 */
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <time.h>

#include "lib_pair.h"

#include <xxhash.h>

#define LINK_MTU 9000
#define LINK_SHARE (8948 / 9014.0)			/* what headers of TCP, IP and Ethernet leave */
#define LINK_BYTES (link_bits / 8.0 * LINK_SHARE)	/* a second */
#define LINK_BURST (32 << 10)
/*
 * Bytes that are on their way when the last one of a round has been taken from the guest: what
 * libkmig lets wait in a socket, the two segments that TCP lets wait in the device's queue, and the
 * link's burst.
 */
#define QUEUE_BYTES ((64 << 10) + 2 * (64 << 10) + LINK_BURST)
#define GUEST_BYTES (guest_mib * MIB)
#define GUEST_PAGES (GUEST_BYTES / PAGE_BYTES)
#define TICK_US 1000
#define STATE_BYTES 100000	/* of devices */
#define ZIPF 0.99
#define LIMIT 0.15
#define READ_PAGES 64
#define READER_LEAST 0.98
#define TABLE_SECONDS 16	/* of the first pass of the classical table */

enum pattern { SWEEP, SKEWED };

static double link_bits = 400e6;	/* a second */
static uint64_t guest_mib = 256;
static double skewed_rate = 2.4;		/* writes, as a multiple of what the link carries */
static bool pagemap;	/* a memfd, without the module: nobody can be stunned */

/* The guest: a writer of so many pages a second. */
static struct load {
	enum pattern pattern;
	double rate;			/* writes a second */
	uint64_t set;			/* pages it writes to */
	uint8_t *ram;
	_Atomic bool stop, paused, parked;
	_Atomic uint64_t written;
	uint32_t *order;		/* page by rank */
	double *share;			/* of the ranks up to this one */
	pthread_t writer, reader;
	bool reads;			/* there is a reader beside it */
	double read_rate;		/* its pages a second */
} load;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint64_t pick(uint64_t *at, uint64_t *state)
{
	uint64_t low = 0, high = load.set - 1;
	double x;

	if (load.pattern == SWEEP)
		return load.order[(*at)++ % load.set];
	x = (next_random(state) >> 11) * 0x1p-53;
	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (load.share[middle] < x)
			low = middle + 1;
		else
			high = middle;
	}
	return load.order[low];
}

static void *write_main(void *data)
{
	uint64_t at = 0, state = 88172645463325252ull;
	double begin = now(), due = 0;

	(void)data;
	while (!load.stop) {
		if (load.paused) {
			load.parked = true;
			usleep(TICK_US);
			begin = now();
			due = 0;
			continue;
		}
		load.parked = false;
		/* What could not be written in time is not made up for: a guest does less, then. */
		if ((now() - begin) * load.rate - due > load.rate / 10)
			due = (now() - begin) * load.rate;
		for (; due < (now() - begin) * load.rate && !load.paused; due++) {
			uint8_t *page = load.ram + pick(&at, &state) * PAGE_BYTES;

			*(volatile uint64_t *)page = next_random(&state);
			load.written++;
		}
		usleep(TICK_US);
	}
	return NULL;
}

/*
 * Somebody in the guest who only reads, all over it, a little every millisecond. How much, is held
 * against the time that the processor was its own: what a migration takes of that on this machine is
 * no matter of stun.
 */
static void *read_main(void *data)
{
	uint64_t page = 0, pages = 0;
	struct timespec used;

	(void)data;
	while (!load.stop) {
		for (unsigned int i = 0; i < READ_PAGES; i++, page = (page + 1) % GUEST_PAGES)
			for (unsigned int at = 0; at < PAGE_BYTES; at += 64)
				(void)*(volatile uint8_t *)(load.ram + page * PAGE_BYTES + at);
		pages += READ_PAGES;
		usleep(TICK_US);
	}
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	load.read_rate = pages / (used.tv_sec + used.tv_nsec / 1e9);
	return NULL;
}

static void load_prepare(enum pattern pattern, double rate, uint64_t set)
{
	uint64_t state = 2463534242;
	double sum = 0;

	load.pattern = pattern;
	load.rate = rate;
	load.set = set;
	free(load.order);
	free(load.share);
	load.order = calloc(set, sizeof(*load.order));
	load.share = calloc(set, sizeof(*load.share));
	for (uint64_t i = 0; i < set; i++) {
		uint64_t other = next_random(&state) % (i + 1);

		load.order[i] = load.order[other];
		load.order[other] = i;
		sum += pow(i + 1, -ZIPF);
		load.share[i] = sum;
	}
	for (uint64_t i = 0; i < set; i++)
		load.share[i] /= sum;
}

static void load_start(uint8_t *ram)
{
	load.ram = ram;
	load.stop = load.paused = load.parked = false;
	pthread_create(&load.writer, NULL, write_main, NULL);
	if (load.reads)
		pthread_create(&load.reader, NULL, read_main, NULL);
}

static void load_end(void)
{
	load.stop = true;
	pthread_join(load.writer, NULL);
	if (load.reads)
		pthread_join(load.reader, NULL);
}

/* ---- One migration ---- */

static struct {
	struct kmig_round_report rounds[1024];
	unsigned int count;
	struct kmig_forecast first;	/* made after the first pass */
	double first_pass;		/* seconds since the migration began, at the end of it */
} trace;

static int pause_load(void *data)
{
	struct side *side = data;

	load.paused = true;
	while (!load.parked)
		usleep(100);
	side->world->source_runs = false;
	return 0;
}

static int resume_load(void *data)
{
	struct side *side = data;

	load.paused = false;
	side->world->source_runs = true;
	return 0;
}

static void note_round(const struct kmig_round_report *round, void *data)
{
	(void)data;
	if (trace.count < 1024)
		trace.rounds[trace.count++] = *round;
}

static void note_progress(const struct kmig_report *report, void *data)
{
	(void)data;
	if (!trace.first.total_ns && report->forecast.total_ns) {
		trace.first = report->forecast;
		trace.first_pass = trace.rounds[0].duration_ns / 1e9;
	}
}

static struct kmig_report move(const struct kmig_source_opts *given, int *result)
{
	struct kmig_source_ops ops = {
		.size = sizeof(ops),
		.pause = pause_load,
		.resume = resume_load,
		.save_state = on_save,
		.completed = on_completed,
		.progress = note_progress,
		.round = note_round,
	};
	struct kmig_report report = { .size = sizeof(report) };
	struct kmig_source_opts opts = *given;
	struct world *world = new_world();
	struct side source, destination;
	struct kmig_source *engine;
	pthread_t thread;
	uint8_t *ram;

	if (side_init(&source, world, !pagemap, GUEST_BYTES) || side_init(&destination, world, false, GUEST_BYTES) ||
	    !(ram = kmig_region_map(source.region))) {
		fprintf(stderr, "%s\n", kmig_ctx_error(source.ctx));
		exit(1);
	}
	for (uint64_t page = 0; page < GUEST_PAGES; page++)
		memset(ram + page * PAGE_BYTES, page * 31 + 1, PAGE_BYTES);
	source.is_source = true;
	source.state_length = destination.state_length = STATE_BYTES;
	source.timeout_ms = destination.timeout_ms = 20000;
	memset(&trace, 0, sizeof(trace));
	load_start(ram);
	usleep(200000);
	pthread_create(&thread, NULL, destination_main, &destination);
	while (!world->port)
		usleep(1000);
	opts.host = "127.0.0.1";
	opts.port = world->port;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = source.timeout_ms;
	if (kmig_source_new(source.ctx, &opts, &ops, &source, &engine) ||
	    kmig_source_add_region(engine, source.region)) {
		fprintf(stderr, "%s\n", kmig_ctx_error(source.ctx));
		exit(1);
	}
	*result = kmig_source_run(engine);
	kmig_source_report(engine, &report);
	if (*result)
		printf("# %s\n", kmig_ctx_error(source.ctx));
	kmig_source_free(engine);
	pthread_join(thread, NULL);
	load_end();
	if (!*result && memcmp(ram, kmig_region_map(destination.region), GUEST_BYTES)) {
		printf("MEMORY DIFFERS\n");
		exit(1);
	}
	side_end(&source);
	side_end(&destination);
	return report;
}

static void print_rounds(void)
{
	printf("%6s %10s %8s %9s %10s %10s %8s\n", "round", "MiB", "seconds", "MB/s", "held", "ceiling", "error");
	for (unsigned int i = 0; i < trace.count; i++) {
		const struct kmig_round_report *r = &trace.rounds[i];

		printf("%6u %10.2f %8.3f %9.1f %10llu %10.0f %8.2f\n", r->round, r->bytes / (double)MIB,
		       r->duration_ns / 1e9, r->bytes_per_second / 1e6, (unsigned long long)r->held_pages,
		       r->stun_pages_per_second, r->forecast_error);
	}
}

static void print_downtime(const struct kmig_report *report)
{
	const struct kmig_downtime *d = &report->downtime;

	printf("downtime %.1f ms: pause %.1f, device state out %.1f, memory %.1f, digests %.1f, device state in %.1f, commit %.1f, resume %.1f\n",
	       report->downtime_ns / 1e6, d->pause_ns / 1e6, d->save_ns / 1e6, d->memory_ns / 1e6, d->digest_ns / 1e6,
	       d->load_ns / 1e6, d->commit_ns / 1e6, d->resume_ns / 1e6);
}

static bool within(const char *what, double forecast, double came, double scale, const char *unit)
{
	double off = fabs(came - forecast) / came;

	printf("%-12s forecast %10.3f %s, came %10.3f %s: %.1f %% off\n", what, forecast / scale, unit, came / scale, unit,
	       off * 100);
	return off <= LIMIT;
}

/* ---- What is shown ---- */

/*
 * Loopback as a link. What it lets through at once is small beside what a blackout carries.
 */
static void shape_link(void)
{
	char command[128];

	snprintf(command, sizeof(command), "tc qdisc replace dev lo root tbf rate %.0fbit burst %d latency 200ms", link_bits,
		 LINK_BURST);
	if (system(command)) {
		perror("shaping the link");
		exit(1);
	}
}

#define DIGESTERS 2	/* at once, if there are as many processors */

struct piece {
	uint8_t *memory;
	uint64_t bytes, digest;
};

static void *digest_piece(void *data)
{
	struct piece *piece = data;

	piece->digest = XXH64(piece->memory, piece->bytes, 0);
	return NULL;
}

/*
 * So long it takes to digest memory that is not in the caches, as it is done in the blackout. The
 * destination's digests come after its memory, the source's meanwhile.
 */
static double digest_ns(uint64_t bytes)
{
	struct piece pieces[DIGESTERS];
	pthread_t threads[DIGESTERS];
	uint8_t *memory = malloc(bytes);
	double begin;

	memset(memory, 1, bytes);
	begin = now();
	for (unsigned int i = 0; i < DIGESTERS; i++) {
		pieces[i].memory = memory + bytes / DIGESTERS * i;
		pieces[i].bytes = bytes / DIGESTERS;
		pthread_create(&threads[i], NULL, digest_piece, &pieces[i]);
	}
	for (unsigned int i = 0; i < DIGESTERS; i++)
		pthread_join(threads[i], NULL);
	begin = now() - begin;
	free(memory);
	return begin * 1e9;
}

static bool quarter(void)
{
	struct kmig_forecast_opts ahead = KMIG_FORECAST_OPTS_INIT;
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_forecast forecast = KMIG_FORECAST_INIT;
	/*
	 * A guest that writes at 0.4 of the link's rate leaves a fifth of a round dirty, pages being
	 * protected just before they are sent; and what it writes ahead of the next round goes along.
	 */
	struct kmig_curve_point curve = { .interval_ns = 1000000000 };
	struct kmig_ctx *ctx;
	struct kmig_report report;
	bool ok;
	int err;

	opts.downtime_ms = 200;
	link_bits = GUEST_BYTES * 8.0 / TABLE_SECONDS / LINK_SHARE;
	curve.pages = 0.4 * LINK_BYTES / PAGE_BYTES;
	shape_link();
	/* The blackout of this guest beside its pages: device state, and as it writes all over, all digests. */
	ahead.ram_bytes = ahead.bytes = GUEST_BYTES;
	ahead.bytes_per_second = LINK_BYTES;
	ahead.curve = &curve;
	ahead.points = 1;
	ahead.downtime_ms = opts.downtime_ms;
	ahead.trip_ns = QUEUE_BYTES / LINK_BYTES * 1e9;
	ahead.blackout_ns = STATE_BYTES / LINK_BYTES * 1e9 + digest_ns(GUEST_BYTES);
	printf("expected of the blackout beside its pages: %.1f ms\n", ahead.blackout_ns / 1e6);
	kmig_ctx_new(&ctx);
	kmig_forecast(ctx, &ahead, &forecast);
	kmig_ctx_free(ctx);

	printf("== quarter: %.0f MiB at %.1f MB/s (2048 MB at 128 in the original), rounds shrink by 4\n",
	       GUEST_BYTES / (double)MIB, LINK_BYTES / 1e6);
	load_prepare(SWEEP, curve.pages, GUEST_PAGES);
	opts.no_hold_back = true;
	report = move(&opts, &err);
	print_rounds();
	if (err)
		return false;
	print_downtime(&report);
	ok = within("rounds", forecast.rounds, report.rounds - 1, 1, "");
	ok &= within("total", forecast.total_ns, report.total_ns - report.setup_ns, 1e9, "s");
	ok &= within("downtime", forecast.downtime_ns, report.downtime_ns, 1e6, "ms");
	return ok;
}

static bool overload(unsigned int runs)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	double worst = 0, off = 0, alone, slowest = INFINITY;
	struct kmig_report report;
	unsigned int kept = 0;
	bool ok;
	int err;

	shape_link();
	printf("== overload: dirties at 5 times the link's rate, half of %.0f MiB, %.0f Mbit/s\n",
	       GUEST_BYTES / (double)MIB, link_bits / 1e6);
	load_prepare(SWEEP, 5 * LINK_BYTES / PAGE_BYTES, GUEST_PAGES / 2);
	load.reads = true;
	opts.no_stun = true;
	opts.no_hold_back = true;
	opts.on_timeout = KMIG_TIMEOUT_ABORT;
	report = move(&opts, &err);
	alone = load.read_rate;
	printf("without stun: %s after %u rounds, %.1f s\n", err ? "did not converge" : "converged", report.rounds,
	       report.total_ns / 1e9);
	ok = err == -ETIME && report.rounds == 30;
	opts = (struct kmig_source_opts)KMIG_SOURCE_OPTS_INIT;
	opts.no_hold_back = true;
	printf("%4s %7s %9s %9s %9s %9s %9s\n", "run", "rounds", "forecast", "total", "off", "downtime", "ceiling");
	for (unsigned int i = 0; i < runs; i++) {
		double total, forecast, ceiling = 0;

		report = move(&opts, &err);
		slowest = fmin(slowest, load.read_rate);
		if (!i) {
			print_rounds();
			print_downtime(&report);
		}
		for (unsigned int r = 0; r < trace.count; r++)
			ceiling = fmax(ceiling, trace.rounds[r].stun_pages_per_second);
		total = (report.total_ns - report.setup_ns) / 1e9;
		forecast = trace.first_pass + trace.first.total_ns / 1e9;
		printf("%4u %7u %7.2f s %7.2f s %7.1f %% %6.1f ms %9.0f\n", i + 1, report.rounds, forecast, total,
		       fabs(total - forecast) / total * 100, report.downtime_ns / 1e6, ceiling);
		fflush(stdout);
		if (err)
			continue;
		kept += report.downtime_ns <= opts.downtime_ms * 1000000ull;
		worst = fmax(worst, report.downtime_ns / 1e6);
		off = fmax(off, fabs(total - forecast) / total);
	}
	printf("downtime kept in %u of %u runs, longest %.1f ms of %u; forecast off by %.1f %% at most\n",
	       kept, runs, worst, opts.downtime_ms, off * 100);
	load.reads = false;
	printf("a reader read %.3f of what it read without stun, in as much time of a processor\n", slowest / alone);
	return ok && kept == runs && off <= LIMIT && slowest >= READER_LEAST * alone;
}

static bool zipf(void)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_report with, without;
	int err;

	shape_link();
	printf("== zipf %.2f: writes over %.0f MiB, %.0f Mbit/s\n", ZIPF, GUEST_BYTES / (double)MIB, link_bits / 1e6);
	load_prepare(SKEWED, skewed_rate * LINK_BYTES / PAGE_BYTES, GUEST_PAGES);
	opts.no_hold_back = true;
	opts.downtime_ms = 400;
	/* Slowed down, it would be another guest. It is moved in any case. */
	opts.no_stun = true;
	opts.on_timeout = KMIG_TIMEOUT_SWITCHOVER;
	without = move(&opts, &err);
	print_rounds();
	if (err)
		return false;
	printf("without holding back: %.1f MiB, %u rounds, downtime %.1f ms\n", without.transferred_bytes / (double)MIB,
	       without.rounds, without.downtime_ns / 1e6);
	print_downtime(&without);
	opts.no_hold_back = false;
	with = move(&opts, &err);
	print_rounds();
	if (err)
		return false;
	printf("with: %.1f MiB, %u rounds, downtime %.1f ms: %.2f of the bytes\n", with.transferred_bytes / (double)MIB,
	       with.rounds, with.downtime_ns / 1e6, (double)with.transferred_bytes / without.transferred_bytes);
	print_downtime(&with);
	return with.downtime_ns <= opts.downtime_ms * 1000000ull &&
	       with.transferred_bytes <= 0.7 * without.transferred_bytes;
}

static bool verdict(const char *name, bool ok)
{
	printf("%s: %s\n\n", name, ok ? "kept" : "NOT kept");
	fflush(stdout);
	return ok;
}

int main(int argc, char **argv)
{
	unsigned int runs = 20;
	bool ok = true;
	char up[64];
	int opt;

	while ((opt = getopt(argc, argv, "g:l:n:pw:")) != -1) {
		if (opt == 'n')
			runs = strtoul(optarg, NULL, 10);
		else if (opt == 'g')
			guest_mib = strtoul(optarg, NULL, 10);
		else if (opt == 'l')
			link_bits = strtoul(optarg, NULL, 10) * 1e6;
		else if (opt == 'w')
			skewed_rate = strtod(optarg, NULL);
		else if (opt == 'p')
			pagemap = true;
		else
			return 2;
	}
	snprintf(up, sizeof(up), "ip link set lo up mtu %d", LINK_MTU);
	if (unshare(CLONE_NEWNET) || system(up)) {
		perror("a network namespace");
		return 1;
	}
	for (int i = optind; i < argc; i++) {
		if (!strcmp(argv[i], "quarter"))
			ok &= verdict(argv[i], quarter());
		else if (!strcmp(argv[i], "overload"))
			ok &= verdict(argv[i], overload(runs));
		else if (!strcmp(argv[i], "zipf"))
			ok &= verdict(argv[i], zipf());
		else
			return 2;
	}
	return !ok;
}
