package logsink

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// opened gives the paths below dir that some thread of this process has open.
func opened(t *testing.T, dir string) (all []string) {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/task/*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, dir) {
			all = append(all, to)
		}
	}
	return all
}

// TestRest: of a log that rests no file is open, also none of a reader that follows, and that has each entry once all the same,
// over rotations too.
func TestRest(t *testing.T) {
	for name, query := range map[string]string{"rotated": "?max-size=4k&max-file=3", "one file": ""} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, s := open(t, "cri://"+dir+"/log"+query, t.TempDir()+"/base")
			const lines = 700
			seen, followed, next := make(chan int, lines), make(chan error, 1), 0
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
			for i := range lines {
				say(t, s, fmt.Sprintf("line %d\n", i))
				if i%7 == 0 {
					if err := l.Rest(context.Background()); err != nil {
						t.Fatal(err)
					}
					if files := opened(t, dir); len(files) > 0 {
						t.Fatalf("open while it rests: %v", files)
					}
					if err := AllRest(context.Background()); err != nil {
						t.Fatal(err)
					}
					l.Wake()
				}
				select {
				case <-seen:
				case err := <-followed:
					t.Fatalf("the reader ends behind line %d: %v", i, err)
				case <-time.After(30 * time.Second):
					t.Fatalf("the reader waits behind line %d", i)
				}
			}
			s.Close()
			if err := <-followed; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRestUnanswered: what does not answer is named: the log whose reader waits, and one that was closed.
func TestRestUnanswered(t *testing.T) {
	dir := t.TempDir()
	l, s := open(t, "cri://"+dir+"/log", t.TempDir()+"/base")
	say(t, s, "one\n")
	table, err := l.beginReading()
	if err != nil {
		t.Fatal(err)
	}
	held, entered := make(chan struct{}), make(chan struct{})
	go table.Do(func() { // as a call into a file system that does not answer
		close(entered)
		<-held
	})
	<-entered
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	for what, err := range map[string]error{"rest": l.Rest(short), "all rest": AllRest(short)} {
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), dir+"/log") {
			t.Errorf("%s: %v", what, err)
		}
	}
	close(held)
	long, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.Rest(long); err != nil {
		t.Fatal(err)
	}
	l.Wake()
	l.endReading(table)
	say(t, s, "two\n")
	if got := text(t, l); got != "one\ntwo\n" {
		t.Errorf("%q", got)
	}
}
