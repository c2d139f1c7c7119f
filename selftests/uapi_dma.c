// SPDX-License-Identifier: GPL-2.0
/*
 * Data that a device delivers long after the page was harvested is not lost: direct I/O holds
 * a page and writes it without a page table entry. A device-mapper target delays the reads, so
 * that the harvest comes between submission and data, every time.
 */
#include <linux/aio_abi.h>
#include <sys/syscall.h>

#include "kselftest_harness.h"
#include "lmtrack_test.h"

#define PAGES	64UL
#define BYTES	(PAGES * PAGE)
#define IO_PAGE	8UL		/* the read goes there */
#define IO_PAGES 4UL
#define DELAY_MS 300
#define DM_NAME	"lmtrack-delay"

FIXTURE(dma) {
	int fd;
	int disk;
	char *memory;
	aio_context_t aio;
	uint64_t bitmap[PAGES / 64];
};

static int run_command(const char *command)
{
	int status = system(command);

	return status;
}

FIXTURE_SETUP(dma)
{
	char pattern[IO_PAGES * PAGE], command[256];
	int ram;

	self->disk = -1;
	if (run_command("modprobe brd rd_nr=1 rd_size=4096 2>/dev/null") ||
	    run_command("modprobe dm-delay 2>/dev/null") ||
	    run_command("dmsetup --version >/dev/null 2>&1"))
		SKIP(return, "needs the modules brd and dm-delay, and dmsetup");
	ram = open("/dev/ram0", O_WRONLY);
	ASSERT_GE(ram, 0);
	memset(pattern, 0x5a, sizeof(pattern));
	ASSERT_EQ(write(ram, pattern, sizeof(pattern)), (ssize_t)sizeof(pattern));
	ASSERT_EQ(fsync(ram), 0);
	close(ram);
	snprintf(command, sizeof(command),
		 "dmsetup create %s --table '0 8192 delay /dev/ram0 0 %d' && dmsetup mknodes",
		 DM_NAME, DELAY_MS);
	ASSERT_EQ(run_command(command), 0);
	self->disk = open("/dev/mapper/" DM_NAME, O_RDONLY | O_DIRECT | O_CLOEXEC);
	ASSERT_GE(self->disk, 0);
	self->fd = lmt_region(BYTES);
	ASSERT_GE(self->fd, 0);
	self->memory = lmt_map(self->fd, BYTES);
	ASSERT_NE((void *)self->memory, MAP_FAILED);
	ASSERT_EQ(syscall(SYS_io_setup, 8, &self->aio), 0);
}

FIXTURE_TEARDOWN(dma)
{
	if (self->disk < 0)
		return;
	syscall(SYS_io_destroy, self->aio);
	munmap(self->memory, BYTES);
	close(self->fd);
	close(self->disk);
	run_command("dmsetup remove --retry " DM_NAME);
}

static int submit(FIXTURE_DATA(dma) *self)
{
	struct iocb iocb = {
		.aio_fildes = self->disk, .aio_lio_opcode = IOCB_CMD_PREAD,
		.aio_buf = (uintptr_t)self->memory + IO_PAGE * PAGE,
		.aio_nbytes = IO_PAGES * PAGE,
	};
	struct iocb *list = &iocb;

	return syscall(SYS_io_submit, self->aio, 1, &list);
}

static int reap(FIXTURE_DATA(dma) *self)
{
	struct io_event event;

	if (syscall(SYS_io_getevents, self->aio, 1, 1, &event, NULL) != 1)
		return -1;
	return event.res == (long)(IO_PAGES * PAGE) ? 0 : -1;
}

TEST_F_TIMEOUT(dma, data_after_harvest, 60)
{
	memset(self->memory, 1, BYTES);
	/* Not EBUSY: nothing is pinned yet. */
	ASSERT_EQ(lmt_start(self->fd, 0, NULL), 0);
	ASSERT_EQ(lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap), PAGES);
	for (unsigned int i = 0; i < 5; i++) {
		double begin = lmt_seconds();
		long dirty;

		ASSERT_EQ(submit(self), 1);
		/* Reported, as it may be written; and still so while it may. */
		ASSERT_GE(lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap),
			  IO_PAGES);
		ASSERT_GE(lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap),
			  IO_PAGES);
		/* The machine was so slow that the data came first: shows nothing. */
		if (lmt_seconds() - begin > DELAY_MS * 0.8e-3)
			i--;
		ASSERT_EQ(reap(self), 0);
		ASSERT_EQ(self->memory[IO_PAGE * PAGE], 0x5a);
		ASSERT_GE(lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES, self->bitmap),
			  IO_PAGES);
		for (unsigned long page = IO_PAGE; page < IO_PAGE + IO_PAGES; page++)
			ASSERT_TRUE(lmt_bit(self->bitmap, page));
		/* And then no more; the kernel tells the end of the I/O before it lets go of pages. */
		while ((dirty = lmt_dirty(self->fd, LMTRACK_DIRTY_CLEAR, 0, PAGES,
					  self->bitmap)) > 0)
			usleep(1000);
		ASSERT_EQ(dirty, 0);
		memset(self->memory + IO_PAGE * PAGE, 1, PAGE);
	}
}

TEST_HARNESS_MAIN
