package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	// How long a server has to stop before it is killed.
	stopTimeout = 10 * time.Second
	// More of a server's log than this is not shown.
	shownLog = 2 << 10
)

// servers are processes of this machine, each at a loopback address of its own.
type servers struct {
	Config
	dir     string
	network [2]int
	all     []*process
}

type process struct {
	config server.Config
	cmd    *exec.Cmd
	exited chan struct{}
	// Taken away by the scenario.
	killed bool
	// Processor time that was seen.
	used time.Duration
}

func newServers(c Config, dir string) *servers {
	pid := os.Getpid()
	return &servers{Config: c, dir: dir, network: [2]int{200 + pid%50, pid / 50 % 100}}
}

// address of a host of the simulated network: servers are in its first /24,
// agents in those after it.
func (s *servers) address(subnet, host int) string {
	return fmt.Sprintf("127.%d.%d.%d", s.network[0], s.network[1]+subnet, host)
}

// start founds the cluster and has all servers join it as voters.
func (s *servers) start(ctx context.Context) (*api, error) {
	first, err := s.host(1)
	if err != nil {
		return nil, err
	}
	if err := server.Init(ctx, first.config); err != nil {
		return nil, err
	}
	if err := s.launch(first); err != nil {
		return nil, err
	}
	api, err := newAPI(first.config.DataDir)
	if err != nil {
		return nil, err
	}
	if err := s.introduce(ctx, api, first); err != nil {
		return nil, err
	}
	for n := 2; n <= s.Servers; n++ {
		if err := s.join(ctx, n, api); err != nil {
			return nil, err
		}
	}
	return api, s.awaitVoters(ctx, api)
}

func (s *servers) join(ctx context.Context, n int, api *api) error {
	p, err := s.host(n)
	if err != nil {
		return err
	}
	token, err := api.cluster().CreateToken(ctx, &pb.CreateTokenRequest{Role: pb.Role_ROLE_SERVER})
	if err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	if _, err := server.Join(ctx, p.config, token.Secret); err != nil {
		return err
	}
	if err := s.launch(p); err != nil {
		return err
	}
	return s.introduce(ctx, api, p)
}

// introduce makes the server known to the API once it answers.
func (s *servers) introduce(ctx context.Context, api *api, p *process) error {
	conn := api.connect(p.config)
	err := api.await(ctx, "server "+p.config.Name, func() (bool, error) {
		_, err := pb.NewClusterClient(conn).GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
		return err == nil, s.alive(p)
	})
	if err != nil {
		_ = conn.Close()
		return err
	}
	api.add(conn)
	return nil
}

func (s *servers) awaitVoters(ctx context.Context, api *api) error {
	promoted := map[string]bool{}
	return api.await(ctx, "servers voting", func() (bool, error) {
		members, err := api.cluster().ListMembers(ctx, &pb.ListMembersRequest{})
		voters := 0
		for _, m := range members.GetMembers() {
			if m.Voter && m.Reachable {
				voters++
			}
			// The cluster makes three by itself.
			if s.Servers > 3 && !promoted[m.Name] {
				_, err := api.cluster().PromoteMember(ctx, &pb.MemberRequest{Name: m.Name})
				promoted[m.Name] = err == nil
			}
		}
		return err == nil && voters == s.Servers, s.alive(s.all...)
	})
}

// host is where and as what a server is to run.
func (s *servers) host(n int) (*process, error) {
	name := fmt.Sprintf("s%d", n)
	config, err := server.Config{
		DataDir: filepath.Join(s.dir, name), Name: name, Advertise: s.address(0, n), LeaseTTL: s.LeaseTTL, LogLevel: "error",
	}.WithDefaults()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(config.Bind, fmt.Sprint(config.GRPCPort)))
	if err != nil {
		return nil, fmt.Errorf("address for server %s: %w", name, err)
	}
	return &process{config: config, exited: make(chan struct{})}, l.Close()
}

// launch runs the server that the process's data directory holds. It ends with
// this process, whatever ends that.
func (s *servers) launch(p *process) error {
	// A file of its own, so that none of this machine's is read.
	settings, err := yaml.Marshal(map[string]any{
		"data_dir": p.config.DataDir, "name": p.config.Name, "advertise": p.config.Advertise,
		"lease_ttl": p.config.LeaseTTL.String(), "log_level": p.config.LogLevel,
	})
	if err != nil {
		return err
	}
	file := p.config.DataDir + ".yaml"
	if err := os.WriteFile(file, settings, 0o600); err != nil {
		return err
	}
	log, err := os.Create(p.log())
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	p.cmd = exec.Command(s.Program, "server", "--config-file", file)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "PERSYS_") })
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("server %s: %w", p.config.Name, err)
	}
	s.all = append(s.all, p)
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // that it ended is what counts
	}()
	return nil
}

func (p *process) log() string { return p.config.DataDir + ".log" }

// alive is an error where one has ended by itself.
func (s *servers) alive(all ...*process) error {
	for _, p := range all {
		select {
		case <-p.exited:
			if !p.killed {
				return fmt.Errorf("server %s has ended", p.config.Name)
			}
		default:
		}
	}
	return nil
}

func (s *servers) killLeader(ctx context.Context, api *api) error {
	summary, err := api.cluster().GetClusterSummary(ctx, &pb.ClusterSummaryRequest{})
	if err != nil {
		return err
	}
	for _, p := range s.all {
		if p.config.Name == summary.Leader {
			p.killed = true
			api.drop(p.config)
			return p.cmd.Process.Kill()
		}
	}
	return fmt.Errorf("the leader %q is none of the servers", summary.Leader)
}

// complaints are what the servers have logged.
func (s *servers) complaints() error {
	var all []error
	for _, p := range s.all {
		data, err := os.ReadFile(p.log())
		if data = bytes.TrimSpace(data); err != nil || len(data) == 0 {
			continue
		}
		all = append(all, fmt.Errorf("server %s says: %s", p.config.Name, data[max(0, len(data)-shownLog):]))
	}
	return errors.Join(all...)
}

func (s *servers) stop() {
	for _, p := range s.all {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // one that has ended needs none
	}
	deadline := time.After(stopTimeout)
	for _, p := range s.all {
		select {
		case <-p.exited:
		case <-deadline:
			_ = p.cmd.Process.Kill()
			<-p.exited
		}
	}
}

// addresses are the servers' gRPC addresses.
func (s *servers) addresses() []string {
	var all []string
	for _, p := range s.all {
		all = append(all, grpcAddress(p.config))
	}
	return all
}

// authority issues the agents' certificates: redeeming a token for each would
// measure something else.
func (s *servers) authority() (*pki.Authority, error) {
	return pki.LoadAuthority(server.AuthorityDir(s.all[0].config.DataDir))
}

func grpcAddress(c server.Config) string {
	return net.JoinHostPort(c.Advertise, fmt.Sprint(c.GRPCPort))
}
