// Package procs runs the real program: servers and agents as processes of this
// machine, each at a loopback address of its own with the standard ports, with
// real files, real certificates and the real command line. Faults are real
// too: processes are killed, paused and started again.
package procs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	callTimeout = 60 * time.Second
	stopTimeout = 20 * time.Second
	pollEvery   = 50 * time.Millisecond
)

// networks gives each cluster of a test binary a /24 of its own; test binaries
// that run at once differ in the byte before.
var networks atomic.Int32

// Cluster is a cluster under test.
type Cluster struct {
	t       testing.TB
	program string
	dir     string
	network int32
	hosts   int
	first   *Process
	http    *http.Client
}

// Process is one server or agent.
type Process struct {
	Name string
	// IP is its own; ports are the standard ones.
	IP string
	// DataDir survives Kill.
	DataDir string

	c       *Cluster
	args    []string
	cmd     *exec.Cmd
	exited  chan struct{}
	logFile string
}

// New prepares a cluster of the given program; nothing runs yet. Everything is
// stopped when the test ends; where it failed, the ends of the logs are shown.
func New(t testing.TB, program string) *Cluster {
	c := &Cluster{t: t, program: program, dir: t.TempDir(), network: networks.Add(1)}
	t.Cleanup(c.sweep)
	return c
}

// sweep removes what a cluster that was ended without order leaves running:
// supervisors with their programs, and containers.
func (c *Cluster) sweep() {
	processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range processes {
		line, err := os.ReadFile(file)
		pid, ok := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil && ok == nil && pid != os.Getpid() && bytes.Contains(line, []byte(c.dir+"/")) {
			_ = syscall.Kill(-pid, syscall.SIGKILL)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	ids, err := exec.Command("docker", "ps", "-aq", "--filter", "label=persys.cluster="+c.id()).Output()
	if all := strings.Fields(string(ids)); err == nil && len(all) > 0 {
		_ = exec.Command("docker", append([]string{"rm", "-f"}, all...)...).Run()
	}
}

// id is the cluster's, as the first server's directory has it.
func (c *Cluster) id() string {
	var identity struct {
		ClusterID string `json:"cluster_id"`
	}
	data, err := os.ReadFile(filepath.Join(c.dir, "s1", "identity.json"))
	if err != nil || json.Unmarshal(data, &identity) != nil {
		return "none"
	}
	return identity.ClusterID
}

func (c *Cluster) host(name string) *Process {
	c.hosts++
	return &Process{
		Name: name, c: c, IP: fmt.Sprintf("127.%d.%d.%d", 100+os.Getpid()%100, c.network, c.hosts),
		DataDir: filepath.Join(c.dir, name), logFile: filepath.Join(c.dir, name+".log"),
	}
}

// Init starts the first server.
func (c *Cluster) Init(name string, more ...string) *Process {
	c.t.Helper()
	p := c.host(name)
	p.args = append([]string{"init"}, p.flags(more...)...)
	p.Start()
	c.first = p
	c.Eventually("the first server answers", callTimeout, func() error {
		_, err := c.Run("cluster", "info")
		return err
	})
	p.args = append([]string{"server"}, p.flags(more...)...)
	return p
}

func (p *Process) flags(more ...string) []string {
	return append([]string{"--name", p.Name, "--data-dir", p.DataDir, "--advertise", p.IP}, more...)
}

// Token makes a join token.
func (c *Cluster) Token(role string, more ...string) string {
	c.t.Helper()
	return strings.TrimSpace(c.Must(append([]string{"token", "create", "--role", role, "-o", "name"}, more...)...))
}

// Join starts a server or an agent with a new token; the same command line
// serves its later starts.
func (c *Cluster) Join(role, name string, more ...string) *Process {
	c.t.Helper()
	p := c.host(name)
	p.args = append([]string{"join", c.Token(role)}, p.flags(more...)...)
	p.Start()
	return p
}

// Start runs the process, with what its data directory holds.
func (p *Process) Start() {
	p.c.t.Helper()
	log, err := os.OpenFile(p.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.c.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(p.c.program, p.args...)
	cmd.Env = p.c.environment()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.c.t.Fatalf("start %s: %v", p.Name, err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	if p.cmd == nil {
		p.c.t.Cleanup(func() {
			p.Kill()
			if strings.Contains(p.Log(), "WARNING: DATA RACE") {
				p.c.t.Errorf("%s has a data race", p.Name)
			}
			p.showLog()
		})
	}
	p.cmd, p.exited = cmd, exited
}

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Kill ends the process at once, as a power cut would.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.exited
}

// Stop ends the process in order.
func (p *Process) Stop() {
	p.c.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		p.Kill()
		p.c.t.Errorf("%s did not stop within %s of SIGTERM", p.Name, stopTimeout)
	}
}

// Pause stops the process from running until Resume.
func (p *Process) Pause() { _ = p.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (p *Process) Resume() { _ = p.cmd.Process.Signal(syscall.SIGCONT) }

// Log is what the process has written.
func (p *Process) Log() string {
	data, err := os.ReadFile(p.logFile)
	if err != nil {
		p.c.t.Fatal(err)
	}
	return string(data)
}

func (p *Process) showLog() {
	if !p.c.t.Failed() {
		return
	}
	const lines = 60
	all := strings.Split(strings.TrimSpace(p.Log()), "\n")
	p.c.t.Logf("--- the end of the log of %s ---\n%s", p.Name, strings.Join(all[max(0, len(all)-lines):], "\n"))
}

func (c *Cluster) environment() []string {
	return append(os.Environ(), "HOME="+c.dir, "XDG_CONFIG_HOME="+filepath.Join(c.dir, "config"), "NO_COLOR=1")
}

// Run carries out a command line and gives its standard output; the error holds
// its standard error.
func (c *Cluster) Run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	out, diagnostics, err := c.Exec(ctx, args...)
	if err != nil {
		return out, fmt.Errorf("persys %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(diagnostics))
	}
	return out, nil
}

// Exec carries out a command line; err is an *exec.ExitError where it failed.
func (c *Cluster) Exec(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	cmd := exec.CommandContext(ctx, c.program, args...)
	// A command is over when it is over: the race detector would wait a second
	// for others to race.
	cmd.Env = append(c.environment(), "GORACE=atexit_sleep_ms=0")
	var out, diagnostics bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &diagnostics
	err = cmd.Run()
	return out.String(), diagnostics.String(), err
}

// Must is Run where failure ends the test.
func (c *Cluster) Must(args ...string) string {
	c.t.Helper()
	out, err := c.Run(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// REST calls the HTTPS port of a server as the administrator. The answer is its
// status and its body.
func (c *Cluster) REST(ctx context.Context, p *Process, method, path, body string) (int, string, error) {
	if c.http == nil {
		credentials, err := pki.LoadCredentials(filepath.Join(c.first.DataDir, "pki", "admin"))
		if err != nil {
			return 0, "", err
		}
		c.http = &http.Client{Transport: &http.Transport{TLSClientConfig: credentials.ClientTLS(pki.RequireRole(pb.Role_ROLE_SERVER), "http/1.1")}}
	}
	request, err := http.NewRequestWithContext(ctx, method, "https://"+net.JoinHostPort(p.IP, "7480")+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	return response.StatusCode, string(data), err
}

// Eventually waits until check succeeds; it fails the test when that takes
// longer than within.
func (c *Cluster) Eventually(what string, within time.Duration, check func() error) time.Duration {
	c.t.Helper()
	started := time.Now()
	for {
		err := check()
		took := time.Since(started)
		if err == nil {
			return took
		}
		if took > within {
			c.t.Fatalf("not within %s: %s: %v", within, what, err)
		}
		time.Sleep(pollEvery)
	}
}

// Build compiles the program for the tests of a package; call it from TestMain.
// The result is removed by the returned function.
func Build() (program string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "persys-test-")
	if err != nil {
		return "", nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) }
	program = filepath.Join(dir, "persys")
	out, err := exec.Command("go", "build", fmt.Sprintf("-race=%t", raceDetector), "-o", program, "github.com/persys-dev/persys/cmd/persys").CombinedOutput()
	if err != nil {
		remove()
		return "", nil, errors.Join(err, errors.New(string(out)))
	}
	return program, remove, nil
}
