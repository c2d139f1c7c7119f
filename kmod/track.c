// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: which pages were written.
 *
 * A region is idle or tracked. The mappings of an idle region have no page_mkwrite: the
 * kernel maps its pages writable at once, and nobody notices a write. The flip to tracked
 * gives every mapping in every process the operations that have page_mkwrite, and a
 * protection without the write bit for pages mapped from then on. It does not touch pages: one
 * that is mapped writable already stays so until its chunk is armed, and until then every
 * page of the chunk counts as dirty.
 *
 * Two things hold while a region is tracked, and every line here keeps them:
 *
 *   A page that is mapped writable anywhere has its dirty bit set, or is in a chunk that is
 *   not armed.
 *
 *   A chunk that is not armed, or has a bit set, is queued.
 *
 * The kernel calls page_mkwrite with a promise to make the page writable afterwards, and does
 * so before the folio is unlocked. Therefore a bit of a page that exists is only cleared under
 * that lock, and the page is write-protected before the lock is given back. A page that does
 * not exist has no lock; its bit is cleared under the i_pages lock, without which the page
 * cannot come into being.
 *
 * Protection clears the write bit and the dirty bit of the page table entries. With the dirty
 * bit left behind, mprotect() and userfaultfd make a shared entry writable without asking, and
 * without the folio's lock, so at any instant: see pages_protect(). NUMA hint faults would,
 * too, but leave dirty file folios alone, and a region's always are.
 *
 * A page that is held for I/O is written without any entry: it is marked again in every
 * harvest for as long as it is held.
 *
 * Locks: see lmtrack.h. The list of processes holds their mm_struct (mmgrab), not their
 * address space; an entry goes when the last mapping of its process does.
 */
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "lmtrack.h"
#include "trace.h"

/*
 * A span of pages is protected by three walks over the mappings, each of which costs some
 * forty instructions a page and over a thousand to begin. So up to three pages are protected
 * one by one instead, and spans are joined where that costs less than to protect the smaller of
 * them by itself, which is as much as walking over eight pages for each one in it. Where an MMU
 * notifier is registered (KVM) a walk also throws away what the guest has mapped in between: there
 * nothing is joined.
 */
#define LMTRACK_SINGLE_PAGES	3
#define LMTRACK_JOIN_PAGES	8

static bool use_mkclean;
module_param(use_mkclean, bool, 0444);
MODULE_PARM_DESC(use_mkclean,
		 "Protect page by page, as on kernels without CONFIG_MAPPING_DIRTY_HELPERS");

/* ---- The processes that map a region ---- */

/**
 * struct lmtrack_mm - a process that maps the region
 * @node:	in region->mms
 * @mm:		held with mmgrab()
 * @vmas:	its mappings
 * @flip_seq:	the flip that its mappings have followed
 */
struct lmtrack_mm {
	struct list_head node;
	struct mm_struct *mm;
	unsigned long vmas;
	u32 flip_seq;
};

static struct lmtrack_mm *mm_find(struct lmtrack_region *region, const struct mm_struct *mm)
{
	struct lmtrack_mm *entry;

	lockdep_assert_held(&region->mms_lock);
	list_for_each_entry(entry, &region->mms, node)
		if (entry->mm == mm)
			return entry;
	return NULL;
}

/* Soft-dirty tracking and userfaultfd want to hear of writes, too: leave their protection. */
static bool vma_watched(const struct vm_area_struct *vma)
{
	return (vma->vm_flags & VM_UFFD_WP) || (VM_SOFTDIRTY && !(vma->vm_flags & VM_SOFTDIRTY));
}

/* The caller holds the mmap_lock of the VMA's process for writing, or nobody else sees it yet. */
static void vma_follow(struct vm_area_struct *vma, bool tracking)
{
	unsigned long flags = vma->vm_flags;

	if (tracking || vma_watched(vma))
		flags &= ~VM_SHARED;
	vma->vm_ops = tracking ? &lmtrack_vm_ops_tracked : &lmtrack_vm_ops_idle;
	WRITE_ONCE(vma->vm_page_prot, vm_get_page_prot(flags));
}

/**
 * lmtrack_mm_add() - a mapping of the region has come into being
 * @region:	the region
 * @vma:	the mapping, its process's mmap_lock held for writing
 * @gfp:	for the list entry of a process that is not in it yet
 *
 * Gives the mapping the operations that the region's state demands.
 */
int lmtrack_mm_add(struct lmtrack_region *region, struct vm_area_struct *vma, gfp_t gfp)
{
	struct lmtrack_mm *fresh = NULL;
	struct lmtrack_mm *entry;

	spin_lock(&region->mms_lock);
	entry = mm_find(region, vma->vm_mm);
	if (!entry) {
		spin_unlock(&region->mms_lock);
		fresh = kzalloc(sizeof(*fresh), gfp);
		if (!fresh)
			return -ENOMEM;
		mmgrab(vma->vm_mm);
		fresh->mm = vma->vm_mm;
		/* No other mapping of this process can have come meanwhile: mmap_lock. */
		spin_lock(&region->mms_lock);
		fresh->flip_seq = region->flip_seq;
		list_add(&fresh->node, &region->mms);
		entry = fresh;
	}
	entry->vmas++;
	vma_follow(vma, region->tracking);
	spin_unlock(&region->mms_lock);
	return 0;
}

static void mm_note_pins(struct lmtrack_region *region, struct mm_struct *mm)
{
	if (mm_flags_test(MMF_HAS_PINNED, mm))
		WRITE_ONCE(region->maybe_pinned, true);
}

/* A mapping of the region is going away */
void lmtrack_mm_del(struct lmtrack_region *region, struct vm_area_struct *vma)
{
	struct mm_struct *mm = vma->vm_mm;
	struct lmtrack_mm *entry;

	/* Pins outlive the mapping they were made through. */
	mm_note_pins(region, mm);
	spin_lock(&region->mms_lock);
	entry = mm_find(region, mm);
	if (WARN_ON_ONCE(!entry) || --entry->vmas) {
		spin_unlock(&region->mms_lock);
		return;
	}
	list_del(&entry->node);
	spin_unlock(&region->mms_lock);
	kfree(entry);
	mmdrop(mm);
}

/* Processes that map the region now */
u64 lmtrack_mm_count(struct lmtrack_region *region)
{
	struct lmtrack_mm *entry;
	u64 count = 0;

	spin_lock(&region->mms_lock);
	list_for_each_entry(entry, &region->mms, node)
		count++;
	spin_unlock(&region->mms_lock);
	return count;
}

/* Is somebody told of every protection call, and pays for it? */
static bool mm_any_notifier(struct lmtrack_region *region)
{
	struct lmtrack_mm *entry;
	bool any = false;

	spin_lock(&region->mms_lock);
	list_for_each_entry(entry, &region->mms, node)
		any |= mm_has_notifiers(entry->mm);
	spin_unlock(&region->mms_lock);
	return any;
}

/* ---- The flip ---- */

/* A process whose mappings have yet to follow, its address space held; NULL: all have. */
static struct mm_struct *flip_next(struct lmtrack_region *region)
{
	struct mm_struct *mm = NULL;
	struct lmtrack_mm *entry;

	spin_lock(&region->mms_lock);
	list_for_each_entry(entry, &region->mms, node) {
		if (entry->flip_seq == region->flip_seq)
			continue;
		if (mmget_not_zero(entry->mm)) {
			mm = entry->mm;
			break;
		}
		/* It is exiting: nothing can be written through it any more, but by pins. */
		mm_note_pins(region, entry->mm);
		entry->flip_seq = region->flip_seq;
	}
	spin_unlock(&region->mms_lock);
	return mm;
}

static void flip_mm(struct lmtrack_region *region, struct mm_struct *mm)
{
	VMA_ITERATOR(vmi, mm, 0);
	struct vm_area_struct *vma;
	struct lmtrack_mm *entry;
	bool tracking;

	mmap_assert_write_locked(mm);
	/* Should the goal change from here on, flip_seq does too and this process comes again. */
	spin_lock(&region->mms_lock);
	tracking = region->tracking;
	entry = mm_find(region, mm);
	if (entry)
		entry->flip_seq = region->flip_seq;
	spin_unlock(&region->mms_lock);

	for_each_vma(vmi, vma) {
		/* A fork that failed half-way left this behind; no mapping of its own follows. */
		if (xa_is_zero(vma))
			break;
		if (!vma->vm_file || lmtrack_region_of(vma->vm_file) != region)
			continue;
		vma_start_write(vma);
		vma_follow(vma, tracking);
	}
	mm_note_pins(region, mm);
}

static void flip_goal(struct lmtrack_region *region, bool tracking)
{
	spin_lock(&region->mms_lock);
	region->tracking = tracking;
	region->flip_seq++;
	spin_unlock(&region->mms_lock);
}

/*
 * Make all mappings follow. Mappings left behind in state idle cost a little and lose nothing.
 * A worker, whom nobody can kill, waits in the same way: for as long as somebody holds his own
 * mmap_lock, which is not a hung task of ours.
 */
static int flip(struct lmtrack_region *region)
{
	struct mm_struct *mm;
	int ret = 0;

	lockdep_assert_held(&region->flip_lock);
	while (!ret && (mm = flip_next(region))) {
		ret = mmap_write_lock_killable(mm);
		if (!ret) {
			flip_mm(region, mm);
			mmap_write_unlock(mm);
		}
		/* Should it be the last user, the end of the process is not ours to wait for. */
		mmput_async(mm);
	}
	return ret;
}

void lmtrack_track_flip_work(struct work_struct *work)
{
	struct lmtrack_region *region = container_of(work, struct lmtrack_region, flip_work);

	if (!mutex_lock_killable(&region->flip_lock)) {
		flip(region);
		mutex_unlock(&region->flip_lock);
	}
	lmtrack_region_put(region);
}

/* For those who cannot wait. */
static void flip_later(struct lmtrack_region *region)
{
	lmtrack_region_hold(region);
	if (!queue_work(lmtrack_wq, &region->flip_work))
		lmtrack_region_put(region);
}

/* ---- Marking ---- */

/* Have the next harvest look at the chunk */
void lmtrack_chunk_queue(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			 unsigned long index)
{
	xa_lock(&region->chunks);
	if (!chunk->queued) {
		WRITE_ONCE(chunk->queued, true);
		__xa_set_mark(&region->chunks, index, LMTRACK_CHUNK_QUEUED);
	}
	xa_unlock(&region->chunks);
}

/*
 * A harvest of the chunk ends: it stays queued if a page of it is dirty still, or again. Until
 * here it was, too, as somebody may be looking for what else is dirty in it.
 */
static void chunk_settle(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			 unsigned long index)
{
	lockdep_assert_held(&region->harvest_lock);
	xa_lock(&region->chunks);
	WRITE_ONCE(chunk->queued, false);
	/*
	 * Pairs with the full barrier of test_and_set_bit() in lmtrack_mark_dirty(): either we
	 * see the bit, or whoever sets it sees that the chunk is not queued.
	 */
	smp_mb();
	if (bitmap_empty(chunk->dirty, LMTRACK_CHUNK_PAGES)) {
		__xa_clear_mark(&region->chunks, index, LMTRACK_CHUNK_QUEUED);
	} else {
		WRITE_ONCE(chunk->queued, true);
		__xa_set_mark(&region->chunks, index, LMTRACK_CHUNK_QUEUED);
	}
	xa_unlock(&region->chunks);
}

/**
 * lmtrack_mark_dirty() - a page is about to become writable, or was written
 * @region:	the region
 * @page:	its number; it exists, or did a moment ago
 *
 * Under the folio's lock for the former. The latter may come without it, after the write.
 *
 * Return: whether the page was clean.
 */
bool lmtrack_mark_dirty(struct lmtrack_region *region, pgoff_t page)
{
	unsigned long index = page / LMTRACK_CHUNK_PAGES;
	struct lmtrack_chunk *chunk;

	if (READ_ONCE(region->state) == LMTRACK_IDLE)
		return false;
	chunk = xa_load(&region->chunks, index);
	if (WARN_ON_ONCE(!chunk))
		return false;
	if (test_bit(page % LMTRACK_CHUNK_PAGES, chunk->dirty) ||
	    test_and_set_bit(page % LMTRACK_CHUNK_PAGES, chunk->dirty))
		return false;
	this_cpu_inc(region->counters->dirtied);
	if (!READ_ONCE(chunk->queued))
		lmtrack_chunk_queue(region, chunk, index);
	return true;
}

/* These pages of a chunk are dirty (again). */
static void chunk_mark(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
		       unsigned long index, const unsigned long *bits)
{
	unsigned int word;

	for (word = 0; word < ARRAY_SIZE(chunk->dirty); word++)
		if (bits[word])
			atomic_long_or(bits[word], (atomic_long_t *)&chunk->dirty[word]);
	/* As in lmtrack_mark_dirty(): the bits are there before we look at queued. */
	smp_mb__after_atomic();
	if (!READ_ONCE(chunk->queued))
		lmtrack_chunk_queue(region, chunk, index);
}

/* The bits of chunk @index that lie in pages @first to @last. */
static void chunk_clip(unsigned long *bits, unsigned long index, pgoff_t first, pgoff_t last)
{
	pgoff_t base = index * LMTRACK_CHUNK_PAGES;
	unsigned int from = first > base ? first - base : 0;
	unsigned int to = min_t(pgoff_t, last - base, LMTRACK_CHUNK_PAGES - 1);

	bitmap_zero(bits, LMTRACK_CHUNK_PAGES);
	bitmap_set(bits, from, to - from + 1);
}

/* Pages do not exist any more: whoever has a copy must hear of it */
void lmtrack_mark_punched(struct lmtrack_region *region, pgoff_t first, pgoff_t last)
{
	DECLARE_BITMAP(bits, LMTRACK_CHUNK_PAGES);
	struct lmtrack_chunk *chunk;
	unsigned long index;

	if (READ_ONCE(region->state) == LMTRACK_IDLE)
		return;
	/* Where there is no chunk, there never was a page. */
	xa_for_each_range(&region->chunks, index, chunk, first / LMTRACK_CHUNK_PAGES,
			  last / LMTRACK_CHUNK_PAGES) {
		chunk_clip(bits, index, first, last);
		chunk_mark(region, chunk, index, bits);
		cond_resched();
	}
}

/* ---- The harvest ---- */

static void chunk_resident(struct lmtrack_region *region, unsigned long index,
			   unsigned long *bits)
{
	pgoff_t first = index * LMTRACK_CHUNK_PAGES;
	XA_STATE(xas, &region->inode->i_mapping->i_pages, first);
	struct folio *folio;

	bitmap_zero(bits, LMTRACK_CHUNK_PAGES);
	rcu_read_lock();
	xas_for_each(&xas, folio, first + LMTRACK_CHUNK_PAGES - 1)
		if (!xas_retry(&xas, folio))
			__set_bit(xas.xa_index - first, bits);
	rcu_read_unlock();
}

/*
 * From here on the chunk's bits say it all. A page that comes into being meanwhile is not
 * missed: it was not there when tracking started, so page_mkwrite sets its bit.
 */
static void chunk_arm(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
		      unsigned long index)
{
	DECLARE_BITMAP(resident, LMTRACK_CHUNK_PAGES);

	lockdep_assert_held(&region->harvest_lock);
	chunk_resident(region, index, resident);
	chunk_mark(region, chunk, index, resident);
	chunk->armed = true;
}

/*
 * Lock the @dirty pages of one word, in ascending order, and clear their bits; clear those of
 * pages that do not exist. Stops at a page whose lock somebody else has; @ours is locked already.
 * The i_pages lock keeps the folios where they are until their own lock does: no reference is
 * needed till then. An xarray node has as many slots as the word has bits: one descent finds them
 * all, or that there are none.
 *
 * Return: the bits cleared; *present: those whose pages exist and are in @folios; *busy: the bit
 * at which it stopped, or BITS_PER_LONG.
 */
static unsigned long word_lock_clear(struct address_space *mapping, pgoff_t first,
				     unsigned long *word, unsigned long dirty,
				     const struct folio *ours, struct folio **folios,
				     unsigned long *present, unsigned int *busy)
{
	XA_STATE(xas, &mapping->i_pages, first + __ffs(dirty));
	unsigned long bits = dirty, there = 0;
	struct folio *folio;
	bool leaf;

	*busy = BITS_PER_LONG;
	xas_lock_irq(&xas);
	folio = xas_load(&xas);
	/* A tree of page 0 only is no node but that page, and one without any is none. */
	leaf = xas_is_node(&xas) && !xas.xa_node->shift;
	for (; bits; bits &= bits - 1) {
		unsigned int bit = __ffs(bits);

		if (leaf) {
			xas.xa_index = first + bit;
			xas.xa_offset = bit;
			folio = xas_reload(&xas);
		} else if (bits != dirty) {
			break;
		}
		if (!folio)
			continue;
		if (folio != ours && !folio_trylock(folio)) {
			dirty &= BIT(bit) - 1;
			*busy = bit;
			break;
		}
		folios[bit] = folio;
		there |= BIT(bit);
	}
	atomic_long_andnot(dirty, (atomic_long_t *)word);
	xas_unlock_irq(&xas);
	*present = there;
	return dirty;
}

static_assert(XA_CHUNK_SIZE == BITS_PER_LONG);

static void pages_clean(struct address_space *mapping, pgoff_t first, unsigned int from,
			unsigned int to, unsigned long *dirty)
{
	pgoff_t start = 0, end = 0;

	clean_record_shared_mapping_range(mapping, first + from, to - from, first, dirty, &start,
					  &end);
}

/*
 * Write-protect pages @from to @to - 1 of the chunk at @first; the dirty ones are locked.
 *
 * An entry that is dirty can be made writable behind our back between two passes. One that is
 * clean cannot: that takes page_mkwrite, which waits for the lock. So clean, protect, and look
 * again: an entry that is clean in the last pass was clean or protected ever since the second,
 * and stays protected. One that is dirty again was written meanwhile: its page goes into
 * @again, to be marked.
 */
static void pages_protect(struct address_space *mapping, pgoff_t first, unsigned int from,
			  unsigned int to, unsigned long *again)
{
	DECLARE_BITMAP(dirty, LMTRACK_CHUNK_PAGES);

	pages_clean(mapping, first, from, to, dirty);
	wp_shared_mapping_range(mapping, first + from, to - from);
	pages_clean(mapping, first, from, to, again);
}

/*
 * Protect the pages of @present among @from to @to - 1, @pages of them. Few are protected one by
 * one: that is one pass over the mappings for each, and its one step for an entry leaves nothing
 * to look at again. Of a page that is just being unmapped it may see no mapping any more while
 * a processor can still write it: who unmaps it holds it until none can, see folio_held().
 */
static void span_protect(struct address_space *mapping, pgoff_t first,
			 const unsigned long *present, struct folio **folios,
			 unsigned int from, unsigned int to, unsigned int pages,
			 unsigned long *again)
{
	unsigned int bit;

	/*
	 * Whether there is a mapping at all is for the walks to see: they hold i_mmap_rwsem. A
	 * mapping that is being resized is not in the tree for a moment.
	 */
	if (IS_ENABLED(CONFIG_MAPPING_DIRTY_HELPERS) && !use_mkclean &&
	    pages > LMTRACK_SINGLE_PAGES) {
		pages_protect(mapping, first, from, to, again);
		return;
	}
	for (bit = from; bit < to; bit = find_next_bit(present, to, bit + 1))
		folio_mkclean(folios[bit]);
}

/*
 * Where a page in the gap between two runs is dirty, it is to stay so, and writable: joining
 * the runs would make its next write fault, for nothing.
 */
static void batch_protect(struct address_space *mapping, pgoff_t first,
			  const unsigned long *present, const unsigned long *dirty,
			  struct folio **folios, unsigned int join, unsigned long *again)
{
	unsigned int from = 0, to = 0, pages = 0, run, run_end;

	for_each_set_bitrange(run, run_end, present, LMTRACK_CHUNK_PAGES) {
		unsigned int smaller = min3(pages, run_end - run, LMTRACK_SINGLE_PAGES);

		if (to && (run - to > join * smaller || find_next_bit(dirty, run, to) < run)) {
			span_protect(mapping, first, present, folios, from, to, pages, again);
			from = run;
			pages = 0;
		} else if (!to) {
			from = run;
		}
		to = run_end;
		pages += run_end - run;
	}
	if (to)
		span_protect(mapping, first, present, folios, from, to, pages, again);
}

/*
 * Can somebody write the page who needs no page table entry? Who does, holds it: with a pin,
 * that is a thousand references, or with a plain one, as direct I/O does in 6.1 and KVM for
 * the guests of a guest. Others are the page cache, each mapping, and who is about to put the
 * page on an LRU list: he counts only if the page was on none before and after we looked, as
 * who takes it off a list clears the flag first. An unmapping gives up the mapping before the
 * reference, so mappings are read after references; and before, too, as a mapping may come
 * without the folio's lock: fork() copies those of a VMA with userfaultfd's write protection.
 * Whoever holds the page for an instant makes it be sent once more than needed.
 */
static bool folio_held(struct folio *folio)
{
	bool listed = folio_test_lru(folio);
	int refs, mappings;

	mappings = atomic_read(&folio->_mapcount) + 1;
	/* Flag and mappings, then the references, then mappings and flag: see above. */
	smp_rmb();
	refs = folio_ref_count(folio);
	/* As before. */
	smp_rmb();
	mappings = min(mappings, atomic_read(&folio->_mapcount) + 1);
	listed |= folio_test_lru(folio);
	return refs > 1 + mappings + !listed;
}

/* Unlock the @present pages of one word; those that are held go into *@again, and are counted. */
static unsigned int word_unlock(unsigned long present, struct folio **folios, bool keep,
				unsigned long *again)
{
	unsigned int held = 0;

	for (; present; present &= present - 1) {
		unsigned int bit = __ffs(present);
		struct folio *folio = folios[bit];

		if (unlikely(folio_held(folio))) {
			*again |= BIT(bit);
			held++;
		}
		/* Who waits for the lock may remove the page before unlock has woken it. */
		folio_get(folio);
		folio_unlock(folio);
		if (!keep)
			folio_put(folio);
	}
	return held;
}

/*
 * One batch: the wanted dirty pages from *@from on, up to the first that cannot be locked without
 * waiting for it while others are held. @ours is the page at *@from, locked already, or NULL.
 * @folios gets the pages; where the caller keeps them they stay referenced.
 *
 * Return: pages that stay dirty because they are held. *@from: the page at which the batch ended,
 * or LMTRACK_CHUNK_PAGES.
 */
static unsigned int harvest_batch(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
				  unsigned long index, const unsigned long *want,
				  unsigned long *taken, struct folio **folios, bool keep,
				  unsigned int join, const struct folio *ours,
				  unsigned int *from)
{
	struct address_space *mapping = region->inode->i_mapping;
	pgoff_t first = index * LMTRACK_CHUNK_PAGES;
	DECLARE_BITMAP(present, LMTRACK_CHUNK_PAGES);
	DECLARE_BITMAP(again, LMTRACK_CHUNK_PAGES);
	unsigned int word = *from / BITS_PER_LONG, busy, held = 0;
	unsigned long mask = ~0UL << (*from % BITS_PER_LONG), marks = 0;

	bitmap_zero(present, LMTRACK_CHUNK_PAGES);
	bitmap_zero(again, LMTRACK_CHUNK_PAGES);
	*from = LMTRACK_CHUNK_PAGES;
	for (; word < ARRAY_SIZE(chunk->dirty); word++, mask = ~0UL) {
		unsigned long dirty = READ_ONCE(chunk->dirty[word]) & want[word] & mask;
		unsigned int base = word * BITS_PER_LONG;
		unsigned long cleared, holes;

		if (!dirty)
			continue;
		cleared = word_lock_clear(mapping, first + base, &chunk->dirty[word], dirty, ours,
					  folios + base, &present[word], &busy);
		taken[word] |= cleared;
		for (holes = cleared & ~present[word]; holes; holes &= holes - 1)
			folios[base + __ffs(holes)] = NULL;
		if (busy < BITS_PER_LONG) {
			*from = base + busy;
			break;
		}
	}

	batch_protect(mapping, first, present, chunk->dirty, folios, join, again);
	/* Pairs with GUP-fast, which takes its reference before it looks at the entry again. */
	smp_mb();
	for (word = 0; word < ARRAY_SIZE(present); word++) {
		held += word_unlock(present[word], folios + word * BITS_PER_LONG, keep,
				    &again[word]);
		marks |= again[word];
	}
	/* Only now: nobody but a harvest asks for these bits, and the chunk is queued. */
	if (marks)
		chunk_mark(region, chunk, index, again);
	return held;
}

/*
 * Whoever holds the lock is about to map the page, to move it or to punch it out. We queue for it:
 * who only waited until it is free would find it taken again for as long as threads fault there.
 *
 * Return: the page, locked, and by that kept in the file without a reference; NULL: it is gone.
 */
static struct folio *page_lock(struct address_space *mapping, pgoff_t page)
{
	struct folio *folio = lmtrack_get_folio(mapping, page);

	if (!folio)
		return NULL;
	folio_lock(folio);
	if (folio->mapping != mapping) {
		folio_unlock(folio);
		folio_put(folio);
		return NULL;
	}
	folio_put(folio);
	return folio;
}

/*
 * Take what is dirty among the pages wanted: clear their bits, protect them again.
 *
 * @folios has room for a chunk. For each page taken it gets the folio, or NULL if there is
 * none; with @keep the caller owns a reference to each.
 *
 * Return: the number of pages taken; they are the bits in @taken.
 */
static unsigned int chunk_harvest(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
				  unsigned long index, const unsigned long *want,
				  unsigned long *taken, struct folio **folios, bool keep)
{
	unsigned int join = mm_any_notifier(region) ? 0 : LMTRACK_JOIN_PAGES;
	unsigned int from = 0, pages, repinned = 0;
	struct folio *ours = NULL;

	lockdep_assert_held(&region->harvest_lock);
	bitmap_zero(taken, LMTRACK_CHUNK_PAGES);
	if (!chunk->armed)
		chunk_arm(region, chunk, index);
	for (;;) {
		repinned += harvest_batch(region, chunk, index, want, taken, folios, keep, join,
					  ours, &from);
		if (from == LMTRACK_CHUNK_PAGES)
			break;
		cond_resched();
		ours = page_lock(region->inode->i_mapping, index * LMTRACK_CHUNK_PAGES + from);
	}
	chunk_settle(region, chunk, index);

	pages = bitmap_weight(taken, LMTRACK_CHUNK_PAGES);
	region->harvested += pages;
	region->repinned += repinned;
	trace_lmtrack_harvest(region->id, index, pages, repinned);
	return pages;
}

/* ---- For streams ---- */

/**
 * lmtrack_sender_begin() - a round of the region begins: tracking cannot be stopped
 * @region:	the region
 * @file:	the open file of it that the stream holds
 *
 * Return: -EINVAL if the region is not tracked by @file, -EINTR if the caller was killed.
 */
int lmtrack_sender_begin(struct lmtrack_region *region, const struct file *file)
{
	int ret = -EINVAL;

	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	if (region->state == LMTRACK_TRACKED && region->tracker == file) {
		region->senders++;
		ret = 0;
	}
	mutex_unlock(&region->harvest_lock);
	return ret;
}

void lmtrack_sender_end(struct lmtrack_region *region)
{
	mutex_lock(&region->harvest_lock);
	region->senders--;
	mutex_unlock(&region->harvest_lock);
}

/* The first chunk from @index on that is queued, or that exists */
bool lmtrack_chunk_find(struct lmtrack_region *region, unsigned long *index, bool all)
{
	return xa_find(&region->chunks, index, ULONG_MAX,
		       all ? XA_PRESENT : LMTRACK_CHUNK_QUEUED);
}

/* How many of these pages are dirty? */
static unsigned int chunk_dirty_of(const struct lmtrack_chunk *chunk, const unsigned long *bits)
{
	unsigned int word, count = 0;

	for (word = 0; word < ARRAY_SIZE(chunk->dirty); word++)
		count += hweight_long(READ_ONCE(chunk->dirty[word]) & bits[word]);
	return count;
}

/**
 * lmtrack_chunk_take() - harvest a chunk in order to send it
 * @region:	a round of it has begun
 * @index:	the chunk's number
 * @all:	every page that exists, not only dirty ones
 * @holding:	leave out the pages that are held
 * @taken:	out: the pages
 * @folios:	room for a chunk; out, for each page taken: its folio, referenced, or NULL
 * @held:	grows by the number of dirty pages that were left out
 *
 * Return: the number of pages taken.
 */
int lmtrack_chunk_take(struct lmtrack_region *region, unsigned long index, bool all,
		       bool holding, unsigned long *taken, struct folio **folios, u64 *held)
{
	struct lmtrack_chunk *chunk = xa_load(&region->chunks, index);
	DECLARE_BITMAP(want, LMTRACK_CHUNK_PAGES);
	unsigned int pages;

	bitmap_fill(want, LMTRACK_CHUNK_PAGES);
	mutex_lock(&region->harvest_lock);
	holding &= !!chunk->held;
	if (holding)
		bitmap_complement(want, chunk->held, LMTRACK_CHUNK_PAGES);
	if (all)
		chunk->armed = false;
	pages = chunk_harvest(region, chunk, index, want, taken, folios, true);
	if (holding)
		*held += chunk_dirty_of(chunk, chunk->held);
	mutex_unlock(&region->harvest_lock);
	return pages;
}

/**
 * lmtrack_chunk_return() - what was taken of a chunk did not arrive: it is dirty again
 * @region:	the region
 * @file:	the open file of it that the stream holds
 * @index:	the chunk's number
 * @pages:	those that were taken
 *
 * Return: whether the region is tracked by @file. If not, all of it will be dirty when it is.
 */
bool lmtrack_chunk_return(struct lmtrack_region *region, const struct file *file,
			  unsigned long index, const unsigned long *pages)
{
	bool tracked;

	mutex_lock(&region->harvest_lock);
	tracked = region->state == LMTRACK_TRACKED && region->tracker == file;
	if (tracked)
		chunk_mark(region, xa_load(&region->chunks, index), index, pages);
	mutex_unlock(&region->harvest_lock);
	return tracked;
}

/* ---- Requests ---- */

static int pinned_count(struct lmtrack_region *region, u64 *pinned)
{
	struct address_space *mapping = region->inode->i_mapping;
	struct folio_batch batch;
	pgoff_t index = 0;
	unsigned int i;

	*pinned = 0;
	if (!READ_ONCE(region->maybe_pinned))
		return 0;
	folio_batch_init(&batch);
	while (filemap_get_folios(mapping, &index, region->pages - 1, &batch)) {
		for (i = 0; i < folio_batch_count(&batch); i++)
			*pinned += folio_maybe_dma_pinned(batch.folios[i]);
		folio_batch_release(&batch);
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/* Back to plain memory. Chunks start the next tracking as they were born: queued, not armed. */
static void track_idle(struct lmtrack_region *region)
{
	struct lmtrack_chunk *chunk;
	unsigned long index;

	lockdep_assert_held(&region->harvest_lock);
	WRITE_ONCE(region->state, LMTRACK_IDLE);
	region->tracker = NULL;
	lmtrack_stun_end(region);
	flip_goal(region, false);
	xa_for_each(&region->chunks, index, chunk) {
		chunk->armed = false;
		bitmap_zero(chunk->dirty, LMTRACK_CHUNK_PAGES);
		lmtrack_hold_forget(region, chunk, index);
		lmtrack_chunk_queue(region, chunk, index);
		cond_resched();
	}
}

long lmtrack_track_start(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_track_start *start = arg;
	struct lmtrack_stun *stun;
	long ret = 0;

	start->pinned = 0;
	if (!(file->f_mode & FMODE_WRITE))
		return -EACCES;
	stun = lmtrack_stun_alloc(region);
	if (!stun)
		return -ENOMEM;
	if (mutex_lock_killable(&region->flip_lock)) {
		lmtrack_stun_put(stun);
		return -EINTR;
	}

	if (mutex_lock_killable(&region->harvest_lock)) {
		lmtrack_stun_put(stun);
		ret = -EINTR;
		goto out;
	}
	if (region->state == LMTRACK_IDLE) {
		region->tracker = file;
		stun = rcu_replace_pointer(region->stun, stun,
					   lockdep_is_held(&region->harvest_lock));
		/* Before the first mapping follows: its faults must find the region tracked. */
		WRITE_ONCE(region->state, LMTRACK_STARTING);
		flip_goal(region, true);
	} else {
		ret = -EBUSY;
	}
	mutex_unlock(&region->harvest_lock);
	/* That of the tracking before, or the one that is not needed. */
	lmtrack_stun_put(stun);
	if (ret)
		goto out;

	ret = flip(region);
	if (!ret)
		ret = pinned_count(region, &start->pinned);
	if (!ret && start->pinned && !(start->flags & LMTRACK_TRACK_ALLOW_PINNED))
		ret = -EBUSY;

	mutex_lock(&region->harvest_lock);
	if (ret)
		track_idle(region);
	else
		WRITE_ONCE(region->state, LMTRACK_TRACKED);
	mutex_unlock(&region->harvest_lock);
	if (ret && flip(region))
		flip_later(region);
out:
	mutex_unlock(&region->flip_lock);
	return ret;
}

/* May a request be about these pages? The first one is the first of a word. */
bool lmtrack_range_valid(const struct lmtrack_region *region, u64 first, u64 pages)
{
	return IS_ALIGNED(first, BITS_PER_LONG) && pages && first < region->pages &&
	       pages <= region->pages - first;
}

/* Under harvest_lock: may this file harvest and stop? */
int lmtrack_track_check(const struct lmtrack_region *region, const struct file *file)
{
	lockdep_assert_held(&region->harvest_lock);
	if (region->state != LMTRACK_TRACKED)
		return -EINVAL;
	return region->tracker == file ? 0 : -EPERM;
}

long lmtrack_track_stop(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	long ret;

	if (mutex_lock_killable(&region->flip_lock))
		return -EINTR;
	if (mutex_lock_killable(&region->harvest_lock)) {
		ret = -EINTR;
		goto out;
	}
	ret = lmtrack_track_check(region, file);
	if (!ret && region->senders)
		ret = -EBUSY;
	if (!ret)
		track_idle(region);
	mutex_unlock(&region->harvest_lock);
	if (!ret && flip(region))
		flip_later(region);
out:
	mutex_unlock(&region->flip_lock);
	return ret;
}

/* An open file of the region was closed for the last time */
void lmtrack_track_release(struct lmtrack_region *region, const struct file *file)
{
	bool ours;

	mutex_lock(&region->harvest_lock);
	ours = region->tracker == file;
	if (ours)
		track_idle(region);
	mutex_unlock(&region->harvest_lock);
	if (ours)
		flip_later(region);
}

/* What a harvest would take of the pages wanted. */
static unsigned int chunk_peek(struct lmtrack_region *region, struct lmtrack_chunk *chunk,
			       unsigned long index, const unsigned long *want, unsigned long *found)
{
	unsigned int word;

	lockdep_assert_held(&region->harvest_lock);
	if (chunk->armed)
		bitmap_zero(found, LMTRACK_CHUNK_PAGES);
	else
		chunk_resident(region, index, found);
	for (word = 0; word < ARRAY_SIZE(chunk->dirty); word++)
		found[word] = (found[word] | READ_ONCE(chunk->dirty[word])) & want[word];
	return bitmap_weight(found, LMTRACK_CHUNK_PAGES);
}

/* Set the chunk's bits in the caller's bitmap, whose first word is that of page @first. */
static int bits_deliver(const struct lmtrack_dirty_get *get, unsigned long index,
			const unsigned long *bits)
{
	u64 __user *bitmap = u64_to_user_ptr(get->bitmap);
	unsigned int word;

	for (word = 0; word < BITS_TO_LONGS(LMTRACK_CHUNK_PAGES); word++) {
		pgoff_t page = index * LMTRACK_CHUNK_PAGES + word * BITS_PER_LONG;
		u64 __user *where = bitmap + (page - get->first) / BITS_PER_LONG;
		u64 value;

		if (!bits[word])
			continue;
		if (get_user(value, where) || put_user(value | bits[word], where))
			return -EFAULT;
	}
	return 0;
}

/* One chunk of DIRTY_GET. The copy is made without locks: the caller's memory may sleep. */
static int dirty_get_chunk(struct lmtrack_region *region, struct file *file,
			   struct lmtrack_dirty_get *get, unsigned long index,
			   struct folio **folios)
{
	struct lmtrack_chunk *chunk = xa_load(&region->chunks, index);
	bool clear = get->flags & LMTRACK_DIRTY_CLEAR;
	DECLARE_BITMAP(want, LMTRACK_CHUNK_PAGES);
	DECLARE_BITMAP(found, LMTRACK_CHUNK_PAGES);
	unsigned int pages = 0;
	int ret;

	chunk_clip(want, index, get->first, get->first + get->pages - 1);
	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	ret = lmtrack_track_check(region, file);
	if (!ret && clear)
		pages = chunk_harvest(region, chunk, index, want, found, folios, false);
	else if (!ret)
		pages = chunk_peek(region, chunk, index, want, found);
	mutex_unlock(&region->harvest_lock);
	if (ret)
		return ret;

	ret = bits_deliver(get, index, found);
	if (!ret)
		get->dirty += pages;
	else if (clear)
		chunk_mark(region, chunk, index, found);
	return ret;
}

long lmtrack_dirty_get(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_dirty_get *get = arg;
	unsigned long index, last;
	struct folio **folios;
	int ret;

	get->dirty = 0;
	if (!lmtrack_range_valid(region, get->first, get->pages))
		return -EINVAL;

	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	ret = lmtrack_track_check(region, file);
	if (!ret && (get->flags & LMTRACK_DIRTY_CLEAR))
		region->harvests++;
	mutex_unlock(&region->harvest_lock);
	if (ret)
		return ret;

	folios = kmalloc_array(LMTRACK_CHUNK_PAGES, sizeof(*folios), GFP_KERNEL_ACCOUNT);
	if (!folios)
		return -ENOMEM;
	index = get->first / LMTRACK_CHUNK_PAGES;
	last = (get->first + get->pages - 1) / LMTRACK_CHUNK_PAGES;
	while (!ret && index <= last &&
	       xa_find(&region->chunks, &index, last, LMTRACK_CHUNK_QUEUED)) {
		ret = dirty_get_chunk(region, file, get, index, folios);
		index++;
		if (fatal_signal_pending(current))
			ret = ret ?: -EINTR;
		cond_resched();
	}
	kfree(folios);
	return ret;
}
