package procs

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

var (
	round  = flag.Duration("round", 0, "how long each load runs at a time in the comparison with etcd; it is skipped without")
	rounds = flag.Int("rounds", 2, "how often each load runs in the comparison with etcd")
	only   = flag.String("only", "", "of the comparison with etcd, the loads whose names contain this")
)

// rival is a cluster of three servers that speaks etcd.
type rival struct {
	name string
	// Clients' endpoints and processes; the leader is the first.
	endpoints []string
	pids      []int
}

// TestBesideEtcd measures three of our servers and three of etcd's on this machine,
// in turns, so that what else runs here disturbs both:
//
//	go test -run BesideEtcd ./chaos/procs -round 1s
//
// A ratio is how many times better we are: of rates, or of delays.
func TestBesideEtcd(t *testing.T) {
	if *round == 0 {
		t.Skip("-round is not given")
	}
	ours, theirs := persysRival(t), etcdRival(t)
	both := []*rival{theirs, ours}
	for _, r := range both {
		r.prepare(t)
	}
	var table bytes.Buffer
	out := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "load\tetcd/s\tpersys/s\tratio\tetcd p50\tpersys p50\tratio\tetcd p99\tpersys p99\tratio\tetcd cpu µs\tpersys cpu µs\tclient cpu µs\t")
	for _, l := range loads {
		if !strings.Contains(l.name, *only) {
			continue
		}
		results := [2]measured{}
		runs := [2]func(time.Duration) measured{}
		for i, r := range both {
			runs[i] = l.prepare(t, r)
			runs[i](*round / 4)
		}
		for n := range *rounds {
			for i := range both {
				i ^= n & 1 // who came first comes second
				results[i].add(both[i].account(runs[i]))
			}
		}
		for i, r := range both {
			if err := results[i].failure; err != nil {
				t.Errorf("%s at %s: %v", l.name, r.name, err)
			}
		}
		e, p := &results[0], &results[1]
		fmt.Fprintf(out, "%s\t%.0f\t%.0f\t%.2f\t%s\t%s\t%.2f\t%s\t%s\t%.2f\t%.0f\t%.0f\t%.0f\t\n", l.name, e.rate(), p.rate(), p.rate()/e.rate(),
			ms(e.quantile(.5)), ms(p.quantile(.5)), ratio(e.quantile(.5), p.quantile(.5)),
			ms(e.quantile(.99)), ms(p.quantile(.99)), ratio(e.quantile(.99), p.quantile(.99)),
			each(e.cpu, e), each(p.cpu, p), each(p.own, p))
	}
	out.Flush()
	fmt.Print(&table)
}

func ms(d time.Duration) string                 { return fmt.Sprintf("%.2f ms", d.Seconds()*1000) }
func ratio(a, b time.Duration) float64          { return a.Seconds() / b.Seconds() }
func each(d time.Duration, m *measured) float64 { return d.Seconds() * 1e6 / float64(len(m.delays)) }

// load is a row of the table.
type load struct {
	name    string
	prepare func(t testing.TB, r *rival) func(time.Duration) measured
}

var loads = slices.Concat(
	[]load{
		{"put, 1 at the leader", repeat(1, put, leader)},
		{"put, 1 at a follower", repeat(1, put, follower)},
		{"put, 64", repeat(64, put, anywhere)},
		{"put, 1000", repeat(1000, put, anywhere)},
		{"range, 1 at the leader", repeat(1, linearizable, leader)},
		{"range, 1 at a follower", repeat(1, linearizable, follower)},
		{"range, 1000", repeat(1000, linearizable, anywhere)},
		{"serializable range, 1", repeat(1, serializable, leader)},
		{"serializable range, 1000", repeat(1000, serializable, anywhere)},
		{"txn, 1 at the leader", repeat(1, txn, leader)},
		{"txn, 1000", repeat(1000, txn, anywhere)},
	},
	[]load{
		{"keep-alive, 1 at the leader", keepLeases(1, leader)},
		{"keep-alive, 1000", keepLeases(1000, anywhere)},
		{"delivery to 100 watchers", func(t testing.TB, r *rival) func(time.Duration) measured {
			conns := connections(t, r.endpoints, 10*clientsPerConn)
			return func(length time.Duration) measured { return delivery(t.Context(), conns, 100, length) }
		}},
	},
)

func leader(r *rival) []string   { return r.endpoints[:1] }
func follower(r *rival) []string { return r.endpoints[1:2] }
func anywhere(r *rival) []string { return r.endpoints }

func repeat(callers int, op operation, where func(*rival) []string) func(testing.TB, *rival) func(time.Duration) measured {
	return func(t testing.TB, r *rival) func(time.Duration) measured {
		conns := connections(t, where(r), callers)
		return func(length time.Duration) measured { return hammer(t.Context(), conns, callers, length, op) }
	}
}

func keepLeases(callers int, where func(*rival) []string) func(testing.TB, *rival) func(time.Duration) measured {
	return func(t testing.TB, r *rival) func(time.Duration) measured {
		conn := connect(t, r.endpoints[0])
		leases := make([]clientv3.LeaseID, 1000)
		for i := range leases {
			lease, err := conn.Grant(t.Context(), 600)
			if err != nil {
				t.Errorf("%s: %v", r.name, err)
				break
			}
			leases[i] = lease.ID
		}
		return repeat(callers, keepAlive(leases), where)(t, r)
	}
}

// prepare stores what the loads read, and puts the leader first.
func (r *rival) prepare(t testing.TB) {
	t.Helper()
	conns := connections(t, r.endpoints, 1000)
	if err := fill(t.Context(), conns, "load/", loadKeys); err != nil {
		t.Fatalf("%s: %v", r.name, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	for i, endpoint := range r.endpoints {
		status, err := conns[0].Status(ctx, endpoint)
		if err != nil {
			t.Fatalf("%s: %v", r.name, err)
		}
		if status.Leader == status.Header.MemberId {
			r.endpoints[0], r.endpoints[i] = r.endpoints[i], r.endpoints[0]
			r.pids[0], r.pids[i] = r.pids[i], r.pids[0]
			return
		}
	}
	t.Fatalf("%s: nobody leads", r.name)
}

// account runs a load and adds up the processor time.
func (r *rival) account(run func(time.Duration) measured) measured {
	cpu, own := r.cpu(), ownCPU()
	m := run(*round)
	m.cpu, m.own = r.cpu()-cpu, ownCPU()-own
	return m
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// cpu is the time that the servers have taken so far.
func (r *rival) cpu() (sum time.Duration) {
	for _, pid := range r.pids {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		// utime and stime, in hundredths of a second, are the 12th and 13th field after the name.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		for _, f := range fields[11:13] {
			ticks, _ := strconv.Atoi(string(f))
			sum += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return sum
}

// resident is the memory of the largest server, in bytes.
func (r *rival) resident() (most int64) {
	for _, pid := range r.pids {
		statm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		pages, _ := strconv.ParseInt(string(bytes.Fields(statm)[1]), 10, 64)
		most = max(most, pages*int64(os.Getpagesize()))
	}
	return most
}

func persysRival(t testing.TB) *rival {
	c := New(t, cmp.Or(os.Getenv("PERSYS_PROGRAM"), program))
	const port = "7483"
	r := &rival{name: "persys"}
	var servers []*Process
	for _, name := range []string{"s1", "s2", "s3"} {
		listen := fmt.Sprintf("127.%d.%d.%d:%s", 100+os.Getpid()%100, c.network, c.hosts+1, port)
		if name == "s1" {
			servers = append(servers, c.Init(name, "--etcd-listen", listen))
		} else {
			servers = append(servers, c.Join("server", name, "--etcd-listen", listen))
		}
		r.endpoints = append(r.endpoints, "http://"+listen)
	}
	c.Eventually("three voters", soon, func() error { return c.voters(3) })
	for _, s := range servers {
		r.pids = append(r.pids, s.cmd.Process.Pid)
	}
	return r
}

// etcdRival starts Debian's etcd.
func etcdRival(t testing.TB) *rival {
	t.Helper()
	etcd, err := exec.LookPath("etcd")
	if err != nil {
		t.Skip("etcd is not installed: hack/setup.sh does it")
	}
	dir, r := t.TempDir(), &rival{name: "etcd"}
	var peers, cluster []string
	for i := range 3 {
		r.endpoints = append(r.endpoints, "http://"+freeAddress(t))
		peers = append(peers, "http://"+freeAddress(t))
		cluster = append(cluster, fmt.Sprintf("e%d=%s", i, peers[i]))
	}
	for i := range 3 {
		name := fmt.Sprintf("e%d", i)
		log, err := os.Create(filepath.Join(dir, name+".log"))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		cmd := exec.Command(etcd, "--name", name, "--data-dir", filepath.Join(dir, name), "--logger", "zap", "--log-level", "error",
			"--listen-client-urls", r.endpoints[i], "--advertise-client-urls", r.endpoints[i],
			"--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i], "--initial-cluster", strings.Join(cluster, ","))
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		r.pids = append(r.pids, cmd.Process.Pid)
	}
	deadline := time.Now().Add(soon)
	for _, endpoint := range r.endpoints {
		for {
			conn, err := net.Dial("tcp", strings.TrimPrefix(endpoint, "http://"))
			if err == nil {
				conn.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("etcd is not up within %s: %v", soon, err)
			}
			time.Sleep(pollEvery)
		}
	}
	return r
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
