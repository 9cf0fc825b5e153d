package session

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// DefaultDetachKeys leave a process without ending it.
const DefaultDetachKeys = "ctrl-p,ctrl-q"

// ParseKeys reads keys separated by commas: a character, or ctrl- and a letter or one of @[\]^_. Empty: none.
func ParseKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var keys []byte
	for _, k := range strings.Split(s, ",") {
		letter, ctrl := strings.CutPrefix(strings.ToLower(k), "ctrl-")
		switch {
		case ctrl && len(letter) == 1 && (letter[0] >= 'a' && letter[0] <= 'z' || strings.ContainsAny(letter, `@[\]^_`)):
			keys = append(keys, letter[0]&0x1f)
		case !ctrl && len(k) == 1:
			keys = append(keys, k[0])
		default:
			return nil, fmt.Errorf("key %q is neither a character nor ctrl-LETTER", k)
		}
	}
	return keys, nil
}

// errDetach ends input at the detach keys.
var errDetach = errors.New("detached")

// keyReader passes input on until the detach keys come: then errDetach. Keys that may be the beginning of them are held
// back until the next one tells.
type keyReader struct {
	r    io.Reader
	keys []byte
	seen int // keys matched so far, and held back
}

// Read needs room for one byte more than there are keys.
func (k *keyReader) Read(p []byte) (int, error) {
	if len(k.keys) == 0 {
		return k.r.Read(p)
	}
	buf := make([]byte, max(1, len(p)-len(k.keys)))
	for {
		n, err := k.r.Read(buf)
		out := p[:0]
		for _, b := range buf[:n] {
			if b == k.keys[k.seen] {
				if k.seen++; k.seen == len(k.keys) {
					k.seen = 0
					return len(out), errDetach
				}
				continue
			}
			// What is held back, and b, may end with the beginning of the keys once more.
			held := append(append([]byte(nil), k.keys[:k.seen]...), b)
			for k.seen = min(k.seen, len(held)-1); k.seen > 0 && !bytes.HasSuffix(held, k.keys[:k.seen]); k.seen-- {
			}
			out = append(out, held[:len(held)-k.seen]...)
		}
		if err != nil {
			out = append(out, k.keys[:k.seen]...)
			k.seen = 0
		}
		if len(out) > 0 || err != nil {
			return len(out), err
		}
	}
}
