// SPDX-License-Identifier: GPL-2.0
/* Messages, clocks, and the parsing of what a user types. */
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "tool.h"

static char message[1024];

int fail(int err, const char *fmt, ...)
{
	va_list args;

	if (!message[0]) {
		va_start(args, fmt);
		vsnprintf(message, sizeof(message), fmt, args);
		va_end(args);
	}
	return -err;
}

const char *failure(void)
{
	return message;
}

void failure_clear(void)
{
	message[0] = '\0';
}

static bool line_stands;

/* In one write each, so that nothing flickers and lines of other processes do not mix in. */
void status_line(const char *text)
{
	if (text)
		fprintf(stderr, "\r%s\033[K", text);
	else if (line_stands)
		fputs("\r\033[K", stderr);
	line_stands = text;
}

void say(const char *fmt, ...)
{
	va_list args;
	char line[1200];

	va_start(args, fmt);
	vsnprintf(line, sizeof(line), fmt, args);
	va_end(args);
	status_line(NULL);
	fprintf(stderr, "kmig: %s\n", line);
}

int print_failure(int code)
{
	say("%s", *message ? message : "failed");
	return code;
}

int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* A nice value is a thread's, and a process's memory is freed by whichever thread is its last. */
void go_last(pid_t pid)
{
	char path[32];
	struct dirent *entry;
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	if (!tasks)
		return;
	while ((entry = readdir(tasks)))
		if (entry->d_name[0] != '.')
			setpriority(PRIO_PROCESS, atoi(entry->d_name), 19);
	closedir(tasks);
}

static bool all_digits(const char *text)
{
	return *text && strspn(text, "0123456789") == strlen(text);
}

int parse_size(const char *text, uint64_t *bytes)
{
	static const char units[] = "KMGTPE";
	unsigned long long value;
	unsigned int shift = 0;
	const char *unit;
	char *end;

	errno = 0;
	value = strtoull(text, &end, 10);
	if (!isdigit((unsigned char)text[0]) || errno)
		return fail(EINVAL, "'%s' is not a size: write a number and a unit, as in 512M or 4G", text);
	if (*end) {
		unit = strchr(units, toupper((unsigned char)*end));
		if (unit) {
			shift = 10 * (unsigned int)(unit - units + 1);
			end++;
			if (*end == 'i')
				end++;
		}
		if (*end == 'B' || *end == 'b')
			end++;
		if (*end)
			return fail(EINVAL, "'%s' is not a size: write a number and a unit, as in 512M or 4G",
				    text);
	}
	if (value > UINT64_MAX >> shift)
		return fail(EINVAL, "size '%s' is too large", text);
	*bytes = (uint64_t)value << shift;
	return 0;
}

int parse_number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *value)
{
	unsigned long long v = 0;

	errno = 0;
	if (all_digits(text))
		v = strtoull(text, NULL, 10);
	else
		errno = EINVAL;
	if (errno || v < min || v > max)
		return fail(EINVAL, "%s must be a number from %" PRIu64 " to %" PRIu64 ", not '%s'",
			    what, min, max, text);
	*value = v;
	return 0;
}

/* Digits, and perhaps a fraction: neither sign nor exponent, nor what else strtod() knows. */
static bool take_decimal(const char *text, double *value, const char **rest)
{
	size_t length = strspn(text, "0123456789.");
	char *end;

	*value = strtod(text, &end);
	*rest = end;
	return length && end == text + length;
}

int parse_decimal(const char *what, const char *text, double min, double max, double *value)
{
	const char *rest;
	double v;

	if (!take_decimal(text, &v, &rest) || *rest || v < min || v > max)
		return fail(EINVAL, "%s must be a number from %.10g to %.10g, not '%s'", what, min, max, text);
	*value = v;
	return 0;
}

#define RATE_MAX 1e18	/* bytes a second: a million times the fastest link */

/*
 * What people write: 10Gbit, 10Gbps, 1.25GB/s, 400 Mbit/s, 120MiB/s, 100M. Bits come in powers of
 * 1000, and so do bytes with a B; a unit alone is one of 1024, as in sizes. Pages are of 4 KiB.
 */
int parse_rate(const char *what, const char *text, double *bytes_per_second)
{
	static const char prefixes[] = "KMGT";
	static const struct {
		const char *name;
		double bytes, thousand;
	} units[] = {
		{ "", 1, 1024 }, { "B", 1, 1000 }, { "byte", 1, 1000 }, { "bytes", 1, 1000 },
		{ "b", 1. / 8, 1000 }, { "bit", 1. / 8, 1000 }, { "bits", 1. / 8, 1000 },
		{ "page", 4096, 1000 }, { "pages", 4096, 1000 },
	};
	double value, thousand = 0;
	const char *p, *prefix;
	unsigned int power = 0;
	size_t length, i;

	if (!take_decimal(text, &value, &p))
		goto bad;
	if (*p == ' ' && p[1])
		p++;
	prefix = *p ? strchr(prefixes, toupper((unsigned char)*p)) : NULL;
	if (prefix) {
		power = (unsigned int)(prefix - prefixes) + 1;
		p++;
		if (*p == 'i') {
			thousand = 1024;
			p++;
		}
	}
	length = strlen(p);
	if (length >= 2 && (!strcmp(p + length - 2, "/s") || !strcmp(p + length - 2, "ps")))
		length -= 2;
	for (i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
		if (strlen(units[i].name) != length || strncmp(units[i].name, p, length))
			continue;
		for (value *= units[i].bytes; power; power--)
			value *= thousand ? thousand : units[i].thousand;
		if (value > RATE_MAX)
			return fail(EINVAL, "%s: '%s' is more than any link or memory takes", what, text);
		*bytes_per_second = value;
		return 0;
	}
bad:
	return fail(EINVAL, "%s: '%s' is not a rate: write 10Gbit/s, 400Mbit, 50MB/s or 48MiB/s", what, text);
}

int parse_bandwidth(const char *what, const char *text, uint64_t *bytes_per_second)
{
	double rate = 0;

	if (strcmp(text, "none") && parse_rate(what, text, &rate))
		return -EINVAL;
	if (strcmp(text, "none") && (rate < KMIG_BANDWIDTH_MIN || rate > KMIG_BANDWIDTH_MAX))
		return fail(EINVAL, "%s must be from 64KiB/s to 1000GB/s, or none, not '%s'", what, text);
	*bytes_per_second = (uint64_t)rate;
	return 0;
}

/*
 * HOST, HOST:PORT, :PORT, [IPV6], [IPV6]:PORT, or an IPv6 address alone, which is known by
 * its several colons. An absent host is left empty, an absent port as it was.
 */
int parse_address(const char *text, char host[HOST_MAX], uint16_t *port)
{
	const char *end, *colon;
	uint64_t number;
	size_t length;

	if (text[0] == '[') {
		text++;
		end = strchr(text, ']');
		if (!end || (end[1] && end[1] != ':'))
			return fail(EINVAL, "'[%s' is not an address: write [IPV6]:PORT", text);
		colon = end[1] ? end + 1 : NULL;
	} else {
		colon = strchr(text, ':');
		if (colon && strchr(colon + 1, ':'))
			colon = NULL;
		end = colon ? colon : text + strlen(text);
	}
	length = (size_t)(end - text);
	if (length >= HOST_MAX)
		return fail(EINVAL, "host name too long");
	if (memchr(text, ' ', length) || memchr(text, '/', length))
		return fail(EINVAL, "'%s' is not an address: write HOST or HOST:PORT", text);
	if (colon) {
		if (parse_number("port", colon + 1, 0, UINT16_MAX, &number))
			return -EINVAL;
		*port = (uint16_t)number;
	}
	memcpy(host, text, length);
	host[length] = '\0';
	return 0;
}

void format_address(const struct sockaddr_storage *address, char text[HOST_MAX])
{
	char host[INET6_ADDRSTRLEN] = "?";

	if (address->ss_family == AF_INET6) {
		const struct sockaddr_in6 *in6 = (const void *)address;

		inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host));
		snprintf(text, HOST_MAX, "[%s]:%u", host, ntohs(in6->sin6_port));
	} else {
		const struct sockaddr_in *in = (const void *)address;

		inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
		snprintf(text, HOST_MAX, "%s:%u", host, ntohs(in->sin_port));
	}
}

static int check_secret(const char *path, int fd)
{
	struct stat st;

	if (fstat(fd, &st))
		return fail(errno, "secret %s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(EINVAL, "secret %s is not a regular file", path);
	if (st.st_mode & (S_IRWXG | S_IRWXO))
		return fail(EPERM, "secret %s can be read by others: chmod 600 it", path);
	return 0;
}

int read_secret(const char *path, char secret[SECRET_MAX], size_t *length)
{
	size_t have = 0;
	ssize_t n;
	int fd, ret;

	/* O_NONBLOCK: a FIFO must be refused below, not waited for. */
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return fail(errno, "secret %s: %s", path, strerror(errno));
	ret = check_secret(path, fd);
	while (!ret && have < SECRET_MAX) {
		n = read(fd, secret + have, SECRET_MAX - have);
		if (n < 0 && errno != EINTR)
			ret = fail(errno, "secret %s: %s", path, strerror(errno));
		if (n == 0)
			break;
		if (n > 0)
			have += (size_t)n;
	}
	close(fd);
	if (ret)
		return ret;
	if (have == SECRET_MAX)
		return fail(EINVAL, "secret %s is longer than %d bytes", path, SECRET_MAX - 1);
	if (have && secret[have - 1] == '\n')
		have--;
	if (have < SECRET_MIN)
		return fail(EINVAL, "secret %s is shorter than %d bytes: make one with "
			    "'head -c 32 /dev/urandom | base64'", path, SECRET_MIN);
	*length = have;
	return 0;
}

size_t character(const char *text)
{
	const unsigned char *s = (const unsigned char *)text;
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	size_t length = *s < 0x80 ? 1 : *s >= 0xf0 ? 4 : *s >= 0xe0 ? 3 : 2, i;
	uint32_t c = *s;

	if (length == 1)
		return c >= 0x20 || c == '\t' || c == '\n' || c == '\r';
	if (c < 0xc2 || c > 0xf4)
		return 0;
	c &= 0x7f >> length;
	/* The terminating zero continues nothing: this does not read beyond it. */
	for (i = 1; i < length; i++) {
		if ((s[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (s[i] & 0x3f);
	}
	if (c < least[length] || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff) || c == 0xfffe || c == 0xffff)
		return 0;
	return length;
}

void format_bytes(uint64_t bytes, char text[32])
{
	static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	double value = (double)bytes;
	unsigned int unit = 0;

	while (value >= 1024 && unit < 6) {
		value /= 1024;
		unit++;
	}
	snprintf(text, 32, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
}

void format_rate(double bytes_per_second, char text[64])
{
	static const char *const units[] = { "", "k", "M", "G", "T" };
	double bits = bytes_per_second * 8;
	unsigned int unit = 0;

	while (bits >= 1000 && unit < 4) {
		bits /= 1000;
		unit++;
	}
	snprintf(text, 64, "%.4g MB/s (%.4g %sbit/s)", bytes_per_second / 1e6, bits, units[unit]);
}
