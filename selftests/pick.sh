# SPDX-License-Identifier: GPL-2.0
#
# For those who run test programs, to be sourced.

# The programs named by the patterns, as far as SELFTESTS asks for them.
pick()
{
	local p

	for p in "$@"; do
		[ -x "$p" ] && [ -f "$p" ] || continue
		case " ${SELFTESTS:-${p##*/}} " in
		*" ${p##*/} "*) echo "$p" ;;
		esac
	done
}
