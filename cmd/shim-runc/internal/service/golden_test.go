package service

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi"
)

var update = flag.Bool("update", false, "write the golden record of the current schema, if there is none")

// releasedProcess is a record that every version must go on reading.
func releasedProcess(schema uint32) *shimstate.Process {
	return &shimstate.Process{
		Schema: schema, BootId: "239a4913-3e97-4539-bc05-d45ff71c28f5", ContainerId: "web", ExecId: "e1", State: "stopped", Pid: 4712,
		StartTicks: 3145299, Terminal: true, Stdin: "/in", Stdout: "/out", Stderr: "/err", InputEnded: true, Spec: []byte(`{"args":["true"]}`),
		ExitStatus: 255, ExitedUnixNano: 1700000001000000000, ExitUnknown: "nobody saw it", Launcher: "/usr/local/bin/shim-runc", Starting: true,
		TimeoutNano: 1e9, DeadlineUnixNano: 1700000002000000000, TimedOut: true,
	}
}

// TestTableGolden: the process table of every schema that was released is read whole; so is that of the next one, with what
// only that knows passed over, and none that is still newer.
func TestTableGolden(t *testing.T) {
	encoded := func(schema uint32, more ...byte) []byte {
		data, err := releasedProcess(schema).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return append(data, more...)
	}
	golden := filepath.Join("testdata", fmt.Sprintf("process-%d.bin", tableSchema))
	if _, err := os.Stat(golden); *update && os.IsNotExist(err) {
		if err := os.WriteFile(golden, encoded(tableSchema), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	records := map[uint32][]byte{
		tableSchema + 1: encoded(tableSchema+1, 0xfa, 0x3f, 3, 'n', 'e', 'w'), // field 1023
		tableSchema + 2: encoded(tableSchema + 2),
	}
	for schema := uint32(1); schema <= tableSchema; schema++ {
		data, err := os.ReadFile(filepath.Join("testdata", fmt.Sprintf("process-%d.bin", schema)))
		if err != nil {
			t.Fatal(err)
		}
		records[schema] = data
	}
	for schema, data := range records {
		bundle := t.TempDir()
		dir := filepath.Join(bundle, shimapi.TableDir)
		if err := os.Mkdir(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, shimapi.TableName("e1")), data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := LoadTable(bundle)
		if newer := schema > tableSchema+1; newer != (err != nil) || newer != (len(got.Processes) == 0) {
			t.Errorf("schema %d: %v, %v", schema, got.Processes, err)
		} else if want := releasedProcess(schema); !newer && !reflect.DeepEqual(got.Processes[0], want) {
			t.Errorf("schema %d:\n got %v\nwant %v", schema, got.Processes[0], want)
		}
	}
}
