package handover

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/managerd/managerd/protos/shimstate"
)

var update = flag.Bool("update", false, "write the golden record of the current schema, if there is none")

// released is what every version must go on reading, with all fields that the first one had.
func released() *shimstate.Handover {
	return &shimstate.Handover{
		Schema: 1, Incarnation: "c14083859e347c17", StartedUnixNano: 1700000000123456789, Parking: "/run/managerd/park.sock", Forwarded: 12,
		Socket: 9, OldBinary: 17, Version: "v0.1.0", Revision: "89c686504b96b94a50aab257763a927de826a517", FrozenNano: 123456789,
		Connections: []*shimstate.Connection{{Fd: 10, Unread: []byte("frame")}, {Fd: 11}},
		Held:        []*shimstate.Descriptor{{Kind: "pidfd", Fd: 12}, {ExecId: "e1", Kind: "stdout", Fd: 13}},
		Table: &shimstate.Table{Schema: 1, Processes: []*shimstate.Process{
			{
				Schema: 1, BootId: "239a4913-3e97-4539-bc05-d45ff71c28f5", ContainerId: "web", State: "running", Pid: 4711, StartTicks: 3145216,
				Terminal: true, Stdin: "/in", Stdout: "/out", Stderr: "/err", InputEnded: true, Launcher: "/usr/local/bin/shim-runc",
			},
			{
				Schema: 1, BootId: "239a4913-3e97-4539-bc05-d45ff71c28f5", ContainerId: "web", ExecId: "e1", State: "stopped", Pid: 4712,
				StartTicks: 3145299, Spec: []byte(`{"args":["true"]}`), ExitStatus: 255, ExitedUnixNano: 1700000001000000000,
				ExitUnknown: "nobody saw it", Starting: true,
			},
		}},
	}
}

// TestGolden: a shim of every schema that was released can be replaced by this one: its record is read whole.
func TestGolden(t *testing.T) {
	path := filepath.Join("testdata", fmt.Sprintf("handover-%d.bin", Schema))
	if _, err := os.Stat(path); *update && os.IsNotExist(err) {
		data, err := released().Marshal()
		if err == nil {
			err = os.MkdirAll("testdata", 0o755)
		}
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob("testdata/handover-*.bin")
	if err != nil || len(files) < Schema {
		t.Fatalf("%d golden records for %d schemas: %v", len(files), Schema, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Read(data)
		if err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		want := released()
		want.Schema = got.Schema
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %v\nwant %v", f, got, want)
		}
	}
}
