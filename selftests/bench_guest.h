/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A KVM guest that does what the benchmarks ask for: each of its processors goes once through a
 * list of addresses in its memory, and reads or increments a word at each. Code and lists are in
 * memory of their own, which nobody tracks.
 */
#ifndef BENCH_GUEST_H
#define BENCH_GUEST_H

#include <linux/kvm.h>

#include "bench.h"

#define GUEST_VCPUS	4
#define GUEST_MAX	(3UL << 30)		/* bytes of the memory that is tracked */
#define GUEST_OWN	0xe0000000u		/* where the rest begins */
#define GUEST_OWN_BYTES	(4 * MIB)		/* for each processor */
#define GUEST_CODE	0x100u
#define GUEST_LIST	0x1000u
#define GUEST_LIST_MAX	((GUEST_OWN_BYTES - GUEST_LIST) / 4)

struct guest {
	int vm;
	struct kvm_userspace_memory_region slot;
	struct {
		int fd;
		struct kvm_run *run;
		unsigned char *own;
	} vcpu[GUEST_VCPUS];
};

/* What the processor finds at the beginning of its own memory. */
struct guest_order {
	uint32_t list;
	uint32_t count;
	uint32_t write;
};

static inline uint32_t *guest_list(const struct guest *guest, unsigned int vcpu)
{
	return (uint32_t *)(guest->vcpu[vcpu].own + GUEST_LIST);
}

/*
 *	again:	mov esi, [list]; mov ecx, [count]; cmp dword [write], 0; je read
 *	write:	lodsd; inc dword [eax]; dec ecx; jnz write; jmp done
 *	read:	lodsd; mov edx, [eax]; dec ecx; jnz read
 *	done:	out 0x10, al; jmp again
 */
static inline void guest_load(unsigned char *own, uint32_t base)
{
	static const unsigned char code[] = {
		0x8b, 0x35, 0, 0, 0, 0, 0x8b, 0x0d, 0, 0, 0, 0, 0x83, 0x3d, 0, 0, 0, 0, 0, 0x74, 8,
		0xad, 0xff, 0x00, 0x49, 0x75, 0xfa, 0xeb, 6,
		0xad, 0x8b, 0x10, 0x49, 0x75, 0xfa,
		0xe6, 0x10, 0xeb, 0xd9,
	};
	uint32_t list = base, count = base + 4, write = base + 8;

	memcpy(own + GUEST_CODE, code, sizeof(code));
	memcpy(own + GUEST_CODE + 2, &list, 4);
	memcpy(own + GUEST_CODE + 8, &count, 4);
	memcpy(own + GUEST_CODE + 14, &write, 4);
}

/* Protected mode without paging: an address is an address of the guest's memory. */
static inline int guest_set_up_vcpu(int vcpu, uint32_t base)
{
	struct kvm_segment code = {
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_segment data = code;
	struct kvm_regs regs = { .rip = base + GUEST_CODE, .rflags = 2 };
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

/*
 * @mem, mapped by this process, is the guest's memory from address 0 on. With more of it than the
 * processors could reach, there are none.
 */
static inline void guest_new(struct guest *guest, void *mem, uint64_t bytes)
{
	struct kvm_userspace_memory_region own = {
		.slot = 1, .guest_phys_addr = GUEST_OWN,
		.memory_size = GUEST_VCPUS * GUEST_OWN_BYTES,
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), run_bytes;
	unsigned char *memory;

	guest->vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	if (guest->vm < 0)
		err(1, "/dev/kvm: run the VM with --kvm-guest");
	guest->slot = (struct kvm_userspace_memory_region){
		.memory_size = bytes, .userspace_addr = (uintptr_t)mem,
	};
	if (ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, &guest->slot))
		err(1, "the guest's memory");
	if (bytes > GUEST_MAX) {
		close(kvm);
		return;
	}
	memory = mmap(NULL, own.memory_size, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	own.userspace_addr = (uintptr_t)memory;
	if (memory == MAP_FAILED || ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, &own))
		err(1, "the guest's own memory");
	run_bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	for (unsigned int i = 0; i < GUEST_VCPUS; i++) {
		uint32_t base = GUEST_OWN + i * GUEST_OWN_BYTES;

		guest->vcpu[i].own = memory + i * GUEST_OWN_BYTES;
		guest_load(guest->vcpu[i].own, base);
		guest->vcpu[i].fd = ioctl(guest->vm, KVM_CREATE_VCPU, i);
		guest->vcpu[i].run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
					  guest->vcpu[i].fd, 0);
		if (guest->vcpu[i].run == MAP_FAILED || guest_set_up_vcpu(guest->vcpu[i].fd, base))
			err(1, "the guest's processor %u", i);
	}
	close(kvm);
}

/* Once through @count addresses of the processor's list, from entry @first on. */
static inline void guest_pass(struct guest *guest, unsigned int vcpu, uint32_t first,
			      uint32_t count, bool write)
{
	uint32_t list = GUEST_OWN + vcpu * GUEST_OWN_BYTES + GUEST_LIST + first * sizeof(uint32_t);

	if (!count)
		return;
	*(struct guest_order *)guest->vcpu[vcpu].own = (struct guest_order){ list, count, write };
	if (ioctl(guest->vcpu[vcpu].fd, KVM_RUN, 0) ||
	    guest->vcpu[vcpu].run->exit_reason != KVM_EXIT_IO)
		errx(1, "the guest stopped, exit reason %u", guest->vcpu[vcpu].run->exit_reason);
}

#endif /* BENCH_GUEST_H */
