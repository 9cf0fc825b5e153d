// Package eventlog has the records of the daemon's log of events (manager/eventlog), generated from eventlog.proto.
package eventlog
