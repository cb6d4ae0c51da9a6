package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// become turns this process into the program: it enters the cgroup while it still
// may, takes on the user, and is replaced. It returns only when that fails; the
// reason goes to the supervisor.
func become(dir string) int {
	unix.CloseOnExec(answerFD)
	err := replace(dir)
	fmt.Fprint(os.NewFile(answerFD, "answer"), err)
	return 127
}

func replace(dir string) error {
	var r record
	if ok, err := readJSON(filepath.Join(dir, recordFile), &r); err != nil || !ok {
		return errors.Join(errors.New("the record can't be read"), err)
	}
	if err := r.Cgroup.join(); err != nil {
		return err
	}
	if u := r.User; u != nil {
		if err := unix.Setgroups(u.Groups); err != nil {
			return fmt.Errorf("groups %v: %w", u.Groups, err)
		}
		if err := unix.Setresgid(u.GID, u.GID, u.GID); err != nil {
			return fmt.Errorf("group %d: %w", u.GID, err)
		}
		if err := unix.Setresuid(u.UID, u.UID, u.UID); err != nil {
			return fmt.Errorf("user %d: %w", u.UID, err)
		}
	}
	// Taking on a user has undone it: the program does not outlive its supervisor.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("death signal: %w", err)
	}
	if r.Dir != "" {
		if err := os.Chdir(r.Dir); err != nil {
			return fmt.Errorf("working directory: %w", err)
		}
	}
	path, err := find(r.Command, r.Env)
	if err != nil {
		return err
	}
	err = unix.Exec(path, append([]string{r.Command}, r.Args...), r.Env)
	return fmt.Errorf("%s: %w", path, err)
}

// find looks a name without a slash up in the program's own PATH.
func find(command string, env []string) (string, error) {
	if strings.Contains(command, "/") {
		return command, nil
	}
	for _, pair := range env {
		if path, ok := strings.CutPrefix(pair, "PATH="); ok {
			if err := os.Setenv("PATH", path); err != nil {
				return "", err
			}
		}
	}
	return exec.LookPath(command)
}
