package chaos

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// sinks are the ways in which output is kept, by the scheme of their URI.
var sinks = []string{"file", "json-file", "cri"}

// line takes one line of a sink apart.
func line(scheme, text string) (string, error) {
	switch scheme {
	case "json-file":
		var l struct{ Log string }
		err := json.Unmarshal([]byte(text), &l)
		return strings.TrimSuffix(l.Log, "\n"), err
	case "cri":
		f := strings.SplitN(text, " ", 4)
		if len(f) != 4 || f[2] != "F" {
			return "", fmt.Errorf("no whole line of a CRI log: %q", text)
		}
		return f[3], nil
	}
	return text, nil
}

// count reads numbered lines, each of which must be there once and in order, and behind them a line "end", at which it calls
// last.
func count(scheme string, r io.Reader, last func()) (n int, ended bool, err error) {
	s := bufio.NewScanner(r)
	for ; s.Scan(); n++ {
		got, err := line(scheme, s.Text())
		switch {
		case err != nil:
			return n, false, fmt.Errorf("line %d: %w", n, err)
		case ended:
			return n, true, fmt.Errorf("line %d is %q, behind the end", n, got)
		case got == "end":
			ended = true
			n--
			last()
		case got != strconv.Itoa(n):
			return n, false, fmt.Errorf("line %d is %q", n, got)
		}
	}
	return n, ended, s.Err()
}

// countFile is count of a file of a sink.
func countFile(scheme, path string) (int, bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, false, err
	}
	defer func() { _ = f.Close() }()
	n, ended, err := count(scheme, f, func() {})
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return n, ended, err
}

// countRotated is count of a file of a sink and those that were rotated away before.
func countRotated(scheme, path string) (int, bool, error) {
	var all []io.Reader
	for n := 0; ; n++ {
		name := path
		if n > 0 {
			name = fmt.Sprintf("%s.%d", path, n)
		}
		f, err := os.Open(name)
		if n > 0 && errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return 0, false, err
		}
		defer func() { _ = f.Close() }()
		all = append(all, f)
	}
	slices.Reverse(all) // the oldest has the largest number
	n, ended, err := count(scheme, io.MultiReader(all...), func() {})
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return n, ended, err
}

// patient reads a FIFO across the times in which nobody has it open for writing: when shim and daemon are dead at once, the
// client sees an end that is none.
type patient struct {
	f    *os.File
	over atomic.Bool // the next end is one
}

func (p *patient) Read(b []byte) (int, error) {
	for {
		n, err := p.f.Read(b)
		if !errors.Is(err, io.EOF) || p.over.Load() {
			return n, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}
