// SPDX-License-Identifier: LGPL-2.1-or-later
/* The context: where messages go. */
#include "private.h"

#include <signal.h>

#define STRING(x) #x
#define VERSION(major, minor) STRING(major) "." STRING(minor)

const char *kmig_version(void)
{
	return VERSION(KMIG_VERSION_MAJOR, KMIG_VERSION_MINOR);
}

int kmig_ctx_new(struct kmig_ctx **out)
{
	struct kmig_ctx *ctx = calloc(1, sizeof(*ctx));

	if (!ctx)
		return -ENOMEM;
	pthread_mutex_init(&ctx->lock, NULL);
	*out = ctx;
	return 0;
}

void kmig_ctx_free(struct kmig_ctx *ctx)
{
	if (!ctx)
		return;
	pthread_mutex_destroy(&ctx->lock);
	free(ctx);
}

void kmig_ctx_set_log(struct kmig_ctx *ctx, kmig_log_fn fn, void *data)
{
	pthread_mutex_lock(&ctx->lock);
	ctx->log = fn;
	ctx->log_data = data;
	pthread_mutex_unlock(&ctx->lock);
}

const char *kmig_ctx_error(const struct kmig_ctx *ctx)
{
	return ctx->error;
}

void kmig_log(struct kmig_ctx *ctx, enum kmig_log_level level, const char *fmt, ...)
{
	char text[KMIG_ERROR_MAX];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);

	pthread_mutex_lock(&ctx->lock);
	if (ctx->log)
		ctx->log(level, text, ctx->log_data);
	pthread_mutex_unlock(&ctx->lock);
}

int kmig_vfail(struct kmig_ctx *ctx, int err, const char *fmt, va_list args)
{
	char text[KMIG_ERROR_MAX];

	/* Not into ctx->error at once: an argument may be that very text. */
	vsnprintf(text, sizeof(text), fmt, args);

	pthread_mutex_lock(&ctx->lock);
	memcpy(ctx->error, text, sizeof(ctx->error));
	if (ctx->log)
		ctx->log(KMIG_LOG_ERROR, text, ctx->log_data);
	pthread_mutex_unlock(&ctx->lock);
	return err;
}

int kmig_fail(struct kmig_ctx *ctx, int err, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	kmig_vfail(ctx, err, fmt, args);
	va_end(args);
	return err;
}

void kmig_copy_error(struct kmig_ctx *ctx, char text[KMIG_ERROR_MAX])
{
	pthread_mutex_lock(&ctx->lock);
	memcpy(text, ctx->error, sizeof(ctx->error));
	pthread_mutex_unlock(&ctx->lock);
}

void kmig_restore_error(struct kmig_ctx *ctx, const char text[KMIG_ERROR_MAX])
{
	pthread_mutex_lock(&ctx->lock);
	memcpy(ctx->error, text, sizeof(ctx->error));
	pthread_mutex_unlock(&ctx->lock);
}

int kmig_thread_start(pthread_t *thread, void *(*run)(void *), void *data)
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(thread, NULL, run, data);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -err;
}

int kmig_copy_sized(struct kmig_ctx *ctx, void *to, size_t known, size_t least, const void *from,
		    const char *what)
{
	const unsigned char *bytes = from;
	size_t size;

	if (!from)
		return kmig_fail(ctx, -EINVAL, "%s: missing", what);
	memcpy(&size, from, sizeof(size));
	if (size < least)
		return kmig_fail(ctx, -EINVAL, "%s: its size is %zu, at least %zu is needed; initialise it with its KMIG_..._INIT macro",
				 what, size, least);
	for (size_t i = known; i < size; i++)
		if (bytes[i])
			return kmig_fail(ctx, -E2BIG, "%s: sets a field this version of libkmig (%s) does not know",
					 what, kmig_version());
	memcpy(to, from, size < known ? size : known);
	return 0;
}

int kmig_fill_sized(struct kmig_ctx *ctx, void *to, const void *from, size_t known, const char *what)
{
	size_t size;

	memcpy(&size, to, sizeof(size));
	if (size < sizeof(size))
		return kmig_fail(ctx, -EINVAL, "%s: its size is not set", what);
	memcpy(to, from, size < known ? size : known);
	memcpy(to, &size, sizeof(size));
	return 0;
}

uint64_t kmig_bit_next(const uint64_t *map, uint64_t bits, uint64_t bit)
{
	uint64_t word = bit / 64;
	uint64_t value;

	if (bit >= bits)
		return bits;
	value = map[word] & (~0ULL << (bit % 64));
	while (!value) {
		if (++word >= kmig_words(bits))
			return bits;
		value = map[word];
	}
	bit = word * 64 + __builtin_ctzll(value);
	return bit < bits ? bit : bits;
}
