package wire

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
)

// A frame of ttrpc: four bytes of length (big endian, without the header), four of stream id, type, flags, payload.
const (
	headerLen = 10

	typeRequest  = 1
	typeResponse = 2
	typeData     = 3

	flagRemoteClosed = 1
)

// frame is a whole frame, header included.
type frame []byte

func (f frame) stream() uint32  { return binary.BigEndian.Uint32(f[4:]) }
func (f frame) kind() byte      { return f[8] }
func (f frame) flags() byte     { return f[9] }
func (f frame) payload() []byte { return f[headerLen:] }

// cut takes the first whole frame off b; nil when there is none yet. The frame shares b's memory.
func cut(b []byte) (f frame, rest []byte) {
	if len(b) < headerLen {
		return nil, b
	}
	n := headerLen + int(binary.BigEndian.Uint32(b))
	if len(b) < n {
		return nil, b
	}
	return frame(b[:n:n]), b[n:]
}

// longest is the most that a payload may be: ttrpc's own limit.
const longest = 4 << 20

// errTooLong ends a connection: it is an end of file to the server, which closes it then.
var errTooLong = fmt.Errorf("a ttrpc frame is longer than %d bytes: %w", longest, io.ErrUnexpectedEOF)

// tooLong says whether b begins with a frame that no server takes and that must not be gathered.
func tooLong(b []byte) bool { return len(b) >= headerLen && binary.BigEndian.Uint32(b) > longest }

// call is a request that has not been answered.
type call struct {
	request         frame
	at              time.Time // when it came
	service, method string
	sent            []byte // the newest message of its stream that the client was sent; nil before the first
}

// newCall reads a request frame. One that cannot be read has no name; the server will refuse it.
func newCall(f frame) *call {
	c := &call{request: append(frame(nil), f...), at: time.Now()}
	var r ttrpc.Request
	if proto.Unmarshal(f.payload(), &r) == nil {
		c.service, c.method = r.Service, r.Method
	}
	return c
}

// again is the request as it must be asked of a successor: with what is left of its timeout, and, for a stream that
// has begun, the payload that resume makes of it.
func (c *call) again(now time.Time, resume func(service, method string, payload, sent []byte) ([]byte, error)) (frame, error) {
	var r ttrpc.Request
	if err := proto.Unmarshal(c.request.payload(), &r); err != nil {
		return nil, fmt.Errorf("cannot read the request of stream %d: %w", c.request.stream(), err)
	}
	if r.TimeoutNano > 0 {
		r.TimeoutNano = max(1, r.TimeoutNano-now.Sub(c.at).Nanoseconds())
	}
	if resume != nil {
		payload, err := resume(c.service, c.method, r.Payload, c.sent)
		if err != nil {
			return nil, fmt.Errorf("cannot resume %s/%s: %w", c.service, c.method, err)
		}
		r.Payload = payload
	}
	payload, err := proto.Marshal(&r)
	if err != nil {
		return nil, err
	}
	f := append(frame(nil), c.request[:headerLen]...)
	binary.BigEndian.PutUint32(f, uint32(len(payload)))
	return append(f, payload...), nil
}
