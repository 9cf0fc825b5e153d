package service

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/cmd/shim-runc/internal/sandbox"
	"github.com/managerd/managerd/protos/shimstate"
	"github.com/managerd/managerd/reaper"
	"github.com/managerd/managerd/shimapi"
	"github.com/managerd/managerd/shimapi/blackbox"
)

func (b *Sandbox) recordPath() string { return filepath.Join(b.cfg.Bundle, shimapi.SandboxFile) }

func (b *Sandbox) set(record shimstate.Sandbox, init *reaper.Process) {
	b.state.Lock()
	defer b.state.Unlock()
	b.record, b.init = record, init
}

// keepSandbox writes the record, so that a successor knows it: before a client is told.
func (b *Sandbox) keepSandbox() error {
	b.keeping.Lock() // the newest record is written last
	defer b.keeping.Unlock()
	b.state.Lock()
	data, err := b.record.Marshal()
	b.state.Unlock()
	half := b.recordPath() + ".new"
	if err == nil {
		err = os.WriteFile(half, data, 0o600)
	}
	if err == nil {
		err = os.Rename(half, b.recordPath())
	}
	if err != nil {
		return fmt.Errorf("cannot keep the record of sandbox %s: %w", b.cfg.ID, err)
	}
	return nil
}

// readSandbox reads what a shim has left of a sandbox. NotFound when there was none, or it was before the last boot.
func readSandbox(bundle string) (*shimstate.Sandbox, error) {
	data, err := os.ReadFile(filepath.Join(bundle, shimapi.SandboxFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("none was made: %w", errdefs.ErrNotFound)
	}
	r := &shimstate.Sandbox{}
	if err == nil {
		err = r.Unmarshal(data)
	}
	if err == nil && r.Schema > tableSchema+1 {
		err = fmt.Errorf("its record has schema %d, the newest known is %d", r.Schema, tableSchema+1)
	}
	return r, err
}

// untoldInit says, while the reaper is frozen, whether the init's exit is with us alone.
func (b *Sandbox) untoldInit() bool {
	b.state.Lock()
	init, stopped := b.init, b.record.State == string(shimapi.Stopped)
	b.state.Unlock()
	return init != nil && !stopped && b.cfg.Reaper.Taken(init)
}

// RestoreSandbox goes on with the sandbox that another incarnation kept, by what stands in its bundle. It is to be called
// before anything is served. NotFound when there is nothing to be kept.
func (b *Sandbox) RestoreSandbox() error {
	r, err := readSandbox(b.cfg.Bundle)
	if err == nil {
		err = b.goOn(r)
	}
	if err != nil {
		return fmt.Errorf("cannot take over sandbox %s: %w", b.cfg.ID, err)
	}
	b.box.Add(blackbox.Note, 0, "took over from a shim that died; the sandbox is "+r.State)
	return nil
}

// SucceedSandbox is RestoreSandbox for the program that replaces another in the same process.
func (b *Sandbox) SucceedSandbox(h *shimstate.Handover) error {
	if h.Sandbox == nil {
		return fmt.Errorf("cannot take over sandbox %s: the hand-over has none: %w", b.cfg.ID, errdefs.ErrDataLoss)
	}
	if err := b.goOn(h.Sandbox); err != nil {
		return fmt.Errorf("cannot take over sandbox %s: %w", b.cfg.ID, err)
	}
	b.box.Add(blackbox.Note, 0, "goes on in the place of version "+h.Version+"; the sandbox is "+h.Sandbox.State)
	return nil
}

func (b *Sandbox) goOn(r *shimstate.Sandbox) error {
	switch {
	case r.State == string(shimapi.Absent):
		return nil // a shim that was replaced before it had made one
	case r.Id != b.cfg.ID:
		return fmt.Errorf("the record is of sandbox %s: %w", r.Id, errdefs.ErrDataLoss)
	case r.BootId != b.boot:
		return fmt.Errorf("the machine was started anew since: %w", errdefs.ErrNotFound)
	}
	past, err := b.readPast()
	if err != nil {
		return err
	}
	b.set(*r, nil)
	for _, m := range r.Members {
		b.members[m.Id] = &member{Member: *m}
	}
	if e := past.exits[processKey{"", int(r.Pid)}]; e != nil { // it is told; the record may be older
		b.state.Lock()
		b.record.State, b.record.ExitStatus, b.record.ExitedUnixNano = string(shimapi.Stopped), e.Status, e.ExitedUnixNano
		b.record.ExitUnknown = e.Unknown
		b.state.Unlock()
	}
	told := func(topic string, event proto.Message) {
		if !past.told[topic] {
			_ = b.emit(topic, event) // logged
		}
	}
	told(shimapi.TopicSandboxCreate, &events.SandboxCreate{SandboxID: b.cfg.ID})
	if b.record.State == string(shimapi.Running) {
		told(shimapi.TopicSandboxStart, &events.SandboxStart{SandboxID: b.cfg.ID})
	}
	if b.record.State == string(shimapi.Stopped) {
		b.letGo()
		close(b.exited)
		return nil
	}
	if missing := sandbox.Missing(b.cfg.Bundle, r.Kinds); missing != "" {
		b.cfg.Log.Error("a namespace of the sandbox is not pinned any more: no container can join it", "namespace", missing)
	}
	if err := b.enter(r.Kinds); err != nil {
		b.cfg.Log.Error("clients do not find the sandbox's namespaces by the pid of its shim", "error", err)
	}
	if r.Pid != 0 {
		init, err := b.cfg.Reaper.Adopt(int(r.Pid), r.StartTicks, nil)
		if err != nil {
			return err
		}
		b.set(b.record, init)
		go b.awaitInit(init)
	}
	return nil
}

// HandSandbox is Hand, with the sandbox.
func (b *Sandbox) HandSandbox() (*shimstate.Handover, Held, error) {
	h, held, err := b.Hand()
	if err == nil {
		b.state.Lock()
		record := b.record
		b.state.Unlock()
		h.Sandbox = &record
	}
	return h, held, err
}

// RemoveSandbox takes away what a dead shim has left of a sandbox in a bundle, and says how it ended: exited is the zero time
// when nobody knows. Nothing there is no error.
func RemoveSandbox(bundle string, r *reaper.Reaper) error {
	record, err := readSandbox(bundle)
	if err == nil && record.Pid != 0 && record.State != string(shimapi.Stopped) {
		init, err := r.Adopt(int(record.Pid), record.StartTicks, nil)
		if err != nil {
			return err
		}
		_ = init.Signal(9) // an error says that it has ended
		select {
		case <-init.Done():
		case <-time.After(stubborn):
			return fmt.Errorf("process %d, the init of the sandbox, does not end", record.Pid)
		}
	}
	errs := []error{sandbox.Unpin(bundle)}
	if err == nil {
		errs = append(errs, removeCgroup(record))
	}
	return errors.Join(errs...)
}

func anyOf(m proto.Message) (*anypb.Any, error) {
	a, err := typeurl.MarshalAny(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()}, nil
}
