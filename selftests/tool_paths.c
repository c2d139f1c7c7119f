// SPDX-License-Identifier: GPL-2.0
/* The ways to the destination: as the user writes them, and as a network namespace's routes say. */
#include "kselftest_harness.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "tool.h"

TEST(as_given)
{
	struct paths paths = { 0 };

	ASSERT_EQ(0, paths_add(&paths, "10.0.0.1=10.0.0.2"));
	ASSERT_EQ(0, paths_add(&paths, "10.1.0.1%eth1=10.1.0.2:77"));
	ASSERT_EQ(0, paths_add(&paths, "fe80::1%eth2=fe80::2"));
	ASSERT_EQ(0, paths_add(&paths, "fc00::1=[fc00::2]:78"));
	ASSERT_EQ(4, paths.count);
	EXPECT_STREQ("10.0.0.1", paths.path[0].local);
	EXPECT_EQ(NULL, paths.path[0].device);
	EXPECT_STREQ("10.0.0.2", paths.path[0].remote);
	EXPECT_EQ(0, paths.path[0].port);
	EXPECT_STREQ("10.1.0.1", paths.path[1].local);
	EXPECT_STREQ("eth1", paths.path[1].device);
	EXPECT_STREQ("10.1.0.2", paths.path[1].remote);
	EXPECT_EQ(77, paths.path[1].port);
	EXPECT_STREQ("fe80::1", paths.path[2].local);
	EXPECT_STREQ("eth2", paths.path[2].device);
	EXPECT_STREQ("fe80::2", paths.path[2].remote);
	EXPECT_STREQ("fc00::2", paths.path[3].remote);
	EXPECT_EQ(78, paths.path[3].port);
	while (paths.count < KMIG_PATHS_MAX)
		ASSERT_EQ(0, paths_add(&paths, "10.0.0.1=10.0.0.2"));
	EXPECT_EQ(-EINVAL, paths_add(&paths, "10.0.0.1=10.0.0.2"));
	EXPECT_STREQ("--via can be given 16 times", failure());
	failure_clear();
}

TEST(wrongly_given)
{
	static const struct { const char *text, *message; } bad[] = {
		{ "10.0.0.1", "--via must be LOCAL=REMOTE or LOCAL%DEVICE=REMOTE, not '10.0.0.1'" },
		{ "", "--via must be LOCAL=REMOTE or LOCAL%DEVICE=REMOTE, not ''" },
		{ "=10.0.0.2", "--via: '' is no address" },
		{ "10.0.0.1=", "--via: '' is no address" },
		{ "host=10.0.0.2", "--via: 'host' is no address" },
		{ "10.0.0.1=host", "--via: 'host' is no address" },
		{ "10.0.0.1%=10.0.0.2", "--via: '' is no network device's name" },
		{ "10.0.0.1%sixteen-letters.=10.0.0.2", "--via: 'sixteen-letters.' is no network device's name" },
		{ "10.0.0.1=10.0.0.2:x", "port must be a number from 0 to 65535, not 'x'" },
		{ "10.0.0.1=fc00::1", "--via: from 10.0.0.1 to fc00::1 no connection can be made" },
	};

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct paths paths = { 0 };

		EXPECT_EQ(-EINVAL, paths_add(&paths, bad[i].text)) TH_LOG("accepted %s", bad[i].text);
		EXPECT_STREQ(bad[i].message, failure());
		EXPECT_EQ(0, paths.count);
		failure_clear();
	}
}

#define RUN(command) ASSERT_EQ(0, system(command)) TH_LOG(command)

FIXTURE(routes) {
	struct paths paths;
};

/* Three links to the destination's network. */
FIXTURE_SETUP(routes)
{
	if (unshare(CLONE_NEWNET | (geteuid() ? CLONE_NEWUSER : 0)))
		SKIP(return, "no network namespace to be had");
	RUN("ip link set lo up");
	RUN("for i in 1 2 3; do ip link add near$i type veth peer name far$i && ip link set near$i up && ip link set far$i up && "
	    "ip addr add 10.0.$i.1/24 dev near$i && ip addr add fc00:$i::1/64 dev near$i nodad || exit 1; done");
}

FIXTURE_TEARDOWN(routes)
{
}

TEST_F(routes, one_is_none)
{
	RUN("ip route add 10.9.0.0/16 via 10.0.1.2");
	paths_find(&self->paths, "10.9.0.1");
	EXPECT_EQ(0, self->paths.count);
	paths_find(&self->paths, "10.8.0.1");	/* no route at all */
	EXPECT_EQ(0, self->paths.count);
	paths_find(&self->paths, "127.0.0.1");
	EXPECT_EQ(0, self->paths.count);
	paths_find(&self->paths, "no such host");
	EXPECT_EQ(0, self->paths.count);
}

TEST_F(routes, next_hops)
{
	RUN("ip route add 10.9.0.0/16 nexthop via 10.0.1.2 nexthop via 10.0.3.2 nexthop via 10.0.3.3");
	paths_find(&self->paths, "10.9.0.1");
	ASSERT_EQ(2, self->paths.count);
	EXPECT_STREQ("near1", self->paths.path[0].device);
	EXPECT_STREQ("near3", self->paths.path[1].device);
	EXPECT_EQ(NULL, self->paths.path[0].local);
	EXPECT_EQ(NULL, self->paths.path[0].remote);
}

TEST_F(routes, next_hops_of_ipv6)
{
	RUN("ip -6 route add fc09::/64 nexthop via fc00:1::2 nexthop via fc00:2::2 nexthop via fc00:3::2");
	paths_find(&self->paths, "fc09::1");
	EXPECT_EQ(3, self->paths.count);
}

/* Next hops that are objects of their own. */
TEST_F(routes, group)
{
	if (system("ip nexthop add id 1 via 10.0.1.2 dev near1 2>/dev/null"))
		SKIP(return, "no nexthop objects here");
	RUN("ip nexthop add id 2 via 10.0.2.2 dev near2");
	RUN("ip nexthop add id 3 group 1/2");
	RUN("ip route add 10.9.0.0/16 nhid 3");
	paths_find(&self->paths, "10.9.0.1");
	ASSERT_EQ(2, self->paths.count);
	EXPECT_STREQ("near1", self->paths.path[0].device);
	EXPECT_STREQ("near2", self->paths.path[1].device);
}

TEST_F(routes, a_link_that_is_down)
{
	RUN("ip route add 10.9.0.0/16 nexthop via 10.0.1.2 nexthop via 10.0.2.2 nexthop via 10.0.3.2");
	RUN("ip link set far2 down");
	paths_find(&self->paths, "10.9.0.1");
	ASSERT_EQ(2, self->paths.count);
	EXPECT_STREQ("near1", self->paths.path[0].device);
	EXPECT_STREQ("near3", self->paths.path[1].device);
}

TEST_HARNESS_MAIN
