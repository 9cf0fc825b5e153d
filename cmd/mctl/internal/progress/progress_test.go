package progress

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/transfer"
)

func layer(n int, event string, progress int64) *transfer.Progress {
	return &transfer.Progress{Event: event, Name: fmt.Sprintf("layer-sha256:%064d", n), Parents: []string{"manifest"}, Progress: progress, Total: 100 << 20}
}

// TestPlain: where there is no terminal, every step and every blob that is done is a line, once.
func TestPlain(t *testing.T) {
	var out bytes.Buffer
	d := New(&out, nil)
	for _, p := range []*transfer.Progress{
		{Event: "Pulling from X"}, layer(1, "waiting", 0), layer(2, "waiting", 0), {Event: "fetching image content", Name: "image"},
		layer(1, "downloading", 5), layer(1, "downloading", 6), layer(2, "already exists", 100<<20), layer(1, "complete", 100<<20), layer(1, "complete", 100<<20),
		{Event: "Completed pull"},
	} {
		d.Tell(p)
	}
	d.Close()
	want := "Pulling from X\nlayer-000000000000: already exists (100MiB)\nlayer-000000000000: complete (100MiB)\nCompleted pull\n"
	if out.String() != want {
		t.Errorf("%s", out.String())
	}
}

// TestTerminal: however many layers there are, what is drawn fits, and is drawn over what was there.
func TestTerminal(t *testing.T) {
	for _, c := range []struct{ layers, width, height int }{{3, 80, 24}, {50, 80, 24}, {50, 30, 5}, {50, 200, 60}, {0, 80, 24}, {50, 0, 0}} {
		d := &Display{out: &bytes.Buffer{}, known: map[string]*transfer.Progress{}, first: map[string]int64{}}
		d.size = func() (int, int, error) { return c.width, c.height, nil }
		width, height := c.width, c.height
		if width == 0 {
			width, height = 80, 24
		}
		for round := range 3 {
			for i := range c.layers {
				d.Tell(layer(i, []string{"waiting", "downloading", "downloading"}[round], int64(round)<<20))
			}
			var out bytes.Buffer
			d.out = &out
			before := d.drawn
			d.drawLocked(false)
			if d.drawn >= height {
				t.Errorf("%+v: %d lines", c, d.drawn)
			}
			if up := fmt.Sprintf("\x1b[%dA", before); before > 0 && !strings.HasPrefix(out.String(), up) {
				t.Errorf("%+v: it is not drawn over %d lines: %q", c, before, out.String())
			}
			for _, l := range strings.Split(out.String(), "\n") {
				if text := strings.NewReplacer("\r", "", "\x1b[2K", "", "\x1b[J", "", fmt.Sprintf("\x1b[%dA", before), "").Replace(l); len([]rune(text)) >= width {
					t.Errorf("%+v: a line of %d characters: %q", c, len([]rune(text)), text)
				}
			}
		}
	}
}

// TestHeading: what was there before does not count as speed, and all as done.
func TestHeading(t *testing.T) {
	d := &Display{known: map[string]*transfer.Progress{}, first: map[string]int64{}}
	d.size = func() (int, int, error) { return 80, 24, nil }
	d.Tell(layer(1, "waiting", 0))
	d.Tell(layer(1, "downloading", 90<<20))
	d.Tell(layer(1, "extracted", 100<<20))
	d.Tell(layer(2, "already exists", 100<<20))
	d.Tell(layer(3, "downloading", 0))
	if got := d.lines(80, 24, true)[1]; !strings.HasPrefix(got, "2 of 3 done, 200MiB of 300MiB, ") {
		t.Errorf("%q", got)
	}
}
