package agent

import (
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Local restarts: the wait doubles from restartFirst to restartMost with each
// crash in a row. A run of restartStable ends the row; not so for jobs, which
// have that many attempts however long each of them takes.
const (
	restartFirst  = 200 * time.Millisecond
	restartMost   = time.Minute
	restartStable = time.Minute
)

// history is what is remembered of a replica from one run to the next, within
// one generation. Values are replaced, never changed.
type history struct {
	generation int64
	// restarts is how often it was started again here.
	restarts int32
	// crashes in a row.
	crashes int
	// counted is the Finished of the last crash that was counted.
	counted time.Time
	retryAt time.Time
	// stopped by us: its end is no crash.
	stopped bool
	// failure of the latest attempt to start it. Another is made at retryAt
	// where that is set; otherwise the leader decides.
	failure *Error
	// instance that fulfilled the assignment when all was well.
	instance string
}

// of gives the history for an assignment: a new generation begins anew.
func (h history) of(generation int64) history {
	if h.generation != generation {
		return history{generation: generation}
	}
	return h
}

// afterEnd counts the end of a run, once.
func (h history) afterEnd(in Instance, spec *pb.WorkloadSpec, now time.Time) history {
	if in.Phase != Exited || h.stopped || h.failure != nil || (!h.counted.IsZero() && in.Finished.Equal(h.counted)) {
		return h
	}
	if in.Finished.Sub(in.Started) >= restartStable && spec.GetKind() != pb.WorkloadKind_JOB {
		h.crashes = 0
	}
	h.counted = in.Finished
	ended := in.Finished
	if ended.IsZero() || ended.After(now) {
		ended = now
	}
	h.retryAt = ended.Add(restartDelay(h.crashes))
	h.crashes++
	return h
}

// afterFailure remembers that a start failed. Nothing but a runtime that did
// not answer is tried again here: where else to try, and when, is the leader's.
func (h history) afterFailure(err *Error, now time.Time) history {
	h.failure, h.retryAt = err, time.Time{}
	if err.Code == pb.ReasonCode_RUNTIME_UNAVAILABLE {
		h.retryAt = now.Add(restartDelay(h.crashes))
		h.crashes++
	}
	return h
}

// afterStart remembers that it runs; again tells a restart from a first start.
func (h history) afterStart(again bool) history {
	if again && !h.stopped {
		h.restarts++
	}
	h.stopped, h.failure, h.retryAt = false, nil, time.Time{}
	return h
}

func restartDelay(crashes int) time.Duration {
	delay := restartFirst
	for range crashes {
		if delay *= 2; delay >= restartMost {
			return restartMost
		}
	}
	return delay
}

// ending is what the end of a run means for the replica.
type ending int

const (
	restarts ending = iota
	completed
	failedForGood
)

// endingOf applies the restart policy. h has the end counted already.
func endingOf(in Instance, spec *pb.WorkloadSpec, h history) ending {
	condition := spec.GetRestart().GetCondition()
	if condition == pb.RestartPolicy_DEFAULT {
		condition = pb.RestartPolicy_ALWAYS
		if spec.GetKind() == pb.WorkloadKind_JOB {
			condition = pb.RestartPolicy_ON_FAILURE
		}
	}
	success := in.ExitCode == 0 && !in.OutOfMemory && in.StartError == ""
	switch {
	case success && condition != pb.RestartPolicy_ALWAYS:
		return completed
	case condition == pb.RestartPolicy_NEVER:
		return failedForGood
	}
	if most := spec.GetRestart().GetMaxAttempts(); most > 0 && h.crashes > int(most) {
		return failedForGood
	}
	return restarts
}
