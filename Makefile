# SPDX-License-Identifier: GPL-2.0
#
# lmtrack: modules, library, tools, tests. All output goes below build/.
#
#   make [KERNELS="..."]   modules, library, tools
#   make modules KVER=...  modules for one kernel, in build/kmod-KVER/
#   make check             everything built, checked and tested on the stock kernels
#   make check KERNEL=debug          ... on a kernel with KASAN, lockdep, kmemleak (built first)
#   make check KERNEL=debug-kcsan    ... on one that looks for data races
#   make check KERNEL=7              ... on Debian 13's newest 7.x (fetched first)
#   make bench             lmtrack beside its peers, in VMs: a table of ratios in build/bench
#   make bench QUICK=1     ... in six minutes; BENCH="harvest ..." only these rows
#   make soak              one guest, moved to and fro for SOAK_SECONDS (3600), in a VM
#   make demo              running guests move between two QEMUs, in a VM
#   make fuzz              the fuzzers, FUZZ_SECONDS each (1800)
#   make coverage          what the tests run of lib, tools/kmig and kmod: tables, and all lines that
#                          did not run, in build/coverage (the kernel debug-gcov is built first)
#   make lint              W=1 and sparse without a word, checkpatch --strict
#   make install           PREFIX, DESTDIR; modules for KERNELS
#   make clean, distclean  distclean also drops what tools/setup/install fetched

ROOT := $(CURDIR)
O ?= $(ROOT)/build
PREFIX ?= /usr/local
RUNNING := $(shell uname -r)

# Without KERNELS=: build for the running kernel, test on the stock ones.
ifdef KVER
KERNELS := $(KVER)
endif
ifdef KERNEL
KERNELS := $(KERNEL)
endif
ifdef KERNELS
CHECK_KERNELS := $(KERNELS)
else
# Its configuration lacks what the others have (compat.h); e2e_module runs what is done then.
LINT_ONLY = $(shell tools/vm/kernels 6.1-cloud)
CHECK_KERNELS = $(shell tools/vm/kernels)
KERNELS = $(if $(wildcard /lib/modules/$(RUNNING)/build),$(RUNNING),$(CHECK_KERNELS))
endif
# Kernels called debug... are built here, by tools/vm/debug/build. 7 is Debian 13's newest 7.x: it
# takes that Debian to build for it.
kdir = $(if $(filter debug%,$(1)),$(O)/vm/$(1),/lib/modules/$(1)/build)
kmake = $(if $(filter 7,$(1)),tools/vm/trixie/make,$(MAKE) --no-print-directory -C $(call kdir,$(1)))

CHECKPATCH := $(O)/kselftest/linux/scripts/checkpatch.pl
SUB = $(MAKE) --no-print-directory O=$(O) PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)

.PHONY: all modules lib tools selftests fuzzers guest check fuzz soak bench demo lint install clean distclean
.PHONY: lint-checkpatch check-installed coverage coverage-programs
all: modules lib tools

modules: $(KERNELS:%=module-%)

# Kbuild writes beside the sources: each kernel gets a copy of them.
define copy_sources
	@mkdir -p $(1)
	@cp -a -u Kbuild kmod uapi $(1)/
endef

module-%:
	$(call copy_sources,$(O)/kmod-$*)
	+@$(call kmake,$*) M=$(O)/kmod-$* W=1 $(if $(filter debug-gcov,$*),GCOV_PROFILE=y) modules

lib:
	+@$(SUB) -C lib all

tools: lib
	+@$(SUB) -C tools/kmig all

selftests: lib tools
	+@$(SUB) -C selftests all

fuzzers:
	+@$(SUB) -C selftests/fuzz all

guest:
	+@$(SUB) -C selftests/guest all

# What is tested on which kernels is only known once they are installed.
check:
	@tools/setup/install
	@set -e; for k in $(filter debug%,$(KERNELS)); do tools/vm/debug/build $$k; done
	@$(if $(filter 7,$(KERNELS)),tools/vm/trixie/build)
	@$(MAKE) --no-print-directory check-installed

check-installed: lint lib tools selftests fuzzers guest $(CHECK_KERNELS:%=module-%)
	@selftests/check $(CHECK_KERNELS)

FUZZ_SECONDS ?= 1800
fuzz:
	@tools/setup/install
	@$(MAKE) --no-print-directory fuzzers
	@FUZZ_SECONDS=$(FUZZ_SECONDS) selftests/run -t $$((6 * $(FUZZ_SECONDS) + 300)) selftests/fuzz/fuzz

bench:
	@tools/setup/install
	@$(MAKE) --no-print-directory selftests guest module-$$(tools/vm/kernels 6.12)
	@selftests/bench $(if $(QUICK),--quick) $(BENCH)

# Not in check, which has to come to the same result whenever it is run.
SOAK_SECONDS ?= 3600
soak:
	@tools/setup/install
	@$(MAKE) --no-print-directory tools guest module-$$(tools/vm/kernels 6.12)
	@k=$$(tools/vm/kernels 6.12); \
	tools/vm/run -k $$k -c 1 -m 2G -t $$(($(SOAK_SECONDS) + 1500)) -o soak --kvm-guest -- \
		env SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEED=$(SOAK_SEED) \
		selftests/run -t $$(($(SOAK_SECONDS) + 1200)) -m build/kmod-$$k/lmtrack.ko selftests/soak

# SELFTESTS="name ..." runs only these programs and adds to what is known of earlier runs.
coverage:
	@tools/setup/install lcov
	@tools/vm/debug/build debug-gcov
	@$(MAKE) --no-print-directory guest coverage-programs module-debug-gcov
	@tools/coverage/run

# Library and tool count what they run, their tests do not; but who leaves by _exit() takes along
# what was counted.
COVERAGE := $(O)/coverage
COUNTING := -Og -g --coverage -fprofile-update=atomic
COUNTED := -Wl,--wrap=_exit $(COVERAGE)/exit.o -Wl,--whole-archive -lgcov -Wl,--no-whole-archive
COVERAGE_SUB = $(MAKE) --no-print-directory O=$(COVERAGE)
COVERAGE_PROGRAMS := $(patsubst selftests/%.c,$(COVERAGE)/selftests/%, \
	$(wildcard selftests/lib*.c selftests/tool_*.c selftests/uapi_*.c))
coverage-programs:
	@mkdir -p $(COVERAGE)
	@$(CC) -O2 -g -c -o $(COVERAGE)/exit.o tools/coverage/exit.c
	+@CFLAGS="$(COUNTING)" LDFLAGS=--coverage $(COVERAGE_SUB) -C lib all
	+@CFLAGS="$(COUNTING)" LDFLAGS="$(COUNTED)" $(COVERAGE_SUB) -C tools/kmig all
	+@CFLAGS="-O2 -g $(COUNTED)" $(COVERAGE_SUB) \
		HARNESS=$(O)/kselftest/linux/tools/testing/selftests -C selftests $(COVERAGE_PROGRAMS)

demo:
	@tools/setup/install
	@$(MAKE) --no-print-directory tools guest module-$$(tools/vm/kernels 6.12)
	@tools/demo/run

lint: lint-checkpatch $(CHECK_KERNELS:%=lint-module-%) $(LINT_ONLY:%=lint-module-%)

# C=2 checks every file, compiled anew or not; any word from compiler or sparse fails.
lint-module-%:
	$(call copy_sources,$(O)/lint-$*)
	+@$(call kmake,$*) M=$(O)/lint-$* W=1 C=2 \
		KCFLAGS=-Werror modules >$(O)/lint-$*/log 2>&1 || { cat $(O)/lint-$*/log; exit 1; }
	@! grep -E 'warning:|error:|WARNING:' $(O)/lint-$*/log
	@echo "lint: $*: W=1 and sparse clean"

# BIT() is not there for user space; checkpatch knows that of include/uapi only.
checkpatch = $(CHECKPATCH) --no-tree --strict --terse --show-types --quiet --no-summary
lint-checkpatch:
	@$(checkpatch) -f $$(find kmod -name '*.[ch]' ! -name trace.h)
	@$(checkpatch) --ignore OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT -f kmod/trace.h
	@$(checkpatch) --ignore BIT_MACRO -f $$(find uapi -name '*.h')
	@echo "lint: checkpatch --strict clean"

install: modules lib tools
	+@$(SUB) -C lib install
	+@$(SUB) -C tools/kmig install
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/include/linux uapi/linux/*.h
	install -D -m 644 -t $(DESTDIR)/usr/lib/udev/rules.d tools/setup/60-lmtrack.rules
	@for k in $(KERNELS); do \
		$(MAKE) --no-print-directory -C $(call kdir,$$k) M=$(O)/kmod-$$k \
			INSTALL_MOD_PATH=$(DESTDIR) INSTALL_MOD_DIR=updates CONFIG_MODULE_SIG_ALL= \
			modules_install && \
		if [ -z "$(DESTDIR)" ]; then depmod $$k; fi || exit 1; \
	done

# What was fetched by tools/setup/install stays.
clean:
	@rm -rf $(filter-out $(O)/vm $(O)/kselftest,$(wildcard $(O)/*))

distclean:
	@rm -rf $(O)
