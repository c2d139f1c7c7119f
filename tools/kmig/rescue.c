// SPDX-License-Identifier: GPL-2.0
/*
 * The source's worker was killed: what is so with the guest, and what can be set right.
 *
 * The engine lets the guest go on only when the destination does not run it and never will. So
 * where the worker had begun with that, it is safe to finish it. Without that, a guest that was
 * paused for the final check may have been committed since: only QEMU is asked then.
 */
#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include <json-c/json.h>

#include "tool.h"

#define CONNECT_TIMEOUT_MS 10000
#define KILLED "the process that moved the guest was killed"

/* What happened takes the place of what failed on the way to knowing it. */
static int __attribute__((format(printf, 2, 3))) is_so(int code, const char *fmt, ...)
{
	char text[900];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	failure_clear();
	fail(ECHILD, "%s", text);
	return code;
}

/* The worker may have been killed before it ended QEMU. */
static int end_source(struct vmm *v, const char *qmp)
{
	int ret = vmm_connect(v, qmp, CONNECT_TIMEOUT_MS);

	if (!ret)
		ret = qmp_run(v->qmp, "quit", NULL);
	if (!ret || ret == -ENOENT || ret == -ECONNREFUSED || ret == -ECONNRESET || ret == -EPIPE)
		return is_so(EXIT_DONE, "the guest runs at the destination; the process that moved it was killed");
	return is_so(EXIT_DONE, "the guest runs at the destination; the process that moved it was killed, and QEMU at the source could not be ended; its guest is paused and must stay so: %s",
		     failure());
}

static int ask(struct vmm *v, const char *qmp)
{
	char status[32];
	int ret = vmm_connect(v, qmp, CONNECT_TIMEOUT_MS);

	if (!ret)
		ret = vmm_status(v, status);
	if (ret)
		return is_so(EXIT_UNKNOWN, KILLED " near the commit, and QEMU here cannot be asked (%s). The guest may run at the destination: look.",
			     failure());
	return is_so(EXIT_UNKNOWN, KILLED " near the commit: the guest is '%s' here, says QEMU, and may run at the destination. If it runs there, end this QEMU (QMP 'quit'); only if it does not, let it go on here (QMP 'cont').",
		     status);
}

static int recover(struct vmm *v, const struct footprint *f, const char *qmp, char status[32])
{
	int ret = vmm_connect(v, qmp, CONNECT_TIMEOUT_MS);

	if (!ret && f->paused)
		ret = vmm_resume(v);
	if (!ret) {
		/* NULL: nothing was set. */
		v->capabilities = json_tokener_parse(f->capabilities);
		v->parameters = json_tokener_parse(f->parameters);
		ret = vmm_restore(v);
	}
	return ret ? ret : vmm_status(v, status);
}

static int find_out(struct vmm *v, const struct footprint *f, const char *qmp)
{
	char status[32];

	if (f->completed)
		return end_source(v, qmp);
	if (f->paused && !f->resuming && f->state >= KMIG_STATE_CHECK)
		return ask(v, qmp);
	if (recover(v, f, qmp, status))
		return is_so(EXIT_UNKNOWN, KILLED ", and QEMU does not answer: %s. The guest does not run at the destination.",
			     failure());
	if (strcmp(status, "running"))
		return is_so(EXIT_UNKNOWN, KILLED ": the guest is '%s' here, says QEMU, and does not run at the destination",
			     status);
	return is_so(EXIT_FAILED, KILLED ": the guest runs on here");
}

/* It may have been resumed before, for want of a data channel: that says nothing of this time. */
void footprint_pause(struct footprint *f)
{
	f->resuming = false;
	f->paused = true;
}

int rescue(const struct footprint *f, const char *qmp)
{
	struct vmm vmm = VMM_INIT;
	int code;

	failure_clear();
	code = find_out(&vmm, f, qmp);
	vmm_close(&vmm);
	return code;
}
