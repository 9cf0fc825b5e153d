package command

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/managerd/managerd/test/clients"
)

var update = flag.Bool("update", false, "write the table of docs/mctl.md anew")

// held are the commands of ctr whose grammar is mctl's.
var held = []string{"images", "content", "snapshots", "leases", "namespaces", "plugins", "events"}

// TestGrammarOfCtr: mctl takes what Debian's ctr and that of containerd 2 take, or says what to do instead; docs/mctl.md
// lists what it takes and does not do.
func TestGrammarOfCtr(t *testing.T) {
	ctr2, err := clients.Build(clients.Ctr)
	if err != nil {
		t.Fatal(err)
	}
	root := (&cli{}).root()
	for _, ctr := range []string{"ctr", ctr2} {
		flags := 0
		for _, group := range held {
			flags += compare(t, ctr, root, []string{group})
		}
		if flags < 100 {
			t.Errorf("%d flags were found in the help of %s, which has more", flags, ctr)
		}
	}

	const page, from, to = "../../../../docs/mctl.md", "<!-- table: go test ./cmd/mctl/internal/command -run Grammar -update -->\n", "<!-- end of table -->\n"
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(data), from)
	was, tail, found := strings.Cut(rest, to)
	if !found {
		t.Fatalf("%s has no table", page)
	}
	now := "| of `ctr` | what `mctl` does |\n|---|---|\n" + forCtrRows(root)
	if was == now {
		return
	}
	if !*update {
		t.Errorf("the table of %s is stale, with -update this test writes it anew; it should be\n%s", page, now)
	} else if err := os.WriteFile(page, []byte(head+from+now+to+tail), 0o644); err != nil {
		t.Error(err)
	}
}

// compare looks for a command of ctr's, and what is below it, in mctl's, and gives the number of flags that it has found.
func compare(t *testing.T, ctr string, parent *cobra.Command, path []string) (flags int) {
	t.Helper()
	h := helpOf(t, ctr, path)
	name := path[len(path)-1]
	i := slices.IndexFunc(parent.Commands(), func(c *cobra.Command) bool { return c.Name() == name || c.HasAlias(name) })
	if i < 0 {
		t.Errorf("%s has %q, mctl has not", ctr, strings.Join(path, " "))
		return 0
	}
	cmd := parent.Commands()[i]
	if cmd.Annotations[forCtr] != "" {
		return 0
	}
	for _, o := range h.options {
		for _, f := range o.names {
			flags++
			var ours *pflag.Flag
			if long, ok := strings.CutPrefix(f, "--"); !ok {
				f = strings.TrimPrefix(f, "-")
				if ours = cmd.LocalFlags().ShorthandLookup(f); ours == nil {
					ours = cmd.InheritedFlags().ShorthandLookup(f)
				}
			} else if ours = cmd.LocalFlags().Lookup(long); ours == nil {
				ours = cmd.InheritedFlags().Lookup(long)
			}
			switch {
			case ours == nil:
				t.Errorf("%s has %q with %s, mctl has not", ctr, strings.Join(path, " "), f)
			case (ours.NoOptDefVal == "") != o.valued:
				t.Errorf("%s has %q with %s, with a value: %v; mctl otherwise", ctr, strings.Join(path, " "), f, o.valued)
			}
		}
	}
	for _, names := range h.commands {
		for _, n := range names {
			flags += compare(t, ctr, cmd, append(slices.Clone(path), n))
		}
	}
	return flags
}

// help is what ctr's says of a command.
type help struct {
	commands [][]string // each with its aliases
	options  []option
}

type option struct {
	names  []string // with their dashes
	valued bool
}

func helpOf(t *testing.T, ctr string, path []string) (h help) {
	t.Helper()
	out, err := exec.Command(ctr, append(slices.Clone(path), "--help")...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "USAGE:") {
		t.Fatalf("%s %q --help: %v\n%s", ctr, path, err, out)
	}
	section := ""
	for line := range strings.Lines(string(out)) {
		item, in := strings.CutPrefix(strings.TrimRight(line, "\n"), "   ")
		if !in {
			if s := strings.TrimSpace(line); s != "" {
				section = s
			}
			continue
		}
		column, _, _ := strings.Cut(item, "  ")
		column, _, _ = strings.Cut(column, " [ ")
		switch {
		case section == "COMMANDS:" && column != "":
			h.commands = append(h.commands, strings.Split(column, ", "))
		case section == "OPTIONS:" && strings.HasPrefix(column, "-"):
			o := option{}
			for _, n := range strings.Split(column, ", ") {
				name, value, _ := strings.Cut(n, " ")
				o.names, o.valued = append(o.names, name), value != ""
			}
			if !slices.Contains(o.names, "--help") {
				h.options = append(h.options, o)
			}
		}
	}
	return h
}

// forCtrRows are the lines of the table, in the order of the commands: those that have the same flags for the same reason are
// one.
func forCtrRows(root *cobra.Command) string {
	type row struct {
		commands, flags []string
		does            string
	}
	var rows []*row
	add := func(command string, flags []string, does string) {
		for _, r := range rows {
			if r.does == does && slices.Equal(r.flags, flags) {
				r.commands = append(r.commands, command)
				return
			}
		}
		rows = append(rows, &row{[]string{command}, flags, does})
	}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		path := strings.TrimPrefix(cmd.CommandPath(), "mctl ")
		if does := cmd.Annotations[forCtr]; does != "" {
			add(path, nil, does)
		}
		var reasons []string
		flags := map[string][]string{}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if a := f.Annotations[forCtr]; a != nil {
				if flags[a[0]] == nil {
					reasons = append(reasons, a[0])
				}
				flags[a[0]] = append(flags[a[0]], "--"+f.Name)
			}
		})
		for _, r := range reasons {
			add(path, flags[r], r)
		}
		for _, below := range cmd.Commands() {
			walk(below)
		}
	}
	walk(root)
	var out strings.Builder
	for _, r := range rows {
		of := "`" + strings.Join(r.commands, "`, `") + "`"
		if r.flags != nil {
			of += ": `" + strings.Join(r.flags, "`, `") + "`"
		}
		_, _ = fmt.Fprintf(&out, "| %s | %s |\n", of, r.does)
	}
	return out.String()
}
