package pki

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"slices"
	"testing"
	"time"
)

// handshake lets the two shake hands over loopback. In TLS 1.3 the calling side
// learns of its refusal only by reading, so the answering side says a word.
func handshake(t *testing.T, serverConfig, clientConfig *tls.Config) (peer Identity, known bool, serverErr, clientErr error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err != nil {
			serverErr = err
			return
		}
		defer conn.Close()
		shaken := tls.Server(conn, serverConfig)
		if serverErr = shaken.Handshake(); serverErr != nil {
			return
		}
		peer, known = PeerIdentity(shaken.ConnectionState())
		_, serverErr = shaken.Write([]byte{1})
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, clientErr = tls.Client(conn, clientConfig).Read(make([]byte, 1))
	conn.Close()
	<-done
	return peer, known, serverErr, clientErr
}

// forge makes credentials that no authority would issue: the template is signed
// as it is, by the authority's key.
func forge(t *testing.T, a *Authority, change func(*x509.Certificate)) *Credentials {
	t.Helper()
	key, _, err := NewKeyAndCSR("x")
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: append(a.root.URIs[:0:0], Identity{a.cluster, server, "s1"}.url()),
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	m := &material{
		bundle:   bundle{key: key, chain: [][]byte{der}, roots: a.Roots()},
		identity: Identity{a.cluster, server, "s1"}, leaf: leaf, pool: poolOf(a.roots),
		asClient: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		asServer: tls.Certificate{Certificate: [][]byte{der, a.root.Raw}, PrivateKey: key, Leaf: leaf},
	}
	c := &Credentials{}
	c.current.Store(m)
	return c
}

// Who is let in by an answering side, and what it says to who is not.
func TestCallersRefused(t *testing.T) {
	ours, same, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	s1 := issue(t, ours, server, "s1", time.Hour)
	as := func(c *Credentials) *tls.Config {
		// A caller that takes anybody, and presents its certificate even where
		// it was asked for others: what is tested is the answering side.
		return &tls.Config{
			InsecureSkipVerify: true,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &c.current.Load().asClient, nil
			},
		}
	}
	for _, test := range []struct {
		name   string
		client *tls.Config
		peer   string
		err    string
	}{
		{"agent", as(issue(t, ours, agent, "a1", time.Hour)), "agent/a1", ""},
		{"server", as(issue(t, ours, server, "s2", time.Hour)), "server/s2", ""},
		{"nobody", &tls.Config{InsecureSkipVerify: true}, "", ""},
		{"other cluster", as(issue(t, other, server, "s1", time.Hour)), "", "unknown authority"},
		{"same cluster id, other root", as(issue(t, same, server, "s1", time.Hour)), "", "unknown authority"},
		{"expired", as(issue(t, ours, agent, "a1", 1)), "", "expired"},
		{"our root, other cluster id", as(forge(t, ours, func(c *x509.Certificate) { c.URIs[0].Host = "c2" })), "", "server/s1 is of cluster c2, this is cluster c1"},
		{"no identity", as(forge(t, ours, func(c *x509.Certificate) { c.URIs = nil })), "", "0 URI names"},
		{"two identities", as(forge(t, ours, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) })), "", "2 URI names"},
		{"unknown role", as(forge(t, ours, func(c *x509.Certificate) { c.URIs[0].Path = "/god/s1" })), "", "unknown role"},
		{"not for calling", as(forge(t, ours, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })), "", "incompatible key usage"},
		{"TLS 1.2", &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "", "unsupported versions"},
	} {
		t.Run(test.name, func(t *testing.T) {
			peer, known, serverErr, clientErr := handshake(t, s1.ServerTLS(), test.client)
			wantError(t, serverErr, test.err)
			if (clientErr != nil) != (test.err != "") {
				t.Errorf("the caller got %v", clientErr)
			}
			if known != (test.peer != "") || known && peer.String() != test.peer {
				t.Errorf("caller is %s (%v), want %q", peer, known, test.peer)
			}
		})
	}
}

// Whom a calling side believes, and what it says of others.
func TestAnsweringSideRefused(t *testing.T) {
	ours, same, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	a1 := issue(t, ours, agent, "a1", time.Hour)
	as := func(c *Credentials) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{c.current.Load().asServer}}
	}
	no := errors.New("not this one")
	for _, test := range []struct {
		name   string
		server *tls.Config
		want   func(Identity) error
		err    string
	}{
		{"server", as(issue(t, ours, server, "s1", time.Hour)), nil, ""},
		{"agent", as(issue(t, ours, agent, "a2", time.Hour)), nil, "incompatible key usage"},
		{"agent that may answer", as(forge(t, ours, func(c *x509.Certificate) { c.URIs[0].Path = "/agent/a2" })), nil, "agent/a2 does not have role server"},
		{"other cluster", as(issue(t, other, server, "s1", time.Hour)), nil, "server/s1 is of cluster c2, this is cluster c1"},
		{"our root, other cluster id", as(forge(t, ours, func(c *x509.Certificate) { c.URIs[0].Host = "c2" })), nil, "server/s1 is of cluster c2, this is cluster c1"},
		{"same cluster id, other root", as(issue(t, same, server, "s1", time.Hour)), nil, "certificate of server/s1 is not signed by the authority of this cluster"},
		{"expired", as(issue(t, ours, server, "s1", 1)), nil, "certificate of server/s1 expired at"},
		{"not yet valid", as(forge(t, ours, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })), nil, "is not valid before"},
		{"not wanted", as(issue(t, ours, server, "s1", time.Hour)), func(Identity) error { return no }, "not this one"},
		{"no identity", as(forge(t, ours, func(c *x509.Certificate) { c.URIs = nil })), nil, "0 URI names"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, _, _, err := handshake(t, test.server, a1.ClientTLS(test.want))
			wantError(t, err, test.err)
		})
	}
}

// The join call, by somebody who knows nothing but pins.
func TestPinnedTLS(t *testing.T) {
	ours, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	withChain := func(c *Credentials, chain ...[]byte) *tls.Config {
		cert := c.current.Load().asServer
		cert.Certificate = chain
		return &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	s1 := issue(t, ours, server, "s1", time.Hour)
	leaf := s1.current.Load().chain[0]
	otherLeaf := issue(t, other, server, "s1", time.Hour)
	for _, test := range []struct {
		name   string
		server *tls.Config
		pins   [][]byte
		err    string
	}{
		{"the pinned root", s1.ServerTLS(), ours.Pins(), ""},
		{"one of two pins", s1.ServerTLS(), append(other.Pins(), ours.Pins()...), ""},
		{"other root", s1.ServerTLS(), other.Pins(), "none of those in the token"},
		{"no pins", s1.ServerTLS(), nil, "none of those in the token"},
		{"root is not presented", withChain(s1, leaf), ours.Pins(), "none of those in the token"},
		{"pinned root beside a leaf of another", withChain(otherLeaf, otherLeaf.current.Load().chain[0], ours.root.Raw), ours.Pins(), "unknown authority"},
		{"the leaf's own key is pinned", withChain(s1, leaf, leaf), [][]byte{pinOf(s1.current.Load().leaf)}, "none of those in the token"},
		{"not a server", issue(t, ours, agent, "a1", time.Hour).ServerTLS(), ours.Pins(), "incompatible key usage"},
		{"agent that may answer", forge(t, ours, func(c *x509.Certificate) { c.URIs[0].Path = "/agent/a2" }).ServerTLS(), ours.Pins(), "agent/a2 does not have role server"},
		{"expired", issue(t, ours, server, "s1", 1).ServerTLS(), ours.Pins(), "expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			peer, known, _, err := handshake(t, test.server, PinnedTLS(test.pins))
			wantError(t, err, test.err)
			if known {
				t.Errorf("the caller passes for %s", peer)
			}
		})
	}
}

// Certificates that nobody verified are nobody's.
func TestPeerIdentityNeedsVerification(t *testing.T) {
	leaf := issue(t, newTestAuthority(t, "c1"), admin, "root", time.Hour).current.Load().leaf
	for name, state := range map[string]tls.ConnectionState{
		"nothing":     {},
		"unverified":  {PeerCertificates: []*x509.Certificate{leaf}},
		"empty chain": {PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{}}},
	} {
		if id, ok := PeerIdentity(state); ok {
			t.Errorf("%s: %s", name, id)
		}
	}
}

// A new certificate and new roots are in use from the next handshake on.
func TestRotation(t *testing.T) {
	before, after := newTestAuthority(t, "c1"), newTestAuthority(t, "c1")
	both := append(before.Roots(), after.Roots()...)
	s1, a1 := issue(t, before, server, "s1", time.Hour), issue(t, before, agent, "a1", time.Hour)
	serverTLS, clientTLS := s1.ServerTLS(), a1.ClientTLS(nil)
	meet := func(want string) {
		t.Helper()
		_, known, serverErr, clientErr := handshake(t, serverTLS, clientTLS)
		if want == "" && !known {
			t.Fatalf("server: %v, client: %v", serverErr, clientErr)
		}
		wantError(t, errors.Join(serverErr, clientErr), want)
	}
	replace := func(c *Credentials, a *Authority, roots [][]byte) {
		t.Helper()
		m := issue(t, a, c.Identity().Role, c.Identity().Name, time.Hour).current.Load()
		if err := c.Replace(m.key, m.chain, roots); err != nil {
			t.Fatal(err)
		}
	}
	meet("")
	// The steps in which roots are changed: trust both, then issue with the
	// new, then trust the new only. At no step is anybody shut out.
	replace(s1, before, both)
	meet("")
	replace(a1, before, both)
	meet("")
	replace(s1, after, both)
	meet("")
	replace(a1, after, both)
	meet("")
	replace(s1, after, after.Roots())
	meet("")
	replace(a1, after, after.Roots())
	meet("")
	if !slices.Equal(s1.Roots()[0], after.root.Raw) {
		t.Error("the old root is still trusted")
	}
	replace(a1, before, before.Roots())
	meet("not signed by the authority of this cluster")
}
