package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	tokenPrefix = "persys1-"
	// Bytes of SHA-256 at the end of a token, over the prefix and what follows.
	checksumSize = 8
	maxToken     = 8 << 10
	maxServers   = 64
	maxPins      = 16
	// Characters of a secret in base32, five bits each: 160 bits are made, less
	// than 128 are never accepted.
	secretBytes     = 20
	minSecretLength = 26
	idBytes         = 8
)

// JoinToken is what a machine needs in order to join: it is written as one
// string that survives being pasted.
type JoinToken struct {
	Cluster string
	// server or agent
	Role pb.Role
	// gRPC addresses, host:port
	Servers []string
	// SHA-256 of the SubjectPublicKeyInfo of each root that may answer
	Pins [][]byte
	// to the second
	Expiry time.Time
	// the key of the token's record; the secret is known to its holder only
	ID, Secret string
}

var tokenAlphabet = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NewTokenSecret makes the id and the secret of a token. Store HashSecret of
// the secret, never the secret.
func NewTokenSecret() (id, secret string, err error) {
	b := make([]byte, idBytes+secretBytes)
	if _, err := rand.Read(b); err != nil {
		return "", "", fmt.Errorf("new token: %w", err)
	}
	return tokenAlphabet.EncodeToString(b[:idBytes]), tokenAlphabet.EncodeToString(b[idBytes:]), nil
}

// HashSecret is what is stored of a secret. A plain hash is enough: the secret
// has 160 random bits, nobody can try them.
func HashSecret(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

// SecretMatches compares in constant time. A weak secret or an empty hash never
// matches.
func SecretMatches(hash []byte, secret string) bool {
	return len(secret) >= minSecretLength && subtle.ConstantTimeCompare(hash, HashSecret(secret)) == 1
}

// String leaves the secret out, so that a token in a log line or an error is
// harmless.
func (t JoinToken) String() string {
	return fmt.Sprintf("join token %s (%s of cluster %s)", t.ID, RoleName(t.Role), t.Cluster)
}

// GoString is String, for %#v.
func (t JoinToken) GoString() string { return t.String() }

// LogValue is String, for slog's JSON.
func (t JoinToken) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Encode writes the token as one string. It fails for a token that
// DecodeToken would refuse.
func (t JoinToken) Encode() (string, error) {
	if err := t.validate(); err != nil {
		return "", fmt.Errorf("join token: %w", err)
	}
	body := t.body()
	text := tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, tokenSum(body)...))
	if len(text) > maxToken {
		return "", fmt.Errorf("join token: %d characters, at most %d are allowed", len(text), maxToken)
	}
	return text, nil
}

// body is: cluster, role, expiry, id, secret, servers, pins; texts and lists
// with their length before them, numbers as varints.
func (t JoinToken) body() []byte {
	text := func(b []byte, s string) []byte {
		return append(binary.AppendUvarint(b, uint64(len(s))), s...)
	}
	b := text(nil, t.Cluster)
	b = binary.AppendUvarint(b, uint64(t.Role))
	b = binary.AppendUvarint(b, uint64(t.Expiry.Unix()))
	b = text(b, t.ID)
	b = text(b, t.Secret)
	b = binary.AppendUvarint(b, uint64(len(t.Servers)))
	for _, s := range t.Servers {
		b = text(b, s)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Pins)))
	for _, pin := range t.Pins {
		b = append(b, pin...)
	}
	return b
}

func tokenSum(body []byte) []byte {
	sum := sha256.Sum256(append([]byte(tokenPrefix), body...))
	return sum[:checksumSize]
}

var errGarbled = errors.New("join token is garbled: it was not copied as a whole, or was changed on the way; copy it again")

// DecodeToken reads what Encode wrote. White space, as terminals and mails put
// it into long lines, is ignored. That the token has expired is not looked at:
// the machine that decides about it has another clock.
func DecodeToken(text string) (JoinToken, error) {
	if len(text) > 2*maxToken {
		return JoinToken{}, fmt.Errorf("join token: %d characters, at most %d are allowed", len(text), maxToken)
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, text)
	if text == "" {
		return JoinToken{}, errors.New("join token is empty")
	}
	encoded, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		if version, _, found := strings.Cut(strings.TrimPrefix(text, "persys"), "-"); found && strings.HasPrefix(text, "persys") {
			if n, err := strconv.Atoi(version); err == nil && n > 1 {
				return JoinToken{}, fmt.Errorf("join token is of format %d, which a newer version of persys made: update this one", n)
			}
		}
		return JoinToken{}, fmt.Errorf("not a join token: it must begin with %s", tokenPrefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(raw) < checksumSize {
		return JoinToken{}, errGarbled
	}
	body, sum := raw[:len(raw)-checksumSize], raw[len(raw)-checksumSize:]
	if !bytes.Equal(sum, tokenSum(body)) {
		return JoinToken{}, errGarbled
	}
	t, err := parseToken(body)
	if err != nil {
		return JoinToken{}, fmt.Errorf("join token: %w", err)
	}
	if err := t.validate(); err != nil {
		return JoinToken{}, fmt.Errorf("join token: %w", err)
	}
	return t, nil
}

func parseToken(body []byte) (JoinToken, error) {
	r := tokenReader{rest: body}
	t := JoinToken{Cluster: r.text(), Role: pb.Role(r.number(math.MaxInt8))}
	t.Expiry = time.Unix(int64(r.number(math.MaxInt32<<8)), 0).UTC()
	t.ID = r.text()
	t.Secret = r.text()
	for range r.number(maxServers) {
		t.Servers = append(t.Servers, r.text())
	}
	for range r.number(maxPins) {
		t.Pins = append(t.Pins, r.take(sha256.Size))
	}
	if r.failed || len(r.rest) != 0 {
		return JoinToken{}, errors.New("its content cannot be read")
	}
	return t, nil
}

// tokenReader remembers the first failure; after it all answers are empty.
type tokenReader struct {
	rest   []byte
	failed bool
}

func (r *tokenReader) number(limit uint64) uint64 {
	n, size := binary.Uvarint(r.rest)
	if r.failed || size <= 0 || n > limit {
		r.failed = true
		return 0
	}
	r.rest = r.rest[size:]
	return n
}

func (r *tokenReader) take(n uint64) []byte {
	if r.failed || n > uint64(len(r.rest)) {
		r.failed = true
		return nil
	}
	out := r.rest[:n:n]
	r.rest = r.rest[n:]
	return out
}

func (r *tokenReader) text() string { return string(r.take(r.number(maxToken))) }

func (t JoinToken) validate() error {
	if err := validateCluster(t.Cluster); err != nil {
		return err
	}
	if t.Role != pb.Role_ROLE_SERVER && t.Role != pb.Role_ROLE_AGENT {
		return fmt.Errorf("role %s cannot join, only server and agent can", RoleName(t.Role))
	}
	if t.Expiry.Unix() <= 0 {
		return errors.New("no expiry")
	}
	if err := validateName(t.ID); err != nil {
		return fmt.Errorf("id: %w", err)
	}
	if len(t.Secret) < minSecretLength {
		return fmt.Errorf("secret has %d characters, at least %d are needed", len(t.Secret), minSecretLength)
	}
	if len(t.Servers) == 0 || len(t.Servers) > maxServers {
		return fmt.Errorf("%d server addresses, 1 to %d are allowed", len(t.Servers), maxServers)
	}
	for _, s := range t.Servers {
		if err := validateHostPort(s); err != nil {
			return fmt.Errorf("server address: %w", err)
		}
	}
	if len(t.Pins) == 0 || len(t.Pins) > maxPins {
		return fmt.Errorf("%d pins, 1 to %d are allowed", len(t.Pins), maxPins)
	}
	for _, pin := range t.Pins {
		if len(pin) != sha256.Size {
			return fmt.Errorf("pin has %d bytes, must have %d", len(pin), sha256.Size)
		}
	}
	return nil
}

func validateHostPort(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(port, 10, 16); host == "" || err != nil || n == 0 {
		return fmt.Errorf("%q is not host:port", address)
	}
	return nil
}

func isPinned(cert *x509.Certificate, pins [][]byte) bool {
	pin := pinOf(cert)
	for _, p := range pins {
		if bytes.Equal(p, pin) {
			return true
		}
	}
	return false
}
