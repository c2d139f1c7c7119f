// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The receiving end of the data channels. Every field of a frame is checked before a byte of
 * it is stored; payload goes from the socket straight into guest memory. By RDMA it is there before
 * the frame comes: the source can write only where it was lent a window, and only until its
 * connection is closed.
 *
 * Threads block in recv() or for a completion and are woken by shutdown() or kmig_rdma_stop(). That a peer lives is watched on the
 * control connection, as a data channel may rightly be silent between rounds. A connection that
 * breaks is no failure here: the engine tells the source, which says what becomes of the channel.
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
		/* What is wrong with this host is no matter of one connection. */
		channel->lost = n <= 0 && (!n || (errno != EFAULT && errno != ENOMEM));
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
	else if (frame->round != round || atomic_load(&channel->ended) == round || round < atomic_load(&channel->from))
		*why = "it is of another round";
	else if (frame->type != LMTRACK_FRAME_ROUND_END && frame->region >= receiver->chunks->count)
		*why = "its region was not announced";
	return *why ? -EPROTO : 0;
}

/*
 * A newer copy of a page must not overtake an older one. What earlier rounds brought is stored, so it
 * is enough that within a round a chunk stays on its channel.
 */
static int check_owner(struct kmig_receiver_channel *channel, uint64_t number, uint32_t round, const char **why)
{
	_Atomic uint64_t *owner = &channel->receiver->owner[number];
	uint64_t us = (uint64_t)round << 32 | channel->number, before = atomic_load(owner);

	if (before == us)
		return 0;
	if (before >> 32 != round && atomic_compare_exchange_strong(owner, &before, us))
		return 0;
	*why = "its chunk came on another channel in this round";
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

static void clear_extents(const struct kmig_region *region, const struct kmig_frame *frame,
			  const struct lmtrack_wire_extent *table)
{
	for (uint32_t i = 0; i < frame->extents; i++)
		memset((uint8_t *)region->map + le64toh(table[i].first) * region->page_size, 0,
		       (size_t)le32toh(table[i].pages) * region->page_size);
}

/* What was never stored is a hole already, as the region began empty. */
static int punch_extents(struct kmig_region *region, uint64_t *stored, const struct kmig_frame *frame,
			 const struct lmtrack_wire_extent *table)
{
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
	return err;
}

static int store_zero(struct kmig_receiver_channel *channel, const struct kmig_frame *frame,
		      const struct lmtrack_wire_extent *table)
{
	struct kmig_receiver *receiver = channel->receiver;
	struct kmig_region *region = receiver->chunks->regions[frame->region];
	int err = 0;

	if (receiver->rdma && kmig_rdma_hole_begin(receiver->rdma, frame->region, le64toh(table[0].first)))
		clear_extents(region, frame, table);
	else
		err = punch_extents(region, receiver->stored[frame->region], frame, table);
	if (receiver->rdma)
		kmig_rdma_hole_end(receiver->rdma);
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
	struct lmtrack_wire_frame frame;
	struct lmtrack_wire_extent table[LMTRACK_WIRE_EXTENTS_MAX];
	struct iovec vec[LMTRACK_WIRE_EXTENTS_MAX];
};

static int refuse(struct kmig_receiver_channel *channel, int err, const char *why)
{
	return channel_fail(channel, err, "frame %llu refused: %s", (unsigned long long)channel->seq, why);
}

/*
 * Everything about a frame but its payload. On return it may be stored; a ROUND_END is done with.
 * @raw is changed.
 */
static int take_frame(struct kmig_receiver_channel *channel, const struct kmig_frame *frame,
		      struct lmtrack_wire_frame *raw, const struct lmtrack_wire_extent *table)
{
	struct kmig_receiver *receiver = channel->receiver;
	uint64_t chunk, number;
	const char *why;
	uint32_t pages;
	int err;

	err = kmig_frame_check_crc(raw, table, &why);
	if (!err)
		err = check_place(channel, frame, &why);
	if (err)
		return refuse(channel, err, why);
	channel->seq++;
	if (frame->type == LMTRACK_FRAME_ROUND_END) {
		err = end_round(channel, frame, &why);
		return err ? refuse(channel, err, why) : 0;
	}

	err = kmig_frame_check_extents(frame, table, kmig_region_pages(receiver->chunks->regions[frame->region]),
				       receiver->page_size, &chunk, &pages, &why);
	if (!err) {
		number = receiver->chunks->first[frame->region] + chunk;
		err = check_owner(channel, number, frame->round, &why);
	}
	if (err)
		return refuse(channel, err, why);

	/* Before the first byte: who digests this chunk at the same time looks here afterwards. */
	atomic_store(&receiver->last_round[number], frame->round);
	channel->round_pages += pages;
	atomic_fetch_add_explicit(frame->type == LMTRACK_FRAME_DATA ? &channel->data_pages : &channel->zero_pages,
				  pages, memory_order_relaxed);
	return 0;
}

static int receive_frame(struct kmig_receiver_channel *channel, struct buffers *buffers)
{
	struct kmig_frame frame;
	const char *why;
	int err;

	err = receive_bytes(channel, &buffers->frame, sizeof(buffers->frame));
	if (err)
		return err;
	err = kmig_frame_decode(&buffers->frame, channel->receiver->page_size, &frame, &why);
	if (err)
		return refuse(channel, err, why);
	err = receive_bytes(channel, buffers->table, frame.extents * sizeof(buffers->table[0]));
	if (!err)
		err = take_frame(channel, &frame, &buffers->frame, buffers->table);
	if (err || frame.type == LMTRACK_FRAME_ROUND_END)
		return err;
	if (frame.type == LMTRACK_FRAME_DATA)
		return store_data(channel, &frame, buffers->table, buffers->vec);
	return store_zero(channel, &frame, buffers->table);
}

static void receive_frames(struct kmig_receiver_channel *channel)
{
	struct buffers *buffers = malloc(sizeof(*buffers));

	/* As good as a connection that broke: others may go on, and this one come back. */
	channel->lost = !buffers;
	if (!buffers)
		channel_fail(channel, -ENOMEM, "out of memory");
	else
		while (!receive_frame(channel, buffers))
			;
	free(buffers);
}

/* ---- By RDMA ---- */

/*
 * The pages are in their place. They came before their frame, which a digest that was taken between
 * the two did not know of: it is void from here on, as is any other of the chunk.
 */
static int note_data(struct kmig_receiver_channel *channel, const struct kmig_frame *frame,
		     const struct lmtrack_wire_extent *table)
{
	struct kmig_receiver *receiver = channel->receiver;

	if (!kmig_rdma_lent(receiver->rdma, frame->region, le64toh(table[0].first)))
		return refuse(channel, -EPROTO, "its pages lie in no window");
	for (uint32_t i = 0; i < frame->extents; i++)
		for (uint32_t j = 0; j < le32toh(table[i].pages); j++)
			kmig_bit_set(receiver->stored[frame->region], le64toh(table[i].first) + j);
	atomic_fetch_add(&channel->bytes, frame->payload);
	atomic_fetch_add(&channel->written, frame->payload);
	return 0;
}

static int take_message(struct kmig_receiver_channel *channel, void *bytes, size_t length)
{
	struct lmtrack_wire_frame *raw = bytes;
	struct lmtrack_wire_extent *table = (void *)(raw + 1);
	struct kmig_frame frame;
	const char *why;
	int err;

	if (length < sizeof(*raw))
		return refuse(channel, -EPROTO, "it is too short");
	err = kmig_frame_decode(raw, channel->receiver->page_size, &frame, &why);
	if (!err && length != sizeof(*raw) + frame.extents * sizeof(*table)) {
		err = -EPROTO;
		why = "its table is not as long as it says";
	}
	/* It would not take our word of buffers, and the connection would not last. */
	if (!err && le16toh(raw->version) != LMTRACK_WIRE_VERSION) {
		err = -EPROTONOSUPPORT;
		why = "the source's lmtrack_rdma.ko is of another version: load that of its kmig";
	}
	if (err)
		return refuse(channel, err, why);
	atomic_fetch_add_explicit(&channel->bytes, length, memory_order_relaxed);
	err = take_frame(channel, &frame, raw, table);
	if (err || frame.type == LMTRACK_FRAME_ROUND_END)
		return err;
	return frame.type == LMTRACK_FRAME_DATA ? note_data(channel, &frame, table) : store_zero(channel, &frame, table);
}

static void take_messages(struct kmig_receiver_channel *channel)
{
	size_t length;
	void *bytes;
	int err;

	do {
		err = kmig_rdma_next(channel->rdma, &bytes, &length);
		if (!err && take_message(channel, bytes, length))
			return;
		if (!err)
			err = kmig_rdma_release(channel->rdma, bytes);
	} while (!err);
	channel->lost = true;
	channel_fail(channel, err, "%s", strerror(-err));
}

static void *channel_main(void *data)
{
	struct kmig_receiver_channel *channel = data;

	if (channel->rdma)
		take_messages(channel);
	else
		receive_frames(channel);
	atomic_store(&channel->failed, true);
	eventfd_write(channel->receiver->event_fd, 1);
	return NULL;
}

/* Is the channel one of those that make up the round? */
static bool is_in(const struct kmig_receiver_channel *channel, uint32_t round)
{
	return channel->runs && atomic_load(&channel->from) <= round;
}

static bool anyone_in(const struct kmig_receiver *receiver, uint32_t round)
{
	for (unsigned int i = 0; i < receiver->channels; i++)
		if (is_in(&receiver->channel[i], round))
			return true;
	return false;
}

int kmig_receiver_start(struct kmig_receiver *receiver, struct kmig_ctx *ctx, const struct kmig_chunks *chunks,
			uint64_t stream, const int *sockets, unsigned int channels, struct kmig_rdma *rdma)
{
	uint64_t total = kmig_chunks_total(chunks);
	bool ok;

	*receiver = (struct kmig_receiver){
		.ctx = ctx,
		.chunks = chunks,
		.rdma = rdma,
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
		if (channel->fd < 0)
			channel->rdma = kmig_rdma_conn(rdma, i);
		if (ok)
			ok = channel->runs = !kmig_thread_start(&channel->thread, channel_main, channel);
	}
	if (ok)
		return 0;
	kmig_receiver_stop(receiver);
	return kmig_fail(ctx, -ENOMEM, "data channels: out of memory, threads or descriptors");
}

static void wake_channel(struct kmig_receiver_channel *channel)
{
	if (channel->fd >= 0)
		shutdown(channel->fd, SHUT_RDWR);
	if (channel->rdma)
		kmig_rdma_stop(channel->rdma);
}

/* On return nothing of it is stored any more, by its thread or by a device. */
static void close_channel(struct kmig_receiver_channel *channel)
{
	wake_channel(channel);
	if (channel->runs)
		pthread_join(channel->thread, NULL);
	channel->runs = false;
	if (channel->fd >= 0)
		close(channel->fd);
	channel->fd = -1;
	if (channel->rdma)
		kmig_rdma_disconnect(channel->receiver->rdma, channel->number);
	channel->rdma = NULL;
}

void kmig_receiver_close(struct kmig_receiver *receiver)
{
	if (receiver->closed)
		return;
	receiver->closed = true;
	for (unsigned int i = 0; i < receiver->channels; i++)
		wake_channel(&receiver->channel[i]);
	for (unsigned int i = 0; i < receiver->channels; i++)
		close_channel(&receiver->channel[i]);
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
		if (is_in(&receiver->channel[i], round) && atomic_load(&receiver->channel[i].ended) != round)
			return false;
	return anyone_in(receiver, round) || receiver->begun >= round;
}

void kmig_receiver_next_round(struct kmig_receiver *receiver)
{
	receiver->ended_ns = 0;
	/* Last: it lets the frames of the next in. */
	atomic_fetch_add(&receiver->acked, 1);
}

bool kmig_receiver_advance(struct kmig_receiver *receiver)
{
	uint32_t next = atomic_load(&receiver->acked) + 1;
	bool advanced = false;

	if (receiver->begun >= next || anyone_in(receiver, next))
		return false;
	for (unsigned int i = 0; i < receiver->channels; i++) {
		if (!receiver->channel[i].runs)
			continue;
		atomic_store(&receiver->channel[i].from, next);
		advanced = true;
	}
	return advanced;
}

int kmig_receiver_drop(struct kmig_receiver *receiver, uint32_t number, uint32_t round)
{
	struct kmig_receiver_channel *channel = &receiver->channel[number];

	receiver->begun = round;
	if (!channel->runs)
		return 0;
	close_channel(channel);
	/* The round may be over without it. */
	eventfd_write(receiver->event_fd, 1);
	if (atomic_load(&channel->failed) && !channel->lost)
		return kmig_fail(receiver->ctx, channel->error, "%s", channel->text);
	return 0;
}

int kmig_receiver_join(struct kmig_receiver *receiver, uint32_t number, int fd, uint64_t attempt)
{
	struct kmig_receiver_channel *channel = &receiver->channel[number];
	uint32_t acked = atomic_load(&receiver->acked);

	channel->fd = fd;
	channel->attempt = attempt;
	channel->seq = 0;
	channel->round_pages = 0;
	channel->error = 0;
	channel->lost = channel->told = false;
	atomic_store(&channel->failed, false);
	atomic_store(&channel->ended, acked);
	/* The source may have begun the next round already, and without it. */
	atomic_store(&channel->from, acked + 2);
	channel->runs = !kmig_thread_start(&channel->thread, channel_main, channel);
	if (!channel->runs) {
		close_channel(channel);
		kmig_log(receiver->ctx, KMIG_LOG_WARNING, "data channel %u has come back, and there is no thread for it", number);
		return -EAGAIN;
	}
	return 0;
}

int kmig_receiver_lost(struct kmig_receiver *receiver, uint32_t timeout_ms, int *why)
{
	uint32_t round = atomic_load(&receiver->acked) + 1;
	uint64_t now = kmig_now_ns(), limit = kmig_ms(timeout_ms), latest = 0;

	for (unsigned int i = 0; i < receiver->channels; i++) {
		struct kmig_receiver_channel *channel = &receiver->channel[i];

		if (is_in(channel, round) && atomic_load(&channel->ended) == round && !receiver->ended_ns)
			receiver->ended_ns = now;
	}
	for (unsigned int i = 0; i < receiver->channels; i++) {
		struct kmig_receiver_channel *channel = &receiver->channel[i];
		uint64_t bytes = atomic_load(&channel->bytes);

		if (!channel->runs || channel->told)
			continue;
		if (bytes != channel->seen_bytes || atomic_load(&channel->ended) == round || !is_in(channel, round)) {
			channel->seen_bytes = bytes;
			channel->seen_ns = now;
		}
		if (is_in(channel, round) && atomic_load(&channel->ended) != round && channel->seen_ns > latest)
			latest = channel->seen_ns;
	}
	for (unsigned int i = 0; i < receiver->channels; i++) {
		struct kmig_receiver_channel *channel = &receiver->channel[i];

		if (!channel->runs || channel->told)
			continue;
		*why = atomic_load(&channel->failed) && channel->lost ? channel->error : 0;
		/* There is nothing left to come for, and of what was come for nothing more arrives. */
		if (!*why && receiver->ended_ns && now - receiver->ended_ns > limit && now - latest > limit &&
		    is_in(channel, round) && atomic_load(&channel->ended) != round)
			*why = -ETIMEDOUT;
		if (!*why)
			continue;
		channel->told = true;
		return i;
	}
	return -1;
}

int kmig_receiver_check(struct kmig_receiver *receiver)
{
	if (receiver->closed)
		return 0;
	for (unsigned int i = 0; i < receiver->channels; i++) {
		const struct kmig_receiver_channel *channel = &receiver->channel[i];

		if (channel->runs && atomic_load(&channel->failed) && !channel->lost)
			return kmig_fail(receiver->ctx, channel->error, "%s", channel->text);
	}
	return 0;
}
