package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// Annotate makes a container's runtime name config to criu, in annotations, which may be nil.
func Annotate(annotations map[string]string, config string) map[string]string {
	if annotations == nil {
		annotations = map[string]string{}
	}
	if said, ok := annotations[Annotation]; ok && said != config {
		annotations[keptAnnotation] = said
	}
	annotations[Annotation] = config
	return annotations
}

// configure makes our configuration file: what the user's says, and lines.
func configure(path string, annotations map[string]string, lines []string) error {
	text, err := configuration(path, annotations, lines)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return fmt.Errorf("cannot write criu's configuration: %w", err)
	}
	return nil
}

// configureOnce is configure for a file that can be read once. criu reads it twice, before and after the options that it
// is called with, and takes descriptors twice then, which fails. done removes the file.
func configureOnce(path string, annotations map[string]string, lines []string) (done func(), err error) {
	text, err := configuration(path, annotations, lines)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	const most = 16 << 10 // a pipe has more
	if len(text) > most {
		err = fmt.Errorf("criu's configuration has %d bytes, the most are %d: %w", len(text), most, errdefs.ErrInvalidArgument)
	} else {
		_, err = w.Write(text)
	}
	_ = w.Close()
	if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	if err == nil {
		err = os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), r.Fd()), path)
	}
	if err != nil {
		_ = r.Close()
		return nil, err
	}
	return func() {
		_ = os.Remove(path)
		_ = r.Close()
	}, nil
}

func configuration(path string, annotations map[string]string, lines []string) ([]byte, error) {
	base, ok := annotations[keptAnnotation]
	if !ok {
		if base, ok = annotations[Annotation]; !ok || base == path {
			base = defaultConfig
		}
	}
	var text []byte
	if base != "" { // empty: the user wants none
		var err error
		if text, err = os.ReadFile(base); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("cannot read criu's configuration: %w", err)
		}
	}
	slices.Sort(lines)
	return append(text, "\n"+strings.Join(lines, "\n")+"\n"...), nil
}

// outside finds criu's names of the FIFOs: "file[MOUNT:INODE]", both hexadecimal, as the processes that hold them see
// them.
func outside(pids []int, fifos map[string]string) (map[string][]string, error) {
	found := map[string][]string{}
	for stream, path := range fifos {
		want, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			dir := fmt.Sprintf("/proc/%d/fd", pid)
			entries, _ := os.ReadDir(dir) // none: it has ended
			for _, e := range entries {
				is, err := os.Stat(filepath.Join(dir, e.Name()))
				if err != nil || !os.SameFile(is, want) {
					continue
				}
				mount, err := mountID(pid, e.Name())
				if err != nil {
					return nil, err
				}
				id := fmt.Sprintf("file[%x:%x]", mount, want.Sys().(*syscall.Stat_t).Ino)
				if !slices.Contains(found[stream], id) {
					found[stream] = append(found[stream], id)
				}
			}
		}
	}
	return found, nil
}

// mountID is the id of the mount through which a process has opened a descriptor (proc(5), fdinfo).
func mountID(pid int, fd string) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.ParseUint(strings.TrimSpace(id), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id", path)
}
