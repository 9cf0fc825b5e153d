#!/bin/bash
# What make test-vm runs: the tests of test/vm/guest in two boots of one disk of the test machine, and the tests of the
# packages that know cgroups, because no other machine of ours has version 2. Needs BIN with the programs. GO: the go
# command; TAGS: the tests' build tags; OUT: where logs are kept (a temporary directory, removed when all is well).
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
for package in test/vm/guest reaper cgroups cmd/shim-runc/internal/engine cmd/shim-runc/internal/service; do
	CGO_ENABLED=1 "$go" test -c -tags "vmguest $tags" -ldflags '-s -w -extldflags -static' -o "$tree/tests/$(basename "$package").test" "./$package"
done
cat >"$tree/boot1" <<'GUEST'
mount -t tmpfs tmpfs /tmp
cd /tmp
/vmtest/tests/guest.test -test.run '^TestFirstBoot$' -test.timeout 200s || exit
export MANAGERD_BIN_DIR=/vmtest/work/this/bin
for test in cgroups:100 engine:300 service:150; do
	began=$SECONDS t=${test%:*}
	/vmtest/tests/$t.test -test.short -test.run '^Test' -test.timeout ${test#*:}s >/out/$t.txt 2>&1 || { s=$?; cat /out/$t.txt; exit $s; }
	echo "$t: $((SECONDS - began)) s"
done
GUEST
cat >"$tree/boot2" <<'GUEST'
mount -t tmpfs tmpfs /tmp
cd /tmp
/vmtest/tests/guest.test -test.run '^TestSecondBoot$' -test.timeout 100s
GUEST
for boot in 1 2; do
	test/vm/run.sh -i "$work/tree" -o "$out/boot$boot" -d "$work/disk" -t $((boot == 1 ? 700 : 140)) "bash /vmtest/boot$boot"
done
status=0
