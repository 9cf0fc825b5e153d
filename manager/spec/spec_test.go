package spec

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/parser"
	"go/token"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden file anew")

// TestDefault holds the default spec, as JSON, to a golden file.
func TestDefault(t *testing.T) {
	const golden = "testdata/default.json"
	got, err := json.MarshalIndent(defaults("web", "default", false), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the default spec changed; if that is meant, go test -update:\n%s", got)
	}
	s, err := New("web", "default")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(s, defaults("web", "default", unified())) {
		t.Error("New without options is not the default spec")
	}
	has := func(s *specs.Spec) bool {
		return slices.Contains(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if has(defaults("web", "default", false)) || !has(defaults("web", "default", true)) {
		t.Error("a cgroup namespace belongs to the unified hierarchy, and only to it")
	}
}

// TestDefaultsApart: no spec shares memory with the defaults of the next.
func TestDefaultsApart(t *testing.T) {
	want := apply(t)
	s := apply(t)
	for _, part := range [][]string{s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Process.Env, s.Mounts[0].Options,
		s.Process.Capabilities.Bounding, s.Process.Capabilities.Permitted, s.Process.Capabilities.Effective} {
		part[0] = "changed"
	}
	if !reflect.DeepEqual(apply(t), want) {
		t.Error("changing one spec changed the defaults")
	}
}

// TestOptions looks at the one part of a spec that an option is about.
func TestOptions(t *testing.T) {
	mem := func(s *specs.Spec) any { return s.Linux.Resources.Memory.Limit }
	env := func(s *specs.Spec) any { return s.Process.Env }
	args := func(s *specs.Spec) any { return s.Process.Args }
	caps := func(s *specs.Spec) any {
		c := s.Process.Capabilities
		if !slices.Equal(c.Bounding, c.Permitted) || !slices.Equal(c.Bounding, c.Effective) || c.Inheritable != nil || c.Ambient != nil {
			t.Errorf("sets are not alike: %+v", c)
		}
		return c.Bounding
	}
	netns := func(s *specs.Spec) any {
		i := slices.IndexFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		if i < 0 {
			return "none"
		}
		return s.Linux.Namespaces[i].Path
	}
	all, err := grantable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		opts []Option
		get  func(*specs.Spec) any
		want any
	}{
		{"nil option", []Option{nil}, args, []string(nil)},
		{"args", []Option{Args("ls", "-l", "")}, args, []string{"ls", "-l", ""}},
		{"env", []Option{Env("A=1", "B=", "A=2=3")}, env, []string{defaultPath, "A=2=3", "B="}},
		{"env replaces PATH", []Option{Env("PATH=/bin")}, env, []string{"PATH=/bin"}},
		{"env of a longer name", []Option{Env("AB=1", "A=2")}, env, []string{defaultPath, "AB=1", "A=2"}},
		{"terminal env", []Option{Terminal(0, 0), Terminal(0, 0)}, env, []string{defaultPath, "TERM=xterm"}},
		{"terminal keeps TERM", []Option{Env("TERM=vt100"), Terminal(0, 0)}, env, []string{defaultPath, "TERM=vt100"}},
		{"terminal size", []Option{Terminal(80, 24)}, func(s *specs.Spec) any { return *s.Process.ConsoleSize }, specs.Box{Width: 80, Height: 24}},
		{"terminal no size", []Option{Terminal(80, 24), Terminal(0, 24)}, func(s *specs.Spec) any { return s.Process.ConsoleSize == nil && s.Process.Terminal }, true},
		{"cwd", []Option{Cwd("/a/../b/")}, func(s *specs.Spec) any { return s.Process.Cwd }, "/b"},
		{"hostname", []Option{Hostname("h")}, func(s *specs.Spec) any { return s.Hostname }, "h"},
		{"image cmd", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a", "b"}}, nil)}, args, []string{"a", "b"}},
		{"image entrypoint cmd", []Option{Image(&ocispec.ImageConfig{Entrypoint: []string{"e"}, Cmd: []string{"a"}}, nil)}, args, []string{"e", "a"}},
		{"image entrypoint args", []Option{Image(&ocispec.ImageConfig{Entrypoint: []string{"e"}, Cmd: []string{"a"}}, []string{"x"})}, args, []string{"e", "x"}},
		{"image args", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a"}}, []string{"x"})}, args, []string{"x"}},
		{"no image, args", []Option{Image(nil, []string{"x"})}, args, []string{"x"}},
		{"image env", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a"}, Env: []string{"PATH=/opt", "A=1"}}, nil), Env("A=2")}, env, []string{"PATH=/opt", "A=2"}},
		{"image cwd", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a"}, WorkingDir: "srv/www"}, nil)}, func(s *specs.Spec) any { return s.Process.Cwd }, "/srv/www"},
		{"image user number", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a"}, User: "7:8"}, nil)}, func(s *specs.Spec) any { return s.Process.User },
			specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{8}}},
		{"user over the image's", []Option{Image(&ocispec.ImageConfig{Cmd: []string{"a"}, User: "nobody"}, nil), User("5", "")}, func(s *specs.Spec) any { return s.Process.User },
			specs.User{UID: 5, AdditionalGids: []uint32{0}}},
		{"memory", []Option{MemoryLimit(4096)}, mem, new(int64(4096))},
		{"memory lifted", []Option{MemoryLimit(4096), MemoryLimit(0)}, mem, (*int64)(nil)},
		{"cpus", []Option{CPUs(1.5)}, func(s *specs.Spec) any { return *s.Linux.Resources.CPU }, specs.LinuxCPU{Quota: new(int64(150000)), Period: new(uint64(100000))}},
		{"cpus and shares", []Option{CPUs(0.01), CPUShares(2)}, func(s *specs.Spec) any { return *s.Linux.Resources.CPU },
			specs.LinuxCPU{Quota: new(int64(1000)), Period: new(uint64(100000)), Shares: new(uint64(2))}},
		{"pids", []Option{PidsLimit(10)}, func(s *specs.Spec) any { return *s.Linux.Resources.Pids.Limit }, int64(10)},
		{"pids unlimited", []Option{PidsLimit(-1)}, func(s *specs.Spec) any { return *s.Linux.Resources.Pids.Limit }, int64(-1)},
		{"cap add", []Option{Capabilities([]string{"sys_admin", "CAP_CHOWN"}, nil)}, caps, append(slices.Clone(defaultCapabilities), "CAP_SYS_ADMIN")},
		{"cap drop", []Option{Capabilities(nil, []string{"cap_chown"})}, caps, defaultCapabilities[1:]},
		{"cap drop all", []Option{Capabilities(nil, []string{"ALL"})}, caps, []string(nil)},
		{"cap drop all add one", []Option{Capabilities([]string{"KILL"}, []string{"all"})}, caps, []string{"CAP_KILL"}},
		{"cap add all", []Option{Capabilities([]string{"ALL"}, nil)}, caps, all},
		{"cap add all drop one", []Option{Capabilities([]string{"ALL"}, []string{"CHOWN"})}, caps, all[1:]},
		{"cap add and drop", []Option{Capabilities([]string{"SYS_ADMIN"}, []string{"SYS_ADMIN"})}, caps, defaultCapabilities},
		{"nnp", []Option{NoNewPrivileges(false)}, func(s *specs.Spec) any { return s.Process.NoNewPrivileges }, false},
		{"readonly", []Option{ReadonlyRootfs()}, func(s *specs.Spec) any { return *s.Root }, specs.Root{Path: "rootfs", Readonly: true}},
		{"rootfs", []Option{Rootfs("/r/")}, func(s *specs.Spec) any { return s.Root.Path }, "/r"},
		{"cgroup", []Option{CgroupsPath("/a//b")}, func(s *specs.Spec) any { return s.Linux.CgroupsPath }, "/a/b"},
		{"cgroup systemd", []Option{CgroupsPath("system.slice:m:id")}, func(s *specs.Spec) any { return s.Linux.CgroupsPath }, "system.slice:m:id"},
		{"annotations", []Option{Annotations(map[string]string{"a": "1", "b": "2"}), Annotations(map[string]string{"a": "3"})},
			func(s *specs.Spec) any { return s.Annotations }, map[string]string{"a": "3", "b": "2"}},
		{"rlimits", []Option{Rlimits("nofile=5", "core=0:unlimited", "NOFILE=6:7")}, func(s *specs.Spec) any { return s.Process.Rlimits },
			[]specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: math.MaxUint64}, {Type: "RLIMIT_NOFILE", Soft: 6, Hard: 7}}},
		{"own network", nil, netns, ""},
		{"host network", []Option{HostNetwork()}, netns, "none"},
		{"netns", []Option{NetNS("/run/netns/x")}, netns, "/run/netns/x"},
		{"netns after host", []Option{HostNetwork(), NetNS("/run/netns/x")}, netns, "/run/netns/x"},
		{"seccomp none", nil, func(s *specs.Spec) any { return s.Linux.Seccomp == nil }, true},
		{"seccomp off", []Option{Seccomp(""), Seccomp("unconfined")}, func(s *specs.Spec) any { return s.Linux.Seccomp == nil }, true},
		{"seccomp", []Option{Seccomp("")}, func(s *specs.Spec) any { return s.Linux.Seccomp.DefaultAction }, specs.ActErrno},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.get(apply(t, c.opts...)); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// TestOptionsRefuse: every wrong argument is an error of the right kind that quotes it.
func TestOptionsRefuse(t *testing.T) {
	bad := func(name, body string) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	invalid, missing := errdefs.IsInvalidArgument, errdefs.IsNotFound
	for _, c := range []struct {
		name string
		opt  Option
		is   func(error) bool
		text string
	}{
		{"image with nothing", Image(&ocispec.ImageConfig{}, nil), invalid, "nothing to run"},
		{"no image", Image(nil, nil), invalid, "nothing to run"},
		{"image env", Image(&ocispec.ImageConfig{Cmd: []string{"a"}, Env: []string{"NOVALUE"}}, nil), invalid, `"NOVALUE"`},
		{"image user", Image(&ocispec.ImageConfig{Cmd: []string{"a"}, User: "web"}, nil), invalid, `"web"`},
		{"no args", Args(), invalid, "nothing to run"},
		{"empty program", Args("", "x"), invalid, "nothing to run"},
		{"args zero", Args("a", "b\x00"), invalid, `"b\x00"`},
		{"env key", Env("KEY"), invalid, `"KEY"`},
		{"env no key", Env("=v"), invalid, `"=v"`},
		{"env zero", Env("A=\x00"), invalid, `"A=\x00"`},
		{"cwd", Cwd("a"), invalid, `"a"`},
		{"hostname", Hostname(strings.Repeat("h", 65)), invalid, "hhh"},
		{"annotation", Annotations(map[string]string{"": "v"}), invalid, `"v"`},
		{"rootfs", Rootfs(""), invalid, `""`},
		{"cgroup", CgroupsPath("a/b"), invalid, `"a/b"`},
		{"cgroup root", CgroupsPath("/.."), invalid, `"/.."`},
		{"memory", MemoryLimit(math.MaxUint64), invalid, "18446744073709551615"},
		{"cpus 0", CPUs(0), invalid, "0"},
		{"cpus negative", CPUs(-1), invalid, "-1"},
		{"cpus NaN", CPUs(math.NaN()), invalid, "NaN"},
		{"cpus Inf", CPUs(math.Inf(1)), invalid, "Inf"},
		{"shares", CPUShares(1), invalid, "1"},
		{"pids 0", PidsLimit(0), invalid, "0"},
		{"pids -2", PidsLimit(-2), invalid, "-2"},
		{"cap add", Capabilities([]string{"FLY"}, nil), invalid, `"FLY"`},
		{"cap drop", Capabilities(nil, []string{"CAP_CAP_KILL"}), invalid, `"CAP_CAP_KILL"`},
		{"netns", NetNS("x"), invalid, `"x"`},
		{"device", Device("/dev/managerd-none"), missing, `"/dev/managerd-none"`},
		{"device relative", Device("null"), invalid, `"null"`},
		{"device directory", Device("/dev"), invalid, `"/dev"`},
		{"seccomp missing", Seccomp("/nonexistent.json"), missing, `"/nonexistent.json"`},
		{"seccomp no json", Seccomp(bad("a", "{")), invalid, "not valid"},
		{"seccomp empty", Seccomp(bad("b", "{}")), invalid, "not valid"},
		{"seccomp null", Seccomp(bad("c", `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[null]}`)), invalid, "not valid"},
		{"mount", Mounts(specs.Mount{Destination: "a", Type: "tmpfs"}), invalid, `"a"`},
		{"mount on root", Mounts(specs.Mount{Destination: "/.", Type: "tmpfs"}), invalid, `"/."`},
		{"mount untyped", Mounts(specs.Mount{Destination: "/a", Source: "x"}), invalid, `"/a"`},
		{"rlimit name", Rlimits("files=1"), invalid, `"files=1"`},
		{"rlimit number", Rlimits("nofile=x"), invalid, `"nofile=x"`},
		{"rlimit none", Rlimits("nofile"), invalid, `"nofile"`},
		{"rlimit order", Rlimits("nofile=2:1"), invalid, `"nofile=2:1"`},
		{"rlimit three", Rlimits("nofile=1:2:3"), invalid, `"nofile=1:2:3"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New("id", "ns", c.opt)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), `"id"`) {
				t.Errorf("error %v", err)
			}
			if err != nil && strings.ContainsRune(err.Error(), 0) {
				t.Errorf("zero byte in error %q", err)
			}
			// The options bear a spec that has nothing in it, too.
			if err := Apply(&specs.Spec{}, c.opt); err == nil && c.name != "image user" {
				t.Error("no error with an empty spec")
			}
		})
	}
	for _, id := range []string{"", ".", "..", "a/b", "a\x00"} {
		if _, err := New(id, "ns"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id %q: %v", id, err)
		}
		if _, err := New("id", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("namespace %q: %v", id, err)
		}
	}
}

// TestEmptySpec: options make the parts that a foreign spec lacks.
func TestEmptySpec(t *testing.T) {
	var s specs.Spec
	err := Apply(&s, Args("a"), Env("A=1"), Cwd("/"), Terminal(1, 1), Hostname("h"), User("1", ""), HostNetwork(), NetNS("/n"), MemoryLimit(1),
		CPUs(1), CPUShares(2), PidsLimit(1), Capabilities([]string{"ALL"}, nil), ReadonlyRootfs(), NoNewPrivileges(true), Rlimits("core=0"),
		Device("/dev/null"), CgroupsPath("/x"), Seccomp(""), Privileged(), Rootfs("r"), Mounts(specs.Mount{Destination: "/a", Type: "tmpfs"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := Apply(&specs.Spec{}, Seccomp("")); err != nil {
		t.Fatal(err)
	}
}

// TestProcess: an exec's process is the container's but for what is asked, and a change of one is none of the other.
func TestProcess(t *testing.T) {
	base := &specs.Process{}
	fill(reflect.ValueOf(base).Elem(), new(int))
	before, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	p := Process(base, []string{"ls"}, false)
	if p.Terminal || p.ConsoleSize != nil || !slices.Equal(p.Args, []string{"ls"}) {
		t.Errorf("process %+v", p)
	}
	want := *base
	want.Terminal, want.ConsoleSize, want.Args, want.CommandLine = false, nil, []string{"ls"}, ""
	if !reflect.DeepEqual(*p, want) {
		t.Errorf("got %+v, want %+v", *p, want)
	}
	scramble(reflect.ValueOf(p).Elem())
	if after, _ := json.Marshal(base); !bytes.Equal(before, after) {
		t.Errorf("a change of the copy changed the base:\n%s\n%s", before, after)
	}

	p = Process(&specs.Process{Env: []string{"A=1"}}, []string{"sh"}, true)
	if !p.Terminal || !slices.Equal(p.Env, []string{"A=1", "TERM=xterm"}) {
		t.Errorf("process with a terminal: %+v", p)
	}
	if p = Process(nil, []string{"sh"}, false); p.Cwd != "/" || len(p.Args) != 1 {
		t.Errorf("process of nothing: %+v", p)
	}
}

// fill gives every part of v a value of its own.
func fill(v reflect.Value, n *int) {
	*n++
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n)
		fill(v.Index(1), n)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	case reflect.String:
		v.SetString("v" + strconv.Itoa(*n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	default:
		panic("a process has a part of a new kind: " + v.Kind().String())
	}
}

// scramble changes, in place, all that v reaches.
func scramble(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			scramble(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			scramble(v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			scramble(v.Field(i))
		}
	default:
		v.SetZero()
	}
}

// TestPrivileged: no fence is left.
func TestPrivileged(t *testing.T) {
	s := apply(t, Seccomp(""), Mounts(specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "ro"}}), Privileged())
	for _, m := range s.Mounts {
		if slices.Contains(m.Options, "ro") {
			t.Errorf("%s is read-only", m.Destination)
		}
	}
	if s.Linux.Seccomp != nil || s.Linux.MaskedPaths != nil || s.Linux.ReadonlyPaths != nil {
		t.Error("seccomp, masked or read-only paths are left")
	}
	if want := []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}; !reflect.DeepEqual(s.Linux.Resources.Devices, want) {
		t.Errorf("device rules %+v", s.Linux.Resources.Devices)
	}
	null := slices.IndexFunc(s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == "/dev/null" })
	if null < 0 {
		t.Fatal("/dev/null is not among the devices")
	}
	if d := s.Linux.Devices[null]; d.Type != "c" || d.Major != 1 || d.Minor != 3 || *d.FileMode != 0o666 || *d.UID != 0 || *d.GID != 0 {
		t.Errorf("/dev/null is %+v", d)
	}
	for _, d := range s.Linux.Devices {
		if strings.HasPrefix(d.Path, "/dev/pts/") || d.Path == "/dev/console" {
			t.Errorf("%s is the host's alone", d.Path)
		}
	}
}

// TestDevice: one device, its rule after the one that denies all, once even if it is given twice.
func TestDevice(t *testing.T) {
	s := apply(t, Device("/dev/zero"), Device("/dev/zero"))
	if len(s.Linux.Devices) != 1 || s.Linux.Devices[0].Path != "/dev/zero" {
		t.Errorf("devices %+v", s.Linux.Devices)
	}
	rules := s.Linux.Resources.Devices
	if rules[0].Allow || !rules[1].Allow || rules[1].Type != "c" || *rules[1].Major != 1 || *rules[1].Minor != 5 || rules[1].Access != "rwm" {
		t.Errorf("rules %+v", rules)
	}
}

// TestSeccompCapabilities: the profile gives more to who may do more; profiles of both formats load.
func TestSeccompCapabilities(t *testing.T) {
	allowed := func(s *specs.Spec, call string) bool {
		return slices.ContainsFunc(s.Linux.Seccomp.Syscalls, func(c specs.LinuxSyscall) bool {
			return slices.Contains(c.Names, call) && c.Action == specs.ActAllow
		})
	}
	if allowed(apply(t, Seccomp("")), "init_module") {
		t.Error("init_module is allowed by default")
	}
	if !allowed(apply(t, Capabilities([]string{"SYS_MODULE"}, nil), Seccomp("")), "init_module") {
		t.Error("init_module is not allowed with CAP_SYS_MODULE")
	}
	file := filepath.Join(t.TempDir(), "profile.json")
	body := `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`
	if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := apply(t, Seccomp(file)); !allowed(s, "read") || allowed(s, "write") || len(s.Linux.Seccomp.Architectures) != 1 {
		t.Errorf("filter %+v", s.Linux.Seccomp)
	}
}

// TestImports: clients link this package, so it brings no store, no wire and nothing of the manager.
func TestImports(t *testing.T) {
	allowed := []string{
		"github.com/containerd/errdefs", "github.com/moby/profiles/seccomp",
		"github.com/opencontainers/image-spec/specs-go/v1", "github.com/opencontainers/runtime-spec/specs-go",
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range parsed.Imports {
			if path, _ := strconv.Unquote(imp.Path.Value); strings.Contains(path, ".") && !slices.Contains(allowed, path) {
				t.Errorf("%s imports %s", file, path)
			}
		}
	}
}
