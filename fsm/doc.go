// Package fsm is the replicated state machine: a revisioned keyspace with the
// meaning of etcd v3, and the one transaction that changes it. It owns what a
// log entry does, what a read at a revision answers, what a watcher sees, the
// state hash, and the snapshot codec. It is a pure function of the log: it
// never looks at a clock, does I/O beyond the reader and writer it is handed,
// starts a goroutine, makes a random choice, or lets the order of a map decide
// anything (purity_test.go).
//
// # Model
//
// The state is, at each revision, a map from keys to values; revision 1 is
// empty. A transaction that changes anything makes the next revision, however
// many keys it changes; one that changes nothing makes none. A key has a
// version for each revision that changed it: its value, when it was created and
// modified, how often since then, and its lease. A delete leaves a tombstone.
// Compaction at revision R forgets what cannot be seen at R or later, so that
// reads at R and later, and watches from R on, go on as before.
//
// Beside etcd's four operations a transaction may grant and revoke leases,
// compact, and verify a checkpoint, all in one with the rest. Leases have no
// clock here: that one has run out is decided outside, and proposed.
//
// An entry is a batch of transactions. Each succeeds or is refused on its own,
// so neither the batching of a log nor the places where replicas restarted from
// a snapshot can be told from the state; a test holds the whole of it to that.
//
// # How it is kept
//
//	current   key → newest version          copy-on-write tree
//	past      key → older, youngest first   copy-on-write tree of chains
//	leases    id → ttl                      copy-on-write tree
//	attached  (lease, key)                  copy-on-write tree, follows from current
//	history   changes in order              append-only, follows from current and past
//	requests  (id, answer), oldest first    append-only, bounded
//
// A version is one immutable object, shared by trees, history and all views. A
// View is a copy of the roots: O(1), after which the next write of each tree
// node copies that node. Make one per reader or round, not one per entry;
// Store.Range, Store.Events and Store.Position need none.
//
// # Invariants
//
//   - Apply either carries a transaction out or changes nothing: all that could
//     be refused is found out beforehand, and nothing is ever undone.
//   - Whatever Apply is given, it answers; it fails only where the replica must
//     stop (ErrFeatureLevel, ErrDiverged), and then for good.
//   - The compares of a transaction, nested ones included, see the state before
//     it; its operations see those before them.
//   - The live version of a key is younger than all its past ones; the youngest
//     past version of a key that is not live is a tombstone. In past there is
//     no tombstone older than the compacted revision, and no version replaced
//     at or before it, unless it was itself made there.
//   - Changes are numbered without a gap: by revision, and within one by sub.
//   - The hash is the sum of the hashes of all versions, leases and remembered
//     requests, mixed with revision, compacted revision and time. It is kept up
//     to date by addition, and does not depend on how the state was reached.
//   - A request id that is remembered is answered with its first answer. What
//     is remembered is bounded in number and bytes, by the log alone.
//   - What limits an entry (validate.go, request.go), what it does, and the hash
//     change only with a new FeatureLevel; golden files hold that.
//
// Where this differs from etcd: equals in a sort are ordered by key; an unknown
// enum value, an empty operation and a transaction beyond the limits are
// refused with TXN_ERROR_INVALID.
//
// # Cost
//
// With n live keys, m matches and k versions in the interval:
//
//	put, delete of a key          O(log n), four allocations in a large batch
//	compare or read of one key    O(log n); at an old revision + its younger versions
//	range, newest                 O(log n + m); with a limit, O(log² n + limit)
//	range, old revision           O(log n + k)
//	count, newest                 O(log² n)
//	sort by another target        O(m log m) on top, whatever the limit
//	lease revoke                  O(keys of the lease · log n)
//	compaction                    O(changes since the last one · log n)
//	view, hash, position          O(1)
//	events                        O(log history + events)
//	hash of the keys              O(versions)
//	snapshot, restore             O(state); writing holds one record in memory
//
// A key takes about 130 bytes beside itself and its value, a change 16 more
// until it is compacted.
package fsm
