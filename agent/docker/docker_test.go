package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/persys-dev/persys/agent"
	"github.com/persys-dev/persys/agent/runtimetest"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// testImage is named after a registry that does not exist, so that a test which
// asks for it is told at once.
const testImage = "127.0.0.1:1/persys-agent-test:1"

// engineInfo skips the test where no engine answers.
func engineInfo(t *testing.T) *client.Client {
	t.Helper()
	api, err := client.New(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { api.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := api.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		t.Skipf("no Docker Engine answers: %v", err)
	}
	return api
}

// imported is set when the image was made; TestMain removes it at the end.
var (
	importOnce sync.Once
	imported   bool
)

func TestMain(m *testing.M) {
	code := m.Run()
	if imported {
		if err := removeImage(); err != nil {
			fmt.Fprintln(os.Stderr, "remove the test image:", err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

func removeImage() error {
	api, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err = api.ImageRemove(ctx, testImage, client.ImageRemoveOptions{Force: true, PruneChildren: true})
	return err
}

// buildImage makes an image that holds the test program and nothing else, once.
func buildImage(t *testing.T, api *client.Client) {
	t.Helper()
	importOnce.Do(func() {
		layer, err := layerOf(runtimetest.Program(t))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := api.ImageImport(t.Context(), client.ImageImportSource{Source: layer, SourceName: "-"}, testImage,
			client.ImageImportOptions{Changes: []string{`ENTRYPOINT ["/program"]`}})
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Close()
		imported = true
		if _, err := io.Copy(io.Discard, answer); err != nil {
			t.Fatal(err)
		}
	})
	if !imported {
		t.Fatal("the test image could not be made")
	}
}

// layerOf is a file system with a program and the directories that tests write to.
func layerOf(program string) (io.Reader, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	layer := &bytes.Buffer{}
	w := tar.NewWriter(layer)
	for _, dir := range []string{"tmp/", "etc/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "program", Mode: 0o755, Size: int64(len(binary))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(binary); err != nil {
		return nil, err
	}
	return layer, w.Close()
}

func open(t *testing.T, node string) *Runtime {
	t.Helper()
	r, err := New(Config{ClusterID: runtimetest.Cluster, NodeID: node, PublishAddress: "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func spec(args ...string) *pb.WorkloadSpec {
	return &pb.WorkloadSpec{Spec: &pb.WorkloadSpec_Container{Container: &pb.ContainerSpec{Image: testImage, Args: args}}}
}

func TestConformance(t *testing.T) {
	buildImage(t, engineInfo(t))
	runtimetest.Run(t, runtimetest.Harness{
		New:  func(t *testing.T, node string) agent.Runtime { return open(t, node) },
		Spec: spec,
		NoProgram: func() *pb.WorkloadSpec {
			s := spec()
			s.GetContainer().Command = []string{"/no-such-program"}
			return s
		},
		NoLimits: open(t, runtimetest.Node).Info(t.Context()).GetMessage(),
	})
}
