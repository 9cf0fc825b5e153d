package main

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
	"github.com/managerd/managerd/shimapi/shimtest"
)

// TestConformance: the suite for every shim there is, on ours.
func TestConformance(t *testing.T) {
	binary, err := shimbin.Build(t.TempDir(), shimbin.Race)
	if err != nil {
		t.Fatal(err)
	}
	shimtest.Run(t, shimtest.Config{Binary: binary})
}

// TestConformanceExternal: the same with other runtimes behind our shim.
func TestConformanceExternal(t *testing.T) {
	binary, err := shimbin.Build(t.TempDir(), shimbin.Race)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"crun", "runc"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			if err != nil {
				t.Fatalf("%v (Debian: apt-get install %s)", err, name)
			}
			if name == "crun" {
				path = withoutHybrid(t, path)
			}
			opts, err := typeurl.MarshalAnyToProto(&options.Options{BinaryName: path})
			if err != nil {
				t.Fatal(err)
			}
			shimtest.Run(t, shimtest.Config{Binary: binary, Options: opts})
		})
	}
}

// withoutHybrid gives a runtime that does not see the v2 hierarchy beside v1: crun refuses to run where that has a
// controller of its own.
func withoutHybrid(t *testing.T, path string) string {
	const unified = "/sys/fs/cgroup/unified"
	data, err := os.ReadFile(unified + "/cgroup.controllers")
	if err != nil || len(bytes.TrimSpace(data)) == 0 {
		return path
	}
	wrapper := filepath.Join(t.TempDir(), filepath.Base(path))
	script := "#!/bin/sh\nexec unshare -m sh -c 'umount " + unified + " && exec " + path + " \"$@\"' " + path + " \"$@\"\n"
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return wrapper
}

// TestConformanceOfContainerd: the same on the shim of Debian's containerd 1.6 over its runc 1.1, so that the suite asks
// for what the world's most used shim does, and nothing of our own invention; and what it does differently, listed.
func TestConformanceOfContainerd(t *testing.T) {
	binary, err := exec.LookPath("containerd-shim-runc-v2")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install containerd)", err)
	}
	known := maps.Clone(ofContainerd)
	if exec.Command("criu", "check").Run() == nil {
		delete(known, "checkpoint/left") // none fails
	}
	shimtest.Run(t, shimtest.Config{Binary: binary, Known: known})
}

const uncoded = "its refusals are sentences without a code, which reach clients as Unknown"

// ofContainerd is what the shim of Debian's containerd 1.6 does differently; docs/shims.md has it as a table.
var ofContainerd = map[string]string{
	"start/v3":      "version 1.6 speaks version 2 of the task API only",
	"info":          "-info came with version 2.0",
	"start/session": "it has a process group of its own, and stays in the session of its daemon",

	"create fails/*/code":                     uncoded,
	"exec fails/code":                         uncoded,
	"illegal/init/created/*/code":             uncoded,
	"illegal/init/running/*/code":             uncoded,
	"illegal/init/paused/*/code":              uncoded,
	"illegal/init/stopped/[^k]*/code":         uncoded, // kill has one
	"illegal/exec/absent/close-io/code":       uncoded,
	"illegal/exec/running/[^c]*/code":         uncoded, // a second create has one
	"illegal/exec/stopped/[rs]*/code":         uncoded,
	"illegal/exec/deleted/close-io/code":      uncoded,
	"illegal/init/stopped/pids/refused":       "it answers with an empty list",
	"illegal/init/stopped/stats/refused":      "it answers with the counters of the empty cgroup",
	"illegal/init/stopped/resize-pty/refused": "a container without a terminal takes any size, in any state",

	"exec/ids":         "the id in the state of an exec is the exec's, and the field of the exec's is empty; containerd's daemon reads neither",
	"exec fails/no id": "an exec without an id is accepted, and cannot be named afterwards",

	"update nothing/code": "a request without resources is a nil pointer there",
	"update nothing/shim": "it dies of that",

	"sigterm/shim":             "SIGTERM and SIGINT end the shim; its container lives on",
	"delete verb/known status": "nothing is written down: what the dead shim knew is lost, and 137 told instead",
	"delete verb/nothing":      "it fails when Create never wrote the file that names the runtime",
	"delete verb/socket":       "the daemon reuses the name when it starts the same container again, and leaves it otherwise",

	"checkpoint/left": "a checkpoint that failed leaves its directory behind",
}

// TestShimsDocs: the table in the documentation is the list of the differences.
func TestShimsDocs(t *testing.T) {
	data, err := os.ReadFile("../../docs/shims.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if cells := strings.Split(line, "|"); len(cells) == 4 && strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			rows[strings.Trim(cells[1], " `")] = strings.TrimSpace(cells[2])
		}
	}
	if !maps.Equal(rows, ofContainerd) {
		for key, why := range ofContainerd {
			if rows[key] != why {
				t.Errorf("docs/shims.md should have the row\n| `%s` | %s |", key, why)
			}
		}
		for key := range rows {
			if _, ok := ofContainerd[key]; !ok {
				t.Errorf("docs/shims.md: %s is no known difference", key)
			}
		}
	}
}
