package engine

import (
	"testing"

	"github.com/containerd/errdefs"
)

// TestSliceName: which slice a path in systemd's form means.
func TestSliceName(t *testing.T) {
	for path, want := range map[string]string{
		"kubepods.slice:cri:pod-1":                   `/kubepods.slice/kubepods-cri.pod\x2d1.slice`,
		"kubepods.slice::kubepods-pod1.slice":        "/kubepods.slice/kubepods-pod1.slice",
		"kubepods-burst.slice:cri:other.slice":       "/kubepods.slice/kubepods-burst.slice/kubepods-burst-cri.other.slice",
		":managerd:pod":                              "/system.slice/system-managerd.pod.slice",
		"-.slice:x:pod":                              "/x.pod.slice",
		"kubepods.slice:cri:kubepods-a-b-pod1.slice": "/kubepods.slice/kubepods-a.slice/kubepods-a-b.slice/kubepods-a-b-pod1.slice",
	} {
		s, err := NewSlice(path, nil)
		if err != nil {
			t.Errorf("%s: %v", path, err)
		} else if s.Path() != want {
			t.Errorf("%s: %s, want %s", path, s.Path(), want)
		}
	}
	for _, path := range []string{"a:b", "a.slice:b:", "a.scope:b:c", "a--b.slice:c:d", "a.slice:b:c:d", "../a.slice:b:c"} {
		if _, err := NewSlice(path, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
