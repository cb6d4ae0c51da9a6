package fsm

// HashKV identifies all keys as they were at revision rev (0: the newest), with their
// values, revisions and leases. Two replicas with the same keys at rev give the same
// hash, whatever has happened since and wherever they are compacted. The error is an
// *Error: COMPACTED or FUTURE_REVISION. O(all versions), and holds up nobody.
func (v *View) HashKV(rev int64) (hash uint64, at int64, err error) {
	at, refused := v.s.readRevision(rev)
	if refused != nil {
		return 0, 0, refused
	}
	sum := uint64(0)
	v.s.current.Scan(func(_ string, one *version) bool {
		if one.mod <= at {
			sum += one.hash()
		}
		return true
	})
	v.s.past.keys.Scan(func(key string, r *replaced) bool {
		if newest, ok := v.s.current.Get(key); ok && newest.mod <= at {
			return true
		}
		if one := r.at(at); one != nil {
			sum += one.hash()
		}
		return true
	})
	return finish(fold(hashKV, sum)), at, nil
}
