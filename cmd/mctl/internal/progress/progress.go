// Package progress shows how far a transfer is: on a terminal as a table that is drawn anew and never larger than the
// terminal, elsewhere as a line for each blob that is done.
package progress

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types/transfer"
	"github.com/docker/go-units"
)

// Display shows one transfer.
type Display struct {
	out  io.Writer
	size func() (width, height int, err error) // nil: no terminal

	mu     sync.Mutex
	status string
	blobs  []*transfer.Progress
	known  map[string]*transfer.Progress
	began  time.Time
	first  map[string]int64 // what of a blob was there when it was first seen: that did not come now
	drawn  int              // lines on the terminal
	stop   chan struct{}
	done   chan struct{}
}

// frame is how often a terminal is drawn anew.
const frame = 100 * time.Millisecond

// New shows on out, a terminal of that size, or with a nil size something else. Close ends it.
func New(out io.Writer, size func() (width, height int, err error)) *Display {
	d := &Display{out: out, size: size, known: map[string]*transfer.Progress{}, first: map[string]int64{}, began: time.Now(), stop: make(chan struct{}), done: make(chan struct{})}
	if size == nil {
		close(d.done)
		return d
	}
	go func() {
		defer close(d.done)
		t := time.NewTicker(frame)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				d.mu.Lock()
				d.drawLocked(false)
				d.mu.Unlock()
			case <-d.stop:
				return
			}
		}
	}()
	return d
}

// Tell is told of a step.
func (d *Display) Tell(p *transfer.Progress) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.Name == "" || len(p.Parents) == 0 {
		if p.Name == "" {
			d.status = p.Event
		}
		if d.size == nil && p.Name == "" {
			d.line(p.Event)
		}
		return
	}
	before := d.known[p.Name]
	if before == nil {
		d.blobs = append(d.blobs, p)
		d.first[p.Name] = p.Progress
	} else {
		for i, b := range d.blobs {
			if b == before {
				d.blobs[i] = p
			}
		}
		if before.Event == "waiting" {
			d.first[p.Name] = p.Progress
		}
	}
	d.known[p.Name] = p
	if d.size == nil && over(p.Event) && (before == nil || before.Event != p.Event) {
		d.line(fmt.Sprintf("%s: %s (%s)", short(p.Name), p.Event, human(p.Total)))
	}
}

func (d *Display) line(text string) { _, _ = fmt.Fprintln(d.out, text) }

// Close shows the last of it.
func (d *Display) Close() {
	if d.size == nil {
		return
	}
	close(d.stop)
	<-d.done
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drawLocked(true)
}

// over tells whether nothing more comes of a blob, as far as this event says.
func over(event string) bool {
	switch event {
	case "complete", "already exists", "extracted":
		return true
	}
	return false
}

// drawLocked draws all of it over what was drawn before.
func (d *Display) drawLocked(last bool) {
	width, height, err := d.size()
	if err != nil || width < 20 {
		width, height = 80, 24
	}
	lines := d.lines(width, height, last)
	var b strings.Builder
	if d.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", d.drawn)
	}
	for _, l := range lines {
		b.WriteString("\r\x1b[2K" + clip(l, width-1) + "\n")
	}
	b.WriteString("\x1b[J") // what was longer before
	d.drawn = len(lines)
	_, _ = io.WriteString(d.out, b.String())
}

// lines are what a terminal of this size shows: a heading, and of the blobs those that are under way, as many as fit.
func (d *Display) lines(width, height int, last bool) []string {
	var have, total, came int64
	var active []*transfer.Progress
	ready, waiting := 0, 0
	for _, b := range d.blobs {
		total += b.Total
		have += b.Progress
		if b.Event != "already exists" {
			came += b.Progress - d.first[b.Name]
		}
		switch {
		case over(b.Event):
			ready++
		case b.Event == "waiting":
			waiting++
		default:
			active = append(active, b)
		}
	}
	out := []string{d.status}
	if len(d.blobs) > 0 {
		line := fmt.Sprintf("%d of %d done, %s of %s", ready, len(d.blobs), human(have), human(total))
		if took := time.Since(d.began); took > time.Second {
			line += fmt.Sprintf(", %s/s", human(int64(float64(came)/took.Seconds())))
		}
		out = append(out, line)
	}
	if last {
		return out
	}
	room := max(height-len(out)-2, 1)
	for i, b := range active {
		if i == room {
			out = append(out, fmt.Sprintf("... and %d more under way, %d waiting", len(active)-i, waiting))
			return out
		}
		out = append(out, row(b, width))
	}
	if waiting > 0 {
		out = append(out, fmt.Sprintf("... %d waiting", waiting))
	}
	return out
}

// row is one blob.
func row(p *transfer.Progress, width int) string {
	const fixed = 20 + 2 + 12 + 2 + 20
	left := fmt.Sprintf("%-20s  %-12s", short(p.Name), p.Event)
	right := fmt.Sprintf("%s/%s", human(p.Progress), human(p.Total))
	room := min(width-fixed-4, 40)
	if room < 5 || p.Total <= 0 {
		return left + "  " + right
	}
	full := int(int64(room) * min(p.Progress, p.Total) / p.Total)
	return fmt.Sprintf("%s  [%s%s] %s", left, strings.Repeat("=", full), strings.Repeat(" ", room-full), right)
}

// short is a name with twelve digits of its digest.
func short(name string) string {
	kind, digits, ok := strings.Cut(name, "-sha256:")
	if !ok || len(digits) < 12 {
		return name
	}
	return kind + "-" + digits[:12]
}

func human(n int64) string { return units.BytesSize(float64(n)) }

// clip cuts a line to n characters: a terminal would fold it, and the next drawing would be off.
func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n])
	}
	return s
}
