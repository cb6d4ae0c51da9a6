package model

import (
	"crypto/subtle"
	"fmt"
	"maps"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	defaultTokenTTL = 3 * time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
	maxTokenUses    = 1000
)

// CreateToken stores a join token: the hash of its secret, never the secret.
func CreateToken(req *pb.CreateTokenRequest, id string, secretHash []byte, m Meta) (*pb.Txn, *pb.Token, error) {
	var errs FieldErrors
	if req.Role != pb.Role_ROLE_SERVER && req.Role != pb.Role_ROLE_AGENT {
		errs.add("role", "%s cannot join; allowed: server, agent", roleName(req.Role))
	}
	if req.Node != "" {
		checkID(&errs, "node", req.Node)
	}
	ttl := defaultTokenTTL
	if req.Ttl != nil {
		if ttl = req.Ttl.AsDuration(); ttl < time.Second || ttl > maxTokenTTL {
			errs.add("ttl", "%v is out of range; allowed: 1s to 720h (30 days)", ttl)
		}
	}
	if req.Uses < 0 || req.Uses > maxTokenUses {
		errs.add("uses", "%d is out of range; allowed: 1 to %d, 0 for the default of 1", req.Uses, maxTokenUses)
	}
	checkLabels(&errs, "labels", req.Labels)
	switch {
	case len(req.Labels) > maxNodeLabels:
		errs.add("labels", "has %d entries; allowed: %d", len(req.Labels), maxNodeLabels)
	case len(req.Labels) > 0 && req.Role == pb.Role_ROLE_SERVER:
		errs.add("labels", "servers have no labels; allowed: for role agent only")
	}
	if err := errs.err(); err != nil {
		return nil, nil, err
	}
	t := &pb.Token{
		Id: id, SecretHash: secretHash, Role: req.Role, Node: req.Node, Labels: maps.Clone(req.Labels), UsesLeft: max(req.Uses, 1),
		ExpireTime: timestamppb.New(m.Now.Add(ttl).Truncate(time.Second)), CreateTime: timestamppb.New(m.Now), CreatedBy: m.Actor,
	}
	return &pb.Txn{
		Compare: []*pb.Compare{Missing(TokenKey(id))},
		Success: []*pb.RequestOp{
			Put(TokenKey(id), t, 0),
			m.event(&pb.Event{Type: pb.EventType_TOKEN_CHANGED, Message: fmt.Sprintf("token %s for %s created", id, forWhom(t))}),
		},
	}, ShowToken(t), nil
}

// RevokeToken removes a token; what joined with it stays.
func RevokeToken(v Reader, req *pb.TokenRequest, m Meta) (*pb.Txn, *pb.Token, error) {
	t := &pb.Token{}
	mod, ok, err := Load(v, TokenKey(req.Id), t)
	switch {
	case err != nil:
		return nil, nil, err
	case !ok || strings.Contains(req.Id, "/"):
		return nil, nil, refuse(codes.NotFound, "there is no token %q", clip(req.Id))
	}
	return &pb.Txn{
		Compare: []*pb.Compare{Unchanged(TokenKey(req.Id), mod)},
		Success: []*pb.RequestOp{
			Delete(TokenKey(req.Id)),
			m.event(&pb.Event{Type: pb.EventType_TOKEN_CHANGED, Message: "token " + req.Id + " revoked"}),
		},
	}, ShowToken(t), nil
}

// ShowToken is a token as it may be answered: without the hash.
func ShowToken(t *pb.Token) *pb.Token {
	t = proto.CloneOf(t)
	t.SecretHash = nil
	return t
}

// Redemption is somebody with a join token.
type Redemption struct {
	TokenID    string
	SecretHash []byte
	// Who wants to be called so.
	Name string
	// What the caller takes itself for; unspecified: whatever the token is for.
	Role pb.Role
}

// CheckToken says whether the token would be accepted, before a certificate is
// made for it.
func CheckToken(v Reader, r Redemption, now time.Time) (*pb.Token, error) {
	t, _, err := checkToken(v, r, now)
	if err != nil {
		return nil, err
	}
	return ShowToken(t), nil
}

// RedeemToken uses the token up by one and records the certificate that was
// issued for it, both or neither.
func RedeemToken(v Reader, r Redemption, cert *pb.Certificate, m Meta) (*pb.Txn, *pb.Token, error) {
	t, mod, err := checkToken(v, r, m.Now)
	if err != nil {
		return nil, nil, err
	}
	key := TokenKey(t.Id)
	// A used-up token stays until it expires, for its holder to be told.
	t.UsesLeft--
	cert = proto.CloneOf(cert)
	cert.TokenId, cert.CreateTime = t.Id, timestamppb.New(m.Now)
	txn := &pb.Txn{
		Compare: []*pb.Compare{Unchanged(key, mod), Missing(CertificateKey(cert.Serial))},
		Success: []*pb.RequestOp{
			Put(key, t, 0),
			Put(CertificateKey(cert.Serial), cert, 0),
			m.event(&pb.Event{Type: pb.EventType_TOKEN_CHANGED, Message: fmt.Sprintf("token %s redeemed by %s %s", t.Id, roleName(t.Role), r.Name)}),
		},
	}
	if t.Role == pb.Role_ROLE_AGENT {
		txn.Compare = append(txn.Compare, Missing(NodeLeaseKey(r.Name)))
	}
	return txn, ShowToken(t), nil
}

func checkToken(v Reader, r Redemption, now time.Time) (*pb.Token, int64, error) {
	var errs FieldErrors
	if checkID(&errs, "name", r.Name); len(errs) > 0 {
		return nil, 0, errs
	}
	t := &pb.Token{}
	mod, ok, err := Load(v, TokenKey(r.TokenID), t)
	if err != nil {
		return nil, 0, err
	}
	// Nothing is said of a token to somebody who does not hold it.
	if !ok || len(t.SecretHash) == 0 || subtle.ConstantTimeCompare(t.SecretHash, r.SecretHash) != 1 {
		return nil, 0, refuse(codes.Unauthenticated, "the join token is not known to this cluster: it was revoked, has expired long ago or is garbled; make another with persys token create")
	}
	again := "; make another with persys token create"
	switch expired := now.Sub(t.ExpireTime.AsTime()); {
	case expired >= 0:
		return nil, 0, refuse(codes.PermissionDenied, "the join token expired at %s%s", t.ExpireTime.AsTime().Format(time.RFC3339), again)
	case t.UsesLeft <= 0:
		return nil, 0, refuse(codes.PermissionDenied, "the join token is used up%s", again)
	case t.Role != pb.Role_ROLE_SERVER && t.Role != pb.Role_ROLE_AGENT:
		return nil, 0, refuse(codes.PermissionDenied, "the join token is for role %s, which cannot join%s", roleName(t.Role), again)
	case r.Role != pb.Role_ROLE_UNSPECIFIED && r.Role != t.Role:
		return nil, 0, refuse(codes.PermissionDenied, "the join token is for role %s, not for %s%s", roleName(t.Role), roleName(r.Role), again)
	case t.Node != "" && t.Node != r.Name:
		return nil, 0, refuse(codes.PermissionDenied, "the join token is for %q only, not for %q", t.Node, r.Name)
	}
	if _, leased := v.Get(NodeLeaseKey(r.Name)); leased && t.Role == pb.Role_ROLE_AGENT {
		return nil, 0, refuse(codes.AlreadyExists, "a node named %q is running; choose another name, or, if this is that machine with an empty disk, wait until its lease has ended", r.Name)
	}
	return t, mod, nil
}

func roleName(r pb.Role) string {
	return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_"))
}

func forWhom(t *pb.Token) string {
	if t.Node != "" {
		return roleName(t.Role) + " " + t.Node
	}
	return roleName(t.Role)
}
