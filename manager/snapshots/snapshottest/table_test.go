package snapshottest_test

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/managerd/managerd/manager/snapshots/snapshottest"
)

var update = flag.Bool("update", false, "write the table of docs/snapshotters.md anew")

const begin, end = "<!-- table: go test ./manager/snapshots/snapshottest -run Table -update -->\n", "<!-- end of table -->\n"

// table has a row for each case of the suite and a column for each snapshotter that TestConformance runs it over.
func table() string {
	var b strings.Builder
	b.WriteString("| case | what must hold |")
	for _, c := range columns {
		fmt.Fprintf(&b, " %s |", c.Name)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, r := range snapshottest.Cases() {
		fmt.Fprintf(&b, "| %s | %s |", r.Name, r.Doc)
		for _, c := range columns {
			switch {
			case c.Only != nil && !slices.Contains(c.Only, r.Name):
				b.WriteString(" not run |")
			case c.Where == "":
				b.WriteString(" yes |")
			default:
				fmt.Fprintf(&b, " %s |", c.Where)
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// TestVM: what the table says of the VM is what is run there.
func TestVM(t *testing.T) {
	script, err := os.ReadFile("../../../test/vm/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(script), "\nmanager/snapshots/snapshottest Devmapper(Full|Reboot)?)$/(\n") || thin.Only != nil {
		t.Error("test/vm/test.sh does not run all of devmapper")
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
