package service

import (
	"maps"
	"testing"

	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
)

// TestExecPIDs: only an exec that runs has a number; the one that an exec had which has ended may be another's by now.
func TestExecPIDs(t *testing.T) {
	s := &Service{execs: map[string]*process{
		"runs":    {kind: shimapi.Exec, state: shimapi.Running, pid: 11, proc: &reaper.Process{}},
		"ended":   {kind: shimapi.Exec, state: shimapi.Stopped, pid: 12, proc: &reaper.Process{}},
		"created": {kind: shimapi.Exec, state: shimapi.Created},
	}}
	if got := s.execPIDsLocked(); !maps.Equal(got, map[int]string{11: "runs"}) {
		t.Errorf("%v", got)
	}
}
