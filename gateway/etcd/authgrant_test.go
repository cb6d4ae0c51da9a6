package etcd

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// Merged grants mean what the single ones mean together, looked at key by key.
func TestGrants(t *testing.T) {
	var keys [][]byte
	for a := byte('a'); a <= 'd'; a++ {
		keys = append(keys, []byte{a})
		for b := byte('a'); b <= 'd'; b++ {
			keys = append(keys, []byte{a, b}, []byte{a, b, 0}, []byte{a, 0})
		}
	}
	key := rapid.SampledFrom(keys)
	end := rapid.OneOf(rapid.Just([]byte(nil)), rapid.Just([]byte{0}), key)
	in := func(k []byte, g grant) bool {
		return bytes.Compare(g.from, k) <= 0 && (g.to == nil || bytes.Compare(k, g.to) < 0)
	}
	rapid.Check(t, func(t *rapid.T) {
		var all grants
		for range rapid.IntRange(0, 6).Draw(t, "grants") {
			all = append(all, grantOf(key.Draw(t, "from"), end.Draw(t, "end")))
		}
		merged := all.merged()
		gaps := merged.gaps()
		for i, g := range merged {
			if i > 0 && merged[i-1].reaches(g.from) {
				t.Fatalf("%q touch", merged)
			}
		}
		for _, k := range keys {
			want, gap := false, false
			for _, g := range all {
				want = want || in(k, g)
			}
			for _, g := range gaps {
				gap = gap || in(k, grantOf(g.from, g.rangeEnd()))
			}
			if got := merged.cover(k, nil); got != want || gap == want {
				t.Fatalf("%q in %q: %v, in its gaps %v; want %v", k, merged, got, gap, want)
			}
		}
		asked := grantOf(key.Draw(t, "key"), end.Draw(t, "range end"))
		if asked.to != nil && bytes.Compare(asked.from, asked.to) >= 0 {
			return
		}
		// What is asked for is covered when no part of it is in a gap.
		want := true
		for _, g := range gaps {
			if (asked.to == nil || bytes.Compare(g.from, asked.to) < 0) && (g.to == nil || bytes.Compare(asked.from, g.to) < 0) {
				want = false
			}
		}
		if got := merged.cover(asked.from, asked.rangeEnd()); got != want {
			t.Fatalf("%q in %q: %v", asked, merged, got)
		}
	})
}
