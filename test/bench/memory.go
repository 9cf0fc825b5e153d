package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// memory of one process, in kB, and its threads.
type memory struct{ pss, privateDirty, rss, threads float64 }

// weigh reads /proc/PID/smaps_rollup and status (proc(5)).
func weigh(pid int) (memory, error) {
	var m memory
	for _, f := range []struct {
		file   string
		fields map[string]*float64
	}{
		{"smaps_rollup", map[string]*float64{"Pss:": &m.pss, "Private_Dirty:": &m.privateDirty, "Rss:": &m.rss}},
		{"status", map[string]*float64{"Threads:": &m.threads}},
	} {
		path := fmt.Sprintf("/proc/%d/%s", pid, f.file)
		data, err := os.ReadFile(path)
		if err != nil {
			return m, err
		}
		missing := len(f.fields)
		for line := range strings.Lines(string(data)) {
			words := strings.Fields(line)
			if len(words) < 2 || f.fields[words[0]] == nil {
				continue
			}
			if *f.fields[words[0]], err = strconv.ParseFloat(words[1], 64); err != nil {
				return m, fmt.Errorf("%s: %w", path, err)
			}
			missing--
		}
		if missing != 0 {
			return m, fmt.Errorf("%s lacks %d of the fields %v", path, missing, f.fields)
		}
	}
	return m, nil
}

// peakOf is the most memory that a process has had, in kB, since its last reset (VmHWM of proc(5)).
func peakOf(pid int) (float64, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("%s has no VmHWM", path)
}

// parent is the process above pid: of a container's init, the shim.
func parent(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat is cut short", pid)
	}
	return strconv.Atoi(fields[1])
}
