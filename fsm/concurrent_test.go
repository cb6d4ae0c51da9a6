package fsm_test

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Readers of all kinds go on while entries are applied. Each transaction moves
// an amount between accounts, so that every state has the same total.
func TestReadersWhileApplying(t *testing.T) {
	const accounts, entries, each = 200, 300, 100
	account := func(i int) string { return fmt.Sprintf("/accounts/%04d", i%accounts) }
	s := fsm.New()
	var first []*pb.RequestOp
	for i := range accounts {
		first = append(first, put(account(i), strconv.Itoa(each)))
	}
	if _, _, err := s.Apply(1, &pb.Entry{FeatureLevel: 1, Txns: []*pb.Txn{txn(first...), txn(grant(1, 10))}}); err != nil {
		t.Fatal(err)
	}

	var done atomic.Bool
	var readers sync.WaitGroup
	// reader repeats the read until all is applied, and once more after that.
	reader := func(read func() error) {
		readers.Go(func() {
			for last := false; ; {
				if err := read(); err != nil {
					t.Error(err)
					return
				}
				if last {
					return
				}
				last = done.Load()
			}
		})
	}
	total := func(kvs []*pb.KeyValue) error {
		sum := 0
		for _, kv := range kvs {
			n, err := strconv.Atoi(string(kv.Value))
			if err != nil {
				return err
			}
			sum += n
		}
		if len(kvs) != accounts || sum != accounts*each {
			return fmt.Errorf("%d accounts with %d", len(kvs), sum)
		}
		return nil
	}
	all := &pb.RangeRequest{Key: []byte("/accounts/"), RangeEnd: []byte("/accounts0")}
	for range 2 {
		reader(func() error { // all accounts, now and at an older revision
			v := s.View()
			resp, err := v.Range(all)
			if err != nil {
				return err
			}
			past, err := v.Range(&pb.RangeRequest{Key: all.Key, RangeEnd: all.RangeEnd, Revision: max(2, v.CompactRevision(), v.Revision()-3)})
			if err != nil {
				return err
			}
			if err := total(past.Kvs); err != nil {
				return err
			}
			return total(resp.Kvs)
		})
	}
	reader(func() error { // the store itself
		if resp, refused := s.Range(&pb.RangeRequest{Key: all.Key, RangeEnd: all.RangeEnd, Limit: 10}); refused != nil || resp.Count != accounts {
			return fmt.Errorf("%v, %w", resp, refused)
		}
		return nil
	})
	var seen int64 = 2
	reader(func() error { // a watcher: no gap, no repetition
		v := s.View()
		for seen < v.Revision() {
			events, upTo, err := v.Events(seen, 10)
			if err != nil {
				seen = v.CompactRevision() // too slow: begins again
				continue
			}
			for _, e := range events {
				if e.Kv.ModRevision != seen && e.Kv.ModRevision != seen+1 {
					return fmt.Errorf("event of %d after %d", e.Kv.ModRevision, seen)
				}
				seen = e.Kv.ModRevision
			}
			if seen != upTo {
				return fmt.Errorf("up to %d after %d", upTo, seen)
			}
		}
		return nil
	})
	reader(func() error { // a snapshot
		v := s.View()
		var out bytes.Buffer
		if _, err := v.WriteTo(io.MultiWriter(&out)); err != nil {
			return err
		}
		again, err := fsm.Restore(&out)
		if err != nil {
			return err
		}
		if again.View().Hash() != v.Hash() {
			return fmt.Errorf("restored %x from %x", again.View().Hash(), v.Hash())
		}
		return nil
	})

	balance := make([]int, accounts)
	for i := range balance {
		balance[i] = each
	}
	for i := range entries {
		from, to := i*7, i*13+1
		e := &pb.Entry{FeatureLevel: 1, TimeUnixNano: int64(i)}
		if from%accounts != to%accounts {
			balance[from%accounts]--
			balance[to%accounts]++
			e.Txns = append(e.Txns, &pb.Txn{RequestId: strconv.AppendInt(nil, int64(i), 10), Success: ops(
				put(account(from), strconv.Itoa(balance[from%accounts])),
				putOp(&pb.PutRequest{Key: []byte(account(to)), Value: []byte(strconv.Itoa(balance[to%accounts])), Lease: 1}))})
		}
		if i%50 == 49 {
			e.Txns = append(e.Txns, txn(compact(s.View().Revision()-10)))
		}
		if _, _, err := s.Apply(uint64(i+2), e); err != nil {
			t.Error(err)
			break
		}
	}
	done.Store(true)
	readers.Wait()
}
