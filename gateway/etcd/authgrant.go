package etcd

import (
	"bytes"
	"slices"
	"sort"
)

// grant is the keys from one on and, where to is not nil, before another.
type grant struct{ from, to []byte }

// grantOf is the keys of a permission or a request, with etcd's ways to write a range
// end: none for one key, "\0" for no end.
func grantOf(key, end []byte) grant {
	switch {
	case len(end) == 0:
		return grant{key, append(slices.Clone(key), 0)}
	case endless(end):
		return grant{key, nil}
	}
	return grant{key, end}
}

func endless(end []byte) bool { return len(end) == 1 && end[0] == 0 }

func (g grant) rangeEnd() []byte {
	if g.to == nil {
		return []byte{0}
	}
	return g.to
}

// grants is a set of keys. Merged, its parts are in order and do not touch.
type grants []grant

func (all grants) merged() grants {
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, func(a, b grant) int { return bytes.Compare(a.from, b.from) })
	var merged grants
	for _, next := range sorted {
		if next.to != nil && bytes.Compare(next.from, next.to) >= 0 {
			continue
		}
		if n := len(merged); n > 0 && merged[n-1].reaches(next.from) {
			if merged[n-1].to != nil && (next.to == nil || bytes.Compare(next.to, merged[n-1].to) > 0) {
				merged[n-1].to = next.to
			}
			continue
		}
		merged = append(merged, next)
	}
	return merged
}

func (g grant) reaches(key []byte) bool { return g.to == nil || bytes.Compare(key, g.to) <= 0 }

// cover reports whether all keys of a request are in the merged set. An empty range
// is judged by where it starts.
func (all grants) cover(key, end []byte) bool {
	i := sort.Search(len(all), func(i int) bool { return bytes.Compare(all[i].from, key) > 0 }) - 1
	switch {
	case i < 0:
		return false
	case all[i].to == nil:
		return true
	case bytes.Compare(key, all[i].to) >= 0 || endless(end):
		return false
	}
	return len(end) == 0 || bytes.Compare(end, all[i].to) <= 0
}

// gaps is all keys that are not in the merged set.
func (all grants) gaps() grants {
	var gaps grants
	from := []byte{0} // the first key there is
	for _, part := range all {
		if bytes.Compare(from, part.from) < 0 {
			gaps = append(gaps, grant{from, part.from})
		}
		if part.to == nil {
			return gaps
		}
		from = part.to
	}
	return append(gaps, grant{from, nil})
}
