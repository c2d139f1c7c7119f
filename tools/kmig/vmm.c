// SPDX-License-Identifier: GPL-2.0
/*
 * QEMU at either end of a migration, through QMP.
 *
 * Memory is lmtrack's business: QEMU is told to leave shared memory out of its own stream
 * (x-ignore-shared), which then holds the devices and small blocks such as ROMs. The stream
 * passes through a socketpair, of which QEMU gets one end (getfd): no path, no port, and it
 * ends when either process does. All that can be done beforehand is: in the blackout the
 * source gets 'stop' and 'migrate', the destination, which waits on its end, 'cont'.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <json-c/json.h>

#include "tool.h"

#define STREAM_NAME "kmig-state"
#define STREAM_BUFFER (4 << 20)		/* QEMU is then seldom blocked on us */
#define STATE_MAX (1u << 30)
#define STATE_TIMEOUT_MS 30000
#define COMMAND_TIMEOUT_MS 15000	/* 'stop' flushes the disks */
#define BANDWIDTH_MAX (1ll << 40)	/* bytes/s: the stream is local */

static const char *const wanted[] = { "x-ignore-shared", "events" };

static const char *text_of(struct json_object *object, const char *key)
{
	struct json_object *value;

	if (!json_object_object_get_ex(object, key, &value) ||
	    !json_object_is_type(value, json_type_string))
		return "";
	return json_object_get_string(value);
}

static bool flag_of(struct json_object *object, const char *key)
{
	struct json_object *value;

	return json_object_object_get_ex(object, key, &value) && json_object_get_boolean(value);
}

static uint64_t number_of(struct json_object *object, const char *key)
{
	struct json_object *value;

	return json_object_object_get_ex(object, key, &value) ? json_object_get_uint64(value) : 0;
}

static int query(struct vmm *v, const char *command, enum json_type type, struct json_object **ret)
{
	int err = qmp_execute(v->qmp, command, NULL, -1, ret);

	if (err)
		return err;
	if (!json_object_is_type(*ret, type)) {
		json_object_put(*ret);
		return fail(EPROTO, "QMP: unexpected answer to '%s'", command);
	}
	return 0;
}

int vmm_connect(struct vmm *v, const char *path, int timeout_ms)
{
	int ret = qmp_connect(path, timeout_ms, &v->qmp);

	if (!ret)
		qmp_set_timeout(v->qmp, COMMAND_TIMEOUT_MS);
	return ret;
}

int vmm_status(struct vmm *v, char status[32])
{
	struct json_object *ret;
	int err = query(v, "query-status", json_type_object, &ret);

	if (err)
		return err;
	snprintf(status, 32, "%s", text_of(ret, "status"));
	json_object_put(ret);
	return 0;
}

/* ---- what a source must be --------------------------------------------------------- */

static bool is_one_of(const char *text, const char *const *list)
{
	for (; *list; list++)
		if (!strcmp(text, *list))
			return true;
	return false;
}

static int check_migration(struct json_object *info)
{
	static const char *const idle[] = { "", "none", "completed", "failed", "cancelled", NULL };
	struct json_object *reasons;
	const char *status = text_of(info, "status");

	if (!is_one_of(status, idle))
		return fail(EBUSY, "QEMU is migrating already (status: %s)", status);
	if (json_object_object_get_ex(info, "blocked-reasons", &reasons) &&
	    json_object_is_type(reasons, json_type_array) && json_object_array_length(reasons))
		return fail(EPERM, "QEMU cannot migrate this guest: %s",
			    json_object_get_string(json_object_array_get_idx(reasons, 0)));
	return 0;
}

int vmm_check_source(struct vmm *v)
{
	struct json_object *ret;
	char status[32];
	int err;

	err = vmm_status(v, status);
	if (err)
		return err;
	if (strcmp(status, "running"))
		return fail(EINVAL, "the guest is not running (status: %s)", status);
	err = query(v, "query-migrate", json_type_object, &ret);
	if (err)
		return err;
	err = check_migration(ret);
	json_object_put(ret);
	return err;
}

static int memory_path(struct vmm *v, const char *id, char path[128])
{
	struct json_object *args = json_object_new_object(), *ret;
	char name[128];
	int err;

	snprintf(name, sizeof(name), "/objects/%s", id);
	json_object_object_add(args, "path", json_object_new_string(name));
	json_object_object_add(args, "property", json_object_new_string("mem-path"));
	err = qmp_execute(v->qmp, "qom-get", args, -1, &ret);
	if (err == -EREMOTEIO) {
		failure_clear();
		return fail(EINVAL, "the guest's memory '%s' is not a file, so not an lmtrack region: "
			    "start QEMU with 'kmig qemu run'", id);
	}
	if (err)
		return err;
	snprintf(path, 128, "%s", json_object_is_type(ret, json_type_string) ?
		 json_object_get_string(ret) : "");
	json_object_put(ret);
	return 0;
}

static int check_backends(struct vmm *v, struct json_object *list, char path[128], uint64_t *bytes)
{
	struct json_object *dev = json_object_array_get_idx(list, 0);
	size_t n = json_object_array_length(list);
	int err;

	if (!n)
		return fail(EINVAL, "the guest's memory is not an lmtrack region: "
			    "start QEMU with 'kmig qemu run'");
	if (n > 1)
		return fail(EINVAL, "the guest has %zu memory backends; one can be migrated", n);
	err = memory_path(v, text_of(dev, "id"), path);
	if (err)
		return err;
	if (!flag_of(dev, "share"))
		return fail(EINVAL, "the guest's memory '%s' is not shared: it needs share=on",
			    text_of(dev, "id"));
	*bytes = number_of(dev, "size");
	return 0;
}

static int check_total(struct vmm *v, uint64_t bytes)
{
	struct json_object *ret;
	uint64_t base, plugged;
	int err;

	err = query(v, "query-memory-size-summary", json_type_object, &ret);
	if (err)
		return err;
	base = number_of(ret, "base-memory");
	plugged = number_of(ret, "plugged-memory");
	json_object_put(ret);
	if (base != bytes || plugged)
		return fail(EINVAL, "the guest has memory beside its lmtrack region: %" PRIu64 " + %" PRIu64
			    " bytes, of which the region holds %" PRIu64, base, plugged, bytes);
	return 0;
}

/* @fd: the descriptor in QEMU that its memory was opened from, or -1 when that is not known. */
int vmm_check_memory(struct vmm *v, pid_t pid, int *fd, uint64_t *bytes)
{
	struct json_object *list;
	char path[128];
	int err, owner, number, end = 0;

	err = query(v, "query-memdev", json_type_array, &list);
	if (err)
		return err;
	err = check_backends(v, list, path, bytes);
	json_object_put(list);
	if (err)
		return err;
	*fd = -1;
	if (sscanf(path, "/proc/self/fd/%d%n", &number, &end) == 1 && !path[end])
		*fd = number;
	else if (sscanf(path, "/proc/%d/fd/%d%n", &owner, &number, &end) == 2 && !path[end] && owner == pid)
		*fd = number;
	return check_total(v, *bytes);
}

/* ---- capabilities and parameters ------------------------------------------------------ */

static void add_capability(struct json_object *list, const char *name, bool on)
{
	struct json_object *c = json_object_new_object();

	json_object_object_add(c, "capability", json_object_new_string(name));
	json_object_object_add(c, "state", json_object_new_boolean(on));
	json_object_array_add(list, c);
}

static int set_capabilities(struct vmm *v, struct json_object *list)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "capabilities", list);
	return qmp_run(v->qmp, "migrate-set-capabilities", args);
}

/*
 * Capabilities that we do not want are switched off: each (multifd, compression, postcopy,
 * a pause before switch-over) would change the stream or make QEMU wait for somebody.
 */
static int plan_capabilities(struct vmm *v)
{
	const size_t n_wanted = sizeof(wanted) / sizeof(wanted[0]);
	struct json_object *now;
	size_t i, k, found = 0;
	int err;

	err = query(v, "query-migrate-capabilities", json_type_array, &now);
	if (err)
		return err;
	v->capabilities = json_object_new_array();
	v->wanted = json_object_new_array();
	for (i = 0; i < json_object_array_length(now); i++) {
		struct json_object *c = json_object_array_get_idx(now, i);
		const char *name = text_of(c, "capability");
		bool on = flag_of(c, "state"), want = false;

		for (k = 0; k < n_wanted; k++)
			want |= !strcmp(name, wanted[k]);
		found += want;
		if (on == want)
			continue;
		add_capability(v->capabilities, name, on);
		add_capability(v->wanted, name, want);
	}
	json_object_put(now);
	if (found != n_wanted)
		return fail(EOPNOTSUPP, "this QEMU is too old: it lacks the migration capability x-ignore-shared");
	return 0;
}

static int plan_parameters(struct vmm *v)
{
	struct json_object *now;
	int err;

	err = query(v, "query-migrate-parameters", json_type_object, &now);
	if (err)
		return err;
	if (*text_of(now, "tls-creds"))
		err = fail(EINVAL, "QEMU's migration parameter tls-creds is set: clear it, "
			   "the device state stays on this host");
	v->parameters = json_object_new_object();
	json_object_object_add(v->parameters, "max-bandwidth",
			       json_object_new_uint64(number_of(now, "max-bandwidth")));
	json_object_put(now);
	return err;
}

/* Nothing is changed yet, so there is nothing to be set back. */
static void forget_plan(struct vmm *v)
{
	json_object_put(v->capabilities);
	json_object_put(v->parameters);
	json_object_put(v->wanted);
	v->capabilities = v->parameters = v->wanted = NULL;
}

int vmm_plan(struct vmm *v)
{
	int err = plan_capabilities(v);

	if (!err)
		err = plan_parameters(v);
	if (err)
		forget_plan(v);
	return err;
}

int vmm_set_up(struct vmm *v)
{
	int err = v->wanted ? 0 : vmm_plan(v);
	struct json_object *set;

	if (err)
		return err;
	err = set_capabilities(v, v->wanted);
	v->wanted = NULL;
	if (err)
		return err;
	set = json_object_new_object();
	json_object_object_add(set, "max-bandwidth", json_object_new_int64(BANDWIDTH_MAX));
	return qmp_run(v->qmp, "migrate-set-parameters", set);
}

int vmm_restore(struct vmm *v)
{
	int err = 0, ret;

	qmp_ignore_interrupt(v->qmp);
	if (v->parameters)
		err = qmp_run(v->qmp, "migrate-set-parameters", v->parameters);
	v->parameters = NULL;
	if (v->capabilities) {
		ret = set_capabilities(v, v->capabilities);
		err = err ? err : ret;
	}
	v->capabilities = NULL;
	return err;
}

/* ---- the device state's stream ------------------------------------------------------------ */

static void close_stream(struct vmm *v)
{
	if (v->stream >= 0)
		close(v->stream);
	v->stream = -1;
}

static int open_stream(struct vmm *v)
{
	int pair[2], size = STREAM_BUFFER, i, err;

	close_stream(v);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return fail(errno, "socketpair: %s", strerror(errno));
	for (i = 0; i < 2; i++)
		setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	v->stream = pair[0];
	err = qmp_getfd(v->qmp, STREAM_NAME, pair[1]);
	close(pair[1]);
	return err;
}

static int stream_command(struct vmm *v, const char *command)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "uri", json_object_new_string("fd:" STREAM_NAME));
	return qmp_run(v->qmp, command, args);
}

int vmm_open_outgoing(struct vmm *v)
{
	return open_stream(v);
}

/* QEMU waits for the first byte from now on, and exits should we end without any. */
int vmm_open_incoming(struct vmm *v)
{
	int err = open_stream(v);

	if (err)
		return err;
	qmp_forget_events(v->qmp);
	return stream_command(v, "migrate-incoming");
}

static int stream_failed(struct vmm *v, const char *what)
{
	struct json_object *info;
	const char *reason = "";
	int err;

	if (query(v, "query-migrate", json_type_object, &info))
		return -EIO;
	reason = text_of(info, "error-desc");
	err = fail(EIO, "QEMU could not %s the device state%s%s", what, *reason ? ": " : "", reason);
	json_object_put(info);
	return err;
}

/* 1: completed; 0: not yet; negative: failed. */
static int stream_status(struct vmm *v, const char *what)
{
	struct json_object *event, *data;
	int done = 0;

	while (!done && (event = qmp_next_event(v->qmp))) {
		const char *status = "";

		if (!strcmp(text_of(event, "event"), "MIGRATION") &&
		    json_object_object_get_ex(event, "data", &data))
			status = text_of(data, "status");
		if (!strcmp(status, "completed"))
			done = 1;
		else if (!strcmp(status, "failed") || !strcmp(status, "cancelled"))
			done = -1;
		json_object_put(event);
	}
	return done < 0 ? stream_failed(v, what) : done;
}

/* Wait until the stream is ready for @events or QMP has news, which are taken in. */
static int wait_stream(struct vmm *v, short events, int64_t deadline)
{
	struct pollfd p[2] = {
		{ .fd = qmp_fd(v->qmp), .events = POLLIN },
		{ .fd = v->stream, .events = events },
	};

	if (interrupted && events == POLLIN)
		return fail(ECANCELED, "interrupted");
	if (now_ms() >= deadline)
		return fail(ETIMEDOUT, "QEMU was too slow with the device state");
	if (poll(p, 2, 100) < 0 && errno != EINTR)
		return fail(errno, "poll: %s", strerror(errno));
	return p[0].revents ? qmp_pump(v->qmp) : 0;
}

struct buffer {
	char *data;
	size_t length, space;
};

/* 1: the stream has ended; 0: more may come. */
static int read_stream(struct vmm *v, struct buffer *b)
{
	ssize_t n;

	for (;;) {
		if (b->length == b->space) {
			size_t space = b->space ? 2 * b->space : 1 << 20;
			char *data = space > STATE_MAX ? NULL : realloc(b->data, space);

			if (!data)
				return fail(ENOMEM, "no memory for a device state of more than %zu bytes", b->length);
			b->data = data;
			b->space = space;
		}
		n = recv(v->stream, b->data + b->length, b->space - b->length, MSG_DONTWAIT);
		if (n == 0)
			return 1;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 0 : fail(errno, "device state: %s", strerror(errno));
		b->length += (size_t)n;
	}
}

static int collect(struct vmm *v, struct buffer *b)
{
	int64_t deadline = now_ms() + STATE_TIMEOUT_MS;
	int end = 0, done = 0, err;

	while (!end || !done) {
		/* A stream that has ended would always be ready. */
		err = end ? qmp_wait(v->qmp, deadline) : wait_stream(v, POLLIN, deadline);
		if (err)
			return err;
		if (!done)
			done = stream_status(v, "save");
		if (done < 0)
			return done;
		if (!end)
			end = read_stream(v, b);
		if (end < 0)
			return end;
	}
	return b->length ? 0 : fail(EIO, "QEMU sent no device state");
}

int vmm_save(struct vmm *v, void **state, size_t *length)
{
	struct buffer b = { 0 };
	int err = 0;

	qmp_forget_events(v->qmp);
	/* The guest was resumed since: it took the first one with it. */
	if (v->stream < 0)
		err = open_stream(v);
	if (!err)
		err = stream_command(v, "migrate");
	if (!err)
		err = collect(v, &b);
	close_stream(v);
	if (err) {
		free(b.data);
		return err;
	}
	*state = b.data;
	*length = b.length;
	return 0;
}

int vmm_load(struct vmm *v, const void *state, size_t length)
{
	int64_t deadline = now_ms() + STATE_TIMEOUT_MS;
	const char *data = state;
	int done, err;
	ssize_t n;

	while (length) {
		n = send(v->stream, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n > 0) {
			data += n;
			length -= (size_t)n;
			continue;
		}
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return fail(errno, "QEMU does not take the device state: %s", strerror(errno));
		err = wait_stream(v, POLLOUT, deadline);
		if (err)
			return err;
	}
	for (;;) {
		done = stream_status(v, "load");
		if (done)
			break;
		err = qmp_wait(v->qmp, deadline);
		if (err)
			return err;
	}
	close_stream(v);
	return done < 0 ? done : 0;
}

/* ---- pausing and going on --------------------------------------------------------------------- */

int vmm_pause(struct vmm *v)
{
	return qmp_run(v->qmp, "stop", NULL);
}

/* Bring an unfinished migration of QEMU's to its end; 'cont' is refused before. */
static int settle(struct vmm *v)
{
	static const char *const settled[] = { "", "none", "completed", "failed", "cancelled", NULL };
	int64_t deadline = now_ms() + STATE_TIMEOUT_MS;
	bool cancelled = false, done;
	struct json_object *info;
	int err;

	for (;;) {
		err = query(v, "query-migrate", json_type_object, &info);
		if (err)
			return err;
		done = is_one_of(text_of(info, "status"), settled);
		json_object_put(info);
		if (done)
			return 0;
		if (!cancelled)
			err = qmp_run(v->qmp, "migrate_cancel", NULL);
		cancelled = true;
		if (err)
			return err;
		if (now_ms() >= deadline)
			return fail(ETIMEDOUT, "QEMU does not end its migration");
		usleep(5000);
	}
}

int vmm_resume(struct vmm *v)
{
	char status[32];
	int err;

	qmp_ignore_interrupt(v->qmp);
	close_stream(v);
	err = settle(v);
	if (!err)
		err = vmm_status(v, status);
	if (!err && strcmp(status, "running"))
		err = qmp_run(v->qmp, "cont", NULL);
	return err;
}

void vmm_close(struct vmm *v)
{
	close_stream(v);
	forget_plan(v);
	qmp_close(v->qmp);
	*v = (struct vmm)VMM_INIT;
}
