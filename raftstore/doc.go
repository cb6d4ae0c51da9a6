// Package raftstore is raft around the fsm: it makes several replicas hold one
// keyspace. It owns the log and the snapshots on disk, proposals and who applies
// them, linearizable reads, watches, the clocks of leases, the leader's epoch and
// membership. It never decides what a key means and never looks into a value,
// except that of the epoch key.
//
// A write goes this way:
//
//	Propose → queue → dispatcher ─ leader here: one entry of all that waits → raft → apply → callers
//	                             └ elsewhere:   one Consensus.Propose of all that waits → its queue
//
// Five decisions carry the package.
//
// One entry carries many transactions. The dispatcher takes whatever has queued
// up while the entries before it were written, so batches grow with the load and a
// lone caller waits for nobody. A timer that lingers for more was tried on paper
// and dropped: it costs the lone caller what it gains the crowd.
//
// Every entry has a tag (entry.go), unique to who proposed it. When leadership is
// lost with entries in flight, the replica does not tell its callers "maybe": it
// follows the log and finds at their index either its own tag, then they were
// applied and here are the results, or another, then they never will be and can be
// proposed again. What is forwarded carries a request id instead, which the fsm
// remembers, and is sent again only for as long as it surely does.
//
// The leader writes an entry to its disk while the followers write it to theirs, and
// not before (logstore.go). It counts for the majority only once it has it on disk
// too, because what the followers answer is held back until then.
//
// Leadership is confirmed by what was sent after the question (link.go). Raft's own
// VerifyLeader counts any answer that arrives after the question, so that an answer
// which sat in a socket while the process was stopped confirms a leader that is
// none any more; it counts non-voters as well. Here only voters count, and only
// messages sent after the read was asked for.
//
// Followers are told of a commit at once (link.go). Raft tells them with the next
// entries or after CommitTimeout, which would make every write, linearizable read and
// watch through a follower of a quiet cluster wait for tens of milliseconds.
package raftstore
