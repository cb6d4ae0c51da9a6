package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// EtcdConfig is how etcd's clients are served. They always are on the gRPC port,
// with certificates of the cluster; Listen is for those that have none.
type EtcdConfig struct {
	// Listen is HOST:PORT; empty: there is no such port. Without a certificate
	// HOST must be loopback.
	Listen string `yaml:"etcd_listen"`
	// CertFile and KeyFile (PEM) make the port speak TLS.
	CertFile string `yaml:"etcd_cert_file"`
	KeyFile  string `yaml:"etcd_key_file"`
	// TrustedCAFile (PEM) has the authorities that clients' certificates must come
	// from; without it none is asked for.
	TrustedCAFile string `yaml:"etcd_trusted_ca_file"`
	// ClientCertAuth takes the common name of a client's certificate for the name
	// of a user of etcd's auth.
	ClientCertAuth bool `yaml:"etcd_client_cert_auth"`

	// What follows is for all ports. MaxRequestBytes bounds a request, default
	// 1.5 MiB; MaxTxnOps the operations of a transaction, default 128; MaxStreams
	// the calls that are open on one connection, default 10,000.
	MaxRequestBytes int `yaml:"etcd_max_request_bytes"`
	MaxTxnOps       int `yaml:"etcd_max_txn_ops"`
	MaxStreams      int `yaml:"etcd_max_streams"`
	// WatchProgress is how often watchers that asked for it, and have no events, are
	// told how far they are; at least 100 ms, default 10 min.
	WatchProgress time.Duration `yaml:"etcd_watch_progress_notify_interval"`
	// QuotaBytes bounds the keys and values that are kept; 0: 8 GiB, negative: not
	// at all.
	QuotaBytes int64 `yaml:"etcd_quota_bytes"`
	// AutoCompactionMode and AutoCompactionRetention say how much of the past is
	// kept, as in etcd; see retention.
	AutoCompactionMode      string `yaml:"auto_compaction_mode"`
	AutoCompactionRetention string `yaml:"auto_compaction_retention"`
}

// What etcd has as its defaults, but for MaxStreams, which it does not bound.
const (
	defaultMaxRequestBytes = 1.5 * 1024 * 1024
	defaultMaxTxnOps       = 128
	defaultMaxStreams      = 10_000
	defaultWatchProgress   = 10 * time.Minute
	// A transaction travels between servers in one message, with others.
	mostRequestBytes = maxMessage / 4
	mostTxnOps       = 100_000
	mostStreams      = 1_000_000
)

func (c EtcdConfig) withDefaults() (EtcdConfig, error) {
	for _, n := range []struct {
		field          string
		value          *int
		standard, most int
	}{
		{"etcd_max_request_bytes", &c.MaxRequestBytes, defaultMaxRequestBytes, mostRequestBytes},
		{"etcd_max_txn_ops", &c.MaxTxnOps, defaultMaxTxnOps, mostTxnOps},
		{"etcd_max_streams", &c.MaxStreams, defaultMaxStreams, mostStreams},
	} {
		if *n.value == 0 {
			*n.value = n.standard
		}
		if *n.value < 1 || *n.value > n.most {
			return c, fmt.Errorf("%s: %d; allowed: 1 to %d", n.field, *n.value, n.most)
		}
	}
	if c.WatchProgress == 0 {
		c.WatchProgress = defaultWatchProgress
	}
	if c.WatchProgress < 100*time.Millisecond {
		return c, fmt.Errorf("etcd_watch_progress_notify_interval: %s; allowed: from 100ms on", c.WatchProgress)
	}
	if _, err := retention(c.AutoCompactionMode, c.AutoCompactionRetention); err != nil {
		return c, err
	}
	return c, c.checkListen()
}

// checkListen refuses a port that anybody in the network could use.
func (c EtcdConfig) checkListen() error {
	if c.Listen == "" {
		if c.CertFile != "" || c.KeyFile != "" || c.TrustedCAFile != "" || c.ClientCertAuth {
			return fmt.Errorf("etcd_listen: missing; the certificates for etcd's clients are for the port that it names")
		}
		return nil
	}
	if strings.Contains(c.Listen, "://") {
		return fmt.Errorf("etcd_listen: %q; allowed: HOST:PORT, without a scheme", c.Listen)
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return fmt.Errorf("etcd_listen: %q; allowed: HOST:PORT, such as 127.0.0.1:2379", c.Listen)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("etcd_listen: %q is not a port; allowed: 1 to 65535", port)
	}
	switch {
	case (c.CertFile == "") != (c.KeyFile == ""):
		return fmt.Errorf("etcd_cert_file and etcd_key_file belong together: give both, or neither")
	case c.CertFile == "" && (c.TrustedCAFile != "" || c.ClientCertAuth):
		return fmt.Errorf("etcd_trusted_ca_file and etcd_client_cert_auth need etcd_cert_file and etcd_key_file: without a certificate of its own the port is plain")
	case c.ClientCertAuth && c.TrustedCAFile == "":
		return fmt.Errorf("etcd_client_cert_auth needs etcd_trusted_ca_file: the authority of the clients' certificates")
	case c.CertFile == "" && !isLoopback(host):
		return fmt.Errorf("etcd_listen: %s is not loopback: whoever reaches it could do anything; give etcd_cert_file and etcd_key_file, "+
			"or leave it out and use the gRPC port, which speaks etcd with the cluster's certificates", c.Listen)
	}
	_, err = c.tls()
	return err
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// etcdURL is where etcd's clients find the port, as far as this server can tell;
// empty where there is none.
func (c Config) etcdURL() string {
	if c.Etcd.Listen == "" {
		return ""
	}
	host, port, _ := net.SplitHostPort(c.Etcd.Listen) // checked in checkListen
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = c.Advertise
	}
	scheme := "http"
	if c.Etcd.CertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// tls is nil for a plain port. The files are read with each handshake, so that
// certificates can be renewed while the server runs.
func (c EtcdConfig) tls() (*tls.Config, error) {
	if c.CertFile == "" {
		return nil, nil
	}
	if _, err := c.loadTLS(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.loadTLS() },
	}, nil
}

func (c EtcdConfig) loadTLS() (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("etcd_cert_file, etcd_key_file: %w", err)
	}
	// gRPC clients offer h2 and nothing else; who offers HTTP/1.1 too, as curl
	// does, wants JSON.
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{certificate}, NextProtos: []string{"http/1.1", "h2"}}
	if c.TrustedCAFile == "" {
		return config, nil
	}
	pem, err := os.ReadFile(c.TrustedCAFile)
	if err != nil {
		return nil, fmt.Errorf("etcd_trusted_ca_file: %w", err)
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("etcd_trusted_ca_file: %s has no certificate", c.TrustedCAFile)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	return config, nil
}
