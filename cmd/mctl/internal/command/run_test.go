package command_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/managerd/managerd/test/harness"
)

// TestExitStatus: what the process exits with, mctl exits with.
func TestExitStatus(t *testing.T) {
	w := newWorld(t)
	for _, status := range []int{0, 1, 2, 7, 127, 255} {
		w.exits(status, "run", "--rm", "busybox", "x", "sh", "-c", "exit "+strconv.Itoa(status))
	}
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	w.exits(5, "tasks", "exec", "one", "sh", "-c", "exit 5")
	w.exits(0, "t", "exec", "one", "true")
	w.ok("tasks", "exec", "-d", "--exec-id", "e1", "one", "sh", "-c", "sleep 0.2; exit 6")
	w.exits(6, "tasks", "wait", "--exec-id", "e1", "one")
	w.ok("tasks", "rm", "--exec-id", "e1", "one")
	w.fails(1, []string{"one", "tasks stop one", "--force"}, "tasks", "rm", "one")
	w.fails(1, []string{"one", "running", "tasks rm -f one"}, "containers", "rm", "one")
	w.ok("tasks", "kill", "-s", "9", "one")
	w.exits(137, "tasks", "wait", "one")
	w.exits(137, "tasks", "wait", "one") // and once more
	w.ok("tasks", "rm", "one")
	w.ok("containers", "rm", "one")
	w.ok("containers", "create", "busybox", "two", "sh", "-c", "echo hello; exit 4")
	for range 2 {
		if out := w.exits(4, "tasks", "start", "two"); out != "hello\n" {
			t.Errorf("start prints %q", out)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(w.Dir, "fifo", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for _, c := range []string{"tasks", "containers"} {
		if out := w.ok(c, "ls", "-q"); c == "tasks" && out != "" || c == "containers" && out != "two\n" {
			t.Errorf("%s left: %s", c, out)
		}
	}
}

// TestStreams: not one byte is lost or mixed up, in any direction.
func TestStreams(t *testing.T) {
	w := newWorld(t)
	out, errs, status := w.mctl("run", "--rm", "busybox", "x", "sh", "-c", "echo out; echo err >&2")
	if out != "out\n" || errs != "err\n" || status != 0 {
		t.Errorf("%d, %q, %q", status, out, errs)
	}
	data := make([]byte, 5<<20)
	_, _ = rand.Read(data)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	for _, args := range [][]string{{"run", "--rm", "busybox", "x", "cat"}, {"tasks", "exec", "one", "cat"}} {
		cmd := w.Mctl(args...)
		cmd.Stdin = bytes.NewReader(data)
		var got bytes.Buffer
		cmd.Stdout = &got
		if err := cmd.Run(); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		if sha256.Sum256(got.Bytes()) != sha256.Sum256(data) {
			t.Errorf("%q: %d bytes came back of %d, or others", args, got.Len(), len(data))
		}
	}
	// A process that ends long before anybody has read what it wrote.
	cmd := w.Mctl("run", "--rm", "busybox", "x", "sh", "-c", "seq 1 300000")
	r, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 100)
	if _, err := io.ReadFull(r, first); err != nil {
		t.Fatal(err)
	}
	w.status("x")               // takes a while, in which nobody reads
	time.Sleep(3 * time.Second) // longer than a shim waits for a client
	rest, err := io.ReadAll(r)
	if err != nil || !bytes.HasSuffix(rest, []byte("\n300000\n")) || len(first)+len(rest) != 1988895 {
		t.Errorf("%d bytes, %v", len(first)+len(rest), err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	// A descendant that holds the output holds nobody up.
	if out := w.ok("tasks", "exec", "one", "sh", "-c", "sleep 1000 & echo done"); out != "done\n" {
		t.Errorf("%q", out)
	}
	// Who does not read does not end the process.
	if err := w.Mctl("run", "--rm", "busybox", "x", "sh", "-c", "seq 1 100000; exit 3").Run(); harness.Status(err) != 3 {
		t.Errorf("%v", err)
	}
	log := filepath.Join(t.TempDir(), "log")
	w.exits(2, "run", "--rm", "--log-uri", "file://"+log, "busybox", "x", "sh", "-c", "echo logged; exit 2")
	if got, _ := os.ReadFile(log); string(got) != "logged\n" {
		t.Errorf("log holds %q", got)
	}
	if out := w.ok("run", "--rm", "--null-io", "busybox", "x", "echo", "lost"); out != "" {
		t.Errorf("%q", out)
	}
}

// TestAttach: a process that was left can be come back to.
func TestAttach(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "-i", "busybox", "one", "sh", "-c", "echo ready; while read l; do echo got $l; done; exit 3")
	if out, _, status := w.run(w.Mctl("tasks", "attach", "one"), "a\nb\n"); out != "ready\ngot a\ngot b\n" || status != 3 {
		t.Errorf("%d, %q", status, out)
	}
	w.ok("run", "-d", "busybox", "two", "sleep", "1000")
	w.fails(1, []string{"two", "--interactive"}, "tasks", "attach", "two")
	// One at a time.
	w.ok("run", "-d", "-i", "busybox", "three", "sh", "-c", "trap 'exit 9' TERM; while :; do echo tick; sleep 0.05; done")
	b := w.begin("tasks", "attach", "--sig-proxy=false", "three")
	b.says(t, "tick")
	w.fails(1, []string{"three", "another mctl"}, "tasks", "attach", "three")
	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if status := b.end(t); status != 143 {
		t.Errorf("a client that was told to go exits with %d", status)
	}
	w.running("three")
	b = w.begin("tasks", "attach", "three")
	b.says(t, "tick")
	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if status := b.end(t); status != 9 {
		t.Errorf("a signal was not passed on: %d, %s", status, &b.errs)
	}
	if left, _ := filepath.Glob(filepath.Join(w.Dir, "fifo", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestFlags: what the flags of run say is what the container has.
func TestFlags(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	envFile := filepath.Join(dir, "env")
	if err := os.WriteFile(envFile, []byte("# comment\nA=1\nB=x y\n\nFROM_HERE\nNOT_SET_HERE\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FROM_HERE", "here")
	for _, c := range []struct {
		flags  []string
		script string
		want   string
	}{
		{[]string{"--env", "C=3", "--env-file", envFile, "-e", "A=2"}, `echo $A $B $C $FROM_HERE ${NOT_SET_HERE-unset}`, "2 x y 3 here unset"},
		{[]string{"--cwd", "/tmp"}, "pwd", "/tmp"},
		{[]string{"--user", "user"}, "id", "uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)"},
		{[]string{"-u", "1000:2000"}, "id -u; id -g", "1000\n2000"},
		{[]string{"--hostname", "box"}, "hostname", "box"},
		{[]string{"--mount", "type=bind,src=" + dir + ",dst=/host,options=rbind:ro"}, "ls /host; touch /host/x 2>/dev/null || echo ro", "env\nro"},
		{[]string{"--read-only"}, "touch /x 2>/dev/null || echo ro", "ro"},
		{[]string{"--cap-drop", "ALL", "--cap-add", "CHOWN"}, "grep CapEff /proc/self/status", "CapEff:\t0000000000000001"},
		{[]string{"--seccomp"}, "grep Seccomp: /proc/self/status", "Seccomp:\t2"},
		{[]string{"--rlimit", "nofile=77:99"}, "ulimit -n; ulimit -Hn", "77\n99"},
		{[]string{"--allow-new-privs"}, "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t0"},
		{[]string{"--net-host"}, "readlink /proc/self/ns/net", link(t, "/proc/self/ns/net")},
		{[]string{"--with-ns", "ipc:/proc/self/ns/ipc"}, "readlink /proc/self/ns/ipc", link(t, "/proc/self/ns/ipc")},
		{[]string{"--privileged"}, "test -w /sys && echo writable", "writable"},
		{[]string{"--label", "a=b", "--annotation", "c=d", "--runtime", filepath.Join(bin, "shim-runc")}, "echo runs", "runs"},
	} {
		args := append(append([]string{"run", "--rm"}, c.flags...), "busybox", "x", "sh", "-c", c.script)
		if out := strings.TrimSpace(w.ok(args...)); out != c.want {
			t.Errorf("%q: %q, want %q", c.flags, out, c.want)
		}
	}
	pidFile := filepath.Join(dir, "pid")
	w.ok("run", "-d", "--memory-limit", "64MiB", "--cpus", "0.5", "--cpu-shares", "512", "--pids-limit", "50", "--label", "a=b",
		"--pid-file", pidFile, "--device", "/dev/null", "busybox", "one", "sleep", "1000")
	var s specs.Spec
	if err := json.Unmarshal([]byte(w.ok("containers", "info", "--spec", "one")), &s); err != nil {
		t.Fatal(err)
	}
	r := s.Linux.Resources
	if *r.Memory.Limit != 64<<20 || *r.CPU.Quota != 50000 || *r.CPU.Shares != 512 || *r.Pids.Limit != 50 {
		t.Errorf("resources are %+v", r)
	}
	if out := w.ok("tasks", "metrics", "one"); !strings.Contains(out, "67108864") {
		t.Errorf("the limit is not in force: %s", out)
	}
	pid, _ := os.ReadFile(pidFile)
	if out := w.ok("tasks", "ls"); !strings.Contains(out, string(pid)) || len(pid) == 0 {
		t.Errorf("pid file says %q, %s", pid, out)
	}
	if out := w.ok("containers", "label", "one", "c=d"); out != "a=b,c=d\n" {
		t.Errorf("labels are %q", out)
	}
	if out := w.ok("containers", "ls", "-q", "labels.a==b"); out != "one\n" {
		t.Errorf("filter finds %q", out)
	}
	if out := w.ok("tasks", "exec", "--user", "user", "--cwd", "/tmp", "--env", "A=7", "one", "sh", "-c", "id -un; pwd; echo $A"); out != "user\n/tmp\n7\n" {
		t.Errorf("exec says %q", out)
	}
	w.ok("tasks", "pause", "one")
	if got := w.status("one"); got != "PAUSED" {
		t.Errorf("paused task is %s", got)
	}
	w.ok("tasks", "resume", "one")

	// A directory, and a spec of one's own.
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/bin/busybox")
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "bin", "busybox"), data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.exits(8, "run", "--rm", "--rootfs", root, "x", "/bin/busybox", "sh", "-c", "exit 8")
	w.ok("containers", "create", "--rootfs", root, "two", "/bin/busybox", "sh", "-c", "exit 9")
	config := filepath.Join(dir, "config.json")
	if err := os.WriteFile(config, []byte(w.ok("containers", "info", "--spec", "two")), 0o644); err != nil {
		t.Fatal(err)
	}
	w.exits(9, "run", "--rm", "--config", config, "three")
}

func link(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSignals: they reach the process, and what is half made when one comes is taken away.
func TestSignals(t *testing.T) {
	w := newWorld(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		b := w.begin("run", "--rm", "busybox", "x", "sh", "-c",
			fmt.Sprintf("trap 'exit %d' %d; echo ready; while :; do sleep 0.02; done", 40+int(sig), int(sig)))
		b.says(t, "ready")
		if err := b.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if status := b.end(t); status != 40+int(sig) {
			t.Errorf("%v: exits with %d: %s", sig, status, &b.errs)
		}
	}
	// TERM, grace, KILL.
	w.ok("run", "-d", "busybox", "gentle", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.02; done")
	w.ok("run", "-d", "busybox", "stubborn", "sh", "-c", "trap '' TERM; while :; do sleep 0.02; done")
	begin := time.Now()
	w.ok("tasks", "stop", "--grace", "1s", "gentle", "stubborn")
	if took := time.Since(begin); took < time.Second || took > 8*time.Second {
		t.Errorf("stop took %v", took)
	}
	w.exits(3, "tasks", "wait", "gentle")
	w.exits(137, "tasks", "wait", "stubborn")
	w.ok("tasks", "stop", "gentle") // has ended: nothing to do
	w.ok("tasks", "rm", "gentle", "stubborn")
}

// TestDaemonKilled: whoever waits in the foreground goes on when the daemon is killed, and gets every line and the
// status.
func TestDaemonKilled(t *testing.T) {
	w := newWorld(t)
	const script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; exit 42"
	w.ok("run", "-d", "busybox", "base", "sleep", "1000")
	w.ok("run", "-d", "busybox", "two", "sh", "-c", script)
	run := w.begin("run", "--rm", "busybox", "one", "sh", "-c", script)
	exec := w.begin("tasks", "exec", "base", "sh", "-c", script)
	wait := w.begin("tasks", "wait", "two")
	w.running("one")
	for range 2 {
		if err := w.Kill(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond) // some lines are written while there is no daemon
		if err := w.Start(); err != nil {
			t.Fatal(err)
		}
		w.ok("tasks", "ls")
	}
	// Once more, so that all of them end meanwhile.
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	want := ""
	for i := 1; i <= 100; i++ {
		want += fmt.Sprintf("line %d\n", i)
	}
	for _, b := range []*background{run, exec, wait} {
		if status := b.end(t); status != 42 {
			t.Errorf("%q: status %d: %s", b.Args, status, &b.errs)
		}
		if b != wait && b.out.String() != want {
			t.Errorf("%q: lines are missing:\n%s", b.Args, &b.out)
		}
		if b.errs.String() != "" {
			t.Errorf("%q: noise: %s", b.Args, &b.errs)
		}
	}
	if out := w.ok("containers", "ls", "-q"); out != "base\ntwo\n" {
		t.Errorf("containers left: %s", out)
	}
	// Graceful, too.
	wait = w.begin("run", "--rm", "busybox", "one", "sh", "-c", "sleep 1; exit 43")
	w.running("one")
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	if status := wait.end(t); status != 43 {
		t.Errorf("status %d: %s", status, &wait.errs)
	}
}

// TestNoDaemon: what is said names the socket, and what to do.
func TestNoDaemon(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	w.fails(1, []string{w.Socket(), "managerd --address"}, "tasks", "ls")
	w.fails(1, []string{w.Socket(), "managerd --address"}, "tasks", "exec", "one", "true")
	w.fails(1, []string{w.Socket(), "managerd --address"}, "--connect-timeout", "100ms", "version", "-o", "json")
	if err := w.Spawn(); err != nil {
		t.Fatal(err)
	}
	w.ok("--connect-timeout", "30s", "tasks", "ls") // waits for it
	if err := w.Ready(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	nowhere := filepath.Join(w.Dir, "nowhere.sock")
	w.fails(1, []string{"no socket " + nowhere, "managerd --address"}, "-a", nowhere, "tasks", "ls")
	w.fails(1, []string{w.Dir, "no socket"}, "-a", w.Dir, "tasks", "ls")
	// One that does not answer.
	mute := filepath.Join(w.Dir, "mute.sock")
	l, err := net.Listen("unix", mute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	w.fails(1, []string{"--timeout 200ms"}, "-a", mute, "--timeout", "200ms", "tasks", "ls")
	w.fails(1, []string{"--timeout 200ms", "one"}, "--timeout", "200ms", "tasks", "wait", "one")
}

// TestBadInput: a sentence, the right status, and nothing half made.
func TestBadInput(t *testing.T) {
	w := newWorld(t)
	w.ok("run", "-d", "busybox", "one", "sleep", "1000")
	for _, c := range []struct {
		status int
		words  []string
		args   []string
	}{
		{2, []string{"bogus", "mctl --help"}, []string{"bogus"}},
		{2, []string{"tasks bogus"}, []string{"tasks", "bogus"}},
		{2, []string{"--bogus"}, []string{"run", "--bogus", "busybox", "x"}},
		{2, []string{"IMAGE and ID"}, []string{"run", "busybox"}},
		{2, []string{"exclude"}, []string{"run", "--rm", "-d", "busybox", "x"}},
		{2, []string{"a/b"}, []string{"run", "busybox", "a/b"}},
		{2, []string{"yaml"}, []string{"-o", "yaml", "tasks", "ls"}},
		{2, []string{"a/b"}, []string{"-n", "a/b", "tasks", "ls"}},
		{2, []string{"--mount", "bogus"}, []string{"run", "--mount", "bogus", "busybox", "x"}},
		{2, []string{"--memory-limit", "lots"}, []string{"run", "--memory-limit", "lots", "busybox", "x"}},
		{2, []string{"--rlimit"}, []string{"run", "--rlimit", "x=1", "busybox", "x"}},
		{2, []string{"--label"}, []string{"run", "--label", "x", "busybox", "x"}},
		{2, []string{"--detach-keys"}, []string{"run", "--detach-keys", "ctrl-!", "busybox", "x"}},
		{2, []string{"--tty", "terminal"}, []string{"run", "-t", "busybox", "x"}},
		{2, []string{"NOPE"}, []string{"tasks", "kill", "-s", "NOPE", "one"}},
		{2, []string{"65"}, []string{"tasks", "kill", "-s", "65", "one"}},
		{2, []string{"too many", "two"}, []string{"tasks", "wait", "one", "two"}},
		{1, []string{"nope", "not found", "images ls"}, []string{"run", "nope", "x"}},
		{1, []string{"one", "already exists", "containers rm one"}, []string{"run", "--rm", "busybox", "one"}},
		{1, []string{"one", "already exists", "tasks rm one"}, []string{"tasks", "start", "-d", "one"}},
		{1, []string{"nope"}, []string{"run", "--rm", "busybox", "x", "nope"}},
		{1, []string{"nobody", "not found"}, []string{"run", "--rm", "--user", "nobody-here", "busybox", "x"}},
		{1, []string{"FLY"}, []string{"run", "--cap-add", "FLY", "busybox", "x"}},
		{1, []string{"/dev/nope"}, []string{"run", "--device", "/dev/nope", "busybox", "x"}},
		{1, []string{"nope.env"}, []string{"run", "--env-file", "nope.env", "busybox", "x"}},
		{1, []string{"/nope"}, []string{"run", "--rootfs", "/nope", "x"}},
		{1, []string{"/nope"}, []string{"run", "--seccomp=/nope", "busybox", "x"}},
		{1, []string{"nope", "overlayfs"}, []string{"run", "--snapshotter", "nope", "busybox", "x"}},
		{1, []string{"io.containerd.nope.v1"}, []string{"run", "--runtime", "io.containerd.nope.v1", "busybox", "x"}},
		{1, []string{"nope", "not found", "containers ls"}, []string{"tasks", "exec", "nope", "true"}},
		{1, []string{"nope"}, []string{"tasks", "exec", "one", "nope"}},
		{1, []string{"nope", "not found", "tasks ls"}, []string{"tasks", "wait", "nope"}},
		{1, []string{"nope", "not found"}, []string{"tasks", "stop", "nope"}},
		{1, []string{"nope", "not found"}, []string{"tasks", "kill", "nope"}},
		{1, []string{"nope", "not found"}, []string{"tasks", "metrics", "nope"}},
		{1, []string{"one", "tasks ls"}, []string{"tasks", "resume", "one"}},
		{1, []string{"filter"}, []string{"containers", "ls", "=="}},
	} {
		w.fails(c.status, c.words, c.args...)
	}
	if out := w.ok("containers", "ls", "-q"); out != "one\n" {
		t.Errorf("containers left: %s", out)
	}
	if out := w.ok("snapshots", "ls"); strings.Contains(out, "\nx ") {
		t.Errorf("snapshots left: %s", out)
	}
	if out := w.ok("leases", "ls", "-q"); out != "" {
		t.Errorf("leases left: %s", out)
	}
	if left, _ := filepath.Glob(filepath.Join(w.Dir, "fifo", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
