package overlay

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNeeded(t *testing.T) {
	for _, c := range []struct {
		files  map[string]string
		userns bool
		want   string
	}{
		{nil, false, ""},
		{map[string]string{"index": "N\n", "metacopy": "N\n"}, false, "index=off"},
		{map[string]string{"index": "N\n", "metacopy": "Y\n"}, false, "index=off metacopy=off"},
		{map[string]string{"index": "N\n", "metacopy": "Y\n"}, true, "index=off userxattr"},
	} {
		dir := t.TempDir()
		for name, body := range c.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := strings.Join(needed(dir, c.userns), " "); got != c.want {
			t.Errorf("%v: %q, want %q", c, got, c.want)
		}
	}
}
