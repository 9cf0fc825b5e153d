#!/bin/sh
# Prints the path of a go command that is new enough for go.mod. Where none is installed, the official toolchain is
# fetched once from the Go module proxy (module golang.org/toolchain, as the go command itself does it).
set -eu
cd "$(dirname "$0")/.."
want=$(sed -n 's/^go //p' go.mod)
for g in go /usr/local/go/bin/go; do
	path=$(command -v "$g" 2>/dev/null) || continue
	# From 1.21 on, a go command fetches what go.mod asks for by itself.
	minor=$("$path" env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
	if [ -n "$minor" ] && { [ "$minor" -ge "$(echo "$want" | cut -d. -f2)" ] ||
		{ [ "$minor" -ge 21 ] && [ "$("$path" env GOTOOLCHAIN)" != local ]; }; }; then
		echo "$path"
		exit 0
	fi
done
case $(uname -m) in
x86_64) arch=amd64 ;;
aarch64) arch=arm64 ;;
*) echo "no go $want for $(uname -m): install it by hand" >&2; exit 1 ;;
esac
cache=${XDG_CACHE_HOME:-$HOME/.cache}/managerd
name=v0.0.1-go$want.linux-$arch
dir=$cache/golang.org/toolchain@$name
if [ ! -x "$dir/bin/go" ]; then
	for tool in curl unzip; do
		command -v "$tool" >/dev/null 2>&1 || missing="${missing:-} $tool"
	done
	if [ -n "${missing:-}" ]; then
		if [ "$(id -u)" != 0 ]; then
			echo "go $want is missing, and to fetch it: sudo apt-get install -y curl unzip ca-certificates" >&2
			exit 1
		fi
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends curl unzip ca-certificates; } >&2 </dev/null
	fi
	mkdir -p "$cache"
	zip=$(mktemp)
	trap 'rm -f "$zip"' EXIT
	proxy=$(echo "${GOPROXY:-https://proxy.golang.org}" | cut -d, -f1)
	curl -fsSL -o "$zip" "$proxy/golang.org/toolchain/@v/$name.zip" || { echo "cannot fetch go $want from $proxy" >&2; exit 1; }
	unzip -q -o "$zip" -d "$cache"
	chmod -R u+x "$dir/bin" "$dir/pkg/tool"
fi
echo "$dir/bin/go"
