// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: a ceiling on how fast pages become dirty, and what tracking costs each thread.
 *
 * The ceiling is a token bucket in the form of one time stamp, stun->due: when the pages that
 * are dirty now would have been, had they come one by one at the rate. A page that becomes
 * dirty moves it on by one interval; who finds it further ahead than the burst allows has to
 * wait until it is not. That the wait has an absolute end makes up for timers that are late:
 * meanwhile the bucket fills.
 *
 * Nobody sleeps in the fault, where the mmap_lock and the folio lock are held. The thread
 * queues a task_work to itself, which the kernel runs without any lock before the thread returns
 * to user mode or enters the guest. A thread that takes several faults on the way (read(2)
 * into the region) has one work, whose end moves.
 *
 * A thread sleeps between its fault and the write itself. Should the page be harvested
 * meanwhile, the write faults once more, and counts once more: the page has to be sent again.
 * But a thread is delayed at most twice for the same page, or it would not get on while harvests
 * come faster than delays end. An instruction may need several pages to be writable at once
 * (one that lies across two, and in a guest the tables that lead to them), each of which faults
 * in its turn, while those before are harvested again: so a thread's last pages are remembered,
 * for a time in which the last of them has had its delays, too.
 *
 * A setting is read without a lock, by its fields. A new one is written under harvest_lock; the
 * generation is raised last and read first, so a wait that was worked out from a mixture belongs
 * to an old generation and ends before it begins.
 *
 * Lifetimes: TRACK_START gives the region a new struct lmtrack_stun, so that the figures of the
 * last tracking can be read until then. The region holds a reference and each queued work
 * another; the structure holds the module. Readers of region->stun and of the threads' hash
 * table are under RCU. A thread's account lives as long as the structure, unless the thread is
 * gone and its place needed; an account whose work is queued stays. The last instructions of a
 * task_work run after it has let go of the module: lmtrack_exit() waits for those.
 *
 * Locks: region->harvest_lock for settings. stun->threads_lock (spin, innermost) for changes of
 * the hash table. A thread's account is written by that thread only.
 */
#include <linux/hashtable.h>
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/refcount.h>
#include <linux/sched/clock.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/task_work.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "compat.h"
#include "lmtrack.h"
#include "trace.h"

#define STUN_HASH_BITS		7
/* Enough for the largest guest's processors and their helpers. */
#define STUN_THREADS_MAX	1024
/*
 * Pages that one instruction of a guest may need: two of data, and up to four levels of tables
 * that lead to its code and to each of them.
 */
#define STUN_PAGES		16
/* Delays for the same page, until it has faulted so often that all these have had theirs. */
#define STUN_WAITS_MAX		2
#define STUN_WAITS_CYCLE	(2 * STUN_WAITS_MAX * STUN_PAGES)
/* How late a wait may end for the sake of one timer interrupt less. */
#define STUN_SLACK_NS		(10 * NSEC_PER_USEC)

/**
 * struct stun_thread - the account of a thread, and its wait
 * @node:	in stun->threads
 * @rcu:	for its end
 * @stun:	what it is of
 * @pid:	the thread; holds a reference
 * @work:	its wait
 * @queued:	@work is queued or runs; @stun is referenced for it
 * @generation:	of the setting that @deadline follows from
 * @deadline:	when the wait ends, on the monotonic clock
 * @pages:	the last ones it was to wait for; without the high bits, as two that are taken for
 *		one cost no more than a delay
 * @waits:	how often for each, modulo STUN_WAITS_CYCLE; 0: no such page
 * @oldest:	the one to be forgotten next
 * @figures:	for the user, without the pid
 */
struct stun_thread {
	struct hlist_node node;
	struct rcu_head rcu;
	struct lmtrack_stun *stun;
	struct pid *pid;
	struct callback_head work;
	bool queued;
	u32 generation;
	s64 deadline;
	u32 pages[STUN_PAGES];
	u8 waits[STUN_PAGES];
	u8 oldest;
	struct lmtrack_stun_thread figures;
};

/**
 * struct lmtrack_stun - ceiling and accounts of one tracking of a region
 * @refs:	the region's and one per queued work
 * @rcu:	for its end
 * @region:	id of the region
 * @rate:	as set, under harvest_lock
 * @interval:	nanoseconds per page; 0: no ceiling
 * @tolerance:	how far @due may be ahead of the clock: the burst
 * @max_delay:	longest wait
 * @generation:	of the setting
 * @due:	see above
 * @sleepers:	those who wait, to be woken by a new setting
 * @stuns:	as in struct lmtrack_stun_stats, like the next ones
 * @total:	nanoseconds
 * @longest:	nanoseconds
 * @requested:	nanoseconds
 * @failed:	delays not made
 * @histogram:	by length
 * @threads_lock: guards changes of @threads, and what follows
 * @threads:	struct stun_thread by struct pid
 * @thread_count: entries
 * @full_until:	jiffies until which it is not worth looking for a thread that is gone
 */
struct lmtrack_stun {
	refcount_t refs;
	struct rcu_head rcu;
	u64 region;

	u64 rate;
	u64 interval;
	u64 tolerance;
	u64 max_delay;
	u32 generation;
	atomic64_t due;
	wait_queue_head_t sleepers;

	atomic64_t stuns;
	atomic64_t total;
	atomic64_t longest;
	atomic64_t requested;
	atomic64_t failed;
	atomic64_t histogram[LMTRACK_STUN_BUCKETS];

	spinlock_t threads_lock;	/* threads, thread_count, full_until */
	DECLARE_HASHTABLE(threads, STUN_HASH_BITS);
	unsigned int thread_count;
	unsigned long full_until;
};

/* ---- Lifetime ---- */

/* For the next tracking of a region */
struct lmtrack_stun *lmtrack_stun_alloc(struct lmtrack_region *region)
{
	struct lmtrack_stun *stun = kzalloc(sizeof(*stun), GFP_KERNEL_ACCOUNT);

	if (!stun)
		return NULL;
	__module_get(THIS_MODULE);
	refcount_set(&stun->refs, 1);
	stun->region = region->id;
	init_waitqueue_head(&stun->sleepers);
	spin_lock_init(&stun->threads_lock);
	hash_init(stun->threads);
	return stun;
}

static void stun_free(struct rcu_head *rcu)
{
	struct lmtrack_stun *stun = container_of(rcu, struct lmtrack_stun, rcu);
	struct stun_thread *thread;
	struct hlist_node *next;
	int bucket;

	hash_for_each_safe(stun->threads, bucket, next, thread, node) {
		put_pid(thread->pid);
		kfree(thread);
	}
	kfree(stun);
}

/* Let go of it; NULL is fine */
void lmtrack_stun_put(struct lmtrack_stun *stun)
{
	if (!stun || !refcount_dec_and_test(&stun->refs))
		return;
	call_rcu(&stun->rcu, stun_free);
	module_put(THIS_MODULE);
}

/* ---- The wait ---- */

static void longest_note(atomic64_t *longest, s64 ns)
{
	s64 old = atomic64_read(longest);

	while (ns > old && !atomic64_try_cmpxchg(longest, &old, ns))
		;
}

static void stun_account(struct stun_thread *thread, s64 requested, s64 slept)
{
	struct lmtrack_stun_thread *figures = &thread->figures;
	unsigned int bucket = fls64(div_u64(slept, NSEC_PER_USEC));
	struct lmtrack_stun *stun = thread->stun;

	atomic64_inc(&stun->stuns);
	atomic64_add(slept, &stun->total);
	atomic64_add(requested, &stun->requested);
	longest_note(&stun->longest, slept);
	atomic64_inc(&stun->histogram[min(bucket, LMTRACK_STUN_BUCKETS - 1U)]);

	WRITE_ONCE(figures->stuns, figures->stuns + 1);
	WRITE_ONCE(figures->stun_ns, figures->stun_ns + slept);
	WRITE_ONCE(figures->longest_ns, max_t(u64, figures->longest_ns, slept));
	trace_lmtrack_stun(stun->region, requested, slept);
}

/* Must this thread go on whatever time it is? */
static bool stun_over(const struct stun_thread *thread)
{
	return READ_ONCE(thread->stun->generation) != thread->generation ||
	       fatal_signal_pending(current) || (current->flags & PF_EXITING);
}

/* On the way to user mode or into the guest, without locks. */
static void stun_work(struct callback_head *work)
{
	struct stun_thread *thread = container_of(work, struct stun_thread, work);
	struct lmtrack_stun *stun = thread->stun;
	s64 begin = ktime_get_ns();
	s64 requested = thread->deadline - begin;
	ktime_t deadline = ns_to_ktime(thread->deadline);
	DEFINE_WAIT(wait);

	if (requested > 0 && !stun_over(thread)) {
		/* Asleep like this it neither counts as load nor looks hung. */
		for (;;) {
			prepare_to_wait(&stun->sleepers, &wait, TASK_KILLABLE | TASK_NOLOAD);
			if (stun_over(thread) ||
			    !schedule_hrtimeout_range(&deadline, STUN_SLACK_NS,
						      HRTIMER_MODE_ABS))
				break;
		}
		finish_wait(&stun->sleepers, &wait);
		stun_account(thread, requested, ktime_get_ns() - begin);
	}
	/* Nothing of the account is touched after this: see thread_make_room(). */
	smp_store_release(&thread->queued, false);
	lmtrack_stun_put(stun);
}

static void stun_queue(struct stun_thread *thread, u32 generation, s64 deadline)
{
	struct lmtrack_stun *stun = thread->stun;

	/* Threads of the kernel never return to user mode. */
	if (current->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER))
		return;
	thread->generation = generation;
	thread->deadline = deadline;
	if (thread->queued)
		return;
	/* Under RCU alone it may be that of a tracking that was replaced a moment ago. */
	if (!refcount_inc_not_zero(&stun->refs))
		return;
	WRITE_ONCE(thread->queued, true);
	init_task_work(&thread->work, stun_work);
	if (task_work_add(current, &thread->work, TWA_RESUME)) {
		/* It is exiting and has run its last work. */
		WRITE_ONCE(thread->queued, false);
		lmtrack_stun_put(stun);
	}
}

/* It has waited for this page, and the write has not come about for a harvest each time. */
static bool thread_waited_enough(struct stun_thread *thread, pgoff_t page)
{
	unsigned int i;

	for (i = 0; i < STUN_PAGES; i++)
		if (thread->waits[i] && thread->pages[i] == (u32)page)
			break;
	if (i == STUN_PAGES) {
		i = thread->oldest;
		thread->oldest = (i + 1) % STUN_PAGES;
		thread->pages[i] = page;
		thread->waits[i] = 0;
	}
	thread->waits[i] = thread->waits[i] % STUN_WAITS_CYCLE + 1;
	return thread->waits[i] > STUN_WAITS_MAX;
}

/* One more page is dirty: who made it so has to wait, or not. */
static void stun_charge(struct lmtrack_stun *stun, struct stun_thread *thread, pgoff_t page)
{
	/* Pairs with the release in stun_apply(): the setting is this generation's or newer. */
	u32 generation = smp_load_acquire(&stun->generation);
	u64 interval = READ_ONCE(stun->interval);
	s64 tolerance = READ_ONCE(stun->tolerance);
	s64 now = ktime_get_ns();
	s64 limit = now + tolerance + READ_ONCE(stun->max_delay);
	s64 old = atomic64_read(&stun->due);
	s64 due;

	do {
		due = min_t(s64, max(old, now) + interval, limit);
	} while (!atomic64_try_cmpxchg(&stun->due, &old, due));

	if (due - tolerance <= now)
		return;
	if (unlikely(!thread))
		atomic64_inc(&stun->failed);
	else if (!thread_waited_enough(thread, page))
		stun_queue(thread, generation, due - tolerance);
}

/* ---- Accounts ---- */

static struct stun_thread *thread_find(struct lmtrack_stun *stun, const struct pid *pid)
{
	struct stun_thread *thread;

	hash_for_each_possible_rcu(stun->threads, thread, node, (unsigned long)pid)
		if (thread->pid == pid)
			return thread;
	return NULL;
}

static void thread_free(struct rcu_head *rcu)
{
	struct stun_thread *thread = container_of(rcu, struct stun_thread, rcu);

	put_pid(thread->pid);
	kfree(thread);
}

static u64 thread_lost_ns(const struct stun_thread *thread)
{
	return READ_ONCE(thread->figures.fault_ns) + READ_ONCE(thread->figures.stun_ns);
}

/*
 * The table is full: drop the thread that is gone and has the least to tell. A thread that
 * calls exec may trade its pid for another's that goes, while its work is queued.
 */
static bool thread_make_room(struct lmtrack_stun *stun)
{
	struct stun_thread *thread, *least = NULL;
	int bucket;

	lockdep_assert_held(&stun->threads_lock);
	if (time_before(jiffies, stun->full_until))
		return false;
	hash_for_each(stun->threads, bucket, thread, node) {
		/* Pairs with the release in stun_work(). */
		if (pid_task(thread->pid, PIDTYPE_PID) || smp_load_acquire(&thread->queued))
			continue;
		if (!least || thread_lost_ns(thread) < thread_lost_ns(least))
			least = thread;
	}
	if (!least) {
		stun->full_until = jiffies + HZ;
		return false;
	}
	hash_del_rcu(&least->node);
	stun->thread_count--;
	call_rcu(&least->rcu, thread_free);
	return true;
}

/* An account for the current thread. Nobody else makes one for it. */
static struct stun_thread *thread_add(struct lmtrack_stun *stun, struct stun_thread *fresh)
{
	bool room;

	get_task_comm(fresh->figures.comm, current);
	spin_lock(&stun->threads_lock);
	room = stun->thread_count < STUN_THREADS_MAX || thread_make_room(stun);
	if (room) {
		fresh->stun = stun;
		fresh->pid = get_pid(task_pid(current));
		hash_add_rcu(stun->threads, &fresh->node, (unsigned long)fresh->pid);
		stun->thread_count++;
	}
	spin_unlock(&stun->threads_lock);
	if (room)
		return fresh;
	kfree(fresh);
	return NULL;
}

/**
 * lmtrack_stun_fault() - the current thread has taken a write fault
 * @region:	of this region, which is or was tracked
 * @page:	the page
 * @dirtied:	it became dirty by this
 * @began:	local_clock() at the beginning
 *
 * In page_mkwrite. May sleep, but not wait.
 */
void lmtrack_stun_fault(struct lmtrack_region *region, pgoff_t page, bool dirtied, u64 began)
{
	struct stun_thread *thread, *fresh = NULL;
	struct lmtrack_stun *stun;
	s64 ns;

	rcu_read_lock();
	stun = rcu_dereference(region->stun);
	thread = thread_find(stun, task_pid(current));
	if (unlikely(!thread)) {
		rcu_read_unlock();
		fresh = kzalloc(sizeof(*fresh), GFP_KERNEL_ACCOUNT | __GFP_NORETRY |
				__GFP_NOWARN);
		rcu_read_lock();
		/* Tracking may have begun anew meanwhile: there is no account there, either. */
		stun = rcu_dereference(region->stun);
		if (fresh)
			thread = thread_add(stun, fresh);
	}
	/* The clock of another processor may be a little behind. */
	ns = max_t(s64, local_clock() - began, 0);
	this_cpu_add(region->counters->fault_ns, ns);
	if (likely(thread)) {
		WRITE_ONCE(thread->figures.write_faults, thread->figures.write_faults + 1);
		WRITE_ONCE(thread->figures.fault_ns, thread->figures.fault_ns + ns);
	}
	if (dirtied && READ_ONCE(stun->interval))
		stun_charge(stun, thread, page);
	rcu_read_unlock();
}

/* ---- Settings ---- */

static struct lmtrack_stun *stun_of(struct lmtrack_region *region)
{
	return rcu_dereference_protected(region->stun, lockdep_is_held(&region->harvest_lock));
}

/* From here on this holds, and who sleeps for an older setting is awake. */
static void stun_apply(struct lmtrack_stun *stun, u64 rate, u64 burst, u64 max_delay)
{
	u64 interval = rate ? DIV_ROUND_CLOSEST_ULL(NSEC_PER_SEC, rate) : 0;
	u64 tolerance = burst * interval;

	WRITE_ONCE(stun->rate, rate);
	WRITE_ONCE(stun->interval, interval);
	WRITE_ONCE(stun->tolerance, tolerance);
	WRITE_ONCE(stun->max_delay, max_delay);
	/* Who sets it often does not hand out a burst each time. */
	atomic64_set(&stun->due, ktime_get_ns() + tolerance);
	/* Pairs with the acquire in stun_charge(). */
	smp_store_release(&stun->generation, stun->generation + 1);
	wake_up_all(&stun->sleepers);
}

/* No ceiling any more. Under harvest_lock */
void lmtrack_stun_end(struct lmtrack_region *region)
{
	struct lmtrack_stun *stun = stun_of(region);

	if (stun)
		stun_apply(stun, 0, 0, 0);
}

/**
 * lmtrack_stun_release() - a stream has ended
 * @region:	one of its regions
 * @file:	the open file of it that the stream holds
 */
void lmtrack_stun_release(struct lmtrack_region *region, const struct file *file)
{
	mutex_lock(&region->harvest_lock);
	if (region->tracker == file)
		lmtrack_stun_end(region);
	mutex_unlock(&region->harvest_lock);
}

static bool stun_set_valid(const struct lmtrack_stun_set *set)
{
	return !set->reserved && set->rate <= LMTRACK_STUN_RATE_MAX &&
	       set->floor <= LMTRACK_STUN_RATE_MAX && set->burst <= LMTRACK_STUN_BURST_MAX &&
	       set->max_delay_us <= LMTRACK_STUN_DELAY_MAX_US;
}

long lmtrack_stun_set(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_stun_set *set = arg;
	u64 rate = set->rate ? max(set->rate, set->floor) : 0;
	u64 burst = set->burst ?: max_t(u64, rate / 100, 1);
	u64 max_delay_us = set->max_delay_us ?: LMTRACK_STUN_DELAY_DEFAULT_US;
	long ret;

	if (!stun_set_valid(set))
		return -EINVAL;
	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	ret = lmtrack_track_check(region, file);
	if (!ret) {
		stun_apply(stun_of(region), rate, burst, max_delay_us * NSEC_PER_USEC);
		set->rate = rate;
	}
	mutex_unlock(&region->harvest_lock);
	return ret;
}

/* ---- Figures ---- */

/* Memory beside the region's own */
u64 lmtrack_stun_bytes(struct lmtrack_region *region)
{
	struct lmtrack_stun *stun;
	u64 bytes = 0;

	rcu_read_lock();
	stun = rcu_dereference(region->stun);
	if (stun)
		bytes = sizeof(*stun) +
			READ_ONCE(stun->thread_count) * sizeof(struct stun_thread);
	rcu_read_unlock();
	return bytes;
}

static void thread_figures(struct stun_thread *thread, struct lmtrack_stun_thread *out)
{
	struct task_struct *task = pid_task(thread->pid, PIDTYPE_PID);

	/* It may have been given another name after its first fault. */
	if (task)
		get_task_comm(out->comm, task);
	else
		memcpy(out->comm, thread->figures.comm, sizeof(out->comm));
	out->pid = pid_vnr(thread->pid);
	out->write_faults = READ_ONCE(thread->figures.write_faults);
	out->fault_ns = READ_ONCE(thread->figures.fault_ns);
	out->stuns = READ_ONCE(thread->figures.stuns);
	out->stun_ns = READ_ONCE(thread->figures.stun_ns);
	out->longest_ns = READ_ONCE(thread->figures.longest_ns);
}

/* The threads that lost most, the worst first; their number. */
static unsigned int threads_worst(struct lmtrack_stun *stun, struct lmtrack_stun_thread *out,
				  unsigned int room)
{
	struct stun_thread *worst[LMTRACK_STUN_THREADS];
	u64 lost[LMTRACK_STUN_THREADS];
	struct stun_thread *thread;
	unsigned int count = 0, i;
	int bucket;

	hash_for_each_rcu(stun->threads, bucket, thread, node) {
		u64 ns = thread_lost_ns(thread);

		if (count < room)
			count++;
		else if (ns <= lost[count - 1])
			continue;
		for (i = count - 1; i && lost[i - 1] < ns; i--) {
			worst[i] = worst[i - 1];
			lost[i] = lost[i - 1];
		}
		worst[i] = thread;
		lost[i] = ns;
	}
	for (i = 0; i < count; i++)
		thread_figures(worst[i], &out[i]);
	return count;
}

static void stun_figures(struct lmtrack_stun *stun, struct lmtrack_stun_stats *stats)
{
	unsigned int i;

	stats->rate = READ_ONCE(stun->rate);
	stats->stuns = atomic64_read(&stun->stuns);
	stats->total_ns = atomic64_read(&stun->total);
	stats->longest_ns = atomic64_read(&stun->longest);
	stats->requested_ns = atomic64_read(&stun->requested);
	stats->failed = atomic64_read(&stun->failed);
	for (i = 0; i < LMTRACK_STUN_BUCKETS; i++)
		stats->histogram[i] = atomic64_read(&stun->histogram[i]);
	stats->threads_known = READ_ONCE(stun->thread_count);
}

long lmtrack_stun_stats(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_stun_thread *threads = NULL;
	struct lmtrack_stun_stats *stats = arg;
	u64 user = stats->threads;
	unsigned int room = min_t(u32, stats->thread_count, LMTRACK_STUN_THREADS);
	struct lmtrack_stun *stun;
	u32 size = stats->size;
	int ret = 0;

	if (stats->reserved || !user != !room)
		return -EINVAL;
	if (room) {
		threads = kcalloc(room, sizeof(*threads), GFP_KERNEL_ACCOUNT);
		if (!threads)
			return -ENOMEM;
	}
	memset(stats, 0, sizeof(*stats));
	stats->size = size;
	stats->threads = user;
	rcu_read_lock();
	stun = rcu_dereference(region->stun);
	if (stun) {
		stun_figures(stun, stats);
		if (room)
			stats->thread_count = threads_worst(stun, threads, room);
	}
	rcu_read_unlock();
	if (copy_to_user(u64_to_user_ptr(user), threads,
			 stats->thread_count * sizeof(*threads)))
		ret = -EFAULT;
	kfree(threads);
	return ret;
}
