package server

import (
	"math"
	"testing"
	"time"

	"github.com/persys-dev/persys/raftstore"
)

func TestRetention(t *testing.T) {
	const all = math.MaxInt64
	for _, c := range []struct {
		mode, keep string
		want       raftstore.Retention
		refused    bool
	}{
		{"", "", raftstore.Retention{}, false},
		{"", "0", raftstore.Retention{Revisions: all, MaxRevisions: all}, false},
		{"revision", "0", raftstore.Retention{Revisions: all, MaxRevisions: all}, false},
		{"", "1", raftstore.Retention{Revisions: 1, Age: time.Hour, MaxRevisions: all}, false},
		{"periodic", "90m", raftstore.Retention{Revisions: 1, Age: 90 * time.Minute, MaxRevisions: all}, false},
		{"revision", "1000", raftstore.Retention{Revisions: 1000, Age: 1, MaxRevisions: all}, false},
		{"periodic", "", raftstore.Retention{}, true},
		{"periodic", "-1h", raftstore.Retention{}, true},
		{"periodic", "-5", raftstore.Retention{}, true},
		{"periodic", "9999999999", raftstore.Retention{}, true},
		{"periodic", "soon", raftstore.Retention{}, true},
		{"revision", "1h", raftstore.Retention{}, true},
		{"revision", "-3", raftstore.Retention{}, true},
		{"sometimes", "1h", raftstore.Retention{}, true},
	} {
		got, err := retention(c.mode, c.keep)
		if got != c.want || (err != nil) != c.refused {
			t.Errorf("%q %q: %+v, %v", c.mode, c.keep, got, err)
		}
	}
}
