package e2e

import (
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/managerd/managerd/test/regproxy"
)

const impatient = `
[plugins."io.managerd.registry.v1.client"]
stall_timeout = "2s"
upload_chunk_size = 1048576
`

// TestPullFaults: what goes wrong between a registry and the daemon, and passes, costs a pull time and some bytes, and no more.
func TestPullFaults(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, server.URL(), "a", 21, 3<<20, 200_000, 1<<20)
	proxy := regproxy.Before(t, server, nil)
	n.ref = proxy.Addr + "/a:latest"
	u := configured(t, impatient)
	u.start()
	var size int64
	for _, l := range n.layers {
		size += l.Size
	}
	refuse := func(status int, header ...string) http.HandlerFunc { return regproxy.Answer(status, "no", header...) }
	for _, c := range []struct {
		name   string
		faults []regproxy.Fault
	}{
		{"latency", []regproxy.Fault{{Delay: 200 * time.Millisecond}}},
		{"reset", []regproxy.Fault{{Path: "/blobs/", Times: 4, Reset: 100_000}}},
		{"reset at every turn", []regproxy.Fault{{Path: "/blobs/", Reset: 400_000}}},
		{"truncated", []regproxy.Fault{{Path: "/blobs/", Times: 4, Truncate: 150_000}}},
		{"stalled", []regproxy.Fault{{Path: "/blobs/", Times: 2, Stall: 50_000}}},
		{"silent", []regproxy.Fault{{Path: "/blobs/", Times: 1, Delay: time.Hour}}},
		{"429 with Retry-After", []regproxy.Fault{{Times: 2, Do: refuse(429, "Retry-After", "1")}}},
		{"429 in the middle", []regproxy.Fault{{Path: "/blobs/", After: 1, Times: 2, Do: refuse(429)}}},
		{"500", []regproxy.Fault{{Path: "/blobs/", Times: 2, Do: refuse(500)}}},
		{"502 of the manifest", []regproxy.Fault{{Path: "/manifests/", Times: 2, Do: refuse(502)}}},
		{"503 with Retry-After", []regproxy.Fault{{Path: "/blobs/", After: 2, Times: 1, Do: refuse(503, "Retry-After", "1")}}},
		{"all of it", []regproxy.Fault{
			{Times: 1, Do: refuse(503)}, {Path: "/blobs/", Times: 1, Reset: 70_000}, {Path: "/blobs/", Times: 1, Stall: 90_000},
			{Path: "/blobs/", Times: 1, Truncate: 10}, {Path: "/blobs/", Times: 1, Do: refuse(429, "Retry-After", "1")}, {Delay: 20 * time.Millisecond},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := &user{Daemon: u.Daemon, t: t}
			proxy.Heal()
			proxy.Add(c.faults...)
			u.mctl("images", "pull", "--plain-http", n.ref)
			n.whole(t, u.Daemon)
			most := 2 * size
			if c.name == "reset at every turn" {
				most = 5 * size // a reset takes with it what the sender's kernel still had
			}
			if sent := proxy.Sent(); sent > most {
				t.Errorf("%d bytes were sent for %d", sent, size)
			}
			u.mctl("images", "rm", "--sync", n.ref)
			equal(t, "content", u.mctl("content", "ls", "-q"), "")
			equal(t, "ingests", u.mctl("content", "active", "-o", "json"), "[]\n")
		})
	}
}

// TestPushFaults: a push through the same arrives, every byte of it; what breaks off goes on at the chunk.
func TestPushFaults(t *testing.T) {
	source := regproxy.Start(t, regproxy.Options{})
	n := makeNoise(t, source.URL(), "a", 22, 3<<20, 200_000, 2<<20)
	n.ref = source.Addr + "/a:latest"
	u := configured(t, impatient)
	u.start()
	u.mctl("images", "pull", "--plain-http", n.ref)
	refuse := func(status int, header ...string) http.HandlerFunc { return regproxy.Answer(status, "no", header...) }
	for i, c := range []struct {
		name   string
		faults []regproxy.Fault
	}{
		{"latency", []regproxy.Fault{{Delay: 100 * time.Millisecond}}},
		{"reset in a chunk", []regproxy.Fault{{Method: "PATCH", After: 1, Times: 2, Reset: 300_000}}},
		{"reset in a whole one", []regproxy.Fault{{Method: "PUT", Path: "/blobs/", Times: 1, Reset: 100_000}}},
		{"the answer is lost", []regproxy.Fault{{Method: "PUT", Times: 2, Truncate: 1}}},
		{"429", []regproxy.Fault{{Method: "POST", Times: 2, Do: refuse(429, "Retry-After", "1")}}},
		{"500 in the middle", []regproxy.Fault{{Method: "PATCH", After: 2, Times: 1, Do: refuse(500)}}},
		{"503 of the manifest", []regproxy.Fault{{Method: "PUT", Path: "/manifests/", Times: 2, Do: refuse(503)}}},
		{"chunks are not taken", []regproxy.Fault{{Method: "PATCH", Do: refuse(405)}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := &user{Daemon: u.Daemon, t: t}
			server := regproxy.Start(t, regproxy.Options{})
			proxy := regproxy.Before(t, server, nil)
			proxy.Add(c.faults...)
			to := fmt.Sprintf("%s/to%d:1", proxy.Addr, i)
			equal(t, "push", u.mctl("images", "push", "--plain-http", to, n.ref), to+" "+n.target.Digest.String()+"\n")
			raw := skopeo(t, "inspect", "--raw", "--tls-verify=false", fmt.Sprintf("docker://%s/to%d:1", server.Addr, i))
			equal(t, "what skopeo finds", digest.FromString(raw).String(), n.target.Digest.String())
			for _, l := range n.layers {
				data, err := os.ReadFile(server.Blob(l.Digest.Encoded()))
				if err != nil || digest.FromBytes(data) != l.Digest {
					t.Errorf("%d bytes of layer %s arrived, %v", len(data), l.Digest, err)
				}
			}
		})
	}
}
