package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// More than this is not a description of workloads.
const maxInput = 16 << 20

func (a *app) applyCommand() *cobra.Command {
	var (
		files            []string
		recursive        bool
		dryRun           string
		wait, createOnly bool
		ifVersion        int64
	)
	c := &cobra.Command{
		Use:     "apply -f FILE...",
		Aliases: []string{"schedule"},
		Short:   "Create workloads, or bring them to what files say",
		Long: `Creates the workloads that the files describe, or brings them to it. A file is
YAML or JSON with one or several documents; a directory stands for the .yaml,
.yml and .json files in it; - is standard input. All files are read and checked
before anything is sent.`,
		Example: `  persys apply -f examples/container.yaml --wait
  persys apply -f web/ -f worker.yaml
  persys apply -f web.yaml --dry-run
  persys get workload web --spec -o yaml | persys apply -f -`,
		Args: noFiles("apply"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			specs, err := a.specsOf("apply", files, recursive)
			if err != nil {
				return err
			}
			if ifVersion != 0 && len(specs) != 1 {
				return usageErrorf("--if-version is for one workload, the files have %d", len(specs))
			}
			requests := make([]*pb.ApplyWorkloadRequest, len(specs))
			for i, s := range specs {
				requests[i] = &pb.ApplyWorkloadRequest{Spec: s, IfVersion: ifVersion, CreateOnly: createOnly}
			}
			switch dryRun {
			case "":
				return a.apply(cmd, requests, wait)
			case dryRunServer:
				return a.plans(cmd, requests, a.printPlans())
			case dryRunClient:
				for _, s := range specs {
					a.note("workload/%s is valid (checked here only: nothing was sent, no place was looked for)", s.Id)
				}
				return nil
			}
			return usageErrorf("--dry-run: %q; allowed: %s (which --dry-run alone means), %s", dryRun, dryRunServer, dryRunClient)
		},
	}
	flags := c.Flags()
	fileFlags(c, &files, &recursive)
	flags.StringVar(&dryRun, "dry-run", "", "`how` to show only what would happen: server, or client to check the files on this machine alone")
	flags.Lookup("dry-run").NoOptDefVal = dryRunServer
	completeFixed(c, "dry-run", dryRunServer, dryRunClient)
	flags.BoolVar(&wait, "wait", false, "wait until everything runs; a failure is exit code 6")
	flags.BoolVar(&createOnly, "create-only", false, "refuse workloads that exist already")
	flags.Int64Var(&ifVersion, "if-version", 0, "refuse unless the workload's resource_version is this `number`")
	return c
}

// apply sends the requests and tells what became of each.
func (a *app) apply(cmd *cobra.Command, requests []*pb.ApplyWorkloadRequest, wait bool) error {
	return a.withClient(cmd, func(ctx context.Context, c *client) error {
		var goals []goal
		err := forEach(requests, func(request *pb.ApplyWorkloadRequest) error {
			request.IdempotencyKey = uuid.NewString()
			answer, err := c.workloads.ApplyWorkload(ctx, request)
			if err != nil {
				return about("workload", request.Spec.Id, err)
			}
			goals = append(goals, goal{id: answer.Workload.GetSpec().GetId()}.asLeft(answer.Workload))
			return a.outcome(answer)
		})
		if err != nil || !wait {
			return err
		}
		return a.await(ctx, c, goals)
	})
}

func (a *app) outcome(answer *pb.ApplyWorkloadResponse) error {
	return a.done(answer.Workload, strings.ToLower(answer.Outcome.String()))
}

// done tells that something was done to a workload.
func (a *app) done(w *pb.Workload, what string) error {
	switch {
	case !a.out.forPeople() && a.out.format != "name":
		return a.out.message(w)
	case a.out.format == "name":
		_, err := fmt.Fprintln(a.Stdout, w.GetSpec().GetId())
		return err
	}
	_, err := fmt.Fprintf(a.Stdout, "workload/%s %s\n", w.GetSpec().GetId(), what)
	return err
}

// readSpecs reads and checks all files. Two documents of one id are a mistake.
func readSpecs(files []string, recursive bool, stdin io.Reader) ([]*pb.WorkloadSpec, error) {
	var specs []*pb.WorkloadSpec
	var all []error
	from := map[string]string{}
	for _, f := range files {
		if f == "" {
			return nil, usageErrorf("-f is given an empty name")
		}
		paths, err := expand(f, recursive)
		if err != nil {
			return nil, usageErrorf("%s: %w", f, causeOfPath(err))
		}
		for _, path := range paths {
			read, err := readSpecFile(path, stdin)
			if err != nil {
				all = append(all, usageErrorf("%s: %w", inputName(path), err))
				continue
			}
			for _, s := range read {
				if other, ok := from[s.Id]; ok {
					all = append(all, usageErrorf("%s: workload %q is in %s already", inputName(path), s.Id, inputName(other)))
				}
				from[s.Id] = path
			}
			specs = append(specs, read...)
		}
	}
	if len(all) == 0 && len(specs) == 0 {
		return nil, usageErrorf("%s: no workload in it", strings.Join(files, ", "))
	}
	return specs, several(all)
}

func inputName(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// expand is the files that an argument of -f stands for.
func expand(name string, recursive bool) ([]string, error) {
	if name == "-" {
		return []string{name}, nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{name}, nil
	}
	var paths []string
	err = filepath.WalkDir(name, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != name && !recursive:
			return filepath.SkipDir
		case !d.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)):
			paths = append(paths, path)
		}
		return nil
	})
	if err == nil && len(paths) == 0 {
		err = errors.New("no .yaml, .yml or .json file in this directory")
	}
	return paths, err
}

func readSpecFile(path string, stdin io.Reader) ([]*pb.WorkloadSpec, error) {
	r := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, causeOfPath(err)
		}
		defer f.Close()
		r = f
	}
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return nil, causeOfPath(err)
	}
	if len(data) > maxInput {
		return nil, fmt.Errorf("larger than %d MiB", maxInput>>20)
	}
	specs, err := model.Decode(data)
	if err != nil {
		return nil, err
	}
	for i, s := range specs {
		if err := model.Validate(model.Normalize(s)); err != nil {
			return nil, fmt.Errorf("%s: %w", specName(s, i), err)
		}
	}
	return specs, nil
}

func specName(s *pb.WorkloadSpec, i int) string {
	if model.IsDNSLabel(s.Id) {
		return fmt.Sprintf("workload %q", s.Id)
	}
	return fmt.Sprintf("document %d", i+1)
}

// causeOfPath drops the path, which the caller names.
func causeOfPath(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
