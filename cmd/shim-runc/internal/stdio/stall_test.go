package stdio

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStalledTerminal: a client that stops reading a terminal's output stops that, is told of, and gets all of it when it
// goes on.
func TestStalledTerminal(t *testing.T) {
	dir, cfg := mkfifos(t)
	cfg.Terminal, cfg.Stdin = true, ""
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	client, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	master, slave := openPTY(t)
	if err := s.SetConsole(master); err != nil {
		t.Fatal(err)
	}
	const lines = 100000
	written := make(chan error, 1)
	go func() {
		_, err := slave.WriteString(numbers(lines))
		written <- err
		_ = slave.Close()
	}()
	until(t, "it is said that the client does not read", func() bool { return s.Outputs()[0].Waiting == unreadClient })
	time.Sleep(10 * time.Millisecond)
	got, err := io.ReadAll(client)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.ReplaceAll(numbers(lines), "\n", "\r\n"); !bytes.Equal(got, []byte(want)) {
		t.Errorf("%d bytes of %d", len(got), len(want))
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}
