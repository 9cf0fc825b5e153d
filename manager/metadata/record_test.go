package metadata

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	records "github.com/managerd/managerd/protos/metadata"
)

func TestRecords(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "metadata.db"))
	err := db.Update(func(tx *Tx) error {
		b, err := tx.MakeBucket(Path("one", Leases)...)
		if err != nil {
			return err
		}
		if _, err := b.CreateBucket([]byte("a bucket")); err != nil {
			t.Error(err)
		}
		for _, key := range []string{"a", "c", strings.Repeat("k", MaxKey)} {
			if err := Put(b, key, &records.Lease{CreatedAt: 1, Labels: map[string]string{"key": key[:1]}}); err != nil {
				t.Errorf("%.20q: %v", key, err)
			}
		}
		for _, key := range []string{"", strings.Repeat("k", MaxKey+1)} {
			if err := Put(b, key, &records.Lease{}); !errdefs.IsInvalidArgument(err) || len(err.Error()) > 200 {
				t.Errorf("%.20q: %v", key, err)
			}
		}
		return b.Put([]byte("b"), []byte{0xff, 0xff}) // damaged
	})
	if err != nil {
		t.Fatal(err)
	}
	err = db.View(func(tx *Tx) error {
		b := tx.Bucket(Path("one", Leases)...)
		var r records.Lease
		if err := Get(b, "a", &r); err != nil || r.Labels["key"] != "a" {
			t.Errorf("%v, %v", r, err)
		}
		for _, key := range []string{"", "x", "a bucket"} {
			if err := Get(b, key, &r); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"`+key+`"`) {
				t.Errorf("%q: %v", key, err)
			}
		}
		if err := Get(nil, "a", &r); !errdefs.IsNotFound(err) {
			t.Errorf("no bucket: %v", err)
		}
		if err := Get(b, "b", &r); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), `"b"`) {
			t.Errorf("damaged: %v", err)
		}
		var keys []string
		note := func(key string, _ *records.Lease) error { keys = append(keys, key[:1]); return nil }
		if err := Each(b, note); err != nil || strings.Join(keys, " ") != "a c k" {
			t.Errorf("each: %v, %v", keys, err)
		}
		if err := EachStrict(b, note); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), `"b"`) && !strings.Contains(err.Error(), " b ") {
			t.Errorf("strict: %v", err)
		}
		if err := Each(nil, note); err != nil {
			t.Error(err)
		}
		if tx.Bucket() != nil || tx.Bucket("no", "such") != nil || tx.Bucket(Path("no", "such", "bucket")...) != nil {
			t.Error("a bucket that is not there was found")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSmallThings(t *testing.T) {
	m := map[string]string{"a": "1", "b": "2"}
	if got := With(m, "a", ""); !reflect.DeepEqual(got, map[string]string{"b": "2"}) {
		t.Errorf("without a: %v", got)
	}
	if got := With(m, "c", "3"); len(got) != 3 || len(m) != 2 {
		t.Errorf("%v of %v", got, m)
	}
	if got := With[string](nil, "c", "3"); !reflect.DeepEqual(got, map[string]string{"c": "3"}) {
		t.Errorf("of nothing: %v", got)
	}
	if FromAny(nil) != nil || ToAny(nil) != nil {
		t.Error("nil did not stay nil")
	}
	if a := ToAny(FromAny(&anypb.Any{TypeUrl: "t", Value: []byte("v")})); a.TypeUrl != "t" || string(a.Value) != "v" {
		t.Errorf("%v", a)
	}
	now := time.Now().UTC()
	if !Time(0).IsZero() || !Time(now.UnixNano()).Equal(now) {
		t.Error("times are not what they were")
	}
}
