package procs

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// BenchmarkFailover kills the leader of three servers and measures how long it
// takes until a write through a survivor is acknowledged, and until the workload
// that it creates has its place. Run it with -benchtime=20x.
func BenchmarkFailover(b *testing.B) {
	c := New(b, program)
	servers := map[string]*Process{"s1": c.Init("s1")}
	servers["s2"], servers["s3"] = c.Join("server", "s2"), c.Join("server", "s3")
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	clients := map[string]pb.WorkloadsClient{}
	for name, s := range servers {
		clients[name] = c.workloads(s)
	}
	c.Join("agent", "n1", "--docker-host", "none")
	c.Eventually("the node is ready", soon, func() error { return c.readyNodes(1) })
	var took, placed []time.Duration
	for i := 0; b.Loop(); i++ {
		leader := c.leader()
		var survivors []pb.WorkloadsClient
		for name, client := range clients {
			if name != leader {
				survivors = append(survivors, client)
				mustWrite(b, client, i, name)
			}
		}
		started := time.Now()
		servers[leader].Kill()
		for n := 0; ; n++ {
			if err := write(survivors[n%len(survivors)], i, "after"); err == nil {
				break
			} else if time.Since(started) > soon {
				b.Fatal(err)
			}
		}
		took = append(took, time.Since(started))
		for !assigned(survivors[0], i, "after") {
			if time.Since(started) > soon {
				b.Fatal("it is not placed")
			}
		}
		placed = append(placed, time.Since(started))
		servers[leader].Start()
		c.Eventually(leader+" is back", soon, func() error { return c.caughtUp(leader) })
	}
	milliseconds := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	for name, all := range map[string][]time.Duration{"": took, "placed-": placed} {
		slices.Sort(all)
		b.ReportMetric(milliseconds(all[len(all)/2]), name+"p50-ms")
		b.ReportMetric(milliseconds(all[(len(all)*99+99)/100-1]), name+"p99-ms")
	}
	b.ReportMetric(0, "ns/op")
}

func (c *Cluster) workloads(p *Process) pb.WorkloadsClient {
	c.t.Helper()
	admin, err := pki.LoadCredentials(filepath.Join(c.first.DataDir, "pki", "admin"))
	if err != nil {
		c.t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(p.IP, "7481"),
		grpc.WithTransportCredentials(credentials.NewTLS(admin.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "h2"))))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return pb.NewWorkloadsClient(conn)
}

// write creates a workload of one replica.
func write(client pb.WorkloadsClient, round int, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := client.ApplyWorkload(ctx, &pb.ApplyWorkloadRequest{Spec: &pb.WorkloadSpec{
		Id:   fmt.Sprintf("w%d-%s", round, name),
		Spec: &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Command: "sleep", Args: []string{"600"}}},
	}})
	return err
}

// assigned reports whether the workload's replica has been given a node.
func assigned(client pb.WorkloadsClient, round int, name string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	w, err := client.GetWorkload(ctx, &pb.GetWorkloadRequest{Id: fmt.Sprintf("w%d-%s", round, name)})
	return err == nil && w.GetStatus().GetAssigned() == 1
}

func mustWrite(b *testing.B, client pb.WorkloadsClient, round int, name string) {
	b.Helper()
	if err := write(client, round, name); err != nil {
		b.Fatal(err)
	}
}
