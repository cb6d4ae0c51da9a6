package model

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func TestEncodeMendsText(t *testing.T) {
	w := &pb.Workload{
		Uid: "a\xffb",
		Spec: &pb.WorkloadSpec{
			Labels: map[string]string{"k\xfe": "v\xfd", "ok": "ok"},
			Spec:   &pb.WorkloadSpec_Process{Process: &pb.ProcessSpec{Args: []string{"x\xff"}, Env: map[string]string{"A": "\xff"}}},
		},
	}
	var got pb.Workload
	if err := proto.Unmarshal(Encode(w), &got); err != nil {
		t.Fatal(err)
	}
	if got.Uid != "a\uFFFDb" || got.Spec.Labels["k\uFFFD"] != "v\uFFFD" || got.Spec.Labels["ok"] != "ok" ||
		got.Spec.GetProcess().Args[0] != "x\uFFFD" || got.Spec.GetProcess().Env["A"] != "\uFFFD" {
		t.Errorf("mended: %v", &got)
	}
	if w.Uid != "a\xffb" {
		t.Error("Encode changed its argument")
	}
}

func TestSplitKey(t *testing.T) {
	for _, tt := range []struct {
		key, id, sub string
		ok           bool
	}{
		{"/workloads/web", "web", "", true},
		{"/workloads/web/status", "web", "status", true},
		{"/workloads/", "", "", false},
		{"/nodes/web", "", "", false},
	} {
		id, sub, ok := SplitKey(WorkloadsPrefix, tt.key)
		if id != tt.id || sub != tt.sub || ok != tt.ok {
			t.Errorf("%s: %q %q %v", tt.key, id, sub, ok)
		}
	}
}
