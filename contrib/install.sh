#!/bin/sh
# install.sh install|uninstall: puts the programs of BIN to PREFIX/bin and the systemd units where systemd looks for them,
# below DESTDIR, or takes them away again. Every file is replaced in one step, so that a running managerd may start shims
# meanwhile. systemd is told only where it runs and DESTDIR is empty; nothing is started, stopped or enabled, apart from
# units that are removed.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
PREFIX=${PREFIX:-/usr/local} DESTDIR=${DESTDIR:-} BIN=${BIN:-$source/bin}
case $PREFIX in
/*) PREFIX=${PREFIX%/} ;;
*) echo "PREFIX is $PREFIX; it must be an absolute path" >&2; exit 1 ;;
esac
if [ -z "${UNITDIR:-}" ]; then
	case $PREFIX in # what systemd.unit(5) lists
	"" | /usr) UNITDIR=/usr/lib/systemd/system ;;
	/usr/local) UNITDIR=/usr/local/lib/systemd/system ;;
	*) UNITDIR=/etc/systemd/system ;;
	esac
fi
programs="managerd shim-runc mctl" units="managerd.service managerd.socket"
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then live=yes; else live=""; fi

put() { # FROM MODE TO
	cp "$1" "$3.new"
	chmod "$2" "$3.new"
	mv -f "$3.new" "$3"
}

case ${1:-} in
install)
	mkdir -p "$DESTDIR$PREFIX/bin" "$DESTDIR$UNITDIR"
	# The shim first: a managerd that starts meanwhile works with a newer shim, and with an older one.
	for p in shim-runc managerd mctl; do put "$BIN/$p" 0755 "$DESTDIR$PREFIX/bin/$p"; done
	temp=$(mktemp)
	trap 'rm -f "$temp"' EXIT
	for u in $units; do
		sed "s|@PREFIX@|$PREFIX|g" "$source/init/$u" >"$temp"
		put "$temp" 0644 "$DESTDIR$UNITDIR/$u"
	done
	if [ -n "$live" ]; then
		systemctl daemon-reload
		if systemctl --quiet is-active managerd.service; then
			echo "installed; the managerd that runs is replaced by: systemctl restart managerd"
		else
			echo "installed; start it with: systemctl enable --now managerd.socket managerd.service"
		fi
	fi
	;;
uninstall)
	if [ -n "$live" ]; then
		# Shims and containers live on: end them first, if they are to end.
		systemctl --quiet disable --now managerd.socket managerd.service 2>/dev/null || :
	fi
	for u in $units; do rm -f "$DESTDIR$UNITDIR/$u"; done
	for p in $programs; do rm -f "$DESTDIR$PREFIX/bin/$p"; done
	[ -z "$live" ] || systemctl daemon-reload
	;;
*)
	echo "usage: install.sh install|uninstall, with PREFIX, DESTDIR, UNITDIR, BIN" >&2
	exit 2
	;;
esac
