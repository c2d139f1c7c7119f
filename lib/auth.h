/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Proof of the shared secret, and the keys derived from it. */
#ifndef KMIG_AUTH_H
#define KMIG_AUTH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/lmtrack_wire.h>

#define KMIG_KEY_SIZE 32
#define KMIG_SEAL_SIZE 16
#define KMIG_SECRET_MIN 16

/* A HELLO as it is on the wire. Both of them, the source's first, are what is proven. */
struct kmig_hello {
	struct lmtrack_wire_message header;
	struct lmtrack_wire_hello body;
};

struct kmig_transcript {
	struct kmig_hello source, destination;
};

struct kmig_session {
	uint8_t key[KMIG_KEY_SIZE];		/* of the session */
	uint8_t source[KMIG_KEY_SIZE];		/* seals what the source sends */
	uint8_t destination[KMIG_KEY_SIZE];	/* seals what the destination sends */
};

/*
 * The first use of randomness and cryptography takes a while, seconds on a machine that has
 * just booted: do that while nobody waits. -EIO when either does not work.
 */
int kmig_auth_init(void);

/* A HELLO of ours with a fresh nonce; -EIO when there is no randomness. */
int kmig_auth_hello(uint32_t page_size, struct kmig_hello *hello);

/* The proof of one side, who is "lmtrack source" or "lmtrack destination". */
int kmig_auth_proof(const void *secret, size_t secret_len, const char *who,
		    const struct kmig_transcript *transcript, struct lmtrack_wire_proof *proof);
int kmig_auth_session(const void *secret, size_t secret_len, const struct kmig_transcript *transcript,
		      struct kmig_session *session);
int kmig_auth_channel(const struct kmig_session *session, uint64_t stream, uint32_t channel, uint64_t attempt,
		      struct lmtrack_wire_channel *proof);
int kmig_auth_token(const struct kmig_session *session, uint64_t stream, uint32_t channel,
		    struct lmtrack_wire_token *token);
/* What covers a message after the proofs; @covered are the bytes of the body that count. */
int kmig_auth_seal(const uint8_t key[KMIG_KEY_SIZE], uint64_t number, const struct lmtrack_wire_message *header,
		   const void *body, size_t covered, uint8_t seal[KMIG_SEAL_SIZE]);

/* In a time that does not depend on where they differ. */
bool kmig_auth_equal(const void *one, const void *other, size_t length);
void kmig_auth_forget(void *key, size_t length);

#endif /* KMIG_AUTH_H */
