// SPDX-License-Identifier: GPL-2.0
// LDFLAGS: -Wl,--wrap=recvmsg -Wl,--wrap=sendmsg
/* The tests of trackers, with the one that is the module: it has to keep the same promises. */
#define ON_MODULE
#include "lib_tracker.c"
