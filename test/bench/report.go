package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report collects the figures, prints a table per section as it is complete, and writes all of them as JSON at the end.
type report struct {
	w        io.Writer
	began    time.Time
	machine  machine
	sides    []string // with their versions
	sections []*section
}

type machine struct {
	Kernel  string    `json:"kernel"`
	CPUs    int       `json:"cpus"`
	Load    string    `json:"load"` // /proc/loadavg before the measuring
	Began   time.Time `json:"began"`
	Elapsed float64   `json:"elapsed_seconds"`
}

// section is a table.
type section struct {
	title string
	sides []string // instead of the report's
	rows  []*row
}

// row is one kind of figure: as many of each side as there were measured. Those of the same index are a pair.
type row struct {
	name, unit string
	figures    [2][]float64
}

func newReport(w io.Writer) *report {
	load, _ := os.ReadFile("/proc/loadavg")
	now := time.Now()
	return &report{w: w, began: now, machine: machine{
		Kernel: kernel(), CPUs: runtime.NumCPU(), Load: strings.TrimSpace(string(load)), Began: now,
	}}
}

// introduce says what is measured, and where.
func (r *report) introduce(ctx context.Context, sides []*side) {
	for _, s := range sides {
		r.sides = append(r.sides, s.versions(ctx))
	}
	fmt.Fprintf(r.w, "%s\nLinux %s, %d CPUs, load average %s\n", strings.Join(r.sides, "  beside  "), r.machine.Kernel, r.machine.CPUs, r.machine.Load)
	if len(sides) == 2 {
		fmt.Fprintf(r.w, "Medians, (least - most) behind them; both sides measured in turn. ×: the median over pairs of %s / %s.\n", sides[1].name, sides[0].name)
	}
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (r *report) section(title string) *section {
	s := &section{title: title}
	r.sections = append(r.sections, s)
	return s
}

// add notes one figure of one side. Rows are in the order in which they were first named.
func (s *section) add(name, unit string, who int, v float64) {
	i := slices.IndexFunc(s.rows, func(r *row) bool { return r.name == name })
	if i < 0 {
		i = len(s.rows)
		s.rows = append(s.rows, &row{name: name, unit: unit})
	}
	s.rows[i].figures[who] = append(s.rows[i].figures[who], v)
}

// ratios are the pairs', the second side's figure over the first's.
func (r *row) ratios() []float64 {
	var out []float64
	for i := range min(len(r.figures[0]), len(r.figures[1])) {
		if r.figures[0][i] > 0 {
			out = append(out, r.figures[1][i]/r.figures[0][i])
		}
	}
	return out
}

// summary of a series.
type summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

func summarize(v []float64) summary {
	if len(v) == 0 {
		return summary{}
	}
	v = slices.Sorted(slices.Values(v))
	mid := len(v) / 2
	median := v[mid]
	if len(v)%2 == 0 {
		median = (v[mid-1] + v[mid]) / 2
	}
	return summary{Median: median, Min: v[0], Max: v[len(v)-1], N: len(v)}
}

// names of the sides that a section compares.
func (s *section) names(r *report) []string {
	if s.sides != nil {
		return s.sides
	}
	return r.sides
}

// print prints one section.
func (r *report) print(s *section) {
	const label, column = 38, 30
	sides := s.names(r)
	fmt.Fprintf(r.w, "\n%s\n  %-*s", s.title, label, "")
	for _, name := range sides {
		name, _, _ = strings.Cut(name, " ")
		fmt.Fprintf(r.w, "%*s", column, name)
	}
	if len(sides) == 2 {
		fmt.Fprintf(r.w, "%9s", "×")
	}
	fmt.Fprintln(r.w)
	for _, row := range s.rows {
		fmt.Fprintf(r.w, "  %-*s", label, row.name)
		for who := range sides {
			fmt.Fprintf(r.w, "%*s", column, cell(summarize(row.figures[who]), row.unit))
		}
		if len(sides) == 2 {
			fmt.Fprintf(r.w, "%9.2f", summarize(row.ratios()).Median)
		}
		fmt.Fprintln(r.w)
	}
}

// cell is a median with its unit, and the extremes.
func cell(s summary, unit string) string {
	if s.N == 0 {
		return "-"
	}
	form := "%.0f"
	if unit == "ms" {
		form = "%.1f"
	}
	median := strings.TrimSpace(fmt.Sprintf(form+" "+unit, s.Median))
	if s.N == 1 {
		return median
	}
	return fmt.Sprintf("%s %15s", median, fmt.Sprintf("("+form+" - "+form+")", s.Min, s.Max))
}

// finish says how long all took, and writes the file for machines, if one is wanted.
func (r *report) finish(file string) error {
	r.machine.Elapsed = time.Since(r.began).Seconds()
	fmt.Fprintf(r.w, "\nmeasured in %.0f s\n", r.machine.Elapsed)
	if file == "" {
		return nil
	}
	type out struct {
		Name    string      `json:"name"`
		Unit    string      `json:"unit"`
		Sides   []summary   `json:"sides"`
		Ratio   *summary    `json:"ratio,omitempty"` // second side / first side
		Figures [][]float64 `json:"figures"`
	}
	type sec struct {
		Title string   `json:"title"`
		Sides []string `json:"sides,omitempty"` // where they are others
		Rows  []out    `json:"rows"`
	}
	doc := struct {
		Machine  machine  `json:"machine"`
		Sides    []string `json:"sides"`
		Sections []sec    `json:"sections"`
	}{Machine: r.machine, Sides: r.sides}
	for _, s := range r.sections {
		o, sides := sec{Title: s.title, Sides: s.sides}, s.names(r)
		for _, row := range s.rows {
			line := out{Name: row.name, Unit: row.unit}
			for who := range sides {
				line.Sides = append(line.Sides, summarize(row.figures[who]))
				line.Figures = append(line.Figures, row.figures[who])
			}
			if len(sides) == 2 {
				ratio := summarize(row.ratios())
				line.Ratio = &ratio
			}
			o.Rows = append(o.Rows, line)
		}
		doc.Sections = append(doc.Sections, o)
	}
	data, err := json.MarshalIndent(doc, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
