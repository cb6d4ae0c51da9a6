package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// verifyChain returns the chain from the leaf (first of presented) to one of
// the roots that are trusted at the given time.
func verifyChain(presented []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, at time.Time) ([]*x509.Certificate, error) {
	if len(presented) == 0 {
		return nil, errNoCertificate
	}
	intermediates := x509.NewCertPool()
	for _, cert := range presented[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := presented[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   at,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return nil, err
	}
	return chains[0], nil
}

// verifyPeer is the whole judgement of the answering side of a connection: of
// our cluster, by our roots, valid now, allowed to answer, and wanted.
func (m *material) verifyPeer(presented []*x509.Certificate, want func(Identity) error) error {
	if _, err := verifyChain(presented, m.pool, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
		return explain(err, presented, m.identity.Cluster)
	}
	id, err := identityOf(presented[0])
	if err != nil {
		return err
	}
	if id.Cluster != m.identity.Cluster {
		return otherCluster(id, m.identity.Cluster)
	}
	return want(id)
}

// verifyCaller judges the calling side, after crypto/tls has verified the chain.
func (m *material) verifyCaller(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	if len(state.VerifiedChains) == 0 {
		return errors.New("certificate was not verified")
	}
	id, err := identityOf(state.PeerCertificates[0])
	if err != nil {
		return err
	}
	if id.Cluster != m.identity.Cluster {
		return otherCluster(id, m.identity.Cluster)
	}
	return nil
}

func otherCluster(id Identity, ours string) error {
	return fmt.Errorf("%s is of cluster %s, this is cluster %s", id, id.Cluster, ours)
}

// explain turns a refusal of a chain into words that say what to do about it.
// What the refused certificate says of itself is believed for the text only.
func explain(err error, presented []*x509.Certificate, cluster string) error {
	if len(presented) == 0 {
		return err
	}
	id, idErr := identityOf(presented[0])
	if idErr != nil {
		return fmt.Errorf("%w (%w)", err, idErr)
	}
	if id.Cluster != cluster {
		return fmt.Errorf("%w: %w", otherCluster(id, cluster), err)
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		leaf := presented[0]
		if now := time.Now(); now.Before(leaf.NotBefore) {
			return fmt.Errorf("certificate of %s is not valid before %s, it is %s here: %w",
				id, leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), err)
		}
		return fmt.Errorf("certificate of %s expired at %s: %w", id, leaf.NotAfter.UTC().Format(time.RFC3339), err)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return fmt.Errorf("certificate of %s is not signed by the authority of this cluster: %w", id, err)
	}
	return fmt.Errorf("certificate of %s: %w", id, err)
}

// ServerTLS is for listeners: it presents the certificate together with its
// root, and takes a caller's certificate where there is one; one that is not of
// this cluster, or expired, ends the handshake. Who called is then PeerIdentity.
func (c *Credentials) ServerTLS(alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: alpn,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m := c.current.Load()
			return &tls.Config{
				MinVersion:       tls.VersionTLS13,
				NextProtos:       alpn,
				Certificates:     []tls.Certificate{m.asServer},
				ClientAuth:       tls.VerifyClientCertIfGiven,
				ClientCAs:        m.pool,
				VerifyConnection: m.verifyCaller,
				// A resumed session would carry an old judgement past a
				// change of roots.
				SessionTicketsDisabled: true,
			}, nil
		},
	}
}

// ClientTLS is for calls: it presents the certificate, and refuses an answering
// side that is not a server of this cluster or that want, where given, objects to.
func (c *Credentials) ClientTLS(want func(Identity) error, alpn ...string) *tls.Config {
	if want == nil {
		want = RequireRole(pb.Role_ROLE_SERVER)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: alpn,
		// Replaces only the check of host name and system roots:
		// VerifyConnection makes ours, and runs with every handshake.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return c.current.Load().verifyPeer(state.PeerCertificates, want)
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &c.current.Load().asClient, nil
		},
	}
}

// PinnedTLS is for the join call of somebody who has no certificate yet and
// knows of the cluster the pins in its token: the answering side must be a
// server whose chain, with its root, is presented, and the root's key pinned.
func PinnedTLS(pins [][]byte, alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         alpn,
		InsecureSkipVerify: true, // as in ClientTLS
		VerifyConnection: func(state tls.ConnectionState) error {
			return verifyPinned(state.PeerCertificates, pins)
		},
	}
}

func verifyPinned(presented []*x509.Certificate, pins [][]byte) error {
	if len(presented) == 0 {
		return errNoCertificate
	}
	roots := x509.NewCertPool()
	found := false
	for _, cert := range presented[1:] {
		if isPinned(cert, pins) && isRoot(cert) {
			roots.AddCert(cert)
			found = true
		}
	}
	if !found {
		return errors.New("the server's root certificate is none of those in the token: another cluster answers at this address, or somebody is in between")
	}
	if _, err := verifyChain(presented, roots, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	id, err := identityOf(presented[0])
	if err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	return RequireRole(pb.Role_ROLE_SERVER)(id)
}
