package raftstore

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Three replicas with real disks; raft and gRPC between them on one port each, with
// mutual TLS, as servers have it:
//
//	go test ./raftstore -run '^$' -bench . -benchtime 3s
//
// PERSYS_LOG=wal|boltdb chooses the log store.

// benchCluster serves Consensus over gRPC. serve does so for the replica at an
// address that was opened.
func benchCluster(b *testing.B) (c *cluster, serve map[string]func(*Store)) {
	b.Helper()
	authority, err := pki.NewAuthority("bench")
	if err != nil {
		b.Fatal(err)
	}
	serve = map[string]func(*Store){}
	c = &cluster{t: b, n: newNetwork()}
	change := func(cfg *Config) {
		cfg.Log = LogKind(os.Getenv("PERSYS_LOG"))
		cfg.Timing = Timing{}
		credentials := benchCredentials(b, authority)
		mux := pki.NewMux(cfg.Stream.(*stream).Listener, credentials, pki.MuxOptions{})
		ctx, stop := context.WithCancel(context.Background())
		b.Cleanup(stop)
		go mux.Run(ctx)
		cfg.Stream = pki.NewRaftStream(mux.Raft(), credentials, cfg.Address)
		server := grpc.NewServer(grpc.Creds(pki.TransportCredentials()))
		serve[cfg.Address] = func(s *Store) {
			pb.RegisterConsensusServer(server, s.Service())
			go server.Serve(mux.GRPC())
			b.Cleanup(server.Stop)
		}
		var mu sync.Mutex
		conns := map[string]*grpc.ClientConn{}
		cfg.Dial = func(_ context.Context, to string) (pb.ConsensusClient, error) {
			mu.Lock()
			defer mu.Unlock()
			if conns[to] == nil {
				conn, err := grpc.NewClient(to, credentials.DialOption(pki.RequireRole(pb.Role_ROLE_SERVER)))
				if err != nil {
					return nil, err
				}
				conns[to] = conn
				b.Cleanup(func() { conn.Close() })
			}
			return pb.NewConsensusClient(conns[to]), nil
		}
	}
	for i := range 3 {
		r := c.add(change)
		r.open()
		serve[r.address](r.Store)
		if i == 0 {
			if err := r.Bootstrap(); err != nil {
				b.Fatal(err)
			}
			r.run()
			r.awaitLeading()
			continue
		}
		r.run()
		c.promote(r)
	}
	return c, serve
}

func benchCredentials(b *testing.B, authority *pki.Authority) *pki.Credentials {
	b.Helper()
	key, csr, err := pki.NewKeyAndCSR("server")
	if err != nil {
		b.Fatal(err)
	}
	who := pki.Identity{Cluster: authority.ClusterID(), Role: pb.Role_ROLE_SERVER, Name: "server"}
	chain, _, _, err := authority.Issue(csr, who, nil, time.Hour)
	if err != nil {
		b.Fatal(err)
	}
	credentials, err := pki.NewCredentials(key, chain, authority.Roots())
	if err != nil {
		b.Fatal(err)
	}
	return credentials
}

// load runs op from so many callers for b.N times in all, and reports rate and
// latencies.
func load(b *testing.B, callers int, op func(caller, i int) error) {
	b.Helper()
	took := make([][]time.Duration, callers)
	var wg sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for c := range callers {
		n := b.N / callers
		if c < b.N%callers {
			n++
		}
		wg.Go(func() {
			took[c] = make([]time.Duration, 0, n)
			for i := range n {
				at := time.Now()
				if err := op(c, i); err != nil {
					b.Error(err)
					return
				}
				took[c] = append(took[c], time.Since(at))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	b.StopTimer()
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	if len(all) == 0 {
		return
	}
	b.ReportMetric(float64(len(all))/elapsed.Seconds(), "ops/s")
	b.ReportMetric(float64(all[len(all)/2].Microseconds())/1e3, "p50-ms")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1e3, "p99-ms")
}

func BenchmarkPropose(b *testing.B) {
	value := strings.Repeat("v", 256)
	for _, at := range []string{"leader", "follower"} {
		for _, callers := range []int{1, 64, 1024} {
			b.Run(fmt.Sprintf("%s/callers=%d", at, callers), func(b *testing.B) {
				c, _ := benchCluster(b)
				r := c.leader()
				if at == "follower" {
					r = c.followers()[0]
				}
				ctx := context.Background()
				load(b, callers, func(caller, i int) error {
					_, err := r.Propose(ctx, put(fmt.Sprintf("key/%04d/%03d", caller, i%500), value))
					return err
				})
				leader := c.leader()
				b.ReportMetric(histogramMean(b, leader.metrics.batchTxns), "txns/entry")
				b.ReportMetric(1e3*histogramMean(b, leader.metrics.logWrite), "log-write-ms")
			})
		}
	}
}

// BenchmarkWatched: what watchers of other keys cost the writers.
func BenchmarkWatched(b *testing.B) {
	for _, watchers := range []int{0, 100, 1000} {
		b.Run(fmt.Sprintf("watchers=%d", watchers), func(b *testing.B) {
			c, _ := benchCluster(b)
			r := c.leader()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			for i := range watchers {
				w := r.Watch(WatchRange{Key: fmt.Appendf(nil, "watched/%d", i), After: r.View().Revision()})
				go w.Next(ctx)
			}
			load(b, 256, func(caller, i int) error {
				_, err := r.Propose(ctx, put(fmt.Sprintf("key/%04d/%03d", caller, i%500), "value"))
				return err
			})
		})
	}
}

func BenchmarkLinearizable(b *testing.B) {
	for _, at := range []string{"leader", "follower"} {
		for _, callers := range []int{1, 1024} {
			b.Run(fmt.Sprintf("%s/callers=%d", at, callers), func(b *testing.B) {
				c, _ := benchCluster(b)
				r := c.leader()
				if at == "follower" {
					r = c.followers()[0]
				}
				r.mustPropose(put("k", "v"))
				ctx := context.Background()
				load(b, callers, func(int, int) error {
					_, err := r.Linearizable(ctx)
					return err
				})
			})
		}
	}
}

// BenchmarkFailover: the leader is cut off with its connections reset, as by
// kill -9, to the first write acknowledged through another replica. One operation
// is one failover; use -benchtime 20x.
func BenchmarkFailover(b *testing.B) {
	c, serve := benchCluster(b)
	var took []time.Duration
	for range b.N {
		leader := c.leader()
		for _, r := range c.followers() {
			r.mustPropose(put("k", "v"))
		}
		next := c.followers()[0]
		start := time.Now()
		c.n.isolate(leader.address)
		if _, err := next.Propose(within(b, patience), put("k", "after")); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
		leader.shut()
		c.n.heal(leader.address)
		leader.open()
		serve[leader.address](leader.Store)
		leader.run()
		c.sameState()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Milliseconds()), "p99-ms")
	b.ReportMetric(float64(took[len(took)-1].Milliseconds()), "max-ms")
}

func histogramMean(b *testing.B, h prometheus.Histogram) float64 {
	b.Helper()
	var m dto.Metric
	if err := h.Write(&m); err != nil {
		b.Fatal(err)
	}
	return m.Histogram.GetSampleSum() / float64(m.Histogram.GetSampleCount())
}
