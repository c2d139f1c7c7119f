// SPDX-License-Identifier: GPL-2.0
/*
 * bench_send: what sending guest memory over TCP costs the source's processors, by a stream of the
 * module and by what a VMM can do from user space: write(2), writev(2), sendmsg(2) with
 * MSG_ZEROCOPY. All send the same pages, in frames of a chunk at most with a table in front, over
 * the same kind of connection to the same sink in another network namespace. Nobody looks for pages
 * of zeroes. Peers know what is to be sent; the stream finds out, and protects it again: that is in
 * its figures, and is no part of theirs, but for one that does the same by PAGEMAP_SCAN.
 *
 * The peers' memory is the VMM's usual: anonymous, of huge pages where the kernel has them. For the
 * one by reference that counts, so there it is tried with single pages as well.
 *
 * The source's time is that of its process, of the channel's thread, and of the thread that takes
 * in what comes back, the acknowledgements. What comes in over veth is otherwise dealt with at once
 * by whoever has sent it, so that the sender would pay for the receiver: for copying what is sent by
 * MSG_ZEROCOPY, too, which the kernel does when such a packet stays on its host. So packets are
 * handed to threads (threaded NAPI), one for each end. veth does that only to packets that are not
 * made of many; these are as long as many are, as the link has an MTU of 65535.
 *
 * Times are summed from one switch of tasks to the next (sched_switch). The kernel's own account of
 * a task begins when it is woken if another is to make way for it, however late that one does. With
 * one processor that would be a good part of the receiver's time in the sender's account.
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <linux/errqueue.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "bench_trackers.h"
#include "uapi_requests.h"

#define PORT		4799
#define FAR_IP		"10.78.0.2"
#define SINK_BYTES	MIB
#define REAP_EVERY	64	/* sends by reference */

static uint64_t bytes;		/* sent in one pass */
static uint64_t region_pages;	/* twice as many: every other run is sent */
static int arrived[2];		/* a pipe: the sink has seen the end of a connection */

static void run(const char *fmt, ...)
{
	char command[512];
	va_list args;

	va_start(args, fmt);
	vsnprintf(command, sizeof(command), fmt, args);
	va_end(args);
	if (system(command))
		errx(1, "failed: %s", command);
}

/* ---- The link, and the sink at its other end ---- */

static void feature(const char *device, uint32_t command, uint32_t on)
{
	struct ethtool_value value = { .cmd = command, .data = on };
	struct ifreq request = { .ifr_data = (void *)&value };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", device);
	if (fd < 0 || ioctl(fd, SIOCETHTOOL, &request))
		err(1, "%s: ethtool", device);
	close(fd);
}

static void stay_on(unsigned int cpu, pid_t tid)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(tid, sizeof(cpus), &cpus))
		err(1, "sched_setaffinity");
}

static unsigned int last_cpu(void)
{
	return sysconf(_SC_NPROCESSORS_ONLN) - 1;
}

/* One connection after the other, to their ends. Lives as long as its parent. */
static void sink(int ready)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	char *buffer = malloc(SINK_BYTES);
	int listener, fd;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (unshare(CLONE_NEWNET) || write(ready, "", 1) != 1)
		_exit(1);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (!buffer || bind(listener, (void *)&in, sizeof(in)) || listen(listener, 1))
		_exit(1);
	stay_on(last_cpu(), 0);
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		while (recv(fd, buffer, SINK_BYTES, 0) > 0)
			;
		close(fd);
		if (write(arrived[1], "", 1) != 1)
			break;
	}
	_exit(1);
}

static pid_t task_named(const char *prefix)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	pid_t found = 0;

	while (proc && !found && (entry = readdir(proc))) {
		char path[300], name[32] = "";
		FILE *comm;

		if (!isdigit((unsigned char)entry->d_name[0]))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		comm = fopen(path, "re");
		if (comm && fgets(name, sizeof(name), comm) && !strncmp(name, prefix, strlen(prefix)))
			found = atoi(entry->d_name);
		if (comm)
			fclose(comm);
	}
	if (proc)
		closedir(proc);
	return found;
}

/* A device's packets come by a thread of its own. */
static void hand_to_thread(const char *device)
{
	feature(device, ETHTOOL_STSO, 0);
	feature(device, ETHTOOL_SGRO, 1);
	run("ip link set %s mtu 65535 up && echo 1 >/sys/class/net/%s/threaded", device, device);
}

static pid_t link_up(void)
{
	pid_t child, thread;
	int ready[2];
	char byte;

	/* The mounted sysfs shows the network of who mounted it. */
	if (unshare(CLONE_NEWNET | CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("sysfs", "/sys", "sysfs", 0, NULL))
		err(1, "namespaces");
	if (pipe(arrived) || pipe(ready))
		err(1, "pipe");
	child = fork();
	if (!child)
		sink(ready[1]);
	close(ready[1]);
	close(arrived[1]);
	if (child < 0 || read(ready[0], &byte, 1) != 1)
		errx(1, "no sink");
	close(ready[0]);
	run("ip link add near type veth peer name far");
	hand_to_thread("near");
	hand_to_thread("far");
	run("ip link set far netns %d", child);
	run("ip addr add 10.78.0.1/24 dev near && nsenter -t %d -n sh -c '"
	    "ip addr add " FAR_IP "/24 dev far && ip link set far up'", child);
	thread = task_named("napi/near");
	if (!thread || !task_named("napi/far"))
		errx(4, "veth has no thread of its own here");
	stay_on(0, thread);
	stay_on(last_cpu(), task_named("napi/far"));
	return thread;
}

static int connect_sink(void)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	inet_pton(AF_INET, FAR_IP, &in.sin_addr);
	for (int tries = 0; connect(fd, (void *)&in, sizeof(in)); tries++) {
		if (tries == 200)
			err(1, "connect");
		usleep(10000);
	}
	return fd;
}

/* ---- What is sent ---- */

struct table {
	uint64_t magic, chunk;
	struct {
		uint32_t first, pages;
	} runs[LMTRACK_CHUNK_PAGES / 2];
};

static void touch_set(unsigned char *mem, uint64_t length)
{
	for (uint64_t page = 0; page < region_pages; page++)
		if (page / length % 2 == 0)
			mem[page * PAGE + 8]++;
}

/* The table of a chunk, and what it names; returns the number of runs. */
static unsigned int lay_out(unsigned char *mem, uint64_t chunk, uint64_t length,
			    struct table *table, struct iovec *iov)
{
	uint64_t first = chunk * LMTRACK_CHUNK_PAGES, end = first + LMTRACK_CHUNK_PAGES;
	unsigned int count = 0;

	table->chunk = chunk;
	for (uint64_t page = first; page < end; page += length) {
		if (page / length % 2)
			continue;
		table->runs[count].first = page;
		table->runs[count].pages = length;
		iov[count].iov_base = mem + page * PAGE;
		iov[count].iov_len = length * PAGE;
		count++;
	}
	return count;
}

static size_t table_bytes(unsigned int count)
{
	return offsetof(struct table, runs) + count * sizeof(((struct table *)0)->runs[0]);
}

static void send_write(int fd, struct table *table, struct iovec *iov, unsigned int count)
{
	if (write(fd, table, table_bytes(count)) < 0)
		err(1, "write");
	for (unsigned int i = 0; i < count; i++)
		for (size_t sent = 0; sent < iov[i].iov_len;) {
			ssize_t ret = write(fd, (char *)iov[i].iov_base + sent, iov[i].iov_len - sent);

			if (ret < 0)
				err(1, "write");
			sent += ret;
		}
}

/* Forward over what was sent. */
static void advance(struct iovec **iov, unsigned int *count, size_t sent)
{
	while (*count && sent >= (*iov)->iov_len) {
		sent -= (*iov)->iov_len;
		++*iov;
		--*count;
	}
	if (*count) {
		(*iov)->iov_base = (char *)(*iov)->iov_base + sent;
		(*iov)->iov_len -= sent;
	}
}

static void send_writev(int fd, struct table *table, struct iovec *runs, unsigned int count)
{
	struct iovec all[LMTRACK_CHUNK_PAGES / 2 + 1], *iov = all;
	ssize_t sent;

	all[0].iov_base = table;
	all[0].iov_len = table_bytes(count);
	memcpy(all + 1, runs, count * sizeof(*runs));
	count++;
	while (count) {
		sent = writev(fd, iov, count);
		if (sent < 0)
			err(1, "writev");
		advance(&iov, &count, sent);
	}
}

static uint32_t sends, done;	/* by reference, of this connection */

/* Sends that the network has finished with. */
static void reap(int fd)
{
	struct pollfd wait = { .fd = fd };
	char control[128];
	struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };

	poll(&wait, 1, -1);
	while (recvmsg(fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0) {
		struct sock_extended_err *got = (void *)CMSG_DATA(CMSG_FIRSTHDR(&msg));

		done = got->ee_data + 1;
		msg.msg_controllen = sizeof(control);
	}
}

static void send_zerocopy(int fd, struct table *table, struct iovec *iov, unsigned int count)
{
	struct msghdr msg = { };
	ssize_t sent;

	if (send(fd, table, table_bytes(count), MSG_MORE) < 0)
		err(1, "send");
	while (count) {
		msg.msg_iov = iov;
		msg.msg_iovlen = count;
		sent = sendmsg(fd, &msg, MSG_ZEROCOPY);
		if (sent < 0 && errno == ENOBUFS) {
			reap(fd);
			continue;
		}
		if (sent < 0)
			err(1, "sendmsg");
		sends++;
		advance(&iov, &count, sent);
	}
	if (sends - done >= REAP_EVERY)
		reap(fd);
}

/* ---- One pass ---- */

struct pass {
	double ns;		/* until all has arrived */
	double cpu_ns;		/* of the source */
};

struct way {
	const char *name;
	void (*send)(int fd, struct table *table, struct iovec *iov, unsigned int count);
	bool single;		/* pages */
	bool finds;		/* what to send, by PAGEMAP_SCAN */
	double cpu_target, rate_target;
	unsigned char *mem;
};

static struct way ways[] = {
	{ .name = "lmtrack" },
	{ .name = "write(2)", .send = send_write, .cpu_target = 0.5, .rate_target = 1 },
	{ .name = "writev(2)", .send = send_writev },
	{ .name = "MSG_ZEROCOPY", .send = send_zerocopy, .cpu_target = 0.8, .rate_target = 1 },
	{ .name = "MSG_ZEROCOPY, single pages", .send = send_zerocopy, .single = true },
	{ .name = "PAGEMAP_SCAN and MSG_ZEROCOPY", .send = send_zerocopy, .finds = true },
};
#define WAYS	(sizeof(ways) / sizeof(ways[0]))

static int region;
static struct memory tracked;	/* by userfaultfd */
static pid_t near_thread;
static uint64_t copied;		/* by the stream's channels */
static double harvesting;	/* ns of the last pass by stream */

/* ---- Who ran for how long ---- */

#define TRACING		"/sys/kernel/tracing/"
#define CPUS_MAX	64

static void tracing(const char *file, const char *value)
{
	int fd = open(file, O_WRONLY | O_TRUNC | O_CLOEXEC);

	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		err(1, "%s", file);
	close(fd);
}

static void tracing_init(void)
{
	if (mount("tracefs", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		err(4, "tracefs");
	tracing(TRACING "tracing_on", "0");
	tracing(TRACING "trace_clock", "mono");
	tracing(TRACING "buffer_size_kb", "16384");
	tracing(TRACING "events/sched/sched_switch/enable", "1");
}

static double tracing_begin(void)
{
	tracing(TRACING "trace", "");
	tracing(TRACING "tracing_on", "1");
	return bench_ns();
}

/* The source's share of the time from @begin to @end. @sender may be 0; this process was running. */
static double tracing_end(double begin, double end, pid_t sender)
{
	double since[CPUS_MAX], sum = 0, at;
	pid_t on[CPUS_MAX] = { getpid() }, next;
	unsigned int cpu;
	unsigned long kept, written;
	char line[512], *p;
	FILE *trace;

	tracing(TRACING "tracing_on", "0");
	for (cpu = 0; cpu < CPUS_MAX; cpu++)
		since[cpu] = begin;
	trace = fopen(TRACING "trace", "re");
	if (!trace)
		err(1, "trace");
	/* NAME-PID [CPU] FLAGS SECONDS: sched_switch: ... next_pid=PID ...; names may hold anything. */
	while (fgets(line, sizeof(line), trace)) {
		p = strstr(line, " sched_switch: ");
		if (!p) {
			if (sscanf(line, "# entries-in-buffer/entries-written: %lu/%lu", &kept, &written) == 2 &&
			    kept != written)
				errx(1, "the trace has not all");
			continue;
		}
		*p = 0;
		at = atof(strrchr(line, ' ')) * 1e9;
		p = strstr(p + 1, " next_pid=");
		if (!p || at < begin || at > end || sscanf(strrchr(line, '[') + 1, "%u", &cpu) != 1 || cpu >= CPUS_MAX)
			continue;
		next = atoi(p + strlen(" next_pid="));
		if (on[cpu] && (on[cpu] == getpid() || on[cpu] == sender || on[cpu] == near_thread))
			sum += at - since[cpu];
		since[cpu] = at;
		on[cpu] = next;
	}
	fclose(trace);
	for (cpu = 0; cpu < CPUS_MAX; cpu++)
		if (on[cpu] == getpid())
			sum += end - since[cpu];
	return sum;
}

static void wait_arrived(int fd)
{
	char byte;

	shutdown(fd, SHUT_WR);
	if (read(arrived[0], &byte, 1) != 1)
		errx(1, "the sink has gone");
}

static struct pass pass_by_stream(unsigned char *mem, uint64_t length)
{
	int stream = stream_open(1, LMTRACK_STREAM_NO_ZERO_DETECT), fd = connect_sink();
	struct lmtrack_channel_stats stats;
	struct lmtrack_stream_wait result;
	uint64_t cpus = 1;
	struct lmtrack_stream_add_channel add = {
		.size = sizeof(add), .fd = fd, .cpumask = (uintptr_t)&cpus, .cpumask_bytes = sizeof(cpus),
	};
	double begin, end;
	pid_t sender;

	if (stream < 0 || stream_add_region(stream, region, 0) || lmt_ioctl(stream, LMTRACK_STREAM_ADD_CHANNEL, &add))
		errx(1, "stream");
	sender = task_named("lmtrack-0");
	if (!sender)
		errx(1, "the channel has no thread");
	touch_set(mem, length);
	begin = tracing_begin();
	if (stream_send(stream, 1, LMTRACK_SEND_DIRTY) || stream_wait(stream, -1, &result) || result.error)
		errx(1, "round");
	wait_arrived(fd);
	end = bench_ns();
	if (result.data_pages * PAGE != bytes)
		errx(1, "%llu pages were sent, not %lu", (unsigned long long)result.data_pages, bytes / PAGE);
	stats = channel_stats(stream, 0);
	copied += stats.copied_bytes;
	harvesting = result.harvest_ns;
	close(stream);
	close(fd);
	return (struct pass){ end - begin, tracing_end(begin, end, sender) };
}

static struct pass pass_by_process(const struct way *way, uint64_t length)
{
	struct iovec iov[LMTRACK_CHUNK_PAGES / 2];
	struct table table = { };
	int fd = connect_sink(), on = 1;
	double begin, end;

	sends = done = 0;
	if (way->send == send_zerocopy && setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)))
		err(1, "SO_ZEROCOPY");
	touch_set(way->mem, length);
	begin = tracing_begin();
	if (way->finds && wp_harvest(&tracked) * PAGE != bytes)
		errx(1, "PAGEMAP_SCAN found something else");
	for (uint64_t chunk = 0; chunk < region_pages / LMTRACK_CHUNK_PAGES; chunk++) {
		unsigned int count = lay_out(way->mem, chunk, length, &table, iov);

		if (count)
			way->send(fd, &table, iov, count);
	}
	while (done != sends)
		reap(fd);
	wait_arrived(fd);
	end = bench_ns();
	close(fd);
	return (struct pass){ end - begin, tracing_end(begin, end, 0) };
}

static struct pass pass_by(const struct way *way, uint64_t length)
{
	return way->send ? pass_by_process(way, length) : pass_by_stream(way->mem, length);
}

/* ---- The table ---- */

static void report(uint64_t length, const struct way *peer, unsigned int pairs,
		   const struct pass *ours, const struct pass *theirs)
{
	struct bench bench = {
		.row = "send", .peer = peer->name, .unit = "ns", .target = peer->cpu_target, .pairs = pairs,
	};

	snprintf(bench.name, sizeof(bench.name), "source CPU per GB, runs of %lu", length);
	for (unsigned int i = 0; i < pairs; i++) {
		bench.ours[i] = ours[i].cpu_ns / bytes * 1e9;
		bench.theirs[i] = theirs[i].cpu_ns / bytes * 1e9;
	}
	bench_print(&bench);
	snprintf(bench.name, sizeof(bench.name), "rate, runs of %lu", length);
	bench.unit = "MB/s";
	bench.higher = true;
	bench.target = peer->rate_target;
	for (unsigned int i = 0; i < pairs; i++) {
		bench.ours[i] = bytes / ours[i].ns * 1e3;
		bench.theirs[i] = bytes / theirs[i].ns * 1e3;
	}
	bench_print(&bench);
}

static void compare(uint64_t length, unsigned int pairs)
{
	struct pass passes[WAYS][BENCH_PAIRS_MAX];

	/* The first of each is for its buffers, and for what TCP remembers of the peer. */
	for (size_t m = 0; m < WAYS; m++)
		pass_by(&ways[m], length);
	for (unsigned int i = 0; i < pairs; i++)
		for (size_t m = 0; m < WAYS; m++)
			passes[m][i] = pass_by(&ways[m], length);
	printf("send: runs of %lu: %.0f ms per GB of lmtrack's are for finding the pages and protecting them\n", length,
	       harvesting / bytes * 1e3);
	for (size_t m = 1; m < WAYS; m++)
		report(length, &ways[m], pairs, passes[0], passes[m]);
}

static unsigned char *peers_memory(bool single)
{
	uint64_t length = region_pages * PAGE + CHUNK;
	unsigned char *mem = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED)
		err(1, "mmap");
	mem += CHUNK - (uintptr_t)mem % CHUNK;
	madvise(mem, region_pages * PAGE, single ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
	return mem;
}

static void fill(unsigned char *mem)
{
	for (uint64_t i = 0; i < region_pages * PAGE / 64; i++)
		*(uint64_t *)(mem + i * 64) = (i + 1) * 0x9e3779b97f4a7c15ULL;
}

int main(int argc, char **argv)
{
	static const uint64_t lengths[] = { 1, 4, 64, 512 };
	unsigned char *huge, *single;
	uint64_t *bitmap;

	bytes = (argc > 1 ? strtoull(argv[1], NULL, 0) : bench_quick() ? 16 : 128) * MIB;
	region_pages = 2 * bytes / PAGE;
	if (!bytes)
		errx(2, "usage: bench_send [MIB]");
	near_thread = link_up();
	tracing_init();
	region = lmt_region(region_pages * PAGE);
	if (region < 0)
		errx(1, "no region: is the module loaded?");
	ways[0].mem = lmt_map(region, region_pages * PAGE);
	if (ways[0].mem == MAP_FAILED)
		err(1, "mmap");
	huge = peers_memory(false);
	single = peers_memory(true);
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	vec = buffer_new(VEC_MAX * sizeof(*vec));
	if (pagemap_fd < 0)
		err(1, "pagemap");
	memory_new(&tracked, &method_wp, region_pages * PAGE, everything, false);
	for (size_t m = 1; m < WAYS; m++)
		ways[m].mem = ways[m].finds ? tracked.mem : ways[m].single ? single : huge;
	fill(ways[0].mem);
	fill(huge);
	fill(single);
	fill(tracked.mem);
	wp_start(&tracked);
	bitmap = calloc(region_pages / 64, 8);
	if (!bitmap || lmt_start(region, 0, NULL) ||
	    lmt_dirty(region, LMTRACK_DIRTY_CLEAR, 0, region_pages, bitmap) != (long)region_pages)
		errx(1, "tracking");
	free(bitmap);
	stay_on(0, 0);
	printf("send: %lu MiB in a pass, of %lu MiB\n", bytes / MIB, region_pages * PAGE / MIB);
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
		compare(lengths[i], bench_quick() ? 2 : BENCH_PAIRS);
	if (copied)
		printf("send: the network copied %lu bytes of the stream's\n", copied);
	return 0;
}
