package service_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// upgrade replaces the shim's program by itself.
func (f *fixture) upgrade() (pause time.Duration) {
	f.t.Helper()
	pid := f.describe().Pid
	c, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := f.Shim().Upgrade(c, &shim.UpgradeRequest{Binary: binary})
	if err != nil {
		f.t.Fatal(shimapi.FromWire(err))
	}
	if d := f.describe(); d.Pid != pid || r.Version == "" || r.FromVersion == "" {
		f.t.Fatalf("pid %d after %d, %v", d.Pid, pid, r)
	}
	return time.Duration(r.PauseNano)
}

// open lists the descriptors that the shim has.
func (f *fixture) open() string {
	var all []string
	dir := fmt.Sprintf("/proc/%d/fd", f.describe().Pid)
	list, _ := os.ReadDir(dir)
	for _, e := range list {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		all = append(all, e.Name()+" "+to)
	}
	return strings.Join(all, ", ")
}

// TestUpgrade: a shim is replaced many times under everything that a container can have: output that never stops, open
// input, a terminal, calls that wait, a stream of events, and execs that come and go. Nobody notices.
func TestUpgrade(t *testing.T) {
	const times, lines = 20, 4000
	script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); usleep 500; done; read x; exit 42", lines)
	f := serve(t, "upgrade", shimbin.Spec("upgrade", "sh", "-c", script))
	in, out, _ := f.fifos("init")
	f.create(func(r *task.CreateTaskRequest) { r.Stdin, r.Stdout = in, out })
	ticker := read(t, out)
	stdin, err := os.OpenFile(in, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	f.start("")
	before := f.describe()

	cat := newDialogue(f, "cat", false, "sh", "-c", "cat; exit 7")
	tty := newDialogue(f, "tty", true, "sh", "-c", "test -t 1 || exit 1; while read x; do [ $x = end ] && exit 9; echo got $x; done")
	waits := map[string]<-chan uint32{}
	for _, id := range []string{"", "cat", "tty"} {
		got := make(chan uint32, 1)
		waits[id] = got
		go func() {
			w, err := f.Wait(ctx, &task.WaitRequest{ID: "upgrade", ExecID: id})
			if err != nil {
				t.Errorf("wait for %q: %v", id, err)
			}
			got <- w.GetExitStatus()
		}()
	}
	events, err := f.Shim().Events(ctx, &shim.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan []uint64, 1)
	go func() {
		var all []uint64
		for e, err := events.Recv(); err == nil; e, err = events.Recv() {
			all = append(all, e.Seq)
			if e.Topic == "/tasks/exit" && e.Event != nil && strings.Contains(string(e.Event.Value), "upgrade\x12\x07upgrade") {
				break
			}
		}
		seen <- all
	}()

	stop, idle := make(chan struct{}), sync.WaitGroup{}
	for n := range 2 {
		idle.Add(1)
		go func() {
			defer idle.Done()
			for i := 0; ; i++ {
				select {
				case <-stop:
					t.Logf("%d execs beside the upgrades", i)
					return
				default:
				}
				want := uint32(10*n + i%10)
				if got := f.runExec(fmt.Sprintf("e%d-%d", n, i), nil, "sh", "-c", fmt.Sprintf("exit %d", want)); got != want {
					t.Errorf("exec: status %d, want %d", got, want)
				}
			}
		}()
	}
	var pauses []time.Duration
	for i := range times {
		pauses = append(pauses, f.upgrade())
		cat.say(fmt.Sprintf("word%d", i), fmt.Sprintf("word%d", i))
		tty.say(fmt.Sprintf("word%d", i), fmt.Sprintf("got word%d", i))
	}
	close(stop)
	idle.Wait()
	slices.Sort(pauses)
	t.Logf("pause p50 %s, max %s", pauses[len(pauses)/2], pauses[len(pauses)-1])

	if after := f.describe(); after.Incarnation != before.Incarnation || !after.StartedAt.AsTime().Equal(before.StartedAt.AsTime()) {
		t.Errorf("before %v, after %v", before, after)
	} else if took := after.Timings["create"]; took == 0 || took != before.Timings["create"] || after.Upgrades != before.Upgrades+times {
		t.Errorf("timings and counters before %v, after %v", before, after)
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", before.Pid)); err != nil || string(name) != filepath.Base(binary)+"\n" {
		t.Errorf("it is called %q, %v", name, err)
	}
	_, _ = tty.in.WriteString("end\n")
	if s := <-waits["tty"]; s != 9 {
		t.Errorf("terminal: status %d", s)
	}
	if _, err := f.CloseIO(ctx, &task.CloseIORequest{ID: "upgrade", ExecID: "cat", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if s := <-waits["cat"]; s != 7 {
		t.Errorf("cat: status %d", s)
	}
	f.upgrade() // with what has ended
	f.remove("cat")
	f.remove("tty")
	_, _ = stdin.WriteString("end\n")
	if s := <-waits[""]; s != 42 {
		t.Errorf("init: status %d", s)
	}
	f.upgrade() // with a container that has ended
	if s := f.wait("").ExitStatus; s != 42 {
		t.Errorf("init, asked again: status %d", s)
	}
	f.remove("")
	var want strings.Builder
	for i := range lines {
		_, _ = fmt.Fprintf(&want, "line %d\n", i)
	}
	if got := <-ticker; got != want.String() {
		t.Errorf("%d bytes of output, want %d: not every line once", len(got), want.Len())
	}
	all := <-seen
	if !slices.IsSorted(all) || len(slices.Compact(slices.Clone(all))) != len(all) || len(all) == 0 {
		t.Errorf("events out of order or doubled: %v", all)
	}
}

// dialogue is an exec with open input, which answers.
type dialogue struct {
	t   testing.TB
	in  *os.File
	out *bufio.Reader
}

func newDialogue(f *fixture, id string, terminal bool, args ...string) *dialogue {
	f.t.Helper()
	in, out, _ := f.fifos(id)
	if err := f.exec(id, func(r *task.ExecProcessRequest) { r.Stdin, r.Stdout, r.Terminal = in, out, terminal }, args...); err != nil {
		f.t.Fatal(err)
	}
	d := &dialogue{t: f.t}
	reader, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	d.out = bufio.NewReader(reader)
	if d.in, err = os.OpenFile(in, os.O_RDWR, 0); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _, _ = d.in.Close(), reader.Close() })
	f.start(id)
	return d
}

// say writes a line and waits for the line that answers it.
func (d *dialogue) say(line, answer string) {
	d.t.Helper()
	if _, err := d.in.WriteString(line + "\n"); err != nil {
		d.t.Fatal(err)
	}
	for {
		got, err := d.out.ReadString('\n')
		if err != nil {
			d.t.Fatal(err)
		}
		if strings.TrimRight(got, "\r\n") == answer {
			return
		}
	}
}

// TestUpgradeRefused: what is no shim that could take over is found out before anything is stopped.
func TestUpgradeRefused(t *testing.T) {
	f := serve(t, "refused", shimbin.Spec("refused", "sleep", "1000"))
	try := func(path, says string) {
		t.Helper()
		_, err := f.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: path})
		if err = shimapi.FromWire(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
	try(binary, "keeps nothing")
	f.create(nil)
	f.start("")
	garbage := filepath.Join(filepath.Dir(f.dir), "garbage")
	if err := os.WriteFile(garbage, []byte("\x7fELF and then nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		"/bin/true": "take over", "/bin/false": "exit status 1", "shim-runc": "absolute", "/no/such": "no such file", "/tmp": "regular file",
		garbage: "exec format", filepath.Join(f.dir, shimapi.ConfigFile): "permission denied",
	} {
		try(path, says)
	}
	if s := f.runExec("e", nil, "sh", "-c", "exit 3"); s != 3 {
		t.Errorf("exec: status %d", s)
	}
	if _, err := f.Shim().Upgrade(ctx, &shim.UpgradeRequest{Handed: true}); !errdefs.IsFailedPrecondition(shimapi.FromWire(err)) {
		t.Errorf("outcome of an upgrade that never was: %v", err)
	}
	f.upgrade()
}

// TestUpgradeBack: a program that passes the check, and then fails, gives the process back.
func TestUpgradeBack(t *testing.T) {
	bad, err := shimbin.BuildBroken(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := running(t, "back", nil)
	tty := newDialogue(f, "tty", true, "sh", "-c", "while read x; do echo got $x; done")
	if err := f.exec("e", nil, "sh", "-c", "usleep 300000; exit 5"); err != nil {
		t.Fatal(err)
	}
	f.start("e")
	status := make(chan uint32, 1)
	go func() {
		w, err := f.Wait(ctx, &task.WaitRequest{ID: "back", ExecID: "e"})
		if err != nil {
			t.Error(err)
		}
		status <- w.GetExitStatus()
	}()
	before := f.describe()
	for range 5 {
		_, err := f.Shim().Upgrade(ctx, &shim.UpgradeRequest{Binary: bad})
		if err = shimapi.FromWire(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "broken on purpose") {
			t.Fatalf("upgrade: %v", err)
		}
		tty.say("hello", "got hello")
	}
	if got := <-status; got != 5 {
		t.Errorf("status %d", got)
	}
	if d := f.describe(); d.Pid != before.Pid || d.Version != before.Version {
		t.Errorf("before %v, after %v", before, d)
	}
	f.upgrade()
	tty.say("hello", "got hello")
}

// TestUpgradeExits: exits that happen while the program is being replaced.
func TestUpgradeExits(t *testing.T) {
	f := running(t, "exits", nil)
	for i := range 15 {
		id := fmt.Sprint("e", i)
		if err := f.exec(id, nil, "sh", "-c", fmt.Sprintf("usleep %d; exit %d", 2000*i, i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 15 {
		f.start(fmt.Sprint("e", i))
	}
	for range 5 {
		f.upgrade()
	}
	for i := range 15 {
		if s := f.wait(fmt.Sprint("e", i)).ExitStatus; s != uint32(i) {
			t.Errorf("status %d, want %d", s, i)
		}
	}
	// Nothing is left open of what was handed over. The number takes a moment to settle: the new program opens the FIFOs of
	// execs that have ended, and comes to their ends, and it reads the counter of OOM kills.
	fds := f.describe().Fds
	for range 5 {
		f.upgrade()
	}
	for deadline := time.Now().Add(10 * time.Second); f.describe().Fds > fds; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors after %d: %s", f.describe().Fds, fds, f.open())
		}
	}
}

// TestUpgradeStalled: a client that reads nothing keeps nobody from an upgrade, and gets each byte afterwards.
func TestUpgradeStalled(t *testing.T) {
	f := running(t, "still", nil)
	for _, terminal := range []bool{false, true} {
		id := fmt.Sprint("e", terminal)
		_, out, _ := f.fifos(id)
		client, err := os.OpenFile(out, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.exec(id, func(r *task.ExecProcessRequest) { r.Stdout, r.Terminal = out, terminal }, "seq", "500000"); err != nil {
			t.Fatal(err)
		}
		f.start(id)
		for range 3 {
			f.upgrade()
		}
		data, err := io.ReadAll(client)
		_ = client.Close()
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(data), "\r", "")
		if want := 3388895; len(text) != want || !strings.HasSuffix(text, "499999\n500000\n") {
			t.Errorf("terminal %v: %d bytes, want %d", terminal, len(text), want)
		}
		f.wait(id)
		f.remove(id)
	}
}
