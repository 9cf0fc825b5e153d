package tasks

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"

	"github.com/managerd/managerd/manager/eventlog"
)

// TestKilledBeforeCursor: a daemon that was killed when it had written an event down, and had not noted so in the bundle, is
// followed by one that does not tell it again. A new task of the same name counts anew.
func TestKilledBeforeCursor(t *testing.T) {
	w := fakes(t)
	journal, err := eventlog.Open(t.TempDir(), eventlog.Bounds{}, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := journal.Close(); err != nil {
			t.Error(err)
		}
	}()
	w.journal = journal
	w.restart()
	written := func() (topics []string) {
		r := journal.Read(0)
		defer r.Close()
		for {
			i, err := r.Next(context.Background(), false)
			if errors.Is(err, io.EOF) {
				return topics
			}
			if err != nil || i.Event == nil {
				t.Fatal(i, err)
			}
			topics = append(topics, i.Event.Topic)
		}
	}
	for round := 1; round <= 2; round++ {
		w.run("c", args("exit", "3"))
		if _, _, err := w.Wait(in("ns"), "c", ""); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its events are written down", func() bool { return len(written()) == 4*round-1 })
		b, err := w.bundles.Load("ns", "c")
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		if err := b.SetCursor(0); err != nil {
			t.Fatal(err)
		}
		<-w.begin()
		if _, err := w.Delete(in("ns"), "c"); err != nil {
			t.Fatal(err)
		}
		if got := written(); len(got) != 4*round || got[4*round-1] != "/tasks/delete" {
			t.Errorf("round %d: %q", round, got)
		}
	}
}
