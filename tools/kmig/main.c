// SPDX-License-Identifier: GPL-2.0
/* kmig OBJECT VERB: tables of what there is, and help at each level. */
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

struct object {
	const char *name;
	const char *help;
	const struct verb *const *verbs;	/* ends with NULL; or: */
	const struct verb *only;	/* the object is its own verb */
};

static int version(const struct verb *verb, char **operands)
{
	(void)verb;
	(void)operands;
	printf("kmig %s\n", kmig_version());
	return EXIT_DONE;
}

static const struct opt no_options[] = { OPT_END };

const struct verb version_verb = {
	.name = "version",
	.arguments = "",
	.help = "the version of kmig",
	.options = no_options,
	.run = version,
};

static const struct verb *const region_list[] = { &region_list_verb, &region_show_verb, NULL };
static const struct verb *const qemu_list[] = { &run_verb, &migrate_verb, NULL };

static const struct object objects[] = {
	{ "region", "memory that can be migrated", region_list, NULL },
	{ "qemu", "start a QEMU on a region, move its guest away", qemu_list, NULL },
	{ "receive", "take in a guest from another host", NULL, &receive_verb },
	{ "limit", "change the bandwidth of a migration while it runs", NULL, &limit_verb },
	{ "forecast", "what a migration would take, before it is begun", NULL, &forecast_verb },
	{ "version", "the version of kmig", NULL, &version_verb },
	{ NULL, NULL, NULL, NULL },
};

static const struct object *current;

static void print_usage(FILE *file, const struct verb *verb)
{
	fprintf(file, "usage: kmig %s%s%s %s\n", current->name, current->only ? "" : " ",
		current->only ? "" : verb->name, verb->arguments);
}

int usage_error(const struct verb *verb, const char *fmt, ...)
{
	va_list args;

	fputs("kmig: ", stderr);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
	print_usage(stderr, verb);
	return EXIT_USAGE;
}

static int help_verb(const struct verb *verb)
{
	print_usage(stdout, verb);
	printf("\n%s\n", verb->help);
	if (verb->options->name) {
		putchar('\n');
		options_help(verb->options, stdout);
	}
	if (verb->notes)
		printf("\n%s", verb->notes);
	return EXIT_DONE;
}

static int run_verb_with(const struct verb *verb, int argc, char **argv)
{
	static char name[] = "kmig";

	/* It begins getopt's messages. */
	argv[0] = name;
	switch (options_parse(verb->options, argc, argv)) {
	case 0:
		break;
	case OPTIONS_HELP:
		return help_verb(verb);
	case OPTIONS_BAD:
		print_usage(stderr, verb);
		return EXIT_USAGE;
	default:
		return usage_error(verb, "%s", failure());
	}
	if (!verb->operands && optind != argc)
		return usage_error(verb, "unexpected argument '%s'", argv[optind]);
	return verb->run(verb, argv + optind);
}

static int help_all(FILE *file)
{
	const struct object *o;

	fputs("usage: kmig OBJECT VERB [options]\n\nobjects:\n", file);
	for (o = objects; o->name; o++)
		fprintf(file, "  %-10s %s\n", o->name, o->help);
	fputs("\n'kmig OBJECT --help' and 'kmig OBJECT VERB --help' say more, as do the manual pages.\n", file);
	return file == stdout ? EXIT_DONE : EXIT_USAGE;
}

static int help_object(FILE *file, const struct object *o)
{
	const struct verb *const *v;

	fprintf(file, "usage: kmig %s VERB [options]\n\nverbs:\n", o->name);
	for (v = o->verbs; *v; v++)
		fprintf(file, "  %-10s %s\n", (*v)->name, (*v)->help);
	return file == stdout ? EXIT_DONE : EXIT_USAGE;
}

static bool is_help(const char *word)
{
	return !strcmp(word, "help") || !strcmp(word, "-h") || !strcmp(word, "--help");
}

static int run_object(const struct object *o, int argc, char **argv)
{
	const struct verb *const *v;

	current = o;
	if (o->only)
		return run_verb_with(o->only, argc, argv);
	if (argc < 2)
		return help_object(stderr, o);
	if (is_help(argv[1]))
		return help_object(stdout, o);
	for (v = o->verbs; *v; v++)
		if (!strcmp((*v)->name, argv[1]))
			return run_verb_with(*v, argc - 1, argv + 1);
	fprintf(stderr, "kmig: '%s' is no verb of %s\n", argv[1], o->name);
	return help_object(stderr, o);
}

static void log_line(enum kmig_log_level level, const char *text, void *data)
{
	const bool *verbose = data;

	/* Errors are returned as well, and told then. */
	if (level == KMIG_LOG_WARNING || (*verbose && level == KMIG_LOG_INFO))
		say("%s", text);
}

int open_context(struct kmig_ctx **ctx, bool verbose)
{
	static bool wordy;
	int ret = kmig_ctx_new(ctx);

	if (ret)
		return fail(-ret, "libkmig: %s", strerror(-ret));
	wordy = verbose;
	kmig_ctx_set_log(*ctx, log_line, &wordy);
	return 0;
}

/* What could not be written was not done. The reports of migrations are not written here. */
static int check_output(int code)
{
	if (!fflush(stdout) && !ferror(stdout))
		return code;
	say("standard output: %s", strerror(errno));
	return code == EXIT_DONE || code == EXIT_DIVERGES ? EXIT_FAILED : code;
}

int main(int argc, char **argv)
{
	const struct object *o;

	if (argc < 2)
		return help_all(stderr);
	if (is_help(argv[1]))
		return check_output(help_all(stdout));
	for (o = objects; o->name; o++)
		if (!strcmp(o->name, argv[1]))
			return check_output(run_object(o, argc - 1, argv + 1));
	fprintf(stderr, "kmig: '%s' is no object\n", argv[1]);
	return help_all(stderr);
}
