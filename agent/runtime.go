package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Runtime runs one type of work on this node. Its methods are idempotent and
// safe for concurrent use; the agent never has two calls for one Key under way.
//
// Errors of Apply, Stop and Remove are *Error where the runtime knows the
// reason. Every call returns soon after its context ends.
type Runtime interface {
	Type() pb.WorkloadType

	// Info says what it is and whether it answers. It does not fail: a runtime
	// that does not answer is described as not healthy, with the reason.
	Info(ctx context.Context) *pb.RuntimeInfo

	// List returns every instance that carries the labels of this cluster and
	// node, running or not. An error means that nothing is known, never that
	// nothing is there.
	List(ctx context.Context) ([]Instance, error)

	// Apply makes the work run: it creates the instance of the assignment's
	// generation, starts it again where it has stopped, and leaves it alone
	// where it runs.
	Apply(ctx context.Context, w Work) (Instance, error)

	// Stop ends an instance and keeps it: its signal first, then after grace
	// the kill. An instance that has stopped or is gone is no error.
	Stop(ctx context.Context, in Instance, grace time.Duration) error

	// Remove stops an instance as Stop does and takes away everything of it.
	Remove(ctx context.Context, in Instance, grace time.Duration) error

	// Watch calls changed after anything may have changed that List would show.
	// It blocks until ctx ends, reconnecting as needed, and may call changed
	// too often.
	Watch(ctx context.Context, changed func()) error
}

// Preparer is a Runtime that can do slow things (fetch an image) before what
// ran until then is taken down.
type Preparer interface {
	Prepare(ctx context.Context, w Work) error
}

// LogSource is a Runtime that keeps the output of its instances.
type LogSource interface {
	// Logs sends lines, oldest first: the last req.Tail of them (0: all) that
	// are newer than req.Since. With follow it goes on until the instance stops
	// or ctx ends. Time is set in every chunk.
	Logs(ctx context.Context, in Instance, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error
}

// StatsSource is a Runtime that measures its instances.
type StatsSource interface {
	// Stats measures what can be measured; an instance that can't is left out.
	Stats(ctx context.Context, ins []Instance) []*pb.ReplicaUsage
}

// Key names a replica.
type Key struct {
	Workload string
	Replica  int32
}

func (k Key) String() string { return fmt.Sprintf("%s/%d", k.Workload, k.Replica) }

func (k Key) compare(o Key) int {
	if c := strings.Compare(k.Workload, o.Workload); c != 0 {
		return c
	}
	return int(k.Replica) - int(o.Replica)
}

func keyOf(a *pb.Assignment) Key { return Key{a.GetWorkloadId(), a.GetReplica()} }

// Phase is how far an instance is.
type Phase int

const (
	// Created: there, and never started.
	Created Phase = iota
	Running
	// Exited: it ran and ended.
	Exited
)

func (p Phase) String() string {
	switch p {
	case Created:
		return "created"
	case Running:
		return "running"
	case Exited:
		return "exited"
	}
	return fmt.Sprintf("phase %d", int(p))
}

// Instance is one real object of a runtime: a container, a supervised process.
type Instance struct {
	Labels
	// ID is the runtime's own name, unique on the node.
	ID    string
	Type  pb.WorkloadType
	Phase Phase
	// Started and Finished are of the latest run.
	Started  time.Time
	Finished time.Time
	ExitCode int32
	// Killed by the kernel for its memory limit.
	OutOfMemory bool
	// Stopped: it was told to end, by the agent or somebody else, where the runtime
	// knows that.
	Stopped bool
	// StartError is why the latest start failed, where the runtime keeps it.
	StartError string
	// Address where its ports are reached, when it is not the node's.
	Address     string
	ImageDigest string
}

// Work is what Apply is to make run.
type Work struct {
	Item   *pb.DesiredItem
	Policy Policy
}

// Key of the replica.
func (w Work) Key() Key { return keyOf(w.Item.GetAssignment()) }

// DefaultGrace is the time between the stop signal and the kill where the spec
// does not give one.
const DefaultGrace = 10 * time.Second

// Grace is the time between the stop signal and the kill.
func (w Work) Grace() time.Duration {
	var seconds *int32
	switch spec := w.Item.GetSpec().GetSpec().(type) {
	case *pb.WorkloadSpec_Container:
		seconds = spec.Container.StopGraceSeconds
	case *pb.WorkloadSpec_Process:
		seconds = spec.Process.StopGraceSeconds
	}
	if seconds == nil || *seconds < 0 {
		return DefaultGrace
	}
	return time.Duration(*seconds) * time.Second
}

// CPULimit is the hard limit in thousandths of a core, MemoryLimit in bytes; 0
// is none. An assignment may reserve a default for work that names no limit, and
// a default is not a limit.
func (w Work) CPULimit() int64 {
	if w.Item.GetSpec().GetResources().GetCpu() == "" {
		return 0
	}
	return w.Item.GetAssignment().GetCpuMillis()
}

// MemoryLimit is described at CPULimit.
func (w Work) MemoryLimit() int64 {
	if w.Item.GetSpec().GetResources().GetMemory() == "" {
		return 0
	}
	return w.Item.GetAssignment().GetMemoryBytes()
}

// Error is a failure with the reason that is reported for it.
type Error struct {
	Code    pb.ReasonCode
	Message string
	// Retryable: the same may succeed later or elsewhere.
	Retryable bool
	Err       error
}

func (e *Error) Error() string {
	if e.Err == nil {
		return e.Message
	}
	if e.Message == "" {
		return e.Err.Error()
	}
	return e.Message + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// Refuse is an error that will come back however often the same is tried.
func Refuse(code pb.ReasonCode, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: nil}
}

// asError gives every failure a reason.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: err}
}
