// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The source engine. It reads top-down at the end of the file: kmig_source_run() goes through
 * the ten states on the caller's thread; a tracker notes writes and sends memory, digests and signs
 * of life have threads of their own.
 *
 * Who may run the guest: until COMMIT has been handed to the network whole, we. From then on
 * the destination, unless it tells us that it has not run it and never will.
 */
#include "channels.h"
#include "control.h"
#include "hot.h"
#include "net.h"
#include "policy.h"
#include "report.h"
#include "source_digest.h"
#include "tracker.h"
#include "width.h"

#include <math.h>
#include <openssl/rand.h>
#include <poll.h>
#include <sys/eventfd.h>

#define TICK_MS 100
#define PAUSE_DELAY_US 1000	/* longest delay of a guest that is about to be paused */
#define PASSES_MAX 3		/* digest passes before the blackout need not leave less behind */
#define LAST_ROUNDS_MAX 8	/* rounds while paused until nothing is dirty any more */
/*
 * Signs of life come from a thread of their own. While the guest stands, they are not enough:
 * an answer has to come within so many times the time-out.
 */
#define ANSWER_TIMEOUTS 6
/*
 * What may wait in a channel's socket: enough that the network never waits for the sender, which
 * sleeps meanwhile.
 */
#define QUEUE_MS 5
#define QUEUE_BYTES_MIN (64u << 10)
#define NEEDS_MAX 4		/* digests that are asked for again, at most so often */
#define CHANNELS_GONE (-ENOLINK)	/* no failure: the guest is paused, and has to run again */

struct kmig_source {
	struct kmig_ctx *ctx;
	struct kmig_source_opts opts;
	struct kmig_source_ops ops;
	void *data;
	char *host;
	struct kmig_net_path paths[KMIG_PATHS_MAX];
	void *secret;
	int abort_fd;
	bool used;

	struct kmig_region *regions[LMTRACK_REGIONS_MAX];
	uint64_t *dirty[LMTRACK_REGIONS_MAX];	/* a bitmap of pages for each, from the last peek */
	unsigned int count;

	struct kmig_session session;
	struct kmig_control control;
	struct kmig_source_digest digest;
	bool digesting;
	struct kmig_tracker *tracker;
	uint64_t stream_id;
	struct kmig_channels channels;
	_Atomic uint64_t max_bandwidth;		/* as asked for; by any thread, at any time */
	uint64_t cap;				/* the one in effect */
	bool widening;				/* it is to be found out how many of them it takes */
	struct kmig_width width;
	uint32_t width_changes;			/* channels lost or back when it was last looked at */

	uint32_t round, acked;
	uint64_t round_begin_ns, round_sent_ns;	/* the latter when the tracker had begun it */
	uint64_t round_expected;		/* pages, as far as known when it began */
	uint64_t pages_before;			/* sent in earlier rounds */
	bool sending;				/* the tracker has not finished the round */
	bool channels_ready, ready, need;	/* CHANNELS_READY, READY, NEED have come */
	bool asked_rdma, offered;		/* RDMA_ASK was sent, RDMA_OFFER has come */
	struct kmig_policy policy;
	struct kmig_hot hot;
	uint64_t trip_ns;			/* of a question and its answer on the control connection */

	void *state;
	size_t state_length;
	struct kmig_curve_point probe[KMIG_CURVE_POINTS];
	unsigned int probed;			/* points of it */
	bool stunned;				/* the tracker slows the guest down */
	uint64_t stuns;				/* when last looked at */
	uint32_t lost_seen;			/* channels, likewise */
	bool paused, committed;
	uint64_t paused_ns;
	uint64_t lap_ns;			/* when the last part of the downtime ended */
	uint64_t asked_ns;			/* since then the paused guest waits for an answer; 0: for none */

	struct kmig_clock clock;
	struct kmig_report report;
};

/* ---- Set-up ---- */

static bool is_bandwidth(uint64_t bytes_per_second)
{
	return !bytes_per_second ||
	       (bytes_per_second >= LMTRACK_STREAM_RATE_MIN && bytes_per_second <= LMTRACK_STREAM_RATE_MAX);
}

static int check_opts(struct kmig_ctx *ctx, const struct kmig_source_opts *opts)
{
	if (!opts->host || !*opts->host)
		return kmig_fail(ctx, -EINVAL, "source: no destination host is given");
	if (!opts->secret || opts->secret_len < KMIG_SECRET_MIN)
		return kmig_fail(ctx, -EINVAL, "source: the shared secret has %zu bytes, at least %d are needed",
				 opts->secret ? opts->secret_len : 0, KMIG_SECRET_MIN);
	if (opts->channels > LMTRACK_CHANNELS_MAX)
		return kmig_fail(ctx, -EINVAL, "source: %u channels, give 1 to %d, or 0 for as many as it takes", opts->channels,
				 LMTRACK_CHANNELS_MAX);
	if (!opts->downtime_ms || opts->downtime_ms > 60000)
		return kmig_fail(ctx, -EINVAL, "source: a downtime of %u ms, give 1 to 60000", opts->downtime_ms);
	if (!opts->max_rounds || opts->max_rounds > 10000)
		return kmig_fail(ctx, -EINVAL, "source: %u rounds at most, give 1 to 10000", opts->max_rounds);
	if (opts->timeout_ms < 100)
		return kmig_fail(ctx, -EINVAL, "source: a time-out of %u ms is too short, give at least 100", opts->timeout_ms);
	if (opts->on_timeout > KMIG_TIMEOUT_ABORT)
		return kmig_fail(ctx, -EINVAL, "source: nothing is known by number %d that could be done at a limit", opts->on_timeout);
	if (!(opts->convergence > 0 && opts->convergence < 1))
		return kmig_fail(ctx, -EINVAL, "source: rounds must shrink to a fraction between 0 and 1, not %g", opts->convergence);
	if (!(opts->stun_floor >= 1) || isinf(opts->stun_floor))
		return kmig_fail(ctx, -EINVAL, "source: a floor of %g pages a second, give at least 1", opts->stun_floor);
	if (opts->transport > KMIG_TRANSPORT_RDMA)
		return kmig_fail(ctx, -EINVAL, "source: no transport is known by number %d", opts->transport);
	if (opts->max_time_ms > UINT64_MAX / 1000000)
		return kmig_fail(ctx, -EINVAL, "source: a limit of %llu ms, give 0 for none", (unsigned long long)opts->max_time_ms);
	if (opts->probe_ms && (opts->probe_ms < KMIG_PROBE_MS_MIN || opts->probe_ms > KMIG_PROBE_MS_MAX))
		return kmig_fail(ctx, -EINVAL, "source: a probe of %u ms, give %d to %d, or 0 for none", opts->probe_ms,
				 KMIG_PROBE_MS_MIN, KMIG_PROBE_MS_MAX);
	if (!is_bandwidth(opts->max_bandwidth))
		return kmig_fail(ctx, -EINVAL, "source: a bandwidth of %llu bytes a second at most, give %llu to %llu, or 0 for no limit",
				 (unsigned long long)opts->max_bandwidth, LMTRACK_STREAM_RATE_MIN, LMTRACK_STREAM_RATE_MAX);
	if (opts->dscp < -1 || opts->dscp > KMIG_NET_DSCP_MAX)
		return kmig_fail(ctx, -EINVAL, "source: a DSCP of %d, give 0 to %d, or -1 for none", opts->dscp, KMIG_NET_DSCP_MAX);
	if (opts->priority < -1 || opts->priority > KMIG_NET_PRIORITY_MAX)
		return kmig_fail(ctx, -EINVAL, "source: a priority of %d, give 0 to %d, or -1 for none", opts->priority,
				 KMIG_NET_PRIORITY_MAX);
	if (opts->path_count > KMIG_PATHS_MAX || (opts->path_count && !opts->paths))
		return kmig_fail(ctx, -EINVAL, "source: %u paths, give %d at most", opts->path_count, KMIG_PATHS_MAX);
	return 0;
}

int kmig_source_new(struct kmig_ctx *ctx, const struct kmig_source_opts *given,
		    const struct kmig_source_ops *ops, void *data, struct kmig_source **out)
{
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;
	int err;

	err = kmig_copy_sized(ctx, &opts, sizeof(opts), offsetof(struct kmig_source_opts, max_bandwidth), given,
			      "source options");
	if (!err)
		err = check_opts(ctx, &opts);
	if (err)
		return err;
	source = calloc(1, sizeof(*source));
	if (!source)
		return kmig_fail(ctx, -ENOMEM, "source: out of memory");
	source->ctx = ctx;
	source->opts = opts;
	source->max_bandwidth = opts.max_bandwidth;
	source->data = data;
	source->control.fd = -1;
	source->report.size = sizeof(source->report);
	source->abort_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	source->host = strdup(opts.host);
	source->secret = malloc(opts.secret_len);
	err = kmig_copy_sized(ctx, &source->ops, sizeof(source->ops), sizeof(source->ops), ops, "source functions");
	if (!err && (!source->ops.pause || !source->ops.resume))
		err = kmig_fail(ctx, -EINVAL, "source: the functions pause and resume are needed");
	if (!err && opts.tracker == KMIG_TRACKER_EXTERNAL && !source->ops.dirty)
		err = kmig_fail(ctx, -EINVAL, "source: the tracker external needs the function dirty");
	if (!err && (source->abort_fd < 0 || !source->host || !source->secret))
		err = kmig_fail(ctx, -ENOMEM, "source: out of memory or descriptors");
	if (err) {
		kmig_source_free(source);
		return err;
	}
	for (unsigned int i = 0; i < opts.path_count; i++) {
		err = kmig_net_path(ctx, &opts.paths[i], &source->paths[i]);
		if (err) {
			kmig_source_free(source);
			return err;
		}
	}
	memcpy(source->secret, opts.secret, opts.secret_len);
	/* They are the caller's, and may be gone when the engine runs. */
	source->opts.host = NULL;
	source->opts.secret = NULL;
	source->opts.paths = NULL;
	*out = source;
	return 0;
}

int kmig_source_add_region(struct kmig_source *source, struct kmig_region *region)
{
	int err;

	if (source->used)
		return kmig_fail(source->ctx, -EBUSY, "source: regions are added before it runs");
	err = kmig_tracker_accepts(source->opts.tracker, source->regions, source->count, region);
	if (err)
		return err;
	if (source->count == LMTRACK_REGIONS_MAX)
		return kmig_fail(source->ctx, -ENOSPC, "source: %d regions are the most there can be", LMTRACK_REGIONS_MAX);
	for (unsigned int i = 0; i < source->count; i++)
		if (source->regions[i] == region)
			return kmig_fail(source->ctx, -EEXIST, "region %s was added already", region->name);
	source->regions[source->count++] = region;
	source->report.ram_bytes += region->bytes;
	source->report.page_size = region->page_size;
	return 0;
}

void kmig_source_abort(struct kmig_source *source)
{
	eventfd_write(source->abort_fd, 1);
}

/* In signal handlers as well: the engine looks. */
int kmig_source_set_max_bandwidth(struct kmig_source *source, uint64_t bytes_per_second)
{
	if (!is_bandwidth(bytes_per_second))
		return -EINVAL;
	source->max_bandwidth = bytes_per_second;
	return 0;
}

/* ---- Report ---- */

/*
 * What is left of the round, and while it is not the last, of what comes after it by forecast.
 */
static uint64_t eta_ns(const struct kmig_source *source)
{
	const struct kmig_policy *policy = &source->policy;
	uint64_t ahead = 0, since = kmig_now_ns() - source->round_begin_ns;

	if (policy->rate <= 0)
		return 0;
	if (!source->paused && policy->forecast.total_ns > since)
		ahead = policy->forecast.total_ns - since;
	return ahead ? ahead : source->report.remaining_bytes / policy->rate * 1e9;
}

static void update_report(struct kmig_source *source)
{
	struct kmig_report *report = &source->report;
	uint64_t data = 0, zero = 0, zerocopy = 0, copied = 0, headers = 0, done;
	struct kmig_channel_stats stats;

	/* A migration is over when the guest runs at the destination. */
	if (report->state != KMIG_STATE_CLEANUP)
		report->total_ns = kmig_now_ns() - source->clock.start_ns;
	if (!source->tracker)
		return;
	for (unsigned int i = 0; i < source->opts.channels; i++) {
		if (kmig_tracker_channel_stats(source->tracker, i, &stats))
			return;
		data += stats.data_pages;
		zero += stats.zero_pages;
		zerocopy += stats.zerocopy_bytes;
		copied += stats.copied_bytes;
		headers += stats.header_bytes;
	}
	report->data_pages = data;
	report->zero_pages = zero;
	report->zerocopy_bytes = zerocopy;
	report->copied_bytes = copied;
	report->transferred_bytes = zerocopy + copied + headers + report->device_state_bytes;
	report->rounds = source->round;
	report->bytes_per_second = source->policy.rate;
	report->stun_pages_per_second = source->policy.ceiling;
	report->held_pages = source->hot.held;
	report->channels_lost = source->channels.lost;
	report->channels_rejoined = source->channels.rejoined;
	report->rdma_channels = source->channels.over_rdma;
	report->channels = source->width.channels;
	report->channels_why = source->width.why;
	report->forecast = source->policy.forecast;
	done = data + zero - source->pages_before;
	if (source->sending)
		report->remaining_bytes = done < source->round_expected ?
					  (source->round_expected - done) * report->page_size : 0;
	report->eta_ns = eta_ns(source);
}

static void tell(struct kmig_source *source)
{
	update_report(source);
	if (source->ops.progress)
		source->ops.progress(&source->report, source->data);
}

static void enter(struct kmig_source *source, enum kmig_state state)
{
	kmig_report_enter(&source->report, &source->clock, state);
	tell(source);
}

int kmig_source_report(struct kmig_source *source, struct kmig_report *report)
{
	return kmig_fill_sized(source->ctx, report, &source->report, sizeof(source->report), "report");
}

/* ---- Hello ---- */

/* A message of the handshake: not sealed, since the key comes from it. */
static int handshake_recv(struct kmig_source *source, int fd, uint16_t type, struct lmtrack_wire_message *header,
			  void *body, size_t length)
{
	uint64_t deadline = kmig_now_ns() + kmig_ms(source->opts.timeout_ms);
	const char *why;
	int err;

	err = kmig_net_recv(fd, header, sizeof(*header), deadline, source->abort_fd);
	if (!err) {
		err = kmig_message_check(header, &why);
		if (err == -EPROTONOSUPPORT)
			return kmig_fail(source->ctx, err, "the destination speaks version %u of the protocol, we speak %u: install the same version of kmig on both",
					 le16toh(header->version), LMTRACK_WIRE_VERSION);
		if (!err && le16toh(header->type) != type) {
			why = "it does not belong here";
			err = -EPROTO;
		}
		if (err)
			return kmig_fail(source->ctx, err, "greeting from the destination: %s", why);
		err = kmig_net_recv(fd, body, length, deadline, source->abort_fd);
		if (!err) {
			err = kmig_message_check_body(header, body, &why);
			if (err)
				return kmig_fail(source->ctx, err, "greeting from the destination: %s", why);
		}
	}
	if (err == -ECANCELED)
		return kmig_fail(source->ctx, err, "aborted");
	if (err == -ETIMEDOUT)
		return kmig_fail(source->ctx, err, "the destination did not answer within %u ms: is it a kmig?", source->opts.timeout_ms);
	/* It says nothing to those who fail the proof: this is what that looks like. */
	if ((err == -ECONNRESET || err == -EPIPE) && type == LMTRACK_MSG_PROOF)
		return kmig_fail(source->ctx, -EKEYREJECTED, "the destination turned us away: give both sides the same secret");
	if (err)
		return kmig_fail(source->ctx, err, "the destination hung up: %s", strerror(-err));
	return 0;
}

static int handshake(struct kmig_source *source, int fd)
{
	uint64_t deadline = kmig_now_ns() + kmig_ms(source->opts.timeout_ms);
	struct {
		struct lmtrack_wire_message header;
		struct lmtrack_wire_proof proof;
	} ours, theirs;
	struct lmtrack_wire_proof expected;
	struct kmig_transcript transcript;
	const struct lmtrack_wire_hello *theirs_hello = &transcript.destination.body;
	int err;

	err = kmig_auth_hello(source->report.page_size, &transcript.source);
	if (!err)
		err = kmig_net_send(fd, &transcript.source, sizeof(transcript.source), deadline, source->abort_fd);
	if (err)
		return kmig_fail(source->ctx, err, "greeting the destination: %s", strerror(-err));
	err = handshake_recv(source, fd, LMTRACK_MSG_HELLO, &transcript.destination.header,
			     &transcript.destination.body, sizeof(transcript.destination.body));
	if (err)
		return err;

	err = kmig_auth_proof(source->secret, source->opts.secret_len, "lmtrack source", &transcript, &ours.proof);
	if (!err) {
		kmig_message_encode(LMTRACK_MSG_PROOF, &ours.proof, sizeof(ours.proof), &ours.header);
		err = kmig_net_send(fd, &ours, sizeof(ours), deadline, source->abort_fd);
	}
	if (err)
		return kmig_fail(source->ctx, err, "proving the secret: %s", strerror(-err));
	err = handshake_recv(source, fd, LMTRACK_MSG_PROOF, &theirs.header, &theirs.proof, sizeof(theirs.proof));
	if (err)
		return err;
	err = kmig_auth_proof(source->secret, source->opts.secret_len, "lmtrack destination", &transcript, &expected);
	if (err)
		return kmig_fail(source->ctx, err, "the destination's proof could not be checked: %s", strerror(-err));
	if (!kmig_auth_equal(&expected, &theirs.proof, sizeof(expected)))
		return kmig_fail(source->ctx, -EKEYREJECTED, "whoever listens there does not know the secret: give both sides the same");

	/* Only now is it known who said so. */
	if (theirs_hello->features || le32toh(theirs_hello->page_size) != source->report.page_size ||
	    le32toh(theirs_hello->chunk_pages) != LMTRACK_CHUNK_PAGES)
		return kmig_fail(source->ctx, -EPROTONOSUPPORT, "the destination has pages of %u bytes in chunks of %u, features %#llx; this side has pages of %u in chunks of %u",
				 le32toh(theirs_hello->page_size), le32toh(theirs_hello->chunk_pages),
				 (unsigned long long)le64toh(theirs_hello->features), source->report.page_size,
				 LMTRACK_CHUNK_PAGES);
	err = kmig_auth_session(source->secret, source->opts.secret_len, &transcript, &source->session);
	return err ? kmig_fail(source->ctx, err, "session key: %s", strerror(-err)) : 0;
}

static struct kmig_net_mark mark_of(const struct kmig_source *source)
{
	return (struct kmig_net_mark){ .dscp = source->opts.dscp, .priority = source->opts.priority };
}

static int hello(struct kmig_source *source)
{
	const struct kmig_net_mark mark = mark_of(source);
	int fd, err;

	if (kmig_auth_init())
		return kmig_fail(source->ctx, -EIO, "source: no randomness or no HMAC-SHA256 to be had from OpenSSL");
	fd = kmig_net_connect(source->ctx, source->host, source->opts.port, source->opts.timeout_ms, source->abort_fd,
			      &mark);
	if (fd < 0)
		return fd;
	err = handshake(source, fd);
	if (err) {
		close(fd);
		return err;
	}
	return kmig_control_open(&source->control, source->ctx, "destination", fd, source->abort_fd,
				 source->opts.timeout_ms, source->session.source, source->session.destination);
}

/* ---- Before the first pass ---- */

static int capacity(struct kmig_source *source)
{
	struct lmtrack_wire_capacity wire = { .bytes = htole64(source->report.ram_bytes) };
	struct kmig_message message;
	uint64_t resident = 0, begin;
	int err;

	for (unsigned int i = 0; i < source->count; i++)
		resident += kmig_region_resident(source->regions[i]);
	source->round_expected = resident / source->report.page_size;
	wire.resident = htole64(resident);
	begin = kmig_now_ns();
	err = kmig_control_send(&source->control, LMTRACK_MSG_CAPACITY, &wire, sizeof(wire));
	if (!err)
		err = kmig_control_expect(&source->control, LMTRACK_MSG_CAPACITY_OK, &message);
	source->trip_ns = kmig_now_ns() - begin;
	return err;
}

/*
 * All channels that there may be are connected before the first pass: which of them carry can then be
 * changed at any time, without a word to the destination.
 */
static void choose_channels(struct kmig_source *source)
{
	unsigned int paths = source->opts.path_count ? source->opts.path_count : 1, most = paths;
	unsigned int cpus = kmig_cpus();

	source->widening = source->opts.channels == KMIG_CHANNELS_AUTO;
	if (source->widening) {
		if (cpus > most)
			most = cpus;
		source->opts.channels = most < LMTRACK_CHANNELS_MAX ? most : LMTRACK_CHANNELS_MAX;
		kmig_width_start(&source->width, paths, source->opts.channels, source->trip_ns);
	} else {
		source->width.channels = source->opts.channels;
	}
}

static int regions(struct kmig_source *source)
{
	struct {
		struct lmtrack_wire_regions head;
		__le64 bytes[LMTRACK_REGIONS_MAX];
	} wire;

	if (RAND_bytes((unsigned char *)&source->stream_id, sizeof(source->stream_id)) != 1)
		return kmig_fail(source->ctx, -EIO, "no random number for the stream");
	wire.head.stream = htole64(source->stream_id);
	wire.head.count = htole32(source->count);
	wire.head.channels = htole32(source->opts.channels);
	for (unsigned int i = 0; i < source->count; i++)
		wire.bytes[i] = htole64(source->regions[i]->bytes);
	return kmig_control_send(&source->control, LMTRACK_MSG_REGIONS, &wire,
				 sizeof(wire.head) + source->count * sizeof(wire.bytes[0]));
}

static int start_tracker(struct kmig_source *source)
{
	struct kmig_tracker_config config = {
		.ctx = source->ctx,
		.kind = source->opts.tracker,
		.regions = source->regions,
		.count = source->count,
		.stream = source->stream_id,
		.no_zero_detection = source->opts.no_zero_detection,
		.allow_pinned = source->opts.allow_pinned,
		.abort_fd = source->abort_fd,
		.dirty = source->ops.dirty,
		.track = source->ops.track,
		.data = source->data,
	};
	struct kmig_tracker *tracker;
	int err;

	err = kmig_tracker_new(&config, &tracker);
	if (err)
		return err;
	err = kmig_tracker_start(tracker);
	source->cap = source->max_bandwidth;
	if (!err && source->cap)
		err = kmig_tracker_cap(tracker, source->cap);
	if (!err)
		source->report.max_bandwidth = source->cap;
	if (!err)
		err = kmig_channels_add(&source->channels, tracker);
	if (!err && source->widening) {
		err = kmig_tracker_width(tracker, source->width.channels);
		/* Of a module that is older than this all channels carry. */
		if (err == -EOPNOTSUPP) {
			source->widening = false;
			source->width.channels = source->opts.channels;
			err = 0;
		}
	}
	if (err)
		kmig_tracker_free(tracker);
	else
		source->tracker = tracker;
	return err;
}

static int start_digests(struct kmig_source *source)
{
	int err;

	for (unsigned int i = 0; i < source->count; i++) {
		source->dirty[i] = calloc(kmig_words(kmig_region_pages(source->regions[i])), sizeof(uint64_t));
		if (!source->dirty[i])
			return kmig_fail(source->ctx, -ENOMEM, "dirty pages: out of memory");
		if (!kmig_region_map(source->regions[i]))
			return -ENOMEM;
	}
	err = kmig_source_digest_start(&source->digest, source->ctx, &source->control, source->regions, source->count);
	source->digesting = !err;
	return err;
}

/* ---- Rounds ---- */

/* The time since the last part of the downtime ended. */
static uint64_t lap(struct kmig_source *source)
{
	uint64_t begin = source->lap_ns;

	source->lap_ns = kmig_now_ns();
	return source->lap_ns - begin;
}

/* A part that the peer says is of something else; it cannot be more than the whole. */
static void move_part(uint64_t *from, uint64_t *to, uint64_t part)
{
	*to = part < *from ? part : *from;
	*from -= *to;
}

static int handle(struct kmig_source *source, const struct kmig_message *message)
{
	const struct lmtrack_wire_round_ack *ack = message->body;
	const struct lmtrack_wire_ready *ready = message->body;

	switch (message->type) {
	case LMTRACK_MSG_CHANNELS_READY:
		/* Once, and not before they could connect. */
		if (source->report.state != KMIG_STATE_CHANNELS || source->channels_ready ||
		    (source->asked_rdma && !source->offered))
			break;
		source->channels_ready = true;
		/* From here on one may be lost, also with the next message. */
		if (source->tracker)
			kmig_channels_start(&source->channels, source->tracker);
		return 0;
	case LMTRACK_MSG_RDMA_OFFER:
		if (!source->asked_rdma || source->offered)
			break;
		source->offered = true;
		return kmig_channels_offer(&source->channels, message);
	case LMTRACK_MSG_WINDOW:
		return kmig_channels_window(&source->channels, message, source->round);
	case LMTRACK_MSG_UNVERIFIED:
	case LMTRACK_MSG_COMPARED:
		if (!source->digesting)
			break;
		return kmig_source_digest_message(&source->digest, message);
	case LMTRACK_MSG_ROUND_ACK:
		if (source->acked == source->round || le32toh(ack->round) != source->round)
			break;
		source->acked = source->round;
		source->asked_ns = 0;
		kmig_source_digest_acked(&source->digest, source->acked);
		return 0;
	case LMTRACK_MSG_CHANNEL_LOST:
	case LMTRACK_MSG_CHANNEL_CLOSED:
	case LMTRACK_MSG_CHANNEL_JOINED:
		if (!source->channels_ready)
			break;
		/* All is there; they are not needed any more. */
		if (source->report.state >= KMIG_STATE_CHECK)
			return 0;
		return kmig_channels_message(&source->channels, message, source->round);
	case LMTRACK_MSG_NEED:
		if (source->report.state != KMIG_STATE_CHECK)
			break;
		source->need = true;
		return 0;
	case LMTRACK_MSG_READY:
		if (source->report.state != KMIG_STATE_CHECK)
			break;
		source->report.digests_compared = le64toh(ready->compared);
		source->report.downtime.digest_ns = lap(source);
		move_part(&source->report.downtime.digest_ns, &source->report.downtime.load_ns, le64toh(ready->load_ns));
		source->ready = true;
		return 0;
	}
	return kmig_control_unexpected(&source->control, message);
}

/* The tracker says it is done with the round: take the figures over. */
static int round_sent(struct kmig_source *source, struct kmig_round *round)
{
	int err = kmig_tracker_wait(source->tracker, round);

	if (err == -ETIMEDOUT || err == -EINTR)
		return 0;
	if (err)
		return err;
	if (round->error)
		return kmig_fail(source->ctx, round->error, "round %u, data channel %d: %s", round->round,
				 round->channel, strerror(-round->error));
	source->sending = false;
	if (source->paused && source->acked != source->round)
		source->asked_ns = kmig_now_ns();
	return 0;
}

static uint64_t answer_limit_ns(const struct kmig_source *source)
{
	return kmig_ms(source->opts.timeout_ms) * ANSWER_TIMEOUTS;
}

/* No channel is left; the guest runs, but what it writes stays here. */
static int check_gone(struct kmig_source *source)
{
	uint64_t since = source->channels.gone_ns;

	if (!since || kmig_channels_usable(&source->channels) ||
	    kmig_now_ns() - since < kmig_ms(source->opts.channel_wait_ms))
		return 0;
	return kmig_fail(source->ctx, -ENOTCONN, "all %u data channels to %s are lost, and none has come back within %u ms: is the network between down?",
			 source->opts.channels, source->host, source->opts.channel_wait_ms);
}

/* The policy looks after each round; where it would only give up, there is no need to wait for that. */
static int check_time(struct kmig_source *source)
{
	const struct kmig_source_opts *opts = &source->opts;

	if (source->paused || opts->on_timeout != KMIG_TIMEOUT_ABORT || !opts->max_time_ms ||
	    kmig_now_ns() - source->clock.start_ns < kmig_ms(opts->max_time_ms))
		return 0;
	return kmig_fail(source->ctx, -ETIME, "the guest could not be paused within %llu ms: %.0f MiB are left of round %u; allow more time, or give it a faster link",
			 (unsigned long long)opts->max_time_ms, source->report.remaining_bytes / 1048576., source->round);
}

/* The cap on the bandwidth was changed: the guest is not given up for a module that cannot. */
static void check_cap(struct kmig_source *source)
{
	uint64_t cap = source->max_bandwidth;
	char text[KMIG_ERROR_MAX];

	if (!source->tracker || cap == source->cap)
		return;
	source->cap = cap;
	if (source->widening)
		kmig_width_restart(&source->width);
	if (kmig_tracker_cap(source->tracker, cap)) {
		kmig_copy_error(source->ctx, text);
		kmig_log(source->ctx, KMIG_LOG_WARNING, "the bandwidth is not limited: %s", text);
		return;
	}
	kmig_policy_cap(&source->policy, cap);
	source->report.max_bandwidth = cap;
	tell(source);
	if (cap)
		kmig_log(source->ctx, KMIG_LOG_INFO, "no more than %.3f MB/s are sent from now on", cap / 1e6);
	else
		kmig_log(source->ctx, KMIG_LOG_INFO, "as much is sent from now on as the network takes");
}

/* A round is sent: should more channels carry? */
static int widen(struct kmig_source *source)
{
	uint32_t changes = source->channels.lost + source->channels.rejoined;

	if (changes != source->width_changes)
		kmig_width_pause(&source->width);
	source->width_changes = changes;
	if (!source->widening || source->width.why || source->paused ||
	    !kmig_width_look(&source->width, kmig_now_ns(), kmig_channels_delivered(&source->channels)))
		return 0;
	kmig_log(source->ctx, KMIG_LOG_DEBUG, "%u data channels carry", source->width.channels);
	return kmig_tracker_width(source->tracker, source->width.channels);
}

/* Wait for something to happen, a tick at most, and take it in. */
static int step(struct kmig_source *source, struct kmig_round *round)
{
	struct pollfd fds[4 + LMTRACK_CHANNELS_MAX] = {
		{ .fd = source->control.fd, .events = POLLIN },
		{ .fd = source->abort_fd, .events = POLLIN },
		{ .fd = source->sending ? kmig_tracker_fd(source->tracker) : -1, .events = POLLIN },
		{ .fd = source->digesting ? source->digest.workers.event_fd : -1, .events = POLLIN },
	};
	/* When all is there they are not needed any more, and the destination closes them. */
	bool watched = source->report.state < KMIG_STATE_CHECK;
	struct kmig_message message;
	int n, err;

	/* Until there is an answer, it would only say the same again. */
	if (!kmig_channels_asked(&source->channels))
		fds[2].events |= POLLPRI;
	/* While the tracker sends, it notices itself; and their error queues are its own. */
	if (watched)
		kmig_channels_poll(&source->channels, fds + 4, !source->sending);
	if (poll(fds, watched ? 4 + source->channels.count : 4, TICK_MS) < 0 && errno != EINTR)
		return kmig_fail(source->ctx, -errno, "waiting: %s", strerror(errno));
	if (fds[1].revents)
		return kmig_fail(source->ctx, -ECANCELED, "aborted");
	/* The caller looks itself whether they are done; here it only ends the wait, once. */
	if (fds[3].revents)
		kmig_workers_busy(&source->digest.workers);
	for (int i = 0; i < KMIG_CONTROL_BATCH && (n = kmig_control_next(&source->control, &message)) > 0; i++) {
		err = handle(source, &message);
		if (err)
			return err;
	}
	if (n < 0)
		return n;
	err = kmig_control_check_silence(&source->control);
	if (!err)
		err = kmig_source_digest_error(&source->digest);
	/* POLLERR alone: it has failed, the round is about to end, and will tell why. */
	if (!err && source->sending && (fds[2].revents & POLLIN))
		err = round_sent(source, round);
	if (!err && source->sending)
		err = widen(source);
	/* Last: the others may say why. */
	if (!err && watched)
		err = kmig_channels_step(&source->channels, fds + 4, source->round);
	if (!err && !source->paused)
		err = check_gone(source);
	if (!err && source->asked_ns && kmig_now_ns() - source->asked_ns > answer_limit_ns(source))
		err = kmig_fail(source->ctx, -ETIMEDOUT, "the guest is paused, and the destination lives but did not answer within %u ms: its VMM may hang",
				source->opts.timeout_ms * ANSWER_TIMEOUTS);
	if (!err)
		err = check_time(source);
	if (!err)
		check_cap(source);
	if (!err && kmig_report_due(&source->clock))
		tell(source);
	return err;
}

static int ask_rdma(struct kmig_source *source)
{
	struct kmig_round round;
	int err;

	if (source->opts.transport == KMIG_TRANSPORT_TCP)
		return 0;
	source->asked_rdma = true;
	err = kmig_control_send(&source->control, LMTRACK_MSG_RDMA_ASK, NULL, 0);
	while (!err && !source->offered)
		err = step(source, &round);
	return err;
}

static int channels(struct kmig_source *source)
{
	struct kmig_round round;
	int err;

	source->channels.ctx = source->ctx;
	source->channels.control = &source->control;
	source->channels.session = &source->session;
	source->channels.host = source->host;
	source->channels.abort_fd = source->abort_fd;
	source->channels.transport = source->opts.transport;
	source->channels.stream = source->stream_id;
	source->channels.timeout_ms = source->opts.timeout_ms;
	source->channels.mark = mark_of(source);
	memcpy(source->channels.path, source->paths, sizeof(source->paths));
	source->channels.paths = source->opts.path_count ? source->opts.path_count : 1;
	source->channels.count = source->opts.channels;
	for (unsigned int i = 0; i < source->channels.count; i++)
		source->channels.channel[i].fd = -1;
	err = ask_rdma(source);
	if (!err)
		err = kmig_channels_connect(&source->channels);
	/* RDMA's connections are the tracker's. Else there is no need to track so early. */
	if (!err && source->channels.rdma_port)
		err = start_tracker(source);
	while (!err && !source->channels_ready)
		err = step(source, &round);
	return err;
}

/* The guest may write as fast as it likes: the blackout begins, nothing can be sent, or all is off. */
static int release_guest(struct kmig_source *source)
{
	int err = 0;

	if (source->stunned)
		err = kmig_tracker_stun(source->tracker, 0, 0);
	source->stunned = false;
	return err;
}

/*
 * Until a round can begin: the last is through, the destination has closed what was lost, and there
 * is a channel. The guest is not kept waiting for one: it is not slowed down, and not paused.
 */
static int await_channels(struct kmig_source *source)
{
	struct kmig_round round;
	int err = 0;

	while (!err && (source->sending || source->acked != source->round || !kmig_channels_settled(&source->channels) ||
			!kmig_channels_usable(&source->channels))) {
		/* CHANNEL_CLOSED is an answer as well. */
		if (source->paused && !source->asked_ns && !kmig_channels_settled(&source->channels))
			source->asked_ns = kmig_now_ns();
		if (!kmig_channels_usable(&source->channels))
			err = source->paused ? CHANNELS_GONE : release_guest(source);
		if (!err)
			err = step(source, &round);
	}
	source->asked_ns = 0;
	return err;
}

static int begin_round(struct kmig_source *source, enum kmig_send_what what, unsigned int flags, uint64_t expected)
{
	int err;

	do {
		err = await_channels(source);
		if (!err)
			err = kmig_channels_begin(&source->channels, source->round + 1);
		/* One that had joined may be lost again. */
	} while (!err && !(kmig_channels_settled(&source->channels) && kmig_channels_usable(&source->channels)));
	if (err)
		return err;
	source->round_expected = expected;
	source->pages_before = source->report.data_pages + source->report.zero_pages;
	source->round_begin_ns = kmig_now_ns();
	err = kmig_tracker_send(source->tracker, source->round + 1, what, flags);
	if (err)
		return err;
	source->round++;
	source->sending = true;
	kmig_width_pause(&source->width);
	source->round_sent_ns = kmig_now_ns();
	return 0;
}

static void limit_queues(struct kmig_source *source)
{
	double bytes = source->policy.rate / source->width.channels * QUEUE_MS / 1000;

	kmig_channels_limit(&source->channels, bytes > QUEUE_BYTES_MIN ? bytes : QUEUE_BYTES_MIN);
}

/*
 * How long the wire waited in the last round for pages to be found. What a tracker has to ask
 * before it can begin is a part of that. One that cannot tell looks as if it sent all the time.
 */
static uint64_t round_scan_ns(const struct kmig_source *source, const struct kmig_round *round)
{
	struct kmig_round_times times;
	uint64_t scan = source->round_sent_ns - source->round_begin_ns;

	kmig_tracker_times(source->tracker, &times);
	if (times.wire_ns && times.wire_ns < round->duration_ns)
		scan += round->duration_ns - times.wire_ns;
	return scan;
}

/* Until the destination has stored the round whole. */
static int finish_round(struct kmig_source *source, struct kmig_round *round)
{
	struct kmig_round_report report;
	uint64_t took, scan;
	int err;

	while (source->sending || source->acked != source->round) {
		if (source->paused && !kmig_channels_usable(&source->channels))
			return CHANNELS_GONE;
		err = step(source, round);
		if (err)
			return err;
	}
	/*
	 * What is in socket buffers is not on the other side: the acknowledgement ends the measurement,
	 * and what of the round was not scanning was the wire's.
	 */
	took = kmig_now_ns() - source->round_begin_ns;
	scan = round_scan_ns(source, round);
	if (scan > took)
		scan = took;
	kmig_policy_sent(&source->policy, round->bytes, took, took - scan);
	limit_queues(source);
	update_report(source);
	report = (struct kmig_round_report){
		.round = round->round,
		.dirty_pages = round->pages,
		.data_pages = round->data_pages,
		.zero_pages = round->zero_pages,
		.bytes = round->bytes,
		.duration_ns = took,
		.bytes_per_second = round->bytes * 1e9 / took,
		.dirty_pages_per_second = source->report.dirty_pages_per_second,
		.held_pages = source->paused ? 0 : source->hot.held,
		.stun_pages_per_second = source->paused ? 0 : source->policy.ceiling,
		.forecast_error = source->policy.error,
		.scan_ns = scan,
	};
	if (source->ops.round)
		source->ops.round(&report, source->data);
	return 0;
}

/* Of so many dirty pages, those held back: a held page may have been punched out meanwhile. */
static uint64_t held_now(const struct kmig_source *source, uint64_t dirty)
{
	return source->hot.held < dirty ? source->hot.held : dirty;
}

/* Look at what is dirty, without changing it; @more: beside what was seen last time. */
static int peek(struct kmig_source *source, uint64_t *dirty, bool more)
{
	double seconds = (kmig_now_ns() - source->round_begin_ns) / 1e9;

	*dirty = 0;
	for (unsigned int i = 0; i < source->count; i++) {
		uint64_t pages = kmig_region_pages(source->regions[i]), found;
		int err;

		if (!more)
			memset(source->dirty[i], 0, kmig_words(pages) * sizeof(uint64_t));
		err = kmig_tracker_peek(source->tracker, i, source->dirty[i], &found);
		if (err)
			return err;
		*dirty += found;
	}
	/* Those held back have been dirty for longer. */
	if (!source->paused && seconds > 0)
		source->report.dirty_pages_per_second = (*dirty - held_now(source, *dirty)) / seconds;
	source->report.remaining_bytes = *dirty * source->report.page_size;
	return 0;
}

/* ---- Convergence ---- */

static int start_convergence(struct kmig_source *source)
{
	const struct kmig_source_opts *opts = &source->opts;
	struct kmig_policy_opts policy = {
		.ram_bytes = source->report.ram_bytes,
		.page_size = source->report.page_size,
		.downtime_ms = opts->downtime_ms,
		.max_rounds = opts->max_rounds,
		.max_time_ms = opts->max_time_ms,
		.trip_ns = source->trip_ns,
		.on_timeout = opts->on_timeout,
		.convergence = opts->convergence,
		.stun_floor = opts->stun_floor,
		.can_stun = !opts->no_stun && source->tracker->ops->stun,
		.can_hold = !opts->no_hold_back && source->tracker->ops->hold,
	};
	struct kmig_curve working_set = { 0 };

	kmig_policy_start(&source->policy, &policy);
	kmig_policy_cap(&source->policy, source->cap);
	for (unsigned int i = 0; i < source->probed; i++)
		kmig_curve_add(&working_set, source->probe[i].interval_ns, source->probe[i].pages);
	kmig_curve_left(&working_set, source->trip_ns, &source->policy.left);
	if (policy.can_hold && kmig_hot_start(&source->hot, source->regions, source->count))
		return kmig_fail(source->ctx, -ENOMEM, "pages held back: out of memory");
	return 0;
}

/* Do to guest and pages what the policy has decided. */
static int carry_out(struct kmig_source *source)
{
	const struct kmig_policy *policy = &source->policy;
	uint64_t before = source->hot.held;
	int err = 0;

	if (policy->opts.can_stun && (policy->ceiling > 0 || source->stunned)) {
		err = kmig_tracker_stun(source->tracker, policy->ceiling, 0);
		source->stunned = policy->ceiling > 0;
	}
	if (!policy->opts.can_hold)
		return err;
	kmig_hot_look(&source->hot, source->dirty);
	kmig_hot_choose(&source->hot, policy->hold_budget);
	/* Nothing was held and nothing is: there is no need to go through the regions. */
	if (!before && !source->hot.held)
		return err;
	for (unsigned int i = 0; i < source->count && !err; i++)
		err = kmig_tracker_hold(source->tracker, i, source->hot.hold[i]);
	return err;
}

/* Had somebody to wait since the last call? Who cannot tell is taken to have, under a ceiling. */
static bool has_stunned(struct kmig_source *source)
{
	struct kmig_tracker_stats stats;
	uint64_t before = source->stuns;

	if (!source->stunned)
		return false;
	if (kmig_tracker_stats(source->tracker, &stats))
		return true;
	source->stuns = stats.stuns;
	return source->stuns != before;
}

/* After each round, once. */
static int decide(struct kmig_source *source, uint64_t dirty, enum kmig_decision *decision)
{
	struct kmig_policy *policy = &source->policy;
	uint64_t now = kmig_now_ns();
	struct kmig_look look = {
		.dirty = dirty,
		.held = held_now(source, dirty),
		.interval_ns = now - source->round_begin_ns,
		.elapsed_ns = now - source->clock.start_ns,
		.stunned = has_stunned(source),
		.lost = source->channels.lost != source->lost_seen,
	};
	double ceiling = policy->ceiling;
	uint64_t chunks;
	int err;

	chunks = kmig_source_digest_dirty(&source->digest, source->dirty);
	policy->digest_ns = kmig_source_digest_cost(&source->digest, chunks);
	/* Nothing was digested yet: then nothing is known. */
	if (policy->digest_ns == UINT64_MAX)
		policy->digest_ns = 0;
	source->lost_seen = source->channels.lost;
	*decision = kmig_policy_look(policy, &look);
	if (*decision == KMIG_GIVE_UP)
		return kmig_fail(source->ctx, -ETIME, "%s: %.0f MiB are dirty, %.1f MB/s are sent; allow a longer downtime or more time, give it a faster link, or wait until the guest is less busy",
				 policy->why, (double)dirty * source->report.page_size / 1048576, policy->rate / 1e6);
	err = carry_out(source);
	if (err)
		return err;
	if (policy->ceiling != ceiling)
		kmig_log(source->ctx, KMIG_LOG_INFO, policy->ceiling > 0 ?
			 "the guest is slowed down: it may dirty %.0f pages a second" :
			 "the guest is not slowed down any more (%.0f)", policy->ceiling);
	return 0;
}

/*
 * Pre-copy. It ends when the policy says so, and when chunks that stay clean have been
 * compared, which costs nothing now and downtime later.
 */
static int iterate(struct kmig_source *source)
{
	enum kmig_decision decision = KMIG_GO_ON;
	unsigned int passes = 0;
	bool compared = false;
	uint32_t decided = 0;
	int err;

	for (;;) {
		struct kmig_round round = { 0 };
		uint64_t dirty, begun;
		bool enough;

		err = await_channels(source);
		if (!err)
			err = peek(source, &dirty, false);
		if (!err && decided != source->round)
			err = decide(source, dirty, &decision);
		if (err)
			return err;
		decided = source->round;
		if (!compared && kmig_source_digest_compared(&source->digest)) {
			begun = kmig_source_digest_pass(&source->digest, source->dirty);
			compared = ++passes > PASSES_MAX ||
				   kmig_source_digest_cost(&source->digest, begun) < kmig_ms(source->opts.downtime_ms) / 10;
		}
		enough = kmig_policy_fits(&source->policy, dirty);
		if ((enough || decision == KMIG_PAUSE) && compared && kmig_source_digest_compared(&source->digest)) {
			source->report.decision = enough ? "what is left fits the downtime" : source->policy.why;
			return 0;
		}
		if (enough) {
			err = step(source, &round);
			if (err)
				return err;
			continue;
		}
		err = begin_round(source, KMIG_SEND_DIRTY, 0, dirty - held_now(source, dirty));
		if (!err)
			err = finish_round(source, &round);
		if (err)
			return err;
	}
}

/* ---- Blackout ---- */

static int pause_guest(struct kmig_source *source)
{
	int err;

	source->paused_ns = source->lap_ns = kmig_now_ns();
	/*
	 * Not released yet: until it stands it would dirty more than the blackout was planned for.
	 * But a vCPU that sleeps cannot be paused.
	 */
	if (source->stunned) {
		err = kmig_tracker_stun(source->tracker, source->policy.ceiling, PAUSE_DELAY_US);
		if (err)
			return err;
	}
	enter(source, KMIG_STATE_BLACKOUT);
	source->paused = true;
	err = source->ops.pause(source->data);
	if (err)
		return kmig_fail(source->ctx, err, "the guest could not be paused: %s", strerror(-err));
	err = release_guest(source);
	if (err)
		return err;
	source->report.downtime.pause_ns = lap(source);
	return kmig_control_send(&source->control, LMTRACK_MSG_PAUSED, NULL, 0);
}

static int save_state(struct kmig_source *source)
{
	int err;

	if (!source->ops.save_state)
		return 0;
	err = source->ops.save_state(&source->state, &source->state_length, source->data);
	if (err)
		return kmig_fail(source->ctx, err, "the device state could not be saved: %s", strerror(-err));
	if (source->state_length > LMTRACK_WIRE_STATE_MAX)
		return kmig_fail(source->ctx, -EFBIG, "the device state has %zu bytes, at most %d can be moved",
				 source->state_length, LMTRACK_WIRE_STATE_MAX);
	source->report.device_state_bytes = source->state_length;
	return 0;
}

static int send_state(struct kmig_source *source)
{
	struct lmtrack_wire_state *piece = malloc(LMTRACK_WIRE_BODY_MAX);
	int err = 0;

	if (!piece)
		return kmig_fail(source->ctx, -ENOMEM, "device state: out of memory");
	for (size_t at = 0; at < source->state_length && !err;) {
		size_t length = source->state_length - at;

		if (length > KMIG_WIRE_STATE_PIECE)
			length = KMIG_WIRE_STATE_PIECE;
		piece->total = htole64(source->state_length);
		piece->offset = htole64(at);
		memcpy(piece->bytes, (uint8_t *)source->state + at, length);
		err = kmig_control_send(&source->control, LMTRACK_MSG_STATE, piece, sizeof(*piece) + length);
		at += length;
	}
	free(piece);
	return err;
}

/* The part of a round's scanning that came after @since, if it was spread evenly over the round. */
static uint64_t scan_since(const struct kmig_source *source, const struct kmig_round *round, uint64_t since)
{
	uint64_t begin = source->round_begin_ns, end = source->round_sent_ns + round->duration_ns;

	if (since <= begin)
		return round_scan_ns(source, round);
	return since < end ? (double)(end - since) / (end - begin) * round_scan_ns(source, round) : 0;
}

/*
 * The vCPUs stand, and the round that carries what they left dirty goes out while the VMM
 * saves its devices. That may still write to memory: only when it is done is memory at rest,
 * so only then are digests taken, and what became dirty meanwhile is sent in a further round.
 */
static int last_rounds(struct kmig_source *source)
{
	struct kmig_round round = { 0 };
	uint64_t dirty, held = 0, before = 0, harvest, begin;
	uint32_t lost = source->channels.lost;
	int err;

	err = peek(source, &dirty, false);
	if (!err)
		err = begin_round(source, KMIG_SEND_DIRTY, KMIG_SEND_HELD, dirty);
	if (!err)
		err = save_state(source);
	source->report.downtime.save_ns = lap(source);
	begin = source->lap_ns;
	if (!err)
		err = peek(source, &dirty, true);
	if (err)
		return err;
	harvest = kmig_now_ns() - begin;
	kmig_source_digest_freeze(&source->digest, source->dirty, source->round);
	err = send_state(source);
	for (int n = 0; !err; n++) {
		err = finish_round(source, &round);
		if (err)
			break;
		harvest += scan_since(source, &round, source->lap_ns);
		begin = kmig_now_ns();
		err = peek(source, &dirty, false);
		harvest += kmig_now_ns() - begin;
		/*
		 * Pages that somebody holds for I/O are dirty after every harvest, written or not. Their
		 * devices rest with the guest, so once they were sent after the pause it is enough: if
		 * no more is dirty than was held in a round begun since, it is they.
		 */
		if (n > 0)
			held = kmig_tracker_held(source->tracker) - before;
		/* Not so of what went over a channel that was lost. */
		if (lost != source->channels.lost) {
			lost = source->channels.lost;
			held = 0;
			n = 0;
		}
		if (err || dirty <= held)
			break;
		if (n == LAST_ROUNDS_MAX)
			return kmig_fail(source->ctx, -EBUSY, "the guest is paused, but its memory is still being written (%llu pages): is a device not stopped?",
					 (unsigned long long)dirty);
		before = kmig_tracker_held(source->tracker);
		err = begin_round(source, KMIG_SEND_DIRTY, KMIG_SEND_HELD, dirty);
		/* Not before: should no channel be left, the round is the running guest's. */
		if (!err)
			kmig_source_digest_freeze(&source->digest, source->dirty, source->round);
	}
	source->report.downtime.memory_ns = lap(source);
	source->report.memory_copy_ns = source->report.downtime.memory_ns;
	move_part(&source->report.memory_copy_ns, &source->report.memory_harvest_ns, harvest);
	return err;
}

/* Back to pre-copy: nothing can be sent, and how long that will last nobody knows. */
static int resume_guest(struct kmig_source *source)
{
	int err;

	kmig_log(source->ctx, KMIG_LOG_WARNING, "the guest was paused, and runs on here until a data channel is back");
	err = source->ops.resume(source->data);
	if (err)
		return kmig_fail(source->ctx, err, "the guest could not be resumed: %s", strerror(-err));
	source->paused = false;
	source->asked_ns = 0;
	free(source->state);
	source->state = NULL;
	source->state_length = 0;
	source->report.device_state_bytes = 0;
	memset(&source->report.downtime, 0, sizeof(source->report.downtime));
	source->report.decision = NULL;
	kmig_source_digest_thaw(&source->digest);
	enter(source, KMIG_STATE_ITERATION);
	return kmig_control_send(&source->control, LMTRACK_MSG_RESUMED, NULL, 0);
}

/* Until the destination says READY. */
static int check(struct kmig_source *source)
{
	struct lmtrack_wire_prepare prepare = { .round = htole32(source->round) };
	unsigned int needs = 0;
	struct kmig_round round;
	int err;

	enter(source, KMIG_STATE_CHECK);
	while (!source->ready) {
		while (!kmig_source_digest_sent(&source->digest)) {
			err = step(source, &round);
			if (err)
				return err;
		}
		source->need = false;
		err = kmig_control_send(&source->control, LMTRACK_MSG_PREPARE, &prepare, sizeof(prepare));
		source->asked_ns = kmig_now_ns();
		while (!err && !source->ready && !source->need)
			err = step(source, &round);
		if (err)
			return err;
		source->asked_ns = 0;
		if (source->need && ++needs > NEEDS_MAX)
			return kmig_fail(source->ctx, -EPROTO, "the destination asks for digests again and again");
		if (source->need) {
			kmig_log(source->ctx, KMIG_LOG_DEBUG, "the destination still needs digests");
			kmig_source_digest_need(&source->digest);
		}
	}
	return 0;
}

/* The module's regions can be watched by anybody, others only by the tracker that they will have. */
static bool can_probe(const struct kmig_source *source)
{
	for (unsigned int i = 0; i < source->count; i++)
		if (source->regions[i]->kind != KMIG_REGION_LMTRACK)
			return false;
	return source->opts.tracker == KMIG_TRACKER_AUTO || source->opts.tracker == KMIG_TRACKER_LMTRACK;
}

static int migrate(struct kmig_source *source)
{
	struct kmig_round round = { 0 };
	struct kmig_message message;
	bool gone;
	int err;

	if (source->opts.probe_ms && can_probe(source)) {
		err = kmig_probe_until(source->ctx, source->regions, source->count, source->opts.probe_ms,
				       source->abort_fd, source->probe, &source->probed);
		if (err)
			return err;
	}
	enter(source, KMIG_STATE_HELLO);
	err = hello(source);
	if (err)
		return err;
	enter(source, KMIG_STATE_CAPACITY);
	err = capacity(source);
	if (err)
		return err;
	choose_channels(source);
	enter(source, KMIG_STATE_REGIONS);
	err = regions(source);
	if (err)
		return err;
	enter(source, KMIG_STATE_DEVICES);
	err = kmig_control_expect(&source->control, LMTRACK_MSG_DEVICES_READY, &message);
	if (err)
		return err;
	enter(source, KMIG_STATE_CHANNELS);
	err = channels(source);
	if (err)
		return err;
	enter(source, KMIG_STATE_FIRST_PASS);
	err = start_digests(source);
	if (!err && !source->tracker)
		err = start_tracker(source);
	if (!err) {
		kmig_channels_start(&source->channels, source->tracker);
		err = start_convergence(source);
	}
	if (!err)
		err = begin_round(source, KMIG_SEND_ALL, 0, source->round_expected);
	if (!err)
		err = finish_round(source, &round);
	if (err)
		return err;
	enter(source, KMIG_STATE_ITERATION);
	do {
		err = iterate(source);
		if (!err)
			err = pause_guest(source);
		if (!err)
			err = last_rounds(source);
		gone = err == CHANNELS_GONE;
		if (gone)
			err = resume_guest(source);
	} while (gone && !err);
	if (!err)
		err = check(source);
	return err;
}

/* ---- The end ---- */

/*
 * READY has come. A COMMIT that was not handed over whole cannot be understood by anyone, so
 * only one that was commits us.
 */
static int commit(struct kmig_source *source)
{
	int err;

	err = kmig_control_check_abort(&source->control);
	if (err)
		return err;
	source->committed = true;
	err = kmig_control_send(&source->control, LMTRACK_MSG_COMMIT, NULL, 0);
	if (err)
		source->committed = false;
	return err;
}

static int await_running(struct kmig_source *source)
{
	const struct lmtrack_wire_running *running;
	struct kmig_message message;
	int err;

	/* Too late to change one's mind. */
	source->control.abort_fd = -1;
	err = kmig_control_expect_until(&source->control, LMTRACK_MSG_RUNNING,
					kmig_now_ns() + answer_limit_ns(source), &message);
	if (!err) {
		running = message.body;
		source->report.downtime.commit_ns = lap(source);
		move_part(&source->report.downtime.commit_ns, &source->report.downtime.resume_ns,
			  le64toh(running->resume_ns));
		return 0;
	}
	if (source->control.peer_aborted && (source->control.abort_flags & LMTRACK_ABORT_NOT_RUN)) {
		source->committed = false;
		return err;
	}
	return kmig_fail(source->ctx, -EINPROGRESS, "the destination was told to run the guest and did not confirm (%s): the guest stays paused here. Look there: if it runs, end this one; only if it does not, and will not, resume it here",
			 kmig_ctx_error(source->ctx));
}

static void completed(struct kmig_source *source)
{
	source->report.downtime_ns = source->lap_ns - source->paused_ns;
	source->report.verdict = KMIG_COMPLETED;
	enter(source, KMIG_STATE_CLEANUP);
	if (source->ops.completed)
		source->ops.completed(source->data);
	kmig_control_send(&source->control, LMTRACK_MSG_DONE, NULL, 0);
}

static void give_up(struct kmig_source *source, int err, const char *text)
{
	int failed;

	if (source->committed) {
		source->report.verdict = KMIG_UNKNOWN;
		return;
	}
	source->report.verdict = err == -ECANCELED ? KMIG_CANCELLED : KMIG_FAILED;
	release_guest(source);
	/* First of all: the destination cannot run it without COMMIT. */
	if (source->paused) {
		failed = source->ops.resume(source->data);
		source->report.downtime_ns = kmig_now_ns() - source->paused_ns;
		if (failed)
			kmig_log(source->ctx, KMIG_LOG_ERROR, "the guest could not be resumed: %s", strerror(-failed));
	}
	if (source->tracker)
		kmig_tracker_cancel(source->tracker);
	if (!source->control.peer_aborted)
		kmig_control_send_abort(&source->control, err, 0, text);
}

static void guest_cost(struct kmig_source *source)
{
	struct kmig_guest_cost *cost = &source->report.guest;
	struct kmig_tracker_stats stats = { 0 };

	if (!source->tracker || kmig_tracker_stats(source->tracker, &stats))
		return;
	cost->write_faults = stats.write_faults;
	cost->fault_ns = stats.fault_ns;
	cost->stuns = stats.stuns;
	cost->stun_ns = stats.stun_ns;
	cost->stun_max_ns = stats.stun_max_ns;
	cost->threads = stats.threads < KMIG_REPORT_THREADS ? stats.threads : KMIG_REPORT_THREADS;
	for (unsigned int i = 0; i < cost->threads; i++) {
		cost->thread[i].id = stats.thread[i].id;
		cost->thread[i].stuns = stats.thread[i].stuns;
		cost->thread[i].stun_ns = stats.thread[i].stun_ns;
	}
}

static void clean_up(struct kmig_source *source)
{
	update_report(source);
	/* A worker may be waiting for room to send in: there will be none. */
	if (source->control.fd >= 0 && source->report.verdict != KMIG_COMPLETED)
		shutdown(source->control.fd, SHUT_WR);
	if (source->digesting)
		kmig_source_digest_stop(&source->digest);
	guest_cost(source);
	kmig_tracker_free(source->tracker);
	source->tracker = NULL;
	kmig_channels_close(&source->channels);
	kmig_control_close(&source->control);
	kmig_hot_stop(&source->hot);
	for (unsigned int i = 0; i < source->count; i++) {
		free(source->dirty[i]);
		source->dirty[i] = NULL;
	}
	free(source->state);
	source->state = NULL;
	kmig_auth_forget(&source->session, sizeof(source->session));
}

int kmig_source_run(struct kmig_source *source)
{
	char text[KMIG_ERROR_MAX];
	int err;

	if (source->used)
		return kmig_fail(source->ctx, -EALREADY, "a source runs once: make another");
	if (!source->count)
		return kmig_fail(source->ctx, -EINVAL, "source: no region was added");
	source->used = true;
	if (!source->opts.port)
		source->opts.port = KMIG_PORT;
	kmig_report_start(&source->report, &source->clock);

	err = migrate(source);
	if (!err)
		err = commit(source);
	if (err)
		err = kmig_control_last_words(&source->control, err);
	if (!err)
		err = await_running(source);
	kmig_copy_error(source->ctx, text);
	if (!err)
		completed(source);
	else
		give_up(source, err, text);
	clean_up(source);
	kmig_restore_error(source->ctx, text);
	if (source->ops.progress)
		source->ops.progress(&source->report, source->data);
	return err;
}

void kmig_source_free(struct kmig_source *source)
{
	if (!source)
		return;
	if (source->abort_fd >= 0)
		close(source->abort_fd);
	if (source->secret)
		kmig_auth_forget(source->secret, source->opts.secret_len);
	free(source->secret);
	free(source->host);
	free(source);
}
