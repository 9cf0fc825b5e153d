package eventlog

import (
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	records "github.com/managerd/managerd/protos/eventlog"
)

var update = flag.Bool("update", false, "write the golden segment of the current schema, if there is none")

// released is a segment that every version must go on reading. more stands behind every record: fields that are not known.
func released(t *testing.T, version uint32, more ...byte) []byte {
	t.Helper()
	out := []byte(magic)
	for _, r := range []*records.Record{
		{UnixNano: 1700000000000000000, Header: &records.Header{Schema: version, BootId: "239a4913-3e97-4539-bc05-d45ff71c28f5", First: 7, Follows: 6}},
		{Seq: 7, UnixNano: 1700000000000000001, Event: &records.Event{Topic: "/a", Namespace: "ns", TypeUrl: "t", Value: []byte{1}, UnixNano: 5}},
		{Seq: 9, UnixNano: 1700000000000000002, Event: &records.Event{Topic: "/b", Namespace: "ns", Source: "ns/web/00", SourceSeq: 12}},
	} {
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

// TestGolden: the log of every schema that was released is read whole, and gone on with; so is that of the next one, with what
// only that knows passed over. One that is still newer is set aside.
func TestGolden(t *testing.T) {
	golden := filepath.Join("testdata", fmt.Sprintf("segment-%d.log", schema))
	if _, err := os.Stat(golden); *update && os.IsNotExist(err) {
		if err := os.WriteFile(golden, released(t, schema), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	segments := map[uint32][]byte{
		schema + 1: released(t, schema+1, 0xfa, 0x3f, 3, 'n', 'e', 'w'), // field 1023
		schema + 2: released(t, schema+2),
	}
	for v := uint32(1); v <= schema; v++ {
		data, err := os.ReadFile(filepath.Join("testdata", fmt.Sprintf("segment-%d.log", v)))
		if err != nil {
			t.Fatal(err)
		}
		segments[v] = data
	}
	for v, data := range segments {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%016x.log", 7)), data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, _ := open(t, dir, Bounds{Age: 1 << 62})
		add(t, l, "/c")
		topics, _ := all(t, l, 0)
		if v > schema+1 {
			want(t, topics, "/c")
			if aside := files(t, dir, "*.damaged"); len(aside) != 1 {
				t.Errorf("schema %d: set aside: %v", v, aside)
			}
			continue
		}
		want(t, topics, "/a /b /c")
		if c := l.Cursor("ns/web/00"); c != 12 {
			t.Errorf("schema %d: cursor %d", v, c)
		}
	}
}
