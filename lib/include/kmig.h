/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkmig: moving the memory of a running virtual machine to another host.
 *
 * Objects are opaque and belong to a context. Functions return 0 (or a count or descriptor
 * where so said) and a negative errno on failure; kmig_ctx_error() then tells in words what
 * was wrong, where, and what to do. Option structures begin with their size, so that a
 * program built against an older header keeps working: initialise them with the
 * KMIG_..._INIT macro and set what differs.
 *
 * An object may be used by one thread at a time; kmig_source_abort(),
 * kmig_source_set_max_bandwidth() and kmig_destination_abort() may be called from any thread and
 * from signal handlers.
 * The library has no globals, prints nothing, never exits and installs no signal handler
 * (it writes to sockets with MSG_NOSIGNAL; the kernel module does likewise).
 */
#ifndef KMIG_H
#define KMIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define KMIG_VERSION_MAJOR 0
#define KMIG_VERSION_MINOR 1
#define KMIG_PORT 4760			/* default TCP port of a destination */
#define KMIG_CHUNK_SIZE (2u << 20)	/* bytes */

/** kmig_version() - the library's version as text, "MAJOR.MINOR" */
const char *kmig_version(void);

/* ---- Context ------------------------------------------------------------------------ */

struct kmig_ctx;

enum kmig_log_level { KMIG_LOG_ERROR, KMIG_LOG_WARNING, KMIG_LOG_INFO, KMIG_LOG_DEBUG };

typedef void (*kmig_log_fn)(enum kmig_log_level level, const char *text, void *data);

int kmig_ctx_new(struct kmig_ctx **ctx);
void kmig_ctx_free(struct kmig_ctx *ctx);	/* after all its objects; NULL is allowed */
void kmig_ctx_set_log(struct kmig_ctx *ctx, kmig_log_fn fn, void *data);

/** kmig_ctx_error() - the message of the last call that failed; "" if none did */
const char *kmig_ctx_error(const struct kmig_ctx *ctx);

/* ---- Region: guest memory ------------------------------------------------------------ */

struct kmig_region;

enum kmig_region_kind {
	KMIG_REGION_AUTO,	/* lmtrack where /dev/lmtrack exists, else memfd */
	KMIG_REGION_LMTRACK,	/* can be a migration's source, seen from any process */
	KMIG_REGION_MEMFD,	/* only from within the VMM; see enum kmig_tracker_kind */
};

struct kmig_region_opts {
	size_t size;
	enum kmig_region_kind kind;
	uint64_t bytes;		/* multiple of the page size */
	int node;		/* NUMA node or -1 */
	const char *name;	/* 1 to 63 printable characters without '/' */
};
#define KMIG_REGION_OPTS_INIT { .size = sizeof(struct kmig_region_opts), .node = -1, .name = "ram" }

struct kmig_region_info {
	size_t size;
	enum kmig_region_kind kind;	/* LMTRACK or MEMFD */
	uint64_t bytes;
	uint64_t id;
	uint64_t resident_bytes;
	uint32_t page_size;
	int node;
	bool tracked;
	uint32_t mappers;
	uint64_t write_faults;
	char name[64];
};
#define KMIG_REGION_INFO_INIT { .size = sizeof(struct kmig_region_info) }

int kmig_region_create(struct kmig_ctx *ctx, const struct kmig_region_opts *opts, struct kmig_region **region);

/**
 * kmig_region_adopt() - use a region whose descriptor came from elsewhere
 * @fd: stays the caller's; the region opens the file anew, so that what it starts ends with it
 */
int kmig_region_adopt(struct kmig_ctx *ctx, int fd, struct kmig_region **region);

/**
 * kmig_region_find() - find the lmtrack region of a running process
 * @pid: the process; @fd: its descriptor number, or -1: the only region it holds
 *
 * ENOENT: it holds none; EMLINK: several, and @fd is -1; EACCES/EPERM: not allowed to look.
 */
int kmig_region_find(struct kmig_ctx *ctx, pid_t pid, int fd, struct kmig_region **region);

int kmig_region_fd(const struct kmig_region *region);		/* stays the region's */
uint64_t kmig_region_bytes(const struct kmig_region *region);
void *kmig_region_map(struct kmig_region *region);		/* whole, read-write, once; NULL: see kmig_ctx_error() */
int kmig_region_get_info(struct kmig_region *region, struct kmig_region_info *info);
int kmig_region_clear(struct kmig_region *region);		/* punch it whole: reads as zero, costs nothing */

/**
 * kmig_region_discard() - punch whole pages: they read as zero and cost nothing; from any thread
 *
 * For what the guest gives back (a balloon, free page reporting). While the region is moved with
 * KMIG_TRACKER_PAGEMAP or _EXTERNAL, memory is given back with this only: a page that was punched
 * otherwise and is read again before the next round is not noticed.
 */
int kmig_region_discard(struct kmig_region *region, uint64_t first_byte, uint64_t bytes);

/**
 * kmig_region_track_start() - from its return on, every write to the region is noticed
 * @pinned_pages: NULL: pages pinned for device I/O are refused (EBUSY); else they are allowed,
 *	dirty in every harvest, and their number is put here
 *
 * Tracking belongs to this region object: it ends with kmig_region_track_stop() or when the
 * object is freed, or its process ends.
 */
int kmig_region_track_start(struct kmig_region *region, uint64_t *pinned_pages);
int kmig_region_track_stop(struct kmig_region *region);
/** @bitmap: zeroed, one bit a page from @first_page (a multiple of 64); returns 0, @dirty may be NULL */
int kmig_region_dirty_get(struct kmig_region *region, bool clear, uint64_t first_page, uint64_t pages,
			  uint64_t *bitmap, uint64_t *dirty);
void kmig_region_free(struct kmig_region *region);

/* ---- Stream: the kernel's sender, for those who bring their own engine ------------------ */

struct kmig_stream;

enum kmig_send_what { KMIG_SEND_ALL, KMIG_SEND_DIRTY };

struct kmig_stream_opts {
	size_t size;
	uint64_t id;
	bool no_zero_detection;
};
#define KMIG_STREAM_OPTS_INIT { .size = sizeof(struct kmig_stream_opts) }

struct kmig_round {
	uint32_t round;
	int error;		/* 0 or negative errno; that of a channel which is lost, see kmig_stream_lost() */
	int channel;		/* where the error happened, or -1 */
	uint64_t duration_ns, pages, data_pages, zero_pages, bytes;
};

/**
 * struct kmig_round_times - what a round's time was spent on
 *
 * The first two are times of threads, summed over channels. @wire_ns is of the round's
 * @duration_ns: at least one channel sent, or its connection had bytes that could not leave yet.
 * The rest of the duration the wire waited for pages to be found: with any number of channels the
 * wire carries @bytes / @wire_ns.
 */
struct kmig_round_times {
	size_t size;
	uint64_t harvest_ns;	/* looking for pages, taking them, looking for zeroes */
	uint64_t send_ns;	/* sending, waiting for room included */
	uint64_t wire_ns;	/* 0: not known, the module is older */
};
#define KMIG_ROUND_TIMES_INIT { .size = sizeof(struct kmig_round_times) }

struct kmig_channel_stats {
	uint64_t frames, data_pages, zero_pages, zero_extents, zerocopy_bytes, copied_bytes, header_bytes, blocked_ns;
};

int kmig_stream_create(struct kmig_ctx *ctx, const struct kmig_stream_opts *opts, struct kmig_stream **stream);
int kmig_stream_fd(const struct kmig_stream *stream);		/* POLLIN: the round has ended; POLLPRI: a channel is lost */
int kmig_stream_add_region(struct kmig_stream *stream, struct kmig_region *region, uint32_t index);
int kmig_stream_add_channel(struct kmig_stream *stream, int sock);	/* returns the channel's number; sock stays the caller's */
/**
 * kmig_stream_lost() - channels that are lost, and were not dropped
 * @lost: out, bit n: channel n
 *
 * Their connections broke. The round goes on over the others; no other begins before the lost ones
 * are dropped.
 */
int kmig_stream_lost(struct kmig_stream *stream, uint64_t *lost);
/**
 * kmig_stream_drop_channel() - let go of a channel, lost or not
 * @why: out, how it was lost, a negative errno; ECANCELED: it was not
 *
 * What it has sent in the round is dirty again. That must not be sent over another channel before
 * the receiver has closed its end, or an older copy may land on a newer one. EINVAL: no such
 * channel; EALREADY: dropped before; EPIPE: the stream has failed.
 */
int kmig_stream_drop_channel(struct kmig_stream *stream, uint32_t channel, int *why);
/**
 * kmig_stream_replace_channel() - another connection for a channel that was dropped
 * @sock: stays the caller's
 *
 * Between two rounds, when the receiver has all of the last. EBUSY: a round is being sent; EEXIST:
 * the channel was not dropped; else as for kmig_stream_add_channel().
 */
int kmig_stream_replace_channel(struct kmig_stream *stream, uint32_t channel, int sock);
int kmig_stream_send(struct kmig_stream *stream, uint32_t round, enum kmig_send_what what);
int kmig_stream_wait(struct kmig_stream *stream, int timeout_ms, struct kmig_round *round);
int kmig_stream_times(struct kmig_stream *stream, struct kmig_round_times *times);	/* of the round last waited for */
int kmig_stream_cancel(struct kmig_stream *stream);
int kmig_stream_channel_stats(struct kmig_stream *stream, uint32_t channel, struct kmig_channel_stats *stats);
void kmig_stream_free(struct kmig_stream *stream);

/* ---- Forecast: what a migration will cost ------------------------------------------------ */

#define KMIG_CURVE_POINTS 16

/**
 * struct kmig_curve_point - a guest's working set: so many distinct pages written within so long
 *
 * Between two points a power law is taken, shorter than the first a proportion, and longer than
 * the last the law of the last two.
 */
struct kmig_curve_point {
	uint64_t interval_ns;	/* > 0 */
	uint64_t pages;
};

struct kmig_forecast_opts {
	size_t size;
	uint64_t ram_bytes;		/* of the guest, whole */
	uint64_t bytes;			/* in use: what the first pass carries */
	uint32_t page_size;		/* bytes */
	uint32_t downtime_ms;		/* the limit */
	uint32_t max_rounds;
	uint64_t max_time_ms;		/* for everything, 0: no limit */
	double bytes_per_second;	/* of the wire */
	const struct kmig_curve_point *curve;
	unsigned int points;		/* at most KMIG_CURVE_POINTS; 0: the guest writes nothing */
	uint64_t trip_ns;		/* what a round takes beside its pages */
	uint64_t blackout_ns;		/* what the blackout takes beside its pages: devices, digests */
	uint64_t held_pages;		/* held back until the blackout */
	double convergence;		/* under stun a round leaves at most this part of itself, 0 to 1 */
	double stun_floor;		/* pages a second that the guest may dirty in any case */
	bool no_stun;
	bool under_way;			/* the first pass is over: stun may begin at once */
};
#define KMIG_FORECAST_OPTS_INIT { .size = sizeof(struct kmig_forecast_opts), .page_size = 4096, \
	.downtime_ms = 300, .max_rounds = 30, .convergence = 0.5, .stun_floor = 256 }

struct kmig_forecast {
	size_t size;
	bool converges;			/* every limit is kept */
	uint32_t rounds;		/* before the blackout */
	uint64_t bytes;
	uint64_t total_ns, downtime_ns;
	double stun_pages_per_second;	/* the ceiling that it takes; 0: none */
	uint64_t next_pages;		/* that the first of these rounds leaves dirty */
};
#define KMIG_FORECAST_INIT { .size = sizeof(struct kmig_forecast) }

/**
 * kmig_forecast() - play a migration through
 *
 * Without stun if that keeps the limits; else with the highest ceiling that does, from
 * @convergence of the wire's rate down to the floor. The formulas stand in lib/forecast.c and,
 * with their source, in Documentation/convergence.rst.
 *
 * EINVAL: an option is missing or out of range. ERANGE: the figures are beyond all numbers.
 */
int kmig_forecast(struct kmig_ctx *ctx, const struct kmig_forecast_opts *opts, struct kmig_forecast *forecast);

/**
 * kmig_probe() - measure the working-set curve of a guest that runs
 * @regions: its memory, lmtrack regions that are not tracked
 * @duration_ms: 10 to 60000; intervals double up to it
 * @points: out, room for KMIG_CURVE_POINTS, @npoints of them filled
 *
 * Tracks the regions meanwhile. Of a large guest, a part chosen at random is watched.
 * EOPNOTSUPP: a region is no lmtrack region; EBUSY: one is tracked; else as
 * kmig_region_track_start(). Nothing is tracked by it when it returns.
 */
int kmig_probe(struct kmig_ctx *ctx, struct kmig_region *const *regions, unsigned int count, uint32_t duration_ms,
	       struct kmig_curve_point *points, unsigned int *npoints);

/* What to do when the downtime cannot be kept within the limits of rounds and time. */
enum kmig_timeout_action {
	KMIG_TIMEOUT_STUN,		/* slow the guest down further, for as long as it takes */
	KMIG_TIMEOUT_SWITCHOVER,	/* pause it all the same: a longer downtime */
	KMIG_TIMEOUT_ABORT,		/* leave it where it is */
};

/* ---- Report: what both engines tell during and after a migration -------------------------- */

/* The ten states of a live migration, in order. */
enum kmig_state {
	KMIG_STATE_HELLO,	/* versions, features, the shared secret */
	KMIG_STATE_CAPACITY,	/* does the destination have the memory? */
	KMIG_STATE_REGIONS,	/* region table */
	KMIG_STATE_DEVICES,	/* destination VM set up */
	KMIG_STATE_CHANNELS,	/* data connections */
	KMIG_STATE_FIRST_PASS,
	KMIG_STATE_ITERATION,
	KMIG_STATE_BLACKOUT,
	KMIG_STATE_CHECK,	/* digests, prepare, ready, commit */
	KMIG_STATE_CLEANUP,
	KMIG_STATES
};
const char *kmig_state_name(enum kmig_state state);

enum kmig_verdict {
	KMIG_RUNNING,		/* the migration is under way */
	KMIG_COMPLETED,		/* the guest runs at the destination */
	/*
	 * The guest runs at the source, as before. Only if @resume failed does it stand there: that
	 * is logged as an error
	 */
	KMIG_FAILED,
	KMIG_CANCELLED,		/* likewise, because of an abort */
	KMIG_UNKNOWN,		/* committed, no answer: the source stays paused until someone decides */
};

/*
 * The downtime by its causes, as the source saw it, one after the other: together they are the
 * downtime. What the destination did is what it said.
 */
struct kmig_downtime {
	uint64_t pause_ns;		/* the VMM pauses the guest */
	uint64_t save_ns;		/* device state out, while the last round is harvested and sent */
	uint64_t memory_ns;		/* what the last rounds took beyond that */
	uint64_t digest_ns;		/* digests of what the last rounds carried */
	uint64_t load_ns;		/* device state in */
	uint64_t commit_ns;		/* commit, its way there and the answer's back */
	uint64_t resume_ns;		/* the destination's VMM runs the guest */
};

#define KMIG_REPORT_THREADS 16

/* What the guest felt while it was tracked; zeroes where the tracker cannot know. */
struct kmig_guest_cost {
	uint64_t write_faults, fault_ns;	/* in the module; entering the kernel is not in it */
	uint64_t stuns, stun_ns, stun_max_ns;
	unsigned int threads;			/* entries in @thread, those first who were stunned longest */
	struct {
		pid_t id;
		uint64_t stuns, stun_ns;
	} thread[KMIG_REPORT_THREADS];
};

struct kmig_report {
	size_t size;
	enum kmig_verdict verdict;
	enum kmig_state state;
	uint64_t total_ns;		/* from the start of the engine until clean-up, or now */
	uint64_t downtime_ns;		/* source paused to destination running, as the source saw it; destination: since it heard of the pause */
	uint64_t setup_ns;		/* hello to first pass */
	uint64_t state_ns[KMIG_STATES];	/* when each state began, since the start; 0 for one not reached, but the first */
	uint64_t ram_bytes;		/* all regions */
	uint64_t transferred_bytes;	/* over data channels, and the device state */
	uint64_t data_pages, zero_pages;
	uint64_t zerocopy_bytes, copied_bytes;
	uint64_t device_state_bytes;
	uint64_t digests_compared;	/* chunks */
	uint64_t remaining_bytes;	/* not sent yet in this round, or dirty again: an estimate while running */
	uint64_t eta_ns;		/* until the end: an estimate; 0 when unknown */
	double bytes_per_second;	/* on the wire, measured while a round was sent */
	double dirty_pages_per_second;	/* of the last interval */
	uint32_t rounds;
	uint32_t page_size;
	/* Only the source's, from here on. */
	double stun_pages_per_second;	/* the ceiling in force; 0: none */
	uint64_t held_pages;		/* held back until the blackout */
	struct kmig_forecast forecast;	/* from now to the end, after the first pass */
	struct kmig_downtime downtime;	/* when it has completed */
	struct kmig_guest_cost guest;	/* when it has ended */
	const char *decision;		/* why pre-copy ended, a constant; NULL while it goes on */
	/*
	 * What @downtime's memory_ns was spent on, together all of it: the wire waited while pages
	 * were looked for and taken; they were sent, and stored by the destination
	 */
	uint64_t memory_harvest_ns, memory_copy_ns;
	/* Both sides': data channels that broke, and that came back, each as often as it did */
	uint32_t channels_lost, channels_rejoined;
	uint32_t rdma_channels;		/* data channels that began over RDMA */
	/* The source's: data channels that carry, and why not more; NULL: not found out, or as it was told */
	uint32_t channels;
	const char *channels_why;	/* a constant */
	uint64_t max_bandwidth;		/* the source's: the cap in effect, bytes a second; 0: none */
};

struct kmig_round_report {
	uint32_t round;
	uint64_t dirty_pages, data_pages, zero_pages, bytes;
	uint64_t duration_ns;
	double bytes_per_second, dirty_pages_per_second;
	uint64_t held_pages;		/* held back from it */
	double stun_pages_per_second;	/* the ceiling while it was sent; 0: none */
	/*
	 * Of what the round before left dirty: |forecast - came| / came, where less than fits the
	 * blackout counts as that; 0: none was made
	 */
	double forecast_error;
	uint64_t scan_ns;		/* of @duration_ns, the wire waited for pages to be found */
};

/* ---- Source engine ------------------------------------------------------------------ */

struct kmig_source;

/* What the VMM does for the source engine; each returns 0 or a negative errno. */
struct kmig_source_ops {
	size_t size;
	/**
	 * @pause: stop every vCPU; guest memory may only change through @save_state from now on.
	 * If it fails, @resume is called all the same
	 */
	int (*pause)(void *data);
	/**
	 * @resume: run the guest again, after an abort before commit, or because no data channel is
	 * left; then @pause and @save_state may follow once more. Called only if @pause was
	 */
	int (*resume)(void *data);
	/**
	 * @save_state: device state into memory from malloc(), freed by the engine; 1 GiB at
	 * most. May still write to guest memory, until it returns. NULL: none
	 */
	int (*save_state)(void **state, size_t *length, void *data);
	/** @completed: the destination runs; the VMM may end. May be NULL */
	void (*completed)(void *data);
	/** @progress: called several times a second and at each change of state. May be NULL */
	void (*progress)(const struct kmig_report *report, void *data);
	/** @round: a round was sent and acknowledged. May be NULL */
	void (*round)(const struct kmig_round_report *round, void *data);
	/**
	 * @dirty: for KMIG_TRACKER_EXTERNAL: set the bits of the pages that were written since it
	 * was last asked, or since @track(true); clear none, page @first_page + n is bit n % 64 of
	 * word n / 64. What is given is the engine's from then on, and given once.
	 *
	 * Every write counts, whoever made it: vCPUs, the VMM's own threads, devices, other
	 * processes; and every page that was punched out. A write is in one answer or a later one,
	 * never in none: so a page is armed again, and that has taken effect on every CPU, before
	 * the bit is given, as KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG do. A page that may be
	 * written without notice (pinned for a device) is given every time. After @pause has
	 * returned, the answers have to run dry. Called on the engine's thread, never twice at once
	 */
	int (*dirty)(unsigned int region, uint64_t first_page, uint64_t pages, uint64_t *bitmap, void *data);
	/**
	 * @track: for KMIG_TRACKER_EXTERNAL: begin to note writes, before any memory is read; and
	 * stop. Not called to stop if it failed to begin. NULL: the VMM does so all the time
	 */
	int (*track)(bool on, void *data);
};

/**
 * enum kmig_tracker_kind - what notices writes and sends memory
 * @KMIG_TRACKER_AUTO: the module for lmtrack regions; pagemap for memfds that this process has
 *	mapped with kmig_region_map(), if its kernel can
 * @KMIG_TRACKER_LMTRACK: the kernel module
 * @KMIG_TRACKER_PAGEMAP: userfaultfd and PAGEMAP_SCAN, Linux 6.7 or newer, without privilege. For
 *	memfds, and within the VMM: it sees what is written through the mapping that
 *	kmig_region_map() made, by this process's threads, by the kernel on their behalf and by KVM.
 *	It does not see what another process writes, or write(2) to the file, or a device that was
 *	given the page before: direct I/O in flight, VFIO, RDMA. Other mappings are refused (EBUSY)
 *	as far as they can be seen. While it runs, fork() does not hand the mapping on
 * @KMIG_TRACKER_EXTERNAL: the VMM itself, with @dirty of struct kmig_source_ops; any region
 *
 * All but the module send from user space. They do not slow the guest down (stun).
 */
enum kmig_tracker_kind {
	KMIG_TRACKER_AUTO,
	KMIG_TRACKER_LMTRACK,
	KMIG_TRACKER_PAGEMAP,
	KMIG_TRACKER_EXTERNAL,
};

/**
 * enum kmig_transport - what data channels go over
 * @KMIG_TRANSPORT_TCP:	TCP
 * @KMIG_TRANSPORT_AUTO: RDMA where both sides can; a channel that cannot be set up, or is lost,
 *			goes over TCP
 * @KMIG_TRANSPORT_RDMA: RDMA and nothing else: where it cannot be set up the migration fails, and
 *			when the last channel is lost
 *
 * RDMA needs KMIG_TRACKER_LMTRACK, lmtrack_rdma.ko, and at both ends a device with the address of
 * the control connection.
 */
enum kmig_transport { KMIG_TRANSPORT_TCP, KMIG_TRANSPORT_AUTO, KMIG_TRANSPORT_RDMA };

/**
 * struct kmig_path - a way for data channels to the destination
 *
 * Addresses are numeric. What is not given, the routes decide.
 */
struct kmig_path {
	const char *local;	/* address to connect from, or NULL */
	const char *device;	/* network device to leave by, or NULL */
	const char *remote;	/* the destination's address; NULL: where the control connection goes */
	uint16_t port;		/* there; 0: the control connection's */
};
#define KMIG_PATHS_MAX 16

/*
 * As many as it takes: one for each path at first, then more as long as more is carried, up to one
 * for each processor that this thread may run on
 */
#define KMIG_CHANNELS_AUTO 0

struct kmig_source_opts {
	size_t size;
	const char *host;	/* destination, numeric or name */
	uint16_t port;		/* 0: KMIG_PORT */
	const void *secret;	/* shared secret, at least 16 bytes */
	size_t secret_len;
	unsigned int channels;	/* 1 to 64, or KMIG_CHANNELS_AUTO */
	uint32_t downtime_ms;	/* limit that decides when to pause; 1 to 60000 */
	uint32_t max_rounds;	/* of pre-copy, 1 to 10000; see on_timeout */
	/*
	 * Longest silence of the peer, which gives a sign of life every second or, if that is
	 * less, every quarter of its own time-out: give both sides about the same. Its VMM may take longer, but while the guest is paused no
	 * more than six times this: to load the device state, to run
	 */
	uint32_t timeout_ms;
	bool no_zero_detection;
	bool allow_pinned;	/* go on with pages pinned for devices: they are sent in every round */
	enum kmig_tracker_kind tracker;	/* what notices writes */
	/*
	 * Convergence; see Documentation/convergence.rst. Stun and holding back are done where the
	 * tracker can.
	 */
	uint64_t max_time_ms;			/* until the blackout; 0: no limit */
	/*
	 * When that or max_rounds is reached, as seen when a round ends; ABORT sees the time at once.
	 * SWITCHOVER also when rounds do not shrink at the floor, which fails otherwise
	 */
	enum kmig_timeout_action on_timeout;
	double convergence;			/* under stun a round leaves at most this part, 0 to 1 */
	double stun_floor;			/* pages a second that the guest may dirty in any case, >= 1 */
	bool no_stun;
	bool no_hold_back;
	uint32_t probe_ms;			/* watch the guest before anything is sent, 10 to 60000, if it is lmtrack's; 0: do not */
	/*
	 * A data channel that breaks is connected again, and the others go on meanwhile. When all are
	 * lost, the guest runs, and so long one may take to come back; 0: then it has failed
	 */
	uint32_t channel_wait_ms;
	/*
	 * Bytes a second that all data channels together hand to the network, KMIG_BANDWIDTH_MIN to
	 * KMIG_BANDWIDTH_MAX; 0: as many as it takes. It holds in the blackout as well: what fits the
	 * downtime is judged by it. The control connection, and with it the device state, is not capped
	 */
	uint64_t max_bandwidth;
	enum kmig_transport transport;	/* of data channels */
	/*
	 * For the network, on what this side sends over its TCP connections, of control and data: DSCP
	 * (0 to 63) in the IP header, and SO_PRIORITY (0 to 6) for the host's own queues. -1: as it is.
	 * A DSCP alone also sets the priority, to what the kernel derives from it. RDMA's channels keep
	 * the traffic class of their device
	 */
	int dscp;
	int priority;
	/*
	 * The data channels are spread evenly over these paths, which are copied. One that breaks comes
	 * back over its own path, or over another if that does not connect: the migration lives as long
	 * as one path does, and the control connection. None: all as the control connection
	 */
	const struct kmig_path *paths;
	unsigned int path_count;		/* at most KMIG_PATHS_MAX */
};
#define KMIG_BANDWIDTH_MIN 65536
#define KMIG_BANDWIDTH_MAX 1000000000000
#define KMIG_SOURCE_OPTS_INIT { .size = sizeof(struct kmig_source_opts), .channels = 2, \
	.downtime_ms = 300, .max_rounds = 30, .timeout_ms = 10000, .convergence = 0.5, .stun_floor = 256, \
	.channel_wait_ms = 30000, .dscp = -1, .priority = -1 }

int kmig_source_new(struct kmig_ctx *ctx, const struct kmig_source_opts *opts,
		    const struct kmig_source_ops *ops, void *data, struct kmig_source **source);
int kmig_source_add_region(struct kmig_source *source, struct kmig_region *region);

/**
 * kmig_source_run() - migrate; blocks, calling the VMM's functions on this thread; once
 *
 * The regions have to outlive it; they are tracked while it runs and idle afterwards.
 * 0: KMIG_COMPLETED. Negative errno: see the report's verdict. ENOMEM/ENOSPC: the destination
 * lacks memory (refused before the first pass); EPROTONOSUPPORT: version or feature;
 * EKEYREJECTED: secret; ECANCELED: aborted; ETIMEDOUT, ECONNRESET...: the peer;
 * EBADMSG: a digest differed; ETIME: it did not converge within its limits, the guest runs on
 * here; EINPROGRESS: KMIG_UNKNOWN.
 */
int kmig_source_run(struct kmig_source *source);
void kmig_source_abort(struct kmig_source *source);

/**
 * kmig_source_set_max_bandwidth() - change @max_bandwidth of the options, also while it runs
 *
 * From any thread and from signal handlers, as long as @source is there. It is in effect a tenth of
 * a second later at most, unless one of the VMM's functions runs: then when that has returned. A
 * module that is too old for it is told of in the log, and the migration goes on. EINVAL, without a
 * message: out of range.
 */
int kmig_source_set_max_bandwidth(struct kmig_source *source, uint64_t bytes_per_second);
int kmig_source_report(struct kmig_source *source, struct kmig_report *report);
void kmig_source_free(struct kmig_source *source);

/* ---- Destination engine --------------------------------------------------------------- */

struct kmig_destination;

struct kmig_destination_ops {
	size_t size;
	/**
	 * @prepare: the source announced @count regions of these sizes: set the VM up and name a
	 * region for each. The engine empties them before it receives. ENOMEM refuses.
	 */
	int (*prepare)(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data);
	/**
	 * @load_state: load the device state; the guest must not run yet. Called when the source
	 * has sent some, after all of memory has arrived and agrees. NULL: a source with device
	 * state is refused
	 */
	int (*load_state)(const void *state, size_t length, void *data);
	/**
	 * @run: the source has committed: run the guest. It can no longer be refused; a failure
	 * leaves the verdict KMIG_UNKNOWN on both sides, and the VM is not discarded
	 */
	int (*run)(void *data);
	/** @discard: the migration failed before commit: throw the VM away. May be NULL */
	void (*discard)(void *data);
	void (*progress)(const struct kmig_report *report, void *data);	/* may be NULL */
};

struct kmig_address {
	const char *host;	/* numeric or name */
	uint16_t port;
};
#define KMIG_LISTEN_MAX 16

struct kmig_destination_opts {
	size_t size;
	const char *host;	/* address to listen on; NULL: 127.0.0.1 */
	uint16_t port;		/* 0: any free one, see kmig_destination_address() */
	const void *secret;
	size_t secret_len;
	uint32_t timeout_ms;	/* longest silence of the source once it has connected; see the source's */
	/*
	 * Largest sum of regions accepted; what exists of them must also be available then.
	 * 0: all of the sum must be, in MemAvailable and in the memory cgroups of this process
	 */
	uint64_t max_bytes;
	/*
	 * A source that asks for RDMA gets it if there is a device. Memory is registered for it, and so
	 * stays in memory, in windows of this many bytes, a multiple of a chunk and 1 GiB at most;
	 * 0: 16 MiB, or as much as it takes so that the device can have all of them
	 */
	uint64_t rdma_window_bytes;
	bool no_rdma;
	/*
	 * Further addresses to listen on, for data channels over several paths; port 0: that of the
	 * first. Any connection may come to any of them
	 */
	const struct kmig_address *more;
	unsigned int more_count;	/* less than KMIG_LISTEN_MAX */
};
#define KMIG_DESTINATION_OPTS_INIT { .size = sizeof(struct kmig_destination_opts), \
	.port = KMIG_PORT, .timeout_ms = 10000 }

/** kmig_destination_new() - also listens, so that the address is known on return */
int kmig_destination_new(struct kmig_ctx *ctx, const struct kmig_destination_opts *opts,
			 const struct kmig_destination_ops *ops, void *data,
			 struct kmig_destination **destination);
int kmig_destination_address(struct kmig_destination *destination, struct sockaddr_storage *address, socklen_t *length);	/* the first */

/**
 * kmig_destination_run() - receive one migration; blocks, calling the VMM's functions on this
 * thread; once
 *
 * A connection that does not prove the secret is turned away and does not end the call.
 * 0: KMIG_COMPLETED, the guest runs here. Negative errno: see the report's verdict; ENOMEM,
 * EPROTO (the source sent what it must not), EBADMSG (a checksum or digest was wrong),
 * ECANCELED, ETIMEDOUT, ECONNRESET..., or what one of the functions returned. With
 * KMIG_FAILED and KMIG_CANCELLED the guest never ran here and @discard has been called.
 */
int kmig_destination_run(struct kmig_destination *destination);
void kmig_destination_abort(struct kmig_destination *destination);
int kmig_destination_report(struct kmig_destination *destination, struct kmig_report *report);
void kmig_destination_free(struct kmig_destination *destination);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif /* KMIG_H */
