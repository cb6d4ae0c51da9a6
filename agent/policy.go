package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Policy is what this node allows. The zero Policy allows neither bind mounts
// nor privileged containers.
type Policy struct {
	// BindRoots are directories of the node below which (themselves included)
	// paths may be mounted into work.
	BindRoots  []string
	Privileged bool
	// Devices are those of the node's configuration: their files, and no others,
	// may be given to work.
	Devices []*pb.Device
}

// DevicePath checks the path of a device file that work was given.
func (p Policy) DevicePath(name, path string) error {
	for _, d := range p.Devices {
		if d.GetName() == name && slices.Contains(d.GetPaths(), path) {
			return nil
		}
	}
	return Refuse(pb.ReasonCode_INVALID_SPEC, "device %s: %q is not in this node's configuration", name, path)
}

// HostPath resolves a path of the node that work wants mounted: every symbolic
// link is followed, and what remains must lie below a root. It is called at use,
// and the resolved path is what must be mounted.
func (p Policy) HostPath(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", Refuse(pb.ReasonCode_INVALID_SPEC, "host path %q is not absolute", path)
	}
	if len(p.BindRoots) == 0 {
		return "", Refuse(pb.ReasonCode_INVALID_SPEC, "host path %q: this node allows no bind mounts", path)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", &Error{Code: pb.ReasonCode_STORAGE_ATTACH_FAILED, Retryable: true, Err: fmt.Errorf("host path %q: %w", path, err)}
	}
	for _, root := range p.BindRoots {
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			continue // a root that is not there allows nothing
		}
		if below(root, resolved) {
			return resolved, nil
		}
	}
	return "", Refuse(pb.ReasonCode_INVALID_SPEC, "host path %q: %q is not below an allowed root (%s)",
		path, resolved, strings.Join(p.BindRoots, ", "))
}

func below(root, path string) bool {
	rel, err := filepath.Rel(root, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}
