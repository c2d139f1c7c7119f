// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: regions, guest memory as a file.
 *
 * A region is an inode of a file system of lmtrack's own with order-0 folios in its page
 * cache and nothing behind them: a page that was never touched does not exist. Folios are
 * dirty from birth and the mapping is unevictable, so neither reclaim nor drop_caches takes
 * one away; only hole punching and the end of the inode do.
 *
 * Lifetimes: the inode owns struct lmtrack_region (i_private), made before the inode can be
 * seen and freed in evict_inode, when no file, mapping or worker refers to it any more. Each
 * inode keeps the file system mounted, the mount keeps the module.
 *
 * A page's chunk exists before the page does and stays for as long as the region. What a
 * fault does beyond finding or making the page is in track.c.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/fs_context.h>
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/pseudo_fs.h>
#include <linux/sched/clock.h>
#include <linux/seq_file.h>
#include <linux/string.h>

#include "compat.h"
#include "lmtrack.h"
#include "trace.h"

#define LMTRACK_FS_MAGIC	0x6c6d7472	/* "lmtr" */

static struct vfsmount *region_mount;
static int region_mount_users;
static atomic64_t region_ids;

static struct lmtrack_region *region_of_mapping(struct address_space *mapping)
{
	return mapping->host->i_private;
}

/* ---- Pages ---- */

/**
 * lmtrack_chunk_get() - the chunk of a page that is about to exist
 * @region:	the region
 * @index:	the chunk's number
 *
 * Return: NULL when there is no memory for it.
 */
struct lmtrack_chunk *lmtrack_chunk_get(struct lmtrack_region *region, unsigned long index)
{
	struct lmtrack_chunk *chunk = xa_load(&region->chunks, index);
	struct lmtrack_chunk *other;

	if (chunk)
		return chunk;
	chunk = kzalloc(sizeof(*chunk), GFP_KERNEL_ACCOUNT);
	if (!chunk)
		return NULL;
	other = xa_cmpxchg(&region->chunks, index, NULL, chunk, GFP_KERNEL_ACCOUNT);
	if (other) {
		kfree(chunk);
		return xa_is_err(other) ? NULL : other;
	}
	/* From birth on: it is not armed. */
	lmtrack_chunk_queue(region, chunk, index);
	atomic_long_inc(&region->chunk_count);
	return chunk;
}

static struct folio *region_alloc_folio(struct lmtrack_region *region, struct vm_fault *vmf)
{
	gfp_t gfp = mapping_gfp_mask(region->inode->i_mapping) | __GFP_ZERO;
	struct page *page;

	if (region->node != NUMA_NO_NODE)
		return __folio_alloc_node(gfp, 0, region->node);
	page = alloc_page_vma(gfp, vmf->vma, vmf->address);
	return page ? page_folio(page) : NULL;
}

/* Make the page, return it locked and referenced, or -EEXIST if another thread was first. */
static struct folio *region_add_folio(struct lmtrack_region *region, struct vm_fault *vmf)
{
	struct address_space *mapping = region->inode->i_mapping;
	struct folio *folio;
	int ret;

	if (!lmtrack_chunk_get(region, vmf->pgoff / LMTRACK_CHUNK_PAGES))
		return ERR_PTR(-ENOMEM);
	folio = region_alloc_folio(region, vmf);
	if (!folio)
		return ERR_PTR(-ENOMEM);
	__folio_mark_uptodate(folio);
	folio_set_dirty(folio);
	ret = filemap_add_folio(mapping, folio, vmf->pgoff, mapping_gfp_mask(mapping));
	if (ret) {
		folio_clear_dirty(folio);
		folio_put(folio);
		return ERR_PTR(ret);
	}
	return folio;
}

static vm_fault_t region_fault(struct vm_fault *vmf)
{
	struct address_space *mapping = vmf->vma->vm_file->f_mapping;
	struct lmtrack_region *region = region_of_mapping(mapping);
	struct folio *folio;

	if (vmf->pgoff >= region->pages)
		return VM_FAULT_SIGBUS;

	for (;;) {
		folio = lmtrack_get_folio(mapping, vmf->pgoff);
		if (folio) {
			folio_lock(folio);
			if (likely(folio->mapping == mapping))
				break;
			/* Punched out meanwhile. */
			folio_unlock(folio);
			folio_put(folio);
			continue;
		}
		folio = region_add_folio(region, vmf);
		if (!IS_ERR(folio))
			break;
		if (PTR_ERR(folio) != -EEXIST)
			return vmf_error(PTR_ERR(folio));
	}
	vmf->page = folio_page(folio, 0);
	return VM_FAULT_LOCKED;
}

/*
 * A page is about to become writable. It becomes so only after this returns, but before the
 * folio is unlocked; a harvest takes the lock first, so whoever sees the page writable sees
 * the bit.
 */
static vm_fault_t region_page_mkwrite(struct vm_fault *vmf)
{
	struct folio *folio = page_folio(vmf->page);
	struct address_space *mapping = vmf->vma->vm_file->f_mapping;
	struct lmtrack_region *region = region_of_mapping(mapping);
	u64 began = local_clock();
	bool dirtied;

	folio_lock(folio);
	if (unlikely(folio->mapping != mapping)) {
		folio_unlock(folio);
		return VM_FAULT_NOPAGE;
	}
	this_cpu_inc(region->counters->write_faults);
	trace_lmtrack_fault(region->id, vmf->pgoff);
	dirtied = lmtrack_mark_dirty(region, vmf->pgoff);
	this_cpu_write(region->counters->marked, folio);
	lmtrack_stun_fault(region, vmf->pgoff, dirtied, began);
	return VM_FAULT_LOCKED;
}

/*
 * The mappings of a process are registered so that the flip finds them. This runs under the
 * mmap_lock of the process, for a VMA that was copied: in fork, or when one is split or moved.
 */
static void region_vma_open(struct vm_area_struct *vma)
{
	/* Cannot fail: there is no way to say so, and a mapping that is missed loses writes. */
	lmtrack_mm_add(region_of_mapping(vma->vm_file->f_mapping), vma,
		       GFP_KERNEL | __GFP_NOFAIL);
}

static void region_vma_close(struct vm_area_struct *vma)
{
	lmtrack_mm_del(region_of_mapping(vma->vm_file->f_mapping), vma);
}

/* Two sets that differ in page_mkwrite only: with it, the kernel maps pages read-only first. */
const struct vm_operations_struct lmtrack_vm_ops_idle = {
	.open = region_vma_open,
	.close = region_vma_close,
	.fault = region_fault,
	.map_pages = filemap_map_pages,
};

const struct vm_operations_struct lmtrack_vm_ops_tracked = {
	.open = region_vma_open,
	.close = region_vma_close,
	.fault = region_fault,
	.map_pages = filemap_map_pages,
	.page_mkwrite = region_page_mkwrite,
};

/*
 * Whoever wrote without a page table entry of its own (ptrace, a driver that held the page)
 * says so here afterwards. So does every write fault, still under the folio's lock, and need
 * not be marked twice.
 *
 * A fault that came to nothing after page_mkwrite leaves @marked behind, and one of the others
 * may be taken for it. No write is lost by that: who writes so holds a reference to the page
 * and got it through a writable entry, when the page was marked; and a harvest marks a page
 * again that it finds held. That the page is marked here, too, is for the one whom neither of
 * these would notice.
 */
static bool region_dirty_folio(struct address_space *mapping, struct folio *folio)
{
	struct lmtrack_region *region = region_of_mapping(mapping);

	if (this_cpu_read(region->counters->marked) == folio) {
		this_cpu_write(region->counters->marked, NULL);
	} else if (READ_ONCE(region->state) != LMTRACK_IDLE) {
		/* The caller's data are there before we look whether the page is marked already. */
		smp_mb();
		lmtrack_mark_dirty(region, folio->index);
	}
	return noop_dirty_folio(mapping, folio);
}

static const struct address_space_operations region_aops = {
	.dirty_folio = region_dirty_folio,
	.migrate_folio = filemap_migrate_folio,
};

/* ---- The file ---- */

static int region_mmap(struct file *file, struct vm_area_struct *vma)
{
	/*
	 * The mapping helpers stop walking at a mapping that cannot be written or is private,
	 * and would leave those behind it unprotected: there must be none.
	 */
	if (!(vma->vm_flags & (VM_SHARED | VM_MAYSHARE)))
		return -EINVAL;
	if ((vma->vm_flags & (VM_SHARED | VM_MAYWRITE)) != (VM_SHARED | VM_MAYWRITE))
		return -EACCES;
	return lmtrack_mm_add(region_of_mapping(file->f_mapping), vma, GFP_KERNEL_ACCOUNT);
}

static long region_punch(struct lmtrack_region *region, loff_t offset, loff_t len)
{
	struct inode *inode = region->inode;
	loff_t end;

	if (!IS_ALIGNED(offset | len, PAGE_SIZE))
		return -EINVAL;
	end = min_t(loff_t, offset + len, i_size_read(inode));
	if (offset >= end)
		return 0;

	inode_lock(inode);
	unmap_mapping_range(inode->i_mapping, offset, end - offset, 0);
	truncate_inode_pages_range(inode->i_mapping, offset, end - 1);
	/*
	 * Afterwards: a harvest that runs in between either still reported the old page, and
	 * reports it again as a hole, or comes later.
	 */
	lmtrack_mark_punched(region, offset >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT);
	inode_unlock(inode);
	return 0;
}

static long region_fallocate(struct file *file, int mode, loff_t offset, loff_t len)
{
	if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
		return -EOPNOTSUPP;
	return region_punch(lmtrack_region_of(file), offset, len);
}

static loff_t region_seek_data(struct address_space *mapping, pgoff_t first, pgoff_t last)
{
	unsigned long index = first;

	if (!xa_find(&mapping->i_pages, &index, last, XA_PRESENT))
		return -ENXIO;
	return (loff_t)index << PAGE_SHIFT;
}

/*
 * The end of the file counts as a hole. Not by page_cache_next_miss(): its answer for page 0,
 * and for a search that finds no gap, is not the same in all kernels.
 */
static loff_t region_seek_hole(struct address_space *mapping, pgoff_t first, pgoff_t last)
{
	XA_STATE(xas, &mapping->i_pages, first);
	pgoff_t hole = first;
	void *entry;
	bool killed = false;

	rcu_read_lock();
	xas_for_each(&xas, entry, last) {
		if (xas_retry(&xas, entry))
			continue;
		if (xas.xa_index != hole)
			break;
		if (++hole % XA_CHECK_SCHED)
			continue;
		killed = fatal_signal_pending(current);
		if (killed)
			break;
		xas_pause(&xas);
		rcu_read_unlock();
		cond_resched();
		rcu_read_lock();
	}
	rcu_read_unlock();
	return killed ? -EINTR : (loff_t)hole << PAGE_SHIFT;
}

static loff_t region_llseek(struct file *file, loff_t offset, int whence)
{
	struct inode *inode = file_inode(file);
	loff_t size = i_size_read(inode);
	pgoff_t first = offset >> PAGE_SHIFT;
	pgoff_t last = (size - 1) >> PAGE_SHIFT;
	loff_t found;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return generic_file_llseek_size(file, offset, whence, size, size);
	if (offset < 0 || offset >= size)
		return -ENXIO;
	if (whence == SEEK_DATA)
		found = region_seek_data(inode->i_mapping, first, last);
	else
		found = region_seek_hole(inode->i_mapping, first, last);
	if (found < 0)
		return found;
	return vfs_setpos(file, max(found, offset), size);
}

static int region_release(struct inode *inode, struct file *file)
{
	lmtrack_track_release(inode->i_private, file);
	return 0;
}

static void region_show_fdinfo(struct seq_file *m, struct file *file)
{
	static const char * const states[] = { "idle", "starting", "tracked" };
	struct lmtrack_region *region = lmtrack_region_of(file);

	seq_printf(m, "lmtrack-id:\t%llu\n", region->id);
	seq_printf(m, "lmtrack-size:\t%llu\n", region->pages << PAGE_SHIFT);
	seq_printf(m, "lmtrack-resident:\t%lu\n",
		   READ_ONCE(region->inode->i_mapping->nrpages) << PAGE_SHIFT);
	seq_printf(m, "lmtrack-state:\t%s\n", states[READ_ONCE(region->state)]);
}

static long region_info(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_region_info *info = arg;

	if (info->reserved)
		return -EINVAL;
	info->region_size = region->pages << PAGE_SHIFT;
	info->region_id = region->id;
	info->page_size = PAGE_SIZE;
	info->node = region->node;
	info->state = READ_ONCE(region->state);
	memcpy(info->name, region->name, sizeof(info->name));
	return 0;
}

static long region_stats(struct file *file, void *arg)
{
	struct lmtrack_region *region = lmtrack_region_of(file);
	struct lmtrack_region_stats *stats = arg;
	int cpu;

	if (mutex_lock_killable(&region->harvest_lock))
		return -EINTR;
	stats->harvests = region->harvests;
	stats->harvested_pages = region->harvested;
	stats->repinned_pages = region->repinned;
	stats->kernel_bytes = region->held_chunks * BITS_TO_BYTES(LMTRACK_CHUNK_PAGES);
	mutex_unlock(&region->harvest_lock);

	stats->resident_pages = READ_ONCE(region->inode->i_mapping->nrpages);
	stats->chunks = atomic_long_read(&region->chunk_count);
	stats->mappers = lmtrack_mm_count(region);
	stats->kernel_bytes += sizeof(*region) +
			       num_possible_cpus() * sizeof(struct lmtrack_region_counters) +
			       stats->chunks * sizeof(struct lmtrack_chunk) +
			       lmtrack_stun_bytes(region);
	stats->write_faults = 0;
	stats->fault_ns = 0;
	stats->dirtied_pages = 0;
	for_each_possible_cpu(cpu) {
		stats->write_faults += per_cpu_ptr(region->counters, cpu)->write_faults;
		stats->fault_ns += per_cpu_ptr(region->counters, cpu)->fault_ns;
		stats->dirtied_pages += per_cpu_ptr(region->counters, cpu)->dirtied;
	}
	return 0;
}

static const struct lmtrack_request region_requests[] = {
	LMTRACK_REQUEST(LMTRACK_REGION_INFO, lmtrack_region_info, 0, true, region_info),
	LMTRACK_REQUEST(LMTRACK_TRACK_START, lmtrack_track_start,
			LMTRACK_TRACK_ALLOW_PINNED, true, lmtrack_track_start),
	LMTRACK_REQUEST(LMTRACK_TRACK_STOP, lmtrack_track_stop, 0, false,
			lmtrack_track_stop),
	LMTRACK_REQUEST(LMTRACK_DIRTY_GET, lmtrack_dirty_get, LMTRACK_DIRTY_CLEAR, true,
			lmtrack_dirty_get),
	LMTRACK_REQUEST(LMTRACK_REGION_STATS, lmtrack_region_stats, 0, true,
			region_stats),
	LMTRACK_REQUEST(LMTRACK_HOLD_SET, lmtrack_hold_set, LMTRACK_HOLD_CLEAR_ALL, true,
			lmtrack_hold_set),
	LMTRACK_REQUEST(LMTRACK_STUN_SET, lmtrack_stun_set, 0, true, lmtrack_stun_set),
	LMTRACK_REQUEST(LMTRACK_STUN_STATS, lmtrack_stun_stats, 0, true, lmtrack_stun_stats),
};

static long region_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return lmtrack_serve(file, region_requests, ARRAY_SIZE(region_requests), cmd, arg);
}

static const struct file_operations region_fops = {
	.owner = THIS_MODULE,
	.release = region_release,
	.mmap = region_mmap,
	.llseek = region_llseek,
	.fallocate = region_fallocate,
	.unlocked_ioctl = region_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.show_fdinfo = region_show_fdinfo,
};

/**
 * lmtrack_region_of() - the region behind a file
 * @file:	any file
 *
 * Return: NULL if it is some other file.
 */
struct lmtrack_region *lmtrack_region_of(struct file *file)
{
	return file->f_op == &region_fops ? file_inode(file)->i_private : NULL;
}

static int region_setattr(lmtrack_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	if ((attr->ia_valid & ATTR_SIZE) && attr->ia_size != i_size_read(d_inode(dentry)))
		return -EINVAL;
	attr->ia_valid &= ~ATTR_SIZE;
	return simple_setattr(idmap, dentry, attr);
}

static const struct inode_operations region_iops = {
	.setattr = region_setattr,
};

/* ---- Inode and file system ---- */

/*
 * The file system is mounted while it has inodes. The last of them may go from within an
 * operation on the file system itself (drop_caches holds its s_umount), which the end of the
 * mount would wait for: a worker lets go of it.
 */
static atomic_t region_unpins;

static void region_unpin_work(struct work_struct *work)
{
	while (atomic_add_unless(&region_unpins, -1, 0))
		simple_release_fs(&region_mount, &region_mount_users);
}

static DECLARE_WORK(region_unpin, region_unpin_work);

static void region_fs_unpin(void)
{
	atomic_inc(&region_unpins);
	queue_work(lmtrack_wq, &region_unpin);
}

static void region_free(struct lmtrack_region *region)
{
	struct lmtrack_chunk *chunk;
	unsigned long index;

	xa_for_each(&region->chunks, index, chunk) {
		kfree(chunk->held);
		kfree(chunk);
	}
	xa_destroy(&region->chunks);
	free_percpu(region->counters);
	lmtrack_stun_put(rcu_access_pointer(region->stun));
	kfree(region);
}

static void region_evict_inode(struct inode *inode)
{
	struct lmtrack_region *region = inode->i_private;

	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	if (!region)
		return;
	region_free(region);
	region_fs_unpin();
}

static const struct super_operations region_sops = {
	.statfs = simple_statfs,
	.evict_inode = region_evict_inode,
};

static int region_init_fs_context(struct fs_context *fc)
{
	struct pseudo_fs_context *ctx = init_pseudo(fc, LMTRACK_FS_MAGIC);

	if (!ctx)
		return -ENOMEM;
	ctx->ops = &region_sops;
	return 0;
}

static struct file_system_type region_fs_type = {
	.owner = THIS_MODULE,
	.name = "lmtrack",
	.init_fs_context = region_init_fs_context,
	.kill_sb = kill_anon_super,
};

static int region_fs_pin(void)
{
	return simple_pin_fs(&region_fs_type, &region_mount, &region_mount_users);
}

/**
 * lmtrack_region_hold() - keep a region for a worker
 * @region:	held by the caller in some other way
 *
 * Keeps the file system, too: it must outlive the eviction that the last put may bring.
 */
void lmtrack_region_hold(struct lmtrack_region *region)
{
	/* Cannot fail where the region already keeps the file system mounted. */
	WARN_ON_ONCE(region_fs_pin());
	ihold(region->inode);
}

/* The end of lmtrack_region_hold(). */
void lmtrack_region_put(struct lmtrack_region *region)
{
	iput(region->inode);
	region_fs_unpin();
}

static struct lmtrack_region *region_alloc(const struct lmtrack_region_create *create)
{
	struct lmtrack_region *region = kzalloc(sizeof(*region), GFP_KERNEL_ACCOUNT);

	if (!region)
		return NULL;
	region->counters = alloc_percpu_gfp(struct lmtrack_region_counters, GFP_KERNEL_ACCOUNT);
	if (!region->counters) {
		kfree(region);
		return NULL;
	}
	region->id = atomic64_inc_return(&region_ids);
	region->pages = create->region_size >> PAGE_SHIFT;
	region->node = create->node;
	strscpy(region->name, create->name, sizeof(region->name));
	xa_init_flags(&region->chunks, XA_FLAGS_ACCOUNT);
	mutex_init(&region->flip_lock);
	spin_lock_init(&region->mms_lock);
	INIT_LIST_HEAD(&region->mms);
	INIT_WORK(&region->flip_work, lmtrack_track_flip_work);
	mutex_init(&region->harvest_lock);
	return region;
}

/* An inode with a region of its own; from here on iput() undoes everything. */
static struct inode *region_new_inode(const struct lmtrack_region_create *create)
{
	struct lmtrack_region *region;
	struct inode *inode;
	int ret;

	ret = region_fs_pin();
	if (ret)
		return ERR_PTR(ret);
	region = region_alloc(create);
	if (!region) {
		ret = -ENOMEM;
		goto err_unpin;
	}
	inode = new_inode(region_mount->mnt_sb);
	if (!inode) {
		ret = -ENOMEM;
		goto err_free;
	}
	region->inode = inode;
	inode->i_private = region;
	inode->i_ino = get_next_ino();
	inode->i_mode = S_IFREG | 0600;
	inode->i_uid = current_fsuid();
	inode->i_gid = current_fsgid();
	inode->i_flags |= S_NOCMTIME;
	inode->i_op = &region_iops;
	inode->i_fop = &region_fops;
	inode->i_size = create->region_size;
	clear_nlink(inode);
	inode->i_mapping->a_ops = &region_aops;
	mapping_set_gfp_mask(inode->i_mapping, GFP_HIGHUSER_MOVABLE);
	mapping_set_unevictable(inode->i_mapping);
	return inode;

err_free:
	region_free(region);
err_unpin:
	region_fs_unpin();
	return ERR_PTR(ret);
}

static bool region_name_valid(const char *name)
{
	size_t len = strnlen(name, LMTRACK_NAME_MAX);
	size_t i;

	if (!len || len == LMTRACK_NAME_MAX)
		return false;
	for (i = 0; i < len; i++)
		if (name[i] <= ' ' || name[i] > '~' || name[i] == '/')
			return false;
	return true;
}

static bool region_node_valid(int node)
{
	return node == NUMA_NO_NODE ||
	       (node >= 0 && node < nr_node_ids && node_state(node, N_MEMORY));
}

long lmtrack_region_create(struct file *file, void *arg)
{
	const struct lmtrack_region_create *create = arg;
	char name[LMTRACK_NAME_MAX + sizeof("lmtrack:")];
	struct inode *inode;
	struct file *region_file;
	int fd;

	if (create->reserved || !create->region_size ||
	    !IS_ALIGNED(create->region_size, PAGE_SIZE) ||
	    create->region_size > LMTRACK_REGION_SIZE_MAX ||
	    !region_name_valid(create->name) || !region_node_valid(create->node))
		return -EINVAL;

	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	inode = region_new_inode(create);
	if (IS_ERR(inode)) {
		put_unused_fd(fd);
		return PTR_ERR(inode);
	}
	snprintf(name, sizeof(name), "lmtrack:%s", create->name);
	/* The file drops a reference to the module when it goes; nobody else takes it. */
	__module_get(THIS_MODULE);
	region_file = alloc_file_pseudo(inode, region_mount, name, O_RDWR | O_LARGEFILE,
					&region_fops);
	if (IS_ERR(region_file)) {
		module_put(THIS_MODULE);
		iput(inode);
		put_unused_fd(fd);
		return PTR_ERR(region_file);
	}
	region_file->f_mode |= FMODE_LSEEK;
	fd_install(fd, region_file);
	return fd;
}
