package pki

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func testToken(t testing.TB) JoinToken {
	t.Helper()
	id, secret, err := NewTokenSecret()
	if err != nil {
		t.Fatal(err)
	}
	return JoinToken{
		Cluster: "6f1c2f0e-9c1d-4f43-8a4c-0b1d4b1d2a11", Role: agent,
		Servers: []string{"10.0.0.1:7481", "[fd00::2]:7481", "s3.example.com:7481"},
		Pins:    newTestAuthority(t, "c1").Pins(),
		Expiry:  time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		ID:      id, Secret: secret,
	}
}

func encode(t testing.TB, token JoinToken) string {
	t.Helper()
	text, err := token.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestTokenRoundTrip(t *testing.T) {
	token := testToken(t)
	text := encode(t, token)
	if !strings.HasPrefix(text, tokenPrefix) || len(text) > 400 {
		t.Errorf("%d characters: %s", len(text), text)
	}
	for name, pasted := range map[string]string{
		"as it is":        text,
		"with a line end": text + "\n",
		"wrapped":         text[:80] + "\r\n  " + text[80:160] + "\n" + text[160:],
	} {
		got, err := DecodeToken(pasted)
		if err != nil || !reflect.DeepEqual(got, token) {
			t.Errorf("%s: %v %v", name, got, err)
		}
	}
}

// Whatever single character is changed, left out or doubled: the token is
// refused, and the words say what to do.
func TestTokenTampered(t *testing.T) {
	text := encode(t, testToken(t))
	check := func(what, changed string) {
		t.Helper()
		_, err := DecodeToken(changed)
		if err == nil {
			t.Fatalf("%s: accepted", what)
		}
		if strings.HasPrefix(changed, tokenPrefix) && !strings.Contains(err.Error(), "garbled") {
			t.Fatalf("%s: %v", what, err)
		}
	}
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+/%\x00é"
	for i := range text {
		for _, c := range alphabet {
			if changed := text[:i] + string(c) + text[i+1:]; changed != text {
				check(fmt.Sprintf("character %d changed to %q", i, c), changed)
			}
		}
		check(fmt.Sprintf("character %d left out", i), text[:i]+text[i+1:])
		if i >= len(tokenPrefix) {
			check(fmt.Sprintf("cut off at %d", i), text[:i])
		}
	}
	check("one more", text+"A")
	check("twice", text+text)
}

func TestDecodeTokenRefuses(t *testing.T) {
	// Well formed, with the right checksum, and still not to be accepted.
	crafted := func(change func(*JoinToken)) string {
		token := testToken(t)
		change(&token)
		body := token.body()
		return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, tokenSum(body)...))
	}
	raw := func(body []byte) string {
		return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, tokenSum(body)...))
	}
	for _, test := range []struct{ name, text, err string }{
		{"empty", " \n", "is empty"},
		{"something else", "K10abc::server:def", "must begin with persys1-"},
		{"a word", "persys", "must begin with persys1-"},
		{"newer format", "persys2-AAAA", "newer version of persys"},
		{"no such format", "persys0-AAAA", "must begin with persys1-"},
		{"only the prefix", tokenPrefix, "garbled"},
		{"giant", tokenPrefix + strings.Repeat("A", 3*maxToken), "at most 8192 are allowed"},
		{"nothing in it", raw(nil), "cannot be read"},
		{"more in it", raw(append(testToken(t).body(), 0)), "cannot be read"},
		{"length beyond the end", raw([]byte{0xff, 0x01, 'c'}), "cannot be read"},
		{"endless number", raw(bytes.Repeat([]byte{0xff}, 20)), "cannot be read"},
		{"no cluster", crafted(func(t *JoinToken) { t.Cluster = "" }), "cluster id"},
		{"admin", crafted(func(t *JoinToken) { t.Role = admin }), "role admin cannot join"},
		{"unknown role", crafted(func(t *JoinToken) { t.Role = pb.Role(99) }), "role 99 cannot join"},
		{"no servers", crafted(func(t *JoinToken) { t.Servers = nil }), "0 server addresses"},
		{"server without port", crafted(func(t *JoinToken) { t.Servers = []string{"s1"} }), "server address"},
		{"server with port 0", crafted(func(t *JoinToken) { t.Servers = []string{"s1:0"} }), "not host:port"},
		{"server without host", crafted(func(t *JoinToken) { t.Servers = []string{":7481"} }), "not host:port"},
		{"no pins", crafted(func(t *JoinToken) { t.Pins = nil }), "0 pins"},
		{"no id", crafted(func(t *JoinToken) { t.ID = "" }), "id"},
		{"id with a slash", crafted(func(t *JoinToken) { t.ID = "a/b" }), "id"},
		{"weak secret", crafted(func(t *JoinToken) { t.Secret = "hunter2" }), "at least 26 are needed"},
		{"no expiry", crafted(func(t *JoinToken) { t.Expiry = time.Unix(0, 0) }), "no expiry"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := DecodeToken(test.text)
			wantError(t, err, test.err)
		})
	}
}

func TestEncodeRefuses(t *testing.T) {
	token := testToken(t)
	token.Secret = "short"
	if _, err := token.Encode(); err == nil {
		t.Error("a weak secret is encoded")
	}
	token = testToken(t)
	for range maxServers - 3 {
		token.Servers = append(token.Servers, strings.Repeat("a", 200)+":7481")
	}
	_, err := token.Encode()
	wantError(t, err, "at most 8192 are allowed")
}

func TestTokenSecret(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		id, secret, err := NewTokenSecret()
		if err != nil {
			t.Fatal(err)
		}
		if seen[id] || seen[secret] || len(secret) < minSecretLength || validateName(id) != nil {
			t.Fatalf("id %q, secret %q", id, secret)
		}
		seen[id], seen[secret] = true, true
		hash := HashSecret(secret)
		if !SecretMatches(hash, secret) {
			t.Fatal("its own hash does not match")
		}
		if SecretMatches(hash, secret+"a") || SecretMatches(nil, secret) || SecretMatches(hash[:16], secret) || SecretMatches(hash, "") {
			t.Fatal("something else matches")
		}
	}
	if SecretMatches(HashSecret(""), "") || SecretMatches(HashSecret("hunter2"), "hunter2") {
		t.Error("a weak secret matches")
	}
}

// A token that gets into a log or an error does not give its secret away.
func TestTokenIsNotPrinted(t *testing.T) {
	token := testToken(t)
	var out bytes.Buffer
	fmt.Fprintf(&out, "%v %+v %#v %s %v", token, token, token, token, &token)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "token", token)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "token", token)
	if strings.Contains(out.String(), token.Secret) {
		t.Errorf("the secret is in %s", &out)
	}
}

func FuzzDecodeToken(f *testing.F) {
	f.Add(encode(f, testToken(f)), []byte(nil))
	f.Add("persys1-", testToken(f).body())
	f.Fuzz(func(t *testing.T, text string, body []byte) {
		// The checksum keeps a fuzzer out of what is behind it: a second input
		// comes with the right one.
		for _, text := range []string{text, tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body[:len(body):len(body)], tokenSum(body)...))} {
			token, err := DecodeToken(text)
			if err != nil {
				continue
			}
			again, err := token.Encode()
			if err != nil {
				t.Fatalf("decoded, and not to be encoded again: %v", err)
			}
			if same, err := DecodeToken(again); err != nil || !reflect.DeepEqual(same, token) {
				t.Fatalf("changed on the way: %#v %#v %v", token, same, err)
			}
		}
	})
}
