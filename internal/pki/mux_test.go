package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long anything may take before a test gives up.
const patience = 20 * time.Second

// journal is a log that can be waited for.
type journal struct {
	mutex   sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newJournal() *journal { return &journal{changed: make(chan struct{})} }

func (j *journal) Write(line []byte) (int, error) {
	j.mutex.Lock()
	defer j.mutex.Unlock()
	close(j.changed)
	j.changed = make(chan struct{})
	return j.text.Write(line)
}

func (j *journal) logger() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

func (j *journal) waitFor(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(patience)
	for {
		j.mutex.Lock()
		found, all, changed := strings.Contains(j.text.String(), text), j.text.String(), j.changed
		j.mutex.Unlock()
		if found {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("the log never says %q, only:\n%s", text, all)
		}
	}
}

type running struct {
	*Mux
	address string
	log     *journal
	// Ends Run and returns its answer.
	stop func() error
}

// startMux runs a Mux whose listeners greet with their protocol's first letter
// and then send back what they get.
func startMux(t *testing.T, creds *Credentials, options MuxOptions) running {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := startMuxOn(t, listener, creds, options)
	for greeting, l := range map[string]net.Listener{"r": r.Raft(), "h": r.GRPC()} {
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					if _, err := io.WriteString(conn, greeting); err == nil {
						_, _ = io.Copy(conn, conn)
					}
				}()
			}
		}()
	}
	return r
}

func startMuxOn(t *testing.T, listener net.Listener, creds *Credentials, options MuxOptions) running {
	t.Helper()
	log := newJournal()
	options.Logger = log.logger()
	ctx, cancel := context.WithCancel(context.Background())
	m := NewMux(listener, creds, options)
	done := make(chan struct{})
	var answer error
	go func() {
		answer = m.Run(ctx)
		close(done)
	}()
	stop := func() error {
		cancel()
		select {
		case <-done:
			return answer
		case <-time.After(patience):
			return errors.New("Run does not end")
		}
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return running{m, listener.Addr().String(), log, stop}
}

// dial opens a connection from the given address.
func dial(t *testing.T, from, to string) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func greeting(conn net.Conn) (string, error) {
	b := make([]byte, 1)
	_, err := io.ReadFull(conn, b)
	return string(b), err
}

func echo(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, err := greeting(conn); err != nil || got != "x" {
		t.Fatalf("sent x, got %q, %v", got, err)
	}
}

func TestMux(t *testing.T) {
	ours, other := newTestAuthority(t, "c1"), newTestAuthority(t, "c2")
	s1, s2, a1 := issue(t, ours, server, "s1", time.Hour), issue(t, ours, server, "s2", time.Hour), issue(t, ours, agent, "a1", time.Hour)
	m := startMux(t, s1, MuxOptions{HandshakeTimeout: 10 * time.Second})
	// Callers that would take anybody, so that the Mux is what refuses.
	as := func(c *Credentials, alpn ...string) *tls.Config {
		config := c.ClientTLS(nil, alpn...)
		config.VerifyConnection = nil
		return config
	}
	anonymous := func(alpn ...string) *tls.Config { return PinnedTLS(ours.Pins(), alpn...) }
	for _, test := range []struct {
		name     string
		client   *tls.Config
		greeting string
		log      string
	}{
		{"agent, gRPC", as(a1, ALPNGRPC), "h", ""},
		{"server, gRPC", as(s2, ALPNGRPC), "h", ""},
		{"nobody, gRPC", anonymous(ALPNGRPC), "h", ""},
		{"server, raft", as(s2, ALPNRaft), "r", ""},
		{"itself, raft", as(s1, ALPNRaft), "r", ""},
		{"agent, raft", as(a1, ALPNRaft), "", "raft: agent/a1 does not have role server"},
		{"admin, raft", as(issue(t, ours, admin, "al", time.Hour), ALPNRaft), "", "raft: admin/al does not have role server"},
		{"nobody, raft", anonymous(ALPNRaft), "", "raft: no certificate was presented"},
		{"other cluster, raft", as(issue(t, other, server, "s9", time.Hour), ALPNRaft), "", "server/s9 is of cluster c2, this is cluster c1"},
		{"other cluster, gRPC", as(issue(t, other, agent, "a9", time.Hour), ALPNGRPC), "", "agent/a9 is of cluster c2, this is cluster c1"},
		{"other root, gRPC", as(issue(t, newTestAuthority(t, "c1"), agent, "a8", time.Hour), ALPNGRPC), "", "certificate of agent/a8 is not signed by the authority of this cluster"},
		{"expired, raft", as(issue(t, ours, server, "s7", 1), ALPNRaft), "", "certificate of server/s7 expired at"},
		{"expired, gRPC", as(issue(t, ours, agent, "a7", 1), ALPNGRPC), "", "certificate of agent/a7 expired at"},
		{"no protocol", as(s2), "", "the caller speaks neither h2 nor persys-raft"},
		{"unknown protocol", as(s2, "spdy"), "", "unsupported application protocols"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := tls.Client(dial(t, "127.0.0.1", m.address), test.client)
			got, err := greeting(conn)
			if got != test.greeting && err == nil || (err == nil) != (test.greeting != "") {
				t.Fatalf("greeting %q, %v, want %q", got, err, test.greeting)
			}
			if test.log != "" {
				m.log.waitFor(t, test.log)
			}
		})
	}
	t.Run("not TLS", func(t *testing.T) {
		conn := dial(t, "127.0.0.1", m.address)
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the connection stays open")
		}
		m.log.waitFor(t, "first record does not look like a TLS handshake")
	})
}

// A caller that says nothing is shut out after the time-out, and one that is
// slow in the middle of its handshake too.
func TestMuxSlowHandshake(t *testing.T) {
	a := newTestAuthority(t, "c1")
	m := startMux(t, issue(t, a, server, "s1", time.Hour), MuxOptions{HandshakeTimeout: 50 * time.Millisecond})
	for name, words := range map[string]string{"silent": "", "stuck": "\x16\x03\x01\x02\x00\x01"} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, "127.0.0.1", m.address)
			if _, err := io.WriteString(conn, words); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the connection stays open")
			}
			m.log.waitFor(t, "handshake: context deadline exceeded")
		})
	}
}

// One address that opens connections and says nothing neither keeps others out
// nor gets more than its share; what it opened too much is closed.
func TestMuxBounds(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1, a1 := issue(t, a, server, "s1", time.Hour), issue(t, a, agent, "a1", time.Hour)
	m := startMux(t, s1, MuxOptions{Handshakes: 4, PerAddress: 3, Total: 5})
	greet := func(from string) (net.Conn, error) {
		conn := tls.Client(dial(t, from, m.address), a1.ClientTLS(nil, ALPNGRPC))
		_, err := greeting(conn)
		return conn, err
	}
	var silent []net.Conn
	for range 3 {
		silent = append(silent, dial(t, "127.0.0.2", m.address))
	}
	if _, err := greet("127.0.0.2"); err == nil {
		t.Fatal("a fourth connection from one address is taken")
	}
	m.log.waitFor(t, "3 connections are open from 127.0.0.2")
	// The silent ones hold one place for handshakes of the four.
	one, err := greet("127.0.0.3")
	if err != nil {
		t.Fatalf("kept out by another address: %v", err)
	}
	if _, err := greet("127.0.0.3"); err != nil {
		t.Fatalf("kept out by another address: %v", err)
	}
	if _, err := greet("127.0.0.4"); err == nil {
		t.Fatal("a sixth connection is taken")
	}
	// What is closed makes room.
	one.Close()
	for _, conn := range silent {
		conn.Close()
	}
	waitUntil(t, func() bool { return m.open() == 1 })
	if _, err := greet("127.0.0.2"); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return m.addresses() == 2 })
}

func (m *Mux) open() int {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return m.total
}

// addresses is how many are remembered.
func (m *Mux) addresses() int {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return len(m.sources)
}

// waitUntil is for what has nothing to wait on.
func waitUntil(t *testing.T, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the condition never holds")
		}
	}
}

// The end of Run ends what has not been handed over, and nothing else.
func TestMuxDrains(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1, a1 := issue(t, a, server, "s1", time.Hour), issue(t, a, agent, "a1", time.Hour)
	m := startMux(t, s1, MuxOptions{})
	established := tls.Client(dial(t, "127.0.0.1", m.address), a1.ClientTLS(nil, ALPNGRPC))
	if got, err := greeting(established); err != nil || got != "h" {
		t.Fatal(got, err)
	}
	silent := dial(t, "127.0.0.1", m.address)
	waitUntil(t, func() bool { return m.open() == 2 })
	if err := m.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := greeting(silent); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a handshake under way goes on: %v", err)
	}
	echo(t, established)
	if conn, err := net.Dial("tcp", m.address); err == nil {
		conn.Close()
		t.Error("the port still accepts")
	}
	for _, l := range []net.Listener{m.Raft(), m.GRPC()} {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after the end: %v", err)
		}
	}
	established.Close()
	waitUntil(t, func() bool { return m.open() == 0 })
}

// A connection that nobody accepts does not stay for ever, and one protocol
// that has stopped does not stop the other.
func TestMuxNobodyAccepts(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1 := issue(t, a, server, "s1", time.Hour)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := startMuxOn(t, listener, s1, MuxOptions{HandshakeTimeout: 200 * time.Millisecond})
	conn := tls.Client(dial(t, "127.0.0.1", m.address), s1.ClientTLS(nil, ALPNRaft))
	if _, err := greeting(conn); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody accepts, and yet: %v", err)
	}
	m.log.waitFor(t, "waiting to be accepted")
	if err := m.GRPC().Close(); err != nil {
		t.Fatal(err)
	}
	conn = tls.Client(dial(t, "127.0.0.1", m.address), s1.ClientTLS(nil, ALPNGRPC))
	if _, err := greeting(conn); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("gRPC has stopped, and yet: %v", err)
	}
	accepted := make(chan error, 1)
	go func() {
		conn, err := m.Raft().Accept()
		if err == nil {
			_, err = io.WriteString(conn, "r")
		}
		accepted <- err
	}()
	conn = tls.Client(dial(t, "127.0.0.1", m.address), s1.ClientTLS(nil, ALPNRaft))
	if got, err := greeting(conn); err != nil || got != "r" {
		t.Errorf("%q %v", got, err)
	}
	if err := <-accepted; err != nil {
		t.Error(err)
	}
}

// A connection goes on while its certificate is replaced; the next one sees the
// new certificate.
func TestMuxRotation(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1, a1 := issue(t, a, server, "s1", time.Hour), issue(t, a, agent, "a1", time.Hour)
	m := startMux(t, s1, MuxOptions{})
	connect := func() (*tls.Conn, string) {
		conn := tls.Client(dial(t, "127.0.0.1", m.address), a1.ClientTLS(nil, ALPNGRPC))
		if got, err := greeting(conn); err != nil || got != "h" {
			t.Fatal(got, err)
		}
		return conn, conn.ConnectionState().PeerCertificates[0].SerialNumber.Text(16)
	}
	first, before := connect()
	fresh := issue(t, a, server, "s1", time.Hour).current.Load()
	if err := s1.Replace(fresh.key, fresh.chain, fresh.roots); err != nil {
		t.Fatal(err)
	}
	second, after := connect()
	if before == after || after != fresh.leaf.SerialNumber.Text(16) {
		t.Errorf("serial %s, then %s", before, after)
	}
	echo(t, first)
	echo(t, second)
}

// flaky fails to accept as a process does that has run out of descriptors.
type flaky struct {
	net.Listener
	failures []error
}

func (l *flaky) Accept() (net.Conn, error) {
	if len(l.failures) > 0 {
		err := l.failures[0]
		l.failures = l.failures[1:]
		return nil, err
	}
	return l.Listener.Accept()
}

func TestMuxAcceptErrors(t *testing.T) {
	a := newTestAuthority(t, "c1")
	s1 := issue(t, a, server, "s1", time.Hour)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	passing := os.NewSyscallError("accept4", syscall.EMFILE)
	m := startMuxOn(t, &flaky{listener, []error{passing, passing}}, s1, MuxOptions{})
	go func() {
		if conn, err := m.GRPC().Accept(); err == nil {
			_, _ = io.WriteString(conn, "h")
		}
	}()
	if got, err := greeting(tls.Client(dial(t, "127.0.0.1", m.address), s1.ClientTLS(nil, ALPNGRPC))); err != nil || got != "h" {
		t.Fatal(got, err)
	}

	lasting := os.NewSyscallError("accept4", syscall.EINVAL)
	if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	broken := NewMux(&flaky{listener, []error{lasting}}, s1, MuxOptions{})
	if err := broken.Run(context.Background()); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("Run ends with %v", err)
	}
}

func TestSourceOf(t *testing.T) {
	for address, want := range map[string]string{
		"10.0.0.1:99":                 "10.0.0.1",
		"[::ffff:10.0.0.1]:99":        "10.0.0.1",
		"[2001:db8:1:2:3:4:5:6]:99":   "2001:db8:1:2::",
		"[2001:db8:1:2:ffff::1]:99":   "2001:db8:1:2::",
		"[fe80::1%eth0]:99":           "fe80::",
		"a pipe or something like it": "invalid IP",
	} {
		if got := sourceOf(advertised(address)).String(); got != want {
			t.Errorf("%s counts as %s, want %s", address, got, want)
		}
	}
}
