package fsm

import (
	"fmt"
	"sync"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// FeatureLevel is the newest meaning of entries that this code knows. Entries
// and snapshots carry theirs; 0 is none.
const FeatureLevel = 1

// Store is the replicated state with the means to change it. Apply is for one
// caller at a time, in log order; all else may be called from any goroutine.
type Store struct {
	mu sync.RWMutex
	state
	// Position in requests of each id that is remembered.
	requestAt map[string]uint64
	// The view of the state as it is, where one was asked for.
	view *View
	// State hash after recent entries, by index modulo its size. Not part of the
	// state: a checkpoint that is older than a restart is not verified.
	hashes [4096]indexHash
	halted error

	// Reused from one transaction to the next.
	path    []bool
	matches []*version
}

type indexHash struct{ index, hash uint64 }

// New is an empty store, at revision 1 as in etcd.
func New() *Store {
	return &Store{state: newState(), requestAt: make(map[string]uint64)}
}

// View is an immutable snapshot of the state: O(1), and the same one until the
// next Apply.
func (s *Store) View() *View {
	s.mu.RLock()
	v := s.view
	s.mu.RUnlock()
	if v != nil {
		return v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view == nil {
		s.view = &View{s: s.snapshot()}
	}
	return s.view
}

// Position is where a store is.
type Position struct {
	Revision, CompactRevision int64
	// Of the last log entry applied.
	Index uint64
}

// Position is that of View, without making one.
func (s *Store) Position() Position {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return Position{Revision: s.revision, CompactRevision: s.compacted, Index: s.index}
}

// Events is that of View, without making one: a watcher that only asks for
// events does not make the next writes copy what they change.
func (s *Store) Events(after int64, max int) (events []*pb.KeyEvent, upTo int64, err error) {
	s.mu.RLock()
	c := s.chronicle
	s.mu.RUnlock()
	return c.after(after, max)
}

// Range reads the newest state. A read of one key, or of a short page in key
// order, makes no view, which saves the next writes some copying; any other
// does, so that it never makes Apply wait for it.
func (s *Store) Range(r *pb.RangeRequest) (*pb.RangeResponse, *Error) {
	if refused := validateRange(r); refused != nil {
		return nil, refused
	}
	if !small(r) {
		return s.View().s.read(r)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.read(r)
}

// small reports whether the answer takes few steps, whatever is stored.
func small(r *pb.RangeRequest) bool {
	const page = 64
	if len(r.RangeEnd) == 0 {
		return true
	}
	return r.Revision == 0 && r.Limit > 0 && r.Limit <= page && r.SortOrder == pb.RangeRequest_NONE && !filtered(r)
}

// Apply carries out the transactions of the log entry at index, in order. The
// results are those of the transactions, the events what they changed, in
// order; both share the memory of the store and must not be modified.
//
// It fails only where the replica must stop: with ErrFeatureLevel or
// ErrDiverged. A transaction that cannot be carried out changes nothing, and
// its result says why.
func (s *Store) Apply(index uint64, e *pb.Entry) ([]*pb.TxnResult, []*pb.KeyEvent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.halted != nil {
		return nil, nil, s.halted
	}
	if level := e.GetFeatureLevel(); level == 0 || level > FeatureLevel {
		s.halted = fmt.Errorf("fsm: entry %d: %w %d, this version knows up to %d", index, ErrFeatureLevel, level, FeatureLevel)
		return nil, nil, s.halted
	}
	s.view = nil
	s.now = max(s.now, e.TimeUnixNano)

	x := execution{s: s, index: index, answers: newAnswers(len(e.Txns)), told: s.history.end}
	results := make([]*pb.TxnResult, len(e.Txns))
	for i, t := range e.Txns {
		result, err := x.apply(t)
		if err != nil {
			s.halted = err
			return nil, nil, err
		}
		results[i] = result
	}
	x.tell(s.history.end)
	s.index = index
	s.hashes[index%uint64(len(s.hashes))] = indexHash{index, s.hash()}
	return results, x.events, nil
}
