// SPDX-License-Identifier: GPL-2.0
/*
 * Frames at the receiver of the data channels. Beside memory errors it looks for pages that were
 * stored though no whole frame named them.
 */
#include "fuzz.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include "../../lib/receiver.h"

#define CHANNELS 2
#define STREAM 0x1122334455667788ull
#define REGIONS 2

static const uint64_t sizes[REGIONS] = { 5 * 512 * FUZZ_PAGE + 3 * FUZZ_PAGE, FUZZ_PAGE };

static struct kmig_ctx *ctx;
static struct kmig_region *regions[REGIONS];
static struct kmig_chunks chunks;
static uint8_t *may_be_stored[REGIONS];	/* of each page: a frame named it */

static void set_up(void)
{
	if (kmig_ctx_new(&ctx))
		abort();
	for (unsigned int i = 0; i < REGIONS; i++) {
		struct kmig_region_opts opts = KMIG_REGION_OPTS_INIT;

		opts.kind = KMIG_REGION_MEMFD;
		opts.bytes = sizes[i];
		if (kmig_region_create(ctx, &opts, &regions[i]) || !kmig_region_map(regions[i]))
			abort();
		may_be_stored[i] = malloc(sizes[i] / FUZZ_PAGE);
	}
	kmig_chunks_init(&chunks, regions, REGIONS);
}

struct sender {
	int fd[CHANNELS];
	uint64_t seq[CHANNELS], pages[CHANNELS];
	uint32_t round;
};

static void put(int fd, const void *data, size_t length)
{
	/* A receiver that has refused does not read on. */
	if (send(fd, data, length, MSG_NOSIGNAL) < 0 && errno != EPIPE)
		abort();
}

static void note_pages(const struct fuzz_frame *made)
{
	if (made->frame.type != LMTRACK_FRAME_DATA || made->frame.region >= REGIONS)
		return;
	for (uint32_t i = 0; i < made->frame.extents; i++) {
		uint64_t first = le64toh(made->table[i].first), count = le32toh(made->table[i].pages);
		uint64_t all = sizes[made->frame.region] / FUZZ_PAGE;

		for (uint64_t page = first; page < all && page - first < count; page++)
			may_be_stored[made->frame.region][page] = 1;
	}
}

static void send_frame(struct script *script, struct sender *sender, unsigned int channel)
{
	struct kmig_frame right = {
		.stream = STREAM, .channel = channel, .round = sender->round, .seq = sender->seq[channel]++,
	};
	static uint8_t payload[FUZZ_PAYLOAD_MAX];
	static struct fuzz_frame made;

	fuzz_frame_make(script, &right, sender->pages[channel], &made);
	for (uint32_t i = 0; i < made.frame.extents; i++)
		sender->pages[channel] += le32toh(made.table[i].pages);
	if (made.frame.type == LMTRACK_FRAME_ROUND_END)
		sender->pages[channel] = 0;
	/* A byte that was changed may have been changed to what it was. */
	note_pages(&made);
	memset(payload, 0xa5, made.payload);
	put(sender->fd[channel], &made.raw, sizeof(made.raw));
	put(sender->fd[channel], made.table, made.frame.extents * sizeof(made.table[0]));
	put(sender->fd[channel], payload, made.payload);
}

/* As the destination does when it hears of it; a round that does not end is not waited for. */
static void end_round(struct kmig_receiver *receiver, struct sender *sender)
{
	struct pollfd event = { .fd = receiver->event_fd, .events = POLLIN };

	for (int tries = 0; tries < CHANNELS; tries++) {
		if (kmig_receiver_round_done(receiver)) {
			atomic_store(&receiver->acked, sender->round++);
			return;
		}
		poll(&event, 1, 2);
	}
}

static void check_stored(void)
{
	for (unsigned int i = 0; i < REGIONS; i++) {
		off_t at = 0;

		if (lseek(regions[i]->fd, 0, SEEK_END) != (off_t)sizes[i])
			abort();
		while ((at = lseek(regions[i]->fd, at, SEEK_DATA)) >= 0) {
			if (!may_be_stored[i][at / FUZZ_PAGE])
				abort();
			at += FUZZ_PAGE;
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct script script = { data, data + size };
	struct sender sender = { .round = 1 };
	struct kmig_receiver receiver;
	int theirs[CHANNELS], why;

	if (!ctx)
		set_up();
	for (unsigned int i = 0; i < REGIONS; i++)
		memset(may_be_stored[i], 0, sizes[i] / FUZZ_PAGE);
	for (unsigned int i = 0; i < CHANNELS; i++) {
		int pair[2], room = 4 << 20;

		if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
			abort();
		setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
		sender.fd[i] = pair[0];
		theirs[i] = pair[1];
	}
	if (kmig_receiver_start(&receiver, ctx, &chunks, STREAM, theirs, CHANNELS, NULL))
		abort();
	while (!script_ended(&script)) {
		uint8_t what = script_number(&script, 1);
		unsigned int channel = what & 1;
		const uint8_t *bytes;
		size_t length;

		switch (what >> 1 & 7) {
		case 0:
			bytes = script_bytes(&script, script_number(&script, 1), &length);
			/* Whatever they mean. */
			memset(may_be_stored[0], 1, sizes[0] / FUZZ_PAGE);
			memset(may_be_stored[1], 1, sizes[1] / FUZZ_PAGE);
			put(sender.fd[channel], bytes, length);
			break;
		case 1:
			end_round(&receiver, &sender);
			break;
		default:
			send_frame(&script, &sender, channel);
		}
	}
	/* What was sent is taken in before the end is seen. */
	for (unsigned int i = 0; i < CHANNELS; i++)
		shutdown(sender.fd[i], SHUT_WR);
	for (unsigned int i = 0; i < CHANNELS; i++)
		while (!atomic_load(&receiver.channel[i].failed))
			poll(&(struct pollfd){ .fd = receiver.event_fd, .events = POLLIN }, 1, 1);
	/* What was in order until then has only lost its connections. */
	if (!kmig_receiver_check(&receiver) && kmig_receiver_lost(&receiver, 1000, &why) < 0)
		abort();
	kmig_receiver_stop(&receiver);
	for (unsigned int i = 0; i < CHANNELS; i++)
		close(sender.fd[i]);
	check_stored();
	for (unsigned int i = 0; i < REGIONS; i++)
		if (kmig_region_punch(regions[i], 0, sizes[i]))
			abort();
	return 0;
}
