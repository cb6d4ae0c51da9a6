package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Files of an instance's directory. The agent writes the record and the order to
// stop, the supervisor all others.
const (
	recordFile = "record.json"
	stateFile  = "state.json"
	stopFile   = "stop.json"
	lockFile   = "lock"
	outputFile = "output.log"
	shimFile   = "shim.log"
)

// record is what is to run. It holds the whole environment, so its directory is
// for nobody else's eyes.
type record struct {
	Labels  map[string]string `json:"labels"`
	Command string            `json:"command"`
	Args    []string          `json:"args,omitempty"`
	Env     []string          `json:"env"`
	Dir     string            `json:"dir,omitempty"`
	User    *user             `json:"user,omitempty"`
	Grace   time.Duration     `json:"grace"`
	Cgroup  cgroup            `json:"cgroup"`

	LogBytes int64 `json:"log_bytes"`
	LogFiles int   `json:"log_files"`
}

// user is as whom it runs; nil: as the agent.
type user struct {
	UID    int   `json:"uid"`
	GID    int   `json:"gid"`
	Groups []int `json:"groups,omitempty"`
}

// state is how far the latest run is.
type state struct {
	Boot    string    `json:"boot"`
	Shim    identity  `json:"shim"`
	Program identity  `json:"program"`
	Started time.Time `json:"started,omitzero"`
	// Finished is set when the program and all that it started are gone.
	Finished    time.Time `json:"finished,omitzero"`
	ExitCode    int       `json:"exit_code"`
	OutOfMemory bool      `json:"out_of_memory,omitempty"`
	// StartError is why the program could not be started, or why nobody knows how
	// it ended.
	StartError string `json:"start_error,omitempty"`
}

// stopOrder overrides the record's grace.
type stopOrder struct {
	Grace time.Duration `json:"grace"`
}

// answer is what the supervisor tells the agent that started it, once.
type answer struct {
	State state `json:"state"`
	// Refused: the program could not be started.
	Refused bool `json:"refused,omitempty"`
	// Error is why the supervisor could not do its work.
	Error string `json:"error,omitempty"`
}

// readJSON reports whether there is such a file.
func readJSON(path string, into any) (bool, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return true, nil
}

// writeJSON replaces a file in one step. It is not synced: after a power cut
// nothing runs that it could speak of.
func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
