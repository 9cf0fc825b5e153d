package server

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/manager/config"
	"github.com/managerd/managerd/manager/namespaces"
)

// TestLeftOutSnapshotters: what this machine, or the configuration, does not have is skipped with the reason.
func TestLeftOutSnapshotters(t *testing.T) {
	r := run(t, settings(t), nil)
	resp, err := introspectionapi.NewIntrospectionClient(r).Plugins(context.Background(), &introspectionapi.PluginsRequest{Filters: []string{"type==io.containerd.snapshotter.v1"}})
	if err != nil {
		t.Fatal(err)
	}
	reasons, capabilities := map[string]string{}, map[string][]string{}
	for _, p := range resp.Plugins {
		capabilities[p.ID] = p.Capabilities
		if p.InitErr != nil {
			reasons[p.ID] = p.InitErr.Message
		}
	}
	for id, why := range map[string]string{"aufs": "removed from Linux, use overlayfs", "blockfile": "scratch_file", "devmapper": "pool_name", "zfs": "zfs"} {
		if !strings.Contains(reasons[id], why) || !strings.HasSuffix(reasons[id], "skip plugin") {
			t.Errorf("%s: %q", id, reasons[id])
		}
	}
	if got := strings.Join(capabilities["overlayfs"], " "); !strings.Contains(got, "only-remap-ids") {
		t.Errorf("overlayfs can %q", got)
	}
}

// TestLeftOutErofs: without mkfs.erofs, or with one that is too old, the list of plugins says so.
func TestLeftOutErofs(t *testing.T) {
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(known), "\terofs\n") {
		t.Skip("this kernel has no erofs")
	}
	for script, why := range map[string]string{"": "mkfs.erofs (erofs-utils) is not installed", "#!/bin/sh\necho usage: mkfs.erofs --quiet\n": "is too old: it has no --preserve-mtime"} {
		dir := t.TempDir()
		if script != "" {
			if err := os.WriteFile(filepath.Join(dir, "mkfs.erofs"), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", dir)
		r := run(t, settings(t), nil)
		resp, err := introspectionapi.NewIntrospectionClient(r).Plugins(context.Background(), &introspectionapi.PluginsRequest{Filters: []string{"id==erofs"}})
		if err != nil || len(resp.Plugins) != 1 {
			t.Fatal(resp, err)
		}
		if m := resp.Plugins[0].InitErr.GetMessage(); !strings.Contains(m, why) || !strings.HasSuffix(m, "skip plugin") {
			t.Errorf("%q, want %q", m, why)
		}
	}
}

// TestProxyPlugins: programs that hang or are not there keep nothing from working.
func TestProxyPlugins(t *testing.T) {
	cfg := settings(t)
	dir := filepath.Dir(cfg.Root)
	l, err := net.Listen("unix", filepath.Join(dir, "mute")) // it takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	cfg.Proxies = map[string]config.Proxy{
		"mute":  {Type: "snapshot", Address: filepath.Join(dir, "mute"), Exports: map[string]string{"root": "/x"}, Capabilities: []string{"remap-ids"}},
		"away":  {Type: "snapshot", Address: filepath.Join(dir, "away")},
		"blobs": {Type: "content", Address: filepath.Join(dir, "away")},
		"tar":   {Type: "diff", Address: filepath.Join(dir, "away")},
		"aufs":  {Type: "snapshot", Address: filepath.Join(dir, "away")},
	}
	cfg.Differs = []string{"walking", "tar"}
	began := time.Now()
	r := run(t, cfg, nil)
	resp, err := introspectionapi.NewIntrospectionClient(r).Plugins(context.Background(), &introspectionapi.PluginsRequest{Filters: []string{"id==mute", "id==away", "id==blobs", "id==tar"}})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]*introspectionapi.Plugin{}
	for _, p := range resp.Plugins {
		got[p.ID] = p
	}
	if p := got["mute"]; p.Type != "io.containerd.snapshotter.v1" || p.InitErr != nil || p.Exports["root"] != "/x" ||
		p.Exports["address"] != cfg.Proxies["mute"].Address || strings.Join(p.Capabilities, " ") != "remap-ids" {
		t.Errorf("mute: %v", p)
	}
	if p := got["tar"]; p.Type != "io.containerd.differ.v1" || p.InitErr != nil {
		t.Errorf("tar: %v", p)
	}
	if p := got["blobs"]; p.Type != "io.containerd.content.v1" || p.InitErr == nil || !strings.Contains(p.InitErr.Message, "content") {
		t.Errorf("blobs: %v", p)
	}
	if failed, _ := r.plugins(t); len(failed) != 1 || failed["io.containerd.content.v1.blobs"] == "" {
		t.Errorf("failed: %v", failed)
	}
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), "default"), 20*time.Second)
	defer cancel()
	client := snapshotsapi.NewSnapshotsClient(r)
	for name, want := range map[string]codes.Code{"away": codes.Unavailable, "native": codes.OK} {
		if _, err := client.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: name, Key: "k"}); status.Code(err) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > time.Minute {
		t.Errorf("it took %s", d)
	}
}

// TestUnknownDiffer: the diff service says which differ it does not have; all else works.
func TestUnknownDiffer(t *testing.T) {
	cfg := settings(t)
	cfg.Differs = []string{"walking", "none"}
	failed, _ := run(t, cfg, nil).plugins(t)
	if why := failed["io.containerd.grpc.v1.diff"]; len(failed) != 1 || !strings.Contains(why, `"none"`) {
		t.Errorf("failed: %v", failed)
	}
}
