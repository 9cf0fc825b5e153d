package diff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Processor is a program that turns blobs of some media types into another: a stream processor of containerd's
// configuration (docs/stream_processors.md there), such as a decoder of encrypted layers. It reads the blob from its
// standard input and writes to its standard output, finds the media type of the input in STREAM_PROCESSOR_MEDIATYPE, and
// on descriptor 3 the payload of the request for its ID, if there is one: a google.protobuf.Any. When it fails, it says
// why on standard error and exits with another status than 0.
type Processor struct {
	ID      string
	Accepts []string // media types
	Returns string   // media type
	Path    string   // of the program; without a slash it is looked for in PATH
	Args    []string
	Env     []string // NAME=VALUE, besides the daemon's own
	// Stall is how long it may neither read what there is for it, nor write, nor end, before it is killed; 0 is no limit.
	Stall time.Duration
}

// mediaTypeEnv tells a processor what it reads.
const mediaTypeEnv = "STREAM_PROCESSOR_MEDIATYPE"

const (
	// maxComplaint is how much of what a processor writes to its standard error is kept, in bytes.
	maxComplaint = 4 << 10
	// stderrDelay is how long children of a processor that has ended may hold its standard error open.
	stderrDelay = time.Second
)

// Processors are asked in their order.
type Processors []Processor

// Accept tells whether a blob of this media type can be made a layer: it is one, or processors make it one.
func (p Processors) Accept(mediaType string) bool {
	_, err := p.chain(mediaType)
	return err == nil
}

// chain finds the processors that make a layer of a blob, one after the other. They stand before what the daemon knows
// itself, except that a plain layer out of a processor is the end.
func (p Processors) chain(mediaType string) (Processors, error) {
	var out Processors
	for at := mediaType; ; {
		i := slices.IndexFunc(p, func(c Processor) bool { return slices.Contains(c.Accepts, at) })
		if i < 0 || len(out) > 0 && at == ocispec.MediaTypeImageLayer {
			if IsLayer(at) {
				return out, nil
			}
			by := ""
			if len(out) > 0 {
				by = fmt.Sprintf(", which stream processor %s makes of %q,", out[len(out)-1].ID, mediaType)
			}
			return nil, fmt.Errorf("media type %q%s is none of a layer: %w", at, by, errdefs.ErrNotImplemented)
		}
		if slices.ContainsFunc(out, func(c Processor) bool { return c.ID == p[i].ID }) {
			return nil, fmt.Errorf("stream processors make no layer of media type %q: %s comes to it again at %q: %w",
				mediaType, p[i].ID, at, errdefs.ErrFailedPrecondition)
		}
		out, at = append(out, p[i]), p[i].Returns
	}
}

// start runs the processors of a chain, each on the output of the one before, the first on r. The processes end with
// ctx. The caller closes the result, before r.
func (p Processors) start(ctx context.Context, mediaType string, r io.Reader, payloads map[string]*anypb.Any) (io.ReadCloser, error) {
	c := &chain{Reader: r}
	for _, one := range p {
		next, err := one.start(ctx, mediaType, c.Reader, payloads[one.ID])
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.all, c.Reader, mediaType = append(c.all, next), next, one.Returns
	}
	return c, nil
}

// chain is what the last of some processes writes.
type chain struct {
	io.Reader
	all []*process
}

func (c *chain) Close() error {
	for _, p := range c.all {
		_ = p.kill()
	}
	for _, p := range c.all {
		p.close()
	}
	return nil
}

// processedError is what is wrong with a layer as the last stream processor writes it.
type processedError struct {
	id  string
	err error
}

func (e *processedError) Error() string {
	return fmt.Sprintf("as stream processor %s writes it: %v", e.id, e.err)
}

func (e *processedError) Unwrap() error { return e.err }

// OfProcessor tells whether a layer could not be applied for a stream processor: it failed, or what it writes is no layer.
func OfProcessor(err error) bool {
	var failed *ProcessorError
	var wrong *processedError
	return errors.As(err, &failed) || errors.As(err, &wrong)
}

// ProcessorError is a stream processor that failed.
type ProcessorError struct {
	ID     string
	Err    error
	Stderr string
}

func (e *ProcessorError) Error() string {
	s := fmt.Sprintf("stream processor %s failed: %v", e.ID, e.Err)
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

func (e *ProcessorError) Unwrap() error { return e.Err }

// process is a processor that runs.
type process struct {
	id     string
	ctx    context.Context
	cmd    *exec.Cmd
	out    *os.File
	stderr complaint

	stall   time.Duration // see Processor
	moves   atomic.Int64  // how often there was input, or it took some
	starved atomic.Bool   // there is no input yet

	fed     chan struct{} // closed when its input is at its end
	feedErr error         // of the input, before fed
	done    chan struct{} // closed when it has ended
	exitErr error         // before done
	payload chan struct{} // closed when nobody writes the payload any more
	forget  func() bool   // of what ctx does to out

	mu     sync.Mutex
	reaped bool // its process group may be another's
}

func (p *Processor) start(ctx context.Context, mediaType string, in io.Reader, payload *anypb.Any) (_ *process, err error) {
	var files []*os.File // the child's
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	inR, inW := pipe()
	outR, outW := pipe()
	payR, payW := (*os.File)(nil), (*os.File)(nil)
	var data []byte
	if payload != nil && err == nil {
		payR, payW = pipe()
		if err == nil {
			data, err = proto.Marshal(payload)
		}
	}
	for _, f := range []*os.File{inR, outW, payR} {
		if f != nil {
			files = append(files, f)
		}
	}
	run := &process{id: p.ID, ctx: ctx, stall: p.Stall, out: outR, fed: make(chan struct{}), done: make(chan struct{}), payload: make(chan struct{})}
	if err == nil {
		run.cmd = exec.CommandContext(ctx, p.Path, p.Args...)
		run.cmd.Env = append(append(os.Environ(), p.Env...), mediaTypeEnv+"="+mediaType)
		run.cmd.Stdin, run.cmd.Stdout, run.cmd.Stderr = inR, outW, &run.stderr
		run.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		run.cmd.Cancel = run.kill
		run.cmd.WaitDelay = stderrDelay
		if payR != nil {
			run.cmd.ExtraFiles = []*os.File{payR}
		}
		if err = run.cmd.Start(); err != nil {
			err = fmt.Errorf("cannot run stream processor %s: %w: %w", p.ID, err, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		for _, f := range []*os.File{inW, outR, payW} {
			if f != nil {
				_ = f.Close()
			}
		}
		return nil, err
	}
	// A child that has left the group may hold the output open.
	run.forget = context.AfterFunc(ctx, func() { _ = outR.SetReadDeadline(time.Unix(1, 0)) })
	go run.feed(inW, in)
	go func() {
		defer close(run.payload)
		if payW != nil {
			_, _ = payW.Write(data) // whether it reads it is its own affair
			_ = payW.Close()
		}
	}()
	go run.wait()
	return run, nil
}

// wait reaps the process, and ends those of its children that it has left behind.
func (p *process) wait() {
	defer close(p.done)
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	_ = p.kill()
	p.mu.Lock()
	p.reaped = true
	p.mu.Unlock()
	if p.exitErr = p.cmd.Wait(); errors.Is(p.exitErr, exec.ErrWaitDelay) {
		p.exitErr = nil // it ended well, a child that left the group has its standard error
	}
}

// feed copies the input. A processor that does not want all of it may close it.
func (p *process) feed(w *os.File, in io.Reader) {
	defer close(p.fed)
	_, err := io.CopyBuffer(counted{w, p}, watched{in, p}, make([]byte, 256<<10))
	if err != nil && !errors.Is(err, unix.EPIPE) {
		p.feedErr = err
		_ = p.kill() // it must not take what there was for all of it
	}
	_ = w.Close()
}

// counted notes that a process takes its input.
type counted struct {
	w io.Writer
	p *process
}

func (c counted) Write(b []byte) (done int, err error) {
	const pipe = 64 << 10 // pipe(7)
	for done < len(b) && err == nil {
		var n int
		n, err = c.w.Write(b[done:min(len(b), done+pipe)])
		done += n
		c.p.moves.Add(1)
	}
	return done, err
}

// watched notes whether a process has to wait for its input.
type watched struct {
	r io.Reader
	p *process
}

func (w watched) Read(b []byte) (int, error) {
	w.p.starved.Store(true)
	n, err := w.r.Read(b)
	w.p.moves.Add(1)
	w.p.starved.Store(false)
	return n, err
}

// inputError is an error of what a process reads, which is none of its own.
type inputError struct{ error }

func (e inputError) Unwrap() error { return e.error }

// read reads the output, for as long as the process does anything.
func (p *process) read(b []byte) (int, error) {
	for p.stall > 0 {
		before := p.moves.Load()
		if err := p.out.SetReadDeadline(time.Now().Add(p.stall)); err != nil {
			return 0, err
		}
		if p.ctx.Err() != nil { // else it sets the deadline
			return 0, context.Cause(p.ctx)
		}
		n, err := p.out.Read(b)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || p.ctx.Err() != nil {
			return n, err
		}
		if p.moves.Load() == before && !p.starved.Load() {
			return 0, p.hangs()
		}
	}
	return p.out.Read(b)
}

// hangs kills a process that does nothing.
func (p *process) hangs() error {
	_ = p.kill()
	<-p.done
	return &ProcessorError{p.id, fmt.Errorf("it did nothing for %v: %w", p.stall, errdefs.ErrUnavailable), p.stderr.String()}
}

// Read implements io.Reader. The end of the output is one only when the process has ended well, and its input did.
func (p *process) Read(b []byte) (int, error) {
	n, err := p.read(b)
	if n > 0 || err == nil {
		return n, nil
	}
	if p.ctx.Err() != nil {
		return 0, context.Cause(p.ctx)
	}
	if !errors.Is(err, io.EOF) {
		return 0, err
	}
	var late <-chan time.Time
	if p.stall > 0 {
		t := time.NewTimer(p.stall)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-p.done:
	case <-late:
		return 0, p.hangs()
	case <-p.ctx.Done():
		return 0, context.Cause(p.ctx)
	}
	select {
	case <-p.fed:
	case <-p.ctx.Done():
		return 0, context.Cause(p.ctx)
	}
	switch {
	case p.ctx.Err() != nil:
		return 0, context.Cause(p.ctx)
	case p.feedErr != nil:
		return 0, inputError{p.feedErr}
	case p.exitErr != nil:
		return 0, &ProcessorError{p.id, p.exitErr, p.stderr.String()}
	}
	return 0, io.EOF
}

// kill ends the process and its children.
func (p *process) kill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	return unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
}

// close waits for a process that has ended or was killed, and for its input.
func (p *process) close() {
	<-p.done
	p.forget()
	_ = p.out.Close()
	<-p.payload
	<-p.fed
}

// complaint keeps the beginning of what is written to it.
type complaint struct{ data []byte }

func (c *complaint) Write(b []byte) (int, error) {
	c.data = append(c.data, b[:min(len(b), maxComplaint-len(c.data))]...)
	return len(b), nil
}

func (c *complaint) String() string {
	s := strings.ToValidUTF8(strings.TrimSpace(string(c.data)), "?")
	if len(c.data) == maxComplaint {
		s += " ..."
	}
	return s
}
