/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels lmtrack is built for. The LMTRACK_HAVE_... macros are
 * probed by Kbuild in the kernel's own headers. Each entry names the change behind it.
 */
#ifndef LMTRACK_COMPAT_H
#define LMTRACK_COMPAT_H

#include <linux/fs.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched.h>

/* "folio_batch: rename pagevec.h to folio_batch.h" */
#ifdef LMTRACK_HAVE_FOLIO_BATCH_H
#include <linux/folio_batch.h>
#else
#include <linux/pagevec.h>
#endif

#if BITS_PER_LONG != 64
#error "lmtrack needs a 64-bit kernel: its bitmaps are arrays of 64-bit words on both sides"
#endif

/* 6.3 passes a mnt_idmap where 6.1 passed a user namespace. */
#ifdef LMTRACK_HAVE_MNT_IDMAP
#define lmtrack_idmap	struct mnt_idmap
#else
#define lmtrack_idmap	struct user_namespace
#endif

/* 6.4 introduced per-VMA locks: a VMA may only be changed after it was marked for writing. */
#ifndef LMTRACK_HAVE_VMA_START_WRITE
static inline void vma_start_write(struct vm_area_struct *vma)
{
}
#endif

/* 6.4 let others than io_uring have threads of the kernel in a user's process. */
#ifndef PF_USER_WORKER
#define PF_USER_WORKER	PF_IO_WORKER
#endif

/* 6.3 made filemap_get_folio() return an error pointer where it returned NULL. */
static inline struct folio *lmtrack_get_folio(struct address_space *mapping, pgoff_t index)
{
	struct folio *folio = filemap_get_folio(mapping, index);

	return IS_ERR_OR_NULL(folio) ? NULL : folio;
}

/* 6.18 made mm->flags a bitmap of its own: "mm: add bitmap mm->flags field". */
#ifndef LMTRACK_HAVE_MM_FLAGS
#define mm_flags_test(flag, mm)	test_bit(flag, &(mm)->flags)
#endif

/*
 * 6.14 gives a thread its CPUs when it first runs, whatever was set before, unless it was told
 * by this: "kthread: Default affine kthread to its preferred NUMA node".
 */
static inline int lmtrack_thread_affine(struct task_struct *task, const struct cpumask *cpus)
{
#ifdef LMTRACK_HAVE_KTHREAD_AFFINE
	return kthread_affine_preferred(task, cpus);
#else
	return set_cpus_allowed_ptr(task, cpus);
#endif
}

/*
 * The mapping helpers are built only for who selects CONFIG_MAPPING_DIRTY_HELPERS (vmwgfx
 * does): Debian's cloud kernels lack them. Pages are then protected one by one.
 */
#if !IS_ENABLED(CONFIG_MAPPING_DIRTY_HELPERS)
static inline unsigned long wp_shared_mapping_range(struct address_space *mapping,
						    pgoff_t first_index, pgoff_t nr)
{
	return 0;
}

static inline unsigned long
clean_record_shared_mapping_range(struct address_space *mapping, pgoff_t first_index,
				  pgoff_t nr, pgoff_t bitmap_pgoff, unsigned long *bitmap,
				  pgoff_t *start, pgoff_t *end)
{
	return 0;
}
#endif

#endif /* LMTRACK_COMPAT_H */
