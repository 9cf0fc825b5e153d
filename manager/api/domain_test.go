package api_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/managerd/managerd/manager/api"
	"github.com/managerd/managerd/manager/containers"
	"github.com/managerd/managerd/manager/content"
	xevents "github.com/managerd/managerd/manager/events"
	"github.com/managerd/managerd/manager/images"
	"github.com/managerd/managerd/manager/leases"
	"github.com/managerd/managerd/manager/metadata"
	"github.com/managerd/managerd/manager/namespaces"
)

// domain serves what is kept in the database, over a real socket.
type domain struct {
	*grpc.ClientConn
	containers containersapi.ContainersClient
	images     imagesapi.ImagesClient
	content    contentapi.ContentClient
	leases     leasesapi.LeasesClient
	namespaces namespacesapi.NamespacesClient
	events     eventsapi.EventsClient
	dir        string
}

// serve runs a server until the end of the test.
func serve(t *testing.T, register func(dir string, s *grpc.Server)) (string, *grpc.ClientConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "api-") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	register(dir, srv)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir, conn
}

func domainServer(t *testing.T) (context.Context, *domain) {
	t.Helper()
	dir, conn := serve(t, func(dir string, s *grpc.Server) {
		db, err := metadata.Open(filepath.Join(dir, "metadata.db"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		x := xevents.NewExchange()
		blobs, err := content.New(dir, content.Shared, db, x)
		if err != nil {
			t.Fatal(err)
		}
		api.NewContainers(containers.NewStore(db), x).Register(s)
		api.NewImages(images.NewStore(db), x, nil).Register(s)
		api.NewContent(blobs).Register(s)
		api.NewLeases(leases.NewStore(db), nil).Register(s)
		api.NewNamespaces(metadata.NewNamespaces(db), x).Register(s)
		api.NewEvents(x).Register(s)
	})
	ctx, cancel := context.WithTimeout(namespaces.With(context.Background(), "one"), 30*time.Second)
	t.Cleanup(cancel)
	return ctx, &domain{
		ClientConn: conn, dir: dir,
		containers: containersapi.NewContainersClient(conn), images: imagesapi.NewImagesClient(conn), content: contentapi.NewContentClient(conn),
		leases: leasesapi.NewLeasesClient(conn), namespaces: namespacesapi.NewNamespacesClient(conn), events: eventsapi.NewEventsClient(conn),
	}
}

func container(id string) *containersapi.Container {
	return &containersapi.Container{
		ID: id, Labels: map[string]string{"l": "1"}, Image: "img", Runtime: &containersapi.Container_Runtime{Name: "io.containerd.runc.v2"},
		Spec: &anypb.Any{TypeUrl: "spec", Value: []byte("{}")}, Snapshotter: "native", SnapshotKey: "k",
	}
}

func image(name string) *imagesapi.Image {
	return &imagesapi.Image{Name: name, Labels: map[string]string{"l": "1"},
		Target: &types.Descriptor{MediaType: "m", Digest: digest.FromString(name).String(), Size: 3}}
}

// TestNoNamespace: every call that works in a namespace asks for one, whatever else is wrong with it, and a malformed one
// is the client's error.
func TestNoNamespace(t *testing.T) {
	_, d := domainServer(t)
	calls := map[string][]string{
		"containers": {"Get", "List", "Create", "Update", "Delete"}, "images": {"Get", "List", "Create", "Update", "Delete"},
		"content": {"Info", "Update", "Delete", "Status", "ListStatuses", "Abort"}, "leases": {"Create", "Delete", "List", "AddResource", "DeleteResource", "ListResources"},
		"events": {"Publish"},
	}
	resource := &leasesapi.Resource{ID: "k", Type: "ingests"}
	full := map[string]proto.Message{
		"containers.Create": &containersapi.CreateContainerRequest{Container: container("c")}, "containers.Update": &containersapi.UpdateContainerRequest{Container: container("c")},
		"images.Create": &imagesapi.CreateImageRequest{Image: image("i")}, "images.Update": &imagesapi.UpdateImageRequest{Image: image("i")},
		"leases.AddResource":    &leasesapi.AddResourceRequest{ID: "l", Resource: resource},
		"leases.DeleteResource": &leasesapi.DeleteResourceRequest{ID: "l", Resource: resource},
	}
	for service, methods := range calls {
		for _, m := range methods {
			req, ok := full[service+"."+m]
			if !ok {
				req = &eventsapi.SubscribeRequest{} // empty, as any message without fields set
			}
			path := "/containerd.services." + service + ".v1." + strings.ToUpper(service[:1]) + service[1:] + "/" + m
			for ns, want := range map[string]codes.Code{"": codes.FailedPrecondition, "a/b": codes.InvalidArgument} {
				ctx := context.Background()
				if ns != "" {
					ctx = namespaces.With(ctx, ns)
				}
				wantCode(t, d.Invoke(ctx, path, req, &eventsapi.SubscribeRequest{}), want, "namespace")
			}
		}
	}
	for name, open := range map[string]func(context.Context) (grpc.ClientStream, error){
		"containers": func(ctx context.Context) (grpc.ClientStream, error) {
			return d.containers.ListStream(ctx, &containersapi.ListContainersRequest{})
		},
		"content": func(ctx context.Context) (grpc.ClientStream, error) {
			return d.content.List(ctx, &contentapi.ListContentRequest{})
		},
		"read": func(ctx context.Context) (grpc.ClientStream, error) {
			return d.content.Read(ctx, &contentapi.ReadContentRequest{Digest: digest.FromString("x").String()})
		},
		"write": func(ctx context.Context) (grpc.ClientStream, error) {
			w, err := d.content.Write(ctx)
			return w, errors.Join(err, w.Send(&contentapi.WriteContentRequest{Ref: "r"}))
		},
	} {
		s, err := open(context.Background())
		if err != nil {
			t.Fatal(name, err)
		}
		wantCode(t, s.RecvMsg(&eventsapi.SubscribeRequest{}), codes.FailedPrecondition, "namespace is required")
	}
}

// subscribe gives the events from now on.
func (d *domain) subscribe(ctx context.Context, t *testing.T, filters ...string) eventsapi.Events_SubscribeClient {
	t.Helper()
	s, err := d.events.Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: filters})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	return s
}

func wantEvent(t *testing.T, s eventsapi.Events_SubscribeClient, ns, topic string, want proto.Message) {
	t.Helper()
	e, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	got := want.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(e.Event.GetValue(), got); err != nil {
		t.Fatal(err)
	}
	name := string(want.ProtoReflect().Descriptor().FullName())
	if e.Topic != topic || e.Namespace != ns || e.Event.GetTypeUrl() != name || !proto.Equal(got, want) || time.Since(e.Timestamp.AsTime()) > time.Minute {
		t.Errorf("event is %v, want %s %s %v", e, topic, name, want)
	}
}

// TestChanges makes, changes and removes one object of each kind; clients and subscribers are told what became of it.
func TestChanges(t *testing.T) {
	ctx, d := domainServer(t)
	s := d.subscribe(ctx, t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mask := func(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

	made, err := d.containers.Create(ctx, &containersapi.CreateContainerRequest{Container: container("c")})
	must(err)
	wantEvent(t, s, "one", "/containers/create", &events.ContainerCreate{ID: "c", Image: "img", Runtime: &events.ContainerCreate_Runtime{Name: "io.containerd.runc.v2"}})
	got, err := d.containers.Get(ctx, &containersapi.GetContainerRequest{ID: "c"})
	must(err)
	if !proto.Equal(got.Container, made.Container) || got.Container.CreatedAt == nil || got.Container.SnapshotKey != "k" {
		t.Errorf("%v, made %v", got, made)
	}
	_, err = d.containers.Create(ctx, &containersapi.CreateContainerRequest{Container: container("c")})
	wantCode(t, err, codes.AlreadyExists, `"c"`)
	c := container("c")
	c.Labels, c.Image = map[string]string{"m": "2"}, "other"
	_, err = d.containers.Update(ctx, &containersapi.UpdateContainerRequest{Container: c, UpdateMask: mask("labels.m")})
	must(err)
	wantEvent(t, s, "one", "/containers/update", &events.ContainerUpdate{ID: "c", Image: "img", Labels: map[string]string{"l": "1", "m": "2"}, SnapshotKey: "k"})
	_, err = d.containers.Update(ctx, &containersapi.UpdateContainerRequest{Container: c, UpdateMask: mask("runtime")})
	wantCode(t, err, codes.InvalidArgument, `"runtime"`)
	for _, bad := range []*containersapi.Container{nil, {}} {
		_, err = d.containers.Update(ctx, &containersapi.UpdateContainerRequest{Container: bad})
		wantCode(t, err, codes.InvalidArgument, "no container")
	}
	_, err = d.containers.Create(ctx, &containersapi.CreateContainerRequest{})
	wantCode(t, err, codes.InvalidArgument, "no container")
	_, err = d.containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: "c"})
	must(err)
	wantEvent(t, s, "one", "/containers/delete", &events.ContainerDelete{ID: "c"})
	_, err = d.containers.Delete(ctx, &containersapi.DeleteContainerRequest{ID: "c"})
	wantCode(t, err, codes.NotFound, `"c"`)

	_, err = d.images.Create(ctx, &imagesapi.CreateImageRequest{Image: image("i")})
	must(err)
	wantEvent(t, s, "one", "/images/create", &events.ImageCreate{Name: "i", Labels: map[string]string{"l": "1"}})
	_, err = d.images.Create(ctx, &imagesapi.CreateImageRequest{})
	wantCode(t, err, codes.InvalidArgument, "name")
	i := image("i")
	i.Labels = map[string]string{"l": "2"}
	_, err = d.images.Update(ctx, &imagesapi.UpdateImageRequest{Image: i, UpdateMask: mask("labels")})
	must(err)
	wantEvent(t, s, "one", "/images/update", &events.ImageUpdate{Name: "i", Labels: map[string]string{"l": "2"}})
	_, err = d.images.Update(ctx, &imagesapi.UpdateImageRequest{})
	wantCode(t, err, codes.InvalidArgument, "no image")
	_, err = d.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "i", Target: &types.Descriptor{Digest: digest.FromString("x").String()}})
	wantCode(t, err, codes.NotFound, "by now")
	_, err = d.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "i", Sync: true})
	must(err)
	wantEvent(t, s, "one", "/images/delete", &events.ImageDelete{Name: "i"})
	_, err = d.images.Get(ctx, &imagesapi.GetImageRequest{Name: "i"})
	wantCode(t, err, codes.NotFound, `image "i"`)

	two := &namespacesapi.Namespace{Name: "two", Labels: map[string]string{"a.b": "1"}}
	_, err = d.namespaces.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: two})
	must(err)
	wantEvent(t, s, "two", "/namespaces/create", &events.NamespaceCreate{Name: "two", Labels: two.Labels})
	_, err = d.namespaces.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: two})
	wantCode(t, err, codes.AlreadyExists, `"two"`)
	for filter, want := range map[string]int{"": 2, "name==two": 1, `labels."a.b"==1`: 1, "labels.a.b": 1, "name==x": 0} {
		l, err := d.namespaces.List(ctx, &namespacesapi.ListNamespacesRequest{Filter: filter})
		if err != nil || len(l.Namespaces) != want {
			t.Errorf("%q: %v, %v", filter, l, err)
		}
	}
	_, err = d.namespaces.Update(ctx, &namespacesapi.UpdateNamespaceRequest{Namespace: &namespacesapi.Namespace{Name: "two"}, UpdateMask: mask("labels.a.b")})
	must(err)
	wantEvent(t, s, "two", "/namespaces/update", &events.NamespaceUpdate{Name: "two"})
	_, err = d.containers.Create(namespaces.With(ctx, "two"), &containersapi.CreateContainerRequest{Container: container("c")})
	must(err)
	_, err = d.namespaces.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: "two"})
	wantCode(t, err, codes.FailedPrecondition, "1 containers")
	_, err = d.containers.Delete(namespaces.With(ctx, "two"), &containersapi.DeleteContainerRequest{ID: "c"})
	must(err)
	_, err = d.namespaces.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: "two"})
	must(err)
	_, err = d.namespaces.Get(ctx, &namespacesapi.GetNamespaceRequest{Name: "two"})
	wantCode(t, err, codes.NotFound, `"two"`)

	l, err := d.leases.Create(ctx, &leasesapi.CreateRequest{Labels: map[string]string{"x": "1"}})
	must(err)
	_, err = d.leases.AddResource(ctx, &leasesapi.AddResourceRequest{ID: l.Lease.ID, Resource: &leasesapi.Resource{ID: "k", Type: "snapshots/native"}})
	must(err)
	_, err = d.leases.AddResource(ctx, &leasesapi.AddResourceRequest{ID: l.Lease.ID})
	wantCode(t, err, codes.InvalidArgument, "id")
	kept, err := d.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: l.Lease.ID})
	if err != nil || len(kept.Resources) != 1 || kept.Resources[0].Type != "snapshots/native" {
		t.Errorf("%v, %v", kept, err)
	}
	_, err = d.leases.List(ctx, &leasesapi.ListRequest{Filters: []string{"id="}})
	wantCode(t, err, codes.InvalidArgument, "filter")
	_, err = d.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: l.Lease.ID, Sync: true})
	must(err)
}

func TestListStream(t *testing.T) {
	ctx, d := domainServer(t)
	var want []string
	for _, id := range []string{"a", "b", "c"} {
		if _, err := d.containers.Create(ctx, &containersapi.CreateContainerRequest{Container: container(id)}); err != nil {
			t.Fatal(err)
		}
		want = append(want, id)
	}
	list := func(filters ...string) (streamed []string, err error) {
		s, err := d.containers.ListStream(ctx, &containersapi.ListContainersRequest{Filters: filters})
		for err == nil {
			var m *containersapi.ListContainerMessage
			if m, err = s.Recv(); err == nil {
				streamed = append(streamed, m.Container.ID)
			}
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return streamed, err
	}
	for _, c := range []struct{ filters, want []string }{{nil, want}, {[]string{"id==a", "id==c"}, []string{"a", "c"}}, {[]string{"id==a,id==c"}, nil}} {
		got, err := list(c.filters...)
		whole, lerr := d.containers.List(ctx, &containersapi.ListContainersRequest{Filters: c.filters})
		if err != nil || lerr != nil || !reflect.DeepEqual(got, c.want) || len(whole.Containers) != len(c.want) {
			t.Errorf("%q: %v, %v, %v, %v", c.filters, got, whole, err, lerr)
		}
	}
	_, err := list("id==a b")
	wantCode(t, err, codes.InvalidArgument, "filter")
}
