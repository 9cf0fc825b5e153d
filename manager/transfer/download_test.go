package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/manager/content"
)

// TestPullNoRanges: a registry that only sends whole blobs serves, and what is there is kept.
func TestPullNoRanges(t *testing.T) {
	e := newEnv(t, content.Shared)
	b := e.reg.image("a:1", platforms.DefaultSpec(), 130, 1_000_000)
	large := b.layers[0]
	e.reg.serve = firstBytes(large.Digest, 300_000)
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err == nil {
		t.Fatal("a broken pull went well")
	}
	e.reg.serve = func(w http.ResponseWriter, r *http.Request, d digest.Digest, data []byte) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		_, _ = io.Copy(struct{ io.Writer }{w}, bytes.NewReader(data))
		return true
	}
	if _, err := e.pull(e.ctx, "a:1", Image{Unpacks: unpackHere()}); err != nil {
		t.Fatal(err)
	}
	e.clean(0)
}

// scripted is a remote whose answers are written down.
type scripted struct {
	Remote
	data    []byte
	answers []answer
	asked   []string
}

// answer is an error, or so many bytes and then one.
type answer struct {
	n   int
	err error
}

func (s *scripted) FetchRange(_ context.Context, _ ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	s.asked = append(s.asked, strconv.FormatInt(offset, 10)+"+"+strconv.FormatInt(length, 10))
	a := answer{n: int(length)}
	if len(s.answers) > 0 {
		a, s.answers = s.answers[0], s.answers[1:]
	}
	if a.n == 0 && a.err != nil {
		return nil, a.err
	}
	body := io.Reader(bytes.NewReader(s.data[offset : offset+int64(a.n)]))
	if a.err != nil {
		body = io.MultiReader(body, failing{a.err})
	}
	return io.NopCloser(body), nil
}

func (s *scripted) Fetch(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return s.FetchRange(ctx, d, offset, d.Size-offset)
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestDownload: what is asked for when parts break off, and when nobody asks again.
func TestDownload(t *testing.T) {
	broke := errors.New("connection reset")
	data := bytes.Repeat([]byte("0123456789"), 10)
	for _, c := range []struct {
		name    string
		answers []answer
		asked   string
		err     error
	}{
		{"well", nil, "0+40 40+40 80+20", nil},
		{"broken", []answer{{10, broke}, {0, broke}, {5, io.EOF}}, "0+40 10+30 10+30 15+25 40+40 80+20", nil},
		{"broken for good", []answer{{10, broke}, {0, broke}, {0, broke}}, "0+40 10+30 10+30", broke},
		{"not there", []answer{{0, errdefs.ErrNotFound}}, "0+40", errdefs.ErrNotFound},
		{"not for us", []answer{{3, errdefs.ErrPermissionDenied}}, "0+40", errdefs.ErrPermissionDenied},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, content.Shared)
			desc := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
			p, err := e.cfg.Content.Partial(e.ctx, "r", desc.Digest, desc.Size, 40)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = p.Close() }()
			s := &scripted{data: data, answers: c.answers}
			err = download(e.ctx, s, desc, p, 1)
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Errorf("%v", err)
			}
			if got := strings.Join(s.asked, " "); got != c.asked {
				t.Errorf("asked for %s, not %s", got, c.asked)
			}
			if c.err == nil && p.Commit(e.ctx, nil) != nil {
				t.Error("it is another")
			}
		})
	}
}
