// SPDX-License-Identifier: GPL-2.0
/* vmm SECRET: take a guest in, on 127.0.0.1.  vmm SECRET HOST: run one, move it to HOST. */
#include <kmig.h>
#include <stdio.h>
#include "guest.h"	/* ram, vm_run(), vm_pause(), vm_save(), vm_load(): the VMM itself */

static int vm_prepare(const uint64_t *bytes, unsigned int count,
		      struct kmig_region **regions, void *data)
{
	regions[0] = data;
	return count == 1 && bytes[0] == RAM_BYTES ? 0 : -EINVAL;
}

static int move(struct kmig_ctx *ctx, struct kmig_region *region, const char *secret,
		const char *host)
{
	struct kmig_source_ops ops = { .size = sizeof(ops), .pause = vm_pause,
				       .resume = vm_run, .save_state = vm_save };
	struct kmig_source_opts opts = KMIG_SOURCE_OPTS_INIT;
	struct kmig_source *source;

	opts.host = host;
	opts.secret = secret;
	opts.secret_len = strlen(secret);
	return kmig_source_new(ctx, &opts, &ops, NULL, &source) ?:
	       kmig_source_add_region(source, region) ?: kmig_source_run(source);
}

static int take_in(struct kmig_ctx *ctx, struct kmig_region *region, const char *secret)
{
	struct kmig_destination_ops ops = { .size = sizeof(ops), .prepare = vm_prepare,
					    .load_state = vm_load, .run = vm_run };
	struct kmig_destination_opts opts = KMIG_DESTINATION_OPTS_INIT;
	struct kmig_destination *destination;

	opts.secret = secret;
	opts.secret_len = strlen(secret);
	return kmig_destination_new(ctx, &opts, &ops, region, &destination) ?:
	       kmig_destination_run(destination);
}

int main(int argc, char **argv)
{
	struct kmig_region_opts memory = KMIG_REGION_OPTS_INIT;
	FILE *file = argc > 1 ? fopen(argv[1], "r") : NULL;
	struct kmig_region *region;
	struct kmig_ctx *ctx;
	char secret[64];
	int err;

	if (!file || !fgets(secret, sizeof(secret), file) || kmig_ctx_new(&ctx))
		errx(1, "usage: vmm SECRET-FILE [HOST]");
	memory.bytes = RAM_BYTES;
	if (kmig_region_create(ctx, &memory, &region) || !(ram = kmig_region_map(region)))
		errx(1, "%s", kmig_ctx_error(ctx));
	if (argc > 2) {
		vm_run(NULL);
		sleep(1);
	}
	err = argc > 2 ? move(ctx, region, secret, argv[2]) : take_in(ctx, region, secret);
	if (err)	/* here ends the example; the guest of a real VMM runs on, see kmig.h */
		errx(1, "%s", kmig_ctx_error(ctx));
	printf("%s at step %lu\n", argc > 2 ? "moved away" : "arrived", steps);
	sleep(1);	/* the guest runs on where it is now, and finds what was lost */
	return 0;
}
