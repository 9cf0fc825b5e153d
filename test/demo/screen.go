package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// screen writes what is shown: numbered steps, commands as one would type them, their output, and what it proves.
type screen struct {
	w      io.Writer
	colour bool
	steps  int
	checks int
}

func newScreen(w io.Writer, colour bool) *screen { return &screen{w: w, colour: colour} }

// colours says whether to use them: on a terminal, unless NO_COLOR is set (no-color.org).
func colours(f *os.File) bool {
	return term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// Colours, of which each has one meaning (ECMA-48, SGR).
const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (s *screen) paint(sgr, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + sgr + "m" + text + "\x1b[0m"
}

func (s *screen) line(format string, args ...any) {
	fmt.Fprintf(s.w, format+"\n", args...) //nolint:errcheck // a screen that is gone is no reason to stop the cleaning up
}

func (s *screen) title(first, second string) {
	s.line("\n%s\n%s", s.paint(bold, first), s.paint(faint, second))
}

// step begins the next part; about says in a sentence or two what will be seen.
func (s *screen) step(name, about string) {
	s.steps++
	s.line("\n%s", s.paint(bold, fmt.Sprintf("%d. %s", s.steps, name)))
	for _, l := range wrap(about, 96) {
		s.line("   %s", l)
	}
}

// command shows a command line.
func (s *screen) command(line string) { s.line("   %s %s", s.paint(faint, "$"), s.paint(cyan, line)) }

// output shows what a command printed; of much the middle is left out.
func (s *screen) output(text string) {
	const most = 16
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) == 1 && lines[0] == "" {
		return
	}
	if len(lines) > most {
		left := len(lines) - (most - 1)
		lines = append(append(lines[:most-4:most-4], fmt.Sprintf("… %d more lines …", left)), lines[len(lines)-3:]...)
	}
	for _, l := range lines {
		s.line("   %s %s", s.paint(faint, "│"), strings.ReplaceAll(strings.TrimRight(l, " \r"), "\t", "    "))
	}
}

// note says something that is no proof.
func (s *screen) note(format string, args ...any) {
	for i, l := range wrap(fmt.Sprintf(format, args...), 94) {
		mark := "·"
		if i > 0 {
			mark = " "
		}
		s.line("   %s %s", s.paint(faint, mark), l)
	}
}

// proves says what has just been checked.
func (s *screen) proves(format string, args ...any) {
	s.checks++
	for i, l := range wrap(fmt.Sprintf(format, args...), 94) {
		mark := s.paint(green, "✓")
		if i > 0 {
			mark = " "
		}
		s.line("   %s %s", mark, l)
	}
}

func (s *screen) failed(err error) {
	for i, l := range strings.Split(err.Error(), "\n") {
		mark := s.paint(red, "✗")
		if i > 0 {
			mark = " "
		}
		s.line("   %s %s", mark, l)
	}
}

func (s *screen) end(took time.Duration) {
	s.line("\n%s", s.paint(bold, fmt.Sprintf("All %d checks held, in %.1f s. Nothing is left: no process, mount, cgroup or file.", s.checks, took.Seconds())))
}

// wrap breaks text into lines of at most width columns, at spaces.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len([]rune(line))+1+len([]rune(word)) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	if line != "" {
		lines = append(lines, line)
	}
	return lines
}
