package logsink

import (
	"os"
	"testing"
)

// TestRawSuccessor: what somebody wrote who was killed before he recorded it is not written again; what others have appended
// stays, and so does what comes after.
func TestRawSuccessor(t *testing.T) {
	for name, c := range map[string]struct{ found, want string }{
		"nothing was written":   {"", "one\ntwo\nthree\n"},
		"a part was written":    {"tw", "one\ntwo\nthree\n"},
		"all was written":       {"two\nthree\n", "one\ntwo\nthree\n"},
		"another wrote":         {"other\n", "one\nother\ntwo\nthree\n"},
		"another wrote as much": {"2wo\n3hree\n", "one\n2wo\n3hree\ntwo\nthree\n"},
		"another wrote more":    {"two\nthree\nfour\n", "one\ntwo\nthree\nfour\ntwo\nthree\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := Config{Target: Target{Format: Raw, Path: dir + "/log", MaxFile: 1}, Base: dir + "/base"}
			begin := func() (*Log, *Stream) {
				l, err := Open(cfg)
				if err != nil {
					t.Fatal(err)
				}
				s, err := l.Stream("stdout")
				if err != nil {
					t.Fatal(err)
				}
				return l, s
			}
			l, s := begin()
			say(t, s, "one\n")
			if _, err := s.TakeBytes([]byte("two\nthree\n")); err != nil { // and is killed
				t.Fatal(err)
			}
			s.Close()
			l.Close()
			f, err := os.OpenFile(dir+"/log", os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString(c.found); err != nil {
				t.Fatal(err)
			}
			_ = f.Close()
			l, s = begin()
			if err := s.Put(false); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(dir + "/log"); err != nil || string(got) != c.want {
				t.Errorf("%q, %v", got, err)
			}
			say(t, s, "four\n")
			s.Close()
			l.Close()
			if got, err := os.ReadFile(dir + "/log"); err != nil || string(got) != c.want+"four\n" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
