// SPDX-License-Identifier: LGPL-2.1-or-later
/* What both engines do for their reports. */
#include "report.h"

#define PROGRESS_MS 250

const char *kmig_state_name(enum kmig_state state)
{
	static const char *const names[KMIG_STATES] = {
		[KMIG_STATE_HELLO] = "hello",
		[KMIG_STATE_CAPACITY] = "capacity",
		[KMIG_STATE_REGIONS] = "regions",
		[KMIG_STATE_DEVICES] = "devices",
		[KMIG_STATE_CHANNELS] = "channels",
		[KMIG_STATE_FIRST_PASS] = "first-pass",
		[KMIG_STATE_ITERATION] = "iteration",
		[KMIG_STATE_BLACKOUT] = "blackout",
		[KMIG_STATE_CHECK] = "check",
		[KMIG_STATE_CLEANUP] = "clean-up",
	};

	return (unsigned int)state < KMIG_STATES ? names[state] : "unknown";
}

void kmig_report_start(struct kmig_report *report, struct kmig_clock *clock)
{
	clock->start_ns = kmig_now_ns();
	clock->told_ns = clock->start_ns;
	report->state = KMIG_STATE_HELLO;
	report->verdict = KMIG_RUNNING;
}

void kmig_report_enter(struct kmig_report *report, const struct kmig_clock *clock, enum kmig_state state)
{
	report->state = state;
	report->state_ns[state] = kmig_now_ns() - clock->start_ns;
	report->total_ns = report->state_ns[state];
	if (state == KMIG_STATE_FIRST_PASS)
		report->setup_ns = report->state_ns[state];
}

bool kmig_report_due(struct kmig_clock *clock)
{
	uint64_t now = kmig_now_ns();

	if (now - clock->told_ns < kmig_ms(PROGRESS_MS))
		return false;
	clock->told_ns = now;
	return true;
}
