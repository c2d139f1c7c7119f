// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The sender in user space.
 *
 * The chunks of a round go out in order, each over the channel that comes for it first, as in the
 * kernel's stream: so each channel carries as much as it can. A round begins when the last was
 * acknowledged: a newer copy of a page never overtakes an older one.
 *
 * @lock guards the beginning and the end of a round, what is left of it, its result, losses and the
 * statistics. It is not held while anything is harvested or sent. The arrays of regions and channels
 * do not change while a round is under way.
 *
 * Fewer channels may carry than there are: the others wait until there is nothing left to come for, or
 * one is lost, in place of which another carries then.
 *
 * A channel whose connection breaks is lost: it is done with the round, and the others go on. What
 * it has sent in the round is in @flight, and is dirty again when the channel is dropped.
 *
 * A failure of the tracker, a cancel and the end are one thing: @error is set once, then every
 * channel is shut down, which wakes the threads that wait for room in it. They look at @error
 * every WAIT_MS besides: the sockets are the caller's as well.
 *
 * Time is divided as in the kernel's stream: a thread scans or sends, and the wire is busy while a
 * channel sends or its connection has bytes that could not leave. Channels that keep it busy are
 * counted, so that the wire's time is right for any number of them. Under a cap (pace.c) the wire is
 * as fast as that: who waits for it sends, and what was sent keeps the wire busy for as long as it
 * would take at the cap.
 *
 * MSG_ZEROCOPY: the network holds the pages until the peer has acknowledged them, then says so
 * in the socket's error queue, and whether it had to copy them after all. Where it had to once
 * (loopback, a device without scatter-gather), the channel goes on without. A page that is
 * written while the network holds it is dirty again, and follows. A channel's round ends when
 * all has been acknowledged, so that nothing is left in the error queue, where it would make
 * poll() return at once for whoever watches the socket.
 */
#include "net.h"
#include "pace.h"
#include "sender.h"
#include "wire.h"

#include <linux/errqueue.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define WAIT_MS 5000
/* Below this pinning pages and hearing of them costs more than copying. */
#define ZEROCOPY_MIN (16u << 10)
/* The kernel takes the whole of a send for locked, however much of it found room. */
#define ZEROCOPY_MAX (256u << 10)
/* Sends whose completion has not come; more are copied. */
#define ZEROCOPY_CALLS 256
/* A chunk has at most every other page in an extent of its own. */
#define EXTENTS (LMTRACK_CHUNK_PAGES / 2)

struct channel {
	struct kmig_sender *sender;
	unsigned int number;
	int sock;
	pthread_t thread;
	bool there;				/* not dropped: the thread runs */
	bool stop;				/* it shall not, once it is done with the round */
	_Atomic int error;			/* negative errno: it is lost */
	unsigned int rank;			/* channels before it that were there when the round began */
	uint32_t round_done;
	bool carrying;				/* one of the sender's that carry */
	uint64_t seq;
	unsigned int pages;			/* of data, in the frame that is about to be sent */
	struct kmig_channel_stats stats;	/* under @lock */

	bool zerocopy;
	uint32_t calls, completed;		/* sends with MSG_ZEROCOPY, as the kernel numbers them */
	uint32_t call_bytes[ZEROCOPY_CALLS];

	struct lmtrack_wire_frame frame;
	struct lmtrack_wire_extent table[EXTENTS];
	struct iovec vec[EXTENTS];
};

/*
 * What a round has sent of a chunk; what an earlier one has sent has arrived. @round is written last:
 * who drops a channel looks while others send, and must not find it beside the channel of an earlier.
 */
struct flight {
	uint32_t round, channel;
	uint64_t pages[KMIG_CHUNK_WORDS];
};

/* What one channel has done in one round. */
struct count {
	uint64_t data, zero, bytes, send_ns, idle_ns;
};

struct kmig_sender {
	struct kmig_tracker *tracker;
	kmig_harvest_fn harvest;
	uint64_t *sent[LMTRACK_REGIONS_MAX];	/* whole chunks, so that no two share a word */
	uint64_t *hold[LMTRACK_REGIONS_MAX];	/* likewise; NULL: no page of the region is held back */
	struct flight *flight[LMTRACK_REGIONS_MAX];	/* for each chunk; of whose channel it is */
	struct channel *channels[LMTRACK_CHANNELS_MAX];
	unsigned int count;
	int event_fd;				/* readable: the round has ended, or a channel is lost */
	struct kmig_pace pace;			/* its lock is the innermost */

	pthread_mutex_t lock;
	pthread_cond_t work;
	uint32_t number;			/* of the round that is sent, or was last */
	enum kmig_send_what what;
	unsigned int flags;
	uint64_t begin_ns;
	unsigned int width;			/* so many channels are to carry */
	unsigned int gone;			/* and so many more: others were lost in the round */
	unsigned int region;			/* the next chunk that nobody has come for */
	uint64_t chunk;
	unsigned int running;			/* channels that have not finished it */
	bool stop;
	_Atomic int error;			/* negative errno: it has failed for good */
	int error_channel;
	char text[KMIG_ERROR_MAX];		/* what there is to say about it, or "" */
	struct kmig_round result;
	struct kmig_round_times times;
	unsigned int carrying;			/* channels that keep the wire busy */
	uint64_t carrying_since;
};

/* It is done with the round, the others go on. */
static void lose(struct channel *channel, int err)
{
	pthread_mutex_lock(&channel->sender->lock);
	if (!channel->error) {
		channel->error = err;
		channel->sender->gone++;
		pthread_cond_broadcast(&channel->sender->work);
	}
	pthread_mutex_unlock(&channel->sender->lock);
	shutdown(channel->sock, SHUT_RDWR);
	kmig_pace_wake(&channel->sender->pace);
	eventfd_write(channel->sender->event_fd, 1);
}

/* The first failure counts; it ends all channels, and so the round. */
static void fail(struct kmig_sender *sender, int number, int err, const char *text)
{
	bool first;

	pthread_mutex_lock(&sender->lock);
	first = !sender->error;
	if (first) {
		sender->error = err;
		sender->error_channel = number;
		snprintf(sender->text, sizeof(sender->text), "%s", text);
		pthread_cond_broadcast(&sender->work);
	}
	/* With the lock held: the socket of one that is dropped is the caller's to close. */
	for (unsigned int i = 0; first && i < sender->count; i++)
		if (sender->channels[i]->there)
			shutdown(sender->channels[i]->sock, SHUT_RDWR);
	pthread_mutex_unlock(&sender->lock);
	kmig_pace_wake(&sender->pace);
}

/* ---- Time ---- */

/* The channel is about to send; returns when that was. */
static uint64_t carry(struct channel *channel)
{
	struct kmig_sender *sender = channel->sender;
	uint64_t now;

	pthread_mutex_lock(&sender->lock);
	/* Read with the lock held: else who was held up before it would count that time twice. */
	now = kmig_now_ns();
	if (!channel->carrying && !sender->carrying++)
		sender->carrying_since = now;
	pthread_mutex_unlock(&sender->lock);
	channel->carrying = true;
	return now;
}

/* It neither sends nor has anything pending; returns when that was. */
static uint64_t rest(struct channel *channel)
{
	struct kmig_sender *sender = channel->sender;
	uint64_t now;

	pthread_mutex_lock(&sender->lock);
	now = kmig_now_ns();
	if (channel->carrying && !--sender->carrying)
		sender->times.wire_ns += now - sender->carrying_since;
	pthread_mutex_unlock(&sender->lock);
	channel->carrying = false;
	return now;
}

/*
 * Has the connection bytes that could not leave? Less than a segment is no sign of it: TCP keeps
 * that until more comes (MSG_MORE).
 */
static bool pending(const struct channel *channel)
{
	int unsent = 0, segment = 0;
	socklen_t length = sizeof(segment);

	if (kmig_pace_busy(&channel->sender->pace))
		return true;
	if (ioctl(channel->sock, SIOCOUTQNSD, &unsent) ||
	    getsockopt(channel->sock, IPPROTO_TCP, TCP_MAXSEG, &segment, &length))
		return false;
	return unsent && unsent >= segment;
}

/* What it began to send at @begin was taken by the connection. */
static void taken(struct channel *channel, uint64_t begin, struct count *count)
{
	count->send_ns += (pending(channel) ? kmig_now_ns() : rest(channel)) - begin;
}

/* ---- Zero-copy ---- */

/* The sends from @low to @high are done with. */
static void completed(struct channel *channel, uint32_t low, uint32_t high, bool copied)
{
	uint64_t bytes = 0;

	for (uint32_t call = low; call != high + 1; call++)
		bytes += channel->call_bytes[call % ZEROCOPY_CALLS];
	channel->completed += high - low + 1;
	if (!copied)
		return;
	channel->zerocopy = false;
	pthread_mutex_lock(&channel->sender->lock);
	channel->stats.zerocopy_bytes -= bytes;
	channel->stats.copied_bytes += bytes;
	pthread_mutex_unlock(&channel->sender->lock);
}

/* Take in what the error queue has to say. */
static void reap(struct channel *channel)
{
	while (channel->completed != channel->calls) {
		char control[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6))];
		struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };

		if (recvmsg(channel->sock, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0)
			return;
		for (struct cmsghdr *at = CMSG_FIRSTHDR(&msg); at; at = CMSG_NXTHDR(&msg, at)) {
			struct sock_extended_err said;

			if (!(at->cmsg_level == SOL_IP && at->cmsg_type == IP_RECVERR) &&
			    !(at->cmsg_level == SOL_IPV6 && at->cmsg_type == IPV6_RECVERR))
				continue;
			memcpy(&said, CMSG_DATA(at), sizeof(said));
			if (!said.ee_errno && said.ee_origin == SO_EE_ORIGIN_ZEROCOPY)
				completed(channel, said.ee_info, said.ee_data, said.ee_code & SO_EE_CODE_ZEROCOPY_COPIED);
		}
	}
}

/* ---- Sockets ---- */

static int given_up(const struct channel *channel)
{
	return channel->sender->error ? channel->sender->error : channel->error;
}

static int broken(struct channel *channel)
{
	int err = 0;
	socklen_t length = sizeof(err);

	getsockopt(channel->sock, SOL_SOCKET, SO_ERROR, &err, &length);
	return err ? -err : -EPIPE;
}

/* Until something can be sent, or heard; a peer that does not read is the engine's affair. */
static int wait_for(struct channel *channel, short events)
{
	struct pollfd fd = { .fd = channel->sock, .events = events };

	if (given_up(channel))
		return given_up(channel);
	if (poll(&fd, 1, WAIT_MS) < 0 && errno != EINTR)
		return -errno;
	reap(channel);
	/* Also when nothing is to be sent any more, and only completions are waited for. */
	return fd.revents & POLLHUP ? broken(channel) : 0;
}

static bool can_zerocopy(const struct channel *channel)
{
	return channel->zerocopy && channel->calls - channel->completed < ZEROCOPY_CALLS;
}

/* The part of the vector to be sent at once: whole pieces, or some of the first. */
static unsigned int zerocopy_part(const struct iovec *vec, unsigned int count, struct iovec *first)
{
	size_t bytes = 0;
	unsigned int n = 0;

	while (n < count && bytes + vec[n].iov_len <= ZEROCOPY_MAX)
		bytes += vec[n++].iov_len;
	*first = (struct iovec){ vec->iov_base, ZEROCOPY_MAX };
	return n;
}

/* Send all of the vector, which is used up; @payload: so many bytes of guest memory, else a head. */
static int push(struct channel *channel, struct iovec *vec, unsigned int count, int flags, uint32_t payload)
{
	uint64_t by_reference = 0, bytes = 0, begin = kmig_now_ns();
	bool zerocopy = payload >= ZEROCOPY_MIN;
	int err = 0;

	while (count && !err) {
		struct msghdr msg = { .msg_iov = vec, .msg_iovlen = count };
		bool now = zerocopy && can_zerocopy(channel);
		struct iovec first;
		ssize_t n;

		if (now)
			msg.msg_iovlen = zerocopy_part(vec, count, &first);
		if (!msg.msg_iovlen) {
			msg.msg_iov = &first;
			msg.msg_iovlen = 1;
		}
		n = sendmsg(channel->sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT | flags | (now ? MSG_ZEROCOPY : 0));
		if (n < 0 && errno == ENOBUFS && now) {
			/* So many pages may not be locked, or notices kept: now, or at all. */
			zerocopy = false;
			channel->zerocopy = channel->completed != channel->calls;
		} else if (n < 0 && errno == EAGAIN) {
			err = wait_for(channel, POLLOUT);
		} else if (n < 0 && errno != EINTR) {
			err = -errno;
		}
		if (n < 0)
			continue;
		bytes += n;
		if (now) {
			channel->call_bytes[channel->calls++ % ZEROCOPY_CALLS] = n;
			by_reference += n;
		}
		kmig_iov_advance(&vec, &count, n);
	}
	pthread_mutex_lock(&channel->sender->lock);
	channel->stats.blocked_ns += kmig_now_ns() - begin;
	channel->stats.zerocopy_bytes += by_reference;
	*(payload ? &channel->stats.copied_bytes : &channel->stats.header_bytes) += bytes - by_reference;
	pthread_mutex_unlock(&channel->sender->lock);
	reap(channel);
	return err;
}

/* ---- Frames ---- */

/* Pages of data that may go in one frame. */
static unsigned int most_pages(const struct kmig_sender *sender)
{
	uint64_t pages = kmig_pace_piece(&sender->pace) / sender->tracker->config.regions[0]->page_size;

	return !pages ? 1 : pages < LMTRACK_CHUNK_PAGES ? pages : LMTRACK_CHUNK_PAGES;
}

#define TOO_LARGE 1	/* no errno: the channel may have been given up with any of them */

/* Is there no point in waiting until its frame may be sent? */
static int frame_over(const void *data)
{
	const struct channel *channel = data;

	if (given_up(channel))
		return given_up(channel);
	return channel->pages > most_pages(channel->sender) ? TOO_LARGE : 0;
}

/* The frame begun in @channel->frame's place: header and table, then what @vec holds. */
static int send_frame(struct channel *channel, struct kmig_frame *frame, unsigned int pages, struct count *count)
{
	struct kmig_sender *sender = channel->sender;
	struct iovec vec[2] = {
		{ &channel->frame, sizeof(channel->frame) },
		{ channel->table, frame->extents * sizeof(channel->table[0]) },
	};
	uint64_t bytes = vec[0].iov_len + vec[1].iov_len + frame->payload;
	bool last = frame->type == LMTRACK_FRAME_ROUND_END;
	int err;

	channel->pages = frame->type == LMTRACK_FRAME_DATA ? pages : 0;
	err = kmig_pace_pay(&sender->pace, bytes, frame_over, channel);
	if (err)
		return err;
	frame->stream = sender->tracker->config.stream;
	frame->channel = channel->number;
	frame->round = sender->number;
	frame->seq = channel->seq++;
	kmig_frame_encode(frame, channel->table, &channel->frame);
	err = push(channel, vec, 2, last ? 0 : MSG_MORE, 0);
	if (!err && frame->payload)
		err = push(channel, channel->vec, frame->extents, MSG_MORE, frame->payload);
	if (err)
		return err;

	count->bytes += bytes;
	pthread_mutex_lock(&sender->lock);
	channel->stats.frames++;
	if (frame->type == LMTRACK_FRAME_DATA) {
		channel->stats.data_pages += pages;
	} else if (frame->type == LMTRACK_FRAME_ZERO) {
		channel->stats.zero_pages += pages;
		channel->stats.zero_extents += frame->extents;
	}
	pthread_mutex_unlock(&sender->lock);
	return 0;
}

/* The table of @frame, and what it names: of the pages from @*next on so many at most. Returns how many. */
static unsigned int fill_frame(struct channel *channel, struct kmig_frame *frame, const struct kmig_region *region,
			       uint64_t chunk, const uint64_t *bits, uint64_t *next, unsigned int most)
{
	unsigned int pages = 0;
	uint64_t from, to;

	for (from = *next; from < LMTRACK_CHUNK_PAGES && pages < most;
	     from = kmig_bit_next(bits, LMTRACK_CHUNK_PAGES, to)) {
		uint64_t first = chunk * LMTRACK_CHUNK_PAGES + from;

		to = kmig_bit_next_clear(bits, LMTRACK_CHUNK_PAGES, from);
		if (to - from > most - pages)
			to = from + most - pages;
		channel->vec[frame->extents] = (struct iovec){
			(uint8_t *)region->map + first * region->page_size,
			(to - from) * region->page_size,
		};
		channel->table[frame->extents++] = (struct lmtrack_wire_extent){
			.first = htole64(first),
			.pages = htole32(to - from),
		};
		pages += to - from;
	}
	*next = from;
	return pages;
}

/* These pages of a chunk, as data or as zeroes: in one frame, unless a cap wants smaller ones. */
static int send_extents(struct channel *channel, uint8_t type, unsigned int index, uint64_t chunk, const uint64_t *bits,
			struct count *count)
{
	const struct kmig_region *region = channel->sender->tracker->config.regions[index];
	uint64_t next = kmig_bit_next(bits, LMTRACK_CHUNK_PAGES, 0);
	bool data = type == LMTRACK_FRAME_DATA;
	int err = 0;

	while (next < LMTRACK_CHUNK_PAGES && !err) {
		struct kmig_frame frame = { .type = type, .region = index };
		unsigned int most = data ? most_pages(channel->sender) : LMTRACK_CHUNK_PAGES;
		uint64_t first = next;
		unsigned int pages = fill_frame(channel, &frame, region, chunk, bits, &next, most);

		frame.payload = data ? pages * region->page_size : 0;
		err = send_frame(channel, &frame, pages, count);
		if (!err)
			*(data ? &count->data : &count->zero) += pages;
		/* The cap was lowered while it waited. */
		if (err == TOO_LARGE) {
			next = first;
			err = 0;
		}
	}
	return err;
}

static bool is_zero(const uint8_t *page, uint32_t size)
{
	/* Each word equals the one before it, and the first is zero. */
	return !*(const uint64_t *)page && !memcmp(page, page + 8, size - 8);
}

static int send_chunk(struct channel *channel, const struct kmig_harvest *harvest, struct count *count)
{
	struct kmig_sender *sender = channel->sender;
	unsigned int index = harvest->region;
	uint64_t chunk = harvest->chunk;
	const struct kmig_region *region = sender->tracker->config.regions[index];
	const uint8_t *map = (const uint8_t *)region->map + chunk * kmig_chunk_bytes(region);
	uint64_t *sent = sender->sent[index] + chunk * KMIG_CHUNK_WORDS;
	uint64_t data[KMIG_CHUNK_WORDS], zero[KMIG_CHUNK_WORDS], begin;
	int err;

	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++) {
		data[i] = harvest->take[i] & harvest->exists[i];
		zero[i] = harvest->take[i] & ~harvest->exists[i];
	}
	if (!sender->tracker->config.no_zero_detection) {
		for (uint64_t page = kmig_bit_next(data, LMTRACK_CHUNK_PAGES, 0); page < LMTRACK_CHUNK_PAGES;
		     page = kmig_bit_next(data, LMTRACK_CHUNK_PAGES, page + 1)) {
			if (!is_zero(map + page * region->page_size, region->page_size))
				continue;
			kmig_bit_clear(data, page);
			kmig_bit_set(zero, page);
		}
	}
	/* The engine's thread may be looking. */
	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++)
		__atomic_store_n(&sent[i], (sent[i] | data[i]) & ~zero[i], __ATOMIC_RELAXED);
	begin = carry(channel);
	err = send_extents(channel, LMTRACK_FRAME_DATA, index, chunk, data, count);
	if (!err)
		err = send_extents(channel, LMTRACK_FRAME_ZERO, index, chunk, zero, count);
	taken(channel, begin, count);
	return err;
}

/* ---- Rounds ---- */

static bool empty(const uint64_t *bits)
{
	return kmig_bit_next(bits, LMTRACK_CHUNK_PAGES, 0) == LMTRACK_CHUNK_PAGES;
}

static bool carries(const struct channel *channel)
{
	return channel->rank < channel->sender->width + channel->sender->gone;
}

/*
 * The next chunk of the round, which is this channel's then, once it is to carry; false: there is
 * none left, or it has been given up.
 */
static bool next_chunk(struct channel *channel, unsigned int *region, uint64_t *chunk, struct count *count)
{
	struct kmig_sender *sender = channel->sender;
	const struct kmig_tracker_config *config = &sender->tracker->config;
	uint64_t begin = 0;
	bool got;

	pthread_mutex_lock(&sender->lock);
	if (!carries(channel)) {
		pthread_mutex_unlock(&sender->lock);
		begin = rest(channel);
		pthread_mutex_lock(&sender->lock);
	}
	while (!carries(channel) && sender->region < config->count && !given_up(channel))
		pthread_cond_wait(&sender->work, &sender->lock);
	if (begin)
		count->idle_ns += kmig_now_ns() - begin;
	got = sender->region < config->count && !given_up(channel);
	if (got) {
		*region = sender->region;
		*chunk = sender->chunk++;
		if (sender->chunk == kmig_region_chunks(config->regions[*region])) {
			sender->region++;
			sender->chunk = 0;
		}
		if (sender->region == config->count)
			pthread_cond_broadcast(&sender->work);
	}
	pthread_mutex_unlock(&sender->lock);
	return got;
}

/* Take what is dirty in the chunk, and send it; @harvesting: a failure is the tracker's. */
static int send_from(struct channel *channel, unsigned int index, uint64_t chunk, struct count *count, bool *harvesting)
{
	struct kmig_sender *sender = channel->sender;
	const uint64_t *hold = kmig_sender_left_out(sender->tracker, index, sender->what, sender->flags);
	struct flight *flight = &sender->flight[index][chunk];
	struct kmig_harvest harvest = {
		.mode = sender->what == KMIG_SEND_ALL ? KMIG_HARVEST_ALL : KMIG_HARVEST_DIRTY,
		.region = index,
		.chunk = chunk,
	};
	int err;

	if (channel->carrying && !pending(channel))
		rest(channel);
	memcpy(harvest.sent, sender->sent[index] + chunk * KMIG_CHUNK_WORDS, sizeof(harvest.sent));
	if (hold)
		memcpy(harvest.hold, hold + chunk * KMIG_CHUNK_WORDS, sizeof(harvest.hold));
	*harvesting = true;
	err = sender->harvest(sender->tracker, &harvest);
	if (err)
		return err;
	*harvesting = false;
	if (empty(harvest.take))
		return 0;
	memcpy(flight->pages, harvest.take, sizeof(flight->pages));
	__atomic_store_n(&flight->channel, channel->number, __ATOMIC_RELAXED);
	__atomic_store_n(&flight->round, sender->number, __ATOMIC_RELEASE);
	return send_chunk(channel, &harvest, count);
}

static int send_round(struct channel *channel, struct count *count, bool *harvesting)
{
	struct kmig_frame end = { .type = LMTRACK_FRAME_ROUND_END };
	unsigned int region;
	uint64_t begin, chunk;
	int err = 0;

	while (!err && next_chunk(channel, &region, &chunk, count))
		err = send_from(channel, region, chunk, count, harvesting);
	if (!err)
		err = given_up(channel);
	if (err)
		return err;
	end.arg = count->data + count->zero;
	begin = carry(channel);
	err = send_frame(channel, &end, 0, count);
	while (!err && channel->completed != channel->calls)
		err = wait_for(channel, 0);
	taken(channel, begin, count);
	return err;
}

/* With @lock held: one channel is done with the round. The last one ends it. */
static void round_done(struct kmig_sender *sender, const struct count *count)
{
	struct kmig_round *result = &sender->result;

	result->data_pages += count->data;
	result->zero_pages += count->zero;
	result->pages += count->data + count->zero;
	result->bytes += count->bytes;
	if (--sender->running)
		return;
	result->error = sender->error;
	result->channel = sender->error_channel;
	result->duration_ns = kmig_now_ns() - sender->begin_ns;
	eventfd_write(sender->event_fd, 1);
}

static void *channel_main(void *data)
{
	struct channel *channel = data;
	struct kmig_sender *sender = channel->sender;

	pthread_mutex_lock(&sender->lock);
	for (;;) {
		struct count count = { 0 };
		bool harvesting = false;
		char text[KMIG_ERROR_MAX] = "";
		uint64_t begin, took;
		int err;

		if (sender->number == channel->round_done) {
			/* A round that has begun needs every channel to say that it is done. */
			if (sender->stop || channel->stop)
				break;
			pthread_cond_wait(&sender->work, &sender->lock);
			continue;
		}
		channel->round_done = sender->number;
		pthread_mutex_unlock(&sender->lock);

		begin = kmig_now_ns();
		err = send_round(channel, &count, &harvesting);
		if (err && harvesting) {
			kmig_copy_error(sender->tracker->config.ctx, text);
			/* These are how a wait says that the round has not ended; the text has the cause. */
			if (err == -ETIMEDOUT || err == -EINTR)
				err = -EIO;
			fail(sender, channel->number, err, text);
		} else if (err && !sender->error) {
			lose(channel, err);
		}
		/* What its connection still has will be gone when the peer says that it has all. */
		took = rest(channel) - begin;

		pthread_mutex_lock(&sender->lock);
		sender->times.harvest_ns += took - count.send_ns - count.idle_ns;
		sender->times.send_ns += count.send_ns;
		round_done(sender, &count);
	}
	pthread_mutex_unlock(&sender->lock);
	return NULL;
}

/* ---- The object ---- */

static uint64_t *new_bitmap(const struct kmig_region *region)
{
	return calloc(kmig_region_chunks(region), KMIG_CHUNK_WORDS * sizeof(uint64_t));
}

int kmig_sender_new(struct kmig_tracker *tracker, kmig_harvest_fn harvest)
{
	const struct kmig_tracker_config *config = &tracker->config;
	struct kmig_sender *sender = calloc(1, sizeof(*sender));
	bool ok;

	if (!sender)
		return kmig_fail(config->ctx, -ENOMEM, "sender: out of memory");
	tracker->sender = sender;
	sender->tracker = tracker;
	sender->harvest = harvest;
	sender->error_channel = -1;
	sender->width = LMTRACK_CHANNELS_MAX;
	pthread_mutex_init(&sender->lock, NULL);
	pthread_cond_init(&sender->work, NULL);
	kmig_pace_init(&sender->pace);
	sender->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ok = sender->event_fd >= 0;
	for (unsigned int i = 0; i < config->count && ok; i++) {
		sender->sent[i] = new_bitmap(config->regions[i]);
		sender->flight[i] = calloc(kmig_region_chunks(config->regions[i]), sizeof(*sender->flight[i]));
		ok = sender->sent[i] && sender->flight[i];
	}
	if (ok)
		return 0;
	kmig_sender_free(tracker);
	return kmig_fail(config->ctx, -ENOMEM, "sender: out of memory or descriptors");
}

void kmig_sender_free(struct kmig_tracker *tracker)
{
	struct kmig_sender *sender = tracker->sender;

	if (!sender)
		return;
	kmig_sender_cancel(tracker);
	pthread_mutex_lock(&sender->lock);
	sender->stop = true;
	pthread_cond_broadcast(&sender->work);
	pthread_mutex_unlock(&sender->lock);
	for (unsigned int i = 0; i < sender->count; i++) {
		if (sender->channels[i]->there)
			pthread_join(sender->channels[i]->thread, NULL);
		free(sender->channels[i]);
	}
	for (unsigned int i = 0; i < tracker->config.count; i++) {
		free(sender->sent[i]);
		free(sender->flight[i]);
		free(sender->hold[i]);
	}
	if (sender->event_fd >= 0)
		close(sender->event_fd);
	kmig_pace_destroy(&sender->pace);
	pthread_cond_destroy(&sender->work);
	pthread_mutex_destroy(&sender->lock);
	free(sender);
	tracker->sender = NULL;
}

static int start_channel(struct kmig_tracker *tracker, uint32_t number, int sock, struct channel **out)
{
	struct kmig_sender *sender = tracker->sender;
	struct channel *channel = calloc(1, sizeof(*channel));
	int one = 1;

	if (!channel)
		return kmig_fail(tracker->config.ctx, -ENOMEM, "sender: out of memory");
	channel->sender = sender;
	channel->number = number;
	channel->sock = sock;
	channel->there = true;
	channel->round_done = sender->number;
	/* A kernel or a socket that cannot is one that copies. */
	channel->zerocopy = !setsockopt(sock, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one));
	if (kmig_thread_start(&channel->thread, channel_main, channel)) {
		free(channel);
		return kmig_fail(tracker->config.ctx, -EAGAIN, "sender: no thread for channel %u", number);
	}
	*out = channel;
	return 0;
}

/* With @lock held: those that are lost, and were not dropped. */
static uint64_t lost_channels(const struct kmig_sender *sender)
{
	uint64_t lost = 0;

	for (unsigned int i = 0; i < sender->count; i++)
		if (sender->channels[i]->there && sender->channels[i]->error)
			lost |= 1ULL << i;
	return lost;
}

/* With @lock held: how many channels there are; they are to send. */
static unsigned int rank_channels(struct kmig_sender *sender)
{
	unsigned int n = 0;

	for (unsigned int i = 0; i < sender->count; i++)
		if (sender->channels[i]->there)
			sender->channels[i]->rank = n++;
	return n;
}

int kmig_sender_add_channel(struct kmig_tracker *tracker, int sock)
{
	struct kmig_sender *sender = tracker->sender;
	int err = start_channel(tracker, sender->count, sock, &sender->channels[sender->count]);

	if (!err)
		sender->count++;
	return err;
}

/* What the channel has sent in the last round is dirty again, and the destination may have it. */
static void take_back(struct kmig_sender *sender, uint32_t number)
{
	for (unsigned int i = 0; i < sender->tracker->config.count; i++) {
		struct kmig_region *region = sender->tracker->config.regions[i];

		for (uint64_t chunk = 0; chunk < kmig_region_chunks(region); chunk++) {
			const struct flight *flight = &sender->flight[i][chunk];
			uint64_t at = chunk * KMIG_CHUNK_WORDS;

			if (__atomic_load_n(&flight->round, __ATOMIC_ACQUIRE) != sender->number ||
			    __atomic_load_n(&flight->channel, __ATOMIC_RELAXED) != number)
				continue;
			for (unsigned int word = 0; word < KMIG_CHUNK_WORDS; word++) {
				__atomic_fetch_or(&sender->sent[i][at + word], flight->pages[word], __ATOMIC_RELAXED);
				__atomic_fetch_or(&region->discarded[at + word], flight->pages[word], __ATOMIC_ACQ_REL);
			}
		}
	}
}

int kmig_sender_drop_channel(struct kmig_tracker *tracker, uint32_t number, int *why)
{
	struct kmig_sender *sender = tracker->sender;
	struct channel *channel = number < sender->count ? sender->channels[number] : NULL;
	eventfd_t events;

	if (sender->error)
		return -EPIPE;
	if (!channel || !channel->there)
		return kmig_fail(tracker->config.ctx, -EINVAL, "sender: there is no channel %u to be dropped", number);
	lose(channel, -ECANCELED);
	pthread_mutex_lock(&sender->lock);
	channel->stop = true;
	pthread_cond_broadcast(&sender->work);
	pthread_mutex_unlock(&sender->lock);
	pthread_join(channel->thread, NULL);
	take_back(sender, number);
	*why = channel->error;

	pthread_mutex_lock(&sender->lock);
	channel->there = false;
	eventfd_read(sender->event_fd, &events);
	if (!sender->running || lost_channels(sender))
		eventfd_write(sender->event_fd, 1);
	pthread_mutex_unlock(&sender->lock);
	return 0;
}

int kmig_sender_replace_channel(struct kmig_tracker *tracker, uint32_t number, int sock)
{
	struct kmig_sender *sender = tracker->sender;
	struct channel *before = number < sender->count ? sender->channels[number] : NULL, *channel;
	int err;

	if (!before || before->there || sender->running)
		return kmig_fail(tracker->config.ctx, -EINVAL, "sender: channel %u is not to be replaced", number);
	err = start_channel(tracker, number, sock, &channel);
	if (err)
		return err;
	channel->stats = before->stats;
	sender->channels[number] = channel;
	free(before);
	return 0;
}

uint64_t kmig_sender_lost(struct kmig_tracker *tracker)
{
	struct kmig_sender *sender = tracker->sender;
	uint64_t lost;

	pthread_mutex_lock(&sender->lock);
	lost = lost_channels(sender);
	pthread_mutex_unlock(&sender->lock);
	return lost;
}

int kmig_sender_send(struct kmig_tracker *tracker, uint32_t round, enum kmig_send_what what, unsigned int flags)
{
	struct kmig_sender *sender = tracker->sender;
	eventfd_t ended;
	int err = 0;

	pthread_mutex_lock(&sender->lock);
	if (sender->error || lost_channels(sender))
		err = -EPIPE;
	else if (sender->running)
		err = -EBUSY;
	else if (!sender->count || round <= sender->number)
		err = -EINVAL;
	if (!err) {
		sender->running = rank_channels(sender);
		err = sender->running ? 0 : -EPIPE;
	}
	if (!err) {
		sender->gone = 0;
		sender->region = sender->chunk = 0;
		eventfd_read(sender->event_fd, &ended);
		sender->result = (struct kmig_round){ .round = round };
		sender->times = (struct kmig_round_times)KMIG_ROUND_TIMES_INIT;
		sender->what = what;
		sender->flags = flags;
		sender->begin_ns = kmig_now_ns();
		sender->number = round;
		pthread_cond_broadcast(&sender->work);
	}
	pthread_mutex_unlock(&sender->lock);
	return err ? kmig_fail(tracker->config.ctx, err, "round %u could not begin: %s", round, strerror(-err)) : 0;
}

int kmig_sender_width(struct kmig_tracker *tracker, unsigned int channels)
{
	struct kmig_sender *sender = tracker->sender;

	pthread_mutex_lock(&sender->lock);
	sender->width = channels;
	pthread_cond_broadcast(&sender->work);
	pthread_mutex_unlock(&sender->lock);
	return 0;
}

int kmig_sender_fd(const struct kmig_tracker *tracker)
{
	return tracker->sender->event_fd;
}

bool kmig_sender_sends(const struct kmig_tracker *tracker)
{
	struct kmig_sender *sender = tracker->sender;
	bool sends;

	pthread_mutex_lock(&sender->lock);
	sends = sender->running;
	pthread_mutex_unlock(&sender->lock);
	return sends;
}

int kmig_sender_wait(struct kmig_tracker *tracker, struct kmig_round *round)
{
	struct kmig_sender *sender = tracker->sender;
	bool ended;

	pthread_mutex_lock(&sender->lock);
	ended = !sender->running;
	*round = sender->result;
	pthread_mutex_unlock(&sender->lock);
	if (!ended)
		return -ETIMEDOUT;
	if (round->error && *sender->text)
		return kmig_fail(tracker->config.ctx, round->error, "%s", sender->text);
	return 0;
}

void kmig_sender_times(struct kmig_tracker *tracker, struct kmig_round_times *times)
{
	struct kmig_sender *sender = tracker->sender;

	pthread_mutex_lock(&sender->lock);
	*times = sender->times;
	pthread_mutex_unlock(&sender->lock);
}

void kmig_sender_cancel(struct kmig_tracker *tracker)
{
	fail(tracker->sender, -1, -ECANCELED, "");
}

int kmig_sender_peek(struct kmig_tracker *tracker, unsigned int index, uint64_t *bitmap, uint64_t *found)
{
	struct kmig_sender *sender = tracker->sender;
	uint64_t chunks = kmig_region_chunks(tracker->config.regions[index]);
	uint64_t words = kmig_words(kmig_region_pages(tracker->config.regions[index]));
	int err = 0;

	*found = 0;
	for (uint64_t chunk = 0; chunk < chunks && !err; chunk++) {
		struct kmig_harvest harvest = { .mode = KMIG_HARVEST_LOOK, .region = index, .chunk = chunk };
		uint64_t at = chunk * KMIG_CHUNK_WORDS;

		for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++)
			harvest.sent[i] = __atomic_load_n(&sender->sent[index][at + i], __ATOMIC_RELAXED);
		err = sender->harvest(tracker, &harvest);
		for (unsigned int i = 0; i < KMIG_CHUNK_WORDS && at + i < words && !err; i++) {
			bitmap[at + i] |= harvest.take[i];
			*found += __builtin_popcountll(harvest.take[i]);
		}
	}
	return err;
}

uint64_t kmig_sender_held(struct kmig_tracker *tracker __attribute__((unused)))
{
	return 0;
}

int kmig_sender_channel_stats(struct kmig_tracker *tracker, uint32_t channel, struct kmig_channel_stats *stats)
{
	struct kmig_sender *sender = tracker->sender;

	if (channel >= sender->count)
		return kmig_fail(tracker->config.ctx, -EINVAL, "sender: there is no channel %u", channel);
	pthread_mutex_lock(&sender->lock);
	*stats = sender->channels[channel]->stats;
	pthread_mutex_unlock(&sender->lock);
	return 0;
}

int kmig_sender_cap(struct kmig_tracker *tracker, uint64_t bytes_per_second)
{
	kmig_pace_set(&tracker->sender->pace, bytes_per_second);
	return 0;
}

int kmig_sender_hold(struct kmig_tracker *tracker, unsigned int index, const uint64_t *bitmap)
{
	const struct kmig_region *region = tracker->config.regions[index];
	uint64_t **hold = &tracker->sender->hold[index];

	if (!bitmap) {
		free(*hold);
		*hold = NULL;
		return 0;
	}
	if (!*hold)
		*hold = new_bitmap(region);
	if (!*hold)
		return kmig_fail(tracker->config.ctx, -ENOMEM, "sender: out of memory");
	memcpy(*hold, bitmap, kmig_words(kmig_region_pages(region)) * sizeof(uint64_t));
	return 0;
}

/* ---- For trackers ---- */

const uint64_t *kmig_sender_left_out(const struct kmig_tracker *tracker, unsigned int region,
				     enum kmig_send_what what, unsigned int flags)
{
	return what == KMIG_SEND_ALL || flags & KMIG_SEND_HELD ? NULL : tracker->sender->hold[region];
}

void kmig_harvest_select(struct kmig_tracker *tracker, struct kmig_harvest *harvest,
			 const uint64_t dirty[KMIG_CHUNK_WORDS])
{
	uint64_t *discarded = tracker->config.regions[harvest->region]->discarded + harvest->chunk * KMIG_CHUNK_WORDS;

	for (unsigned int i = 0; i < KMIG_CHUNK_WORDS; i++) {
		uint64_t changed = dirty[i] | __atomic_load_n(&discarded[i], __ATOMIC_ACQUIRE);

		if (harvest->mode == KMIG_HARVEST_ALL)
			changed = ~0ULL;
		harvest->take[i] = ((changed & harvest->exists[i]) | (harvest->sent[i] & ~harvest->exists[i])) & ~harvest->hold[i];
		/* Whoever discards punches first: what is read from now on is what he left. */
		if (harvest->mode != KMIG_HARVEST_LOOK)
			__atomic_fetch_and(&discarded[i], ~harvest->take[i], __ATOMIC_ACQ_REL);
	}
}
