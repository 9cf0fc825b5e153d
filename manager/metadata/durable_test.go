package metadata

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// writerEnv has the test binary write records into the database it names, and tell each one after it was committed.
const writerEnv = "METADATA_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(writerEnv); path != "" {
		writeForever(path)
	}
	os.Exit(m.Run())
}

func writeForever(path string) {
	db, err := Open(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				do := db.Batch
				if i%5 == 0 {
					do = db.Update
				}
				if err := do(func(tx *Tx) error { return put(tx, key) }); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(key)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// TestKilled: what was acknowledged is there after kill -9, each time, and the database opens.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	told := map[string]bool{}
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), writerEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s := bufio.NewScanner(out)
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() }) // if it hangs
		for want := 40 + 13*round; s.Scan(); want-- {
			told[s.Text()] = true // lines that are cut short stand at the end only
			if want == 0 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		kill.Stop()
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the writer was not killed: %v", err)
		}
		db, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		found := keysOf(t, db)
		for key := range told {
			if !found[key] {
				t.Errorf("round %d: %s was acknowledged and is not there", round, key)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(told) < 200 {
		t.Errorf("only %d records were acknowledged", len(told))
	}
}
