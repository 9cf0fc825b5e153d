package boot

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/managerd/managerd/cmd/shim-runc/internal/service"
	"github.com/managerd/managerd/shimapi/failpoint"
	"github.com/managerd/managerd/shimapi/parking"
)

// unparking is how long a daemon may take to hand over what was parked with it; what has not come by then is done without.
const unparking = 5 * time.Second

// adopt makes svc the successor of the shim that kept its bundle.
func adopt(svc *service.Service, log *slog.Logger) error {
	held, err := receive()
	if err != nil {
		log.Error("not everything that was parked has come", "error", err)
	}
	table, err := svc.LoadTable()
	if err != nil {
		log.Error("a part of the process table is lost", "error", err)
	}
	failpoint.Hit("shim.adopt.received")
	begin := time.Now()
	if err := svc.Restore(table, held); err != nil {
		return err
	}
	failpoint.Hit("shim.adopt.restored")
	log.Info("took over from a shim that died", "processes", len(table.Processes), "took", time.Since(begin))
	return nil
}

// adoptSandbox is adopt for a sandbox: all that there is of it is in the bundle.
func adoptSandbox(b *service.Sandbox, log *slog.Logger) error {
	if held, err := receive(); err == nil {
		held.Close()
	}
	begin := time.Now()
	if err := b.RestoreSandbox(); err != nil {
		return err
	}
	log.Info("took over a sandbox from a shim that died", "took", time.Since(begin))
	return nil
}

// receive takes the descriptors that were parked, to the end of the hand-over connection.
func receive() (service.Held, error) {
	held := service.Held{}
	conn, err := parking.Conn(os.NewFile(parking.HandoverFD, "handover"))
	if err != nil {
		return held, err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetReadDeadline(time.Now().Add(unparking)); err != nil {
		return held, err
	}
	for {
		parcel, files, err := parking.Receive(conn)
		if errors.Is(err, io.EOF) {
			return held, nil
		}
		if err != nil {
			return held, err
		}
		of := held[parcel.ExecId]
		if of == nil {
			of = map[string]*os.File{}
			held[parcel.ExecId] = of
		}
		for i, kind := range parcel.Kinds {
			if old := of[kind]; old != nil {
				_ = old.Close()
			}
			of[kind] = files[i]
		}
	}
}
