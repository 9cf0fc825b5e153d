package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/services/snapshots/v1"
	taskapi "github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/managerd/managerd/manager/metadata"
)

// blobs gives the digests of the namespace, with their labels.
func (c *client) blobs(t *testing.T) map[string]map[string]string {
	t.Helper()
	s, err := contentapi.NewContentClient(c.conn).List(c.ctx, &contentapi.ListContentRequest{})
	out := map[string]map[string]string{}
	for err == nil {
		var r *contentapi.ListContentResponse
		if r, err = s.Recv(); err == nil {
			for _, i := range r.Info {
				out[i.Digest] = i.Labels
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return out
}

// layers gives the snapshots of the namespace: kind and parent by name.
func (c *client) layers(t *testing.T) map[string]string {
	t.Helper()
	s, err := c.snapshots.List(c.ctx, &snapshots.ListSnapshotsRequest{Snapshotter: snapshotter})
	out := map[string]string{}
	for err == nil {
		var r *snapshots.ListSnapshotsResponse
		if r, err = s.Recv(); err == nil {
			for _, i := range r.Info {
				out[i.Name] = i.Kind.String() + " on " + i.Parent
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return out
}

// warning is what the daemon says of its database.
func (c *client) warning(t *testing.T) string {
	t.Helper()
	r, err := introspectionapi.NewIntrospectionClient(c.conn).Plugins(c.ctx, &introspectionapi.PluginsRequest{Filters: []string{"id==bolt"}})
	if err != nil || len(r.Plugins) != 1 {
		t.Fatal(r, err)
	}
	return r.Plugins[0].Exports["warning"]
}

// TestDatabaseLost: the database is gone, full of something else, torn, or yesterday's. The daemon starts each time, the
// containers have not noticed, and all that is on disk is known again.
func TestDatabaseLost(t *testing.T) {
	u := hoarder(t)
	c := newClient(t, u.Daemon)
	file := filepath.Join(u.Root(), "metadata.db")
	read := func(path string) []byte {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	restart := func(change func()) {
		t.Helper()
		if err := u.Kill(); err != nil {
			t.Fatal(err)
		}
		change()
		if err := u.Start(); err != nil {
			t.Fatal(err)
		}
	}
	run := func(id string) uint32 {
		t.Helper()
		pid, err := c.run(id, "echo mine >/mark; trap 'exit 42' TERM; sleep 1000 & wait")
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	pids := map[string]uint32{"old": run("old")}
	run("gone")
	var backup []byte
	restart(func() { backup = read(file) })
	c.finish(t, "gone")
	images := u.ctr("images", "ls", "-q")
	torn := func(data []byte) []byte {
		page := os.Getpagesize()
		for at := 2 * page; at+page <= len(data); at += page { // every page with a container's record
			if bytes.Contains(data[at:at+page], []byte("runtime-spec/1/Spec")) {
				clear(data[at+16 : at+page])
			}
		}
		return data
	}
	for n, lose := range []struct {
		name   string
		reason string
		do     func(now []byte) []byte // nil: no file
		images string                  // are still known
	}{
		{"missing", "there was no database", func([]byte) []byte { return nil }, "no"},
		{"empty", "damaged", func([]byte) []byte { return []byte{} }, "no"},
		{"another format", "damaged", func([]byte) []byte { return bytes.Repeat([]byte("%PDF-1.7 "), 10000) }, "no"},
		{"torn", "damaged", torn, "yes"},
		// Whether the records are in the third that is left is a matter of luck.
		{"cut short", "damaged", func(now []byte) []byte { return now[:len(now)/3] }, "perhaps"},
		{"no meta page", "damaged", func(now []byte) []byte { clear(now[:2*os.Getpagesize()]); return now }, "yes"},
		{"yesterday's", "a copy from before", func([]byte) []byte { return backup }, "yes"},
	} {
		later := fmt.Sprint("later", n)
		pids[later] = run(later)
		layers, blobs := c.layers(t), c.blobs(t)
		var broken []byte
		restart(func() {
			if broken = lose.do(read(file)); broken == nil {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(file, broken, 0o600); err != nil {
				t.Fatal(err)
			}
		})
		check := func(what string, err error) {
			t.Helper()
			if err != nil {
				t.Errorf("%s: %s: %v", lose.name, what, err)
			}
		}
		if w := c.warning(t); !strings.Contains(w, lose.reason) || !strings.Contains(w, "mctl fsck") {
			t.Errorf("%s: the warning is %q", lose.name, w)
		} else if at := strings.Index(w, file+".damaged-"); lose.reason == "damaged" {
			aside, _, _ := strings.Cut(w[max(at, 0):], ";")
			if got, err := os.ReadFile(aside); err != nil || !bytes.Equal(got, broken) {
				t.Errorf("%s: set aside as %q: %v", lose.name, aside, err)
			}
		}
		h, err := grpc_health_v1.NewHealthClient(c.conn).Check(c.ctx, &grpc_health_v1.HealthCheckRequest{Service: "metadata"})
		if err != nil || h.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			t.Errorf("%s: health: %v, %v", lose.name, h, err)
		}
		for id, pid := range pids {
			st, err := c.state(id, "")
			if err != nil || st.Pid != pid || st.Status != taskapi.Status_RUNNING {
				t.Errorf("%s: task %s: %v, %v", lose.name, id, st, err)
				continue
			}
			r, err := c.containers.Get(c.ctx, &containersapi.GetContainerRequest{ID: id})
			if err != nil || r.Container.SnapshotKey != id || r.Container.Snapshotter != snapshotter || r.Container.Runtime.Name != runtime ||
				!strings.Contains(string(r.Container.Spec.Value), "exit 42") {
				t.Errorf("%s: container %s: %v, %v", lose.name, id, r, err)
			}
			check("exec", c.exec(id, "x", "test $(cat /mark) = mine && exit 7"))
			check("start", c.start(id, "x"))
			if code, err := c.wait(id, "x"); err != nil || code != 7 {
				t.Errorf("%s: exec in %s: %d, %v", lose.name, id, code, err)
			}
			_, err = c.deleteExec(id, "x")
			check("delete", err)
		}
		if got := c.layers(t); fmt.Sprint(got) != fmt.Sprint(layers) {
			t.Errorf("%s: snapshots are\n%v, not\n%v", lose.name, got, layers)
		}
		until(t, lose.name+": the content is known", func() bool { return len(c.blobs(t)) == len(blobs) })
		for d, labels := range c.blobs(t) {
			if _, ok := blobs[d]; !ok {
				t.Errorf("%s: there is %s", lose.name, d)
			}
			if lose.images == "no" && labels[metadata.RecoveredLabel] == "" {
				t.Errorf("%s: %s has the labels %v", lose.name, d, labels)
			}
		}
		got := u.ctr("images", "ls", "-q")
		if got != "" && got != images || lose.images == "no" && got != "" || lose.images == "yes" && got != images {
			t.Errorf("%s: images %q", lose.name, got)
		}
		if _, err := c.containers.Get(c.ctx, &containersapi.GetContainerRequest{ID: "gone"}); (err == nil) != (lose.name == "yesterday's") {
			t.Errorf("%s: a container that was removed: %v", lose.name, err)
		}
		// The image can be had again, and be run.
		u.ctr("images", "import", archive)
		check("another container", func() error { _, err := c.run("new", "sleep 1000"); return err }())
		c.finish(t, "new")
		if !t.Failed() {
			continue
		}
		return
	}
	for id := range pids {
		if err := c.kill(id, "", 15); err != nil {
			t.Error(err)
		}
		if code, err := c.wait(id, ""); err != nil || code != 42 {
			t.Errorf("%s ended with %d, %v", id, code, err)
		}
		if err := c.remove(id); err != nil {
			t.Error(err)
		}
	}
	// Somebody has looked, and says so.
	found := u.fsck(1)
	if len(found) == 0 || found[len(found)-1].Kind != "database" || !strings.Contains(found[len(found)-1].Problem, "older") {
		t.Errorf("%v", found)
	}
	u.fsck(0, "--fix")
	for range 2 {
		if w := c.warning(t); w != "" {
			t.Errorf("afterwards: %q", w)
		}
		restart(func() {})
	}
	if aside, _ := filepath.Glob(file + ".damaged-*"); len(aside) != 5 {
		t.Errorf("%d were set aside", len(aside))
	}
	if _, err := imagesapi.NewImagesClient(c.conn).List(c.ctx, &imagesapi.ListImagesRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file + ".salvaged"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a half-made database is left")
	}
}
