package shimapi

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

//go:generate go test -run ^TestDiagram$ -update .

var update = flag.Bool("update", false, "write docs/lifecycle.md anew")

const diagram = "../docs/lifecycle.md"

// TestDiagram: the document is what the table in lifecycle.go says.
func TestDiagram(t *testing.T) {
	want := draw()
	if *update {
		if err := os.WriteFile(diagram, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(diagram)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is stale: run go generate ./shimapi", diagram)
	}
}

func draw() string {
	var b strings.Builder
	b.WriteString(`# The lifecycle of a container's processes

<!-- Generated from shimapi/lifecycle.go: go generate ./shimapi -->

Whether a request is legal is decided by one table, and nowhere else. Below it is as both sides of the shim's socket use
it. A cell is what a request does to a process in that state: **→ state** is the one that follows, *a → b* passes through
a while the request runs, *same* leaves it; what is not allowed is refused with the code that stands there. "exited" is
not a request: it is the end of the process, which the kernel reports.

An exec stands still with its container: it has no pause of its own. Adding one is the request *exec* of the container.
`)
	for _, k := range []struct {
		kind  Kind
		title string
	}{{Init, "The container (its init process)"}, {Exec, "An exec"}} {
		fmt.Fprintf(&b, "\n## %s\n\n", k.title)
		drawTable(&b, k.kind)
		b.WriteString("\n")
		drawStates(&b, k.kind)
	}
	return b.String()
}

// statesOf leaves out what a process of this kind is never in.
func statesOf(k Kind) (out []State) {
	for _, s := range States {
		for _, r := range Requests {
			if _, ok := Next(k, s, r); ok || s == Deleted {
				out = append(out, s)
				break
			}
		}
	}
	return out
}

func drawTable(b *strings.Builder, k Kind) {
	states := statesOf(k)
	b.WriteString("| request |")
	for _, s := range states {
		fmt.Fprintf(b, " %s |", s)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(states)) + "\n")
	for _, r := range Requests {
		if len(From(k, r)) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s |", r)
		for _, s := range states {
			fmt.Fprintf(b, " %s |", cell(k, s, r))
		}
		b.WriteString("\n")
	}
}

func cell(k Kind, s State, r Request) string {
	step, ok := Next(k, s, r)
	err := Check(k, "", s, r)
	switch {
	case ok && step.Via != "":
		return fmt.Sprintf("%s → **%s**", step.Via, step.To)
	case ok && step.To == s:
		return "same"
	case ok:
		return fmt.Sprintf("→ **%s**", step.To)
	case r == Exited:
		return "" // there is nothing to end
	case errdefs.IsNotFound(err):
		return "NotFound"
	case errdefs.IsAlreadyExists(err):
		return "AlreadyExists"
	}
	return "FailedPrecondition"
}

// drawStates draws the steps that change the state; those that do the same share an arrow.
func drawStates(b *strings.Builder, k Kind) {
	b.WriteString("```mermaid\nstateDiagram-v2\n")
	name := func(s State) State {
		if s == Absent || s == Deleted {
			return "[*]"
		}
		return s
	}
	arrows := map[string][]string{}
	var order []string
	arrow := func(from, to State, what string) {
		a := fmt.Sprintf("%s --> %s", name(from), name(to))
		if arrows[a] == nil {
			order = append(order, a)
		}
		for _, w := range arrows[a] {
			if w == what {
				return
			}
		}
		arrows[a] = append(arrows[a], what)
	}
	for _, s := range States {
		for _, r := range Requests {
			step, ok := Next(k, s, r)
			switch {
			case ok && step.Via != "":
				arrow(s, step.Via, string(r))
				arrow(step.Via, step.To, "done")
			case ok && step.To != s:
				arrow(s, step.To, string(r))
			}
		}
	}
	for _, a := range order {
		fmt.Fprintf(b, "    %s: %s\n", a, strings.Join(arrows[a], ", "))
	}
	b.WriteString("```\n")
}
