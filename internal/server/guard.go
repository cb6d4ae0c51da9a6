package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/persys-dev/persys/agent"
)

// guardCommand is the command line that ends up in GuardMain.
func guardCommand(c Config) ([]string, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	settings, err := json.Marshal(Config{
		DataDir: c.DataDir, Name: c.Name, Bind: c.Bind, DockerHost: c.DockerHost, LogLevel: c.LogLevel, LogFormat: c.LogFormat,
	})
	if err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	return []string{exe, "agent-guard", string(settings)}, nil
}

// GuardMain is what `persys agent-guard` does: it stands beside an agent and stops
// exclusive work when the lease ends and the agent can't; see agent.Guard. Its
// argument is what guardCommand made. It returns the exit code.
func GuardMain(args []string) int {
	debug.SetGCPercent(20) // it sleeps nearly always
	if err := runGuard(args); err != nil {
		fmt.Fprintln(os.Stderr, "agent-guard:", err)
		return 1
	}
	return 0
}

func runGuard(args []string) error {
	if len(args) != 1 {
		return errors.New("it is started by the agent only")
	}
	var c Config
	if err := json.Unmarshal([]byte(args[0]), &c); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	id, err := loadIdentity(c.DataDir)
	if err != nil {
		return err
	}
	log, err := newLogger(c)
	if err != nil {
		return err
	}
	log = log.With("name", c.Name, "part", "guard")
	runtimes, err := c.runtimes(id, agentDir(c.DataDir), log)
	if err != nil {
		return err
	}
	return agent.Guard(context.Background(), agent.GuardConfig{
		DataDir: agentDir(c.DataDir), Runtimes: runtimes, Owner: os.Stdin, Logger: log,
	})
}
