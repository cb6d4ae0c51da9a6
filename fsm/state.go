package fsm

import (
	"sort"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

type attachment struct {
	lease int64
	key   string
}

func (a attachment) before(b attachment) bool {
	if a.lease != b.lease {
		return a.lease < b.lease
	}
	return a.key < b.key
}

// state is all that is replicated. The store changes its own; a view holds a
// copy that nobody changes.
type state struct {
	// Live keys with their newest version.
	current *btree.Map[string, *version]
	// Versions that a later one replaced, and tombstones, by key and age.
	past past
	// Time to live in seconds by lease id.
	leases *btree.Map[int64, int64]
	// Which live keys are attached to which lease; follows from current.
	attached *btree.BTreeG[attachment]
	// Changes of revision compacted and later; follows from current and past.
	chronicle
	// Remembered request ids with their answers, oldest first.
	requests     journal[request]
	requestBytes int

	now   int64 // Unix nanoseconds of the leader
	index uint64
	// Sum of the hashes of all versions, leases and remembered requests.
	sum uint64
	// Bytes of keys and values in current and past.
	bytes int64
}

func newState() state {
	return state{
		current:  btree.NewMap[string, *version](0),
		past:     newPast(),
		leases:   btree.NewMap[int64, int64](0),
		attached: btree.NewBTreeGOptions(attachment.before, btree.Options{NoLocks: true}),
		// As in etcd, the first change makes revision 2, and revision 0 can be
		// compacted once.
		chronicle: chronicle{revision: 1, compacted: -1},
	}
}

// snapshot is O(1): the trees copy a node when it is next written.
func (s *state) snapshot() state {
	c := *s
	c.current = s.current.Copy()
	c.past = s.past.snapshot()
	c.leases = s.leases.Copy()
	c.attached = s.attached.Copy()
	return c
}

func (s *state) hash() uint64 {
	h := fold(hashScalars, uint64(s.revision))
	h = fold(h, uint64(s.compacted))
	h = fold(h, uint64(s.now))
	return finish(fold(h, s.sum))
}

func (s *state) time() time.Time { return time.Unix(0, s.now).UTC() }

// bounds is an interval of keys.
type bounds struct {
	from, to string // from <= key < to
	open     bool   // no upper bound
	single   bool   // the key from, and to is not set
}

// boundsOf gives key and range_end their meaning in the etcd API. The result
// shares their memory.
func boundsOf(key, end []byte) bounds {
	switch {
	case len(end) == 0:
		return bounds{from: viewString(key), single: true}
	case len(end) == 1 && end[0] == 0:
		return bounds{from: viewString(key), open: true}
	default:
		return bounds{from: viewString(key), to: viewString(end)}
	}
}

// prefixBounds holds the keys that begin with prefix.
func prefixBounds(prefix string) bounds {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] < 0xff {
			return bounds{from: prefix, to: prefix[:i] + string([]byte{prefix[i] + 1})}
		}
	}
	return bounds{from: prefix, open: true}
}

// beyond reports whether the key, not less than from, is past the interval.
func (b bounds) beyond(key string) bool {
	switch {
	case b.single:
		return key != b.from
	case b.open:
		return false
	default:
		return key >= b.to
	}
}

// scan yields the versions of the interval that are the newest at revision rev,
// in key order. O(log n + matches) at the newest revision and for a single key,
// O(log n + versions in the interval) at an older one.
func (s *state) scan(b bounds, rev int64, yield func(*version) bool) {
	if rev < s.revision {
		s.scanPast(b, rev, yield)
		return
	}
	if b.single {
		if v, ok := s.current.Get(b.from); ok {
			yield(v)
		}
		return
	}
	s.current.Ascend(b.from, func(key string, v *version) bool {
		return !b.beyond(key) && yield(v)
	})
}

func (s *state) scanPast(b bounds, rev int64, yield func(*version) bool) {
	if b.single {
		if v := s.at(b.from, rev); v != nil {
			yield(v)
		}
		return
	}
	var last *version // newest of its key so far that is not after rev
	s.versions(b, func(v *version, _ bool) bool {
		if last != nil && last.key() != v.key() {
			if !last.tombstone() && !yield(last) {
				last = nil
				return false
			}
			last = nil
		}
		if v.mod <= rev {
			last = v
		}
		return true
	})
	if last != nil && !last.tombstone() {
		yield(last)
	}
}

// at is the version of the key that was the newest at revision rev, or nil.
// O(log n), however often the key has changed.
func (s *state) at(key string, rev int64) *version {
	if v, ok := s.current.Get(key); ok && v.mod <= rev {
		return v
	}
	return s.past.at(key, rev)
}

// versions yields all versions of the keys of the interval, tombstones
// included, ordered by key and then by age, and whether they are live.
func (s *state) versions(b bounds, yield func(v *version, live bool) bool) {
	past, current := s.past.keys.Iter(), s.current.Iter()
	p := past.Seek(b.from)
	c := current.Seek(b.from)
	for {
		p = p && !b.beyond(past.Key())
		c = c && !b.beyond(current.Key())
		switch {
		case p && (!c || past.Key() <= current.Key()):
			if !past.Value().ascend(func(v *version) bool { return yield(v, false) }) {
				return
			}
			p = past.Next()
		case c:
			if !yield(current.Value(), true) {
				return
			}
			c = current.Next()
		default:
			return
		}
	}
}

// countLive is the number of live keys of the interval; O(log² n).
func (s *state) countLive(b bounds) int64 {
	if b.single {
		if _, ok := s.current.Get(b.from); ok {
			return 1
		}
		return 0
	}
	to := s.current.Len()
	if !b.open {
		to = s.rank(b.to)
	}
	return int64(max(0, to-s.rank(b.from)))
}

// rank is the number of live keys less than key.
func (s *state) rank(key string) int {
	return sort.Search(s.current.Len(), func(i int) bool {
		k, _, _ := s.current.GetAt(i)
		return strings.Compare(k, key) >= 0
	})
}
