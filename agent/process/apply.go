package process

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// overdue is how long after the grace a supervisor may take to have everything
	// killed before the agent does it.
	overdue = 10 * time.Second
)

// name of an instance: its directory and its cgroup.
func name(l agent.Labels) string {
	sum := sha256.Sum256([]byte(l.UID))
	return fmt.Sprintf("%s-%d-%d-%x", l.Key.Workload, l.Key.Replica, l.Generation, sum[:4])
}

func (r *Runtime) dir(id string) string { return filepath.Join(r.cfg.Dir, id) }

// Apply starts the program unless it runs.
func (r *Runtime) Apply(ctx context.Context, w agent.Work) (agent.Instance, error) {
	spec := w.Item.GetSpec().GetProcess()
	labels := agent.LabelsOf(r.cfg.ClusterID, r.cfg.NodeID, w)
	if spec == nil || spec.GetCommand() == "" {
		return agent.Instance{}, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "%s is no process, or has no command", w.Key())
	}
	id := name(labels)
	if !filepath.IsLocal(id) || strings.ContainsRune(id, filepath.Separator) {
		return agent.Instance{}, agent.Refuse(pb.ReasonCode_INVALID_SPEC, "workload id %q can't be the name of a directory", labels.Key.Workload)
	}
	in, there, err := r.read(id)
	if err != nil {
		return agent.Instance{}, err
	}
	if there && in.Phase == agent.Running {
		return in, nil
	}
	if there {
		// The last run may be in its last moments.
		if err := r.await(ctx, id); err != nil {
			return agent.Instance{}, err
		}
	}
	if err := r.write(w, labels, id); err != nil {
		return agent.Instance{}, err
	}
	said, err := r.launch(ctx, id)
	if err == nil && said.Error != "" {
		err = errors.New(said.Error)
	}
	switch {
	case err != nil:
		return agent.Instance{}, &agent.Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: fmt.Errorf("supervisor of %s: %w", id, err)}
	case said.Refused:
		refused := agent.Refuse(pb.ReasonCode_BAD_COMMAND, "%s", said.State.StartError)
		if !there {
			if err := r.erase(id); err != nil {
				r.log.Warn("what could not be started can't be removed either", "instance", id, "error", err)
			}
		}
		return agent.Instance{}, refused
	}
	r.wake()
	return instance(id, labels, said.State, agent.Running), nil
}

// write puts down what is to run, and makes its cgroup.
func (r *Runtime) write(w agent.Work, labels agent.Labels, id string) error {
	spec := w.Item.GetSpec().GetProcess()
	rec := record{
		Labels: labels.Map(), Command: spec.GetCommand(), Args: spec.GetArgs(), Dir: spec.GetWorkingDir(), Grace: w.Grace(),
		LogBytes: r.cfg.LogBytes, LogFiles: r.cfg.LogFiles,
	}
	home := "/"
	if spec.GetUser() != "" {
		var err error
		if rec.User, home, err = lookup(spec.GetUser()); err != nil {
			return agent.Refuse(pb.ReasonCode_INVALID_SPEC, "user: %v", err)
		}
	}
	rec.Env = environment(w, r.cfg.NodeID, home)
	var err error
	if rec.Cgroup, err = r.cgroups.instance(id, w.CPULimit(), w.MemoryLimit()); err != nil {
		// Where groups can be made at all, work never runs without its limits.
		if r.cgroups.cannot == "" {
			return &agent.Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: err}
		}
		rec.Cgroup = cgroup{}
	}
	dir := r.dir(id)
	err = os.MkdirAll(dir, 0o700)
	if err == nil {
		err = writeJSON(filepath.Join(dir, recordFile), rec)
	}
	if err == nil {
		if err = os.Remove(filepath.Join(dir, stopFile)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		code := pb.ReasonCode_STORAGE_ERROR
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			code = pb.ReasonCode_STORAGE_FULL
		}
		return &agent.Error{Code: code, Retryable: true, Err: err}
	}
	return nil
}

// environment is agent.Environment over the little that every program expects. The
// agent's own is not handed on: it may hold what is nobody else's business.
func environment(w agent.Work, node, home string) []string {
	env := agent.Environment(w, node, func(p *pb.Port) int32 { return p.GetHostPort() })
	for _, base := range []string{"PATH=" + defaultPath, "HOME=" + home} {
		n := strings.Index(base, "=") + 1
		if !slices.ContainsFunc(env, func(pair string) bool { return strings.HasPrefix(pair, base[:n]) }) {
			env = append(env, base)
		}
	}
	return env
}

// lookup finds a user by name or number. A number that no user has is taken as it
// is, with the group of the same number.
func lookup(who string) (*user, string, error) {
	found, err := osuser.Lookup(who)
	if n, numeric := strconv.Atoi(who); err != nil && numeric == nil {
		if n < 0 {
			return nil, "", fmt.Errorf("%d is not a user id", n)
		}
		if found, err = osuser.LookupId(who); err != nil {
			return &user{UID: n, GID: n}, "/", nil
		}
	}
	if err != nil {
		return nil, "", err
	}
	names, err := found.GroupIds()
	if err != nil {
		return nil, "", err
	}
	u := &user{}
	var groups []int
	for _, text := range append([]string{found.Uid, found.Gid}, names...) {
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, "", fmt.Errorf("%s: id %q is not a number", who, text)
		}
		groups = append(groups, n)
	}
	u.UID, u.GID, u.Groups = groups[0], groups[1], groups[2:]
	return u, found.HomeDir, nil
}

// launch starts the supervisor in a session of its own, and hears from it how the
// start went.
func (r *Runtime) launch(ctx context.Context, id string) (said answer, err error) {
	dir := r.dir(id)
	trace, err := os.OpenFile(filepath.Join(dir, shimFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return answer{}, err
	}
	defer trace.Close()
	listen, tell, err := os.Pipe()
	if err != nil {
		return answer{}, err
	}
	defer listen.Close()
	cmd := exec.Command(r.cfg.Shim[0], append(slices.Clone(r.cfg.Shim[1:]), "run", dir)...)
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = trace, trace, []*os.File{tell}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	tell.Close()
	if err != nil {
		return answer{}, err
	}
	go cmd.Wait() // only takes note of its end; it outlives us as it may
	stop := context.AfterFunc(ctx, func() { _ = listen.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewDecoder(listen).Decode(&said); err != nil {
		if ctx.Err() != nil {
			return answer{}, ctx.Err()
		}
		words, _ := os.ReadFile(filepath.Join(dir, shimFile))
		return answer{}, fmt.Errorf("ended without an answer: %.500s", words)
	}
	return said, nil
}

// Stop asks the supervisor to stop the program, and does it itself where that
// does not happen.
func (r *Runtime) Stop(ctx context.Context, in agent.Instance, grace time.Duration) error {
	st, held, err := r.supervised(in.ID)
	if err != nil || !held {
		return err
	}
	if err := writeJSON(filepath.Join(r.dir(in.ID), stopFile), stopOrder{Grace: grace}); err != nil {
		// A full disk must not keep anything running: the record's grace then.
		r.log.Warn("grace can't be told to the supervisor", "instance", in.ID, "error", err)
	}
	if err := st.Shim.signal(unix.SIGTERM); err != nil {
		return &agent.Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: err}
	}
	limit, cancel := context.WithTimeout(ctx, grace+overdue)
	err = r.await(limit, in.ID)
	cancel()
	if err == nil || ctx.Err() != nil {
		return err
	}
	r.log.Warn("supervisor does not stop its program", "instance", in.ID)
	if err := st.Shim.signal(unix.SIGKILL); err != nil {
		return &agent.Error{Code: pb.ReasonCode_RUNTIME_ERROR, Retryable: true, Err: err}
	}
	return r.await(ctx, in.ID)
}

// await returns when no supervisor holds the instance any more, and nothing of it
// is left.
func (r *Runtime) await(ctx context.Context, id string) error {
	for {
		st, held, err := r.supervised(id)
		if err != nil || !held {
			return err
		}
		if err := st.Shim.wait(ctx); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		pause(ctx) // the lock goes a moment after the process is seen to end
	}
}

func pause(ctx context.Context) {
	timer := time.NewTimer(2 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// Remove stops the program and takes away its directory, logs and cgroup.
func (r *Runtime) Remove(ctx context.Context, in agent.Instance, grace time.Duration) error {
	if err := r.Stop(ctx, in, grace); err != nil {
		return err
	}
	return r.erase(in.ID)
}

func (r *Runtime) erase(id string) error {
	dir := r.dir(id)
	var rec record
	ok, err := readJSON(filepath.Join(dir, recordFile), &rec)
	if err == nil && ok {
		err = r.cgroups.tidy(rec.Cgroup)
	}
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		return &agent.Error{Code: pb.ReasonCode_STORAGE_ERROR, Retryable: true, Err: fmt.Errorf("remove %s: %w", id, err)}
	}
	return nil
}

// ours reports whether a record was written for this cluster and node.
func (r *Runtime) ours(rec record) bool {
	return maps.Equal(map[string]string{agent.LabelCluster: r.cfg.ClusterID, agent.LabelNode: r.cfg.NodeID},
		map[string]string{agent.LabelCluster: rec.Labels[agent.LabelCluster], agent.LabelNode: rec.Labels[agent.LabelNode]})
}
