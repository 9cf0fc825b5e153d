package command_test

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestReplay prints what the daemon has written down, also before it was killed, and goes on behind a number.
func TestReplay(t *testing.T) {
	w := newWorld(t)
	w.ok("namespaces", "create", "early")
	if err := w.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	w.ok("namespaces", "create", "late")
	topic := "topic==/namespaces/create"
	var seqs []string
	for _, line := range strings.Split(strings.TrimSpace(w.ok("events", "--since", "10m", "--no-follow", "-o", "json", topic)), "\n") {
		var e struct {
			Seq       json.Number
			Namespace string
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(line, err)
		}
		if e.Namespace == "early" || e.Namespace == "late" {
			seqs = append(seqs, e.Seq.String())
		}
	}
	if len(seqs) != 2 {
		t.Fatalf("numbers %q", seqs)
	}
	if out := w.ok("events", "--since", seqs[0], "--no-follow", topic); !strings.HasPrefix(out, seqs[1]+" ") || strings.Count(out, "\n") != 1 {
		t.Errorf("behind the first one: %s", out)
	}
	if out := w.ok("events", "--since", seqs[1], "--no-follow"); out != "" {
		t.Errorf("behind the last one: %s", out)
	}
	if out := w.ok("events", "--since", "0", "--no-follow"); strings.Count(out, "\n") < 3 {
		t.Errorf("all: %s", out)
	}
	if _, errs, status := w.mctl("events", "--since", "1", "--no-follow"); status != 0 || !strings.Contains(errs, "are lost") {
		t.Errorf("a number before the log: %d, %s", status, errs)
	}
	for _, args := range [][]string{{"--since", "yesterday"}, {"--no-follow"}} {
		if _, errs, status := w.mctl(append([]string{"events"}, args...)...); status != 2 || !strings.Contains(errs, "--since") {
			t.Errorf("%q: %d, %s", args, status, errs)
		}
	}
}
