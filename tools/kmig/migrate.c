// SPDX-License-Identifier: GPL-2.0
/*
 * kmig qemu migrate: move the guest of a running QEMU to another host.
 *
 * The engine of libkmig decides what happens when; here are the functions through which it
 * moves QEMU, and what is told to the user.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <json-c/json.h>

#include "tool.h"

#define CONNECT_TIMEOUT_MS 10000
#define QUIT_TIMEOUT_MS 10000

/* What the front must know should the worker be killed. */
struct footprint {
	volatile bool set_up;		/* QEMU's capabilities are ours */
	volatile bool paused;		/* by us, not yet running again */
	volatile bool completed;
	volatile enum kmig_state state;
};

struct migration {
	struct kmig_source_opts opts;
	const char *qmp, *report_path;
	char host[HOST_MAX];
	char secret[SECRET_MAX];
	bool json, verbose;

	struct vmm vmm;
	int pidfd;		/* QEMU's process, or -1 */
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_source *source;
	struct kmig_report report;
	struct rounds rounds;
	struct progress progress;
	struct footprint *footprint;
	bool lost;		/* QEMU does not answer any more */
};

/* ---- what the engine calls ------------------------------------------------------------ */

static int pause_guest(void *data)
{
	struct migration *m = data;

	m->footprint->paused = true;
	return vmm_pause(&m->vmm);
}

static int resume_guest(void *data)
{
	struct migration *m = data;
	int ret = vmm_resume(&m->vmm);

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
	qmp_ignore_interrupt(m->vmm.qmp);
	if (qmp_run(m->vmm.qmp, "quit", NULL))
		say("QEMU at the source could not be ended; its guest is paused and must stay so: %s", failure());
}

static void progress(const struct kmig_report *report, void *data)
{
	struct migration *m = data;

	m->footprint->state = report->state;
	progress_update(&m->progress, report);
}

static void round_done(const struct kmig_round_report *round, void *data)
{
	struct migration *m = data;

	rounds_add(&m->rounds, round);
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

static int find_region(struct migration *m)
{
	pid_t pid = qmp_peer(m->vmm.qmp);
	uint64_t bytes;
	int fd, ret;

	if (pid <= 0)
		return fail(ESRCH, "%s: QEMU's process cannot be told (it is in another PID namespace)", m->qmp);
	m->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (m->pidfd < 0)
		return fail(errno, "QEMU (process %d): %s", pid, strerror(errno));
	ret = vmm_check_memory(&m->vmm, pid, &fd, &bytes);
	if (ret)
		return ret;
	ret = kmig_region_find(m->ctx, pid, fd, &m->region);
	if (ret == -ENOENT)
		return fail(ENOENT, "QEMU (process %d) holds no lmtrack region: start it with 'kmig qemu run'", pid);
	if (ret)
		return fail(-ret, "%s", kmig_ctx_error(m->ctx));
	if (kmig_region_bytes(m->region) != bytes)
		return fail(EINVAL, "QEMU's memory has %" PRIu64 " bytes, its lmtrack region %" PRIu64,
			    bytes, kmig_region_bytes(m->region));
	return 0;
}

static int prepare(struct migration *m)
{
	int ret = open_context(&m->ctx, m->verbose);

	if (!ret)
		ret = vmm_connect(&m->vmm, m->qmp, CONNECT_TIMEOUT_MS);
	if (!ret)
		ret = vmm_check_source(&m->vmm);
	if (!ret)
		ret = find_region(m);
	if (ret)
		return ret;
	m->footprint->set_up = true;
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
	ret = kmig_source_run(m->source);
	on_interrupt(NULL);
	progress_end(&m->progress);
	kmig_source_report(m->source, &m->report);
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
	switch (m->report.verdict) {
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

static void tear_down(struct migration *m)
{
	kmig_source_free(m->source);
	kmig_region_free(m->region);
	kmig_ctx_free(m->ctx);
	vmm_close(&m->vmm);
	if (m->pidfd >= 0)
		close(m->pidfd);
	free(m->rounds.table);
}

static int work(void *data)
{
	struct migration *m = data;
	bool tell = m->json || m->report_path;
	int ret, code;

	m->report.verdict = KMIG_FAILED;
	progress_init(&m->progress, m->verbose);
	ret = prepare(m);
	if (!ret) {
		ret = run_engine(m);
		/* A table of nothing tells nothing. */
		tell |= m->report.state_ns[KMIG_STATE_CAPACITY] > 0;
	}
	if (m->report.verdict == KMIG_COMPLETED)
		wait_for_quit(m);
	else if (m->vmm.qmp && vmm_restore(&m->vmm))
		m->lost = m->report.verdict != KMIG_UNKNOWN;
	code = tell_outcome(m);
	/* An error after the guest has moved has been told, and is none of the migration. */
	if (tell && report_finish(&m->report, &m->rounds, ret ? failure() : "", m->json, m->report_path)) {
		failure_clear();
		say("the report could not be written to %s", m->report_path);
		if (code == EXIT_DONE)
			code = EXIT_FAILED;
	}
	tear_down(m);
	return code;
}

/* ---- the front, when the worker was killed ------------------------------------------------- */

static int recover(struct migration *m)
{
	static const char *const ours[] = { "x-ignore-shared", "events" };
	size_t i;
	int ret = vmm_connect(&m->vmm, m->qmp, CONNECT_TIMEOUT_MS);

	if (!ret && m->footprint->paused)
		ret = vmm_resume(&m->vmm);
	if (ret || !m->footprint->set_up)
		return ret;
	m->vmm.capabilities = json_object_new_array();
	for (i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
		struct json_object *c = json_object_new_object();

		json_object_object_add(c, "capability", json_object_new_string(ours[i]));
		json_object_object_add(c, "state", json_object_new_boolean(false));
		json_object_array_add(m->vmm.capabilities, c);
	}
	return vmm_restore(&m->vmm);
}

static int died(void *data)
{
	struct migration *m = data;
	const struct footprint *f = m->footprint;

	if (f->completed) {
		say("the guest runs at the destination; the process that moved it was killed");
		return EXIT_DONE;
	}
	/* The commit happens in this state; whether it did, only the dead one knew. */
	if (f->paused && f->state >= KMIG_STATE_CHECK) {
		say("the process that moved the guest was killed near the commit: the guest is paused here and may run there. If it runs there, end this QEMU (QMP 'quit'); only if it does not, let it go on here (QMP 'cont').");
		return EXIT_UNKNOWN;
	}
	if (recover(m)) {
		say("the process that moved the guest was killed, and QEMU does not answer: %s", failure());
		return f->paused ? EXIT_UNKNOWN : EXIT_FAILED;
	}
	say("the process that moved the guest was killed: the guest runs on here");
	return EXIT_FAILED;
}

/* ---- options ------------------------------------------------------------------------------------ */

static const struct option options[] = {
	{ "qmp", required_argument, NULL, 'q' },
	{ "to", required_argument, NULL, 't' },
	{ "secret", required_argument, NULL, 's' },
	{ "channels", required_argument, NULL, 'c' },
	{ "downtime", required_argument, NULL, 'd' },
	{ "max-rounds", required_argument, NULL, 'r' },
	{ "no-zero-detection", no_argument, NULL, 'z' },
	{ "report", required_argument, NULL, 'R' },
	{ "json", no_argument, NULL, 'j' },
	{ "verbose", no_argument, NULL, 'v' },
	{ "help", no_argument, NULL, 'h' },
	{ NULL, 0, NULL, 0 },
};

/* Returns 0, a negative errno, or 1 for --help and 2 for what getopt has complained about. */
static int parse(struct migration *m, int argc, char **argv, const char **secret)
{
	uint64_t n;
	int c, ret = 0;

	while (!ret && (c = getopt_long(argc, argv, "+jvh", options, NULL)) != -1) {
		switch (c) {
		case 'q':
			m->qmp = optarg;
			break;
		case 't':
			m->opts.port = KMIG_PORT;
			ret = parse_address(optarg, m->host, &m->opts.port);
			break;
		case 's':
			*secret = optarg;
			break;
		case 'c':
			ret = parse_number("--channels", optarg, 1, 64, &n);
			if (!ret)
				m->opts.channels = (unsigned int)n;
			break;
		case 'd':
			ret = parse_number("--downtime", optarg, 1, 60000, &n);
			if (!ret)
				m->opts.downtime_ms = (uint32_t)n;
			break;
		case 'r':
			ret = parse_number("--max-rounds", optarg, 1, 10000, &n);
			if (!ret)
				m->opts.max_rounds = (uint32_t)n;
			break;
		case 'z':
			m->opts.no_zero_detection = true;
			break;
		case 'R':
			m->report_path = optarg;
			break;
		case 'j':
			m->json = true;
			break;
		case 'v':
			m->verbose = true;
			break;
		case 'h':
			return 1;
		default:
			return 2;
		}
	}
	return ret;
}

static int migrate_main(const struct verb *verb, int argc, char **argv)
{
	static struct migration m = {
		.opts = KMIG_SOURCE_OPTS_INIT,
		.vmm = VMM_INIT,
		.pidfd = -1,
		.report = { .size = sizeof(m.report), .page_size = 4096 },
	};
	const struct supervised job = { .work = work, .died = died, .data = &m };
	const char *secret = NULL;
	int ret = parse(&m, argc, argv, &secret);

	if (ret == 1)
		return usage_help(verb);
	if (ret == 2)
		return usage_bad(verb);
	if (ret)
		return usage_error(verb, "%s", failure());
	if (optind != argc)
		return usage_error(verb, "unexpected argument '%s'", argv[optind]);
	if (!m.qmp || !m.host[0] || !secret)
		return usage_error(verb, "--qmp, --to and --secret are needed");
	if (!m.opts.port)
		return usage_error(verb, "--to: port 0 is none");
	if (read_secret(secret, m.secret, &m.opts.secret_len))
		return print_failure(EXIT_FAILED);
	m.opts.host = m.host;
	m.opts.secret = m.secret;
	m.footprint = shared_alloc(sizeof(*m.footprint));
	if (!m.footprint) {
		fail(ENOMEM, "no memory");
		return print_failure(EXIT_FAILED);
	}
	return supervise(&job);
}

const struct verb migrate_verb = {
	"migrate", "--qmp PATH --to HOST[:PORT] --secret FILE [--channels N] [--downtime MS] [--max-rounds N] [--no-zero-detection] [--report FILE] [-j] [-v]",
	"move the guest of a running QEMU to another host",
	"  --qmp PATH           QEMU's QMP socket\n"
	"  --to HOST[:PORT]     where 'kmig receive' listens; IPv6 as [ADDRESS]:PORT\n"
	"  --secret FILE        what both sides know, at least 16 bytes, readable by the owner only\n"
	"  --channels N         data connections, 1 to 64 (2)\n"
	"  --downtime MS        pause the guest once the rest is expected to take no longer (300)\n"
	"  --max-rounds N       pause it after so many rounds at the latest (30)\n"
	"  --no-zero-detection  do not look for pages that hold only zeroes\n"
	"  --report FILE        write the report to FILE as JSON\n"
	"  -j, --json           print the report as JSON\n"
	"  -v, --verbose        tell of each state and round\n"
	"\n"
	"Exit status: 0 moved; 1 failed, the guest runs on here; 2 usage; 3 the guest is paused\n"
	"here and may run there; 130 interrupted, the guest runs on here.\n",
	migrate_main,
};
