// Package table prints rows, as ctr prints them or as JSON. It knows no row's meaning.
package table

import (
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
)

// Format is how to print.
type Format string

// The formats.
const (
	Text Format = "table"
	JSON Format = "json"
)

// ParseFormat reads the value of a flag.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case Text, JSON:
		return f, nil
	}
	return "", fmt.Errorf("output format %q is neither table nor json", s)
}

// Column is a title and what stands below it for a row.
type Column[T any] struct {
	Title string
	Cell  func(T) string
}

// Table is what rows of a kind look like.
type Table[T any] struct {
	Columns []Column[T]
	Wide    bool // four blanks between columns instead of one, where ctr has them
}

// Print writes rows: as a table, or as a JSON array of the rows themselves, whose fields need json tags. No rows are a
// line of titles, or an empty array.
func (t Table[T]) Print(w io.Writer, f Format, rows []T) error {
	if f == JSON {
		if rows == nil {
			rows = []T{}
		}
		return PrintJSON(w, rows)
	}
	// ctr's widths, so that scripts which cut columns go on working.
	tw := tabwriter.NewWriter(w, 1, 8, 1, ' ', 0)
	if t.Wide {
		tw = tabwriter.NewWriter(w, 4, 8, 4, ' ', 0)
	}
	cells := make([]string, len(t.Columns))
	for i, c := range t.Columns {
		cells[i] = c.Title
	}
	_, _ = fmt.Fprintln(tw, strings.Join(cells, "\t")+"\t") // what fails, Flush tells
	for _, r := range rows {
		for i, c := range t.Columns {
			cells[i] = c.Cell(r)
		}
		_, _ = fmt.Fprintln(tw, strings.Join(cells, "\t")+"\t")
	}
	return tw.Flush()
}

// PrintJSON writes v indented, as ctr does.
func PrintJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}

// Bytes is a number of bytes for people: 2.0 MiB.
func Bytes(n int64) string {
	return units.CustomSize("%.1f %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"})
}

// Labels are sorted and joined by commas; none are "none".
func Labels(m map[string]string, none string) string {
	if len(m) == 0 {
		return none
	}
	all := make([]string, 0, len(m))
	for k, v := range m {
		all = append(all, k+"="+v)
	}
	sort.Strings(all)
	return strings.Join(all, ",")
}
