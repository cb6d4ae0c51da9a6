// Package pki owns who is who in a cluster: the embedded certificate authority,
// the identity in a certificate, credentials on disk and in running
// connections, join tokens, and the listener that tells raft from gRPC by ALPN.
//
// A peer is judged by its identity (cluster, role, name) and by the chain to
// the cluster's roots, never by host name or address. The package decides who
// somebody is; what they may do is decided elsewhere. It never keeps a token's
// secret, only makes it and compares its hash, and it writes no file but the
// two that it is told to (credentials and authority).
package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Identity is the name in a certificate, as the URI
// spiffe://<cluster>/<role>/<name> (source: SPIFFE ID and X.509-SVID).
type Identity struct {
	Cluster string
	Role    pb.Role
	Name    string
}

// One order for writing and for error texts.
var roles = []struct {
	role pb.Role
	name string
}{
	{pb.Role_ROLE_SERVER, "server"},
	{pb.Role_ROLE_AGENT, "agent"},
	{pb.Role_ROLE_ADMIN, "admin"},
	{pb.Role_ROLE_OPERATOR, "operator"},
	{pb.Role_ROLE_VIEWER, "viewer"},
	{pb.Role_ROLE_METRICS, "metrics"},
}

// RoleName is how a role is written in identities and messages; for a value
// that is no role it is the enum's own text.
func RoleName(role pb.Role) string {
	for _, r := range roles {
		if r.role == role {
			return r.name
		}
	}
	return role.String()
}

// ParseRole is the reverse of RoleName.
func ParseRole(name string) (pb.Role, error) {
	known := make([]string, len(roles))
	for i, r := range roles {
		if r.name == name {
			return r.role, nil
		}
		known[i] = r.name
	}
	return pb.Role_ROLE_UNSPECIFIED, fmt.Errorf("unknown role %q, known are %s", name, strings.Join(known, ", "))
}

// String is role/name: within a cluster that says it all.
func (id Identity) String() string { return RoleName(id.Role) + "/" + id.Name }

// URI is the full form. It is an identity's only form in certificates.
func (id Identity) URI() string {
	return "spiffe://" + id.Cluster + "/" + RoleName(id.Role) + "/" + id.Name
}

// Validate says what keeps the identity from being written into a certificate.
func (id Identity) Validate() error {
	if err := validateCluster(id.Cluster); err != nil {
		return err
	}
	if _, err := ParseRole(RoleName(id.Role)); err != nil {
		return err
	}
	return validateName(id.Name)
}

// Limits of SPIFFE: a trust domain of at most 255 bytes, a URI of at most 2,048.
const (
	maxCluster = 255
	maxName    = 253
)

func validateCluster(cluster string) error {
	if cluster == "" || len(cluster) > maxCluster {
		return fmt.Errorf("cluster id %q: must have 1 to %d characters", cluster, maxCluster)
	}
	for _, c := range []byte(cluster) {
		if !lowerOrDigit(c) && c != '-' && c != '.' && c != '_' {
			return fmt.Errorf("cluster id %q: only lower case letters, digits, '-', '.' and '_' are allowed", cluster)
		}
	}
	return nil
}

func validateName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("name %q: must have 1 to %d characters", name, maxName)
	}
	if name == "." || name == ".." {
		return fmt.Errorf("name %q: not allowed", name)
	}
	for _, c := range []byte(name) {
		if !lowerOrDigit(c) && !(c >= 'A' && c <= 'Z') && c != '-' && c != '.' && c != '_' {
			return fmt.Errorf("name %q: only letters, digits, '-', '.' and '_' are allowed", name)
		}
	}
	return nil
}

func lowerOrDigit(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// ParseIdentity reads the URI form. Only the canonical text is accepted, so
// that two texts never mean one identity.
func ParseIdentity(uri string) (Identity, error) {
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("identity %q: must begin with spiffe://", uri)
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 3 {
		return Identity{}, fmt.Errorf("identity %q: must be spiffe://<cluster>/<role>/<name>", uri)
	}
	role, err := ParseRole(parts[1])
	if err != nil {
		return Identity{}, fmt.Errorf("identity %q: %w", uri, err)
	}
	id := Identity{Cluster: parts[0], Role: role, Name: parts[2]}
	if err := id.Validate(); err != nil {
		return Identity{}, fmt.Errorf("identity %q: %w", uri, err)
	}
	return id, nil
}

func (id Identity) url() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.Cluster, Path: "/" + RoleName(id.Role) + "/" + id.Name}
}

// identityOf reads the identity of a leaf: exactly one URI, as X.509-SVID demands.
func identityOf(leaf *x509.Certificate) (Identity, error) {
	if len(leaf.URIs) != 1 {
		return Identity{}, fmt.Errorf("certificate has %d URI names, an identity is exactly one", len(leaf.URIs))
	}
	return ParseIdentity(leaf.URIs[0].String())
}

// PeerIdentity is who called, on the accepting side of a connection made with
// ServerTLS. It answers false for a caller without a certificate, and for a
// state whose certificates nobody verified.
func PeerIdentity(state tls.ConnectionState) (Identity, bool) {
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return Identity{}, false
	}
	id, err := identityOf(state.VerifiedChains[0][0])
	return id, err == nil
}

// RequireRole is a condition for ClientTLS: the other side must have this role.
func RequireRole(role pb.Role) func(Identity) error {
	return func(id Identity) error {
		if id.Role != role {
			return fmt.Errorf("%s does not have role %s", id, RoleName(role))
		}
		return nil
	}
}

var errNoCertificate = errors.New("no certificate was presented")
