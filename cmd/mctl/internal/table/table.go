// Package table prints rows, as ctr prints them or as JSON. It knows no row's meaning.
package table

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
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

// Print writes rows: a table with these columns, or a JSON array of the rows themselves, whose fields need json tags. No
// rows are a line of titles, or an empty array.
func Print[T any](w io.Writer, f Format, columns []Column[T], rows []T) error {
	if f == JSON {
		if rows == nil {
			rows = []T{}
		}
		return PrintJSON(w, rows)
	}
	// ctr's widths, so that scripts which cut columns go on working.
	t := tabwriter.NewWriter(w, 1, 8, 1, ' ', 0)
	cells := make([]string, len(columns))
	for i, c := range columns {
		cells[i] = c.Title
	}
	_, _ = fmt.Fprintln(t, strings.Join(cells, "\t")+"\t") // what fails, Flush tells
	for _, r := range rows {
		for i, c := range columns {
			cells[i] = c.Cell(r)
		}
		_, _ = fmt.Fprintln(t, strings.Join(cells, "\t")+"\t")
	}
	return t.Flush()
}

// PrintJSON writes v indented, as ctr does.
func PrintJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}
