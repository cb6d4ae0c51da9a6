// Command persys is the servers, the agents and the command line of Persys.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"google.golang.org/grpc/grpclog"

	"github.com/persys-dev/persys/agent/process"
	"github.com/persys-dev/persys/internal/cli"
	"github.com/persys-dev/persys/internal/server"
)

func main() {
	// The supervisor of a process workload is this program too. It heeds its own
	// signals, so it comes before anything that would catch them.
	if len(os.Args) > 1 && os.Args[1] == "process-shim" {
		os.Exit(process.ShimMain(os.Args[2:]))
	}
	// So is what stops exclusive work when the agent can't. It outlives signals
	// that are meant for the agent.
	if len(os.Args) > 1 && os.Args[1] == "agent-guard" {
		os.Exit(server.GuardMain(os.Args[2:]))
	}
	// gRPC would tell standard error of each bad request that a client sends.
	if os.Getenv("GRPC_GO_LOG_SEVERITY_LEVEL") == "" {
		grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Main(ctx, os.Args[1:], cli.Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		LookupEnv: os.LookupEnv,
		ConfigDir: os.UserConfigDir,
		Version:   server.Version,
		Node: cli.Node{
			Init: server.Init, Join: server.Join, Run: server.Run, AdminContext: server.AdminContext,
		},
	}))
}
