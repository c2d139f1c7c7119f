/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Two engines and a guest, for the tests that move it: each side notes in shared memory what
 * became of the guest, so that this is known after either has been killed.
 */
#ifndef LIB_PAIR_H
#define LIB_PAIR_H

#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <kmig.h>

#define PAGE_BYTES 4096u
#define MIB (1u << 20)
#define SECRET "a secret of sixteen bytes and more"
#define TIMEOUT_MS (2000 * lmt_slower())

/* ---- A guest: two writers, threads or processes, that write to a region while it runs ---- */

struct guest {
	uint8_t *ram;
	uint64_t bytes, hot;	/* writes go to the first @hot bytes */
	_Atomic bool running, stop;
	_Atomic int parked;
	_Atomic uint64_t writes;
	unsigned int pause_us;
	pthread_t thread[2];
	pid_t pid[2];
};

struct writer {
	struct guest *guest;
	uint8_t *ram;
	unsigned int seed;
};

static inline void *guest_main(void *data)
{
	struct writer *writer = data;
	struct guest *guest = writer->guest;
	bool parked = false;

	while (!guest->stop) {
		uint64_t at;

		if (!guest->running) {
			if (!parked)
				guest->parked++;
			parked = true;
			/* A paused guest takes no time from those who move it. */
			usleep(5000);
			continue;
		}
		if (parked) {
			guest->parked--;
			parked = false;
			continue;	/* look again: it may have been stopped meanwhile */
		}
		writer->seed = writer->seed * 1103515245 + 12345;
		at = ((uint64_t)writer->seed << 8) % (guest->hot / 8) * 8;
		*(volatile uint64_t *)(writer->ram + at) = writer->seed;
		guest->writes++;
		if (guest->pause_us)
			usleep(guest->pause_us);
	}
	return NULL;
}

/* @guest is in shared memory. @fd: processes that map this; -1: threads that use @ram. */
static inline void guest_start(struct guest *guest, uint8_t *ram, int fd, uint64_t bytes, uint64_t hot,
			       unsigned int pause_us)
{
	static struct writer writers[2];
	pid_t pid;

	*guest = (struct guest){ .ram = ram, .bytes = bytes, .hot = hot, .running = true, .pause_us = pause_us };
	for (int i = 0; i < 2; i++) {
		writers[i] = (struct writer){ guest, ram, i + 1 };
		if (fd < 0) {
			pthread_create(&guest->thread[i], NULL, guest_main, &writers[i]);
			continue;
		}
		pid = fork();
		if (pid) {
			guest->pid[i] = pid;
			continue;
		}
		writers[i].ram = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (writers[i].ram != MAP_FAILED)
			guest_main(&writers[i]);
		_exit(writers[i].ram == MAP_FAILED);
	}
}

static inline void guest_pause(struct guest *guest)
{
	guest->running = false;
	while (guest->parked != 2)
		usleep(500);
}

static inline void guest_end(struct guest *guest)
{
	guest->stop = true;
	for (int i = 0; i < 2; i++) {
		if (guest->pid[i])
			waitpid(guest->pid[i], NULL, 0);
		else
			pthread_join(guest->thread[i], NULL);
	}
}

/* ---- Both sides, in threads or processes ---- */

/* Shared by both sides, also when they are processes. */
struct world {
	struct guest guest;
	_Atomic int port;
	_Atomic bool source_runs, destination_runs;	/* the guest, there */
	_Atomic bool discarded, completed;
	_Atomic int source_result, destination_result, source_verdict, destination_verdict;
};

enum act { NOTHING, ABORT, KILL, STOP, HANG };

#define HANG_MS 4000
/* Beside the ten states, the moments in which the VMM works for an engine. */
enum { AT_PAUSE = KMIG_STATES, AT_SAVE, AT_LOAD, AT_RUN, AT_PREPARE, POINTS };
/* And when a round has arrived. */
enum { AT_ROUND = POINTS + 1 };

struct side {
	struct world *world;
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct guest *guest;
	void *engine;
	bool is_source;
	uint64_t bytes;
	enum act act;
	int at;
	void (*hook)(struct side *side, int at);	/* in each of these moments */
	size_t state_length;
	bool state_right;
	unsigned int rounds;
	struct kmig_round_report round;	/* the last */
	struct kmig_report report;
	char error[512];
	/* of the tracker external: what the VMM has seen to be written */
	int (*dirty)(uint64_t first, uint64_t pages, uint64_t *bitmap);
	/* what to change about the options */
	enum kmig_tracker_kind tracker;
	enum kmig_transport transport;
	uint64_t rdma_window_bytes;
	uint32_t downtime_ms, max_rounds, timeout_ms, probe_ms;
	enum kmig_timeout_action on_timeout;
	bool no_stun;
	uint64_t max_time_ms;
	unsigned int channels;		/* 0: as is usual */
	bool channels_auto;
	const struct kmig_path *paths;
	unsigned int path_count;
	const char *host;		/* to listen on, and to connect to; NULL: loopback */
	const struct kmig_address *more;
	unsigned int more_count;
	uint32_t channel_wait_ms;
	uint64_t max_bandwidth;
	bool marked;			/* with these */
	int dscp, priority;
	int pause_error, resume_error, save_error, load_error, run_error, prepare_error;
	uint64_t max_bytes;
	unsigned int delay_ms;		/* of each VMM function */
	bool save_early;		/* saving writes at once, and then takes its time */
	_Atomic unsigned int needs;	/* digests that were asked for again */
	_Atomic bool stuck;		/* it was said that the guest could not be resumed */
};

static inline void act(struct side *side, int at)
{
	if (side->hook)
		side->hook(side, at);
	if (side->at != at)
		return;
	if (side->act == KILL)
		kill(getpid(), SIGKILL);
	if (side->act == STOP) {
		side->act = NOTHING;	/* once */
		raise(SIGSTOP);
	}
	if (side->act == HANG)
		usleep(HANG_MS * 1000);
	if (side->act == ABORT && side->is_source)
		kmig_source_abort(side->engine);
	else if (side->act == ABORT)
		kmig_destination_abort(side->engine);
}

static inline void on_progress(const struct kmig_report *report, void *data)
{
	act(data, report->state);
}

static inline uint8_t state_byte(size_t i)
{
	return i * 7 + (i >> 12);
}

static inline void delay(const struct side *side)
{
	usleep(side->delay_ms * 1000);
}

static inline int on_pause(void *data)
{
	struct side *side = data;

	act(side, AT_PAUSE);
	delay(side);
	if (side->guest)
		guest_pause(side->guest);
	side->world->source_runs = false;
	/* A vCPU's last write. */
	if (side->guest)
		side->guest->ram[side->guest->bytes - 32] ^= 1;
	return side->pause_error;
}

static inline int on_resume(void *data)
{
	struct side *side = data;

	if (side->resume_error)
		return side->resume_error;
	side->world->source_runs = true;
	if (side->guest)
		side->guest->running = true;
	return 0;
}

static inline int on_save(void **state, size_t *length, void *data)
{
	struct side *side = data;
	uint8_t *bytes = malloc(side->state_length);

	if (!bytes)
		return -ENOMEM;
	act(side, AT_SAVE);
	if (side->save_early) {
		side->guest->ram[side->guest->bytes * 3 / 4] = 1;
		usleep(500000);
	}
	delay(side);
	if (side->save_error) {
		free(bytes);
		return side->save_error;
	}
	for (size_t i = 0; i < side->state_length; i++)
		bytes[i] = state_byte(i);
	/* Saving a device may still write to guest memory. */
	if (side->guest)
		memcpy(side->guest->ram + side->guest->bytes - 16, "written by save", 16);
	*state = bytes;
	*length = side->state_length;
	return 0;
}

static inline void on_completed(void *data)
{
	struct side *side = data;

	side->world->completed = true;
}

static inline void on_round(const struct kmig_round_report *round, void *data)
{
	struct side *side = data;

	if (round->round == side->rounds + 1)
		side->rounds++;
	side->round = *round;
	act(side, AT_ROUND);
}

static inline int on_dirty(unsigned int region, uint64_t first, uint64_t pages, uint64_t *bitmap, void *data)
{
	struct side *side = data;

	(void)region;
	return side->dirty(first, pages, bitmap);
}

static inline int on_prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	struct side *side = data;

	act(side, AT_PREPARE);
	delay(side);
	if (count != 1 || bytes[0] != side->bytes)
		return -EINVAL;
	regions[0] = side->region;
	return side->prepare_error;
}

static inline int on_load(const void *state, size_t length, void *data)
{
	const uint8_t *bytes = state;
	struct side *side = data;

	act(side, AT_LOAD);
	delay(side);
	side->state_right = length == side->state_length;
	for (size_t i = 0; i < length; i++)
		side->state_right = side->state_right && bytes[i] == state_byte(i);
	return side->load_error;
}

static inline int on_run(void *data)
{
	struct side *side = data;

	act(side, AT_RUN);
	delay(side);
	if (side->run_error)
		return side->run_error;
	side->world->destination_runs = true;
	return 0;
}

static inline void on_discard(void *data)
{
	struct side *side = data;

	side->world->discarded = true;
}

static const struct kmig_source_ops source_ops = {
	.size = sizeof(source_ops),
	.pause = on_pause,
	.resume = on_resume,
	.save_state = on_save,
	.completed = on_completed,
	.progress = on_progress,
	.round = on_round,
	.dirty = on_dirty,
};

static const struct kmig_destination_ops destination_ops = {
	.size = sizeof(destination_ops),
	.prepare = on_prepare,
	.load_state = on_load,
	.run = on_run,
	.discard = on_discard,
	.progress = on_progress,
};

/* Listen, tell the port, receive. */
static inline void *destination_main(void *data)
{
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_destination *destination;
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	struct side *side = data;
	int err;

	opts.host = side->host;
	opts.rdma_window_bytes = side->rdma_window_bytes;
	opts.port = 0;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = side->timeout_ms;
	opts.max_bytes = side->max_bytes;
	opts.more = side->more;
	opts.more_count = side->more_count;
	err = kmig_destination_new(side->ctx, &opts, &destination_ops, side, &destination);
	if (!err) {
		side->engine = destination;
		err = kmig_destination_address(destination, &address, &length);
		if (!err) {
			side->world->port = ntohs(((struct sockaddr_in *)&address)->sin_port);
			err = kmig_destination_run(destination);
		}
		side->report = (struct kmig_report){ .size = sizeof(side->report) };
		kmig_destination_report(destination, &side->report);
		kmig_destination_free(destination);
	}
	snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
	side->world->destination_verdict = side->report.verdict;
	side->world->destination_result = err;
	return NULL;
}

static inline int source_main(struct side *side)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;
	int err;

	opts.host = side->host ? side->host : "127.0.0.1";
	opts.tracker = side->tracker;
	opts.transport = side->transport;
	opts.port = side->world->port;
	opts.secret = SECRET;
	opts.secret_len = strlen(SECRET);
	opts.timeout_ms = side->timeout_ms;
	if (side->channels)
		opts.channels = side->channels;
	if (side->channels_auto)
		opts.channels = KMIG_CHANNELS_AUTO;
	opts.paths = side->paths;
	opts.path_count = side->path_count;
	if (side->downtime_ms)
		opts.downtime_ms = side->downtime_ms;
	if (side->max_rounds)
		opts.max_rounds = side->max_rounds;
	if (side->channel_wait_ms)
		opts.channel_wait_ms = side->channel_wait_ms;
	opts.max_bandwidth = side->max_bandwidth;
	opts.probe_ms = side->probe_ms;
	if (side->marked) {
		opts.dscp = side->dscp;
		opts.priority = side->priority;
	}
	opts.on_timeout = side->on_timeout;
	opts.no_stun = side->no_stun;
	opts.max_time_ms = side->max_time_ms;
	err = kmig_source_new(side->ctx, &opts, &source_ops, side, &source);
	if (err) {
		snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
		side->world->source_result = err;
		return err;
	}
	side->engine = source;
	err = kmig_source_add_region(source, side->region);
	if (!err)
		err = kmig_source_run(source);
	side->report = (struct kmig_report){ .size = sizeof(side->report) };
	kmig_source_report(source, &side->report);
	snprintf(side->error, sizeof(side->error), "%s", kmig_ctx_error(side->ctx));
	side->world->source_verdict = side->report.verdict;
	side->world->source_result = err;
	kmig_source_free(source);
	return err;
}

static inline void log_line(enum kmig_log_level level, const char *text, void *data)
{
	struct side *side = data;

	if (level == KMIG_LOG_DEBUG && strstr(text, "still needs digests"))
		side->needs++;
	if (level == KMIG_LOG_ERROR && strstr(text, "could not be resumed"))
		side->stuck = true;
	if (getenv("LOG"))
		fprintf(stderr, "# %s %d: %s\n", side->is_source ? "source" : "destination", level, text);
}

static inline int side_init(struct side *side, struct world *world, bool is_source, uint64_t bytes)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	int err;

	*side = (struct side){
		.world = world,
		.is_source = is_source,
		.bytes = bytes,
		.at = -1,
		.timeout_ms = TIMEOUT_MS,
		.state_length = 700000,
	};
	opts.bytes = bytes;
#ifndef SOURCE_REGION
#define SOURCE_REGION KMIG_REGION_LMTRACK
#endif
	opts.kind = is_source ? SOURCE_REGION : KMIG_REGION_MEMFD;
	err = kmig_ctx_new(&side->ctx);
	if (err)
		return err;
	kmig_ctx_set_log(side->ctx, log_line, side);
	return kmig_region_create(side->ctx, &opts, &side->region);
}

static inline void side_end(struct side *side)
{
	kmig_region_free(side->region);
	kmig_ctx_free(side->ctx);
}

static inline struct world *new_world(void)
{
	struct world *world = mmap(NULL, sizeof(*world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	world->source_runs = true;
	return world;
}

/* Something in every 8th page of the lower half, zeroes beside it, a page at the end. */
static inline void fill(uint8_t *ram, uint64_t bytes)
{
	for (uint64_t at = 0; at < bytes / 2; at += PAGE_BYTES) {
		uint64_t value = at / PAGE_BYTES % 8 ? 0 : at * 0x9e3779b97f4a7c15;

		for (unsigned int i = 0; i < PAGE_BYTES; i += 8)
			memcpy(ram + at + i, &value, 8);
	}
	ram[bytes - 1] = 1;
}

static inline uint64_t resident(struct kmig_region *region)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;

	return kmig_region_get_info(region, &info) ? 0 : info.resident_bytes;
}

#endif /* LIB_PAIR_H */
