// SPDX-License-Identifier: LGPL-2.1-or-later
/* How much memory is there to be had, and how many processors? */
#include "private.h"

#include <limits.h>
#include <sched.h>

/* More than any kernel is built for. */
#define CPUS_MAX (1 << 20)

static bool read_number(const char *path, uint64_t *value)
{
	FILE *file = fopen(path, "re");
	unsigned long long number;
	bool ok;

	if (!file)
		return false;
	ok = fscanf(file, "%llu", &number) == 1;	/* "max" is no number: no limit */
	fclose(file);
	*value = number;
	return ok;
}

static uint64_t machine_available(void)
{
	FILE *file = fopen("/proc/meminfo", "re");
	unsigned long long kib;
	char line[128];
	uint64_t bytes = UINT64_MAX;

	if (!file)
		return bytes;
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			bytes = kib * 1024;
	fclose(file);
	return bytes;
}

/* What the memory cgroups (version 2) around this process leave, from its own to the root. */
static uint64_t cgroup_available(void)
{
	FILE *file = fopen("/proc/self/cgroup", "re");
	char line[PATH_MAX], path[PATH_MAX + 64], group[PATH_MAX] = "";
	uint64_t least = UINT64_MAX, limit, current;

	if (!file)
		return least;
	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, "0::/", 4))
			snprintf(group, sizeof(group), "%.*s", (int)strcspn(line + 3, "\n"), line + 3);
	fclose(file);

	while (*group) {
		snprintf(path, sizeof(path), "/sys/fs/cgroup%s/memory.max", group);
		if (read_number(path, &limit)) {
			snprintf(path, sizeof(path), "/sys/fs/cgroup%s/memory.current", group);
			if (read_number(path, &current) && (current > limit ? 0 : limit - current) < least)
				least = current > limit ? 0 : limit - current;
		}
		*strrchr(group, '/') = '\0';
	}
	return least;
}

uint64_t kmig_memory_available(void)
{
	uint64_t machine = machine_available();
	uint64_t cgroup = cgroup_available();

	return machine < cgroup ? machine : cgroup;
}

/* EINVAL: the kernel knows of more processors than the set has room for. */
unsigned int kmig_cpus(void)
{
	unsigned int found = 0;

	for (int room = CPU_SETSIZE; !found && room <= CPUS_MAX; room *= 2) {
		cpu_set_t *set = CPU_ALLOC(room);

		if (!set)
			break;
		if (!sched_getaffinity(0, CPU_ALLOC_SIZE(room), set))
			found = CPU_COUNT_S(CPU_ALLOC_SIZE(room), set);
		else if (errno != EINVAL)
			room = CPUS_MAX;
		CPU_FREE(set);
	}
	return found ? found : 1;
}
