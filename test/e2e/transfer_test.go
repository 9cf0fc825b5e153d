package e2e

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/services/streaming/v1"
	wire "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/managerd/managerd/test/harness"
	"github.com/managerd/managerd/test/regproxy"
)

// eventsOf are those of a blob or an image, in order, each once.
func eventsOf(told []*wire.Progress, name string) (out []string) {
	for _, p := range told {
		if strings.HasPrefix(p.Name, name) && (name != "" || p.Name == "") && (len(out) == 0 || out[len(out)-1] != p.Event) {
			out = append(out, p.Event)
		}
	}
	return out
}

// TestTransfer: pull, tag, push, export and import by the services Transfer and Streaming, as ctr 2.x uses them.
func TestTransfer(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "a/b", 2, 100_000, 3<<20)
	n.ref = registry.Addr + "/a/b:latest"
	d := harness.Test(t, bin)
	m := newMover(t, d)

	told, err := m.move(plain(n.ref), stored(n.ref))
	if err != nil {
		t.Fatal(err)
	}
	n.whole(t, d)
	all := eventsOf(told, "")
	if len(all) != 3 || all[0] != "Resolving from OCI Registry ("+n.ref+")" || all[1] != "Pulling from OCI Registry ("+n.ref+")" || all[2] != "Completed pull from OCI Registry ("+n.ref+")" {
		t.Errorf("%q", all)
	}
	if e := eventsOf(told, n.ref); strings.Join(e, ",") != "fetching image content,saved" {
		t.Errorf("%q", e)
	}
	layer := "layer-" + n.layers[1].Digest.String()
	if e := eventsOf(told, layer); len(e) == 0 || e[len(e)-1] != "extracted" {
		t.Errorf("%q", e)
	}
	last := &wire.Progress{}
	for _, p := range told {
		if p.Name == layer {
			last = p
		}
	}
	if last.Progress != n.layers[1].Size || last.Total != n.layers[1].Size || last.Desc.GetDigest() != n.layers[1].Digest.String() || len(last.Parents) != 1 || last.Parents[0] != "manifest-"+n.target.Digest.String() {
		t.Errorf("%v", last)
	}

	if _, err := m.move(&wire.ImageStore{Name: n.ref}, &wire.ImageStore{Name: "local/tag:1"}); err != nil {
		t.Fatal(err)
	}
	to := registry.Addr + "/c/d:2"
	if told, err = m.move(&wire.ImageStore{Name: "local/tag:1"}, plain(to)); err != nil {
		t.Fatal(err)
	}
	if e := eventsOf(told, ""); len(e) != 2 || e[1] != "Completed push to OCI Registry ("+to+")" {
		t.Errorf("%q", e)
	}
	if _, err := m.move(plain(to), &wire.ImageStore{Name: to}); err != nil {
		t.Error(err)
	}

	// Out over one stream, and into another daemon over another.
	id, s, err := m.stream("export")
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	received := make(chan error, 1)
	go func() { received <- receive(s, &archive) }()
	if told, err = m.move(&wire.ImageStore{ExtraReferences: []*wire.ImageReference{{Name: n.ref}}}, &wire.ImageExportStream{Stream: id}); err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Fatal(err)
	}
	if e := eventsOf(told, ""); strings.Join(e, ",") != "Exporting,Completed export" {
		t.Errorf("%q", e)
	}
	other := harness.Test(t, bin)
	o := newMover(t, other)
	if id, s, err = o.stream("import"); err != nil {
		t.Fatal(err)
	}
	go func() { received <- send(s, &archive) }()
	store := stored("")
	store.ExtraReferences = []*wire.ImageReference{{Name: "import-2026", IsPrefix: true, AllowOverwrite: true}}
	if told, err = o.move(&wire.ImageImportStream{Stream: id}, store); err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Error(err)
	}
	if e := eventsOf(told, n.ref); strings.Join(e, ",") != "saved" {
		t.Errorf("%q", e)
	}
	n.whole(t, other)

	// What is wrong has containerd's code.
	for _, c := range []struct {
		from, to proto.Message
		code     string
	}{
		{plain(registry.Addr + "/nosuch:1"), stored("x"), "NotFound"},
		{plain(""), stored("x"), "InvalidArgument"},
		{plain("not a name"), stored("x"), "InvalidArgument"},
		{&wire.ImageStore{Name: "nosuch"}, &wire.ImageStore{Name: "y"}, "NotFound"},
		{&wire.ImageStore{Name: n.ref}, &wire.ImageExportStream{Stream: "nosuch"}, "NotFound"},
		{plain(n.ref), plain(n.ref), "Unimplemented"},
	} {
		if _, err := m.move(c.from, c.to); code(err) != c.code {
			t.Errorf("%v to %v: %v", c.from, c.to, err)
		}
	}
}

// TestTransferCredentials: a registry that wants to know who pulls is told what the client answers over its stream.
func TestTransferCredentials(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	d := harness.Test(t, bin)
	u := &user{Daemon: d, t: t}
	u.ctr("images", "import", archive)
	at := registry.Addr + "/a:1"
	m := newMover(t, d)
	for _, c := range []struct {
		answer *wire.AuthResponse
		ok     bool
	}{
		{&wire.AuthResponse{AuthType: wire.AuthType_NONE}, false},
		{&wire.AuthResponse{AuthType: wire.AuthType_CREDENTIALS, Username: "joe", Secret: "wrong"}, false},
		{&wire.AuthResponse{AuthType: wire.AuthType_HEADER, Secret: "Basic am9lOnNlY3JldA=="}, true},
		{&wire.AuthResponse{AuthType: wire.AuthType_CREDENTIALS, Username: "joe", Secret: "secret"}, true},
	} {
		id, s, err := m.stream("auth")
		if err != nil {
			t.Fatal(err)
		}
		var asked *wire.AuthRequest
		var answering sync.WaitGroup
		ctx, cancel := context.WithCancel(m.ctx)
		answering.Go(func() { asked = answer(ctx, s, c.answer) })
		to := plain(at)
		to.Resolver.AuthStream = id
		_, err = m.move(&wire.ImageStore{Name: ref}, to)
		if (err == nil) != c.ok || err != nil && code(err) != "Unauthenticated" {
			t.Errorf("%v: %v", c.answer, err)
		}
		_ = s.CloseSend()
		cancel()
		answering.Wait()
		if asked.GetHost() != registry.Addr || asked.GetReference() != at {
			t.Errorf("asked for %v", asked)
		}
	}
	// The same by mctl, which cannot do without either.
	has(t, u.failing(1, u.Mctl("images", "pull", "--plain-http", at)), registry.Addr, "password")
	u.mctl("images", "pull", "--plain-http", "--user", "joe:secret", at)
}

// answer answers each question the same, and gives the last one.
func answer(ctx context.Context, s streaming.Streaming_StreamClient, r *wire.AuthResponse) (last *wire.AuthRequest) {
	type question struct {
		q   *wire.AuthRequest
		err error
	}
	questions := make(chan question, 1)
	go func() {
		for {
			a, err := s.Recv()
			q := &wire.AuthRequest{}
			if err == nil {
				err = typeurl.UnmarshalTo(a, q)
			}
			questions <- question{q, err}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case q := <-questions:
			if q.err != nil {
				return last
			}
			last = q.q
			_ = s.Send(pack(r))
		case <-ctx.Done():
			return last
		}
	}
}

// TestMctlPull: mctl pulls, pushes, mounts and unmounts; Debian's ctr, which pulls by the content service, agrees.
func TestMctlPull(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "a/b", 3, 200_000, 100_000)
	n.ref = registry.Addr + "/a/b:latest"
	u := &user{Daemon: harness.Test(t, bin), t: t}

	out, err := u.Mctl("images", "pull", "--plain-http", "--label", "k=v", n.ref).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	has(t, string(out), "Pulling from OCI Registry ("+n.ref+")", "layer-"+n.layers[1].Digest.Encoded()[:12]+": ", n.ref+" "+n.target.Digest.String())
	if strings.Contains(string(out), "\x1b") {
		t.Errorf("what is for a terminal goes elsewhere:\n%s", out)
	}
	n.whole(t, u.Daemon)
	has(t, u.mctl("images", "label", n.ref), "k=v")
	has(t, u.mctl("images", "pull", "-o", "json", "--plain-http", n.ref), `"digest": "`+n.target.Digest.String()+`"`)

	byDigest := registry.Addr + "/a/b@" + n.target.Digest.String()
	equal(t, "pull by digest", u.mctl("images", "pull", "--plain-http", "--all-platforms", byDigest), byDigest+" "+n.target.Digest.String()+"\n")
	equal(t, "push", u.mctl("images", "push", "--plain-http", registry.Addr+"/x:1", n.ref), registry.Addr+"/x:1 "+n.target.Digest.String()+"\n")
	u.ctr("images", "rm", n.ref)
	has(t, u.ctr("images", "pull", "--plain-http", registry.Addr+"/x:1"), "done")
	equal(t, "digest of ctr", row(t, u.ctr("images", "ls"), registry.Addr+"/x:1")[2], n.target.Digest.String())

	dir := t.TempDir()
	equal(t, "mount", u.mctl("images", "mount", registry.Addr+"/x:1", dir), dir+"\n")
	if _, err := os.Stat(filepath.Join(dir, "f1")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); err == nil {
		t.Error("a mounted image can be written to")
	}
	has(t, u.failing(1, u.Mctl("images", "mount", registry.Addr+"/x:1", dir)), "unmount --rm")
	u.mctl("images", "unmount", "--rm", dir)
	u.mctl("images", "mount", "--rw", registry.Addr+"/x:1", dir)
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); err != nil {
		t.Error(err)
	}
	u.mctl("images", "unmount", "--rm", dir)
	var st, parent unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Dir(dir), &parent); err != nil || st.Dev != parent.Dev {
		t.Errorf("it is still mounted (%v)", err)
	}
	equal(t, "leases", u.mctl("leases", "ls", "-q"), "")

	has(t, u.failing(1, u.Mctl("images", "pull", "--plain-http", registry.Addr+"/nosuch:1")), "nosuch", "404")
	for _, bad := range [][]string{{"--platform", "a/b/c/d", n.ref}, {"--platform", "linux/arm64", "--all-platforms", n.ref}, {"UPPER"}, {"--label", "x", n.ref}, {"-H", "x", n.ref}} {
		u.failing(2, u.Mctl(append([]string{"images", "pull"}, bad...)...))
	}
}

// TestMctlPullTerminal: on a terminal progress is drawn, over itself.
func TestMctlPullTerminal(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, registry.URL(), "a", 4, 1000, 1000)
	u := &user{Daemon: harness.Test(t, bin), t: t}
	args := append([]string{"-qec"}, strings.Join(u.Mctl("images", "pull", "--plain-http", registry.Addr+"/a:latest").Args, " "), "/dev/null")
	out, err := exec.Command("script", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	has(t, string(out), "\x1b[J", "Completed pull", "4 of 4 done", n.target.Digest.String())
}

// TestPullBeside: a client that pulls over the content service and one that has the daemon pull, at the same time, fetch
// what is large once between them.
func TestPullBeside(t *testing.T) {
	registry := regproxy.Start(t, regproxy.Options{})
	m := newMeter(t, registry.URL(), 10<<20)
	n := makeNoise(t, registry.URL(), "a", 8, 4<<20, 2<<20)
	n.ref = m.addr + "/a:latest"
	u := &user{Daemon: harness.Test(t, bin), t: t}
	var pulls sync.WaitGroup
	for _, cmd := range []*exec.Cmd{u.Command("images", "pull", "--plain-http", n.ref), u.Mctl("images", "pull", "--plain-http", n.ref)} {
		pulls.Go(func() {
			if out, err := harness.Output(cmd); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	pulls.Wait()
	n.whole(t, u.Daemon)
	for _, l := range n.layers {
		if got := m.of(l.Digest.String()); got > l.Size*3/2 {
			t.Errorf("%d bytes of a layer of %d came", got, l.Size)
		}
	}
}
