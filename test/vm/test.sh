#!/bin/bash
# What make test-vm runs: the tests of test/vm/guest in two boots of one disk of the test machine, and those tests of other
# packages that come out differently there. Needs BIN with the programs. GO: the go
# command; TAGS: the tests' build tags; OUT: where logs are kept (a temporary directory, removed when all is well). PARTS, a
# regular expression such as 'Install|Import|Steady|Restart': only these parts of the first boot, and nothing else. TESTS, one
# such as 'engine|reaper': only the tests of these packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${BIN:-$PWD/bin} go=${GO:-go} tags=${TAGS:-seccomp netgo osusergo}
if [ "$(id -u)" != 0 ]; then
	echo "make test-vm needs root: the image of the machine is made by debootstrap" >&2
	exit 1
fi
work=$(mktemp -d)
out=${OUT:-$work/out}
status=1
end() {
	if [ "$status" = 0 ] || [ -n "${OUT:-}" ]; then rm -rf "$work"; else rm -rf "$work/tree" "$work/disk"; echo "logs: $out" >&2; fi
}
trap end EXIT

# Two builds to install from, which differ in their version.
tree=$work/tree/vmtest
mkdir -p "$tree/tests"
for build in this next; do
	mkdir -p "$tree/work/$build/bin" "$tree/work/$build/contrib"
	cp contrib/install.sh "$tree/work/$build/contrib/"
	cp -r init "$tree/work/$build/"
done
cp "$bin"/{managerd,shim-runc,mctl} "$tree/work/this/bin/"
stamp="-s -w -X github.com/managerd/managerd/shimapi/version.Version=vm-next"
CGO_ENABLED=0 "$go" build -trimpath -ldflags "$stamp" -o "$tree/work/next/bin/" ./cmd/managerd ./cmd/mctl
CGO_ENABLED=1 "$go" build -trimpath -tags "no_grpc $tags" -ldflags "$stamp -extldflags -static" -o "$tree/work/next/bin/" ./cmd/shim-runc

# Linked statically: Debian's C library in the machine is another one.
test_binary() { # PACKAGE
	CGO_ENABLED=1 "$go" test -c -tags "vmguest failpoints $tags" -ldflags '-s -w -extldflags -static' -o "$tree/tests/$(basename "$1").test" "./$1" </dev/null
}
test_binary test/vm/guest
cat >"$tree/boot1" <<GUEST
mount -t tmpfs tmpfs /tmp
cd /tmp
/vmtest/tests/guest.test -test.run '^TestFirstBoot$/^(${PARTS:-.*})$' -test.timeout 600s || exit
GUEST
once() { # SECONDS
	test/vm/run.sh -i "$work/tree" -o "$out/parts" -t "$1" "bash /vmtest/boot1"
	status=0
	exit
}
if [ -n "${PARTS:-}" ]; then once 700; fi
if [ -n "${TESTS:-}" ]; then printf '%s\n' 'mount -t tmpfs tmpfs /tmp' 'cd /tmp' >"$tree/boot1"; fi
# What is different under cgroup v2, or on a kernel that does not tell how a process ended that is not one's child.
echo "export MANAGERD_BIN_DIR=/vmtest/work/this/bin" >>"$tree/boot1"
while read -r package tests; do
	if [ -n "${TESTS:-}" ] && ! [[ $package =~ ($TESTS)$ ]]; then continue; fi
	test_binary "$package"
	name=$(basename "$package")
	cat >>"$tree/boot1" <<GUEST
began=\$SECONDS
/vmtest/tests/$name.test -test.short -test.run '^Test($tests)' -test.timeout 300s >/out/$name.txt 2>&1 || { s=\$?; cat /out/$name.txt; exit \$s; }
echo "$package: \$((SECONDS - began)) s"
GUEST
done <<'PACKAGES'
cgroups .
reaper .
shimapi Vsock
cmd/shim-runc/internal/engine LeftCgroups|PauseResumeUpdate|Remove|Limits|Update|DeviceRules|ScopeDevices|CgroupsPath|NetDevices
cmd/shim-runc/internal/service OOM|Pause|StatsAndUpdate|Checkpoint(Fails|Refused|NoCriu|Pending|Restore|Input|Terminal|NoOutput)|Restore|SandboxSlice
manager/snapshots/snapshottest Devmapper(Full|Reboot)?)$/^(Layers|View|Kinds|Names|Labels|Usage|Children|Namespaces|Leases|Filters
PACKAGES
if [ -n "${TESTS:-}" ]; then once 800; fi
cat >"$tree/boot2" <<'GUEST'
mount -t tmpfs tmpfs /tmp
cd /tmp
/vmtest/tests/guest.test -test.run '^TestSecondBoot$' -test.timeout 200s
GUEST
for boot in 1 2; do
	test/vm/run.sh -i "$work/tree" -o "$out/boot$boot" -d "$work/disk" -t $((boot == 1 ? 1200 : 240)) "bash /vmtest/boot$boot"
done
status=0
