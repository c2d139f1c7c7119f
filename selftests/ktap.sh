# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# KTAP from a shell script. To be sourced.

ktap_number=0 ktap_failed=0

plan()
{
	echo "TAP version 13"
	echo "1..$1"
	ktap_plan=$1
}

# check NAME COMMAND...: the command's success is the test's; its output is shown if it
# fails. The command must leave nothing running that holds its output.
check()
{
	local name=$1 out

	shift
	ktap_number=$((ktap_number + 1))
	if out=$("$@" 2>&1); then
		echo "# after $SECONDS s:"
		echo "ok $ktap_number $name"
		return 0
	fi
	ktap_failed=$((ktap_failed + 1))
	[ -z "$out" ] || echo "$out" | sed 's/^/# /'
	echo "not ok $ktap_number $name"
	return 1
}

skip_rest()
{
	while [ "$ktap_number" -lt "$ktap_plan" ]; do
		ktap_number=$((ktap_number + 1))
		echo "ok $ktap_number # SKIP $1"
	done
}

note() { echo "# $*"; }
note_file() { [ ! -s "$1" ] || sed -e "s/^/# ${1##*\/}: /" "$1" | tail -n "${2:-20}"; }

finish() { [ $ktap_failed = 0 ] && [ "$ktap_number" = "$ktap_plan" ]; }
