// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -lrdmacm -libverbs
/*
 * What a stream sends over RDMA, next to what ib_write_bw (perftest) writes over the same
 * soft-RoCE device in messages of the same size, and to the same stream over TCP on loopback. In
 * the VM, with the module, by hand:
 *
 *	LMTRACK_MODULE=.../lmtrack.ko build/selftests/bench_rdma [MIB]
 *
 * The rate is that of the best of three first passes over memory that is all dirty. Processor time
 * is the whole machine's, as soft-RoCE and TCP work outside of any process.
 */
#include <err.h>

#include "rdma_link.h"
#include "rdma_peer.h"

#define RUNS	3
#define WINDOW	LMTRACK_CHUNK_PAGES

struct figures {
	double rate;			/* bytes/s */
	double cpu;			/* seconds */
	uint64_t writes, gathered;
};

/* All processors' time that was not idle. */
static double cpu_seconds(void)
{
	unsigned long long user, nice, system, idle, iowait, irq, softirq;
	FILE *stat = fopen("/proc/stat", "r");

	if (!stat || fscanf(stat, "cpu %llu %llu %llu %llu %llu %llu %llu", &user, &nice,
			    &system, &idle, &iowait, &irq, &softirq) != 7)
		err(1, "/proc/stat");
	fclose(stat);
	return (double)(user + nice + system + irq + softirq) / sysconf(_SC_CLK_TCK);
}

static int stream_open(int region)
{
	struct lmtrack_stream_create create = {
		.size = sizeof(create), .flags = LMTRACK_STREAM_NO_ZERO_DETECT,
		.stream_id = PEER_STREAM,
	};
	struct lmtrack_stream_add_region add = { .size = sizeof(add), .fd = region };
	int dev = device_open();
	int stream = lmt_ioctl(dev, LMTRACK_STREAM_CREATE, &create);

	close(dev);
	if (stream < 0 || lmt_ioctl(stream, LMTRACK_STREAM_ADD_REGION, &add))
		errx(1, "stream");
	return stream;
}

/* A first pass; until the peer has said that it has all. */
static void pass(int stream, struct figures *figures, uint64_t bytes, bool (*arrived)(void *),
		 void *data)
{
	struct lmtrack_stream_send send = {
		.size = sizeof(send), .round = 1, .what = LMTRACK_SEND_ALL,
	};
	struct lmtrack_stream_wait wait = { .size = sizeof(wait), .timeout_ms = -1 };
	double begin, cpu = cpu_seconds();

	begin = lmt_seconds();
	if (lmt_ioctl(stream, LMTRACK_STREAM_SEND, &send) ||
	    lmt_ioctl(stream, LMTRACK_STREAM_WAIT, &wait) || wait.error || !arrived(data))
		errx(1, "round: %s", strerror(wait.error));
	figures->rate = bytes / (lmt_seconds() - begin);
	figures->cpu = cpu_seconds() - cpu;
}

static bool peer_arrived(void *data)
{
	return peer_wait(data, 1);
}

static struct figures over_rdma(int region, uint64_t bytes)
{
	struct lmtrack_stream_add_rdma add = {
		.size = sizeof(add), .timeout_ms = 20000, .window_pages = WINDOW,
		.token_bytes = LMTRACK_RDMA_TOKEN_MAX,
	};
	struct lmtrack_channel_stats stats = { .size = sizeof(stats) };
	struct peer_memory memory;
	struct figures figures = { };
	struct peer peer = { };
	int stream = stream_open(region);
	const char *wrong;

	if (!peer_memory_init(&memory, bytes / PAGE) || !peer_start(&peer, &memory, 0, RDMA_IPV4))
		errx(1, "peer");
	memcpy(add.remote, &peer.address, sizeof(add.remote));
	memcpy(add.token, peer.token, sizeof(add.token));
	if (lmt_ioctl(stream, LMTRACK_STREAM_ADD_RDMA, &add))
		errx(1, "no RDMA channel");
	for (uint64_t first = 0; first < memory.pages; first += WINDOW) {
		struct lmtrack_stream_rdma_window window = {
			.size = sizeof(window), .first = first,
		};
		uint64_t address;

		if (!peer_window(&peer, first, WINDOW, &address, &window.rkey))
			errx(1, "window");
		window.address = address;
		if (lmt_ioctl(stream, LMTRACK_STREAM_RDMA_WINDOW, &window))
			errx(1, "window");
	}
	pass(stream, &figures, bytes, peer_arrived, &peer);
	lmt_ioctl(stream, LMTRACK_CHANNEL_STATS, &stats);
	figures.writes = stats.writes;
	figures.gathered = stats.gathered;
	close(stream);
	wrong = peer_end(&peer);
	if (wrong)
		errx(1, "%s", wrong);
	munmap(memory.mem, bytes);
	return figures;
}

struct sink {
	int fd;
	unsigned char *mem;
	uint64_t bytes;
	pthread_t thread;
};

static void *sink_main(void *data)
{
	struct sink *sink = data;
	ssize_t n = 1;

	for (uint64_t got = 0; got < sink->bytes && n > 0; got += n)
		n = recv(sink->fd, sink->mem + got % (sink->bytes - MIB), MIB, 0);
	return NULL;
}

static bool sink_arrived(void *data)
{
	struct sink *sink = data;

	return !pthread_join(sink->thread, NULL);
}

static struct figures over_tcp(int region, uint64_t bytes)
{
	struct lmtrack_stream_add_channel add = { .size = sizeof(add) };
	struct sockaddr_in in = { .sin_family = AF_INET };
	int listener = socket(AF_INET, SOCK_STREAM, 0), stream = stream_open(region);
	struct sink sink = { .bytes = bytes };
	struct figures figures = { };
	socklen_t length = sizeof(in);

	inet_pton(AF_INET, RDMA_IPV4, &in.sin_addr);
	add.fd = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (void *)&in, sizeof(in)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&in, &length) ||
	    connect(add.fd, (void *)&in, sizeof(in)) ||
	    lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &add))
		err(1, "TCP");
	sink.fd = accept(listener, NULL, NULL);
	sink.mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (sink.mem == MAP_FAILED || pthread_create(&sink.thread, NULL, sink_main, &sink))
		errx(1, "sink");
	pass(stream, &figures, bytes, sink_arrived, &sink);
	close(stream);
	close(add.fd);
	close(sink.fd);
	close(listener);
	munmap(sink.mem, bytes);
	return figures;
}

/* Bytes a second of perftest, or 0. */
static double perftest(uint64_t message, uint64_t bytes)
{
	uint64_t count = bytes / message < 20 ? 20 : bytes / message;
	double peak, average = 0, rate = 0;
	char command[256], line[256];
	unsigned long long size, n;
	FILE *client;

	snprintf(command, sizeof(command),
		 "(ib_write_bw -R -F -s %llu -n %llu >/dev/null 2>&1 &) ; sleep 3;"
		 " ib_write_bw -R -F -s %llu -n %llu " RDMA_IPV4 " 2>/dev/null",
		 (unsigned long long)message, (unsigned long long)count,
		 (unsigned long long)message, (unsigned long long)count);
	client = popen(command, "re");
	while (client && fgets(line, sizeof(line), client))
		if (sscanf(line, " %llu %llu %lf %lf", &size, &n, &peak, &average) == 4)
			rate = average * MIB;
	if (client)
		pclose(client);
	return rate;
}

static void keep_best(struct figures *best, struct figures run)
{
	if (run.rate > best->rate)
		*best = run;
}

int main(int argc, char **argv)
{
	uint64_t bytes = (argc > 1 ? strtoull(argv[1], NULL, 0) : 64) * MIB, message;
	struct figures rdma = { }, tcp = { };
	double best = 0, gb = bytes / 1e9;
	unsigned char *mem;
	int region;

	if (bytes < 4 * MIB)
		errx(2, "usage: bench_rdma [MIB]");
	if (!rdma_link_up() || !rdma_module_load())
		errx(4, "no soft-RoCE here");
	region = lmt_region(bytes);
	mem = region < 0 ? MAP_FAILED : lmt_map(region, bytes);
	if (mem == MAP_FAILED)
		errx(1, "region");
	for (uint64_t i = 0; i < bytes / 8; i++)
		((uint64_t *)mem)[i] = (i + 1) * 0x9e3779b97f4a7c15ULL;
	if (lmt_start(region, 0, NULL))
		errx(1, "tracking");

	for (int i = 0; i < RUNS; i++)
		keep_best(&rdma, over_rdma(region, bytes));
	message = bytes / rdma.writes / PAGE * PAGE;
	for (int i = 0; i < RUNS; i++) {
		double rate = perftest(message, bytes);

		best = rate > best ? rate : best;
	}
	for (int i = 0; i < RUNS; i++)
		keep_best(&tcp, over_tcp(region, bytes));

	printf("RDMA         %8.1f MB/s  %6.2f CPU s/GB  %llu writes of %llu KiB on average, %.1f %% gathered\n",
	       rdma.rate / 1e6, rdma.cpu / gb, (unsigned long long)rdma.writes,
	       (unsigned long long)message / 1024, 100.0 * rdma.gathered / rdma.writes);
	printf("ib_write_bw  %8.1f MB/s\n", best / 1e6);
	printf("TCP          %8.1f MB/s  %6.2f CPU s/GB\n", tcp.rate / 1e6, tcp.cpu / gb);
	if (best > 0)
		printf("RDMA reaches %.2f of ib_write_bw (wanted: 0.90)\n", rdma.rate / best);
	return 0;
}
