// SPDX-License-Identifier: GPL-2.0
/*
 * The ways to the destination: as the user says, or as the routes do.
 *
 * Only what a route itself calls equal is taken without being asked for: the next hops of a
 * multipath route to the destination, those that are by different devices. A channel is bound to
 * the device, since a source address does not choose among next hops; the kernel then picks an
 * address of that device. What else may lead there (another address of the destination, another
 * network) cannot be known from here, and is what --via is for.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <net/if.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <libmnl/libmnl.h>
#include <linux/rtnetlink.h>

#include "tool.h"

/* ---- as the user says ------------------------------------------------------------------ */

static bool is_numeric(const char *text)
{
	struct in6_addr address;

	return inet_pton(AF_INET, text, &address) == 1 || inet_pton(AF_INET6, text, &address) == 1;
}

static struct kmig_path *next_path(struct paths *paths, struct path_text **text)
{
	*text = &paths->text[paths->count];
	return &paths->path[paths->count];
}

int paths_add(struct paths *paths, const char *given)
{
	const char *equals = strchr(given, '='), *percent = strchr(given, '%');
	struct path_text *text;
	struct kmig_path *path;
	size_t length;

	if (paths->count == KMIG_PATHS_MAX)
		return fail(EINVAL, "--via can be given %d times", KMIG_PATHS_MAX);
	if (!equals)
		return fail(EINVAL, "--via must be LOCAL=REMOTE or LOCAL%%DEVICE=REMOTE, not '%s'", given);
	path = next_path(paths, &text);
	*path = (struct kmig_path){ .local = text->local, .remote = text->remote };
	if (percent && percent < equals) {
		length = (size_t)(equals - percent) - 1;
		if (!length || length >= sizeof(text->device))
			return fail(EINVAL, "--via: '%.*s' is no network device's name", (int)length, percent + 1);
		memcpy(text->device, percent + 1, length);
		text->device[length] = '\0';
		path->device = text->device;
	} else {
		percent = equals;
	}
	length = (size_t)(percent - given);
	if (length >= sizeof(text->local))
		return fail(EINVAL, "--via: '%.*s' is no address", (int)length, given);
	memcpy(text->local, given, length);
	text->local[length] = '\0';
	if (parse_address(equals + 1, text->remote, &path->port))
		return -EINVAL;
	if (!is_numeric(text->local))
		return fail(EINVAL, "--via: '%s' is no address", text->local);
	if (!is_numeric(text->remote))
		return fail(EINVAL, "--via: '%s' is no address", text->remote);
	if (!strchr(text->local, ':') != !strchr(text->remote, ':'))
		return fail(EINVAL, "--via: from %s to %s no connection can be made", text->local, text->remote);
	paths->count++;
	return 0;
}

int take_path(const struct opt *opt, const char *text)
{
	return paths_add(opt->value, text);
}

/* ---- as the routes do -------------------------------------------------------------------- */

static void add_device(struct paths *paths, unsigned int index)
{
	char name[IF_NAMESIZE];
	struct path_text *text;
	struct kmig_path *path;

	if (paths->count == KMIG_PATHS_MAX || !if_indextoname(index, name))
		return;
	for (unsigned int i = 0; i < paths->count; i++)
		if (!strcmp(paths->path[i].device, name))
			return;
	path = next_path(paths, &text);
	strcpy(text->device, name);
	*path = (struct kmig_path){ .device = text->device };
	paths->count++;
}

static void take_next_hops(struct paths *paths, const struct nlattr *attr)
{
	const struct rtnexthop *hop = mnl_attr_get_payload(attr);
	int left = mnl_attr_get_payload_len(attr);

	for (; left >= (int)sizeof(*hop) && RTNH_OK(hop, left); left -= NLMSG_ALIGN(hop->rtnh_len), hop = RTNH_NEXT(hop))
		if (!(hop->rtnh_flags & (RTNH_F_DEAD | RTNH_F_LINKDOWN)))
			add_device(paths, (unsigned int)hop->rtnh_ifindex);
}

static int take_route(const struct nlmsghdr *message, void *data)
{
	const struct nlattr *attr;

	if (message->nlmsg_type != RTM_NEWROUTE)
		return MNL_CB_STOP;
	mnl_attr_for_each(attr, message, sizeof(struct rtmsg))
		if (mnl_attr_get_type(attr) == RTA_MULTIPATH)
			take_next_hops(data, attr);
	return MNL_CB_STOP;
}

/* Ask for the route itself: without that the kernel tells of the one next hop it would choose. */
static void ask_route(struct mnl_socket *socket, const struct sockaddr *to, struct paths *paths)
{
	char buffer[MNL_SOCKET_BUFFER_SIZE];
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct rtmsg *route;
	ssize_t n;

	message->nlmsg_type = RTM_GETROUTE;
	message->nlmsg_flags = NLM_F_REQUEST;
	message->nlmsg_seq = 1;
	route = mnl_nlmsg_put_extra_header(message, sizeof(*route));
	route->rtm_family = (unsigned char)to->sa_family;
	route->rtm_flags = RTM_F_FIB_MATCH;
	if (to->sa_family == AF_INET6) {
		route->rtm_dst_len = 128;
		mnl_attr_put(message, RTA_DST, sizeof(struct in6_addr), &((const struct sockaddr_in6 *)to)->sin6_addr);
	} else {
		route->rtm_dst_len = 32;
		mnl_attr_put(message, RTA_DST, sizeof(struct in_addr), &((const struct sockaddr_in *)to)->sin_addr);
	}
	if (mnl_socket_sendto(socket, message, message->nlmsg_len) < 0)
		return;
	n = mnl_socket_recvfrom(socket, buffer, sizeof(buffer));
	if (n > 0)
		mnl_cb_run(buffer, (size_t)n, 1, mnl_socket_get_portid(socket), take_route, paths);
}

void paths_find(struct paths *paths, const char *host)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG }, *list;
	struct mnl_socket *socket;

	paths->count = 0;
	/* A name of several addresses: it is not known which of them will answer. */
	if (getaddrinfo(host, NULL, &hints, &list))
		return;
	socket = list->ai_next ? NULL : mnl_socket_open(NETLINK_ROUTE);
	if (socket) {
		if (!mnl_socket_bind(socket, 0, MNL_SOCKET_AUTOPID))
			ask_route(socket, list->ai_addr, paths);
		mnl_socket_close(socket);
	}
	freeaddrinfo(list);
	/* One alone is what the routes say anyway. */
	if (paths->count < 2)
		paths->count = 0;
}
