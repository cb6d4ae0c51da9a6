package etcd

import "hash/maphash"

// toEnd as the end of a range means that it has none, as in etcd's API.
const toEnd = "\x00"

// span is the watchers of one key or one range.
type span struct {
	// key and end as in etcd's API: no end for a single key.
	key, end []byte
	// A watcher knows its place in it.
	watchers []*watcher
	// What was found for them in the batch that is looked at.
	hits []*change

	// As a node of the tree of ranges. furthest is the furthest end below here.
	left, right *span
	priority    uint64
	furthest    []byte
}

// spanIndex finds the spans that hold a key: single keys in a map, ranges in a
// treap, ordered by where they begin, in which each node knows how far those below
// it reach. Finding m of n ranges takes O(log n + m) where they are disjoint or
// nested, as prefixes are.
type spanIndex struct {
	keys   map[string]*span
	ranges *span
	size   int // watchers
}

var spanSeed = maphash.MakeSeed()

// add puts a watcher under its key and end.
func (x *spanIndex) add(w *watcher) {
	s := x.find(w.key, w.end)
	if s == nil {
		s = &span{key: w.key, end: w.end}
		if len(s.end) == 0 {
			if x.keys == nil {
				x.keys = map[string]*span{}
			}
			x.keys[string(s.key)] = s
		} else {
			var h maphash.Hash
			h.SetSeed(spanSeed)
			h.Write(s.key)
			h.WriteByte(0)
			h.Write(s.end)
			s.priority, s.furthest = h.Sum64(), s.end
			x.ranges = x.ranges.insert(s)
		}
	}
	w.span, w.slot = s, len(s.watchers)
	s.watchers = append(s.watchers, w)
	x.size++
}

func (x *spanIndex) remove(w *watcher) {
	s := w.span
	last := len(s.watchers) - 1
	moved := s.watchers[last]
	s.watchers[w.slot], moved.slot = moved, w.slot
	s.watchers[last] = nil
	s.watchers = s.watchers[:last]
	w.span = nil
	x.size--
	if last > 0 {
		return
	}
	if len(s.end) == 0 {
		delete(x.keys, string(s.key))
	} else {
		x.ranges = x.ranges.remove(s)
	}
}

func (x *spanIndex) find(key, end []byte) *span {
	if len(end) == 0 {
		return x.keys[string(key)]
	}
	for t := x.ranges; t != nil; {
		switch c := t.compare(key, end); {
		case c == 0:
			return t
		case c < 0:
			t = t.left
		default:
			t = t.right
		}
	}
	return nil
}

// at calls visit for each span that holds the key.
func (x *spanIndex) at(key []byte, visit func(*span)) {
	if s := x.keys[string(key)]; s != nil {
		visit(s)
	}
	x.ranges.stab(key, visit)
}

// all is every watcher.
func (x *spanIndex) all() []*watcher {
	all := make([]*watcher, 0, x.size)
	for _, s := range x.keys {
		all = append(all, s.watchers...)
	}
	var walk func(*span)
	walk = func(t *span) {
		if t != nil {
			walk(t.left)
			all = append(all, t.watchers...)
			walk(t.right)
		}
	}
	walk(x.ranges)
	return all
}

// before reports whether the key is before the end of a range.
func before(key, end []byte) bool { return string(end) == toEnd || string(key) < string(end) }

// compare is where (key, end) is, seen from t, in the order of the tree.
func (t *span) compare(key, end []byte) int {
	switch {
	case string(key) != string(t.key):
		if string(key) < string(t.key) {
			return -1
		}
		return 1
	case string(end) == string(t.end):
		return 0
	case string(end) < string(t.end):
		return -1
	default:
		return 1
	}
}

func (t *span) stab(key []byte, visit func(*span)) {
	if t == nil || !before(key, t.furthest) {
		return
	}
	t.left.stab(key, visit)
	if string(t.key) > string(key) {
		return
	}
	if before(key, t.end) {
		visit(t)
	}
	t.right.stab(key, visit)
}

func (t *span) insert(s *span) *span {
	switch {
	case t == nil:
		return s
	case t.compare(s.key, s.end) < 0:
		t.left = t.left.insert(s)
		if l := t.left; l.priority > t.priority {
			t.left, l.right = l.right, t
			t.measure()
			t = l
		}
	default:
		t.right = t.right.insert(s)
		if r := t.right; r.priority > t.priority {
			t.right, r.left = r.left, t
			t.measure()
			t = r
		}
	}
	t.measure()
	return t
}

func (t *span) remove(s *span) *span {
	switch {
	case t == s:
		return merge(t.left, t.right)
	case t.compare(s.key, s.end) < 0:
		t.left = t.left.remove(s)
	default:
		t.right = t.right.remove(s)
	}
	t.measure()
	return t
}

// merge joins two trees of which the first is before the second.
func merge(a, b *span) *span {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.priority > b.priority:
		a.right = merge(a.right, b)
		a.measure()
		return a
	default:
		b.left = merge(a, b.left)
		b.measure()
		return b
	}
}

// measure finds out how far t and what is below it reach.
func (t *span) measure() {
	t.furthest = t.end
	for _, child := range []*span{t.left, t.right} {
		if child != nil && before(t.furthest, child.furthest) && string(t.furthest) != toEnd {
			t.furthest = child.furthest
		}
	}
}
