package diff_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/managerd/managerd/manager/diff"
)

const (
	encrypted = ocispec.MediaTypeImageLayerGzip + "+encrypted"
	twice     = "application/vnd.example.twice"
)

// flip is a cipher.
func flip(data []byte) []byte {
	out := make([]byte, len(data))
	for i, c := range data {
		out[i] = c ^ 0xff
	}
	return out
}

// processor is a shell script; $1 is a directory for it.
func processor(t *testing.T, id, accepts, returns, script string) diff.Processor {
	t.Helper()
	return diff.Processor{ID: id, Accepts: []string{accepts}, Returns: returns, Path: "/bin/sh", Args: []string{"-c", script, "decoder", t.TempDir()}, Env: []string{"KEY=from the configuration"}}
}

// invert undoes flip, with the tools of every machine.
const invert = `exec perl -0777 -pe '$_ = ~$_'`

// TestProcessors: a layer that two programs decode, one after the other, is applied; they have what containerd's
// protocol says they have.
func TestProcessors(t *testing.T) {
	c := newBlobs()
	data := layerTar(t, "f", "g")
	desc := c.add(twice, flip(gz(t, data)))
	outer := processor(t, "outer", twice, encrypted,
		`echo "$STREAM_PROCESSOR_MEDIATYPE $KEY" >$1/env; cat <&3 >$1/payload; `+invert)
	inner := processor(t, "inner", encrypted, ocispec.MediaTypeImageLayerGzip,
		`echo "$STREAM_PROCESSOR_MEDIATYPE" >$1/env; test -e /proc/self/fd/3 && echo unasked >$1/payload; cat`)
	payload, err := anypb.New(&anypb.Any{TypeUrl: "example/key", Value: []byte("secret")})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	out, err := diff.Apply(t.Context(), c, desc, bind(root), diff.ApplyOptions{
		Processors: diff.Processors{inner, outer}, Payloads: map[string]*anypb.Any{"outer": payload, "nobody": payload},
	})
	if err != nil {
		t.Fatal(err)
	}
	plain := c.add(ocispec.MediaTypeImageLayer, data)
	if out.Digest != plain.Digest || out.Size != plain.Size || out.MediaType != plain.MediaType {
		t.Errorf("%+v, not %+v", out, plain)
	}
	if _, err := os.Stat(filepath.Join(root, "g")); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(filepath.Join(outer.Args[3], "env")); string(got) != twice+" from the configuration\n" {
		t.Errorf("environment: %q", got)
	}
	if got, _ := os.ReadFile(filepath.Join(inner.Args[3], "env")); string(got) != encrypted+"\n" {
		t.Errorf("environment of the second: %q", got)
	}
	got, err := os.ReadFile(filepath.Join(outer.Args[3], "payload"))
	var read anypb.Any
	if err != nil || proto.Unmarshal(got, &read) != nil || !proto.Equal(&read, payload) {
		t.Errorf("payload: %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(inner.Args[3], "payload")); err == nil {
		t.Error("the second has a payload that is not for it")
	}
}

// TestProcessorFails: whatever a program does wrong, the error names it, and nothing of it stays.
func TestProcessorFails(t *testing.T) {
	const tarType, gzType = ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip
	long := strings.Repeat("x", 100_000)
	for name, c := range map[string]struct {
		returns, script string
		want            []string
		class           error
	}{
		"says why":                  {tarType, `echo "no key for me" >&2; exit 3`, []string{"stream processor one failed", "exit status 3", "no key for me"}, nil},
		"after all output":          {tarType, `cat; echo "bad signature" >&2; exit 1`, []string{"one failed", "exit status 1", "bad signature"}, nil},
		"in the middle, of a gzip":  {gzType, `gzip | head -c 100; echo "tired" >&2; exit 1`, []string{"one failed", "tired"}, nil},
		"is killed":                 {tarType, `kill -9 $$`, []string{"one failed", "signal: killed"}, nil},
		"says too much":             {tarType, `echo ` + long + ` >&2; exit 1`, []string{"one failed", "xxx ..."}, nil},
		"writes no layer":           {tarType, `cat >/dev/null; head -c 2000 /dev/zero | tr '\0' x`, []string{"no tar archive"}, errdefs.ErrInvalidArgument},
		"writes half of it":         {tarType, `head -c 300`, []string{"cut short"}, errdefs.ErrInvalidArgument},
		"never ends after nonsense": {tarType, `head -c 1000000 /dev/zero | tr '\0' x; exec sleep 1000`, []string{"no tar archive"}, errdefs.ErrInvalidArgument},
		"returns no layer":          {"text/plain", `cat`, []string{`media type "text/plain", which stream processor one makes of`}, errdefs.ErrNotImplemented},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blobs := newBlobs()
			desc := blobs.add(twice, layerTar(t, "f", "g"))
			p := processor(t, "one", twice, c.returns, "echo $$ >$1/pid; "+c.script)
			_, err := diff.Apply(t.Context(), blobs, desc, bind(t.TempDir()), diff.ApplyOptions{Processors: diff.Processors{p}})
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%.300v: not %q", err, w)
				}
			}
			if len(err.Error()) > 6000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if c.class != nil && !errors.Is(err, c.class) || c.class == nil && errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
			gone(t, filepath.Join(p.Args[3], "pid"))
		})
	}

	t.Run("no program", func(t *testing.T) {
		blobs := newBlobs()
		desc := blobs.add(twice, nil)
		p := diff.Processor{ID: "one", Accepts: []string{twice}, Returns: tarType, Path: "/nowhere/decoder"}
		_, err := diff.Apply(t.Context(), blobs, desc, bind(t.TempDir()), diff.ApplyOptions{Processors: diff.Processors{p}})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/nowhere/decoder") {
			t.Error(err)
		}
	})
	t.Run("a ring", func(t *testing.T) {
		ring := diff.Processors{
			{ID: "one", Accepts: []string{twice}, Returns: encrypted, Path: "/x"},
			{ID: "two", Accepts: []string{encrypted}, Returns: twice, Path: "/x"},
		}
		blobs := newBlobs()
		_, err := diff.Apply(t.Context(), blobs, blobs.add(twice, nil), bind(t.TempDir()), diff.ApplyOptions{Processors: ring})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "one comes to it again") || ring.Accept(twice) {
			t.Error(err)
		}
	})
}

// TestProcessorCancelled: a program that hangs, and its child, end with the request.
func TestProcessorCancelled(t *testing.T) {
	blobs := newBlobs()
	desc := blobs.add(twice, layerTar(t, "f"))
	p := processor(t, "one", twice, ocispec.MediaTypeImageLayer, `sleep 1000 & echo $! >$1/child; echo $$ >$1/pid; wait`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if pid, _ := os.ReadFile(filepath.Join(p.Args[3], "pid")); len(pid) > 1 {
				cancel()
			}
			time.Sleep(time.Millisecond)
		}
	}()
	_, err := diff.Apply(ctx, blobs, desc, bind(t.TempDir()), diff.ApplyOptions{Processors: diff.Processors{p}})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	gone(t, filepath.Join(p.Args[3], "pid"))
	gone(t, filepath.Join(p.Args[3], "child"))
}

// TestProcessorLeavesChild: a child that a program leaves behind keeps nobody waiting.
func TestProcessorLeavesChild(t *testing.T) {
	blobs := newBlobs()
	data := layerTar(t, "f")
	p := processor(t, "one", twice, ocispec.MediaTypeImageLayer, `cat; sleep 1000 & echo $! >$1/child`)
	if _, err := diff.Apply(t.Context(), blobs, blobs.add(twice, data), bind(t.TempDir()), diff.ApplyOptions{Processors: diff.Processors{p}}); err != nil {
		t.Error(err)
	}
	gone(t, filepath.Join(p.Args[3], "child"))
}

// TestProcessorInput: an input that breaks off is no end of it, and its error is what is told.
func TestProcessorInput(t *testing.T) {
	broken := errors.New("connection reset")
	p := processor(t, "one", twice, ocispec.MediaTypeImageLayer, `cat`)
	c := &brokenBlob{data: layerTar(t, "f"), err: broken}
	_, err := diff.Apply(t.Context(), c, ocispec.Descriptor{MediaType: twice}, bind(t.TempDir()), diff.ApplyOptions{Processors: diff.Processors{p}})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
}

// gone waits until the process whose ID stands in a file is no more.
func gone(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		return // it never ran
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") || unix.Kill(pid, 0) != nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d is still there", pid)
		}
	}
}

// brokenBlob is a blob that cannot be read to its end.
type brokenBlob struct {
	*blobs
	data []byte
	err  error
}

func (b *brokenBlob) Open(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(io.MultiReader(bytes.NewReader(b.data), iotest.ErrReader(b.err))), nil
}
