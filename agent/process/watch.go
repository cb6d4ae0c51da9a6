package process

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// wake makes Watch look which supervisors there are.
func (r *Runtime) wake() {
	select {
	case r.started <- struct{}{}:
	default:
	}
}

// Watch waits for supervisors to end: for all of them in one thread, by handles on
// the processes.
func (r *Runtime) Watch(ctx context.Context, changed func()) error {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	nudged := make(chan struct{})
	go func() { // writes on behalf of wake, and ends with ctx
		defer close(nudged)
		defer unix.Close(pipe[1])
		for {
			select {
			case <-ctx.Done():
				return
			case <-r.started:
				_, _ = unix.Write(pipe[1], []byte{0}) // a full pipe wakes as well
			}
		}
	}()
	defer func() { <-nudged }()
	ended := map[identity]bool{}
	for ctx.Err() == nil {
		if err := r.watchOnce(pipe[0], ended, changed); err != nil {
			return err
		}
	}
	return nil
}

// watchOnce waits until a supervisor ends or woken can be read. ended are those of
// which that was said already.
func (r *Runtime) watchOnce(woken int, ended map[identity]bool, changed func()) error {
	fds := []unix.PollFd{{Fd: int32(woken), Events: unix.POLLIN}}
	defer func() {
		for _, fd := range fds[1:] {
			unix.Close(int(fd.Fd))
		}
	}()
	entries, err := os.ReadDir(r.cfg.Dir)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	watched := []identity{{}}
	for _, e := range entries {
		var st state
		ok, err := readJSON(filepath.Join(r.dir(e.Name()), stateFile), &st)
		if err != nil || !ok || !st.Finished.IsZero() || st.Boot != r.boot || ended[st.Shim] {
			continue
		}
		fd, ok, err := st.Shim.open()
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		if ok {
			fds, watched = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}), append(watched, st.Shim)
		}
	}
	maps.DeleteFunc(ended, func(id identity, _ bool) bool {
		_, err := statusOf(id.PID)
		return err != nil
	})
	// Only now: who was gone before is in no handle, and found by a list.
	changed()
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		break
	}
	for i, fd := range fds[1:] {
		if fd.Revents != 0 {
			ended[watched[i+1]] = true
		}
	}
	if fds[0].Revents != 0 {
		buf := make([]byte, 64)
		for {
			if n, err := unix.Read(woken, buf); n < len(buf) || err != nil {
				break
			}
		}
	}
	return nil
}
