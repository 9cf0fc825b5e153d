package config

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestProxies(t *testing.T) {
	const file = `version = 3
[proxy_plugins.stargz]
type = "snapshot"
address = "unix:///run/stargz.sock"
[proxy_plugins.stargz.exports]
root = "/var/lib/stargz"
enable_remote_snapshot_annotations = "true"
[proxy_plugins."my.other"]
type = "diff"
address = "/run/x.sock"
platform = "linux/arm64"
capabilities = ["a", "b"]
colour = "red"
`
	c, warnings, err := Load(write(t, t.TempDir(), "config.toml", file))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Proxy{
		"stargz": {Type: "snapshot", Address: "/run/stargz.sock", Exports: map[string]string{
			"root": "/var/lib/stargz", "enable_remote_snapshot_annotations": "true"}},
		"my.other": {Type: "diff", Address: "/run/x.sock", Platform: "linux/arm64", Capabilities: []string{"a", "b"}},
	}
	if !reflect.DeepEqual(c.Proxies, want) {
		t.Errorf("%+v", c.Proxies)
	}
	if len(warnings) != 1 || warnings[0].Line != 13 {
		t.Errorf("warnings: %v", warnings)
	}
	if got := Changed(Default(), c); !reflect.DeepEqual(got, []string{"proxy_plugins"}) {
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

func TestBadProxies(t *testing.T) {
	for body, want := range map[string]string{
		"proxy_plugins = 1":                                                                       "must be a table",
		"[proxy_plugins]\nx = 1":                                                                  "must be a table",
		"[proxy_plugins.x]\naddress = \"/run/x\"":                                                 "none of snapshot",
		"[proxy_plugins.x]\ntype = \"snapshotter\"\naddress = \"/run/x\"":                         `"snapshotter" is none of`,
		"[proxy_plugins.x]\ntype = \"snapshot\"":                                                  "absolute path",
		"[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"relative\"":                          "absolute path",
		"[proxy_plugins.x]\ntype = 5":                                                             "must be a string",
		"[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/x\"\ncapabilities = \"a\"":          "list of strings",
		"[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/x\"\nexports = \"a\"":               "must be a table",
		"[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/x\"\nexports = { root = 1 }":        "must be a string",
		"[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/" + strings.Repeat("x", 200) + "\"": "too long",
	} {
		_, _, err := Load(write(t, t.TempDir(), "config.toml", "version = 3\n"+body+"\n"))
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "config.toml:") {
			t.Errorf("%s: %v", body, err)
		}
	}
}
