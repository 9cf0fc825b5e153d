package config

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestUnpacks(t *testing.T) {
	const file = `version = 3
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/amd64"
snapshotter = "overlayfs"
differ = ""
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
snapshotter = "erofs"
differ = "erofs"
colour = "red"
`
	c, warnings, err := Load(write(t, t.TempDir(), "config.toml", file))
	if err != nil {
		t.Fatal(err)
	}
	if want := []Unpack{{Platform: "linux/amd64", Snapshotter: "overlayfs"}, {Snapshotter: "erofs", Differ: "erofs"}}; !reflect.DeepEqual(c.Transfer.Unpacks, want) {
		t.Errorf("%+v", c.Transfer.Unpacks)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0].Key, "colour") {
		t.Errorf("warnings: %v", warnings)
	}
	if got := Changed(Default(), c); len(got) != 1 || !strings.Contains(got[0], "unpack_config") {
		t.Errorf("changed: %v", got)
	}
	var out bytes.Buffer
	if _, err := c.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	again, _, err := Load(write(t, t.TempDir(), "config.toml", out.String()))
	if err != nil || !reflect.DeepEqual(again, c) {
		t.Errorf("written and read again: %+v, %v", again, err)
	}
}

func TestBadUnpacks(t *testing.T) {
	const key = `plugins."io.containerd.transfer.v1.local"`
	for body, want := range map[string]string{
		"[" + key + "]\nunpack_config = 1":                        "array of tables",
		"[" + key + "]\nunpack_config = [1]":                      "array of tables",
		"[[" + key + ".unpack_config]]\nplatform = 1":             "platform",
		"[[" + key + ".unpack_config]]\nplatform = \"a/b/c/d/e\"": "OS/ARCH",
	} {
		_, _, err := Load(write(t, t.TempDir(), "config.toml", "version = 3\n"+body+"\n"))
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "config.toml:") {
			t.Errorf("%s: %v", body, err)
		}
	}
}
