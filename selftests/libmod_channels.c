// SPDX-License-Identifier: GPL-2.0
/* The tests of data channels that break, on the module's stream. */
#define ON_MODULE
#include "lib_channels.c"
