// SPDX-License-Identifier: GPL-2.0
/*
 * Do several channels carry what their links do? A region is moved between two network namespaces
 * over two links, each shaped by tc, and the rate of the first pass is looked at. Run in the VM
 * with the module, as root:
 *
 *   equal	two links of the same rate, a channel over each: at least 1.9 times what one carries
 *   unequal	one is three times as fast as the other: at least 0.95 of the sum of both
 *   auto	as many channels as it takes: one where one fills the link, two where a connection gets
 *		half of it at most (given two processors)
 *
 * -g MIB, -l MBIT: of the guest, of the slower link. -p: with the tracker pagemap; needs no VM, no
 * module.
 *
 * It prints figures and, at the end of each, whether the bounds were kept.
 */
#include <errno.h>
#include <getopt.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>

#include "lib_pair.h"

#define LINK_BURST (32 << 10)
#define LINKS 2

static double link_bits = 200e6;	/* a second */
static uint64_t guest_mib = 128;
static bool pagemap;
static pid_t far;		/* a process in the destination's namespace */

static void run(const char *fmt, ...)
{
	char command[512];
	va_list args;

	va_start(args, fmt);
	vsnprintf(command, sizeof(command), fmt, args);
	va_end(args);
	if (system(command)) {
		fprintf(stderr, "failed: %s\n", command);
		exit(1);
	}
}

/* The source's namespace is this process's. */
static void make_links(void)
{
	int ready[2];

	if (pipe(ready) || unshare(CLONE_NEWNET)) {
		perror("a network namespace");
		exit(1);
	}
	far = fork();
	if (!far) {
		if (unshare(CLONE_NEWNET))
			_exit(1);
		close(ready[0]);
		close(ready[1]);
		for (;;)
			pause();
	}
	/* Readable at its end once the other has come as far. */
	close(ready[1]);
	if (read(ready[0], &ready[1], 1)) {
		perror("a network namespace");
		exit(1);
	}
	close(ready[0]);
	run("ip link set lo up");
	for (int i = 1; i <= LINKS; i++) {
		run("ip link add near%d type veth peer name far%d netns %d", i, i, far);
		run("ip addr add 10.0.%d.1/24 dev near%d && ip link set near%d up", i, i, i);
		run("nsenter -t %d -n sh -c 'ip addr add 10.0.%d.2/24 dev far%d && ip link set far%d up'", far, i, i, i);
	}
}

static void shape(int link, double bits)
{
	run("tc qdisc replace dev near%d root tbf rate %.0fbit burst %d latency 50ms", link, bits, LINK_BURST);
}

static void *far_main(void *data)
{
	char path[64];
	int ns;

	snprintf(path, sizeof(path), "/proc/%d/ns/net", far);
	ns = open(path, O_RDONLY | O_CLOEXEC);
	if (ns < 0 || setns(ns, CLONE_NEWNET)) {
		perror("the destination's namespace");
		exit(1);
	}
	close(ns);
	return destination_main(data);
}

static double first_pass;	/* bytes a second */
static struct kmig_report report;

static void note_round(const struct kmig_round_report *round, void *data)
{
	(void)data;
	if (round->round == 1)
		first_pass = round->bytes_per_second;
}

static int pause_nothing(void *data)
{
	(void)data;
	return 0;
}

static double move(const struct kmig_path *paths, unsigned int count, unsigned int channels)
{
	struct kmig_source_ops ops = {
		.size = sizeof(ops),
		.pause = pause_nothing,
		.resume = pause_nothing,
		.save_state = on_save,
		.completed = on_completed,
		.round = note_round,
	};
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct world *world = new_world();
	uint64_t bytes = guest_mib * MIB;
	struct side source, destination;
	struct kmig_source *engine;
	pthread_t thread;
	uint8_t *ram;

	if (side_init(&source, world, !pagemap, bytes) || side_init(&destination, world, false, bytes) ||
	    !(ram = kmig_region_map(source.region))) {
		fprintf(stderr, "%s\n", kmig_ctx_error(source.ctx));
		exit(1);
	}
	for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++)
		memset(ram + page * PAGE_BYTES, page * 31 + 1, PAGE_BYTES);
	source.is_source = true;
	source.state_length = destination.state_length = 1000;
	source.timeout_ms = destination.timeout_ms = 20000;
	destination.host = "0.0.0.0";
	pthread_create(&thread, NULL, far_main, &destination);
	while (!world->port)
		usleep(1000);
	opts.host = "10.0.1.2";
	opts.port = world->port;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = source.timeout_ms;
	opts.channels = channels;
	opts.paths = paths;
	opts.path_count = count;
	if (kmig_source_new(source.ctx, &opts, &ops, &source, &engine) ||
	    kmig_source_add_region(engine, source.region) || kmig_source_run(engine)) {
		fprintf(stderr, "%s\n", kmig_ctx_error(source.ctx));
		exit(1);
	}
	report = (struct kmig_report){ .size = sizeof(report) };
	kmig_source_report(engine, &report);
	kmig_source_free(engine);
	pthread_join(thread, NULL);
	if (memcmp(ram, kmig_region_map(destination.region), bytes)) {
		printf("MEMORY DIFFERS\n");
		exit(1);
	}
	side_end(&source);
	side_end(&destination);
	return first_pass;
}

static const struct kmig_path paths[LINKS] = {
	{ .local = "10.0.1.1", .device = "near1", .remote = "10.0.1.2" },
	{ .local = "10.0.2.1", .device = "near2", .remote = "10.0.2.2" },
};

static bool at_least(const char *what, double came, double of, double bound)
{
	printf("%s: %.1f MB/s of %.1f: %.3f, at least %.2f is asked for\n", what, came / 1e6, of / 1e6, came / of, bound);
	return came / of >= bound;
}

static bool equal(void)
{
	double one, both;

	shape(1, link_bits);
	shape(2, link_bits);
	printf("== equal: %llu MiB over two links of %.0f Mbit/s\n", (unsigned long long)guest_mib, link_bits / 1e6);
	one = move(paths, 1, 1);
	both = move(paths, 2, 2);
	return at_least("two channels", both, one, 1.9);
}

static bool unequal(void)
{
	double fast, slow, both;

	shape(1, 3 * link_bits);
	shape(2, link_bits);
	printf("== unequal: %llu MiB over links of %.0f and %.0f Mbit/s\n", (unsigned long long)guest_mib, 3 * link_bits / 1e6,
	       link_bits / 1e6);
	fast = move(paths, 1, 1);
	slow = move(paths + 1, 1, 1);
	both = move(paths, 2, 2);
	printf("the fast one alone %.1f MB/s, the slow one %.1f\n", fast / 1e6, slow / 1e6);
	return at_least("two channels", both, fast + slow, 0.95);
}

static unsigned int chosen(const char *what)
{
	double rate = move(NULL, 0, KMIG_CHANNELS_AUTO);

	printf("%s: %.1f MB/s in the first pass, %u channels: %s\n", what, rate / 1e6, report.channels,
	       report.channels_why ? report.channels_why : "not found out");
	return report.channels;
}

static bool automatic(void)
{
	cpu_set_t cpus;
	bool ok;

	printf("== auto: %llu MiB over a link of %.0f Mbit/s\n", (unsigned long long)guest_mib, link_bits / 1e6);
	shape(1, link_bits);
	ok = chosen("one fills it") == 1;
	/*
	 * By its source port a connection gets one half or the other. Of these ports connect() takes the
	 * even ones first: for the control connection, which needs little, and for channel 0.
	 */
	run("echo 40000 40003 >/proc/sys/net/ipv4/ip_local_port_range");
	run("tc qdisc del dev near1 root; tc qdisc add dev near1 root handle 1: htb default 10");
	for (int i = 0; i < 2; i++)
		run("tc class add dev near1 parent 1: classid 1:%d htb rate %.0fbit burst %d cburst %d quantum 9000 && tc filter add dev near1 parent 1: protocol ip u32 match ip sport %d 0x1 flowid 1:%d",
		    10 + i, link_bits / 2, LINK_BURST, LINK_BURST, i, 10 + i);
	ok &= sched_getaffinity(0, sizeof(cpus), &cpus) || CPU_COUNT(&cpus) < 2 || chosen("one gets half") >= 2;
	run("tc qdisc del dev near1 root");
	return ok;
}

static bool verdict(const char *name, bool ok)
{
	printf("%s: %s\n\n", name, ok ? "kept" : "NOT kept");
	fflush(stdout);
	return ok;
}

int main(int argc, char **argv)
{
	bool ok = true;
	int opt;

	while ((opt = getopt(argc, argv, "g:l:p")) != -1) {
		if (opt == 'g')
			guest_mib = strtoul(optarg, NULL, 10);
		else if (opt == 'l')
			link_bits = strtoul(optarg, NULL, 10) * 1e6;
		else if (opt == 'p')
			pagemap = true;
		else
			return 2;
	}
	make_links();
	for (int i = optind; i < argc; i++) {
		if (!strcmp(argv[i], "equal"))
			ok &= verdict(argv[i], equal());
		else if (!strcmp(argv[i], "unequal"))
			ok &= verdict(argv[i], unequal());
		else if (!strcmp(argv[i], "auto"))
			ok &= verdict(argv[i], automatic());
		else
			ok = false;
	}
	kill(far, SIGKILL);
	return !ok;
}
