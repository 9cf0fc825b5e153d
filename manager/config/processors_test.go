package config

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestProcessors(t *testing.T) {
	const file = `version = 3
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
returns = "application/vnd.oci.image.layer.v1.tar+gzip"
path = "ctd-decoder"
args = ["--decryption-keys-path", "/etc/containerd/ocicrypt/keys"]
env = ["OCICRYPT_KEYPROVIDER_CONFIG=/etc/containerd/ocicrypt/ocicrypt_keyprovider.conf"]
colour = "red"
`
	c, warnings, err := Load(write(t, t.TempDir(), "config.toml", file))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Processor{"io.containerd.ocicrypt.decoder.v1.tar.gzip": {
		Accepts: []string{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted"}, Returns: "application/vnd.oci.image.layer.v1.tar+gzip",
		Path: "ctd-decoder", Args: []string{"--decryption-keys-path", "/etc/containerd/ocicrypt/keys"},
		Env: []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/containerd/ocicrypt/ocicrypt_keyprovider.conf"},
	}}
	if !reflect.DeepEqual(c.Processors, want) {
		t.Errorf("%+v", c.Processors)
	}
	if len(warnings) != 1 || warnings[0].Line != 8 {
		t.Errorf("warnings: %v", warnings)
	}
	if got := Changed(Default(), c); !reflect.DeepEqual(got, []string{"stream_processors"}) {
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

func TestBadProcessors(t *testing.T) {
	const good = "[stream_processors.x]\naccepts = [\"a\"]\nreturns = \"b\"\npath = \"/x\"\n"
	for body, want := range map[string]string{
		"stream_processors = 1":                                "must be a table",
		"[stream_processors]\nx = 1":                           "must be a table",
		"[stream_processors.x]\nreturns = \"b\"\npath = \"p\"": "must name media types",
		strings.Replace(good, `["a"]`, `"a"`, 1):               "list of strings",
		strings.Replace(good, `"b"`, `""`, 1):                  "must name a media type",
		strings.Replace(good, `"b"`, `"a"`, 1):                 "no end to it",
		strings.Replace(good, `"/x"`, `""`, 1):                 "must name a program",
		good + `env = ["=x"]`:                                  "must be NAME=VALUE",
	} {
		_, _, err := Load(write(t, t.TempDir(), "config.toml", "version = 3\n"+body+"\n"))
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "config.toml:") {
			t.Errorf("%s: %v", body, err)
		}
	}
}
