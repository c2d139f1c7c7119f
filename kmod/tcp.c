// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: frames over a TCP connection that the caller made.
 *
 * Headers are copied into the socket, pages are handed to it by reference: the network holds
 * its own references until the peer has acknowledged the bytes, and nobody needs to be told. A
 * page that is written meanwhile may arrive half old and half new; it is dirty again and
 * follows in a later round, which begins when the peer has stored this one.
 *
 * channel->priv is the socket, held with a reference to its file from attach to detach. The
 * channel's thread is the only sender. It waits for room itself, holding no lock, and is woken
 * by room, by whoever ends the channel and once a second: the socket is its owner's as well, who
 * can connect it anew and set what SO_SNDTIMEO is. So nothing waits in the socket, but for its
 * lock.
 */
#include <linux/bvec.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/socket.h>
#include <linux/tcp.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/wait.h>
#include <net/inet_connection_sock.h>
#include <net/sock.h>
#include <net/tcp_states.h>

#include "lmtrack.h"

static int tcp_attach(struct lmtrack_channel *channel, const void *how)
{
	const struct lmtrack_stream_add_channel *add = how;
	struct socket *sock;
	int ret;

	sock = sockfd_lookup(add->fd, &ret);
	if (!sock)
		return ret;
	if ((sock->sk->sk_family != AF_INET && sock->sk->sk_family != AF_INET6) ||
	    sock->type != SOCK_STREAM || sock->sk->sk_protocol != IPPROTO_TCP)
		ret = -EPROTOTYPE;
	else if (sock->ops->shutdown == sock_no_shutdown)
		ret = -EPROTOTYPE;
	else if (READ_ONCE(sock->sk->sk_state) != TCP_ESTABLISHED)
		ret = -ENOTCONN;
	else
		ret = 0;
	if (ret) {
		sockfd_put(sock);
		return ret;
	}
	channel->priv = sock;
	return 0;
}

/* Is there room again, or no point in waiting for it? */
static bool tcp_may_go_on(const struct lmtrack_channel *channel)
{
	const struct socket *sock = channel->priv;
	struct sock *sk = sock->sk;

	return sk_stream_is_writeable(sk) || READ_ONCE(sk->sk_err) ||
	       (READ_ONCE(sk->sk_shutdown) & SEND_SHUTDOWN) || lmtrack_channel_error(channel);
}

/*
 * What a send brought: bytes, or an error that ends the channel. A peer that does not read is
 * none: how long it may be silent is for the caller to decide. Then this waits, returns 0 and
 * leaves word in @refused.
 */
static int tcp_sent(struct lmtrack_channel *channel, int ret, bool *refused)
{
	const struct socket *sock = channel->priv;

	if (ret != -EAGAIN) {
		*refused = false;
		return ret ?: -EPIPE;
	}
	/* Woken like any sender, so interruptibly; but no signal reaches the thread. */
	if (!tcp_may_go_on(channel))
		wait_event_interruptible_timeout(*sk_sleep(sock->sk), tcp_may_go_on(channel),
						 HZ);
	else if (*refused)
		/* It is not room that is wanting, but memory: nobody tells when there is. */
		schedule_timeout_idle(1);
	*refused = true;
	return lmtrack_channel_error(channel);
}

/* Send all that the message has, in pieces if need be. */
static int tcp_send_message(struct lmtrack_channel *channel, struct msghdr *msg)
{
	bool refused = false;
	int ret;

	while (msg_data_left(msg)) {
		ret = tcp_sent(channel, sock_sendmsg(channel->priv, msg), &refused);
		if (ret < 0)
			return ret;
	}
	return 0;
}

static int tcp_send_bytes(struct lmtrack_channel *channel, void *base, size_t bytes, int flags)
{
	struct kvec vec = { .iov_base = base, .iov_len = bytes };
	struct msghdr msg = { .msg_flags = flags };

	iov_iter_kvec(&msg.msg_iter, ITER_SOURCE, &vec, 1, bytes);
	return tcp_send_message(channel, &msg);
}

/*
 * For what sits above TCP: plain buffers, or TLS would keep the pages and encrypt them later. And
 * copies, made so that a memory error that nobody knew of yet ends the stream, not the host.
 */
static int tcp_copy_pages(struct lmtrack_channel *channel, struct bio_vec *bvec,
			  unsigned int pages, int flags)
{
	void *copy = kmalloc(PAGE_SIZE, GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN);
	unsigned int i;
	int ret = copy ? 0 : -ENOMEM;

	for (i = 0; !ret && i < pages; i++) {
		if (copy_mc_to_kernel(copy, page_address(bvec[i].bv_page), PAGE_SIZE))
			ret = -EHWPOISON;
		else
			ret = tcp_send_bytes(channel, copy, PAGE_SIZE,
					     flags | (i + 1 < pages ? MSG_MORE : 0));
	}
	kfree(copy);
	return ret;
}

/* 6.5 replaced kernel_sendpage() by a flag of sendmsg(). */
#ifdef LMTRACK_HAVE_SENDPAGE
static int tcp_send_pages(struct lmtrack_channel *channel, struct bio_vec *bvec,
			  unsigned int pages, int flags)
{
	unsigned int i;

	for (i = 0; i < pages; i++) {
		int more = i + 1 < pages ? MSG_MORE | MSG_SENDPAGE_NOTLAST : 0;
		bool refused = false;
		size_t sent = 0;
		int ret;

		while (sent < PAGE_SIZE) {
			ret = kernel_sendpage(channel->priv, bvec[i].bv_page, sent,
					      PAGE_SIZE - sent, flags | more);
			ret = tcp_sent(channel, ret, &refused);
			if (ret < 0)
				return ret;
			sent += ret;
		}
	}
	return 0;
}
#else
static int tcp_send_pages(struct lmtrack_channel *channel, struct bio_vec *bvec,
			  unsigned int pages, int flags)
{
	struct msghdr msg = { .msg_flags = flags | MSG_SPLICE_PAGES };

	iov_iter_bvec(&msg.msg_iter, ITER_SOURCE, bvec, pages, (size_t)pages << PAGE_SHIFT);
	return tcp_send_message(channel, &msg);
}
#endif

/*
 * TCP takes pages by reference on its own account, whatever the device can do: one without
 * scatter-gather has them copied into one piece on the way out, and nobody says so.
 */
static bool tcp_gathers(struct sock *sk)
{
	struct dst_entry *dst;
	bool gathers;

	rcu_read_lock();
	dst = __sk_dst_get(sk);
	gathers = (sk->sk_route_caps & NETIF_F_SG) && (!dst || dst->dev->features & NETIF_F_SG);
	rcu_read_unlock();
	return gathers;
}

static int tcp_send(struct lmtrack_channel *channel, void *head, size_t head_bytes,
		    struct bio_vec *bvec, unsigned int pages, bool more)
{
	struct socket *sock = channel->priv;
	/* Something above TCP (TLS) copies anyway, and must not be handed pages. */
	bool plain = !inet_csk(sock->sk)->icsk_ulp_ops;
	size_t bytes = (size_t)pages << PAGE_SHIFT;
	int flags = MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0);
	int ret;

	ret = tcp_send_bytes(channel, head, head_bytes, flags | (pages ? MSG_MORE : 0));
	if (!ret && pages)
		ret = plain ? tcp_send_pages(channel, bvec, pages, flags) :
			      tcp_copy_pages(channel, bvec, pages, flags);
	if (ret)
		return ret;
	channel->stats.header_bytes += head_bytes;
	if (plain && tcp_gathers(sock->sk))
		channel->stats.zerocopy_bytes += bytes;
	else
		channel->stats.copied_bytes += bytes;
	return 0;
}

/*
 * Less than a segment is no sign of a busy wire: TCP keeps it until more comes (MSG_MORE). Without
 * the socket's lock: our thread is the only one to write, and what is sent meanwhile is seen the
 * next time.
 */
static bool tcp_pending(const struct lmtrack_channel *channel)
{
	const struct socket *sock = channel->priv;
	const struct tcp_sock *tp = tcp_sk(sock->sk);

	return READ_ONCE(tp->write_seq) - READ_ONCE(tp->snd_nxt) >= READ_ONCE(tp->mss_cache);
}

static void tcp_shutdown_channel(struct lmtrack_channel *channel)
{
	kernel_sock_shutdown(channel->priv, SHUT_RDWR);
}

/*
 * Where a kernel thread lets go of it, nobody is left who wished it to linger, and no signal could
 * end that. A linger of 0 stays: it resets the connection. If another has the socket, too, it is
 * not closed now, and the lock may be kept.
 */
static void tcp_detach(struct lmtrack_channel *channel)
{
	struct socket *sock = channel->priv;

	if ((current->flags & PF_KTHREAD) && file_count(sock->file) == 1) {
		lock_sock(sock->sk);
		if (sock->sk->sk_lingertime)
			sock_reset_flag(sock->sk, SOCK_LINGER);
		release_sock(sock->sk);
	}
	lmtrack_fput(sock->file);
}

const struct lmtrack_transport lmtrack_tcp = {
	.attach = tcp_attach,
	.send = tcp_send,
	.pending = tcp_pending,
	.shutdown = tcp_shutdown_channel,
	.detach = tcp_detach,
};
