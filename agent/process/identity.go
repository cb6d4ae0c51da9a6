package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// identity is a process id that can't be taken for another's: the kernel may use
// a number again, but not with the same start (ticks since boot).
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// status is what the kernel says of a process.
type status struct {
	state   byte
	parent  int
	session int
	start   uint64
	// cpu is user and system time in ticks; pages are resident.
	cpu   uint64
	pages int64
}

// statusOf reads /proc/<pid>/stat (proc(5)).
func statusOf(pid int) (status, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return status{}, err
	}
	return parseStatus(data)
}

// parseStatus skips the program's name, which may hold anything, parentheses too.
func parseStatus(data []byte) (status, error) {
	end := bytes.LastIndexByte(data, ')')
	fields := strings.Fields(string(data[end+1:]))
	// Field n of the manual is fields[n-3].
	if end < 0 || len(fields) < 22 || len(fields[0]) != 1 {
		return status{}, fmt.Errorf("/proc stat: %q is too short", data)
	}
	numbers := map[int]uint64{}
	for _, n := range []int{4, 6, 14, 15, 22, 24} {
		v, err := strconv.ParseInt(fields[n-3], 10, 64)
		if err != nil {
			return status{}, fmt.Errorf("/proc stat: field %d: %w", n, err)
		}
		numbers[n] = uint64(v)
	}
	return status{
		state: fields[0][0], parent: int(numbers[4]), session: int(numbers[6]), start: numbers[22],
		cpu: numbers[14] + numbers[15], pages: int64(numbers[24]),
	}, nil
}

func identify(pid int) (identity, error) {
	s, err := statusOf(pid)
	if err != nil {
		return identity{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return identity{PID: pid, Start: s.start}, nil
}

// open gives a handle on the very process, or false when it is gone. One that has
// ended and was not asked for its exit code yet is not gone: it may have threads
// that still end, and the handle is what tells when they have. The caller closes it.
func (id identity) open() (fd int, ok bool, err error) {
	if id.PID <= 0 {
		return -1, false, nil
	}
	fd, err = unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return -1, false, nil
	}
	if err != nil {
		return -1, false, fmt.Errorf("process %d: %w", id.PID, err)
	}
	// The handle is on whoever has the number now: compare after it is held.
	s, err := statusOf(id.PID)
	if err != nil || s.start != id.Start {
		return -1, false, unix.Close(fd)
	}
	return fd, true, nil
}

// signal sends to the very process, and does nothing when it is gone.
func (id identity) signal(sig unix.Signal) error {
	fd, ok, err := id.open()
	if err != nil || !ok {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", id.PID, err)
	}
	return nil
}

// wait returns when the process is gone, or with ctx.
func (id identity) wait(ctx context.Context) error {
	fd, ok, err := id.open()
	if err != nil || !ok {
		return err
	}
	defer unix.Close(fd)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	stop := context.AfterFunc(ctx, func() { unix.Close(pipe[1]) })
	defer func() {
		if stop() {
			unix.Close(pipe[1])
		}
	}()
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(pipe[0]), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", id.PID, err)
		case fds[0].Revents != 0:
			return nil
		case fds[1].Revents != 0:
			return ctx.Err()
		}
	}
}

// bootID names this boot of the machine.
func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
