package history

import (
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// Each history is written down as call, return, request and answer.
func TestCheck(t *testing.T) {
	type op struct {
		call, ret int64
		in        Input
		out       Output
	}
	put := func(value string) Input { return Input{Kind: Put, Key: "k", Value: value} }
	get := Input{Kind: Get, Key: "k"}
	del := Input{Kind: Delete, Key: "k"}
	swap := func(revision int64, value string) Input {
		return Input{Kind: Swap, Key: "k", If: revision, Value: value}
	}
	at := func(revision int64) Output { return Output{Revision: revision} }
	done := func(revision int64) Output { return Output{Revision: revision, OK: true} }
	found := func(now int64, value string, revision int64) Output {
		return Output{Revision: now, Found: Found{value, revision}}
	}
	lost := Output{Unknown: true}
	for name, c := range map[string]struct {
		ops []op
		ok  bool
	}{
		"one after the other":             {[]op{{1, 2, put("a"), at(2)}, {3, 4, get, found(2, "a", 2)}, {5, 6, del, done(3)}, {7, 8, get, at(3)}}, true},
		"a read that is late":             {[]op{{1, 2, put("a"), at(2)}, {3, 4, put("b"), at(3)}, {5, 6, get, found(3, "a", 2)}}, false},
		"a read meanwhile":                {[]op{{1, 2, put("a"), at(2)}, {3, 9, put("b"), at(3)}, {4, 5, get, found(2, "a", 2)}}, true},
		"reads that go back":              {[]op{{1, 2, put("a"), at(2)}, {3, 9, put("b"), at(3)}, {4, 5, get, found(3, "b", 3)}, {6, 7, get, found(3, "a", 2)}}, false},
		"a lost answer, carried out":      {[]op{{1, 2, put("a"), lost}, {3, 4, get, found(2, "a", 2)}, {5, 6, get, found(2, "a", 2)}}, true},
		"a lost answer, not carried out":  {[]op{{1, 2, put("a"), lost}, {3, 4, get, at(1)}}, true},
		"and carried out late":            {[]op{{1, 2, put("a"), lost}, {3, 4, get, at(1)}, {5, 6, get, found(2, "a", 2)}}, true},
		"but not twice":                   {[]op{{1, 2, put("a"), lost}, {3, 4, get, found(2, "a", 2)}, {5, 6, put("b"), at(3)}, {7, 8, get, found(4, "a", 4)}}, false},
		"nor at two revisions":            {[]op{{1, 2, put("a"), lost}, {3, 4, get, found(2, "a", 2)}, {5, 6, get, found(3, "a", 3)}}, false},
		"a swap":                          {[]op{{1, 2, put("a"), at(2)}, {3, 4, swap(2, "b"), done(3)}, {5, 6, get, found(3, "b", 3)}}, true},
		"a swap of what is there no more": {[]op{{1, 2, put("a"), at(2)}, {3, 4, put("b"), at(3)}, {5, 6, swap(2, "c"), done(4)}}, false},
		"two swaps of the same":           {[]op{{1, 9, swap(0, "a"), done(2)}, {1, 9, swap(0, "b"), done(3)}}, false},
		"one swap and one that reads":     {[]op{{1, 9, swap(0, "a"), done(2)}, {1, 9, swap(0, "b"), found(2, "a", 2)}}, true},
		"a swap refused without a reason": {[]op{{1, 2, put("a"), at(2)}, {3, 4, swap(2, "b"), found(2, "a", 2)}}, false},
		"a lost swap":                     {[]op{{1, 2, put("a"), at(2)}, {3, 4, swap(2, "b"), lost}, {5, 6, get, found(3, "b", 3)}}, true},
		"a lost swap that must not hold":  {[]op{{1, 2, put("a"), at(2)}, {3, 4, swap(1, "b"), lost}, {5, 6, get, found(3, "b", 3)}}, false},
		"a delete that found nothing":     {[]op{{1, 2, put("a"), at(2)}, {3, 4, del, at(2)}}, false},
		"a revision that goes back":       {[]op{{1, 2, put("a"), at(7)}, {3, 4, Input{Kind: Get, Key: "other"}, at(6)}}, false},
		"a revision made twice":           {[]op{{1, 9, put("a"), at(2)}, {1, 9, Input{Kind: Put, Key: "other"}, at(2)}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := New()
			for _, o := range c.ops {
				r.operations = append(r.operations, porcupine.Operation{Input: o.in, Call: o.call, Output: o.out, Return: o.ret})
				r.last = max(r.last, o.ret)
			}
			if err := Check(r.Operations(), time.Minute); (err == nil) != c.ok {
				t.Errorf("%v", err)
			}
		})
	}
}
