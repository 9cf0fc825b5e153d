#!/bin/sh
# Makes sure of what the build or the tests need from the system: contrib/deps.sh build|test|vm.
# Missing Debian packages are installed when this runs as root; otherwise the exact command is printed and it stops.
# The Go toolchain is not a Debian package: contrib/go.sh finds or fetches it.
set -eu

need=""
want() { # COMMAND-OR-FILE PACKAGE
	case $1 in
	/*) [ -e "$1" ] ;;
	*) command -v "$1" >/dev/null 2>&1 ;;
	esac || need="$need $2"
}

want gcc "gcc libc6-dev"
want pkg-config pkg-config
{ command -v pkg-config >/dev/null 2>&1 && pkg-config --exists libseccomp; } || need="$need libseccomp-dev"
want /bin/busybox busybox-static
if [ -e /bin/busybox ] && ! /bin/busybox true 2>/dev/null; then need="$need busybox-static"; fi
want git git
if [ "${1:-build}" = test ]; then
	want ctr containerd
	want containerd containerd
	want runc runc
	want crun crun
	want criu criu
	want iptables iptables
	case $(cat /sys/module/apparmor/parameters/enabled 2>/dev/null) in Y*) want apparmor_parser apparmor ;; esac
	want ps procps
	want ip iproute2
	want /etc/ssl/certs/ca-certificates.crt ca-certificates
	want docker-registry docker-registry
	want skopeo skopeo
	want podman podman
	want mkfs.btrfs btrfs-progs
	want mkfs.erofs erofs-utils
	want mkfs.ext4 e2fsprogs
	want mkfs.xfs xfsprogs
fi
if [ "${1:-build}" = vm ]; then
	want qemu-system-x86_64 qemu-system-x86
	want debootstrap debootstrap
	want mke2fs e2fsprogs
	want cpio cpio
fi
[ -n "$need" ] || exit 0

need=$(printf '%s\n' $need | sort -u | tr '\n' ' ')
if ! command -v apt-get >/dev/null 2>&1; then
	echo "missing: $need(Debian package names); install them with this system's package manager" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "missing packages; run: sudo apt-get install -y --no-install-recommends $need" >&2
	exit 1
fi
echo "installing: $need"
log=$(mktemp)
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $need; } >"$log" 2>&1 </dev/null; then
	cat "$log" >&2
	rm -f "$log"
	echo "cannot install: $need" >&2
	exit 1
fi
rm -f "$log"
