package handover

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/managerd/managerd/protos/shimstate"
)

// TestSchema: one version more or less is understood, and what it has that we do not know is passed over.
func TestSchema(t *testing.T) {
	for schema, ok := range map[uint32]bool{0: false, Schema: true, Schema + 1: true, Schema + 2: false, Schema + 100: false} {
		h := &shimstate.Handover{Schema: schema, Incarnation: "i", Connections: []*shimstate.Connection{{Fd: 7, Unread: []byte("abc")}}}
		data, err := h.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		data = append(data, 0xfa, 0x3f, 3, 'n', 'e', 'w') // field 1023
		got, err := Read(data)
		if (err == nil) != ok {
			t.Errorf("schema %d: %v", schema, err)
		}
		if err == nil && (got.Incarnation != "i" || len(got.Connections) != 1 || string(got.Connections[0].Unread) != "abc") {
			t.Errorf("schema %d: %v", schema, got)
		}
		var said bytes.Buffer
		if err := Check(bytes.NewReader(data), &said); (err == nil) != ok || (said.String() == yes) != ok {
			t.Errorf("schema %d: check says %q, %v", schema, said.String(), err)
		}
	}
}

// envPlay tells the test binary what to be when it is asked whether it could take over.
const envPlay = "HANDOVER_TEST_PLAY"

func TestMain(m *testing.M) {
	if len(os.Args) < 2 || os.Args[1] != CheckVerb {
		os.Exit(m.Run())
	}
	switch os.Getenv(envPlay) {
	case "shim":
		if err := Check(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "other": // which ends with success whatever it is asked
		fmt.Println("hello")
	case "dead":
		time.Sleep(time.Hour)
	}
}

// TestOpen: only what says yes is taken.
func TestOpen(t *testing.T) {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		play   string
		schema uint32
		says   string // empty: it is taken
	}{{"shim", Schema, ""}, {"shim", Schema + 2, "schema 3"}, {"other", Schema, "does not know"}, {"dead", Schema, "killed"}} {
		t.Setenv(envPlay, c.play)
		f, err := Open(path, &shimstate.Handover{Schema: c.schema}, func(run func() error) error { return run() })
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v", c.play, err)
		}
		if err == nil {
			_ = f.Close()
		}
	}
}

// TestExecFails: after a failure nothing is left of the attempt, and the descriptors are closed on exec again.
func TestExecFails(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(bad)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := count()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	var b Bundle
	h := &shimstate.Handover{Schema: Schema, Socket: b.Add(null)}
	if err := Exec(f, h, &b); err == nil || !strings.Contains(err.Error(), "execve") {
		t.Errorf("exec: %v", err)
	}
	info, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(self(null)))
	if err != nil || !strings.Contains(string(info), "flags:\t02") { // O_CLOEXEC is 02000000
		t.Errorf("%s, %v", info, err)
	}
	b.Close()
	if after := count(); after != before {
		t.Errorf("%d descriptors after %d", after, before)
	}
}

// TestReceiveNothing: a program that was started as others are.
func TestReceiveNothing(t *testing.T) {
	if r, err := Receive(); r != nil || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	for _, bad := range []string{"x", "-1", "999999"} {
		t.Setenv(envRecord, bad)
		if _, err := Receive(); err == nil {
			t.Errorf("%s=%s was taken", envRecord, bad)
		}
		if os.Getenv(envRecord) != "" {
			t.Error("it is left in the environment")
		}
	}
}

func FuzzRead(f *testing.F) {
	h := &shimstate.Handover{
		Schema: Schema, Table: &shimstate.Table{Processes: []*shimstate.Process{{Pid: 1}}}, Held: []*shimstate.Descriptor{{Kind: "pidfd", Fd: 3}},
	}
	data, err := h.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := Read(data)
		if err != nil {
			return
		}
		again, err := h.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Read(again); err != nil {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
	})
}
