#!/bin/bash
# initrd.sh ROOT RELEASE FILE: makes the initial RAM disk: busybox and the modules of the virtio disks. It mounts the
# disks as the root, /vmtest and /out, and hands over to systemd.
set -euo pipefail
root=$1 release=$2 file=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{bin,dev,proc,sys,root,modules}
cp /bin/busybox "$work/bin/busybox"
modules=""
for m in $(chroot "$root" modprobe --set-version "$release" --show-depends virtio_pci | sed -n 's/^insmod //p') \
	$(chroot "$root" modprobe --set-version "$release" --show-depends virtio_blk | sed -n 's/^insmod //p'); do
	name=$(basename "$m")
	case " $modules " in *" $name "*) continue ;; esac
	cp "$root$m" "$work/modules/$name"
	modules="$modules $name"
done
cat >"$work/init" <<INIT
#!/bin/busybox sh
bb=/bin/busybox
\$bb mount -t devtmpfs dev /dev
\$bb mount -t proc proc /proc
\$bb mount -t sysfs sys /sys
for m in$modules; do \$bb insmod /modules/\$m; done
until [ -b /dev/vdc ]; do \$bb usleep 20000; done
\$bb mount -t ext4 -o rw,noatime /dev/vda /root || exec \$bb sh
\$bb mount -t ext4 -o ro /dev/vdb /root/vmtest
\$bb mount -t ext4 -o commit=1,data=journal /dev/vdc /root/out
\$bb umount /proc /sys /dev
exec \$bb switch_root /root /sbin/init
INIT
chmod 0755 "$work/init"
(cd "$work" && find . | cpio -o -H newc --quiet | gzip -1) >"$file"
