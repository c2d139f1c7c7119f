/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The part of the example that is not about moving: a machine with one vCPU, a thread that
 * writes guest memory where a real one would call KVM_RUN. It notices a page whose last
 * write was lost on the way.
 */
#ifndef GUEST_H
#define GUEST_H

#include <err.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RAM_BYTES	(16ull << 20)
#define RAM_PAGES	(RAM_BYTES / 4096)

static uint64_t *ram;		/* guest memory */
static uint64_t steps;		/* the vCPU's only register, and so all the device state */
static volatile bool running;
static pthread_t vcpu;

static void *vcpu_thread(void *data)
{
	for (; running; steps++) {
		uint64_t *page = ram + steps % RAM_PAGES * (4096 / sizeof(*ram));

		if (*page != (steps < RAM_PAGES ? 0 : steps - RAM_PAGES))
			errx(2, "step %lu: the page was lost", steps);
		*page = steps;
		if (steps % 8 == 0)
			usleep(100);
	}
	return data;
}

static int vm_run(void *data)
{
	running = true;
	return -pthread_create(&vcpu, NULL, vcpu_thread, data);
}

static int vm_pause(void *data)
{
	(void)data;
	running = false;
	return -pthread_join(vcpu, NULL);
}

static int vm_save(void **state, size_t *length, void *data)
{
	(void)data;
	*length = sizeof(steps);
	*state = malloc(*length);
	if (!*state)
		return -ENOMEM;
	memcpy(*state, &steps, *length);
	return 0;
}

static int vm_load(const void *state, size_t length, void *data)
{
	(void)data;
	if (length != sizeof(steps))
		return -EPROTO;
	memcpy(&steps, state, length);
	return 0;
}

#endif /* GUEST_H */
