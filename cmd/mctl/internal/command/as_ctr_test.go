package command_test

import (
	"regexp"
	"strings"
	"testing"
)

// TestAsCtr: what mctl has of ctr prints what ctr prints.
func TestAsCtr(t *testing.T) {
	w := newWorld(t)
	chain := strings.TrimSpace(w.ok("snapshots", "unpack", "busybox"))
	target := w.inspect(busybox)
	layer := target.Children[len(target.Children)-1]
	w.ok("snapshots", "prepare", "one", chain)
	w.put("one", "mine")
	// The image refers to the snapshots, or the collector would remove those that have no label to keep them.
	w.ok("content", "label", target.Digest, "k=v", "containerd.io/gc.ref.snapshot.overlayfs/1=one", "containerd.io/gc.ref.snapshot.overlayfs/2=two")
	for _, args := range [][]string{
		{"snapshots", "mounts", "/mnt", "one"},
		{"snapshots", "info", "one"},
		{"snapshots", "tree"},
		{"snapshots", "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", "one"},
		{"snapshots", "label", "one", "k=v", "containerd.io/gc.root="},
		{"content", "active"},
		{"content", "get", target.Digest},
		{"content", "label", layer.Digest, "k=v", "containerd.io/uncompressed="},
		{"images", "label", busybox, "k=v"},
		{"images", "convert", "--uncompress", busybox, "local/a:1"},
	} {
		want, errs, status := w.run(w.Command(args...), "")
		if status != 0 {
			t.Errorf("ctr %q: status %d, %s", args, status, errs)
			continue
		}
		got := w.ok(args...)
		if strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
			t.Errorf("mctl %q prints\n%s\nctr prints\n%s", args, got, want)
		}
	}
	digits := regexp.MustCompile("[0-9]+") // snapshots are numbered
	words := func(s string) string { return digits.ReplaceAllString(strings.Join(strings.Fields(s), " "), "#") }
	for _, c := range []struct{ do, undo []string }{ // the same twice
		{[]string{"snapshots", "prepare", "-t", "/mnt", "two", chain}, []string{"snapshots", "rm", "two"}},
		{[]string{"snapshots", "view", "--mounts", "two", chain}, []string{"snapshots", "rm", "two"}},
		{[]string{"content", "rm", layer.Digest}, []string{"images", "import", archive}},
	} {
		got := w.ok(c.do...)
		w.ok(c.undo...)
		want, errs, status := w.run(w.Command(c.do...), "")
		w.ok(c.undo...)
		if status != 0 || words(got) != words(want) {
			t.Errorf("mctl %q prints\n%s\nctr (status %d, %s) prints\n%s", c.do, got, status, errs, want)
		}
	}
}
