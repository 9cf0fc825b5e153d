#!/bin/bash
# Prints a directory to lay over /usr of the test machine: ZFS for its kernel, and the programs zfs and zpool. It is built when
# it is not there, from Debian's contrib: ten minutes of compiling, once. Needs what image.sh needs; no package is installed on
# the host, and its sources stay as they are.
set -euo pipefail
cd "$(dirname "$0")"

suite=bookworm
mirror=${MANAGERD_VM_MIRROR:-http://deb.debian.org/debian}
image=$(./image.sh)
release=$(debugfs -R 'ls -p /usr/lib/modules' "$image/root.img" 2>/dev/null | sed -n 's|^/[0-9]*/[0-9]*/[0-9]*/[0-9]*/\([0-9][^/]*\)/.*|\1|p')
key=$(cat zfs.sh - <<<"$release" | sha256sum | cut -c1-16)
cache=$(dirname "$image")
out=$cache/zfs-$key
if [ -e "$out/done" ]; then
	touch "$out/done"
	echo "$out/usr"
	exit 0
fi

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/log
fail() {
	tail -n 40 "$log" >&2
	echo "cannot build ZFS for the test machine: $1" >&2
	exit 1
}
download() { (cd "$work/debs" && apt-get "$@") >>"$log" 2>&1 </dev/null; }

mkdir -p "$work"/{debs,lists/partial,cache/archives/partial,files}
: >"$work/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite contrib" >"$work/sources"
contrib=(-o "Dir::Etc::sourcelist=$work/sources" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
	-o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
download "${contrib[@]}" update || fail "contrib of $suite from $mirror"
programs="zfsutils-linux libzfs4linux libzpool5linux libnvpair3linux libuutil3linux"
download "${contrib[@]}" download zfs-dkms $programs || fail "the packages of ZFS"
abi=${release%-cloud-amd64}
download download "linux-headers-$release" "linux-headers-$abi-common" "linux-kbuild-${release%%.0-*}" ||
	fail "the headers of $release; if it is not the newest kernel any more, remove $image"

root=$work/root
debootstrap --variant=minbase --include=gcc,make,libc6-dev,libelf1,perl,kmod,file "$suite" "$root" "$mirror" >>"$log" 2>&1 </dev/null ||
	fail "debootstrap of $suite from $mirror failed; MANAGERD_VM_MIRROR names another mirror"
for deb in "$work"/debs/{linux-,zfs-dkms}*.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root"; done
for package in $programs; do dpkg -x "$work/debs/$package"_*.deb "$work/files"; done
chroot "$root" sh -euc '
	cd /usr/src/zfs-*
	./configure --disable-dependency-tracking --prefix=/usr --with-config=kernel --with-linux=/lib/modules/$1/source --with-linux-obj=/lib/modules/$1/build
	make -j"$(nproc)"
	find module -name "*.ko" -exec strip --strip-debug {} +
' sh "$release" >>"$log" 2>&1 </dev/null || fail "zfs-dkms for $release"

# The test machine has no /lib and /sbin of its own, they are those of /usr.
mkdir -p "$work/usr/lib/modules/$release/extra" "$work/usr/sbin"
find "$root"/usr/src/zfs-*/module -name '*.ko' -exec cp {} "$work/usr/lib/modules/$release/extra/" \;
cp -a "$work/files/lib/x86_64-linux-gnu" "$work/usr/lib/"
cp -a "$work"/files/sbin/z{fs,pool} "$work/usr/sbin/"
rm -rf "$root" "$work"/{debs,lists,cache,files,status,sources}
touch "$work/done"
rm -rf "$out"
mv "$work" "$out"
chmod 0755 "$out"
echo "$out/usr"
