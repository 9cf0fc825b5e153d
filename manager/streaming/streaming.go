// Package streaming keeps the streams that clients open, by a name of theirs, for a later call to use, and carries bytes
// over them by containerd's protocol: the receiver grants the sender a window (WindowUpdate), and is sent Data within it.
// It must not know what a stream is for.
package streaming

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/namespaces"
)

// Stream is a client's. One goroutine may send while another receives.
type Stream interface {
	Send(*anypb.Any) error
	// Recv gives io.EOF when the client has ended its side.
	Recv() (*anypb.Any, error)
	// Close ends both sides. It may be called again.
	Close() error
}

// Manager knows the streams that are open.
type Manager struct {
	mu  sync.Mutex
	all map[string]Stream // by namespace and id
}

// NewManager returns one without streams.
func NewManager() *Manager { return &Manager{all: map[string]Stream{}} }

// Register enters a stream in the namespace of ctx, until the returned function is called. AlreadyExists when its id is
// taken.
func (m *Manager) Register(ctx context.Context, id string, s Stream) (func(), error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	if id == "" {
		return nil, fmt.Errorf("stream has no id: %w", errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	key := ns + "/" + id
	if m.all[key] != nil {
		return nil, fmt.Errorf("stream %q: %w", id, errdefs.ErrAlreadyExists)
	}
	m.all[key] = s
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.all, key)
	}, nil
}

// Get finds a stream. NotFound when its client has not opened it, or has closed it.
func (m *Manager) Get(ctx context.Context, id string) (Stream, error) {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.all[ns+"/"+id]
	if s == nil {
		return nil, fmt.Errorf("stream %q: %w", id, errdefs.ErrNotFound)
	}
	return s, nil
}
