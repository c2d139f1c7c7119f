// SPDX-License-Identifier: GPL-2.0
/*
 * Messages and frames at a real destination engine, from the greeting to the commit, in any order.
 * Beside memory errors it looks for a guest that is run without a COMMIT, and for a destination
 * that does not come to its end when its peer has gone.
 */
#include "fuzz.h"

#include <errno.h>
#include <poll.h>

#include "../lib_peer.h"

#include "../../lib/digest.h"

#define GUEST_BYTES (3 * 512 * FUZZ_PAGE + 3 * FUZZ_PAGE)
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define END_SECONDS 30
#define TIMEOUT_MS 2000
#define PATIENT_MS 200
#define STRANGER_MS 10		/* to be turned away in */

/* How far the peer behaves before it follows the script. */
enum begins { AS_STRANGER, GREETED, PROVEN, ANNOUNCED, CHANNELS_OPEN, BEGINS };

static bool begin(struct peer *peer, enum begins how, int port)
{
	*peer = (struct peer){ .port = port, .control = -1 };
	for (int i = 0; i < PEER_CHANNELS; i++)
		peer->channel[i] = -1;
	if (how == AS_STRANGER) {
		peer->control = peer_socket(port);
		return peer->control >= 0;
	}
	return peer_greet(peer) && (how < PROVEN || peer_prove(peer)) &&
	       (how < ANNOUNCED || peer_announce(peer, GUEST_BYTES)) &&
	       (how < CHANNELS_OPEN || peer_open_channels(peer));
}

static void say(int fd, const void *data, size_t length)
{
	/* Who was turned away, or not let in, is not heard. */
	if (fd >= 0)
		send(fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Well-formed but for what the script says: sealed, of a length that the type allows or not. */
static void send_message(struct script *script, struct peer *peer, bool *committed)
{
	static uint8_t body[LMTRACK_WIRE_BODY_MAX];
	uint8_t wrong = script_number(script, 1);
	uint16_t type = script_number(script, wrong & 1 ? 2 : 1) % (wrong & 1 ? UINT16_MAX : LMTRACK_MSG_WINDOW + 2);
	struct lmtrack_wire_message header;
	const uint8_t *bytes;
	size_t length, given;

	bytes = script_bytes(script, script_number(script, 1), &given);
	length = wrong & 2 ? script_number(script, 4) % sizeof(body) : given;
	memset(body, 0, length);
	memcpy(body, bytes, given < length ? given : length);
	kmig_message_encode(type, body, length, &header);
	kmig_auth_seal(peer->session.source, peer->sent + (wrong & 4 ? 1 : 0), &header, body,
		       type == LMTRACK_MSG_STATE ? 0 : length, header.mac);
	peer->sent++;
	if (wrong & 8)
		((uint8_t *)&header)[script_number(script, 1) % sizeof(header)] ^= script_number(script, 1);
	*committed |= type == LMTRACK_MSG_COMMIT;
	say(peer->control, &header, sizeof(header));
	say(peer->control, body, length);
}

/* Digests of all chunks that are right as of now, said to be of this round. */
static void send_digests(struct peer *peer, struct kmig_region *region, uint32_t round)
{
	struct lmtrack_wire_digest digests[GUEST_BYTES / FUZZ_PAGE / LMTRACK_CHUNK_PAGES + 1];

	if (!kmig_region_map(region))
		abort();
	for (uint64_t i = 0; i < ARRAY_SIZE(digests); i++)
		digests[i] = (struct lmtrack_wire_digest){
			.round = htole32(round),
			.chunk = htole64(i),
			.digest = htole64(kmig_digest_chunk(region, i)),
		};
	peer_send(peer, LMTRACK_MSG_DIGESTS, digests, sizeof(digests));
}

static void send_frame(struct script *script, struct peer *peer, uint32_t round, unsigned int channel)
{
	struct kmig_frame right = {
		.stream = PEER_STREAM, .channel = channel, .round = round, .seq = peer->seq[channel]++,
	};
	static uint8_t payload[FUZZ_PAYLOAD_MAX];
	static struct fuzz_frame made;

	fuzz_frame_make(script, &right, script_number(script, 1), &made);
	say(peer->channel[channel], &made.raw, sizeof(made.raw));
	say(peer->channel[channel], made.table, made.frame.extents * sizeof(made.table[0]));
	say(peer->channel[channel], payload, made.payload);
}

/* Take in what has come, so that the destination can go on; not its meaning. */
static void listen_a_while(struct peer *peer, int wait_ms)
{
	struct pollfd control = { .fd = peer->control, .events = POLLIN };
	char scrap[4096];

	for (; poll(&control, 1, wait_ms) == 1 && recv(peer->control, scrap, sizeof(scrap), MSG_DONTWAIT) > 0; wait_ms = 1)
		;
}

/* So that all that was sent is looked at: closing with something unread would reset the connection. */
static void hang_up(struct peer *peer, enum begins how)
{
	struct pollfd control = { .fd = peer->control, .events = POLLIN };
	char scrap[4096];

	for (int i = 0; i < PEER_CHANNELS; i++)
		if (peer->channel[i] >= 0)
			shutdown(peer->channel[i], SHUT_WR);
	shutdown(peer->control, SHUT_WR);
	while (poll(&control, 1, how < PROVEN ? STRANGER_MS : END_SECONDS * 1000) == 1 &&
	       recv(peer->control, scrap, sizeof(scrap), MSG_DONTWAIT) > 0)
		;
	close(peer->control);
	peer->control = -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct script script = { data, data + size };
	enum begins how = script_number(&script, 1) % BEGINS;
	static struct victim victim;
	bool committed = false;
	uint32_t round = 1;
	struct peer peer;

	memset(&victim, 0, sizeof(victim));
	victim.opts = (struct kmig_destination_opts)KMIG_DESTINATION_OPTS_INIT;
	victim.opts.timeout_ms = TIMEOUT_MS;
	if (victim_start(&victim, GUEST_BYTES) || !begin(&peer, how, victim.port))
		abort();
	while (!script_ended(&script)) {
		uint8_t what = script_number(&script, 1);
		const uint8_t *bytes;
		size_t length;

		switch (what >> 1 & 7) {
		case 0:
			bytes = script_bytes(&script, script_number(&script, 1), &length);
			say(what & 16 ? peer.channel[what & 1] : peer.control, bytes, length);
			break;
		case 1:
			listen_a_while(&peer, what & 1 ? PATIENT_MS : 1);
			round++;
			break;
		case 2:
		case 3:
			send_frame(&script, &peer, round, what & 1);
			break;
		case 4:
			if (how >= PROVEN)
				send_digests(&peer, victim.region, round - (what & 1));
			break;
		default:
			send_message(&script, &peer, &committed);
		}
	}
	hang_up(&peer, how);
	/* A stranger alone does not end the destination, which waits for its source. */
	if (how < PROVEN)
		kmig_destination_abort(victim.destination);
	alarm(END_SECONDS);
	victim_join(&victim);
	alarm(0);
	peer_end(&peer);
	if (victim.runs_guest && !committed)
		abort();
	victim_end(&victim);
	return 0;
}
