package etcd

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func stateOf(secret string, users ...*authpb.User) *authState {
	st := &authState{enabled: true, secret: []byte(secret), users: map[string]*user{}}
	for _, u := range users {
		one := &user{User: u}
		one.caller = sync.OnceValue(func() *caller { return st.callerOf(one) })
		st.users[string(u.Name)] = one
	}
	return st
}

func TestToken(t *testing.T) {
	ann := &authpb.User{Name: []byte("ann"), Password: []byte("hash")}
	st := stateOf("secret", ann)
	all := newSessions(time.Minute)
	now := time.Now()
	good := newToken("ann", st.secret, ann.Password, now.Add(time.Minute))
	for what, token := range map[string]string{
		"another secret":   newToken("ann", []byte("other"), ann.Password, now.Add(time.Minute)),
		"no secret":        newToken("ann", nil, ann.Password, now.Add(time.Minute)),
		"another password": newToken("ann", st.secret, []byte("other"), now.Add(time.Minute)),
		"another user":     newToken("bob", st.secret, ann.Password, now.Add(time.Minute)),
		"nobody":           newToken("", st.secret, ann.Password, now.Add(time.Minute)),
		"expired":          newToken("ann", st.secret, ann.Password, now.Add(-time.Minute)),
		"empty":            "", "garbage": "x.y", "cut": good[:len(good)-1], "longer": good + "AAAA", "with a break": good[:8] + "\n" + good[8:],
	} {
		if _, err := all.open(token, st); err != rpctypes.ErrGRPCInvalidAuthToken {
			t.Errorf("%s: %v", what, err)
		}
	}
	raw, err := base64.RawURLEncoding.DecodeString(good)
	ok(t, err)
	for i := range raw {
		changed := bytes.Clone(raw)
		changed[i] ^= 1
		if _, err := all.open(base64.RawURLEncoding.EncodeToString(changed), st); err == nil {
			t.Errorf("good with byte %d changed", i)
		}
	}
	if len(all.all) != 0 {
		t.Errorf("%d bad tokens are remembered", len(all.all))
	}
	s, err := all.open(good, st)
	ok(t, err)
	if c, err := all.user(s, st); err != nil || c.actor != "etcd/ann" {
		t.Errorf("%+v, %v", c, err)
	}
	for what, later := range map[string]*authState{
		"user gone": stateOf("secret"), "new secret": stateOf("other", ann), "auth was off": stateOf("", ann),
		"new password": stateOf("secret", &authpb.User{Name: []byte("ann"), Password: []byte("new")}),
		"no password":  stateOf("secret", &authpb.User{Name: []byte("ann")}),
	} {
		if _, err := all.user(s, later); err != rpctypes.ErrGRPCInvalidAuthToken {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := all.user(s, stateOf("secret", ann)); err != nil {
		t.Errorf("another change: %v", err)
	}
}

// What a replica remembers is bounded, and a token that it forgot is taken again.
func TestSessionsAreBounded(t *testing.T) {
	ann := &authpb.User{Name: []byte("ann"), Password: []byte("hash")}
	st := stateOf("secret", ann)
	all := newSessions(time.Minute)
	first := newToken("ann", st.secret, ann.Password, time.Now().Add(time.Hour))
	for i := range maxSessions + 100 {
		if _, err := all.open(newToken("ann", st.secret, ann.Password, time.Now().Add(time.Hour+time.Duration(i)*time.Second)), st); err != nil {
			t.Fatal(err)
		}
	}
	if len(all.all) > maxSessions {
		t.Errorf("%d sessions", len(all.all))
	}
	if _, err := all.open(first, st); err != nil {
		t.Error(err)
	}
}

// Those who wait for their password to be looked at can leave, and are not too many.
func TestBcryptQueue(t *testing.T) {
	q := newBcryptQueue()
	for range cap(q.slots) {
		ok(t, q.enter(within(t, patience)))
	}
	ctx, leave := context.WithCancel(within(t, patience))
	var waiting sync.WaitGroup
	for range maxBcryptWaiting {
		waiting.Go(func() {
			if err := q.enter(ctx); status.Code(err) != codes.Canceled {
				t.Error(err)
			}
		})
	}
	eventually(t, "all wait", func() error {
		if n := q.waiting.Load(); n < maxBcryptWaiting {
			return fmt.Errorf("%d wait", n)
		}
		return nil
	})
	if err := q.enter(ctx); err != rpctypes.ErrGRPCRequestTooManyRequests {
		t.Error(err)
	}
	leave()
	waiting.Wait()
	q.leave()
	ok(t, q.enter(within(t, patience)))
}

func FuzzToken(f *testing.F) {
	ann := &authpb.User{Name: []byte("ann"), Password: []byte("hash")}
	st := stateOf("secret", ann)
	f.Add(newToken("ann", st.secret, ann.Password, time.Unix(1, 0)))
	f.Add("")
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, token string) {
		s, err := parseToken(token)
		if err != nil {
			return
		}
		raw := append(append(s.header[:], s.mac[:]...), s.name...)
		if again := base64.RawURLEncoding.EncodeToString(raw); again != token {
			t.Errorf("%q means %q", token, again)
		}
		if s.verify(st) != nil && token != newToken("ann", st.secret, ann.Password, s.expires) {
			t.Errorf("%q is good", token)
		}
	})
}

// The cost of knowing who calls, of each request.
func BenchmarkCaller(b *testing.B) {
	c := newCluster(b, 1, quick)
	client := c.client()
	a, store := c.replicas[0].etcd.auth, c.replicas[0].store
	run := func(name string, ctx context.Context) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				who, err := a.caller(ctx, nil)
				if err != nil || who.mayRead([]byte("key-5"), nil) != nil {
					b.Fatal(who, err)
				}
			}
		})
		b.Run(name+"/view", func(b *testing.B) {
			b.ReportAllocs()
			v := store.View()
			for b.Loop() {
				if who, err := a.caller(ctx, v); err != nil || who.mayRead([]byte("key-5"), nil) != nil {
					b.Fatal(who, err)
				}
			}
		})
	}
	run("disabled", context.Background())
	grants := make([]string, 100)
	for i := range grants {
		grants[i] = fmt.Sprintf("rw key-%d", i)
	}
	addUser(b, client, "ann", grants...)
	c.enableAuth(client)
	run("token", metadata.NewIncomingContext(context.Background(), metadata.Pairs("token", tokenOfUser(b, client, "ann"))))
}
