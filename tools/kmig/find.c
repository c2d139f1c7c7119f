// SPDX-License-Identifier: GPL-2.0
/* The region that is a running QEMU's guest memory. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tool.h"

int find_region(struct vmm *v, struct kmig_ctx *ctx, const char *qmp, struct kmig_region **region, int *pidfd)
{
	pid_t pid = qmp_peer(v->qmp);
	uint64_t bytes;
	int fd, ret;

	if (pid <= 0)
		return fail(ESRCH, "%s: QEMU's process cannot be told (it is in another PID namespace)", qmp);
	*pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (*pidfd < 0)
		return fail(errno, "QEMU (process %d): %s", pid, strerror(errno));
	ret = vmm_check_memory(v, pid, &fd, &bytes);
	if (ret)
		return ret;
	ret = kmig_region_find(ctx, pid, fd, region);
	if (ret == -ENOENT)
		return fail(ENOENT, "QEMU (process %d) holds no lmtrack region: start it with 'kmig qemu run'", pid);
	if (ret)
		return fail(-ret, "%s", kmig_ctx_error(ctx));
	if (kmig_region_bytes(*region) != bytes)
		return fail(EINVAL, "QEMU's memory has %" PRIu64 " bytes, its lmtrack region %" PRIu64,
			    bytes, kmig_region_bytes(*region));
	return 0;
}
