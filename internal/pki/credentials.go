package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"
)

const credentialsFile = "credentials.pem"

// Credentials are a key, its certificate and the roots to trust. All
// connections made from them look at them anew with each handshake, so that
// Replace takes effect while running; open connections go on. Safe for
// concurrent use.
type Credentials struct {
	current atomic.Pointer[material]
}

// material is immutable.
type material struct {
	bundle
	identity Identity
	leaf     *x509.Certificate
	pool     *x509.CertPool
	// What is presented: to servers the chain; to clients its root too, for
	// those that know nothing but the root's pin.
	asClient, asServer tls.Certificate
}

// NewKeyAndCSR makes a key and the request (PKCS #10, DER) that proves to hold
// it. The name is for people who look at the request: the issuer decides.
func NewKeyAndCSR(name string) (key *ecdsa.PrivateKey, csr []byte, err error) {
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("new key: %w", err)
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}
	csr, err = x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate request: %w", err)
	}
	return key, csr, nil
}

// NewCredentials checks that the chain (DER, leaf first) is for the key and
// ends in one of the roots (DER), and that leaf and roots are of one cluster.
// An expired certificate is accepted, so that one can read whose it was.
func NewCredentials(key *ecdsa.PrivateKey, chain, roots [][]byte) (*Credentials, error) {
	m, err := newMaterial(bundle{key: key, chain: chain, roots: roots})
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	c := &Credentials{}
	c.current.Store(m)
	return c, nil
}

func newMaterial(b bundle) (*material, error) {
	if b.key == nil {
		return nil, errors.New("there is no key")
	}
	if len(b.chain) == 0 {
		return nil, errNoCertificate
	}
	roots, cluster, err := parseRoots(b.roots)
	if err != nil {
		return nil, err
	}
	chain := make([]*x509.Certificate, len(b.chain))
	for i, der := range b.chain {
		if chain[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
	}
	m := &material{bundle: b, leaf: chain[0], pool: poolOf(roots)}
	if m.identity, err = identityOf(m.leaf); err != nil {
		return nil, err
	}
	if m.identity.Cluster != cluster {
		return nil, fmt.Errorf("certificate is of cluster %s, the roots of cluster %s", m.identity.Cluster, cluster)
	}
	if !b.key.PublicKey.Equal(m.leaf.PublicKey) {
		return nil, fmt.Errorf("certificate of %s is not for this key", m.identity)
	}
	verified, err := verifyChain(chain, m.pool, x509.ExtKeyUsageClientAuth, m.leaf.NotAfter)
	if err != nil {
		return nil, err
	}
	m.asClient = tls.Certificate{Certificate: b.chain, PrivateKey: b.key, Leaf: m.leaf}
	m.asServer = m.asClient
	m.asServer.Certificate = append(b.chain[:len(b.chain):len(b.chain)], verified[len(verified)-1].Raw)
	return m, nil
}

func poolOf(roots []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	return pool
}

// CredentialsFromPEM is the reverse of PEM. Of each part it takes what the part
// is for, so the one file that Save writes may be all three.
func CredentialsFromPEM(certificate, key, roots []byte) (*Credentials, error) {
	var parts [3]*bundle
	for i, part := range []struct {
		name string
		pem  []byte
	}{{"certificate", certificate}, {"key", key}, {"roots", roots}} {
		var err error
		if parts[i], err = parseBlocks(part.pem); err != nil {
			return nil, fmt.Errorf("credentials: %s: %w", part.name, err)
		}
	}
	return NewCredentials(parts[1].key, parts[0].chain, parts[2].roots)
}

// LoadCredentials reads what Save wrote. Where there are none the error is
// fs.ErrNotExist.
func LoadCredentials(dir string) (*Credentials, error) {
	path := filepath.Join(dir, credentialsFile)
	b, err := readBundle(path)
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	c, err := NewCredentials(b.key, b.chain, b.roots)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	return c, nil
}

// Save writes key, chain and roots to the directory, readable by the owner
// only, in one step.
func (c *Credentials) Save(dir string) error {
	if err := c.current.Load().write(filepath.Join(dir, credentialsFile)); err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	return nil
}

// Replace takes a new key, chain or set of roots into use. The identity must
// stay: who somebody is does not change while it runs.
func (c *Credentials) Replace(key *ecdsa.PrivateKey, chain, roots [][]byte) error {
	m, err := newMaterial(bundle{key: key, chain: chain, roots: roots})
	if err != nil {
		return fmt.Errorf("replace credentials: %w", err)
	}
	if was := c.Identity(); m.identity != was {
		return fmt.Errorf("replace credentials: %s cannot become %s", was.URI(), m.identity.URI())
	}
	c.current.Store(m)
	return nil
}

// Identity is whose credentials these are.
func (c *Credentials) Identity() Identity { return c.current.Load().identity }

// NotAfter is the end of the certificate's life.
func (c *Credentials) NotAfter() time.Time { return c.current.Load().leaf.NotAfter }

// Addresses are the IP addresses and DNS names in the certificate.
func (c *Credentials) Addresses() []string {
	leaf := c.current.Load().leaf
	var out []string
	for _, ip := range leaf.IPAddresses {
		out = append(out, ip.String())
	}
	return append(out, leaf.DNSNames...)
}

// Roots are the trusted roots, DER.
func (c *Credentials) Roots() [][]byte { return c.current.Load().roots }

// PEM gives the three parts as text, for the contexts of the CLI and for tools
// such as curl.
func (c *Credentials) PEM() (certificate, key, roots []byte, err error) {
	m := c.current.Load()
	if key, err = m.keyPEM(); err != nil {
		return nil, nil, nil, fmt.Errorf("credentials: %w", err)
	}
	return certificatesPEM(m.chain), key, certificatesPEM(m.roots), nil
}
