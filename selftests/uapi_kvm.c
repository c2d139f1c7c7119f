// SPDX-License-Identifier: GPL-2.0
/*
 * No write of a KVM guest is lost. The guest is a dozen instructions that increment a word in
 * each page of its memory, pass after pass; its memory is a region, mapped by a process of its
 * own. After each comparison's last harvest the shadow must equal the region byte by byte.
 */
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "kselftest_harness.h"
#include "lmtrack_test.h"

#define PAGES		2048UL
#define BYTES		(PAGES * PAGE)
#define CODE		0x1000UL
#define FIRST		0x10000UL	/* memory the guest writes begins here */
#define WORDS		(PAGE / sizeof(uint64_t))

struct control {
	volatile int pause;
	volatile int stop;
	volatile int resting;
	volatile int failed;
	uint64_t passes;
};

/* 32-bit code: for (ebx = FIRST; ebx < BYTES; ebx += PAGE) ++*ebx; out 0x10, al; again. */
static void load_guest(char *memory)
{
	uint32_t first = FIRST, step = PAGE, end = BYTES;
	unsigned char code[] = {
		0xbb, 0, 0, 0, 0,		/* mov ebx, first */
		0xff, 0x03,			/* inc dword [ebx] */
		0x81, 0xc3, 0, 0, 0, 0,		/* add ebx, step */
		0x81, 0xfb, 0, 0, 0, 0,		/* cmp ebx, end */
		0x72, 0xf0,			/* jb: back 16 */
		0xe6, 0x10,			/* out 0x10, al */
		0xeb, 0xe7,			/* jmp: back 25 */
	};

	memcpy(code + 1, &first, 4);
	memcpy(code + 9, &step, 4);
	memcpy(code + 15, &end, 4);
	memcpy(memory + CODE, code, sizeof(code));
}

static int vcpu_protected_mode(int vcpu)
{
	struct kvm_segment code = {
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_segment data = code;
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	struct kvm_sregs sregs;

	data.type = 3;
	data.selector = 16;
	if (ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return -1;
	sregs.cr0 |= 1;
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	return ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs) ? -1 : 0;
}

static int guest_run(struct control *control, int kvm, int fd)
{
	struct kvm_userspace_memory_region slot = { .memory_size = BYTES };
	struct kvm_run *run;
	void *memory = lmt_map(fd, BYTES);
	int vm, vcpu, bytes;

	if (memory == MAP_FAILED)
		return -1;
	load_guest(memory);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	slot.userspace_addr = (uintptr_t)memory;
	if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
		return -1;
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (vcpu < 0 || bytes < 0)
		return -1;
	run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED || vcpu_protected_mode(vcpu))
		return -1;
	while (!control->stop) {
		if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "# the guest stopped: exit reason %u\n", run->exit_reason);
			return -1;
		}
		control->passes++;
		while (control->pause && !control->stop) {
			control->resting = 1;
			sched_yield();
		}
		control->resting = 0;
	}
	return 0;
}

FIXTURE(kvm) {
	int kvm;
	int fd;
	pid_t guest;
	uint64_t *memory;
	uint64_t *shadow;
	uint64_t *bitmap;
	struct control *control;
};

FIXTURE_SETUP(kvm)
{
	self->guest = -1;
	self->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (self->kvm < 0)
		SKIP(return, "no /dev/kvm here");
	self->control = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE((void *)self->control, MAP_FAILED);
	self->fd = lmt_region(BYTES);
	ASSERT_GE(self->fd, 0);
	self->memory = lmt_map(self->fd, BYTES);
	ASSERT_NE((void *)self->memory, MAP_FAILED);
	self->shadow = calloc(1, BYTES);
	self->bitmap = calloc(PAGES / 64, 8);
	self->guest = fork();
	if (!self->guest) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		self->control->failed = guest_run(self->control, self->kvm, self->fd) < 0;
		_exit(0);
	}
	while (!self->control->passes && !self->control->failed)
		sched_yield();
	ASSERT_EQ(self->control->failed, 0);
}

FIXTURE_TEARDOWN(kvm)
{
	if (self->guest < 0)
		return;
	self->control->stop = 1;
	waitpid(self->guest, NULL, 0);
	free(self->shadow);
	free(self->bitmap);
	munmap(self->memory, BYTES);
	close(self->fd);
	close(self->kvm);
}

static long harvest(FIXTURE_DATA(kvm) *self)
{
	long dirty = lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap);

	for (unsigned long page = 0; dirty > 0 && page < PAGES; page++)
		if (lmt_bit(self->bitmap, page))
			memcpy(self->shadow + page * WORDS, self->memory + page * WORDS, PAGE);
	return dirty;
}

static long compare(FIXTURE_DATA(kvm) *self)
{
	long differing = 0, dirty;

	self->control->pause = 1;
	while (!self->control->resting && !self->control->failed)
		sched_yield();
	dirty = harvest(self);
	if (dirty < 0)
		return dirty;
	for (unsigned long page = 0; page < PAGES; page++)
		differing += !!memcmp(self->shadow + page * WORDS, self->memory + page * WORDS,
				      PAGE);
	self->control->pause = 0;
	while (self->control->resting && !self->control->failed)
		sched_yield();
	return differing;
}

static void run(struct __test_metadata *_metadata, FIXTURE_DATA(kvm) *self, bool punch)
{
	uint64_t before = self->control->passes;
	unsigned int page = FIRST / PAGE;

	ASSERT_EQ(lmt_start(self->fd, 0, NULL), 0);
	/* However slow the guest is here: both sides have worked. */
	for (unsigned int i = 1; i <= 400 || self->control->passes < before + 40; i++) {
		ASSERT_GE(harvest(self), 0);
		ASSERT_EQ(self->control->failed, 0);
		if (punch) {
			ASSERT_EQ(lmt_punch(self->fd, page * PAGE, 32 * PAGE), 0);
			page = FIRST / PAGE + (page * 7 + 13) % (PAGES - 64);
		}
		if (i % 20 == 0)
			ASSERT_EQ(compare(self), 0);
	}
	ASSERT_EQ(lmt_stop(self->fd), 0);
	fprintf(stderr, "# %lu passes of the guest over %lu pages, 0 pages lost\n",
		(unsigned long)(self->control->passes - before), PAGES);
}

TEST_F_TIMEOUT(kvm, guest_writes, 240)
{
	run(_metadata, self, false);
}

TEST_F_TIMEOUT(kvm, guest_writes_while_ballooned, 240)
{
	run(_metadata, self, true);
}

/* What the guest wrote last before it was stopped is in the next harvest, and nothing else. */
TEST_F_TIMEOUT(kvm, final_harvest, 120)
{
	ASSERT_EQ(lmt_start(self->fd, 0, NULL), 0);
	ASSERT_EQ(compare(self), 0);
	self->control->pause = 1;
	while (!self->control->resting)
		sched_yield();
	ASSERT_GE(harvest(self), 0);
	EXPECT_EQ(harvest(self), 0);
	EXPECT_EQ(memcmp(self->shadow, self->memory, BYTES), 0);
}

/*
 * The guest's processor is the thread that is delayed: it dirties no more than the ceiling, and
 * nothing is lost on the way.
 */
TEST_F_TIMEOUT(kvm, guest_is_stunned, 240)
{
	struct lmtrack_stun_set set = {
		.size = sizeof(set), .rate = 100, .burst = 1,
		.max_delay_us = LMTRACK_STUN_DELAY_MAX_US,
	};
	struct lmtrack_stun_thread thread;
	struct lmtrack_stun_stats stats = {
		.size = sizeof(stats), .threads = (uintptr_t)&thread, .thread_count = 1,
	};
	uint64_t dirtied, passes;
	double begin, seconds;

	ASSERT_EQ(lmt_start(self->fd, 0, NULL), 0);
	ASSERT_GE(harvest(self), 0);
	ASSERT_EQ(lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set), 0);
	begin = lmt_seconds();
	dirtied = lmt_stats(self->fd).dirtied_pages;
	while (lmt_seconds() < begin + 4) {
		ASSERT_GE(harvest(self), 0);
		usleep(100000);
	}
	dirtied = lmt_stats(self->fd).dirtied_pages - dirtied;
	seconds = lmt_seconds() - begin;
	ASSERT_EQ(lmt_ioctl(self->fd, LMTRACK_STUN_STATS, &stats), 0);
	fprintf(stderr, "# %.0f pages/s of 100, %lu delays, the longest %.1f ms\n",
		dirtied / seconds, (unsigned long)stats.stuns, stats.longest_ns * 1e-6);
	EXPECT_GT(dirtied, 0);
	EXPECT_LT(dirtied, 100 * seconds * 1.05 + 1);
	EXPECT_GT(stats.stuns, 0);
	EXPECT_EQ(thread.pid, self->guest);
	/* It goes on while the figures are read. */
	EXPECT_GE(thread.stuns + 1, stats.stuns);
	EXPECT_EQ(compare(self), 0);

	/* Let go, it passes over all its pages again; held, a pass would take twenty seconds. */
	set.rate = 0;
	ASSERT_EQ(lmt_ioctl(self->fd, LMTRACK_STUN_SET, &set), 0);
	passes = self->control->passes;
	begin = lmt_seconds();
	while (self->control->passes < passes + 6 && lmt_seconds() < begin + 60)
		ASSERT_GE(harvest(self), 0);
	EXPECT_GE(self->control->passes, passes + 6);
	EXPECT_EQ(compare(self), 0);
	ASSERT_EQ(lmt_stop(self->fd), 0);
}

TEST_HARNESS_MAIN
