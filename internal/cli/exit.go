package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes; docs/cli.md lists them for users.
const (
	exitOK          = 0
	exitFailure     = 1
	exitDiffers     = 1 // of persys diff, which makes exitUsage of a failure
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
	exitRollout     = 6
	exitDenied      = 7
	// As a shell reports a program that SIGINT ended.
	exitInterrupted = 130
)

// codedError is an error that decides the exit code itself.
type codedError struct {
	code int
	err  error
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }

// errDiffers is an answer, and nobody is told of an error.
var errDiffers = coded(exitDiffers, "there are differences")

func coded(code int, format string, args ...any) error {
	return &codedError{code, fmt.Errorf(format, args...)}
}

func usageErrorf(format string, args ...any) error {
	return coded(exitUsage, format, args...)
}

// exitCode translates an error to the program's exit code.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	var own *codedError
	if errors.As(err, &own) {
		return own.code
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return exitUnavailable
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	st, ok := statusOf(err)
	if !ok {
		return exitFailure
	}
	switch st.Code() {
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return exitConflict
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		return exitUnavailable
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.Canceled:
		return exitInterrupted
	default:
		return exitFailure
	}
}

// statusOf is the gRPC status inside err, if there is one.
func statusOf(err error) (*status.Status, bool) {
	var carrier interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &carrier) {
		return nil, false
	}
	return carrier.GRPCStatus(), true
}

func codeOf(err error) codes.Code {
	if st, ok := statusOf(err); ok {
		return st.Code()
	}
	return codes.Unknown
}

// message is what a person reads about err: a server's own words without
// gRPC's wrapping.
func message(err error) string {
	text := err.Error()
	var carrier interface {
		error
		GRPCStatus() *status.Status
	}
	if errors.As(err, &carrier) {
		st := carrier.GRPCStatus()
		said := st.Message()
		if said == "" {
			said = strings.ToLower(st.Code().String())
		}
		text = strings.ReplaceAll(text, carrier.Error(), said)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		text = strings.ReplaceAll(text, context.DeadlineExceeded.Error(), "timed out")
	}
	// A further line of one error is set off from the next error.
	return strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n  ")
}

// about says which thing an error is about, where the server did not.
func about(kind, id string, err error) error {
	if err == nil || strings.Contains(message(err), strconv.Quote(id)) {
		return err
	}
	return fmt.Errorf("%s %q: %w", kind, id, err)
}
