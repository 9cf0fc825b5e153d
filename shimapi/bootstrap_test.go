package shimapi

import (
	"encoding/json"
	"strings"
	"testing"
)

// printed is what shims print on start, by what becomes of it: an address, or the reason why it is refused.
var printed = []struct {
	out     string
	version int
	address string
	refused string
}{
	{"unix:///run/x", 2, "unix:///run/x", ""},
	{" unix:///run/x\n", 2, "unix:///run/x", ""},
	{`{"version":3,"address":"unix:///run/x","protocol":"ttrpc"}`, 3, "unix:///run/x", ""},
	{`{"version":2,"address":"unix:///run/x"}`, 2, "unix:///run/x", ""},
	{`{"address":"unix:///run/x"}`, 2, "unix:///run/x", ""},
	// containerd 2.3's BootstrapResult, as protojson spells it.
	{`{"version":3, "address":"unix:///run/x", "protocol":"ttrpc", "capabilities":["CAPABILITY_UNSPECIFIED"], "metadata":{"a":"b"}}` + "\n", 3, "unix:///run/x", ""},
	{"", 0, "", "no address"},
	{" \n", 0, "", "no address"},
	{"{", 0, "", "cannot parse"},
	{`{"version":"three"}`, 0, "", "cannot parse"},
	{`{"version":4,"address":"unix:///run/x"}`, 0, "", "version 4"},
	{`{"version":1,"address":"unix:///run/x"}`, 0, "", "version 1"},
	{`{"version":3,"address":"unix:///run/x","protocol":"grpc"}`, 0, "", `"grpc"`},
	{`{"version":3}`, 0, "", "not of the form"},
	{"unix://", 0, "", "not of the form"},
	{"vsock://3:1024", 2, "vsock://3:1024", ""},
	{"vsock://3", 0, "", "not of the form"},
	{"vsock://" + strings.Repeat("3", 10000) + ":1", 0, "", "not of the form"},
	{"unix://\x00", 0, "", "is no path"},
	{"unix:///run/x\nunix:///run/y", 0, "", "is no path"},
	{"unix:///run/\xff", 0, "", "is no path"},
	{"panic: " + strings.Repeat("x", 10000), 0, "", "..."},
}

func TestParseBootstrap(t *testing.T) {
	for _, c := range printed {
		p, err := ParseBootstrap([]byte(c.out))
		if c.refused != "" {
			if err == nil || !strings.Contains(err.Error(), c.refused) || len(err.Error()) > 400 {
				t.Errorf("%.100q: %+v, %v", c.out, p, err)
			}
			continue
		}
		if want := (BootstrapParams{Version: c.version, Address: c.address, Protocol: "ttrpc"}); err != nil || p != want {
			t.Errorf("%q: %+v, %v", c.out, p, err)
		}
	}
}

// FuzzParseBootstrap: whatever a shim prints, the answer is an error or something to connect to, which survives being
// kept in a bundle.
func FuzzParseBootstrap(f *testing.F) {
	for _, c := range printed {
		f.Add([]byte(c.out))
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		p, err := ParseBootstrap(out)
		if err != nil {
			if p != (BootstrapParams{}) {
				t.Errorf("%+v beside %v", p, err)
			}
			return
		}
		if p.Version < 2 || p.Version > 3 || !strings.HasPrefix(p.Address, "unix://") && !strings.HasPrefix(p.Address, "vsock://") || p.Protocol != "ttrpc" {
			t.Errorf("%+v", p)
		}
		kept, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseBootstrap(kept)
		if err != nil || again != p {
			t.Errorf("%+v comes back as %+v, %v", p, again, err)
		}
	})
}
