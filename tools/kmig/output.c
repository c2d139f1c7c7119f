// SPDX-License-Identifier: GPL-2.0
/*
 * Text and JSON from one call. The tree is always built, so that a report can go to a file
 * as JSON while its text goes to the terminal.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <json-c/json.h>

#include "tool.h"

#define OUT_DEPTH 8
#define REPLACEMENT "\xef\xbf\xbd"	/* U+FFFD */

struct out {
	FILE *text;
	struct json_object *stack[OUT_DEPTH];	/* stack[0] is the root and owns the rest */
	unsigned int depth;			/* open containers */
};

struct out *out_new(FILE *text)
{
	struct out *o = calloc(1, sizeof(*o));

	if (!o)
		abort();
	o->text = text;
	return o;
}

void out_free(struct out *o)
{
	json_object_put(o->stack[0]);
	free(o);
}

struct json_object *out_json(struct out *o)
{
	return o->stack[0];
}

void out_print_json(const struct out *o, FILE *file)
{
	fprintf(file, "%s\n", json_object_to_json_string_ext(o->stack[0],
		JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE));
}

int print_error(int code, bool json)
{
	struct out *o;

	print_failure(code);
	if (!json)
		return code;
	o = out_new(NULL);
	out_object(o, NULL);
	out_string(o, "error", NULL, failure());
	out_end(o);
	out_print_json(o, stdout);
	out_free(o);
	return code;
}

static int put_and_close(FILE *file, void (*put)(FILE *file, const void *data), const void *data)
{
	int err = 0;

	put(file, data);
	if (ferror(file))
		err = EIO;
	if (fclose(file) && !err)
		err = errno;
	return err;
}

static int replace(const char *path, void (*put)(FILE *file, const void *data), const void *data)
{
	char *part;
	FILE *file;
	int err;

	if (asprintf(&part, "%s.part", path) < 0)
		return ENOMEM;
	file = fopen(part, "we");
	err = file ? put_and_close(file, put, data) : errno;
	if (file && !err && rename(part, path))
		err = errno;
	if (file && err)
		unlink(part);
	free(part);
	return err;
}

int write_report(const char *path, void (*put)(FILE *file, const void *data), const void *data)
{
	struct stat st;
	char *target;
	FILE *file;
	int err;

	if (!stat(path, &st) && !S_ISREG(st.st_mode)) {
		/* A device or a pipe stays what it is. */
		file = fopen(path, "we");
		err = file ? put_and_close(file, put, data) : errno;
	} else {
		/* A link, too: what it leads to is replaced. NULL: there is nothing yet. */
		target = realpath(path, NULL);
		err = replace(target ? target : path, put, data);
		free(target);
	}
	return err ? fail(err, "report %s: %s", path, strerror(err)) : 0;
}

static void put_json(FILE *file, const void *data)
{
	out_print_json(data, file);
}

int out_write_report(const struct out *o, const char *path)
{
	return write_report(path, put_json, o);
}

static void insert(struct out *o, const char *key, struct json_object *value)
{
	struct json_object *in;

	if (!o->depth) {
		o->stack[0] = value;
		return;
	}
	in = o->stack[o->depth - 1];
	if (json_object_is_type(in, json_type_array))
		json_object_array_add(in, value);
	else
		json_object_object_add(in, key, value);
}

static void add(struct out *o, const char *key, struct json_object *value)
{
	if (!value)
		abort();
	insert(o, key, value);
}

static void push(struct out *o, const char *key, struct json_object *value)
{
	add(o, key, value);
	if (o->depth == OUT_DEPTH)
		abort();
	o->stack[o->depth++] = value;
}

void out_object(struct out *o, const char *key)
{
	push(o, key, json_object_new_object());
}

void out_array(struct out *o, const char *key)
{
	push(o, key, json_object_new_array());
}

void out_end(struct out *o)
{
	o->depth--;
}

void out_text(struct out *o, const char *fmt, ...)
{
	va_list args;

	if (!o->text)
		return;
	va_start(args, fmt);
	vfprintf(o->text, fmt, args);
	va_end(args);
}

/* The formats come from this program's own sources, one directive each. */
#define PRINT(o, fmt, value) do { if ((o)->text && (fmt)) fprintf((o)->text, (fmt), (value)); } while (0)

void out_uint(struct out *o, const char *key, const char *fmt, uint64_t value)
{
	add(o, key, json_object_new_uint64(value));
	PRINT(o, fmt, value);
}

void out_int(struct out *o, const char *key, const char *fmt, int value)
{
	add(o, key, json_object_new_int(value));
	PRINT(o, fmt, value);
}

void out_float(struct out *o, const char *key, const char *fmt, double value)
{
	char digits[64];

	/* Three decimals say all that is measured; the default prints seventeen digits. */
	snprintf(digits, sizeof(digits), "%.3f", value);
	if (isfinite(value))
		add(o, key, json_object_new_double_s(value, digits));
	else
		insert(o, key, NULL);	/* null: JSON has no word for it */
	PRINT(o, fmt, value);
}

/* What is no text in UTF-8, a name on a command line or a message that was cut, must not spoil all. */
static char *as_utf8(const char *s)
{
	char *text = malloc(3 * strlen(s) + 1), *to = text;

	if (!text)
		abort();
	while (*s) {
		size_t length = character(s);

		memcpy(to, length ? s : REPLACEMENT, length ? length : strlen(REPLACEMENT));
		to += length ? length : strlen(REPLACEMENT);
		s += length ? length : 1;
	}
	*to = '\0';
	return text;
}

void out_string(struct out *o, const char *key, const char *fmt, const char *value)
{
	char *text = as_utf8(value);

	add(o, key, json_object_new_string(text));
	free(text);
	PRINT(o, fmt, value);
}

void out_bool(struct out *o, const char *key, const char *fmt, bool value)
{
	add(o, key, json_object_new_boolean(value));
	PRINT(o, fmt, value ? "yes" : "no");
}

void out_bytes(struct out *o, const char *key, const char *fmt, uint64_t value)
{
	char human[32];

	format_bytes(value, human);
	add(o, key, json_object_new_uint64(value));
	PRINT(o, fmt, human);
}
