// SPDX-License-Identifier: GPL-2.0
/*
 * bench_rate [SECONDS]: how well a cap on the rate of a stream holds. A table, no verdict: for
 * each rate and number of channels, what was sent in the slowest and in the fastest second of
 * a round, by what the channels count, over all windows of a second that begin with one of the
 * looks. "1 of 3" are three channels of which one has all the pages. Under an emulator timers are
 * late and harvests slow; "wire" is what the round itself says of the wire's rate.
 */
#include <err.h>

#include "uapi_sink.h"

#define CHANNELS_MAX	3
#define LOOK_US		2000
#define LOOKS_MAX	20000

static double seconds = 5;

static void *swallow(void *arg)
{
	static char buffer[1 << 20];

	while (recv(*(int *)arg, buffer, sizeof(buffer), 0) > 0)
		;
	return NULL;
}

/* Chunks with pages: enough for the time and a little more. */
static void measure(uint64_t rate, unsigned int channels, unsigned int working)
{
	static double at[LOOKS_MAX], sent[LOOKS_MAX];
	size_t chunks = rate * (seconds + 0.5) / CHUNK + 1, stride = channels / working, i;
	int region = lmt_region(chunks * stride * CHUNK), stream = stream_open(1, LMTRACK_STREAM_NO_ZERO_DETECT);
	double least = 1e18, most = 0, begin;
	struct lmtrack_stream_wait result;
	int pair[CHANNELS_MAX][2];
	pthread_t thread[CHANNELS_MAX];
	unsigned int n = 0, from, to;
	unsigned char *mem;

	if (region < 0 || stream < 0 || lmt_start(region, 0, NULL))
		errx(1, "no region or no stream: is the module loaded?");
	mem = lmt_map(region, chunks * stride * CHUNK);
	for (i = 0; i < chunks; i++)
		touch(mem, i * stride * LMTRACK_CHUNK_PAGES, LMTRACK_CHUNK_PAGES, 1);
	if (stream_add_region(stream, region, 0))
		errx(1, "LMTRACK_STREAM_ADD_REGION");
	for (i = 0; i < channels; i++) {
		if (tcp_pair(pair[i]) || stream_add_channel(stream, pair[i][0], i % sysconf(_SC_NPROCESSORS_ONLN)))
			errx(1, "LMTRACK_STREAM_ADD_CHANNEL");
		pthread_create(&thread[i], NULL, swallow, &pair[i][1]);
	}
	if (stream_rate(stream, rate) || stream_send(stream, 1, LMTRACK_SEND_ALL))
		errx(1, "LMTRACK_STREAM_RATE_SET or LMTRACK_STREAM_SEND");
	begin = lmt_seconds();
	while (n < LOOKS_MAX && stream_wait(stream, 0, &result) == -ETIMEDOUT) {
		double before = lmt_seconds();

		sent[n] = stream_sent(stream, channels);
		at[n++] = (before + lmt_seconds()) / 2;
		usleep(LOOK_US);
	}
	stream_wait(stream, -1, &result);
	begin = lmt_seconds() - begin;
	for (from = to = 0; to < n; from++) {
		while (to < n && at[to] - at[from] < 1)
			to++;
		if (to < n && (sent[to] - sent[from]) / (at[to] - at[from]) > most)
			most = (sent[to] - sent[from]) / (at[to] - at[from]);
		if (to < n && (sent[to] - sent[from]) / (at[to] - at[from]) < least)
			least = (sent[to] - sent[from]) / (at[to] - at[from]);
	}
	printf("%8.0f %5u of %u %12.2f %% %9.2f %% %9.2f %% %9.2f %%\n", rate / 1e6, working, channels,
	       100 * least / rate - 100, 100 * most / rate - 100, 100 * result.bytes / begin / rate - 100,
	       100 * (result.bytes * 1e9 / result.wire_ns) / rate - 100);
	fflush(stdout);
	close(stream);
	for (i = 0; i < channels; i++) {
		close(pair[i][0]);
		pthread_join(thread[i], NULL);
		close(pair[i][1]);
	}
	munmap(mem, chunks * stride * CHUNK);
	close(region);
}

int main(int argc, char **argv)
{
	static const uint64_t rates[] = { 1000000, 2000000, 20000000, 100000000 };
	unsigned int i;

	if (argc > 1)
		seconds = atof(argv[1]);
	printf("%8s %10s %14s %11s %11s %11s\n", "MB/s", "channels", "slowest s", "fastest s", "whole", "wire");
	for (i = 0; i < sizeof(rates) / sizeof(rates[0]); i++) {
		measure(rates[i], 1, 1);
		measure(rates[i], 3, 3);
		measure(rates[i], 3, 1);
	}
	return 0;
}
