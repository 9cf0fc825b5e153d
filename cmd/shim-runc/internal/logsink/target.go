// Package logsink writes a process's output into log files: Docker's json-file format or the Kubernetes CRI format, with
// rotation, and reads them again. It knows files and pipes, not containers.
//
// One Log is a file with its rotated predecessors; the one or two streams that go into it take turns. Each has a spool
// in between, a file in the bundle:
//
//	container ── FIFO ──splice──▶ spool ──frames──▶ log
//
// Whoever writes may be killed between any two instructions, and another process (a successor) opens the same Log and
// goes on without a byte lost or doubled, as long as the machine runs:
//
//   - splice(2) takes bytes off the FIFO and makes the spool longer by them in one call, which a signal can shorten but
//     not divide. The length of the spool is how much was ever taken; what is in the log is punched out of it.
//   - After each write to the log one small record, in one pwrite(2), says which file it is, how long it is, and how much of
//     each spool is in it. What a log has beyond that length was written by somebody who did not live to say so: the
//     successor cuts it off, and frames the same bytes of the spool again.
//     A log of raw output has no entries that could be cut off, and others may append to it too: there the successor looks
//     whether what it has beyond that length is what comes next in a spool, and takes it as written then.
//   - A file is rotated only when all of it is recorded. A successor that finds another file than the recorded one, or
//     none, was left in the middle of that, and begins where the new file ends.
//
// A line that has no end yet stays in the spool until its end comes, or the stream's. Nothing that is written is synced
// to the disk: like every log, it is the page cache's after a power cut.
//
// A terminal has no FIFO, and what was read of it is in memory for a moment. So no more is read than goes into the
// spool at once.
package logsink

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Format is how a line of output is written in a log.
type Format string

// The formats, named as the schemes of log URIs.
const (
	JSON Format = "json-file" // {"log":"text\n","stream":"stdout","time":"RFC3339Nano"}
	CRI  Format = "cri"       // RFC3339Nano stdout F text
)

// Raw is output as it is. It has no URI of this package: whoever opens such a log names the file.
const Raw Format = "file"

// Target is what a log URI says.
type Target struct {
	Format  Format
	Path    string // absolute
	MaxSize int64  // bytes in one file; 0: it grows without end, and is not rotated
	MaxFile int    // files in all, with the one that is written; at least 1
	Drop    bool   // when there is no room output is dropped and counted, instead of blocking the writer
	Newest  int64  // of output that comes faster only so many bytes are kept, the rest is counted; 0: all are
}

// defaultFiles is how many files a log with a max-size has, unless it says.
const defaultFiles = 5

// Known says whether a URI's scheme is one of the formats.
func Known(scheme string) bool { return Format(scheme) == JSON || Format(scheme) == CRI }

// Parse reads a log URI whose scheme is Known: json-file:///path?max-size=10m&max-file=3&full=drop. Errors are InvalidArgument.
func Parse(u *url.URL) (Target, error) {
	t := Target{Format: Format(u.Scheme), Path: u.Path, MaxFile: 1}
	if u.Host != "" || !filepath.IsAbs(u.Path) || strings.HasSuffix(u.Path, "/") {
		return t, fmt.Errorf("not an absolute path of a file, write %s:///path: %w", u.Scheme, errdefs.ErrInvalidArgument)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return t, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	files := 0
	for key, values := range query {
		value := values[len(values)-1]
		switch key {
		case "max-size":
			t.MaxSize, err = size(value)
		case "max-file":
			if files, err = strconv.Atoi(value); err == nil && (files < 1 || files > 1000) {
				err = fmt.Errorf("%q is not a number from 1 to 1000", value)
			}
		case "full":
			if t.Drop = value == "drop"; !t.Drop && value != "block" {
				err = fmt.Errorf("%q is neither block nor drop", value)
			}
		default:
			err = fmt.Errorf("no such parameter, there are max-size, max-file and full")
		}
		if err != nil {
			return t, fmt.Errorf("parameter %s: %w: %w", key, err, errdefs.ErrInvalidArgument)
		}
	}
	switch {
	case files > 0 && t.MaxSize == 0:
		return t, fmt.Errorf("parameter max-file needs max-size, or nothing is ever rotated: %w", errdefs.ErrInvalidArgument)
	case files > 0:
		t.MaxFile = files
	case t.MaxSize > 0:
		t.MaxFile = defaultFiles
	}
	return t, nil
}

// size reads a number of bytes: 1048576, 1024k, 1m. A "b" may follow the unit.
func size(s string) (int64, error) {
	digits := strings.TrimSuffix(strings.ToLower(s), "b")
	unit := int64(1)
	for suffix, u := range map[string]int64{"k": 1 << 10, "m": 1 << 20, "g": 1 << 30} {
		if d, ok := strings.CutSuffix(digits, suffix); ok {
			digits, unit = d, u
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 || n > 1<<50/unit {
		return 0, fmt.Errorf("%q is not a size, write for example 10m", s)
	}
	return n * unit, nil
}
