package diff

import (
	"fmt"
	"io"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

// Limits bound what one layer may become, so that a small blob does not fill the disk. 0 is no limit.
type Limits struct {
	Bytes   int64 // of the unpacked layer, and of its files with their holes
	Entries int64 // files, directories, links and whiteouts
	Ratio   int64 // bytes of the unpacked layer for one of the blob, once there are ratioFrom
}

// ratioFrom is how many bytes a layer may always become: zeros pack well, and a few of them harm nobody.
const ratioFrom = 1 << 30

// countRead counts what is read.
type countRead struct {
	r io.Reader
	n *atomic.Int64
}

func (c countRead) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// expansion is an unpacked layer, as long as it stays within its limits.
type expansion struct {
	r      io.Reader
	in     *atomic.Int64 // bytes of the blob
	out    int64
	limits Limits
}

func (e *expansion) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.out += int64(n)
	if l := e.limits.Bytes; l > 0 && e.out > l {
		return 0, fmt.Errorf("the layer has more than %d bytes when it is unpacked, the maximum (max_layer_bytes): %w", l, errdefs.ErrResourceExhausted)
	}
	if l, in := e.limits.Ratio, e.in.Load(); l > 0 && e.out > ratioFrom && e.out/l > in {
		return 0, fmt.Errorf("the layer becomes %d bytes out of %d, more than %d times as many (max_layer_ratio): %w", e.out, in, l, errdefs.ErrResourceExhausted)
	}
	return n, err
}
