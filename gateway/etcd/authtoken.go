package etcd

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
)

// A token says who until when, signed with a secret of the cluster, so that every
// replica takes it: version, expiry in Unix seconds, signature, name, in base64. The
// hash of the password is part of what is signed: with another one, or without the
// user, the token is void.
const (
	tokenVersion = 1
	tokenHeader  = 1 + 8
	tokenBytes   = tokenHeader + sha256.Size
)

// maxSessions bounds the tokens that a replica remembers.
const maxSessions = 1 << 14

var errToken = errors.New("malformed token")

// session is a token, taken apart.
type session struct {
	name    string
	header  [tokenHeader]byte
	mac     [sha256.Size]byte
	expires time.Time
	// until is in Unix nanoseconds: as in etcd the use of a token, on the replica
	// where it is used, makes it last longer.
	until atomic.Int64
	// seen is for what it was last found valid.
	seen atomic.Pointer[verified]
}

type verified struct {
	state *authState
	user  *user
}

func newToken(name string, secret, password []byte, expires time.Time) string {
	s := session{name: name}
	s.header[0] = tokenVersion
	binary.BigEndian.PutUint64(s.header[1:], uint64(expires.Unix()))
	raw := append(s.header[:], s.sign(secret, password)...)
	return base64.RawURLEncoding.EncodeToString(append(raw, name...))
}

func parseToken(token string) (*session, error) {
	if strings.ContainsAny(token, "\r\n") { // which the decoder skips
		return nil, errToken
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(raw) <= tokenBytes || raw[0] != tokenVersion {
		return nil, errToken
	}
	s := &session{name: string(raw[tokenBytes:])}
	copy(s.header[:], raw)
	copy(s.mac[:], raw[tokenHeader:])
	s.expires = time.Unix(int64(binary.BigEndian.Uint64(raw[1:])), 0)
	return s, nil
}

func (s *session) sign(secret, password []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write(s.header[:])
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(s.name))))
	h.Write([]byte(s.name))
	h.Write(password)
	return h.Sum(nil)
}

// verify is the user that the token is of.
func (s *session) verify(st *authState) *user {
	if seen := s.seen.Load(); seen != nil && seen.state == st {
		return seen.user
	}
	u := st.users[s.name]
	if u == nil || len(u.Password) == 0 || len(st.secret) == 0 || !hmac.Equal(s.mac[:], s.sign(st.secret, u.Password)) {
		return nil
	}
	s.seen.Store(&verified{st, u})
	return u
}

// sessions remembers the tokens that are in use on this replica.
type sessions struct {
	ttl time.Duration
	mu  *sync.RWMutex
	all map[string]*session
}

func newSessions(ttl time.Duration) sessions {
	return sessions{ttl: ttl, mu: &sync.RWMutex{}, all: map[string]*session{}}
}

// open finds the session of a token, and makes it last longer.
func (a *sessions) open(token string, st *authState) (*session, error) {
	now := time.Now()
	a.mu.RLock()
	s := a.all[token]
	a.mu.RUnlock()
	if s != nil {
		if now.UnixNano() > s.until.Load() {
			a.forget(token)
			return nil, rpctypes.ErrGRPCInvalidAuthToken
		}
	} else {
		var err error
		if s, err = parseToken(token); err != nil || now.After(s.expires) || s.verify(st) == nil {
			return nil, rpctypes.ErrGRPCInvalidAuthToken
		}
		s = a.remember(token, s)
	}
	s.until.Store(now.Add(a.ttl).UnixNano())
	return s, nil
}

// user is the caller that a session stands for, in a state.
func (a *sessions) user(s *session, st *authState) (*caller, error) {
	u := s.verify(st)
	if u == nil {
		return nil, rpctypes.ErrGRPCInvalidAuthToken
	}
	return u.caller(), nil
}

func (a *sessions) remember(token string, s *session) *session {
	s.until.Store(time.Now().Add(a.ttl).UnixNano())
	a.mu.Lock()
	defer a.mu.Unlock()
	if other := a.all[token]; other != nil {
		return other
	}
	if len(a.all) >= maxSessions {
		a.sweep()
	}
	a.all[token] = s
	return s
}

// sweep makes room: of a few tokens those go that have expired or, if none has, one.
func (a *sessions) sweep() {
	now, left := time.Now().UnixNano(), 32
	for token, s := range a.all {
		if left--; now > s.until.Load() || left == 0 && len(a.all) >= maxSessions {
			delete(a.all, token)
		}
		if left == 0 {
			return
		}
	}
}

func (a *sessions) forget(token string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, token)
}

// tokenOf is the token that came with a call, under the name that etcd's clients use
// or, by HTTP, as the Authorization header.
func tokenOf(ctx context.Context) (string, bool) {
	for _, field := range []string{rpctypes.TokenFieldNameGRPC, rpctypes.TokenFieldNameSwagger} {
		if values := metadata.ValueFromIncomingContext(ctx, field); len(values) > 0 {
			return values[0], true
		}
	}
	return "", false
}

type pinKey struct{}

func pinned(ctx context.Context) *session {
	s, _ := ctx.Value(pinKey{}).(*session)
	return s
}
