// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: the device that makes regions and streams, and the way requests reach them.
 *
 * Lifetimes: an open /dev/lmtrack holds the module; so does every region's file, the
 * regions' file system while a region exists, every stream, every thread of a channel, and every
 * thread that is to be delayed. When none of them is left no code of the module can run but the
 * workers', RCU's and the last instructions of a thread that was delayed, which lmtrack_exit()
 * waits for.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/uaccess.h>

#include "lmtrack.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* The largest argument fits. */
#define LMTRACK_ARG_MAX	512
static_assert(sizeof(struct lmtrack_stun_stats) <= LMTRACK_ARG_MAX);

/**
 * lmtrack_serve() - find a request in a table, fetch its argument, serve it
 * @file:	the object
 * @table:	its requests
 * @entries:	in @table
 * @cmd:	from ioctl()
 * @uarg:	from ioctl()
 *
 * Return: what the request returned; ENOTTY, EFAULT, EINVAL (argument too short), E2BIG (set
 * beyond what is known here) or EOPNOTSUPP (a flag) before that.
 */
long lmtrack_serve(struct file *file, const struct lmtrack_request *table, size_t entries,
		   unsigned int cmd, unsigned long uarg)
{
	void __user *user = (void __user *)uarg;
	const struct lmtrack_request *request = NULL;
	u64 arg[LMTRACK_ARG_MAX / sizeof(u64)];
	u32 user_size;
	size_t i;
	long ret;

	for (i = 0; i < entries; i++)
		if (table[i].cmd == cmd)
			request = &table[i];
	if (!request)
		return -ENOTTY;

	if (get_user(user_size, (u32 __user *)user))
		return -EFAULT;
	if (user_size < (request->least ?: request->size))
		return -EINVAL;
	if (user_size > PAGE_SIZE)
		return -E2BIG;
	ret = copy_struct_from_user(arg, request->size, user, user_size);
	if (ret)
		return ret;
	/* Every argument begins with its size and its flags. */
	if (((u32 *)arg)[1] & ~request->flags)
		return -EOPNOTSUPP;
	/* Where the answer could not be told, nothing is done. */
	if (request->out && copy_to_user(user, arg, min(user_size, request->size)))
		return -EFAULT;

	ret = request->serve(file, arg);
	if (request->out && copy_to_user(user, arg, min(user_size, request->size)) && ret >= 0)
		ret = -EFAULT;
	return ret;
}

static const struct lmtrack_request lmtrack_requests[] = {
	LMTRACK_REQUEST(LMTRACK_REGION_CREATE, lmtrack_region_create, 0, false,
			lmtrack_region_create),
	LMTRACK_REQUEST(LMTRACK_STREAM_CREATE, lmtrack_stream_create,
			LMTRACK_STREAM_NO_ZERO_DETECT, false, lmtrack_stream_create),
};

static long lmtrack_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return lmtrack_serve(file, lmtrack_requests, ARRAY_SIZE(lmtrack_requests), cmd, arg);
}

static const struct file_operations lmtrack_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = lmtrack_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice lmtrack_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "lmtrack",
	.fops = &lmtrack_fops,
	.mode = 0660,
};

struct workqueue_struct *lmtrack_wq;

static int __init lmtrack_init(void)
{
	int ret;

	lmtrack_wq = alloc_workqueue("lmtrack", WQ_UNBOUND, 0);
	if (!lmtrack_wq)
		return -ENOMEM;
	ret = misc_register(&lmtrack_device);
	if (ret)
		destroy_workqueue(lmtrack_wq);
	return ret;
}

static void __exit lmtrack_exit(void)
{
	misc_deregister(&lmtrack_device);
	destroy_workqueue(lmtrack_wq);
	/* A thread that was delayed may have let go of the module and not left its code yet. */
	synchronize_rcu_tasks();
	/* What it let go of is freed by RCU. */
	rcu_barrier();
}

module_init(lmtrack_init);
module_exit(lmtrack_exit);

MODULE_DESCRIPTION("Tracked guest memory and its zero-copy sender for live migration");
MODULE_AUTHOR("The lmtrack developers");
MODULE_LICENSE("GPL");
