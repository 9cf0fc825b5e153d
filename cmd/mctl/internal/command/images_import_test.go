package command_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/clients"
	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/image"
)

// TestImportUnpacks: an image that cannot be unpacked is not imported.
func TestImportUnpacks(t *testing.T) {
	w := newWorld(t)
	w.ok("images", "rm", "--sync", busybox)
	file := multi(t, "amd64", "arm64")
	const name = "docker.io/library/multi:1"
	w.fails(1, []string{name, "not imported", "linux/mips", "--no-unpack"}, "images", "import", "--platform", "linux/amd64", "--platform", "linux/mips", file)
	if out := w.ok("images", "ls", "-q"); out != "" {
		t.Errorf("images are there: %s", out)
	}
	w.collect()
	if out := w.ok("content", "ls", "-q") + w.ok("leases", "ls", "-q"); out != "" {
		t.Errorf("left: %s", out)
	}
	w.ok("images", "import", "--no-unpack", "--platform", "linux/mips", file)
	if out := w.ok("images", "ls", "-q"); out != name+"\n" {
		t.Errorf("images are %q", out)
	}
}

// collect has the collector run.
func (w *world) collect() {
	w.Helper()
	w.ok("leases", "rm", "--sync", strings.TrimSpace(w.ok("leases", "create")))
}

// halves cuts the archive of an image in the middle of its last layer, and gives the digests of those before that.
func halves(t *testing.T) (first, second []byte, whole []string) {
	t.Helper()
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise)
	var b bytes.Buffer
	if err := image.WriteTo(&b, image.Options{Layers: [][]image.File{{{Name: "noise", Body: string(noise), Mode: 0o644}}}}); err != nil {
		t.Fatal(err)
	}
	data := bytes.NewReader(b.Bytes())
	in, cut := tar.NewReader(data), 0
	var layers []string
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Size > 100_000 {
			cut = b.Len() - data.Len() + int(h.Size)/2
			layers = append(layers, digest.NewDigestFromEncoded(digest.SHA256, h.Name[strings.LastIndex(h.Name, "/")+1:]).String())
		}
	}
	if len(layers) != 2 {
		t.Fatalf("the layers are %q", layers)
	}
	return b.Bytes()[:cut], b.Bytes()[cut:], layers[:1]
}

// TestImportCollected: a collection in the middle of an import takes nothing of it away; of an import that ends there nothing
// stays that is not collected.
func TestImportCollected(t *testing.T) {
	ctr2, err := clients.Build(clients.Ctr)
	if err != nil {
		t.Fatal(err)
	}
	first, second, whole := halves(t)
	for _, c := range []struct {
		name   string
		client string // "" for mctl, which imports itself; that of containerd 2 has the daemon import
		end    syscall.Signal
		status int
	}{
		{"mctl", "", 0, 0},
		{"mctl interrupted", "", syscall.SIGINT, 130},
		{"mctl killed", "", syscall.SIGKILL, -1},
		{"daemon", ctr2, 0, 0},
		{"daemon, client killed", ctr2, syscall.SIGKILL, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.ok("images", "rm", "--sync", busybox)
			cmd := w.Mctl("images", "import", "-")
			if w.Client = c.client; c.client != "" {
				cmd = w.Command("images", "import", "-")
			}
			var said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said, &said
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill() })
			if _, err := in.Write(first); err != nil {
				t.Fatal(err)
			}
			var active []struct{ Offset int64 }
			eventually(t, "the import is in its last layer", func() bool {
				parse(t, w.ok("content", "active", "-o", "json"), &active)
				return len(active) == 1 && active[0].Offset > 0 && strings.Contains(w.ok("content", "ls", "-q"), whole[0])
			})
			w.collect()
			if got := w.ok("content", "ls", "-q"); !strings.Contains(got, whole[0]) || strings.TrimSpace(w.ok("content", "active", "-o", "json")) == "[]" {
				t.Fatalf("in the middle of the import there are %q", got)
			}
			if c.end == 0 {
				_, err := in.Write(second)
				if err := errors.Join(err, in.Close(), cmd.Wait()); err != nil {
					t.Fatalf("%v: %s", err, &said)
				}
				w.collect()
				if out := w.ok("images", "check"); !strings.Contains(out, "complete (3/3)") || !strings.Contains(out, "true") {
					t.Errorf("imported: %s", out)
				}
				return
			}
			if err := cmd.Process.Signal(c.end); err != nil {
				t.Fatal(err)
			}
			if status := ends(t, cmd); status != c.status {
				t.Errorf("it ended with %d, not %d: %s", status, c.status, &said)
			}
			eventually(t, "nothing is left", func() bool {
				for _, l := range strings.Fields(w.ok("leases", "ls", "-q")) {
					if c.end == syscall.SIGKILL { // it would end by itself
						_, _, _ = w.mctl("leases", "rm", l)
					}
				}
				w.collect()
				return w.ok("content", "ls", "-q")+w.ok("leases", "ls", "-q")+w.ok("images", "ls", "-q") == ""
			})
			if c.client == "" && c.end == syscall.SIGKILL {
				return // its write goes when nobody has gone on with it for a day
			}
			if out := w.ok("content", "active", "-o", "json"); strings.TrimSpace(out) != "[]" {
				t.Errorf("writes are left: %s", out)
			}
		})
	}
}

// ends waits for a command.
func ends(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return harness.Status(err)
	case <-time.After(60 * time.Second):
		_ = cmd.Process.Signal(os.Kill)
		t.Fatalf("%v does not end", cmd.Args)
		return 0
	}
}
