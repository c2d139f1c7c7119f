/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The source's data channels: how they come, are lost, and come back. */
#ifndef KMIG_CHANNELS_H
#define KMIG_CHANNELS_H

#include <netinet/in.h>
#include <poll.h>

#include "control.h"
#include "net.h"
#include "tracker.h"

enum kmig_channel_state {
	KMIG_CHANNEL_AWAY,		/* to be connected at @at_ns; lost, and the destination has closed it; or new */
	KMIG_CHANNEL_CONNECTING,	/* until @at_ns */
	KMIG_CHANNEL_CONNECTED,		/* the destination is to take it in until @at_ns */
	KMIG_CHANNEL_JOINED,		/* it has: from round @from on */
	KMIG_CHANNEL_THERE,		/* the tracker sends on it */
	KMIG_CHANNEL_CLOSING,		/* lost; CHANNEL_CLOSED has not come */
};

/* @fd is open but where the channel is AWAY or CLOSING, or over RDMA. */
struct kmig_channel {
	int fd;
	bool rdma;			/* THERE: it is the tracker's connection; once lost it comes back over TCP */
	bool asked;			/* WINDOW_WANTED has no answer yet, also if it was lost meanwhile */
	uint32_t asked_region;		/* for this one */
	uint64_t asked_first;
	enum kmig_channel_state state;
	uint64_t at_ns;
	uint32_t pause_ms;		/* before the next attempt */
	uint64_t attempt;		/* connections before this one */
	unsigned int tries;		/* since the channel was lost: over its own path first, then over the others in turn */
	uint32_t from;
};

struct kmig_channels {
	struct kmig_ctx *ctx;
	struct kmig_control *control;
	const struct kmig_session *session;
	struct kmig_tracker *tracker;	/* until it is there, a loss ends the migration */
	const char *host;
	int abort_fd;
	enum kmig_transport transport;
	uint16_t rdma_port;		/* the destination's; 0: it has none, or was not asked */
	uint32_t window_pages;
	struct kmig_net_path path[KMIG_PATHS_MAX];
	unsigned int paths;
	uint64_t failed_paths;		/* bit for each that has not connected once, and was told of */
	uint64_t stream;
	uint32_t timeout_ms;
	struct kmig_net_mark mark;
	uint64_t queue_bytes;		/* that may wait in a socket */
	unsigned int count;
	struct kmig_channel channel[LMTRACK_CHANNELS_MAX];
	uint64_t gone_ns;		/* since then none is there; 0: one is */
	uint32_t lost, rejoined;	/* so many times */
	uint32_t over_rdma;		/* so many began so */
};

/*
 * Connect all of them, if not over RDMA, which the tracker does; @channels is filled in as far as
 * @count, its paths not yet completed.
 */
int kmig_channels_connect(struct kmig_channels *channels);
void kmig_channels_close(struct kmig_channels *channels);
/* RDMA_OFFER. An error: nothing but RDMA is allowed, and it cannot be had. */
int kmig_channels_offer(struct kmig_channels *channels, const struct kmig_message *message);
/* The tracker has begun, and gets them. */
int kmig_channels_add(struct kmig_channels *channels, struct kmig_tracker *tracker);
/* From now on one may be lost. */
void kmig_channels_start(struct kmig_channels *channels, struct kmig_tracker *tracker);
/* Most bytes that may wait in the socket of each. */
void kmig_channels_limit(struct kmig_channels *channels, uint64_t bytes);

/* Bytes that have arrived over those that are there: fewer than before when one was lost. */
uint64_t kmig_channels_delivered(const struct kmig_channels *channels);

/*
 * What to wait for, @count entries; @idle: the tracker does not look after those it sends on. Then
 * what has happened, @round being the last begun.
 */
void kmig_channels_poll(const struct kmig_channels *channels, struct pollfd *fds, bool idle);
int kmig_channels_step(struct kmig_channels *channels, const struct pollfd *fds, uint32_t round);
/* CHANNEL_LOST, CHANNEL_CLOSED or CHANNEL_JOINED. */
int kmig_channels_message(struct kmig_channels *channels, const struct kmig_message *message, uint32_t round);

/* WINDOW. */
int kmig_channels_window(struct kmig_channels *channels, const struct kmig_message *message, uint32_t round);
/* Does one wait for a window that was asked for? Then there is no need to be told so. */
bool kmig_channels_asked(const struct kmig_channels *channels);

/* Is there one that a round could be sent on? */
bool kmig_channels_usable(const struct kmig_channels *channels);
/* Has the destination closed what was lost? No round may begin before. */
bool kmig_channels_settled(const struct kmig_channels *channels);
/* @round is about to begin: those that joined for it are the tracker's. */
int kmig_channels_begin(struct kmig_channels *channels, uint32_t round);

#endif /* KMIG_CHANNELS_H */
