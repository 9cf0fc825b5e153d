//go:build !vmguest

package service

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
)

// TestOptionsDocument: the documentation says what becomes of every runtime option, and names none that there is not.
func TestOptionsDocument(t *testing.T) {
	data, err := os.ReadFile("../../../../docs/runtime-spec.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(data), "\n## Runtime options\n")
	said := map[string]bool{}
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) == 5 {
			for _, m := range regexp.MustCompile("`([A-Za-z]+)`").FindAllStringSubmatch(cells[1], -1) {
				said[m[1]] = true
			}
		}
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[options.Options]()) {
		if field.IsExported() && !said[field.Name] {
			t.Errorf("%s has no row", field.Name)
		}
		delete(said, field.Name)
	}
	for name := range said {
		t.Errorf("%s is no runtime option", name)
	}
}
