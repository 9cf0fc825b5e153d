package service_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/typeurl/v2"

	"github.com/managerd/managerd/cmd/shim-runc/internal/shimbin"
)

// TestUpgradeSinks: output that goes to files and logs, of a terminal too, is there once and in order.
func TestUpgradeSinks(t *testing.T) {
	const lines = 1500
	for _, scheme := range []string{"file", "json-file", "cri"} {
		for _, terminal := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s terminal %v", scheme, terminal), func(t *testing.T) {
				f := running(t, "sinks", nil)
				log := filepath.Join(filepath.Dir(f.dir), "log")
				if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdout, r.Terminal = scheme+"://"+log, terminal },
					"sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); usleep 300; done; exit 6", lines)); err != nil {
					t.Fatal(err)
				}
				f.start("e")
				for range 8 {
					f.upgrade()
				}
				if s := f.wait("e").ExitStatus; s != 6 {
					t.Errorf("status %d", s)
				}
				data, err := os.ReadFile(log)
				if err != nil {
					t.Fatal(err)
				}
				n := 0
				for line := range strings.Lines(string(data)) {
					if scheme == "json-file" {
						var entry struct{ Log string }
						if err := json.Unmarshal([]byte(line), &entry); err != nil {
							t.Fatalf("%q: %v", line, err)
						}
						line = entry.Log
					}
					if line = strings.TrimRight(line, "\r\n"); !strings.HasSuffix(line, fmt.Sprintf("line %d", n)) {
						t.Fatalf("entry %d is %q", n, line)
					}
					n++
				}
				if n != lines {
					t.Errorf("%d lines, want %d", n, lines)
				}
			})
		}
	}
}

// TestUpgradeStates: a container and an exec in each state of their lives.
func TestUpgradeStates(t *testing.T) {
	engines := map[string]*options.Options{"builtin": {}}
	if path, err := exec.LookPath("runc"); err == nil {
		engines["runc"] = &options.Options{BinaryName: path}
	}
	for name, opts := range engines {
		t.Run(name, func(t *testing.T) {
			any, err := typeurl.MarshalAnyToProto(opts)
			if err != nil {
				t.Fatal(err)
			}
			f := serve(t, "states", shimbin.Spec("states", "sh", "-c", "while read x; do echo got $x; [ $x = end ] && exit 8; done"))
			in, out, _ := f.fifos("init")
			f.create(func(r *task.CreateTaskRequest) { r.Options, r.Stdin, r.Stdout = any, in, out })
			f.upgrade()
			if s := f.state(""); s.Status != tasktypes.Status_CREATED {
				t.Errorf("created: %v", s)
			}
			got := read(t, out)
			w, err := os.OpenFile(in, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Close() }()
			_, _ = w.WriteString("one\n")
			f.start("")
			f.upgrade()
			if _, err := f.Pause(ctx, &task.PauseRequest{ID: "states"}); err != nil {
				t.Fatal(err)
			}
			f.upgrade()
			if s := f.state(""); s.Status != tasktypes.Status_PAUSED {
				t.Errorf("paused: %v", s)
			}
			if _, err := f.Resume(ctx, &task.ResumeRequest{ID: "states"}); err != nil {
				t.Fatal(err)
			}
			ein, eout, _ := f.fifos("e")
			ew, err := os.OpenFile(ein, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ew.Close() }()
			_, _ = ew.WriteString("all of it\n")
			if err := f.exec("e", func(r *task.ExecProcessRequest) { r.Stdin, r.Stdout = ein, eout }, "cat"); err != nil {
				t.Fatal(err)
			}
			if _, err := f.CloseIO(ctx, &task.CloseIORequest{ID: "states", ExecID: "e", Stdin: true}); err != nil {
				t.Fatal(err)
			}
			f.upgrade()
			if s := f.state("e"); s.Status != tasktypes.Status_CREATED || s.Pid != 0 {
				t.Errorf("added: %v", s)
			}
			f.start("e")
			egot := read(t, eout)
			if s := f.wait("e").ExitStatus; s != 0 {
				t.Errorf("exec: status %d", s)
			}
			if text := <-egot; text != "all of it\n" {
				t.Errorf("exec: %q", text)
			}
			f.upgrade()
			if s := f.state("e"); s.Status != tasktypes.Status_STOPPED || s.ExitStatus != 0 {
				t.Errorf("ended: %v", s)
			}
			f.remove("e")
			_, _ = w.WriteString("end\n")
			if s := f.wait("").ExitStatus; s != 8 {
				t.Errorf("init: status %d", s)
			}
			if text := <-got; text != "got one\ngot end\n" {
				t.Errorf("init: %q", text)
			}
			f.upgrade()
			if d := f.remove(""); d.ExitStatus != 8 {
				t.Errorf("delete: %v", d)
			}
		})
	}
}
