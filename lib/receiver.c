// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The receiving end of the data channels. Every field of a frame is checked before a byte of
 * it is stored; payload goes from the socket straight into guest memory.
 *
 * Threads block in recv() and are woken by shutdown(). That a peer lives is watched on the
 * control connection, as a data channel may rightly be silent between rounds.
 */
#include "net.h"
#include "receiver.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

static int channel_fail(struct kmig_receiver_channel *channel, int err, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

static int channel_fail(struct kmig_receiver_channel *channel, int err, const char *fmt, ...)
{
	va_list args;
	int n;

	n = snprintf(channel->text, sizeof(channel->text), "data channel %u: ", channel->number);
	va_start(args, fmt);
	vsnprintf(channel->text + n, sizeof(channel->text) - n, fmt, args);
	va_end(args);
	channel->error = err;
	return err;
}

/* Receive exactly what the vector holds; the vector is used up. */
static int receive(struct kmig_receiver_channel *channel, struct iovec *vec, unsigned int count)
{
	while (count) {
		struct msghdr msg = { .msg_iov = vec, .msg_iovlen = count };
		ssize_t n = recvmsg(channel->fd, &msg, MSG_WAITALL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return channel_fail(channel, -errno, "%s", errno == EFAULT ? "guest memory cannot be written: is the host out of memory?" :
					    strerror(errno));
		if (!n)
			return channel_fail(channel, -ECONNRESET, "the source closed it");
		atomic_fetch_add_explicit(&channel->bytes, n, memory_order_relaxed);
		kmig_iov_advance(&vec, &count, n);
	}
	return 0;
}

static int receive_bytes(struct kmig_receiver_channel *channel, void *to, size_t length)
{
	struct iovec vec = { .iov_base = to, .iov_len = length };

	return length ? receive(channel, &vec, 1) : 0;
}

/* Does the frame belong here and now? */
static int check_place(struct kmig_receiver_channel *channel, const struct kmig_frame *frame, const char **why)
{
	struct kmig_receiver *receiver = channel->receiver;
	uint32_t round = atomic_load(&receiver->acked) + 1;

	*why = NULL;
	if (frame->type == LMTRACK_FRAME_CHANNEL)
		*why = "the channel has begun already";
	else if (frame->stream != receiver->stream)
		*why = "it is of another stream";
	else if (frame->channel != channel->number)
		*why = "it is of another channel";
	else if (frame->seq != channel->seq)
		*why = "a frame is missing, or came twice";
	else if (frame->round != round || atomic_load(&channel->ended) == round)
		*why = "it is of another round";
	else if (frame->type != LMTRACK_FRAME_ROUND_END && frame->region >= receiver->chunks->count)
		*why = "its region was not announced";
	return *why ? -EPROTO : 0;
}

/* A newer copy of a page must not overtake an older one: a chunk stays on its channel. */
static int check_owner(struct kmig_receiver_channel *channel, uint64_t number, const char **why)
{
	uint8_t owner = 0, us = channel->number + 1;

	if (atomic_compare_exchange_strong(&channel->receiver->owner[number], &owner, us) || owner == us)
		return 0;
	*why = "its chunk came on another channel before";
	return -EPROTO;
}

static int store_data(struct kmig_receiver_channel *channel, const struct kmig_frame *frame,
		      const struct lmtrack_wire_extent *table, struct iovec *vec)
{
	struct kmig_receiver *receiver = channel->receiver;
	struct kmig_region *region = receiver->chunks->regions[frame->region];
	uint64_t *stored = receiver->stored[frame->region];

	for (uint32_t i = 0; i < frame->extents; i++) {
		uint64_t first = le64toh(table[i].first);
		uint32_t pages = le32toh(table[i].pages);

		vec[i].iov_base = (uint8_t *)region->map + first * region->page_size;
		vec[i].iov_len = (size_t)pages * region->page_size;
		for (uint64_t page = first; page < first + pages; page++)
			kmig_bit_set(stored, page);
	}
	return receive(channel, vec, frame->extents);
}

/* What was never stored is a hole already, as the region began empty. */
static int store_zero(struct kmig_receiver_channel *channel, const struct kmig_frame *frame,
		      const struct lmtrack_wire_extent *table)
{
	struct kmig_receiver *receiver = channel->receiver;
	struct kmig_region *region = receiver->chunks->regions[frame->region];
	uint64_t *stored = receiver->stored[frame->region];
	uint64_t begin = 0, end = 0;
	int err = 0;

	for (uint32_t i = 0; i < frame->extents && !err; i++) {
		uint64_t page = le64toh(table[i].first);
		uint64_t last = page + le32toh(table[i].pages);

		for (; page < last && !err; page++) {
			if (!kmig_bit(stored, page))
				continue;
			kmig_bit_clear(stored, page);
			if (page != end) {
				if (end > begin)
					err = kmig_region_punch(region, begin * region->page_size,
								(end - begin) * region->page_size);
				begin = page;
			}
			end = page + 1;
		}
	}
	if (end > begin && !err)
		err = kmig_region_punch(region, begin * region->page_size, (end - begin) * region->page_size);
	if (err)
		return channel_fail(channel, err, "a hole could not be punched: %s", strerror(-err));
	return 0;
}

static int end_round(struct kmig_receiver_channel *channel, const struct kmig_frame *frame, const char **why)
{
	if (frame->arg != channel->round_pages) {
		*why = "the round's pages are not as many as were sent";
		return -EPROTO;
	}
	channel->round_pages = 0;
	atomic_store(&channel->ended, frame->round);
	eventfd_write(channel->receiver->event_fd, 1);
	return 0;
}

struct buffers {
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	struct iovec vec[LMTRACK_WIRE_EXTENTS_MAX];
};

static int receive_frame(struct kmig_receiver_channel *channel, struct buffers *buffers)
{
	struct kmig_receiver *receiver = channel->receiver;
	struct lmtrack_wire_frame raw;
	struct kmig_frame frame;
	struct kmig_region *region;
	uint64_t chunk, number;
	const char *why;
	uint32_t pages;
	int err;

	err = receive_bytes(channel, &raw, sizeof(raw));
	if (err)
		return err;
	err = kmig_frame_decode(&raw, receiver->page_size, &frame, &why);
	if (err)
		goto refuse;
	err = receive_bytes(channel, buffers->table, frame.extents * sizeof(buffers->table[0]));
	if (err)
		return err;
	err = kmig_frame_check_crc(&raw, buffers->table, &why);
	if (!err)
		err = check_place(channel, &frame, &why);
	if (err)
		goto refuse;
	channel->seq++;
	if (frame.type == LMTRACK_FRAME_ROUND_END) {
		err = end_round(channel, &frame, &why);
		if (err)
			goto refuse;
		return 0;
	}

	region = receiver->chunks->regions[frame.region];
	err = kmig_frame_check_extents(&frame, buffers->table, kmig_region_pages(region), receiver->page_size,
				       &chunk, &pages, &why);
	if (err)
		goto refuse;
	number = receiver->chunks->first[frame.region] + chunk;
	err = check_owner(channel, number, &why);
	if (err)
		goto refuse;

	/* Before the first byte: who digests this chunk at the same time looks here afterwards. */
	atomic_store(&receiver->last_round[number], frame.round);
	channel->round_pages += pages;
	if (frame.type == LMTRACK_FRAME_DATA) {
		atomic_fetch_add_explicit(&channel->data_pages, pages, memory_order_relaxed);
		return store_data(channel, &frame, buffers->table, buffers->vec);
	}
	atomic_fetch_add_explicit(&channel->zero_pages, pages, memory_order_relaxed);
	return store_zero(channel, &frame, buffers->table);

refuse:
	return channel_fail(channel, err, "frame %llu refused: %s", (unsigned long long)channel->seq, why);
}

static void *channel_main(void *data)
{
	struct kmig_receiver_channel *channel = data;
	struct buffers *buffers = malloc(sizeof(*buffers));

	if (!buffers)
		channel_fail(channel, -ENOMEM, "out of memory");
	else
		while (!receive_frame(channel, buffers))
			;
	free(buffers);
	atomic_store(&channel->failed, true);
	eventfd_write(channel->receiver->event_fd, 1);
	return NULL;
}

int kmig_receiver_start(struct kmig_receiver *receiver, struct kmig_ctx *ctx, const struct kmig_chunks *chunks,
			uint64_t stream, const int *sockets, unsigned int channels)
{
	uint64_t total = kmig_chunks_total(chunks);
	bool ok;

	*receiver = (struct kmig_receiver){
		.ctx = ctx,
		.chunks = chunks,
		.page_size = sysconf(_SC_PAGESIZE),
		.stream = stream,
		.channels = channels,
		.last_round = calloc(total, sizeof(*receiver->last_round)),
		.owner = calloc(total, sizeof(*receiver->owner)),
		.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
	};
	ok = receiver->last_round && receiver->owner && receiver->event_fd >= 0;
	for (unsigned int i = 0; i < chunks->count; i++) {
		/* Whole chunks, so that no two share a word. */
		receiver->stored[i] = calloc(kmig_region_chunks(chunks->regions[i]), LMTRACK_CHUNK_PAGES / 8);
		ok = ok && receiver->stored[i];
	}
	for (unsigned int i = 0; i < channels; i++) {
		struct kmig_receiver_channel *channel = &receiver->channel[i];

		channel->receiver = receiver;
		channel->number = i;
		channel->fd = sockets[i];
		if (ok)
			ok = channel->runs = !kmig_thread_start(&channel->thread, channel_main, channel);
	}
	if (ok)
		return 0;
	kmig_receiver_stop(receiver);
	return kmig_fail(ctx, -ENOMEM, "data channels: out of memory");
}

void kmig_receiver_close(struct kmig_receiver *receiver)
{
	if (receiver->closed)
		return;
	receiver->closed = true;
	for (unsigned int i = 0; i < receiver->channels; i++)
		shutdown(receiver->channel[i].fd, SHUT_RDWR);
	for (unsigned int i = 0; i < receiver->channels; i++) {
		if (receiver->channel[i].runs)
			pthread_join(receiver->channel[i].thread, NULL);
		close(receiver->channel[i].fd);
	}
}

void kmig_receiver_stop(struct kmig_receiver *receiver)
{
	if (!receiver->channels)
		return;
	kmig_receiver_close(receiver);
	for (unsigned int i = 0; i < receiver->chunks->count; i++)
		free(receiver->stored[i]);
	free(receiver->last_round);
	free(receiver->owner);
	close(receiver->event_fd);
	receiver->channels = 0;
}

bool kmig_receiver_round_done(struct kmig_receiver *receiver)
{
	uint32_t round = atomic_load(&receiver->acked) + 1;
	eventfd_t count;

	eventfd_read(receiver->event_fd, &count);
	for (unsigned int i = 0; i < receiver->channels; i++)
		if (atomic_load(&receiver->channel[i].ended) != round)
			return false;
	return true;
}

int kmig_receiver_check(struct kmig_receiver *receiver)
{
	const struct kmig_receiver_channel *worst = NULL;

	if (receiver->closed)
		return 0;
	for (unsigned int i = 0; i < receiver->channels; i++) {
		const struct kmig_receiver_channel *channel = &receiver->channel[i];

		if (!atomic_load(&channel->failed))
			continue;
		/* What was refused says more than what was closed in consequence. */
		if (!worst || (worst->error == -ECONNRESET && channel->error != -ECONNRESET))
			worst = channel;
	}
	return worst ? kmig_fail(receiver->ctx, worst->error, "%s", worst->text) : 0;
}
