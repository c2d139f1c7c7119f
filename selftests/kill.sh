# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Signals to the processes of a migration, at its states. After each, the guest runs at
# exactly one side, whole, nothing of the migration is left, and the region is idle. Where
# the guest has moved, the next migration starts from there. To be sourced by a script
# that then calls kill_cases, or has its own (soak).

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/ktap.sh"
. "$here/e2e.sh"
guest_memory=160M
guest_load="gl.mb=16 gl.static=8 gl.writers=2 gl.rate=4 gl.verify=4"
trap cleanup EXIT

# The guest lives in process $here_qemu, its QMP socket is $here_qmp, its console $here_log;
# $logs are all the consoles it ever had. The other side is $there_...
sides=0

# Orphans become zombies where the VM's init does not care.
gone() { [ ! -e "/proc/$1" ] || grep -q '^State:.*Z' "/proc/$1/status" 2>/dev/null; }
is_running() { "$here/qmp.py" "$1" query-status 2>/dev/null | grep -q '"running": true'; }
child_of() { pgrep -P "$1" | head -n 1; }
listens() { [ -n "$("${in_dst[@]}" ss -Hltn 'sport = :4760')" ]; }

# strike TARGET SIGNAL STATE: read the migration's messages; when it enters STATE, strike.
strike()
{
	local line pid worker=

	while read -r line; do
		echo "$line" >>"$work/migrate.err"
		# Looked up at once: later there is no time for it.
		[ "$1" != worker ] || [ -n "$worker" ] || worker=$(child_of "$(cat "$work/migrate.pid")")
		[[ $line = "state: $3 at"* ]] || continue
		case $1 in
		migrate) pid=$(<"$work/migrate.pid") ;;
		worker) pid=$worker ;;
		receive) pid=$recv_pid ;;
		receiver) pid=$recv_worker ;;
		qemu) pid=$there_qemu ;;
		esac
		kill "-$2" "$pid" && echo struck >>"$work/migrate.err"
	done
}

# start_there OPTIONS...: kmig receive, with a QEMU that waits.
start_there()
{
	sides=$((sides + 1))
	there_qmp=$work/$sides.qmp
	there_log=$work/$sides.log
	qemu_args "$there_log"
	"${in_dst[@]}" "$kmig" receive --listen $dst_ip --secret "$work/secret" --memory $guest_memory \
		--qmp "$there_qmp" --name e2e "$@" -- "${qemu[@]}" >"$work/receive.out" 2>"$work/receive.err" &
	recv_pid=$!
	# Or the shell tells of its end.
	disown "$recv_pid"
	wait_for 60 receive_listens_or_ended
	grep -q '^listening on ' "$work/receive.err" || return 1
	recv_worker=$(child_of "$recv_pid")
	there_qemu=$(child_of "$recv_worker")
}

# start_migrate MESSAGES OPTIONS...: the front writes down who it is and becomes kmig.
start_migrate()
{
	local messages=$1

	shift
	("${in_src[@]}" sh -c 'echo $$ >"$0"; exec "$@"' "$work/migrate.pid" "$kmig" qemu migrate -v \
		--qmp "$here_qmp" --to $dst_ip --secret "$work/secret" "$@" >"$work/migrate.out" 2>"$messages"
	echo $? >"$work/migrate.rc") 2>/dev/null &
	migrate_pid=$!
}

# migrate_and_strike TARGET SIGNAL STATE
migrate_and_strike()
{
	rm -f "$work/migrate.err" "$work/migrate.rc"
	mkfifo "$work/messages" 2>/dev/null
	strike "$@" <"$work/messages" 2>>"$work/strike.err" &
	striker=$!
	start_migrate "$work/messages"
}

# kmig's processes at the source hold the pipe of the messages.
source_settled() { gone "$striker" && gone "$migrate_pid"; }
receiver_settled() { gone "$recv_pid" && gone "$recv_worker"; }

# settle [SECONDS]: both sides have ended, the source within so long.
# A connection that broke before it proved the secret does not end the waiting for another.
settle()
{
	wait_for "${1:-40}" source_settled || { echo "kmig qemu migrate does not end"; return 1; }
	wait_for 3 receiver_settled && return
	! listens || kill -INT "$recv_pid"
	wait_for 40 receiver_settled || { echo "kmig receive does not end"; return 1; }
}

goes_on()
{
	local n

	n=$(last_beat "$2" n)
	wait_for 15 beats_beyond "$2" "${n:-0}" || { echo "no heartbeat"; return 1; }
	"$kmig" region show --pid "$1" | grep -q 'state *idle' || { echo "still tracked"; return 1; }
	! grep -a -m 1 CORRUPT "$2"
}

one_gone() { gone "$here_qemu" || gone "$there_qemu"; }

# Exactly one of both QEMUs exists and runs its guest, and that one's heart beats on.
one_side()
{
	local rc

	rc=$(cat "$work/migrate.rc")
	echo "exit status $rc"
	# One whose last connection was closed may take a moment to end.
	wait_for 10 one_gone
	if gone "$there_qemu" && is_running "$here_qmp"; then
		[ "$rc" != 0 ] || { echo "kmig says that it has moved"; return 1; }
		goes_on "$here_qemu" "$here_log"
	elif gone "$here_qemu" && is_running "$there_qmp"; then
		touch "$work/moved"
		[ "$rc" = 0 ] || [ "$rc" = 137 ] || { echo "kmig says that it has not moved"; return 1; }
		goes_on "$there_qemu" "$there_log"
	else
		gone "$here_qemu" || "$here/qmp.py" "$here_qmp" query-status
		gone "$there_qemu" || "$here/qmp.py" "$there_qmp" query-status
		echo "not one side"
		return 1
	fi
}

one_case()
{
	if settle && one_side; then
		[ "$3" = clean-up ] || grep -q struck "$work/migrate.err" && return
		echo "it was over before the signal came"
	fi
	cat "$work/migrate.err" "$work/migrate.out" "$work/receive.err"
	return 1
}

# kill_cases "TARGET SIGNAL STATE"...
kill_cases()
{
	local c target signal state

	plan $(($# + 2))
	link_up ""
	(umask 077 && head -c 32 /dev/urandom | base64 >"$work/secret")
	start_source
	here_qmp=$work/src.qmp here_log=$work/src.log here_qemu=$src_pid logs=("$work/src.log")
	check "the guest starts" wait_for 90 has_beats "$here_log" 5 ||
		{ note_file "$work/src.err"; skip_rest "no guest"; exit 1; }
	for c in "$@"; do
		read -r target signal state <<<"$c"
		rm -f "$work/moved"
		start_there || note_file "$work/receive.err"
		migrate_and_strike "$target" "$signal" "$state"
		check "$target $signal at $state" one_case "$target" "$signal" "$state"
		note "exit status $(cat "$work/migrate.rc"), the guest $([ -e "$work/moved" ] && echo has moved || echo has stayed)"
		[ -e "$work/moved" ] || continue
		here_qmp=$there_qmp here_log=$there_log here_qemu=$there_qemu
		logs+=("$there_log")
	done
	check "no heartbeat is lost, no page damaged" wait_for 5 beats_continue "${logs[@]}"
	finish
}
