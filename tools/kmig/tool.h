/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the parts of kmig, the command line, share.
 *
 * Functions return 0 or a negative errno. The one that finds something wrong says so with
 * fail(); the first message is kept, since it names the cause, and main() prints it.
 */
#ifndef KMIG_TOOL_H
#define KMIG_TOOL_H

#include <net/if.h>
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
	EXIT_DIVERGES = 4,	/* forecast: the limits cannot be kept */
	EXIT_INTERRUPTED = 130,
};

/* ---- util.c ----------------------------------------------------------------------- */

int __attribute__((format(printf, 2, 3))) fail(int err, const char *fmt, ...);
const char *failure(void);	/* "" when nothing failed */
void failure_clear(void);
void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...);	/* a line on stderr */

int print_failure(int code);	/* says it and returns @code */

int64_t now_ms(void);
/*
 * A process whose guest has moved has little left to do, but gigabytes of mappings to free: other
 * guests, and the one that moved, must not wait for that.
 */
void go_last(pid_t pid);

int parse_size(const char *text, uint64_t *bytes);
int parse_number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *value);
int parse_decimal(const char *what, const char *text, double min, double max, double *value);
int parse_rate(const char *what, const char *text, double *bytes_per_second);
int parse_bandwidth(const char *what, const char *text, uint64_t *bytes_per_second);	/* 0: none */
#define HOST_MAX 256
int parse_address(const char *text, char host[HOST_MAX], uint16_t *port);	/* *port is the default */
void format_address(const struct sockaddr_storage *address, char text[HOST_MAX]);
#define SECRET_MIN 16
#define SECRET_MAX 4096
int read_secret(const char *path, char secret[SECRET_MAX], size_t *length);
/** character() - how many bytes the UTF-8 character that begins here has; 0: it is none that XML allows */
size_t character(const char *text);
void format_bytes(uint64_t bytes, char text[32]);
void format_rate(double bytes_per_second, char text[64]);	/* in bytes and in bits */

/* What stands on the terminal's last line until something else is said; NULL takes it away. */
void status_line(const char *text);

/* Set by SIGINT, SIGTERM and SIGHUP, see supervise.c. */
extern volatile sig_atomic_t interrupted;

/* ---- options.c: a verb's options, their parsing and their help from one table --------- */

struct opt {
	const char *name;
	char letter;			/* or '\0' */
	const char *argument;		/* as the help calls it; NULL: it takes none */
	int (*take)(const struct opt *opt, const char *text);
	void *value;
	uint64_t min, max;		/* of a number */
	const char *const *choices;	/* of a word; ends with NULL */
	const char *help;
};

struct endpoint {
	char host[HOST_MAX];
	uint16_t port;
};

int take_flag(const struct opt *opt, const char *text);
int take_text(const struct opt *opt, const char *text);
int take_int(const struct opt *opt, const char *text);
int take_u32(const struct opt *opt, const char *text);
int take_double(const struct opt *opt, const char *text);
int take_percent(const struct opt *opt, const char *text);
int take_seconds(const struct opt *opt, const char *text);
int take_size(const struct opt *opt, const char *text);
int take_rate(const struct opt *opt, const char *text);
int take_bandwidth(const struct opt *opt, const char *text);
int take_choice(const struct opt *opt, const char *text);
int take_endpoint(const struct opt *opt, const char *text);

/* The compiler sees to it that an option fits its variable. A table ends with OPT_END. */
#define OPT_TO(type, p) (1 ? (p) : (type *)NULL)
#define OPT_FLAG(c, n, p, h) { .name = (n), .letter = (c), .take = take_flag, .value = OPT_TO(bool, p), .help = (h) }
#define OPT_TEXT(n, a, p, h) \
	{ .name = (n), .argument = (a), .take = take_text, .value = OPT_TO(const char *, p), .help = (h) }
#define OPT_INT(n, a, p, lo, hi, h) \
	{ .name = (n), .argument = (a), .take = take_int, .value = OPT_TO(int, p), .min = (lo), .max = (hi), .help = (h) }
#define OPT_U32(n, a, p, lo, hi, h) \
	{ .name = (n), .argument = (a), .take = take_u32, .value = OPT_TO(uint32_t, p), .min = (lo), .max = (hi), .help = (h) }
#define OPT_DOUBLE(n, a, p, lo, hi, h) \
	{ .name = (n), .argument = (a), .take = take_double, .value = OPT_TO(double, p), .min = (lo), .max = (hi), .help = (h) }
#define OPT_PERCENT(n, a, p, lo, hi, h) /* kept as a fraction */ \
	{ .name = (n), .argument = (a), .take = take_percent, .value = OPT_TO(double, p), .min = (lo), .max = (hi), .help = (h) }
#define OPT_SECONDS(n, a, p, lo, hi, h) /* kept in milliseconds */ \
	{ .name = (n), .argument = (a), .take = take_seconds, .value = OPT_TO(uint64_t, p), .min = (lo), .max = (hi), .help = (h) }
#define OPT_SIZE(n, a, p, h) \
	{ .name = (n), .argument = (a), .take = take_size, .value = OPT_TO(uint64_t, p), .help = (h) }
#define OPT_RATE(n, a, p, h) /* kept in bytes a second */ \
	{ .name = (n), .argument = (a), .take = take_rate, .value = OPT_TO(double, p), .help = (h) }
#define OPT_BANDWIDTH(n, a, p, h) /* kept in bytes a second, 0: none */ \
	{ .name = (n), .argument = (a), .take = take_bandwidth, .value = OPT_TO(uint64_t, p), .help = (h) }
#define OPT_CHOICE(n, a, p, list, h) /* kept as its place in the list */ \
	{ .name = (n), .argument = (a), .take = take_choice, .value = OPT_TO(unsigned int, p), .choices = (list), .help = (h) }
#define OPT_ENDPOINT(n, a, p, h) \
	{ .name = (n), .argument = (a), .take = take_endpoint, .value = OPT_TO(struct endpoint, p), .help = (h) }
/* What both ends of a migration have. */
#define OPT_SECRET(p) OPT_TEXT("secret", "FILE", p, "what both sides know, at least 16 bytes, readable by the owner only")
#define OPT_JSON(p) OPT_FLAG('j', "json", p, "print the report as JSON")
#define OPT_END { .name = NULL }

/* options_parse() - 0, or one of these, or -EINVAL; @optind is then where the operands begin */
enum { OPTIONS_HELP = 1, OPTIONS_BAD /* and has been told so */ };
int options_parse(const struct opt *table, int argc, char **argv);
void options_help(const struct opt *table, FILE *file);

/* ---- paths.c: ways for the data channels ---------------------------------------------- */

struct path_text {
	char local[HOST_MAX], device[IF_NAMESIZE], remote[HOST_MAX];
};

/* @path points into @text: it must not be moved. */
struct paths {
	unsigned int count;
	struct kmig_path path[KMIG_PATHS_MAX];
	struct path_text text[KMIG_PATHS_MAX];
};

/* LOCAL[%DEVICE]=REMOTE[:PORT] */
int paths_add(struct paths *paths, const char *text);
int take_path(const struct opt *opt, const char *text);
#define OPT_PATH(n, a, p, h) \
	{ .name = (n), .argument = (a), .take = take_path, .value = OPT_TO(struct paths, p), .help = (h) }
/* Two at least, or none. */
void paths_find(struct paths *paths, const char *host);

/* ---- output.c: text and JSON from one call ------------------------------------------ */

struct json_object;
struct out;

struct out *out_new(FILE *text);	/* NULL: JSON only */
void out_free(struct out *o);
struct json_object *out_json(struct out *o);
void out_print_json(const struct out *o, FILE *file);
int print_error(int code, bool json);	/* print_failure(), and if asked for, an object with "error" */
int out_write_report(const struct out *o, const char *path);
/** write_report() - a file beside its name, and renamed: a reader never finds half of it */
int write_report(const char *path, void (*put)(FILE *file, const void *data), const void *data);

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
	void **shared;			/* set to zeroed memory that front and worker share */
	size_t shared_size;
};
int supervise(const struct supervised *job);	/* the exit code, or a negative errno: no worker was started */
void on_interrupt(void (*fn)(void));	/* called in the signal handler; NULL: nothing */
/* Likewise, with the value of each LIMIT_SIGNAL; those that came before are not lost, the last one counts. */
void on_limit(void (*fn)(uint64_t bytes_per_second));
#define LIMIT_SIGNAL SIGRTMIN	/* one that queues: the last of several is not lost */

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
	struct json_object *wanted;		/* what to set by it */
	int stream;				/* our end of the device state's socket, or -1 */
};
#define VMM_INIT { .stream = -1 }

int vmm_connect(struct vmm *v, const char *path, int timeout_ms);
int vmm_check_source(struct vmm *v);
int vmm_check_memory(struct vmm *v, pid_t pid, int *fd, uint64_t *bytes);
int vmm_plan(struct vmm *v);		/* what to set, and what to set back; changes nothing */
int vmm_set_up(struct vmm *v);		/* plans, unless that was done */
int vmm_restore(struct vmm *v);
int vmm_open_outgoing(struct vmm *v);
int vmm_open_incoming(struct vmm *v);
int vmm_pause(struct vmm *v);
int vmm_save(struct vmm *v, void **state, size_t *length);
int vmm_load(struct vmm *v, const void *state, size_t length);
int vmm_resume(struct vmm *v);
int vmm_status(struct vmm *v, char status[32]);
void vmm_close(struct vmm *v);

/* ---- rescue.c: the source's worker was killed -------------------------------------------------- */

/* What the front must know then. In memory that it shares with the worker. */
struct footprint {
	volatile bool paused;		/* by us, not yet running again */
	volatile bool resuming;		/* as it is not, and will not be, run at the destination */
	volatile bool completed;
	volatile bool told;		/* the reports are written */
	volatile enum kmig_state state;
	char capabilities[4096], parameters[256];	/* of QEMU, to be set back; JSON, or "" */
	struct kmig_report report;	/* the last one; may be torn */
};
void footprint_pause(struct footprint *f);
/** rescue() - set right what can be; returns the exit code and leaves in failure() what is so */
int rescue(const struct footprint *f, const char *qmp);

/* ---- find.c: the region that is its memory ------------------------------------------------- */

/** @pidfd: of QEMU's process, for the caller to close; set also when the region was not found */
int find_region(struct vmm *v, struct kmig_ctx *ctx, const char *qmp, struct kmig_region **region, int *pidfd);

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

/* What is told of a migration at its end. */
struct account {
	bool source;			/* what only the source knows is told as well */
	struct kmig_report report;
	struct kmig_round_report *rounds;
	size_t count;
	size_t precopy;			/* of them, before the blackout */
	uint64_t acked_ns;		/* when the last one was stored, since the start */
	struct {
		struct kmig_forecast expected;
		size_t rounds;		/* that were sent when it was made; 0: none was made */
		uint64_t at_ns;
	} forecast;
	struct cap {
		uint64_t at_ns;			/* since the start */
		uint64_t bytes_per_second;	/* from then on; 0: as many as the network takes */
	} *caps;			/* each change of the cap on the bandwidth */
	size_t cap_count;
};
/** account_came() - what came of the first forecast, from then to the end; of one that has completed */
struct kmig_forecast account_came(const struct account *a);
/** account_progress() - take note of caps and the first forecast; before account_round() for its round */
void account_progress(struct account *a, const struct kmig_report *now);
void account_round(struct account *a, const struct kmig_round_report *round);
void account_free(struct account *a);
void report_put(struct out *o, const struct account *a, const char *error);
/** report_finish() - to stdout as text or JSON, and to the file at @path unless it is NULL; both are tried */
int report_finish(const struct account *a, const char *error, bool json, const char *path);

struct progress {
	bool source;		/* which knows what is left */
	bool verbose;
	bool terminal;
	int64_t last;
	enum kmig_state state;
	bool begun;
};
void progress_init(struct progress *p, bool source, bool verbose);
/** progress_say() - what is being done, where there are no figures for it */
void progress_say(struct progress *p, const char *what);
void progress_update(struct progress *p, const struct kmig_report *report);
void progress_round(struct progress *p, const struct kmig_round_report *round);
/** progress_text() - the line, as much of it as fits before the last of @columns */
#define PROGRESS_MAX 256
void progress_text(const struct kmig_report *report, bool source, unsigned int columns, char text[PROGRESS_MAX]);
void progress_round_text(const struct kmig_round_report *round, unsigned int columns, char text[PROGRESS_MAX]);

/* ---- timeline.c, html.c, chart.c: the report that is looked at ------------------------------- */

struct sample {
	uint64_t at_ns;			/* since the start */
	uint64_t transferred_bytes, remaining_bytes, held_pages;
	double ceiling;			/* pages a second; 0: none */
};

struct timed_round {
	uint64_t begin_ns, end_ns;
	struct kmig_round_report report;
};

#define TIMELINE_MAX 1024
struct timeline {
	struct sample sample[TIMELINE_MAX];	/* the first and the last are always kept */
	size_t count;
	uint64_t spacing_ns;			/* of those to come, at least */
	struct timed_round *round;
	size_t rounds;
};
void timeline_add(struct timeline *t, const struct kmig_report *now);
void timeline_round(struct timeline *t, const struct kmig_report *now, const struct kmig_round_report *round);
void timeline_free(struct timeline *t);

struct story {
	const struct account *account;
	const struct timeline *timeline;
	const char *guest, *to;			/* names; may hold anything */
	const char *error;			/* "" if none */
	uint32_t downtime_ms;			/* the limit */
};
/** html_write() - one file with everything in it, no script, nothing fetched */
int html_write(const struct story *story, const char *path);

/* ---- the verbs --------------------------------------------------------------------------------- */

struct verb {
	const char *name;
	const char *arguments;
	const char *help;		/* one line */
	const struct opt *options;
	bool operands;			/* more than options may follow */
	const char *notes;		/* lines below the options; may be NULL */
	int (*run)(const struct verb *verb, char **operands);	/* its options are parsed */
};
int usage_error(const struct verb *verb, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int open_context(struct kmig_ctx **ctx, bool verbose);

extern const struct verb region_list_verb, region_show_verb;
extern const struct verb run_verb, migrate_verb, receive_verb, limit_verb, forecast_verb, version_verb;

#endif /* KMIG_TOOL_H */
