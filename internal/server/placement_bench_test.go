package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Three servers and a hundred agents in this process, everything over gRPC with
// mutual TLS and on real disks; only what the agents run is not real:
//
//	go test ./internal/server -run '^$' -bench Placement -benchtime 3x
//
// cpu-µs/replica is of the whole process, agents included.

// fleetOf starts agents that run whatever is wanted of them at once.
func (c *testCluster) fleetOf(n int, servers ...*testHost) *testFleet {
	c.t.Helper()
	f := &testFleet{agents: make([]*testAgent, n)}
	founder, err := loadIdentity(c.first.config.DataDir)
	if err != nil {
		c.t.Fatal(err)
	}
	authority, err := pki.LoadAuthority(caDir(c.first.config.DataDir))
	if err != nil {
		c.t.Fatal(err)
	}
	var addresses []string
	for _, s := range servers {
		addresses = append(addresses, s.config.grpcAddress())
	}
	key, csr, err := pki.NewKeyAndCSR("fleet")
	if err != nil {
		c.t.Fatal(err)
	}
	var group sync.WaitGroup
	for i := range f.agents {
		name := fmt.Sprintf("n%d", i)
		chain, _, _, err := authority.Issue(csr, pki.Identity{Cluster: founder.ClusterID, Role: pb.Role_ROLE_AGENT, Name: name}, []string{"127.0.0.1"}, time.Hour)
		if err != nil {
			c.t.Fatal(err)
		}
		own, err := pki.NewCredentials(key, chain, authority.Roots())
		if err != nil {
			c.t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		a := &testAgent{name: name, incarnation: uuid.NewString(), servers: addresses, turn: i, credentials: own, stop: stop, held: map[string]*pb.Replica{}}
		f.agents[i] = a
		group.Go(func() { a.run(ctx) })
	}
	c.t.Cleanup(func() {
		for _, a := range f.agents {
			a.stop()
		}
		group.Wait()
	})
	c.eventually(fmt.Sprintf("%d nodes", n), func() error {
		ready := 0
		for kv := range servers[0].replica.Load().store.View().Scan(model.NodesPrefix) {
			if _, sub, ok := model.SplitKey(model.NodesPrefix, string(kv.Key)); ok && sub == "lease" {
				ready++
			}
		}
		if ready < n {
			return fmt.Errorf("%d", ready)
		}
		return nil
	})
	return f
}

type testFleet struct{ agents []*testAgent }

// testAgent holds sessions as an agent does: one status report under way at a
// time, what changes within 20 ms in one, and heartbeats. It is for one goroutine.
type testAgent struct {
	name, incarnation string
	servers           []string
	turn              int
	credentials       *pki.Credentials
	stop              context.CancelFunc

	held     map[string]*pb.Replica
	revision int64
	seq      uint64
	// The report under way, and the next.
	sent *pb.StatusReport
	next pb.StatusReport
}

func (a *testAgent) run(ctx context.Context) {
	peers := newPeers(credentials.NewTLS(a.credentials.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2")))
	defer peers.close()
	for ctx.Err() == nil {
		conn, err := peers.dial(a.servers[a.turn%len(a.servers)])
		if err == nil {
			_ = a.attach(ctx, conn)
		}
		a.turn++
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (a *testAgent) attach(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewAgentsClient(conn).Session(ctx)
	if err != nil {
		return err
	}
	hello := &pb.AgentHello{
		NodeId: a.name, Incarnation: a.incarnation, Version: "test", Capacity: &pb.NodeCapacity{CpuMillis: 64_000, MemoryBytes: 256 << 30, DiskBytes: 1 << 40},
		Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_PROCESS, Healthy: true}}, Address: "127.0.0.1",
	}
	if err := stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Hello{Hello: hello}}); err != nil {
		return err
	}
	received, failed := make(chan *pb.ServerMessage), make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case received <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	beat := time.NewTicker(2 * time.Second)
	defer beat.Stop()
	var gather <-chan time.Time
	// What is gone is said until it is acknowledged.
	a.sent, a.next = nil, pb.StatusReport{Removed: append(a.sent.GetRemoved(), a.next.Removed...)}
	for n := uint64(0); ; {
		select {
		case m := <-received:
			switch m := m.Message.(type) {
			case *pb.ServerMessage_Desired:
				a.take(m.Desired)
				if gather == nil {
					gather = time.After(20 * time.Millisecond)
				}
			case *pb.ServerMessage_StatusAck:
				a.sent = nil
			}
		case <-beat.C:
			n++
			if err := stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Heartbeat{Heartbeat: &pb.Heartbeat{Seq: n}}}); err != nil {
				return err
			}
		case <-gather:
			gather = nil
		case err := <-failed:
			return err
		}
		if gather != nil || a.sent != nil || len(a.next.Replicas) == 0 && len(a.next.Removed) == 0 && !a.next.Full {
			continue
		}
		a.seq++
		report := &pb.StatusReport{Seq: a.seq, Full: a.next.Full, DesiredRevision: a.revision, Replicas: a.next.Replicas, Removed: a.next.Removed}
		if err := stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Status{Status: report}}); err != nil {
			return err
		}
		a.sent, a.next = report, pb.StatusReport{}
	}
}

// take runs what is wanted, at once.
func (a *testAgent) take(set *pb.DesiredSet) {
	a.revision = set.Revision
	if set.Complete {
		for _, r := range a.held {
			a.next.Removed = append(a.next.Removed, &pb.Replica{WorkloadId: r.WorkloadId, Replica: r.Replica, Generation: r.Generation, State: pb.State_DELETED})
		}
		clear(a.held)
		a.next.Full, a.next.Replicas = true, nil
	}
	for _, item := range set.Items {
		want := item.Assignment
		r := &pb.Replica{
			WorkloadId: want.WorkloadId, Replica: want.Replica, NodeId: a.name, Generation: want.Generation, Revision: want.Revision,
			State: pb.State_RUNNING, RuntimeId: "pid-12345678", StartTime: want.CreateTime,
		}
		a.held[model.ReplicaKey(r.WorkloadId, r.Replica)] = r
		a.next.Replicas = append(a.next.Replicas, r)
	}
	for _, k := range set.Removed {
		delete(a.held, model.ReplicaKey(k.WorkloadId, k.Replica))
		a.next.Removed = append(a.next.Removed, &pb.Replica{WorkloadId: k.WorkloadId, Replica: k.Replica, Generation: k.Generation, State: pb.State_DELETED})
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type placementBench struct {
	*testCluster
	b       *testing.B
	servers []*testHost
	runs    atomic.Int64
}

func newPlacementBench(b *testing.B) *placementBench {
	c := newTestCluster(b)
	c.quiet, c.lease = true, 10*time.Second
	s1 := c.init("s1")
	c.voters(s1, 1)
	s2, s3 := c.join(pb.Role_ROLE_SERVER, "s2"), c.join(pb.Role_ROLE_SERVER, "s3")
	c.voters(s1, 3)
	c.voters(s2, 3)
	c.voters(s3, 3)
	return &placementBench{testCluster: c, b: b, servers: []*testHost{s1, s2, s3}}
}

// admin is what Init made for whoever founded the cluster.
func (c *testCluster) admin() *pki.Credentials {
	c.t.Helper()
	admin, err := pki.LoadCredentials(credentialsDir(c.first.config.DataDir, pb.Role_ROLE_ADMIN))
	if err != nil {
		c.t.Fatal(err)
	}
	return admin
}

func (c *testCluster) workloads(server *testHost) pb.WorkloadsClient {
	c.t.Helper()
	peers := newPeers(credentials.NewTLS(c.admin().ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2")))
	c.t.Cleanup(peers.close)
	conn, err := peers.dial(server.config.grpcAddress())
	if err != nil {
		c.t.Fatal(err)
	}
	return pb.NewWorkloadsClient(conn)
}

// until polls a server's own state.
func (p *placementBench) until(what string, server int, check func(r *replica) bool) {
	p.b.Helper()
	deadline := time.Now().Add(patience)
	for !check(p.servers[server].replica.Load()) {
		if time.Now().After(deadline) {
			for _, prefix := range []string{model.WorkloadsPrefix, model.AssignmentsPrefix, model.ReplicasPrefix} {
				for kv := range p.servers[server].replica.Load().store.View().Scan(prefix) {
					p.b.Logf("%s at %d, first of %d", kv.Key, kv.ModRevision, count(p.servers[server].replica.Load(), prefix))
					break
				}
			}
			p.b.Fatalf("%s: not within %s", what, patience)
		}
		time.Sleep(time.Millisecond)
	}
}

func count(r *replica, prefix string) int {
	answer, refused := r.store.View().Range(&pb.RangeRequest{Key: []byte(prefix), RangeEnd: model.PrefixEnd(prefix), CountOnly: true})
	if refused != nil {
		return 0
	}
	return int(answer.Count)
}

func running(r *replica, id string) int {
	s := &pb.WorkloadStatus{}
	if _, ok, err := model.Load(r.store.View(), model.WorkloadStatusKey(id), s); !ok || err != nil {
		return 0
	}
	return int(s.Running)
}

// One workload of 5,000 replicas, submitted to a follower and seen there.
func BenchmarkPlacementOfMany(b *testing.B) {
	const replicas = 5000
	p := newPlacementBench(b)
	p.fleetOf(100, p.servers...)
	client := p.workloads(p.servers[1])
	var visible, all, gone, cpu time.Duration
	for b.Loop() {
		id := fmt.Sprintf("many%d", p.runs.Add(1))
		began, used := time.Now(), cpuTime()
		if _, err := client.ApplyWorkload(b.Context(), &pb.ApplyWorkloadRequest{Spec: smallProcess(id, replicas)}); err != nil {
			b.Fatal(err)
		}
		p.until("all assigned", 1, func(r *replica) bool { return count(r, model.AssignmentsPrefix+id+"/") == replicas })
		visible += time.Since(began)
		p.until("all running", 1, func(r *replica) bool { return running(r, id) == replicas })
		all += time.Since(began)
		cpu += cpuTime() - used
		began = time.Now()
		if _, err := client.DeleteWorkload(b.Context(), &pb.DeleteWorkloadRequest{Id: id}); err != nil {
			b.Fatal(err)
		}
		p.until("all gone", 1, func(r *replica) bool {
			return count(r, model.ReplicasPrefix+id+"/") == 0 && count(r, model.AssignmentsPrefix+id+"/") == 0 && count(r, model.WorkloadsPrefix+id) == 0
		})
		gone += time.Since(began)
	}
	n := float64(b.N)
	b.ReportMetric(n*replicas/visible.Seconds(), "placed/s")
	b.ReportMetric(all.Seconds()/n, "s-to-running")
	b.ReportMetric(gone.Seconds()/n, "s-to-gone")
	b.ReportMetric(float64(cpu.Microseconds())/n/replicas, "cpu-µs/replica")
	b.ReportMetric(0, "ns/op")
}

// 1,000 workloads of one replica each, by 32 callers over REST.
func BenchmarkPlacementOfOnes(b *testing.B) {
	const workloads, callers = 1000, 32
	p := newPlacementBench(b)
	p.fleetOf(100, p.servers...)
	tls := p.admin().ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2", "http/1.1")
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: tls, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: callers}}
	b.Cleanup(client.CloseIdleConnections)
	var placed, all, cpu time.Duration
	for b.Loop() {
		run := p.runs.Add(1)
		began, used := time.Now(), cpuTime()
		var next atomic.Int64
		var group sync.WaitGroup
		for i := range callers {
			group.Go(func() {
				address := p.servers[i%len(p.servers)].config.httpsAddress()
				for n := next.Add(1); n <= workloads; n = next.Add(1) {
					body := fmt.Sprintf(`{"id":"w%d-%d","process":{"command":"/bin/true"},"resources":{"cpu":"10m","memory":"16Mi"}}`, run, n)
					answer, err := client.Post("https://"+address+"/v1/workloads", "application/json", bytes.NewReader([]byte(body)))
					if err != nil {
						b.Error(err)
						return
					}
					said, _ := io.ReadAll(answer.Body)
					answer.Body.Close()
					if answer.StatusCode != http.StatusCreated {
						b.Errorf("%s: %.200s", answer.Status, said)
						return
					}
				}
			})
		}
		group.Wait()
		if b.Failed() {
			return
		}
		prefix := fmt.Sprintf("w%d-", run)
		p.until("all assigned", 1, func(r *replica) bool { return count(r, model.AssignmentsPrefix+prefix) == workloads })
		placed += time.Since(began)
		p.until("all running", 1, func(r *replica) bool { return count(r, model.ReplicasPrefix+prefix) == workloads })
		all += time.Since(began)
		cpu += cpuTime() - used
	}
	n := float64(b.N)
	b.ReportMetric(n*workloads/placed.Seconds(), "placed/s")
	b.ReportMetric(all.Seconds()/n, "s-to-running")
	b.ReportMetric(float64(cpu.Microseconds())/n/workloads, "cpu-µs/workload")
	b.ReportMetric(0, "ns/op")
}

func smallProcess(id string, replicas int32) *pb.WorkloadSpec {
	return &pb.WorkloadSpec{
		Id: id, Replicas: &replicas, Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "/bin/true"}},
		Resources: &pb.Resources{Cpu: "10m", Memory: "16Mi"},
	}
}
