package identifiers

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestValidate(t *testing.T) {
	for _, good := range []string{
		"a", "A9", "default", "k8s.io", "moby", "a-b", "a_b", "a.b", "a--b", "a.-_b", "0123", strings.Repeat("a", MaxLength),
	} {
		if err := Validate(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", ".", "..", "-a", "a-", ".a", "a.", "_", "a/b", "../a", "a b", " a", "a\n", "\na", "a\x00b", "é", "a:b", "a@b", strings.Repeat("a", MaxLength+1),
	} {
		err := Validate(bad)
		if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), "identifier") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestLabels(t *testing.T) {
	fits := strings.Repeat("v", maxLabel-1)
	if err := ValidateLabels(map[string]string{"k": fits, "": "", "a/b.c": "x"}); err != nil {
		t.Error(err)
	}
	for k, v := range map[string]string{"k": fits + "v", strings.Repeat("k", maxLabel+1): ""} {
		err := ValidateLabels(map[string]string{"a": "b", k: v})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "4097") || len(err.Error()) > 300 {
			t.Errorf("%d and %d bytes: %v", len(k), len(v), err)
		}
	}
}

func FuzzValidate(f *testing.F) {
	f.Add("a.b")
	f.Fuzz(func(t *testing.T, s string) {
		if Validate(s) == nil && (s == "." || s == ".." || strings.ContainsAny(s, "/\x00 \n") || len(s) > MaxLength || s == "") {
			t.Errorf("%q is not safe as the name of a file", s)
		}
	})
}
