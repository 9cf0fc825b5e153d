package service_test

import (
	wire "encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	shim "github.com/managerd/managerd/protos/shim/v1"
	"github.com/managerd/managerd/shimapi"
)

// methods are those of the task API; the number of one stands for it in a fuzzed input.
var methods = []string{
	"State", "Create", "Start", "Delete", "Pids", "Pause", "Resume", "Checkpoint", "Kill", "Exec", "ResizePty", "CloseIO",
	"Update", "Wait", "Stats", "Connect", "Shutdown", "NoSuchMethod",
	"Describe", "Exits", "Park", // from here on those of managerd.shim.v1 that are answered once
}

// serviceOf is the service that has a method.
func serviceOf(method string) string {
	if slices.Index(methods, method) >= slices.Index(methods, "Describe") {
		return "managerd.shim.v1.Shim"
	}
	return shimapi.TaskServiceV3
}

// script is a sequence of requests: for each the number of its method, two bytes of length, the payload.
func script(t testing.TB, calls ...any) (out []byte) {
	t.Helper()
	for i := 0; i < len(calls); i += 2 {
		n := 0
		for j, m := range methods {
			if m == calls[i] {
				n = j
			}
		}
		var payload []byte
		switch p := calls[i+1].(type) {
		case []byte:
			payload = p
		case proto.Message:
			var err error
			if payload, err = proto.Marshal(p); err != nil {
				t.Fatal(err)
			}
		}
		out = append(out, byte(n))
		out = wire.BigEndian.AppendUint16(out, uint16(len(payload)))
		out = append(out, payload...)
	}
	return out
}

// harmless takes the paths out of a payload, which name files of the machine: what is fuzzed runs as root.
func harmless(method string, payload []byte) []byte {
	var clean proto.Message
	switch method {
	case "Create":
		r := &task.CreateTaskRequest{}
		if proto.Unmarshal(payload, r) != nil {
			return payload
		}
		r.Rootfs, r.Stdin, r.Stdout, r.Stderr, r.Checkpoint, clean = nil, "", "", "", "", r
	case "Checkpoint":
		r := &task.CheckpointTaskRequest{}
		if proto.Unmarshal(payload, r) != nil {
			return payload
		}
		r.Path, r.Options, clean = "", nil, r
	case "Exec":
		r := &task.ExecProcessRequest{}
		if proto.Unmarshal(payload, r) != nil {
			return payload
		}
		r.Stdin, r.Stdout, r.Stderr, clean = "", "", "", r
	case "Park":
		r := &shim.ParkRequest{}
		if proto.Unmarshal(payload, r) != nil {
			return payload
		}
		r.Socket, clean = "", r
	default:
		return payload
	}
	out, err := proto.Marshal(clean)
	if err != nil {
		return nil
	}
	return out
}

// frame is one ttrpc request on the wire, its payload as it is.
func frame(t testing.TB, stream uint32, method string, payload []byte) []byte {
	t.Helper()
	body, err := proto.Marshal(&ttrpc.Request{Service: serviceOf(method), Method: method, Payload: payload, TimeoutNano: int64(200 * time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	head := wire.BigEndian.AppendUint32(nil, uint32(len(body)))
	head = wire.BigEndian.AppendUint32(head, stream)
	return append(append(head, 1, 0), body...) // type request, no flags
}

// answer reads one response.
func answer(c net.Conn) error {
	var head [10]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	body := make([]byte, wire.BigEndian.Uint32(head[:4]))
	if _, err := io.ReadFull(c, body); err != nil {
		return err
	}
	if head[8] != 2 {
		return errors.New("not a response")
	}
	return proto.Unmarshal(body, &ttrpc.Response{})
}

// FuzzRequests sends sequences of requests with any payload to a shim whose container runs. Each is answered, and at the
// end the shim lives and can be taken down; what came of it stays in its bundle.
func FuzzRequests(f *testing.F) {
	const id, e1 = "fuzz", "e1"
	spec := &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: []byte(`{"args":["sleep","1000"],"cwd":"/","env":["PATH=/bin"]}`)}
	junk := []byte("\x0a\x04fuzz\x12\xff\xff\xff\xff\x0f\x00\xfe")
	for _, m := range methods {
		f.Add(script(f, m, []byte(nil), m, junk, m, []byte{0x0a, 0x04, 'f', 'u', 'z', 'z'}))
	}
	f.Add(script(f, "Exec", &task.ExecProcessRequest{ID: id, ExecID: e1, Spec: limited(f, time.Millisecond, "sleep", "1000")}, "Start", &task.StartRequest{ID: id, ExecID: e1},
		"Wait", &task.WaitRequest{ID: id, ExecID: e1}, "Exits", &shim.ExitsRequest{Since: 1 << 63}, "Describe", &shim.DescribeRequest{}))
	f.Add(script(f, "Exec", &task.ExecProcessRequest{ID: id, ExecID: "../../x", Spec: spec}, "Start", &task.StartRequest{ID: id, ExecID: "../../x"}))
	f.Add(script(f, "Exec", &task.ExecProcessRequest{ID: id, ExecID: e1, Spec: spec, Terminal: true}, "Start", &task.StartRequest{ID: id, ExecID: e1},
		"ResizePty", &task.ResizePtyRequest{ID: id, ExecID: e1, Width: 1 << 31, Height: 1 << 31}, "CloseIO", &task.CloseIORequest{ID: id, ExecID: e1, Stdin: true},
		"Kill", &task.KillRequest{ID: id, ExecID: e1, Signal: 1 << 31}, "Kill", &task.KillRequest{ID: id, ExecID: e1, Signal: 15}, "Delete", &task.DeleteRequest{ID: id, ExecID: e1}))
	f.Add(script(f, "Pause", &task.PauseRequest{ID: id}, "Update", &task.UpdateTaskRequest{ID: id, Resources: &anypb.Any{TypeUrl: "x", Value: []byte(`{"memory":{"limit":-5},"cpu":{"quota":-1,"period":0}}`)}},
		"Kill", &task.KillRequest{ID: id, Signal: 9, All: true}, "Wait", &task.WaitRequest{ID: id}, "Delete", &task.DeleteRequest{ID: id}, "Shutdown", &task.ShutdownRequest{ID: id, Now: true}))
	f.Fuzz(func(t *testing.T, input []byte) {
		fx := running(t, id, nil)
		for n := 0; n < 16 && len(input) > 3; n++ {
			method := methods[int(input[0])%len(methods)]
			size := min(int(wire.BigEndian.Uint16(input[1:3])), len(input)-3)
			payload := harmless(method, input[3:3+size])
			input = input[3+size:]
			if !fx.send(frame(t, 1, method, payload)) {
				t.Errorf("%s with %q is not answered", method, payload)
			}
		}
		fx.survived()
	})
}

// FuzzFrames sends any bytes to the socket: other clients do not notice.
func FuzzFrames(f *testing.F) {
	good := frame(f, 1, "Connect", nil)
	f.Add(good)
	f.Add([]byte{})
	f.Add(good[:7])
	f.Add(good[:len(good)-1])
	f.Add(frame(f, 2, "Connect", nil)) // even: a server's
	f.Add(append(frame(f, 3, "Connect", nil), good...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, 3, 0})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		fx := running(t, "frames", nil)
		c, err := shimapi.DialSocket(ctx, fx.socket())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(data) // the shim may hang up at any byte
		_ = c.Close()
		fx.survived()
	})
}

// send says whether a frame was answered; a shim that has ended in order need not answer.
func (f *fixture) send(frame []byte) bool {
	c, err := shimapi.DialSocket(ctx, f.socket())
	if err != nil {
		return f.shutDown()
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err = c.Write(frame); err == nil {
		err = answer(c)
	}
	return err == nil || f.shutDown()
}

// shutDown says whether the shim has ended because it was told to.
func (f *fixture) shutDown() bool {
	select {
	case <-f.done:
		return f.cmd.ProcessState.Success()
	case <-time.After(5 * time.Second):
		return false
	}
}

// survived looks for a shim that still answers, or has ended in order, and for what got out of the bundle.
func (f *fixture) survived() {
	f.t.Helper()
	if _, err := f.Connect(ctx, &task.ConnectRequest{ID: f.id}); err != nil && !f.shutDown() {
		f.t.Errorf("the shim does not answer: %v", err)
	}
	entries, err := os.ReadDir(filepath.Dir(f.dir))
	if err != nil {
		f.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "b" && e.Name() != "s" {
			f.t.Errorf("%s came out of the bundle", filepath.Join(filepath.Dir(f.dir), e.Name()))
		}
	}
}
