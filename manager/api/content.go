package api

import (
	"context"
	"errors"
	"fmt"
	"io"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/content"
	"github.com/managerd/managerd/manager/filters"
)

// Content serves containerd.services.content.v1.Content.
type Content struct {
	api.UnimplementedContentServer
	store *content.Store
}

// NewContent serves store.
func NewContent(store *content.Store) *Content { return &Content{store: store} }

// Register adds the service to a server.
func (a *Content) Register(s *grpc.Server) { api.RegisterContentServer(s, a) }

// chunk is how many bytes a message of a read carries, and entries how many records one of a list.
const (
	chunk   = 1 << 20
	entries = 100
)

func infoToWire(i content.Info) *api.Info {
	return &api.Info{
		Digest: i.Digest.String(), Size: i.Size, Labels: i.Labels,
		CreatedAt: timestamppb.New(i.CreatedAt), UpdatedAt: timestamppb.New(i.UpdatedAt),
	}
}

func statusToWire(s content.Status) *api.Status {
	return &api.Status{
		Ref: s.Ref, Offset: s.Offset, Total: s.Total, Expected: s.Expected.String(),
		StartedAt: timestamppb.New(s.StartedAt), UpdatedAt: timestamppb.New(s.UpdatedAt),
	}
}

// Info finds a blob.
func (a *Content) Info(ctx context.Context, r *api.InfoRequest) (*api.InfoResponse, error) {
	i, err := a.store.Info(ctx, digest.Digest(r.Digest))
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.InfoResponse{Info: infoToWire(i)}, nil
}

// Update changes labels.
func (a *Content) Update(ctx context.Context, r *api.UpdateRequest) (*api.UpdateResponse, error) {
	i, err := a.store.Update(ctx, content.Info{Digest: digest.Digest(r.Info.GetDigest()), Labels: r.Info.GetLabels()}, r.UpdateMask.GetPaths()...)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.UpdateResponse{Info: infoToWire(i)}, nil
}

// List streams the blobs that match.
func (a *Content) List(r *api.ListContentRequest, stream api.Content_ListServer) error {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return toGRPC(err)
	}
	var page []*api.Info
	err = a.store.Walk(stream.Context(), f, func(i content.Info) error {
		if page = append(page, infoToWire(i)); len(page) < entries {
			return nil
		}
		resp := &api.ListContentResponse{Info: page}
		page = nil
		return stream.Send(resp)
	})
	if err == nil && len(page) > 0 {
		err = stream.Send(&api.ListContentResponse{Info: page})
	}
	return toGRPC(err)
}

// Delete removes a blob.
func (a *Content) Delete(ctx context.Context, r *api.DeleteContentRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.Delete(ctx, digest.Digest(r.Digest)))
}

// Read streams a part of a blob: up to its end with size 0, or one that lies beyond it.
func (a *Content) Read(r *api.ReadContentRequest, stream api.Content_ReadServer) error {
	blob, err := a.store.ReaderAt(stream.Context(), digest.Digest(r.Digest))
	if err != nil {
		return toGRPC(err)
	}
	defer func() { _ = blob.Close() }()
	if r.Offset < 0 || r.Size < 0 || r.Offset > blob.Size() {
		return toGRPC(fmt.Errorf("content %s has %d bytes, not %d at %d: %w", r.Digest, blob.Size(), r.Size, r.Offset, errdefs.ErrOutOfRange))
	}
	size := blob.Size() - r.Offset
	if r.Size > 0 {
		size = min(size, r.Size)
	}
	buf := make([]byte, min(chunk, size))
	for at, end := r.Offset, r.Offset+size; at < end; {
		n, err := blob.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return toGRPC(err)
		}
		if n == 0 {
			return toGRPC(fmt.Errorf("content %s ends at byte %d of %d: %w", r.Digest, at, blob.Size(), errdefs.ErrDataLoss))
		}
		if err := stream.Send(&api.ReadContentResponse{Offset: at, Data: buf[:n]}); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// Status finds an ingest.
func (a *Content) Status(ctx context.Context, r *api.StatusRequest) (*api.StatusResponse, error) {
	s, err := a.store.Status(ctx, r.Ref)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &api.StatusResponse{Status: statusToWire(s)}, nil
}

// ListStatuses gives the ingests that match.
func (a *Content) ListStatuses(ctx context.Context, r *api.ListStatusesRequest) (*api.ListStatusesResponse, error) {
	f, err := filters.ParseAll(r.Filters...)
	if err != nil {
		return nil, toGRPC(err)
	}
	all, err := a.store.ListStatuses(ctx, f)
	if err != nil {
		return nil, toGRPC(err)
	}
	resp := &api.ListStatusesResponse{}
	for _, s := range all {
		resp.Statuses = append(resp.Statuses, statusToWire(s))
	}
	return resp, nil
}

// Abort throws an ingest away.
func (a *Content) Abort(ctx context.Context, r *api.AbortRequest) (*emptypb.Empty, error) {
	return done, toGRPC(a.store.Abort(ctx, r.Ref))
}

// Write serves one writer: its first message names the ingest, each asks for its status, or appends, or commits, and
// each is answered.
func (a *Content) Write(stream api.Content_WriteServer) error {
	ctx := stream.Context()
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	ref, total, expected := r.Ref, r.Total, digest.Digest(r.Expected)
	w, err := a.store.Writer(ctx, ref, expected, total)
	if err != nil {
		return toGRPC(err)
	}
	defer func() { _ = w.Close() }()
	for {
		// What the first messages left open may be said later, but nothing may be said twice.
		switch {
		case r.Ref != "" && r.Ref != ref:
			err = fmt.Errorf("write to %q cannot go on as %q", ref, r.Ref)
		case r.Total > 0 && total > 0 && r.Total != total:
			err = fmt.Errorf("write to %q has a total of %d bytes, which cannot become %d", ref, total, r.Total)
		case r.Expected != "" && expected != "" && r.Expected != expected.String():
			err = fmt.Errorf("write to %q is of %s, which cannot become %s", ref, expected, r.Expected)
		}
		if err != nil {
			return toGRPC(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
		}
		if r.Expected != "" {
			expected = digest.Digest(r.Expected)
		}
		if r.Total > 0 {
			total = r.Total
		}
		resp, err := a.step(ctx, w, r, total, expected)
		if err != nil {
			return toGRPC(err)
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
		if r.Action == api.WriteAction_COMMIT {
			return nil
		}
		if r, err = stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (a *Content) step(ctx context.Context, w *content.Writer, r *api.WriteContentRequest, total int64, expected digest.Digest) (*api.WriteContentResponse, error) {
	st := w.Status()
	switch r.Action {
	case api.WriteAction_STAT, api.WriteAction_WRITE, api.WriteAction_COMMIT:
	default:
		return nil, fmt.Errorf("write to %q: action %d is not known: %w", st.Ref, r.Action, errdefs.ErrInvalidArgument)
	}
	if r.Action != api.WriteAction_STAT {
		switch {
		case r.Offset != 0 && r.Offset != st.Offset:
			return nil, fmt.Errorf("write to %q at %d must be at its current offset, %d: %w", st.Ref, r.Offset, st.Offset, errdefs.ErrOutOfRange)
		case r.Offset == 0 && st.Offset > 0 && r.Action == api.WriteAction_WRITE:
			if err := w.Truncate(0); err != nil {
				return nil, err
			}
		}
		if len(r.Data) > 0 {
			if have := w.Status().Offset; total > 0 && int64(len(r.Data)) > total-have {
				return nil, fmt.Errorf("write to %q exceeds its total of %d bytes: %w", st.Ref, total, errdefs.ErrFailedPrecondition)
			}
			if _, err := w.Write(r.Data); err != nil {
				return nil, err
			}
		}
		if r.Action == api.WriteAction_COMMIT {
			if err := w.Commit(ctx, total, expected, r.Labels); err != nil {
				return nil, err
			}
		}
	}
	st = w.Status()
	resp := &api.WriteContentResponse{
		Action: r.Action, StartedAt: timestamppb.New(st.StartedAt), UpdatedAt: timestamppb.New(st.UpdatedAt), Offset: st.Offset, Total: st.Total,
	}
	if r.Action != api.WriteAction_WRITE {
		resp.Digest = w.Digest().String()
	}
	return resp, nil
}
