// SPDX-License-Identifier: GPL-2.0
/* kmig qemu run: a stock QEMU whose memory is an lmtrack region. */
#include <errno.h>
#include <getopt.h>
#include <limits.h>

#include "tool.h"

static const struct option options[] = {
	{ "memory", required_argument, NULL, 'm' },
	{ "qmp", required_argument, NULL, 'q' },
	{ "name", required_argument, NULL, 'n' },
	{ "node", required_argument, NULL, 'N' },
	{ "help", no_argument, NULL, 'h' },
	{ NULL, 0, NULL, 0 },
};

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

static int run_main(const struct verb *verb, int argc, char **argv)
{
	struct qemu_start start = { .node = -1 };
	uint64_t number;
	int c;

	while ((c = getopt_long(argc, argv, "+h", options, NULL)) != -1) {
		switch (c) {
		case 'm':
			if (parse_size(optarg, &start.bytes))
				return usage_error(verb, "%s", failure());
			break;
		case 'q':
			start.qmp = optarg;
			break;
		case 'n':
			start.name = optarg;
			break;
		case 'N':
			if (parse_number("--node", optarg, 0, INT_MAX, &number))
				return usage_error(verb, "%s", failure());
			start.node = (int)number;
			break;
		case 'h':
			return usage_help(verb);
		default:
			return usage_bad(verb);
		}
	}
	start.argv = argv + optind;
	if (!start.bytes || !start.qmp)
		return usage_error(verb, "--memory and --qmp are needed");
	if (!start.argv[0])
		return usage_error(verb, "QEMU's command is missing: write it behind '--'");
	return run(&start);
}

const struct verb run_verb = {
	"run", "--memory SIZE --qmp PATH [--name NAME] [--node N] -- qemu-system-x86_64 ARGS...",
	"start a QEMU whose memory is an lmtrack region",
	"  --memory SIZE  the guest's memory, as in 4G; give QEMU no -m\n"
	"  --qmp PATH     where QEMU is to make its QMP socket\n"
	"  --name NAME    the region's name, for 'kmig region list'\n"
	"  --node N       take the memory from this NUMA node\n",
	run_main,
};
