// SPDX-License-Identifier: LGPL-2.1-or-later
/* Proof of the shared secret, and the keys derived from it: HMAC-SHA256 throughout. */
#include "auth.h"
#include "wire.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/rand.h>
#include <string.h>

struct part {
	const void *data;
	size_t length;
};

static int hmac(const void *key, size_t key_len, const struct part *parts, unsigned int count,
		uint8_t out[KMIG_KEY_SIZE])
{
	OSSL_PARAM params[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0),
		OSSL_PARAM_construct_end(),
	};
	EVP_MAC *algorithm = EVP_MAC_fetch(NULL, "HMAC", NULL);
	EVP_MAC_CTX *mac = algorithm ? EVP_MAC_CTX_new(algorithm) : NULL;
	size_t length = 0;
	bool ok;

	ok = mac && EVP_MAC_init(mac, key, key_len, params);
	for (unsigned int i = 0; ok && i < count; i++)
		ok = EVP_MAC_update(mac, parts[i].data, parts[i].length);
	ok = ok && EVP_MAC_final(mac, out, &length, KMIG_KEY_SIZE) && length == KMIG_KEY_SIZE;
	EVP_MAC_CTX_free(mac);
	EVP_MAC_free(algorithm);
	return ok ? 0 : -EIO;
}

int kmig_auth_init(void)
{
	uint8_t key[KMIG_KEY_SIZE], out[KMIG_KEY_SIZE];
	struct part part = { "", 0 };

	if (RAND_bytes(key, sizeof(key)) != 1)
		return -EIO;
	return hmac(key, sizeof(key), &part, 1, out);
}

int kmig_auth_hello(uint32_t page_size, struct kmig_hello *hello)
{
	hello->body = (struct lmtrack_wire_hello){
		.page_size = htole32(page_size),
		.chunk_pages = htole32(LMTRACK_CHUNK_PAGES),
	};
	if (RAND_bytes(hello->body.nonce, sizeof(hello->body.nonce)) != 1)
		return -EIO;
	kmig_message_encode(LMTRACK_MSG_HELLO, &hello->body, sizeof(hello->body), &hello->header);
	return 0;
}

int kmig_auth_proof(const void *secret, size_t secret_len, const char *who,
		    const struct kmig_transcript *transcript, struct lmtrack_wire_proof *proof)
{
	/* The NUL ends the text, so that no other text and transcript can give the same bytes. */
	struct part parts[] = {
		{ who, strlen(who) + 1 },
		{ transcript, sizeof(*transcript) },
	};

	return hmac(secret, secret_len, parts, 2, proof->mac);
}

int kmig_auth_session(const void *secret, size_t secret_len, const struct kmig_transcript *transcript,
		      struct kmig_session *session)
{
	struct part source = { "lmtrack source", strlen("lmtrack source") };
	struct part destination = { "lmtrack destination", strlen("lmtrack destination") };
	struct lmtrack_wire_proof key;
	int err;

	err = kmig_auth_proof(secret, secret_len, "lmtrack session", transcript, &key);
	if (err)
		return err;
	memcpy(session->key, key.mac, sizeof(session->key));
	kmig_auth_forget(&key, sizeof(key));
	err = hmac(session->key, sizeof(session->key), &source, 1, session->source);
	if (!err)
		err = hmac(session->key, sizeof(session->key), &destination, 1, session->destination);
	return err;
}

static int channel_mac(const struct kmig_session *session, const char *text, uint64_t stream, uint32_t channel,
		       uint64_t attempt, uint8_t mac[KMIG_KEY_SIZE])
{
	uint64_t id = htole64(stream), before = htole64(attempt);
	uint32_t number = htole32(channel);
	struct part parts[] = {
		{ text, strlen(text) },
		{ &id, sizeof(id) },
		{ &number, sizeof(number) },
		{ &before, sizeof(before) },
	};

	return hmac(session->key, sizeof(session->key), parts, 4, mac);
}

int kmig_auth_channel(const struct kmig_session *session, uint64_t stream, uint32_t channel, uint64_t attempt,
		      struct lmtrack_wire_channel *proof)
{
	return channel_mac(session, "lmtrack channel", stream, channel, attempt, proof->mac);
}

int kmig_auth_token(const struct kmig_session *session, uint64_t stream, uint32_t channel,
		    struct lmtrack_wire_token *token)
{
	*token = (struct lmtrack_wire_token){ .stream = htole64(stream), .channel = htole32(channel) };
	return channel_mac(session, "lmtrack rdma", stream, channel, 0, token->mac);
}

int kmig_auth_seal(const uint8_t key[KMIG_KEY_SIZE], uint64_t number, const struct lmtrack_wire_message *raw,
		   const void *body, size_t covered, uint8_t seal[KMIG_SEAL_SIZE])
{
	struct lmtrack_wire_message header = *raw;
	uint64_t count = htole64(number);
	struct part parts[] = {
		{ &count, sizeof(count) },
		{ &header, sizeof(header) },
		{ body, covered },
	};
	uint8_t full[KMIG_KEY_SIZE];
	int err;

	memset(header.mac, 0, sizeof(header.mac));
	err = hmac(key, KMIG_KEY_SIZE, parts, covered ? 3 : 2, full);
	if (!err)
		memcpy(seal, full, KMIG_SEAL_SIZE);
	return err;
}

bool kmig_auth_equal(const void *one, const void *other, size_t length)
{
	return !CRYPTO_memcmp(one, other, length);
}

void kmig_auth_forget(void *key, size_t length)
{
	OPENSSL_cleanse(key, length);
}
