package logsink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	fifoEnv = "LOGSINK_TEST_FIFO" // set: this process is a writer that is going to be killed
	baseEnv = "LOGSINK_TEST_BASE"
	uriEnv  = "LOGSINK_TEST_URI"
)

func TestMain(m *testing.M) {
	if fifo := os.Getenv(fifoEnv); fifo != "" {
		if err := copyAll(fifo, os.Getenv(baseEnv), os.Getenv(uriEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func target(t testing.TB, uri string) Target {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(u)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// copyAll copies a FIFO into a log, to its end.
func copyAll(fifo, base, uri string) error {
	u, err := url.Parse(uri)
	if err != nil {
		return err
	}
	t, err := Parse(u)
	if err != nil {
		return err
	}
	fd, err := unix.Open(fifo, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	l, err := Open(Config{Target: t, Base: base})
	if err != nil {
		return err
	}
	s, err := l.Stream("stdout")
	if err != nil {
		return err
	}
	for {
		if err := s.Put(false); err != nil {
			return err
		}
		n, err := s.Take(fd)
		switch {
		case errors.Is(err, unix.EAGAIN):
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		case err != nil:
			return err
		case n == 0:
			if err := s.Put(true); err != nil {
				return err
			}
			s.Close()
			l.Close()
			return nil
		}
	}
}

// text gives all that is in a log, as the process wrote it.
func text(t testing.TB, l *Log) string {
	t.Helper()
	var b bytes.Buffer
	if err := l.Read(context.Background(), ReadOptions{Tail: -1}, each(func(e Entry) error {
		b.Write(e.Line)
		return nil
	})); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func open(t testing.TB, uri, base string) (*Log, *Stream) {
	t.Helper()
	l, err := Open(Config{Target: target(t, uri), Base: base})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	s, err := l.Stream("stdout")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return l, s
}

func say(t testing.TB, s *Stream, text string) {
	t.Helper()
	if n, err := s.TakeBytes([]byte(text)); n != len(text) || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Put(false); err != nil {
		t.Fatal(err)
	}
}

func TestFormats(t *testing.T) {
	const at = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`
	long := strings.Repeat("é", maxLine/2) // a character's end is not where the entry's is
	for scheme, want := range map[string][]string{
		"json-file": {
			`^\{"log":"a \\"b\\"\\t\\u003c\\ufffd\\u0000\\n","stream":"stdout","time":"` + at + `"\}$`,
			`^\{"log":"x(é)+","stream":"stdout","time":"` + at + `"\}$`,
			`^\{"log":"é\\n","stream":"stdout","time":"` + at + `"\}$`,
			`^\{"log":"end","stream":"stdout","time":"` + at + `"\}$`,
		},
		"cri": {
			"^" + at + " stdout F a \"b\"\t<\xff\x00$",
			"^" + at + ` stdout P x(é)+$`,
			"^" + at + ` stdout F é$`,
			"^" + at + ` stdout F end$`,
		},
	} {
		dir := t.TempDir()
		_, s := open(t, scheme+"://"+dir+"/log", dir+"/base")
		say(t, s, "a \"b\"\t<\xff\x00\nx"+long+"\nen")
		say(t, s, "d")
		if err := s.Put(true); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(dir + "/log")
		if err != nil {
			t.Fatal(err)
		}
		lines := bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
		if len(lines) != len(want) {
			t.Fatalf("%s: %d lines", scheme, len(lines))
		}
		for i, line := range lines {
			ok := matches(want[i], line)
			if !ok {
				t.Errorf("%s: line %d is %.120q", scheme, i, line)
			}
		}
	}
}

// matches compares byte by byte: what is no UTF-8 is not to be seen as U+FFFD.
func matches(pattern string, line []byte) bool {
	wide := func(b []byte) string {
		var out strings.Builder
		for _, c := range b {
			out.WriteRune(rune(c))
		}
		return out.String()
	}
	return regexp.MustCompile(wide([]byte(pattern))).MatchString(wide(line))
}

func TestBadURIs(t *testing.T) {
	for _, uri := range []string{
		"cri://host/path", "cri:///dir/", "json-file:///x?max-size=0", "json-file:///x?max-size=1x", "cri:///x?max-file=3",
		"cri:///x?max-size=1m&max-file=0", "cri:///x?full=maybe", "cri:///x?no=1", "cri:///x?max-size=9999999999g",
	} {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(u); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if got := target(t, "cri:///x?max-size=2mb&full=drop"); got.MaxSize != 2<<20 || got.MaxFile != defaultFiles || !got.Drop {
		t.Errorf("%+v", got)
	}
}

// TestRotation: files have the size and number that was asked for, and the newest output; a reader that follows gets all of it.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l, s := open(t, "cri://"+dir+"/log?max-size=4k&max-file=3", dir+"/base")
	next := 0
	followed := make(chan error, 1)
	seen := make(chan int, 1000)
	go func() {
		followed <- l.Read(context.Background(), ReadOptions{Follow: true, Tail: -1}, each(func(e Entry) error {
			if string(e.Line) != fmt.Sprintf("line %d\n", next) {
				return fmt.Errorf("%q instead of line %d", e.Line, next)
			}
			next++
			seen <- next
			return nil
		}))
	}()
	for i := range 1000 {
		say(t, s, fmt.Sprintf("line %d\n", i))
		<-seen
	}
	s.Close()
	if err := <-followed; err != nil {
		t.Error(err)
	}
	files, _ := filepath.Glob(dir + "/log*")
	if len(files) != 3 {
		t.Errorf("files: %v", files)
	}
	for _, f := range files {
		if fi, err := os.Stat(f); err != nil || fi.Size() > 4<<10 || fi.Size() == 0 {
			t.Errorf("%s: %v, %v", f, fi.Size(), err)
		}
	}
	if got := text(t, l); !strings.HasSuffix(got, "line 998\nline 999\n") {
		t.Errorf("it ends %q", got[max(0, len(got)-40):])
	}
	var tail []string
	if err := l.Read(context.Background(), ReadOptions{Tail: 150}, each(func(e Entry) error {
		tail = append(tail, string(e.Line))
		return nil
	})); err != nil || len(tail) != 150 || tail[0] != "line 850\n" {
		t.Errorf("%d entries, %v", len(tail), err)
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	l, s := open(t, "json-file://"+dir+"/log", dir+"/base")
	say(t, s, "one\n")
	if err := os.Rename(dir+"/log", dir+"/away"); err != nil {
		t.Fatal(err)
	}
	say(t, s, "two\n")
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	say(t, s, "three\n")
	for file, want := range map[string]int{"away": 2, "log": 1} {
		if data, err := os.ReadFile(filepath.Join(dir, file)); err != nil || bytes.Count(data, []byte("\n")) != want {
			t.Errorf("%s: %q, %v", file, data, err)
		}
	}
	if _, err := Open(Config{Target: l.Target(), Base: dir + "/other"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second writer: %v", err)
	}
}

// TestSuccessors: whoever writes is killed again and again at any moment, in the middle of rotations too, and not a byte is
// lost or doubled.
func TestSuccessors(t *testing.T) {
	dir := t.TempDir()
	fifo, base, uri := dir+"/fifo", dir+"/base", "cri://"+dir+"/log?max-size=64k&max-file=1000"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_RDWR, 0) // as the container holds it
	if err != nil {
		t.Fatal(err)
	}
	// A FIFO that nobody has open is emptied by the kernel. Between two writers, when the container has ended, this is all
	// that holds it.
	held, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	const lines = 400_000
	written := make(chan error, 1)
	go func() {
		var b []byte
		for i := range lines {
			b = append(strconv.AppendInt(b, int64(i), 10), '\n')
			if len(b) > 3000 || i == lines-1 {
				if _, err := w.Write(b); err != nil {
					written <- err
					return
				}
				b = b[:0]
				time.Sleep(50 * time.Microsecond) // so that it lasts through many kills
			}
		}
		written <- w.Close()
	}()
	kills, lifetime := 0, time.Millisecond
	for ; ; kills++ {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fifoEnv+"="+fifo, baseEnv+"="+base, uriEnv+"="+uri)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(lifetime, func() { _ = cmd.Process.Kill() })
		err := cmd.Wait()
		kill.Stop()
		if err == nil {
			break
		}
		if stderr.Len() > 0 {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		lifetime = min(lifetime+lifetime/8+73*time.Microsecond, 2*time.Second)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	l, err := Open(Config{Target: target(t, uri), Base: base})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	next := 0
	if err := l.Read(context.Background(), ReadOptions{Tail: -1}, each(func(e Entry) error {
		if string(e.Line) != fmt.Sprintf("%d\n", next) {
			return fmt.Errorf("%q instead of %d", e.Line, next)
		}
		next++
		return nil
	})); err != nil || next != lines {
		t.Errorf("%d lines of %d, after %d kills: %v", next, lines, kills, err)
	}
	t.Logf("%d kills", kills)
}

// each calls fn with every entry of a batch.
func each(fn func(Entry) error) Reader {
	return func(entries []Entry, _ Position) error {
		for _, e := range entries {
			if err := fn(e); err != nil {
				return err
			}
		}
		return nil
	}
}

// small mounts a file system with room for little, and fills it.
func small(t *testing.T) (dir string, makeRoom func()) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.WriteFile(dir+"/ballast", make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		if err := os.Remove(dir + "/ballast"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFullBlocks(t *testing.T) {
	dir, makeRoom := small(t)
	l, s := open(t, "cri://"+dir+"/log", t.TempDir()+"/base")
	var want strings.Builder
	var err error
	for i := 0; err == nil; i++ {
		line := fmt.Sprintf("%05d %s\n", i, strings.Repeat("x", 500))
		want.WriteString(line)
		if _, terr := s.TakeBytes([]byte(line)); terr != nil {
			t.Fatal(terr)
		}
		err = s.Put(false)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if got := text(t, l); !strings.HasPrefix(want.String(), got) || len(got) == 0 {
		t.Errorf("a log of %d bytes is not whole entries", len(got))
	}
	makeRoom()
	if err := s.Put(false); err != nil {
		t.Fatal(err)
	}
	if got := text(t, l); got != want.String() {
		t.Errorf("%d bytes of %d", len(got), want.Len())
	}
}

func TestFullDrops(t *testing.T) {
	dir, makeRoom := small(t)
	l, s := open(t, "cri://"+dir+"/log?full=drop", t.TempDir()+"/base")
	line := strings.Repeat("x", 499) + "\n"
	const lines = 1000
	for range lines {
		say(t, s, line)
	}
	if !s.Lost() {
		t.Fatal("nothing was lost: the disk is not full")
	}
	makeRoom()
	say(t, s, "after\n")
	got := text(t, l)
	if !strings.HasSuffix(got, " were lost here: no space left on device]\nafter\n") || s.Lost() {
		t.Fatalf("the log ends %q", got[max(0, len(got)-200):])
	}
	// A note may find room where a line did not: there can be several.
	lostBytes, lostLines := 0, 0
	for _, m := range regexp.MustCompile(`(?m)^\[managerd: (\d+) bytes of output \((\d+) entries\) were lost here`).FindAllStringSubmatch(got, -1) {
		b, _ := strconv.Atoi(m[1])
		n, _ := strconv.Atoi(m[2])
		lostBytes, lostLines = lostBytes+b, lostLines+n
	}
	kept := strings.Count(got, line)
	if kept+lostLines != lines || lostBytes != lostLines*len(line) || kept == 0 {
		t.Errorf("%d written, %d kept, %d lost in %d bytes", lines, kept, lostLines, lostBytes)
	}
}

// BenchmarkCopy is how fast a FIFO is copied into a log.
func BenchmarkCopy(b *testing.B) {
	for _, scheme := range []string{"json-file", "cri"} {
		b.Run(scheme, func(b *testing.B) {
			dir := b.TempDir()
			if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
				b.Fatal(err)
			}
			w, err := os.OpenFile(dir+"/fifo", os.O_RDWR, 0)
			if err != nil {
				b.Fatal(err)
			}
			_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
			chunk := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), 655)
			b.SetBytes(int64(len(chunk)))
			go func() {
				for range b.N {
					if _, err := io.Copy(w, bytes.NewReader(chunk)); err != nil {
						b.Error(err)
					}
				}
				_ = w.Close()
			}()
			if err := copyAll(dir+"/fifo", dir+"/base", scheme+"://"+dir+"/log?max-size=64m&max-file=2"); err != nil {
				b.Fatal(err)
			}
		})
	}
}
