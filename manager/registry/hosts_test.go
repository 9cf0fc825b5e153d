package registry

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/managerd/managerd/test/regproxy"
)

// said is an endpoint in words, as the tests below write it.
func said(e endpoint) string {
	var b strings.Builder
	fmt.Fprint(&b, e.base.String())
	for _, name := range []string{"pull", "resolve", "push", "referrers"} {
		if e.capabilities == everything {
			break
		}
		if e.capabilities&capabilities[name] != 0 {
			fmt.Fprintf(&b, " %s", name)
		}
	}
	add := func(name string, v any) {
		if !reflect.ValueOf(v).IsZero() {
			fmt.Fprintf(&b, " %s=%v", name, v)
		}
	}
	add("mirror", e.mirror)
	add("maybe plain", e.maybePlain)
	add("ca", strings.Join(e.settings.ca, ","))
	if e.settings.client != nil {
		add("client", e.settings.client)
	}
	add("skip", e.settings.skipVerify)
	add("dial", e.settings.dialTimeout)
	add("proxy", e.settings.proxy)
	if e.header != nil {
		add("header", e.header)
	}
	return b.String()
}

// TestHosts: which endpoints a registry has, by its host directory.
func TestHosts(t *testing.T) {
	for name, c := range map[string]struct {
		files    map[string]string
		registry string
		o        Options
		want     []string // DIR stands for the root
	}{
		"nothing":       {registry: "docker.io", want: []string{"https://registry-1.docker.io/v2"}},
		"another":       {registry: "a.b:5000", want: []string{"https://a.b:5000/v2"}},
		"plain":         {registry: "a.b:5000", o: Options{PlainHTTP: true}, want: []string{"http://a.b:5000/v2"}},
		"not verified":  {registry: "a.b", o: Options{SkipVerify: true}, want: []string{"https://a.b/v2 skip=true"}},
		"localhost":     {registry: "localhost:5000", want: []string{"https://localhost:5000/v2 maybe plain=true skip=true"}},
		"localhost:443": {registry: "localhost:443", want: []string{"https://localhost:443/v2 skip=true"}},
		"127.1":         {registry: "127.0.0.9:80", want: []string{"http://127.0.0.9:80/v2"}},
		"IPv6":          {registry: "[::1]:5000", want: []string{"https://[::1]:5000/v2 maybe plain=true skip=true"}},
		"not localhost": {registry: "localhost.example:5000", want: []string{"https://localhost.example:5000/v2"}},
		"mirrors, in order": {files: map[string]string{"docker.io/hosts.toml": `
server = "https://registry-1.docker.io"
[host."https://z.mirror"]
  capabilities = ["pull"]
[host."http://a.mirror:5000"]
  capabilities = ["pull", "resolve"]
[host.'b.mirror']
`}, registry: "docker.io", want: []string{
			"https://z.mirror/v2 pull referrers mirror=true", "http://a.mirror:5000/v2 pull resolve referrers mirror=true", "https://b.mirror/v2 mirror=true", "https://registry-1.docker.io/v2"}},
		"dotted and inline": {files: map[string]string{"a.b/hosts.toml": "host.\"https://z\".skip_verify = true\nhost.\"https://a\" = {dial_timeout = \"1s\"}\n"}, registry: "a.b", want: []string{
			"https://z/v2 mirror=true skip=true", "https://a/v2 mirror=true dial=1s", "https://a.b/v2"}},
		"inline hosts": {files: map[string]string{"a.b/hosts.toml": "host = {\"https://z\" = {}, \"https://a\" = {}}\n"}, registry: "a.b", want: []string{"https://z/v2 mirror=true", "https://a/v2 mirror=true", "https://a.b/v2"}},
		"tables below one": {files: map[string]string{"a.b/hosts.toml": "[host]\n[host.\"https://z\".header]\nx-y = [\"1\", \"2\"]\n[host.\"https://a\"]\n"}, registry: "a.b", want: []string{
			"https://z/v2 mirror=true header=map[X-Y:[1 2]]", "https://a/v2 mirror=true", "https://a.b/v2"}},
		"docker.io means its registry": {files: map[string]string{"docker.io/hosts.toml": `server = "https://docker.io"`}, registry: "docker.io", want: []string{"https://registry-1.docker.io/v2"}},
		"another server":               {files: map[string]string{"_default/hosts.toml": `server = "https://only.one/root"`}, registry: "a.b", want: []string{"https://only.one/root/v2 mirror=true"}},
		"override_path": {files: map[string]string{"a.b/hosts.toml": "[host.\"https://m/x/v2/proxy/\"]\noverride_path = true\n[host.\"https://n\"]\noverride_path = true\n[host.\"https://o/v2\"]\n"}, registry: "a.b", want: []string{
			"https://m/x/v2/proxy mirror=true", "https://n mirror=true", "https://o/v2 mirror=true", "https://a.b/v2"}},
		"at the top": {files: map[string]string{"a.b/hosts.toml": "ca = \"my.crt\"\nclient = \"/abs.pem\"\nskip_verify = true\ndial_timeout = \"500ms\"\ncapabilities = [\"Push\"]\nproxy = \"socks5://p:1\"\n[header]\nx-one = \"1\"\n"}, registry: "a.b", want: []string{
			"https://a.b/v2 push ca=DIR/a.b/my.crt client=[[/abs.pem ]] skip=true dial=500ms proxy=socks5://p:1 header=map[X-One:[1]]"}},
		"HTTP with settings of TLS": {files: map[string]string{"a.b/hosts.toml": "server = \"http://m:80\"\nskip_verify = true\n[host.\"http://m:5000\"]\nskip_verify = false\n[host.\"http://m\"]\nca = \"/x\"\n[host.\"http://n:5000\"]\n"}, registry: "a.b", want: []string{
			"https://m:5000/v2 mirror=true maybe plain=true", "http://m/v2 mirror=true ca=/x", "http://n:5000/v2 mirror=true", "http://m:80/v2 mirror=true skip=true"}},
		"lists of files": {files: map[string]string{"a.b/hosts.toml": "[host.\"https://m\"]\nca = [\"a\", \"/b\"]\nclient = [[\"c\", \"k\"], [\"/d\", \"\"]]\n[host.\"https://n\"]\nclient = [\"e\", \"f\"]\n"}, registry: "a.b", want: []string{
			"https://m/v2 mirror=true ca=DIR/a.b/a,/b client=[[DIR/a.b/c DIR/a.b/k] [/d ]]", "https://n/v2 mirror=true client=[[DIR/a.b/e ] [DIR/a.b/f ]]", "https://a.b/v2"}},
		"port with a line":  {files: map[string]string{"a.b_5000_/hosts.toml": `server = "https://one"`, "a.b:5000/hosts.toml": `server = "https://two"`}, registry: "a.b:5000", want: []string{"https://one/v2 mirror=true"}},
		"port with a colon": {files: map[string]string{"a.b:5000/hosts.toml": `server = "https://two"`, "_default/hosts.toml": `server = "https://three"`}, registry: "a.b:5000", want: []string{"https://two/v2 mirror=true"}},
		"any other":         {files: map[string]string{"a.b/hosts.toml": `server = "https://two"`, "_default/hosts.toml": `[host."https://three"]`}, registry: "a.b:5000", want: []string{"https://three/v2 mirror=true", "https://a.b:5000/v2"}},
		"certificates": {files: map[string]string{"a.b/ca.crt": "", "a.b/me.cert": "", "a.b/me.key": "", "a.b/README": ""}, registry: "a.b", want: []string{
			"https://a.b/v2 ca=DIR/a.b/ca.crt client=[[DIR/a.b/me.cert DIR/a.b/me.key]]"}},
		"hosts.toml goes before":    {files: map[string]string{"a.b/ca.crt": "", "a.b/hosts.toml": ""}, registry: "a.b", want: []string{"https://a.b/v2"}},
		"a CA is used at localhost": {files: map[string]string{"localhost:5000/hosts.toml": `ca = "/x"`}, registry: "localhost:5000", want: []string{"https://localhost:5000/v2 maybe plain=true ca=/x"}},
		"the request's own":         {files: map[string]string{"a.b/hosts.toml": `server = "https://two"`}, registry: "a.b", o: Options{HostDir: "/nonexistent"}, want: []string{"https://a.b/v2"}},
		"keys of later versions":    {files: map[string]string{"a.b/hosts.toml": "something = 1\n[host.\"https://m\"]\nelse = \"x\"\n"}, registry: "a.b", want: []string{"https://m/v2 mirror=true", "https://a.b/v2"}},
	} {
		dir := hostDir(t, c.files)
		r := client(t, Config{ConfigPath: []string{"/nonexistent", dir}})
		found, err := r.endpoints(c.registry, c.o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, e := range found {
			got = append(got, strings.ReplaceAll(said(e), dir, "DIR"))
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n%s\nnot\n%s", name, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
}

// TestWrongHosts: what is wrong in a host directory is told with its file.
func TestWrongHosts(t *testing.T) {
	for name, c := range map[string]struct{ file, words string }{
		"no TOML":        {"a = \n", "hosts.toml:1:"},
		"types":          {"server = 3\n", "hosts.toml:1:"},
		"capability":     {"capabilities = [\"pul\"]\n", `hosts.toml: server: capability "pul" is none of pull, resolve, push`},
		"host":           {"[host.\"ftp://x\"]\n", `hosts.toml: host "ftp://x": "ftp://x" is neither`},
		"no host":        {"[host.\"https://\"]\n", `names no host`},
		"a user":         {"[host.\"https://u:secret@m\"]\n", `has a user in it`},
		"a query":        {"server = \"https://m/?a=b\"\n", `has more than a host and a path`},
		"ca":             {"ca = 3\n", "ca must be a string or a list"},
		"no ca":          {"ca = \"\"\n", "ca names no file"},
		"client":         {"client = [[\"a\",\"b\",\"c\"]]\n", "client must be a file"},
		"header":         {"[header]\n\"a b\" = \"c\"\n", `header "a b" cannot be sent`},
		"header value":   {"[header]\na = 3\n", "header a must be a string"},
		"dial_timeout":   {"dial_timeout = \"soon\"\n", `dial_timeout "soon"`},
		"negative":       {"dial_timeout = \"-1s\"\n", `dial_timeout "-1s"`},
		"proxy":          {"proxy = \"p:1/x\"\n", `proxy "p:1/x"`},
		"missing ca":     {"ca = \"gone.crt\"\n", "gone.crt"},
		"ca of no PEM":   {"ca = \"hosts.toml\"\n", "has no PEM certificate"},
		"missing client": {"client = \"gone.pem\"\n", "gone.pem"},
	} {
		dir := hostDir(t, map[string]string{"127.0.0.1:1/hosts.toml": c.file})
		p, err := client(t, Config{ConfigPath: []string{dir}}).Repository("127.0.0.1:1/c", Options{})
		if err == nil {
			_, err = p.Resolve(context.Background())
		}
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := hostDir(t, map[string]string{"a.b/me.cert": ""})
	if _, err := client(t, Config{ConfigPath: []string{dir}}).Repository("a.b/c", Options{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "me.key") {
		t.Error(err)
	}
}

// TestLegacy: CRI's old mirrors, configs and auths.
func TestLegacy(t *testing.T) {
	l := Legacy{
		Mirrors: map[string][]string{"docker.io": {"http://m:5000", "https://n/x"}, "*": {"https://any"}, "own.io": {"http://own.io"}},
		TLS:     map[string]LegacyTLS{"n": {CAFile: "/ca", CertFile: "/c", KeyFile: "/k"}, "q.io": {InsecureSkipVerify: true}},
	}
	for registry, want := range map[string][]string{
		"docker.io": {"http://m:5000/v2 pull resolve referrers mirror=true", "https://n/x/v2 pull resolve referrers mirror=true ca=/ca client=[[/c /k]]", "https://registry-1.docker.io/v2"},
		"q.io":      {"https://any/v2 pull resolve referrers mirror=true", "https://q.io/v2 skip=true"},
		"own.io":    {"http://own.io/v2"},
	} {
		found, err := client(t, Config{Legacy: l}).endpoints(registry, Options{})
		if err != nil {
			t.Error(err)
		}
		var got []string
		for _, e := range found {
			got = append(got, said(e))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %q, not %q", registry, got, want)
		}
	}
	if _, err := client(t, Config{Legacy: Legacy{Mirrors: map[string][]string{"a.b": {"ftp://x"}}}}).Repository("a.b/c", Options{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	wrong := client(t, Config{Legacy: Legacy{Auths: map[string]LegacyAuth{"a.b": {Auth: "?"}}}})
	if _, err := wrong.configured(context.Background(), "a.b"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "a.b") {
		t.Error(err)
	}
	dir := hostDir(t, map[string]string{"docker.io/hosts.toml": ""})
	if found, err := client(t, Config{Legacy: l, ConfigPath: []string{dir}}).endpoints("docker.io", Options{}); err != nil || len(found) != 1 {
		t.Errorf("a host directory goes before: %v, %v", found, err)
	}
}

// TestMirrors: mirrors are asked in their order, for what they may be, and told which registry is meant; who fails is named,
// and left out for a while.
func TestMirrors(t *testing.T) {
	ctx := context.Background()
	server := regproxy.Start(t, regproxy.Options{})
	image := paint(t, random(20, 100000))
	image.hang(t, repository(t, client(t, quick()), server.Addr+"/a:b", Options{}))
	first, second, main := regproxy.Before(t, server, nil), regproxy.Before(t, server, nil), regproxy.Before(t, server, nil)
	dead := regproxy.Nobody(t)
	// The registry that is meant is main; it has no other name.
	hosts := `
server = "` + main.URL + `"
[host."` + first.URL + `"]
capabilities = ["pull"]
[host."http://` + dead + `"]
[host."` + second.URL + `/sub/dir"]
override_path = true
capabilities = ["pull", "resolve"]
[host."` + second.URL + `/sub/dir".header]
x-mine = "yes"
`
	sub := func(r *http.Request) { r.URL.Path = "/v2" + strings.TrimPrefix(r.URL.Path, "/sub/dir") }
	second.Add(regproxy.Fault{Path: "/sub/dir", Request: sub})
	cfg := quick()
	cfg.ConfigPath = []string{hostDir(t, map[string]string{"meant.example/hosts.toml": hosts})}
	r := client(t, cfg)
	repo := repository(t, r, "meant.example/a:b", Options{Headers: http.Header{"Authorization": {"Basic bWU6bWU="}, "X-All": {"1"}}})
	got, err := repo.Resolve(ctx)
	if err != nil || got.Digest != image.manifest.Digest {
		t.Fatal(got, err)
	}
	seen := second.Seen("HEAD", "/sub/dir/a/manifests/b")
	if len(first.Seen("", "")) != 0 || len(main.Seen("", "")) != 0 || len(seen) != 1 || seen[0].Query != "ns=meant.example" {
		t.Errorf("%+v", seen)
	}
	if h := seen[0].Header; h.Get("X-Mine") != "yes" || h.Get("X-All") != "1" || h.Get("Authorization") != "" {
		t.Errorf("headers %v", h)
	}
	if wait, why := r.breaker.skip("http://"+dead, time.Now()); wait == 0 || why == nil {
		t.Error("a dead mirror is not left out")
	}
	data, err := all(repo, image.layer, 0)
	same(t, "layer", data, err, image.data[image.layer.Digest])
	if n := len(first.Seen("GET", "/v2/a/blobs/")); n != 1 {
		t.Errorf("%d requests at the first mirror", n)
	}
	// The first has other bytes: it is distrusted from then on.
	first.Add(regproxy.Fault{Path: "/blobs/", Do: regproxy.Answer(200, string(random(21, 100000)))})
	if _, err := all(repo, image.layer, 0); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), first.URL) {
		t.Error(err)
	}
	data, err = all(repo, image.layer, 0)
	same(t, "layer from another", data, err, image.data[image.layer.Digest])
	// Whoever breaks in the middle is followed by the next, from there on.
	first.Heal()
	first.Add(regproxy.Fault{Path: "/blobs/", Times: 1, Reset: 50000}, regproxy.Fault{Path: "/blobs/", Do: regproxy.Answer(500, "")})
	second.Heal()
	second.Add(regproxy.Fault{Path: "/sub/dir", Request: sub})
	repo = repository(t, r, "meant.example/a:b", Options{})
	data, err = all(repo, image.layer, 0)
	same(t, "layer from two", data, err, image.data[image.layer.Digest])
	if s := second.Seen("GET", "/blobs/"); len(s) != 1 || s[0].Header.Get("Range") == "" {
		t.Errorf("%+v", s)
	}
	// Nobody serves: each says why, and the registry itself decides of what kind the error is.
	second.Heal()
	second.Add(regproxy.Fault{Do: regproxy.Answer(503, "")})
	main.Add(regproxy.Fault{Do: regproxy.Answer(404, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)})
	_, err = repository(t, r, "meant.example/a:b", Options{}).Resolve(ctx)
	if !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	for _, words := range []string{"cannot resolve meant.example/a:b: http://" + dead + ": left out for another", "connection refused", second.URL + "/sub/dir: ", "503", main.URL + ": ", "404 Not Found"} {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("%v\nhas no %q", err, words)
		}
	}
	// With nobody else left, the one that was left out is asked all the same.
	main.Heal()
	main.Add(regproxy.Fault{Do: regproxy.Answer(503, "")})
	second.Heal()
	second.Add(regproxy.Fault{Path: "/sub/dir", Request: sub})
	if _, err = repository(t, r, "meant.example/a:b", Options{}).Resolve(ctx); err != nil {
		t.Error(err)
	}
	// What is pushed goes to the first that may be pushed to, which is dead here.
	if err := repository(t, r, "meant.example/a:b", Options{}).Push(ctx, image.config, strings.NewReader("")); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), dead) {
		t.Error(err)
	}
	none := client(t, Config{ConfigPath: []string{hostDir(t, map[string]string{"a.b/hosts.toml": "capabilities = [\"pull\"]\n"})}})
	if err := repository(t, none, "a.b/c:d", Options{}).Push(ctx, image.config, strings.NewReader("")); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "capabilities in hosts.toml") {
		t.Error(err)
	}
}

// TestProxy: what hosts.toml names as a proxy is used, for that endpoint.
func TestProxy(t *testing.T) {
	server := regproxy.Start(t, regproxy.Options{})
	image := paint(t, random(22, 1000))
	image.hang(t, repository(t, client(t, quick()), server.Addr+"/a:b", Options{}))
	proxy := regproxy.Before(t, server, nil) // it does not look at the host that is asked for
	cfg := quick()
	cfg.ConfigPath = []string{hostDir(t, map[string]string{"far.invalid/hosts.toml": "server = \"http://far.invalid\"\nproxy = \"" + proxy.URL + "\"\n"})}
	repo := repository(t, client(t, cfg), "far.invalid/a:b", Options{})
	if got, err := repo.Resolve(context.Background()); err != nil || got.Digest != image.manifest.Digest || len(proxy.Seen("HEAD", "/v2/a/manifests/b")) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestBreaker(t *testing.T) {
	b := breaker{first: time.Second}
	now := time.Unix(1000, 0)
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 16} {
		b.failed("a", errdefs.ErrUnavailable, now)
		b.failed("a", errdefs.ErrUnavailable, now) // at the same time: once
		if wait, err := b.skip("a", now); wait != want*time.Second || err == nil {
			t.Errorf("%s, %v; not %ds", wait, err, want)
		}
		now = now.Add(want * time.Second)
		if wait, _ := b.skip("a", now); wait != 0 {
			t.Errorf("still %s", wait)
		}
	}
	b.failed("a", errdefs.ErrUnavailable, now)
	b.served("a")
	if wait, _ := b.skip("a", now); wait != 0 {
		t.Error(wait)
	}
	if wait, _ := b.skip("b", now); wait != 0 {
		t.Error(wait)
	}
}

func TestHeaders(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, " 7 ": 7 * time.Second, "-7": 0, "soon": 0, "99999999999999999999": 0,
		"Fri, 02 Jan 2026 03:04:15 GMT": 10 * time.Second, "Thu, 01 Jan 2026 03:04:15 GMT": 0,
	} {
		if got := retryAfter(http.Header{"Retry-After": {v}}, now); got != want {
			t.Errorf("Retry-After %q: %s", v, got)
		}
	}
	for v, want := range map[string][2]int64{"bytes 5-9/10": {5, 10}, "bytes 5-9/*": {5, -1}} {
		if first, total, ok := contentRange(v); !ok || first != want[0] || total != want[1] {
			t.Errorf("%q: %d, %d, %t", v, first, total, ok)
		}
	}
	for _, v := range []string{"", "bytes */10", "bytes 9-5/10", "bytes 5-10/10", "bytes -1-5/10", "5-9/10", "bytes 5-9"} {
		if _, _, ok := contentRange(v); ok {
			t.Errorf("%q is taken", v)
		}
	}
	h := http.Header{"Www-Authenticate": {"Negotiate", `Basic realm="a"`, `bearer realm="b"`}}
	if preferBearer(h); len(h["Www-Authenticate"]) != 1 || !strings.HasPrefix(h.Get("Www-Authenticate"), "bearer") {
		t.Error(h)
	}
}

// FuzzHosts: any file is read, or refused as what is wrong with it.
func FuzzHosts(f *testing.F) {
	for _, s := range []string{"", "server = \"https://a\"\n[host.\"https://b\"]\ncapabilities = [\"pull\"]\n", "host = {\"a\" = {}}", "client = [[\"a\",\"b\"]]", "[header]\na = [\"b\"]", "[[host]]\n", "host.a.b = 1"} {
		f.Add([]byte(s))
	}
	own := origin("a.b", false)
	f.Fuzz(func(t *testing.T, data []byte) {
		found, err := parseHosts(data, "/dir/hosts.toml", own)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		if len(found) == 0 {
			t.Error("no endpoint")
		}
		for _, e := range found {
			if e.base.Host == "" || e.base.Scheme != "http" && e.base.Scheme != "https" {
				t.Errorf("%+v", e)
			}
			for _, p := range e.settings.ca {
				if !filepath.IsAbs(p) {
					t.Error(p)
				}
			}
		}
	})
}

// FuzzReference: any reference is read, or refused; what is read names a host and a repository.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"busybox", "a.b:5000/c/d:e@sha256:" + zeros, "[::1]:5000/a", "localhost/a", "../a", "a//b"} {
		f.Add(s)
	}
	r := New(Config{})
	f.Fuzz(func(t *testing.T, s string) {
		p, err := r.Repository(s, Options{})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		if p.domain == "" || p.path == "" || p.tag == "" && p.digest == "" || strings.Contains(p.path, "..") {
			t.Errorf("%q: %+v", s, p)
		}
		u := (&host{endpoint: &p.endpoints[0], r: r, repo: p.path}).url("manifests", p.tag)
		if again, err := u.Parse(""); err != nil || again.Host != u.Host {
			t.Error(u, err)
		}
	})
}
