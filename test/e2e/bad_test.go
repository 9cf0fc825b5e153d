package e2e

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

// TestBadRequests: what cannot be done has containerd's code and a sentence that names the object, and leaves nothing.
func TestBadRequests(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	if _, err := c.run("box", "sleep 1000"); err != nil {
		t.Fatal(err)
	}
	defer c.finish(t, "box")

	fails(t, "unknown task", c.start("nosuch", ""), codes.NotFound, "nosuch")
	fails(t, "unknown exec", c.start("box", "nosuch"), codes.NotFound, "nosuch", "box")
	_, err := c.state("nosuch", "")
	fails(t, "state of an unknown task", err, codes.NotFound, "nosuch")
	_, err = c.wait("nosuch", "")
	fails(t, "wait for an unknown task", err, codes.NotFound, "nosuch")
	_, err = c.create("nosuch")
	fails(t, "mounts of an unknown snapshot", err, codes.NotFound, "nosuch")
	fails(t, "unknown container", c.deleteContainer("nosuch"), codes.NotFound, "nosuch")
	fails(t, "unknown snapshot", c.removeSnapshot("nosuch"), codes.NotFound, "nosuch")

	spec, err := c.sh("box", "true")
	if err != nil {
		t.Fatal(err)
	}
	fails(t, "a container's id again", c.container("box", spec), codes.AlreadyExists, "box")
	fails(t, "a snapshot's key again", c.prepare("box"), codes.AlreadyExists, "box")
	_, err = c.create("box")
	fails(t, "a second task", err, codes.AlreadyExists, "box")
	if err := c.exec("box", "e", "sleep 1000"); err != nil {
		t.Fatal(err)
	}
	fails(t, "an exec's id again", c.exec("box", "e", "true"), codes.AlreadyExists, "e", "box")

	fails(t, "start of what runs", c.start("box", ""), codes.FailedPrecondition, "box", "running")
	_, err = c.deleteTask("box")
	fails(t, "delete of what runs", err, codes.FailedPrecondition, "box", "running")
	fails(t, "kill of an exec that was not started", c.kill("box", "e", 9), codes.FailedPrecondition, "e", "box")
	_, err = c.tasks.Resume(c.ctx, &tasks.ResumeTaskRequest{ContainerID: "box"})
	fails(t, "resume of what runs", err, codes.FailedPrecondition, "box")
	if _, err := c.deleteExec("box", "e"); err != nil {
		t.Fatal(err)
	}
	fails(t, "no signal", c.kill("box", "", 999), codes.InvalidArgument, "999")
	_, err = c.tasks.Exec(c.ctx, &tasks.ExecProcessRequest{ContainerID: "box", ExecID: "e", Spec: &anypb.Any{TypeUrl: processURL, Value: []byte("{")}})
	fails(t, "a process that is no JSON", err, codes.InvalidArgument, "box")
	_, err = c.tasks.Exec(c.ctx, &tasks.ExecProcessRequest{ContainerID: "box", ExecID: "../e", Spec: encode(processURL, &specs.Process{Args: []string{"true"}, Cwd: "/"})})
	fails(t, "an exec's name with a slash", err, codes.InvalidArgument, "../e")

	for _, id := range []string{"", "a/b", "..", "a b", strings.Repeat("x", 200)} {
		fails(t, "a container's name", c.container(id, spec), codes.InvalidArgument, id[:min(len(id), 20)])
	}
	none := metadata.NewOutgoingContext(context.Background(), nil)
	_, err = c.containers.List(none, &containers.ListContainersRequest{})
	fails(t, "no namespace", err, codes.FailedPrecondition, "namespace")
	other := metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", "another")
	_, err = c.containers.Get(other, &containers.GetContainerRequest{ID: "box"})
	fails(t, "a container of another namespace", err, codes.NotFound, "box")
	_, err = c.tasks.Get(other, &tasks.GetRequest{ContainerID: "box"})
	fails(t, "a task of another namespace", err, codes.NotFound, "box")
	_, err = c.tasks.Kill(other, &tasks.KillRequest{ContainerID: "box", Signal: 9})
	fails(t, "a kill from another namespace", err, codes.NotFound, "box")
	_, err = c.containers.List(c.ctx, &containers.ListContainersRequest{Filters: []string{"id=="}})
	fails(t, "a filter", err, codes.InvalidArgument, "id==")
	_, err = c.snapshots.Prepare(c.ctx, &snapshots.PrepareSnapshotRequest{Snapshotter: "nosuch", Key: "x"})
	fails(t, "an unknown snapshotter", err, codes.InvalidArgument, "nosuch", snapshotter)
	if p, err := c.state("box", ""); err != nil || p.Status.String() != "RUNNING" {
		t.Errorf("after all that: %v, %v", p, err)
	}
}

// TestBadSpecs: a container that cannot be made leaves no task, and can be removed. The harness looks for the rest.
func TestBadSpecs(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	for name, bad := range map[string]struct {
		change func(*specs.Spec)
		raw    string // instead of a spec
		mounts []*types.Mount
		code   codes.Code
		parts  []string
	}{
		"no JSON":            {raw: "{", code: codes.InvalidArgument},
		"a wrong type":       {raw: `{"process": {"args": "sh"}}`, code: codes.InvalidArgument, parts: []string{"args"}},
		"nothing":            {raw: "{}", code: codes.InvalidArgument},
		"no args":            {change: func(s *specs.Spec) { s.Process.Args = nil }, code: codes.InvalidArgument, parts: []string{"args"}},
		"no process":         {change: func(s *specs.Spec) { s.Process = nil }, code: codes.InvalidArgument, parts: []string{"process"}},
		"no program":         {change: func(s *specs.Spec) { s.Process.Args = []string{"/nosuch"} }, code: codes.InvalidArgument, parts: []string{"/nosuch"}},
		"a directory":        {change: func(s *specs.Spec) { s.Process.Args = []string{"/bin"} }, code: codes.InvalidArgument, parts: []string{"/bin"}},
		"relative directory": {change: func(s *specs.Spec) { s.Process.Cwd = "here" }, code: codes.InvalidArgument, parts: []string{"here"}},
		"a mount's source": {change: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/nosuch", Destination: "/m", Options: []string{"rbind"}})
		}, code: codes.Unknown, parts: []string{"/nosuch"}}, // which is what containerd says when the machine lacks something
		"a namespace's path": {change: func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces[:0:0], specs.LinuxNamespace{Type: specs.MountNamespace}, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/nosuch"})
		}, code: codes.Unknown, parts: []string{"/nosuch"}},
		"no rootfs":       {mounts: []*types.Mount{}, code: codes.InvalidArgument, parts: []string{"/bin/sh"}},
		"a rootfs's type": {mounts: []*types.Mount{{Type: "nosuchfs", Source: "x"}}, code: codes.Unknown, parts: []string{"nosuchfs"}},
		"a rootfs's source": {mounts: []*types.Mount{{Type: "bind", Source: "/nosuch", Options: []string{"rbind"}}},
			code: codes.Unknown, parts: []string{"/nosuch"}},
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := c.sh("bad", "true")
			if err != nil {
				t.Fatal(err)
			}
			if bad.change != nil {
				bad.change(spec)
			}
			value := encode(specURL, spec)
			if bad.raw != "" {
				value.Value = []byte(bad.raw)
			}
			if err := c.prepare("bad"); err != nil {
				t.Fatal(err)
			}
			_, err = c.containers.Create(c.ctx, &containers.CreateContainerRequest{Container: &containers.Container{
				ID: "bad", Snapshotter: snapshotter, SnapshotKey: "bad", Spec: value, Runtime: &containers.Container_Runtime{Name: runtime},
			}})
			if err == nil {
				mounts := bad.mounts
				if mounts == nil {
					if mounts, err = c.mounts("bad"); err != nil {
						t.Fatal(err)
					}
				}
				_, err = c.tasks.Create(c.ctx, &tasks.CreateTaskRequest{ContainerID: "bad", Rootfs: mounts})
				defer func() {
					if err := c.deleteContainer("bad"); err != nil {
						t.Error(err)
					}
				}()
			}
			fails(t, "create", err, bad.code, append(bad.parts, "bad")...)
			if _, err := c.state("bad", ""); err == nil {
				t.Error("there is a task")
			}
			if err := c.removeSnapshot("bad"); err != nil {
				t.Error(err)
			}
		})
	}
	fails(t, "an unknown runtime", func() error {
		spec, err := c.sh("bad", "true")
		if err != nil {
			return err
		}
		_, err = c.containers.Create(c.ctx, &containers.CreateContainerRequest{Container: &containers.Container{
			ID: "bad", Spec: encode(specURL, spec), Runtime: &containers.Container_Runtime{Name: "io.containerd.nosuch.v1"},
		}})
		if err != nil {
			return err
		}
		defer func() { _ = c.deleteContainer("bad") }()
		_, err = c.tasks.Create(c.ctx, &tasks.CreateTaskRequest{ContainerID: "bad"})
		return err
	}(), codes.NotFound, "io.containerd.nosuch.v1", "containerd-shim-nosuch-v1")
}

// TestBadImages: an archive that is damaged, or whose layers would write outside of their root, is refused by name; no
// image, snapshot, ingest or lease of it stays.
func TestBadImages(t *testing.T) {
	u := newUser(t)
	good, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	layers := func(c image.Compression, files ...image.File) []byte {
		var b bytes.Buffer
		if err := image.WriteTo(&b, image.Options{Name: "example.org/bad:1", Compression: c, Layers: [][]image.File{files}}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	plain := layers(image.None, image.File{Name: "f", Body: "the body of a file", Mode: 0o644})
	before := u.ctr("images", "ls", "-q") + u.ctr("snapshots", "ls")
	outside := filepath.Join(t.TempDir(), "outside")
	for name, c := range map[string]struct {
		data  []byte
		parts []string
	}{
		"empty":      {nil, []string{"empty"}},
		"no archive": {[]byte("hello"), nil},
		"cut":        {good[:len(good)/2], []string{"unexpected EOF"}},
		"damaged":    {bytes.Replace(plain, []byte("the body"), []byte("a corpse"), 1), []string{"digest"}},
		"dot dot":    {layers(image.Gzip, image.File{Name: "../../../../../../../.." + outside, Body: "x", Mode: 0o644}), []string{".."}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "bad.tar")
			if err := os.WriteFile(file, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			refs := func() string { // of what was begun; ctr leaves some, to go on with
				var b strings.Builder
				for line := range strings.Lines(u.ctr("content", "active")) {
					b.WriteString(strings.Fields(line)[0] + " ")
				}
				return b.String() + u.ctr("leases", "ls", "-q", "id~=^mctl")
			}
			begun := refs()
			_, err := harness.Output(u.Mctl("images", "import", file))
			if err == nil {
				t.Fatal("mctl imports it")
			}
			has(t, err.Error(), append(c.parts, file)...)
			equal(t, "what mctl leaves", refs(), begun)
			u.fails(1, "images", "import", file)
			if _, err := os.Lstat(outside); err == nil {
				t.Error("it wrote outside of its root")
			}
			for _, ref := range strings.Fields(u.ctr("images", "ls", "-q", "name==example.org/bad:1")) {
				u.ctr("images", "rm", ref) // ctr makes the image before it unpacks it
			}
			if after := u.ctr("images", "ls", "-q") + u.ctr("snapshots", "ls"); after != before {
				t.Errorf("left:\n%s", after)
			}
		})
	}

	// What a link points to is looked for in the root, as in the container later.
	file := filepath.Join(t.TempDir(), "link.tar")
	if err := os.WriteFile(file, layers(image.Gzip, image.File{Name: "l", Body: filepath.Dir(outside), Mode: os.ModeSymlink},
		image.File{Name: "l/outside", Body: "inside", Mode: 0o644}), 0o600); err != nil {
		t.Fatal(err)
	}
	u.ctr("images", "import", file)
	if _, err := os.Lstat(outside); err == nil {
		t.Error("a layer wrote outside of its root through a link")
	}
	equal(t, "what was written", u.ctr("run", "--rm", "example.org/bad:1", "c", "cat", outside), "inside")
}
