package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/managerd/managerd/test/regproxy"
)

// troubled is an image at a registry, and a proxy before it.
func troubled(t *testing.T, size int) (*regproxy.Registry, *regproxy.Proxy, picture) {
	t.Helper()
	server := regproxy.Start(t, regproxy.Options{})
	image := paint(t, random(7, size))
	image.hang(t, repository(t, client(t, quick()), server.Addr+"/a:b", Options{}))
	return server, regproxy.Before(t, server, nil), image
}

// TestFaults: what goes wrong in the middle, and passes, the caller does not notice.
func TestFaults(t *testing.T) {
	const size = 4 << 20
	_, proxy, image := troubled(t, size)
	page := regproxy.Answer(200, "<html>please log in</html>", "Content-Type", "text/html; charset=utf-8")
	wrongBytes := func(resp *http.Response) {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{bytes.NewReader(random(8, size)), resp.Body}
	}
	for name, c := range map[string]struct {
		faults    []regproxy.Fault
		layer     func(error) bool // what becomes of the layer; nil: it is right
		words     string
		refetched int64 // most bytes that come twice
	}{
		"reset":               {faults: []regproxy.Fault{{Path: "/blobs/", Times: 2, Reset: 3 << 20}}, refetched: 2 << 20},
		"truncated":           {faults: []regproxy.Fault{{Path: "/blobs/", Times: 2, Truncate: 1 << 20}}, refetched: 1 << 20},
		"stalled":             {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Stall: 3 << 20}}, refetched: 1 << 20},
		"slow to answer":      {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Delay: time.Minute}}},
		"reset at every turn": {faults: []regproxy.Fault{{Path: "/blobs/", Reset: 1 << 19}}, refetched: 4 << 20},
		"no ranges":           {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Reset: 1 << 20}, {Path: "/blobs/", Request: func(r *http.Request) { r.Header.Del("Range") }}}, refetched: 2 << 20},
		"500":                 {faults: []regproxy.Fault{{Path: "/blobs/", Times: 2, Do: regproxy.Answer(500, "oops")}}},
		"503":                 {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Do: regproxy.Answer(503, "", "Retry-After", "1")}}},
		"429":                 {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Do: regproxy.Answer(429, "", "Retry-After", "1")}}},
		"429 until a date": {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Do: func(w http.ResponseWriter, r *http.Request) {
			regproxy.Answer(429, "", "Retry-After", time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat))(w, r)
		}}}},
		"429 for long":         {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(429, `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`, "Retry-After", "3600")}}, layer: errdefs.IsResourceExhausted, words: "slow down (try again in 1h0m0s)"},
		"500 for ever":         {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(500, "oops")}}, layer: errdefs.IsUnavailable, words: "500 Internal Server Error: oops"},
		"404":                  {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(404, `{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}`)}}, layer: errdefs.IsNotFound, words: "blob unknown"},
		"403":                  {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(403, "")}}, layer: errdefs.IsPermissionDenied, words: "403 Forbidden"},
		"a page":               {faults: []regproxy.Fault{{Path: "/blobs/", Do: page}}, layer: func(err error) bool { return errors.Is(err, ErrNotRegistry) && errdefs.IsUnavailable(err) }, words: "a web page"},
		"a page with 502":      {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(502, "<html>", "Content-Type", "text/html")}}, layer: errdefs.IsUnavailable, words: "502 Bad Gateway: a web page"},
		"other bytes":          {faults: []regproxy.Fault{{Path: "/blobs/", Rewrite: wrongBytes}}, layer: func(err error) bool { return errors.Is(err, ErrDigest) && errdefs.IsFailedPrecondition(err) }, words: "wrong digest"},
		"too short":            {faults: []regproxy.Fault{{Path: "/blobs/", Do: regproxy.Answer(200, "short")}}, layer: errdefs.IsFailedPrecondition, words: "it has 5 bytes, where"},
		"compressed once more": {faults: []regproxy.Fault{{Path: "/blobs/", Rewrite: func(r *http.Response) { r.Header.Set("Content-Encoding", "gzip") }}}, layer: errdefs.IsFailedPrecondition, words: "compressed once more (gzip)"},
		"a byte each time":     {faults: []regproxy.Fault{{Path: "/blobs/", Truncate: 1}}, layer: errdefs.IsUnavailable, words: "broke off after 105 of"},
		"redirected in circles": {faults: []regproxy.Fault{{Path: "/blobs/", Do: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path+"?again", http.StatusTemporaryRedirect)
		}}}, layer: errdefs.IsFailedPrecondition, words: "redirected more than 10 times"},
		"an odd range": {faults: []regproxy.Fault{{Path: "/blobs/", Times: 1, Reset: 1 << 20}, {Path: "/blobs/", Rewrite: func(r *http.Response) {
			r.Header.Set("Content-Range", "bytes 0-9/10")
		}}}, layer: errdefs.IsFailedPrecondition, words: "asked for bytes from", refetched: size},
	} {
		t.Run(name, func(t *testing.T) {
			proxy.Heal()
			proxy.Add(c.faults...)
			cfg := quick()
			if strings.HasPrefix(name, "s") { // stalled, or slow
				cfg.StallTimeout = 2 * time.Second
			}
			got, err := all(repository(t, client(t, cfg), proxy.Addr+"/a:b", Options{}), image.layer, 0)
			if c.layer == nil {
				same(t, "layer", got, err, image.data[image.layer.Digest])
			} else if !c.layer(err) || c.words != "" && !strings.Contains(err.Error(), c.words) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if err == nil && proxy.Sent() > size+c.refetched {
				t.Errorf("%d bytes were sent for %d", proxy.Sent(), size)
			}
		})
	}
}

// TestEndless: what comes after a blob's size is not read.
func TestEndless(t *testing.T) {
	_, proxy, image := troubled(t, 1<<20)
	data := image.data[image.layer.Digest]
	proxy.Add(regproxy.Fault{Path: "/blobs/", Do: func(w http.ResponseWriter, r *http.Request) {
		_, err := w.Write(data)
		for zero := make([]byte, 1<<16); err == nil; {
			_, err = w.Write(zero)
		}
	}})
	got, err := all(repository(t, client(t, quick()), proxy.Addr+"/a:b", Options{}), image.layer, 0)
	same(t, "layer", got, err, data)
}

// TestNoRanges: whoever wants only a part is told that it costs the whole.
func TestNoRanges(t *testing.T) {
	_, proxy, image := troubled(t, 1<<20)
	proxy.Add(regproxy.Fault{Path: "/blobs/", Request: func(r *http.Request) { r.Header.Del("Range") }})
	repo := repository(t, client(t, quick()), proxy.Addr+"/a:b", Options{})
	if _, err := repo.FetchRange(context.Background(), image.layer, 10, 20); !errors.Is(err, ErrNoRanges) || !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	rc, err := repo.FetchRange(context.Background(), image.layer, 0, 20)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	same(t, "beginning", got, err, image.data[image.layer.Digest][:20])
	got, err = all(repo, image.layer, 1000)
	same(t, "the rest", got, err, image.data[image.layer.Digest][1000:])
}

// TestStall: a reader that waits in vain says so, and how far it got.
func TestStall(t *testing.T) {
	_, proxy, image := troubled(t, 1<<20)
	proxy.Add(regproxy.Fault{Path: "/blobs/", Times: 1, Stall: 5000}, regproxy.Fault{Path: "/blobs/", Delay: time.Hour})
	cfg := quick()
	cfg.Attempts, cfg.StallTimeout = 2, 2*time.Second
	got, err := all(repository(t, client(t, cfg), proxy.Addr+"/a:b", Options{}), image.layer, 0)
	var stall *StallError
	if len(got) != 5000 || !errors.As(err, &stall) || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no byte came for 2s") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestRestart: a registry that is killed in the middle and comes back is waited for.
func TestRestart(t *testing.T) {
	server, proxy, image := troubled(t, 32<<20)
	cfg := quick()
	cfg.Attempts = 8
	repo := repository(t, client(t, cfg), proxy.Addr+"/a:b", Options{})
	rc, err := repo.Fetch(context.Background(), image.layer, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	first := make([]byte, 1000)
	if _, err := io.ReadFull(rc, first); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	var (
		rest []byte
		read = make(chan struct{})
	)
	go func() {
		defer close(read)
		rest, err = io.ReadAll(rc)
	}()
	server.Run(t)
	<-read
	same(t, "layer", append(first, rest...), err, image.data[image.layer.Digest])
	if n := len(proxy.Seen("GET", "/blobs/")); n < 2 {
		t.Errorf("%d requests: it was not killed in the middle", n)
	}
}

// TestCancelled: a caller that gives up is not kept.
func TestCancelled(t *testing.T) {
	_, proxy, image := troubled(t, 1<<20)
	cfg := quick()
	cfg.StallTimeout = time.Hour
	why := errors.New("enough")
	for name, f := range map[string]regproxy.Fault{"in the middle": {Path: "/blobs/", Stall: 5000}, "before": {Path: "/blobs/", Delay: time.Hour}, "between": {Path: "/blobs/", Do: regproxy.Answer(503, "", "Retry-After", "9")}} {
		proxy.Heal()
		proxy.Add(f)
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(200*time.Millisecond, func() { cancel(why) })
		rc, err := repository(t, client(t, cfg), proxy.Addr+"/a:b", Options{}).Fetch(ctx, image.layer, 0)
		if err == nil {
			_, err = io.ReadAll(rc)
			_ = rc.Close()
		}
		if !errors.Is(err, why) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestManifests: what a registry says of an image is believed when it fits.
func TestManifests(t *testing.T) {
	_, proxy, image := troubled(t, 1000)
	manifest := string(image.data[image.manifest.Digest])
	long := `{"schemaVersion":2,"x":"` + strings.Repeat("x", 5<<20) + `"}`
	for name, c := range map[string]struct {
		faults []regproxy.Fault
		kind   func(error) bool // nil: it is right
		words  string
	}{
		"HEAD is not there":    {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(405, "")}}},
		"HEAD fails":           {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(500, "")}}},
		"HEAD says too little": {faults: []regproxy.Fault{{Method: "HEAD", Rewrite: func(r *http.Response) { r.Header.Del("Docker-Content-Digest") }}}},
		"nothing is said": {faults: []regproxy.Fault{{Path: "/manifests/", Rewrite: func(r *http.Response) {
			r.Header.Del("Docker-Content-Digest")
			r.Header.Set("Content-Type", "text/plain")
		}}}},
		"the digest is another": {faults: []regproxy.Fault{{Path: "/manifests/", Method: "HEAD", Do: regproxy.Answer(405, "")}, {Path: "/manifests/", Do: regproxy.Answer(200, manifest+" ", "Content-Type", ocispec.MediaTypeImageManifest, "Docker-Content-Digest", image.manifest.Digest.String())}}, kind: errdefs.IsFailedPrecondition, words: "the manifest should be"},
		"far too long":          {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(405, "")}, {Do: regproxy.Answer(200, long, "Content-Type", ocispec.MediaTypeImageManifest)}}, kind: errdefs.IsFailedPrecondition, words: "the limit is 4194304"},
		"a page":                {faults: []regproxy.Fault{{Do: regproxy.Answer(200, "<html>", "Content-Type", "text/html")}}, kind: errdefs.IsUnavailable, words: "a web page"},
		"no manifest":           {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(405, "")}, {Do: regproxy.Answer(200, `{"a":1}`, "Content-Type", "application/json")}}, kind: errdefs.IsFailedPrecondition, words: "no image manifest"},
		"schema 1":              {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(405, "")}, {Do: regproxy.Answer(200, `{"schemaVersion":1}`, "Content-Type", dockerSchema1+"prettyjws")}}, kind: errdefs.IsNotImplemented, words: "schema 1"},
		"broken off, once":      {faults: []regproxy.Fault{{Method: "HEAD", Do: regproxy.Answer(405, "")}, {Times: 1, Path: "/manifests/", Truncate: 100}}},
	} {
		t.Run(name, func(t *testing.T) {
			proxy.Heal()
			proxy.Add(c.faults...)
			got, err := repository(t, client(t, quick()), proxy.Addr+"/a:b", Options{}).Resolve(context.Background())
			if c.kind == nil && (err != nil || got.Digest != image.manifest.Digest || got.Size != image.manifest.Size || got.MediaType != image.manifest.MediaType) {
				t.Errorf("%+v, %v", got, err)
			}
			if c.kind != nil && (!c.kind(err) || !strings.Contains(err.Error(), c.words)) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	proxy.Heal()
	proxy.Add(regproxy.Fault{Method: "GET", Path: "/manifests/", Do: regproxy.Answer(200, strings.Replace(manifest, "amd64", "arm64", 1)+" ", "Content-Type", ocispec.MediaTypeImageManifest)})
	repo := repository(t, client(t, quick()), proxy.Addr+"/a:b", Options{})
	if data, err := all(repo, image.manifest, 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%d bytes of another manifest: %v", len(data), err)
	}
	huge := image.manifest
	huge.Size = 100 << 20
	if _, err := all(repo, huge, 0); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the limit") {
		t.Error(err)
	}
}

// TestRedirects: content comes from where a registry says, credentials and headers do not go there.
func TestRedirects(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{Htpasswd: htpasswd})
	joe := Options{Credentials: func(context.Context, string) (Credential, error) {
		return Credential{Username: "joe", Password: "secret"}, nil
	}}
	image := paint(t, random(9, 1<<20))
	image.hang(t, repository(t, client(t, quick()), server.Addr+"/a:b", joe))
	proxy := regproxy.Before(t, server, nil)
	var leaked atomic.Value
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"Authorization", "X-Secret", "Cookie"} {
			if v := r.Header.Get(name); v != "" {
				leaked.Store(name + ": " + v)
			}
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(image.data[image.layer.Digest]))
	}))
	defer elsewhere.Close()
	// Another host, by name: the same port at localhost is another origin too.
	other := strings.Replace(elsewhere.URL, "127.0.0.1", "localhost", 1)
	proxy.Add(regproxy.Fault{Path: "/blobs/", Do: func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" || r.Header.Get("X-Secret") != "mine" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, other+"/blob?signature=secret", http.StatusTemporaryRedirect)
	}})
	o := joe
	o.Headers = http.Header{"X-Secret": {"mine"}}
	repo := repository(t, client(t, quick()), proxy.Addr+"/a:b", o)
	got, err := all(repo, image.layer, 0)
	same(t, "layer", got, err, image.data[image.layer.Digest])
	got, err = all(repo, image.layer, 100)
	same(t, "its end", got, err, image.data[image.layer.Digest][100:])
	if v := leaked.Load(); v != nil {
		t.Errorf("the other host got %s", v)
	}
	elsewhere.Close()
	if _, err := all(repo, image.layer, 0); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "signature") {
		t.Errorf("%v", err)
	}
	// Nor where it sends an upload to, and asks who comes.
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if v := r.Header.Get("Authorization"); v != "" {
			leaked.Store(v)
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="give"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer thief.Close()
	proxy.Heal()
	proxy.Add(regproxy.Fault{Method: "POST", Rewrite: func(r *http.Response) { r.Header.Set("Location", thief.URL+"/up") }})
	data := random(10, 100)
	if err := repo.Push(context.Background(), describe("x", data), bytes.NewReader(data)); !errdefs.IsUnauthorized(err) {
		t.Errorf("%v", err)
	}
	if v := leaked.Load(); v != nil {
		t.Errorf("the other host got %s", v)
	}
}

// TestUploads: an upload that breaks off goes on.
func TestUploads(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	proxy := regproxy.Before(t, server, nil)
	for name, c := range map[string]struct {
		faults []regproxy.Fault
		size   int
		kind   func(error) bool
		most   int // PATCH requests; 0: any
	}{
		"small":                 {size: 1000},
		"empty":                 {size: 0},
		"whole, broken once":    {size: 1 << 20, faults: []regproxy.Fault{{Method: "PUT", Times: 1, Reset: 1000}}},
		"chunks":                {size: 9 << 20, most: 5},
		"a chunk refused once":  {size: 9 << 20, faults: []regproxy.Fault{{Method: "PATCH", After: 2, Times: 1, Do: regproxy.Answer(503, "")}}, most: 6},
		"a chunk broken off":    {size: 9 << 20, faults: []regproxy.Fault{{Method: "PATCH", After: 2, Times: 1, Reset: 1 << 20}}},
		"the answer is lost":    {size: 9 << 20, faults: []regproxy.Fault{{Method: "PUT", Times: 1, Truncate: 1}}},
		"chunks are not taken":  {size: 9 << 20, faults: []regproxy.Fault{{Method: "PATCH", Do: regproxy.Answer(405, "")}}, most: 1},
		"nothing is taken":      {size: 1000, faults: []regproxy.Fault{{Method: "PUT", Do: regproxy.Answer(403, "")}}, kind: errdefs.IsPermissionDenied},
		"uploads are not begun": {size: 1000, faults: []regproxy.Fault{{Method: "POST", Do: regproxy.Answer(202, "")}}, kind: errdefs.IsFailedPrecondition},
		"it always breaks":      {size: 1000, faults: []regproxy.Fault{{Method: "PUT", Do: regproxy.Answer(500, "")}}, kind: errdefs.IsUnavailable},
		"another digest":        {size: 1000, faults: []regproxy.Fault{{Method: "PUT", Do: regproxy.Answer(201, "", "Docker-Content-Digest", "sha256:"+zeros)}}, kind: errdefs.IsFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			proxy.Heal()
			proxy.Add(c.faults...)
			cfg := quick()
			cfg.ChunkSize = 2 << 20
			data := random(int64(crc32.ChecksumIEEE([]byte(name))), c.size)
			desc := describe("application/octet-stream", data)
			var last atomic.Int64
			o := Options{Progress: func(_ ocispec.Descriptor, sent int64) { last.Store(sent) }}
			repo := repository(t, client(t, cfg), proxy.Addr+"/up:load", o)
			err := repo.Push(context.Background(), desc, bytes.NewReader(data))
			if c.kind != nil {
				if !c.kind(err) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			stored, err := os.ReadFile(server.Blob(desc.Digest.Encoded()))
			same(t, "stored", stored, err, data)
			if n := len(proxy.Seen("PATCH", "")); c.most > 0 && n > c.most {
				t.Errorf("%d PATCH requests, at most %d expected", n, c.most)
			}
			if last.Load() != int64(c.size) {
				t.Errorf("progress ends at %d of %d", last.Load(), c.size)
			}
			proxy.Heal()
			if err := repo.Push(context.Background(), desc, bytes.NewReader(data)); err != nil || len(proxy.Seen("POST", "")) != 0 {
				t.Errorf("pushed again: %v, %v", err, proxy.Seen("POST", ""))
			}
		})
	}
}

// TestResumedUpload: a registry that says how far an upload got is sent the rest only.
func TestResumedUpload(t *testing.T) {
	data := random(11, 3<<20)
	desc := describe("application/octet-stream", data)
	var (
		have    bytes.Buffer
		patches []string
		broke   bool
		sum     string
	)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := func() {
			w.Header().Set("Location", "/v2/a/blobs/uploads/1")
			w.Header().Set("Range", fmt.Sprintf("0-%d", max(have.Len()-1, 0)))
		}
		switch r.Method {
		case http.MethodPost:
			at()
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch:
			patches = append(patches, r.Header.Get("Content-Range"))
			if !broke && len(patches) == 2 {
				broke = true
				_, _ = io.CopyN(&have, r.Body, 1000)
				panic(http.ErrAbortHandler)
			}
			_, _ = io.Copy(&have, r.Body)
			at()
			w.WriteHeader(http.StatusAccepted)
		case http.MethodGet:
			at()
			w.WriteHeader(http.StatusNoContent)
		case http.MethodPut:
			sum = r.URL.Query().Get("digest")
			w.WriteHeader(http.StatusCreated)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer s.Close()
	cfg := quick()
	cfg.ChunkSize = 1 << 20
	repo := repository(t, client(t, cfg), strings.TrimPrefix(s.URL, "http://")+"/a:b", Options{})
	if err := repo.Push(context.Background(), desc, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	want := []string{"0-1048575", "1048576-2097151", "1049576-2098151", "2098152-3145727"}
	if fmt.Sprint(patches) != fmt.Sprint(want) || !bytes.Equal(have.Bytes(), data) || sum != desc.Digest.String() {
		t.Errorf("%v, %d bytes, %s", patches, have.Len(), sum)
	}
}
