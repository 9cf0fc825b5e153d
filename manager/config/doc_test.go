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
	b.WriteString("\n## `[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]`\n\nHow the daemon unpacks what it pulls and imports; the first entry that fits counts. An image may be unpacked without one.\n\n" +
		"| key | meaning |\n|---|---|\n" +
		"| `platform` | `OS/ARCH[/VARIANT]` of the images; empty for this machine's. |\n" +
		"| `snapshotter` | Where they are unpacked, and where those are whose client names no snapshotter and whose namespace has none; empty: it fits every one. |\n" +
		"| `differ` | The differ that applies their layers, and no other; empty for those of `[plugins.\"io.containerd.service.v1.diff-service\"]`. |\n")
	b.WriteString("\n## `[proxy_plugins.NAME]`\n\nA plugin that is another program; see [snapshotters.md](snapshotters.md). One table for each.\n\n" +
		"| key | meaning |\n|---|---|\n" +
		"| `type` | Service that it serves: " + strings.Join(proxyTypes, ", ") + ". Of type content, one is used, in place of the daemon's own. Sandbox controllers are in the plugin list, with the reason why they are not used. |\n" +
		"| `address` | Path of its socket. |\n" +
		"| `platform` | `OS/ARCH` for the plugin list; empty for this machine's. |\n" +
		"| `exports` | Table of strings for the plugin list, such as `root`. |\n" +
		"| `capabilities` | List of strings for the plugin list, such as `remap-ids`. |\n")
	b.WriteString("\n## `[stream_processors.\"ID\"]`\n\nA program that makes layers of blobs that are none, such as a decoder; see [pull.md](pull.md#stream-processors). One table for each.\n\n" +
		"| key | meaning |\n|---|---|\n" +
		"| `accepts` | List of media types that it reads. |\n" +
		"| `returns` | Media type that it writes. |\n" +
		"| `path` | Path of the program, or its name in PATH. |\n" +
		"| `args` | List of its arguments. |\n" +
		"| `env` | List of `NAME=VALUE` for its environment, besides the daemon's own. |\n")
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
