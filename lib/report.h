/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What both engines do for their reports. */
#ifndef KMIG_REPORT_H
#define KMIG_REPORT_H

#include "private.h"

struct kmig_clock {
	uint64_t start_ns;
	uint64_t told_ns;	/* when progress was last called */
};

void kmig_report_start(struct kmig_report *report, struct kmig_clock *clock);
void kmig_report_enter(struct kmig_report *report, const struct kmig_clock *clock, enum kmig_state state);
/* Several times a second is enough: is it time again? */
bool kmig_report_due(struct kmig_clock *clock);

#endif /* KMIG_REPORT_H */
