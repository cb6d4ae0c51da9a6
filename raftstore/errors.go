package raftstore

import "errors"

var (
	// ErrNoLeader: no leader was found for as long as Timing.NoLeader. Nothing was
	// changed.
	ErrNoLeader = errors.New("the cluster has no leader")
	// ErrNotLeader: only the leader can do this, and this replica does not lead, or
	// does not in the epoch that was asked for.
	ErrNotLeader = errors.New("this replica is not the leader")
	// ErrOutcomeUnknown: the transaction may have been applied or not, and there is
	// no safe way left to find out by trying again.
	ErrOutcomeUnknown = errors.New("the outcome of the transaction is unknown")
	// ErrClosed: the store does not run (any more).
	ErrClosed = errors.New("the store is closed")
	// ErrQuorum: the change of membership would leave fewer reachable voters than a
	// majority needs.
	ErrQuorum = errors.New("refused: the cluster would lose its quorum")
	// ErrNotCaughtUp: a server becomes a voter only when it holds the log.
	ErrNotCaughtUp = errors.New("the server has not caught up with the log yet")
	// ErrUnknownServer: no server of that id is a member.
	ErrUnknownServer = errors.New("no such server in the cluster")
)

// notProposed says of an error that nothing of the call has reached a log: it may
// be proposed again, by whoever leads.
type notProposed struct{ cause error }

func (e *notProposed) Error() string { return "not proposed: " + e.cause.Error() }
func (e *notProposed) Unwrap() error { return e.cause }
