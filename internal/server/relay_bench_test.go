package server

import (
	"fmt"
	"testing"
	"time"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What the leader spends on what 10,000 agents say, without their connections: a
// hello, a heartbeat, and a full report of ten replicas in which nothing is new, as
// after an election.
//
//	go test ./internal/server -run '^$' -bench Relay
func BenchmarkRelay(b *testing.B) {
	const nodes, each, batch = 10_000, 10, 1000
	c := newTestCluster(b)
	c.quiet, c.lease = true, time.Hour
	s1 := c.init("s1")
	c.voters(s1, 1)
	c.eventually("s1 leads", func() error {
		if s1.replica.Load().leading.Load() == nil {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	r := s1.replica.Load()
	l := r.leading.Load()
	relay := func(first int, say func(report *pb.AgentReport)) {
		request := &pb.RelayRequest{MemberId: r.memberID}
		for i := range batch {
			report := &pb.AgentReport{NodeId: fmt.Sprintf("n%d", first+i), Incarnation: "one"}
			say(report)
			request.Reports = append(request.Reports, report)
		}
		response, err := l.relay(b.Context(), request)
		if err != nil {
			b.Fatal(err)
		}
		for i, result := range response.Results {
			if !result.Ok {
				b.Fatalf("%s: %v", request.Reports[i].NodeId, result)
			}
		}
	}
	everyone := func(say func(report *pb.AgentReport)) {
		for first := 0; first < nodes; first += batch {
			relay(first, say)
		}
	}
	hello := func(report *pb.AgentReport) {
		report.Hello = &pb.AgentHello{
			NodeId: report.NodeId, Incarnation: report.Incarnation, Capacity: &pb.NodeCapacity{CpuMillis: 64_000, MemoryBytes: 256 << 30},
			Runtimes: []*pb.RuntimeInfo{{Type: pb.WorkloadType_PROCESS, Healthy: true}},
		}
	}
	measure := func(name string, per int, say func(report *pb.AgentReport)) {
		b.Run(name, func(b *testing.B) {
			used, n := cpuTime(), 0
			for b.Loop() {
				relay(n%(nodes/batch)*batch, say)
				n++
			}
			b.ReportMetric(float64((cpuTime()-used).Nanoseconds())/1e3/float64(b.N*batch*per), "cpu-µs/each")
			b.ReportMetric(0, "ns/op")
		})
	}
	everyone(hello)
	measure("hello", 1, hello)
	measure("heartbeat", 1, func(report *pb.AgentReport) { report.Heartbeat = &pb.Heartbeat{Seq: 1, Usage: &pb.NodeUsage{}} })

	client := c.workloads(s1)
	for i := range each {
		if _, err := client.ApplyWorkload(b.Context(), &pb.ApplyWorkloadRequest{Spec: smallProcess(fmt.Sprintf("many%d", i), nodes)}); err != nil {
			b.Fatal(err)
		}
	}
	c.eventually("all are assigned", func() error {
		if n := count(r, model.AssignmentsPrefix); n != nodes*each {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	view := r.store.View()
	if err := r.picture.reached(b.Context(), view.Revision()); err != nil {
		b.Fatal(err)
	}
	full := func(report *pb.AgentReport) {
		status := &pb.StatusReport{Seq: 1, Full: true, DesiredRevision: view.Revision()}
		r.picture.mu.Lock()
		defer r.picture.mu.Unlock()
		for _, k := range r.picture.current.AssignedTo(report.NodeId) {
			status.Replicas = append(status.Replicas, &pb.Replica{
				WorkloadId: k.WorkloadId, Replica: k.Replica, NodeId: report.NodeId, Generation: k.Generation, State: pb.State_RUNNING, RuntimeId: "pid-12345678",
			})
		}
		report.Status = []*pb.StatusReport{status}
	}
	everyone(full)
	c.eventually("all run", func() error {
		for i := range each {
			if n := running(r, fmt.Sprintf("many%d", i)); n != nodes {
				return fmt.Errorf("%d of many%d", n, i)
			}
		}
		return nil
	})
	measure("full-report", each, full)
}
