/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * lmtrack: tracked guest memory and its zero-copy sender.
 *
 * /dev/lmtrack makes two kinds of object, each a file descriptor:
 *
 *   region   guest RAM as a file that can be mapped shared, tracked for writes and harvested
 *   stream   a sender that moves regions over connected channels, round by round
 *
 * Every argument structure begins with its own size and a flags word. The kernel accepts a
 * larger structure than it knows when the part it does not know is zero (E2BIG otherwise);
 * a smaller one than the first published is EINVAL. Unknown flags are EOPNOTSUPP, reserved
 * fields that are not zero EINVAL, unknown requests ENOTTY.
 *
 * Page numbers count units of the system's page size; a chunk is LMTRACK_CHUNK_PAGES pages.
 */
#ifndef _UAPI_LINUX_LMTRACK_H
#define _UAPI_LINUX_LMTRACK_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define LMTRACK_IOC_TYPE	0xBC

/* The unit of tracking memory, of sending and of digests: 2 MiB with 4 KiB pages. */
#define LMTRACK_CHUNK_PAGES	512

#define LMTRACK_NAME_MAX	64	/* bytes, the terminating NUL included */
#define LMTRACK_CHANNELS_MAX	64
#define LMTRACK_REGIONS_MAX	64	/* regions of one stream */
#define LMTRACK_REGION_SIZE_MAX	(1ULL << 46)

/**
 * struct lmtrack_region_create - LMTRACK_REGION_CREATE, on /dev/lmtrack
 * @size:	sizeof(struct lmtrack_region_create)
 * @flags:	none yet, zero
 * @region_size: bytes; a multiple of the page size, 1 page to LMTRACK_REGION_SIZE_MAX
 * @node:	NUMA node that pages are preferably taken from, or -1 for the policy of the
 *		thread that touches them
 * @reserved:	zero
 * @name:	NUL-terminated, at least one character, printable ASCII without space and '/':
 *		seen in /proc as "/lmtrack:NAME"
 *
 * The ioctl returns the new region's file descriptor (close-on-exec).
 *
 * EINVAL: size, name, node or reserved field; EOPNOTSUPP: unknown flag; ENOMEM.
 */
struct lmtrack_region_create {
	__u32 size;
	__u32 flags;
	__aligned_u64 region_size;
	__s32 node;
	__u32 reserved;
	char name[LMTRACK_NAME_MAX];
};

#define LMTRACK_REGION_CREATE	_IO(LMTRACK_IOC_TYPE, 0x00)

/**
 * struct lmtrack_stream_create - LMTRACK_STREAM_CREATE, on /dev/lmtrack
 * @size:	sizeof(struct lmtrack_stream_create)
 * @flags:	LMTRACK_STREAM_NO_ZERO_DETECT: do not look for pages that hold only zeroes
 * @stream_id:	written into every frame (see lmtrack_wire.h); the caller's choice
 *
 * The ioctl returns the new stream's file descriptor (close-on-exec).
 */
struct lmtrack_stream_create {
	__u32 size;
	__u32 flags;
	__aligned_u64 stream_id;
};

#define LMTRACK_STREAM_CREATE	_IO(LMTRACK_IOC_TYPE, 0x01)

#define LMTRACK_STREAM_NO_ZERO_DETECT	(1U << 0)

/**
 * enum lmtrack_region_state - where a region is between plain memory and tracked memory
 * @LMTRACK_IDLE:	plain shared memory: no write is noticed, none costs more
 * @LMTRACK_STARTING:	TRACK_START is under way
 * @LMTRACK_TRACKED:	every write is in the bitmap
 */
enum lmtrack_region_state {
	LMTRACK_IDLE = 0,
	LMTRACK_STARTING = 1,
	LMTRACK_TRACKED = 2,
};

/**
 * struct lmtrack_region_info - LMTRACK_REGION_INFO, on a region
 * @size:	sizeof(struct lmtrack_region_info)
 * @flags:	zero
 * @region_size: out: bytes
 * @region_id:	out: unique among the regions of this host since the module was loaded
 * @page_size:	out: bytes
 * @node:	out: NUMA node asked for, or -1
 * @state:	out: enum lmtrack_region_state
 * @reserved:	zero
 * @name:	out: as given at creation
 */
struct lmtrack_region_info {
	__u32 size;
	__u32 flags;
	__aligned_u64 region_size;
	__aligned_u64 region_id;
	__u32 page_size;
	__s32 node;
	__u32 state;
	__u32 reserved;
	char name[LMTRACK_NAME_MAX];
};

#define LMTRACK_REGION_INFO	_IO(LMTRACK_IOC_TYPE, 0x10)

/**
 * struct lmtrack_track_start - LMTRACK_TRACK_START, on a region
 * @size:	sizeof(struct lmtrack_track_start)
 * @flags:	LMTRACK_TRACK_ALLOW_PINNED
 * @pinned:	out: pages found pinned for I/O (also with EBUSY); direct I/O in flight counts
 *
 * From its return on, every write through any mapping of the region is noticed. All resident
 * pages count as dirty until they are first harvested. Tracking belongs to the open file that
 * started it: only that file can harvest and stop it, and it stops when that file is closed.
 * A caller that got its descriptor from another process therefore opens /proc/self/fd/N anew
 * and starts tracking there.
 *
 * Costs time in proportion to the number of mappings, not of pages; only when a process that
 * maps the region has ever pinned memory are the resident pages looked at, for pins.
 *
 * EBUSY: tracked already (@pinned is 0), or @pinned pages are pinned and
 * LMTRACK_TRACK_ALLOW_PINNED was not given. EACCES: the descriptor is not open for writing.
 * EINTR: killed while waiting for a process's mmap_lock.
 *
 * A page that somebody holds for I/O is dirty in every harvest for as long as it is held, as it
 * may be written without notice. The network holds a page that a stream has sent until its
 * peer has acknowledged it: written again before that, it is sent once more than needed.
 */
struct lmtrack_track_start {
	__u32 size;
	__u32 flags;
	__aligned_u64 pinned;
};

#define LMTRACK_TRACK_START	_IO(LMTRACK_IOC_TYPE, 0x11)

#define LMTRACK_TRACK_ALLOW_PINNED	(1U << 0)

/**
 * struct lmtrack_track_stop - LMTRACK_TRACK_STOP, on the region file that started
 * @size:	sizeof(struct lmtrack_track_stop)
 * @flags:	zero
 *
 * EPERM: another open file started it. EINVAL: not tracked. EBUSY: a stream is sending it.
 */
struct lmtrack_track_stop {
	__u32 size;
	__u32 flags;
};

#define LMTRACK_TRACK_STOP	_IO(LMTRACK_IOC_TYPE, 0x12)

/**
 * struct lmtrack_dirty_get - LMTRACK_DIRTY_GET, on the region file that started tracking
 * @size:	sizeof(struct lmtrack_dirty_get)
 * @flags:	LMTRACK_DIRTY_CLEAR: clear what is reported and protect it again;
 *		without: peek, nothing changes
 * @first:	first page of the range, a multiple of 64
 * @pages:	length of the range in pages, > 0; @first + @pages within the region
 * @bitmap:	address of an array of __u64, (@pages + 63) / 64 long; page @first + n is
 *		bit n % 64 of word n / 64
 * @dirty:	out: pages reported; with an error, those delivered before it
 *
 * Bits are set, never cleared: the caller hands in zeroed memory, and the kernel touches only
 * words in which something is dirty. On EFAULT nothing is lost: what could not be delivered is
 * still dirty. Cost is in proportion to what is dirty, not to the range.
 *
 * EINVAL: not tracked, range, alignment; EOPNOTSUPP: flags; EPERM: not the tracking file;
 * EFAULT: @bitmap; EINTR: killed.
 */
struct lmtrack_dirty_get {
	__u32 size;
	__u32 flags;
	__aligned_u64 first;
	__aligned_u64 pages;
	__aligned_u64 bitmap;
	__aligned_u64 dirty;
};

#define LMTRACK_DIRTY_GET	_IO(LMTRACK_IOC_TYPE, 0x13)

#define LMTRACK_DIRTY_CLEAR	(1U << 0)

/**
 * struct lmtrack_region_stats - LMTRACK_REGION_STATS, on a region
 * @size:	sizeof(struct lmtrack_region_stats)
 * @flags:	zero
 * @resident_pages: pages that exist now
 * @chunks:	chunks for which tracking memory exists now
 * @kernel_bytes: memory held for this region beside its pages, as far as the module knows
 * @write_faults: write faults noticed (none while idle)
 * @dirtied_pages: clean pages that became dirty
 * @harvests:	DIRTY_GET with LMTRACK_DIRTY_CLEAR
 * @harvested_pages: pages cleared by them and by streams
 * @repinned_pages: pages that stayed dirty in a harvest because they were held for I/O
 * @mappers:	processes that map the region now
 * @fault_ns:	time spent in noticing write faults, waiting for a harvest of the page included;
 *		stuns are not in it
 *
 * Counters grow from the creation of the region.
 */
struct lmtrack_region_stats {
	__u32 size;
	__u32 flags;
	__aligned_u64 resident_pages;
	__aligned_u64 chunks;
	__aligned_u64 kernel_bytes;
	__aligned_u64 write_faults;
	__aligned_u64 dirtied_pages;
	__aligned_u64 harvests;
	__aligned_u64 harvested_pages;
	__aligned_u64 repinned_pages;
	__aligned_u64 mappers;
	__aligned_u64 fault_ns;
};

#define LMTRACK_REGION_STATS	_IO(LMTRACK_IOC_TYPE, 0x14)

#define LMTRACK_STUN_RATE_MAX		1000000000ULL	/* pages per second */
#define LMTRACK_STUN_BURST_MAX		0xffffffffULL	/* pages */
#define LMTRACK_STUN_DELAY_DEFAULT_US	10000
#define LMTRACK_STUN_DELAY_MAX_US	100000

/**
 * struct lmtrack_stun_set - LMTRACK_STUN_SET, on the region file that started tracking
 * @size:	sizeof(struct lmtrack_stun_set)
 * @flags:	zero
 * @rate:	in: pages per second that may become dirty, at most LMTRACK_STUN_RATE_MAX;
 *		0: no ceiling. out: the rate in effect
 * @burst:	pages that may become dirty at once after a time with fewer, at most
 *		LMTRACK_STUN_BURST_MAX; 0: what @rate allows in 10 ms, at least 1
 * @floor:	a @rate that is not 0 is raised to this one, so that a mistake of whoever
 *		computes it cannot stop the guest
 * @max_delay_us: the longest that a thread is delayed at once, at most
 *		LMTRACK_STUN_DELAY_MAX_US; 0: LMTRACK_STUN_DELAY_DEFAULT_US
 * @reserved:	zero
 *
 * Holds the rate at which clean pages become dirty below a ceiling. The thread that makes one
 * dirty in excess of it sleeps on its way back to user mode or into the guest, where it holds
 * no lock. Who reads, or writes pages that are dirty already, is not delayed; nor are threads
 * of the kernel, whose pages count all the same.
 *
 * What is in excess is never carried further than @max_delay_us. So n threads that do nothing
 * but dirty pages always get n pages per @max_delay_us: at 10 ms, 100 pages per second each.
 * A lower ceiling, or a low one with many writers, needs a longer delay to hold.
 *
 * May be called again at any time. Every call, and the end of tracking, wakes all who sleep
 * at once; who was woken goes on. A setting begins without a burst to spend. The ceiling also
 * ends when a stream that was given this file fails, is cancelled or closed.
 *
 * EINVAL: not tracked, or a value out of range; EPERM: another open file started tracking;
 * EINTR: killed.
 */
struct lmtrack_stun_set {
	__u32 size;
	__u32 flags;
	__aligned_u64 rate;
	__aligned_u64 burst;
	__aligned_u64 floor;
	__u32 max_delay_us;
	__u32 reserved;
};

#define LMTRACK_STUN_SET	_IO(LMTRACK_IOC_TYPE, 0x15)

#define LMTRACK_COMM_MAX	16
#define LMTRACK_STUN_THREADS	16
#define LMTRACK_STUN_BUCKETS	24

/**
 * struct lmtrack_stun_thread - what tracking has cost one thread
 * @pid:	its id in the caller's pid namespace, also when it is gone; 0: not visible there
 * @reserved:	zero
 * @comm:	its name, NUL-terminated
 * @write_faults: write faults of this region
 * @fault_ns:	time spent in them, see struct lmtrack_region_stats
 * @stuns:	times it was delayed
 * @stun_ns:	for how long altogether
 * @longest_ns:	longest of them
 */
struct lmtrack_stun_thread {
	__u32 pid;
	__u32 reserved;
	char comm[LMTRACK_COMM_MAX];
	__aligned_u64 write_faults;
	__aligned_u64 fault_ns;
	__aligned_u64 stuns;
	__aligned_u64 stun_ns;
	__aligned_u64 longest_ns;
};

/**
 * struct lmtrack_stun_stats - LMTRACK_STUN_STATS, on a region
 * @size:	sizeof(struct lmtrack_stun_stats)
 * @flags:	zero
 * @rate:	out: pages per second in effect, 0: no ceiling
 * @stuns:	out: times a thread was delayed
 * @total_ns:	out: for how long altogether
 * @longest_ns:	out: longest of them
 * @requested_ns: out: for how long they should have been; more than @total_ns where threads
 *		were woken early, less where the timer was late
 * @failed:	out: delays that were due and not made: no memory to remember the thread, or
 *		too many of them
 * @histogram:	out: stuns by length: bucket 0 below 1 microsecond, bucket n from 2^(n-1) to
 *		below 2^n microseconds, the last one all that are longer
 * @threads_known: out: threads that have written, each with an account of its own. Accounts
 *		of threads that are gone are given to new ones when there are too many
 * @threads:	address of an array of struct lmtrack_stun_thread, or 0
 * @thread_count: in: its length; out: entries written, LMTRACK_STUN_THREADS at most: the
 *		threads that lost most time in faults and stuns, the worst first
 * @reserved:	zero
 *
 * All of it since tracking last began; it can be read until tracking begins anew.
 *
 * EINVAL: @reserved, or @threads without @thread_count or the other way round; EFAULT: @threads;
 * ENOMEM.
 */
struct lmtrack_stun_stats {
	__u32 size;
	__u32 flags;
	__aligned_u64 rate;
	__aligned_u64 stuns;
	__aligned_u64 total_ns;
	__aligned_u64 longest_ns;
	__aligned_u64 requested_ns;
	__aligned_u64 failed;
	__aligned_u64 histogram[LMTRACK_STUN_BUCKETS];
	__aligned_u64 threads_known;
	__aligned_u64 threads;
	__u32 thread_count;
	__u32 reserved;
};

#define LMTRACK_STUN_STATS	_IO(LMTRACK_IOC_TYPE, 0x16)

/**
 * struct lmtrack_hold_set - LMTRACK_HOLD_SET, on the region file that started tracking
 * @size:	sizeof(struct lmtrack_hold_set)
 * @flags:	LMTRACK_HOLD_CLEAR_ALL: before anything else, hold no page of the region
 * @first:	first page of the range, a multiple of 64
 * @pages:	length of the range in pages; @first + @pages within the region. 0 only with
 *		LMTRACK_HOLD_CLEAR_ALL: nothing else is to be done
 * @bitmap:	address of an array of __u64, (@pages + 63) / 64 long; page @first + n is
 *		bit n % 64 of word n / 64. Set: the page is held from now on; clear: it is not
 * @held:	out: pages of the region that are held now
 *
 * A held page that is dirty is left out of rounds: it stays dirty and writable, and writing it
 * costs nothing. LMTRACK_SEND_HELD and LMTRACK_SEND_ALL send it all the same. DIRTY_GET knows
 * nothing of it: a page that is held is reported, and cleared if so asked.
 *
 * Bits of chunks in which no page was ever touched are ignored. The end of tracking forgets
 * what was held. On error, part of the range may have been set.
 *
 * EINVAL: not tracked, range, alignment; EPERM: not the tracking file; EFAULT: @bitmap; ENOMEM;
 * EINTR: killed.
 */
struct lmtrack_hold_set {
	__u32 size;
	__u32 flags;
	__aligned_u64 first;
	__aligned_u64 pages;
	__aligned_u64 bitmap;
	__aligned_u64 held;
};

#define LMTRACK_HOLD_SET	_IO(LMTRACK_IOC_TYPE, 0x17)

#define LMTRACK_HOLD_CLEAR_ALL	(1U << 0)

/**
 * struct lmtrack_stream_add_region - LMTRACK_STREAM_ADD_REGION, on a stream
 * @size:	sizeof(struct lmtrack_stream_add_region)
 * @flags:	zero
 * @fd:		a region, the open file that tracks it or will
 * @index:	its number in the frames, below LMTRACK_REGIONS_MAX
 *
 * The stream keeps the region's file open. Before the first SEND only.
 *
 * EBADF: no such fd; EINVAL: not a region, index; EEXIST: the region or the index is in the
 * stream already; EBUSY: a round was already sent.
 */
struct lmtrack_stream_add_region {
	__u32 size;
	__u32 flags;
	__s32 fd;
	__u32 index;
};

#define LMTRACK_STREAM_ADD_REGION	_IO(LMTRACK_IOC_TYPE, 0x20)

/**
 * struct lmtrack_stream_add_channel - LMTRACK_STREAM_ADD_CHANNEL, on a stream
 * @size:	sizeof(struct lmtrack_stream_add_channel)
 * @flags:	LMTRACK_CHANNEL_REPLACE: in place of a channel that was dropped
 * @fd:		a connected TCP socket; the stream is its only writer from now on
 * @reserved:	zero
 * @cpumask:	address of a CPU mask for the channel's thread, or 0: the CPUs of the first
 *		region's node
 * @cpumask_bytes: its length; 0 when @cpumask is
 * @channel:	out: the channel's number, counted from 0; with LMTRACK_CHANNEL_REPLACE in: that of
 *		the channel that was dropped
 *
 * Before the first SEND, or with LMTRACK_CHANNEL_REPLACE between two rounds. The new channel
 * counts its frames from 0; its statistics go on.
 *
 * EBADF, ENOTSOCK, EPROTOTYPE (no TCP socket), ENOTCONN, EEXIST (the socket is in this stream
 * already; the channel was not dropped), ENOSPC (LMTRACK_CHANNELS_MAX in this stream, or the
 * module's channels_max in all streams), EBUSY (a round was already sent, or is being sent),
 * EPIPE (cancelled), EINVAL (mask empty, or without an online CPU; no such channel), EFAULT,
 * ENOMEM.
 */
struct lmtrack_stream_add_channel {
	__u32 size;
	__u32 flags;
	__s32 fd;
	__u32 reserved;
	__aligned_u64 cpumask;
	__u32 cpumask_bytes;
	__u32 channel;
};

#define LMTRACK_STREAM_ADD_CHANNEL	_IO(LMTRACK_IOC_TYPE, 0x21)

#define LMTRACK_CHANNEL_REPLACE	(1U << 0)

/**
 * enum lmtrack_send_what - what a round carries
 * @LMTRACK_SEND_ALL:	every resident page; holes are neither touched nor sent
 * @LMTRACK_SEND_DIRTY:	what was dirtied since it was last harvested; pages punched out
 *			travel as zero; held pages stay behind
 */
enum lmtrack_send_what {
	LMTRACK_SEND_ALL = 0,
	LMTRACK_SEND_DIRTY = 1,
};

/**
 * struct lmtrack_stream_send - LMTRACK_STREAM_SEND, on a stream
 * @size:	sizeof(struct lmtrack_stream_send)
 * @flags:	LMTRACK_SEND_HELD: send dirty pages that are held, too
 * @round:	the round's number in the frames; grows from one SEND to the next
 * @what:	enum lmtrack_send_what
 *
 * Returns at once; poll() reports POLLIN when the round has been handed to the network whole,
 * or has failed, POLLPRI while a channel is lost that was not dropped, and POLLERR when the
 * stream has failed or was cancelled. Pages are harvested (cleared, protected again) chunk by
 * chunk just before they are sent. All regions must be tracked by the files they were added by.
 *
 * A round sends a chunk over whichever channel comes for it first, and another round over another.
 * So that a newer copy of a page never overtakes an older one, begin a round when the peer has
 * stored all of the last.
 *
 * EBUSY: a round is being sent; EINVAL: no channel, no region, a region that is not tracked,
 * @round or @what; EPIPE: the stream failed or was cancelled before, a channel is lost and was
 * not dropped, or no channel is left.
 */
struct lmtrack_stream_send {
	__u32 size;
	__u32 flags;
	__u32 round;
	__u32 what;
};

#define LMTRACK_STREAM_SEND	_IO(LMTRACK_IOC_TYPE, 0x22)

#define LMTRACK_SEND_HELD	(1U << 0)

/**
 * struct lmtrack_stream_wait - LMTRACK_STREAM_WAIT, on a stream
 * @size:	sizeof(struct lmtrack_stream_wait)
 * @flags:	zero
 * @timeout_ms:	longest wait in milliseconds, or -1
 * @round:	out: the last round sent
 * @error:	out: 0, or the positive errno that ended the round, or by which a channel was lost
 * @channel:	out: where the error happened, or -1
 * @duration_ns: out: from SEND to the end of the round
 * @pages:	out: pages harvested in the round
 * @data_pages:	out: of them, sent as data
 * @zero_pages:	out: of them, sent as zero (holes and zeroes)
 * @bytes:	out: bytes handed to the network, headers included
 * @held_pages:	out: dirty pages that were left behind because they are held
 * @harvest_ns:	out: time that channels spent in looking for chunks, harvesting them and looking
 *		for pages of zeroes, summed over channels
 * @send_ns:	out: time that they spent in making frames and handing them to the network, waiting
 *		for room included, likewise
 * @wire_ns:	out: of @duration_ns, the time during which the wire was busy: at least one channel
 *		sent, or its connection had bytes that could not leave yet (a TCP segment or more
 *		that was taken and not sent)
 * @lost:	out, also with ETIMEDOUT: bit n: channel n is lost, and was not dropped
 *
 * A channel that is lost does not end the round: it goes on over the others, and only what the
 * lost one has not sent stays behind. LMTRACK_STREAM_DROP_CHANNEL is what follows. When @lost has
 * the bit of @channel, @error says how it was lost; any other error has ended the stream.
 *
 * @harvest_ns and @send_ns are times of threads: together they are up to @duration_ns for each
 * channel. @wire_ns is a time of the clock, @duration_ns at most, however many channels there
 * are. So the rate of the wire is
 *
 *	@bytes / @wire_ns
 *
 * and @duration_ns - @wire_ns is what the round took longer because the wire had to wait
 * for a harvest. What the network has taken and not delivered when the round ends is in
 * neither: who knows when the peer has all of it, T after SEND, takes for the rate
 *
 *	@bytes / (T - (@duration_ns - @wire_ns))
 *
 * A module that is older than @harvest_ns and what follows leaves it zero; @wire_ns is never zero
 * otherwise, as the end of a round has to be sent.
 *
 * EINVAL: no round was ever sent; ETIMEDOUT; EINTR.
 */
struct lmtrack_stream_wait {
	__u32 size;
	__u32 flags;
	__s32 timeout_ms;
	__u32 round;
	__u32 error;
	__s32 channel;
	__aligned_u64 duration_ns;
	__aligned_u64 pages;
	__aligned_u64 data_pages;
	__aligned_u64 zero_pages;
	__aligned_u64 bytes;
	__aligned_u64 held_pages;
	__aligned_u64 harvest_ns;
	__aligned_u64 send_ns;
	__aligned_u64 wire_ns;
	__aligned_u64 lost;
};

#define LMTRACK_STREAM_WAIT	_IO(LMTRACK_IOC_TYPE, 0x23)

/**
 * struct lmtrack_stream_cancel - LMTRACK_STREAM_CANCEL, on a stream
 * @size:	sizeof(struct lmtrack_stream_cancel)
 * @flags:	zero
 *
 * Has every channel shut down, without waiting for it, which ends the round with ECANCELED. The
 * stream cannot send again.
 * Pages harvested but not sent are no longer dirty: whoever goes on after this begins with
 * LMTRACK_SEND_ALL on a new stream. Harmless when nothing is being sent. Ends the ceiling of
 * LMTRACK_STUN_SET on its regions, as does any other end of the stream.
 */
struct lmtrack_stream_cancel {
	__u32 size;
	__u32 flags;
};

#define LMTRACK_STREAM_CANCEL	_IO(LMTRACK_IOC_TYPE, 0x24)

/**
 * struct lmtrack_channel_stats - LMTRACK_CHANNEL_STATS, on a stream
 * @size:	sizeof(struct lmtrack_channel_stats)
 * @flags:	zero
 * @channel:	in: the channel's number
 * @reserved:	zero
 * @frames:	frames sent
 * @data_pages:	pages sent as data
 * @zero_pages:	pages sent as zero
 * @zero_extents: extents they were sent in
 * @zerocopy_bytes: payload bytes the network took by reference
 * @copied_bytes: payload bytes it copied (no scatter-gather, or TLS on the socket)
 * @header_bytes: frame headers and extent tables
 * @blocked_ns:	time spent in sending, most of it waiting for room
 * @writes:	RDMA writes posted; 0 on TCP
 * @gathered:	of them, those that carried more than one page
 *
 * A module that is older than the last two fields leaves them zero.
 *
 * EINVAL: no such channel.
 */
struct lmtrack_channel_stats {
	__u32 size;
	__u32 flags;
	__u32 channel;
	__u32 reserved;
	__aligned_u64 frames;
	__aligned_u64 data_pages;
	__aligned_u64 zero_pages;
	__aligned_u64 zero_extents;
	__aligned_u64 zerocopy_bytes;
	__aligned_u64 copied_bytes;
	__aligned_u64 header_bytes;
	__aligned_u64 blocked_ns;
	__aligned_u64 writes;
	__aligned_u64 gathered;
};

#define LMTRACK_CHANNEL_STATS	_IO(LMTRACK_IOC_TYPE, 0x25)

/**
 * struct lmtrack_stream_drop_channel - LMTRACK_STREAM_DROP_CHANNEL, on a stream
 * @size:	sizeof(struct lmtrack_stream_drop_channel)
 * @flags:	zero
 * @channel:	the channel's number
 * @error:	out: the positive errno by which it was lost; ECANCELED: it was not, until now
 * @pages:	out: pages that were made dirty again
 *
 * Shuts the channel down, waits until its thread has ended, and lets go of the socket. At any
 * time, lost or not. What the channel has sent in the last round begun, pages punched out
 * included, is dirty again; what it had not got to still is. So nothing is forgotten if the peer
 * had all of the rounds before; but it may have some of this one, and may still get it from the
 * network: before the pages are sent again, over another channel, it has to close its end.
 *
 * The other channels go on with the round. From the next on they carry the chunks of all. Of a
 * round of LMTRACK_SEND_ALL that has lost a channel, pages that were clean may be missing.
 * When all channels were dropped, LMTRACK_CHANNEL_REPLACE has to come before the next SEND.
 *
 * EINVAL: no such channel; EALREADY: it was dropped before; EPIPE: the stream failed or was
 * cancelled; EINTR: killed, and the channel is lost but not dropped.
 */
struct lmtrack_stream_drop_channel {
	__u32 size;
	__u32 flags;
	__u32 channel;
	__u32 error;
	__aligned_u64 pages;
};

#define LMTRACK_STREAM_DROP_CHANNEL	_IO(LMTRACK_IOC_TYPE, 0x26)

#define LMTRACK_RDMA_ADDRESS_MAX	32	/* a struct sockaddr_in or sockaddr_in6 */
#define LMTRACK_RDMA_TOKEN_MAX		56	/* what RDMA's connection manager carries */
#define LMTRACK_RDMA_TIMEOUT_MAX_MS	60000

/**
 * struct lmtrack_stream_add_rdma - LMTRACK_STREAM_ADD_RDMA, on a stream
 * @size:	sizeof(struct lmtrack_stream_add_rdma)
 * @flags:	LMTRACK_CHANNEL_REPLACE, as in struct lmtrack_stream_add_channel
 * @remote:	struct sockaddr_in or sockaddr_in6 of the peer, who listens with RDMA's
 *		connection manager; the rest zero
 * @local:	the same of this side, or all zero: as the routes say
 * @token:	handed to the peer with the request for a connection: who this is
 * @token_bytes: of @token, LMTRACK_RDMA_TOKEN_MAX at most
 * @timeout_ms:	longest time that connecting may take, 1 to LMTRACK_RDMA_TIMEOUT_MAX_MS
 * @window_pages: length of a window, see LMTRACK_STREAM_RDMA_WINDOW: a multiple of
 *		LMTRACK_CHUNK_PAGES
 * @channel:	as in struct lmtrack_stream_add_channel
 * @cpumask:	as in struct lmtrack_stream_add_channel
 * @cpumask_bytes: same
 * @reserved:	zero
 *
 * Connects, from the caller's network namespace, and returns when the peer has accepted. Pages
 * are written into the peer's windows by RDMA, straight from the region; nothing is registered
 * or pinned for it on this side. Frames arrive as messages, see lmtrack_wire.h. A stream may
 * have channels of both kinds.
 *
 * Pages of a round are written while the peer may still have messages of the last to deal with: a
 * ZERO frame that it acts on late would wipe newer data out. So whoever has a channel of this
 * kind begins a round only when the peer says that it has dealt with all of the last.
 *
 * When it may be called is as with LMTRACK_STREAM_ADD_CHANNEL; a channel may replace one of the
 * other kind. Needs lmtrack_rdma.ko, which is loaded on demand.
 *
 * EPROTONOSUPPORT: it cannot be loaded; EINVAL: an address, length, time-out or mask;
 * EHOSTUNREACH, ENETUNREACH, ENODEV, EADDRNOTAVAIL: no RDMA device leads there; ECONNREFUSED:
 * nobody listens; EACCES: the peer refused the token; ETIMEDOUT; EOPNOTSUPP: the device's queues
 * are too short; ENOSPC, EBUSY, EPIPE, EFAULT, ENOMEM, EINTR: as with
 * LMTRACK_STREAM_ADD_CHANNEL.
 */
struct lmtrack_stream_add_rdma {
	__u32 size;
	__u32 flags;
	__u8 remote[LMTRACK_RDMA_ADDRESS_MAX];
	__u8 local[LMTRACK_RDMA_ADDRESS_MAX];
	__u8 token[LMTRACK_RDMA_TOKEN_MAX];
	__u32 token_bytes;
	__u32 timeout_ms;
	__u32 window_pages;
	__u32 channel;
	__aligned_u64 cpumask;
	__u32 cpumask_bytes;
	__u32 reserved;
};

#define LMTRACK_STREAM_ADD_RDMA	_IO(LMTRACK_IOC_TYPE, 0x27)

/**
 * struct lmtrack_stream_rdma_window - LMTRACK_STREAM_RDMA_WINDOW, on a stream
 * @size:	sizeof(struct lmtrack_stream_rdma_window)
 * @flags:	zero
 * @channel:	an RDMA channel's number
 * @region:	the region's index
 * @first:	the window's first page, a multiple of the channel's window_pages. The window has
 *		so many pages, or as many as the region has from there on
 * @address:	of the first page, at the peer
 * @rkey:	the peer's key for that memory
 * @reserved:	zero
 *
 * Says where pages of the region are to be written at the peer. The regions have been added.
 * May be called at any time; a window cannot be changed. A channel that comes to pages without a
 * window waits for one: then poll() reports POLLPRI, and LMTRACK_STREAM_RDMA_WANTED says
 * which. It waits until the window is set, the connection is lost or the stream ends.
 *
 * EINVAL: no such channel or region, @first, @address, @reserved; EOPNOTSUPP: the channel is not
 * one of RDMA; EEXIST: the window was set before; ENOMEM; EINTR: killed.
 */
struct lmtrack_stream_rdma_window {
	__u32 size;
	__u32 flags;
	__u32 channel;
	__u32 region;
	__aligned_u64 first;
	__aligned_u64 address;
	__u32 rkey;
	__u32 reserved;
};

#define LMTRACK_STREAM_RDMA_WINDOW	_IO(LMTRACK_IOC_TYPE, 0x28)

/**
 * struct lmtrack_stream_rdma_wanted - LMTRACK_STREAM_RDMA_WANTED, on a stream
 * @size:	sizeof(struct lmtrack_stream_rdma_wanted)
 * @flags:	zero
 * @channel:	in: a channel's number
 * @region:	out: the region's index
 * @first:	out: first page of the window the channel waits for
 * @pages:	out: its length
 *
 * EINVAL: no such channel; EAGAIN: it waits for no window; EINTR: killed.
 */
struct lmtrack_stream_rdma_wanted {
	__u32 size;
	__u32 flags;
	__u32 channel;
	__u32 region;
	__aligned_u64 first;
	__aligned_u64 pages;
};

#define LMTRACK_STREAM_RDMA_WANTED	_IO(LMTRACK_IOC_TYPE, 0x29)

#define LMTRACK_STREAM_RATE_MIN	65536ULL		/* bytes per second */
#define LMTRACK_STREAM_RATE_MAX	1000000000000ULL

/**
 * struct lmtrack_stream_rate_set - LMTRACK_STREAM_RATE_SET, on a stream
 * @size:	sizeof(struct lmtrack_stream_rate_set)
 * @flags:	zero
 * @rate:	bytes per second, LMTRACK_STREAM_RATE_MIN to LMTRACK_STREAM_RATE_MAX; 0: no cap
 *
 * All channels together, of either kind, hand no more than @rate to the network: frames, tables
 * and pages, not what the network adds. It holds from now on, also for a round under way: who
 * waits for an earlier setting goes by this one. A frame that the network is taking goes out
 * whole: that is one chunk of each channel at most, and only where the earlier setting was higher.
 *
 * Within any second no more than what takes 10 ms at @rate and one frame is sent above it, that
 * is 1.5 % from about 1 MB/s on; what was not sent is not made up for,
 * but for 10 ms, which evens out late timers. DATA frames are cut to what takes 5 ms at @rate, or
 * to one page. The time that channels wait is a part of send_ns and wire_ns (struct
 * lmtrack_stream_wait): the wire is as fast as the cap.
 *
 * At any time; ends with the stream. EINVAL: @rate.
 */
struct lmtrack_stream_rate_set {
	__u32 size;
	__u32 flags;
	__aligned_u64 rate;
};

#define LMTRACK_STREAM_RATE_SET	_IO(LMTRACK_IOC_TYPE, 0x2a)

/**
 * struct lmtrack_stream_width - LMTRACK_STREAM_WIDTH, on a stream
 * @size:	sizeof(struct lmtrack_stream_width)
 * @flags:	zero
 * @channels:	1 or more
 * @reserved:	zero
 *
 * At any time: so many channels carry chunks from now on, also of the round that is being sent,
 * those with the lowest numbers that are there. The others wait, and end each round with nothing;
 * in place of one that is lost in a round another carries the rest of it. All that are there, until
 * this was said, and if they are fewer.
 *
 * EINVAL: @channels, @reserved; EINTR: killed.
 */
struct lmtrack_stream_width {
	__u32 size;
	__u32 flags;
	__u32 channels;
	__u32 reserved;
};

#define LMTRACK_STREAM_WIDTH	_IO(LMTRACK_IOC_TYPE, 0x2b)

#endif /* _UAPI_LINUX_LMTRACK_H */
