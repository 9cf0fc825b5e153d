// The rules of the house, as tests: which room may import which, and why. See docs/architecture.md.
package managerd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const module = "github.com/managerd/managerd"

type pkg struct {
	ImportPath, Dir, Name string
	Imports, Deps         []string
	GoFiles, CgoFiles     []string
	TestGoFiles           []string
	Standard              bool
}

// list asks the go command for the packages that match patterns, built with tags.
func list(t *testing.T, tags string, patterns ...string) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-tags", tags, "-json"}, patterns...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	found := map[string]pkg{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		found[p.ImportPath] = p
	}
}

const (
	seccompTags = "seccomp netgo osusergo"
	shimTags    = "seccomp no_grpc netgo osusergo"
)

// TestImports holds the rules about direct imports.
func TestImports(t *testing.T) {
	rules := []struct {
		from   string // a package, or everything below it
		except string // but not this one
		not    string // must not import this, or anything below it
		why    string
	}{
		{module, "", "github.com/containerd/containerd/v2", "that is the system we implement and measure against"},
		{module, module + "/cmd/shim-runc/internal/engine", "github.com/opencontainers/runc", "the engine is the only one that knows libcontainer, so that another engine can stand beside it"},
		{module + "/cmd/shim-runc/internal/engine/external", "", "github.com/opencontainers/runc", "what runs another program must not grow on libcontainer"},
		{module + "/protos", "", module + "/manager", "the contract knows neither side"},
		{module + "/protos", "", module + "/shimapi", "records do not know who writes them"},
		{module + "/shimapi", "", module + "/manager", "the contract knows neither side"},
		{module + "/shimapi", "", module + "/cmd", "the contract knows neither side"},
		{module + "/reaper", "", module, "the reaper is about processes, not about containers"},
		{module + "/cgroups", "", module + "/manager", "metrics and OOM serve both sides"},
		{module + "/cgroups", "", module + "/shimapi", "metrics and OOM know cgroups only"},
		{module + "/manager", module + "/manager/server", module + "/manager/server", "the server wires the domain, the domain does not know it"},
		{module + "/manager", "", module + "/cmd", "programs use packages, not the reverse"},
		{module + "/manager/filters", "", module + "/manager", "a leaf"},
		{module + "/manager/identifiers", "", module + "/manager", "a leaf"},
		{module + "/manager/bundle", "", module + "/manager/tasks", "imports run downwards: tasks, shims, bundle"},
		{module + "/manager/shims", "", module + "/manager/tasks", "imports run downwards: tasks, shims, bundle"},
		{module + "/cmd/shim-runc/internal/stdio", "", module + "/cmd/shim-runc/internal/engine", "streams do not know what runs"},
		{module + "/cmd/shim-runc/internal/engine", "", module + "/cmd/shim-runc/internal/service", "the service uses the engine"},
		{module + "/cmd/shim-runc/internal/handover", "", module + "/cmd/shim-runc", "a hand-over does not know what it carries"},
		{module + "/cmd/shim-runc/internal/wire", "", module + "/cmd/shim-runc", "connections do not know what is asked on them"},
	}
	below := func(path, room string) bool { return path == room || strings.HasPrefix(path, room+"/") }
	for path, p := range list(t, seccompTags, "./...") {
		for _, r := range rules {
			if !below(path, r.from) || r.except != "" && below(path, r.except) {
				continue
			}
			for _, imp := range p.Imports {
				if below(imp, r.not) && !(r.from == r.not) && !(r.from == module+"/reaper" && below(imp, r.from)) {
					t.Errorf("%s imports %s: %s", path, imp, r.why)
				}
			}
		}
		// Only the API and the server may speak gRPC: a domain package returns errdefs sentinels.
		if below(path, module+"/manager") && !below(path, module+"/manager/api") && !below(path, module+"/manager/server") {
			for _, imp := range p.Imports {
				if imp == "google.golang.org/grpc/status" {
					t.Errorf("%s imports %s: only manager/api maps errors to a wire", path, imp)
				}
			}
		}
	}
}

// TestLinked holds the rules about whole programs: what must never be in the memory of a shim, or of the daemon.
func TestLinked(t *testing.T) {
	for _, c := range []struct {
		program, tags string
		not           []string
		why           string
	}{
		{"./cmd/shim-runc", shimTags, []string{module + "/manager", "go.etcd.io/bbolt", "google.golang.org/grpc/internal/transport", "github.com/prometheus"},
			"one shim lives per container: its memory and its start-up time are everybody's"},
		{"./cmd/managerd", "", []string{"github.com/opencontainers/runc", module + "/reaper", module + "/cmd/shim-runc"},
			"the daemon is never a container's parent"},
		{"./cmd/mctl", "", []string{"go.etcd.io/bbolt", "github.com/opencontainers/runc", module + "/reaper"},
			"a command talks to the daemon, it does not carry one"},
	} {
		for _, p := range list(t, c.tags, c.program) {
			for _, dep := range p.Deps {
				for _, not := range c.not {
					if dep == not || strings.HasPrefix(dep, not+"/") {
						t.Errorf("%s links %s: %s", c.program, dep, c.why)
					}
				}
			}
		}
	}
}

// TestRooms holds the top level: a new room is a decision, not an accident.
func TestRooms(t *testing.T) {
	rooms := map[string]bool{
		"cmd": true, "shimapi": true, "manager": true, "reaper": true, "cgroups": true, "protos": true, "test": true,
		"docs": true, "init": true, "contrib": true, "bin": true,
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !rooms[e.Name()] {
			t.Errorf("%s/ is not one of the house's rooms (docs/architecture.md)", e.Name())
		}
	}
}

// TestPackageDocs: every package says in its doc comment what it is for.
func TestPackageDocs(t *testing.T) {
	for path, p := range list(t, seccompTags, "./...") {
		files := append(p.GoFiles, p.CgoFiles...)
		documented := len(files) == 0
		for _, f := range files {
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || parsed.Doc != nil && strings.TrimSpace(parsed.Doc.Text()) != ""
		}
		if !documented {
			t.Errorf("%s has no package comment", path)
		}
	}
}

// TestSmall: a main wires and does nothing else, and a file is one thing that can be read in one go.
func TestSmall(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, ".pb.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		lines, most := bytes.Count(data, []byte("\n")), 600
		if m, _ := filepath.Match("cmd/*/main.go", path); m {
			most = 30
		}
		if lines > most {
			t.Errorf("%s has %d lines, the most is %d", path, lines, most)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFailures: what docs/failures.md promises is tested by tests that there are.
func TestFailures(t *testing.T) {
	data, err := os.ReadFile("docs/failures.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z0-9/-]+)\\.(Test[A-Za-z]+)(?:/([A-Za-z]+))?`").FindAllStringSubmatch(string(data), -1)
	if rows := strings.Count(string(data), "\n| ") - strings.Count(string(data), "\n| what happens"); len(named) < rows {
		t.Errorf("%d lines name %d tests", rows, len(named))
	}
	for _, n := range named {
		files, err := filepath.Glob(n[1] + "/*_test.go")
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || strings.Contains(string(text), "\nfunc "+n[2]+"(") &&
				(n[3] == "" || strings.Contains(string(text), `{"`+n[3]+`", test`+n[3]+`}`)) // a part, as those of the VM are
		}
		if !found {
			t.Errorf("docs/failures.md names %s, which there is not", n[0])
		}
	}
}
