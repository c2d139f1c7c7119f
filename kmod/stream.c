// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: streams, the senders.
 *
 * A stream has regions and channels, both added before its first round and fixed from then
 * on. A round visits each chunk once: the chunk is harvested, and what was dirty in it goes
 * out over the one channel the chunk belongs to, so a newer copy of a page is always behind
 * an older one. Each channel has a thread; they work on a round independently, and the
 * last to finish ends it.
 *
 * Time: a thread of a channel scans (looks for chunks, harvests them, looks for zeroes) or
 * sends. The wire is busy while a channel sends, and after that for as long as the connection
 * has bytes that could not leave: what is scanned meanwhile costs the round nothing. Channels
 * that keep it busy are counted; the round's wire time is the time during which there was
 * one, so it is right for any number of them. The clock is read twice for each chunk sent, and
 * once more when a connection was found to have run dry.
 *
 * Locks: stream->lock for set-up and for beginning a round. stream->end_lock (spin) for the
 * results of a round, who carries, and its end. Neither is held while anything is sent. The
 * threads read the arrays of regions and channels without a lock; a round is published with a
 * release store of stream->round after everything it needs.
 *
 * A failure of one channel, CANCEL and closing the stream are one thing: the stream's error
 * is set once, then every channel is shut down, which wakes the threads that wait in it.
 *
 * Lifetimes: the stream's file owns everything: the threads, references to the regions' files
 * and what the transports hold. release() stops the threads before it frees anything.
 */
#include <linux/anon_inodes.h>
#include <linux/bvec.h>
#include <linux/cpumask.h>
#include <linux/crc32c.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/pagemap.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/topology.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "lmtrack.h"
#include "trace.h"

/* A chunk in extents has at most every other page in one of them. */
#define LMTRACK_FRAME_EXTENTS	(LMTRACK_CHUNK_PAGES / 2)
#define LMTRACK_HEAD_BYTES	(sizeof(struct lmtrack_wire_frame) +			\
				 LMTRACK_FRAME_EXTENTS * sizeof(struct lmtrack_wire_extent))

static_assert(sizeof(struct lmtrack_wire_frame) == 64);
static_assert(sizeof(struct lmtrack_wire_extent) == 16);
static_assert(LMTRACK_FRAME_EXTENTS <= LMTRACK_WIRE_EXTENTS_MAX);

/**
 * struct lmtrack_stream - a sender
 * @lock:	set-up and the beginning of rounds
 * @id:		in the frames
 * @zero_detect: look for pages of zeroes
 * @regions:	by index in the frames; a file reference each
 * @region_count: of them
 * @channels:	by number
 * @channel_count: of them
 * @what:	of the round
 * @holding:	the round leaves out held pages
 * @round:	being sent, or the last that was; 0 before the first
 * @begin:	when the round began
 * @work:	channels wait here for a round
 * @running:	channels that have not finished the round
 * @end_lock:	guards what follows
 * @carrying:	channels that keep the wire busy
 * @carrying_since: when the first of them began
 * @sending:	a round is under way
 * @error:	negative errno; the stream has failed for good
 * @error_channel: where, or -1
 * @result:	of the round
 * @end:	poll() and WAIT wait here for the end of the round
 */
struct lmtrack_stream {
	struct mutex lock;		/* set-up, beginning of rounds */
	u64 id;
	bool zero_detect;
	struct file *regions[LMTRACK_REGIONS_MAX];
	unsigned int region_count;
	struct lmtrack_channel *channels[LMTRACK_CHANNELS_MAX];
	unsigned int channel_count;

	u32 what;
	bool holding;
	u32 round;
	ktime_t begin;
	wait_queue_head_t work;
	atomic_t running;

	spinlock_t end_lock;		/* results, wire and end of a round */
	unsigned int carrying;
	ktime_t carrying_since;
	bool sending;
	int error;
	int error_channel;
	struct lmtrack_stream_wait result;
	wait_queue_head_t end;
};

/* What one channel has done in one round. */
struct round_count {
	u64 pages;
	u64 data;
	u64 zero;
	u64 bytes;
	u64 held;
	u64 send_ns;
};

static struct lmtrack_region *stream_region(struct lmtrack_stream *stream, unsigned int index)
{
	return stream->regions[index] ? lmtrack_region_of(stream->regions[index]) : NULL;
}

/* For transports that wait: 0, or the error that has ended the stream. */
int lmtrack_channel_error(const struct lmtrack_channel *channel)
{
	return READ_ONCE(channel->stream->error);
}

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
	spin_unlock(&stream->end_lock);
	if (!first)
		return;
	for (i = 0; i < stream->channel_count; i++)
		stream->channels[i]->transport->shutdown(stream->channels[i]);
	/* Nobody is slowed down for a migration that has ended. */
	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			lmtrack_stun_release(stream_region(stream, i), stream->regions[i]);
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

/* What it began to send at @begin was taken by the connection. */
static void channel_sent(struct lmtrack_channel *channel, ktime_t begin, struct round_count *count)
{
	ktime_t now = channel->transport->pending(channel) ? ktime_get() : channel_rest(channel);
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

	ret = channel->transport->send(channel, frame, bytes, channel->bvec, pages,
				       frame->type != LMTRACK_FRAME_ROUND_END);
	if (ret)
		return ret;
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

/* One frame with these pages of a chunk, as data or as zeroes. */
static int send_extents(struct lmtrack_channel *channel, u8 type, u32 region,
			unsigned long chunk, const unsigned long *bits,
			struct round_count *count)
{
	struct lmtrack_wire_frame *frame = frame_begin(channel, type, region);
	struct lmtrack_wire_extent *extent = (struct lmtrack_wire_extent *)(frame + 1);
	unsigned int from, to, bit, extents = 0, payload = 0, pages = 0;
	int ret;

	for_each_set_bitrange(from, to, bits, LMTRACK_CHUNK_PAGES) {
		extent->first = cpu_to_le64((u64)chunk * LMTRACK_CHUNK_PAGES + from);
		extent->pages = cpu_to_le32(to - from);
		extent->reserved = 0;
		extent++;
		extents++;
		pages += to - from;
		if (type != LMTRACK_FRAME_DATA)
			continue;
		for (bit = from; bit < to; bit++, payload++) {
			channel->bvec[payload].bv_page = folio_page(channel->folios[bit], 0);
			channel->bvec[payload].bv_offset = 0;
			channel->bvec[payload].bv_len = PAGE_SIZE;
		}
	}
	if (!pages)
		return 0;
	ret = send_frame(channel, frame, extents, payload, count);
	if (ret)
		return ret;
	count->pages += pages;
	if (type == LMTRACK_FRAME_DATA) {
		count->data += pages;
		channel->stats.data_pages += pages;
	} else {
		count->zero += pages;
		channel->stats.zero_pages += pages;
		channel->stats.zero_extents += extents;
	}
	return 0;
}

static bool folio_is_zero(struct folio *folio)
{
	void *page = kmap_local_folio(folio, 0);
	bool zero = !memchr_inv(page, 0, PAGE_SIZE);

	kunmap_local(page);
	return zero;
}

static int send_chunk(struct lmtrack_channel *channel, u32 region, unsigned long chunk,
		      const unsigned long *taken, struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	DECLARE_BITMAP(zero, LMTRACK_CHUNK_PAGES);
	DECLARE_BITMAP(data, LMTRACK_CHUNK_PAGES);
	unsigned int bit;
	ktime_t begin;
	int ret;

	bitmap_zero(zero, LMTRACK_CHUNK_PAGES);
	for_each_set_bit(bit, taken, LMTRACK_CHUNK_PAGES) {
		struct folio *folio = channel->folios[bit];

		/* Reading it could stop the host. */
		if (folio && PageHWPoison(folio_page(folio, 0)))
			return -EHWPOISON;
		if (!folio || (stream->zero_detect && folio_is_zero(folio)))
			__set_bit(bit, zero);
	}
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

/* The chunks of one region that belong to this channel. */
static int channel_send_region(struct lmtrack_channel *channel, u32 number,
			       struct lmtrack_region *region, struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	bool all = stream->what == LMTRACK_SEND_ALL;
	DECLARE_BITMAP(taken, LMTRACK_CHUNK_PAGES);
	unsigned long index;
	unsigned int bit;
	int ret = 0;

	for (index = 0; !ret && lmtrack_chunk_find(region, &index, all); index++) {
		cond_resched();
		if ((index + number) % stream->channel_count != channel->number)
			continue;
		ret = READ_ONCE(stream->error);
		if (ret)
			break;
		if (channel->carrying && !channel->transport->pending(channel))
			channel_rest(channel);
		if (!lmtrack_chunk_take(region, index, all, stream->holding, taken,
					channel->folios, &count->held))
			continue;
		ret = send_chunk(channel, number, index, taken, count);
		for_each_set_bit(bit, taken, LMTRACK_CHUNK_PAGES)
			if (channel->folios[bit])
				folio_put(channel->folios[bit]);
	}
	return ret;
}

static int channel_send_round(struct lmtrack_channel *channel, struct round_count *count)
{
	struct lmtrack_stream *stream = channel->stream;
	unsigned int i;
	int ret = READ_ONCE(stream->error);

	for (i = 0; !ret && i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			ret = channel_send_region(channel, i, stream_region(stream, i), count);
	return ret ?: send_round_end(channel, count);
}

/* The last channel is done: let go of the regions, then tell. */
static void stream_round_end(struct lmtrack_stream *stream)
{
	struct lmtrack_stream_wait *result = &stream->result;
	unsigned int i;

	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			lmtrack_sender_end(stream_region(stream, i));
	spin_lock(&stream->end_lock);
	result->error = -stream->error;
	result->channel = stream->error_channel;
	result->duration_ns = ktime_to_ns(ktime_sub(ktime_get(), stream->begin));
	WRITE_ONCE(stream->sending, false);
	spin_unlock(&stream->end_lock);
	trace_lmtrack_round_end(stream->id, stream->round, result->pages, result->bytes,
				stream->error);
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
	if (ret)
		stream_fail(stream, channel->number, ret);
	/* What its connection still has will be gone when the peer says that it has all. */
	took = ktime_to_ns(ktime_sub(channel_rest(channel), begin));
	spin_lock(&stream->end_lock);
	result->harvest_ns += took - count.send_ns;
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

static int channel_thread(void *data)
{
	struct lmtrack_channel *channel = data;
	struct lmtrack_stream *stream = channel->stream;
	u32 round;

	for (;;) {
		wait_event_idle(stream->work,
				kthread_should_stop() ||
				READ_ONCE(stream->round) != channel->round_done);
		/* Pairs with the release in SEND: regions, channels and the round are there. */
		round = smp_load_acquire(&stream->round);
		if (round == channel->round_done)
			return 0;
		channel->round_done = round;
		channel_work(channel);
	}
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
	if (!ret) {
		stream->regions[index] = region_file;
		stream->region_count++;
	}
	mutex_unlock(&stream->lock);
	if (!ret)
		return 0;
err_put:
	fput(region_file);
	return ret;
}

static void channel_free(struct lmtrack_channel *channel)
{
	kvfree(channel->bvec);
	kvfree(channel->folios);
	kfree(channel->head);
	kfree(channel);
}

static struct lmtrack_channel *channel_alloc(struct lmtrack_stream *stream)
{
	struct lmtrack_channel *channel = kzalloc(sizeof(*channel), GFP_KERNEL_ACCOUNT);

	if (!channel)
		return NULL;
	channel->stream = stream;
	channel->head = kzalloc(LMTRACK_HEAD_BYTES, GFP_KERNEL_ACCOUNT);
	channel->folios = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*channel->folios),
				   GFP_KERNEL_ACCOUNT);
	channel->bvec = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*channel->bvec),
				 GFP_KERNEL_ACCOUNT);
	if (!channel->head || !channel->folios || !channel->bvec) {
		channel_free(channel);
		return NULL;
	}
	return channel;
}

/* The caller's CPUs; false in *@given if the caller has no wish. */
static int channel_cpus(const struct lmtrack_stream_add_channel *add, struct cpumask *cpus,
			bool *given)
{
	size_t bytes = min_t(size_t, add->cpumask_bytes, cpumask_size());

	*given = add->cpumask;
	if (!add->cpumask != !add->cpumask_bytes)
		return -EINVAL;
	if (!*given)
		return 0;
	cpumask_clear(cpus);
	if (copy_from_user(cpus, u64_to_user_ptr(add->cpumask), bytes))
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
	int node = stream_node(channel->stream);
	struct task_struct *task;

	if (!cpus && node != NUMA_NO_NODE && !cpumask_empty(cpumask_of_node(node)))
		cpus = cpumask_of_node(node);
	task = kthread_create_on_node(channel_thread, channel, node, "lmtrack-%u",
				      channel->number);
	if (IS_ERR(task))
		return PTR_ERR(task);
	if (cpus)
		set_cpus_allowed_ptr(task, cpus);
	channel->task = task;
	wake_up_process(task);
	return 0;
}

static int stream_check_channel(struct lmtrack_stream *stream,
				const struct lmtrack_channel *channel)
{
	unsigned int i;

	if (stream->round)
		return -EBUSY;
	if (stream->error)
		return -EPIPE;
	if (stream->channel_count == LMTRACK_CHANNELS_MAX)
		return -ENOSPC;
	for (i = 0; i < stream->channel_count; i++)
		if (stream->channels[i]->transport == channel->transport &&
		    stream->channels[i]->priv == channel->priv)
			return -EEXIST;
	return 0;
}

static long stream_add_channel(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_stream_add_channel *add = arg;
	struct lmtrack_channel *channel;
	cpumask_var_t cpus;
	bool given;
	long ret;

	if (add->reserved)
		return -EINVAL;
	if (!alloc_cpumask_var(&cpus, GFP_KERNEL))
		return -ENOMEM;
	ret = channel_cpus(add, cpus, &given);
	if (ret)
		goto out_mask;
	channel = channel_alloc(stream);
	if (!channel) {
		ret = -ENOMEM;
		goto out_mask;
	}
	channel->transport = &lmtrack_tcp;
	ret = channel->transport->attach(channel, add->fd);
	if (ret)
		goto err_free;
	if (mutex_lock_killable(&stream->lock)) {
		ret = -EINTR;
		goto err_detach;
	}
	ret = stream_check_channel(stream, channel);
	if (!ret) {
		channel->number = stream->channel_count;
		ret = channel_start(channel, given ? cpus : NULL);
	}
	if (!ret) {
		stream->channels[stream->channel_count++] = channel;
		add->channel = channel->number;
	}
	mutex_unlock(&stream->lock);
	if (!ret)
		goto out_mask;
err_detach:
	channel->transport->detach(channel);
err_free:
	channel_free(channel);
out_mask:
	free_cpumask_var(cpus);
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

static long stream_send(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	const struct lmtrack_stream_send *send = arg;
	long ret;

	if (send->what > LMTRACK_SEND_DIRTY)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	if (stream->error)
		ret = -EPIPE;
	else if (READ_ONCE(stream->sending))
		ret = -EBUSY;
	else if (!stream->region_count || !stream->channel_count ||
		 send->round <= stream->round)
		ret = -EINVAL;
	else
		ret = stream_hold_regions(stream);
	if (ret)
		goto out;

	spin_lock(&stream->end_lock);
	memset(&stream->result, 0, sizeof(stream->result));
	stream->result.round = send->round;
	WRITE_ONCE(stream->sending, true);
	spin_unlock(&stream->end_lock);
	stream->what = send->what;
	stream->holding = send->what == LMTRACK_SEND_DIRTY && !(send->flags & LMTRACK_SEND_HELD);
	stream->begin = ktime_get();
	atomic_set(&stream->running, stream->channel_count);
	trace_lmtrack_round_begin(stream->id, send->round, send->what);
	/* Everything above is for the threads to see with the round. */
	smp_store_release(&stream->round, send->round);
	wake_up_all(&stream->work);
out:
	mutex_unlock(&stream->lock);
	return ret;
}

static bool stream_ended(struct lmtrack_stream *stream)
{
	return READ_ONCE(stream->round) && !READ_ONCE(stream->sending);
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
		if (!left)
			return -ETIMEDOUT;
		/* Unless another thread has begun the next round since. */
		spin_lock(&stream->end_lock);
		ended = !stream->sending;
		if (ended)
			*wait = stream->result;
		spin_unlock(&stream->end_lock);
	} while (!ended);
	wait->size = size;
	return 0;
}

static long stream_cancel(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;

	/* Set-up must not add a channel behind the back of the one that shuts them down. */
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	stream_fail(stream, -1, -ECANCELED);
	mutex_unlock(&stream->lock);
	return 0;
}

static long stream_channel_stats(struct file *file, void *arg)
{
	struct lmtrack_stream *stream = file->private_data;
	struct lmtrack_channel_stats *stats = arg;
	u32 channel = stats->channel;
	u32 size = stats->size;
	unsigned int index;

	if (stats->reserved)
		return -EINVAL;
	if (mutex_lock_killable(&stream->lock))
		return -EINTR;
	if (channel >= stream->channel_count) {
		mutex_unlock(&stream->lock);
		return -EINVAL;
	}
	index = array_index_nospec(channel, stream->channel_count);
	*stats = stream->channels[index]->stats;
	mutex_unlock(&stream->lock);
	stats->size = size;
	stats->channel = channel;
	return 0;
}

static const struct lmtrack_request stream_requests[] = {
	LMTRACK_REQUEST(LMTRACK_STREAM_ADD_REGION, lmtrack_stream_add_region, 0, false,
			stream_add_region),
	LMTRACK_REQUEST(LMTRACK_STREAM_ADD_CHANNEL, lmtrack_stream_add_channel, 0, true,
			stream_add_channel),
	LMTRACK_REQUEST(LMTRACK_STREAM_SEND, lmtrack_stream_send, LMTRACK_SEND_HELD, false,
			stream_send),
	LMTRACK_REQUEST_GROWN(LMTRACK_STREAM_WAIT, lmtrack_stream_wait,
			      offsetofend(struct lmtrack_stream_wait, held_pages), 0, true,
			      stream_wait),
	LMTRACK_REQUEST(LMTRACK_STREAM_CANCEL, lmtrack_stream_cancel, 0, false,
			stream_cancel),
	LMTRACK_REQUEST(LMTRACK_CHANNEL_STATS, lmtrack_channel_stats, 0, true,
			stream_channel_stats),
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
	if (READ_ONCE(stream->error))
		events |= EPOLLERR;
	return events;
}

static int stream_release(struct inode *inode, struct file *file)
{
	struct lmtrack_stream *stream = file->private_data;
	unsigned int i;

	stream_fail(stream, -1, -ECANCELED);
	for (i = 0; i < stream->channel_count; i++)
		kthread_stop(stream->channels[i]->task);
	/* A thread that was stopped before it ever ran has left its round unfinished. */
	if (stream->sending)
		stream_round_end(stream);
	for (i = 0; i < stream->channel_count; i++) {
		stream->channels[i]->transport->detach(stream->channels[i]);
		channel_free(stream->channels[i]);
	}
	for (i = 0; i < LMTRACK_REGIONS_MAX; i++)
		if (stream->regions[i])
			fput(stream->regions[i]);
	kfree(stream);
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
	int fd;

	if (!stream)
		return -ENOMEM;
	mutex_init(&stream->lock);
	spin_lock_init(&stream->end_lock);
	init_waitqueue_head(&stream->work);
	init_waitqueue_head(&stream->end);
	stream->id = create->stream_id;
	stream->zero_detect = !(create->flags & LMTRACK_STREAM_NO_ZERO_DETECT);
	stream->error_channel = -1;
	fd = anon_inode_getfd("lmtrack-stream", &stream_fops, stream, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		kfree(stream);
	return fd;
}
