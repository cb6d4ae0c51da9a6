package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"

	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Run runs what the data directory says this machine is, until ctx ends.
func Run(ctx context.Context, c Config) error {
	c, err := c.WithDefaults()
	if err != nil {
		return err
	}
	log, err := newLogger(c)
	if err != nil {
		return err
	}
	lock, err := lockDataDir(c.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	id, err := loadIdentity(c.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return conflict("data directory %s belongs to no cluster yet; found one with `persys init`, or join one with `persys join TOKEN`", c.DataDir)
	}
	if err != nil {
		return err
	}
	if c.Role != pb.Role_ROLE_UNSPECIFIED && c.Role != id.Role {
		return conflict("data directory %s belongs to a machine with role %s; start it with `persys %s`", c.DataDir, pki.RoleName(id.Role), pki.RoleName(id.Role))
	}
	if id.Name != c.Name {
		return conflict("name: data directory %s belongs to %q, not to %q", c.DataDir, id.Name, c.Name)
	}
	log = log.With("name", c.Name)
	switch {
	case id.Role == pb.Role_ROLE_AGENT:
		return runAgent(ctx, c, id, log)
	case c.Agent:
		return runReplica(ctx, c, id, log, runOwnAgent)
	default:
		return runReplica(ctx, c, id, log)
	}
}

// runOwnAgent runs an agent in a server's process; the server certifies it.
func runOwnAgent(ctx context.Context, r *replica) error {
	if _, err := pki.LoadCredentials(credentialsDir(r.config.DataDir, pb.Role_ROLE_AGENT)); err != nil {
		if err := issueOwn(r.config, r.authority, r.id, pb.Role_ROLE_AGENT, r.config.Name); err != nil {
			return err
		}
	}
	return startAgent(ctx, r.config, r.id, r.log, r.registry, r.ownAgentServers)
}

// ownAgentServers: the agent in a server's process attaches to that server, and
// to another where that one does not answer.
func (r *replica) ownAgentServers() []string {
	own := r.config.grpcAddress()
	return append([]string{own}, slices.DeleteFunc(r.serverAddresses(), func(a string) bool { return a == own })...)
}

func newLogger(c Config) (*slog.Logger, error) {
	var level slog.Level
	if c.LogLevel != "" {
		if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
			return nil, fmt.Errorf("log_level: %q; allowed: debug, info, warn, error", c.LogLevel)
		}
	}
	options := &slog.HandlerOptions{Level: level}
	switch c.LogFormat {
	case "", "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	}
	return nil, fmt.Errorf("log_format: %q; allowed: text, json", c.LogFormat)
}
