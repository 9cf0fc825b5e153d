package metadata

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	bolt "go.etcd.io/bbolt"

	records "github.com/managerd/managerd/protos/metadata"
)

// The stamp is a file beside the database, PATH.stamp, with the database's identity and the number of its last commit. It
// is written after each commit, without an fsync: it may be behind the database, never ahead. So a database that is behind
// its stamp is a copy of an earlier one, and what it does not know may be in use all the same.
const stampSuffix = ".stamp"

var (
	identityBucket = []byte("identity")
	identityKey    = []byte("id")
)

type stamp struct {
	file     *os.File
	identity []byte
	known    bool // there was a stamp, and the database is what that says
}

// openStamp opens the stamp of the database b and says why b is not the database that was last open here: empty when it is.
func openStamp(path string, b *bolt.DB) (_ *stamp, older string, err error) {
	s := &stamp{}
	var txid uint64
	err = b.View(func(tx *bolt.Tx) error {
		txid = uint64(tx.ID())
		if i := tx.Bucket(identityBucket); i != nil {
			s.identity = bytes.Clone(i.Get(identityKey))
		}
		return nil
	})
	if err != nil {
		return nil, "", err
	}
	data, err := os.ReadFile(path + stampSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, "", err
	}
	var last records.Stamp
	if Unseal(data, &last) == nil { // one that is damaged says nothing
		s.known = len(s.identity) > 0 && bytes.Equal(last.Identity, s.identity) && last.Txid <= txid
		switch {
		case !bytes.Equal(last.Identity, s.identity):
			older = "it is not the database that this daemon used last"
		case last.Txid > txid:
			older = fmt.Sprintf("it is a copy from before: its last commit is number %d, that of the database used last was %d", txid, last.Txid)
		}
	}
	if s.file, err = os.OpenFile(path+stampSuffix, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, "", err
	}
	return s, older, nil
}

// identify gives a database that has none an identity.
func (s *stamp) identify(tx *Tx) error {
	if s.identity != nil {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(identityBucket)
	if err != nil {
		return err
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	s.identity = id
	return b.Put(identityKey, id)
}

// write notes that a commit is on disk. What it writes has one length, but for the number, whose bytes are few.
func (s *stamp) write(txid uint64) error {
	data, err := Seal(&records.Stamp{Version: 1, Identity: s.identity, Txid: txid})
	if err != nil {
		return err
	}
	n, err := s.file.WriteAt(data, 0)
	if err != nil {
		return err
	}
	return s.file.Truncate(int64(n))
}
