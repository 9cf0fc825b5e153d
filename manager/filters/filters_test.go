package filters

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var object = AdapterFunc(func(path []string) (string, bool) {
	v, ok := map[string]string{
		"name": "a", "image": "docker.io/library/busybox:latest", "labels.env": "prod", "labels.a/b.c": "x,y", "n.1": "one",
	}[strings.Join(path, ".")]
	return v, ok
})

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		filters string // separated by ';'
		want    bool
	}{
		{"", true},
		{"name", true}, {"nothing", false},
		{"name==a", true}, {"name==b", false}, {"name!=b", true}, {"name!=a", false}, {"nothing!=x", true},
		{"image~=busybox", true}, {"image~=^busybox", false}, {`image~=/library\/busy/`, true}, {`image~=|busybox:(latest\|x)|`, true},
		{`name=="a"`, true}, {`"name"==a`, true}, {`labels."a/b.c"=="x,y"`, true}, {`labels."a/b.c"==x,y`, false},
		{"labels.env==prod,name==a", true}, {"labels.env==prod,name==b", false}, {"n.1==one", true},
		{`labels."env"`, true}, {`labels."a/b.c"`, true}, {`labels."a/b"`, false}, {`"labels"."env"==prod`, true}, {"labels", false},
		{`labels."a/b.c"~="x.*"`, true}, {`labels."a/b.c"~=/^x,y$/`, true}, {`name==""`, false}, {`nothing!=""`, false},
		{`nothing~=^$`, true}, {"image~=.*/busybox:latest", true}, {`name=="\x61"`, true}, {`name!="a",name`, false},
		{"name == a", true}, {" name==a , labels.env ~= /pr/ ", true}, {"name==ab", false}, {"name==é", false},
		{"name==b;name==a", true}, {"name==b;name==c", false},
	} {
		var ss []string
		if c.filters != "" {
			ss = strings.Split(c.filters, ";")
		}
		f, err := ParseAll(ss...)
		if err != nil {
			t.Errorf("%q: %v", c.filters, err)
			continue
		}
		if got := f.Match(object); got != c.want {
			t.Errorf("%q: %v", c.filters, got)
		}
	}
}

func TestMalformed(t *testing.T) {
	for _, s := range []string{"==a", ",", "name==a,", "name=a", "name==", `name=="a`, "name~=(", "name~=/a", "a..b", "name a", "name==a,,b", "name==a b", "name== ", "name~= ,a",
		`labels."a`, `name=="a"b`, "name===a,", "name<a", `name=='a` + "\n'", "name.", ".name", "name~=[", `name~="[`, "name~=|a|b", "é=a"} {
		if _, err := ParseAll(s); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "filter") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"name==a", `labels."a/b"~=/x\/y/,z`, "a.b.c!=1", `"\u00e9"==x`,
		`labels."nerdctl/name"==web,id!=a`, `name~="^docker\\.io/library/(a|b)$"`, `type==io.containerd.snapshotter.v1,id==overlayfs`,
		`topic~=/tasks/exit`, `labels."io.cri-containerd.kind"=="container"`, `parent==sha256:0000`, "a==,b", `a~=[`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if filter, err := Parse(s); err == nil {
			filter.Match(object)
		} else if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	})
}
