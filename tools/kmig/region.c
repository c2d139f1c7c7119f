// SPDX-License-Identifier: GPL-2.0
/* kmig region: the lmtrack regions that processes hold. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

#define LINK_PREFIX "/lmtrack:"

struct held {
	pid_t pid;
	int fd;
	char command[32];
	struct kmig_region_info info;
};

/* Return the number that names a directory entry of /proc, or -1. */
static int entry_number(const struct dirent *entry)
{
	char *end;
	long n;

	if (!isdigit((unsigned char)entry->d_name[0]))
		return -1;
	n = strtol(entry->d_name, &end, 10);
	return *end || n > INT_MAX ? -1 : (int)n;
}

static void read_command(pid_t pid, char command[32])
{
	char path[64];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/comm", pid);
	strcpy(command, "?");
	file = fopen(path, "re");
	if (!file)
		return;
	if (fgets(command, 32, file))
		command[strcspn(command, "\n")] = '\0';
	fclose(file);
}

static bool is_region(pid_t pid, int fd)
{
	char path[64], target[sizeof(LINK_PREFIX)];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, fd);
	n = readlink(path, target, sizeof(target));
	return n >= (ssize_t)strlen(LINK_PREFIX) && !memcmp(target, LINK_PREFIX, strlen(LINK_PREFIX));
}

static int look_up(struct kmig_ctx *ctx, pid_t pid, int fd, struct held *held)
{
	struct kmig_region *region;
	int ret;

	held->pid = pid;
	held->fd = fd;
	held->info = (struct kmig_region_info)KMIG_REGION_INFO_INIT;
	ret = kmig_region_find(ctx, pid, fd, &region);
	if (ret)
		return ret;
	ret = kmig_region_get_info(region, &held->info);
	kmig_region_free(region);
	read_command(pid, held->command);
	return ret;
}

static void put_region(struct out *o, const struct held *h, bool all)
{
	const char *state = h->info.tracked ? "tracked" : "idle";

	out_object(o, NULL);
	out_int(o, "pid", all ? "pid          %d\n" : "%8d ", h->pid);
	out_string(o, "command", all ? "command      %s\n" : "%-16s ", h->command);
	if (h->fd >= 0)
		out_int(o, "fd", all ? "fd           %d\n" : "%4d ", h->fd);
	out_string(o, "name", all ? "name         %s\n" : "%-16s ", h->info.name);
	out_bytes(o, "size", all ? "size         %s\n" : "%10s ", h->info.bytes);
	out_bytes(o, "resident", all ? "resident     %s\n" : "%10s ", h->info.resident_bytes);
	out_string(o, "state", all ? "state        %s\n" : "%s\n", state);
	out_uint(o, "id", all ? "id           %" PRIu64 "\n" : NULL, h->info.id);
	out_uint(o, "page-size", all ? "page size    %" PRIu64 "\n" : NULL, h->info.page_size);
	out_int(o, "node", all ? "node         %d\n" : NULL, h->info.node);
	out_uint(o, "mappers", all ? "mappers      %" PRIu64 "\n" : NULL, h->info.mappers);
	out_uint(o, "write-faults", all ? "write faults %" PRIu64 "\n" : NULL, h->info.write_faults);
	out_end(o);
}

/* A process may hold several descriptors of one region: QEMU does. The lowest is shown. */
static bool seen(const uint64_t *ids, size_t count, uint64_t id)
{
	size_t i;

	for (i = 0; i < count; i++)
		if (ids[i] == id)
			return true;
	return false;
}

static int compare(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

static void list_process(struct kmig_ctx *ctx, struct out *o, pid_t pid)
{
	uint64_t ids[64];
	int fds[64], fd;
	size_t i, n_ids = 0, n_fds = 0;
	struct dirent *entry;
	struct held held;
	char path[64];
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	dir = opendir(path);
	if (!dir)
		return;	/* ended meanwhile, or not ours to see */
	while ((entry = readdir(dir)) && n_fds < 64) {
		fd = entry_number(entry);
		if (fd >= 0 && is_region(pid, fd))
			fds[n_fds++] = fd;
	}
	closedir(dir);
	qsort(fds, n_fds, sizeof(fds[0]), compare);
	for (i = 0; i < n_fds; i++) {
		if (look_up(ctx, pid, fds[i], &held) || seen(ids, n_ids, held.info.id))
			continue;
		ids[n_ids++] = held.info.id;
		put_region(o, &held, false);
	}
}

static int list_all(struct kmig_ctx *ctx, struct out *o)
{
	DIR *dir = opendir("/proc");
	struct dirent *entry;

	if (!dir)
		return fail(errno, "/proc: %s", strerror(errno));
	out_text(o, "%8s %-16s %4s %-16s %10s %10s %s\n", "PID", "COMMAND", "FD", "NAME", "SIZE",
		 "RESIDENT", "STATE");
	out_array(o, NULL);
	while ((entry = readdir(dir))) {
		int pid = entry_number(entry);

		if (pid > 0 && pid != getpid())
			list_process(ctx, o, pid);
	}
	out_end(o);
	closedir(dir);
	return 0;
}

static struct {
	int pid, fd;
	bool json;
} asked = { .fd = -1 };

static const struct opt list_options[] = {
	OPT_FLAG('j', "json", &asked.json, "as JSON"),
	OPT_END
};

static int region_list(const struct verb *verb, char **operands)
{
	struct kmig_ctx *ctx;
	struct out *o;
	int ret;

	(void)verb;
	(void)operands;
	ret = open_context(&ctx, false);
	if (ret)
		return print_error(EXIT_FAILED, asked.json);
	o = out_new(asked.json ? NULL : stdout);
	ret = list_all(ctx, o);
	if (!ret && asked.json)
		out_print_json(o, stdout);
	out_free(o);
	kmig_ctx_free(ctx);
	return ret ? print_error(EXIT_FAILED, asked.json) : EXIT_DONE;
}

static const struct opt show_options[] = {
	OPT_INT("pid", "PID", &asked.pid, 1, INT_MAX, "the process that holds it"),
	OPT_INT("fd", "N", &asked.fd, 0, INT_MAX, "its descriptor there, when it holds several regions"),
	OPT_FLAG('j', "json", &asked.json, "as JSON"),
	OPT_END
};

static int show(void)
{
	struct kmig_ctx *ctx;
	struct held held;
	struct out *o;

	if (open_context(&ctx, false))
		return print_error(EXIT_FAILED, asked.json);
	if (look_up(ctx, asked.pid, asked.fd, &held)) {
		fail(EINVAL, "%s", kmig_ctx_error(ctx));
		kmig_ctx_free(ctx);
		return print_error(EXIT_FAILED, asked.json);
	}
	o = out_new(asked.json ? NULL : stdout);
	put_region(o, &held, true);
	if (asked.json)
		out_print_json(o, stdout);
	out_free(o);
	kmig_ctx_free(ctx);
	return EXIT_DONE;
}

static int region_show(const struct verb *verb, char **operands)
{
	(void)operands;
	if (!asked.pid)
		return usage_error(verb, "--pid is missing");
	return show();
}

const struct verb region_list_verb = {
	.name = "list",
	.arguments = "[-j]",
	.help = "the regions of all processes",
	.options = list_options,
	.run = region_list,
};

const struct verb region_show_verb = {
	.name = "show",
	.arguments = "--pid PID [--fd N] [-j]",
	.help = "one region in full",
	.options = show_options,
	.run = region_show,
};
