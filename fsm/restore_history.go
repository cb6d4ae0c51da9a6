package fsm

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// history puts the changes since the compacted revision into the order in which
// they were made, and makes sure that none is missing and that the versions of
// each key make sense one after the other.
func (b *builder) history() error {
	s := &b.store.state
	var changes []change
	var last *version
	var lastLive bool
	var err error
	s.versions(bounds{open: true}, func(v *version, live bool) bool {
		var prev *version
		if last != nil && last.key() == v.key() {
			prev = last
		} else if err = checkNewest(last, lastLive); err != nil {
			return false
		}
		if err = s.checkSuccessor(prev, v); err != nil {
			return false
		}
		last, lastLive = v, live
		if v.mod >= s.compacted {
			if prev != nil && prev.tombstone() {
				prev = nil
			}
			changes = append(changes, change{cur: v, prev: prev})
		}
		return true
	})
	if err = cmp.Or(err, checkNewest(last, lastLive)); err != nil {
		return err
	}
	slices.SortFunc(changes, func(x, y change) int {
		return cmp.Or(cmp.Compare(x.cur.mod, y.cur.mod), cmp.Compare(x.cur.sub, y.cur.sub))
	})
	return s.replay(changes)
}

// checkNewest makes sure that the newest version of a key is live or a tombstone.
func checkNewest(v *version, live bool) error {
	if v == nil || live || v.tombstone() {
		return nil
	}
	return fmt.Errorf("key %q is neither live nor deleted", v.key())
}

// checkSuccessor makes sure that v can be what followed prev, the version of
// its key before it that is still there, if any.
func (s *state) checkSuccessor(prev, v *version) error {
	switch {
	case v.tombstone() && v.mod < s.compacted,
		prev != nil && prev.mod < s.compacted && v.mod <= s.compacted:
		return fmt.Errorf("key %q has a version that was compacted", v.key())
	case prev == nil && v.mod > s.compacted && (v.create != v.mod || v.ver != 1):
		return fmt.Errorf("key %q has lost the version before revision %d", v.key(), v.mod)
	case prev == nil:
		return nil
	case !prev.before(v):
		return fmt.Errorf("key %q is live at revision %d and was replaced at %d", v.key(), v.mod, prev.mod)
	case prev.tombstone() && (v.create != v.mod || v.ver != 1),
		!prev.tombstone() && !v.tombstone() && (v.create != prev.create || v.ver != prev.ver+1):
		return fmt.Errorf("key %q: version %d created at %d follows version %d created at %d", v.key(), v.ver, v.create, prev.ver, prev.create)
	}
	return nil
}

// replay fills the history with changes in order. Each revision has at least
// one change; the first change of all makes revision 2.
func (s *state) replay(changes []change) error {
	rev, sub := max(2, s.compacted), uint32(0)
	for _, c := range changes {
		if sub > 0 && c.cur.mod == rev+1 {
			rev, sub = rev+1, 0
		}
		if c.cur.mod != rev || c.cur.sub != sub {
			return fmt.Errorf("change %d of revision %d is missing", sub, rev)
		}
		sub++
		s.history.append(c)
	}
	if s.revision > 1 && (rev != s.revision || sub == 0) {
		return errors.New("the changes of the newest revisions are missing")
	}
	return nil
}
