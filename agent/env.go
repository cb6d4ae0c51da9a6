package agent

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Environment is what work is started with, sorted NAME=value pairs: the
// workload's env, over it the container's or the process's own, over those what
// Persys says about the replica. listen gives the port that work listens on
// for a port of its spec.
//
// Users may give PORT a value of their own, and none of the names below that
// begin with PERSYS_. PERSYS_EPOCH is a fencing token,
// "<leader epoch>.<generation>", which grows with each assignment of the replica.
func Environment(w Work, node string, listen func(*pb.Port) int32) []string {
	a, spec := w.Item.GetAssignment(), w.Item.GetSpec()
	env := map[string]string{}
	for i, p := range a.GetPorts() {
		if i == 0 {
			env["PORT"] = strconv.Itoa(int(listen(p)))
		}
	}
	layers := []map[string]string{spec.GetEnv()}
	switch s := spec.GetSpec().(type) {
	case *pb.WorkloadSpec_Container:
		layers = append(layers, s.Container.GetEnv())
	case *pb.WorkloadSpec_Process:
		layers = append(layers, s.Process.GetEnv())
	}
	for _, layer := range layers {
		for name, value := range layer {
			env[name] = value
		}
	}
	env["PERSYS_WORKLOAD"] = a.GetWorkloadId()
	env["PERSYS_REPLICA"] = strconv.Itoa(int(a.GetReplica()))
	env["PERSYS_NODE"] = node
	env["PERSYS_EPOCH"] = fmt.Sprintf("%d.%d", a.GetEpoch(), a.GetGeneration())
	for i, p := range a.GetPorts() {
		env["PERSYS_PORT_"+strconv.Itoa(i)] = strconv.Itoa(int(listen(p)))
		env["PERSYS_HOST_PORT_"+strconv.Itoa(i)] = strconv.Itoa(int(p.GetHostPort()))
	}
	for _, d := range a.GetDevices() {
		env["PERSYS_DEVICES_"+envSuffix(d.GetName())] = strings.Join(d.GetIds(), ",")
	}
	for _, s := range a.GetStorage() {
		env["PERSYS_STORAGE_"+envSuffix(s.GetPool())] = s.GetPath()
	}
	pairs := make([]string, 0, len(env))
	for name, value := range env {
		pairs = append(pairs, name+"="+value)
	}
	slices.Sort(pairs)
	return pairs
}

// envSuffix is a name as the end of a variable's: upper case, with _ for what is
// neither letter nor digit.
func envSuffix(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(name))
}
