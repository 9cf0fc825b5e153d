package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

const outsideContent = `
disabled_plugins = ["io.containerd.content.v1.content"]
[proxy_plugins.outside]
type = "content"
address = "DIR/plugin.sock"
`

// pluginRow gives a line of the list of plugins: its status, and its detailed text.
func (u *user) pluginRow(typ, id string) (status, text string) {
	u.t.Helper()
	filter := fmt.Sprintf("type==%s,id==%s", typ, id)
	f := strings.Fields(strings.TrimSpace(strings.Split(u.mctl("plugins", "ls", filter)+"\n\n", "\n")[1]))
	if len(f) == 0 {
		u.t.Fatalf("there is no plugin %s.%s", typ, id)
	}
	return f[len(f)-1], u.mctl("plugins", "ls", "-d", filter)
}

// TestContentProxy: content is in another program, whichever client brings it, and only its records are here. Without that
// program all else works, also a start; what needs it is told so.
func TestContentProxy(t *testing.T) {
	u := configured(t, outsideContent)
	p := newPlugin(u)
	u.start()
	u.ctr("images", "import", archive)
	equal(t, "output", u.ctr("run", "--rm", ref, "c", "echo", "x"), "x\n")
	if status, text := u.pluginRow("io.containerd.content.v1", "outside"); status != "ok" {
		t.Errorf("%s: %s", status, text)
	}
	until(t, "as many blobs there as records here", func() bool { // what the import leaves is collected meanwhile
		n := p.blobs()
		return n > 0 && n == rows(u.ctr("content", "ls"))
	})
	if own, _ := filepath.Glob(filepath.Join(u.Root(), "io.containerd.content.v1.content", "blobs", "*", "*")); len(own) > 0 {
		t.Errorf("stored here: %v", own)
	}
	// What goes in comes out.
	file := filepath.Join(t.TempDir(), "out.tar")
	u.ctr("images", "export", file, ref)
	digest := row(t, u.ctr("images", "ls"), ref)[2]
	u.ctr("images", "rm", "--sync", ref)
	if n := p.blobs(); n != 0 {
		t.Errorf("%d blobs are left there", n)
	}
	u.mctl("images", "import", file)
	equal(t, "digest", row(t, u.ctr("images", "ls"), ref)[2], digest)
	u.ctr("run", "-d", ref, "stays", "sleep", "1000")
	equal(t, "orphans", fmt.Sprint(u.fsck(0)), "[]")

	p.kill()
	status, text := u.pluginRow("io.containerd.content.v1", "outside")
	equal(t, "status", status, "warning")
	has(t, text, "outside", p.socket())
	has(t, u.fails(1, "content", "get", digest), "outside at "+p.socket(), "Unavailable")
	has(t, u.failing(1, u.Mctl("images", "import", archive)), "outside at "+p.socket()) // ctr would wait for it
	quickly(t, "a restart without the other program", func() { u.restart(u.Kill) })
	equal(t, "output", u.ctr("t", "exec", "--exec-id", "e", "stays", "echo", "y"), "y\n")
	u.ctr("images", "rm", ref)
	for _, id := range strings.Fields(u.ctr("leases", "ls", "-q")) { // the import that failed has left what there is of it for another one
		u.ctr("leases", "rm", id)
	}
	u.mctl("content", "prune")

	p.start()
	u.restart(u.Stop)
	u.ctr("t", "kill", "-s", "KILL", "stays")
	until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "stays")[2] == "STOPPED" })
	u.ctr("t", "rm", "stays")
	u.ctr("c", "rm", "stays")
	await(t, "what was removed without the program is removed there", func() bool { return p.blobs() == 0 })
}

// TestContentProxyHung: a program that does not answer makes nobody else wait.
func TestContentProxyHung(t *testing.T) {
	u := configured(t, outsideContent)
	p := newPlugin(u)
	u.start()
	u.ctr("images", "import", archive)
	u.ctr("run", "-d", ref, "stays", "sleep", "1000")
	digest := row(t, u.ctr("images", "ls"), ref)[2]
	wake := p.hang()
	lists := func() {
		u.ctr("c", "ls")
		u.ctr("content", "ls")
		equal(t, "output", u.ctr("t", "exec", "--exec-id", "e", "stays", "echo", "y"), "y\n")
	}
	conn := must(u.Conn())
	ctx, cancel := context.WithCancel(u.Context(context.Background()))
	defer cancel()
	begun := make(chan error, 1)
	go func() { // somebody waits for it all the time
		w, err := contentapi.NewContentClient(conn).Write(ctx)
		if err == nil {
			err = w.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: "r"})
		}
		if err == nil {
			_, err = w.Recv()
		}
		begun <- err
	}()
	quickly(t, "what does not need it", lists)
	if err := <-begun; code(err) != "Unavailable" || !strings.Contains(err.Error(), "outside at "+p.socket()+" did not answer within 10s") {
		t.Error(err)
	}
	if status, text := u.pluginRow("io.containerd.content.v1", "outside"); status != "warning" || !strings.Contains(text, "has not answered since") {
		t.Errorf("%s: %s", status, text)
	}
	quickly(t, "a restart beside a program that hangs", func() { u.restart(u.Stop) })
	quickly(t, "what does not need it", lists)
	wake()
	await(t, "content", func() bool {
		out, err := harness.Output(u.Command("content", "get", digest))
		return err == nil && strings.Contains(out, "layers")
	})
	u.ctr("t", "kill", "-s", "KILL", "stays")
	until(t, "stop", func() bool { return row(t, u.ctr("t", "ls"), "stays")[2] == "STOPPED" })
	u.ctr("t", "rm", "stays")
	u.ctr("c", "rm", "stays")
}

// TestContentProxyKilled: the program is killed in the middle of an import and of a pull, and started again: both go on where
// it stands, and what they bring is right.
func TestContentProxyKilled(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	m := newMeter(t, registry.URL(), 16<<20)
	n := makeNoise(t, registry.URL(), "noise", 9, 6<<20, 10<<20, 100_000)
	n.ref = m.addr + "/noise:latest"
	u := configured(t, outsideContent)
	p := newPlugin(u)
	u.start()
	mv := newMover(t, u.Daemon)

	pulled := make(chan error, 1)
	go func() {
		_, err := mv.move(plain(n.ref), stored(n.ref))
		pulled <- err
	}()
	for k := range int64(3) {
		m.until(t, "bytes of layers", func() bool { return m.total >= (k+1)*3<<20 || len(pulled) > 0 })
		p.kill()
		p.start()
	}
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	n.whole(t, u.Daemon)
	for i, l := range n.layers {
		if got := m.of(l.Digest.String()); got != l.Size {
			t.Errorf("%d bytes of layer %d came, it has %d", got, i, l.Size)
		}
	}

	// The archive comes through a pipe that stands still in the middle of its largest layer.
	file := filepath.Join(t.TempDir(), "noise.tar")
	u.ctr("images", "export", file, n.ref)
	u.ctr("images", "rm", "--sync", n.ref)
	if left := p.blobs(); left != 0 {
		t.Fatalf("%d blobs are left there", left)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	id, s, err := mv.stream("import")
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() { sent <- send(s, r) }()
	imported := make(chan error, 1)
	go func() {
		store := stored("")
		store.ExtraReferences = []*wire.ImageReference{{Name: "import-2026", IsPrefix: true, AllowOverwrite: true}}
		_, err := mv.move(&wire.ImageImportStream{Stream: id}, store)
		imported <- err
	}()
	half := len(data) / 2
	for at := 0; at < half; {
		k, err := w.Write(data[at:min(half, at+1<<20)])
		if err != nil {
			t.Fatal(err, <-imported)
		}
		at += k
	}
	p.kill()
	p.start()
	if _, err := w.Write(data[half:]); err != nil {
		t.Fatal(err, <-imported)
	}
	_ = w.Close()
	if err := <-imported; err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	n.whole(t, u.Daemon)
	if out := u.ctr("content", "active"); rows(out) != 0 {
		t.Errorf("writes are left: %s", out)
	}

	// One that does not come back is named, and what it has counts when it does.
	u.ctr("images", "rm", "--sync", n.ref)
	before := m.of("")
	go func() {
		_, err := mv.move(plain(n.ref), stored(n.ref))
		pulled <- err
	}()
	m.until(t, "bytes of layers", func() bool { return m.total >= before+6<<20 || len(pulled) > 0 })
	p.kill()
	if err := <-pulled; code(err) != "Unavailable" || !strings.Contains(err.Error(), "outside at "+p.socket()) {
		t.Error(err)
	}
	p.start()
	had := n.offsets(t, u.Daemon)
	came := m.of("")
	if _, err := mv.move(plain(n.ref), stored(n.ref)); err != nil {
		t.Fatal(err)
	}
	n.whole(t, u.Daemon)
	rest := int64(0)
	for i, l := range n.layers {
		rest += l.Size - had[i]
	}
	if got := m.of("") - came; got != rest {
		t.Errorf("%d bytes were fetched, %d were missing", got, rest)
	}
}

// TestContentStores: one content store is used, and the others say which, and how to choose.
func TestContentStores(t *testing.T) {
	two := "[proxy_plugins.a]\ntype = \"content\"\naddress = \"DIR/a.sock\"\n[proxy_plugins.b]\ntype = \"content\"\naddress = \"DIR/plugin.sock\"\n"
	u := configured(t, two)
	p := newPlugin(u)
	u.start()
	u.ctr("images", "import", archive) // to our own
	if n := p.blobs(); n > 0 {
		t.Errorf("%d blobs are in a store that is not used", n)
	}
	for _, id := range []string{"a", "b"} {
		status, text := u.pluginRow("io.containerd.content.v1", id)
		equal(t, id, status, "error")
		has(t, text, "content is kept in content", "io.containerd.content.v1.content in disabled_plugins")
	}
	u.ctr("images", "rm", "--sync", ref)

	u.configure("disabled_plugins = [\"io.containerd.content.v1.content\"]\n" + two)
	u.restart(u.Stop)
	for _, id := range []string{"a", "b"} {
		status, text := u.pluginRow("io.containerd.content.v1", id)
		equal(t, id, status, "error")
		has(t, text, "there are a, b", "disabled_plugins")
	}
	has(t, u.fails(1, "content", "ls"), "unknown service")

	u.configure("disabled_plugins = [\"io.containerd.content.v1.content\", \"io.containerd.content.v1.a\"]\n" + two)
	u.restart(u.Stop)
	u.ctr("images", "import", archive)
	if p.blobs() == 0 {
		t.Error("nothing is in the store that is left")
	}
	u.ctr("images", "rm", "--sync", ref)
}

// TestDiffProxy: layers are applied by another program where the configuration says so, by clients and by the daemon, and by
// the next differ where it does not know how.
func TestDiffProxy(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "noise", 3, 300_000, 100_000)
	n.ref = registry.Addr + "/noise:latest"
	const differ = "[proxy_plugins.outside]\ntype = \"diff\"\naddress = \"DIR/plugin.sock\"\n"
	const order = "[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"outside\", \"walking\"]\n"
	entry := func(snapshotter, differ string) string {
		return fmt.Sprintf("[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nsnapshotter = %q\ndiffer = %q\n", snapshotter, differ)
	}
	for _, c := range []struct {
		name, config string
		used         bool
	}{
		{"order", differ + order, true},
		{"differ", differ + entry("overlayfs", "outside"), true},
		{"other differ", differ + order + entry("overlayfs", "walking"), false},
		{"other snapshotter", differ + entry("native", "outside"), false},
		{"alone", differ, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := configured(t, c.config)
			p := newPlugin(u)
			u.start()
			mv := newMover(t, u.Daemon)
			if _, err := mv.move(plain(n.ref), stored(n.ref)); err != nil {
				t.Fatal(err)
			}
			n.whole(t, u.Daemon)
			var want []string
			for _, l := range n.layers {
				want = append(want, "apply="+l.Digest.String())
			}
			if !c.used {
				want = nil
			}
			equal(t, "layers applied outside", strings.Join(p.applied(), " "), strings.Join(want, " "))
			if c.name != "order" {
				return
			}
			// The diff service, and an import with a layer that the other program does not know.
			made := u.mctl("snapshots", "diff", "--keep", n.chain)
			has(t, strings.Join(p.applied(), " "), "diff="+digest.FromString(made).String())
			p.kill()
			u.ctr("images", "rm", "--sync", n.ref)
			if _, err := mv.move(plain(n.ref), stored(n.ref)); code(err) != "Unavailable" || !strings.Contains(err.Error(), "outside at "+p.socket()) {
				t.Error(err)
			}
			if out := u.ctr("snapshots", "ls"); rows(out) > 0 {
				t.Errorf("left of the unpacking that failed: %s", out)
			}
			p.start()
			if _, err := mv.move(plain(n.ref), stored(n.ref)); err != nil {
				t.Error(err)
			}
			plainArchive := filepath.Join(t.TempDir(), "plain.tar")
			u.mctl("images", "convert", "--uncompress", n.ref, "docker.io/library/plain:1")
			u.mctl("images", "export", plainArchive, "docker.io/library/plain:1")
			u.mctl("images", "rm", "--sync", n.ref, "docker.io/library/plain:1")
			before := len(p.applied())
			u.mctl("images", "import", plainArchive)
			if got := len(p.applied()); got != before {
				t.Errorf("%d plain layers were applied outside", got-before)
			}
			if out := u.ctr("snapshots", "ls"); rows(out) != len(n.layers) {
				t.Errorf("the plain layers are not unpacked: %s", out)
			}
		})
	}
}

// TestDiffProxyUnknown: a differ that there is not is said by what was to use it.
func TestDiffProxyUnknown(t *testing.T) {
	u := configured(t, "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\ndiffer = \"nosuch\"\n")
	u.start()
	status, text := u.pluginRow("io.containerd.transfer.v1", "local")
	equal(t, "status", status, "error")
	has(t, text, "unpack_config is to use differ \"nosuch\", there are walking")
}
