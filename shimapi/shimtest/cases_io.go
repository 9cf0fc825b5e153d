package shimtest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
)

// pipes are the client's side of a process's streams.
type pipes struct {
	in, out, errs string // paths
	stdin         *os.File
	readers       map[string]*os.File
}

// newPipes makes the FIFOs and opens the client's ends, as clients do before they create.
func (sh *shim) newPipes(name string, terminal bool) *pipes {
	sh.t.Helper()
	base := filepath.Join(sh.dir, sh.id+"."+name)
	p := &pipes{in: base + ".in", out: base + ".out", errs: base + ".err", readers: map[string]*os.File{}}
	if terminal {
		p.errs = ""
	}
	for _, path := range []string{p.in, p.out, p.errs} {
		if path != "" {
			sh.must("mkfifo", unix.Mkfifo(path, 0o600))
		}
	}
	for _, path := range []string{p.out, p.errs} {
		if path == "" {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		sh.must("open", err)
		p.readers[path] = f
	}
	var err error
	p.stdin, err = os.OpenFile(p.in, os.O_RDWR|unix.O_NONBLOCK, 0) // O_RDWR: the shim need not be there yet
	sh.must("open", err)
	return p
}

func (p *pipes) forCreate(r *task.CreateTaskRequest) {
	r.Stdin, r.Stdout, r.Stderr = p.in, p.out, p.errs
	r.Terminal = p.errs == ""
}

func (p *pipes) forExec(r *task.ExecProcessRequest) {
	r.Stdin, r.Stdout, r.Stderr = p.in, p.out, p.errs
	r.Terminal = p.errs == ""
}

// read reads a stream to its end. It is called when the process has been started: the shim has its side open then.
func (p *pipes) read(path string) <-chan string {
	got := make(chan string, 1)
	f := p.readers[path]
	_ = f.SetReadDeadline(time.Now().Add(patience))
	go func() {
		data, err := io.ReadAll(f)
		_ = f.Close()
		if err != nil {
			data = append(data, (" (" + err.Error() + ")")...)
		}
		got <- string(data)
	}()
	return got
}

// big prints a megabyte and a bit that no part of a stream can stand for.
const big = `i=0; while [ $i -lt 40000 ]; do echo "line $i of the output, to the end"; i=$((i+1)); done`

func bigOutput() []byte {
	var b bytes.Buffer
	for i := range 40000 {
		fmt.Fprintf(&b, "line %d of the output, to the end\n", i)
	}
	return b.Bytes()
}

// outputCase: two streams, apart, whole, and ended when the process has.
func outputCase(sh *shim) {
	want := sha256.Sum256(bigOutput())
	p := sh.newPipes("init", false)
	defer func() { _ = p.stdin.Close() }()
	sh.created(newSpec(sh.id, "sh", "-c", big+"; echo oops >&2; read line; exit 5"), p.forCreate)
	st := sh.state("")
	sh.expect("stdio/state", st.Stdin == p.in && st.Stdout == p.out && st.Stderr == p.errs && !st.Terminal, "%v", st)
	sh.start("")
	out, errs := p.read(p.out), p.read(p.errs)

	e := sh.newPipes("e1", false)
	defer func() { _ = e.stdin.Close() }()
	sh.must("Exec", sh.addExec("e1", e.forExec, "sh", "-c", big+"; echo exec oops >&2; exit 4"))
	sh.start("e1")
	eout, eerrs := e.read(e.out), e.read(e.errs)
	sh.expect("stdio/exec status", sh.wait("e1").ExitStatus == 4, "status %d", sh.wait("e1").ExitStatus)
	got := <-eout
	sh.expect("stdio/exec output", sha256.Sum256([]byte(got)) == want, "%d bytes, ending in %q", len(got), tail(got))
	got = <-eerrs
	sh.expect("stdio/exec errors", got == "exec oops\n", "%q", got)

	sh.expect("stdio/apart", sh.state("").Status == tasktypes.Status_RUNNING, "%v", sh.state(""))
	_, err := p.stdin.WriteString("go\n")
	sh.must("write", err)
	sh.expect("stdio/status", sh.wait("").ExitStatus == 5, "status %d", sh.wait("").ExitStatus)
	got = <-out
	sh.expect("stdio/output", sha256.Sum256([]byte(got)) == want, "%d bytes, ending in %q", len(got), tail(got))
	got = <-errs
	sh.expect("stdio/errors", got == "oops\n", "%q", got)
}

func tail(s string) string { return s[max(0, len(s)-80):] }

// inputCase: what the client wrote arrives, and the end of it when the client says so.
func inputCase(sh *shim) {
	p := sh.newPipes("init", false)
	sh.created(newSpec(sh.id, "cat"), p.forCreate)
	sh.start("")
	out, errs := p.read(p.out), p.read(p.errs)

	e := sh.newPipes("e1", false)
	sh.must("Exec", sh.addExec("e1", e.forExec, "sh", "-c", "cat; exit 6"))
	sh.start("e1")
	eout, eerrs := e.read(e.out), e.read(e.errs)

	for _, s := range []struct {
		execID    string
		p         *pipes
		out, errs <-chan string
		status    uint32
	}{{"e1", e, eout, eerrs, 6}, {"", p, out, errs, 0}} {
		_, err := s.p.stdin.WriteString("hello " + s.execID + "\n")
		sh.must("write", err)
		// The client's own end must be there until the shim has read: a FIFO that nobody holds forgets.
		sh.expect("stdin/open", sh.state(s.execID).Status == tasktypes.Status_RUNNING, "%v", sh.state(s.execID))
		sh.must("close", s.p.stdin.Close())
		_, err = request(sh.CloseIO, &task.CloseIORequest{ID: sh.id, ExecID: s.execID, Stdin: true})
		sh.expect("closeio", err == nil, "%v", err)
		sh.expect("closeio/status", sh.wait(s.execID).ExitStatus == s.status, "status %d", sh.wait(s.execID).ExitStatus)
		got := <-s.out
		sh.expect("stdin/arrives", got == "hello "+s.execID+"\n", "%q", got)
		<-s.errs
	}
}

// terminalCase: a container with a terminal of its own.
func terminalCase(sh *shim) {
	p := sh.newPipes("init", true)
	defer func() { _ = p.stdin.Close() }()
	spec := newSpec(sh.id, "sh", "-c", "read line; echo got $line; tty; stty size; exit 8")
	spec.Process.Terminal = true
	sh.created(spec, p.forCreate)
	sh.expect("terminal/state", sh.state("").Terminal, "%v", sh.state(""))
	_, err := request(sh.ResizePty, &task.ResizePtyRequest{ID: sh.id, Width: 111, Height: 44})
	sh.expect("terminal/resize", err == nil, "%v", err)
	sh.start("")
	sh.talk(p, "", "init")
}

// execTerminalCase: the same for an exec in a container without.
func execTerminalCase(sh *shim) {
	sh.running(nil)
	p := sh.newPipes("e1", true)
	defer func() { _ = p.stdin.Close() }()
	sh.must("Exec", sh.addExec("e1", p.forExec, "sh", "-c", "read line; echo got $line; tty; stty size; exit 8"))
	sh.start("e1")
	_, err := request(sh.ResizePty, &task.ResizePtyRequest{ID: sh.id, ExecID: "e1", Width: 111, Height: 44})
	sh.expect("terminal/exec resize", err == nil, "%v", err)
	sh.talk(p, "e1", "exec")
}

func (sh *shim) talk(p *pipes, execID, key string) {
	sh.t.Helper()
	out := p.read(p.out)
	_, err := p.stdin.WriteString("hello\n")
	sh.must("write", err)
	sh.expect("terminal/"+key+" status", sh.wait(execID).ExitStatus == 8, "status %d", sh.wait(execID).ExitStatus)
	got := strings.ReplaceAll(<-out, "\r", "")
	for _, want := range []string{"got hello\n", "/dev/pts/", "44 111\n"} {
		sh.expect("terminal/"+key+" output", strings.Contains(got, want), "%q", got)
	}
}
