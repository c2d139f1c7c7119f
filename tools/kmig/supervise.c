// SPDX-License-Identifier: GPL-2.0
/*
 * A migration is done by a worker, a child of the process that the user started.
 *
 * Were it one process, its SIGKILL during the blackout would leave a guest that runs
 * nowhere. So: when the front is killed, the worker gets SIGTERM from the kernel and aborts
 * in good order; when the worker is killed, the front sets right what can be set right. The
 * worker has a process group of its own, so that no signal meant for a group, as of
 * timeout -k, kills both.
 *
 * LIMIT_SIGNAL, from kmig limit, has a rate as its value; the front hands it on to the worker.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tool.h"

volatile sig_atomic_t interrupted;

static void (*volatile interrupt_fn)(void);

static void handle(int sig)
{
	void (*fn)(void) = interrupt_fn;

	(void)sig;
	interrupted = 1;
	if (fn)
		fn();
}

void on_interrupt(void (*fn)(void))
{
	interrupt_fn = fn;
	/* A signal that came before would otherwise be lost. */
	if (fn && interrupted)
		fn();
}

static void (*volatile limit_fn)(uint64_t bytes_per_second);
static volatile uint64_t limit;
static volatile sig_atomic_t limited;

static void handle_limit(int sig, siginfo_t *info, void *context)
{
	void (*fn)(uint64_t) = limit_fn;

	(void)sig;
	(void)context;
	/* Of others the value is anything. */
	if (info->si_code != SI_QUEUE)
		return;
	limit = (uintptr_t)info->si_value.sival_ptr;
	limited = 1;
	if (fn)
		fn(limit);
}

void on_limit(void (*fn)(uint64_t bytes_per_second))
{
	uint64_t seen;

	limit_fn = fn;
	if (!fn || !limited)
		return;
	/* Another may come between the look and the call: the last one counts. */
	do {
		seen = limit;
		fn(seen);
	} while (seen != limit);
}

static int share(const struct supervised *job)
{
	void *p = mmap(NULL, job->shared_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return fail(errno, "no memory to share with a process: %s", strerror(errno));
	*job->shared = p;
	return 0;
}

static void worker(const struct supervised *job, pid_t front, const sigset_t *mask)
{
	struct sigaction sa = { .sa_handler = handle };	/* no SA_RESTART: calls are to return */

	setpgid(0, 0);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (getppid() != front)
		interrupted = 1;
	sigprocmask(SIG_SETMASK, mask, NULL);
	exit(job->work(job->data));
}

static int wait_for(pid_t pid, const sigset_t *signals, int *status)
{
	siginfo_t info;
	pid_t got;
	int sig;

	for (;;) {
		sig = sigwaitinfo(signals, &info);
		if (sig == SIGINT || sig == SIGTERM || sig == SIGHUP)
			kill(pid, SIGTERM);
		if (sig == LIMIT_SIGNAL && info.si_code == SI_QUEUE)
			sigqueue(pid, sig, info.si_value);
		if (sig != SIGCHLD)
			continue;
		/* Only the worker: what it leaves behind is reaped by init when we end. */
		got = waitpid(pid, status, WNOHANG);
		if (got == pid)
			return 0;
		if (got < 0 && errno != EINTR)
			return -errno;
	}
}

int supervise(const struct supervised *job)
{
	/* The worker's; the front has it as well, as a sign of what it can, see limit.c. */
	struct sigaction sa = { .sa_sigaction = handle_limit, .sa_flags = SA_SIGINFO | SA_RESTART };
	sigset_t signals, old;
	pid_t front = getpid(), pid;
	int status, ret = share(job);

	if (ret)
		return ret;
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGHUP);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, LIMIT_SIGNAL);
	sigprocmask(SIG_BLOCK, &signals, &old);
	sigaction(LIMIT_SIGNAL, &sa, NULL);
	/* A QEMU whose worker was killed becomes our child, so that its pid stays its own. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	fflush(NULL);
	pid = fork();
	if (pid < 0)
		return fail(errno, "cannot start a process: %s", strerror(errno));
	if (!pid)
		worker(job, front, &old);
	ret = wait_for(pid, &signals, &status);
	if (!ret && WIFEXITED(status))
		return WEXITSTATUS(status);
	/* The line that it wrote last may still stand on the terminal. */
	if (isatty(STDERR_FILENO))
		status_line("");
	return job->died(job->data);
}
