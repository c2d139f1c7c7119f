// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=recvmsg -Wl,--wrap=sendmsg
/*
 * The writer is a KVM guest, its memory the first region, under each of the trackers: external
 * with KVM's own dirty log.
 */
#include "lib_tracker.h"

#include <linux/kvm.h>

#define GUEST_CODE 0x1000u
#define GUEST_FIRST 0x10000u

static struct {
	int vm, vcpu;
	struct kvm_run *run;
	struct kvm_userspace_memory_region slot;
	_Atomic bool stop, failed;
	_Atomic uint64_t passes;
} guest;

/* for (ebx = FIRST; ebx < end; ebx += PAGE) ++*ebx; out 0x10, al; again */
static void load_guest(uint8_t *memory, uint32_t end)
{
	static const uint8_t code[] = {
		0xbb, 0, 0, 0, 0, 0xff, 0x03, 0x81, 0xc3, 0, 0x10, 0, 0, 0x81, 0xfb, 0, 0, 0, 0,
		0x72, 0xf0, 0xe6, 0x10, 0xeb, 0xe7,
	};
	uint32_t first = GUEST_FIRST;

	memcpy(memory + GUEST_CODE, code, sizeof(code));
	memcpy(memory + GUEST_CODE + 1, &first, 4);
	memcpy(memory + GUEST_CODE + 15, &end, 4);
}

static int set_up_vcpu(void)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1 };
	struct kvm_segment data = code;
	struct kvm_regs regs = { .rip = GUEST_CODE, .rflags = 2 };
	struct kvm_sregs sregs;

	data.type = 3;
	data.selector = 16;
	if (ioctl(guest.vcpu, KVM_GET_SREGS, &sregs))
		return -1;
	sregs.cr0 |= 1;
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	return ioctl(guest.vcpu, KVM_SET_SREGS, &sregs) || ioctl(guest.vcpu, KVM_SET_REGS, &regs);
}

static int new_guest(int kvm, const struct kmig_region *region)
{
	int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	load_guest(region->map, region->bytes);
	guest.vm = ioctl(kvm, KVM_CREATE_VM, 0);
	guest.slot = (struct kvm_userspace_memory_region){
		.memory_size = region->bytes,
		.userspace_addr = (uintptr_t)region->map,
	};
	if (bytes < 0 || guest.vm < 0 || ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &guest.slot))
		return -1;
	guest.vcpu = ioctl(guest.vm, KVM_CREATE_VCPU, 0);
	guest.run = guest.vcpu < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest.vcpu, 0);
	return guest.run == MAP_FAILED ? -1 : set_up_vcpu();
}

static void *vcpu_main(void *data)
{
	while (!guest.stop) {
		if (ioctl(guest.vcpu, KVM_RUN, 0) || guest.run->exit_reason != KVM_EXIT_IO) {
			guest.failed = true;
			break;
		}
		guest.passes++;
	}
	return data;
}

/* What a VMM on KVM does for the tracker external. */
static int kvm_track(bool on, void *data)
{
	guest.slot.flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	logging = on;
	(void)data;
	return ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &guest.slot) ? -errno : 0;
}

static int kvm_dirty(unsigned int region, uint64_t first, uint64_t pages, uint64_t *bitmap, void *data)
{
	static uint64_t scratch[(16 * MIB / PAGE_BYTES + 5 + 63) / 64];
	struct kvm_dirty_log log = { .dirty_bitmap = scratch };

	if (!region) {
		if (ioctl(guest.vm, KVM_GET_DIRTY_LOG, &log))
			return -errno;
		for (uint64_t word = 0; word < (pages + 63) / 64; word++)
			bitmap[word] |= scratch[first / 64 + word];
	}
	return give_dirty(region, first, pages, bitmap, data);
}

FIXTURE(kvm) {
	struct kmig_ctx *ctx;
	struct kmig_region *regions[REGIONS];
	struct kmig_tracker *tracker;
	struct world_of_pages world;
	int socks[CHANNELS_MAX];
	uint32_t number;
	struct kmig_round round;
	pthread_t thread;
	int kvm;
};

FIXTURE_VARIANT(kvm) {
	enum kmig_tracker_kind kind;
	unsigned int channels;
};

FIXTURE_VARIANT_ADD(kvm, lmtrack) { .kind = KMIG_TRACKER_LMTRACK, .channels = 2 };
FIXTURE_VARIANT_ADD(kvm, pagemap) { .kind = KMIG_TRACKER_PAGEMAP, .channels = 2 };
FIXTURE_VARIANT_ADD(kvm, external) { .kind = KMIG_TRACKER_EXTERNAL, .channels = 2 };

FIXTURE_SETUP(kvm)
{
	self->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (self->kvm < 0)
		SKIP(return, "no /dev/kvm here");
	SET_UP_REGIONS();
	ASSERT_EQ(0, new_guest(self->kvm, self->regions[0]));
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, vcpu_main, NULL));
}

FIXTURE_TEARDOWN(kvm)
{
}

TEST_F_TIMEOUT(kvm, no_write_is_lost, 60)
{
	uint64_t begin = kmig_now_ns(), passes;

	ask_dirty = kvm_dirty;
	ask_track = kvm_track;
	while (!guest.passes && !guest.failed)
		usleep(1000);
	START();
	SEND_ALL();
	passes = guest.passes;
	while (kmig_now_ns() - begin < kmig_ms(5000) || guest.passes < passes + 3)
		SEND_DIRTY();
	guest.stop = true;
	pthread_join(self->thread, NULL);
	EXPECT_FALSE(guest.failed);
	SEND_DIRTY();
	SEND_DIRTY();
	EXPECT_PAGES(0, self->round.pages);
	EXPECT_SAME();
	TH_LOG("%u rounds, %llu passes", self->number, (unsigned long long)guest.passes);
	STOP();
}

TEST_HARNESS_MAIN
