package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	"github.com/persys-dev/persys/gateway"
	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/raftstore"
)

// certificates are files in a directory: ca.crt, and for each name its .crt and
// .key, good for 127.0.0.1.
type certificates struct {
	t      *testing.T
	dir    string
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

func newCertificates(t *testing.T) *certificates {
	t.Helper()
	c := &certificates{t: t, dir: t.TempDir()}
	c.ca = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	c.key = c.write("ca", c.ca, nil)
	return c
}

// issue gives a name a new certificate.
func (c *certificates) issue(name string) *certificates {
	c.t.Helper()
	c.serial++
	c.write(name, &x509.Certificate{
		SerialNumber: big.NewInt(100 + c.serial), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:    x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, c.key)
	return c
}

func (c *certificates) write(name string, template *x509.Certificate, by *ecdsa.PrivateKey) *ecdsa.PrivateKey {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if by == nil {
		by = key
	}
	der, err2 := x509.CreateCertificate(rand.Reader, template, c.ca, &key.PublicKey, by)
	keyDER, err3 := x509.MarshalECPrivateKey(key)
	if err := errors.Join(err, err2, err3,
		os.WriteFile(c.file(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(c.file(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600),
	); err != nil {
		c.t.Fatal(err)
	}
	return key
}

func (c *certificates) file(name string) string { return filepath.Join(c.dir, name) }

// client trusts the authority, and presents the name's certificate where there is
// one.
func (c *certificates) client(name string) *tls.Config {
	c.t.Helper()
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	data, err := os.ReadFile(c.file("ca.crt"))
	if err != nil || !config.RootCAs.AppendCertsFromPEM(data) {
		c.t.Fatal(err)
	}
	if name != "" {
		pair, err := tls.LoadX509KeyPair(c.file(name+".crt"), c.file(name+".key"))
		if err != nil {
			c.t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config
}

func TestEtcdConfig(t *testing.T) {
	x := newCertificates(t).issue("server")
	cert, key, ca := x.file("server.crt"), x.file("server.key"), x.file("ca.crt")
	for _, c := range []EtcdConfig{
		{},
		{Listen: "127.0.0.1:2379"}, {Listen: "localhost:2379"}, {Listen: "[::1]:2379"},
		{Listen: ":2379", CertFile: cert, KeyFile: key},
		{Listen: "db.example:2379", CertFile: cert, KeyFile: key, TrustedCAFile: ca, ClientCertAuth: true},
		{WatchProgress: 5 * time.Second, MaxRequestBytes: 1 << 20, MaxTxnOps: 1000, MaxStreams: 5, QuotaBytes: -1, AutoCompactionMode: "revision", AutoCompactionRetention: "1000"},
	} {
		got, err := c.withDefaults()
		if err != nil || got.MaxRequestBytes == 0 || got.MaxTxnOps == 0 || got.MaxStreams == 0 || got.WatchProgress == 0 {
			t.Errorf("%+v: %+v, %v", c, got, err)
		}
	}
	for want, c := range map[string]EtcdConfig{
		"0.0.0.0:2379 is not loopback":                     {Listen: "0.0.0.0:2379"},
		":2379 is not loopback":                            {Listen: ":2379"},
		"db.example:2379 is not loopback":                  {Listen: "db.example:2379"},
		"192.0.2.1:2379 is not loopback: whoever":          {Listen: "192.0.2.1:2379"},
		"allowed: from 100ms on":                           {WatchProgress: time.Millisecond},
		"without a scheme":                                 {Listen: "http://127.0.0.1:2379"},
		"such as 127.0.0.1:2379":                           {Listen: "127.0.0.1"},
		`"x" is not a port`:                                {Listen: "127.0.0.1:x"},
		`"0" is not a port`:                                {Listen: "127.0.0.1:0"},
		"belong together":                                  {Listen: "127.0.0.1:1", CertFile: cert},
		"need etcd_cert_file and etcd_key_file":            {Listen: "127.0.0.1:1", TrustedCAFile: ca},
		"etcd_client_cert_auth needs etcd_trusted_ca_file": {Listen: "127.0.0.1:1", CertFile: cert, KeyFile: key, ClientCertAuth: true},
		"etcd_listen: missing":                             {CertFile: cert, KeyFile: key},
		"no such file":                                     {Listen: "127.0.0.1:1", CertFile: cert + "x", KeyFile: key},
		"has no certificate":                               {Listen: "127.0.0.1:1", CertFile: cert, KeyFile: key, TrustedCAFile: key},
		"etcd_max_request_bytes: -1; allowed: 1 to":        {MaxRequestBytes: -1},
		"etcd_max_request_bytes: 1000000000; allowed":      {MaxRequestBytes: 1e9},
		"etcd_max_txn_ops: 1000000; allowed":               {MaxTxnOps: 1e6},
		"auto_compaction_mode":                             {AutoCompactionMode: "sometimes", AutoCompactionRetention: "1"},
	} {
		if _, err := c.withDefaults(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v\n got %v\nwant %s", c, err, want)
		}
	}
}

func TestEtcdURL(t *testing.T) {
	for want, c := range map[string]Config{
		"":                           {Advertise: "192.0.2.1"},
		"http://127.0.0.1:2379":      {Advertise: "192.0.2.1", Etcd: EtcdConfig{Listen: "127.0.0.1:2379"}},
		"https://192.0.2.1:2379":     {Advertise: "192.0.2.1", Etcd: EtcdConfig{Listen: ":2379", CertFile: "x"}},
		"https://192.0.2.2:2379":     {Advertise: "192.0.2.2", Etcd: EtcdConfig{Listen: "[::]:2379", CertFile: "x"}},
		"https://[2001:db8::1]:2379": {Advertise: "2001:db8::1", Etcd: EtcdConfig{Listen: "0.0.0.0:2379", CertFile: "x"}},
		"https://db.example:2379":    {Advertise: "192.0.2.1", Etcd: EtcdConfig{Listen: "db.example:2379", CertFile: "x"}},
	} {
		if got := c.etcdURL(); got != want {
			t.Errorf("%+v: %s, want %s", c.Etcd, got, want)
		}
	}
}

// runPort serves health over gRPC and "http" over HTTP until the test ends.
func runPort(t *testing.T, c EtcdConfig) (address string) {
	t.Helper()
	c.Listen = "127.0.0.1:1" // only its form counts
	c, err := c.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	p := &etcdPort{log: slog.New(slog.DiscardHandler)}
	if p.tls, err = c.tls(); err != nil {
		t.Fatal(err)
	}
	if p.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	p.grpc = grpc.NewServer(c.grpcOptions()...)
	healthpb.RegisterHealthServer(p.grpc, health.NewServer())
	p.http = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Proto)
	})}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the port does not close")
		}
	})
	return p.listener.Addr().String()
}

func healthy(t *testing.T, address string, creds credentials.TransportCredentials) error {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

func get(url string, config *tls.Config) (string, error) {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, DisableKeepAlives: true}}
	answer, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	return string(data), err
}

func TestEtcdPortPlain(t *testing.T) {
	address := runPort(t, EtcdConfig{})
	// Who says nothing, or half of it, keeps nobody waiting.
	for _, said := range []string{"", "P"} {
		silent, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		if _, err := io.WriteString(silent, said); err != nil {
			t.Fatal(err)
		}
	}
	if err := healthy(t, address, insecure.NewCredentials()); err != nil {
		t.Error(err)
	}
	if got, err := get("http://"+address, nil); err != nil || got != "HTTP/1.1" {
		t.Errorf("%q, %v", got, err)
	}
	garbage, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer garbage.Close()
	if _, err := io.WriteString(garbage, "\x16\x03\x01 hello\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(garbage); err != nil || !strings.Contains(string(answer), "400 Bad Request") {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestEtcdPortTLS(t *testing.T) {
	x := newCertificates(t).issue("server").issue("alice")
	address := runPort(t, EtcdConfig{CertFile: x.file("server.crt"), KeyFile: x.file("server.key"), TrustedCAFile: x.file("ca.crt")})
	alice := x.client("alice")
	if err := healthy(t, address, credentials.NewTLS(alice)); err != nil {
		t.Error(err)
	}
	// It offers HTTP/2 too, as curl does.
	if got, err := get("https://"+address, alice); err != nil || got != "HTTP/1.1" {
		t.Errorf("%q, %v", got, err)
	}
	if err := healthy(t, address, credentials.NewTLS(x.client(""))); err == nil {
		t.Error("served without a certificate")
	}
	if err := healthy(t, address, insecure.NewCredentials()); err == nil {
		t.Error("served without TLS")
	}
	serial := func() int64 {
		conn, err := tls.Dial("tcp", address, alice)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	before := serial()
	x.issue("server")
	if after := serial(); after == before {
		t.Error("a renewed certificate is not used")
	}
}

func TestCertUser(t *testing.T) {
	x := newCertificates(t).issue("alice")
	pair, err := tls.LoadX509KeyPair(x.file("alice.crt"), x.file("alice.key"))
	if err != nil {
		t.Fatal(err)
	}
	state := tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{pair.Leaf}}}
	with := func(info credentials.AuthInfo) context.Context {
		return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: info})
	}
	verified := with(credentials.TLSInfo{State: state})
	on := EtcdConfig{ClientCertAuth: true}
	for name, test := range map[string]struct {
		config EtcdConfig
		ctx    context.Context
		want   string
	}{
		"verified":            {on, verified, "alice"},
		"not asked for":       {EtcdConfig{}, verified, ""},
		"not verified":        {on, with(credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}}}), ""},
		"plain":               {on, with(nil), ""},
		"no peer":             {on, t.Context(), ""},
		"one of ours, not it": {on, gateway.WithIdentity(verified, pki.Identity{Name: "alice"}), ""},
	} {
		if got := test.config.certUser(test.ctx); got != test.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestEtcdErrors(t *testing.T) {
	other := errors.New("other")
	for err, want := range map[error]error{
		nil:                         nil,
		raftstore.ErrNoLeader:       rpctypes.ErrGRPCNoLeader,
		raftstore.ErrNotLeader:      rpctypes.ErrGRPCLeaderChanged,
		raftstore.ErrOutcomeUnknown: rpctypes.ErrGRPCTimeoutDueToLeaderFail,
		raftstore.ErrClosed:         rpctypes.ErrGRPCStopped,
		other:                       other,
	} {
		if got := etcdError(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
		if err != nil && want != other {
			if got := etcdError(fmt.Errorf("wrapped: %w", err)); got != want {
				t.Errorf("wrapped %v: %v", err, got)
			}
		}
	}
}

// Who lets everybody in is told so.
func TestEtcdPortAnnouncesHowOpenItIs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for want, p := range map[string]etcdPort{
		"WITHOUT ENCRYPTION": {anybody: true},
		"WITHOUT ASKING":     {anybody: true, tls: &tls.Config{}},
		"level=INFO":         {tls: &tls.Config{}},
	} {
		var out strings.Builder
		p.listener, p.log = l, slog.New(slog.NewTextHandler(&out, nil))
		p.announce()
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s: %s", want, out.String())
		}
	}
}
