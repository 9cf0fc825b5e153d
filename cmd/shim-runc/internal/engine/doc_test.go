//go:build !vmguest

package engine

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

//go:generate go test -run ^TestDocument$ -update .

var update = flag.Bool("update", false, "write the table in docs/runtime-spec.md anew")

// TestDocument: the table in the documentation is what the tests are, and the tests that it names are there, and run in the VM.
func TestDocument(t *testing.T) {
	const path, begin, end = "../../../../docs/runtime-spec.md", "<!-- the table, by go generate -->\n", "<!-- end -->"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q or no %q", path, begin, end)
	}
	if want := table(); old != want {
		if !*update {
			t.Fatalf("%s is not what the tests show: go generate ./cmd/shim-runc/internal/engine", path)
		}
		if err := os.WriteFile(path, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	own := sources(t, ".")
	vm := inVM(t)
	for _, p := range proofs() {
		if !strings.Contains(own, "\nfunc "+p.test+"(") {
			t.Errorf("%s names %s, which there is not", p.field, p.test)
		}
		if !vm.MatchString(p.test) {
			t.Errorf("test/vm/test.sh does not run %s, which shows %s", p.test, p.field)
		}
	}
	for _, m := range regexp.MustCompile("`([a-z/-]+)\\.(Test[A-Za-z]+)`").FindAllStringSubmatch(after, -1) {
		if !strings.Contains(sources(t, "../../../../"+m[1]), "\nfunc "+m[2]+"(") {
			t.Errorf("%s names %s.%s, which there is not", path, m[1], m[2])
		}
	}
}

// inVM matches the tests of this package that make test-vm-packages runs.
func inVM(t *testing.T) *regexp.Regexp {
	t.Helper()
	script, err := os.ReadFile("../../../../test/vm/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(script), "\ncmd/shim-runc/internal/engine ")
	tests, _, ok := strings.Cut(rest, "\n")
	if !ok {
		t.Fatal("test/vm/test.sh has no line of this package")
	}
	return regexp.MustCompile("^Test(" + tests + ")")
}

// sources are the tests of a package.
func sources(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(dir + "/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range files {
		source, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(source)
	}
	return all.String()
}

// table is the table of the documentation.
func table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| field | cgroup v1 | cgroup v2 | test |\n|---|---|---|---|\n")
	for _, p := range proofs() {
		path, of, _ := strings.Cut(p.field, " ")
		if of != "" {
			of = " " + of
		}
		fmt.Fprintf(&b, "| `%s`%s | %s | %s | `%s` |\n", strings.TrimSuffix(path, ","), of, p.v1, p.v2, p.test)
	}
	return b.String()
}
