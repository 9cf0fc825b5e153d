package command_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const busybox = "docker.io/library/busybox:latest"

// trimmed is output without the blanks at the ends of its lines.
func trimmed(s string) string {
	return regexp.MustCompile(`[ \t]+\n`).ReplaceAllString(strings.TrimRight(s, " \t\n")+"\n", "\n")
}

// TestTablesAsCtr: what ctr prints, mctl prints.
func TestTablesAsCtr(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.ok("containers", "create", "--label", "a=b", "--rootfs", "/", "two", "true")
	w.ok("namespaces", "create", w.Namespace+"-other", "x=y", "a=b")
	w.ok("leases", "create", "--id", "l1", "k=v")
	w.ok("tasks", "exec", "-d", "--exec-id", "e1", "one", "sleep", "1000")
	for _, args := range [][]string{
		{"namespaces", "ls"}, {"namespaces", "ls", "-q"}, {"images", "ls"}, {"images", "ls", "-q"}, {"images", "check"}, {"images", "check", "-q"},
		{"containers", "ls"}, {"containers", "ls", "-q"}, {"containers", "info", "one"}, {"containers", "info", "--spec", "one"}, {"containers", "label", "two", "a=b"},
		{"tasks", "ls"}, {"tasks", "ls", "-q"},
		{"snapshots", "ls"}, {"snapshots", "tree"}, {"snapshots", "usage"}, {"snapshots", "usage", "-b"}, {"snapshots", "info", "one"},
		{"content", "ls", "-q"}, {"leases", "ls"}, {"leases", "ls", "-q"}, {"plugins", "ls"}, {"plugins", "ls", "-q"},
		{"c", "ls"}, {"t", "ls"}, {"i", "ls"}, {"ns", "ls"}, {"image", "list"}, {"container", "list"}, {"task", "list"}, {"snapshot", "list"}, {"plugin", "list"},
	} {
		theirs, errs, status := w.run(w.Command(args...), "")
		if status != 0 {
			t.Fatalf("ctr %q: %s", args, errs)
		}
		if ours := w.ok(args...); trimmed(ours) != trimmed(theirs) {
			t.Errorf("%q: mctl prints\n%s\nctr prints\n%s", args, ours, theirs)
		}
	}
	// Counters go on between two commands, and ctr shows details of an exec as Go does: the first columns are
	// compared. Behind what ctr has mctl has more.
	names := func(s string) (names []string) {
		for _, l := range strings.Split(s, "\n") {
			names = append(names, strings.Join(strings.Fields(l + " -")[:1], ""))
		}
		return names
	}
	for _, what := range []string{"metrics", "ps"} {
		theirs, _, _ := w.run(w.Command("tasks", what, "one"), "")
		if ours := w.ok("tasks", what, "one"); !strings.HasPrefix(strings.Join(names(ours), "\n"), strings.TrimSuffix(strings.Join(names(theirs), "\n"), "\n-")) {
			t.Errorf("%s: mctl prints\n%s\nctr prints\n%s", what, ours, theirs)
		}
	}
	if out := w.ok("tasks", "ps", "one"); !strings.Contains(out, `{"exec_id":"e1"}`) {
		t.Errorf("ps does not tell the exec: %s", out)
	}
	w.ok("namespaces", "rm", w.Namespace+"-other")
	w.ok("leases", "rm", "l1")
}

// TestJSON: everything that prints a table prints JSON.
func TestJSON(t *testing.T) {
	w := newWorld(t)
	var made struct {
		ID  string
		PID int
	}
	parse(t, w.ok("run", "-d", "-o", "json", "busybox", "one", "sleep", "1000"), &made)
	if made.ID != "one" || made.PID <= 0 {
		t.Errorf("run says %+v", made)
	}
	for _, args := range [][]string{
		{"namespaces", "ls"}, {"images", "ls"}, {"images", "check"}, {"images", "usage"}, {"containers", "ls"}, {"tasks", "ls"},
		{"tasks", "ps", "one"}, {"snapshots", "ls"}, {"snapshots", "tree"}, {"snapshots", "usage"}, {"content", "ls"}, {"plugins", "ls"},
		{"images", "ls", "-q"}, {"images", "import", archive},
	} {
		var rows []any
		if parse(t, w.ok(append([]string{"-o", "json"}, args...)...), &rows); len(rows) == 0 {
			t.Errorf("%q: no rows", args)
		}
		parse(t, w.ok(append(args, "--output=json")...), &rows)
	}
	for _, args := range [][]string{{"leases", "ls"}, {"content", "ingest", "ls"}, {"content", "active"}, {"tasks", "ls", "-n", "nobody"}} {
		if out := w.ok(append(args, "-o", "json")...); strings.TrimSpace(out) != "[]" {
			t.Errorf("%q: %q, want an empty array", args, out)
		}
	}
	for _, args := range [][]string{{"version"}, {"containers", "info", "one"}, {"tasks", "metrics", "one"}, {"snapshots", "info", "one"}, {"containers", "label", "one", "a=b"}} {
		var v map[string]any
		if parse(t, w.ok(append(args, "-o", "json")...), &v); len(v) == 0 {
			t.Errorf("%q: nothing in it", args)
		}
	}
	var stopped []struct {
		ID         string
		ExitStatus int `json:"exit_status"`
	}
	parse(t, w.ok("tasks", "stop", "-o", "json", "-s", "KILL", "one"), &stopped)
	if len(stopped) != 1 || stopped[0].ID != "one" || stopped[0].ExitStatus != 137 {
		t.Errorf("stop says %+v", stopped)
	}
	out, _, status := w.mctl("tasks", "wait", "-o", "json", "one")
	if status != 137 || !strings.Contains(out, `"exit_status": 137`) {
		t.Errorf("wait says %d, %s", status, out)
	}
}

func parse(t *testing.T, out string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("no JSON: %v: %s", err, out)
	}
}

// TestImages: what can be done to images.
func TestImages(t *testing.T) {
	w := newWorld(t)
	if out := w.ok("images", "tag", busybox, "local/a:1", "local/b:1"); out != "local/a:1\nlocal/b:1\n" {
		t.Errorf("tag prints %q", out)
	}
	w.fails(1, []string{"local/a:1", "already exists", "--force"}, "images", "tag", busybox, "local/a:1")
	w.ok("images", "tag", "--force", busybox, "local/a:1")
	w.fails(1, []string{"nope", "not found", "images ls"}, "images", "tag", "nope", "x:1")
	if out := w.ok("images", "label", "local/a:1", "k=v", "l=w"); out != "k=v,l=w\n" {
		t.Errorf("label prints %q", out)
	}
	if out := w.ok("images", "label", "local/a:1", "k="); out != "l=w\n" {
		t.Errorf("label prints %q", out)
	}
	tar := filepath.Join(t.TempDir(), "out.tar")
	w.ok("images", "export", tar, "local/a:1", "busybox")
	w.ok("images", "rm", "--sync", "local/a:1", "local/b:1", busybox)
	if out := w.ok("images", "ls", "-q"); out != "" {
		t.Errorf("images left: %s", out)
	}
	out, errs, status := w.mctl("images", "rm", "local/a:1")
	if out != "" || status != 0 || !strings.Contains(errs, "local/a:1") {
		t.Errorf("rm of a missing image: %d, %q, %q", status, out, errs)
	}
	data, err := os.ReadFile(tar)
	if err != nil {
		t.Fatal(err)
	}
	if out, errs, status := w.run(w.Mctl("images", "import", "--no-unpack", "-"), string(data)); status != 0 || !strings.Contains(out, "local/a:1") || !strings.Contains(out, busybox) {
		t.Errorf("import: %d, %s%s", status, out, errs)
	}
	if out := w.ok("images", "check", "-q", "--snapshotter", "native"); out != "" {
		t.Errorf("ready although not unpacked: %s", out)
	}
	w.exits(3, "run", "--rm", "--snapshotter", "native", "local/a:1", "x", "sh", "-c", "exit 3") // unpacks it
	if out := w.ok("images", "check", "-q", "--snapshotter", "native"); !strings.Contains(out, busybox) {
		t.Errorf("not ready: %s", out)
	}
	w.fails(1, []string{"nope", "not found"}, "images", "export", tar+"2", "nope")
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(tar), "*")); len(left) != 1 {
		t.Errorf("a failed export left %v", left)
	}
	// Cut short, and not there.
	if err := os.WriteFile(tar, data[:len(data)/2], 0o644); err != nil {
		t.Fatal(err)
	}
	w.fails(1, []string{tar, "cut short"}, "images", "import", tar)
	w.fails(1, []string{"nope.tar", "no such file"}, "images", "import", "nope.tar")
}

// TestDiscardLayers: layers that are unpacked are not kept when they are not wanted, and the image runs.
func TestDiscardLayers(t *testing.T) {
	w := newWorld(t)
	w.ok("images", "rm", "--sync", busybox)
	w.fails(2, []string{"--discard-unpacked-layers", "--no-unpack"}, "images", "import", "--no-unpack", "--discard-unpacked-layers", archive)
	w.ok("images", "import", "--snapshotter", "native", "--discard-unpacked-layers", archive)
	w.ok("content", "prune", "references")
	w.exits(4, "run", "--rm", "--snapshotter", "native", busybox, "x", "sh", "-c", "exit 4")
	if out := w.ok("images", "check"); !strings.Contains(out, "incomplete") {
		t.Errorf("its layers are kept: %s", out)
	}
	w.ok("images", "import", "--snapshotter", "native", archive)
	if out := w.ok("images", "check"); strings.Contains(out, "incomplete") {
		t.Errorf("another import has not brought them back: %s", out)
	}
}

// TestStores: namespaces, leases, snapshots, content.
func TestStores(t *testing.T) {
	w := newWorld(t)
	other := w.Namespace + "-x"
	w.ok("namespaces", "create", other, "a=b")
	w.fails(1, []string{other, "already exists"}, "namespaces", "create", other)
	if out := w.ok("namespaces", "label", other, "c=d", "a="); out != "c=d\n" {
		t.Errorf("label prints %q", out)
	}
	w.fails(1, []string{w.Namespace, "must be empty"}, "namespaces", "rm", w.Namespace)
	w.fails(1, []string{"nobody", "not found"}, "namespaces", "label", "nobody")
	w.ok("namespaces", "rm", other)

	id := strings.TrimSpace(w.ok("leases", "create", "-x", "0", "a=b"))
	if out := w.ok("leases", "ls"); !strings.Contains(out, id) || strings.Contains(out, "gc.expire") {
		t.Errorf("leases are %s", out)
	}
	w.ok("leases", "rm", "--sync", id)
	w.fails(1, []string{id, "not found"}, "leases", "rm", id)

	w.ok("containers", "create", "busybox", "one")
	w.ok("containers", "rm", "--keep-snapshot", "one")
	w.fails(1, []string{"one", "snapshots rm one"}, "containers", "create", "busybox", "one")
	if out := w.ok("containers", "ls", "-q"); out != "" {
		t.Errorf("a failed create left container %s", out)
	}
	w.ok("snapshots", "rm", "one")
	w.fails(1, []string{"one", "not found", "snapshots ls"}, "snapshots", "info", "one")
	w.fails(1, []string{"nope", "overlayfs"}, "snapshots", "--snapshotter", "nope", "ls")

	var images []struct{ Digest string }
	parse(t, w.ok("images", "ls", "-o", "json"), &images)
	var manifest map[string]any
	if parse(t, w.ok("content", "get", images[0].Digest), &manifest); manifest["config"] == nil {
		t.Errorf("no manifest: %v", manifest)
	}
	zero := "sha256:" + strings.Repeat("0", 64)
	w.fails(1, []string{zero, "not found", "content ls"}, "content", "get", zero)
	w.fails(2, []string{"abc", "digest"}, "content", "get", "abc")
}

// TestEvents: they are printed as they come, and a daemon that is started anew ends nothing.
func TestEvents(t *testing.T) {
	w := newWorld(t)
	out := filepath.Join(t.TempDir(), "events")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	b := w.Mctl("events", "-o", "json", "topic~=^/namespaces/")
	b.Stdout, b.Stderr = f, f
	if err := b.Start(); err != nil {
		t.Fatal(err)
	}
	seen := func(name string) {
		t.Helper()
		eventually(t, "event about "+name, func() bool {
			w.ok("namespaces", "create", name) // until the subscription stands
			w.ok("namespaces", "rm", name)
			data, _ := os.ReadFile(out)
			return strings.Contains(string(data), `"name":"`+name+`"`)
		})
	}
	seen("before")
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	seen("after")
	if err := b.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(); b.ProcessState.ExitCode() != 130 {
		t.Errorf("interrupted: %v", err)
	}
	data, _ := os.ReadFile(out)
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		var e struct{ Topic string }
		if parse(t, line, &e); !strings.HasPrefix(e.Topic, "/namespaces/") {
			t.Errorf("not asked for: %s", line)
		}
	}
}

// TestPrune: layers whose content is let go of run on; images that nobody uses go with all that they held.
func TestPrune(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.ok("images", "tag", busybox, "local/unused:1")
	if _, errs, status := w.mctl("images", "prune"); status == 0 || !strings.Contains(errs, "--all") {
		t.Errorf("%d: %s", status, errs)
	}
	blobs := func() int { return len(strings.Fields(w.ok("content", "ls", "-q"))) }
	before := blobs()
	layers := strings.Fields(w.ok("content", "prune", "references", "--dry"))
	if len(layers) == 0 || blobs() != before {
		t.Errorf("dry: %q, %d blobs of %d", layers, blobs(), before)
	}
	if got := strings.Fields(w.ok("content", "prune", "references")); strings.Join(got, " ") != strings.Join(layers, " ") {
		t.Errorf("%q, not %q", got, layers)
	}
	if got := blobs(); got != before-len(layers) {
		t.Errorf("%d blobs of %d, %d were layers", got, before, len(layers))
	}
	if out := w.ok("tasks", "exec", "--exec-id", "e", "one", "echo", "here"); out != "here\n" {
		t.Errorf("%q", out)
	}
	w.ok("run", "--rm", "busybox", "two", "true") // from the snapshot
	if out := w.ok("images", "prune", "--all", "--dry"); out != "local/unused:1\n" {
		t.Errorf("%q", out)
	}
	w.ok("images", "prune", "--all")
	if out := w.ok("images", "ls", "-q"); out != busybox+"\n" {
		t.Errorf("%q", out)
	}
	w.ok("tasks", "rm", "-f", "one")
	w.ok("containers", "rm", "one")
	w.ok("images", "prune", "--all")
	if out := w.ok("content", "ls", "-q") + w.ok("snapshots", "ls")[len("KEY"):]; strings.Contains(out, "sha256:") {
		t.Errorf("left: %s", out)
	}
}
