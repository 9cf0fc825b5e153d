package config

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// write makes a file below dir.
func write(t *testing.T, dir, name, data string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func text(t *testing.T, c *Config) string {
	t.Helper()
	var b bytes.Buffer
	if n, err := c.WriteTo(&b); err != nil || n != int64(b.Len()) {
		t.Fatal(n, err)
	}
	return b.String()
}

func TestRoundTrip(t *testing.T) {
	odd := Default()
	odd.Root, odd.GRPC.Address, odd.OOMScore, odd.GRPC.UID = "/a \"b\"\t\\ü\n", "/run/x.sock", -999, 7
	odd.DisabledPlugins, odd.RequiredPlugins = []string{"io.containerd.a.v1.b", `q"`}, []string{}
	odd.Debug.Level, odd.ContentSharing, odd.Overlayfs.RootPath, odd.Task.Shim = "trace", "isolated", "/o", "/bin/shim"
	odd.Task.UpgradeShims = "always"
	for name, c := range map[string]*Config{"default": Default(), "odd": odd} {
		path := write(t, t.TempDir(), "config.toml", text(t, c))
		got, warnings, err := Load(path)
		if err != nil || len(warnings) != 0 || !reflect.DeepEqual(got, c) {
			t.Errorf("%s: %+v, %v, %v; written:\n%s", name, got, warnings, err, text(t, c))
		}
		if again, err := Migrate([]byte(text(t, c)), path); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got, _, err := Load(write(t, t.TempDir(), "migrated.toml", string(again))); err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%s migrated: %+v, %v", name, got, err)
		}
	}
	if err := Default().Validate(); err != nil {
		t.Error(err)
	}
}

// TestWrong: whatever is wrong is told with file, line and key, all of it at once.
func TestWrong(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string // what the error has, each "LINE: KEY ..."
	}{
		"types": {"version = 2\nroot = 3\noom_score = \"x\"\n[grpc]\naddress = true\nuid = 1.5\n[plugins.\"io.containerd.snapshotter.v1.overlayfs\"]\nroot_path = [1]\n", []string{
			"2: root must be a string, not the integer 3", `3: oom_score must be an integer, not the string "x"`, "5: grpc.address must be a string, not the boolean true",
			"6: grpc.uid must be an integer, not the float 1.5", `8: plugins."io.containerd.snapshotter.v1.overlayfs".root_path must be a string, not a list`}},
		"lists": {"version = 2\ndisabled_plugins = \"cri\"\nimports = [\n 1 ]\nrequired_plugins = { a = 1 }\n", []string{
			`2: disabled_plugins must be a list of strings, not the string "cri"`, "3: imports must be a list of strings, not one with the integer 1", "5: required_plugins must be a list of strings, not a table"}},
		"a table":    {"version = 2\ngrpc = 5\nplugins = []\n", []string{"2: grpc must be a table, not the integer 5", "3: plugins must be a table, not a list"}},
		"inline":     {"version = 2\ndebug = { level = \"loud\", uid = -1 }\n", []string{`2: debug.level "loud" is none of trace,`, "2: debug.uid -1 must not be negative"}},
		"dotted":     {"version = 2\n\ndebug.format = 2020-01-01\n", []string{"3: debug.format must be a string, not a time"}},
		"values":     {"version = 3\nroot = \"a/b\"\noom_score = 1001\n[grpc]\naddress = \"/" + strings.Repeat("s", 200) + "\"\n", []string{"2: root \"a/b\" must be an absolute path", "3: oom_score 1001", "5: grpc.address"}},
		"policy":     {"version = 2\n[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = 'none'\n", []string{`3: plugins."io.containerd.metadata.v1.bolt".content_sharing_policy "none" is none of shared, isolated`}},
		"no TOML":    {"version = 2\n[grpc\naddress = 1\n", []string{"2:"}},
		"twice":      {"version = 2\nroot = \"/a\"\nroot = \"/b\"\n", []string{"3:"}},
		"version":    {"version = \"2\"\n", []string{`1: version must be an integer, not the string "2"`}},
		"newer":      {"root = \"/a\"\nversion = 4\n", []string{"2: version 4 is newer"}},
		"older":      {"# old\nversion = 1\n", []string{"2: version 1 is too old", "config migrate"}},
		"no version": {"root = \"/a\"\n", []string{"version 1", "config migrate"}},
		"nothing":    {"", []string{"config migrate"}},
		"huge":       {"version = 2\noom_score = 99999999999999999999\n", []string{"2:"}},
		"import":     {"version = 2\nimports = [\"gone.toml\"]\n", []string{"2: cannot import", "gone.toml"}},
		"pattern":    {"version = 2\nimports = [\"[\"]\n", []string{"2: imports: pattern \"["}},
	} {
		path := write(t, t.TempDir(), "config.toml", c.file)
		cfg, _, err := Load(path)
		if err == nil || cfg != nil || !errdefs.IsInvalidArgument(err) && name != "import" {
			t.Errorf("%s: %v, %v", name, cfg, err)
			continue
		}
		for _, want := range c.want {
			if line, _, ok := strings.Cut(want, ":"); ok && len(line) < 3 {
				want = path + ":" + want
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v\nhas no %q", name, err, want)
			}
		}
	}
	if _, _, err := Load(filepath.Join(t.TempDir(), "missing.toml")); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "missing.toml") {
		t.Errorf("no file: %v", err)
	}
	same := Default()
	same.State = same.Root + "/."
	same.GRPC.Address = "relative"
	if err := same.Validate(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "root and state") || !strings.Contains(err.Error(), "grpc.address") {
		t.Errorf("%v", err)
	}
}

// TestTolerated: what containerd's files have and this daemon has not is said, with its line, and changes nothing.
func TestTolerated(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string // "LINE: KEY: words"; a warning each, in this order
	}{
		"containerd 1.6's own": {`version = 2
root = "/var/lib/managerd"
state = "/run/managerd"
plugin_dir = ""
temp = ""
oom_score = 0
[grpc]
  tcp_address = ""
[cgroup]
  path = ""
[timeouts]
[plugins]
  [plugins."io.containerd.gc.v1.scheduler"]
    pause_threshold = 0.02
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.6"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      snapshotter = "overlayfs"
`, []string{`15: plugins."io.containerd.grpc.v1.cri": has no effect`}},
		"version 3": {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'x'\n[plugins.'io.containerd.grpc.v1.cri']\n", []string{`2: plugins."io.containerd.cri.v1.images": has no effect`}},
		"slips": {"version = 2\nrot = \"/a\"\n[grpc]\nadress = \"/x\"\n[plugins.\"io.containerd.snapshotter.v1.overlayfs\"]\nroot_pth = \"/x\"\nasynchronous = true\n", []string{
			"2: rot: is not known and has no effect; did you mean root?", "4: grpc.adress: is not known and has no effect; did you mean grpc.address?", "6: ", "7: "}},
		"unknown": {"version = 2\n[nothing.like]\nthis = 1\n", []string{"2: nothing: is not known"}},
		"tcp":     {"version = 2\n[grpc]\ntcp_address = \"0.0.0.0:1\"\n[cgroup]\npath = \"/x\"\n", []string{"3: grpc.tcp_address: has no effect: the API is not served over TCP", "has no effect: the daemon stays in the cgroup"}},
	} {
		path := write(t, t.TempDir(), "config.toml", c.file)
		cfg, warnings, err := Load(path)
		if err != nil || !reflect.DeepEqual(cfg, Default()) {
			t.Errorf("%s: %+v, %v", name, cfg, err)
		}
		if len(warnings) != len(c.want) {
			t.Errorf("%s: warnings %v, not %v", name, warnings, c.want)
			continue
		}
		for i, want := range c.want {
			if got := warnings[i].String(); !strings.HasPrefix(got, path+":") || !strings.Contains(got, want) {
				t.Errorf("%s: %q has no %q", name, got, want)
			}
		}
	}
}

func TestImports(t *testing.T) {
	dir := t.TempDir()
	main := write(t, dir, "config.toml", "version = 2\nroot = \"/main\"\nimports = [\"conf.d/*.toml\", \"last.toml\", \"none/*.toml\"]\ndisabled_plugins = [\"a\"]\n[grpc]\nuid = 1\ngid = 1\n")
	write(t, dir, "conf.d/2.toml", "version = 3\ndisabled_plugins = [\"c\", \"a\"]\n[grpc]\ngid = 3\n")
	write(t, dir, "conf.d/1.toml", "disabled_plugins = [\"b\"]\nimports = [\"../config.toml\"]\n[grpc]\nuid = 2\ngid = 2\n") // round in a circle
	last := write(t, dir, "last.toml", "root = \"/last\"\nbad = 1\n")
	cfg, warnings, err := Load(main)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Root != "/last" || cfg.GRPC.UID != 2 || cfg.GRPC.GID != 3 || !reflect.DeepEqual(cfg.DisabledPlugins, []string{"a", "b", "c"}) {
		t.Errorf("%+v", cfg)
	}
	if len(warnings) != 1 || warnings[0].File != last || warnings[0].Line != 2 || warnings[0].Key != "bad" {
		t.Errorf("%v", warnings)
	}
	// What is wrong in an imported file is told with its name; one of another version is refused.
	for data, want := range map[string]string{"\nroot = 1\n": ":2: root must be", "version = 1\n": "too old", "version = 9\n": "newer"} {
		write(t, dir, "last.toml", data)
		if _, _, err := Load(main); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), last) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", data, err)
		}
	}
}

func TestMigrate(t *testing.T) {
	v1 := `# containerd's version 1
root = "/r"
disabled_plugins = ["cri", "io.containerd.grpc.v1.diff", "own"]
[grpc]
address = "/a.sock"
[plugins.overlayfs]
root_path = "/o"
[plugins.cri.containerd]
snapshotter = "native"
`
	path := filepath.Join(t.TempDir(), "old.toml")
	for name, data := range map[string]string{"no version": v1, "version 1": "version = 1\n" + v1} {
		out, err := Migrate([]byte(data), path)
		if err != nil {
			t.Fatal(err)
		}
		cfg, warnings, err := Load(write(t, t.TempDir(), "new.toml", string(out)))
		if err != nil || cfg.Root != "/r" || cfg.GRPC.Address != "/a.sock" || cfg.Overlayfs.RootPath != "/o" ||
			!reflect.DeepEqual(cfg.DisabledPlugins, []string{"io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.diff", "own"}) {
			t.Errorf("%s: %+v, %v; migrated:\n%s", name, cfg, err, out)
		}
		if len(warnings) != 1 || !strings.Contains(warnings[0].Key, "io.containerd.grpc.v1.cri") {
			t.Errorf("%s: %v", name, warnings)
		}
	}
	for data, want := range map[string]string{
		"version = 4\n": "newer", "version = 'x'\n": "must be an integer", "[x": ":1:",
		"[plugins.cri]\na = 1\n[plugins.'io.containerd.grpc.v1.cri']\nb = 1\n": "are the same",
	} {
		if _, err := Migrate([]byte(data), path); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", data, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("version = 2\n[grpc]\naddress = '/x'\n")
	f.Add("version = 3\nplugins.a.b = { c = [1, {d = 2}] }\n[[x]]\ny=1\n[[x]]\n")
	f.Add("disabled_plugins = ['cri']\n[plugins.cri]\n")
	f.Fuzz(func(t *testing.T, data string) {
		if strings.Contains(data, "imports") {
			return // other files are not this test's
		}
		path := write(t, t.TempDir(), "config.toml", data)
		cfg, warnings, err := Load(path)
		switch {
		case err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path)):
			t.Errorf("%q: %v", data, err)
		case err == nil && cfg == nil:
			t.Errorf("%q: nothing", data)
		}
		for _, w := range warnings {
			if w.Line < 1 || w.Line > strings.Count(data, "\n")+1 || w.Key == "" {
				t.Errorf("%q: %v", data, w)
			}
		}
		if out, err := Migrate([]byte(data), path); err == nil {
			if _, _, err := Load(write(t, t.TempDir(), "new.toml", string(out))); err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q migrated: %v", data, errors.Join(err))
			}
		}
	})
}
