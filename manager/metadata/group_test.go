package metadata

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	records "github.com/managerd/managerd/protos/metadata"
)

func put(tx *Tx, key string) error {
	b, err := tx.MakeBucket(Path("one", Leases)...)
	if err != nil {
		return err
	}
	return Put(b, key, &records.Lease{})
}

func keysOf(t *testing.T, db *DB) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	err := db.View(func(tx *Tx) error {
		return Each(tx.Bucket(Path("one", Leases)...), func(key string, _ *records.Lease) error { found[key] = true; return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestGroup has many writers at once, of both kinds, some of which fail or panic: each gets its own outcome, what
// succeeded is there, what failed is not, and they share commits.
func TestGroup(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	const n = 400
	before := commits(db)
	var wg sync.WaitGroup
	var runs [n]int // only its own function writes it
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			key := fmt.Sprint("k", i)
			fn := func(tx *Tx) error {
				runs[i]++
				if err := put(tx, key); err != nil {
					return err
				}
				switch i % 10 {
				case 3:
					return errors.New("no " + key)
				case 7:
					panic("oh " + key)
				}
				return nil
			}
			do := db.Batch
			if i%4 == 0 {
				do = db.Update
			}
			thrown, err := caught(func() error { return do(fn) })
			switch i % 10 {
			case 3:
				if err == nil || err.Error() != "no "+key || thrown != nil {
					t.Errorf("%s: %v, %v", key, err, thrown)
				}
			case 7:
				if thrown != "oh "+key {
					t.Errorf("%s: %v, %v", key, err, thrown)
				}
			default:
				if err != nil || thrown != nil {
					t.Errorf("%s: %v, %v", key, err, thrown)
				}
			}
		}()
	}
	wg.Wait()
	found := keysOf(t, db)
	for i := range n {
		if want := i%10 != 3 && i%10 != 7; found[fmt.Sprint("k", i)] != want {
			t.Errorf("k%d: %t", i, !want)
		}
		if i%4 == 0 && runs[i] != 1 {
			t.Errorf("an update ran %d times", runs[i])
		}
	}
	made := commits(db) - before
	t.Logf("%d writers, %d commits", n, made)
	if made >= n {
		t.Errorf("%d writers made %d commits: none was shared", n, made)
	}
}

func commits(db *DB) int {
	var id int
	_ = db.View(func(tx *Tx) error { id = tx.ID(); return nil })
	return id
}

func caught(fn func() error) (thrown any, err error) {
	defer func() { thrown = recover() }()
	return nil, fn()
}

// TestSeesEarlier: of two writers of one key that check first, one wins, however they are grouped.
func TestSeesEarlier(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	taken := errors.New("taken")
	for round := range 20 {
		key := fmt.Sprint("k", round)
		var wg sync.WaitGroup
		var errs [8]error
		for i := range errs {
			wg.Add(1)
			go func() {
				defer wg.Done()
				errs[i] = db.Batch(func(tx *Tx) error {
					if b := tx.Bucket(Path("one", Leases)...); b != nil && b.Get([]byte(key)) != nil {
						return taken
					}
					return put(tx, key)
				})
			}()
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errors.Is(err, taken) {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Errorf("%s was made by %d", key, won)
		}
	}
}

// TestGoexit: a function that ends its goroutine holds up nobody who comes later.
func TestGoexit(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = db.Update(func(tx *Tx) error {
			if err := put(tx, "gone"); err != nil {
				t.Error(err)
			}
			runtime.Goexit()
			return nil
		})
	}()
	<-ended
	if err := db.Batch(func(tx *Tx) error { return put(tx, "later") }); err != nil {
		t.Fatal(err)
	}
	if found := keysOf(t, db); found["gone"] || !found["later"] {
		t.Errorf("%v", found)
	}
}

func TestClosed(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	ran := false
	err := db.Update(func(*Tx) error { ran = true; return nil })
	if err == nil || ran || !strings.Contains(err.Error(), "not open") {
		t.Errorf("%t, %v", ran, err)
	}
}
