package service_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"

	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/ledger"
)

// TestExitFullDisk: exits that cannot be written down, because there is no room, are when there is, and nobody is told before.
func TestExitFullDisk(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	t.Setenv("TMPDIR", small)
	f := running(t, "full", nil)
	path := fmt.Sprintf("/proc/%d/root/dev/gate", f.state("").Pid)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	gate, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = gate.Close() }()
	const execs = 40 // more than there is room for at the end of the ledger's last page
	for i := range execs {
		id := fmt.Sprint("e", i)
		if err := f.exec(id, nil, "sh", "-c", fmt.Sprintf("read x </dev/gate; exit %d", i)); err != nil {
			t.Fatal(err)
		}
		f.start(id)
	}
	filler, err := os.Create(filepath.Join(small, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = filler.Close() }()
	for page := make([]byte, 4096); err == nil; {
		_, err = filler.Write(page)
	}
	if _, err := gate.WriteString(strings.Repeat("\n", execs)); err != nil {
		t.Fatal(err)
	}
	told := make(chan error, execs)
	for i := range execs {
		go func() {
			r, err := f.Wait(ctx, &task.WaitRequest{ID: "full", ExecID: fmt.Sprint("e", i)})
			if err == nil && r.ExitStatus != uint32(i) {
				err = fmt.Errorf("status %d, not %d", r.ExitStatus, i)
			}
			told <- err
		}()
	}
	written := func() (n int) {
		records, err := ledger.Read(filepath.Join(f.dir, shimapi.LedgerFile))
		if err != nil {
			t.Error(err)
		}
		for _, r := range records {
			if r.Exit != nil {
				n++
			}
		}
		return n
	}
	until(t, "all have ended", func() bool {
		for i := range execs {
			pid := f.state(fmt.Sprint("e", i)).Pid
			if err := unix.Kill(int(pid), 0); err == nil {
				return false
			}
		}
		return true
	})
	n := written()
	if n >= execs {
		t.Errorf("%d exits are written down, though there is no room", n)
	}
	if err := filler.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for range execs {
		select {
		case err := <-told:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("nobody is told")
		}
	}
	if n := written(); n != execs {
		t.Errorf("%d exits of %d are written down", n, execs)
	}
}
