package local

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// leases answers with what it was asked, and is told how a stream ends by id 13.
type leases struct {
	etcdpb.UnimplementedLeaseServer
}

func (leases) LeaseGrant(_ context.Context, r *etcdpb.LeaseGrantRequest) (*etcdpb.LeaseGrantResponse, error) {
	if r.TTL < 0 {
		return nil, context.DeadlineExceeded
	}
	r.TTL++ // the caller's must stay
	return &etcdpb.LeaseGrantResponse{TTL: r.TTL}, nil
}

func (leases) LeaseKeepAlive(s etcdpb.Lease_LeaseKeepAliveServer) error {
	answer := &etcdpb.LeaseKeepAliveResponse{}
	for {
		r, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case r.ID == 13:
			return status.Error(codes.NotFound, "13")
		}
		answer.ID = r.ID // one message for all answers
		if err := s.Send(answer); err != nil {
			return err
		}
	}
}

func client(admit Admit) etcdpb.LeaseClient {
	c := New(admit)
	etcdpb.RegisterLeaseServer(c, leases{})
	return etcdpb.NewLeaseClient(c)
}

func all(ctx context.Context, _ string) (context.Context, error) { return ctx, nil }

func TestCall(t *testing.T) {
	c, r := client(all), &etcdpb.LeaseGrantRequest{TTL: 1}
	if answer, err := c.LeaseGrant(t.Context(), r); err != nil || answer.TTL != 2 || r.TTL != 1 {
		t.Errorf("%v, %v; asked %v", answer, err, r)
	}
	if _, err := c.LeaseGrant(t.Context(), &etcdpb.LeaseGrantRequest{TTL: -1}); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	if _, err := c.LeaseRevoke(t.Context(), &etcdpb.LeaseRevokeRequest{}); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	if _, err := etcdpb.NewKVClient(New(all)).Put(t.Context(), &etcdpb.PutRequest{}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "KV/Put") {
		t.Error(err)
	}
}

func TestAdmitIsAsked(t *testing.T) {
	var asked []string
	c := client(func(ctx context.Context, method string) (context.Context, error) {
		asked = append(asked, method)
		return nil, status.Error(codes.PermissionDenied, "no")
	})
	if _, err := c.LeaseGrant(t.Context(), &etcdpb.LeaseGrantRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	if _, err := c.LeaseKeepAlive(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	if got := strings.Join(asked, " "); got != etcdpb.Lease_LeaseGrant_FullMethodName+" "+etcdpb.Lease_LeaseKeepAlive_FullMethodName {
		t.Error(got)
	}
}

func TestStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s, err := client(all).LeaseKeepAlive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var first *etcdpb.LeaseKeepAliveResponse
		for id := range int64(3) {
			if err := s.Send(&etcdpb.LeaseKeepAliveRequest{ID: id}); err != nil {
				t.Fatal(err)
			}
			answer, err := s.Recv()
			if err != nil || answer.ID != id {
				t.Fatalf("%v, %v", answer, err)
			}
			if first == nil {
				first = answer
			}
		}
		if first.ID != 0 {
			t.Error("an answer changed after it was received")
		}
		if err := errors.Join(s.CloseSend(), s.CloseSend()); err != nil {
			t.Error(err)
		}
		if _, err := s.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestStreamFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s, err := client(all).LeaseKeepAlive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&etcdpb.LeaseKeepAliveRequest{ID: 13}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := s.Send(&etcdpb.LeaseKeepAliveRequest{ID: 1}); !errors.Is(err, io.EOF) {
			t.Errorf("sent to nobody: %v", err)
		}
		if _, err := s.Header(); err != nil {
			t.Error(err)
		}
		if _, err := s.Recv(); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
	})
}

// Everybody who waits is released by the end of the context, and the handler ends.
func TestStreamCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := client(all).LeaseKeepAlive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		received, header := make(chan error, 1), make(chan error, 1)
		go func() { _, err := s.Recv(); received <- err }()
		go func() { _, err := s.Header(); header <- err }()
		synctest.Wait()
		cancel()
		if err := <-received; status.Code(err) != codes.Canceled {
			t.Error(err)
		}
		<-header // what it said is a race between the end and the context
		synctest.Wait()
		if err := s.Send(&etcdpb.LeaseKeepAliveRequest{}); !errors.Is(err, io.EOF) && status.Code(err) != codes.Canceled {
			t.Error(err)
		}
	})
}
