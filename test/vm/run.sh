#!/bin/bash
# run.sh -i TREE -o OUTDIR [-d DISK] [-t SECONDS] [-k PARAMETERS] COMMAND: boots the test machine (image.sh) under qemu without
# KVM, with TREE at /vmtest, read-only, and runs COMMAND there by bash, with /out as OUTDIR. The exit status is COMMAND's; 124:
# the time limit; 125: the machine ended without a result. DISK keeps the root from boot to boot; without it, it is thrown away.
# PARAMETERS are more of the kernel's command line.
set -euo pipefail
tree="" out="" disk="" seconds=240 kernel=""
while getopts i:o:d:t:k: option; do
	case $option in
	k) kernel=$OPTARG ;;
	i) tree=$OPTARG ;;
	o) out=$OPTARG ;;
	d) disk=$OPTARG ;;
	t) seconds=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
command=${1:?usage: run.sh -i TREE -o OUTDIR [-d DISK] [-t SECONDS] [-k PARAMETERS] COMMAND}
here=$(cd "$(dirname "$0")" && pwd)
image=$("$here/image.sh")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/tree" "$work/out"
rm -f "$out/status"
cat >"$work/out/main" <<MAIN
# The result is on disk before the machine goes; an orderly power off would wait for containers.
status=0
( $command ) || status=\$?
journalctl --no-pager -o short-monotonic >/out/journal.txt 2>&1 || :
echo \$status >/out/status
sync
echo o >/proc/sysrq-trigger
sleep 60
MAIN
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "${tree:-$work/tree}" "$work/tree.img" \
	$(($(du -sm "${tree:-$work/tree}" | cut -f 1) * 9 / 8 + 16))M >/dev/null
mke2fs -q -t ext4 -J size=16 -d "$work/out" "$work/out.img" 256M >/dev/null
if [ -z "$disk" ]; then
	disk=$work/root.img
fi
[ -e "$disk" ] || cp --sparse=always "$image/root.img" "$disk"

# What TCG does slowly is left out: string instructions (a byte at a time), second page tables for the kernel's own accesses,
# zeroing pages in advance and huge ones at once, grace periods of timer ticks, processors that wait for each other. Without a
# PIT the clock is set by the HPET, which a busy host does not lead astray: guests had a clock 76 times too fast.
cheap="init_on_alloc=0 transparent_hugepage=never rcupdate.rcu_expedited=1"
args=(-machine pc,pit=off -accel "tcg,thread=multi,tb-size=512" -cpu "max,la57=off,erms=off,fsrm=off,smap=off,smep=off" -smp 2 -m 2048
	-nodefaults -no-reboot -display none -kernel "$image/vmlinuz" -initrd "$image/initrd.img"
	-append "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable systemd.show_status=0 $cheap $kernel"
	-drive "file=$disk,format=raw,if=virtio,cache=unsafe"
	-drive "file=$work/tree.img,format=raw,if=virtio,readonly=on"
	-drive "file=$work/out.img,format=raw,if=virtio,cache=unsafe"
	-serial "file:$out/console.txt" -serial stdio)
status=0
timeout --foreground -k 5 "$seconds" qemu-system-x86_64 "${args[@]}" </dev/null || status=$?
if [ "$status" = 124 ] || [ "$status" = 137 ]; then
	echo "the test machine did not end within $seconds s; see $out/console.txt" >&2
	e2fsck -fy "$work/out.img" >/dev/null 2>&1 || :
	debugfs -R "rdump / $out" "$work/out.img" >/dev/null 2>&1 || :
	exit 124
fi
e2fsck -fy "$work/out.img" >/dev/null 2>&1 || [ $? -le 1 ]
debugfs -R "rdump / $out" "$work/out.img" >/dev/null 2>&1
rm -rf "$out/lost+found"
if [ ! -s "$out/status" ]; then
	tail -n 30 "$out/console.txt" >&2 || :
	echo "the test machine ended without a result" >&2
	exit 125
fi
exit "$(cat "$out/status")"
