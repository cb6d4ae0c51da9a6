package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/gossip"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	certificateTTL = 365 * 24 * time.Hour
	joinTimeout    = 30 * time.Second
	adminName      = "admin"
)

// identity is what the data directory says the process is. Its file is written
// last, so that a set-up that was cut short can simply be done again.
type identity struct {
	ClusterID string `json:"cluster_id"`
	Name      string `json:"name"`
	// New for each data directory: a name with an empty disk is a new member.
	Incarnation string `json:"incarnation"`
	// server or agent.
	Role pb.Role `json:"role"`
	// The first server founds the cluster when it has no raft state. Cleared
	// once it has.
	Bootstrap bool `json:"bootstrap,omitempty"`
	// gRPC and gossip addresses of servers, as last heard of.
	Servers     []string          `json:"servers"`
	GossipPeers []string          `json:"gossip_peers"`
	GossipKey   []byte            `json:"gossip_key"`
	Labels      map[string]string `json:"labels,omitempty"`

	mu sync.Mutex // guards Servers and GossipPeers while running
}

func (i *identity) memberID() string { return i.Name + "." + i.Incarnation }

// servers are the gRPC addresses that were last heard of.
func (i *identity) servers() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.Servers)
}

// remember stores the servers that gossip knows; where it knows none, what was
// known stays.
func (i *identity) remember(dir string, servers []gossip.Peer) error {
	var grpcAddresses, gossipAddresses []string
	for _, s := range servers {
		grpcAddresses = append(grpcAddresses, s.GRPCAddress)
		gossipAddresses = append(gossipAddresses, s.GossipAddress)
	}
	slices.Sort(grpcAddresses)
	slices.Sort(gossipAddresses)
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(servers) == 0 || slices.Equal(i.Servers, grpcAddresses) && slices.Equal(i.GossipPeers, gossipAddresses) {
		return nil
	}
	i.Servers, i.GossipPeers = grpcAddresses, gossipAddresses
	return i.save(dir)
}

func identityPath(dir string) string { return filepath.Join(dir, "identity.json") }
func caDir(dir string) string        { return filepath.Join(dir, "pki", "ca") }

// AuthorityDir is where a server's data directory has the certificate authority.
func AuthorityDir(dir string) string { return caDir(dir) }

func credentialsDir(dir string, role pb.Role) string {
	return filepath.Join(dir, "pki", pki.RoleName(role))
}

func loadIdentity(dir string) (*identity, error) {
	data, err := os.ReadFile(identityPath(dir))
	if err != nil {
		return nil, err
	}
	i := &identity{}
	err = json.Unmarshal(data, i)
	if err == nil && (i.ClusterID == "" || i.Name == "" || i.Incarnation == "" || i.Role == pb.Role_ROLE_UNSPECIFIED || len(i.GossipKey) == 0) {
		err = errors.New("it does not say who this machine is")
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; restore it, or join again with an empty directory", identityPath(dir), err)
	}
	return i, nil
}

func (i *identity) save(dir string) error {
	data, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".identity-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(data, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), identityPath(dir))
}

// belongs checks that credentials are of the machine that the identity names.
func (i *identity) belongs(dir string, own pki.Identity) error {
	if own.Cluster != i.ClusterID || own.Name != i.Name {
		return conflict("data directory %s belongs to %q of cluster %s, but its certificate is %s of cluster %s; restore the one or the other",
			dir, i.Name, i.ClusterID, own, own.Cluster)
	}
	return nil
}

// conflict is a refusal because of what is on this machine already. Statuses
// tell the command line the kind of an error.
func conflict(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}

// lockDataDir makes sure that one process at a time uses the directory. The
// lock ends with the process.
func lockDataDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, conflict("data directory %s is in use by another process; one at a time can use it", dir)
	}
	return f, nil
}

// Init prepares the data directory of the first server of a new cluster: the
// certificate authority, this server's certificate and the administrator's.
// A directory that belongs to a cluster already is refused and not touched.
func Init(_ context.Context, c Config) error {
	c, err := c.WithDefaults()
	if err != nil {
		return err
	}
	lock, err := lockDataDir(c.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := checkFresh(c.DataDir); err != nil {
		return err
	}
	id := &identity{
		ClusterID: uuid.NewString(), Name: c.Name, Incarnation: uuid.NewString(), Role: pb.Role_ROLE_SERVER, Bootstrap: true,
		Servers: []string{c.grpcAddress()}, GossipPeers: []string{c.gossipAddress()}, GossipKey: make([]byte, 32),
	}
	if _, err := rand.Read(id.GossipKey); err != nil {
		return err
	}
	authority, err := pki.NewAuthority(id.ClusterID)
	if err != nil {
		return err
	}
	if err := authority.Save(caDir(c.DataDir)); err != nil {
		return err
	}
	if err := issueOwn(c, authority, id, pb.Role_ROLE_SERVER, c.Name); err != nil {
		return err
	}
	if err := issueOwn(c, authority, id, pb.Role_ROLE_ADMIN, adminName); err != nil {
		return err
	}
	return id.save(c.DataDir)
}

// checkFresh refuses a directory that holds a cluster's data.
func checkFresh(dir string) error {
	id, err := loadIdentity(dir)
	switch {
	case err == nil:
		return conflict("data directory %s already belongs to %s %q of cluster %s; start it with `persys %s`, or choose another directory",
			dir, pki.RoleName(id.Role), id.Name, id.ClusterID, pki.RoleName(id.Role))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "raft")); err == nil {
		return conflict("data directory %s holds a cluster's log but no identity.json; it is not touched: restore the file, or choose another directory", dir)
	}
	return nil
}

// issueOwn has the authority in this process certify a key made here.
func issueOwn(c Config, authority *pki.Authority, id *identity, role pb.Role, name string) error {
	key, csr, err := pki.NewKeyAndCSR(name)
	if err != nil {
		return err
	}
	var addresses []string
	if role != pb.Role_ROLE_ADMIN {
		addresses = []string{c.Advertise, c.Name, "localhost", "127.0.0.1"}
	}
	chain, _, _, err := authority.Issue(csr, pki.Identity{Cluster: id.ClusterID, Role: role, Name: name}, addresses, certificateTTL)
	if err != nil {
		return err
	}
	credentials, err := pki.NewCredentials(key, chain, authority.Roots())
	if err != nil {
		return err
	}
	return credentials.Save(credentialsDir(c.DataDir, role))
}

// Join redeems a token and writes the data directory; the role is the token's.
// A directory that has joined the same cluster already is left as it is, so
// the same line serves the first start and every later one.
func Join(ctx context.Context, c Config, token string) (pb.Role, error) {
	c, err := c.WithDefaults()
	if err != nil {
		return 0, err
	}
	t, err := pki.DecodeToken(token)
	if err != nil {
		return 0, err
	}
	lock, err := lockDataDir(c.DataDir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	incarnation := uuid.NewString()
	if id, err := loadIdentity(c.DataDir); err == nil {
		if err := belongs(c, t, id); err != nil || !expired(c.DataDir, id.Role) {
			return id.Role, err
		}
		// It was switched off for so long that its certificate has run out.
		incarnation = id.Incarnation
	} else if err := checkFresh(c.DataDir); err != nil {
		return 0, err
	}
	if time.Now().After(t.Expiry) {
		return 0, status.Errorf(codes.PermissionDenied, "the token expired at %s; make a new one: persys token create --role %s", t.Expiry.Format(time.RFC3339), pki.RoleName(t.Role))
	}
	key, csr, err := pki.NewKeyAndCSR(c.Name)
	if err != nil {
		return 0, err
	}
	answer, err := redeem(ctx, c, t, csr)
	if err != nil {
		return 0, err
	}
	return t.Role, writeJoined(c, t, key, answer, incarnation)
}

// expired reports whether the machine's certificate can't be used any more.
func expired(dir string, role pb.Role) bool {
	credentials, err := pki.LoadCredentials(credentialsDir(dir, role))
	return err == nil && time.Now().After(credentials.NotAfter())
}

// belongs checks that a directory which has joined already fits the token.
func belongs(c Config, t pki.JoinToken, id *identity) error {
	switch {
	case id.ClusterID != t.Cluster:
		return conflict("data directory %s belongs to cluster %s, the token is for cluster %s; choose another directory", c.DataDir, id.ClusterID, t.Cluster)
	case id.Role != t.Role:
		return conflict("data directory %s belongs to a machine with role %s, the token is for role %s; choose another directory", c.DataDir, pki.RoleName(id.Role), pki.RoleName(t.Role))
	case id.Name != c.Name:
		return conflict("data directory %s belongs to %q, not to %q", c.DataDir, id.Name, c.Name)
	}
	return nil
}

// redeem asks the token's servers in turn. An answer is final, whichever it is;
// a server that can't be reached is passed over.
func redeem(ctx context.Context, c Config, t pki.JoinToken, csr []byte) (*pb.JoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	request := &pb.JoinRequest{TokenId: t.ID, Secret: t.Secret, Name: c.Name, Csr: csr, Addresses: []string{c.Advertise}, ClusterId: t.Cluster}
	var failures []string
	for _, address := range t.Servers {
		answer, final, err := redeemAt(ctx, address, t, request)
		if err == nil {
			return answer, nil
		}
		if final {
			return nil, fmt.Errorf("join refused: %w", err)
		}
		failures = append(failures, address+": "+status.Convert(err).Message())
	}
	return nil, status.Errorf(codes.Unavailable, "no server of the token answers: %s", strings.Join(failures, "; "))
}

func redeemAt(ctx context.Context, address string, t pki.JoinToken, request *pb.JoinRequest) (answer *pb.JoinResponse, final bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout/2)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(pki.PinnedTLS(t.Pins, "h2"))))
	if err != nil {
		return nil, false, err
	}
	defer conn.Close()
	answer, err = pb.NewClusterClient(conn).Join(ctx, request)
	return answer, isRefusal(err), err
}

func writeJoined(c Config, t pki.JoinToken, key *ecdsa.PrivateKey, answer *pb.JoinResponse, incarnation string) error {
	if answer.ClusterId != t.Cluster || answer.Role != t.Role {
		return fmt.Errorf("join: the server answered for %s of cluster %s, the token is for %s of %s", pki.RoleName(answer.Role), answer.ClusterId, pki.RoleName(t.Role), t.Cluster)
	}
	credentials, err := pki.NewCredentials(key, answer.Certificate, answer.Roots)
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if err := credentials.Save(credentialsDir(c.DataDir, t.Role)); err != nil {
		return err
	}
	if t.Role == pb.Role_ROLE_SERVER {
		authority, err := pki.FromKey(answer.CaKey, answer.Roots)
		if err != nil {
			return fmt.Errorf("join: %w", err)
		}
		if err := authority.Save(caDir(c.DataDir)); err != nil {
			return err
		}
	}
	id := &identity{
		ClusterID: answer.ClusterId, Name: answer.Name, Incarnation: incarnation, Role: answer.Role,
		Servers: answer.Servers, GossipPeers: answer.GossipPeers, GossipKey: bytes.Clone(answer.GossipKey), Labels: answer.Labels,
	}
	return id.save(c.DataDir)
}

// AdminContext gives the administrator's credentials that Init left in the data
// directory, as PEM.
func AdminContext(dataDir string) (certificate, key, roots []byte, err error) {
	admin, err := pki.LoadCredentials(credentialsDir(dataDir, pb.Role_ROLE_ADMIN))
	if err != nil {
		return nil, nil, nil, err
	}
	return admin.PEM()
}
