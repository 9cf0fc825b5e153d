package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// sparseBomb is a tar of a few KiB whose only file is a hole (GNU tar's PAX format 1.0).
func sparseBomb(t testing.TB, size int64) []byte {
	t.Helper()
	body := make([]byte, 512) // the map of the file: no data
	copy(body, fmt.Sprintf("1\n%d\n0\n", size))
	record := func(k, v string) string {
		for n := len(k) + len(v) + 4; ; n++ {
			if r := fmt.Sprintf("%d %s=%s\n", n, k, v); len(r) == n {
				return r
			}
		}
	}
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "hole") +
		record("GNU.sparse.realsize", fmt.Sprint(size))
	var out bytes.Buffer
	for _, e := range []struct {
		name string
		flag byte
		data []byte
	}{{"PaxHeaders/hole", tar.TypeXHeader, []byte(pax)}, {"GNUSparseFile/hole", tar.TypeReg, body}} {
		h := make([]byte, 512)
		copy(h, e.name)
		copy(h[100:], "0000644\x000000000\x000000000\x00"+fmt.Sprintf("%011o\x00%011o\x00", len(e.data), 0)+"        ")
		h[156] = e.flag
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, b := range h {
			sum += int(b)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		out.Write(h)
		out.Write(e.data)
		out.Write(make([]byte, (512-len(e.data)%512)%512))
	}
	out.Write(make([]byte, 1024))
	return out.Bytes()
}

// TestLimits: what is beyond a limit is refused by what its header says, before it is unpacked.
func TestLimits(t *testing.T) {
	for name, c := range map[string]struct {
		data   []byte
		limits Limits
		want   string // "": it is applied
	}{
		"entries":            {archive(t, dir("d"), file("d/a"), file("d/b")), Limits{Entries: 2}, "more than 2 entries"},
		"just the entries":   {archive(t, dir("d"), file("d/a"), file("d/b")), Limits{Entries: 3}, ""},
		"a hole":             {sparseBomb(t, 1<<60), Limits{Bytes: 1 << 40}, `"hole": the files of the layer have more than`},
		"a hole that fits":   {sparseBomb(t, 1<<20), Limits{Bytes: 1 << 20}, ""},
		"a link has no size": {archive(t, symlink("l", "x")), Limits{Bytes: 1}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			err := Apply(context.Background(), root, bytes.NewReader(c.data), c.limits)
			if c.want == "" && err != nil || c.want != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.want)) {
				t.Error(err)
			}
			if _, err := os.Stat(root + "/hole"); c.want != "" && err == nil {
				t.Error("the file was made")
			}
		})
	}
}
