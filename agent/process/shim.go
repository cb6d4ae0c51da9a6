package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// answerFD is the pipe to the agent that started the supervisor, and in the
	// program's first moments the one to the supervisor.
	answerFD = 3
	// clearing bounds how long what the program left behind may take to die, and
	// its last output to be read.
	clearing = 5 * time.Second
)

// ShimMain is what `persys process-shim` does; args are what followed it. It is the
// supervisor of one instance ("run <dir>"), and for a moment the program itself
// before it is replaced by it ("exec <dir>"). It returns the exit code.
func ShimMain(args []string) int {
	if len(args) != 2 || (args[0] != "run" && args[0] != "exec") {
		fmt.Fprintln(os.Stderr, "process-shim is started by the agent only")
		return 2
	}
	// The kernel binds what follows to the thread: death signal, identity.
	runtime.LockOSThread()
	if args[0] == "exec" {
		return become(args[1])
	}
	debug.SetGCPercent(20) // there are as many of us as there are processes
	if err := supervise(args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "process-shim:", err)
		return 1
	}
	return 0
}

// supervisor of one run.
type supervisor struct {
	dir    string
	record record
	state  state
	log    *logFile
	// oomBefore is how many were killed in the cgroup by earlier runs.
	oomBefore int64
}

// supervise runs the program to its end. Whoever holds the lock is the supervisor
// of the instance; there is never a second.
func supervise(dir string) error {
	tell := os.NewFile(answerFD, "answer")
	// The agent's terminal may go away. Caught, not ignored: what is ignored would
	// be ignored by the program too.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	stops := make(chan os.Signal, 4)
	signal.Notify(stops, unix.SIGTERM, unix.SIGINT)

	s := &supervisor{dir: dir}
	lock, err := acquire(filepath.Join(dir, lockFile))
	if err == nil {
		defer lock.Close()
		err = s.prepare()
	}
	if err != nil {
		return errors.Join(err, send(tell, answer{Error: err.Error()}))
	}
	defer s.log.close()
	output, err := s.start()
	if err != nil {
		s.state.StartError, s.state.Finished = err.Error(), time.Now()
		return errors.Join(writeJSON(filepath.Join(dir, stateFile), s.state), send(tell, answer{State: s.state, Refused: true}))
	}
	if err := writeJSON(filepath.Join(dir, stateFile), s.state); err != nil {
		// Nobody could recognise it later.
		s.kill()
		return errors.Join(err, send(tell, answer{Error: err.Error()}))
	}
	// An agent that has gone away meanwhile finds the state file.
	_ = send(tell, answer{State: s.state})

	exit := s.await(stops)
	s.clear()
	output.finish()
	s.state.Finished = time.Now()
	s.state.ExitCode = exitCode(exit)
	s.state.OutOfMemory = s.state.ExitCode != 0 && s.record.Cgroup.oomKills() > s.oomBefore
	return writeJSON(filepath.Join(dir, stateFile), s.state)
}

func send(tell *os.File, a answer) error {
	return errors.Join(json.NewEncoder(tell).Encode(a), tell.Close())
}

func (s *supervisor) prepare() error {
	if ok, err := readJSON(filepath.Join(s.dir, recordFile), &s.record); err != nil || !ok {
		return errors.Join(errors.New("the record can't be read"), err)
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	s.state = state{Boot: boot, Shim: self}
	s.oomBefore = s.record.Cgroup.oomKills()
	// What the program starts and leaves behind becomes our child, so that it can
	// be found and killed without cgroups too.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("subreaper: %w", err)
	}
	s.log, err = openLog(filepath.Join(s.dir, outputFile), s.record.LogBytes, s.record.LogFiles)
	return err
}

// output are the pipes from the program.
type output struct {
	pipes   []*os.File
	reading sync.WaitGroup
}

// finish reads what is left, and gives up on pipes that somebody still holds.
func (o *output) finish() {
	for _, p := range o.pipes {
		_ = p.SetReadDeadline(time.Now().Add(clearing))
	}
	o.reading.Wait()
	for _, p := range o.pipes {
		p.Close()
	}
}

// start runs the program in a session of its own. It returns when the program has
// replaced this one in it, or why it could not.
func (s *supervisor) start() (*output, error) {
	// The very file that runs now, though an upgrade may have replaced its name.
	// The arguments are ours, but for the last two.
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append(slices.Clone(os.Args[:len(os.Args)-2]), "exec", s.dir)
	cmd.Env = []string{}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	out := &output{}
	var ends []*os.File
	defer func() {
		for _, f := range ends {
			f.Close()
		}
	}()
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		out.pipes, ends = append(out.pipes, r), append(ends, w)
	}
	failed, failing, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer failed.Close()
	ends = append(ends, failing)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = ends[0], ends[1], []*os.File{failing}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s.state.Started = time.Now()
	if s.state.Program, err = identify(cmd.Process.Pid); err != nil {
		return nil, err
	}
	for _, f := range ends {
		f.Close()
	}
	ends = nil
	for i, stream := range []byte{'o', 'e'} {
		out.reading.Go(func() { s.log.copyFrom(out.pipes[i], stream) })
	}
	why := make([]byte, 4096)
	n := 0
	for n < len(why) {
		got, err := failed.Read(why[n:])
		if n += got; err != nil {
			break
		}
	}
	if n > 0 {
		s.clear()
		out.finish()
		return nil, errors.New(string(why[:n]))
	}
	return out, nil
}

// await waits for the program, and carries out orders to stop it.
func (s *supervisor) await(stops <-chan os.Signal) unix.WaitStatus {
	ended := make(chan unix.WaitStatus, 1)
	go func() {
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, 0, nil)
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				ended <- unix.WaitStatus(0xff00)
				return
			case pid == s.state.Program.PID:
				ended <- status
				return
			}
		}
	}()
	var deadline <-chan time.Time
	var until time.Time
	for {
		select {
		case status := <-ended:
			return status
		case <-stops:
			order := stopOrder{Grace: s.record.Grace}
			_, _ = readJSON(filepath.Join(s.dir, stopFile), &order) // the record's grace is as good
			if deadline == nil {
				unix.Kill(-s.state.Program.PID, unix.SIGTERM)
			}
			if end := time.Now().Add(order.Grace); deadline == nil || end.Before(until) {
				until, deadline = end, time.After(order.Grace)
			}
		case <-deadline:
			s.kill()
			deadline = time.After(time.Second) // and whatever was started meanwhile
		}
	}
}

// kill kills the program's group and cgroup. The program is our child and not
// waited for yet, so its number is its own.
func (s *supervisor) kill() {
	unix.Kill(-s.state.Program.PID, unix.SIGKILL)
	s.record.Cgroup.kill()
}

// clear kills what the program has left behind: what is in its cgroup, and what
// has become our child.
func (s *supervisor) clear() {
	for end := time.Now().Add(clearing); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		left := s.record.Cgroup.kill()
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.ECHILD) && left == 0 {
				return
			}
			if err != nil && !errors.Is(err, unix.EINTR) || pid == 0 {
				break
			}
		}
		for _, pid := range childrenOf(os.Getpid()) {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// childrenOf looks through all processes: the kernel's own list of children is not
// built into every kernel.
func childrenOf(parent int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var children []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := statusOf(pid); err == nil && s.parent == parent {
			children = append(children, pid)
		}
	}
	return children
}

// exitCode is the program's own, or as shells have it 128 and the signal.
func exitCode(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}
