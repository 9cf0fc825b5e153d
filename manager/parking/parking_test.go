package parking

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/shimapi/parking"
)

func open(t *testing.T) *Lot {
	t.Helper()
	l, err := Open(filepath.Join(t.TempDir(), parking.SocketName), nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// shim is a connection by which one parks.
func shim(t *testing.T, l *Lot) *net.UnixConn {
	t.Helper()
	c, err := parking.Dial(context.Background(), l.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// file has a text to be known by.
func file(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func park(t *testing.T, c *net.UnixConn, p *shimstate.Parcel, texts ...string) {
	t.Helper()
	p.Namespace, p.ContainerId = "ns", "c"
	var files []*os.File
	for _, text := range texts {
		files = append(files, file(t, text))
	}
	if err := parking.Send(c, p, files); err != nil {
		t.Fatal(err)
	}
}

// handed gives what a successor gets: EXEC/KIND=TEXT, sorted.
func handed(t *testing.T, l *Lot, id string) (all []string) {
	t.Helper()
	ours, theirs, err := parking.Pair()
	if err != nil {
		t.Fatal(err)
	}
	c, err := parking.Conn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := errors.Join(l.HandOver(ours, "ns", id), ours.Close()); err != nil {
		t.Fatal(err)
	}
	for {
		p, files, err := parking.Receive(c)
		if errors.Is(err, io.EOF) {
			slices.Sort(all)
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		text := make([]byte, 100)
		n, err := files[0].ReadAt(text, 0)
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		_ = files[0].Close()
		all = append(all, fmt.Sprintf("%s/%s=%s", p.ExecId, p.Kinds[0], text[:n]))
	}
}

func expect(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("handed over: %q, not %q", got, want)
	}
}

// TestHandOver: what a shim parked is its successor's, the newest of each kind, without what it dropped.
func TestHandOver(t *testing.T) {
	l := open(t)
	c := shim(t, l)
	park(t, c, &shimstate.Parcel{Kinds: []string{parking.Pidfd, parking.Stdout}}, "p1", "o1")
	park(t, c, &shimstate.Parcel{ExecId: "e", Kinds: []string{parking.Pidfd}}, "pe")
	park(t, c, &shimstate.Parcel{Kinds: []string{parking.Stdout}}, "o2")
	park(t, c, &shimstate.Parcel{ExecId: "e", Drop: []string{parking.Pidfd}})
	park(t, c, &shimstate.Parcel{ExecId: "f", Kinds: []string{parking.Terminal}}, "tf")
	_ = c.Close()
	want := []string{"/pidfd=p1", "/stdout=o2", "f/terminal=tf"}
	expect(t, handed(t, l, "c"), want...)
	expect(t, handed(t, l, "c"), want...) // it is kept: the successor may die as well
	expect(t, handed(t, l, "another"))
	l.Drop("ns", "c")
	expect(t, handed(t, l, "c"))
}

// TestLast: what a shim sent in the moment before it died counts, however far the lot has got with it.
func TestLast(t *testing.T) {
	l := open(t)
	for i := range 200 {
		c := shim(t, l)
		park(t, c, &shimstate.Parcel{Whole: true, Kinds: []string{parking.Pidfd}}, fmt.Sprint(i))
		park(t, c, &shimstate.Parcel{ExecId: "e", Kinds: []string{parking.Pidfd}}, fmt.Sprint("e", i))
		if i%2 > 0 {
			_ = shim(t, l) // another one lives: nobody waits for that
		}
		_ = c.Close()
		expect(t, handed(t, l, "c"), fmt.Sprint("/pidfd=", i), fmt.Sprint("e/pidfd=e", i))
	}
}
