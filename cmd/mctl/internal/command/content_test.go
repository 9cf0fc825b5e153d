package command_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// in runs mctl with input; it must succeed and have nothing to complain about.
func (w *world) in(input string, args ...string) string {
	w.Helper()
	out, errs, status := w.run(w.Mctl(args...), input)
	if status != 0 || errs != "" {
		w.Fatalf("mctl %q: status %d, %s", args, status, errs)
	}
	return out
}

// TestContent: blobs that are written, labelled, edited and removed.
func TestContent(t *testing.T) {
	w := newWorld(t)
	d := digest.FromString("{}").String()
	if out := w.in("{}", "content", "ingest", "--expected-size", "2", "--expected-digest", d, "--label", "a=b", "mine"); out != d+"\n" {
		t.Errorf("ingest prints %q", out)
	}
	if out := w.ok("content", "get", d); out != "{}" {
		t.Errorf("get prints %q", out)
	}
	if out := w.in("{}", "content", "ingest", "-o", "json", "again"); !strings.Contains(out, d) || !strings.Contains(out, `"size": 2`) {
		t.Errorf("ingest of what is there prints %q", out)
	}
	_, errs, status := w.run(w.Mctl("content", "ingest", "--expected-digest", d, "mine"), "[]")
	if status != 1 || !strings.Contains(errs, d) {
		t.Errorf("ingest of another digest: %d, %s", status, errs)
	}
	w.fails(2, []string{"abc", "digest"}, "content", "ingest", "--expected-digest", "abc", "mine")
	if out := w.ok("content", "active", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("left: %s", out)
	}

	if out := w.ok("content", "label", d, "c=d", "a="); !strings.HasPrefix(out, "c=d,containerd.io/gc.root=") {
		t.Errorf("label prints %q", out)
	}
	zero := "sha256:" + strings.Repeat("0", 64)
	w.fails(1, []string{zero, "not found", "content ls"}, "content", "label", zero, "a=b")

	// An editor is a command line.
	editor := filepath.Join(t.TempDir(), "my editor")
	if err := os.WriteFile(editor, []byte("#!/bin/sh\necho drawn\nprintf %s \"$1\" >\"$2\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	edited := digest.FromString("[1]").String()
	out, errs, status := w.mctl("content", "edit", "--editor", "'"+editor+"' '[1]'", "--validate", "json", d)
	if out != edited+"\n" || errs != "drawn\n" || status != 0 {
		t.Errorf("edit prints %q, %q, status %d", out, errs, status)
	}
	if out := w.ok("content", "label", edited); !strings.HasPrefix(out, "c=d,") {
		t.Errorf("labels of the copy: %q", out)
	}
	if out := w.ok("content", "edit", "--editor", "true", d); out != d+"\n" {
		t.Errorf("edit of nothing prints %q", out)
	}
	w.fails(1, []string{d, "no JSON"}, "content", "edit", "--editor", "printf x >", "--validate", "json", d)
	w.fails(1, []string{d, "exit status 3"}, "content", "edit", "--editor", "exit 3;", d)
	w.fails(1, []string{zero, "not found"}, "content", "edit", "--editor", "true", zero)
	w.fails(2, []string{"$EDITOR"}, "content", "edit", "--editor", "", d)
	w.fails(2, []string{"xml"}, "content", "edit", "--editor", "true", "--validate", "xml", d)

	// The collector keeps both until their roots are cleared.
	if id := strings.TrimSpace(w.ok("leases", "create")); id != "" {
		w.ok("leases", "rm", "--sync", id)
	}
	if out := w.ok("content", "ls", "-q"); !strings.Contains(out, d) || !strings.Contains(out, edited) {
		t.Errorf("collected: %s", out)
	}
	if out := w.ok("content", "rm", d); out != d+"\n" {
		t.Errorf("rm prints %q", out)
	}
	out, errs, status = w.mctl("content", "rm", d, edited)
	if out != edited+"\n" || status != 0 || !strings.Contains(errs, d) {
		t.Errorf("rm of a missing one: %d, %q, %q", status, out, errs)
	}
	w.fails(2, []string{"abc", "digest"}, "content", "rm", "abc")
}
