package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// Pauses between looks at a condition: twice as long as looking takes, within
	// these bounds, so that looking is not what is measured.
	pollLeast, pollMost = 10 * time.Millisecond, 100 * time.Millisecond
	// A call that was not answered is tried again for so long: there may be an
	// election.
	callPatience = time.Minute
	callPause    = 20 * time.Millisecond
	pageSize     = 1000
)

// api is the cluster's API as its administrator sees it, over a connection to
// each server.
type api struct {
	creds *pki.Credentials
	http  *http.Client

	mu    sync.Mutex
	conns []connection
	turn  atomic.Int64
}

type connection struct {
	*grpc.ClientConn
	name, https string
}

func newAPI(dataDir string) (*api, error) {
	certificate, key, roots, err := server.AdminContext(dataDir)
	if err != nil {
		return nil, err
	}
	creds, err := pki.CredentialsFromPEM(certificate, key, roots)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: creds.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2", "http/1.1"), ForceAttemptHTTP2: true}
	return &api{creds: creds, http: &http.Client{Transport: transport}}, nil
}

func (a *api) connect(c server.Config) connection {
	conn, err := grpc.NewClient("passthrough:///"+grpcAddress(c), grpc.WithTransportCredentials(credentials.NewTLS(a.creds.ClientTLS(nil, "h2"))),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: callPause, MaxDelay: time.Second, Multiplier: 1.6}, MinConnectTimeout: time.Second}))
	if err != nil {
		panic(err) // the address was made here
	}
	return connection{conn, c.Name, "https://" + net.JoinHostPort(c.Advertise, fmt.Sprint(c.HTTPSPort))}
}

// add has the server answer calls from now on.
func (a *api) add(c connection) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns = append(a.conns, c)
}

// drop forgets a server that is about to be killed.
func (a *api) drop(c server.Config) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, conn := range a.conns {
		if conn.name == c.Name {
			a.conns = append(a.conns[:i:i], a.conns[i+1:]...)
			_ = conn.Close()
			return
		}
	}
}

func (a *api) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		_ = c.Close()
	}
	a.http.CloseIdleConnections()
}

// next takes the servers in turn.
func (a *api) next() connection {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conns[int(a.turn.Add(1))%len(a.conns)]
}

func (a *api) cluster() pb.ClusterClient { return pb.NewClusterClient(a.next()) }

// await looks again and again until the condition holds. An error of the
// condition is final only where it lasts.
func (a *api) await(ctx context.Context, what string, holds func() (bool, error)) error {
	var failing time.Time
	for {
		began := time.Now()
		ok, err := holds()
		switch {
		case err == nil && ok:
			return nil
		case err == nil:
			failing = time.Time{}
		case failing.IsZero():
			failing = began
		case time.Since(failing) > callPatience:
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-time.After(min(max(pollLeast, 2*time.Since(began)), pollMost)):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, errors.Join(ctx.Err(), err))
		}
	}
}

// count is how many keys begin with prefix, as the server that is asked shows it.
func (a *api) count(ctx context.Context, prefix string) (int64, error) {
	answer, err := etcdpb.NewKVClient(a.next()).Range(ctx, &etcdpb.RangeRequest{
		Key: []byte(prefix), RangeEnd: model.PrefixEnd(prefix), CountOnly: true, Serializable: true,
	})
	return answer.GetCount(), err
}

// running reports whether the status of all workloads says that all of the
// replicas run, so many in all.
func (a *api) running(ctx context.Context, replicas int) (bool, error) {
	client := pb.NewWorkloadsClient(a.next())
	request := &pb.ListWorkloadsRequest{PageSize: pageSize}
	sum := 0
	for {
		answer, err := client.ListWorkloads(ctx, request)
		if err != nil {
			return false, err
		}
		for _, w := range answer.Workloads {
			if w.Status.GetState() != pb.State_RUNNING {
				return false, nil
			}
			sum += int(w.Status.Running)
		}
		if request.PageToken = answer.NextPageToken; request.PageToken == "" {
			return sum == replicas, nil
		}
	}
}

// position is how far keyspace and log are.
type position struct{ revision, index int64 }

func (a *api) position(ctx context.Context) (position, error) {
	answer, err := etcdpb.NewMaintenanceClient(a.next()).Status(ctx, &etcdpb.StatusRequest{})
	return position{answer.GetHeader().GetRevision(), int64(answer.GetRaftIndex())}, err
}

// submit applies all workloads, by several callers who each wait for the answer
// to one before they send the next. sending is told when each is sent.
func (a *api) submit(ctx context.Context, c Config, sending func(id string, at time.Time)) ([]time.Duration, error) {
	latencies := make([]time.Duration, c.Workloads)
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range min(c.Callers, c.Workloads) {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= c.Workloads {
					return nil
				}
				spec := c.workload(i)
				began := time.Now()
				sending(spec.Id, began)
				if err := a.apply(ctx, spec, c.REST); err != nil {
					return fmt.Errorf("submit %s: %w", spec.Id, err)
				}
				latencies[i] = time.Since(began)
			}
		})
	}
	err := group.Wait()
	return latencies, err
}

// workload is the spec of the i-th one.
func (c Config) workload(i int) *pb.WorkloadSpec {
	spec := proto.CloneOf(c.Template)
	replicas := c.Replicas / c.Workloads
	if i < c.Replicas%c.Workloads {
		replicas++
	}
	spec.Id, spec.Replicas = fmt.Sprintf("%s-%05d", c.Template.Id, i), proto.Int32(int32(replicas))
	return spec
}

func (a *api) apply(ctx context.Context, spec *pb.WorkloadSpec, rest bool) error {
	began := time.Now()
	for {
		to := a.next()
		var err error
		if rest {
			err = a.post(ctx, to.https+"/v1/workloads", spec)
		} else {
			_, err = pb.NewWorkloadsClient(to).ApplyWorkload(ctx, &pb.ApplyWorkloadRequest{Spec: spec})
		}
		if err == nil || ctx.Err() != nil || time.Since(began) > callPatience {
			return err
		}
		time.Sleep(callPause)
	}
}

func (a *api) post(ctx context.Context, url string, spec *pb.WorkloadSpec) error {
	body, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(spec)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	answer, err := a.http.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", answer.Status, text)
	}
	return err
}
