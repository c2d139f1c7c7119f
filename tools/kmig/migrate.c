// SPDX-License-Identifier: GPL-2.0
/*
 * kmig qemu migrate: move the guest of a running QEMU to another host.
 *
 * The engine of libkmig decides what happens when; here are the functions through which it
 * moves QEMU, and what is told to the user.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <json-c/json.h>

#include "tool.h"

#define SETTLE_MS 200
#define CONNECT_TIMEOUT_MS 10000
#define QUIT_TIMEOUT_MS 10000
#define PROBE_MS_MIN 10

struct migration {
	struct kmig_source_opts opts;
	struct endpoint to;
	struct paths paths;
	const char *qmp, *secret_path, *report_path, *page_path;
	char secret[SECRET_MAX];
	bool channels_given;
	bool json, verbose;

	struct vmm vmm;
	int pidfd;		/* QEMU's process, or -1 */
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_source *source;
	struct account account;
	struct timeline *timeline;
	struct progress progress;
	struct footprint *footprint;
	bool lost;		/* QEMU does not answer any more */
};

/* ---- what the engine calls ------------------------------------------------------------ */

static int pause_guest(void *data)
{
	struct migration *m = data;

	footprint_pause(m->footprint);
	return vmm_pause(&m->vmm);
}

static int resume_guest(void *data)
{
	struct migration *m = data;
	int ret;

	m->footprint->resuming = true;
	ret = vmm_resume(&m->vmm);
	if (!ret)
		m->footprint->paused = false;
	return ret;
}

static int save_state(void **state, size_t *length, void *data)
{
	struct migration *m = data;

	return vmm_save(&m->vmm, state, length);
}

static void completed(void *data)
{
	struct migration *m = data;

	m->footprint->completed = true;
	/*
	 * The guest has just begun to run and looks for its pages, maybe on the processors that
	 * clean up here; the destination, too, does so only when this has returned.
	 */
	usleep(SETTLE_MS * 1000);
	go_last(getpid());
	go_last(qmp_peer(m->vmm.qmp));
	qmp_ignore_interrupt(m->vmm.qmp);
	if (qmp_run(m->vmm.qmp, "quit", NULL))
		say("QEMU at the source could not be ended; its guest is paused and must stay so: %s", failure());
}

static void progress(const struct kmig_report *report, void *data)
{
	struct migration *m = data;

	m->footprint->state = report->state;
	m->footprint->report = *report;
	account_progress(&m->account, report);
	timeline_add(m->timeline, report);
	progress_update(&m->progress, report);
}

static void round_done(const struct kmig_round_report *round, void *data)
{
	struct migration *m = data;

	/* The next forecast may come before the next call of progress(). */
	kmig_source_report(m->source, &m->account.report);
	account_progress(&m->account, &m->account.report);
	account_round(&m->account, round);
	timeline_round(m->timeline, &m->account.report, round);
	progress_round(&m->progress, round);
}

static const struct kmig_source_ops ops = {
	.size = sizeof(ops),
	.pause = pause_guest,
	.resume = resume_guest,
	.save_state = save_state,
	.completed = completed,
	.progress = progress,
	.round = round_done,
};

/* ---- the worker ------------------------------------------------------------------------- */

static struct kmig_source *active;

static void abort_active(void)
{
	kmig_source_abort(active);
}

static void limit_active(uint64_t bytes_per_second)
{
	/* Whoever may signal us can send anything: what is out of range changes nothing. */
	kmig_source_set_max_bandwidth(active, bytes_per_second);
}

/* Should we be killed the front sets QEMU back to this; what does not fit, it cannot. */
static void note_plan(const struct vmm *v, struct footprint *f)
{
	const char *capabilities = json_object_to_json_string(v->capabilities);
	const char *parameters = json_object_to_json_string(v->parameters);

	if (strlen(capabilities) < sizeof(f->capabilities))
		strcpy(f->capabilities, capabilities);
	if (strlen(parameters) < sizeof(f->parameters))
		strcpy(f->parameters, parameters);
}

static int prepare(struct migration *m)
{
	int ret = open_context(&m->ctx, m->verbose);

	if (!ret)
		ret = vmm_connect(&m->vmm, m->qmp, CONNECT_TIMEOUT_MS);
	if (!ret)
		ret = vmm_check_source(&m->vmm);
	if (!ret)
		ret = find_region(&m->vmm, m->ctx, m->qmp, &m->region, &m->pidfd);
	if (!ret)
		ret = vmm_plan(&m->vmm);
	if (ret)
		return ret;
	note_plan(&m->vmm, m->footprint);
	ret = vmm_set_up(&m->vmm);
	return ret ? ret : vmm_open_outgoing(&m->vmm);
}

static int run_engine(struct migration *m)
{
	int ret;

	ret = kmig_source_new(m->ctx, &m->opts, &ops, m, &m->source);
	if (!ret)
		ret = kmig_source_add_region(m->source, m->region);
	if (ret)
		return fail(-ret, "%s", kmig_ctx_error(m->ctx));
	active = m->source;
	on_interrupt(abort_active);
	on_limit(limit_active);
	if (m->opts.probe_ms)
		progress_say(&m->progress, "the guest is watched");
	ret = kmig_source_run(m->source);
	on_limit(NULL);
	on_interrupt(NULL);
	status_line(NULL);
	kmig_source_report(m->source, &m->account.report);
	if (ret)
		fail(-ret, "%s", kmig_ctx_error(m->ctx));
	return ret;
}

/* Its process, not only its connection: then its memory is free, too. */
static void wait_for_quit(struct migration *m)
{
	struct pollfd p = { .fd = m->pidfd, .events = POLLIN };
	int64_t deadline = now_ms() + QUIT_TIMEOUT_MS, left;

	while ((left = deadline - now_ms()) > 0)
		if (poll(&p, 1, (int)left) == 1)
			return;
	say("QEMU at the source does not end; its guest is paused and must stay so");
}

static int tell_outcome(struct migration *m)
{
	switch (m->account.report.verdict) {
	case KMIG_COMPLETED:
		return EXIT_DONE;
	case KMIG_UNKNOWN:
		say("the migration was committed, but the destination did not confirm: %s", failure());
		say("the guest is paused here and may run there: look. If it runs there, end this QEMU (QMP 'quit'); only if it does not, let it go on here (QMP 'cont').");
		return EXIT_UNKNOWN;
	default:
		break;
	}
	if (m->lost) {
		say("%s", failure());
		say("QEMU does not answer any more: look after it. The guest does not run at the destination.");
		return EXIT_UNKNOWN;
	}
	if (m->footprint->paused) {
		say("%s", failure());
		say("the guest could not be set running again: it is paused here (QMP 'cont'); it does not run at the destination");
		return EXIT_UNKNOWN;
	}
	if (interrupted) {
		say("interrupted: the guest runs on here");
		return EXIT_INTERRUPTED;
	}
	say("%s", failure());
	say("not migrated: the guest runs on here");
	return EXIT_FAILED;
}

static bool write_page(const struct migration *m, const char *error)
{
	struct kmig_region_info info = KMIG_REGION_INFO_INIT;
	char to[HOST_MAX + 8];
	const struct story story = {
		.account = &m->account,
		.timeline = m->timeline,
		.guest = m->region && !kmig_region_get_info(m->region, &info) ? info.name : m->qmp,
		.to = to,
		.error = error,
		.downtime_ms = m->opts.downtime_ms,
	};

	snprintf(to, sizeof(to), strchr(m->to.host, ':') ? "[%s]:%u" : "%s:%u", m->to.host, m->to.port);
	return !html_write(&story, m->page_path);
}

static bool is_asked_for(const struct migration *m)
{
	return m->json || m->report_path || m->page_path;
}

/* All that were asked for, whatever becomes of one of them. @failed: why is in failure(). */
static void write_reports(const struct migration *m, bool failed)
{
	char error[1024] = "";

	if (failed)
		snprintf(error, sizeof(error), "%s", failure());
	failure_clear();
	if (report_finish(&m->account, error, m->json, m->report_path))
		say("%s", failure());
	failure_clear();
	if (m->page_path && !write_page(m, error))
		say("%s", failure());
}

static void tear_down(struct migration *m)
{
	kmig_source_free(m->source);
	kmig_region_free(m->region);
	kmig_ctx_free(m->ctx);
	vmm_close(&m->vmm);
	if (m->pidfd >= 0)
		close(m->pidfd);
	account_free(&m->account);
	timeline_free(m->timeline);
}

static int work(void *data)
{
	struct migration *m = data;
	bool tell = is_asked_for(m);
	int ret, code;

	m->account.report.verdict = KMIG_FAILED;
	progress_init(&m->progress, true, m->verbose);
	ret = prepare(m);
	if (!ret) {
		ret = run_engine(m);
		/* A table of nothing tells nothing. */
		tell |= m->account.report.state_ns[KMIG_STATE_CAPACITY] > 0;
	}
	if (m->account.report.verdict == KMIG_COMPLETED)
		wait_for_quit(m);
	else if (m->vmm.qmp && vmm_restore(&m->vmm))
		m->lost = m->account.report.verdict != KMIG_UNKNOWN;
	code = tell_outcome(m);
	/* The exit status tells where the guest is, whether or not all reports could be written. */
	if (tell)
		write_reports(m, ret);
	m->footprint->told = true;
	tear_down(m);
	return code;
}

/* ---- the front, when the worker was killed ------------------------------------------------- */

static int died(void *data)
{
	struct migration *m = data;
	int code = rescue(m->footprint, m->qmp);

	say("%s", failure());
	if (m->footprint->told)
		return code;
	if (m->footprint->report.size)
		m->account.report = m->footprint->report;
	m->account.report.verdict = code == EXIT_DONE ? KMIG_COMPLETED : code == EXIT_UNKNOWN ? KMIG_UNKNOWN : KMIG_FAILED;
	if (is_asked_for(m))
		write_reports(m, code != EXIT_DONE);
	return code;
}

/* ---- options ------------------------------------------------------------------------------------ */

static const char *const on_timeout[] = {
	[KMIG_TIMEOUT_STUN] = "stun",
	[KMIG_TIMEOUT_SWITCHOVER] = "switchover",
	[KMIG_TIMEOUT_ABORT] = "abort",
	NULL
};

static const char *const transports[] = {
	[KMIG_TRANSPORT_TCP] = "tcp",
	[KMIG_TRANSPORT_AUTO] = "auto",
	[KMIG_TRANSPORT_RDMA] = "rdma",
	NULL
};

static struct timeline timeline;

static struct migration asked = {
	.opts = KMIG_SOURCE_OPTS_INIT,
	.opts.probe_ms = 500,
	.to = { .port = KMIG_PORT },
	.vmm = VMM_INIT,
	.pidfd = -1,
	.timeline = &timeline,
	.account = { .source = true, .report = { .size = sizeof(asked.account.report), .page_size = 4096 } },
};

static int take_report(const struct opt *opt, const char *text)
{
	struct migration *m = opt->value;
	const char *end = strrchr(text, '.');

	if (end && !strcmp(end, ".html"))
		m->page_path = text;
	else
		m->report_path = text;
	return 0;
}

static int take_channels(const struct opt *opt, const char *text)
{
	struct migration *m = opt->value;
	uint64_t n;

	m->channels_given = true;
	m->opts.channels = KMIG_CHANNELS_AUTO;
	if (!strcmp(text, "auto"))
		return 0;
	if (parse_number("--channels", text, 1, 64, &n)) {
		failure_clear();
		return fail(EINVAL, "--channels must be auto or a number from 1 to 64, not '%s'", text);
	}
	m->opts.channels = (unsigned int)n;
	return 0;
}

static const struct opt options[] = {
	OPT_TEXT("qmp", "PATH", &asked.qmp, "QEMU's QMP socket"),
	OPT_ENDPOINT("to", "HOST[:PORT]", &asked.to, "where 'kmig receive' listens; IPv6 as [ADDRESS]:PORT"),
	OPT_PATH("via", "LOCAL=REMOTE", &asked.paths,
		 "a path for data connections, between these addresses; may be given again"),
	OPT_SECRET(&asked.secret_path),
	{ .name = "channels", .argument = "N", .take = take_channels, .value = &asked,
	  .help = "data connections, 1 to 64 (2, or one for each path); auto: as many as it takes" },
	OPT_CHOICE("transport", "KIND", &asked.opts.transport, transports,
		   "what they go over: tcp, rdma, or auto, which is rdma where it can be had (tcp)"),
	OPT_U32("channel-wait", "MS", &asked.opts.channel_wait_ms, 0, 3600000,
		"when all of them are lost, wait so long for one to come back (30000)"),
	OPT_BANDWIDTH("max-bandwidth", "RATE", &asked.opts.max_bandwidth,
		      "send no more: 400Mbit/s, 50MB/s, 48MiB/s...; 'kmig limit' changes it (none)"),
	OPT_INT("dscp", "N", &asked.opts.dscp, 0, 63, "mark packets for routers with this DSCP, 0 to 63 (none)"),
	OPT_INT("priority", "N", &asked.opts.priority, 0, 6, "and for this host's queues (SO_PRIORITY), 0 to 6 (none)"),
	OPT_U32("downtime", "MS", &asked.opts.downtime_ms, 1, 60000,
		"pause the guest once the rest is expected to take no longer (300)"),
	OPT_SECONDS("max-time", "SECONDS", &asked.opts.max_time_ms, 1, 1000000,
		    "to be ready for that in so long (no limit)"),
	OPT_U32("max-rounds", "N", &asked.opts.max_rounds, 1, 10000, "and in so many rounds (30)"),
	OPT_CHOICE("on-timeout", "ACTION", &asked.opts.on_timeout, on_timeout,
		   "when it is not: stun, switchover or abort (stun)"),
	OPT_PERCENT("convergence", "PERCENT", &asked.opts.convergence, 1, 99,
		    "a guest that is slowed down dirties so much of what is sent (50)"),
	OPT_DOUBLE("stun-floor", "PAGES/s", &asked.opts.stun_floor, 1, 1000000000,
		   "that it may always dirty (256)"),
	OPT_FLAG(0, "no-stun", &asked.opts.no_stun, "do not slow the guest down"),
	OPT_FLAG(0, "no-hold-back", &asked.opts.no_hold_back,
		 "send pages that are always dirty again and again, not only at the end"),
	OPT_U32("probe", "MS", &asked.opts.probe_ms, 0, 60000,
		"watch the guest for so long before anything is sent (500); 0: do not"),
	OPT_FLAG(0, "no-zero-detection", &asked.opts.no_zero_detection, "do not look for pages that hold only zeroes"),
	{ .name = "report", .argument = "FILE", .take = take_report, .value = &asked,
	  .help = "write the report to FILE: as a page with charts if that ends in .html, else as JSON" },
	OPT_JSON(&asked.json),
	OPT_FLAG('v', "verbose", &asked.verbose, "tell of each state and round"),
	OPT_END
};

/* Nothing was begun; who asked for a report gets one all the same. */
static int not_begun(struct migration *m)
{
	say("%s", failure());
	m->account.report.verdict = KMIG_FAILED;
	if (is_asked_for(m))
		write_reports(m, true);
	return EXIT_FAILED;
}

static int migrate_main(const struct verb *verb, char **operands)
{
	struct migration *m = &asked;
	const struct supervised job = {
		.work = work,
		.died = died,
		.data = m,
		.shared = (void **)&m->footprint,
		.shared_size = sizeof(*m->footprint),
	};
	int code;

	(void)operands;
	if (!m->qmp || !m->to.host[0] || !m->secret_path)
		return usage_error(verb, "--qmp, --to and --secret are needed");
	if (!m->to.port)
		return usage_error(verb, "--to: port 0 is none");
	if (m->opts.probe_ms && m->opts.probe_ms < PROBE_MS_MIN)
		return usage_error(verb, "--probe must be 0 or a number from %d to 60000, not '%u'", PROBE_MS_MIN, m->opts.probe_ms);
	if (read_secret(m->secret_path, m->secret, &m->opts.secret_len))
		return not_begun(m);
	if (!m->paths.count)
		paths_find(&m->paths, m->to.host);
	for (unsigned int i = 0; i < m->paths.count && m->verbose; i++)
		say("path %u: from %s%s%s to %s", i, m->paths.path[i].local ? m->paths.path[i].local : "",
		    m->paths.path[i].device ? "%" : "", m->paths.path[i].device ? m->paths.path[i].device : "",
		    m->paths.path[i].remote ? m->paths.path[i].remote : m->to.host);
	if (!m->channels_given && m->opts.channels < m->paths.count)
		m->opts.channels = m->paths.count;
	m->opts.paths = m->paths.path;
	m->opts.path_count = m->paths.count;
	m->opts.host = m->to.host;
	m->opts.port = m->to.port;
	m->opts.secret = m->secret;
	code = supervise(&job);
	return code < 0 ? not_begun(m) : code;
}

const struct verb migrate_verb = {
	.name = "migrate",
	.arguments = "--qmp PATH --to HOST[:PORT] --secret FILE [options]",
	.help = "move the guest of a running QEMU to another host",
	.options = options,
	.notes = "Exit status: 0 moved; 1 failed, the guest runs on here; 2 usage; 3 the guest is paused\n"
		"here and may run there; 130 interrupted, the guest runs on here.\n",
	.run = migrate_main,
};
