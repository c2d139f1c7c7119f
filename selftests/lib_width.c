// SPDX-License-Identifier: GPL-2.0
/* How many channels it takes, on links that are made up: time is a variable. */
#include "kselftest_harness.h"

#include "../lib/width.h"

#define TICK_NS 20000000ull

struct link {
	uint64_t now, bytes;
	double each, all;	/* bytes a second, that a channel and that all of them can carry at most */
};

/* Send for so long; how often the number has changed. */
static unsigned int send_for(struct kmig_width *width, struct link *link, double seconds)
{
	unsigned int changes = 0;

	for (uint64_t end = link->now + seconds * 1e9; link->now < end; link->now += TICK_NS) {
		double rate = width->channels * link->each;

		link->bytes += (rate < link->all ? rate : link->all) * TICK_NS / 1e9;
		changes += kmig_width_look(width, link->now, link->bytes);
	}
	return changes;
}

TEST(as_many_as_it_takes)
{
	struct link link = { .now = 1, .each = 100e6, .all = 350e6 };
	struct kmig_width width;

	/* Four carry 350, five no more. */
	kmig_width_start(&width, 1, 16, 0);
	EXPECT_EQ(1, width.channels);
	send_for(&width, &link, 10);
	EXPECT_EQ(4, width.channels);
	EXPECT_STREQ("more of them carried no more", width.why);
	EXPECT_EQ(0, send_for(&width, &link, 10));
}

TEST(one_is_enough)
{
	struct link link = { .now = 1, .each = 100e6, .all = 100e6 };
	struct kmig_width width;

	kmig_width_start(&width, 1, 16, 0);
	EXPECT_EQ(2, send_for(&width, &link, 10));
	EXPECT_EQ(1, width.channels);
}

/* Over three paths, three at a time. */
TEST(steps)
{
	struct link link = { .now = 1, .each = 100e6, .all = 900e6 };
	struct kmig_width width;

	kmig_width_start(&width, 3, 64, 0);
	send_for(&width, &link, 10);
	EXPECT_EQ(9, width.channels);
}

TEST(no_more_than_processors)
{
	struct link link = { .now = 1, .each = 100e6, .all = 1e12 };
	struct kmig_width width;

	kmig_width_start(&width, 2, 5, 0);
	send_for(&width, &link, 10);
	EXPECT_EQ(5, width.channels);
	EXPECT_STREQ("there are no more processors", width.why);
	kmig_width_start(&width, 4, 4, 0);
	EXPECT_EQ(0, send_for(&width, &link, 10));
	EXPECT_EQ(4, width.channels);
	EXPECT_STREQ("there are no more processors", width.why);
}

/* A round that is over before anything was learnt says nothing, nor does the pause after it. */
TEST(short_rounds)
{
	struct link link = { .now = 1, .each = 100e6, .all = 1e9 };
	struct kmig_width width;

	kmig_width_start(&width, 1, 16, 0);
	for (int i = 0; i < 50; i++) {
		EXPECT_EQ(0, send_for(&width, &link, 0.4));
		kmig_width_pause(&width);
		link.now += 1000000000;
	}
	EXPECT_EQ(NULL, width.why);
	EXPECT_EQ(1, send_for(&width, &link, 0.6));
}

/* What had arrived over a channel that is lost is not counted any more. */
TEST(a_loss)
{
	struct link link = { .now = 1, .each = 100e6, .all = 250e6 };
	struct kmig_width width;

	kmig_width_start(&width, 1, 16, 0);
	send_for(&width, &link, 0.9);
	EXPECT_EQ(2, width.channels);
	link.bytes /= 2;
	send_for(&width, &link, 10);
	EXPECT_EQ(3, width.channels);
}

/* Before the new ones are up to speed nothing is measured, however long that takes. */
TEST(a_long_way)
{
	struct link link = { .now = 1, .each = 100e6, .all = 1e9 };
	struct kmig_width width;

	kmig_width_start(&width, 1, 16, 200000000);
	EXPECT_EQ(0, send_for(&width, &link, 2.4));
	EXPECT_EQ(1, send_for(&width, &link, 0.3));
}

TEST_HARNESS_MAIN
