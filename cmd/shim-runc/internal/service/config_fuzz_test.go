package service

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/shimapi"
)

// FuzzReadSpec: whatever config.json is, it is a spec or an invalid argument that names the file. What the engine makes of
// a spec is fuzzed there.
func FuzzReadSpec(f *testing.F) {
	for _, s := range []string{
		"", "{", "[]", "null", "{}", "{\n\t\"process\": {]", `{"process":{}}`, `{"process":{"args":"true"}}`, `{"linux":{"namespaces":[null]}}`,
		`{"process":{"args":["true"],"cwd":"/"},"root":{"path":"rootfs"},"linux":{}}`, "\xff\xfe", `{"a":` + strings.Repeat("[", 20000),
		`{"linux":{"resources":{"memory":{"limit":1e99}}}}`,
	} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	path := filepath.Join(dir, shimapi.ConfigFile)
	f.Fuzz(func(t *testing.T, config []byte) {
		if err := os.WriteFile(path, config, 0o600); err != nil {
			t.Fatal(err)
		}
		spec, err := readSpec(dir)
		if (spec == nil) == (err == nil) {
			t.Fatalf("spec %v beside error %v", spec, err)
		}
		if err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path)) {
			t.Errorf("%v", err)
		}
	})
}
