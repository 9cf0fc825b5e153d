package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/config.md anew")

// reference is docs/config.md: the table of keys for people.
func reference() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# config.toml

The daemon reads the file given with `+"`--config`, or `/etc/managerd/config.toml`"+` if it is there; without one the defaults below hold.
The form is containerd's, version %d or %d; `+"`managerd config migrate`"+` converts older files. Flags override the file.
`+"`managerd config default` prints a complete file, `managerd config dump`"+` what holds.

A value of the wrong type or out of its range keeps the daemon from starting; the error names file, line and key. A key that is
not known has no effect and is logged as a warning, also with its line.

*Made from the table of keys: `+"`go test ./manager/config -update`"+`.*
`, oldestVersion, Version)
	table := "none"
	for _, k := range keys {
		if t := k.tableName(); t != table {
			table = t
			if t == "" {
				b.WriteString("\n## At the top\n")
			} else {
				fmt.Fprintf(&b, "\n## `[%s]`\n", t)
			}
			b.WriteString("\n| key | default | meaning |\n|---|---|---|\n")
		}
		doc := strings.NewReplacer("\n", " ", "|", `\|`, "*", `\*`).Replace(k.doc)
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", k.path[len(k.path)-1], literal(k.def), doc)
	}
	b.WriteString("\n## `[proxy_plugins.NAME]`\n\nA plugin that is another program; see [snapshotters.md](snapshotters.md). One table for each.\n\n" +
		"| key | meaning |\n|---|---|\n" +
		"| `type` | Service that it serves: " + strings.Join(proxyTypes, ", ") + ". Snapshotters and differs are used; others are in the plugin list, with the reason. |\n" +
		"| `address` | Path of its socket. |\n" +
		"| `platform` | `OS/ARCH` for the plugin list; empty for this machine's. |\n" +
		"| `exports` | Table of strings for the plugin list, such as `root`. |\n" +
		"| `capabilities` | List of strings for the plugin list, such as `remap-ids`. |\n")
	b.WriteString("\n## Without effect\n\nThese keys of containerd are read over, with a warning when they ask for something.\n\n| key | why |\n|---|---|\n")
	for _, i := range ignored {
		if i.why != "" {
			fmt.Fprintf(&b, "| `%s` | %s |\n", strings.TrimSuffix(i.prefix, "."), i.why)
		}
	}
	return b.String()
}

func TestReference(t *testing.T) {
	const path = "../../docs/config.md"
	want := reference()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s is stale (%v): go test ./manager/config -update", path, err)
	}
}
