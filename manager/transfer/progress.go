package transfer

import (
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/archive"
)

// Progress is a step of a transfer, or how far one blob of it is.
type Progress struct {
	Event    string
	Name     string   // of a blob's ingest, or of an image; empty for the transfer as a whole
	Parents  []string // the names of what the blob is part of
	Progress int64    // bytes
	Total    int64
	Desc     *ocispec.Descriptor
}

// The events of a blob.
const (
	eventWaiting     = "waiting"
	eventDownloading = "downloading"
	eventUploading   = "uploading"
	eventExists      = "already exists"
	eventComplete    = "complete"
	eventExtracting  = "extracting"
	eventExtracted   = "extracted"
)

const (
	// tick is how often a blob's progress is told.
	tick = 200 * time.Millisecond
	// telling is how long the end of a transfer waits for one who does not listen.
	telling = 5 * time.Second
)

// tracker tells of the progress of blobs, in order, and never keeps those who work waiting. A nil one tells nobody.
type tracker struct {
	emit func(Progress)
	root string // the name of the image, which blobs without a parent are part of

	mu    sync.Mutex
	queue []Progress
	jobs  []*job
	known map[string]*job
	wake  chan struct{}
	done  chan struct{}
	ended bool
}

// job is one blob.
type job struct {
	t     *tracker
	now   Progress
	dirty bool
	bytes func() int64 // asks how far it is; nil when that is told

	unpacking, unpacked bool
}

func newTracker(root string, emit func(Progress)) *tracker {
	if emit == nil {
		return nil
	}
	t := &tracker{emit: emit, root: root, known: map[string]*job{}, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go t.run()
	return t
}

func (t *tracker) run() {
	defer close(t.done)
	every := time.NewTicker(tick)
	defer every.Stop()
	for {
		t.mu.Lock()
		t.collectLocked()
		queue, ended := t.queue, t.ended
		t.queue = nil
		t.mu.Unlock()
		for _, p := range queue {
			t.emit(p)
		}
		if ended && len(queue) == 0 {
			return
		}
		if ended {
			continue
		}
		select {
		case <-t.wake:
		case <-every.C:
		}
	}
}

// collectLocked queues what changed.
func (t *tracker) collectLocked() {
	for _, j := range t.jobs {
		if j.bytes != nil {
			if n := j.bytes(); n != j.now.Progress {
				j.now.Progress, j.dirty = n, true
			}
		}
		if j.dirty {
			j.dirty = false
			t.queue = append(t.queue, j.now)
		}
	}
}

// say tells of a step, after all that came before it.
func (t *tracker) say(p Progress) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.collectLocked()
	t.queue = append(t.queue, p)
	t.wakeUp()
}

func (t *tracker) wakeUp() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// end tells what is still to be told.
func (t *tracker) end() {
	if t == nil {
		return
	}
	t.mu.Lock()
	t.ended = true
	t.wakeUp()
	t.mu.Unlock()
	select {
	case <-t.done:
	case <-time.After(telling):
	}
}

// job enters a blob, or finds it, as part of parent.
func (t *tracker) job(desc ocispec.Descriptor, parent *ocispec.Descriptor) *job {
	if t == nil {
		return nil
	}
	name := archive.RefKey(desc)
	above := t.root
	if parent != nil {
		above = archive.RefKey(*parent)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if j := t.known[name]; j != nil {
		return j
	}
	j := &job{t: t, dirty: true, now: Progress{Event: eventWaiting, Name: name, Parents: []string{above}, Total: desc.Size, Desc: &desc}}
	t.known[name] = j
	t.jobs = append(t.jobs, j)
	return j
}

// follow has bytes asked for how far the blob is.
func (j *job) follow(event string, bytes func() int64) {
	if j == nil {
		return
	}
	j.t.mu.Lock()
	defer j.t.mu.Unlock()
	j.now.Event, j.bytes, j.dirty = event, bytes, true
}

// set ends that.
func (j *job) set(event string, progress int64) {
	if j == nil {
		return
	}
	j.t.mu.Lock()
	defer j.t.mu.Unlock()
	j.now.Event, j.now.Progress, j.bytes, j.dirty = event, progress, nil, true
	j.unpackLocked()
}

// unpack notes that a layer is being unpacked, or has been, which is told when it is fetched.
func (j *job) unpack(done bool) {
	if j == nil {
		return
	}
	j.t.mu.Lock()
	defer j.t.mu.Unlock()
	j.unpacking, j.unpacked = true, done
	j.unpackLocked()
}

func (j *job) unpackLocked() {
	switch j.now.Event {
	case eventComplete, eventExists, eventExtracting:
		if j.unpacked {
			j.now.Event, j.dirty = eventExtracted, true
		} else if j.unpacking {
			j.now.Event, j.dirty = eventExtracting, true
		}
	}
}
