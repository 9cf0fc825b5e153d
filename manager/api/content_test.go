package api_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/managerd/managerd/manager/leases"
)

const (
	stat   = contentapi.WriteAction_STAT
	write  = contentapi.WriteAction_WRITE
	commit = contentapi.WriteAction_COMMIT
)

type writing []*contentapi.WriteContentRequest

// send opens a stream and asks for one step after the other, up to the first error.
func (d *domain) send(ctx context.Context, t *testing.T, steps writing) (last *contentapi.WriteContentResponse, err error) {
	t.Helper()
	s, err := d.content.Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range steps {
		if err := s.Send(r); err != nil && !errors.Is(err, io.EOF) { // EOF: Recv says why
			t.Fatal(err)
		}
		if last, err = s.Recv(); err != nil {
			return nil, err
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream ends with %v", err)
	}
	return last, nil
}

func TestWrite(t *testing.T) {
	ctx, d := domainServer(t)
	data := "hello, world"
	sum := digest.FromString(data).String()
	other := digest.FromString("other").String()
	for name, c := range map[string]struct {
		steps writing
		code  codes.Code
		words string
	}{
		"no ref":            {writing{{Action: stat}}, codes.InvalidArgument, "reference"},
		"bad digest":        {writing{{Action: stat, Ref: "r", Expected: "sha256:x"}}, codes.InvalidArgument, "sha256:x"},
		"negative total":    {writing{{Action: stat, Ref: "r", Total: -1}}, codes.InvalidArgument, "-1 bytes"},
		"unknown action":    {writing{{Action: 77, Ref: "r"}}, codes.InvalidArgument, "action 77"},
		"beyond the end":    {writing{{Action: write, Ref: "r", Offset: 5, Data: []byte("x")}}, codes.OutOfRange, "offset, 0"},
		"negative offset":   {writing{{Action: write, Ref: "r", Offset: -5, Data: []byte("x")}}, codes.OutOfRange, "offset, 0"},
		"gap":               {writing{{Action: write, Ref: "r", Data: []byte("xy")}, {Action: write, Offset: 3, Data: []byte("z")}}, codes.OutOfRange, "offset, 2"},
		"again":             {writing{{Action: write, Ref: "r", Data: []byte("xy")}, {Action: write, Offset: 1, Data: []byte("z")}}, codes.OutOfRange, "offset, 2"},
		"too much":          {writing{{Action: write, Ref: "r", Total: 3, Data: []byte("xyza")}}, codes.FailedPrecondition, "3 bytes"},
		"too little":        {writing{{Action: write, Ref: "r", Total: 30, Data: []byte("x")}, {Action: commit, Offset: 1}}, codes.FailedPrecondition, "expected are 30"},
		"wrong digest":      {writing{{Action: write, Ref: "r", Expected: other, Data: []byte("x")}, {Action: commit, Offset: 1}}, codes.FailedPrecondition, other},
		"wrong at the end":  {writing{{Action: write, Ref: "r", Data: []byte("x")}, {Action: commit, Offset: 1, Expected: other}}, codes.FailedPrecondition, other},
		"another total":     {writing{{Action: stat, Ref: "r", Total: 3}, {Action: commit, Total: 4}}, codes.InvalidArgument, "cannot become 4"},
		"another digest":    {writing{{Action: stat, Ref: "r", Expected: sum}, {Action: commit, Expected: other}}, codes.InvalidArgument, "cannot become " + other},
		"another reference": {writing{{Action: stat, Ref: "r"}, {Action: stat, Ref: "q"}}, codes.InvalidArgument, `"q"`},
		"label":             {writing{{Action: commit, Ref: "r", Data: []byte("x"), Labels: map[string]string{"k": strings.Repeat("v", 5000)}}}, codes.InvalidArgument, "label"},
		"unknown lease":     {writing{{Action: stat, Ref: "r"}}, codes.NotFound, `lease "none"`},
	} {
		cctx := ctx
		if name == "unknown lease" {
			cctx = leases.With(ctx, "none")
		}
		_, err := d.send(cctx, t, c.steps)
		if status.Code(err) != c.code || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %s with %q", name, err, c.code, c.words)
		}
		d.abort(ctx, t, "r")
	}

	// As clients do it: ask, write in pieces, the last one to commit.
	steps := writing{{Action: stat, Ref: "r", Total: 12, Expected: sum}, {Action: write, Data: []byte("hello, ")}}
	if r, err := d.send(ctx, t, steps); err != nil || r.Offset != 7 || r.Total != 12 {
		t.Fatalf("%v, %v", r, err)
	}
	st, err := d.content.Status(ctx, &contentapi.StatusRequest{Ref: "r"})
	if err != nil || st.Status.Offset != 7 || st.Status.Expected != sum || st.Status.StartedAt == nil {
		t.Errorf("%v, %v", st, err)
	}
	list, err := d.content.ListStatuses(ctx, &contentapi.ListStatusesRequest{Filters: []string{"ref~=^r"}})
	if err != nil || len(list.Statuses) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	// From where it stopped; written twice from the start it is begun anew.
	r := d.resumed(ctx, t, writing{
		{Action: stat, Ref: "r"}, {Action: write, Offset: 7, Data: []byte("x")}, {Action: write, Data: []byte("hello, wor")},
		{Action: commit, Offset: 10, Data: []byte("ld"), Total: 12, Expected: sum, Labels: map[string]string{"l": "1"}},
	})
	if r.Offset != 12 || r.Digest != sum || r.Action != commit {
		t.Errorf("%v", r)
	}
	i, err := d.content.Info(ctx, &contentapi.InfoRequest{Digest: sum})
	if err != nil || i.Info.Size != 12 || i.Info.Labels["l"] != "1" {
		t.Errorf("%v, %v", i, err)
	}
	_, err = d.send(ctx, t, writing{{Action: stat, Ref: "r2", Expected: sum}})
	wantCode(t, err, codes.AlreadyExists, sum)
	_, err = d.send(ctx, t, writing{{Action: commit, Ref: "r2", Data: []byte(data)}})
	wantCode(t, err, codes.AlreadyExists, sum)
	if list, err := d.content.ListStatuses(ctx, &contentapi.ListStatusesRequest{}); err != nil || len(list.Statuses) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}

// resumed is send, again while the daemon has not yet seen that the writer before has gone: what clients do as well.
func (d *domain) resumed(ctx context.Context, t *testing.T, steps writing) *contentapi.WriteContentResponse {
	t.Helper()
	for {
		r, err := d.send(ctx, t, steps)
		if err == nil {
			return r
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// abort ends an ingest, if it was begun, and waits until nobody holds its reference.
func (d *domain) abort(ctx context.Context, t *testing.T, ref string) {
	t.Helper()
	d.resumed(ctx, t, writing{{Action: stat, Ref: ref}})
	if _, err := d.content.Abort(ctx, &contentapi.AbortRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	_, err := d.content.Status(ctx, &contentapi.StatusRequest{Ref: ref})
	wantCode(t, err, codes.NotFound, ref)
}

func TestTwoStreams(t *testing.T) {
	ctx, d := domainServer(t)
	first, err := d.content.Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Send(&contentapi.WriteContentRequest{Action: stat, Ref: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Recv(); err != nil {
		t.Fatal(err)
	}
	_, err = d.send(ctx, t, writing{{Action: stat, Ref: "r"}})
	wantCode(t, err, codes.Unavailable, `"r" is being written`)
	if _, err := d.content.Abort(ctx, &contentapi.AbortRequest{Ref: "r"}); err != nil {
		t.Error(err)
	}
	if err := first.Send(&contentapi.WriteContentRequest{Action: commit, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	_, err = first.Recv()
	wantCode(t, err, codes.Aborted, `"r"`)
	d.abort(ctx, t, "r")
}

func TestReadAndList(t *testing.T) {
	ctx, d := domainServer(t)
	if _, err := d.leases.Create(ctx, &leasesapi.CreateRequest{ID: "l"}); err != nil {
		t.Fatal(err)
	}
	data := strings.Repeat("0123456789", 250_000) // several messages
	for ref, data := range map[string]string{"big": data, "empty": ""} {
		if _, err := d.send(leases.With(ctx, "l"), t, writing{{Action: stat, Ref: ref}, {Action: commit, Data: []byte(data), Labels: map[string]string{"name": ref}}}); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := d.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: "l"}); err != nil || len(kept.Resources) != 2 || kept.Resources[0].Type != "content" {
		t.Errorf("%v, %v", kept, err)
	}
	size := int64(len(data))
	read := func(of string, offset, size int64) (string, error) {
		s, err := d.content.Read(ctx, &contentapi.ReadContentRequest{Digest: digest.FromString(of).String(), Offset: offset, Size: size})
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return b.String(), nil
			}
			if err != nil {
				return "", err
			}
			if m.Offset != offset+int64(b.Len()) {
				t.Errorf("a message is of byte %d, not of %d", m.Offset, offset+int64(b.Len()))
			}
			b.Write(m.Data)
		}
	}
	for _, c := range []struct {
		of           string
		offset, size int64
		want         string
		code         codes.Code
	}{
		{data, 0, 0, data, codes.OK}, {data, 3, 4, "3456", codes.OK}, {data, size - 2, 0, "89", codes.OK}, {data, size, 0, "", codes.OK},
		{data, size - 2, 100, "89", codes.OK}, {data, 0, 1 << 62, data, codes.OK}, {data, size - 1, 1<<63 - 1, "9", codes.OK},
		{data, size + 1, 0, "", codes.OutOfRange}, {data, 1<<63 - 1, 5, "", codes.OutOfRange}, {data, -1, 0, "", codes.OutOfRange}, {data, 0, -1, "", codes.OutOfRange},
		{"", 0, 0, "", codes.OK}, {"", 0, 10, "", codes.OK}, {"missing", 0, 0, "", codes.NotFound},
	} {
		got, err := read(c.of, c.offset, c.size)
		wantCode(t, err, c.code, "content")
		if got != c.want {
			t.Errorf("%d at %d: %d bytes instead of %d", c.size, c.offset, len(got), len(c.want))
		}
	}
	list := func(filters ...string) (n int, err error) {
		s, err := d.content.List(ctx, &contentapi.ListContentRequest{Filters: filters})
		for err == nil {
			var m *contentapi.ListContentResponse
			if m, err = s.Recv(); err == nil {
				n += len(m.Info)
			}
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return n, err
	}
	for filter, want := range map[string]int{"digest": 2, "labels.name==big": 1, "labels.name==x": 0} {
		if n, err := list(filter); err != nil || n != want {
			t.Errorf("%q: %d, %v", filter, n, err)
		}
	}
	_, err := list("labels.name=")
	wantCode(t, err, codes.InvalidArgument, "filter")
	for _, want := range []codes.Code{codes.OK, codes.NotFound} {
		_, err = d.content.Delete(ctx, &contentapi.DeleteContentRequest{Digest: digest.FromString("").String()})
		wantCode(t, err, want, "content")
	}
	_, err = d.content.Update(ctx, &contentapi.UpdateRequest{})
	wantCode(t, err, codes.InvalidArgument, "digest")
}
