package ledger

import (
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	ledger "github.com/managerd/managerd/protos/ledger"
)

var update = flag.Bool("update", false, "write the golden ledger of the current schema, if there is none")

// released is what every version must go on reading.
func released(schema uint32) []*ledger.Record {
	return []*ledger.Record{
		{Trim: &ledger.Trim{UpTo: 3, Dropped: 2}},
		{Seq: 2, UnixNano: 1700000000000000001, Header: &ledger.Header{
			Schema: schema, Namespace: "ns", ContainerId: "web", Incarnation: "c14083859e347c17",
			BootId: "239a4913-3e97-4539-bc05-d45ff71c28f5", ShimPid: 4700,
		}},
		{Seq: 4, UnixNano: 1700000000000000002, Process: &ledger.Process{
			ContainerId: "web", ExecId: "e1", Pid: 4712, StartTicks: 3145299, Terminal: true, Stdin: "/in", Stdout: "/out", Stderr: "/err", OomKills: 1,
		}},
		{Seq: 5, UnixNano: 1700000000000000003, Event: &ledger.Event{
			Topic: "/tasks/oom", TypeUrl: "containerd.events.TaskOOM", Value: []byte{10, 3, 'w', 'e', 'b'}, OomKills: 2, OomLevel: "own", OomCgroup: "/ns/web",
		}},
		{Seq: 6, UnixNano: 1700000000000000004, Exit: &ledger.Exit{
			ContainerId: "web", ExecId: "e1", Pid: 4712, Status: 255, ExitedUnixNano: 1700000001000000000, Unknown: "nobody saw it",
			OomKills: 2, OomKilled: true, TimedOut: true,
		}},
	}
}

// TestGolden: the ledger of every schema that was released is read whole, and can be gone on with; so is that of the next
// one, with what only that knows passed over.
func TestGolden(t *testing.T) {
	encoded := func(schema uint32, more ...byte) []byte {
		out := append([]byte{}, magic...)
		for _, r := range released(schema) {
			payload, err := r.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			payload = append(payload, more...)
			out = binary.LittleEndian.AppendUint32(out, uint32(len(payload)))
			out = binary.LittleEndian.AppendUint32(out, crc32.Checksum(payload, castagnoli))
			out = append(out, payload...)
		}
		return out
	}
	golden := filepath.Join("testdata", fmt.Sprintf("ledger-%d.bin", Schema))
	if _, err := os.Stat(golden); *update && os.IsNotExist(err) {
		if err := os.WriteFile(golden, encoded(Schema), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files := map[uint32][]byte{Schema + 1: encoded(Schema+1, 0xfa, 0x3f, 3, 'n', 'e', 'w')} // field 1023
	for schema := uint32(1); schema <= Schema; schema++ {
		data, err := os.ReadFile(filepath.Join("testdata", fmt.Sprintf("ledger-%d.bin", schema)))
		if err != nil {
			t.Fatal(err)
		}
		files[schema] = data
	}
	for schema, data := range files {
		path := filepath.Join(t.TempDir(), "ledger")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Read(path)
		if err != nil {
			t.Errorf("schema %d: %v", schema, err)
		}
		if want := released(schema); !reflect.DeepEqual(got, want) {
			t.Errorf("schema %d:\n got %v\nwant %v", schema, got, want)
		}
		l, err := Open(path, ledger.Header{Incarnation: "next"})
		if err != nil {
			t.Errorf("schema %d: %v", schema, err)
			continue
		}
		if l.Last() != 7 {
			t.Errorf("schema %d: goes on with %d", schema, l.Last())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}
