package logsink

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"
)

// maxLine is how many bytes of a line go into one entry, as with Docker and the CRI: a longer one is written in parts.
const maxLine = 16 << 10

// batch is how many bytes of frames are made before they are written.
const batch = 128 << 10

// frame is one entry in a batch.
type frame struct {
	end  int  // where it ends in the batch
	raw  int  // how much of the stream it is made of
	note bool // it tells of what was lost before, and is made of nothing
}

// frames is a batch that is being made.
type frames struct {
	format Format
	stream string
	stamp  string
	out    []byte
	list   []frame
}

func (f *frames) reset(format Format, stream string, at time.Time) {
	f.format, f.stream, f.stamp = format, stream, at.UTC().Format(time.RFC3339Nano)
	f.out, f.list = f.out[:0], f.list[:0]
}

// fill makes entries of data until the batch is full, and says how much it used. An unfinished line at the end of data
// is left, unless nothing comes after it.
func (f *frames) fill(data []byte, last bool) (used int) {
	for used < len(data) && len(f.out) < batch {
		rest := data[used:]
		n, whole := cut(rest, last)
		if n == 0 {
			break
		}
		f.add(rest[:n], !whole)
		f.list = append(f.list, frame{end: len(f.out), raw: n})
		used += n
	}
	return used
}

// cut says how many bytes of data are the next entry (0: its end is not here yet), and whether the line ends with it.
func cut(data []byte, last bool) (n int, whole bool) {
	window := data[:min(len(data), maxLine+1)]
	if i := bytes.IndexByte(window, '\n'); i >= 0 {
		return i + 1, true
	}
	if len(window) <= maxLine {
		if last {
			return len(window), true
		}
		return 0, false
	}
	n = maxLine
	for back := 1; back < utf8.UTFMax; back++ { // not through the middle of a character
		if c := data[n-back]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRune(data[n-back:n]) {
				n -= back
			}
			break
		}
	}
	return n, false
}

// note makes an entry of our own.
func (f *frames) note(text string) {
	f.add([]byte(text+"\n"), false)
	f.list = append(f.list, frame{end: len(f.out), note: true})
}

func (f *frames) add(line []byte, partial bool) {
	if f.format == JSON {
		f.out = append(f.out, `{"log":"`...)
		f.out = appendJSON(f.out, line)
		f.out = append(f.out, `","stream":"`...)
		f.out = append(f.out, f.stream...)
		f.out = append(f.out, `","time":"`...)
		f.out = append(f.out, f.stamp...)
		f.out = append(f.out, "\"}\n"...)
		return
	}
	f.out = append(f.out, f.stamp...)
	f.out = append(f.out, ' ')
	f.out = append(f.out, f.stream...)
	if partial {
		f.out = append(f.out, " P "...)
	} else {
		f.out = append(f.out, " F "...)
	}
	f.out = append(f.out, bytes.TrimSuffix(line, []byte("\n"))...)
	f.out = append(f.out, '\n')
}

const hex = "0123456789abcdef"

// appendJSON appends the inside of a JSON string. Bytes that are no UTF-8 become U+FFFD: the format has no way to carry
// them.
func appendJSON(out, s []byte) []byte {
	from := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&' {
			i++
			continue
		}
		size := 1
		if c >= utf8.RuneSelf {
			var r rune
			r, size = utf8.DecodeRune(s[i:])
			if r != '\u2028' && r != '\u2029' && (r != utf8.RuneError || size > 1) {
				i += size
				continue
			}
			out = append(out, s[from:i]...)
			switch r {
			case '\u2028':
				out = append(out, `\u2028`...)
			case '\u2029':
				out = append(out, `\u2029`...)
			default:
				out = append(out, `\ufffd`...)
			}
		} else {
			out = append(out, s[from:i]...)
			switch c {
			case '"', '\\':
				out = append(out, '\\', c)
			case '\n':
				out = append(out, '\\', 'n')
			case '\r':
				out = append(out, '\\', 'r')
			case '\t':
				out = append(out, '\\', 't')
			default:
				out = append(out, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			}
		}
		i += size
		from = i
	}
	return append(out, s[from:]...)
}

// Entry is one entry of a log.
type Entry struct {
	Time    time.Time // zero for a line that is not of the log's format
	Stream  string    // "stdout" or "stderr"; empty for a line that is not of the log's format
	Line    []byte    // with its newline, if it has one
	Partial bool      // the line goes on in the next entry of its stream
}

// parse reads one line of a log, without its newline. What is not of the format is given as it is.
func parse(format Format, line []byte) Entry {
	if format == JSON {
		var v struct {
			Log    string    `json:"log"`
			Stream string    `json:"stream"`
			Time   time.Time `json:"time"`
		}
		if err := json.Unmarshal(line, &v); err != nil {
			return foreign(line)
		}
		// The format has no mark for it but the missing newline, and that the entry is as long as one can be.
		partial := !strings.HasSuffix(v.Log, "\n") && len(v.Log) > maxLine-utf8.UTFMax
		return Entry{Time: v.Time, Stream: v.Stream, Line: []byte(v.Log), Partial: partial}
	}
	parts := bytes.SplitN(line, []byte(" "), 4)
	if len(parts) < 4 {
		return foreign(line)
	}
	at, err := time.Parse(time.RFC3339Nano, string(parts[0]))
	tag, _, _ := bytes.Cut(parts[2], []byte(":"))
	if err != nil || string(tag) != "F" && string(tag) != "P" {
		return foreign(line)
	}
	e := Entry{Time: at, Stream: string(parts[1]), Line: bytes.Clone(parts[3]), Partial: string(tag) == "P"}
	if !e.Partial {
		e.Line = append(e.Line, '\n')
	}
	return e
}

func foreign(line []byte) Entry { return Entry{Line: append(bytes.Clone(line), '\n')} }
