# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Functions for scripts that move a guest, in the VM of tools/vm/run: two network
# namespaces, src and dst, joined by a shaped link; a guest in a QEMU at either end.
# To be sourced. Everything it makes is below $work, which is $all or below it, and gone after
# cleanup.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kmig=$root/build/tools/kmig
export LD_LIBRARY_PATH=$root/build/lib
all=$(mktemp -d)
work=$all
src_ip=10.77.0.1
dst_ip=10.77.0.2
in_src=(ip netns exec src) in_dst=(ip netns exec dst)
guest_name=e2e
guest_memory=256M
guest_load="gl.mb=64 gl.static=32 gl.writers=2 gl.rate=20 gl.verify=16"
guest_kernel=/boot/vmlinuz-$("$root/tools/vm/kernels" 6.12)
[ -e /dev/kvm ] && guest_accel=kvm guest_cpu=host || guest_accel=tcg guest_cpu=max

# link_up RATE: RATE as tc knows it; empty for an unshaped link. The queue is long enough
# that a sender is slowed down, as by a network card, and not told by losses.
link_up()
{
	ip netns add src
	ip netns add dst
	link_add "$1"
}

# link_add RATE [DEVICE SRC_IP DST_IP]: the link alone, where it is gone; or another one.
link_add()
{
	local ns device=${2:-veth0}

	ip link add "$device" netns src type veth peer name "$device" netns dst
	ip -n src addr add "${3:-$src_ip}/24" dev "$device"
	ip -n dst addr add "${4:-$dst_ip}/24" dev "$device"
	for ns in src dst; do
		ip -n $ns link set lo up
		ip -n $ns link set "$device" up
	done
	[ -z "$1" ] || link_shape "$1" "$device"
}

# link_shape RATE [DEVICE [BURST]]: anew, also where it was shaped already. As many bytes as a burst
# may wait, which is seconds on a slow link.
link_shape()
{
	local ns

	for ns in src dst; do
		tc -n $ns qdisc replace dev "${2:-veth0}" root tbf rate "$1" burst "${3:-256k}" latency 100ms || return 1
	done
}

# roce_up MODULE: soft-RoCE on a link of its own, and lmtrack_rdma.ko from beside MODULE. It has its
# socket in the first network namespace only, so from here on both hosts are this one: not to be
# called in a subshell. The modules that lend memory come first: when a device goes they are the
# last to let go of it.
roce_up()
{
	dst_ip=10.76.0.1
	in_src=() in_dst=()
	modprobe rdma_ucm && modprobe ib_uverbs && modprobe rdma_rxe &&
	{ [ -e /sys/module/lmtrack_rdma ] || insmod "${1%/*}/lmtrack_rdma.ko"; } &&
	ip link set lo up && ip link add lmt0 type veth peer name lmt1 &&
	ip link set lmt0 mtu 9000 up && ip link set lmt1 mtu 9000 up &&
	ip addr add $dst_ip/24 dev lmt0 && roce_add
}
roce_add() { rdma link add lmt0 type rxe netdev lmt0; }

# The device may have gone already. lmtrack_rdma.ko holds lmtrack.ko.
roce_down()
{
	rdma link delete lmt0 2>/dev/null
	ip link del lmt0
	rmmod lmtrack_rdma
}

# qemu_args SERIAL_LOG: sets $qemu. The same at both ends, but for the log.
# rtc=on and pci=off save a stock kernel seconds of probing for what is not there.
qemu_args()
{
	qemu=(qemu-system-x86_64 -accel "$guest_accel" -cpu "$guest_cpu"
	      -machine microvm,acpi=off,rtc=on -smp 1
	      -nodefaults -no-reboot -display none -serial "file:$1"
	      -kernel "$guest_kernel" -initrd "$root/build/guest/initramfs.cpio.gz"
	      -append "console=ttyS0 quiet panic=-1 pci=off edd=off $guest_load")
	# gl.beat comes out here, for who has made a fifo to watch it.
	[ ! -p "${1%.log}.beat" ] || qemu+=(-debugcon "file:${1%.log}.beat")
}

# Wait until a command succeeds, at most SECONDS.
wait_for()
{
	local end=$((SECONDS + $1))

	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.1
	done
}

ended() { ! kill -0 "$1" 2>/dev/null; }
has_beats() { [ "$(grep -ac '^HB ' "$1" 2>/dev/null)" -ge "$2" ] 2>/dev/null; }
beats_beyond() { [ "$(last_beat "$1" n)" -gt "$2" ] 2>/dev/null; }

# last_beat LOG FIELD: n, or a value by its name, of the last whole heartbeat.
last_beat()
{
	tr -d '\r' <"$1" | awk -v f="$2" '/^HB .* passes=[0-9]+$/ { l = $0 }
		END {
			n = split(l, w, " ")
			if (f == "n")
				print w[2]
			for (i = 3; i <= n; i++)
				if (index(w[i], f "=") == 1)
					print substr(w[i], length(f) + 2)
		}'
}

# The guest at the source, on an lmtrack region. Sets src_pid.
start_source()
{
	qemu_args "$work/src.log"
	"${in_src[@]}" "$kmig" qemu run --memory $guest_memory --qmp "$work/src.qmp" \
		--name "$guest_name" -- "${qemu[@]}" 2>"$work/src.err" &
	src_pid=$!
}

# kmig receive, with a QEMU that waits. Sets recv_pid; returns when it listens.
start_receive()
{
	[ -e "$work/secret" ] || (umask 077 && head -c 32 /dev/urandom | base64 >"$work/secret")
	qemu_args "$work/dst.log"
	"${in_dst[@]}" "$kmig" receive --listen $dst_ip --secret "$work/secret" \
		--memory $guest_memory --qmp "$work/dst.qmp" --name "$guest_name" \
		--report "$work/receive.json" "$@" -- "${qemu[@]}" >"$work/receive.log" 2>"$work/receive.err" &
	recv_pid=$!
	wait_for 30 receive_listens_or_ended
	grep -q '^listening on ' "$work/receive.err"
}

receive_listens_or_ended()
{
	grep -q '^listening on ' "$work/receive.err" || ended "$recv_pid"
}

# migrate OPTIONS...: from src to dst, in the foreground.
migrate()
{
	"${in_src[@]}" "$kmig" qemu migrate --qmp "$work/src.qmp" --to $dst_ip \
		--secret "$work/secret" --report "$work/report.json" "$@"
}

# begin_migrate OPTIONS...: in the background, and return when it sends. Sets migrate_pid.
begin_migrate()
{
	# What the last one said must not be taken for this one's.
	: >"$work/migrate.err"
	migrate -v "$@" 2>"$work/migrate.err" &
	migrate_pid=$!
	wait_for 60 has_said '^first pass, ' && moves && find_control_port
}

# Sets control_port. It has come first.
find_control_port()
{
	control_port=$("${in_src[@]}" ss -Htnp state established "dport = :4760" |
		sed -nE 's/^([^ ]+ +){2}[^ ]*:([0-9]+) .*[,(]fd=([0-9]+).*/\3 \2/p' | sort -n | sed -n '1s/.* //p')
}

moves() { ! ended "$migrate_pid"; }
# has_said PATTERN: the source has, or will not any more.
has_said() { grep -q "$1" "$work/migrate.err" || ended "$migrate_pid"; }
moved() { wait "$migrate_pid" && wait "$recv_pid"; }

# limit RATE: of what is sent from now on.
front() { pgrep -o -f "kmig qemu migrate --qmp $work/src.qmp"; }
limit() { "$kmig" limit "$(front)" "$1"; }

# What the source has said in its blackouts. It is there before what happens next.
said_in_blackout() { awk '/^state: / { b = $2 == "blackout" } b' "$work/migrate.err"; }
in_blackout() { moves && awk '/^state: / { b = $2 == "blackout" } END { exit !b }' "$work/migrate.err"; }
blackout_or_ended() { in_blackout || ended "$migrate_pid"; }
wait_blackout() { wait_for "$1" blackout_or_ended && in_blackout; }

# Channels lost in blackouts, and how many different ones.
lost_in_blackout()
{
	said_in_blackout | awk '/ channel [0-9]+ to .* is lost/ { n++; if (!seen[$3]++) d++ } END { print n + 0, d + 0 }'
}
resumed() { grep -q "the guest was paused, and runs on here until a data channel is back" "$work/migrate.err"; }
blackouts() { [ "$(grep -c '^state: blackout ' "$work/migrate.err")" -ge "$1" ]; }

# reported TEST: of the source's report r, in Python. Shows what became of the channels.
reported()
{
	python3 - "$1" "$work/report.json" <<-'END'
		import json, sys
		r = json.load(open(sys.argv[2]))
		print("channels: %d over RDMA, %d lost, %d back" % (r["rdma-channels"], r["channels-lost"], r["channels-rejoined"]))
		sys.exit(not eval(sys.argv[1]))
	END
}

# The guest at the source does what it did, and nothing of a migration is left.
runs_on()
{
	wait_for 20 beats_beyond "$work/src.log" "$(last_beat "$work/src.log" n)" &&
		"$root/selftests/qmp.py" "$work/src.qmp" query-status | grep -q '"running": true' &&
		"$kmig" region show --pid "$src_pid" | grep -q 'state *idle'
}

dst_pid() { pgrep -f "unix:$work/dst.qmp" | head -n 1; }

# beats_continue [LOG...]: one after the other, by default both sides', they are one guest's: no
# heartbeat missing, none twice, one boot id, no corruption. The line cut by a move comes out whole;
# the very last may still be on its way.
beats_continue()
{
	[ $# -gt 0 ] || set -- "$work/src.log" "$work/dst.log"
	cat "$@" | tr -d '\r' | sed '$d' | awk '
		/^CORRUPT/ { print "the guest says: " $0; bad = 1; exit }
		/^HB / {
			if (seen && $2 != n + 1) {
				print "heartbeat " n " is followed by " $2
				bad = 1
				exit
			}
			if (seen && $3 != id) {
				print "boot id changed: " id " " $3
				bad = 1
				exit
			}
			seen = 1
			n = $2
			id = $3
		}
		END {
			if (!seen)
				print "no heartbeat at all"
			exit bad || !seen
		}'
}

# The guest has moved: from where it is now it can be moved on.
turn_round()
{
	local from=$work

	src_pid=$(dst_pid)
	work=$(mktemp -d "$all/XXX")
	ln -s "$from/dst.log" "$work/src.log"
	ln -s "$from/dst.qmp" "$work/src.qmp"
}

# verifies [LOG]: the guest, by default the one at the destination, goes twice more through all its
# memory: once it began after now.
verifies()
{
	local log=${1:-$work/dst.log} passes

	wait_for 30 has_beats "$log" 1 || return 1
	passes=$(last_beat "$log" passes)
	wait_for 90 has_verified "$log" $((passes + 2))
}
has_verified() { [ "$(last_beat "$1" passes)" -ge "$2" ]; }

# ---- What may happen to a network

# The source's ports of data channels; the control connection is left out.
data_ports()
{
	"${in_src[@]}" ss -Htn state established "dport = :4760" | awk '{ sub(".*:", "", $3); print $3 }' |
		grep -vx "$control_port"
}

# reset_ports PORT...: all of them at once.
reset_ports()
{
	local filter

	[ $# -gt 0 ] || return 1
	filter=$(printf ' or sport = :%s' "$@")
	"${in_src[@]}" ss -HKtn "${filter# or }" >/dev/null
}

# Reset a data channel at random; false: none is there.
reset_one()
{
	local ports

	mapfile -t ports < <(data_ports)
	[ ${#ports[@]} -gt 0 ] && reset_ports "${ports[RANDOM % ${#ports[@]}]}"
}

# link_worsen NETEM...: instead of the shaper, until the next link_shape.
link_worsen()
{
	local ns

	for ns in src dst; do
		tc -n $ns qdisc replace dev veth0 root netem "$@" || return 1
	done
}

# link_off_while SECONDS COMMAND...: down and up again; the command must succeed before and after.
link_off_while()
{
	local seconds=$1

	shift
	"$@" && ip -n src link set veth0 down || return 1
	sleep "$seconds"
	ip -n src link set veth0 up && "$@"
}

# shellcheck disable=SC2046 # words
signal_destination() { kill "-$1" $(ip netns pids dst); }

# End both QEMUs and whatever listens.
end_guests()
{
	local pid

	for pid in $(ip netns pids src 2>/dev/null) $(ip netns pids dst 2>/dev/null) $(pgrep -f "$work/"); do
		kill -KILL "$pid" 2>/dev/null
		wait "$pid" 2>/dev/null
		wait_for 10 ended "$pid"
	done
}

# And remove the link.
cleanup()
{
	local ns

	work=$all
	end_guests
	for ns in src dst; do
		ip netns del $ns 2>/dev/null
	done
	rm -rf "$work"
}
