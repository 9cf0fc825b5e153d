package fsck

import "testing"

func TestCgroupOf(t *testing.T) {
	for path, want := range map[string]string{
		"":                     "",
		"/ns/id":               "/ns/id",
		"ns/id":                "",
		"system.slice:runc:id": "/system.slice/runc-id.scope",
		":runc:id":             "/system.slice/runc-id.scope",
		"-.slice:runc:id":      "/runc-id.scope",
		"system.slice::id":     "/system.slice/id.scope",
		"kubepods-burstable-pod1.slice:cri-containerd:abc": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
		"a.slice:x:a-b.slice":                              "/a.slice/a-b.slice",
		"a.slice:x:":                                       "",
		"a--b.slice:x:y":                                   "",
		"a:x:y":                                            "",
		"a/b.slice:x:y":                                    "",
		"a.slice:x:../y":                                   "",
	} {
		if got := cgroupOf(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}
