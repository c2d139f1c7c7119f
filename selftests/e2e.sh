# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Functions for scripts that move a guest, in the VM of tools/vm/run: two network
# namespaces, src and dst, joined by a shaped link; a guest in a QEMU at either end.
# To be sourced. Everything it makes is below $work and gone after cleanup.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kmig=$root/build/tools/kmig
export LD_LIBRARY_PATH=$root/build/lib
work=$(mktemp -d)
src_ip=10.77.0.1
dst_ip=10.77.0.2
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

# link_add RATE: the link alone, where it is gone.
link_add()
{
	local ns

	ip link add veth0 netns src type veth peer name veth0 netns dst
	ip -n src addr add $src_ip/24 dev veth0
	ip -n dst addr add $dst_ip/24 dev veth0
	for ns in src dst; do
		ip -n $ns link set lo up
		ip -n $ns link set veth0 up
	done
	[ -z "$1" ] || link_shape "$1"
}

# link_shape RATE: anew, also where it was shaped already.
link_shape()
{
	local ns

	for ns in src dst; do
		tc -n $ns qdisc replace dev veth0 root tbf rate "$1" burst 256k latency 100ms || return 1
	done
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
	ip netns exec src "$kmig" qemu run --memory $guest_memory --qmp "$work/src.qmp" \
		--name "$guest_name" -- "${qemu[@]}" 2>"$work/src.err" &
	src_pid=$!
}

# kmig receive, with a QEMU that waits. Sets recv_pid; returns when it listens.
start_receive()
{
	[ -e "$work/secret" ] || (umask 077 && head -c 32 /dev/urandom | base64 >"$work/secret")
	qemu_args "$work/dst.log"
	ip netns exec dst "$kmig" receive --listen $dst_ip --secret "$work/secret" \
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
	ip netns exec src "$kmig" qemu migrate --qmp "$work/src.qmp" --to $dst_ip \
		--secret "$work/secret" --report "$work/report.json" "$@"
}

dst_pid() { pgrep -f "unix:$work/dst.qmp" | head -n 1; }

# The two logs, one after the other, are one guest's: no heartbeat missing, none
# twice, one boot id, no corruption. The line cut by the move comes out whole; the
# very last may still be on its way.
beats_continue()
{
	cat "$work/src.log" "$work/dst.log" | tr -d '\r' | sed '$d' | awk '
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

# End both QEMUs and whatever listens.
end_guests()
{
	local pid ns

	for ns in src dst; do
		for pid in $(ip netns pids $ns 2>/dev/null); do
			kill -KILL "$pid" 2>/dev/null
			wait "$pid" 2>/dev/null
			wait_for 10 ended "$pid"
		done
	done
}

# And remove the link.
cleanup()
{
	local ns

	end_guests
	for ns in src dst; do
		ip netns del $ns 2>/dev/null
	done
	rm -rf "$work"
}
