#!/bin/bash
# test.sh systemd|packages|oci|zfs: what make test-vm, make test-vm-packages, make test-vm-oci and make test-vm-zfs run on a test
# machine:
#   systemd   the tests of test/vm/guest, in two boots of one disk
#   packages  those tests of other packages that come out differently there
#   oci       those that stand for a row of docs/runtime-spec.md
#   zfs       those of the snapshotter zfs, with the modules of zfs.sh
# Needs BIN with the programs. GO: the go command; TAGS: the tests' build tags; OUT: where logs are kept (a temporary directory,
# removed when all is well). PARTS, a regular expression such as 'Install|Import|Steady|Restart': only these parts of the first
# boot, and nothing else. TESTS, one such as 'engine|reaper': only the tests of these packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-systemd} bin=${BIN:-$PWD/bin} go=${GO:-go} tags=${TAGS:-seccomp netgo osusergo}
if [ "$(id -u)" != 0 ]; then
	echo "make test-vm needs root: the image of the machine is made by debootstrap" >&2
	exit 1
fi
work=$(mktemp -d)
out=${OUT:-$work/out}
status=1
end() {
	if [ "$status" = 0 ] || [ -n "${OUT:-}" ]; then rm -rf "$work"; else rm -rf "$work"/{systemd,packages,oci,zfs}*; echo "logs: $out" >&2; fi
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# test_binaries CGO MACHINE PACKAGE...: linked statically, for Debian's C library in the machine is another one.
test_binaries() {
	local cgo=$1 dir=$work/$2/tests flags='-s -w'
	shift 2
	if [ "$cgo" = 1 ]; then flags="$flags -extldflags -static"; fi
	mkdir -p "$dir"
	CGO_ENABLED=$cgo "$go" test -c -tags "vmguest failpoints $tags" -ldflags "$flags" -o "$dir/" "${@/#/./}" </dev/null
}

# machine SECONDS SCRIPT...: runs the scripts of the tree, one boot each, on one disk.
machine() {
	local seconds=$1 script began=$SECONDS
	shift
	wait "$image"
	for script; do
		test/vm/run.sh -i "$work/$what" -o "$out/$script" -d "$work/$what.img" -t "$seconds" "mount -t tmpfs tmpfs /tmp; cd /tmp; . /vmtest/$script"
	done
	echo "$what: all of it in $((SECONDS - began)) s"
}

test/vm/image.sh >/dev/null & image=$!

case $what in
systemd)
	# Two builds to install from, which differ in their version.
	tree=$work/systemd
	for build in this next; do
		mkdir -p "$tree/work/$build/bin" "$tree/work/$build/contrib"
		cp contrib/install.sh "$tree/work/$build/contrib/"
		cp -r init "$tree/work/$build/"
	done
	cp "$bin"/{managerd,shim-runc,mctl} "$tree/work/this/bin/"
	stamp="-s -w -X github.com/managerd/managerd/shimapi/version.Version=vm-next"
	CGO_ENABLED=0 "$go" build -trimpath -ldflags "$stamp" -o "$tree/work/next/bin/" ./cmd/managerd ./cmd/mctl
	CGO_ENABLED=1 "$go" build -trimpath -tags "no_grpc $tags" -ldflags "$stamp -extldflags -static" -o "$tree/work/next/bin/" ./cmd/shim-runc
	test_binaries 0 systemd test/vm/guest
	echo "/vmtest/tests/guest.test -test.run '^TestFirstBoot\$/^(${PARTS:-.*})\$' -test.timeout 900s" >"$tree/boot1"
	echo "/vmtest/tests/guest.test -test.run '^TestSecondBoot\$' -test.timeout 300s" >"$tree/boot2"
	if [ -n "${PARTS:-}" ]; then machine 1000 boot1; else machine 1000 boot1 boot2; fi
	;;
packages | oci | zfs)
	tree=$work/$what
	mkdir -p "$tree/bin"
	cp "$bin"/{managerd,shim-runc,mctl} "$tree/bin/"
	echo "export MANAGERD_BIN_DIR=/vmtest/bin MANAGERD_OOM_KILLS=4 SNAPSHOTTEST_COLUMNS=overlayfs,devmapper" >"$tree/$what"
	if [ "$what" = zfs ]; then
		wait "$image"
		cp -a "$(test/vm/zfs.sh)" "$tree/usr"
		echo '{ cp -a /vmtest/usr/. /usr/ && ldconfig && depmod && modprobe zfs; } || exit 1; export SNAPSHOTTEST_COLUMNS=devmapper,zfs' >>"$tree/$what"
	fi
	plain="" cgo="" limit=900s seconds=2400
	if [ "$what" = zfs ]; then limit=1800s seconds=5400; fi # a change of a pool takes seconds there
	while read -r package tests; do
		case $package in *:*) on=${package%%:*} ;; *) on=packages ;; esac
		if [ "$on" != "$what" ]; then continue; fi
		package=${package#*:}
		if [ -n "${TESTS:-}" ] && ! [[ $package =~ ($TESTS)$ ]]; then continue; fi
		case $package in cmd/shim-runc/*) cgo="$cgo $package" ;; *) plain="$plain $package" ;; esac
		name=$(basename "$package")
		case $tests in Crash*) short="" ;; *) short=-test.short ;; esac # all of the points
		cat >>"$tree/$what" <<GUEST
began=\$SECONDS
/vmtest/tests/$name.test $short -test.run '^Test($tests)' -test.timeout $limit >>/out/$name.txt 2>&1 || { s=\$?; cat /out/$name.txt; exit \$s; }
echo "$package $tests: \$((SECONDS - began)) s"
GUEST
	done <<'PACKAGES'
cgroups .
reaper .
shimapi Vsock
shimapi/mount .
cmd/shim-runc/internal/engine LeftCgroups|PauseResumeUpdate|Remove|Limits|Update|DeviceRules|ScopeDevices|CgroupsPath|NetDevices
cmd/shim-runc/internal/service OOM|Pause|StatsAndUpdate|Checkpoint(Fails|Refused|NoCriu|Pending|Restore|Input|Terminal|NoOutput|Locks|TCP)|Restore|SandboxSlice
cmd/shim-runc/internal/service CheckpointUnixSocket)$/^(libcontainer
manager/snapshots/overlayfs .
manager/snapshots/snapshottest Conformance|Crash|Diff|Devmapper
oci:cmd/shim-runc/internal/engine AppArmor|CgroupsPath|CheckBefore|CopyUp|DeviceRules|Exec(Affinity|Fields)|Fields|Hook|IDMapped|Limits|MountOptions|N(amespace|etDevices)|Poststop|R(ealtime|ootfs)|S(copeDevices|eccomp|hown)|Terminal|U(nknown|pdate|serNamespace)|WeightDevice
oci:cmd/shim-runc/internal/engine/external Options|SystemdCgroup
oci:cmd/shim-runc/internal/engine/criu .
oci:cmd/shim-runc/internal/service ClampsTold|DecodeOptions|MissingRuntime|Option|WarningsTold
zfs:manager/snapshots/zfs .
zfs:manager/snapshots/snapshottest Conformance|DiffMounted)$/^(zfs
zfs:manager/snapshots/snapshottest Crash)$/^(zfs
zfs:manager/snapshots/snapshottest Full|Layers
zfs:test/e2e Snapshotters$|Suspended
PACKAGES
	if [ -n "$plain" ]; then test_binaries 0 "$what" $(printf '%s\n' $plain | sort -u); fi
	if [ -n "$cgo" ]; then test_binaries 1 "$what" $(printf '%s\n' $cgo | sort -u); fi
	machine "$seconds" "$what"
	;;
*)
	echo "usage: test/vm/test.sh systemd|packages|oci|zfs" >&2
	exit 2
	;;
esac
status=0
