// Package filters is containerd's filter language, with which clients select what a list returns and what a
// subscription delivers. It knows no object: an Adaptor gives it fields.
//
//	filter   := selector ( "," selector )*            all must match
//	selector := field ( "." field )* [ op value ]     without an operator: the field is there
//	op       := "==" | "!=" | "~="                    the last is a regular expression (RE2)
//	field    := letters, digits, '_' and '-', or quoted
//	value    := anything up to a comma or a blank, or quoted
//	quoted   := "..." with Go's escapes; a regular expression also /.../ or |...|, in which only the quote is escaped
//
// Blanks may stand before a field, an operator and a value, and at the end. Of several filters one must match.
package filters

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// Filter selects objects.
type Filter interface{ Match(Adaptor) bool }

// Adaptor gives the fields of an object by their path; false when there is no such field, or it is empty.
type Adaptor interface {
	Field(path []string) (string, bool)
}

// AdapterFunc is a function as an Adaptor.
type AdapterFunc func(path []string) (string, bool)

// Field calls the function.
func (f AdapterFunc) Field(path []string) (string, bool) { return f(path) }

type always struct{}

func (always) Match(Adaptor) bool { return true }

// Always matches everything.
var Always Filter = always{}

type anyOf []Filter

func (a anyOf) Match(o Adaptor) bool {
	for _, f := range a {
		if f.Match(o) {
			return true
		}
	}
	return false
}

type allOf []selector

func (a allOf) Match(o Adaptor) bool {
	for _, s := range a {
		if !s.match(o) {
			return false
		}
	}
	return true
}

type selector struct {
	path  []string
	op    string
	value string
	re    *regexp.Regexp
}

func (s selector) match(o Adaptor) bool {
	v, present := o.Field(s.path)
	switch s.op {
	case "":
		return present
	case "==":
		return present && v == s.value
	case "!=":
		return v != s.value
	default:
		return s.re.MatchString(v)
	}
}

// ParseAll gives the filter that matches what any of ss matches; none of them match everything. The error wraps
// ErrInvalidArgument and says where.
func ParseAll(ss ...string) (Filter, error) {
	if len(ss) == 0 {
		return Always, nil
	}
	var out anyOf
	for _, s := range ss {
		f, err := Parse(s)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	if len(out) == 1 {
		return out[0], nil
	}
	return out, nil
}

// Parse reads one filter; the empty one matches everything.
func Parse(s string) (Filter, error) {
	if strings.TrimSpace(s) == "" {
		return Always, nil
	}
	p := parser{in: s}
	var out allOf
	for {
		sel, err := p.selector()
		if err != nil {
			return nil, fmt.Errorf("filter %q, byte %d: %w: %w", s, p.at, err, errdefs.ErrInvalidArgument)
		}
		out = append(out, sel)
		p.blanks()
		if p.at == len(p.in) {
			return out, nil
		}
		if p.in[p.at] != ',' {
			return nil, fmt.Errorf("filter %q, byte %d: unexpected %q: %w", s, p.at, p.in[p.at], errdefs.ErrInvalidArgument)
		}
		p.at++
	}
}

type parser struct {
	in string
	at int
}

func (p *parser) blanks() {
	p.at = len(p.in) - len(strings.TrimLeftFunc(p.in[p.at:], unicode.IsSpace))
}

func (p *parser) selector() (s selector, err error) {
	p.blanks()
	for {
		f, err := p.field()
		if err != nil {
			return s, err
		}
		s.path = append(s.path, f)
		if p.at < len(p.in) && p.in[p.at] == '.' {
			p.at++
			continue
		}
		break
	}
	p.blanks()
	rest := p.in[p.at:]
	for _, op := range []string{"==", "!=", "~="} {
		if strings.HasPrefix(rest, op) {
			s.op = op
			p.at += len(op)
			break
		}
	}
	if s.op == "" {
		return s, nil
	}
	if s.value, err = p.value(s.op == "~="); err != nil {
		return s, err
	}
	if s.op == "~=" {
		s.re, err = regexp.Compile(s.value)
	}
	return s, err
}

func (p *parser) field() (string, error) {
	if p.at < len(p.in) && p.in[p.at] == '"' {
		return p.quoted()
	}
	begin := p.at
	for p.at < len(p.in) {
		r, n := utf8.DecodeRuneInString(p.in[p.at:])
		if r != '_' && r != '-' && !unicode.IsLetter(r) && !unicode.IsDigit(r) {
			break
		}
		p.at += n
	}
	if p.at == begin {
		return "", fmt.Errorf("expected the name of a field")
	}
	return p.in[begin:p.at], nil
}

func (p *parser) value(re bool) (string, error) {
	p.blanks()
	if p.at == len(p.in) {
		return "", fmt.Errorf("expected a value")
	}
	switch c := p.in[p.at]; {
	case c == '"':
		return p.quoted()
	case re && (c == '/' || c == '|'):
		return p.slashed(c)
	}
	v := p.in[p.at:]
	if end := strings.IndexFunc(v, func(r rune) bool { return r == ',' || unicode.IsSpace(r) }); end >= 0 {
		v = v[:end]
	}
	if v == "" {
		return "", fmt.Errorf("expected a value")
	}
	p.at += len(v)
	return v, nil
}

func (p *parser) quoted() (string, error) {
	prefix, err := strconv.QuotedPrefix(p.in[p.at:])
	if err != nil {
		return "", fmt.Errorf("unterminated or malformed quotes")
	}
	p.at += len(prefix)
	return strconv.Unquote(prefix)
}

func (p *parser) slashed(quote byte) (string, error) {
	var b strings.Builder
	for i := p.at + 1; i < len(p.in); i++ {
		switch c := p.in[i]; {
		case c == quote:
			p.at = i + 1
			return b.String(), nil
		case c == '\\' && i+1 < len(p.in) && p.in[i+1] == quote:
			i++
			b.WriteByte(quote)
		default:
			b.WriteByte(c)
		}
	}
	return "", fmt.Errorf("unterminated %c", quote)
}
