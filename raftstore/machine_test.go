package raftstore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/fsm"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func counterValue(t *testing.T, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

type lostBatch struct {
	b   *batch
	err error
}

func newTestMachine(lost *[]lostBatch) *machine {
	m := newMachine(slog.New(slog.DiscardHandler), newMetrics())
	m.lost = func(b *batch, err error) { *lost = append(*lost, lostBatch{b, err}) }
	return m
}

// command makes the log entry of a batch with one transaction.
func command(t *testing.T, index uint64, of tag, txn *pb.Txn) *raft.Log {
	t.Helper()
	encoded, err := appendTxn(nil, txn)
	if err != nil {
		t.Fatal(err)
	}
	data := append(entryHeader(1, len(encoded)), encoded...)
	return &raft.Log{Index: index, Type: raft.LogCommand, Data: data, Extensions: of.seal(data)}
}

// What becomes of a batch whose leadership was lost, by what is found at its index.
func TestFateOfABatchInFlight(t *testing.T) {
	mine, other := tag{1, 1}, tag{2, 1}
	lostAt5 := func(m *machine, b *batch) { m.settle(b, 5, raft.ErrLeadershipLost) }
	apply := func(index uint64, of tag) func(*testing.T, *machine) {
		return func(t *testing.T, m *machine) { m.Apply(command(t, index, of, put("k", "v"))) }
	}
	restore := func(t *testing.T, m *machine) {
		from := newTestMachine(nil)
		from.Apply(command(t, 9, other, put("k", "v")))
		if err := m.Restore(snapshotOf(t, from)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		before, after func(*testing.T, *machine)
		settle        func(*machine, *batch)
		applied       bool
		again         bool // reported as not proposed
		err           error
	}{
		"committed":                      {before: apply(5, mine), settle: func(m *machine, b *batch) { m.settle(b, 5, nil) }, applied: true},
		"committed, the answer was lost": {before: apply(5, mine), settle: lostAt5, applied: true},
		"committed by the next leader":   {settle: lostAt5, after: apply(5, mine), applied: true},
		"replaced by the next leader":    {settle: lostAt5, after: apply(5, other), again: true},
		"passed over":                    {settle: lostAt5, after: apply(6, other), again: true},
		"replaced before it was known":   {before: apply(5, other), settle: lostAt5, again: true},
		"a snapshot came":                {settle: lostAt5, after: restore, err: ErrOutcomeUnknown},
		"a snapshot came before":         {before: restore, settle: lostAt5, err: ErrOutcomeUnknown},
		"never reached the log":          {settle: func(m *machine, b *batch) { m.settle(b, 0, raft.ErrNotLeader) }, again: true},
		"never heard of again":           {settle: lostAt5, after: func(_ *testing.T, m *machine) { m.abandon() }, err: ErrOutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			var lost []lostBatch
			m := newTestMachine(&lost)
			c0 := newCall(context.Background(), put("k", "v"))
			b := &batch{tag: mine, calls: []*call{c0}}
			m.expect(b)
			if c.before != nil {
				c.before(t, m)
			}
			c.settle(m, b)
			if c.after != nil {
				c.after(t, m)
			}
			select {
			case o := <-c0.done:
				if !c.applied || o.err != nil || len(o.results) != 1 || o.index != 5 {
					t.Errorf("outcome %+v", o)
				}
			default:
				if c.applied {
					t.Error("no outcome")
				}
			}
			if c.applied {
				if len(lost) != 0 {
					t.Errorf("lost %v", lost)
				}
				return
			}
			if len(lost) != 1 {
				t.Fatalf("lost %v", lost)
			}
			var not *notProposed
			if errors.As(lost[0].err, &not) != c.again || c.err != nil && !errors.Is(lost[0].err, c.err) {
				t.Errorf("lost with %v", lost[0].err)
			}
			if len(m.pending) != 0 {
				t.Errorf("%d batches are still expected", len(m.pending))
			}
		})
	}
}

type sink struct {
	bytes.Buffer
	raft.SnapshotSink
}

func (s *sink) Write(b []byte) (int, error) { return s.Buffer.Write(b) }

func snapshotOf(t testing.TB, m *machine) io.ReadCloser {
	t.Helper()
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var out sink
	if err := snap.Persist(&out); err != nil {
		t.Fatal(err)
	}
	snap.Release()
	return io.NopCloser(&out.Buffer)
}

// A snapshot's index may be that of a change of membership, which the fsm does not
// see; who waits for it must not wait for ever after a restore.
func TestSnapshotKeepsTheAppliedIndex(t *testing.T) {
	m := newTestMachine(nil)
	m.Apply(command(t, 3, tag{1, 1}, put("k", "v")))
	m.Apply(&raft.Log{Index: 4, Type: raft.LogConfiguration})
	to := newTestMachine(nil)
	if err := to.Restore(snapshotOf(t, m)); err != nil {
		t.Fatal(err)
	}
	if err := to.wait(within(t, patience), 4); err != nil {
		t.Error(err)
	}
	if to.view().Hash() != m.view().Hash() {
		t.Error("the state is another")
	}
}

func TestRestoreKeepsTheStateWhenTheSnapshotIsBad(t *testing.T) {
	m := newTestMachine(nil)
	m.Apply(command(t, 3, tag{1, 1}, put("k", "v")))
	whole, err := io.ReadAll(snapshotOf(t, m))
	if err != nil {
		t.Fatal(err)
	}
	before := m.view().Hash()
	for n := range whole {
		if err := m.Restore(io.NopCloser(bytes.NewReader(whole[:n]))); err == nil {
			t.Fatalf("the first %d bytes of %d are taken for a snapshot", n, len(whole))
		}
	}
	if m.view().Hash() != before || m.applied.Load() != 3 {
		t.Error("a bad snapshot has changed the state")
	}
}

func FuzzRestore(f *testing.F) {
	m := newTestMachine(nil)
	whole, err := io.ReadAll(snapshotOf(f, m))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(snapshotMagic))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newTestMachine(nil)
		if err := m.Restore(io.NopCloser(bytes.NewReader(data))); err != nil && m.view().Revision() != 1 {
			t.Error("a bad snapshot has changed the state")
		}
	})
}

func TestMachineHalts(t *testing.T) {
	next, err := proto.Marshal(&pb.Entry{FeatureLevel: fsm.FeatureLevel + 1})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"garbage": []byte("\xff\xff\xff"), "a newer version": next} {
		t.Run(name, func(t *testing.T) {
			var lost []lostBatch
			m := newTestMachine(&lost)
			m.Apply(command(t, 1, tag{1, 1}, put("k", "v")))
			b := &batch{tag: tag{1, 2}}
			m.expect(b)
			m.Apply(&raft.Log{Index: 2, Type: raft.LogCommand, Data: data, Extensions: b.tag.seal(data)})
			m.settle(b, 2, nil)
			m.Apply(command(t, 3, tag{1, 3}, put("k", "w")))
			select {
			case <-m.halted:
			default:
				t.Fatal("it goes on")
			}
			if err := m.wait(context.Background(), 3); err == nil || !strings.Contains(err.Error(), "log entry 2") {
				t.Errorf("wait: %v", err)
			}
			if _, err := m.Snapshot(); err == nil {
				t.Error("it writes snapshots")
			}
			if len(lost) != 1 || lost[0].err != m.haltCause() {
				t.Errorf("lost %v", lost)
			}
			if kv, _ := m.view().Get("k"); string(kv.Value) != "v" || m.applied.Load() != 1 {
				t.Error("something was applied")
			}
		})
	}
}

// A replica that halts says why, hands nothing out any more, and the rest goes on.
func TestRunEndsWhenTheReplicaHalts(t *testing.T) {
	c := newCluster(t, 3, nil)
	sick := c.followers()[0]
	sick.machine.halt(errors.New("cosmic ray"))
	err := <-sick.done
	sick.stop = nil
	if err == nil || !strings.Contains(err.Error(), "cosmic ray") {
		t.Errorf("Run: %v", err)
	}
	if _, err := sick.Propose(within(t, patience), put("k", "v")); !errors.Is(err, ErrClosed) {
		t.Errorf("propose: %v", err)
	}
	if st := sick.Status(); st.Halted == nil {
		t.Error("the status does not show it")
	}
	c.leader().mustPropose(put("k", "v"))
}

func TestEntryIsWhatProtoWouldWrite(t *testing.T) {
	txns := []*pb.Txn{put("a", "1"), {}, leaseTxn(4, 9, "b"), {RequestId: []byte("id"), Compare: []*pb.Compare{{Key: []byte("x")}}}}
	var encoded []byte
	for _, txn := range txns {
		var err error
		if encoded, err = appendTxn(encoded, txn); err != nil {
			t.Fatal(err)
		}
	}
	var got pb.Entry
	if err := proto.Unmarshal(append(entryHeader(77, len(encoded)), encoded...), &got); err != nil {
		t.Fatal(err)
	}
	want := &pb.Entry{TimeUnixNano: 77, FeatureLevel: fsm.FeatureLevel, Txns: txns}
	if !proto.Equal(&got, want) {
		t.Errorf("got %v\nwant %v", &got, want)
	}
	var refused *fsm.Error
	if _, err := appendTxn(nil, put("k", strings.Repeat("v", maxTxnBytes))); !errors.As(err, &refused) {
		t.Errorf("a transaction that is too large: %v", err)
	}
}

func TestEffectsOfWhatWasCarriedOut(t *testing.T) {
	nested := func(txn *pb.Txn) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: txn}}
	}
	e := &pb.Entry{FeatureLevel: fsm.FeatureLevel, Txns: []*pb.Txn{
		leaseTxn(4, 9, "b"),
		{ // the other branch is taken
			Compare: []*pb.Compare{{Target: pb.Compare_VERSION, Key: []byte("b"), TargetUnion: &pb.Compare_Version{Version: 7}}},
			Success: revokeLease(4).Success,
			Failure: []*pb.RequestOp{grantOp(5, 9), nested(revokeLease(5))},
		},
		leaseTxn(4, 9, "refused"),
		{Success: append(revokeLease(4).Success, grantOp(4, 9))},
	}}
	results, _, err := fsm.New().Apply(1, e)
	if err != nil {
		t.Fatal(err)
	}
	var beside effects
	beside.note(e.Txns, results)
	want := []leaseEffect{{id: 4}, {id: 5}, {id: 5, revoked: true}, {id: 4, revoked: true}, {id: 4}}
	if !slices.Equal(beside.leases, want) || beside.compacted {
		t.Errorf("effects %+v", beside)
	}
}
