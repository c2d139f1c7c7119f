// SPDX-License-Identifier: GPL-2.0
/* Options from a table, which is their help, too. */
#include <errno.h>
#include <getopt.h>
#include <string.h>

#include "tool.h"

#define OPTIONS_MAX 32
#define LONG_BASE 256	/* a long option's value: its place in the table, beyond all letters */

static const char *dashed(const struct opt *opt)
{
	static char text[64];

	snprintf(text, sizeof(text), "--%s", opt->name);
	return text;
}

int take_flag(const struct opt *opt, const char *text)
{
	(void)text;
	*(bool *)opt->value = true;
	return 0;
}

int take_text(const struct opt *opt, const char *text)
{
	*(const char **)opt->value = text;
	return 0;
}

int take_int(const struct opt *opt, const char *text)
{
	uint64_t n;
	int ret = parse_number(dashed(opt), text, opt->min, opt->max, &n);

	if (!ret)
		*(int *)opt->value = (int)n;
	return ret;
}

int take_u32(const struct opt *opt, const char *text)
{
	uint64_t n;
	int ret = parse_number(dashed(opt), text, opt->min, opt->max, &n);

	if (!ret)
		*(uint32_t *)opt->value = (uint32_t)n;
	return ret;
}

int take_double(const struct opt *opt, const char *text)
{
	return parse_decimal(dashed(opt), text, (double)opt->min, (double)opt->max, opt->value);
}

int take_percent(const struct opt *opt, const char *text)
{
	int ret = take_double(opt, text);

	if (!ret)
		*(double *)opt->value /= 100;
	return ret;
}

int take_seconds(const struct opt *opt, const char *text)
{
	double seconds;
	int ret = parse_decimal(dashed(opt), text, (double)opt->min, (double)opt->max, &seconds);

	if (!ret)
		*(uint64_t *)opt->value = (uint64_t)(seconds * 1000);
	return ret;
}

int take_size(const struct opt *opt, const char *text)
{
	uint64_t *bytes = opt->value;
	int ret = parse_size(text, bytes);

	/* What was not given is 0. */
	return ret || *bytes ? ret : fail(EINVAL, "%s must be more than nothing", dashed(opt));
}

int take_rate(const struct opt *opt, const char *text)
{
	return parse_rate(dashed(opt), text, opt->value);
}

int take_bandwidth(const struct opt *opt, const char *text)
{
	return parse_bandwidth(dashed(opt), text, opt->value);
}

int take_choice(const struct opt *opt, const char *text)
{
	const char *const *c;
	char list[128] = "";

	for (c = opt->choices; *c; c++) {
		if (!strcmp(*c, text)) {
			*(unsigned int *)opt->value = (unsigned int)(c - opt->choices);
			return 0;
		}
		snprintf(list + strlen(list), sizeof(list) - strlen(list), "%s%s",
			 c == opt->choices ? "" : c[1] ? ", " : " or ", *c);
	}
	return fail(EINVAL, "%s must be %s, not '%s'", dashed(opt), list, text);
}

int take_endpoint(const struct opt *opt, const char *text)
{
	struct endpoint *e = opt->value;

	e->port = KMIG_PORT;
	return parse_address(text, e->host, &e->port);
}

static const struct opt *find(const struct opt *table, int c)
{
	if (c >= LONG_BASE)
		return &table[c - LONG_BASE];
	for (; table->name; table++)
		if (table->letter == c)
			return table;
	return NULL;
}

int options_parse(const struct opt *table, int argc, char **argv)
{
	struct option longs[OPTIONS_MAX + 2] = { { "help", no_argument, NULL, 'h' } };
	char letters[2 * OPTIONS_MAX + 3] = "+h";
	const struct opt *opt;
	int c, ret = 0, n = 1;

	for (opt = table; opt->name && n <= OPTIONS_MAX; opt++, n++) {
		longs[n].name = opt->name;
		longs[n].has_arg = opt->argument ? required_argument : no_argument;
		longs[n].val = LONG_BASE + n - 1;
		if (opt->letter)
			snprintf(letters + strlen(letters), 3, "%c%s", opt->letter, opt->argument ? ":" : "");
	}
	optind = 0;
	while (!ret && (c = getopt_long(argc, argv, letters, longs, NULL)) != -1) {
		if (c == 'h')
			return OPTIONS_HELP;
		opt = c == '?' ? NULL : find(table, c);
		if (!opt)
			return OPTIONS_BAD;
		ret = opt->take(opt, optarg);
	}
	return ret;
}

static int width(const struct opt *opt)
{
	return (int)((opt->letter ? 4 : 0) + 2 + strlen(opt->name) + (opt->argument ? 1 + strlen(opt->argument) : 0));
}

void options_help(const struct opt *table, FILE *file)
{
	const struct opt *opt;
	int widest = 0;

	for (opt = table; opt->name; opt++)
		if (width(opt) > widest)
			widest = width(opt);
	for (opt = table; opt->name; opt++) {
		fputs("  ", file);
		if (opt->letter)
			fprintf(file, "-%c, ", opt->letter);
		fprintf(file, "--%s%s%s%*s  %s\n", opt->name, opt->argument ? " " : "",
			opt->argument ? opt->argument : "", widest - width(opt), "", opt->help);
	}
}
