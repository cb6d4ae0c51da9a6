package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	authorityFile = "authority.pem"
	rootLifetime  = 10 * 365 * 24 * time.Hour
	// Certificates begin in the past, so that a machine whose clock is behind
	// can use what it was just given.
	backdate = time.Hour
	// A request is a key, a signature and a name; more is not a request.
	maxCSR = 16 << 10
	// Addresses in one certificate.
	maxAddresses = 64
)

// Authority issues the certificates of one cluster. It is immutable and safe
// for concurrent use.
type Authority struct {
	cluster string
	key     *ecdsa.PrivateKey
	root    *x509.Certificate   // the one whose key it holds
	roots   []*x509.Certificate // all that are trusted; root is among them
}

// NewAuthority makes the key and the self-signed root of a new cluster.
func NewAuthority(clusterID string) (*Authority, error) {
	if err := validateCluster(clusterID); err != nil {
		return nil, fmt.Errorf("new authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("new authority: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("new authority: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Persys"}, CommonName: rootName(clusterID)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            1, // room for one intermediate
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: clusterID}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("new authority: %w", err)
	}
	return newAuthority(key, [][]byte{der})
}

// X.520 bounds a common name to 64 characters; the full id is in the URI.
func rootName(clusterID string) string {
	const prefix = "Persys CA "
	return prefix + clusterID[:min(len(clusterID), 64-len(prefix))]
}

// FromKey makes the authority of a server that was given the issuing key
// (PKCS #8) and the roots (DER) when it joined.
func FromKey(key []byte, roots [][]byte) (*Authority, error) {
	parsed, err := parseKey(key)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	return newAuthority(parsed, roots)
}

// LoadAuthority reads what Save wrote. Where there is none the error is
// fs.ErrNotExist.
func LoadAuthority(dir string) (*Authority, error) {
	path := filepath.Join(dir, authorityFile)
	b, err := readBundle(path)
	if err != nil {
		return nil, fmt.Errorf("load authority: %w", err)
	}
	if len(b.chain) != 0 {
		return nil, fmt.Errorf("load authority: %s holds a certificate that is not a root", path)
	}
	a, err := newAuthority(b.key, b.roots)
	if err != nil {
		return nil, fmt.Errorf("load authority: %s: %w", path, err)
	}
	return a, nil
}

func newAuthority(key *ecdsa.PrivateKey, roots [][]byte) (*Authority, error) {
	parsed, cluster, err := parseRoots(roots)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	for _, root := range parsed {
		if key.PublicKey.Equal(root.PublicKey) {
			return &Authority{cluster: cluster, key: key, root: root, roots: parsed}, nil
		}
	}
	return nil, errors.New("authority: the key belongs to none of the roots")
}

// Save writes key and roots to the directory, readable by the owner only, in
// one step.
func (a *Authority) Save(dir string) error {
	b := bundle{key: a.key, roots: a.Roots()}
	if err := b.write(filepath.Join(dir, authorityFile)); err != nil {
		return fmt.Errorf("save authority: %w", err)
	}
	return nil
}

// ClusterID is the cluster it issues for.
func (a *Authority) ClusterID() string { return a.cluster }

// Key is the issuing key as PKCS #8, for a server that joins.
func (a *Authority) Key() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	return key, nil
}

// Roots are the trusted roots, DER.
func (a *Authority) Roots() [][]byte { return rawOf(a.roots) }

// Pins are the SHA-256 of each root's SubjectPublicKeyInfo, for join tokens.
func (a *Authority) Pins() [][]byte {
	pins := make([][]byte, len(a.roots))
	for i, root := range a.roots {
		pins[i] = pinOf(root)
	}
	return pins
}

func pinOf(cert *x509.Certificate) []byte {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return sum[:]
}

// Issue makes a certificate for the key of a certificate request (PKCS #10,
// DER). Of the request only the key counts, and the proof that the requester
// holds it; identity, addresses (IP addresses and DNS names) and lifetime are
// the caller's. Only servers get a certificate that others accept from the
// answering side of a connection. It returns the chain (DER, leaf first,
// without the root), the serial number in hex, and the end of its life, which
// is no later than the root's.
func (a *Authority) Issue(csr []byte, id Identity, addresses []string, ttl time.Duration) (chain [][]byte, serial string, notAfter time.Time, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("issue certificate for %s: %w", id, err)
		}
	}()
	if err := id.Validate(); err != nil {
		return nil, "", time.Time{}, err
	}
	if id.Cluster != a.cluster {
		return nil, "", time.Time{}, fmt.Errorf("identity is of cluster %s, the authority of cluster %s", id.Cluster, a.cluster)
	}
	if ttl <= 0 {
		return nil, "", time.Time{}, fmt.Errorf("lifetime %s is not positive", ttl)
	}
	public, err := verifyRequest(csr)
	if err != nil {
		return nil, "", time.Time{}, err
	}
	number, err := newSerial()
	if err != nil {
		return nil, "", time.Time{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          number,
		Subject:               pkix.Name{Organization: []string{"Persys"}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(ttl),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:                  []*url.URL{id.url()},
	}
	if name := id.String(); len(name) <= 64 {
		template.Subject.CommonName = name // for people who look at it; never read
	}
	if id.Role == pb.Role_ROLE_SERVER {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if template.NotAfter.After(a.root.NotAfter) {
		template.NotAfter = a.root.NotAfter
	}
	if err := addAddresses(template, addresses); err != nil {
		return nil, "", time.Time{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, public, a.key)
	if err != nil {
		return nil, "", time.Time{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, "", time.Time{}, err
	}
	return [][]byte{der}, hex.EncodeToString(number.Bytes()), leaf.NotAfter, nil
}

// verifyRequest returns the key that the request proves to hold. The kind of
// key is looked at before its signature, so that nobody is made to check a
// signature of a giant RSA key.
func verifyRequest(csr []byte) (*ecdsa.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, fmt.Errorf("certificate request has %d bytes, at most %d are allowed", len(csr), maxCSR)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	public, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("certificate request: the key must be ECDSA P-256")
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request does not prove possession of its key: %w", err)
	}
	return public, nil
}

func addAddresses(template *x509.Certificate, addresses []string) error {
	if len(addresses) > maxAddresses {
		return fmt.Errorf("%d addresses, at most %d are allowed", len(addresses), maxAddresses)
	}
	seen := make(map[string]bool)
	for _, address := range addresses {
		ip, err := netip.ParseAddr(address)
		if err == nil {
			ip = ip.Unmap()
			if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
				return fmt.Errorf("address %q cannot be in a certificate", address)
			}
			if !seen[ip.String()] {
				seen[ip.String()] = true
				template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
			}
			continue
		}
		name := strings.ToLower(address)
		if !isHostName(name) {
			return fmt.Errorf("address %q is neither an IP address nor a DNS name", address)
		}
		if !seen[name] {
			seen[name] = true
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return nil
}

// isHostName accepts plain lower case host names: no wildcards, no final dot,
// and no last label of digits alone, which would be a misspelt IP address.
func isHostName(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !lowerOrDigit(c) && c != '-' {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// newSerial is random and positive; RFC 5280 allows 20 bytes.
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40 // positive, and always of the same length
	return new(big.Int).SetBytes(b), nil
}

// parseRoots checks that all are self-signed roots of one cluster.
func parseRoots(ders [][]byte) (roots []*x509.Certificate, cluster string, err error) {
	if len(ders) == 0 {
		return nil, "", errors.New("there is no root certificate")
	}
	for _, der := range ders {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, "", fmt.Errorf("root certificate: %w", err)
		}
		if !isRoot(root) {
			return nil, "", fmt.Errorf("certificate %q is not a self-signed root", root.Subject)
		}
		of, err := clusterOfRoot(root)
		if err != nil {
			return nil, "", err
		}
		if cluster != "" && of != cluster {
			return nil, "", fmt.Errorf("roots of two clusters: %s and %s", cluster, of)
		}
		cluster = of
		roots = append(roots, root)
	}
	return roots, cluster, nil
}

func clusterOfRoot(root *x509.Certificate) (string, error) {
	if len(root.URIs) != 1 {
		return "", fmt.Errorf("root %q names no cluster", root.Subject)
	}
	cluster, ok := strings.CutPrefix(root.URIs[0].String(), "spiffe://")
	if !ok || validateCluster(cluster) != nil {
		return "", fmt.Errorf("root %q names no cluster", root.Subject)
	}
	return cluster, nil
}

func isRoot(cert *x509.Certificate) bool {
	return cert.IsCA && bytes.Equal(cert.RawSubject, cert.RawIssuer) && cert.CheckSignatureFrom(cert) == nil
}

func rawOf(certs []*x509.Certificate) [][]byte {
	raw := make([][]byte, len(certs))
	for i, cert := range certs {
		raw[i] = cert.Raw
	}
	return raw
}
