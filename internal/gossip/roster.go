package gossip

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/memberlist"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Addresses of lost servers that are remembered.
const maxLost = 16

// record is what travels as memberlist's metadata, at most 512 bytes.
type record struct {
	Cluster string  `json:"c"`
	Name    string  `json:"n"`
	Role    pb.Role `json:"r"`
	Member  string  `json:"m,omitempty"`
	GRPC    string  `json:"g,omitempty"`
	HTTPS   string  `json:"h,omitempty"`
	// Start of the process, Unix milliseconds: tells the new one of two with
	// one name.
	Started int64 `json:"t"`
}

func (g *Gossip) describe(meta Meta) error {
	data, err := json.Marshal(record{
		Cluster: g.config.Cluster, Name: g.config.Name, Role: g.config.Role,
		Member: meta.MemberID, GRPC: meta.GRPCAddress, HTTPS: meta.HTTPSAddress,
		Started: g.started.UnixMilli(),
	})
	if err != nil {
		return err
	}
	if len(data) > memberlist.MetaMaxSize {
		return fmt.Errorf("name, cluster id and addresses take %d bytes together, at most %d are allowed", len(data), memberlist.MetaMaxSize)
	}
	g.description.Store(&data)
	return nil
}

// roster is the list of live peers, kept by memberlist's calls. They come with
// memberlist's locks held, so nothing here calls back.
type roster struct {
	cluster string
	self    string // our name in memberlist

	mutex   sync.Mutex
	alive   map[string]entry // by name in memberlist
	lost    []string         // gossip addresses of servers that died, oldest first
	changed chan struct{}
}

type entry struct {
	record
	address string
}

func newRoster(cluster, self string) *roster {
	return &roster{cluster: cluster, self: self, alive: make(map[string]entry), changed: make(chan struct{})}
}

func (r *roster) read(node *memberlist.Node) (entry, error) {
	e := entry{address: node.Address()}
	if err := json.Unmarshal(node.Meta, &e.record); err != nil {
		return entry{}, fmt.Errorf("peer at %s does not describe itself as a peer of persys: %w", e.address, err)
	}
	if e.Cluster != r.cluster {
		return entry{}, fmt.Errorf("peer %s at %s is of cluster %q, this is cluster %q", e.Name, e.address, e.Cluster, r.cluster)
	}
	return e, nil
}

// NotifyAlive keeps out who is not of this cluster, whoever tells of it.
func (r *roster) NotifyAlive(node *memberlist.Node) error {
	_, err := r.read(node)
	return err
}

// NotifyMerge ends a join in either direction where the other side is, or
// knows, somebody of another cluster.
func (r *roster) NotifyMerge(nodes []*memberlist.Node) error {
	for _, node := range nodes {
		if _, err := r.read(node); err != nil {
			return err
		}
	}
	return nil
}

// NotifyJoin takes a live peer in.
func (r *roster) NotifyJoin(node *memberlist.Node) { r.put(node) }

// NotifyUpdate takes a peer's new description or address.
func (r *roster) NotifyUpdate(node *memberlist.Node) { r.put(node) }

func (r *roster) put(node *memberlist.Node) {
	e, err := r.read(node)
	if err != nil || node.Name == r.self {
		return // NotifyAlive has refused it
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if was, ok := r.alive[node.Name]; ok && was == e {
		return
	}
	r.alive[node.Name] = e
	r.lost = slices.DeleteFunc(r.lost, func(address string) bool { return address == e.address })
	r.signal()
}

// NotifyLeave drops a peer that left or died.
func (r *roster) NotifyLeave(node *memberlist.Node) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	e, ok := r.alive[node.Name]
	if !ok {
		return
	}
	delete(r.alive, node.Name)
	if node.State != memberlist.StateLeft && e.Role == pb.Role_ROLE_SERVER && !r.isAlive(e.address) {
		r.lost = append(slices.DeleteFunc(r.lost, func(address string) bool { return address == e.address }), e.address)
		if len(r.lost) > maxLost {
			r.lost = r.lost[1:]
		}
	}
	r.signal()
}

func (r *roster) isAlive(address string) bool {
	for _, e := range r.alive {
		if e.address == address {
			return true
		}
	}
	return false
}

func (r *roster) signal() {
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *roster) nextChange() <-chan struct{} {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.changed
}

// missing are addresses where somebody should be and nobody is known to be:
// those given, and those of lost servers.
func (r *roster) missing(given []string) []string {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	var out []string
	for _, address := range slices.Concat(given, r.lost) {
		if !r.isAlive(address) && !slices.Contains(out, address) {
			out = append(out, address)
		}
	}
	return out
}

func (r *roster) peers() []Peer {
	r.mutex.Lock()
	entries := make([]entry, 0, len(r.alive))
	for _, e := range r.alive {
		entries = append(entries, e)
	}
	r.mutex.Unlock()
	// Of several with one role and name the newest first; the others are on
	// their way out.
	slices.SortFunc(entries, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name),
			cmp.Compare(b.Started, a.Started), cmp.Compare(a.address, b.address))
	})
	entries = slices.CompactFunc(entries, func(a, b entry) bool { return a.Role == b.Role && a.Name == b.Name })
	peers := make([]Peer, len(entries))
	for i, e := range entries {
		peers[i] = Peer{
			Name: e.Name, Role: e.Role, MemberID: e.Member,
			GRPCAddress: e.GRPC, HTTPSAddress: e.HTTPS, GossipAddress: e.address,
		}
	}
	return peers
}
