// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: pages that are held back.
 *
 * A page that is dirtied round after round is sent round after round, for nothing: only its
 * last contents count. A held page stays dirty in the rounds it is held from, and writable:
 * writing it costs nothing.
 *
 * The bits are allocated by chunk, with the first held page in it, and freed with the last: a
 * pointer is what a chunk without held pages pays. Chunks that have them carry a mark. A page
 * without a chunk never existed, so is not dirty; it cannot be held.
 *
 * Locks: everything here is under region->harvest_lock, one chunk at a time.
 */
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "lmtrack.h"

/* The held pages of a chunk shall be @bits, in @fresh if the chunk has no memory for them yet. */
static void chunk_hold(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
		       unsigned long index, const unsigned long *bits, unsigned long **fresh)
{
	lockdep_assert_held(&region->harvest_lock);
	if (chunk->held)
		region->held -= bitmap_weight(chunk->held, LMTRACK_CHUNK_PAGES);
	if (bitmap_empty(bits, LMTRACK_CHUNK_PAGES)) {
		region->held_chunks -= !!chunk->held;
		kfree(chunk->held);
		chunk->held = NULL;
		xa_clear_mark(&region->chunks, index, LMTRACK_CHUNK_HELD);
		return;
	}
	if (!chunk->held) {
		swap(chunk->held, *fresh);
		region->held_chunks++;
		xa_set_mark(&region->chunks, index, LMTRACK_CHUNK_HELD);
	}
	bitmap_copy(chunk->held, bits, LMTRACK_CHUNK_PAGES);
	region->held += bitmap_weight(bits, LMTRACK_CHUNK_PAGES);
}

/* No page of the chunk is held. Under harvest_lock */
void lmtrack_hold_forget(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			 unsigned long index)
{
	DECLARE_BITMAP(none, LMTRACK_CHUNK_PAGES);

	if (!chunk->held)
		return;
	bitmap_zero(none, LMTRACK_CHUNK_PAGES);
	chunk_hold(region, chunk, index, none, NULL);
}

static int hold_clear_all(struct lmtrack_region *region, struct file *file)
{
	unsigned long index = 0;
	int ret = 0;

	while (!ret && xa_find(&region->chunks, &index, ULONG_MAX, LMTRACK_CHUNK_HELD)) {
		if (mutex_lock_killable(&region->harvest_lock))
			return -EINTR;
		ret = lmtrack_track_check(region, file);
		if (!ret)
			lmtrack_hold_forget(region, xa_load(&region->chunks, index), index);
		mutex_unlock(&region->harvest_lock);
		/* On to the next, though another thread may hold pages of this one again. */
		index++;
		cond_resched();
	}
	return ret;
}

/*
 * The caller's bits of chunk @index: in @bits, and in @range which of them he gave. First and last
 * page of the range may lie within the chunk; the first is the first of a word.
 */
static int bits_fetch(const struct lmtrack_hold_set *set, unsigned long index,
		      unsigned long *bits, unsigned long *range)
{
	pgoff_t base = index * LMTRACK_CHUNK_PAGES;
	u64 first = max_t(u64, set->first, base);
	u64 end = min_t(u64, set->first + set->pages, base + LMTRACK_CHUNK_PAGES);
	const u64 __user *bitmap = u64_to_user_ptr(set->bitmap);

	bitmap_zero(bits, LMTRACK_CHUNK_PAGES);
	bitmap_zero(range, LMTRACK_CHUNK_PAGES);
	bitmap_set(range, first - base, end - first);
	if (copy_from_user(bits + BIT_WORD(first - base),
			   bitmap + BIT_WORD(first - set->first),
			   BITS_TO_LONGS(end - first) * sizeof(*bits)))
		return -EFAULT;
	bitmap_and(bits, bits, range, LMTRACK_CHUNK_PAGES);
	return 0;
}

static int hold_chunk(struct lmtrack_region *region, struct file *file,
		      const struct lmtrack_hold_set *set, struct lmtrack_chunk *chunk,
		      unsigned long index)
{
	DECLARE_BITMAP(bits, LMTRACK_CHUNK_PAGES);
	DECLARE_BITMAP(range, LMTRACK_CHUNK_PAGES);
	unsigned long *fresh = NULL;
	int ret;

	ret = bits_fetch(set, index, bits, range);
	if (ret)
		return ret;
	if (!bitmap_empty(bits, LMTRACK_CHUNK_PAGES)) {
		fresh = bitmap_zalloc(LMTRACK_CHUNK_PAGES, GFP_KERNEL_ACCOUNT);
		if (!fresh)
			return -ENOMEM;
	}
	if (mutex_lock_killable(&region->harvest_lock)) {
		kfree(fresh);
		return -EINTR;
	}
	ret = lmtrack_track_check(region, file);
	if (!ret && chunk->held) {
		bitmap_andnot(range, chunk->held, range, LMTRACK_CHUNK_PAGES);
		bitmap_or(bits, bits, range, LMTRACK_CHUNK_PAGES);
	}
	if (!ret)
		chunk_hold(region, chunk, index, bits, &fresh);
	mutex_unlock(&region->harvest_lock);
	kfree(fresh);
	return ret;
}

long lmtrack_hold_set(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_hold_set *set = arg;
	struct lmtrack_chunk *chunk;
	unsigned long index;
	int ret;

	set->held = 0;
	if (!set->pages && !(set->flags & LMTRACK_HOLD_CLEAR_ALL))
		return -EINVAL;
	if (set->pages && !lmtrack_range_valid(region, set->first, set->pages))
		return -EINVAL;
	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	ret = lmtrack_track_check(region, file);
	mutex_unlock(&region->harvest_lock);
	if (!ret && (set->flags & LMTRACK_HOLD_CLEAR_ALL))
		ret = hold_clear_all(region, file);
	if (!ret && set->pages) {
		xa_for_each_range(&region->chunks, index, chunk,
				  set->first / LMTRACK_CHUNK_PAGES,
				  (set->first + set->pages - 1) / LMTRACK_CHUNK_PAGES) {
			ret = hold_chunk(region, file, set, chunk, index);
			if (!ret && fatal_signal_pending(current))
				ret = -EINTR;
			if (ret)
				break;
			cond_resched();
		}
	}
	set->held = READ_ONCE(region->held);
	return ret;
}
