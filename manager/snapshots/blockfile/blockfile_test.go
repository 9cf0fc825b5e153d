package blockfile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestScratch(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	_, err := New(root, Options{FSType: "ext4"})
	if !errors.Is(err, errdefs.ErrNotImplemented) || !strings.Contains(err.Error(), "scratch_file") {
		t.Errorf("without a scratch: %v", err)
	}
	if _, err := os.Stat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the root was made: %v", err)
	}
	scratch := filepath.Join(dir, "scratch.img")
	if _, err := New(root, Options{Scratch: scratch}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), scratch) {
		t.Errorf("a scratch that is not there: %v", err)
	}
	if _, err := New(root, Options{Scratch: dir}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a directory: %v", err)
	}
	open := func(o Options, want string) {
		t.Helper()
		b, err := New(root, o)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(b.scratch); err != nil || string(got) != want {
			t.Errorf("the scratch is %q, %v; want %q", got, err, want)
		}
	}
	for _, body := range []string{"one", "two"} {
		if err := os.WriteFile(scratch, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		open(Options{Scratch: scratch}, "one")
	}
	open(Options{}, "one") // it has its copy
	open(Options{Scratch: scratch, Recreate: true}, "two")
}

// TestCopy: holes stay holes, in whichever way the data is copied.
func TestCopy(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	in, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	const size = 64 << 20
	for _, at := range []int64{0, 5 << 20, size - 4096} {
		if _, err := in.WriteAt(bytes.Repeat([]byte{byte(at>>20) + 1}, 4096), at); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := copyFile(dst, src); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dst)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs (%v)", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dst, &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("12 KiB of data take %d bytes (%v)", st.Blocks*512, err)
	}
	out, err := os.Create(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	if err := readWrite(out, in, 0, size); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was read and written differs (%v)", err)
	}
	if err := copyFile(dst, filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
}
