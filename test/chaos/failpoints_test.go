package chaos

import (
	"bytes"
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
)

const repository = "../.."

// points finds every failpoint in the source: no list of them can forget one. Those of snapshotters that this daemon's
// containers do not use are gone through by TestCrash of manager/snapshots/snapshottest.
func points(t *testing.T) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || filepath.Base(filepath.Dir(path)) == "snapshots") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "Hit" {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); !ok || pkg.Name != "failpoint" {
				return true
			}
			lit, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Errorf("%s: a failpoint whose name is no literal", path)
				return true
			}
			name, err := strconv.Unquote(lit.Value)
			if err != nil || slices.Contains(names, name) {
				t.Errorf("%s: failpoint %s is there twice (%v)", path, lit.Value, err)
			}
			names = append(names, name)
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if len(names) == 0 {
		t.Fatal("there are no failpoints")
	}
	return names
}

// crashable builds the programs with failpoints in them.
func crashable(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, p := range []struct{ name, tags, cgo string }{
		{"managerd", "failpoints", "0"}, {"shim-runc", "failpoints seccomp no_grpc netgo osusergo", "1"},
	} {
		cmd := exec.Command("go", "build", "-tags", p.tags, "-o", filepath.Join(dir, p.name), "./cmd/"+p.name)
		cmd.Dir, cmd.Env = repository, append(os.Environ(), "CGO_ENABLED="+p.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cannot build %s: %v\n%s", p.name, err, out)
		}
	}
	if err := os.Symlink(filepath.Join(bin, "mctl"), filepath.Join(dir, "mctl")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestFailpoints kills whoever gets there at every failpoint, one after the other, in the middle of everything that a
// daemon and a shim do, starts a daemon again when it is the one that was killed, and goes on. At the end of each nothing
// may be lost, wrong, doubled or left.
func TestFailpoints(t *testing.T) {
	dir := crashable(t)
	names := points(t)
	// What is not there cannot kill: the programs that are shipped know nothing of it, those of this test do.
	for _, name := range append(slices.Clone(names), "MANAGERD_FAILPOINTS") {
		found := false
		for _, program := range []string{"managerd", "shim-runc"} {
			for of, has := range map[string]bool{dir: true, bin: false} {
				data, err := os.ReadFile(filepath.Join(of, program))
				if err != nil {
					t.Fatal(err)
				}
				switch in := bytes.Contains(data, []byte(name)); {
				case has:
					found = found || in
				case in:
					t.Errorf("failpoint %s is in %s/%s", name, of, program)
				}
			}
		}
		if !found {
			t.Errorf("failpoint %s is in no program", name)
		}
	}

	armory := t.TempDir()
	t.Setenv("MANAGERD_FAILPOINTS", armory)
	d, err := harness.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			kept, err := keep(d)
			t.Logf("what is known is kept in %s (%v)", kept, err)
			if err := d.Raze(); err != nil {
				t.Error(err)
			}
			return
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	store, err := d.NewFDStore()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	if out, err := harness.Output(d.Mctl("images", "import", archive)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	j, err := newJournal(d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.file.Close() }()
	watch := newWarden(d)
	defer watch.stop()
	began := time.Now()
	for i, name := range names {
		if !strings.Contains(name, *only) {
			continue
		}
		j.note("--- %s", name)
		r := &run{name: name, id: fmt.Sprintf("p%d", i), d: d, j: j, watch: watch, store: store, armory: armory}
		if err := r.all(); err != nil {
			t.Errorf("%s: %v", name, err)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			err := d.Clear(ctx)
			cancel()
			if err != nil {
				t.Fatalf("%s: nothing can be said of what follows: %v", name, err)
			}
			continue
		}
		outputs, _ := filepath.Glob(filepath.Join(d.Dir, r.id+"*")) // keep keeps those of failures
		for _, path := range outputs {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d failpoints, %d deaths of the daemon, in %s", len(names), watch.deaths(), time.Since(began).Round(time.Second))
}
