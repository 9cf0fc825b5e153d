package boot

import (
	"bytes"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
)

// FuzzCommandLine: a command line, one argument a line, is refused or names a container whose name is no path.
func FuzzCommandLine(f *testing.F) {
	for _, line := range []string{
		"", "start", "-namespace n -id i start", "-namespace n -id i -bundle /b -debug serve", "-namespace=n -id=i delete", "-namespace n -id ../i start",
		"-namespace . -id i start", "-id i -namespace n start more", "-id i -namespace", "--", "-- start", "-v", "-info", "-debug=maybe start",
	} {
		f.Add(strings.ReplaceAll(line, " ", "\n"))
	}
	f.Fuzz(func(t *testing.T, lines string) {
		if strings.ContainsRune(lines, 0) {
			return // execve(2) cannot carry it
		}
		a, err := parse(strings.Split(lines, "\n"), io.Discard)
		if err != nil || a.version || a.info {
			return
		}
		for _, name := range []string{a.namespace, a.id} {
			if dir := filepath.Dir(filepath.Join("/x", name)); dir != "/x" || name == "" {
				t.Errorf("%q is taken for a name", name)
			}
		}
		if !filepath.IsAbs(a.bundle) || a.verb == "" {
			t.Errorf("%+v", a)
		}
	})
}

// FuzzInfo: what containerd writes to -info is an Any, which comes back in the answer, or is refused; nothing is printed
// then.
func FuzzInfo(f *testing.F) {
	opts, err := typeurl.MarshalAnyToProto(&options.Options{SystemdCgroup: true, BinaryName: "x"})
	if err != nil {
		f.Fatal(err)
	}
	seed, err := proto.Marshal(opts)
	if err != nil {
		f.Fatal(err)
	}
	for _, in := range [][]byte{nil, seed, seed[:len(seed)/2], {0xff}, []byte("{}"), append([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f}, seed...)} {
		f.Add(in)
	}
	f.Setenv("PATH", f.TempDir()) // so that no name in the options is a program that would be run
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		if err := info(bytes.NewReader(in), &out); err != nil {
			if out.Len() > 0 {
				t.Errorf("%d bytes beside %v", out.Len(), err)
			}
			return
		}
		about := &types.RuntimeInfo{}
		if err := proto.Unmarshal(out.Bytes(), about); err != nil || about.Name != runtimeName || (about.Options != nil) != (len(in) > 0) {
			t.Errorf("%v, %v", about, err)
		}
	})
}
