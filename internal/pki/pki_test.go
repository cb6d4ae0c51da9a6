package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	server = pb.Role_ROLE_SERVER
	agent  = pb.Role_ROLE_AGENT
	admin  = pb.Role_ROLE_ADMIN
)

func newTestAuthority(t testing.TB, cluster string) *Authority {
	t.Helper()
	a, err := NewAuthority(cluster)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// issue makes credentials; a lifetime of a nanosecond makes expired ones,
// because certificates count in seconds.
func issue(t testing.TB, a *Authority, role pb.Role, name string, ttl time.Duration) *Credentials {
	t.Helper()
	key, csr, err := NewKeyAndCSR(name)
	if err != nil {
		t.Fatal(err)
	}
	chain, _, _, err := a.Issue(csr, Identity{a.cluster, role, name}, []string{"127.0.0.1"}, ttl)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCredentials(key, chain, a.Roots())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	switch {
	case text == "" && err != nil:
		t.Fatalf("unexpected error: %v", err)
	case text != "" && err == nil:
		t.Fatalf("no error, want one with %q", text)
	case text != "" && !strings.Contains(err.Error(), text):
		t.Fatalf("error is %q, want one with %q", err, text)
	}
}

func TestIdentity(t *testing.T) {
	for _, test := range []struct{ uri, err string }{
		{"spiffe://c1/server/s1", ""},
		{"spiffe://6f1c2f0e-9c1d-4f43-8a4c-0b1d4b1d2a11/agent/node-7", ""},
		{"spiffe://c1/admin/Alice.Smith_2", ""},
		{"https://c1/server/s1", "must begin with spiffe://"},
		{"spiffe://c1/server", "must be spiffe://<cluster>/<role>/<name>"},
		{"spiffe://c1/server/s1/x", "must be spiffe://<cluster>/<role>/<name>"},
		{"spiffe://c1/root/s1", `unknown role "root", known are server, agent`},
		{"spiffe://c1//s1", "unknown role"},
		{"spiffe:///server/s1", "cluster id"},
		{"spiffe://C1/server/s1", "cluster id"},
		{"spiffe://c1:80/server/s1", "cluster id"},
		{"spiffe://u@c1/server/s1", "cluster id"},
		{"spiffe://c1/server/", "name"},
		{"spiffe://c1/server/..", "name"},
		{"spiffe://c1/server/s%31", "name"},
		{"spiffe://c1/server/s1?x", "name"},
		{"spiffe://c1/server/s1#x", "name"},
		{"spiffe://c1/server/" + strings.Repeat("a", 254), "name"},
		{"spiffe://" + strings.Repeat("a", 256) + "/server/s1", "cluster id"},
	} {
		t.Run(test.uri, func(t *testing.T) {
			id, err := ParseIdentity(test.uri)
			wantError(t, err, test.err)
			if err == nil && (id.URI() != test.uri || id.url().String() != test.uri) {
				t.Fatalf("written again it is %s and %s", id.URI(), id.url())
			}
		})
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://c1/server/s1")
	f.Add("spiffe://c1/agent/%2e")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := ParseIdentity(uri)
		if err == nil && id.URI() != uri {
			t.Fatalf("%q and %q are one identity", uri, id.URI())
		}
	})
}

func TestIssue(t *testing.T) {
	a := newTestAuthority(t, "c1")
	key, csr, err := NewKeyAndCSR("whatever")
	if err != nil {
		t.Fatal(err)
	}
	chain, serial, notAfter, err := a.Issue(csr, Identity{"c1", server, "s1"}, []string{"127.0.0.1", "s1.Example.com", "::1", "127.0.0.1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.SerialNumber.Text(16) != serial || !leaf.NotAfter.Equal(notAfter) {
		t.Errorf("serial %s and end %s, the certificate has %s and %s", serial, notAfter, leaf.SerialNumber.Text(16), leaf.NotAfter)
	}
	if left := time.Until(notAfter); left < 59*time.Minute || left > time.Hour {
		t.Errorf("%s left of an hour", left)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("CA %v, key usage %b", leaf.IsCA, leaf.KeyUsage)
	}
	if !slices.Equal(leaf.DNSNames, []string{"s1.example.com"}) || len(leaf.IPAddresses) != 2 {
		t.Errorf("names %v, addresses %v", leaf.DNSNames, leaf.IPAddresses)
	}
	c, err := NewCredentials(key, chain, a.Roots())
	if err != nil {
		t.Fatal(err)
	}
	if c.Identity() != (Identity{"c1", server, "s1"}) || !c.NotAfter().Equal(notAfter) {
		t.Errorf("credentials are of %s until %s", c.Identity().URI(), c.NotAfter())
	}
	if want := []string{"127.0.0.1", "::1", "s1.example.com"}; !slices.Equal(c.Addresses(), want) {
		t.Errorf("addresses %v, want %v", c.Addresses(), want)
	}

	_, _, notAfter, err = a.Issue(csr, Identity{"c1", agent, "a1"}, nil, 100*365*24*time.Hour)
	if err != nil || notAfter.After(a.root.NotAfter) {
		t.Errorf("a certificate until %s (%v), the root ends %s", notAfter, err, a.root.NotAfter)
	}
}

// What the request says beside its key must not get into the certificate.
func TestIssueIgnoresNamesOfRequest(t *testing.T) {
	a := newTestAuthority(t, "c1")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wish := Identity{"c1", admin, "mallory"}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		DNSNames: []string{"s1.example.com"}, URIs: append(a.root.URIs, wish.url()),
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, _, _, err := a.Issue(csr, Identity{"c1", agent, "a1"}, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := identityOf(leaf)
	if err != nil || id != (Identity{"c1", agent, "a1"}) || len(leaf.DNSNames) != 0 {
		t.Fatalf("identity %v (%v), names %v", id, err, leaf.DNSNames)
	}
	if slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		t.Error("an agent's certificate may answer as a server")
	}
}

func TestIssueRefuses(t *testing.T) {
	a := newTestAuthority(t, "c1")
	_, good, err := NewKeyAndCSR("n")
	if err != nil {
		t.Fatal(err)
	}
	// The last bytes are the signature's.
	forged := slices.Clone(good)
	forged[len(forged)-1] ^= 1
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request := func(key any) []byte {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	ours := Identity{"c1", agent, "a1"}
	for _, test := range []struct {
		name      string
		csr       []byte
		id        Identity
		addresses []string
		ttl       time.Duration
		err       string
	}{
		{"nothing wrong", good, ours, nil, time.Hour, ""},
		{"no request", nil, ours, nil, time.Hour, "certificate request"},
		{"giant request", make([]byte, maxCSR+1), ours, nil, time.Hour, "at most 16384 are allowed"},
		{"another's key", forged, ours, nil, time.Hour, "does not prove possession"},
		{"RSA", request(rsaKey), ours, nil, time.Hour, "must be ECDSA P-256"},
		{"P-384", request(p384), ours, nil, time.Hour, "must be ECDSA P-256"},
		{"other cluster", good, Identity{"c2", agent, "a1"}, nil, time.Hour, "identity is of cluster c2, the authority of cluster c1"},
		{"no role", good, Identity{"c1", 0, "a1"}, nil, time.Hour, "unknown role"},
		{"name with a slash", good, Identity{"c1", agent, "a/1"}, nil, time.Hour, `name "a/1"`},
		{"no lifetime", good, ours, nil, 0, "not positive"},
		{"wildcard", good, ours, []string{"*.example.com"}, time.Hour, "neither an IP address nor a DNS name"},
		{"misspelt IP", good, ours, []string{"127.0.0.256"}, time.Hour, "neither an IP address nor a DNS name"},
		{"with port", good, ours, []string{"127.0.0.1:80"}, time.Hour, "neither an IP address nor a DNS name"},
		{"empty address", good, ours, []string{""}, time.Hour, "neither an IP address nor a DNS name"},
		{"unspecified", good, ours, []string{"0.0.0.0"}, time.Hour, "cannot be in a certificate"},
		{"too many", good, ours, make([]string, maxAddresses+1), time.Hour, "at most 64 are allowed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, _, _, err := a.Issue(test.csr, test.id, test.addresses, test.ttl)
			wantError(t, err, test.err)
		})
	}
}

func TestAuthorityOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	if _, err := LoadAuthority(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("of an empty place: %v", err)
	}
	a := newTestAuthority(t, "c1")
	for range 2 { // the second replaces the first
		if err := a.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	checkOnlyFile(t, dir, authorityFile)
	b, err := LoadAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b.ClusterID() != "c1" || !b.key.Equal(a.key) || !slices.EqualFunc(a.Roots(), b.Roots(), bytes.Equal) {
		t.Error("another authority was read than was written")
	}
	if !slices.EqualFunc(a.Pins(), b.Pins(), bytes.Equal) || len(a.Pins()[0]) != 32 {
		t.Error("pins differ")
	}
}

func checkOnlyFile(t *testing.T, dir, name string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name() != name {
		t.Fatalf("%s holds %v, want only %s", dir, entries, name)
	}
	info, err := entries[0].Info()
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("%s has mode %o", name, info.Mode())
	}
	if info, err = os.Stat(dir); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("%s has mode %o (%v)", dir, info.Mode(), err)
	}
}

func TestFromKey(t *testing.T) {
	a, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	key, err := a.Key()
	if err != nil {
		t.Fatal(err)
	}
	leaf := issue(t, a, agent, "a1", time.Hour).current.Load().chain
	for _, test := range []struct {
		name  string
		key   []byte
		roots [][]byte
		err   string
	}{
		{"its own", key, a.Roots(), ""},
		{"one of two roots", key, append(newTestAuthority(t, "c1").Roots(), a.Roots()...), ""},
		{"no roots", key, nil, "no root certificate"},
		{"other root", key, newTestAuthority(t, "c1").Roots(), "belongs to none of the roots"},
		{"roots of two clusters", key, append(a.Roots(), other.Roots()...), "roots of two clusters: c1 and c2"},
		{"leaf for a root", key, leaf, "not a self-signed root"},
		{"no key", nil, a.Roots(), "private key"},
		{"garbage", key, [][]byte{[]byte("x")}, "root certificate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, err := FromKey(test.key, test.roots)
			wantError(t, err, test.err)
			if err != nil {
				return
			}
			// What it issues is accepted by those who trust the first one.
			c := issue(t, b, agent, "a2", time.Hour).current.Load()
			if _, err := NewCredentials(c.key, c.chain, a.Roots()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCredentialsOnDisk(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadCredentials(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("of an empty place: %v", err)
	}
	a := newTestAuthority(t, "c1")
	c := issue(t, a, agent, "a1", time.Hour)
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(dir); err != nil {
		t.Fatal(err)
	}
	checkOnlyFile(t, dir, credentialsFile)
	d, err := LoadCredentials(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d.Identity() != c.Identity() || !slices.EqualFunc(c.Roots(), d.Roots(), bytes.Equal) {
		t.Error("other credentials were read than were written")
	}

	certificate, key, roots, err := c.PEM()
	if err != nil {
		t.Fatal(err)
	}
	e, err := CredentialsFromPEM(certificate, bytes.TrimSpace(key), roots)
	if err != nil || e.Identity() != c.Identity() {
		t.Errorf("from PEM: %v", err)
	}

	// A file that was cut off, at any place, is never taken for a whole one.
	path := filepath.Join(dir, credentialsFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := CredentialsFromPEM(whole, whole, whole); err != nil || e.Identity() != c.Identity() {
		t.Errorf("one file as all three parts: %v", err)
	}
	if _, err := CredentialsFromPEM([]byte("garbage"), key, whole); err == nil {
		t.Error("garbage is taken for a certificate")
	}
	for n := 0; n < len(bytes.TrimSpace(whole)); n += 7 {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadCredentials(dir); err == nil {
			t.Fatalf("%d of %d bytes are accepted", n, len(whole))
		}
	}
}

// Where the directory cannot be written the old file stays and nothing is left.
func TestSaveFails(t *testing.T) {
	dir := t.TempDir()
	a := newTestAuthority(t, "c1")
	if err := os.Mkdir(filepath.Join(dir, credentialsFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := issue(t, a, agent, "a1", time.Hour).Save(dir); err == nil {
		t.Fatal("a directory was replaced")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("left behind: %v (%v)", entries, err)
	}
}

func TestNewCredentialsRefuses(t *testing.T) {
	a, same, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	m := issue(t, a, agent, "a1", time.Hour).current.Load()
	n := issue(t, a, agent, "a2", time.Hour).current.Load()
	for _, test := range []struct {
		name         string
		key          *ecdsa.PrivateKey
		chain, roots [][]byte
		err          string
	}{
		{"nothing wrong", m.key, m.chain, m.roots, ""},
		{"no key", nil, m.chain, m.roots, "no key"},
		{"no certificate", m.key, nil, m.roots, "no certificate"},
		{"no roots", m.key, m.chain, nil, "no root certificate"},
		{"key of another", n.key, m.chain, m.roots, "certificate of agent/a1 is not for this key"},
		{"roots of another cluster", m.key, m.chain, other.Roots(), "certificate is of cluster c1, the roots of cluster c2"},
		{"another root of this cluster", m.key, m.chain, same.Roots(), "unknown authority"},
		{"root for a leaf", m.key, m.roots, m.roots, `identity "spiffe://c1"`},
		{"garbage", m.key, [][]byte{[]byte("x")}, m.roots, "certificate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := NewCredentials(test.key, test.chain, test.roots)
			wantError(t, err, test.err)
		})
	}
	c := issue(t, a, agent, "a1", time.Hour)
	wantError(t, c.Replace(n.key, n.chain, n.roots), "spiffe://c1/agent/a1 cannot become spiffe://c1/agent/a2")
	if c.Identity().Name != "a1" {
		t.Error("replaced although it was refused")
	}
}

func FuzzParseBundle(f *testing.F) {
	a := newTestAuthority(f, "c1")
	certificate, key, roots, err := issue(f, a, agent, "a1", time.Hour).PEM()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slices.Concat(key, certificate, roots))
	f.Add(key)
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBundle(data)
		if err == nil && b.key == nil {
			t.Fatal("accepted without a key")
		}
		if err == nil {
			_, _ = NewCredentials(b.key, b.chain, b.roots) // must not panic
		}
	})
}
