package command_test

import (
	"testing"
	"time"
)

// TestLeases: a lease has the id, the labels and the end that it is given.
func TestLeases(t *testing.T) {
	w := newWorld(t)
	before := time.Now()
	if out := w.ok("leases", "create", "--id", "mine", "-x", "1h", "k=v"); out != "mine\n" {
		t.Errorf("create prints %q", out)
	}
	var rows []struct {
		ID     string
		Labels map[string]string
	}
	parse(t, w.ok("leases", "ls", "-o", "json", "id==mine"), &rows)
	if len(rows) != 1 || rows[0].ID != "mine" || rows[0].Labels["k"] != "v" {
		t.Fatalf("leases are %+v", rows)
	}
	end, err := time.Parse(time.RFC3339, rows[0].Labels["containerd.io/gc.expire"])
	if err != nil || end.Before(before.Add(59*time.Minute)) || end.After(time.Now().Add(time.Hour)) {
		t.Errorf("it ends %v (%v), was made %v", end, err, before)
	}
	w.fails(1, []string{"mine", "already exists"}, "leases", "create", "--id", "mine")
	w.fails(2, []string{"-1h"}, "leases", "create", "-x", "-1h")
	w.fails(2, []string{"abc"}, "leases", "create", "abc")
	w.ok("leases", "rm", "mine")
}
