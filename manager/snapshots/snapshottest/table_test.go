package snapshottest_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

var update = flag.Bool("update", false, "write the table of docs/snapshotters.md anew")

const begin, end = "<!-- table: go test ./manager/snapshots/snapshottest -run Table -update -->\n", "<!-- end of table -->\n"

// more are the rows of the other tests that run over the columns.
var more = []struct {
	snapshottest.Case
	where func(c snapshottest.Column) string
}{
	{snapshottest.Case{Name: "`TestCrash`", Doc: "a process killed at each durable step: each snapshot is whole or not there, the next process goes on, and nothing is left"}, where},
	{snapshottest.Case{Name: "`TestDiffMounted`", Doc: "of what a container that runs has written so far a layer can be made"}, where},
	{snapshottest.Case{Name: "`TestLayers`", Doc: "layers of every feature, applied and made, see below"}, wherePools},
	{snapshottest.Case{Name: "`TestFull`", Doc: "without room a snapshot, the layer in it or its commit says so, and where; the room is given back"},
		func(c snapshottest.Column) string {
			if c.Foreign {
				return "no"
			}
			return wherePools(c)
		}},
}

// where says what runs the suite over a column.
func where(c snapshottest.Column) string {
	if c.Where == "" {
		return "yes"
	}
	return c.Where
}

// wherePools is where for tests that take too long for every run of the VM.
func wherePools(c snapshottest.Column) string {
	if c.Where == "" {
		return "yes"
	}
	return zfsVM
}

// table has a row for each case of the suite and a column for each snapshotter that TestConformance runs it over.
func table() string {
	var b strings.Builder
	b.WriteString("| case | what must hold |")
	for _, c := range columns {
		fmt.Fprintf(&b, " %s |", c.Name)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(columns)) + "\n")
	row := func(r snapshottest.Case, where func(c snapshottest.Column) string) {
		fmt.Fprintf(&b, "| %s | %s |", r.Name, r.Doc)
		for _, c := range columns {
			fmt.Fprintf(&b, " %s |", where(c))
		}
		b.WriteByte('\n')
	}
	for _, r := range snapshottest.Cases() {
		row(r, where)
	}
	for _, r := range more {
		row(r.Case, r.where)
	}
	return b.String()
}

// TestVM: what the table says of the VM is what is run there.
func TestVM(t *testing.T) {
	script, err := os.ReadFile("../../../test/vm/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		" SNAPSHOTTEST_COLUMNS=overlayfs,devmapper\"", "\nmanager/snapshots/snapshottest Conformance|Crash|Diff|Devmapper\n",
		" SNAPSHOTTEST_COLUMNS=devmapper,zfs'", "\nzfs:manager/snapshots/snapshottest Conformance|DiffMounted)$/^(zfs\n",
		"\nzfs:manager/snapshots/snapshottest Crash)$/^(zfs\n", "\nzfs:manager/snapshots/snapshottest Full|Layers\n",
	} {
		if !strings.Contains(string(script), line) {
			t.Errorf("test/vm/test.sh has no %q", line)
		}
	}
}

func TestTable(t *testing.T) {
	const path = "../../../docs/snapshotters.md"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(doc), begin)
	have, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no place for the table", path)
	}
	if have == table() {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+table()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("the table of %s is stale: go test ./manager/snapshots/snapshottest -run Table -update", path)
}
