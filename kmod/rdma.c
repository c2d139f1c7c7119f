// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack_rdma: frames over RDMA.
 *
 * A channel is a reliable connection made by RDMA's connection manager. The pages of a DATA
 * frame are written into the peer's memory, where the windows say; then the frame itself, header
 * and table, follows as a message (SEND) on the same queue pair, which delivers it behind the
 * writes. Other frames are messages only. The peer says how many buffers it has for them, when
 * it accepts and in messages of its own (struct lmtrack_wire_credit); without one the thread waits,
 * as it would for TCP's window. A device could wait (RNR), but not with iWARP.
 *
 * Pages are mapped for the device one by one and sent by the local DMA key. So nothing is
 * registered on this side, and nothing is pinned for longer than it is under way. Pages that are
 * neighbours in the peer's memory go in one write, as many as the device gathers.
 *
 * A frame takes a batch: references to its pages, their mappings and a copy of header and table.
 * Its last request is the only one that reports success, and since requests end in order, it
 * speaks for all of the batch. Completions only set a flag and wake the thread, which releases
 * the batch, so batches and the room in the queue are the thread's own. The end of a round waits
 * until no batch is under way: then every byte is in the peer's memory, and no page is held, which
 * the next harvest would take for I/O. With iWARP a byte may still be on its way, in order, and its
 * page held by the socket below.
 *
 * A page that is written while the device reads it may arrive half old and half new; it is dirty
 * again and follows in a later round on the same connection.
 *
 * Locks: channels_lock guards the list of channels, which is there for devices that go away.
 * rdma->lock, inside it, guards the resources below the connection (id, queue pair, mappings) and
 * @gone: the thread holds it while it maps, posts and unmaps, never while it waits but for the
 * end of all that is under way, when the channel is shut down. The
 * handler of the connection's events takes neither, as rdma_destroy_id() waits for it. Windows are
 * found without a lock: they are only added, and live as long as the channel.
 *
 * Lifetimes: the channel holds everything from attach to shutdown, which releases what belongs to
 * the device and leaves the rest to detach; if the device goes away before, client_remove() does.
 * Before memory is unmapped the queue is drained.
 */
#include <linux/bvec.h>
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nsproxy.h>
#include <linux/overflow.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <linux/xarray.h>
#include <rdma/ib_cm.h>
#include <rdma/ib_verbs.h>
#include <rdma/rdma_cm.h>

#include "lmtrack.h"

/* Frames under way: enough to hide the way there and back behind the harvest. */
#define RDMA_BATCHES		16
/* A frame of a whole chunk in writes of one page each, and its message. */
#define RDMA_REQUESTS_LEAST	(LMTRACK_CHUNK_PAGES + 1)
#define RDMA_REQUESTS		(2 * LMTRACK_CHUNK_PAGES - 1)
#define RDMA_HEAD_BYTES		(sizeof(struct lmtrack_wire_frame) +			\
				 LMTRACK_CHUNK_PAGES / 2 * sizeof(struct lmtrack_wire_extent))
#define RDMA_RETRIES		7	/* of a packet that is not acknowledged */
/* A peer that has fewer buffers than it said is waited for without limit. */
#define RDMA_RNR_FOREVER	7
/* Of the peer's messages, each for many frames, no more are under way. */
#define RDMA_CREDITS		4
#define RDMA_FRAMES_MAX		1048576	/* that a peer can have buffers for */

struct rdma_channel;

/**
 * struct rdma_batch - a frame under way
 * @rdma:	owner
 * @written:	its writes, which are heard of only when they failed
 * @sent:	its message, the last of it
 * @done:	@sent has completed, well or badly
 * @requests:	places it takes in the queue
 * @pages:	entries of the next two
 * @page:	the pages, a reference each
 * @dma:	where the device finds them
 * @head:	header and table
 * @head_dma:	where the device finds it
 */
struct rdma_batch {
	struct rdma_channel *rdma;
	struct ib_cqe written;
	struct ib_cqe sent;
	bool done;
	unsigned int requests;
	unsigned int pages;
	struct page **page;
	u64 *dma;
	void *head;
	u64 head_dma;
};

/**
 * struct rdma_credit - a buffer for one of the peer's messages
 * @rdma:	owner
 * @got:	it has come
 * @message:	it
 * @dma:	where the device finds @message
 */
struct rdma_credit {
	struct rdma_channel *rdma;
	struct ib_cqe got;
	struct lmtrack_wire_credit *message;
	u64 dma;
};

/**
 * struct rdma_window - memory of the peer's
 * @address:	of its first page
 * @rkey:	the peer's key
 */
struct rdma_window {
	u64 address;
	u32 rkey;
};

/**
 * struct rdma_channel - a connection
 * @channel:	whose
 * @node:	in @channels
 * @lock:	see above
 * @id:		of the connection manager
 * @pd:		protection domain; with it go the local DMA key and all that follows
 * @cq:		from the device's pool, shared with others
 * @depth:	of the send queue
 * @sges:	pages that one write gathers at most, unless they are neighbours here, too
 * @heads:	batches whose head is mapped
 * @mapped:	of @credit, those whose message is
 * @posted_to:	requests may have been posted to the queue pair
 * @gone:	what belongs to the device is
 * @step:	a step of connecting is done, or has failed
 * @error:	negative errno, the first: the connection is of no more use
 * @wait:	the thread waits here for completions and windows
 * @flying:	batches whose message has not completed
 * @frames:	messages that the peer has buffers for; only the thread takes of them
 * @credit:	for the peer's messages
 * @windows:	struct rdma_window by window_index()
 * @first:	oldest batch in use; the thread's own, as is what follows
 * @used:	batches in use, from @first on, round and round
 * @posted:	places of the send queue they take
 * @batch:	all of them
 * @writes:	requests under construction
 * @sge:	their pages
 */
struct rdma_channel {
	struct lmtrack_channel *channel;
	struct list_head node;
	struct mutex lock;		/* id, queue pair, mappings, gone */
	struct rdma_cm_id *id;
	struct ib_pd *pd;
	struct ib_cq *cq;
	unsigned int depth;
	unsigned int sges;
	unsigned int heads;
	unsigned int mapped;
	bool posted_to;
	bool gone;
	struct completion step;
	int error;
	wait_queue_head_t wait;
	atomic_t flying;
	atomic_t frames;
	struct rdma_credit credit[RDMA_CREDITS];
	struct xarray windows;

	unsigned int first;
	unsigned int used;
	unsigned int posted;
	struct rdma_batch batch[RDMA_BATCHES];
	struct ib_rdma_wr *writes;
	struct ib_sge *sge;
};

static struct ib_client rdma_client;
static DEFINE_MUTEX(channels_lock);
static LIST_HEAD(channels);

/* The first error counts; who waits shall see it. */
static void rdma_fail(struct rdma_channel *rdma, int error)
{
	cmpxchg(&rdma->error, 0, error);
	wake_up_all(&rdma->wait);
}

/* 0, or what ended the channel or its stream. */
static int rdma_error(const struct rdma_channel *rdma)
{
	return READ_ONCE(rdma->error) ?: lmtrack_channel_error(rdma->channel);
}

/* ---- Windows ---- */

static unsigned long window_index(u32 region, u64 window)
{
	return (unsigned long)region << 40 | window;
}

static int rdma_window(struct lmtrack_channel *channel, u32 region, u64 number, u64 address,
		       u32 rkey)
{
	struct rdma_channel *rdma = channel->priv;
	struct rdma_window *window = kmalloc(sizeof(*window), GFP_KERNEL_ACCOUNT);
	int ret;

	if (!window)
		return -ENOMEM;
	window->address = address;
	window->rkey = rkey;
	ret = xa_insert(&rdma->windows, window_index(region, number), window,
			GFP_KERNEL_ACCOUNT);
	if (ret) {
		kfree(window);
		return ret == -EBUSY ? -EEXIST : ret;
	}
	wake_up_all(&rdma->wait);
	return 0;
}

/* The window of a page, waited for if need be. */
static int window_of(struct rdma_channel *rdma, u32 region, u64 page,
		     const struct rdma_window **window)
{
	u64 number = div_u64(page, rdma->channel->window_pages);
	unsigned long index = window_index(region, number);

	*window = xa_load(&rdma->windows, index);
	if (*window)
		return 0;
	lmtrack_channel_want(rdma->channel, region, number);
	wait_event_idle(rdma->wait,
			(*window = xa_load(&rdma->windows, index)) || rdma_error(rdma));
	lmtrack_channel_got(rdma->channel);
	return *window ? 0 : rdma_error(rdma);
}

/* ---- Batches ---- */

static void batch_release(struct rdma_channel *rdma, struct rdma_batch *batch)
{
	struct ib_device *device = rdma->id->device;
	unsigned int i;

	lockdep_assert_held(&rdma->lock);
	for (i = 0; i < batch->pages; i++) {
		ib_dma_unmap_page(device, batch->dma[i], PAGE_SIZE, DMA_TO_DEVICE);
		put_page(batch->page[i]);
	}
	batch->pages = 0;
}

/* Release batches that are done with. */
static void batches_reap(struct rdma_channel *rdma)
{
	lockdep_assert_held(&rdma->lock);
	while (rdma->used) {
		struct rdma_batch *batch = &rdma->batch[rdma->first];

		/* Pairs with the release in batch_completed(): the device is done with it. */
		if (!smp_load_acquire(&batch->done))
			return;
		batch_release(rdma, batch);
		rdma->posted -= batch->requests;
		rdma->first = (rdma->first + 1) % RDMA_BATCHES;
		rdma->used--;
	}
}

static int completion_error(const struct ib_wc *wc)
{
	switch (wc->status) {
	case IB_WC_SUCCESS:
		return 0;
	case IB_WC_RETRY_EXC_ERR:
	case IB_WC_RNR_RETRY_EXC_ERR:
		return -ETIMEDOUT;
	case IB_WC_REM_ACCESS_ERR:
		return -EACCES;
	case IB_WC_WR_FLUSH_ERR:
		return -ECONNRESET;
	default:
		return -EIO;
	}
}

static void batch_written(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rdma_batch *batch = container_of(wc->wr_cqe, struct rdma_batch, written);

	if (wc->status != IB_WC_SUCCESS)
		rdma_fail(batch->rdma, completion_error(wc));
}

static void batch_completed(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rdma_batch *batch = container_of(wc->wr_cqe, struct rdma_batch, sent);
	struct rdma_channel *rdma = batch->rdma;

	if (wc->status != IB_WC_SUCCESS)
		rdma_fail(rdma, completion_error(wc));
	atomic_dec(&rdma->flying);
	/* Pairs with batches_reap(). The queue is drained before anything of this is freed. */
	smp_store_release(&batch->done, true);
	wake_up_all(&rdma->wait);
}

/* Take the lock for what needs the device, unless there is no use in it any more. */
static int rdma_lock(struct rdma_channel *rdma)
{
	int ret = READ_ONCE(rdma->error);

	if (ret)
		return ret;
	mutex_lock(&rdma->lock);
	if (!rdma->gone)
		return 0;
	mutex_unlock(&rdma->lock);
	return -ENODEV;
}

/* Wait for the oldest batch. */
static int batch_wait(struct rdma_channel *rdma)
{
	wait_event_idle(rdma->wait,
			READ_ONCE(rdma->batch[rdma->first].done) || rdma_error(rdma));
	return rdma_error(rdma);
}

/* Wait for a buffer of the peer's. */
static int frames_wait(struct rdma_channel *rdma)
{
	wait_event_idle(rdma->wait, atomic_read(&rdma->frames) || rdma_error(rdma));
	return rdma_error(rdma);
}

/*
 * A free batch, room for so many requests and a buffer at the peer for its message, with the lock
 * held; or an error without.
 */
static int batch_get(struct rdma_channel *rdma, unsigned int requests, struct rdma_batch **batch)
{
	bool room;
	int ret;

	for (;;) {
		ret = rdma_lock(rdma);
		if (ret)
			return ret;
		batches_reap(rdma);
		room = rdma->used < RDMA_BATCHES && rdma->posted + requests <= rdma->depth;
		if (room && atomic_add_unless(&rdma->frames, -1, 0)) {
			*batch = &rdma->batch[(rdma->first + rdma->used) % RDMA_BATCHES];
			return 0;
		}
		mutex_unlock(&rdma->lock);
		ret = room ? frames_wait(rdma) : batch_wait(rdma);
		if (ret)
			return ret;
	}
}

/* Until nothing is under way, and no page held. */
static int batches_end(struct rdma_channel *rdma)
{
	int ret;

	for (;;) {
		ret = rdma_lock(rdma);
		if (ret)
			return ret;
		batches_reap(rdma);
		mutex_unlock(&rdma->lock);
		/* Not before: what is done with may have failed since the lock was taken. */
		if (!rdma->used)
			return rdma_error(rdma);
		ret = batch_wait(rdma);
		if (ret)
			return ret;
	}
}

static int batch_map(struct rdma_channel *rdma, struct rdma_batch *batch,
		     const struct bio_vec *bvec, unsigned int pages)
{
	struct ib_device *device = rdma->id->device;
	unsigned int i;
	u64 dma;

	for (i = 0; i < pages; i++) {
		dma = ib_dma_map_page(device, bvec[i].bv_page, 0, PAGE_SIZE, DMA_TO_DEVICE);
		if (ib_dma_mapping_error(device, dma)) {
			batch_release(rdma, batch);
			return -EIO;
		}
		get_page(bvec[i].bv_page);
		batch->page[i] = bvec[i].bv_page;
		batch->dma[i] = dma;
		batch->pages = i + 1;
	}
	return 0;
}

/* ---- Requests ---- */

/* What a frame takes in the queue at most. */
static unsigned int requests_most(const struct rdma_channel *rdma,
				  const struct lmtrack_wire_frame *frame)
{
	const struct lmtrack_wire_extent *extent = (const void *)(frame + 1);
	unsigned int i, requests = 1;

	if (frame->type == LMTRACK_FRAME_DATA)
		for (i = 0; i < le32_to_cpu(frame->extents); i++)
			requests += DIV_ROUND_UP(le32_to_cpu(extent[i].pages), rdma->sges);
	return requests;
}

static void write_begin(struct rdma_channel *rdma, struct rdma_batch *batch,
			const struct rdma_window *window, u64 address)
{
	struct ib_rdma_wr *write = &rdma->writes[batch->requests];

	memset(write, 0, sizeof(*write));
	write->wr.wr_cqe = &batch->written;
	write->wr.opcode = IB_WR_RDMA_WRITE;
	write->remote_addr = address;
	write->rkey = window->rkey;
	if (batch->requests)
		rdma->writes[batch->requests - 1].wr.next = &write->wr;
	batch->requests++;
}

/* Writes of one extent, whose pages are those from @from on; @sge: the first free one. */
static struct ib_sge *write_extent(struct rdma_channel *rdma, struct rdma_batch *batch,
				   const struct rdma_window *window, u64 address,
				   unsigned int from, unsigned int pages, struct ib_sge *sge)
{
	struct lmtrack_channel_stats *stats = &rdma->channel->stats;
	struct ib_send_wr *wr = NULL;
	unsigned int i, bytes = 0;

	for (i = from; i < from + pages; i++, address += PAGE_SIZE) {
		u64 dma = batch->dma[i];

		if (wr && sge[-1].addr + sge[-1].length == dma) {
			sge[-1].length += PAGE_SIZE;
		} else {
			if (!wr || wr->num_sge == rdma->sges) {
				write_begin(rdma, batch, window, address);
				wr = &rdma->writes[batch->requests - 1].wr;
				wr->sg_list = sge;
				stats->writes++;
				bytes = 0;
			}
			sge->addr = dma;
			sge->length = PAGE_SIZE;
			sge->lkey = rdma->pd->local_dma_lkey;
			sge++;
			wr->num_sge++;
		}
		bytes += PAGE_SIZE;
		if (bytes == 2 * PAGE_SIZE)
			stats->gathered++;
	}
	return sge;
}

/* Pages lie in the batch in the order of the extents. */
static void batch_writes(struct rdma_channel *rdma, struct rdma_batch *batch,
			 const struct lmtrack_wire_frame *frame, const struct rdma_window *window)
{
	const struct lmtrack_wire_extent *extent = (const void *)(frame + 1);
	unsigned int i, page, from = 0;
	struct ib_sge *sge = rdma->sge;

	for (i = 0; i < le32_to_cpu(frame->extents); i++) {
		div_u64_rem(le64_to_cpu(extent[i].first), rdma->channel->window_pages, &page);
		sge = write_extent(rdma, batch, window,
				   window->address + ((u64)page << PAGE_SHIFT),
				   from, le32_to_cpu(extent[i].pages), sge);
		from += le32_to_cpu(extent[i].pages);
	}
}

/* Writes, then the message, in one go. */
static int batch_post(struct rdma_channel *rdma, struct rdma_batch *batch, size_t head_bytes)
{
	struct ib_sge sge = {
		.addr = batch->head_dma,
		.length = head_bytes,
		.lkey = rdma->pd->local_dma_lkey,
	};
	struct ib_send_wr message = {
		.wr_cqe = &batch->sent,
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IB_WR_SEND,
		.send_flags = IB_SEND_SIGNALED,
	};
	const struct ib_send_wr *first = &message;
	int ret;

	if (batch->requests) {
		rdma->writes[batch->requests - 1].wr.next = &message;
		first = &rdma->writes[0].wr;
	}
	batch->requests++;
	batch->done = false;
	/* Before it is posted: what is posted of it may be under way, also if it fails. */
	rdma->used++;
	rdma->posted += batch->requests;
	atomic_inc(&rdma->flying);
	ret = ib_post_send(rdma->id->qp, first, NULL);
	if (ret)
		rdma_fail(rdma, ret);
	return ret;
}

static int rdma_send(struct lmtrack_channel *channel, void *head, size_t head_bytes,
		     struct bio_vec *bvec, unsigned int pages, bool more)
{
	struct rdma_channel *rdma = channel->priv;
	const struct lmtrack_wire_frame *frame = head;
	const struct lmtrack_wire_extent *extent = (const void *)(frame + 1);
	const struct rdma_window *window = NULL;
	struct rdma_batch *batch;
	int ret;

	/* A frame is of one chunk, and so of one window. */
	if (pages) {
		ret = window_of(rdma, le32_to_cpu(frame->region), le64_to_cpu(extent->first),
				&window);
		if (ret)
			return ret;
	}
	ret = batch_get(rdma, requests_most(rdma, frame), &batch);
	if (ret)
		return ret;
	batch->requests = 0;
	ret = batch_map(rdma, batch, bvec, pages);
	if (!ret) {
		memcpy(batch->head, head, head_bytes);
		ib_dma_sync_single_for_device(rdma->id->device, batch->head_dma, head_bytes,
					      DMA_TO_DEVICE);
		if (pages)
			batch_writes(rdma, batch, frame, window);
		ret = batch_post(rdma, batch, head_bytes);
	}
	mutex_unlock(&rdma->lock);
	if (ret)
		return ret;
	channel->stats.header_bytes += head_bytes;
	channel->stats.zerocopy_bytes += (u64)pages << PAGE_SHIFT;
	return more ? 0 : batches_end(rdma);
}

static bool rdma_pending(const struct lmtrack_channel *channel)
{
	const struct rdma_channel *rdma = channel->priv;

	return atomic_read(&rdma->flying);
}

/* ---- The peer's buffers ---- */

/* It has so many more; none is no news. */
static int frames_add(struct rdma_channel *rdma, const struct lmtrack_wire_credit *credit)
{
	u32 frames = le32_to_cpu(credit->frames);

	if (le32_to_cpu(credit->magic) != LMTRACK_WIRE_MAGIC || frames > RDMA_FRAMES_MAX)
		return -EPROTO;
	/* The answer's and a message's may be added at the same time: far from an overflow. */
	if (atomic_add_return(frames, &rdma->frames) > RDMA_FRAMES_MAX)
		return -EPROTO;
	wake_up_all(&rdma->wait);
	return 0;
}

static int credit_post(struct rdma_credit *credit)
{
	struct rdma_channel *rdma = credit->rdma;
	struct ib_sge sge = {
		.addr = credit->dma,
		.length = sizeof(*credit->message),
		.lkey = rdma->pd->local_dma_lkey,
	};
	struct ib_recv_wr wr = {
		.wr_cqe = &credit->got,
		.sg_list = &sge,
		.num_sge = 1,
	};

	return ib_post_recv(rdma->id->qp, &wr, NULL);
}

static void credit_got(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rdma_credit *credit = container_of(wc->wr_cqe, struct rdma_credit, got);
	struct rdma_channel *rdma = credit->rdma;
	int ret = completion_error(wc);

	/* The connection is over; why, its manager says, or a request that failed. */
	if (wc->status == IB_WC_WR_FLUSH_ERR)
		return;
	/* It was longer than one. */
	if (wc->status == IB_WC_LOC_LEN_ERR)
		ret = -EPROTO;
	if (!ret) {
		ib_dma_sync_single_for_cpu(rdma->id->device, credit->dma,
					   sizeof(*credit->message), DMA_FROM_DEVICE);
		ret = wc->byte_len == sizeof(*credit->message) ?
			frames_add(rdma, credit->message) : -EPROTO;
	}
	/* Nothing is posted behind the request that drains the queue. */
	if (!ret && !READ_ONCE(rdma->error)) {
		ib_dma_sync_single_for_device(rdma->id->device, credit->dma,
					      sizeof(*credit->message), DMA_FROM_DEVICE);
		ret = credit_post(credit);
	}
	if (ret)
		rdma_fail(rdma, ret);
}

static int credits_post(struct rdma_channel *rdma)
{
	unsigned int i;
	int ret;

	for (i = 0; i < RDMA_CREDITS; i++) {
		ret = credit_post(&rdma->credit[i]);
		if (ret)
			return ret;
	}
	return 0;
}

/* ---- Connecting ---- */

/*
 * What a refusal means to who asked. iWARP knows no reason; there it is the peer's program that
 * refuses when it has something to say, and nobody who listens when not.
 */
static int rejected_error(const struct rdma_cm_event *event)
{
	if (event->status == IB_CM_REJ_CONSUMER_DEFINED ||
	    (event->status < 0 && event->param.conn.private_data_len))
		return -EACCES;
	return -ECONNREFUSED;
}

/* The peer has accepted, and told of its buffers. */
static int established(struct rdma_channel *rdma, const struct rdma_conn_param *answer)
{
	struct lmtrack_wire_credit credit;

	if (answer->private_data_len < sizeof(credit))
		return -EPROTO;
	memcpy(&credit, answer->private_data, sizeof(credit));
	return frames_add(rdma, &credit);
}

static int rdma_event(struct rdma_cm_id *id, struct rdma_cm_event *event)
{
	struct rdma_channel *rdma = id->context;
	int ret;

	switch (event->event) {
	case RDMA_CM_EVENT_ADDR_RESOLVED:
	case RDMA_CM_EVENT_ROUTE_RESOLVED:
		break;
	case RDMA_CM_EVENT_ESTABLISHED:
		ret = established(rdma, &event->param.conn);
		if (ret)
			rdma_fail(rdma, ret);
		break;
	case RDMA_CM_EVENT_ADDR_ERROR:
	case RDMA_CM_EVENT_ROUTE_ERROR:
	case RDMA_CM_EVENT_CONNECT_ERROR:
	case RDMA_CM_EVENT_UNREACHABLE:
		rdma_fail(rdma, event->status < 0 ? event->status : -EHOSTUNREACH);
		break;
	case RDMA_CM_EVENT_REJECTED:
		rdma_fail(rdma, rejected_error(event));
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
		rdma_fail(rdma, -ECONNRESET);
		break;
	case RDMA_CM_EVENT_DEVICE_REMOVAL:
		/* client_remove() was here before, or attach is still at it and will give up. */
		rdma_fail(rdma, -ENODEV);
		break;
	default:
		return 0;
	}
	complete(&rdma->step);
	return 0;
}

/* For the end of a step, at most until @deadline. */
static int step_wait(struct rdma_channel *rdma, unsigned long deadline)
{
	long left = max_t(long, deadline - jiffies, 1);

	left = wait_for_completion_interruptible_timeout(&rdma->step, left);
	if (left < 0)
		return -EINTR;
	return left ? READ_ONCE(rdma->error) : -ETIMEDOUT;
}

static int batches_alloc(struct rdma_channel *rdma)
{
	unsigned int i;

	rdma->writes = kvcalloc(RDMA_REQUESTS_LEAST, sizeof(*rdma->writes), GFP_KERNEL_ACCOUNT);
	rdma->sge = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*rdma->sge), GFP_KERNEL_ACCOUNT);
	if (!rdma->writes || !rdma->sge)
		return -ENOMEM;
	for (i = 0; i < RDMA_BATCHES; i++) {
		struct rdma_batch *batch = &rdma->batch[i];

		batch->rdma = rdma;
		batch->written.done = batch_written;
		batch->sent.done = batch_completed;
		batch->page = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*batch->page),
				       GFP_KERNEL_ACCOUNT);
		batch->dma = kvcalloc(LMTRACK_CHUNK_PAGES, sizeof(*batch->dma),
				      GFP_KERNEL_ACCOUNT);
		batch->head = kmalloc(RDMA_HEAD_BYTES, GFP_KERNEL_ACCOUNT);
		if (!batch->page || !batch->dma || !batch->head)
			return -ENOMEM;
	}
	for (i = 0; i < RDMA_CREDITS; i++) {
		struct rdma_credit *credit = &rdma->credit[i];

		credit->rdma = rdma;
		credit->got.done = credit_got;
		credit->message = kmalloc(sizeof(*credit->message), GFP_KERNEL_ACCOUNT);
		if (!credit->message)
			return -ENOMEM;
	}
	return 0;
}

static void batches_free(struct rdma_channel *rdma)
{
	unsigned int i;

	for (i = 0; i < RDMA_BATCHES; i++) {
		kvfree(rdma->batch[i].page);
		kvfree(rdma->batch[i].dma);
		kfree(rdma->batch[i].head);
	}
	for (i = 0; i < RDMA_CREDITS; i++)
		kfree(rdma->credit[i].message);
	kvfree(rdma->writes);
	kvfree(rdma->sge);
}

static int messages_map(struct rdma_channel *rdma)
{
	struct ib_device *device = rdma->id->device;

	for (; rdma->heads < RDMA_BATCHES; rdma->heads++) {
		struct rdma_batch *batch = &rdma->batch[rdma->heads];
		u64 dma = ib_dma_map_single(device, batch->head, RDMA_HEAD_BYTES,
					    DMA_TO_DEVICE);

		if (ib_dma_mapping_error(device, dma))
			return -EIO;
		batch->head_dma = dma;
	}
	for (; rdma->mapped < RDMA_CREDITS; rdma->mapped++) {
		struct rdma_credit *credit = &rdma->credit[rdma->mapped];
		u64 dma = ib_dma_map_single(device, credit->message, sizeof(*credit->message),
					    DMA_FROM_DEVICE);

		if (ib_dma_mapping_error(device, dma))
			return -EIO;
		credit->dma = dma;
	}
	return 0;
}

static void messages_unmap(struct rdma_channel *rdma)
{
	struct ib_device *device = rdma->id->device;

	for (; rdma->heads; rdma->heads--)
		ib_dma_unmap_single(device, rdma->batch[rdma->heads - 1].head_dma,
				    RDMA_HEAD_BYTES, DMA_TO_DEVICE);
	for (; rdma->mapped; rdma->mapped--)
		ib_dma_unmap_single(device, rdma->credit[rdma->mapped - 1].dma,
				    sizeof(struct lmtrack_wire_credit), DMA_FROM_DEVICE);
}

/* One place in either queue is for draining it; when they break, all that is in them completes. */
static unsigned int completions_most(const struct rdma_channel *rdma)
{
	return rdma->depth + 1 + RDMA_CREDITS + 1;
}

/* Everything that belongs to the device. */
static int device_setup(struct rdma_channel *rdma)
{
	const struct ib_device_attr *attrs = &rdma->id->device->attrs;
	struct ib_qp_init_attr init = {
		.sq_sig_type = IB_SIGNAL_REQ_WR,
		.qp_type = IB_QPT_RC,
	};
	struct ib_pd *pd;
	struct ib_cq *cq;
	int ret;

	rdma->depth = min_t(unsigned int, attrs->max_qp_wr, RDMA_REQUESTS) - 1;
	rdma->sges = min_t(unsigned int, attrs->max_send_sge, LMTRACK_CHUNK_PAGES);
	if (attrs->max_qp_wr <= RDMA_REQUESTS_LEAST || !rdma->sges)
		return -EOPNOTSUPP;
	pd = ib_alloc_pd(rdma->id->device, 0);
	if (IS_ERR(pd))
		return PTR_ERR(pd);
	rdma->pd = pd;
	cq = ib_cq_pool_get(rdma->id->device, completions_most(rdma), -1, IB_POLL_SOFTIRQ);
	if (IS_ERR(cq))
		return PTR_ERR(cq);
	rdma->cq = cq;
	init.send_cq = cq;
	init.recv_cq = cq;
	init.cap.max_send_wr = rdma->depth + 1;
	init.cap.max_send_sge = rdma->sges;
	init.cap.max_recv_wr = RDMA_CREDITS + 1;
	init.cap.max_recv_sge = 1;
	ret = rdma_create_qp(rdma->id, pd, &init);
	return ret ?: messages_map(rdma);
}

/* The device's part of the channel ends here, with nothing of it under way. */
static void device_release(struct rdma_channel *rdma)
{
	unsigned int i;

	lockdep_assert_held(&rdma->lock);
	if (rdma->posted_to) {
		/* credit_got() posts no more. */
		rdma_fail(rdma, -ESHUTDOWN);
		rdma_disconnect(rdma->id);
		ib_drain_qp(rdma->id->qp);
	}
	for (i = 0; i < RDMA_BATCHES; i++)
		batch_release(rdma, &rdma->batch[i]);
	messages_unmap(rdma);
	if (rdma->id->qp)
		rdma_destroy_qp(rdma->id);
	if (rdma->cq)
		ib_cq_pool_put(rdma->cq, completions_most(rdma));
	if (rdma->pd)
		ib_dealloc_pd(rdma->pd);
	rdma_destroy_id(rdma->id);
	rdma->id = NULL;
}

static void rdma_free(struct rdma_channel *rdma)
{
	struct rdma_window *window;
	unsigned long index;

	mutex_lock(&channels_lock);
	list_del(&rdma->node);
	mutex_unlock(&channels_lock);
	/* From here on client_remove() does not find it. */
	mutex_lock(&rdma->lock);
	if (rdma->id)
		device_release(rdma);
	mutex_unlock(&rdma->lock);
	xa_for_each(&rdma->windows, index, window)
		kfree(window);
	xa_destroy(&rdma->windows);
	batches_free(rdma);
	mutex_destroy(&rdma->lock);
	kfree(rdma);
}

static struct rdma_channel *rdma_alloc(struct lmtrack_channel *channel)
{
	struct rdma_channel *rdma = kzalloc(sizeof(*rdma), GFP_KERNEL_ACCOUNT);
	struct rdma_cm_id *id;

	if (!rdma)
		return ERR_PTR(-ENOMEM);
	rdma->channel = channel;
	INIT_LIST_HEAD(&rdma->node);
	mutex_init(&rdma->lock);
	init_completion(&rdma->step);
	init_waitqueue_head(&rdma->wait);
	xa_init_flags(&rdma->windows, XA_FLAGS_ACCOUNT);
	id = rdma_create_id(current->nsproxy->net_ns, rdma_event, rdma, RDMA_PS_TCP, IB_QPT_RC);
	if (IS_ERR(id)) {
		rdma_free(rdma);
		return ERR_CAST(id);
	}
	rdma->id = id;
	return rdma;
}

static int connect_resolve(struct rdma_channel *rdma, const struct lmtrack_stream_add_rdma *add,
			   unsigned long deadline)
{
	struct sockaddr_storage local = { }, remote = { };
	int ret;

	memcpy(&local, add->local, sizeof(add->local));
	memcpy(&remote, add->remote, sizeof(add->remote));
	ret = rdma_resolve_addr(rdma->id, local.ss_family ? (struct sockaddr *)&local : NULL,
				(struct sockaddr *)&remote, add->timeout_ms);
	if (!ret)
		ret = step_wait(rdma, deadline);
	if (ret)
		return ret;
	/* It has a device now; but client_remove() may have been there already. */
	mutex_lock(&channels_lock);
	if (ib_get_client_data(rdma->id->device, &rdma_client))
		list_add_tail(&rdma->node, &channels);
	else
		ret = -ENODEV;
	mutex_unlock(&channels_lock);
	if (ret)
		return ret;

	ret = rdma_lock(rdma);
	if (ret)
		return ret;
	ret = device_setup(rdma);
	if (!ret)
		ret = rdma_resolve_route(rdma->id, add->timeout_ms);
	mutex_unlock(&rdma->lock);
	return ret ?: step_wait(rdma, deadline);
}

static int connect_peer(struct rdma_channel *rdma, const struct lmtrack_stream_add_rdma *add,
			unsigned long deadline)
{
	struct rdma_conn_param param = {
		.private_data = add->token,
		.private_data_len = add->token_bytes,
		.retry_count = RDMA_RETRIES,
		.rnr_retry_count = RDMA_RNR_FOREVER,
	};
	int ret;

	ret = rdma_lock(rdma);
	if (ret)
		return ret;
	rdma->posted_to = true;
	ret = credits_post(rdma);
	if (!ret)
		ret = rdma_connect(rdma->id, &param);
	mutex_unlock(&rdma->lock);
	return ret ?: step_wait(rdma, deadline);
}

/* An address of a family that is known, with a host and zeroes behind it. */
static bool address_valid(const u8 *bytes)
{
	const struct sockaddr *addr = (const struct sockaddr *)bytes;
	size_t length;

	if (addr->sa_family == AF_INET)
		length = sizeof(struct sockaddr_in);
	else if (addr->sa_family == AF_INET6)
		length = sizeof(struct sockaddr_in6);
	else
		return false;
	return !memchr_inv(bytes + length, 0, LMTRACK_RDMA_ADDRESS_MAX - length);
}

static int rdma_attach(struct lmtrack_channel *channel, const void *how)
{
	const struct lmtrack_stream_add_rdma *add = how;
	unsigned long deadline = jiffies + msecs_to_jiffies(add->timeout_ms);
	struct rdma_channel *rdma;
	int ret;

	if (!address_valid(add->remote) ||
	    (memchr_inv(add->local, 0, sizeof(add->local)) && !address_valid(add->local)))
		return -EINVAL;
	rdma = rdma_alloc(channel);
	if (IS_ERR(rdma))
		return PTR_ERR(rdma);
	ret = batches_alloc(rdma);
	if (!ret)
		ret = connect_resolve(rdma, add, deadline);
	if (!ret)
		ret = connect_peer(rdma, add, deadline);
	if (ret) {
		rdma_free(rdma);
		return ret;
	}
	channel->priv = rdma;
	return 0;
}

static void rdma_detach(struct lmtrack_channel *channel)
{
	rdma_free(channel->priv);
}

static void rdma_shutdown(struct lmtrack_channel *channel)
{
	struct rdma_channel *rdma = channel->priv;

	mutex_lock(&rdma->lock);
	if (!rdma->gone) {
		rdma->gone = true;
		device_release(rdma);
	}
	mutex_unlock(&rdma->lock);
}

static const struct lmtrack_transport rdma_transport = {
	.owner = THIS_MODULE,
	.attach = rdma_attach,
	.send = rdma_send,
	.pending = rdma_pending,
	.shutdown = rdma_shutdown,
	.detach = rdma_detach,
	.window = rdma_window,
};

/* ---- The module ---- */

/* Any value will do: it says that client_remove() is yet to come. */
static int client_add(struct ib_device *device)
{
	ib_set_client_data(device, &rdma_client, device);
	return 0;
}

/* Before the connection manager's own turn: it was there, and registered, before us. */
static void client_remove(struct ib_device *device, void *data)
{
	struct rdma_channel *rdma;

	mutex_lock(&channels_lock);
	ib_set_client_data(device, &rdma_client, NULL);
	list_for_each_entry(rdma, &channels, node) {
		mutex_lock(&rdma->lock);
		if (rdma->id && rdma->id->device == device) {
			rdma_fail(rdma, -ENODEV);
			rdma->gone = true;
			device_release(rdma);
			/* For who is still connecting. */
			complete(&rdma->step);
		}
		mutex_unlock(&rdma->lock);
	}
	mutex_unlock(&channels_lock);
}

static struct ib_client rdma_client = {
	.name = "lmtrack_rdma",
	.add = client_add,
	.remove = client_remove,
};

static int __init lmtrack_rdma_init(void)
{
	int ret = ib_register_client(&rdma_client);

	if (!ret)
		lmtrack_transport_register(&rdma_transport);
	return ret;
}

static void __exit lmtrack_rdma_exit(void)
{
	lmtrack_transport_unregister(&rdma_transport);
	ib_unregister_client(&rdma_client);
}

module_init(lmtrack_rdma_init);
module_exit(lmtrack_rdma_exit);

MODULE_DESCRIPTION("RDMA for lmtrack's streams");
MODULE_AUTHOR("The lmtrack developers");
MODULE_LICENSE("GPL");
