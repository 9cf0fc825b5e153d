// Package criu is what both engines know of criu(8), the program that saves processes to files and makes them again: its
// configuration, what a checkpoint has beside criu's own images, and what to say when it fails. It knows neither the task
// API nor libcontainer.
//
// A container's streams are FIFOs outside of its mount namespace, which criu refuses to save unless it is told that they
// come from outside (criu(8), --external and --inherit-fd). Neither libcontainer nor runc has an option for that; both
// name a configuration file to criu, the one of the annotation org.criu.config or else /etc/criu/runc.conf. A file of ours
// stands in its place, which begins with what that one says.
package criu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// Annotation names criu's configuration file, in the OCI spec.
	Annotation = "org.criu.config"
	// keptAnnotation has what the user had said there, in the spec of a container that got our file instead.
	keptAnnotation = "managerd.criu.config"
	// defaultConfig is what runtimes name without the annotation.
	defaultConfig = "/etc/criu/runc.conf"
	// metaFile stands in the directory of the images.
	metaFile = "managerd.json"
	// checking is how long criu may take to say its version, or what the kernel lacks.
	checking = 20 * time.Second
)

// Options say how criu is to treat what is not only the container's (containerd.runc.v1.CheckpointOptions). A checkpoint
// remembers them for its restores.
type Options struct {
	OpenTCP             bool     `json:"open_tcp,omitempty"`
	ExternalUnixSockets bool     `json:"external_unix_sockets,omitempty"`
	Terminal            bool     `json:"terminal,omitempty"`
	FileLocks           bool     `json:"file_locks,omitempty"`
	EmptyNamespaces     []string `json:"empty_namespaces,omitempty"` // "network" is the only one that there is
	CgroupsMode         string   `json:"cgroups_mode,omitempty"`     // soft, full, strict, ignore; empty: criu's default
}

// Validate refuses what criu does not know: InvalidArgument.
func (o Options) Validate() error {
	if !slices.Contains([]string{"", "soft", "full", "strict", "ignore"}, o.CgroupsMode) {
		return fmt.Errorf("cgroups mode %q is none of soft, full, strict, ignore: %w", o.CgroupsMode, errdefs.ErrInvalidArgument)
	}
	for _, ns := range o.EmptyNamespaces {
		if ns != "network" {
			return fmt.Errorf("a %q namespace cannot be left empty, only \"network\": %w", ns, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Place says where a run of criu finds and leaves its files.
type Place struct {
	Images string // directory of the images, absolute
	Work   string // directory of criu's log; empty: one that is thrown away
	Bundle string // the log of a run that failed is copied here when Work is empty
	Config string // our configuration file
}

// Checkpoint is a container to be saved.
type Checkpoint struct {
	Options
	Place
	Exit  bool              // end its processes
	FIFOs map[string]string // the paths of its streams, by their name
}

// Restore is a container to be made again.
type Restore struct {
	Place
}

// meta is what metaFile has.
type meta struct {
	Options
	// Streams are criu's names of the FIFOs outside, by the name of the stream.
	Streams map[string][]string `json:"streams,omitempty"`
}

// descriptors are those on which a restored container's streams are given to criu.
var descriptors = map[string]int{"stdin": 0, "stdout": 1, "stderr": 2}

// Find says whether there is a criu: FailedPrecondition names where it was looked for.
func Find() error {
	if _, err := exec.LookPath("criu"); err != nil {
		return fmt.Errorf("there is no criu in the PATH of the shim (%s), install the package criu: %w", os.Getenv("PATH"), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Run saves a container of which pids are all processes, by dump, which is given the directory for criu's log. It forks,
// and wants the reaper's fork guard held. After an error nothing of the checkpoint is left that was not there before.
func (c Checkpoint) Run(pids []int, annotations map[string]string, dump func(work string) error) (err error) {
	if err := Find(); err != nil {
		return err
	}
	streams, err := outside(pids, c.FIFOs)
	if err != nil {
		return err
	}
	var lines []string
	for _, ids := range streams {
		for _, id := range ids {
			lines = append(lines, "external "+id)
		}
	}
	if err := configure(c.Config, annotations, lines); err != nil {
		return err
	}
	switch merr := os.Mkdir(c.Images, 0o700); {
	case merr == nil:
		defer func() {
			if err != nil {
				_ = os.RemoveAll(c.Images)
			}
		}()
	case !errors.Is(merr, fs.ErrExist):
		return fmt.Errorf("cannot make the directory of the images: %w: %w", merr, errdefs.ErrInvalidArgument)
	}
	if err := c.run("dump.log", dump); err != nil {
		return err
	}
	data, err := json.Marshal(meta{Options: c.Options, Streams: streams})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.Images, metaFile), data, 0o600)
}

// Check says whether there is something to restore (InvalidArgument), and a criu.
func (r Restore) Check() error {
	if _, err := os.Stat(filepath.Join(r.Images, "inventory.img")); err != nil {
		return fmt.Errorf("%s holds no checkpoint: %w: %w", r.Images, err, errdefs.ErrInvalidArgument)
	}
	return Find()
}

// Run makes a container again by restore, which is given the options of its checkpoint and the directory for criu's log.
// It forks, and wants the fork guard held.
func (r Restore) Run(annotations map[string]string, restore func(o Options, work string) error) error {
	if err := r.Check(); err != nil {
		return err
	}
	m, err := r.meta()
	if err != nil {
		return err
	}
	var lines []string
	for stream, ids := range m.Streams {
		for _, id := range ids {
			lines = append(lines, fmt.Sprintf("inherit-fd fd[%d]:%s", descriptors[stream], id))
		}
	}
	done, err := configureOnce(r.Config, annotations, lines)
	if err != nil {
		return err
	}
	defer done()
	return r.run("restore.log", func(work string) error { return restore(m.Options, work) })
}

// Has says whether the checkpoint has a stream which must be given to the restored container.
func (r Restore) Has(stream string) bool {
	m, err := r.meta()
	return err == nil && len(m.Streams[stream]) > 0
}

// meta is empty for a checkpoint that somebody else has made.
func (r Restore) meta() (m meta, err error) {
	data, err := os.ReadFile(filepath.Join(r.Images, metaFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &m)
	}
	if err == nil {
		err = m.Validate()
	}
	if err != nil {
		return m, fmt.Errorf("cannot read the checkpoint's %s: %w", metaFile, err)
	}
	return m, nil
}

// run calls criu through fn. The error of a run that failed has what criu's log says.
func (p Place) run(log string, fn func(work string) error) error {
	work := p.Work
	if work == "" {
		work = filepath.Join(p.Bundle, "criu-work")
		defer func() { _ = os.RemoveAll(work) }()
	}
	if err := os.MkdirAll(work, 0o700); err != nil {
		return fmt.Errorf("cannot make criu's work directory: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	path := filepath.Join(work, log)
	_ = os.Remove(path) // of an earlier run
	err := fn(work)
	if err == nil {
		return nil
	}
	data, _ := os.ReadFile(path)
	if p.Work == "" && len(data) > 0 {
		path = filepath.Join(p.Bundle, "criu-"+log)
		if werr := os.WriteFile(path, data, 0o600); werr != nil {
			return errors.Join(failure(err, data, ""), werr)
		}
	}
	if len(data) == 0 {
		path = ""
	}
	return failure(err, data, path)
}

// allows are the options of containerd's CheckpointOptions, by what criu says of them in its log when one is missing.
var allows = map[string]string{
	"consider using --tcp-established": "open_tcp", "You can try --file-locks": "file_locks",
	"Consider using --ext-unix-sk": "external_unix_sockets", "Consider using --shell-job": "terminal",
}

// failure says which criu failed, its last errors, where the rest is, and whether "criu check" finds it unfit for the
// machine (FailedPrecondition).
func failure(err error, log []byte, path string) error {
	var b strings.Builder
	version, _ := call("--version")
	version = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(version), "Version:"))
	fmt.Fprintf(&b, "criu %s", version)
	said := lastErrors(log)
	if len(said) > 0 {
		fmt.Fprintf(&b, " says: %s", strings.Join(said, "; "))
	}
	if path != "" {
		fmt.Fprintf(&b, " (its log: %s)", path)
	}
	for flag, option := range allows {
		if bytes.Contains(log, []byte(flag)) {
			return fmt.Errorf("%w: %s; the option %s allows it: %w", err, b.String(), option, errdefs.ErrFailedPrecondition)
		}
	}
	out, cerr := call("check")
	if cerr == nil {
		return fmt.Errorf("%w: %s", err, b.String())
	}
	var uname unix.Utsname
	_ = unix.Uname(&uname) // never fails (uname(2))
	fmt.Fprintf(&b, "; \"criu check\" fails, it does not work with kernel %s", unix.ByteSliceToString(uname.Release[:]))
	for _, line := range lastErrors([]byte(out)) {
		if !slices.Contains(said, line) {
			fmt.Fprintf(&b, ": %s", line)
		}
	}
	return fmt.Errorf("%w: %s: %w", err, b.String(), errdefs.ErrFailedPrecondition)
}

func call(arg string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), checking)
	defer cancel()
	out, err := exec.CommandContext(ctx, "criu", arg).CombinedOutput()
	return string(out), err
}

// lastErrors are the last few different errors in criu's log, without times and places in its source.
func lastErrors(log []byte) (said []string) {
	const most = 4
	for line := range bytes.Lines(log) {
		_, text, ok := strings.Cut(string(line), "Error (")
		if !ok {
			continue
		}
		if _, after, ok := strings.Cut(text, "): "); ok {
			text = after
		}
		text = strings.TrimRight(strings.TrimSpace(text), ".")
		if strings.HasPrefix(text, "exited, status=") || slices.Contains(said, text) {
			continue // a tool that was tried, criu tells what came of it
		}
		said = append(said, text)
	}
	return said[max(0, len(said)-most):]
}
