package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/managerd/managerd/test/harness"
)

// configured gives a daemon with a configuration that has not been started. DIR in it is the daemon's directory.
func configured(t *testing.T, config string) *user {
	t.Helper()
	d, err := harness.New(bin)
	if err != nil {
		t.Fatal(err)
	}
	u := &user{Daemon: d, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(d.Log())
			t.Logf("the end of the daemon's log:\n%s", log[max(0, len(log)-8000):])
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	u.configure(config)
	return u
}

// configure has the daemon read this when it is started next.
func (u *user) configure(config string) {
	u.t.Helper()
	file := filepath.Join(u.Dir, "config.toml")
	if err := os.WriteFile(file, []byte("version = 3\n"+strings.ReplaceAll(config, "DIR", u.Dir)), 0o600); err != nil {
		u.t.Fatal(err)
	}
	u.Args = []string{"--config", file}
}

// restart ends the daemon, and starts it again.
func (u *user) restart(end func() error) {
	u.t.Helper()
	if err := end(); err != nil {
		u.t.Fatal(err)
	}
	u.start()
}

// pluginBinary builds test/plugin, once.
var pluginBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(filepath.Dir(archive), "plugin")
	out, err := exec.Command("go", "build", "-o", path, "github.com/managerd/managerd/test/plugin").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cannot build test/plugin: %w\n%s", err, out)
	}
	return path, nil
})

// plugin is a process of test/plugin.
type plugin struct {
	t    *testing.T
	dir  string // of what it stores
	args []string
	cmd  *exec.Cmd
}

// newPlugin starts one that listens on DIR/plugin.sock of the daemon, whose content it applies layers of.
func newPlugin(u *user) *plugin {
	u.t.Helper()
	path, err := pluginBinary()
	if err != nil {
		u.t.Fatal(err)
	}
	dir := u.t.TempDir()
	p := &plugin{t: u.t, dir: dir, args: []string{path, "-dir", dir, "-socket", filepath.Join(u.Dir, "plugin.sock"), "-daemon", u.Socket()}}
	u.t.Cleanup(p.kill)
	p.start()
	return p
}

func (p *plugin) socket() string { return p.args[4] }

// start starts it, and waits until it listens.
func (p *plugin) start() {
	p.t.Helper()
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = os.Stderr, os.Stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	await(p.t, "a plugin that listens", func() bool {
		c, err := net.Dial("unix", p.socket())
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// kill ends it as kill -9 does.
func (p *plugin) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // it was killed
	p.cmd = nil
}

// hang stops it until the function that is returned is called.
func (p *plugin) hang() (wake func()) {
	p.t.Helper()
	signal := func(s syscall.Signal) {
		if err := p.cmd.Process.Signal(s); err != nil {
			p.t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	return func() { signal(syscall.SIGCONT) }
}

// blobs counts the blobs that it stores.
func (p *plugin) blobs() int {
	all, _ := filepath.Glob(filepath.Join(p.dir, "io.containerd.content.v1.content", "blobs", "*", "*")) // the pattern is right
	return len(all)
}

// applied gives the layers that its differ applied and made, each with the verb before it.
func (p *plugin) applied() []string {
	data, _ := os.ReadFile(filepath.Join(p.dir, "applied"))
	return strings.Fields(strings.ReplaceAll(string(data), " ", "="))
}

// quickly fails the test when fn, which is to wait for nobody, takes longer than a busy machine can explain.
func quickly(t *testing.T, what string, fn func()) {
	t.Helper()
	began := time.Now()
	fn()
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("%s took %s", what, took)
	}
}
