// SPDX-License-Identifier: GPL-2.0
/*
 * The report that is looked at: that it is whole, lets nothing in and fetches nothing, and what
 * is kept of a long run. The runs are played here, with a clock of their own.
 */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kselftest_harness.h"
#include "tool.h"

#define MS 1000000ull
#define PAGE 4096

/* A guest with a working set, and a wire. */
struct play {
	double wire;		/* bytes a second */
	double dirty;		/* pages a second that the guest would write, all of them different */
	double ceiling;		/* from the second round on; 0: none */
	uint64_t pages, working_set, held;
	unsigned int rounds;	/* at most */
	double pause_s;		/* what is left takes no longer: pause */
	uint64_t scan;		/* nanoseconds of each round */
	uint64_t lump;		/* what was sent counts up by so many bytes; 0: steadily */
	uint64_t cap;		/* on the bandwidth, from the beginning; and from the second round on */
	uint64_t later_cap;
};

FIXTURE(html)
{
	struct account account;
	struct timeline timeline;
	struct story story;
	struct kmig_report now;
	char dir[64], path[128];
	char *text;
	size_t length;
};

FIXTURE_SETUP(html)
{
	strcpy(self->dir, "/tmp/kmig-html.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->dir));
	snprintf(self->path, sizeof(self->path), "%s/report.html", self->dir);
	self->account.source = true;
	self->now = (struct kmig_report){ .size = sizeof(self->now), .page_size = PAGE };
	self->story = (struct story){
		.account = &self->account, .timeline = &self->timeline, .guest = "vm1", .to = "host2:4760", .error = "",
		.downtime_ms = 300,
	};
	failure_clear();
}

FIXTURE_TEARDOWN(html)
{
	unlink(self->path);
	rmdir(self->dir);
	timeline_free(&self->timeline);
	account_free(&self->account);
	free(self->text);
}

static void tell(FIXTURE_DATA(html) *self)
{
	self->account.report = self->now;
	account_progress(&self->account, &self->now);
	timeline_add(&self->timeline, &self->now);
}

static void enter(FIXTURE_DATA(html) *self, enum kmig_state state)
{
	self->now.state = state;
	self->now.state_ns[state] = self->now.total_ns;
	tell(self);
}

static void play_round(FIXTURE_DATA(html) *self, const struct play *p, uint64_t pages)
{
	struct kmig_report *r = &self->now;
	uint64_t took = (uint64_t)((double)pages * PAGE / p->wire * 1e9) + MS;
	uint64_t begin = r->total_ns, sent = r->transferred_bytes;
	struct kmig_round_report round = { .round = ++r->rounds, .dirty_pages = pages, .data_pages = pages,
					   .bytes = pages * PAGE, .duration_ns = took };

	while (r->total_ns + 250 * MS < begin + took) {
		r->total_ns += 250 * MS;
		r->transferred_bytes = sent + (uint64_t)((double)(r->total_ns - begin) / 1e9 * p->wire);
		if (p->lump)
			r->transferred_bytes -= (r->transferred_bytes - sent) % p->lump;
		r->remaining_bytes = round.bytes - (r->transferred_bytes - sent);
		tell(self);
	}
	r->total_ns = begin + took;
	r->transferred_bytes = sent + round.bytes;
	r->remaining_bytes = 0;
	round.bytes_per_second = (double)round.bytes / (double)took * 1e9;
	round.dirty_pages_per_second = r->dirty_pages_per_second;
	round.held_pages = r->held_pages;
	round.stun_pages_per_second = r->stun_pages_per_second;
	round.scan_ns = p->scan;
	round.forecast_error = r->rounds > 2 ? 0.04 * r->rounds : 0;
	if (r->state < KMIG_STATE_BLACKOUT)
		r->bytes_per_second = round.bytes_per_second;
	self->account.report = *r;
	account_progress(&self->account, r);
	account_round(&self->account, &round);
	timeline_round(&self->timeline, r, &round);
}

/* Until the blackout; what is then left is returned. */
static uint64_t play(FIXTURE_DATA(html) *self, const struct play *p)
{
	struct kmig_report *r = &self->now;
	uint64_t left = p->pages;

	r->ram_bytes = p->pages * PAGE;
	enter(self, KMIG_STATE_HELLO);
	r->total_ns = 8 * MS;
	enter(self, KMIG_STATE_CAPACITY);
	r->total_ns = 500 * MS;
	enter(self, KMIG_STATE_CHANNELS);
	r->max_bandwidth = p->cap;
	r->setup_ns = r->total_ns = 510 * MS;
	enter(self, KMIG_STATE_FIRST_PASS);
	while (r->rounds < p->rounds) {
		uint64_t begin = r->total_ns;
		double most = p->dirty, dirty;

		if (r->stun_pages_per_second > 0 && r->stun_pages_per_second < most)
			most = r->stun_pages_per_second;
		play_round(self, p, left);
		dirty = most * (double)(r->total_ns - begin) / 1e9;
		if (dirty > (double)p->working_set)
			dirty = (double)p->working_set;
		left = (uint64_t)dirty;
		r->max_bandwidth = p->later_cap;
		r->dirty_pages_per_second = dirty / (double)(r->total_ns - begin) * 1e9;
		r->remaining_bytes = left * PAGE;
		if (left * PAGE / p->wire <= p->pause_s)
			break;
		r->stun_pages_per_second = p->ceiling;
		r->held_pages = p->held;
		if (r->state != KMIG_STATE_ITERATION)
			enter(self, KMIG_STATE_ITERATION);
		if (!r->forecast.total_ns)
			r->forecast = (struct kmig_forecast){ .converges = true, .rounds = 5, .bytes = 3 * left * PAGE,
				.total_ns = (uint64_t)((double)(3 * left * PAGE) / p->wire * 1e9), .downtime_ns = 280 * MS,
				.stun_pages_per_second = p->ceiling };
	}
	return left;
}

static void complete(FIXTURE_DATA(html) *self, const struct play *p, uint64_t left)
{
	struct kmig_report *r = &self->now;
	struct kmig_downtime *d = &r->downtime;

	left += r->held_pages;
	r->stun_pages_per_second = 0;
	enter(self, KMIG_STATE_BLACKOUT);
	r->total_ns += d->pause_ns = 2 * MS;
	r->total_ns += d->save_ns = 24 * MS;
	play_round(self, p, left);
	d->memory_ns = r->total_ns - r->state_ns[KMIG_STATE_BLACKOUT] - 26 * MS;
	r->memory_harvest_ns = d->memory_ns / 4;
	r->memory_copy_ns = d->memory_ns - r->memory_harvest_ns;
	r->held_pages = 0;
	enter(self, KMIG_STATE_CHECK);
	r->total_ns += d->digest_ns = 11 * MS;
	r->total_ns += d->load_ns = 31 * MS;
	r->total_ns += d->commit_ns = 1 * MS;
	r->total_ns += d->resume_ns = 700000;
	r->downtime_ns = r->total_ns - r->state_ns[KMIG_STATE_BLACKOUT];
	enter(self, KMIG_STATE_CLEANUP);
	r->total_ns += 40 * MS;
	r->verdict = KMIG_COMPLETED;
	r->decision = "what is left fits the downtime";
	r->guest = (struct kmig_guest_cost){ .write_faults = 48211, .fault_ns = 210 * MS };
	if (p->ceiling > 0) {
		r->guest.stuns = 9120;
		r->guest.stun_ns = r->total_ns / 2;
		r->guest.stun_max_ns = 10 * MS;
		r->guest.threads = 2;
		r->guest.thread[0].id = 4711;
		r->guest.thread[0].stuns = 7000;
		r->guest.thread[0].stun_ns = r->total_ns / 3;
		r->guest.thread[1].id = 4712;
		r->guest.thread[1].stuns = 2120;
		r->guest.thread[1].stun_ns = r->total_ns / 6;
	}
	tell(self);
}

static void fail_with(FIXTURE_DATA(html) *self, const char *error)
{
	self->now.verdict = KMIG_FAILED;
	self->now.total_ns += 10 * MS;
	tell(self);
	self->story.error = error;
}

/* Written, read again, and seen to be well-formed by somebody else, where there is one. */
static void read_back(struct __test_metadata *_metadata, FIXTURE_DATA(html) *self)
{
	static const char check[] = "python3 -c 'import sys, xml.etree.ElementTree as e; e.parse(sys.argv[1])' ";
	char command[256];
	struct stat st;
	FILE *file;

	ASSERT_EQ(0, html_write(&self->story, self->path)) TH_LOG("%s", failure());
	ASSERT_EQ(0, stat(self->path, &st));
	free(self->text);
	self->text = calloc(1, (size_t)st.st_size + 1);
	file = fopen(self->path, "r");
	ASSERT_NE(NULL, file);
	self->length = fread(self->text, 1, (size_t)st.st_size, file);
	fclose(file);
	ASSERT_EQ((size_t)st.st_size, self->length);
	EXPECT_EQ(self->length, strlen(self->text));
	if (!system("command -v python3 >/dev/null")) {
		snprintf(command, sizeof(command), "%s%s", check, self->path);
		EXPECT_EQ(0, system(command));
	}
}

static const char *find(FIXTURE_DATA(html) *self, const char *what)
{
	return strstr(self->text, what);
}

/* Nothing that is no number is drawn, nothing is fetched, nothing runs. */
static void look(struct __test_metadata *_metadata, FIXTURE_DATA(html) *self)
{
	static const char *const never[] = {
		"nan", "inf\"", "-inf", "http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link",
		" onload", " onerror", " onclick", "style=\"width:-",
	};
	size_t i;

	read_back(_metadata, self);
	for (i = 0; i < sizeof(never) / sizeof(never[0]); i++) {
		const char *at = find(self, never[i]);

		EXPECT_EQ(NULL, at) TH_LOG("it has: %.60s", at);
	}
}

/* Between two bars of the downtime, in units of the picture; less than a tenth is none. */
static int gap_between(FIXTURE_DATA(html) *self, const char *one, const char *other)
{
	const char *name[2] = { one, other };
	double x[2], width[2];
	char title[64];
	int i;

	for (i = 0; i < 2; i++) {
		const char *at;

		snprintf(title, sizeof(title), "<title>%s: ", name[i]);
		at = find(self, title);
		at = at ? strstr(at, "<rect ") : NULL;
		if (!at || sscanf(at, "<rect class=\"%*[a-z]\" x=\"%lf\" y=\"%*f\" width=\"%lf\"", &x[i], &width[i]) != 2)
			return -1;
	}
	return (int)(10 * (x[1] - x[0] - width[0]));
}

TEST_F(html, stunned)
{
	struct play p = { .wire = 118e6, .dirty = 144000, .ceiling = 14400, .pages = 2048 << 8, .working_set = 400000,
			  .held = 2100, .rounds = 30, .pause_s = 0.12, .scan = 7500000 };

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "Moved:</span> <span class=\"name\">vm1</span> to <span class=\"name\">host2:4760"));
	EXPECT_NE(NULL, find(self, "the most it was let dirty"));
	EXPECT_NE(NULL, find(self, "held back until the pause"));
	EXPECT_NE(NULL, find(self, "\"good\">within the limit of 300 ms<"));
	EXPECT_NE(NULL, find(self, ">device state out</text>"));
	EXPECT_NE(NULL, find(self, ">last harvest</text>"));
	EXPECT_NE(NULL, find(self, ">last copy</text>"));
	EXPECT_NE(NULL, find(self, "<th>took</th><th>of it<br/>scan</th><th>MB/s</th>"));
	EXPECT_NE(NULL, find(self, "<td>7.5 ms</td>"));
	/* Each begins where the one before it ends. */
	EXPECT_EQ(0, gap_between(self, "last harvest", "last copy"));
	EXPECT_EQ(0, gap_between(self, "last copy", "digests"));
	EXPECT_NE(NULL, find(self, "What the guest felt"));
	EXPECT_NE(NULL, find(self, "<td>4711</td>"));
	EXPECT_NE(NULL, find(self, ">guest paused 253 ms</text>"));
	EXPECT_NE(NULL, find(self, "<b>118 MB/s</b>"));
	EXPECT_NE(NULL, find(self, "The forecast, and what came"));
}

TEST_F(html, short_run)
{
	struct play p = { .wire = 1.1e9, .dirty = 2000, .pages = 128 << 8, .working_set = 3000, .rounds = 30,
			  .pause_s = 0.0005 };

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	EXPECT_EQ(NULL, find(self, "(stun)"));
	EXPECT_EQ(NULL, find(self, "line cap"));
	EXPECT_EQ(NULL, find(self, "might be sent"));
	EXPECT_EQ(NULL, find(self, "of it<br/>scan"));
	EXPECT_EQ(NULL, find(self, "held back"));
	EXPECT_NE(NULL, find(self, ">600</text>"));
}

/* On a slow link what was sent counts up by a chunk, seldom: the wire was not idle between. */
TEST_F(html, slow_link)
{
	struct play p = { .wire = 3e6, .dirty = 100, .pages = 100 << 8, .working_set = 3000, .rounds = 30,
			  .pause_s = 0.5, .lump = 2 << 20 };
	int idle = 0, steps = 0;
	double base, x, y, to;
	const char *at;

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	at = find(self, "<path class=\"area wire\" d=\"M");
	ASSERT_NE(NULL, at);
	at = strchr(at, 'M');
	ASSERT_EQ(2, sscanf(at, "M%lf %lf", &x, &base));
	while ((at = strpbrk(at + 1, "L\"")) && sscanf(at, "L%lf %lfH%lf", &x, &y, &to) == 3) {
		steps++;
		idle += y > base - 1;
	}
	EXPECT_LT(10, steps);
	/* Paused, devices are loaded and nothing is sent. */
	EXPECT_GE(2, idle);
}

/* The steps of the cap's line, at most @most: where each begins and ends, and how high it is. */
static size_t cap_steps(FIXTURE_DATA(html) *self, double step[][3], size_t most)
{
	static const char path[] = "<path class=\"line cap\" d=\"M";
	const char *at = find(self, "<svg class=\"chart\"");
	size_t n = 0;

	at = at ? strstr(at, path) : NULL;
	for (at = at ? at + strlen(path) - 1 : NULL; at && n < most; at = strpbrk(at + 1, "LM\"")) {
		if (sscanf(at + 1, "%lf %lfH%lf", &step[n][0], &step[n][2], &step[n][1]) != 3)
			break;
		n++;
	}
	return n;
}

/* Half of it from the second round on: the line goes down there, by half, and on to the end. */
TEST_F(html, capped)
{
	struct play p = { .wire = 8e6, .dirty = 500, .pages = 100 << 8, .working_set = 20000, .rounds = 4, .pause_s = 0.1,
			  .cap = 8000000, .later_cap = 4000000 };
	double step[4][3], base = 250;

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	ASSERT_EQ(2, cap_steps(self, step, 4));
	EXPECT_EQ(58, step[0][0]);
	EXPECT_EQ(step[0][1], step[1][0]);
	EXPECT_EQ(808, step[1][1]);
	EXPECT_GT(0.2, fabs(base - step[0][2] - 2 * (base - step[1][2])));
	EXPECT_NE(NULL, find(self, "the most that might be sent (--max-bandwidth)</span>"));
	EXPECT_NE(NULL, find(self, "What might be sent: no more than 8.00 MB/s; from 13.6 s on no more than 4.00 MB/s.</small></p>"));
}

/* Until it ends there is a line, and what it was is said. */
TEST_F(html, capped_for_a_while)
{
	struct play p = { .wire = 8e6, .dirty = 500, .pages = 100 << 8, .working_set = 20000, .rounds = 4, .pause_s = 0.1,
			  .cap = 8000000 };
	double step[4][3];

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	ASSERT_EQ(1, cap_steps(self, step, 4));
	EXPECT_GT(808, step[0][1]);
	EXPECT_NE(NULL, find(self, "no more than 8.00 MB/s; from 13.6 s on what the network takes.</small></p>"));
}

/* One that is never reached makes nothing else small: it is only said. */
TEST_F(html, capped_far_above)
{
	struct play p = { .wire = 8e6, .dirty = 500, .pages = 100 << 8, .working_set = 20000, .rounds = 4, .pause_s = 0.1,
			  .cap = 8000000000, .later_cap = 8000000000 };
	double step[4][3];

	complete(self, &p, play(self, &p));
	look(_metadata, self);
	EXPECT_EQ(0, cap_steps(self, step, 4));
	EXPECT_NE(NULL, find(self, ">8</text>"));
	EXPECT_EQ(NULL, find(self, ">10</text>\n<text class=\"end\" x=\"50\" y=\"26\">MB/s"));
	EXPECT_NE(NULL, find(self, "What might be sent: no more than 8000 MB/s.</small></p>"));
}

/* Changed all the time, for long: the line stays whole, the file small. */
TEST_F(html, capped_and_capped_again)
{
	struct play p = { .wire = 8e6, .pages = 100 << 8, .rounds = 1 };
	struct kmig_report *r = &self->now;
	double step[2000][3];
	size_t n, i;

	play(self, &p);
	for (i = 0; i < 100000; i++) {
		r->total_ns += MS;
		r->max_bandwidth = 4000000 + i % 2;
		tell(self);
	}
	fail_with(self, "aborted");
	EXPECT_EQ(100000, self->account.cap_count);
	look(_metadata, self);
	n = cap_steps(self, step, 2000);
	EXPECT_LT(100, n);
	EXPECT_GT(2000, n);
	for (i = 1; i < n; i++)
		ASSERT_EQ(step[i - 1][1], step[i][0]);
	EXPECT_EQ(808, step[n - 1][1]);
	EXPECT_NE(NULL, find(self, "; and 99994 changes more.</small></p>"));
	EXPECT_GE(1 << 19, self->length);
}

TEST_F(html, one_round)
{
	struct play p = { .wire = 118e6, .pages = 256 << 8, .rounds = 30, .pause_s = 1 };

	self->story.downtime_ms = 20;
	complete(self, &p, play(self, &p));
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "\"bad\">above the limit of 20 ms<"));
	EXPECT_EQ(NULL, find(self, "The forecast"));
}

/* It fails in the midst of a round, with words that would be more than words. */
TEST_F(html, hostile)
{
	static const char error[] =
		"</p><script>alert('1')</script><img src=x onerror=\"a()\"> &amp; ]]> --> \x01\x1b \x80\xff \xc0\xaf "
		"\xed\xa0\x80 \xef\xbf\xbf\xef\xbf\xbe \xf5\x80\x80\x80 \xc3\xa4 \xf0\x9f\x98\x80 \xe2\x82";
	static const char escaped[] =
		">&lt;/p&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&lt;img src=x onerror=&quot;a()&quot;&gt; "
		"&amp;amp; ]]&gt; --&gt; &#xfffd;&#xfffd; &#xfffd;&#xfffd; &#xfffd;&#xfffd; &#xfffd;&#xfffd;&#xfffd; "
		"&#xfffd;&#xfffd;&#xfffd;&#xfffd;&#xfffd;&#xfffd; &#xfffd;&#xfffd;&#xfffd;&#xfffd; \xc3\xa4 \xf0\x9f\x98\x80 &#xfffd;&#xfffd;</p>";
	struct play p = { .wire = 118e6, .dirty = 40000, .pages = 512 << 8, .working_set = 50000, .rounds = 3 };

	play(self, &p);
	self->now.total_ns += 700 * MS;
	self->now.transferred_bytes += 80000000;
	self->now.remaining_bytes -= 80000000;
	self->story.guest = "<b>vm</b>\"'&";
	self->story.to = "http://x\x1b[31m";
	fail_with(self, error);
	read_back(_metadata, self);
	EXPECT_NE(NULL, find(self, escaped));
	EXPECT_NE(NULL, find(self, "Not moved:</span> <span class=\"name\">&lt;b&gt;vm&lt;/b&gt;&quot;&#39;&amp;</span>"));
	EXPECT_NE(NULL, find(self, ">http://x&#xfffd;[31m</span>"));
	EXPECT_EQ(NULL, find(self, "downtime was made of"));
}

/* Days of it: what is kept does not grow, and is still all of it. */
TEST_F(html, thousands_of_rounds)
{
	struct play p = { .wire = 118e6, .dirty = 60000, .pages = 512 << 8, .working_set = 50000, .rounds = 5000 };
	struct timeline *t = &self->timeline;
	size_t i;

	complete(self, &p, play(self, &p));
	EXPECT_EQ(5001, t->rounds);
	EXPECT_LE(TIMELINE_MAX / 4, t->count);
	EXPECT_GE(TIMELINE_MAX, t->count);
	EXPECT_EQ(0, t->sample[0].at_ns);
	EXPECT_EQ(self->now.total_ns, t->sample[t->count - 1].at_ns);
	EXPECT_EQ(self->now.transferred_bytes, t->sample[t->count - 1].transferred_bytes);
	for (i = 1; i < t->count; i++)
		ASSERT_LE(t->sample[i - 1].at_ns, t->sample[i].at_ns) TH_LOG("sample %zu", i);
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "4951 rounds are left out here"));
	EXPECT_NE(NULL, find(self, "<td>1</td>"));
	EXPECT_NE(NULL, find(self, "<td>5001 <small>paused</small></td>"));
	EXPECT_GE(1 << 20, self->length);
}

/* Whatever the number of samples is, the first and the last are there. */
TEST(thinning)
{
	struct timeline *t = calloc(1, sizeof(*t));
	struct kmig_report now = { 0 };
	uint64_t n;

	for (n = 1; n <= 20 * TIMELINE_MAX; n++) {
		now.total_ns = 10 * n;
		timeline_add(t, &now);
		ASSERT_EQ(10, t->sample[0].at_ns);
		ASSERT_EQ(now.total_ns, t->sample[t->count - 1].at_ns);
		ASSERT_GE(TIMELINE_MAX, t->count);
		ASSERT_TRUE(n <= TIMELINE_MAX ? t->count == n : t->count > TIMELINE_MAX / 2 - 1);
	}
	/* A clock that goes back would draw a line that does. */
	now.total_ns = 11;
	timeline_add(t, &now);
	EXPECT_EQ(10 * 20 * TIMELINE_MAX, t->sample[t->count - 1].at_ns);
	timeline_free(t);
	free(t);
}

TEST_F(html, empty)
{
	self->story.error = "no /dev/lmtrack";
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "Nothing was sent."));
	tell(self);
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "Nothing was sent."));
	/* Nothing but that time went by; and then only that it began. */
	fail_with(self, "no destination");
	look(_metadata, self);
	EXPECT_NE(NULL, find(self, "Nothing was sent."));
	enter(self, KMIG_STATE_FIRST_PASS);
	look(_metadata, self);
	EXPECT_EQ(NULL, find(self, "Nothing was sent."));
	EXPECT_NE(NULL, find(self, "no destination"));
}

TEST_F(html, not_writable)
{
	char text[256];

	strcpy(self->path, "/proc/nowhere/x.html");
	EXPECT_EQ(-ENOENT, html_write(&self->story, self->path));
	snprintf(text, sizeof(text), "report %s: No such file or directory", self->path);
	EXPECT_STREQ(text, failure());
}

/* Which report is meant, the ending says; one does not stand for the other. */
TEST_F(html, command)
{
	char self_path[PATH_MAX], command[2 * PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", self_path, sizeof(self_path) - 1);
	struct stat st;

	ASSERT_LT(0, n);
	self_path[n] = '\0';
	*strrchr(self_path, '/') = '\0';
	/* Nothing listens there: it fails, and tells of it in all ways. */
	snprintf(command, sizeof(command),
		 "cd %s && (umask 077; echo 0123456789abcdef >secret) && "
		 "%s/../tools/kmig qemu migrate --qmp './<none>' --to ::1 --secret secret --report report.html --report json "
		 ">/dev/null 2>&1; test $? = 1 && rm secret && grep -q '\"status\": \"failed\"' json && rm json",
		 self->dir, self_path);
	EXPECT_EQ(0, system(command)) TH_LOG("%s", command);
	EXPECT_EQ(0, stat(self->path, &st));
	snprintf(command, sizeof(command), "grep -q 'Not moved:.*./&lt;none&gt;.* to .*\\[::1\\]:4760' %s", self->path);
	EXPECT_EQ(0, system(command)) TH_LOG("%s", command);
	/* A page that cannot be written is told of. */
	snprintf(command, sizeof(command),
		 "cd %s && (umask 077; echo 0123456789abcdef >secret) && "
		 "%s/../tools/kmig qemu migrate --qmp none --to ::1 --secret secret --report none/x.html 2>&1 >/dev/null |"
		 "grep -q 'kmig: report none/x.html: No such file or directory'; ret=$?; rm secret; exit $ret",
		 self->dir, self_path);
	EXPECT_EQ(0, system(command)) TH_LOG("%s", command);
}

TEST_HARNESS_MAIN
