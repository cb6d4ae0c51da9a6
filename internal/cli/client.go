package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/credentials"

	"github.com/persys-dev/persys/internal/pki"
	"github.com/persys-dev/persys/internal/server"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// client is the API of a cluster, answered by whichever server can.
type client struct {
	pool      *pool
	workloads pb.WorkloadsClient
	nodes     pb.NodesClient
	cluster   pb.ClusterClient
}

func newClient(addresses []string, creds credentials.TransportCredentials) *client {
	p := newPool(addresses, creds)
	return &client{p, pb.NewWorkloadsClient(p), pb.NewNodesClient(p), pb.NewClusterClient(p)}
}

// target is where a client connects to, and as whom.
type target struct {
	endpoints []string
	creds     *pki.Credentials
	// Set where the endpoints are those of a context, which may learn more.
	configPath, context string
}

const noCluster = "no cluster to talk to: start one with `persys dev` or `persys init`, or name one with --context or --endpoint"

// target works out flags, environment and the user's file.
func (a *app) target() (*target, error) {
	path, err := a.configPath()
	if err != nil {
		return nil, err
	}
	config, err := loadUserConfig(path)
	if err != nil {
		return nil, err
	}
	g := &a.global
	if g.config != "" {
		if _, err := os.Stat(path); err != nil {
			return nil, usageErrorf("configuration %s: %w", path, causeOfPath(err))
		}
	}
	own := &clusterContext{CAFile: g.caFile, CertFile: g.certFile, KeyFile: g.keyFile}
	fromFlags := g.caFile != "" || g.certFile != "" || g.keyFile != ""
	name := g.context
	if name == "" {
		name = config.CurrentContext
	}
	if name == "" && len(config.Contexts) == 1 {
		name = config.names()[0]
	}
	x := config.Contexts[name]
	switch {
	case x == nil && g.context != "":
		return nil, usageErrorf("there is no context %q in %s%s", name, path, didYouMean(name, config.names()))
	case x == nil && name != "" && !fromFlags:
		return nil, usageErrorf("the current context %q is not in %s; choose another with `persys context use`", name, path)
	case x == nil && len(config.Contexts) > 1 && !fromFlags:
		return nil, usageErrorf("several clusters are known, none is the current one: name one with --context (%s)", strings.Join(config.names(), ", "))
	case x == nil && (!fromFlags || len(g.endpoints) == 0):
		return nil, usageErrorf(noCluster)
	}
	t := &target{endpoints: g.endpoints}
	if x != nil && len(t.endpoints) == 0 {
		t.configPath, t.context = path, name
		t.endpoints = append(slices.Clone(x.Endpoints), loadKnownServers(path, name)...)
	}
	if t.endpoints, err = cleanEndpoints(t.endpoints); err != nil {
		return nil, err
	}
	if len(t.endpoints) == 0 {
		return nil, usageErrorf("context %q in %s has no endpoints", name, path)
	}
	what := fmt.Sprintf("context %q in %s", name, path)
	if fromFlags {
		x, what = own, "--ca-file, --cert-file, --key-file"
		if path, err = os.Getwd(); err != nil {
			return nil, fmt.Errorf("working directory: %w", err)
		}
		path += "/" // files are relative to it
	}
	certificate, key, roots, err := x.pem(path)
	if err != nil {
		return nil, usageErrorf("%s: %w", what, err)
	}
	if t.creds, err = pki.CredentialsFromPEM(certificate, key, roots); err != nil {
		return nil, usageErrorf("%s: %w", what, err)
	}
	return t, nil
}

// cleanEndpoints adds the default port and drops what is there twice.
func cleanEndpoints(in []string) ([]string, error) {
	var out []string
	for _, e := range in {
		e = strings.TrimSpace(e)
		if e == "" {
			continue
		}
		if strings.Contains(e, "/") {
			return nil, usageErrorf("endpoint %q: must be host or host:port of a server's gRPC port, without a scheme", e)
		}
		host, port, err := net.SplitHostPort(e)
		if err != nil {
			host, port = strings.Trim(e, "[]"), strconv.Itoa(server.DefaultGRPCPort)
		}
		if n, err := strconv.ParseUint(port, 10, 16); host == "" || err != nil || n == 0 || strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return nil, usageErrorf("endpoint %q: must be host or host:port of a server's gRPC port", e)
		}
		e = net.JoinHostPort(host, port)
		if !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out, nil
}

// withClient connects, runs use, and remembers which servers there are.
func (a *app) withClient(cmd *cobra.Command, use func(context.Context, *client) error) error {
	t, err := a.target()
	if err != nil {
		return err
	}
	if until := t.creds.NotAfter(); time.Now().After(until) {
		return coded(exitDenied, "the certificate of %s expired on %s; on a server, `persys context add --data-dir DIR` gives a new one",
			t.creds.Identity(), until.Format(time.DateOnly))
	}
	c := newClient(t.endpoints, credentials.NewTLS(t.creds.ClientTLS(nil, "h2")))
	defer c.pool.close()
	if err := use(cmd.Context(), c); err != nil {
		return err
	}
	if t.context != "" && a.staleServers(t) {
		a.learnServers(cmd.Context(), c, t)
	}
	return nil
}

const (
	// With fewer servers known than this, one that is lost could leave the
	// command line without any.
	enoughServers = 3
	learnEvery    = time.Hour
	learnTimeout  = 500 * time.Millisecond
)

func (a *app) staleServers(t *target) bool {
	if len(t.endpoints) < enoughServers {
		return true
	}
	info, err := os.Stat(knownServersPath(t.configPath))
	return err != nil || time.Since(info.ModTime()) > learnEvery
}

// learnServers asks who the servers are. It is a convenience: where it fails,
// the command has succeeded all the same.
func (a *app) learnServers(ctx context.Context, c *client, t *target) {
	ctx, cancel := context.WithTimeout(ctx, learnTimeout)
	defer cancel()
	answer, err := c.cluster.ListMembers(ctx, &pb.ListMembersRequest{})
	if err == nil {
		err = saveKnownServers(t.configPath, t.context, addressesOf(answer.Members))
	}
	if err == nil {
		now := time.Now()
		err = os.Chtimes(knownServersPath(t.configPath), now, now)
	}
	_ = err // asked again by the next command
}

func addressesOf(members []*pb.Member) []string {
	var addresses []string
	for _, m := range members {
		if !m.Removed && m.GrpcAddress != "" {
			addresses = append(addresses, m.GrpcAddress)
		}
	}
	sort.Strings(addresses)
	return addresses
}

// userDefaults takes what the user's file says about output and timeout.
func (a *app) userDefaults(cmd *cobra.Command) error {
	if cmd.Annotations[onMachine] != "" {
		return nil // a server does not depend on somebody's home
	}
	path, err := a.configPath()
	if err != nil {
		return nil // those who need it will say so
	}
	config, err := loadUserConfig(path)
	if err != nil {
		return err
	}
	for flag, value := range map[string]string{"output": config.Output, "timeout": config.Timeout} {
		if f := cmd.Flags().Lookup(flag); value != "" && !f.Changed {
			// Not flags.Set: --wait still has a default of its own.
			if err := f.Value.Set(value); err != nil {
				return fmt.Errorf("%s: %s: %w", path, flag, causeOf(err))
			}
		}
	}
	a.warnReadable(path, config)
	return nil
}

// warnReadable tells of a file with private keys that others may read.
func (a *app) warnReadable(path string, config *userConfig) {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return
	}
	for _, x := range config.Contexts {
		if x.Key != "" {
			a.note("persys: warning: %s holds a private key and others can read it; chmod 600 it", path)
			return
		}
	}
}

// forEach does one thing for each item and goes on after an error, so that one
// bad item does not hide the others. The errors are reported one per line.
func forEach[T any](items []T, do func(T) error) error {
	var all []error
	for _, item := range items {
		if err := do(item); err != nil {
			all = append(all, err)
			if code := exitCode(err); code == exitUnavailable || code == exitInterrupted {
				break // the others would fare no better
			}
		}
	}
	return several(all)
}

// several is one error out of many; the exit code is that of the first.
func several(all []error) error {
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	lines := make([]string, len(all))
	for i, err := range all {
		lines[i] = message(err)
	}
	return &codedError{exitCode(all[0]), errors.New(strings.Join(lines, "\n"))}
}
