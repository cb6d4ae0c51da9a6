package raftstore

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// These run whole clusters in virtual time: raft's own transport in memory, real
// files. Minutes of waiting take no time, and time-outs are exact.

// virtual starts three voters inside a synctest bubble.
func virtual(t *testing.T, change func(*Config)) (c *cluster, transports map[string]*raft.InmemTransport) {
	t.Helper()
	transports = map[string]*raft.InmemTransport{}
	c = &cluster{t: t, n: newNetwork()}
	dir := t.TempDir()
	var servers []raft.Server
	for i := range 3 {
		name := fmt.Sprintf("s%d", i+1)
		address, tr := raft.NewInmemTransport(raft.ServerAddress(name))
		transports[name] = tr
		r := &replica{t: t, n: c.n, name: name, address: string(address), dir: filepath.Join(dir, name)}
		r.lead = func(ctx context.Context, _ int64) error { <-ctx.Done(); return nil }
		cfg := Config{
			Dir: r.dir, ID: r.id(), Address: r.address, EpochKey: testEpochKey,
			Dial:      c.n.dial(r.address),
			Logger:    testLogger(t, name),
			transport: func() (transport, error) { return tr, nil },
		}
		if change != nil {
			change(&cfg)
		}
		var err error
		if r.Store, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
		c.n.stores[r.address] = r.Store
		c.replicas = append(c.replicas, r)
		servers = append(servers, raft.Server{ID: raft.ServerID(r.id()), Address: address})
	}
	for _, a := range transports {
		for _, b := range transports {
			a.Connect(b.LocalAddr(), b)
		}
	}
	for _, r := range c.replicas {
		err := raft.BootstrapCluster(r.cfg.raft(), r.logs, r.disk.stable, r.disk.snaps, nil, raft.Configuration{Servers: servers})
		if err != nil {
			t.Fatal(err)
		}
		r.run()
	}
	return c, transports
}

func (c *cluster) shutAll() {
	for _, r := range c.replicas {
		r.shut()
	}
	// What raft still sends to those who have stopped runs into its time-out.
	time.Sleep(time.Minute)
}

func TestVirtualIdleHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := virtual(t, nil)
		leader := c.leader()
		leader.mustPropose(leaseTxn(1, 10, "k"))
		time.Sleep(time.Second)
		before := leader.raft.LastIndex()
		// An agent's heartbeats go on, through a follower.
		follower := c.followers()[0]
		ctx := context.Background()
		for range 30 * 60 {
			time.Sleep(2 * time.Second)
			if ttls, err := follower.KeepAlive(ctx, 1); err != nil || ttls[0] != 10 {
				t.Fatalf("keep-alive: %v, %v", ttls, err)
			}
		}
		if after := leader.raft.LastIndex(); after != before {
			t.Errorf("%d log entries in an idle hour", after-before)
		}
		if c.leader() != leader {
			t.Error("the leader changed in an idle hour")
		}
		c.shutAll()
	})
}

func TestVirtualLeaseTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, transports := virtual(t, nil)
		leader := c.leader()
		leader.mustPropose(leaseTxn(1, 10, "k"))
		granted := time.Now()
		time.Sleep(8 * time.Second)
		if _, ok := leader.View().Get("k"); !ok {
			t.Fatal("ended early")
		}
		// The leader is lost at 8 s; its successor gives the whole time again.
		transports[leader.name].DisconnectAll()
		for name, tr := range transports {
			if name != leader.name {
				tr.Disconnect(raft.ServerAddress(leader.name))
			}
		}
		c.n.isolate(leader.address)
		next := c.leader()
		took := time.Since(granted)
		if took > 11*time.Second {
			t.Errorf("the next leader came after %v", took-8*time.Second)
		}
		time.Sleep(9 * time.Second)
		if _, ok := next.View().Get("k"); !ok {
			t.Error("the next leader gave no fresh time")
		}
		time.Sleep(1500 * time.Millisecond)
		if _, ok := next.View().Get("k"); ok {
			t.Error("the lease never ends")
		}
		c.shutAll()
	})
}

// Old versions go, the newest stay, and when the writes end so do the entries.
func TestVirtualUpkeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := virtual(t, func(cfg *Config) {
			cfg.Retention = Retention{Revisions: 100, Age: time.Minute, CheckpointEntries: 200}
		})
		leader := c.leader()
		checkpoints := 0
		for i := range 600 {
			leader.mustPropose(put(fmt.Sprintf("k%d", i%5), fmt.Sprint(i)))
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Minute)
		v := leader.View()
		if kept := v.Revision() - v.CompactRevision(); kept < 100 || kept > 200 {
			t.Errorf("revision %d, compacted to %d", v.Revision(), v.CompactRevision())
		}
		for i := uint64(1); i <= leader.raft.LastIndex(); i++ {
			var l raft.Log
			var e pb.Entry
			if err := leader.logs.GetLog(i, &l); err != nil || l.Type != raft.LogCommand {
				continue
			}
			if err := proto.Unmarshal(l.Data, &e); err != nil {
				t.Fatal(err)
			}
			for _, op := range e.Txns[0].GetSuccess() {
				if op.GetCheckpoint() != nil {
					checkpoints++
				}
			}
		}
		if checkpoints < 2 || checkpoints > 4 {
			t.Errorf("%d checkpoints in about 600 entries", checkpoints)
		}
		before := leader.raft.LastIndex()
		time.Sleep(time.Hour)
		if after := leader.raft.LastIndex(); after != before {
			t.Errorf("%d log entries after the writes ended", after-before)
		}
		c.sameState()
		c.shutAll()
	})
}

func TestHistoryTarget(t *testing.T) {
	keep := Retention{Revisions: 100, Age: time.Minute, MaxRevisions: 1000}
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	h := newHistory(keep)
	for _, step := range []struct {
		second              int
		revision, compacted int64
		want                int64 // 0: nothing to do
	}{
		{0, 500, 1, 0},        // nothing is known to be old
		{30, 600, 1, 0},       //
		{60, 610, 1, 500},     // what was there a minute ago, but for the newest 100
		{61, 611, 500, 0},     //
		{90, 620, 500, 0},     // 520 is not worth an entry
		{91, 700, 500, 600},   // 600 at second 30
		{95, 2500, 600, 1500}, // too many, however young
		{300, 2500, 1500, 2400},
		{900, 2500, 2400, 0}, // idle
		{901, 2500, 2400, 0},
	} {
		got, ok := h.target(at(step.second), step.revision, step.compacted)
		if ok != (step.want != 0) || got != step.want {
			t.Errorf("second %d: compact to %d (%v), want %d", step.second, got, ok, step.want)
		}
	}
	if len(h.samples) > 3 {
		t.Errorf("%d samples are kept", len(h.samples))
	}
}

// What etcd's modes of auto-compaction ask for.
func TestHistoryTargetByAgeOrNumberAlone(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	byAge := newHistory(Retention{Revisions: 1, Age: 24 * time.Hour, MaxRevisions: math.MaxInt64})
	byNumber := newHistory(Retention{Revisions: 100, Age: 1, MaxRevisions: math.MaxInt64})
	never := newHistory(Retention{Revisions: math.MaxInt64, Age: 1, MaxRevisions: math.MaxInt64})
	if to, ok := byAge.target(at(0), 1, -1); ok {
		t.Errorf("compacts to %d while there is nothing", to)
	}
	aged, numbered := int64(-1), int64(-1)
	const day = 24 * 60 * 60
	for s := 5; s < 3*day; s += 5 {
		revision := int64(s + 1) // one a second
		if to, ok := byAge.target(at(s), revision, aged); ok {
			if age := revision - to; age < day || age > day+day/100 {
				t.Fatalf("compacts what is %d s old", age)
			}
			aged = to
		}
		if to, ok := byNumber.target(at(s), revision, numbered); ok {
			if kept := revision - to; kept < 100 || kept > 155 {
				t.Fatalf("keeps %d revisions", kept)
			}
			numbered = to
		}
		if to, ok := never.target(at(s), revision, -1); ok {
			t.Fatalf("compacts to %d", to)
		}
	}
	if aged < day || numbered < 2*day {
		t.Errorf("compacted to %d by age, to %d by number", aged, numbered)
	}
	if len(byAge.samples) > 2*samplesPerAge {
		t.Errorf("%d samples are kept", len(byAge.samples))
	}
}
