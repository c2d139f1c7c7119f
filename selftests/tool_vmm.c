// SPDX-License-Identifier: GPL-2.0
/*
 * kmig's hold on a stock QEMU, at both ends, under QEMU's emulator: memory is two memfds
 * and copied by the test itself, so that neither module nor library is needed.
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "kselftest_harness.h"
#include "tool.h"

#define BYTES (192ull << 20)
#define INITRD "build/guest/initramfs.cpio.gz"
#define BOOT_MS 90000

struct side {
	struct vmm vmm;
	pid_t pid;
	int fd;
	void *memory;
	char dir[32], qmp[64], console[64];
};

FIXTURE(vmm)
{
	char kernel[128];
	struct side a, b;
};

static bool find_kernel(char kernel[128])
{
	glob_t g;

	if (glob("/boot/vmlinuz-6.*-amd64", 0, NULL, &g))
		return false;
	snprintf(kernel, 128, "%s", g.gl_pathv[g.gl_pathc - 1]);
	globfree(&g);
	return !access(kernel, R_OK);
}

static void start(struct side *s, char *kernel, bool incoming)
{
	char serial[80];
	char *argv[] = { "qemu-system-x86_64", "-accel", "tcg", "-machine", "microvm,acpi=off", "-nodefaults",
			 "-no-reboot", "-display", "none", "-serial", serial, "-kernel", kernel, "-initrd",
			 INITRD, "-append", "console=ttyS0 quiet gl.mb=8 gl.static=4 gl.rate=2 gl.verify=2", NULL };
	struct qemu_start q = { .bytes = BYTES, .qmp = s->qmp, .incoming = incoming, .argv = argv };

	s->vmm = (struct vmm)VMM_INIT;
	strcpy(s->dir, "/tmp/kmig-vmm.XXXXXX");
	if (!mkdtemp(s->dir))
		abort();
	snprintf(s->qmp, sizeof(s->qmp), "%s/qmp", s->dir);
	snprintf(s->console, sizeof(s->console), "%s/console", s->dir);
	snprintf(serial, sizeof(serial), "file:%s", s->console);
	s->fd = memfd_create("ram", MFD_CLOEXEC);
	if (s->fd < 0 || ftruncate(s->fd, BYTES))
		abort();
	s->memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
	s->pid = fork();
	if (!s->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		qemu_exec(qemu_arguments(&q), s->fd);
		_exit(127);
	}
}

static int reach(struct side *s)
{
	int64_t deadline = now_ms() + 20000;

	while (vmm_connect(&s->vmm, s->qmp, 20000)) {
		if (now_ms() > deadline)
			return -1;
		failure_clear();
		usleep(20000);
	}
	return 0;
}

static void stop(struct side *s)
{
	vmm_close(&s->vmm);
	kill(s->pid, SIGKILL);
	waitpid(s->pid, NULL, 0);
	munmap(s->memory, BYTES);
	close(s->fd);
	unlink(s->qmp);
	unlink(s->console);
	rmdir(s->dir);
}

/* The number of the last heartbeat on the console, -1 for none, -2 for damage. */
static int beat(const struct side *s, char boot[40])
{
	static char text[1 << 20];
	int fd = open(s->console, O_RDONLY), number = -1, n, used;
	ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
	char *p = text;

	if (fd >= 0)
		close(fd);
	text[length > 0 ? length : 0] = '\0';
	if (strstr(text, "CORRUPT"))
		return -2;
	while ((p = strstr(p, "HB "))) {
		used = 0;
		if (sscanf(p, "HB %d boot=%39s t=%*d%n", &n, boot, &used) == 2 && used)
			number = n;
		p += 3;
	}
	return number;
}

static int wait_beat(const struct side *s, int more_than, char boot[40])
{
	int64_t deadline = now_ms() + BOOT_MS;
	int n;

	while ((n = beat(s, boot)) <= more_than && n != -2 && now_ms() < deadline)
		usleep(50000);
	return n;
}

FIXTURE_SETUP(vmm)
{
	if (!find_kernel(self->kernel) || access(INITRD, R_OK) ||
	    system("command -v qemu-system-x86_64 >/dev/null"))
		SKIP(return, "needs qemu-system-x86_64, a kernel in /boot and the test guest");
	failure_clear();
	interrupted = 0;
	start(&self->a, self->kernel, false);
	ASSERT_EQ(0, reach(&self->a));
}

FIXTURE_TEARDOWN(vmm)
{
	if (self->a.pid)
		stop(&self->a);
}

static bool capability(struct vmm *v, const char *name)
{
	struct json_object *list, *c, *value;
	bool on = false;
	size_t i;

	if (qmp_execute(v->qmp, "query-migrate-capabilities", NULL, -1, &list))
		return false;
	for (i = 0; i < json_object_array_length(list); i++) {
		c = json_object_array_get_idx(list, i);
		json_object_object_get_ex(c, "capability", &value);
		if (strcmp(json_object_get_string(value), name))
			continue;
		json_object_object_get_ex(c, "state", &value);
		on = json_object_get_boolean(value);
	}
	json_object_put(list);
	return on;
}

TEST_F(vmm, facts)
{
	uint64_t bytes;
	char status[32];
	int fd;

	EXPECT_EQ(self->a.pid, qmp_peer(self->a.vmm.qmp));
	EXPECT_EQ(0, vmm_check_source(&self->a.vmm)) TH_LOG("%s", failure());
	ASSERT_EQ(0, vmm_check_memory(&self->a.vmm, self->a.pid, &fd, &bytes)) TH_LOG("%s", failure());
	EXPECT_EQ(BYTES, bytes);
	EXPECT_EQ(QEMU_FD, fd);
	ASSERT_EQ(0, vmm_pause(&self->a.vmm));
	EXPECT_EQ(-EINVAL, vmm_check_source(&self->a.vmm));
	EXPECT_STREQ("the guest is not running (status: paused)", failure());
	ASSERT_EQ(0, vmm_resume(&self->a.vmm));
	ASSERT_EQ(0, vmm_status(&self->a.vmm, status));
	EXPECT_STREQ("running", status);
}

TEST_F(vmm, capabilities_come_back)
{
	struct json_object *args = json_tokener_parse(
		"{\"capabilities\": [{\"capability\": \"auto-converge\", \"state\": true}]}");

	ASSERT_EQ(0, qmp_run(self->a.vmm.qmp, "migrate-set-capabilities", args));
	ASSERT_EQ(0, vmm_set_up(&self->a.vmm));
	EXPECT_TRUE(capability(&self->a.vmm, "x-ignore-shared"));
	EXPECT_FALSE(capability(&self->a.vmm, "auto-converge"));
	ASSERT_EQ(0, vmm_restore(&self->a.vmm));
	EXPECT_FALSE(capability(&self->a.vmm, "x-ignore-shared"));
	EXPECT_TRUE(capability(&self->a.vmm, "auto-converge"));
}

/* The guest goes on at A after an attempt that was given up, and after a blackout that was; then at B. */
TEST_F_TIMEOUT(vmm, moves, 150)
{
	int64_t t0, t1, t2, t3, t4;
	char boot_a[40], boot_b[40], status[32];
	size_t length;
	void *state;
	int n;

	n = wait_beat(&self->a, 5, boot_a);
	ASSERT_LT(5, n);
	ASSERT_EQ(0, vmm_set_up(&self->a.vmm));

	ASSERT_EQ(0, vmm_open_outgoing(&self->a.vmm));
	ASSERT_EQ(0, vmm_pause(&self->a.vmm));
	interrupted = 1;
	EXPECT_EQ(-ECANCELED, vmm_save(&self->a.vmm, &state, &length));
	ASSERT_EQ(0, vmm_resume(&self->a.vmm)) TH_LOG("%s", failure());
	interrupted = 0;
	failure_clear();
	n = wait_beat(&self->a, beat(&self->a, boot_a) + 2, boot_a);
	ASSERT_LT(7, n);

	ASSERT_EQ(0, vmm_pause(&self->a.vmm));
	ASSERT_EQ(0, vmm_save(&self->a.vmm, &state, &length)) TH_LOG("%s", failure());
	free(state);
	ASSERT_EQ(0, vmm_resume(&self->a.vmm)) TH_LOG("%s", failure());
	n = wait_beat(&self->a, beat(&self->a, boot_a) + 2, boot_a);
	ASSERT_LT(9, n);

	start(&self->b, self->kernel, true);
	ASSERT_EQ(0, reach(&self->b));
	ASSERT_EQ(0, vmm_status(&self->b.vmm, status));
	EXPECT_STREQ("inmigrate", status);
	ASSERT_EQ(0, vmm_set_up(&self->b.vmm));
	ASSERT_EQ(0, vmm_open_incoming(&self->b.vmm)) TH_LOG("%s", failure());

	t0 = now_ms();
	ASSERT_EQ(0, vmm_pause(&self->a.vmm));
	t1 = now_ms();
	ASSERT_EQ(0, vmm_save(&self->a.vmm, &state, &length)) TH_LOG("%s", failure());
	t2 = now_ms();
	memcpy(self->b.memory, self->a.memory, BYTES);
	t3 = now_ms();
	ASSERT_EQ(0, vmm_load(&self->b.vmm, state, length)) TH_LOG("%s", failure());
	ASSERT_EQ(0, vmm_status(&self->b.vmm, status));
	EXPECT_STREQ("paused", status);
	EXPECT_EQ(0, memcmp(self->b.memory, self->a.memory, BYTES));
	n = beat(&self->a, boot_a);
	t4 = now_ms();
	ASSERT_EQ(0, qmp_run(self->b.vmm.qmp, "cont", NULL));
	TH_LOG("device state %zu bytes: pause %d ms, save %d ms, load %d ms", length, (int)(t1 - t0),
	       (int)(t2 - t1), (int)(t4 - t3));
	free(state);

	EXPECT_LT(n, wait_beat(&self->b, n, boot_b));
	EXPECT_STREQ(boot_a, boot_b);
	EXPECT_EQ(n, beat(&self->a, boot_a));
	stop(&self->b);
}

/* Device state that is none, or cut off, must end QEMU or fail, and never run. */
TEST_F(vmm, damaged_state)
{
	start(&self->b, self->kernel, true);
	ASSERT_EQ(0, reach(&self->b));
	ASSERT_EQ(0, vmm_set_up(&self->b.vmm));
	ASSERT_EQ(0, vmm_open_incoming(&self->b.vmm));
	EXPECT_GT(0, vmm_load(&self->b.vmm, "nonsense", 8));
	stop(&self->b);
}

TEST_HARNESS_MAIN
