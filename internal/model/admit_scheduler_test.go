package model

import (
	"testing"

	"google.golang.org/grpc/codes"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestSchedulerConfig(t *testing.T) {
	w := newWorld(t)
	now := func() *pb.SchedulerConfig {
		t.Helper()
		c, err := LoadSchedulerConfig(w.view())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := now(); c.Rebalance || c.RebalanceMoves != 5 || c.RebalanceIntervalSeconds != 300 || c.RebalanceThreshold != 20 || c.ResourceVersion != 0 {
		t.Errorf("defaults: %v", c)
	}
	set := func(c *pb.SchedulerConfig, message string) {
		t.Helper()
		txn, _, err := SetSchedulerConfig(w.view(), c, w.meta())
		if err != nil {
			t.Fatal(err)
		}
		if (txn == nil) != (message == "") {
			t.Fatalf("%v", txn)
		}
		if txn == nil {
			return
		}
		w.do(txn)
		var last *pb.Event
		for kv := range w.store.View().Scan(EventsPrefix) {
			last = &pb.Event{}
			if err := Parse(kv, last); err != nil {
				t.Fatal(err)
			}
		}
		if last.Type != pb.EventType_SCHEDULER_CHANGED || last.Message != message || last.Actor == "" {
			t.Errorf("event: %v", last)
		}
	}
	set(&pb.SchedulerConfig{}, "")
	set(&pb.SchedulerConfig{Rebalance: true, RebalanceMoves: 7, RebalanceThreshold: 20}, "scheduler: rebalance=true rebalance-moves=7")
	set(&pb.SchedulerConfig{Rebalance: true, RebalanceMoves: 7, RebalanceIntervalSeconds: 300}, "")
	read := now()
	read.NoPreemption = true
	set(read, "scheduler: no-preemption=true")
	_, _, err := SetSchedulerConfig(w.view(), read, w.meta())
	wantCode(t, err, codes.Aborted, "somebody changed it; read it again")
	for _, c := range []struct {
		config *pb.SchedulerConfig
		text   string
	}{
		{&pb.SchedulerConfig{RebalanceMoves: -1}, "rebalance_moves: -1 is not allowed; allowed: 1 to 10000"},
		{&pb.SchedulerConfig{RebalanceIntervalSeconds: 9}, "rebalance_interval_seconds: 9 is not allowed; allowed: 10 to 604800"},
		{&pb.SchedulerConfig{RebalanceThreshold: 101}, "rebalance_threshold: 101 is not allowed; allowed: 1 to 100"},
		{&pb.SchedulerConfig{ResourceVersion: -1}, "resource_version: -1 is negative"},
	} {
		_, _, err := SetSchedulerConfig(w.view(), c.config, w.meta())
		wantCode(t, err, codes.InvalidArgument, c.text)
	}
	for document, text := range map[string]string{
		`{"rebalance": "often"}`: "rebalance", `{"speed": 9}`: "speed", ``: "empty", `{"rebalance_threshold": 1000}`: "rebalance_threshold",
	} {
		_, err := PutSchedulerConfig(w.view(), []byte(document), w.meta())
		wantCode(t, err, codes.InvalidArgument, text)
	}
	txn, err := PutSchedulerConfig(w.view(), []byte(`{"rebalance": true}`), w.meta())
	if err != nil {
		t.Fatal(err)
	}
	w.do(txn)
	if c := now(); !c.Rebalance || c.RebalanceMoves != 5 || c.NoPreemption {
		t.Errorf("%v", c)
	}
	if txn, err = ResetSchedulerConfig(w.view(), w.meta()); err != nil {
		t.Fatal(err)
	}
	w.do(txn)
	if c := now(); c.Rebalance || c.ResourceVersion != 0 {
		t.Errorf("%v", c)
	}
	if txn, err := ResetSchedulerConfig(w.view(), w.meta()); txn != nil || err != nil {
		t.Errorf("%v %v", txn, err)
	}
}
