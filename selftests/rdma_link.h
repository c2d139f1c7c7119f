/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A soft-RoCE device for tests, on one end of a veth pair in the first network namespace: up to
 * 6.12 soft-RoCE has its socket there and nowhere else. Both sides of a connection use it, by
 * its own address. Left for the programs that follow. LMTRACK_RDMA=siw: an iWARP device instead,
 * which Debian's kernels have not, and the debug kernel has.
 */
#ifndef RDMA_LINK_H
#define RDMA_LINK_H

#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RDMA_IPV4	"10.76.0.1"
#define RDMA_IPV6	"fd76::1"

static inline bool rdma_shell(const char *command)
{
	return !system(command);
}

static inline bool rdma_is_iwarp(void)
{
	const char *type = getenv("LMTRACK_RDMA");

	return type && !strcmp(type, "siw");
}

/* lmtrack_rdma.ko lies beside lmtrack.ko. */
static inline bool rdma_module_load(void)
{
	const char *module = getenv("LMTRACK_MODULE");
	char path[PATH_MAX], command[PATH_MAX + 64];

	if (!access("/sys/module/lmtrack_rdma", F_OK))
		return true;
	snprintf(path, sizeof(path), "%s", module ?: "./lmtrack.ko");
	snprintf(command, sizeof(command), "modprobe rdma_cm && insmod %s/lmtrack_rdma.ko",
		 dirname(path));
	return rdma_shell(command);
}

static inline bool rdma_link_up(void)
{
	if (!access("/sys/class/infiniband/lmt0", F_OK))
		return true;
	/* The kernel loads the type's module by itself. */
	return rdma_shell("{ modprobe rdma_ucm && modprobe ib_uverbs &&"
			  " ip link set lo up &&"
			  " { [ -e /sys/class/net/lmt0 ] ||"
			  "   ip link add lmt0 type veth peer name lmt1; } &&"
			  " ip link set lmt0 mtu 9000 up && ip link set lmt1 mtu 9000 up &&"
			  " ip addr replace " RDMA_IPV4 "/24 dev lmt0 &&"
			  " ip addr replace " RDMA_IPV6 "/64 dev lmt0 nodad &&"
			  " rdma link add lmt0 type ${LMTRACK_RDMA:-rxe} netdev lmt0; } >/dev/null 2>&1");
}

#endif /* RDMA_LINK_H */
