// SPDX-License-Identifier: GPL-2.0
/*
 * bench_stun [SECONDS [PART]]: how well the ceiling holds, and what it costs those it is not
 * for. Tables, no verdict. PART is ceiling, free, latency or kill; without it all of them. Every figure is of this machine: under an emulator, timers are late and
 * faults slow, which is seen in the first lines.
 *
 * The writers of the first table do nothing but dirty pages that are clean, in one process; a
 * thread of the same process harvests five times a second so that they find some.
 */
#include <err.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <signal.h>

#include "lmtrack_test.h"

#define PAGES		(128 * (size_t)LMTRACK_CHUNK_PAGES)	/* 256 MiB */
#define BYTES		(PAGES * PAGE)
#define WRITERS_MAX	8
#define MAX_US		LMTRACK_STUN_DELAY_MAX_US

static int region;
static unsigned char *mem;
static uint64_t bitmap[PAGES / 64];
static int seconds = 5;

static void harvest(void)
{
	if (lmt_dirty(region, LMTRACK_DIRTY_CLEAR, 0, PAGES, bitmap) < 0)
		err(1, "harvest");
}

/* From the beginning, with figures that begin at zero. All pages are clean. */
static void track(void)
{
	lmt_stop(region);
	if (lmt_start(region, 0, NULL))
		err(1, "LMTRACK_TRACK_START");
	harvest();
}

static void stun(uint64_t rate, uint32_t max_delay_us)
{
	struct lmtrack_stun_set set = {
		.size = sizeof(set), .rate = rate, .max_delay_us = max_delay_us,
	};

	if (lmt_ioctl(region, LMTRACK_STUN_SET, &set))
		err(1, "LMTRACK_STUN_SET");
}

static void on_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static void sleep_until(double when)
{
	double left;
	struct timespec pause;

	while ((left = when - lmt_seconds()) > 0) {
		pause.tv_sec = left;
		pause.tv_nsec = (left - pause.tv_sec) * 1e9;
		nanosleep(&pause, NULL);
	}
}

static int compare_doubles(const void *a, const void *b)
{
	double difference = *(const double *)a - *(const double *)b;

	return difference < 0 ? -1 : difference > 0;
}

static double median(double *values, size_t count)
{
	qsort(values, count, sizeof(*values), compare_doubles);
	return values[count / 2];
}

/* ---- The ceiling ---- */

struct thread {
	pthread_t thread;
	volatile bool stop;
	size_t first;
	size_t pages;
	int cpu;
};

static void *dirty_pages(void *arg)
{
	struct thread *self = arg;
	size_t page = 0;

	if (self->cpu >= 0)
		on_cpu(self->cpu);
	while (!self->stop) {
		(*(volatile unsigned char *)(mem + (self->first + page) * PAGE))++;
		page = (page + 1) % self->pages;
	}
	return NULL;
}

static void *harvest_often(void *arg)
{
	struct thread *self = arg;

	while (!self->stop) {
		harvest();
		sleep_until(lmt_seconds() + 0.2);
	}
	return NULL;
}

static struct thread writers[WRITERS_MAX];

static void writers_start(int count, int cpu)
{
	for (int i = 0; i < count; i++) {
		writers[i] = (struct thread){
			.first = i * (PAGES / count), .pages = PAGES / count, .cpu = cpu,
		};
		if (pthread_create(&writers[i].thread, NULL, dirty_pages, &writers[i]))
			err(1, "pthread_create");
	}
}

static void writers_stop(int count)
{
	for (int i = 0; i < count; i++)
		writers[i].stop = true;
	stun(0, 0);
	for (int i = 0; i < count; i++)
		pthread_join(writers[i].thread, NULL);
}

/* Pages that became dirty in each second; the mean, and how far any second was off @want. */
static double watch(double want, double *worst)
{
	double begin = lmt_seconds(), last = begin, now, rate;
	uint64_t first = lmt_stats(region).dirtied_pages, before = first, dirtied = first;

	*worst = 0;
	for (int i = 1; i <= seconds; i++) {
		sleep_until(begin + i);
		dirtied = lmt_stats(region).dirtied_pages;
		now = lmt_seconds();
		rate = (dirtied - before) / (now - last);
		if (fabs(rate / want - 1) > fabs(*worst))
			*worst = rate / want - 1;
		before = dirtied;
		last = now;
	}
	return (dirtied - first) / (last - begin);
}

static void bench_ceiling(void)
{
	static const uint64_t rates[] = { 0, 100, 1000, 10000, 50000 };
	static const int counts[] = { 1, 2, 8 };
	struct lmtrack_stun_stats stats = { .size = sizeof(stats) }, after = stats;
	struct thread harvester;
	double mean, worst;

	printf("%9s %7s %12s %14s %9s %12s %12s\n", "ceiling/s", "writers", "mean/s",
	       "worst second", "delays/s", "mean delay", "longest");
	for (size_t c = 0; c < 3; c++) {
		for (size_t r = 0; r < 5; r++) {
			track();
			harvester = (struct thread){ };
			if (pthread_create(&harvester.thread, NULL, harvest_often, &harvester))
				err(1, "pthread_create");
			stun(rates[r], MAX_US);
			writers_start(counts[c], -1);
			sleep_until(lmt_seconds() + 1);
			lmt_ioctl(region, LMTRACK_STUN_STATS, &stats);
			mean = watch(rates[r] ?: 1, &worst);
			lmt_ioctl(region, LMTRACK_STUN_STATS, &after);
			writers_stop(counts[c]);
			harvester.stop = true;
			pthread_join(harvester.thread, NULL);
			if (!rates[r]) {
				printf("%9s %7d %12.0f\n", "none", counts[c], mean);
				continue;
			}
			printf("%9lu %7d %12.1f %+13.1f%% %9.0f %9.3f ms %9.1f ms\n",
			       (unsigned long)rates[r], counts[c], mean, worst * 100,
			       (double)(after.stuns - stats.stuns) / seconds,
			       (after.total_ns - stats.total_ns) * 1e-6 /
			       (after.stuns - stats.stuns ?: 1), after.longest_ns * 1e-6);
			fflush(stdout);
		}
	}
}

/* ---- Those it is not for ---- */

#define SLICES		20
#define SLICE		0.1
#define OWN_PAGES	256

/* Passes over pages of one's own, which are dirty if they are written, in one slice of time. */
static double passes(bool writing)
{
	unsigned char *own = mem + (PAGES - OWN_PAGES) * PAGE;
	double begin = lmt_seconds(), now;
	unsigned long count = 0;

	do {
		for (int i = 0; i < 100; i++)
			for (size_t page = 0; page < OWN_PAGES; page++) {
				volatile unsigned char *byte = own + page * PAGE;

				if (writing)
					*byte = i;
				else
					(void)*byte;
			}
		count += 100;
		now = lmt_seconds();
	} while (now < begin + SLICE);
	return count / (now - begin);
}

/*
 * Slices with and without the ceiling take turns, so that what else the machine does meets
 * both. The writer has a processor of its own.
 */
static void bench_free(const char *name, bool writing, bool beside_writer)
{
	double with[SLICES], without[SLICES];

	harvest();
	passes(writing);
	for (int i = 0; i < SLICES; i++) {
		without[i] = passes(writing);
		stun(1000, MAX_US);
		if (beside_writer)
			writers_start(1, 1);
		with[i] = passes(writing);
		if (beside_writer)
			writers_stop(1);
		stun(0, 0);
	}
	printf("%-34s %6.1f %%\n", name,
	       100 * median(with, SLICES) / median(without, SLICES));
	fflush(stdout);
}

enum operation { MMAP, MUNMAP, FORK, OPERATIONS };

#define TURNS	200

static void latencies(double took[OPERATIONS][TURNS])
{
	for (int i = 0; i < TURNS; i++) {
		double begin = lmt_seconds();
		void *other = lmt_map(region, BYTES);
		pid_t pid;

		took[MMAP][i] = lmt_seconds() - begin;
		if (other == MAP_FAILED)
			err(1, "mmap");
		begin = lmt_seconds();
		munmap(other, BYTES);
		took[MUNMAP][i] = lmt_seconds() - begin;
		begin = lmt_seconds();
		pid = fork();
		if (!pid)
			_exit(0);
		took[FORK][i] = lmt_seconds() - begin;
		waitpid(pid, NULL, 0);
	}
}

static void bench_latencies(void)
{
	static const char *const names[OPERATIONS] = { "mmap", "munmap", "fork" };
	static double without[OPERATIONS][TURNS], with[OPERATIONS][TURNS];
	struct lmtrack_stun_stats stats = { .size = sizeof(stats) }, after = stats;

	harvest();
	latencies(without);
	stun(1, MAX_US);
	lmt_ioctl(region, LMTRACK_STUN_STATS, &stats);
	writers_start(8, -1);
	sleep_until(lmt_seconds() + 0.5);
	latencies(with);
	lmt_ioctl(region, LMTRACK_STUN_STATS, &after);
	writers_stop(8);
	printf("%-8s %14s %14s %14s %14s\n", "", "median", "longest", "median beside",
	       "longest beside");
	for (int i = 0; i < OPERATIONS; i++) {
		double m = median(without[i], TURNS), beside = median(with[i], TURNS);

		printf("%-8s %11.3f ms %11.3f ms %11.3f ms %11.3f ms\n", names[i], m * 1e3,
		       without[i][TURNS - 1] * 1e3, beside * 1e3, with[i][TURNS - 1] * 1e3);
	}
	printf("beside: eight threads of the process, asleep for 100 ms each time, %lu times\n",
	       (unsigned long)(after.stuns - stats.stuns));
}

/* From SIGKILL to the end of a process that is delayed, or waits in pause(). */
static void bench_kill(bool delayed)
{
	double took[50], begin, middle;

	for (int i = 0; i < 50; i++) {
		pid_t pid;

		harvest();
		stun(delayed, MAX_US);
		pid = fork();
		if (!pid) {
			if (!delayed)
				pause();
			dirty_pages(&(struct thread){ .pages = PAGES, .cpu = -1 });
		}
		sleep_until(lmt_seconds() + 0.13 + 0.0017 * i);
		begin = lmt_seconds();
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		took[i] = lmt_seconds() - begin;
	}
	stun(0, 0);
	middle = median(took, 50);
	printf("SIGKILL to the end of a process %-12s median %.3f ms, longest %.3f ms\n",
	       delayed ? "asleep:" : "in pause():", middle * 1e3, took[49] * 1e3);
	fflush(stdout);
}

static void bench_free_all(void)
{
	on_cpu(0);
	printf("speed with a ceiling of 1000 pages/s, of that without:\n");
	bench_free("reader", false, false);
	bench_free("rewriter of dirty pages", true, false);
	bench_free("reader beside a writer", false, true);
	bench_free("rewriter beside a writer", true, true);
}

static void bench_kill_all(void)
{
	bench_kill(false);
	bench_kill(true);
}

static const struct {
	const char *name;
	void (*run)(void);
} parts[] = {
	{ "ceiling", bench_ceiling },
	{ "latency", bench_latencies },
	{ "kill", bench_kill_all },
	{ "free", bench_free_all },
};

int main(int argc, char **argv)
{
	if (argc > 1)
		seconds = atoi(argv[1]);
	region = lmt_region(BYTES);
	mem = region < 0 ? MAP_FAILED : lmt_map(region, BYTES);
	if (mem == MAP_FAILED || seconds < 1)
		errx(1, "usage: bench_stun [SECONDS [PART]], with the module loaded");
	memset(mem, 1, BYTES);
	for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
		if (argc > 2 && strcmp(argv[2], parts[i].name))
			continue;
		track();
		parts[i].run();
		printf("\n");
		fflush(stdout);
	}
	return 0;
}
