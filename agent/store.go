package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// stateFile holds pb.AgentState. Losing it is harmless while servers are
// reachable: what runs is recognised by its labels. A file that can't be read is
// put aside, and the agent begins with revision 0 and an empty set, on which
// nothing is ever removed (see Orphans in diff.go).
const stateFile = "desired.pb"

// loadDesired reads the set of an earlier run. A file of another cluster or node is
// an error: the directory is not ours.
func loadDesired(dir, cluster, node string) (d desired, damaged error, err error) {
	empty := desired{items: map[Key]*pb.DesiredItem{}}
	path := filepath.Join(dir, stateFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return empty, nil, nil
	}
	if err != nil {
		return desired{}, nil, fmt.Errorf("desired set: %w", err)
	}
	state := &pb.AgentState{}
	if err := proto.Unmarshal(data, state); err != nil {
		damaged = fmt.Errorf("desired set %s is damaged and was put aside: %w", path, err)
		if err := os.Rename(path, path+".damaged"); err != nil {
			return desired{}, nil, fmt.Errorf("desired set: %w", err)
		}
		return empty, damaged, nil
	}
	if state.GetClusterId() != cluster {
		return desired{}, nil, fmt.Errorf("data directory %s belongs to cluster %q, not to %q: use another --data-dir", dir, state.GetClusterId(), cluster)
	}
	if state.GetNodeId() != node {
		return desired{}, nil, fmt.Errorf("data directory %s belongs to node %q, not to %q: use another --data-dir", dir, state.GetNodeId(), node)
	}
	d = desired{revision: state.GetRevision(), items: make(map[Key]*pb.DesiredItem, len(state.GetItems()))}
	for _, item := range state.GetItems() {
		d.items[keyOf(item.GetAssignment())] = item
	}
	return d, nil, nil
}

// saveDesired replaces the file atomically; it is on the disk when it returns.
func saveDesired(dir, cluster, node string, d desired, now time.Time) error {
	state := &pb.AgentState{ClusterId: cluster, NodeId: node, Revision: d.revision, SavedAt: timestamppb.New(now)}
	for _, key := range d.keys() {
		state.Items = append(state.Items, d.items[key])
	}
	data, err := proto.Marshal(state)
	if err != nil {
		return fmt.Errorf("desired set: %w", err)
	}
	if err := writeFile(filepath.Join(dir, stateFile), data); err != nil {
		return fmt.Errorf("desired set: %w", err)
	}
	return nil
}

// writeFile replaces a file: after a crash there is the old one or the new one.
func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
