package command_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMounts: mounts are activated from arguments and from what snapshots print, shown, labelled and deactivated.
func TestMounts(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(w.Dir, "disk")
	type row struct {
		Type, Source string
		Point        string `json:"mount_point"`
		Data         map[string]string
	}
	var left []row
	parse := func(out string, v any) {
		t.Helper()
		if err := json.Unmarshal([]byte(out), v); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	parse(w.ok("mounts", "activate", "--temporary", "-l", "k=v", "disk", "mkfs/loop:"+file+":X-containerd.mkfs.size=8MiB,rw", "format/ext4:{{ mount 0 }}"), &left)
	var info struct {
		Name           string
		Active, System []row
		Labels         map[string]string
	}
	parse(w.ok("mounts", "info", "disk"), &info)
	if len(left) != 1 || len(info.Active) != 2 || len(info.System) != 1 || left[0].Source != info.Active[1].Point || !strings.HasPrefix(info.Active[0].Data["device"], "/dev/loop") ||
		info.Labels["k"] != "v" {
		t.Errorf("%+v, %+v", left, info)
	}
	if _, err := os.Stat(filepath.Join(left[0].Source, "lost+found")); err != nil {
		t.Error(err)
	}
	if out := w.ok("mounts", "ls"); !strings.Contains(out, "disk") || !strings.Contains(out, "k=v") {
		t.Errorf("%s", out)
	}
	if out := w.ok("mounts", "label", "disk", "k=", "l=w"); !strings.Contains(out, "l=w") || strings.Contains(out, "k=v") {
		t.Errorf("%s", out)
	}
	// Nothing else than its label keeps it.
	lease := strings.TrimSpace(w.ok("leases", "create"))
	w.ok("mounts", "activate", "--lease", lease, "leased", "loop:"+file+":ro")
	w.ok("leases", "rm", "--sync", lease)
	if out := w.ok("mounts", "ls", "-q"); out != "disk\n" {
		t.Errorf("%s", out)
	}
	// From what a snapshot prints.
	list := filepath.Join(w.Dir, "mounts.json")
	if err := os.WriteFile(list, []byte(w.ok("snapshots", "prepare", "--mounts", "s")), 0o600); err != nil {
		t.Fatal(err)
	}
	w.ok("mounts", "activate", "--temporary", "--from", list, "s")
	w.ok("mounts", "deactivate", "s", "disk")
	w.ok("snapshots", "rm", "s")
	if out := w.ok("mounts", "ls", "-o", "json"); out != "[]\n" {
		t.Errorf("%s", out)
	}

	w.fails(1, []string{"disk", "not found", "mounts ls"}, "mounts", "info", "disk")
	w.fails(1, []string{"disk", "not found", "mounts ls"}, "mounts", "deactivate", "disk")
	w.fails(1, []string{"by itself"}, "mounts", "activate", "x", "bind:/:bind")
	w.fails(1, []string{"size=SIZE"}, "mounts", "activate", "x", "mkfs/loop:"+file)
	w.fails(1, []string{"no list of mounts"}, "mounts", "activate", "--from", file, "x")
	w.fails(2, []string{"TYPE:SOURCE"}, "mounts", "activate", "x", "loop")
	w.fails(2, []string{"no mounts"}, "mounts", "activate", "x")
}
