package fsm

// HashKV identifies all versions of all keys that were written at revision rev or
// before (0: the newest) and are still there, tombstones included. Two replicas
// with the same keys at rev give the same hash, whatever has happened since, if
// they are compacted at the same revision, which changes what is there. The error
// is an *Error: COMPACTED or FUTURE_REVISION. O(all versions), and holds up nobody.
func (v *View) HashKV(rev int64) (hash uint64, at int64, err error) {
	at, refused := v.s.readRevision(rev)
	if refused != nil {
		return 0, 0, refused
	}
	sum := uint64(0)
	add := func(one *version) {
		if one.mod <= at {
			sum += one.hash()
		}
	}
	v.s.current.Scan(func(_ string, one *version) bool { add(one); return true })
	v.s.past.scan(func(one *version) bool { add(one); return true })
	return finish(fold(fold(hashKV, uint64(v.s.compacted)), sum)), at, nil
}
