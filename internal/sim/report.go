package sim

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Report is what was measured.
type Report struct {
	Scenario  string `json:"scenario"`
	Servers   int    `json:"servers"`
	Nodes     int    `json:"nodes"`
	Workloads int    `json:"workloads"`
	Replicas  int    `json:"replicas"`
	// Phases in the order in which they ended.
	Phases []*Phase `json:"phases"`
	// What was written while nothing happened.
	IdleRevisions int64 `json:"idle_revisions"`
	IdleEntries   int64 `json:"idle_log_entries"`
	// The servers, and this process, which is all agents.
	Processes []Process `json:"processes"`

	mu sync.Mutex // guards Phases, and what the processes have used, while it runs
}

// Phase is one thing that was waited for.
type Phase struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds,omitempty"`
	Count   int     `json:"count,omitempty"`
	// Count by Seconds.
	PerSecond float64 `json:"per_second,omitempty"`
	// Of single ones, where they were measured.
	P50  float64 `json:"p50_seconds,omitempty"`
	P99  float64 `json:"p99_seconds,omitempty"`
	Max  float64 `json:"max_seconds,omitempty"`
	Note string  `json:"note,omitempty"`
	// Processor time of all servers and of the agents meanwhile.
	ServersCPU float64 `json:"servers_cpu_seconds,omitempty"`
	AgentsCPU  float64 `json:"agents_cpu_seconds,omitempty"`

	s       *simulation
	began   time.Time
	servers time.Duration
	agents  time.Duration
}

// Process is what one of them has used in all.
type Process struct {
	Name       string  `json:"name"`
	Memory     int64   `json:"memory_bytes"`
	PeakMemory int64   `json:"peak_memory_bytes"`
	CPU        float64 `json:"cpu_seconds"`
	Lost       bool    `json:"lost,omitempty"`
}

func newReport(c Config) *Report {
	return &Report{Scenario: c.Scenario, Servers: c.Servers, Nodes: c.Nodes, Workloads: c.Workloads, Replicas: c.Replicas}
}

func (s *simulation) begin(name string) *Phase {
	p := &Phase{Name: name, s: s, began: time.Now()}
	p.servers, p.agents = s.cpu()
	return p
}

// phase adds one that is not timed as a whole.
func (r *Report) phase(name string) *Phase {
	p := &Phase{Name: name}
	r.add(p)
	return p
}

func (r *Report) add(p *Phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Phases = append(r.Phases, p)
}

func (p *Phase) count(n int) *Phase {
	p.Count = n
	return p
}

// spread tells how single ones were distributed.
func (p *Phase) spread(all []time.Duration) *Phase {
	if len(all) == 0 {
		return p
	}
	slices.Sort(all)
	p.P50, p.P99 = all[len(all)/2].Seconds(), all[len(all)*99/100].Seconds()
	p.Max = all[len(all)-1].Seconds()
	return p
}

func (p *Phase) end() {
	p.Seconds = time.Since(p.began).Seconds()
	servers, agents := p.s.cpu()
	p.ServersCPU, p.AgentsCPU = (servers - p.servers).Seconds(), (agents - p.agents).Seconds()
	if p.Count > 0 {
		p.PerSecond = float64(p.Count) / p.Seconds
	}
	p.s.report.add(p)
}

// cpu is the processor time so far of all servers, as far as it was seen, and of
// the agents.
func (s *simulation) cpu() (servers, agents time.Duration) {
	s.report.mu.Lock()
	defer s.report.mu.Unlock()
	for _, p := range s.servers.all {
		if used, err := usageOf(p.cmd.Process.Pid); err == nil {
			p.used = max(p.used, used.cpu)
		}
		servers += p.used
	}
	if used, err := usageOf(os.Getpid()); err == nil {
		agents = used.cpu
	}
	return servers, agents
}

func (s *simulation) processes() []Process {
	var all []Process
	add := func(name string, pid int, lost bool) {
		used, err := usageOf(pid)
		if err == nil || lost {
			all = append(all, Process{Name: name, Memory: used.memory, PeakMemory: used.peak, CPU: used.cpu.Seconds(), Lost: lost})
		}
	}
	for _, p := range s.servers.all {
		add("server "+p.config.Name, p.cmd.Process.Pid, p.killed)
	}
	add("agents", os.Getpid(), false)
	return all
}

type usage struct {
	cpu          time.Duration
	memory, peak int64
}

// ticks of /proc's processor times are hundredths of a second on every
// architecture that Linux has (USER_HZ).
const tick = 10 * time.Millisecond

// usageOf reads /proc (proc_pid_stat(5), proc_pid_status(5)).
func usageOf(pid int) (usage, error) {
	var u usage
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	// The name, in parentheses, may have spaces.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const user, system = 14 - 3, 15 - 3
	if len(fields) <= system {
		return u, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	for _, field := range []int{user, system} {
		n, err := strconv.ParseInt(fields[field], 10, 64)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(n) * tick
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		name, rest, _ := strings.Cut(line, ":")
		kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			u.memory = kib << 10
		case "VmHWM":
			u.peak = kib << 10
		}
	}
	return u, nil
}

// checkFiles makes sure that there can be as many connections as agents.
func checkFiles(nodes int) error {
	const others = 500
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	// The runtime has raised the soft limit to the hard one.
	if most := int64(limit.Max) - others; int64(nodes) > most {
		return fmt.Errorf("nodes: %d, and this process may open %d files; each agent has a connection of its own, for its certificate is its identity: raise the limit (ulimit -Hn), or simulate at most %d", nodes, limit.Max, most)
	}
	return nil
}

// giveWay lets the servers, which run already, have the processors before the
// agents, which are threads of this process. In truth they have machines of their
// own; starved by thousands of agents they would hold elections for want of time.
// Without /proc, or the right to, all share alike.
func giveWay() {
	const lower = 10
	threads, _ := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		if id, err := strconv.Atoi(t.Name()); err == nil {
			// Threads that come later take it from those that make them.
			_ = syscall.Setpriority(syscall.PRIO_PROCESS, id, lower)
		}
	}
}
