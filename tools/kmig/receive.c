// SPDX-License-Identifier: GPL-2.0
/*
 * kmig receive: take in a guest.
 *
 * QEMU is started and brought to where it waits for the device state before the first
 * connection is accepted, so that its start is no part of a migration, let alone of the
 * blackout. It never runs the guest but by the engine's order.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tool.h"

#define START_TIMEOUT_MS 60000
#define END_TIMEOUT_MS 3000

/* What the front must know should the worker be killed. */
struct traces {
	volatile pid_t qemu;		/* 0: none */
	volatile bool committed;
	volatile bool told;		/* the report is written */
};

struct reception {
	struct kmig_destination_opts opts;
	struct qemu_start start;
	struct endpoint listen[KMIG_LISTEN_MAX];
	unsigned int listens;
	struct kmig_address more[KMIG_LISTEN_MAX];
	const char *secret_path, *report_path;
	char secret[SECRET_MAX];
	bool json, verbose;

	struct vmm vmm;
	struct kmig_ctx *ctx;
	struct kmig_region *region;
	struct kmig_destination *destination;
	struct account account;
	struct progress progress;
	struct traces *footprint;
	bool qemu_ended;	/* of itself */
};

/* ---- QEMU's process ------------------------------------------------------------------ */

static void become_qemu(const struct reception *r, char **argv)
{
	int null = open("/dev/null", O_RDONLY);

	/* Away from our terminal and process group: QEMU stays when we end. */
	setsid();
	dup2(null, STDIN_FILENO);
	/* Our standard output is for the report. */
	dup2(STDERR_FILENO, STDOUT_FILENO);
	signal(SIGPIPE, SIG_DFL);
	qemu_exec(argv, kmig_region_fd(r->region));
	say("%s", failure());
	_exit(127);
}

static int start_qemu(struct reception *r)
{
	char **argv = qemu_arguments(&r->start);
	pid_t pid;

	fflush(NULL);
	pid = fork();
	if (!pid)
		become_qemu(r, argv);
	qemu_arguments_free(argv);
	if (pid < 0)
		return fail(errno, "cannot start a process: %s", strerror(errno));
	r->footprint->qemu = pid;
	return 0;
}

/* Say how QEMU ended, if it did. */
static int check_alive(struct reception *r)
{
	int status;

	if (!r->footprint->qemu)
		return -ECHILD;
	if (waitpid(r->footprint->qemu, &status, WNOHANG) != r->footprint->qemu)
		return 0;
	r->footprint->qemu = 0;
	r->qemu_ended = true;
	failure_clear();
	if (WIFSIGNALED(status))
		return fail(ECHILD, "QEMU was ended by signal %d", WTERMSIG(status));
	return fail(ECHILD, "QEMU ended with status %d", WEXITSTATUS(status));
}

/* Its guest never ran here, so nothing is lost. */
static void end_qemu(volatile pid_t *qemu)
{
	int64_t deadline = now_ms() + END_TIMEOUT_MS;
	pid_t pid = *qemu;

	if (!pid)
		return;
	*qemu = 0;
	kill(pid, SIGTERM);
	while (waitpid(pid, NULL, WNOHANG) == 0) {
		if (now_ms() >= deadline)
			kill(pid, SIGKILL);
		usleep(10000);
	}
}

/*
 * The socket at the path may still be an earlier QEMU's: only the one that our child made
 * will do.
 */
static int connect_qemu(struct reception *r)
{
	int64_t deadline = now_ms() + START_TIMEOUT_MS;
	int ret;

	for (;;) {
		ret = vmm_connect(&r->vmm, r->start.qmp, START_TIMEOUT_MS);
		if (!ret && qmp_peer(r->vmm.qmp) == r->footprint->qemu)
			return 0;
		vmm_close(&r->vmm);
		usleep(20000);
		if (check_alive(r))
			return -ECHILD;
		if (ret && ret != -ENOENT && ret != -ECONNREFUSED)
			return ret;
		failure_clear();
		if (interrupted)
			return fail(ECANCELED, "interrupted");
		if (now_ms() >= deadline)
			return fail(ETIMEDOUT, "QEMU makes no QMP socket at %s", r->start.qmp);
	}
}

/*
 * QMP answers once the machine is built. The firmware is then in memory already, where the
 * engine's emptying of the region removes it.
 */
static int ready_qemu(struct reception *r)
{
	char status[32];
	int ret, tries;

	ret = start_qemu(r);
	if (!ret)
		ret = connect_qemu(r);
	if (!ret)
		ret = vmm_status(&r->vmm, status);
	if (!ret && strcmp(status, "inmigrate"))
		ret = fail(EPROTO, "QEMU does not wait for a migration (status: %s)", status);
	if (!ret)
		ret = vmm_set_up(&r->vmm);
	if (!ret)
		ret = vmm_open_incoming(&r->vmm);
	/* Its connection breaks before its end can be seen. */
	for (tries = 0; ret && ret != -ECANCELED && tries < 25 && !check_alive(r); tries++)
		usleep(20000);
	return ret;
}

/* ---- what the engine calls -------------------------------------------------------------- */

static int prepare(const uint64_t *bytes, unsigned int count, struct kmig_region **regions, void *data)
{
	struct reception *r = data;

	if (count != 1)
		return fail(EINVAL, "the source sends %u regions, not one", count);
	if (bytes[0] != r->start.bytes)
		return fail(bytes[0] > r->start.bytes ? ENOMEM : EINVAL,
			    "the guest has %" PRIu64 " bytes of memory, --memory says %" PRIu64,
			    bytes[0], r->start.bytes);
	regions[0] = r->region;
	return 0;
}

static int load_state(const void *state, size_t length, void *data)
{
	struct reception *r = data;

	return vmm_load(&r->vmm, state, length);
}

static int run_guest(void *data)
{
	struct reception *r = data;

	r->footprint->committed = true;
	qmp_ignore_interrupt(r->vmm.qmp);
	return qmp_run(r->vmm.qmp, "cont", NULL);
}

static void discard(void *data)
{
	struct reception *r = data;

	signal(SIGCHLD, SIG_DFL);
	/* Its own end is why all this ends: say so before it is forgotten. */
	check_alive(r);
	end_qemu(&r->footprint->qemu);
}

static void progress(const struct kmig_report *report, void *data)
{
	struct reception *r = data;

	if (report->state == KMIG_STATE_CLEANUP)
		go_last(getpid());
	progress_update(&r->progress, report);
}

static const struct kmig_destination_ops ops = {
	.size = sizeof(ops),
	.prepare = prepare,
	.load_state = load_state,
	.run = run_guest,
	.discard = discard,
	.progress = progress,
};

/* ---- the worker ----------------------------------------------------------------------------- */

static struct kmig_destination *active;

static void abort_active(void)
{
	kmig_destination_abort(active);
}

/* QEMU ended, and with it what we listen for. */
static void qemu_ended(int sig)
{
	(void)sig;
	kmig_destination_abort(active);
}

static int listen_here(struct reception *r)
{
	struct sockaddr_storage address;
	socklen_t length = sizeof(address);
	char text[HOST_MAX];
	int ret;

	ret = kmig_destination_new(r->ctx, &r->opts, &ops, r, &r->destination);
	if (!ret)
		ret = kmig_destination_address(r->destination, &address, &length);
	if (ret)
		return fail(-ret, "%s", kmig_ctx_error(r->ctx));
	format_address(&address, text);
	fprintf(stderr, "listening on %s\n", text);
	for (unsigned int i = 0; i < r->opts.more_count; i++)
		fprintf(stderr, "listening on %s, too\n", r->more[i].host);
	return 0;
}

static int create_region(struct reception *r)
{
	struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;
	int ret;

	opts.bytes = r->start.bytes;
	if (r->start.name)
		opts.name = r->start.name;
	ret = kmig_region_create(r->ctx, &opts, &r->region);
	return ret ? fail(-ret, "%s", kmig_ctx_error(r->ctx)) : 0;
}

static int run_engine(struct reception *r)
{
	struct sigaction sa = { .sa_handler = qemu_ended, .sa_flags = SA_NOCLDSTOP };
	int ret;

	active = r->destination;
	sigaction(SIGCHLD, &sa, NULL);
	on_interrupt(abort_active);
	/* It may have ended before the handler stood. */
	ret = check_alive(r);
	if (!ret) {
		ret = kmig_destination_run(r->destination);
		kmig_destination_report(r->destination, &r->account.report);
	}
	on_interrupt(NULL);
	signal(SIGCHLD, SIG_DFL);
	status_line(NULL);
	if (ret && !r->footprint->committed)
		check_alive(r);
	/* The engine was aborted, but by nobody's wish. */
	if (r->qemu_ended && r->account.report.verdict == KMIG_CANCELLED)
		r->account.report.verdict = KMIG_FAILED;
	if (ret)
		fail(-ret, "%s", kmig_ctx_error(r->ctx));
	return ret;
}

static int tell_outcome(struct reception *r)
{
	if (r->account.report.verdict == KMIG_COMPLETED)
		return EXIT_DONE;
	if (r->footprint->committed) {
		say("the source has committed, but: %s", failure());
		say("the guest is paused at the source. Look whether it runs here (QEMU is process %d) before you let it go on there.",
		    r->footprint->qemu);
		return EXIT_UNKNOWN;
	}
	if (interrupted) {
		say("interrupted: nothing was received");
		return EXIT_INTERRUPTED;
	}
	say("%s", failure());
	say("nothing was received: the guest, if any, runs on at the source");
	return EXIT_FAILED;
}

static bool is_asked_for(const struct reception *r)
{
	return r->json || r->report_path;
}

/* @failed: why is in failure(). */
static void write_report_of(struct reception *r, bool failed)
{
	char error[1024] = "";

	if (failed)
		snprintf(error, sizeof(error), "%s", failure());
	failure_clear();
	if (report_finish(&r->account, error, r->json, r->report_path))
		say("%s", failure());
}

static int work(void *data)
{
	struct reception *r = data;
	bool tell = is_asked_for(r);
	int ret, code;

	r->account.report.verdict = KMIG_FAILED;
	progress_init(&r->progress, false, r->verbose);
	ret = open_context(&r->ctx, r->verbose);
	if (!ret)
		ret = create_region(r);
	if (!ret)
		ret = ready_qemu(r);
	if (!ret)
		ret = listen_here(r);
	if (!ret) {
		ret = run_engine(r);
		/* A table of nothing tells nothing. */
		tell |= r->account.report.state_ns[KMIG_STATE_CAPACITY] > 0;
	}
	code = tell_outcome(r);
	if (code == EXIT_DONE)
		vmm_restore(&r->vmm);
	if (!r->footprint->committed)
		end_qemu(&r->footprint->qemu);
	/* The exit status tells where the guest is, whether or not the report could be written. */
	if (tell)
		write_report_of(r, ret);
	r->footprint->told = true;
	kmig_destination_free(r->destination);
	kmig_region_free(r->region);
	kmig_ctx_free(r->ctx);
	vmm_close(&r->vmm);
	return code;
}

static int tell_end(struct reception *r, int code, enum kmig_verdict verdict)
{
	say("%s", failure());
	r->account.report.verdict = verdict;
	if (is_asked_for(r) && !(r->footprint && r->footprint->told))
		write_report_of(r, true);
	return code;
}

/* The front, when the worker was killed: QEMU is our child now. */
static int died(void *data)
{
	struct reception *r = data;

	failure_clear();
	if (r->footprint->committed) {
		fail(ECHILD, "the process that received the guest was killed after the commit: look whether QEMU (process %d) runs it before you let it go on at the source",
		     r->footprint->qemu);
		return tell_end(r, EXIT_UNKNOWN, KMIG_UNKNOWN);
	}
	end_qemu(&r->footprint->qemu);
	fail(ECHILD, "the process that received the guest was killed: nothing was received");
	return tell_end(r, EXIT_FAILED, KMIG_FAILED);
}

/* ---- options -------------------------------------------------------------------------------------- */

static struct reception asked = {
	.opts = KMIG_DESTINATION_OPTS_INIT,
	.vmm = VMM_INIT,
	.start = { .node = -1, .incoming = true },
	.account.report = { .size = sizeof(asked.account.report), .page_size = 4096 },
};

/* Those that come after the first are on its port unless they say otherwise. */
static int take_listen(const struct opt *opt, const char *text)
{
	struct reception *r = opt->value;

	if (r->listens == KMIG_LISTEN_MAX)
		return fail(EINVAL, "--listen can be given %d times", KMIG_LISTEN_MAX);
	r->listen[r->listens].port = r->listens ? 0 : KMIG_PORT;
	if (parse_address(text, r->listen[r->listens].host, &r->listen[r->listens].port))
		return -EINVAL;
	r->listens++;
	return 0;
}

static const struct opt options[] = {
	{ .name = "listen", .argument = "ADDR[:PORT]", .take = take_listen, .value = &asked,
	  .help = "where to listen (127.0.0.1:4760); IPv6 as [ADDRESS]:PORT; port 0: any; may be given again" },
	OPT_SECRET(&asked.secret_path),
	OPT_SIZE("memory", "SIZE", &asked.start.bytes, "the guest's memory, as at the source"),
	OPT_TEXT("qmp", "PATH", &asked.start.qmp, "where QEMU is to make its QMP socket"),
	OPT_TEXT("name", "NAME", &asked.start.name, "the region's name, for 'kmig region list'"),
	OPT_SIZE("rdma-window", "SIZE", &asked.opts.rdma_window_bytes,
		 "register memory for RDMA in pieces of SIZE (16M, or as the device needs it)"),
	OPT_FLAG(0, "no-rdma", &asked.opts.no_rdma, "take data connections over TCP only"),
	OPT_TEXT("report", "FILE", &asked.report_path, "write the report to FILE as JSON"),
	OPT_JSON(&asked.json),
	OPT_FLAG('v', "verbose", &asked.verbose, "tell of each state"),
	OPT_END
};

static int receive_main(const struct verb *verb, char **operands)
{
	struct reception *r = &asked;
	const struct supervised job = {
		.work = work,
		.died = died,
		.data = r,
		.shared = (void **)&r->footprint,
		.shared_size = sizeof(*r->footprint),
	};
	int code;

	r->start.argv = operands;
	if (!r->secret_path || !r->start.bytes || !r->start.qmp)
		return usage_error(verb, "--secret, --memory and --qmp are needed");
	if (!operands[0])
		return usage_error(verb, "QEMU's command is missing: write it behind '--'");
	if (qemu_check_start(&r->start) || read_secret(r->secret_path, r->secret, &r->opts.secret_len))
		return tell_end(r, EXIT_FAILED, KMIG_FAILED);
	if (r->listens) {
		r->opts.host = r->listen[0].host;
		r->opts.port = r->listen[0].port;
		r->opts.more_count = r->listens - 1;
	}
	for (unsigned int i = 0; i < r->opts.more_count; i++)
		r->more[i] = (struct kmig_address){ .host = r->listen[i + 1].host, .port = r->listen[i + 1].port };
	r->opts.more = r->more;
	r->opts.secret = r->secret;
	code = supervise(&job);
	return code < 0 ? tell_end(r, EXIT_FAILED, KMIG_FAILED) : code;
}

const struct verb receive_verb = {
	.name = "receive",
	.arguments = "--secret FILE --memory SIZE --qmp PATH [options] -- qemu-system-x86_64 ARGS...",
	.help = "take in one guest: start QEMU, receive, leave it running",
	.options = options,
	.operands = true,
	.notes = "QEMU's ARGS must be those of the source: the same machine and devices.\n"
		"Exit status: 0 the guest runs here; 1 failed, nothing runs here; 2 usage; 3 the source\n"
		"committed and something failed then; 130 interrupted, nothing runs here.\n",
	.run = receive_main,
};
