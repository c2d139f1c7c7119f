/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Before every test program. A kernel that checks itself takes several times as long for everything:
 * with LMTRACK_SLOWER=N in the environment a test may take N times its limit, and so may a peer of
 * libkmig's be silent.
 */
#ifndef SLOWER_H
#define SLOWER_H

#include <stdlib.h>
#include <unistd.h>

static inline unsigned int lmt_slower(void)
{
	const char *value = getenv("LMTRACK_SLOWER");
	unsigned int times = value ? atoi(value) : 1;

	return times ? times : 1;
}

/* This is how the harness sets its limits. */
#define alarm(seconds) alarm((seconds) * lmt_slower())

#endif /* SLOWER_H */
