package eventlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	records "github.com/managerd/managerd/protos/eventlog"
)

func open(t *testing.T, dir string, b Bounds) (*Log, *bytes.Buffer) {
	t.Helper()
	said := &bytes.Buffer{}
	l, err := Open(dir, b, slog.New(slog.NewTextHandler(said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, said
}

func add(t *testing.T, l *Log, topics ...string) {
	t.Helper()
	for _, topic := range topics {
		if fresh, err := l.Append(&records.Event{Topic: topic, Namespace: "ns"}); err != nil || !fresh {
			t.Fatal(fresh, err)
		}
	}
}

// all reads what there is: topics, "LOST" for what is lost, and the number of the last one.
func all(t *testing.T, l *Log, since uint64) (topics []string, last uint64) {
	t.Helper()
	r := l.Read(since)
	defer r.Close()
	last = since
	for {
		i, err := r.Next(context.Background(), false)
		if errors.Is(err, io.EOF) {
			return topics, last
		}
		if err != nil {
			t.Fatal(err)
		}
		if i.Seq <= last && i.Event != nil {
			t.Errorf("number %d after %d", i.Seq, last)
		}
		last = i.Seq
		if i.Event == nil {
			topics = append(topics, "LOST")
		} else {
			topics = append(topics, i.Event.Topic)
		}
	}
}

func want(t *testing.T, got []string, topics string) {
	t.Helper()
	if g := strings.Join(got, " "); g != topics {
		t.Errorf("%q, not %q", g, topics)
	}
}

func files(t *testing.T, dir, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestResume: each event once, however often the log is opened again; a source's event is not taken twice.
func TestResume(t *testing.T) {
	dir := t.TempDir()
	var since uint64
	var got []string
	for n := range 5 {
		l, _ := open(t, dir, Bounds{Segment: 100})
		for seq := range uint64(n + 2) { // those of the last round once more
			fresh, err := l.Append(&records.Event{Topic: fmt.Sprint(seq + 1), Source: "s", SourceSeq: seq + 1})
			if err != nil || fresh != (seq+1 > max(1, uint64(n+1)) || n == 0) {
				t.Errorf("round %d, event %d: %v, %v", n, seq+1, fresh, err)
			}
		}
		if c := l.Cursor("s"); c != uint64(n+2) || l.Cursor("x") != 0 {
			t.Errorf("cursor %d", c)
		}
		topics, last := all(t, l, since)
		got, since = append(got, topics...), last
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Append(&records.Event{}); err == nil {
			t.Error("a closed log takes events")
		}
	}
	want(t, got, "1 2 3 4 5 6")
	if n := len(files(t, dir, "*.log")); n < 2 {
		t.Errorf("%d segments", n)
	}
}

// TestTorn: a writer that was killed at any byte leaves what was whole, and the log goes on.
func TestTorn(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, dir, Bounds{})
	add(t, l, "a", "b")
	whole := l.segments[0].end
	add(t, l, "c")
	path, end := l.segments[0].path, l.segments[0].end
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil || int64(len(data)) != end {
		t.Fatal(len(data), end, err)
	}
	for n := whole; n < end; n++ {
		if err := os.WriteFile(path, data[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		l, said := open(t, dir, Bounds{})
		add(t, l, "d")
		topics, _ := all(t, l, 0)
		want(t, topics, "a b d")
		if err := l.Close(); err != nil || said.Len() != 0 {
			t.Fatal(err, said)
		}
	}
}

// TestDamaged: a segment that is damaged is set aside, a reader is told what is lost, and no number is used again.
func TestDamaged(t *testing.T) {
	for _, which := range []int{0, 1, 2} {
		dir := t.TempDir()
		l, _ := open(t, dir, Bounds{Segment: 1})
		add(t, l, "a", "b", "c")
		_, last := all(t, l, 0)
		first := l.segments[0].last
		path := l.segments[which].path
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)-1] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, said := open(t, dir, Bounds{Segment: 1})
		if n := len(files(t, dir, "*.damaged")); n != 1 || !strings.Contains(said.String(), "set aside") || !strings.Contains(said.String(), "checksum") {
			t.Errorf("%d files are set aside: %s", n, said)
		}
		add(t, l, "d")
		topics, _ := all(t, l, 0)
		want(t, topics, []string{"b c d", "a LOST c d", "a b LOST d"}[which])
		if which > 0 {
			topics, now := all(t, l, first)
			want(t, topics, []string{"", "LOST c d", "b LOST d"}[which])
			if now <= last {
				t.Errorf("number %d is used again: %d", now, last)
			}
		}
	}
}

// TestNewBoot: after a power cut the log goes on with numbers that nobody has seen, and nothing counts as lost.
func TestNewBoot(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, dir, Bounds{})
	add(t, l, "a")
	_, last := all(t, l, 0)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := l.segments[0]
	head, err := frame(&records.Record{UnixNano: 1, Header: &records.Header{Schema: 1, BootId: strings.Repeat("x", len(bootID())), First: s.first}})
	if err != nil {
		t.Fatal(err)
	}
	event, err := frame(&records.Record{Seq: last, UnixNano: 1, Event: &records.Event{Topic: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path, append(append([]byte(magic), head...), event...), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l, said := open(t, dir, Bounds{Age: 100 * 365 * 24 * time.Hour})
		if err := l.Close(); err != nil || said.Len() > 0 {
			t.Fatal(err, said)
		}
	}
	l, _ = open(t, dir, Bounds{Age: 100 * 365 * 24 * time.Hour})
	add(t, l, "b")
	topics, now := all(t, l, last)
	want(t, topics, "b")
	if now <= last {
		t.Errorf("%d after %d", now, last)
	}
}

// TestBounds: the oldest segments go, by size and by age, and who is behind is told.
func TestBounds(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, dir, Bounds{Segment: 300, Total: 1000})
	add(t, l, "first")
	_, first := all(t, l, 0)
	for range 100 {
		add(t, l, "x")
	}
	var size int64
	for _, f := range files(t, dir, "*.log") {
		fi, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		size += fi.Size()
	}
	if size > 1400 {
		t.Errorf("%d bytes", size)
	}
	topics, _ := all(t, l, first)
	if len(topics) < 3 || topics[0] != "LOST" || topics[1] != "x" {
		t.Errorf("%q", topics)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Millisecond)
	l, _ = open(t, dir, Bounds{Segment: 1, Age: time.Millisecond})
	add(t, l, "y", "z")
	if n := len(files(t, dir, "*.log")); n > 2 {
		t.Errorf("%d segments", n)
	}
}

// TestFollow: readers see every event once, while it is written.
func TestFollow(t *testing.T) {
	l, _ := open(t, t.TempDir(), Bounds{Segment: 500})
	const n = 500
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			r := l.Read(0)
			defer r.Close()
			for i := range n {
				item, err := r.Next(ctx, true)
				if err != nil || item.Event == nil || item.Event.Topic != fmt.Sprint(i) {
					t.Errorf("event %d: %v, %v", i, item, err)
					return
				}
			}
		})
	}
	for i := range n {
		add(t, l, fmt.Sprint(i))
	}
	readers.Wait()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	r := l.Read(l.last)
	defer r.Close()
	if _, err := r.Next(ended, true); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func BenchmarkAppend(b *testing.B) {
	l, err := Open(b.TempDir(), Bounds{}, slog.Default())
	if err != nil {
		b.Fatal(err)
	}
	for i := range b.N {
		if _, err := l.Append(&records.Event{Topic: "/tasks/exit", Namespace: "ns", Value: make([]byte, 100), Source: "s", SourceSeq: uint64(i + 1)}); err != nil {
			b.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}
