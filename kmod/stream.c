// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: streams, the senders.
 *
 * A stream has regions and channels, both added before its first round. A round visits each
 * chunk once: the chunk is harvested, and what was dirty in it goes out over the channel that came
 * for it first. So each channel carries as much as it can, however different their links are. A
 * newer copy of a page is never ahead of an older one, since user space begins a round when the
 * peer has stored the last. Each channel has a thread; they work on a round independently, and the
 * last to finish ends it.
 *
 * A channel whose connection breaks is lost: it is done with the round, and the others go on. It
 * is for user space to drop it, having heard of it by poll(), and to replace it. What a channel
 * has sent in the last round is noted per chunk (struct lmtrack_flight), and is dirty again when
 * the channel is dropped.
 *
 * User space may have fewer channels carry than there are (WIDTH), and find out by that how many
 * it takes. The others wait until there is nothing left to come for, or until one is lost: then
 * another carries in its place, or nobody might carry the rest of the round.
 *
 * Time: a thread of a channel scans (looks for chunks, harvests them, looks for zeroes) or
 * sends. The wire is busy while a channel sends, and after that for as long as the connection
 * has bytes that could not leave: what is scanned meanwhile costs the round nothing. Channels
 * that keep it busy are counted; the round's wire time is the time during which there was
 * one, so it is right for any number of them. The clock is read twice for each chunk sent, and
 * once more when a connection was found to have run dry. Under a cap (pace.c) the wire is as fast
 * as that: a channel that waits for it sends, and what was sent keeps the wire busy for as long as
 * it would take at the cap.
 *
 * Locks: stream->lock for set-up, for beginning a round and for dropping a channel.
 * stream->end_lock (spin) for the beginning of a round and its results, who keeps the wire busy,
 * who is lost, who waits for a window, failures, and which threads there are. None is held while
 * anything is sent. The threads read what they need of the stream without a lock; a round is
 * published with a release store of stream->round after everything it needs.
 *
 * A failure that is not a connection's, CANCEL and closing the stream are one thing: the stream's
 * error is set once and the threads are woken, wherever they wait. A thread that finds its channel
 * or the stream at an end finishes the round there is, shuts its connection down, and ends. Nobody
 * else sends or shuts down: whoever shares a socket can keep the lock that this takes for as long
 * as he likes. So no call waits for a connection but by waiting, killably, for its thread.
 *
 * Lifetimes: the stream's file owns everything: references to the regions' files, the channels,
 * what their transports hold, and the threads. Who drops a channel waits for its thread, then lets
 * go of the connection; so does, for all of them, who closes the stream, and frees it. Who is
 * killed meanwhile does not wait on, and who is dying not for longer than LMTRACK_LINGER: then the
 * last thread frees the stream. Each thread holds the module.
 */
#include <linux/anon_inodes.h>
#include <linux/bvec.h>
#include <linux/cpumask.h>
#include <linux/crc32c.h>
#include <linux/file.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/pagemap.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/topology.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "compat.h"
#include "lmtrack.h"
#include "trace.h"

/* So long does a dying process stay for the threads of each stream that it had. */
#define LMTRACK_LINGER		(HZ / 10)

/* A chunk in extents has at most every other page in one of them. */
#define LMTRACK_FRAME_EXTENTS	(LMTRACK_CHUNK_PAGES / 2)
#define LMTRACK_HEAD_BYTES	(sizeof(struct lmtrack_wire_frame) +			\
				 LMTRACK_FRAME_EXTENTS * sizeof(struct lmtrack_wire_extent))

static_assert(sizeof(struct lmtrack_wire_frame) == 64);
static_assert(sizeof(struct lmtrack_wire_extent) == 16);
static_assert(LMTRACK_FRAME_EXTENTS <= LMTRACK_WIRE_EXTENTS_MAX);

/**
 * struct lmtrack_flight - what a round has sent of a chunk, and may be lost on the way
 * @round:	the round; what an earlier one has sent has arrived
 * @channel:	over which it went
 * @pages:	of the chunk
 *
 * Made when the chunk is first sent, lives as long as the stream. Written by the thread that came
 * for the chunk in the round, read by who drops a channel when that channel's thread has ended.
 * Other threads may be writing theirs: @round is written last, so that it does not stand beside
 * the channel of an earlier one.
 */
struct lmtrack_flight {
	u32 round;
	u32 channel;
	unsigned long pages[BITS_TO_LONGS(LMTRACK_CHUNK_PAGES)];
};

/**
 * struct lmtrack_stream - a sender
 * @lock:	set-up, the beginning of rounds, the end of channels
 * @id:		in the frames
 * @zero_detect: look for pages of zeroes
 * @memcg:	of who made it: what the threads allocate is charged to it
 * @regions:	by index in the frames; a file reference each
 * @region_count: of them
 * @flights:	struct lmtrack_flight by region and chunk
 * @channels:	by number; changes under @lock and @end_lock, as does the next
 * @channel_count: of them
 * @what:	of the round
 * @holding:	the round leaves out held pages
 * @round:	being sent, or the last that was; 0 before the first
 * @width:	so many channels are to carry
 * @next:	the first chunk that no channel has come for, see stream_next()
 * @begin:	when the round began
 * @work:	channels wait here for a round, and in it until they are to carry
 * @running:	channels that have not finished the round
 * @end_lock:	guards what follows
 * @carrying:	channels that keep the wire busy
 * @carrying_since: when the first of them began
 * @sending:	a round is under way
 * @wanting:	channels that wait for a window
 * @lost:	bit for each channel that is lost and was not dropped
 * @alive:	channels that are not lost
 * @gone:	those that were lost in the round; so many more are to carry
 * @error:	negative errno; the stream has failed for good
 * @error_channel: where, or -1
 * @threads:	of channels, that have not ended
 * @orphan:	nobody waits for them: the last frees the stream
 * @result:	of the round
 * @end:	poll() and WAIT wait here for the end of the round
 * @pace:	how fast they may send
 */
struct lmtrack_stream {
	struct mutex lock;		/* set-up, beginning of rounds */
	u64 id;
	bool zero_detect;
	struct mem_cgroup *memcg;
	struct file *regions[LMTRACK_REGIONS_MAX];
	unsigned int region_count;
	struct xarray flights[LMTRACK_REGIONS_MAX];
	struct lmtrack_channel *channels[LMTRACK_CHANNELS_MAX];
	unsigned int channel_count;

	DECLARE_BITMAP(wanting, LMTRACK_CHANNELS_MAX);
	u32 what;
	bool holding;
	u32 round;
	unsigned int width;
	atomic64_t next;
	ktime_t begin;
	wait_queue_head_t work;
	atomic_t running;

	spinlock_t end_lock;		/* results, wire, losses, windows, end of rounds; threads */
	unsigned int carrying;
	ktime_t carrying_since;
	bool sending;
	u64 lost;
	unsigned int alive;
	unsigned int gone;
	int error;
	int error_channel;
	unsigned int threads;
	bool orphan;
	struct lmtrack_stream_wait result;
	wait_queue_head_t end;

	struct lmtrack_pace pace;
};

/* What one channel has done in one round. */
struct round_count {
	u64 pages;
	u64 data;
	u64 zero;
	u64 bytes;
	u64 held;
	u64 send_ns;
	u64 idle_ns;		/* it was not to carry */
};

static struct lmtrack_region *stream_region(struct lmtrack_stream *stream, unsigned int index)
{
	return stream->regions[index] ? lmtrack_region_of(stream->regions[index]) : NULL;
}

/* For transports that wait: 0, or the error that has ended the channel or the stream. */
int lmtrack_channel_error(const struct lmtrack_channel *channel)
{
	return READ_ONCE(channel->stream->error) ?: READ_ONCE(channel->error);
}
EXPORT_SYMBOL_GPL(lmtrack_channel_error);

/* Nobody is slowed down for a migration that has ended, or that nothing leaves any more. */
static void stream_release_stun(struct lmtrack_stream *stream)
{
	unsigned int i;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++) {
		struct file *region = READ_ONCE(stream->regions[i]);

		if (region)
			lmtrack_stun_release(lmtrack_region_of(region), region);
	}
}

/* With end_lock held: its thread looks again what there is to do, wherever it waits. */
static void channel_wake(struct lmtrack_channel *channel)
{
	if (!channel->ended)
		wake_up_process(channel->task);
}

/*
 * The channel's connection is of no more use: it ends, the others go on. By the channel's thread,
 * or under stream->lock.
 */
static void channel_lose(struct lmtrack_channel *channel, int error)
{
	struct lmtrack_stream *stream = channel->stream;
	bool last = false;

	spin_lock(&stream->end_lock);
	/* Of a stream that has failed they are all shut down, and none is lost. */
	if (!channel->error && !stream->error) {
		WRITE_ONCE(channel->error, error);
		WRITE_ONCE(stream->lost, stream->lost | BIT_ULL(channel->number));
		last = !--stream->alive;
		WRITE_ONCE(stream->gone, stream->gone + 1);
	}
	channel_wake(channel);
	spin_unlock(&stream->end_lock);
	if (last)
		stream_release_stun(stream);
	wake_up_all(&stream->end);
	wake_up_all(&stream->work);
}

/* Never 0, as that is no window. */
#define WANTED(region, window)	(((u64)(region) << 40 | (window)) + 1)
#define WANTED_REGION(wanted)	((u32)(((wanted) - 1) >> 40))
#define WANTED_WINDOW(wanted)	(((wanted) - 1) & GENMASK_ULL(39, 0))

/* For transports with windows: the thread will wait for this one; poll() tells. */
void lmtrack_channel_want(struct lmtrack_channel *channel, u32 region, u64 window)
{
	struct lmtrack_stream *stream = channel->stream;

	spin_lock(&stream->end_lock);
	WRITE_ONCE(channel->wanted, WANTED(region, window));
	__set_bit(channel->number, stream->wanting);
	spin_unlock(&stream->end_lock);
	wake_up_all(&stream->end);
}
EXPORT_SYMBOL_GPL(lmtrack_channel_want);

/* It waits no more. */
void lmtrack_channel_got(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;

	spin_lock(&stream->end_lock);
	WRITE_ONCE(channel->wanted, 0);
	__clear_bit(channel->number, stream->wanting);
	spin_unlock(&stream->end_lock);
}
EXPORT_SYMBOL_GPL(lmtrack_channel_got);

/* The first failure counts; it ends all channels, and so the round. */
static void stream_fail(struct lmtrack_stream *stream, int channel, int error)
{
	unsigned int i;
	bool first;

	spin_lock(&stream->end_lock);
	first = !stream->error;
	if (first) {
		WRITE_ONCE(stream->error, error);
		stream->error_channel = channel;
	}
	for (i = 0; first && i < stream->channel_count; i++)
		channel_wake(stream->channels[i]);
	spin_unlock(&stream->end_lock);
	if (!first)
		return;
	stream_release_stun(stream);
	wake_up_all(&stream->end);
}

/* ---- Time ---- */

/* The channel is about to send; returns when that was. */
static ktime_t channel_carry(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;
	ktime_t now;

	spin_lock(&stream->end_lock);
	/* Read under the lock: else who was held up before it would count that time twice. */
	now = ktime_get();
	if (!channel->carrying && !stream->carrying++)
		stream->carrying_since = now;
	spin_unlock(&stream->end_lock);
	channel->carrying = true;
	return now;
}

/* It neither sends nor has anything pending; returns when that was. */
static ktime_t channel_rest(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;
	ktime_t now;

	spin_lock(&stream->end_lock);
	now = ktime_get();
	if (channel->carrying && !--stream->carrying)
		stream->result.wire_ns += ktime_to_ns(ktime_sub(now, stream->carrying_since));
	spin_unlock(&stream->end_lock);
	channel->carrying = false;
	return now;
}

/* Is the wire busy with what it has sent? */
static bool channel_pending(const struct lmtrack_channel *channel)
{
	return channel->transport->pending(channel) || lmtrack_pace_busy(&channel->stream->pace);
}

/* What it began to send at @begin was taken by the connection. */
static void channel_sent(struct lmtrack_channel *channel, ktime_t begin, struct round_count *count)
{
	ktime_t now = channel_pending(channel) ? ktime_get() : channel_rest(channel);
	u64 took = ktime_to_ns(ktime_sub(now, begin));

	count->send_ns += took;
	channel->stats.blocked_ns += took;
}

/* ---- Frames ---- */

static int send_frame(struct lmtrack_channel *channel, struct lmtrack_wire_frame *frame,
		      unsigned int extents, unsigned int pages, struct round_count *count)
{
	size_t bytes = sizeof(*frame) + extents * sizeof(struct lmtrack_wire_extent);
	int ret;

	frame->magic = cpu_to_le32(LMTRACK_WIRE_MAGIC);
	frame->version = cpu_to_le16(LMTRACK_WIRE_VERSION);
	frame->stream = cpu_to_le64(channel->stream->id);
	frame->channel = cpu_to_le32(channel->number);
	frame->round = cpu_to_le32(channel->stream->round);
	frame->extents = cpu_to_le32(extents);
	frame->payload = cpu_to_le32(pages << PAGE_SHIFT);
	frame->seq = cpu_to_le64(channel->seq);
	frame->crc = cpu_to_le32(~crc32c(~0, frame, bytes));

	ret = lmtrack_pace_pay(&channel->stream->pace, channel, pages,
			       bytes + ((size_t)pages << PAGE_SHIFT));
	if (ret)
		return ret;
	ret = channel->transport->send(channel, frame, bytes, channel->bvec, pages,
				       frame->type != LMTRACK_FRAME_ROUND_END);
	/*
	 * A page that cannot be read is no fault of the connection's, and ends the stream. Part of
	 * the frame may be out: nobody can send over this connection after it.
	 */
	if (ret == -EHWPOISON)
		return ret;
	if (ret) {
		/* That is how the cap asks for a smaller frame: it must not be asked for ever. */
		ret = ret == -EAGAIN ? -EIO : ret;
		channel_lose(channel, ret);
		return ret;
	}
	channel->seq++;
	channel->stats.frames++;
	count->bytes += bytes + ((u64)pages << PAGE_SHIFT);
	return 0;
}

static struct lmtrack_wire_frame *frame_begin(struct lmtrack_channel *channel, u8 type,
					      u32 region)
{
	struct lmtrack_wire_frame *frame = channel->head;

	memset(frame, 0, sizeof(*frame));
	frame->type = type;
	frame->region = cpu_to_le32(region);
	return frame;
}

/* What a DATA frame carries: these pages behind those that it has. */
static void frame_add(struct lmtrack_channel *channel, unsigned int from, unsigned int to,
		      unsigned int pages)
{
	struct bio_vec *bvec = &channel->bvec[pages];

	for (; from < to; from++, bvec++) {
		bvec->bv_page = folio_page(channel->folios[from], 0);
		bvec->bv_offset = 0;
		bvec->bv_len = PAGE_SIZE;
	}
}

/* The table of @frame: of the pages from *@next on so many at most. Returns its entries. */
static unsigned int frame_fill(struct lmtrack_channel *channel, struct lmtrack_wire_frame *frame,
			       unsigned long chunk, const unsigned long *bits,
			       unsigned int *next, unsigned int most, unsigned int *pages)
{
	struct lmtrack_wire_extent *extent = (struct lmtrack_wire_extent *)(frame + 1);
	unsigned int from, to, extents = 0, count = 0;

	for (from = find_next_bit(bits, LMTRACK_CHUNK_PAGES, *next);
	     from < LMTRACK_CHUNK_PAGES && count < most;
	     from = find_next_bit(bits, LMTRACK_CHUNK_PAGES, to)) {
		to = find_next_zero_bit(bits, LMTRACK_CHUNK_PAGES, from);
		to = min(to, from + most - count);
		extent[extents].first = cpu_to_le64((u64)chunk * LMTRACK_CHUNK_PAGES + from);
		extent[extents].pages = cpu_to_le32(to - from);
		extent[extents].reserved = 0;
		extents++;
		if (frame->type == LMTRACK_FRAME_DATA)
			frame_add(channel, from, to, count);
		count += to - from;
	}
	*pages = count;
	*next = from;
	return extents;
}

/* These pages of a chunk, as data or as zeroes: in one frame, unless a cap wants smaller ones. */
static int send_extents(struct lmtrack_channel *channel, u8 type, u32 region,
			unsigned long chunk, const unsigned long *bits,
			struct round_count *count)
{
	bool data = type == LMTRACK_FRAME_DATA;
	struct lmtrack_wire_frame *frame;
	unsigned int next = find_first_bit(bits, LMTRACK_CHUNK_PAGES);
	unsigned int most = LMTRACK_CHUNK_PAGES, extents, pages, first;
	int ret;

	while (next < LMTRACK_CHUNK_PAGES) {
		first = next;
		frame = frame_begin(channel, type, region);
		if (data)
			most = lmtrack_pace_pages(&channel->stream->pace);
		extents = frame_fill(channel, frame, chunk, bits, &next, most, &pages);
		ret = send_frame(channel, frame, extents, data ? pages : 0, count);
		if (ret == -EAGAIN) {
			next = first;
			continue;
		}
		if (ret)
			return ret;
		count->pages += pages;
		if (data) {
			count->data += pages;
			channel->stats.data_pages += pages;
		} else {
			count->zero += pages;
			channel->stats.zero_pages += pages;
			channel->stats.zero_extents += extents;
		}
	}
	return 0;
}

/*
 * Is it all zeroes? It is looked at through a copy, which a memory error that nobody knew of yet
 * only makes fail: to read it in place would stop the host. Most pages are told by the first line.
 *
 * Return: 1, 0 or -EHWPOISON.
 */
static int folio_is_zero(struct folio *folio)
{
	const void *page = page_address(folio_page(folio, 0));
	size_t offset, bytes = SMP_CACHE_BYTES, i;
	u64 piece[32];

	for (offset = 0; offset < PAGE_SIZE; offset += bytes) {
		if (offset)
			bytes = min(sizeof(piece), PAGE_SIZE - offset);
		if (copy_mc_to_kernel(piece, page + offset, bytes))
			return -EHWPOISON;
		for (i = 0; i < bytes / sizeof(*piece); i++)
			if (piece[i])
				return 0;
	}
	return 1;
}

/* Need the page not be sent, as it is all zeroes? 1, 0 or -EHWPOISON. */
static int page_is_zero(const struct lmtrack_channel *channel, unsigned int page)
{
	struct folio *folio = channel->folios[page];

	if (!folio)
		return 1;
	if (PageHWPoison(folio_page(folio, 0)))
		return -EHWPOISON;
	return channel->stream->zero_detect ? folio_is_zero(folio) : 0;
}

/* Word by word: a few instructions for each page, whatever the pattern. */
static int find_zeroes(const struct lmtrack_channel *channel, const unsigned long *taken,
		       unsigned long *zero)
{
	unsigned int word, page;
	unsigned long rest;
	int is_zero;

	bitmap_zero(zero, LMTRACK_CHUNK_PAGES);
	for (word = 0; word < BITS_TO_LONGS(LMTRACK_CHUNK_PAGES); word++) {
		for (rest = taken[word]; rest; rest &= rest - 1) {
			page = word * BITS_PER_LONG + __ffs(rest);
			is_zero = page_is_zero(channel, page);
			if (is_zero < 0)
				return is_zero;
			if (is_zero)
				__set_bit(page, zero);
		}
	}
	return 0;
}

static void put_taken(const struct lmtrack_channel *channel, const unsigned long *taken)
{
	struct folio *folio;
	unsigned int word;
	unsigned long rest;

	for (word = 0; word < BITS_TO_LONGS(LMTRACK_CHUNK_PAGES); word++) {
		for (rest = taken[word]; rest; rest &= rest - 1) {
			folio = channel->folios[word * BITS_PER_LONG + __ffs(rest)];
			if (folio)
				folio_put(folio);
		}
	}
}

static int send_chunk(struct lmtrack_channel *channel, u32 region, unsigned long chunk,
		      const unsigned long *taken, struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	DECLARE_BITMAP(zero, LMTRACK_CHUNK_PAGES);
	DECLARE_BITMAP(data, LMTRACK_CHUNK_PAGES);
	ktime_t begin;
	int ret;

	ret = find_zeroes(channel, taken, zero);
	if (ret)
		return ret;
	bitmap_andnot(data, taken, zero, LMTRACK_CHUNK_PAGES);

	begin = channel_carry(channel);
	ret = send_extents(channel, LMTRACK_FRAME_DATA, region, chunk, data, count);
	if (!ret)
		ret = send_extents(channel, LMTRACK_FRAME_ZERO, region, chunk, zero, count);
	channel_sent(channel, begin, count);
	trace_lmtrack_chunk_sent(stream->id, channel->number, stream->round, region, chunk,
				 bitmap_weight(data, LMTRACK_CHUNK_PAGES),
				 bitmap_weight(zero, LMTRACK_CHUNK_PAGES));
	return ret;
}

static int send_round_end(struct lmtrack_channel *channel, struct round_count *count)
{
	struct lmtrack_wire_frame *frame = frame_begin(channel, LMTRACK_FRAME_ROUND_END, 0);
	ktime_t begin = channel_carry(channel);
	int ret;

	frame->arg = cpu_to_le64(count->pages);
	ret = send_frame(channel, frame, 0, 0, count);
	channel_sent(channel, begin, count);
	return ret;
}

/* ---- Rounds ---- */

/*
 * What is taken of the chunk, and so no longer dirty, is noted in what this returns. Where memory
 * is short the stream ends: nobody is killed for it.
 */
static struct lmtrack_flight *stream_flight(struct lmtrack_stream *stream, u32 region,
					    unsigned long chunk)
{
	const gfp_t gfp = GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN;
	struct lmtrack_flight *flight = xa_load(&stream->flights[region], chunk);

	if (flight)
		return flight;
	flight = kzalloc(sizeof(*flight), gfp);
	if (flight && xa_err(xa_store(&stream->flights[region], chunk, flight, gfp))) {
		kfree(flight);
		flight = NULL;
	}
	return flight;
}

/* What the channel has sent in the last round is dirty again. Its thread has ended. */
static u64 channel_return(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;
	struct lmtrack_flight *flight;
	unsigned long chunk;
	unsigned int i;
	u64 pages = 0;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++) {
		xa_for_each(&stream->flights[i], chunk, flight) {
			cond_resched();
			/* Pairs with the release in channel_send_from(). */
			if (smp_load_acquire(&flight->round) == stream->round &&
			    READ_ONCE(flight->channel) == channel->number &&
			    lmtrack_chunk_return(stream_region(stream, i), stream->regions[i],
						 chunk, flight->pages))
				pages += bitmap_weight(flight->pages, LMTRACK_CHUNK_PAGES);
		}
	}
	return pages;
}

#define NEXT_REGION(next)	((u32)((u64)(next) >> 40))
#define NEXT_CHUNK(next)	((u64)(next) & GENMASK_ULL(39, 0))
#define NEXT(region, chunk)	((s64)((u64)(region) << 40 | (chunk)))

/*
 * The next chunk of the round, which is the caller's then; false: there is none left. Who finds
 * that another was faster looks on from there: a search is not made twice for nothing but where
 * two find the same chunk.
 */
static bool stream_next(struct lmtrack_stream *stream, u32 *region, unsigned long *chunk)
{
	bool all = stream->what == LMTRACK_SEND_ALL;
	s64 next = atomic64_read(&stream->next);

	do {
		*region = NEXT_REGION(next);
		*chunk = NEXT_CHUNK(next);
		while (*region < LMTRACK_REGIONS_MAX &&
		       !(stream->regions[*region] &&
			 lmtrack_chunk_find(stream_region(stream, *region), chunk, all))) {
			++*region;
			*chunk = 0;
		}
		if (*region == LMTRACK_REGIONS_MAX) {
			atomic64_set(&stream->next, NEXT(LMTRACK_REGIONS_MAX, 0));
			wake_up_all(&stream->work);
			return false;
		}
	} while (!atomic64_try_cmpxchg(&stream->next, &next, NEXT(*region, *chunk + 1)));
	return true;
}

static bool channel_carries(const struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;

	return channel->rank < READ_ONCE(stream->width) + READ_ONCE(stream->gone);
}

/* Until the channel is to carry, or there is nothing left; or the error that has ended it. */
static int channel_wait_part(struct lmtrack_channel *channel, struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	ktime_t begin;

	if (!channel_carries(channel)) {
		begin = channel_rest(channel);
		wait_event_idle(stream->work,
				channel_carries(channel) || lmtrack_channel_error(channel) ||
				NEXT_REGION(atomic64_read(&stream->next)) == LMTRACK_REGIONS_MAX);
		count->idle_ns += ktime_to_ns(ktime_sub(ktime_get(), begin));
	}
	return lmtrack_channel_error(channel);
}

/* Harvest the chunk, and send what was dirty in it. */
static int channel_send_from(struct lmtrack_channel *channel, u32 number, unsigned long index,
			     struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	struct lmtrack_region *region = stream_region(stream, number);
	struct lmtrack_flight *flight = stream_flight(stream, number, index);
	DECLARE_BITMAP(taken, LMTRACK_CHUNK_PAGES);
	int ret;

	if (!flight)
		return -ENOMEM;
	if (channel->carrying && !channel_pending(channel))
		channel_rest(channel);
	if (!lmtrack_chunk_take(region, index, stream->what == LMTRACK_SEND_ALL, stream->holding,
				taken, channel->folios, &count->held))
		return 0;
	bitmap_copy(flight->pages, taken, LMTRACK_CHUNK_PAGES);
	WRITE_ONCE(flight->channel, channel->number);
	/* Last: see struct lmtrack_flight. Pairs with the acquire in channel_return(). */
	smp_store_release(&flight->round, stream->round);
	ret = send_chunk(channel, number, index, taken, count);
	put_taken(channel, taken);
	return ret;
}

static int channel_send_round(struct lmtrack_channel *channel, struct round_count *count)
{
	int ret = channel_wait_part(channel, count);
	unsigned long chunk;
	u32 region;

	while (!ret && stream_next(channel->stream, &region, &chunk)) {
		cond_resched();
		ret = channel_send_from(channel, region, chunk, count);
		if (!ret)
			ret = channel_wait_part(channel, count);
	}
	return ret ?: send_round_end(channel, count);
}

static void stream_let_regions(struct lmtrack_stream *stream)
{
	unsigned int i;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			lmtrack_sender_end(stream_region(stream, i));
}

/* The last channel is done: let go of the regions, then tell. */
static void stream_round_end(struct lmtrack_stream *stream)
{
	struct lmtrack_stream_wait *result = &stream->result;

	stream_let_regions(stream);
	spin_lock(&stream->end_lock);
	result->error = -stream->error;
	result->channel = stream->error_channel;
	result->duration_ns = ktime_to_ns(ktime_sub(ktime_get(), stream->begin));
	trace_lmtrack_round_end(stream->id, stream->round, result->pages, result->bytes,
				stream->error);
	WRITE_ONCE(stream->sending, false);
	spin_unlock(&stream->end_lock);
	wake_up_all(&stream->end);
}

static void channel_work(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;
	struct lmtrack_stream_wait *result = &stream->result;
	struct round_count count = { };
	ktime_t begin = ktime_get();
	u64 took;
	int ret;

	ret = channel_send_round(channel, &count);
	if (ret && !READ_ONCE(channel->error))
		stream_fail(stream, channel->number, ret);
	/* What its connection still has will be gone when the peer says that it has all. */
	took = ktime_to_ns(ktime_sub(channel_rest(channel), begin));
	spin_lock(&stream->end_lock);
	result->harvest_ns += took - count.send_ns - count.idle_ns;
	result->send_ns += count.send_ns;
	result->pages += count.pages;
	result->data_pages += count.data;
	result->zero_pages += count.zero;
	result->bytes += count.bytes;
	result->held_pages += count.held;
	spin_unlock(&stream->end_lock);
	if (atomic_dec_and_test(&stream->running))
		stream_round_end(stream);
}

static void stream_free(struct lmtrack_stream *stream);

/* The thread does not look at the channel any more. */
static void channel_end(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;
	bool last;

	spin_lock(&stream->end_lock);
	WRITE_ONCE(channel->ended, true);
	WRITE_ONCE(stream->threads, stream->threads - 1);
	last = stream->orphan && !stream->threads;
	/* Not after: who waits takes the lock once more before it frees the stream. */
	wake_up_all(&stream->end);
	spin_unlock(&stream->end_lock);
	if (last)
		stream_free(stream);
}

/* The round that the channel is to work on, or its last if there is no more for it to do. */
static u32 channel_wait_round(struct lmtrack_channel *channel)
{
	struct lmtrack_stream *stream = channel->stream;

	wait_event_idle(stream->work,
			READ_ONCE(stream->round) != channel->round_done ||
			lmtrack_channel_error(channel));
	/*
	 * A round that was begun is for each channel to end, also where an error has ended the
	 * stream since: that was set under the lock, so the round is seen.
	 */
	spin_lock(&stream->end_lock);
	spin_unlock(&stream->end_lock);
	/* Pairs with the release in SEND: regions, channels and the round are there. */
	return smp_load_acquire(&stream->round);
}

static int channel_thread(void *data)
{
	struct lmtrack_channel *channel = data;
	struct lmtrack_stream *stream = channel->stream;
	u32 round;

	set_active_memcg(stream->memcg);
	for (round = channel_wait_round(channel); round != channel->round_done;
	     round = channel_wait_round(channel)) {
		channel->round_done = round;
		channel_work(channel);
	}
	set_active_memcg(NULL);
	channel->transport->shutdown(channel);
	channel_end(channel);
	module_put_and_kthread_exit(0);
}

/* ---- Set-up ---- */

static long stream_add_region(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_add_region *add = arg;
	struct file *region_file;
	unsigned int index, i;
	long ret = 0;

	if (add->index >= LMTRACK_REGIONS_MAX)
		return -EINVAL;
	index = array_index_nospec(add->index, LMTRACK_REGIONS_MAX);
	region_file = fget(add->fd);
	if (!region_file)
		return -EBADF;
	if (!lmtrack_region_of(region_file)) {
		ret = -EINVAL;
		goto err_put;
	}
	if (mutex_lock_killable(&stream->lock)) {
		ret = -EINTR;
		goto err_put;
	}
	if (stream->round)
		ret = -EBUSY;
	for (i = 0; !ret && i < LMTRACK_REGIONS_MAX; i++)
		if (stream_region(stream, i) == lmtrack_region_of(region_file))
			ret = -EEXIST;
	if (!ret && stream->regions[index])
		ret = -EEXIST;
	/* Whoever cancels now looks for regions after that: stream_release_stun(). */
	spin_lock(&stream->end_lock);
	if (!ret && stream->error)
		ret = -EPIPE;
	if (!ret) {
		WRITE_ONCE(stream->regions[index], region_file);
		stream->region_count++;
	}
	spin_unlock(&stream->end_lock);
	mutex_unlock(&stream->lock);
	if (!ret)
		return 0;
err_put:
	fput(region_file);
	return ret;
}

/* Its thread has ended. */
static void channel_detach(struct lmtrack_channel *channel)
{
	channel->transport->detach(channel);
	lmtrack_transport_put(channel->transport);
}

/*
 * Channels of all streams. Each is a kernel thread, which no limit of the process or of its cgroup
 * counts: who may open the device could use up the host's threads.
 */
static unsigned int channels_max = 4096;
module_param(channels_max, uint, 0644);
MODULE_PARM_DESC(channels_max, "Channels of all streams on this host together");
static atomic_t channel_total = ATOMIC_INIT(0);

static void channel_free(struct lmtrack_channel *channel)
{
	if (channel->task)
		put_task_struct(channel->task);
	atomic_dec(&channel_total);
	kvfree(channel->bvec);
	kvfree(channel->folios);
	kfree(channel->head);
	kfree(channel);
}

static struct lmtrack_channel *channel_alloc(struct lmtrack_stream *stream)
{
	struct lmtrack_channel *channel = kzalloc(sizeof(*channel), GFP_KERNEL_ACCOUNT);
	long ret = -ENOMEM;

	if (!channel)
		return ERR_PTR(-ENOMEM);
	if (atomic_inc_return(&channel_total) > READ_ONCE(channels_max)) {
		ret = -ENOSPC;
		goto err;
	}
	channel->stream = stream;
	channel->head = kzalloc(LMTRACK_HEAD_BYTES, GFP_KERNEL_ACCOUNT);
	channel->folios = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*channel->folios),
				   GFP_KERNEL_ACCOUNT);
	channel->bvec = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*channel->bvec),
				 GFP_KERNEL_ACCOUNT);
	if (channel->head && channel->folios && channel->bvec)
		return channel;
err:
	channel_free(channel);
	return ERR_PTR(ret);
}

/* The caller's CPUs; false in *@given if the caller has no wish. */
static int channel_cpus(u64 user_mask, u32 user_bytes, struct cpumask *cpus, bool *given)
{
	size_t bytes = min_t(size_t, user_bytes, cpumask_size());

	*given = user_mask;
	if (!user_mask != !user_bytes)
		return -EINVAL;
	if (!*given)
		return 0;
	cpumask_clear(cpus);
	if (copy_from_user(cpus, u64_to_user_ptr(user_mask), bytes))
		return -EFAULT;
	return cpumask_intersects(cpus, cpu_online_mask) ? 0 : -EINVAL;
}

static int stream_node(struct lmtrack_stream *stream)
{
	unsigned int i;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			return stream_region(stream, i)->node;
	return NUMA_NO_NODE;
}

/* Start the thread, on the CPUs wished for or else near the memory. */
static int channel_start(struct lmtrack_channel *channel, const struct cpumask *cpus)
{
	struct lmtrack_stream *stream = channel->stream;
	int node = stream_node(stream);
	struct task_struct *task;

	if (!cpus && node != NUMA_NO_NODE && !cpumask_empty(cpumask_of_node(node)))
		cpus = cpumask_of_node(node);
	task = kthread_create_on_node(channel_thread, channel, node, "lmtrack-%u",
				      channel->number);
	if (IS_ERR(task))
		return PTR_ERR(task);
	if (cpus)
		lmtrack_thread_affine(task, cpus);
	channel->task = get_task_struct(task);
	__module_get(THIS_MODULE);
	spin_lock(&stream->end_lock);
	stream->threads++;
	spin_unlock(&stream->end_lock);
	wake_up_process(task);
	return 0;
}

static int stream_check_channel(struct lmtrack_stream *stream,
				const struct lmtrack_channel *channel, bool replace)
{
	unsigned int i;

	if (replace ? READ_ONCE(stream->sending) : stream->round)
		return -EBUSY;
	if (stream->error)
		return -EPIPE;
	if (replace && channel->number >= stream->channel_count)
		return -EINVAL;
	if (replace && !stream->channels[channel->number]->dropped)
		return -EEXIST;
	if (!replace && stream->channel_count == LMTRACK_CHANNELS_MAX)
		return -ENOSPC;
	for (i = 0; i < stream->channel_count; i++)
		if (!stream->channels[i]->dropped &&
		    stream->channels[i]->transport == channel->transport &&
		    stream->channels[i]->priv == channel->priv)
			return -EEXIST;
	return 0;
}

/* Its thread runs: it takes its place, which is that of a dropped one if there is one. */
static void stream_put_channel(struct lmtrack_stream *stream, struct lmtrack_channel *channel)
{
	struct lmtrack_channel *before = stream->channels[channel->number];

	spin_lock(&stream->end_lock);
	stream->channels[channel->number] = channel;
	if (!before)
		stream->channel_count++;
	stream->alive++;
	/* Whoever cancelled just now has not woken it. */
	if (stream->error)
		channel_wake(channel);
	spin_unlock(&stream->end_lock);
	if (before)
		channel_free(before);
}

/* A channel over the connection that @how, the request, describes; *number: its number. */
static long stream_add(struct lmtrack_stream *stream, const struct lmtrack_transport *transport,
		       const void *how, u32 window_pages, u64 cpumask, u32 cpumask_bytes,
		       bool replace, u32 *number)
{
	struct lmtrack_channel *channel;
	cpumask_var_t cpus;
	bool given;
	long ret;

	if (replace && *number >= LMTRACK_CHANNELS_MAX)
		return -EINVAL;
	if (!alloc_cpumask_var(&cpus, GFP_KERNEL))
		return -ENOMEM;
	ret = channel_cpus(cpumask, cpumask_bytes, cpus, &given);
	if (ret)
		goto out_mask;
	channel = channel_alloc(stream);
	if (IS_ERR(channel)) {
		ret = PTR_ERR(channel);
		goto out_mask;
	}
	channel->transport = transport;
	channel->window_pages = window_pages;
	ret = transport->attach(channel, how);
	if (ret)
		goto err_free;
	if (mutex_lock_killable(&stream->lock)) {
		ret = -EINTR;
		goto err_detach;
	}
	channel->number = replace ? array_index_nospec(*number, LMTRACK_CHANNELS_MAX) :
				    stream->channel_count;
	channel->round_done = stream->round;
	ret = stream_check_channel(stream, channel, replace);
	if (!ret)
		ret = channel_start(channel, given ? cpus : NULL);
	if (!ret) {
		if (replace)
			channel->stats = stream->channels[channel->number]->stats;
		stream_put_channel(stream, channel);
		*number = channel->number;
	}
	mutex_unlock(&stream->lock);
	if (!ret)
		goto out_mask;
err_detach:
	transport->detach(channel);
err_free:
	channel_free(channel);
out_mask:
	free_cpumask_var(cpus);
	return ret;
}

static long stream_drop_channel(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_stream_drop_channel *drop = arg;
	struct lmtrack_channel *channel;
	long ret = 0;

	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	if (drop->channel >= stream->channel_count) {
		ret = -EINVAL;
		goto out;
	}
	channel = stream->channels[array_index_nospec(drop->channel, stream->channel_count)];
	if (stream->error)
		ret = -EPIPE;
	else if (channel->dropped)
		ret = -EALREADY;
	if (ret)
		goto out;
	channel_lose(channel, -ECANCELED);
	if (wait_event_killable(stream->end, READ_ONCE(channel->ended))) {
		ret = -EINTR;
		goto out;
	}
	kthread_stop(channel->task);
	channel_detach(channel);
	channel->dropped = true;
	/* It has none of its own if its thread has failed the whole stream meanwhile. */
	drop->error = -(channel->error ?: READ_ONCE(stream->error));
	drop->pages = channel_return(channel);
	/* Not before: until then a round could begin, and forget what the last has sent. */
	spin_lock(&stream->end_lock);
	WRITE_ONCE(stream->lost, stream->lost & ~BIT_ULL(channel->number));
	spin_unlock(&stream->end_lock);
out:
	mutex_unlock(&stream->lock);
	return ret;
}

static long stream_add_channel(struct file *file, void *arg)
{
	struct lmtrack_stream_add_channel *add = arg;

	if (add->reserved)
		return -EINVAL;
	return stream_add(file->private_data, &lmtrack_tcp, add, 0, add->cpumask,
			  add->cpumask_bytes, add->flags & LMTRACK_CHANNEL_REPLACE,
			  &add->channel);
}

static long stream_add_rdma(struct file *file, void *arg)
{
	struct lmtrack_stream_add_rdma *add = arg;
	const struct lmtrack_transport *transport;
	long ret;

	if (add->reserved || add->token_bytes > sizeof(add->token) || !add->timeout_ms ||
	    add->timeout_ms > LMTRACK_RDMA_TIMEOUT_MAX_MS || !add->window_pages ||
	    add->window_pages % LMTRACK_CHUNK_PAGES)
		return -EINVAL;
	transport = lmtrack_transport_get_rdma();
	if (!transport)
		return -EPROTONOSUPPORT;
	ret = stream_add(file->private_data, transport, add, add->window_pages, add->cpumask,
			 add->cpumask_bytes, add->flags & LMTRACK_CHANNEL_REPLACE, &add->channel);
	/* Else the channel has it. */
	if (ret)
		lmtrack_transport_put(transport);
	return ret;
}

/* ---- Windows ---- */

static struct lmtrack_channel *stream_channel(struct lmtrack_stream *stream, u32 number)
{
	if (number >= stream->channel_count)
		return NULL;
	return stream->channels[array_index_nospec(number, stream->channel_count)];
}

static int stream_set_window(struct lmtrack_stream *stream,
			     const struct lmtrack_stream_rdma_window *set)
{
	struct lmtrack_channel *channel = stream_channel(stream, set->channel);
	struct lmtrack_region *region;
	u64 window;
	int ret;

	if (!channel || channel->dropped || set->region >= LMTRACK_REGIONS_MAX)
		return -EINVAL;
	if (!channel->transport->window)
		return -EOPNOTSUPP;
	region = stream_region(stream, array_index_nospec(set->region, LMTRACK_REGIONS_MAX));
	if (!region || set->first >= region->pages || set->first % channel->window_pages)
		return -EINVAL;
	if (set->address > U64_MAX - ((u64)channel->window_pages << PAGE_SHIFT))
		return -EINVAL;
	window = div_u64(set->first, channel->window_pages);
	ret = channel->transport->window(channel, set->region, window, set->address, set->rkey);
	if (ret)
		return ret;
	/*
	 * Nor is it wanted any more by the time the caller looks again. The thread may already be
	 * at the next one it lacks.
	 */
	spin_lock(&stream->end_lock);
	if (channel->wanted == WANTED(set->region, window)) {
		WRITE_ONCE(channel->wanted, 0);
		__clear_bit(channel->number, stream->wanting);
	}
	spin_unlock(&stream->end_lock);
	return 0;
}

static long stream_rdma_window(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_rdma_window *set = arg;
	long ret;

	if (set->reserved)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	ret = stream_set_window(stream, set);
	mutex_unlock(&stream->lock);
	return ret;
}

static long stream_rdma_wanted(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_stream_rdma_wanted *out = arg;
	struct lmtrack_channel *channel;
	u64 wanted;
	long ret = 0;

	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	channel = stream_channel(stream, out->channel);
	wanted = channel && !channel->dropped ? READ_ONCE(channel->wanted) : 0;
	if (!channel) {
		ret = -EINVAL;
	} else if (!wanted) {
		ret = -EAGAIN;
	} else {
		/* Regions are fixed by now, as a round was begun. */
		out->region = WANTED_REGION(wanted);
		out->first = WANTED_WINDOW(wanted) * channel->window_pages;
		out->pages = min_t(u64, channel->window_pages,
				   stream_region(stream, out->region)->pages - out->first);
	}
	mutex_unlock(&stream->lock);
	return ret;
}

/* ---- Requests of a round ---- */

static int stream_hold_regions(struct lmtrack_stream *stream)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; !ret && i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			ret = lmtrack_sender_begin(stream_region(stream, i),
						   stream->regions[i]);
	if (!ret)
		return 0;
	/* The one before i is the one that refused. */
	for (i--; i--;)
		if (stream->regions[i])
			lmtrack_sender_end(stream_region(stream, i));
	return ret;
}

/* With end_lock held. While nothing is sent no thread fails, and nobody is lost. */
static int stream_may_send(const struct lmtrack_stream *stream,
			   const struct lmtrack_stream_send *send)
{
	if (stream->error)
		return -EPIPE;
	if (stream->sending)
		return -EBUSY;
	if (!stream->region_count || !stream->channel_count || send->round <= stream->round)
		return -EINVAL;
	return stream->lost || !stream->alive ? -EPIPE : 0;
}

/*
 * With end_lock held: the channels there are work on the round, from the first chunk on. Each of
 * their threads will see it, and end it for its part, whatever happens from now on.
 */
static void stream_begin(struct lmtrack_stream *stream, const struct lmtrack_stream_send *send)
{
	unsigned int i, there = 0;

	memset(&stream->result, 0, sizeof(stream->result));
	stream->result.round = send->round;
	stream->what = send->what;
	stream->holding = send->what == LMTRACK_SEND_DIRTY && !(send->flags & LMTRACK_SEND_HELD);
	stream->begin = ktime_get();
	for (i = 0; i < stream->channel_count; i++)
		if (!stream->channels[i]->dropped)
			stream->channels[i]->rank = there++;
	stream->gone = 0;
	atomic64_set(&stream->next, NEXT(0, 0));
	atomic_set(&stream->running, there);
	WRITE_ONCE(stream->sending, true);
	trace_lmtrack_round_begin(stream->id, send->round, send->what);
	/* Everything above is for the threads to see with the round. */
	smp_store_release(&stream->round, send->round);
}

static long stream_send(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_send *send = arg;
	long ret;

	if (send->what > LMTRACK_SEND_DIRTY)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	spin_lock(&stream->end_lock);
	ret = stream_may_send(stream, send);
	spin_unlock(&stream->end_lock);
	if (!ret)
		ret = stream_hold_regions(stream);
	if (ret)
		goto out;
	spin_lock(&stream->end_lock);
	/* Cancelled meanwhile? */
	ret = stream_may_send(stream, send);
	if (!ret)
		stream_begin(stream, send);
	spin_unlock(&stream->end_lock);
	if (ret) {
		stream_let_regions(stream);
		goto out;
	}
	wake_up_all(&stream->work);
out:
	mutex_unlock(&stream->lock);
	return ret;
}

static long stream_width(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_width *set = arg;

	if (!set->channels || set->reserved)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	WRITE_ONCE(stream->width, min_t(u32, set->channels, LMTRACK_CHANNELS_MAX));
	wake_up_all(&stream->work);
	mutex_unlock(&stream->lock);
	return 0;
}

static bool stream_ended(struct lmtrack_stream *stream)
{
	return READ_ONCE(stream->round) && !READ_ONCE(stream->sending);
}

/* With end_lock held: a channel that is lost shows in what became of the round, until dropped. */
static void stream_tell_lost(struct lmtrack_stream *stream, struct lmtrack_stream_wait *wait)
{
	wait->lost = stream->lost;
	if (!wait->lost || wait->error)
		return;
	wait->channel = __ffs64(wait->lost);
	wait->error = -stream->channels[wait->channel]->error;
}

static long stream_wait(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_stream_wait *wait = arg;
	u32 size = wait->size;
	bool ended;
	long left;

	if (wait->timeout_ms < -1)
		return -EINVAL;
	if (!READ_ONCE(stream->round))
		return -EINVAL;
	left = wait->timeout_ms < 0 ? MAX_SCHEDULE_TIMEOUT : msecs_to_jiffies(wait->timeout_ms);
	do {
		left = wait_event_interruptible_timeout(stream->end, stream_ended(stream), left);
		if (left < 0)
			return -EINTR;
		if (!left) {
			wait->lost = READ_ONCE(stream->lost);
			return -ETIMEDOUT;
		}
		/* Unless another thread has begun the next round since. */
		spin_lock(&stream->end_lock);
		ended = !stream->sending;
		if (ended)
			*wait = stream->result;
		stream_tell_lost(stream, wait);
		spin_unlock(&stream->end_lock);
	} while (!ended);
	wait->size = size;
	return 0;
}

/* Without a lock: whoever has it may be waiting for a thread. */
static long stream_cancel(struct file *file, void *arg)
{
	stream_fail(file->private_data, -1, -ECANCELED);
	return 0;
}

static long stream_rate_set(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_rate_set *set = arg;

	if (set->rate && (set->rate < LMTRACK_STREAM_RATE_MIN ||
			  set->rate > LMTRACK_STREAM_RATE_MAX))
		return -EINVAL;
	lmtrack_pace_set(&stream->pace, set->rate);
	return 0;
}

static long stream_channel_stats(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_channel_stats *stats = arg;
	u32 channel = stats->channel;
	u32 size = stats->size;

	if (stats->reserved)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	if (!stream_channel(stream, channel)) {
		mutex_unlock(&stream->lock);
		return -EINVAL;
	}
	*stats = stream_channel(stream, channel)->stats;
	mutex_unlock(&stream->lock);
	stats->size = size;
	stats->channel = channel;
	return 0;
}

static const struct lmtrack_request stream_requests[] = {
	LMTRACK_REQUEST(LMTRACK_STREAM_ADD_REGION, lmtrack_stream_add_region, 0, false,
			stream_add_region),
	LMTRACK_REQUEST(LMTRACK_STREAM_ADD_CHANNEL, lmtrack_stream_add_channel,
			LMTRACK_CHANNEL_REPLACE, true, stream_add_channel),
	LMTRACK_REQUEST(LMTRACK_STREAM_DROP_CHANNEL, lmtrack_stream_drop_channel, 0, true,
			stream_drop_channel),
	LMTRACK_REQUEST(LMTRACK_STREAM_SEND, lmtrack_stream_send, LMTRACK_SEND_HELD, false,
			stream_send),
	LMTRACK_REQUEST_GROWN(LMTRACK_STREAM_WAIT, lmtrack_stream_wait,
			      offsetofend(struct lmtrack_stream_wait, held_pages), 0, true,
			      stream_wait),
	LMTRACK_REQUEST(LMTRACK_STREAM_CANCEL, lmtrack_stream_cancel, 0, false,
			stream_cancel),
	LMTRACK_REQUEST_GROWN(LMTRACK_CHANNEL_STATS, lmtrack_channel_stats,
			      offsetofend(struct lmtrack_channel_stats, blocked_ns), 0, true,
			      stream_channel_stats),
	LMTRACK_REQUEST(LMTRACK_STREAM_ADD_RDMA, lmtrack_stream_add_rdma, LMTRACK_CHANNEL_REPLACE,
			true, stream_add_rdma),
	LMTRACK_REQUEST(LMTRACK_STREAM_RDMA_WINDOW, lmtrack_stream_rdma_window, 0, false,
			stream_rdma_window),
	LMTRACK_REQUEST(LMTRACK_STREAM_RDMA_WANTED, lmtrack_stream_rdma_wanted, 0, true,
			stream_rdma_wanted),
	LMTRACK_REQUEST(LMTRACK_STREAM_RATE_SET, lmtrack_stream_rate_set, 0, false,
			stream_rate_set),
	LMTRACK_REQUEST(LMTRACK_STREAM_WIDTH, lmtrack_stream_width, 0, false, stream_width),
};

static long stream_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return lmtrack_serve(file, stream_requests, ARRAY_SIZE(stream_requests), cmd, arg);
}

static __poll_t stream_poll(struct file *file, struct poll_table_struct *table)
{
	struct lmtrack_stream *stream = file->private_data;
	__poll_t events = 0;

	poll_wait(file, &stream->end, table);
	if (stream_ended(stream))
		events |= EPOLLIN | EPOLLRDNORM;
	if (READ_ONCE(stream->lost) || !bitmap_empty(stream->wanting, LMTRACK_CHANNELS_MAX))
		events |= EPOLLPRI;
	if (READ_ONCE(stream->error))
		events |= EPOLLERR;
	return events;
}

/* Its threads have ended, or are the caller. */
static void stream_free(struct lmtrack_stream *stream)
{
	struct lmtrack_flight *flight;
	unsigned long chunk;
	unsigned int i;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++) {
		if (stream->regions[i])
			lmtrack_fput(stream->regions[i]);
		xa_for_each(&stream->flights[i], chunk, flight)
			kfree(flight);
		xa_destroy(&stream->flights[i]);
	}
	for (i = 0; i < stream->channel_count; i++) {
		if (!stream->channels[i]->dropped)
			channel_detach(stream->channels[i]);
		channel_free(stream->channels[i]);
	}
	mem_cgroup_put(stream->memcg);
	kfree(stream);
}

/*
 * Who closes it waits for the threads. Not so the kernel's worker that closes what was on its way
 * from process to process: others wait for that.
 */
static int stream_release(struct inode *inode, struct file *file)
{
	struct lmtrack_stream *stream = file->private_data;
	unsigned int i;
	bool last;

	stream_fail(stream, -1, -ECANCELED);
	if (current->flags & PF_EXITING)
		wait_event_timeout(stream->end, !READ_ONCE(stream->threads), LMTRACK_LINGER);
	else if (!(current->flags & PF_KTHREAD))
		wait_event_killable(stream->end, !READ_ONCE(stream->threads));
	spin_lock(&stream->end_lock);
	last = !stream->threads;
	stream->orphan = !last;
	spin_unlock(&stream->end_lock);
	if (!last)
		return 0;
	/* They hold the module until they have ended. Those of dropped channels have. */
	for (i = 0; i < stream->channel_count; i++)
		if (!stream->channels[i]->dropped)
			kthread_stop(stream->channels[i]->task);
	stream_free(stream);
	return 0;
}

static const struct file_operations stream_fops = {
	.owner = THIS_MODULE,
	.release = stream_release,
	.poll = stream_poll,
	.unlocked_ioctl = stream_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

long lmtrack_stream_create(struct file *file, void *arg)
{
	const struct lmtrack_stream_create *create = arg;
	struct lmtrack_stream *stream = kzalloc(sizeof(*stream), GFP_KERNEL_ACCOUNT);
	unsigned int i;
	int fd;

	if (!stream)
		return -ENOMEM;
	mutex_init(&stream->lock);
	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		xa_init_flags(&stream->flights[i], XA_FLAGS_ACCOUNT);
	spin_lock_init(&stream->end_lock);
	init_waitqueue_head(&stream->work);
	init_waitqueue_head(&stream->end);
	lmtrack_pace_init(&stream->pace);
	stream->id = create->stream_id;
	stream->zero_detect = !(create->flags & LMTRACK_STREAM_NO_ZERO_DETECT);
	stream->error_channel = -1;
	stream->width = LMTRACK_CHANNELS_MAX;
	stream->memcg = get_mem_cgroup_from_mm(current->mm);
	fd = anon_inode_getfd("lmtrack-stream", &stream_fops, stream, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		stream_free(stream);
	return fd;
}
