// Package agent makes one node match its desired set.
//
// It owns the session with the servers, the last desired set on disk, the
// picture of what really runs, the decision what to do about the difference
// (diff.go, pure) and its execution, local restarts, the lease that guards
// exclusive work, and what is reported about all of it.
//
// It never decides where work runs, never asks a server for permission to
// restart what crashed, and never concludes from a runtime's silence that
// nothing runs: a runtime that does not answer is unreachable, and nothing of
// its is touched until it answers again. Ending the agent leaves work running.
//
// Runtimes (agent/docker, agent/process) are handed in by the caller. Work is
// recognised by what is written on the real objects (Labels), so neither a lost
// data directory nor a restart makes it forget what it started.
package agent
