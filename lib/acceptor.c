// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The destination's door. Whoever connects gets a slot: a few bytes of memory, a few seconds
 * of time. Nothing blocks on any of them, so a silent stranger does not keep the source out;
 * when all slots are taken, the one who has waited longest leaves. Whoever fails to prove the
 * secret is turned away without a word, and cannot try again on that connection.
 */
#include "acceptor.h"
#include "net.h"
#include "wire.h"

#include <netinet/tcp.h>

#define PATIENCE_MS 5000
#define LOOK_AROUND_MS 250
#define SHUT_MS 100

void kmig_acceptor_init(struct kmig_acceptor *acceptor, struct kmig_ctx *ctx, const int *listen_fds,
			unsigned int listens, int abort_fd, uint32_t timeout_ms, uint32_t page_size, const void *secret, size_t secret_len)
{
	acceptor->ctx = ctx;
	acceptor->listen_fds = listen_fds;
	acceptor->listens = listens;
	acceptor->abort_fd = abort_fd;
	acceptor->patience_ms = timeout_ms < PATIENCE_MS ? timeout_ms : PATIENCE_MS;
	acceptor->page_size = page_size;
	acceptor->secret = secret;
	acceptor->secret_len = secret_len;
	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++)
		acceptor->guests[i].fd = -1;
}

static void turn_away(struct kmig_acceptor *acceptor, struct kmig_guest *guest, const char *why)
{
	kmig_log(acceptor->ctx, KMIG_LOG_WARNING, "a connection was turned away: %s", why);
	close(guest->fd);
	guest->fd = -1;
}

void kmig_acceptor_close(struct kmig_acceptor *acceptor)
{
	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++)
		if (acceptor->guests[i].fd >= 0)
			turn_away(acceptor, &acceptor->guests[i], "it is not needed any more");
}

static struct kmig_guest *free_slot(struct kmig_acceptor *acceptor)
{
	struct kmig_guest *oldest = &acceptor->guests[0];

	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++) {
		struct kmig_guest *guest = &acceptor->guests[i];

		if (guest->fd < 0)
			return guest;
		if (guest->since_ns < oldest->since_ns)
			oldest = guest;
	}
	turn_away(acceptor, oldest, "others wait, and it has said nothing for longest");
	return oldest;
}

/*
 * Who knocks goes on to do so, and poll() to say so at once: the door is not looked at for a while. The
 * reason is told once, though it may last.
 */
static void stay_shut(struct kmig_acceptor *acceptor, int error)
{
	acceptor->shut_until_ns = kmig_now_ns() + kmig_ms(SHUT_MS);
	if (!acceptor->told_shut)
		kmig_log(acceptor->ctx, KMIG_LOG_WARNING, "no connection can be taken in for now: %s", strerror(error));
	acceptor->told_shut = true;
}

static bool is_shut(const struct kmig_acceptor *acceptor)
{
	return kmig_now_ns() < acceptor->shut_until_ns;
}

static void let_in_from(struct kmig_acceptor *acceptor, int listen_fd)
{
	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS && !is_shut(acceptor); i++) {
		int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		struct kmig_guest *guest;

		if (fd < 0) {
			if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
				stay_shut(acceptor, errno);
			return;
		}
		acceptor->told_shut = false;
		guest = free_slot(acceptor);
		*guest = (struct kmig_guest){ .fd = fd, .since_ns = kmig_now_ns() };
	}
}

static void let_in(struct kmig_acceptor *acceptor)
{
	for (unsigned int i = 0; i < acceptor->listens; i++)
		let_in_from(acceptor, acceptor->listen_fds[i]);
}

static void show_the_slow_out(struct kmig_acceptor *acceptor)
{
	uint64_t now = kmig_now_ns();

	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++) {
		struct kmig_guest *guest = &acceptor->guests[i];

		if (guest->fd >= 0 && now - guest->since_ns > kmig_ms(acceptor->patience_ms))
			turn_away(acceptor, guest, "it took too long to prove the secret");
	}
}

/* Read until @want bytes are there: 1 when they are, 0 not yet, -1 gone. */
static int read_some(struct kmig_guest *guest, size_t want)
{
	while (guest->have < want) {
		ssize_t n = recv(guest->fd, guest->bytes + guest->have, want - guest->have, MSG_DONTWAIT);

		if (n > 0)
			guest->have += n;
		else if (n < 0 && errno == EINTR)
			continue;
		else
			return n < 0 && errno == EAGAIN ? 0 : -1;
	}
	return 1;
}

/* Our version is no secret, and tells the other what to do about it. */
static void tell_version(struct kmig_guest *guest)
{
	struct {
		struct lmtrack_wire_message header;
		struct lmtrack_wire_abort abort;
	} answer = { .abort.error = htole32(EPROTONOSUPPORT) };

	kmig_message_encode(LMTRACK_MSG_ABORT, &answer.abort, sizeof(answer.abort), &answer.header);
	kmig_net_send_first(guest->fd, &answer, sizeof(answer));
}

/* A message of @type and @length, read into @guest->bytes: 1, 0 not yet, -1 turned away. */
static int read_message(struct kmig_acceptor *acceptor, struct kmig_guest *guest, uint16_t type, size_t length)
{
	struct lmtrack_wire_message header;
	const char *why = "it hung up";
	int n = read_some(guest, sizeof(header));
	char text[96];

	if (n > 0) {
		memcpy(&header, guest->bytes, sizeof(header));
		n = kmig_message_check(&header, &why);
		if (n == -EPROTONOSUPPORT && type == LMTRACK_MSG_HELLO) {
			tell_version(guest);
			snprintf(text, sizeof(text), "it speaks version %u of the protocol, we speak %u: install the same version of kmig on both",
				 le16toh(header.version), LMTRACK_WIRE_VERSION);
			why = text;
		} else if (!n && le16toh(header.type) != type) {
			why = "it does not begin with a greeting and a proof";
			n = -1;
		}
		if (!n)
			n = read_some(guest, sizeof(header) + length);
		if (n > 0)
			n = kmig_message_check_body(&header, guest->bytes + sizeof(header), &why) ?: 1;
	}
	if (n < 0)
		turn_away(acceptor, guest, why);
	return n < 0 ? -1 : n;
}

static void greet(struct kmig_acceptor *acceptor, struct kmig_guest *guest)
{
	struct kmig_hello *ours = &guest->transcript.destination;

	memcpy(&guest->transcript.source, guest->bytes, sizeof(struct kmig_hello));
	guest->have = 0;
	if (kmig_auth_hello(acceptor->page_size, ours) || kmig_net_send_first(guest->fd, ours, sizeof(*ours))) {
		turn_away(acceptor, guest, "it could not be greeted");
		return;
	}
	guest->greeted = true;
	/* A new step, a new wait; and how long ours took is not the guest's fault. */
	guest->since_ns = kmig_now_ns();
}

static bool prove(struct kmig_acceptor *acceptor, struct kmig_guest *guest, struct kmig_session *session)
{
	struct {
		struct lmtrack_wire_message header;
		struct lmtrack_wire_proof proof;
	} answer;
	struct lmtrack_wire_proof expected;
	const struct lmtrack_wire_hello *theirs = &guest->transcript.source.body;
	const void *given = guest->bytes + sizeof(answer.header);

	if (kmig_auth_proof(acceptor->secret, acceptor->secret_len, "lmtrack source", &guest->transcript, &expected)) {
		turn_away(acceptor, guest, "its proof could not be checked");
		return false;
	}
	if (!kmig_auth_equal(given, &expected, sizeof(expected))) {
		turn_away(acceptor, guest, "it does not know the secret");
		return false;
	}
	if (kmig_auth_proof(acceptor->secret, acceptor->secret_len, "lmtrack destination", &guest->transcript,
			    &answer.proof) ||
	    kmig_auth_session(acceptor->secret, acceptor->secret_len, &guest->transcript, session)) {
		turn_away(acceptor, guest, "the proof could not be computed");
		return false;
	}
	kmig_message_encode(LMTRACK_MSG_PROOF, &answer.proof, sizeof(answer.proof), &answer.header);
	if (kmig_net_send_first(guest->fd, &answer, sizeof(answer))) {
		turn_away(acceptor, guest, "it hung up");
		return false;
	}
	/* It has our greeting and our proof, and says the same to whoever uses it. */
	if (theirs->features || le32toh(theirs->page_size) != acceptor->page_size ||
	    le32toh(theirs->chunk_pages) != LMTRACK_CHUNK_PAGES) {
		turn_away(acceptor, guest, "its features, pages or chunks are not ours");
		return false;
	}
	return true;
}

/* One step with one guest; true when it is the source. */
static bool source_step(struct kmig_acceptor *acceptor, struct kmig_guest *guest, struct kmig_session *session)
{
	if (!guest->greeted) {
		if (read_message(acceptor, guest, LMTRACK_MSG_HELLO, sizeof(struct lmtrack_wire_hello)) <= 0)
			return false;
		greet(acceptor, guest);
		if (guest->fd < 0)
			return false;
	}
	if (read_message(acceptor, guest, LMTRACK_MSG_PROOF, sizeof(struct lmtrack_wire_proof)) <= 0)
		return false;
	return prove(acceptor, guest, session);
}

void kmig_acceptor_fds(const struct kmig_acceptor *acceptor, struct pollfd *fds)
{
	unsigned int listens = is_shut(acceptor) ? 0 : acceptor->listens;

	for (unsigned int i = 0; i < KMIG_LISTEN_MAX; i++)
		fds[i] = (struct pollfd){ .fd = i < listens ? acceptor->listen_fds[i] : -1, .events = POLLIN };
	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++)
		fds[KMIG_LISTEN_MAX + i] = (struct pollfd){ .fd = acceptor->guests[i].fd, .events = POLLIN };
}

int kmig_acceptor_poll(struct kmig_acceptor *acceptor, int fd, int wait_ms)
{
	struct pollfd fds[2 + KMIG_ACCEPTOR_FDS];

	fds[0] = (struct pollfd){ .fd = acceptor->abort_fd, .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = fd, .events = POLLIN };
	kmig_acceptor_fds(acceptor, fds + 2);
	if (poll(fds, 2 + KMIG_ACCEPTOR_FDS, wait_ms) < 0 && errno != EINTR)
		return kmig_fail(acceptor->ctx, -errno, "waiting for connections: %s", strerror(errno));
	if (fds[0].revents)
		return kmig_fail(acceptor->ctx, -ECANCELED, "aborted");
	return 0;
}

int kmig_acceptor_source(struct kmig_acceptor *acceptor, struct kmig_session *session)
{
	for (;;) {
		int err = kmig_acceptor_poll(acceptor, -1, LOOK_AROUND_MS);

		if (err)
			return err;
		let_in(acceptor);
		for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++) {
			struct kmig_guest *guest = &acceptor->guests[i];
			int fd = guest->fd;

			if (fd < 0 || !source_step(acceptor, guest, session))
				continue;
			guest->fd = -1;
			return fd;
		}
		show_the_slow_out(acceptor);
	}
}

/* One step with one guest; its channel's number when it is one, else -1. */
static int channel_step(struct kmig_acceptor *acceptor, struct kmig_guest *guest, const struct kmig_session *session,
			uint64_t stream, unsigned int count, uint64_t *attempt)
{
	struct lmtrack_wire_channel expected;
	struct lmtrack_wire_frame raw;
	const char *why = "it hung up";
	struct kmig_frame frame;
	int n;

	n = read_some(guest, sizeof(raw) + sizeof(expected));
	if (!n)
		return -1;
	if (n > 0) {
		memcpy(&raw, guest->bytes, sizeof(raw));
		n = kmig_frame_decode(&raw, acceptor->page_size, &frame, &why);
		/* Before its table is looked at: a frame of another type has one, and it was not read. */
		if (!n && frame.type != LMTRACK_FRAME_CHANNEL) {
			why = "it does not begin as a channel";
			n = -1;
		}
		if (!n)
			n = kmig_frame_check_crc(&raw, NULL, &why);
		if (!n && (frame.stream != stream || frame.channel >= count)) {
			why = "it is no channel of this migration";
			n = -1;
		}
		if (!n) {
			n = kmig_auth_channel(session, stream, frame.channel, frame.arg, &expected);
			why = "its proof could not be checked";
		}
		if (!n && !kmig_auth_equal(guest->bytes + sizeof(raw), &expected, sizeof(expected))) {
			why = "it does not know the session's key";
			n = -1;
		}
	}
	if (n < 0) {
		turn_away(acceptor, guest, why);
		return -1;
	}
	*attempt = frame.arg;
	return frame.channel;
}

uint64_t kmig_acceptor_channels(struct kmig_acceptor *acceptor, const struct kmig_session *session, uint64_t stream,
				unsigned int count, uint64_t there, int *sockets, uint64_t *attempts)
{
	uint64_t attempt, come = 0;

	let_in(acceptor);
	for (int i = 0; i < KMIG_ACCEPTOR_SLOTS; i++) {
		struct kmig_guest *guest = &acceptor->guests[i];
		int channel;

		if (guest->fd < 0)
			continue;
		channel = channel_step(acceptor, guest, session, stream, count, &attempt);
		if (channel < 0)
			continue;
		if ((there | come) >> channel & 1) {
			turn_away(acceptor, guest, "its channel is there already");
			continue;
		}
		sockets[channel] = guest->fd;
		attempts[channel] = attempt;
		come |= 1ULL << channel;
		guest->fd = -1;
	}
	show_the_slow_out(acceptor);
	return come;
}
