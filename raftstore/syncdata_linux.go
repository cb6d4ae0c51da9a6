package raftstore

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// syncData makes what was written durable, and of the metadata only what reading it
// back needs.
func syncData(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("fdatasync %s: %w", f.Name(), err)
		}
		return nil
	}
}
