package raftstore

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// transport is what this package needs of raft's transports.
type transport interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
}

var errSilenced = errors.New("the disk does not answer: this replica gives its leadership up")

// link is the transport that raft gets. It passes everything on and looks at the
// appends that the leader sends, to know when each peer last followed this leader
// and how far. With that it can confirm leadership, tell a follower of a commit at
// once, and fall silent.
//
// What it sends itself are messages that raft could have sent at that moment in
// the same words: an empty heartbeat, and an empty append after an entry that the
// follower is known to hold.
type link struct {
	transport
	self    raft.ServerID
	address raft.ServerAddress

	silent atomic.Bool
	// Reports whether this replica leads in the term and the server is a member.
	leads func(id raft.ServerID, term uint64) bool
	// Returns when this replica has the entry on disk; see logStore.
	durable func(index uint64) error
	// Fires when any peer followed.
	followed broadcast
	running  sync.WaitGroup

	mu     sync.Mutex
	peers  map[raft.ServerID]*peer
	closed bool
}

// peer is what the leader knows of another server; all for one term.
type peer struct {
	term uint64
	// When the newest message was sent that the peer answered as a follower.
	followed time.Time
	// The newest entry that the peer holds, and the commit index it knows of.
	index, indexTerm uint64
	commit           uint64
	wanted           uint64 // highest commit index that somebody waits for there

	beatSent time.Time // of the heartbeat in flight; zero when there is none
	again    bool      // another heartbeat is wanted after the one in flight
	telling  bool      // a message about the commit index is in flight
}

func newLink(t transport, id, address string) *link {
	return &link{
		transport: t,
		self:      raft.ServerID(id),
		address:   raft.ServerAddress(address),
		peers:     map[raft.ServerID]*peer{},
		leads:     func(raft.ServerID, uint64) bool { return false },
		durable:   func(uint64) error { return nil },
	}
}

// LocalAddr is the advertised address, whatever the listener is bound to.
func (l *link) LocalAddr() raft.ServerAddress { return l.address }

// AppendEntriesPipeline refuses: a follower whose log fails for a while is wedged
// for good when two appends are in flight to it (hashicorp/raft issue 612).
func (l *link) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

func (l *link) AppendEntries(id raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if l.silent.Load() {
		return errSilenced
	}
	sent := time.Now()
	if err := l.transport.AppendEntries(id, to, args, resp); err != nil {
		if args.PrevLogEntry > 0 || len(args.Entries) > 0 { // no heartbeat
			l.awaitReturn(id, args.Term, sent)
		}
		return err
	}
	if resp.Term == args.Term && resp.Success {
		l.note(id, to, args, sent)
		if n := len(args.Entries); n > 0 {
			return l.durable(args.Entries[n-1].Index)
		}
	}
	return nil
}

// InstallSnapshot sends a snapshot; for its failure see awaitReturn.
func (l *link) InstallSnapshot(id raft.ServerID, to raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if l.silent.Load() {
		return errSilenced
	}
	sent := time.Now()
	err := l.transport.InstallSnapshot(id, to, args, resp, data)
	if err != nil {
		l.awaitReturn(id, args.Term, sent)
	}
	return err
}

// awaitReturn holds the failure of a message back until the peer has followed in
// one that was sent later: heartbeats try several times a second. Raft waits after
// each failure twice as long as before, up to ten seconds, and so would keep a
// follower that is back without what it needs to answer a read, or to know what
// its agents are to run. It ends, too, when nobody needs the message any more.
func (l *link) awaitReturn(id raft.ServerID, term uint64, since time.Time) {
	for {
		followed := l.followed.next()
		if _, last := l.progress(id, term); last.After(since) || l.silent.Load() || !l.leads(id, term) {
			return
		}
		timer := time.NewTimer(returnPoll)
		select {
		case <-followed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// returnPoll is how often awaitReturn asks whether there is still a reason to wait.
const returnPoll = 100 * time.Millisecond

// note records that the peer followed.
func (l *link) note(id raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, sent time.Time) {
	l.mu.Lock()
	p := l.peer(id, args.Term)
	if p.term > args.Term {
		l.mu.Unlock()
		return
	}
	if sent.After(p.followed) {
		p.followed = sent
	}
	last, lastTerm := args.PrevLogEntry, args.PrevLogTerm
	if n := len(args.Entries); n > 0 {
		last, lastTerm = args.Entries[n-1].Index, args.Entries[n-1].Term
	}
	if last > p.index {
		p.index, p.indexTerm = last, lastTerm
	}
	p.commit = max(p.commit, min(args.LeaderCommitIndex, last))
	l.tell(id, to, p)
	l.mu.Unlock()
	l.followed.fire()
}

// peer returns the record of the peer, begun anew with a newer term. l.mu is held.
func (l *link) peer(id raft.ServerID, term uint64) *peer {
	p := l.peers[id]
	if p == nil {
		p = &peer{}
		l.peers[id] = p
	}
	if p.term < term {
		p.term, p.followed = term, time.Time{}
		p.index, p.indexTerm, p.commit = 0, 0, 0
	}
	return p
}

func (l *link) request(term uint64) *raft.AppendEntriesRequest {
	return &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{
			ProtocolVersion: raft.ProtocolVersionMax,
			ID:              []byte(l.self),
			Addr:            l.EncodePeer(l.self, l.address),
		},
		Term: term,
	}
}

// start runs send in a goroutine that Close waits for. l.mu is held.
func (l *link) start(send func()) bool {
	if l.closed {
		return false
	}
	l.running.Add(1)
	go func() {
		defer l.running.Done()
		send()
	}()
	return true
}

// followedSince counts the voters that followed this leader in a message that was
// sent at or after since, itself included.
func (l *link) followedSince(servers []raft.Server, term uint64, since time.Time) (followed, voters int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if p := l.peers[s.ID]; s.ID == l.self || p != nil && p.term == term && !p.followed.Before(since) {
			followed++
		}
	}
	return followed, voters
}

// beat sends a heartbeat to each voter that has not followed since then, unless
// one is in flight that was sent late enough.
func (l *link) beat(servers []raft.Server, term uint64, since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range servers {
		if s.ID == l.self || s.Suffrage != raft.Voter {
			continue
		}
		p := l.peer(s.ID, term)
		switch {
		case p.term != term || !p.followed.Before(since):
		case p.beatSent.IsZero():
			p.beatSent = time.Now()
			if !l.start(func() { l.heartbeat(s, term, p) }) {
				p.beatSent = time.Time{}
			}
		case p.beatSent.Before(since):
			p.again = true
		}
	}
}

func (l *link) heartbeat(to raft.Server, term uint64, p *peer) {
	for {
		err := l.AppendEntries(to.ID, to.Address, l.request(term), &raft.AppendEntriesResponse{})
		l.mu.Lock()
		if err != nil || !p.again || l.closed {
			p.beatSent, p.again = time.Time{}, false
			l.mu.Unlock()
			return
		}
		p.beatSent, p.again = time.Now(), false
		l.mu.Unlock()
	}
}

// spread sees to it that the servers learn of the commit index without delay.
func (l *link) spread(servers []raft.Server, commit uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range servers {
		if s.ID == l.self {
			continue
		}
		p := l.peer(s.ID, 0)
		p.wanted = max(p.wanted, commit)
		l.tell(s.ID, s.Address, p)
	}
}

// tell sends the commit index to a peer that somebody waits on and that does not
// know of it. l.mu is held. It names an entry that the peer holds and no commit
// beyond it, so that it says nothing which raft itself does not.
func (l *link) tell(id raft.ServerID, to raft.ServerAddress, p *peer) {
	commit := min(p.wanted, p.index)
	if commit <= p.commit || p.telling || l.silent.Load() {
		return
	}
	req := l.request(p.term)
	req.PrevLogEntry, req.PrevLogTerm, req.LeaderCommitIndex = p.index, p.indexTerm, commit
	p.telling = l.start(func() {
		var resp raft.AppendEntriesResponse
		sent := time.Now()
		err := l.transport.AppendEntries(id, to, req, &resp)
		l.mu.Lock()
		p.telling = false
		l.mu.Unlock()
		if err == nil && resp.Term == req.Term && resp.Success {
			l.note(id, to, req, sent)
		}
	})
}

// begin forgets what was known from earlier terms.
func (l *link) begin(term uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range l.peers {
		l.peer(id, term).wanted = 0
	}
}

// progress is what the leader knows of a peer.
func (l *link) progress(id raft.ServerID, term uint64) (index uint64, followed time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.peers[id]; p != nil && p.term == term {
		return p.index, p.followed
	}
	return 0, time.Time{}
}

// Close closes the connections and waits for what this link itself has sent.
func (l *link) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	err := l.transport.Close()
	if n, ok := l.transport.(interface{ CloseStreams() }); ok {
		n.CloseStreams()
	}
	l.running.Wait()
	return err
}
