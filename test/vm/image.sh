#!/bin/bash
# Prints a directory with root.img (Debian, systemd, cgroup v2), vmlinuz and initrd.img for run.sh, and builds it when it
# is not there: about a minute, once. Needs root (debootstrap changes root), debootstrap, mke2fs, cpio, busybox-static.
# Nothing is mounted on the host.
set -euo pipefail
cd "$(dirname "$0")"

suite=bookworm
mirror=${MANAGERD_VM_MIRROR:-http://deb.debian.org/debian}
packages=systemd,systemd-sysv,dbus,iproute2,iptables,kmod,procps,mount,util-linux,busybox-static,e2fsprogs,libseccomp2,nftables,dmsetup,thin-provisioning-tools,btrfs-progs,erofs-utils,fuse3,jq,criu,containerd,crun,apparmor
key=$(cat image.sh initrd.sh | sha256sum | cut -c1-16)
cache=${MANAGERD_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/managerd/vm}
out=$cache/$key
if [ -e "$out/done" ]; then
	touch "$out/done"
	echo "$out"
	exit 0
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/log
fail() {
	tail -n 40 "$log" >&2
	echo "cannot build the image of the test machine: $1" >&2
	exit 1
}
root=$work/root
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" >"$log" 2>&1 </dev/null ||
	fail "debootstrap of $suite from $mirror failed; MANAGERD_VM_MIRROR names another mirror"

# The kernel's package is unpacked, not installed: its hooks would bring a boot loader and an initramfs of their own.
newest() { apt-cache depends linux-image-cloud-amd64 2>>"$log" | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
kernel=$(newest)
if [ -z "$kernel" ]; then
	apt-get update >>"$log" 2>&1 </dev/null || fail "apt-get update"
	kernel=$(newest)
fi
[ -n "$kernel" ] || fail "apt knows no linux-image-cloud-amd64"
(cd "$work" && apt-get download "$kernel" && mkdir kernel && dpkg -x ./linux-image-*.deb kernel) >>"$log" 2>&1 </dev/null || fail "$kernel"
release=$(ls "$work/kernel/lib/modules")
mkdir -p "$root/lib/modules"
cp -a "$work/kernel/lib/modules/$release" "$root/lib/modules/"
chroot "$root" depmod "$release" >>"$log" 2>&1 || fail depmod

# Fast to boot, and no first boot: no udev, no getty, a machine id, a volatile journal.
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/usr/share/{doc,man,locale}/*
echo 6d616e61676572646d616e6167657264 >"$root/etc/machine-id"
echo testvm >"$root/etc/hostname"
: >"$root/etc/fstab"
chroot "$root" passwd -d root >>"$log" 2>&1
mask="serial-getty@.service getty.target getty@.service systemd-udevd.service systemd-udev-trigger.service
	systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-timesyncd.service systemd-networkd.service
	systemd-resolved.service systemd-firstboot.service systemd-remount-fs.service dev-hugepages.mount sys-kernel-debug.mount
	sys-kernel-tracing.mount apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
	e2scrub_reap.service containerd.service logrotate.timer man-db.timer apparmor.service"
for unit in $mask; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d" "$root/out" "$root/vmtest"
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\n' >"$root/etc/systemd/journald.conf.d/test.conf"
printf '[Manager]\nDefaultEnvironment=DM_DISABLE_UDEV=1\n' >"$root/etc/systemd/system.conf.d/test.conf"
cat >"$root/etc/systemd/system/vmtest.service" <<'UNIT'
[Unit]
Description=The test
After=multi-user.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/bash /out/main
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/ttyS1
[Install]
WantedBy=default.target
UNIT
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
sed -i 's/^After=.*/After=basic.target dbus.socket/' "$root/etc/systemd/system/vmtest.service"
ln -s ../vmtest.service "$root/etc/systemd/system/multi-user.target.wants/vmtest.service"
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"

./initrd.sh "$root" "$release" "$work/initrd.img" >>"$log" 2>&1 || fail "the initial RAM disk"
mke2fs -q -t ext4 -d "$root" -E lazy_itable_init=1 -O ^has_journal "$work/root.img" 3G >>"$log" 2>&1 || fail mke2fs
rm -rf "$root"
cp "$work/kernel/boot/vmlinuz-$release" "$work/vmlinuz"
rm -rf "$work/kernel" "$work"/*.deb
touch "$work/done"
rm -rf "$out"
mv "$work" "$out"
chmod 0755 "$out"
# Images that nobody has used for a week, and what is left of builds that were interrupted.
find "$cache" -mindepth 2 -maxdepth 2 \( -name done -o -name log -path '*/build.*' \) -mtime +6 -printf '%h\0' | xargs -0r rm -rf
echo "$out"
