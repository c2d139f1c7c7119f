// SPDX-License-Identifier: GPL-2.0
/* kmig qemu run: a stock QEMU whose memory is an lmtrack region. */
#include <errno.h>
#include <limits.h>

#include "tool.h"

/* QEMU takes this process's place and with it the region; nothing of us stays. */
static int run(const struct qemu_start *start)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	struct kmig_region *region;
	struct kmig_ctx *ctx;

	if (qemu_check_start(start) || open_context(&ctx, false))
		return print_failure(EXIT_FAILED);
	opts.kind = KMIG_REGION_LMTRACK;
	opts.bytes = start->bytes;
	opts.node = start->node;
	if (start->name)
		opts.name = start->name;
	if (kmig_region_create(ctx, &opts, &region))
		fail(EIO, "%s", kmig_ctx_error(ctx));
	else
		qemu_exec(qemu_arguments(start), kmig_region_fd(region));
	return print_failure(EXIT_FAILED);
}

static struct qemu_start asked = { .node = -1 };

static const struct opt options[] = {
	OPT_SIZE("memory", "SIZE", &asked.bytes, "the guest's memory, as in 4G; give QEMU no -m"),
	OPT_TEXT("qmp", "PATH", &asked.qmp, "where QEMU is to make its QMP socket"),
	OPT_TEXT("name", "NAME", &asked.name, "the region's name, for 'kmig region list'"),
	OPT_INT("node", "N", &asked.node, 0, INT_MAX, "take the memory from this NUMA node"),
	OPT_END
};

static int run_main(const struct verb *verb, char **operands)
{
	asked.argv = operands;
	if (!asked.bytes || !asked.qmp)
		return usage_error(verb, "--memory and --qmp are needed");
	if (!operands[0])
		return usage_error(verb, "QEMU's command is missing: write it behind '--'");
	return run(&asked);
}

const struct verb run_verb = {
	.name = "run",
	.arguments = "--memory SIZE --qmp PATH [--name NAME] [--node N] -- qemu-system-x86_64 ARGS...",
	.help = "start a QEMU whose memory is an lmtrack region",
	.options = options,
	.operands = true,
	.run = run_main,
};
