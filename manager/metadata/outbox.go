package metadata

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/managerd/managerd/manager/namespaces"
	"github.com/managerd/managerd/protos/eventlog"
	"github.com/managerd/managerd/shimapi/failpoint"
)

// pruning is how long events that were handed on stay in the database, if no other transaction takes them out.
const pruning = time.Second

// Deliver hands an event on. Source and seq name it: one that was handed on before, by a daemon that was killed before it
// could take note, is not to be handed on again.
type Deliver func(source string, seq uint64, e *types.Envelope) error

// outbox keeps the events of changes in the transactions that make them, so that neither is on disk without the other. They
// are handed on in the order of the commits, and taken out by a later transaction.
type outbox struct {
	source string // names this opening of the database
	seq    uint64 // of the last event; guarded by the database's lock of writers, as its transactions are

	mu      sync.Mutex // held while events are handed on: their order is that of the commits
	deliver Deliver    // nil: they wait
	sent    uint64     // the last one that may be taken out
	timer   *time.Timer
	closed  bool
}

// told is an event in the outbox, by its key there.
type told struct {
	key   uint64
	event *eventlog.Event
}

func newOutbox() *outbox {
	var name [8]byte
	_, _ = rand.Read(name[:]) // never fails (crypto/rand)
	return &outbox{source: "metadata/" + hex.EncodeToString(name[:])}
}

type txKey struct{}

// In says that what is published with the context belongs to tx.
func In(ctx context.Context, tx *Tx) context.Context { return context.WithValue(ctx, txKey{}, tx) }

// Publish tells of a change in the namespace of ctx: with that, when the context is one of In, else in a transaction of its
// own.
func (db *DB) Publish(ctx context.Context, topic string, event proto.Message) error {
	ns, err := namespaces.Required(ctx)
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	if tx, ok := ctx.Value(txKey{}).(*Tx); ok {
		return tx.tell(ns, topic, event)
	}
	return db.Batch(func(tx *Tx) error { return tx.tell(ns, topic, event) })
}

func (tx *Tx) tell(ns, topic string, event proto.Message) error {
	body, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	b, err := tx.CreateBucketIfNotExists(outboxBucket)
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	key, err := b.NextSequence()
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	tx.box.seq++
	e := &eventlog.Event{
		UnixNano: time.Now().UnixNano(), Namespace: ns, Topic: topic, TypeUrl: body.TypeUrl, Value: body.Value,
		Source: tx.box.source, SourceSeq: tx.box.seq,
	}
	data, err := e.Marshal()
	if err == nil {
		err = b.Put(binary.BigEndian.AppendUint64(nil, key), data)
	}
	if err != nil {
		return fmt.Errorf("cannot publish %s: %w", topic, err)
	}
	tx.told = append(tx.told, told{key, e})
	return nil
}

// Deliver has the events of changes handed on from now on, and first those that are still there from an earlier daemon. To be
// called once, before anything is changed. fn must not use the database.
func (db *DB) Deliver(fn Deliver) error {
	var waiting []told
	err := db.View(func(tx *Tx) error {
		b := tx.Bucket(string(outboxBucket))
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			e := &eventlog.Event{}
			if err := e.Unmarshal(v); err != nil || len(k) != 8 {
				slog.Error("an event in the database is damaged", "key", fmt.Sprintf("%x", k), "error", err)
				return nil
			}
			waiting = append(waiting, told{binary.BigEndian.Uint64(k), e})
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("cannot read the events of the last changes: %w", err)
	}
	db.box.mu.Lock()
	db.box.deliver = fn
	db.box.mu.Unlock()
	db.hand(waiting)
	return nil
}

// hand hands on events that are committed.
func (db *DB) hand(events []told) {
	if len(events) == 0 {
		return
	}
	o := db.box
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.deliver == nil {
		return
	}
	failpoint.Hit("metadata.event.committed")
	for _, t := range events {
		e := t.event
		err := o.deliver(e.Source, e.SourceSeq, &types.Envelope{
			Timestamp: timestamppb.New(time.Unix(0, e.UnixNano)), Namespace: e.Namespace, Topic: e.Topic,
			Event: &anypb.Any{TypeUrl: e.TypeUrl, Value: e.Value},
		})
		if err != nil {
			slog.Error("cannot tell of a change", "namespace", e.Namespace, "topic", e.Topic, "error", err)
		}
		failpoint.Hit("metadata.event.delivered")
		o.sent = max(o.sent, t.key)
	}
	if o.timer == nil && !o.closed {
		o.timer = time.AfterFunc(pruning, db.prune)
	}
}

// prune takes out what was handed on.
func (db *DB) prune() {
	db.box.mu.Lock()
	db.box.timer = nil
	closed := db.box.closed
	db.box.mu.Unlock()
	if closed {
		return
	}
	if err := db.Batch(func(*Tx) error { return nil }); err != nil && !errors.Is(err, bolterrors.ErrDatabaseNotOpen) { // every transaction does
		slog.Error("cannot take events out of the database that were told", "error", err)
	}
}

// clear takes out of the outbox, in a transaction that writes, what was handed on.
func (o *outbox) clear(tx *bolt.Tx) error {
	o.mu.Lock()
	sent := o.sent
	o.mu.Unlock()
	b := tx.Bucket(outboxBucket)
	if b == nil || sent == 0 {
		return nil
	}
	c := b.Cursor()
	for k, _ := c.First(); len(k) == 8 && binary.BigEndian.Uint64(k) <= sent; k, _ = c.First() {
		if err := b.Delete(k); err != nil {
			return fmt.Errorf("cannot take an event out of the database that was told: %w", err)
		}
	}
	return nil
}

// close ends the pruning.
func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	if o.timer != nil {
		o.timer.Stop()
	}
}
