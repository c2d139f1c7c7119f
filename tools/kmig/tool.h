/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the parts of kmig, the command line, share.
 *
 * Functions return 0 or a negative errno. The one that finds something wrong says so with
 * fail(); the first message is kept, since it names the cause, and main() prints it.
 */
#ifndef KMIG_TOOL_H
#define KMIG_TOOL_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "kmig.h"

enum exit_code {
	EXIT_DONE = 0,
	EXIT_FAILED = 1,	/* migrate: the guest runs on at the source */
	EXIT_USAGE = 2,
	EXIT_UNKNOWN = 3,	/* the source is paused and the destination did not confirm */
	EXIT_INTERRUPTED = 130,
};

/* ---- util.c ----------------------------------------------------------------------- */

int __attribute__((format(printf, 2, 3))) fail(int err, const char *fmt, ...);
const char *failure(void);	/* "" when nothing failed */
void failure_clear(void);
void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...);	/* a line on stderr */

int print_failure(int code);	/* says it and returns @code */

int64_t now_ms(void);

int parse_size(const char *text, uint64_t *bytes);
int parse_number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *value);
#define HOST_MAX 256
int parse_address(const char *text, char host[HOST_MAX], uint16_t *port);	/* *port is the default */
void format_address(const struct sockaddr_storage *address, char text[HOST_MAX]);
#define SECRET_MIN 16
#define SECRET_MAX 4096
int read_secret(const char *path, char secret[SECRET_MAX], size_t *length);
void format_bytes(uint64_t bytes, char text[32]);

/* Set by SIGINT, SIGTERM and SIGHUP, see supervise.c. */
extern volatile sig_atomic_t interrupted;

/* ---- output.c: text and JSON from one call ------------------------------------------ */

struct json_object;
struct out;

struct out *out_new(FILE *text);	/* NULL: JSON only */
void out_free(struct out *o);
struct json_object *out_json(struct out *o);
void out_print_json(struct out *o, FILE *file);
int out_write_report(struct out *o, const char *path);

/* A key of NULL names nothing: the top level, or an element of an array. */
void out_object(struct out *o, const char *key);
void out_array(struct out *o, const char *key);
void out_end(struct out *o);
void __attribute__((format(printf, 2, 3))) out_text(struct out *o, const char *fmt, ...);

/* @fmt prints the value as text and has one directive; NULL: only in the JSON. */
void out_uint(struct out *o, const char *key, const char *fmt, uint64_t value);	/* %PRIu64 */
void out_int(struct out *o, const char *key, const char *fmt, int value);	/* %d */
void out_float(struct out *o, const char *key, const char *fmt, double value);	/* %f */
void out_string(struct out *o, const char *key, const char *fmt, const char *value);
void out_bool(struct out *o, const char *key, const char *fmt, bool value);	/* %s: yes, no */
void out_bytes(struct out *o, const char *key, const char *fmt, uint64_t value);/* %s: 1.5 GiB */

/* ---- supervise.c: a migration outlives the SIGKILL of the process that was started --- */

struct supervised {
	int (*work)(void *data);	/* runs in the worker; returns the exit code */
	int (*died)(void *data);	/* runs in the front: the worker was killed; likewise */
	void *data;
};
int supervise(const struct supervised *job);
void *shared_alloc(size_t size);	/* zeroed memory that front and worker share */
void on_interrupt(void (*fn)(void));	/* called in the signal handler; NULL: nothing */

/* ---- qmp.c ---------------------------------------------------------------------------- */

struct qmp;

int qmp_attach(int fd, int timeout_ms, struct qmp **qmp);	/* takes @fd in any case */
int qmp_connect(const char *path, int timeout_ms, struct qmp **qmp);
void qmp_close(struct qmp *q);
int qmp_fd(const struct qmp *q);
pid_t qmp_peer(const struct qmp *q);		/* 0: not known */
/**
 * qmp_execute() - send a command, wait for its answer
 * @args: given away; may be NULL.  @send_fd: passed along, or -1.
 * @ret: the answer's "return", to be put; may be NULL
 *
 * EREMOTEIO: QEMU refused; ECANCELED: interrupted.
 */
int qmp_execute(struct qmp *q, const char *command, struct json_object *args, int send_fd,
		struct json_object **ret);
int qmp_run(struct qmp *q, const char *command, struct json_object *args);
int qmp_getfd(struct qmp *q, const char *name, int fd);
int qmp_pump(struct qmp *q);			/* take in what has arrived, without waiting */
int qmp_wait(struct qmp *q, int64_t deadline);	/* wait for anything to arrive, take it in */
struct json_object *qmp_next_event(struct qmp *q);	/* to be put; NULL: none */
void qmp_forget_events(struct qmp *q);
void qmp_set_timeout(struct qmp *q, int timeout_ms);
void qmp_ignore_interrupt(struct qmp *q);	/* from now on: what is begun must be ended */

/* ---- vmm.c: QEMU at either end of a migration ------------------------------------------- */

struct vmm {
	struct qmp *qmp;
	struct json_object *capabilities;	/* what to set to undo vmm_set_up() */
	struct json_object *parameters;
	int stream;				/* our end of the device state's socket, or -1 */
};
#define VMM_INIT { .stream = -1 }

int vmm_connect(struct vmm *v, const char *path, int timeout_ms);
int vmm_check_source(struct vmm *v);
int vmm_check_memory(struct vmm *v, pid_t pid, int *fd, uint64_t *bytes);
int vmm_set_up(struct vmm *v);
int vmm_restore(struct vmm *v);
int vmm_open_outgoing(struct vmm *v);
int vmm_open_incoming(struct vmm *v);
int vmm_pause(struct vmm *v);
int vmm_save(struct vmm *v, void **state, size_t *length);
int vmm_load(struct vmm *v, const void *state, size_t length);
int vmm_resume(struct vmm *v);
int vmm_status(struct vmm *v, char status[32]);
void vmm_close(struct vmm *v);

/* ---- start.c: a QEMU on a region ----------------------------------------------------------- */

#define QEMU_FD 10	/* the region's descriptor in QEMU */

struct qemu_start {
	uint64_t bytes;
	const char *qmp;
	const char *name;
	int node;
	bool incoming;
	char **argv;	/* NULL-terminated: program and arguments */
};
int qemu_check_start(const struct qemu_start *start);
char **qemu_arguments(const struct qemu_start *start);
void qemu_arguments_free(char **argv);
int qemu_exec(char **argv, int region_fd);	/* returns only on failure */

/* ---- report.c, progress.c ------------------------------------------------------------------- */

struct rounds {
	struct kmig_round_report *table;
	size_t count;
};
void rounds_add(struct rounds *r, const struct kmig_round_report *round);
void report_put(struct out *o, const struct kmig_report *report, const struct rounds *rounds,
		const char *error);
/** report_finish() - to stdout as text or JSON, and to the file at @path unless it is NULL */
int report_finish(const struct kmig_report *report, const struct rounds *rounds,
		  const char *error, bool json, const char *path);

struct progress {
	bool verbose;
	bool terminal;
	bool line;		/* an unfinished line stands on the terminal */
	int64_t last;
	enum kmig_state state;
	bool begun;
};
void progress_init(struct progress *p, bool verbose);
void progress_update(struct progress *p, const struct kmig_report *report);
void progress_round(struct progress *p, const struct kmig_round_report *round);
void progress_end(struct progress *p);

/* ---- the verbs --------------------------------------------------------------------------------- */

struct verb {
	const char *name;
	const char *arguments;
	const char *help;	/* one line */
	const char *options;	/* the lines below the usage; may be NULL */
	int (*run)(const struct verb *verb, int argc, char **argv);
};
int usage_error(const struct verb *verb, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int usage_bad(const struct verb *verb);
int usage_help(const struct verb *verb);
int open_context(struct kmig_ctx **ctx, bool verbose);

extern const struct verb region_list_verb, region_show_verb;
extern const struct verb run_verb, migrate_verb, receive_verb, version_verb;

#endif /* KMIG_TOOL_H */
