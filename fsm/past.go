package fsm

import "github.com/tidwall/btree"

// past holds of each key the versions that a later one replaced, and tombstones.
// The zero value is not ready; see newPast. A copy of it is a snapshot.
type past struct {
	keys *btree.Map[string, *replaced]
}

// replaced is a version with those of the same key that are older. It never
// changes: snapshots share the chains.
type replaced struct {
	v     *version
	older *replaced
}

func newPast() past { return past{keys: btree.NewMap[string, *replaced](0)} }

func (p past) snapshot() past { return past{keys: p.keys.Copy()} }

// add takes a version that is younger than all of its key that are there.
func (p past) add(v *version) {
	r := &replaced{v: v}
	r.older, _ = p.keys.Set(v.key(), r)
}

// at is the youngest version of a key that is no younger than rev; nil where there
// is none, or a tombstone.
func (p past) at(key string, rev int64) *version {
	r, _ := p.keys.Get(key)
	return r.at(rev)
}

func (r *replaced) at(rev int64) *version {
	for ; r != nil; r = r.older {
		if r.v.mod <= rev {
			if r.v.tombstone() {
				return nil
			}
			return r.v
		}
	}
	return nil
}

// scan yields all versions, ordered by key and then by age.
func (p past) scan(yield func(*version) bool) {
	p.keys.Scan(func(_ string, r *replaced) bool { return r.ascend(yield) })
}

// ascend yields the versions of a key, the oldest first.
func (r *replaced) ascend(yield func(*version) bool) bool {
	var chain []*version
	for ; r != nil; r = r.older {
		chain = append(chain, r.v)
	}
	for i := len(chain) - 1; i >= 0; i-- {
		if !yield(chain[i]) {
			return false
		}
	}
	return true
}

// forget drops the versions of a key that were replaced at or before rev and made
// before it, and the tombstone before rev: these are its oldest. next is the
// revision that replaced the youngest one.
func (p past) forget(key string, next, rev int64, dropped func(*version)) {
	var kept []*version
	r, _ := p.keys.Get(key)
	for ; r != nil; r = r.older {
		if r.v.mod < rev && (r.v.tombstone() || next <= rev) {
			break
		}
		kept = append(kept, r.v)
		next = r.v.mod
	}
	if r == nil {
		return
	}
	for ; r != nil; r = r.older {
		dropped(r.v)
	}
	p.keys.Delete(key)
	for i := len(kept) - 1; i >= 0; i-- {
		p.add(kept[i])
	}
}
