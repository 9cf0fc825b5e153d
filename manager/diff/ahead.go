package diff

import (
	"io"

	"github.com/opencontainers/go-digest"
)

// ahead reads, and hashes, in a goroutine of its own, a few buffers ahead of its reader: unpacking costs as much time
// in the kernel as decompression does outside of it, and so they overlap.
type ahead struct {
	full chan chunk
	free chan []byte
	quit chan struct{}
	done chan struct{}

	cur  chunk
	rest []byte

	// Written by the goroutine, read once it has ended.
	digester digest.Digester
	size     int64
}

type chunk struct {
	buf []byte
	n   int
	err error
}

func readAhead(r io.Reader) *ahead {
	const buffers, size = 4, 256 << 10
	a := &ahead{
		full: make(chan chunk, buffers), free: make(chan []byte, buffers),
		quit: make(chan struct{}), done: make(chan struct{}),
		digester: digest.SHA256.Digester(),
	}
	for range buffers {
		a.free <- make([]byte, size)
	}
	go a.run(r)
	return a
}

func (a *ahead) run(r io.Reader) {
	defer close(a.done)
	for {
		var c chunk
		select {
		case c.buf = <-a.free:
		case <-a.quit:
			return
		}
		for c.n < len(c.buf) && c.err == nil {
			var n int
			n, c.err = r.Read(c.buf[c.n:])
			c.n += n
		}
		_, _ = a.digester.Hash().Write(c.buf[:c.n]) // a hash never fails
		a.size += int64(c.n)
		a.full <- c // has room for every buffer there is
		if c.err != nil {
			return
		}
	}
}

// Read implements io.Reader, for one goroutine.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.buf != nil {
			a.free <- a.cur.buf
		}
		a.cur = <-a.full
		a.rest = a.cur.buf[:a.cur.n]
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop ends the goroutine and waits for it: it is in Read of the source for as long as that takes.
func (a *ahead) stop() {
	close(a.quit)
	<-a.done
}

// sum is the digest and the size of all that was read; Read must have returned EOF.
func (a *ahead) sum() (digest.Digest, int64) {
	<-a.done
	return a.digester.Digest(), a.size
}
