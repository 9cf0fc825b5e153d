package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"

	managerapi "github.com/managerd/managerd/protos/manager/v1"
)

// replayKills is how often the daemon is killed under TestReplayOnce.
const replayKills = 25

// consumer reads the log of events as a program does that keeps the number of the last event it has dealt with.
type consumer struct {
	mu   sync.Mutex
	last uint64
	seen map[string]int // "TOPIC ID EXEC"
	lost int
}

// consume reads until a container's deletion comes, through every end of the daemon.
func (c *consumer) consume(ctx context.Context, conn *grpc.ClientConn, ns, until string) error {
	for ctx.Err() == nil {
		s, err := managerapi.NewEventsClient(conn).Replay(ctx, &managerapi.ReplayRequest{
			SinceSeq: c.last, Follow: true, Filters: []string{"namespace==" + ns},
		})
		if err != nil {
			continue
		}
		for {
			e, err := s.Recv()
			if err != nil {
				break
			}
			c.mu.Lock()
			c.last = e.Seq
			if e.Lost {
				c.lost++
			}
			id, exec, ok := process(&types.Envelope{Topic: e.Topic, Event: e.Event})
			if ok {
				c.seen[e.Topic+" "+id+" "+exec]++
			}
			c.mu.Unlock()
			if ok && e.Topic == "/tasks/delete" && id == until && exec == "" {
				return nil
			}
		}
	}
	return ctx.Err()
}

// TestReplayOnce kills the daemon again and again under containers that start, exec and exit, and holds what a consumer
// that resumes has seen against what was done: every event exactly once, without any allowance for the moment of a kill.
func TestReplayOnce(t *testing.T) {
	u := newUser(t)
	c := newClient(t, u.Daemon)
	if _, err := c.run("steady", "exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	got := &consumer{seen: map[string]int{}}
	ended := make(chan error, 1)
	go func() { ended <- got.consume(c.ctx, c.conn, c.ns, "last") }()

	stop, killed := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := range replayKills {
			select { // the kills fall on every moment of what goes on
			case <-time.After(time.Duration(30+n*17%90) * time.Millisecond):
			case <-stop:
				killed <- nil
				return
			}
			if err := u.Kill(); err != nil {
				killed <- err
				return
			}
			if err := u.Start(); err != nil {
				killed <- err
				return
			}
		}
		killed <- nil
	}()
	// What is done is done inside the container: an exit that nobody waits for is told as well.
	want := map[string]int{}
	for n, killing := 0, true; killing; n++ {
		select {
		case err := <-killed:
			if err != nil {
				t.Fatal(err)
			}
			killing = false
		default:
		}
		id := fmt.Sprintf("e%d", n)
		if c.exec("steady", id, "exit 3") != nil || c.start("steady", id) != nil {
			continue // cut off by a kill: done or not, it is told at most once
		}
		want["/tasks/exec-added steady "+id]++
		want["/tasks/exec-started steady "+id]++
		want["/tasks/exit steady "+id]++
	}
	close(stop)
	c.finish(t, "steady")
	if _, err := c.run("last", "exit 0"); err != nil {
		t.Fatal(err)
	}
	c.finish(t, "last")
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"steady", "last"} {
		for _, topic := range []string{"create", "start", "exit", "delete"} {
			want["/tasks/"+topic+" "+id+" "]++
		}
	}
	for what, n := range want {
		if got.seen[what] != n {
			t.Errorf("%s: seen %d times", what, got.seen[what])
		}
	}
	for what, n := range got.seen {
		if n != 1 {
			t.Errorf("%s: seen %d times", what, n)
		}
	}
	if got.lost > 0 || len(want) < replayKills {
		t.Errorf("%d gaps; %d events were expected", got.lost, len(want))
	}
	t.Logf("%d events, each once, over %d kills", len(got.seen), replayKills)
}
