package server

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/persys-dev/persys/raftstore"
)

// Modes of auto-compaction, as etcd has them.
const (
	compactPeriodic = "periodic"
	compactRevision = "revision"
)

// retention is how much of the past is kept by etcd's --auto-compaction-mode and
// --auto-compaction-retention: a time ("90m"; a bare number is hours) or a number
// of revisions. "0" keeps all until a client compacts; "" is raftstore's default.
// It is kept at least, and forgotten soon after; a quiet cluster forgets nothing.
func retention(mode, keep string) (raftstore.Retention, error) {
	switch {
	case mode != "" && mode != compactPeriodic && mode != compactRevision:
		return raftstore.Retention{}, fmt.Errorf("auto_compaction_mode: %q; allowed: %s, %s", mode, compactPeriodic, compactRevision)
	case keep == "" && mode == "":
		return raftstore.Retention{}, nil
	case keep == "":
		return raftstore.Retention{}, fmt.Errorf("auto_compaction_retention: missing; say how much the mode %s keeps, or leave the mode out", mode)
	}
	number, err := strconv.ParseInt(keep, 10, 64)
	if err == nil && number == 0 {
		return raftstore.Retention{Revisions: math.MaxInt64, MaxRevisions: math.MaxInt64}, nil
	}
	if mode == compactRevision {
		if err != nil || number < 0 {
			return raftstore.Retention{}, fmt.Errorf("auto_compaction_retention: %q; allowed: a number of revisions", keep)
		}
		return raftstore.Retention{Revisions: number, Age: 1, MaxRevisions: math.MaxInt64}, nil
	}
	age := time.Duration(number) * time.Hour
	if err != nil {
		age, err = time.ParseDuration(keep)
	}
	if err != nil || age <= 0 || age/time.Hour > 24*366*10 || number > 24*366*10 {
		return raftstore.Retention{}, fmt.Errorf("auto_compaction_retention: %q; allowed: a time such as 90m, or a number of hours", keep)
	}
	return raftstore.Retention{Revisions: 1, Age: age, MaxRevisions: math.MaxInt64}, nil
}
