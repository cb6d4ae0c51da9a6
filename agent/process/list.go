package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// lost is the exit code of a program whose end nobody saw.
const lost = 255

// List reads the directories of all instances.
func (r *Runtime) List(ctx context.Context) ([]agent.Instance, error) {
	entries, err := os.ReadDir(r.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	var all []agent.Instance
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !e.IsDir() {
			continue
		}
		in, ok, err := r.read(e.Name())
		if err != nil {
			return nil, fmt.Errorf("list: %w", err)
		}
		if ok {
			all = append(all, in)
		}
	}
	return all, nil
}

// read tells how an instance is; false where there is none, or none of ours.
func (r *Runtime) read(id string) (agent.Instance, bool, error) {
	var rec record
	ok, err := readJSON(filepath.Join(r.dir(id), recordFile), &rec)
	if err != nil {
		// Left by a power cut: nothing runs from it, or its supervisor holds it.
		r.log.Warn("record of an instance can't be read; it is left alone", "instance", id, "error", err)
		return agent.Instance{}, false, nil
	}
	if !ok || !r.ours(rec) {
		return agent.Instance{}, false, nil
	}
	labels, err := agent.ParseLabels(rec.Labels)
	if err != nil {
		r.log.Warn("labels of an instance make no sense; it is left alone", "instance", id, "error", err)
		return agent.Instance{}, false, nil
	}
	st, held, err := r.supervised(id)
	if err != nil {
		return agent.Instance{}, false, err
	}
	phase := agent.Exited
	switch {
	case held && st.Finished.IsZero():
		phase = agent.Running
	case st.Started.IsZero() && st.Finished.IsZero():
		phase = agent.Created
	}
	return instance(id, labels, st, phase), true, nil
}

func instance(id string, l agent.Labels, st state, phase agent.Phase) agent.Instance {
	return agent.Instance{
		Labels: l, ID: id, Type: pb.WorkloadType_PROCESS, Phase: phase, Started: st.Started, Finished: st.Finished,
		ExitCode: int32(st.ExitCode), OutOfMemory: st.OutOfMemory, StartError: st.StartError,
	}
}

// supervised gives the state of an instance and whether a supervisor holds it. A
// run whose supervisor was killed, or that was cut off by a restart of the
// machine, is given an end here, once; what may be left of it is killed first.
func (r *Runtime) supervised(id string) (st state, held bool, err error) {
	dir := r.dir(id)
	for {
		before, err := r.state(dir)
		if err != nil {
			return state{}, false, err
		}
		held, err := locked(filepath.Join(dir, lockFile))
		if err != nil {
			return state{}, false, err
		}
		// Whoever held the lock may have written between the two.
		if st, err = r.state(dir); err != nil {
			return state{}, false, err
		}
		if st != before {
			continue
		}
		if held || st.Started.IsZero() || !st.Finished.IsZero() {
			return st, held, nil
		}
		st, err = r.settle(dir, st)
		return st, false, err
	}
}

func (r *Runtime) state(dir string) (st state, err error) {
	_, err = readJSON(filepath.Join(dir, stateFile), &st)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		// A power cut: what ran then does not run now.
		return state{Started: time.Unix(1, 0), Finished: time.Unix(1, 0), ExitCode: lost, StartError: "the machine was started again"}, nil
	}
	return st, err
}

// settle ends a run that has no supervisor any more. A new one is only started
// after that, so nothing of a later run is overwritten.
func (r *Runtime) settle(dir string, seen state) (state, error) {
	r.settling.Lock()
	defer r.settling.Unlock()
	st, err := r.state(dir)
	if err != nil || st != seen {
		return st, err
	}
	st.StartError = "its supervisor was killed: how it ended is not known"
	if st.Boot != r.boot {
		st.StartError = "the machine was started again"
	} else if err := r.sweep(dir, st); err != nil {
		return state{}, err
	}
	st.ExitCode, st.Finished = lost, time.Now()
	return st, writeJSON(filepath.Join(dir, stateFile), st)
}

// sweep kills what is left of a run without a supervisor.
func (r *Runtime) sweep(dir string, st state) error {
	var rec record
	if _, err := readJSON(filepath.Join(dir, recordFile), &rec); err != nil {
		return err
	}
	rec.Cgroup.kill()
	return errors.Join(st.Program.signal(unix.SIGKILL), killSession(st.Program))
}

// killSession kills what is in the session that the program began. The session has
// the program's number for as long as anybody is in it, so it is not another's.
func killSession(program identity) error {
	if program.PID <= 0 {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		s, err := statusOf(pid)
		if err != nil || s.session != program.PID || s.start < program.Start {
			continue
		}
		if err := (identity{PID: pid, Start: s.start}).signal(unix.SIGKILL); err != nil {
			return err
		}
	}
	return nil
}
