package agent

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ownSession takes a process out of the agent's session and group.
func ownSession() *unix.SysProcAttr { return &unix.SysProcAttr{Setsid: true} }

// sinceBoot names this boot of the machine, and gives the time since it began,
// which goes on while the machine sleeps.
func sinceBoot() (id string, since time.Duration, err error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", 0, fmt.Errorf("boot id: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0, fmt.Errorf("time since boot: %w", err)
	}
	return strings.TrimSpace(string(data)), time.Duration(ts.Nano()), nil
}
