package service_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/cmd/shim-runc/internal/logger/loggertest"
	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	shim "github.com/managerd/managerd/protos/shim/v1"
)

// floodEnv names how many MiB a container prints in TestFlood: 1024 for the whole show.
const floodEnv = "MANAGERD_FLOOD_MIB"

// pad makes a line of TestFlood long: its number, and this.
var pad = strings.Repeat("-", 1000)

// flood is a container that prints much, and how much of it has been seen.
type flood struct {
	*fixture
	dir   string
	lines int // that it prints
	begin time.Time

	next, seen, lost int64 // line, bytes
	rest             []byte
}

func newFlood(t *testing.T, id string) *flood {
	t.Helper()
	mib := 32
	if v := os.Getenv(floodEnv); v != "" {
		var err error
		if mib, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	n := mib << 20 / (len(pad) + 8)
	f := &flood{fixture: serve(t, id, shimbin.Spec(id, "sh", "-c", fmt.Sprintf("exec seq -s '%s\n' 1 %d", pad, n))), lines: n, next: 1}
	f.dir = filepath.Dir(f.fixture.dir)
	return f
}

// print has it begin.
func (f *flood) print(stdout, stderr string) {
	f.t.Helper()
	f.create(func(r *task.CreateTaskRequest) { r.Stdout, r.Stderr = stdout, stderr })
	f.begin = time.Now()
	f.start("")
}

func (f *flood) line(i int64) string {
	if i == int64(f.lines) { // seq ends the last one itself
		return fmt.Sprintf("%d\n", i)
	}
	return strconv.FormatInt(i, 10) + pad + "\n"
}

// size is how many bytes it prints.
func (f *flood) size() (n int64) {
	for i, digits := int64(1), 1; i <= int64(f.lines); i, digits = i*10, digits+1 {
		n += (min(i*10, int64(f.lines)+1) - i) * int64(digits+len(pad)+1)
	}
	return n - int64(len(pad))
}

// take looks at what has come: every line must be the one that follows.
func (f *flood) take(b []byte) {
	f.t.Helper()
	f.seen += int64(len(b))
	f.rest = append(f.rest, b...)
	for {
		i := bytes.IndexByte(f.rest, '\n')
		if i < 0 {
			return
		}
		if got := string(f.rest[:i+1]); got != f.line(f.next) {
			f.t.Fatalf("after line %d comes %.40q", f.next-1, got)
		}
		f.next++
		f.rest = append(f.rest[:0], f.rest[i+1:]...)
	}
}

var lossNote = regexp.MustCompile(`^\[managerd: (\d+) bytes of output \(\d+ entries\) were lost here: no space left on device\]\n$`)

// takeLossy is take where lines may be missing, of which notes tell.
func (f *flood) takeLossy(line string) {
	f.t.Helper()
	if m := lossNote.FindStringSubmatch(line); m != nil {
		n, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			f.t.Fatal(err)
		}
		f.lost += n
		return
	}
	f.seen += int64(len(line))
}

// killable proves that a process beside it is started, killed, waited for and deleted.
func (f *flood) killable() {
	f.t.Helper()
	begin := time.Now()
	err := f.exec("victim", nil, "sleep", "1000")
	if err == nil {
		if _, err = f.Start(ctx, &task.StartRequest{ID: f.id, ExecID: "victim"}); err != nil {
			f.remove("victim")
		}
	}
	if err != nil { // unless the container, which nothing holds up where output is dropped, has ended meanwhile
		until(f.t, "why no process can be started: "+err.Error(), f.ended)
		return
	}
	f.kill("victim", unix.SIGKILL)
	if s := f.wait("victim").ExitStatus; s != 137 {
		f.t.Errorf("status %d", s)
	}
	f.remove("victim")
	if took := time.Since(begin); took > 30*time.Second {
		f.t.Errorf("a kill took %v", took)
	}
}

// stuck waits until output waits for why.
func (f *flood) stuck(why string) {
	f.t.Helper()
	until(f.t, "output waits: "+why, func() bool { return f.output("", "stdout").Waiting == why })
}

func (f *flood) finish() {
	f.t.Helper()
	if s := f.wait("").ExitStatus; s != 0 {
		f.t.Errorf("status %d", s)
	}
	took := time.Since(f.begin).Seconds()
	if f.seen+f.lost != f.size() {
		f.t.Errorf("%d bytes came and %d were lost, %d were printed", f.seen, f.lost, f.size())
	}
	f.t.Logf("%d MiB in %.1f s, %.0f MiB/s; %d bytes lost", f.size()>>20, took, float64(f.size()>>20)/took, f.lost)
}

// ended says that the container has ended and everything has been written.
func (f *flood) ended() bool { return f.state("").Status.String() == "STOPPED" }

// smallDisk mounts one that is full after a quarter of what is printed.
func (f *flood) smallDisk() string {
	f.t.Helper()
	small := filepath.Join(f.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		f.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, fmt.Sprintf("size=%d", f.size()/4)); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	return small
}

// away moves a log away, as logrotate does, has it begun anew, and gives the old one's entries to fn.
func (f *flood) away(path string, fn func(line string)) {
	f.t.Helper()
	old := path + ".away"
	if err := os.Rename(path, old); err != nil {
		f.t.Fatal(err)
	}
	if r, err := f.Shim().ReopenLogs(ctx, &shim.ReopenLogsRequest{}); err != nil || len(r.Paths) != 1 || r.Paths[0] != path {
		f.t.Fatalf("%v, %v", r, err)
	}
	file, err := os.Open(old)
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for d := json.NewDecoder(file); ; {
		var e struct{ Log string }
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			f.t.Fatal(err)
		}
		fn(e.Log)
	}
	if err := os.Remove(old); err != nil {
		f.t.Fatal(err)
	}
}

// TestFlood: a container prints much into sinks that are full, stall, and go away, again and again. Nothing is lost where it
// is to wait, and every byte that is dropped is told of where it is not; it always goes on; and processes can be killed all
// the while.
func TestFlood(t *testing.T) {
	t.Run("full disk, block", func(t *testing.T) {
		f := newFlood(t, "floodblock")
		small := f.smallDisk()
		path := filepath.Join(small, "log")
		f.print("json-file://"+path, "json-file://"+path)
		full := func() bool { // what is told may be of a moment ago
			var st unix.Statfs_t
			return f.output("", "stdout").Waiting == "no space left on device" && unix.Statfs(small, &st) == nil && st.Bavail*uint64(st.Bsize) < 1<<20
		}
		for f.seen < f.size() {
			until(t, "the disk is full, or all is written", func() bool { return full() || f.ended() })
			if !f.ended() {
				f.killable()
			}
			f.away(path, func(line string) { f.take([]byte(line)) })
		}
		f.finish()
	})
	t.Run("full disk, drop", func(t *testing.T) {
		f := newFlood(t, "flooddrop")
		path := filepath.Join(f.smallDisk(), "log")
		f.print("json-file://"+path+"?full=drop", "json-file://"+path+"?full=drop")
		for f.seen+f.lost < f.size() {
			until(t, "something was dropped, or all is over", func() bool { return f.output("", "stdout").LostBytes > 0 || f.ended() })
			if !f.ended() {
				f.killable()
			}
			f.away(path, f.takeLossy)
		}
		f.finish()
		if f.lost == 0 {
			t.Error("nothing was lost: the disk was not full")
		}
	})
	t.Run("client", func(t *testing.T) {
		f := newFlood(t, "floodclient")
		_, out, _ := f.fifos("init")
		f.print(out, "")
		for i := range int64(4) {
			client, err := os.Open(out)
			if err != nil {
				t.Fatal(err)
			}
			for _, more := range []int64{1, 2} { // it stalls in between, and goes away after that
				most := f.size() * (2*i + more) / 8
				if i == 3 && more == 2 {
					most = f.size() + 1 // to the end of file
				}
				if _, err := io.Copy(taker{f}, io.LimitReader(client, most-f.seen)); err != nil {
					t.Fatal(err)
				}
				if f.seen < f.size() {
					f.stuck("the client does not read")
					f.killable()
				}
			}
			_ = client.Close()
		}
		f.finish()
	})
	t.Run("logger", func(t *testing.T) {
		f := newFlood(t, "floodlogger")
		uri := loggertest.URI(f.dir, loggertest.Copies)
		f.print(uri, uri)
		path := filepath.Join(f.dir, "stdout")
		for i, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL, unix.SIGSTOP, unix.SIGKILL} {
			f.grown(path, f.size()*int64(i+1)/8)
			pid := f.logger()
			if err := unix.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
			f.killable()
			if sig == unix.SIGSTOP {
				if err := unix.Kill(pid, unix.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
		}
		f.grown(path, f.size())
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = file.Close() }()
		if _, err := io.Copy(taker{f}, file); err != nil {
			t.Fatal(err)
		}
		f.finish()
	})
}

// taker writes into take.
type taker struct{ f *flood }

func (t taker) Write(b []byte) (int, error) {
	t.f.take(b)
	return len(b), nil
}

// grown waits until a file has n bytes, as long as it grows.
func (f *flood) grown(path string, n int64) {
	f.t.Helper()
	for last := int64(-1); ; {
		var size int64
		until(f.t, fmt.Sprintf("%s has more than %d bytes of %d", path, last, n), func() bool {
			fi, err := os.Stat(path)
			if err == nil {
				size = fi.Size()
			}
			return err == nil && (size > last || size >= n)
		})
		if last = size; size >= n {
			return
		}
	}
}
