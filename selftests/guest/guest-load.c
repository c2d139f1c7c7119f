// SPDX-License-Identifier: GPL-2.0
/*
 * The only program of the small Linux guest that the tests move about: it dirties
 * memory and knows what every page of it must hold.
 *
 * Each page of the working set carries its number, a generation and a checksum of
 * its body and its generation. The generation it must have is kept in another table, so
 * that a page that arrives whole but old is found too. A page whose table entry is odd is
 * being written. The static area is written once; its checksums are kept apart as well.
 *
 * Parameters, on the kernel's command line:
 *   gl.mb=N       working set in MiB (64)
 *   gl.static=N   static area in MiB (32)
 *   gl.writers=N  threads that write (2)
 *   gl.rate=N     MB/s that they dirty together, 0 for as fast as they can (20)
 *   gl.touch=1    write only the head of a page: it is as dirty, and far more pages are (0)
 *   gl.zipf=1     the n-th of a writer's pages is written n times less often than its first (0:
 *                 each as often)
 *   gl.pin=1      who writes runs on the last processor, all others on the first (0)
 *   gl.verify=N   MB/s that are verified, 0 for as fast as it can (16)
 *   gl.corrupt=N  after N seconds, damage a page (0: never); the guest must notice
 *   gl.beat=N     a byte to QEMU's debug console every N ms (0: none)
 *   gl.line=N     a line to the console every N ms (100)
 *
 * The line:
 *   HB <n> boot=<boot id> t=<ms> pages=<written> verified=<pages> passes=<n>
 * preceded, from the first mismatch on, by a line that begins with CORRUPT. Each byte of a
 * line is an exit, which keeps an emulated guest from other things; who wants to know how
 * long it stood still watches the bytes of gl.beat, which count.
 */

#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE		4096
#define MB_PAGES	(1048576 / PAGE)
#define BODY_WORDS	((PAGE - 24) / 8)
#define STATIC_WORDS	(PAGE / 8)
#define NSEC		1000000000LL
#define BATCH		32
#define BEAT_PORT	0xe9

struct page {
	uint64_t number;
	uint64_t generation;
	uint64_t checksum;
	uint64_t body[BODY_WORDS];
};
_Static_assert(sizeof(struct page) == PAGE, "a page is a page");

static struct page *pages;
static _Atomic uint64_t *generations;
static uint64_t page_count;

static uint64_t (*fixed)[STATIC_WORDS];
static uint64_t *fixed_sums;
static uint64_t fixed_count;

static uint64_t writers, rate, touch, zipf, pin, verify_rate, corrupt_after;
static atomic_ullong written, verified, passes;

static char corrupt_text[160];
static atomic_bool corrupt;

static void die(const char *what)
{
	printf("guest-load: %s failed: %m\n", what);
	for (;;)
		pause();
}

static int64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC + ts.tv_nsec;
}

static void sleep_until(int64_t when)
{
	struct timespec ts = { when / NSEC, when % NSEC };

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

/*
 * Sleep as long as @done pages at @mbs MB/s are early since *@start. Who is late by
 * more than a second, having been paused or starved, does not run to catch up.
 */
static void pace(uint64_t done, uint64_t mbs, int64_t *start)
{
	int64_t due;

	if (!mbs)
		return;
	due = *start + done * PAGE * 1000 / mbs;
	if (due > now())
		sleep_until(due);
	else if (now() - due > NSEC)
		*start += now() - due;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

/* Sums of sums: words that change places are noticed. */
static uint64_t checksum(const uint64_t *words, unsigned int n)
{
	uint64_t a = 1, b = 0;

	for (unsigned int i = 0; i < n; i++) {
		a += words[i];
		b += a;
	}
	return a ^ (b << 32 | b >> 32);
}

/* What page_write() has to change: a generation has its share in the sum, so that it can. */
static uint64_t page_sum(const struct page *p, uint64_t gen)
{
	return checksum(p->body, BODY_WORDS) ^ mix(gen);
}

static void page_fill(struct page *p, uint64_t n, uint64_t gen)
{
	uint64_t x = mix(n << 32 ^ gen), step = mix(x) | 1;

	for (unsigned int i = 0; i < BODY_WORDS; i++, x += step)
		p->body[i] = x;
	p->number = n;
	p->checksum = page_sum(p, gen);
}

static void page_write(uint64_t n, bool whole)
{
	uint64_t old = atomic_load_explicit(&generations[n], memory_order_relaxed);
	struct page *p = &pages[n];
	uint64_t gen = old + 2;

	atomic_store_explicit(&generations[n], gen - 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);

	/* If the page is not the one of generation old, its sum stays as wrong as it is. */
	if (whole)
		page_fill(p, n, gen);
	else
		p->checksum ^= mix(old) ^ mix(gen);
	p->generation = gen;

	atomic_store_explicit(&generations[n], gen, memory_order_release);
	atomic_fetch_add_explicit(&written, 1, memory_order_relaxed);
}

static uint64_t draw(uint64_t *seed)
{
	*seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
	return *seed >> 32;
}

/*
 * A number below @count, by Zipf's law: that it is below n is as likely as log n is to log count. So
 * first its length is drawn, then the rest of its digits. Neighbours in that order lie far apart.
 */
static uint64_t draw_zipf(uint64_t *seed, uint64_t count)
{
	const uint64_t spread = 2654435761;	/* a prime, and no count has it */
	unsigned int lengths = 64 - __builtin_clzll(count);
	uint64_t n;

	do {
		uint64_t least = 1ULL << draw(seed) % lengths;

		n = least + draw(seed) % least - 1;
	} while (n >= count);
	return n * spread % count;
}

static void stay_on(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (pin && sched_setaffinity(0, sizeof(cpus), &cpus))
		die("sched_setaffinity");
}

/* Writer i owns the pages [i, i + 1) * page_count / writers and nobody else writes there. */
static void *writer(void *arg)
{
	uint64_t i = (uintptr_t)arg;
	uint64_t first = i * page_count / writers;
	uint64_t count = (i + 1) * page_count / writers - first;
	uint64_t seed = mix(i + 1), done = 0;
	int64_t start = now();

	stay_on(sysconf(_SC_NPROCESSORS_ONLN) - 1);
	for (;;) {
		for (int k = 0; k < BATCH; k++)
			page_write(first + (zipf ? draw_zipf(&seed, count) : draw(&seed) % count), !touch);
		done += BATCH * writers;
		pace(done, rate, &start);
	}
	return NULL;
}

__attribute__((format(printf, 1, 2)))
static void report_corrupt(const char *fmt, ...)
{
	va_list ap;

	if (atomic_load(&corrupt))
		return;
	va_start(ap, fmt);
	vsnprintf(corrupt_text, sizeof(corrupt_text), fmt, ap);
	va_end(ap);
	atomic_store(&corrupt, true);
}

static void page_verify(uint64_t n)
{
	static struct page copy;
	uint64_t gen = atomic_load_explicit(&generations[n], memory_order_acquire);

	if (gen & 1)
		return;
	memcpy(&copy, &pages[n], PAGE);
	atomic_thread_fence(memory_order_acquire);
	if (atomic_load_explicit(&generations[n], memory_order_relaxed) != gen)
		return;

	if (copy.number != n)
		report_corrupt("page %" PRIu64 " says it is page %" PRIu64, n, copy.number);
	else if (copy.generation != gen)
		report_corrupt("page %" PRIu64 " has generation %" PRIu64 ", not %" PRIu64, n,
			       copy.generation / 2, gen / 2);
	else if (copy.checksum != page_sum(&copy, gen))
		report_corrupt("page %" PRIu64 " generation %" PRIu64 " has a wrong checksum", n,
			       gen / 2);
}

static void fixed_verify(uint64_t n)
{
	if (checksum(fixed[n], STATIC_WORDS) != fixed_sums[n])
		report_corrupt("static page %" PRIu64 " has a wrong checksum", n);
}

static void *verifier(void *arg)
{
	uint64_t total = page_count + fixed_count, done = 0;
	int64_t start = now();

	(void)arg;
	for (;;) {
		for (uint64_t n = 0; n < total; n++) {
			if (n < page_count)
				page_verify(n);
			else
				fixed_verify(n - page_count);
			atomic_fetch_add_explicit(&verified, 1, memory_order_relaxed);
			if (++done % BATCH == 0)
				pace(done, verify_rate, &start);
		}
		atomic_fetch_add(&passes, 1);
	}
	return NULL;
}

/*
 * It is nobody's turn before this one's, and the byte is out when the write has ended. Late
 * ones are not made up for.
 */
static void *beater(void *period_ms)
{
	const struct sched_param first = { .sched_priority = 1 };
	int ports = open("/dev/port", O_WRONLY);

	if (ports < 0 || pthread_setschedparam(pthread_self(), SCHED_FIFO, &first))
		die("beater");
	for (uint8_t n = 0;; n++) {
		if (pwrite(ports, &n, 1, BEAT_PORT) != 1)
			die("a beat");
		sleep_until(now() + (int64_t)(uintptr_t)period_ms * 1000000);
	}
	return NULL;
}

static void *map(uint64_t bytes)
{
	void *p = mmap(NULL, bytes ? bytes : PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static void fill(void)
{
	uint64_t x = (uint64_t)now();

	pages = map(page_count * PAGE);
	generations = map(page_count * sizeof(*generations));
	for (uint64_t n = 0; n < page_count; n++)
		page_write(n, true);

	fixed = map(fixed_count * PAGE);
	fixed_sums = map(fixed_count * sizeof(*fixed_sums));
	for (uint64_t n = 0; n < fixed_count; n++) {
		for (unsigned int i = 0; i < STATIC_WORDS; i++)
			fixed[n][i] = x = x * 6364136223846793005ULL + 1442695040888963407ULL;
		fixed_sums[n] = checksum(fixed[n], STATIC_WORDS);
	}
}

static void start_thread(void *(*fn)(void *), uintptr_t arg)
{
	pthread_t t;

	if (pthread_create(&t, NULL, fn, (void *)arg))
		die("pthread_create");
}

static void read_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);

	if (n < 0)
		die(path);
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	close(fd);
}

static uint64_t parameter(const char *cmdline, const char *name, uint64_t otherwise)
{
	const char *p = strstr(cmdline, name);

	return p ? strtoull(p + strlen(name), NULL, 10) : otherwise;
}

static void damage(void)
{
	pages[page_count / 3].body[17] ^= 4;
	fixed[fixed_count / 3][17] ^= 4;
}

int main(void)
{
	char cmdline[4096], boot_id[64];
	uint64_t beat_ms, line_ms;
	int64_t start, beat;
	int console;

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	console = open("/dev/console", O_RDWR);
	if (console >= 0) {
		dup2(console, STDOUT_FILENO);
		dup2(console, STDERR_FILENO);
	}
	/* A heartbeat is one write, so that it arrives whole or not at all. */
	setvbuf(stdout, NULL, _IOFBF, 1024);

	read_text("/proc/cmdline", cmdline, sizeof(cmdline));
	read_text("/proc/sys/kernel/random/boot_id", boot_id, sizeof(boot_id));
	page_count = parameter(cmdline, "gl.mb=", 64) * MB_PAGES;
	fixed_count = parameter(cmdline, "gl.static=", 32) * MB_PAGES;
	writers = parameter(cmdline, "gl.writers=", 2);
	rate = parameter(cmdline, "gl.rate=", 20);
	touch = parameter(cmdline, "gl.touch=", 0);
	zipf = parameter(cmdline, "gl.zipf=", 0);
	pin = parameter(cmdline, "gl.pin=", 0);
	verify_rate = parameter(cmdline, "gl.verify=", 16);
	corrupt_after = parameter(cmdline, "gl.corrupt=", 0);

	line_ms = parameter(cmdline, "gl.line=", 100);

	fill();
	stay_on(0);
	start_thread(verifier, 0);
	for (uint64_t i = 0; i < writers; i++)
		start_thread(writer, i);
	beat_ms = parameter(cmdline, "gl.beat=", 0);
	if (beat_ms)
		start_thread(beater, beat_ms);

	start = now();
	beat = start;
	for (uint64_t n = 1;; n++) {
		if (atomic_load(&corrupt))
			printf("CORRUPT %s\n", corrupt_text);
		printf("HB %" PRIu64 " boot=%s t=%" PRId64 " pages=%llu verified=%llu passes=%llu\n",
		       n, boot_id, (int64_t)(now() / 1000000), atomic_load(&written),
		       atomic_load(&verified), atomic_load(&passes));
		fflush(stdout);
		if (corrupt_after && now() - start > (int64_t)corrupt_after * NSEC) {
			corrupt_after = 0;
			damage();
		}
		beat += line_ms * 1000000;
		if (beat < now())
			beat = now();
		sleep_until(beat);
	}
}
