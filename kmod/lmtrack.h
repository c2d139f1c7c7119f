/* SPDX-License-Identifier: GPL-2.0 */
/*
 * lmtrack: what its files share. Each file's own locking rules and lifetimes stand at its top.
 *
 * Lock order, outermost first:
 *
 *   stream->lock
 *     (rdma.c) channels_lock		the list of channels
 *       rdma->lock, the connection manager's
 *     region->flip_lock		one change between idle and tracked at a time
 *       mmap_lock			of any process that maps the region
 *         region->mms_lock		the list of those processes
 *     region->harvest_lock		one chunk at a time is harvested; state and tracker
 *       folio locks, ascending
 *         i_mmap_rwsem, page table locks (taken by the mapping helpers)
 *         i_pages lock, region->chunks lock
 *         stun->threads_lock		the accounts of threads
 *       stun->sleepers.lock		of the wait queue
 *     stream->end_lock		results, losses, threads; beneath it only wait queues
 *   stream->pace.lock			how much was sent; taken with nothing else held
 *
 * flip_lock may wait for a process's mmap_lock for as long as that process likes, so it is
 * only taken killably, or by a worker nobody waits for. harvest_lock is held for one chunk's
 * work or less and never across a copy to user space.
 */
#ifndef LMTRACK_H
#define LMTRACK_H

#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <linux/lmtrack.h>
#include <linux/lmtrack_wire.h>

struct bio_vec;
struct folio;
struct mm_struct;
struct vm_area_struct;

/* ---- Requests (main.c) ---- */

/**
 * struct lmtrack_request - one ioctl: its argument's shape and who serves it
 * @cmd:	number
 * @size:	of the argument as this module knows it
 * @least:	of the argument as it was first published; 0: it has not grown since
 * @flags:	those it may carry
 * @out:	the argument goes back to the caller, also when the request failed
 * @serve:	gets the argument in kernel memory; what the caller did not give is zero
 */
struct lmtrack_request {
	unsigned int cmd;
	u32 size;
	u32 least;
	u32 flags;
	bool out;
	long (*serve)(struct file *file, void *arg);
};

#define LMTRACK_REQUEST(_cmd, _type, _flags, _out, _serve)			\
	{									\
		.cmd = (_cmd), .size = sizeof(struct _type),			\
		.flags = (_flags), .out = (_out), .serve = (_serve),		\
	}

/* The argument has grown since it was first published, with @_least bytes. */
#define LMTRACK_REQUEST_GROWN(_cmd, _type, _least, _flags, _out, _serve)		\
	{									\
		.cmd = (_cmd), .size = sizeof(struct _type), .least = (_least),	\
		.flags = (_flags), .out = (_out), .serve = (_serve),		\
	}

long lmtrack_serve(struct file *file, const struct lmtrack_request *table, size_t entries,
		   unsigned int cmd, unsigned long uarg);

/* For what must not be done or waited for where it becomes due. main.c ends it last. */
extern struct workqueue_struct *lmtrack_wq;

/* ---- Regions (region.c) ---- */

/**
 * struct lmtrack_chunk - LMTRACK_CHUNK_PAGES pages and their dirty bits
 * @dirty:	set under the folio's lock before its page table entry becomes writable; cleared
 *		only by a harvest that holds the same lock, or that holds the i_pages lock and
 *		sees that the page does not exist
 * @queued:	has LMTRACK_CHUNK_QUEUED in the tree; written under the tree's lock
 * @held:	pages to be left out of rounds, see hold.c; NULL: none. Under harvest_lock
 * @armed:	its resident pages have been put into @dirty since tracking started. Until
 *		then every one of them counts as dirty. Under harvest_lock
 *
 * Made when the first page of the chunk is, lives as long as the region.
 */
struct lmtrack_chunk {
	unsigned long dirty[BITS_TO_LONGS(LMTRACK_CHUNK_PAGES)];
	unsigned long *held;
	bool queued;
	bool armed;
};

/* Mark in region->chunks: not armed, or has dirty bits. The next harvest must look at it. */
#define LMTRACK_CHUNK_QUEUED	XA_MARK_0
/* Another: has held pages. */
#define LMTRACK_CHUNK_HELD	XA_MARK_1

/**
 * struct lmtrack_region_counters - of one processor
 * @write_faults: as in struct lmtrack_region_stats
 * @fault_ns:	same
 * @dirtied:	same
 * @marked:	the folio that page_mkwrite last marked here, until dirty_folio is told of it;
 *		compared, never dereferenced
 */
struct lmtrack_region_counters {
	u64 write_faults;
	u64 fault_ns;
	u64 dirtied;
	const struct folio *marked;
};

/**
 * struct lmtrack_region - guest memory
 * @inode:	the file; owns this structure
 * @id:		unique since the module was loaded
 * @pages:	length
 * @node:	NUMA node or NUMA_NO_NODE
 * @name:	as given
 * @chunks:	struct lmtrack_chunk by chunk number
 * @chunk_count: entries in @chunks
 * @counters:	per CPU
 * @flip_lock:	one flip at a time
 * @mms_lock:	guards @mms, @tracking and @flip_seq
 * @mms:	struct lmtrack_mm: every process that maps the region
 * @tracking:	which operations a mapping shall have
 * @flip_seq:	grows whenever @tracking changes
 * @maybe_pinned: a process that maps or mapped the region has pinned memory at some time
 * @flip_work:	brings the mappings in line when the one who tracked is gone
 * @harvest_lock: guards @state, @tracker, @senders, chunk->armed and every harvest
 * @state:	enum lmtrack_region_state; read without the lock by faults
 * @tracker:	the open file that started tracking; compared, never dereferenced
 * @senders:	streams that are sending a round of this region
 * @harvests:	DIRTY_GET with LMTRACK_DIRTY_CLEAR
 * @harvested:	pages cleared
 * @repinned:	pages left dirty because somebody held them for I/O
 * @held:	pages that are held
 * @held_chunks: chunks that have some
 * @stun:	ceiling and accounts of the last tracking; NULL before the first. Replaced
 *		under harvest_lock
 */
struct lmtrack_region {
	struct inode *inode;
	u64 id;
	u64 pages;
	int node;
	char name[LMTRACK_NAME_MAX];

	struct xarray chunks;
	atomic_long_t chunk_count;
	struct lmtrack_region_counters __percpu *counters;

	struct mutex flip_lock;		/* one flip at a time */
	spinlock_t mms_lock;		/* mms, tracking, flip_seq */
	struct list_head mms;
	bool tracking;
	u32 flip_seq;
	bool maybe_pinned;
	struct work_struct flip_work;

	struct mutex harvest_lock;	/* state, tracker, senders, harvests */
	u32 state;
	const struct file *tracker;
	unsigned int senders;
	u64 harvests;
	u64 harvested;
	u64 repinned;
	u64 held;
	u64 held_chunks;
	struct lmtrack_stun __rcu *stun;
};

long lmtrack_region_create(struct file *file, void *arg);
struct lmtrack_region *lmtrack_region_of(struct file *file);
void lmtrack_region_hold(struct lmtrack_region *region);
void lmtrack_region_put(struct lmtrack_region *region);
struct lmtrack_chunk *lmtrack_chunk_get(struct lmtrack_region *region, unsigned long index);
extern const struct vm_operations_struct lmtrack_vm_ops_idle;
extern const struct vm_operations_struct lmtrack_vm_ops_tracked;

/* ---- Tracking (track.c) ---- */

void lmtrack_track_flip_work(struct work_struct *work);

int lmtrack_mm_add(struct lmtrack_region *region, struct vm_area_struct *vma, gfp_t gfp);
void lmtrack_mm_del(struct lmtrack_region *region, struct vm_area_struct *vma);
u64 lmtrack_mm_count(struct lmtrack_region *region);

bool lmtrack_mark_dirty(struct lmtrack_region *region, pgoff_t index);
void lmtrack_mark_punched(struct lmtrack_region *region, pgoff_t first, pgoff_t last);
void lmtrack_chunk_queue(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			 unsigned long index);

long lmtrack_track_start(struct file *file, void *arg);
long lmtrack_track_stop(struct file *file, void *arg);
long lmtrack_dirty_get(struct file *file, void *arg);
bool lmtrack_range_valid(const struct lmtrack_region *region, u64 first, u64 pages);
int lmtrack_track_check(const struct lmtrack_region *region, const struct file *file);
void lmtrack_track_release(struct lmtrack_region *region, const struct file *file);

/* What a sender needs: hold the tracked state, then chunk by chunk. */
int lmtrack_sender_begin(struct lmtrack_region *region, const struct file *file);
void lmtrack_sender_end(struct lmtrack_region *region);
bool lmtrack_chunk_find(struct lmtrack_region *region, unsigned long *index, bool all);
int lmtrack_chunk_take(struct lmtrack_region *region, unsigned long index, bool all,
		       bool holding, unsigned long *taken, struct folio **folios, u64 *held);
bool lmtrack_chunk_return(struct lmtrack_region *region, const struct file *file,
			  unsigned long index, const unsigned long *pages);

/* ---- Pages held back (hold.c) ---- */

long lmtrack_hold_set(struct file *file, void *arg);
void lmtrack_hold_forget(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			 unsigned long index);

/* ---- Stun (stun.c) ---- */

struct lmtrack_stun;

struct lmtrack_stun *lmtrack_stun_alloc(struct lmtrack_region *region);
void lmtrack_stun_put(struct lmtrack_stun *stun);
void lmtrack_stun_end(struct lmtrack_region *region);
void lmtrack_stun_release(struct lmtrack_region *region, const struct file *file);
void lmtrack_stun_fault(struct lmtrack_region *region, pgoff_t page, bool dirtied, u64 began);
u64 lmtrack_stun_bytes(struct lmtrack_region *region);
long lmtrack_stun_set(struct file *file, void *arg);
long lmtrack_stun_stats(struct file *file, void *arg);

/* ---- Streams (stream.c) and their transports ---- */

/* A kernel thread's would be put by a worker, and all that the host puts so would wait for it. */
static inline void lmtrack_fput(struct file *file)
{
	if (current->flags & PF_KTHREAD)
		__fput_sync(file);
	else
		fput(file);
}

struct lmtrack_stream;

/**
 * struct lmtrack_channel - one connection of a stream and the thread that feeds it
 * @stream:	owner
 * @number:	in the frames
 * @transport:	how it sends
 * @priv:	the transport's own
 * @task:	the thread, with a reference
 * @ended:	it has shut the connection down, and ends; under the stream's end_lock
 * @dropped:	so it has, and @priv is gone; under the stream's lock
 * @error:	negative errno: it is lost; under the stream's end_lock
 * @rank:	channels before it that were there when the round began
 * @seq:	frames sent; the thread's own
 * @round_done:	last round this channel has ended; the thread's own
 * @carrying:	one of the stream's that carry; the thread's own
 * @window_pages: of the windows at the peer; 0: the transport has none
 * @wanted:	the window that the thread waits for, see lmtrack_channel_want(); 0: none
 * @head:	frame header and extent table under construction
 * @folios:	pages of the chunk being sent
 * @bvec:	their bytes
 * @stats:	written by the thread only
 */
struct lmtrack_channel {
	struct lmtrack_stream *stream;
	u32 number;
	const struct lmtrack_transport *transport;
	void *priv;
	struct task_struct *task;
	bool ended;
	bool dropped;
	int error;
	u32 rank;
	u64 seq;
	u32 round_done;
	bool carrying;
	u32 window_pages;
	u64 wanted;
	void *head;
	struct folio **folios;
	struct bio_vec *bvec;
	struct lmtrack_channel_stats stats;
};

/**
 * struct lmtrack_transport - what carries frames
 *
 * A @send that waits looks for lmtrack_channel_error() whenever it is woken, for which
 * wake_up_process() is enough. @send, @pending and @shutdown are called by the channel's thread.
 *
 * @owner:	its module, if that is another than this; each channel holds it
 * @attach:	take or make the connection that @how, the request, describes; sets channel->priv,
 *		which is the same for the same connection
 * @send:	send @head, then the pages; returns when the connection took all, or an error
 *		after which the channel is of no more use. @more: another frame follows at once
 * @pending:	the connection has bytes that could not leave yet: the wire is busy with them
 * @shutdown:	end the connection, for the peer as well; takes as long as that may take
 * @detach:	release what attach took, after @shutdown or where no thread was there
 * @window:	pages of a region, from the window's first on, go to @address at the peer. NULL:
 *		the transport has no windows
 */
struct lmtrack_transport {
	struct module *owner;
	int (*attach)(struct lmtrack_channel *channel, const void *how);
	int (*send)(struct lmtrack_channel *channel, void *head, size_t head_bytes,
		    struct bio_vec *bvec, unsigned int pages, bool more);
	bool (*pending)(const struct lmtrack_channel *channel);
	void (*shutdown)(struct lmtrack_channel *channel);
	void (*detach)(struct lmtrack_channel *channel);
	int (*window)(struct lmtrack_channel *channel, u32 region, u64 window, u64 address,
		      u32 rkey);
};

extern const struct lmtrack_transport lmtrack_tcp;

int lmtrack_channel_error(const struct lmtrack_channel *channel);
void lmtrack_channel_want(struct lmtrack_channel *channel, u32 region, u64 window);
void lmtrack_channel_got(struct lmtrack_channel *channel);
long lmtrack_stream_create(struct file *file, void *arg);

/* ---- How fast a stream sends (pace.c) ---- */

/**
 * struct lmtrack_pace - the cap of a stream
 * @lock:	guards the next two
 * @rate:	bytes per second of all channels together; 0: no cap
 * @due:	when what was sent would have left at that rate, on the monotonic clock
 * @sleepers:	channels that wait until then
 */
struct lmtrack_pace {
	spinlock_t lock;		/* rate, due */
	u64 rate;
	s64 due;
	wait_queue_head_t sleepers;
};

void lmtrack_pace_init(struct lmtrack_pace *pace);
void lmtrack_pace_set(struct lmtrack_pace *pace, u64 rate);
unsigned int lmtrack_pace_pages(const struct lmtrack_pace *pace);
bool lmtrack_pace_busy(const struct lmtrack_pace *pace);
int lmtrack_pace_pay(struct lmtrack_pace *pace, const struct lmtrack_channel *channel,
		     unsigned int pages, size_t bytes);

/* ---- Transports in modules of their own (transport.c) ---- */

void lmtrack_transport_register(const struct lmtrack_transport *transport);
void lmtrack_transport_unregister(const struct lmtrack_transport *transport);
const struct lmtrack_transport *lmtrack_transport_get_rdma(void);
void lmtrack_transport_put(const struct lmtrack_transport *transport);

#endif /* LMTRACK_H */
