package process

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// cgroup is the control group of one instance: a directory for each controller
// in version 1, one for all in version 2. The zero cgroup is none.
type cgroup struct {
	V2 string `json:"v2,omitempty"`
	// V1 by controller; those that share a mount share a directory.
	V1 map[string]string `json:"v1,omitempty"`
}

// controllers that limits and measurements need. Only cpu and memory enforce
// something.
var controllers = []string{"cpu", "memory", "cpuacct", "blkio", "io", "freezer"}

// cgroups is where the groups of this node are made.
type cgroups struct {
	root, below string
	// cannot says why limits can't be enforced; empty: they can.
	cannot string
	// mu keeps the parent there while a group is made in it.
	mu sync.Mutex
}

// findCgroups looks for what root offers.
func findCgroups(root, cluster, node string) *cgroups {
	sum := sha256.Sum256([]byte(cluster + "\x00" + node))
	c := &cgroups{root: root, below: filepath.Join("persys", fmt.Sprintf("%s-%x", node, sum[:4]))}
	if root == "none" {
		c.cannot = "cgroups are turned off"
		return c
	}
	base, err := c.parent()
	if err != nil {
		c.cannot = err.Error()
	}
	base.leave()
	return c
}

// parent makes the parent of the node's groups. With an error there may be some of
// it, which serves to measure and to find what runs.
func (c *cgroups) parent() (cgroup, error) {
	if c.root == "none" {
		return cgroup{}, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(c.root, &fs); err != nil {
		return cgroup{}, fmt.Errorf("%s: %w", c.root, err)
	}
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		path, err := makeV2(c.root, c.below)
		return cgroup{V2: path}, err
	}
	paths, err := makeV1(c.root, c.below)
	return cgroup{V1: paths}, err
}

// makeV2 hands the controllers down from the root: a group has the files of a
// controller only where its parent has it in cgroup.subtree_control.
func makeV2(root, below string) (string, error) {
	path := root
	for _, part := range append([]string{""}, strings.Split(below, "/")...) {
		path = filepath.Join(path, part)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		data, err := os.ReadFile(filepath.Join(path, "cgroup.controllers"))
		if err != nil {
			return "", err
		}
		has := strings.Fields(string(data))
		for _, controller := range []string{"cpu", "memory", "io"} {
			needed := controller != "io"
			if !slices.Contains(has, controller) {
				if needed {
					return "", fmt.Errorf("%s has no %s controller", path, controller)
				}
				continue
			}
			err := writeControl(filepath.Join(path, "cgroup.subtree_control"), "+"+controller)
			if err != nil && needed {
				return "", err
			}
		}
	}
	return path, nil
}

// makeV1 uses what is mounted; without cpu or memory there are no limits, and what
// there is serves to measure.
func makeV1(root, below string) (map[string]string, error) {
	paths := map[string]string{}
	var missing []error
	for _, controller := range controllers {
		mounted := filepath.Join(root, controller)
		needed := controller == "cpu" || controller == "memory"
		var fs unix.Statfs_t
		err := unix.Statfs(mounted, &fs)
		if err == nil && fs.Type != unix.CGROUP_SUPER_MAGIC {
			err = errors.New("is no cgroup file system")
		}
		path := filepath.Join(mounted, below)
		if err == nil {
			err = os.MkdirAll(path, 0o755)
		}
		if err == nil {
			paths[controller] = path
		} else if needed {
			missing = append(missing, fmt.Errorf("%s: %w", mounted, err))
		}
	}
	return paths, errors.Join(missing...)
}

// instance makes the group of an instance with its limits, in thousandths of a
// core and bytes; 0 is no limit.
func (c *cgroups) instance(name string, cpuMillis, memory int64) (cgroup, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	base, err := c.parent()
	if err != nil && c.cannot == "" {
		return cgroup{}, fmt.Errorf("cgroup: %w", err)
	}
	g := cgroup{}
	if base.V2 != "" {
		g.V2 = filepath.Join(base.V2, name)
	}
	for controller, path := range base.V1 {
		if g.V1 == nil {
			g.V1 = map[string]string{}
		}
		g.V1[controller] = filepath.Join(path, name)
	}
	for _, path := range g.paths() {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return cgroup{}, fmt.Errorf("cgroup: %w", err)
		}
	}
	for _, w := range g.limits(cpuMillis, memory) {
		err := writeControl(w.file, w.value)
		if err != nil && (!w.optional || !errors.Is(err, fs.ErrNotExist)) {
			return cgroup{}, fmt.Errorf("cgroup: %w", err)
		}
	}
	return g, nil
}

type control struct {
	file, value string
	// optional files are not there on every kernel.
	optional bool
}

// Microseconds: the kernel's default period, and the least time in it that it
// accepts.
const (
	cpuPeriod = 100_000
	cpuLeast  = 1_000
)

// limits are the writes that set them. In version 1 memory and swap can't be
// below memory, so it comes last where limits grow and is harmless otherwise: an
// instance's limits never change while it is there.
func (g cgroup) limits(cpuMillis, memory int64) []control {
	var writes []control
	quota := strconv.FormatInt(max(cpuMillis*cpuPeriod/1000, cpuLeast), 10)
	limit := strconv.FormatInt(memory, 10)
	if g.V2 != "" {
		if cpuMillis > 0 {
			writes = append(writes, control{file: filepath.Join(g.V2, "cpu.max"), value: quota + " " + strconv.Itoa(cpuPeriod)})
		}
		if memory > 0 {
			writes = append(writes,
				control{file: filepath.Join(g.V2, "memory.max"), value: limit},
				control{file: filepath.Join(g.V2, "memory.swap.max"), value: "0", optional: true})
		}
		return writes
	}
	if path, ok := g.V1["cpu"]; ok && cpuMillis > 0 {
		writes = append(writes,
			control{file: filepath.Join(path, "cpu.cfs_period_us"), value: strconv.Itoa(cpuPeriod)},
			control{file: filepath.Join(path, "cpu.cfs_quota_us"), value: quota})
	}
	if path, ok := g.V1["memory"]; ok && memory > 0 {
		writes = append(writes,
			control{file: filepath.Join(path, "memory.limit_in_bytes"), value: limit},
			control{file: filepath.Join(path, "memory.memsw.limit_in_bytes"), value: limit, optional: true})
	}
	return writes
}

// paths are all directories, each once, in order.
func (g cgroup) paths() []string {
	var paths []string
	if g.V2 != "" {
		paths = append(paths, g.V2)
	}
	for _, path := range g.V1 {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// join moves the calling process into the group.
func (g cgroup) join() error {
	for _, path := range g.paths() {
		if err := writeControl(filepath.Join(path, "cgroup.procs"), "0"); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// kill kills everything in the group; what is started while it does so is
// killed by the next call. It returns how many were there.
func (g cgroup) kill() int {
	if g.V2 != "" && writeControl(filepath.Join(g.V2, "cgroup.kill"), "1") == nil {
		return len(g.pids())
	}
	pids := g.pids()
	for _, pid := range pids {
		// The number is in the group at this moment: that it is somebody else's a
		// moment later is what version 1 can't rule out.
		unix.Kill(pid, unix.SIGKILL)
	}
	return len(pids)
}

func (g cgroup) pids() []int {
	var pids []int
	for _, path := range g.paths() {
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// oomKills counts what the kernel has killed in the group for its memory limit.
func (g cgroup) oomKills() int64 {
	if g.V2 != "" {
		return readKeyed(filepath.Join(g.V2, "memory.events"), "oom_kill")
	}
	if path, ok := g.V1["memory"]; ok {
		return readKeyed(filepath.Join(path, "memory.oom_control"), "oom_kill")
	}
	return 0
}

// leave takes away what is empty, and the parent that all nodes share with it.
func (g cgroup) leave() {
	for _, path := range g.paths() {
		if os.Remove(path) == nil {
			_ = os.Remove(filepath.Dir(path)) // not empty while another node has groups
		}
	}
}

// tidy takes an instance's group away, and the node's with the last of them.
func (c *cgroups) tidy(g cgroup) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := g.remove(); err != nil {
		return err
	}
	above := cgroup{V1: map[string]string{}}
	for _, path := range g.paths() {
		above.V1[path] = filepath.Dir(path)
	}
	above.leave()
	return nil
}

// remove takes the directories away; groups that are gone are no error.
func (g cgroup) remove() error {
	var errs []error
	for _, path := range g.paths() {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

// usage of the group: nanoseconds of processor time, bytes of memory that can't
// be given back, bytes read and written. False: it can't be measured.
func (g cgroup) usage() (cpu uint64, memory, read, written int64, ok bool) {
	if g.V2 != "" {
		cpu = uint64(readKeyed(filepath.Join(g.V2, "cpu.stat"), "usage_usec")) * 1000
		memory = readNumber(filepath.Join(g.V2, "memory.current")) - readKeyed(filepath.Join(g.V2, "memory.stat"), "inactive_file")
		read, written = readIO(filepath.Join(g.V2, "io.stat"))
		return cpu, max(memory, 0), read, written, true
	}
	acct, hasCPU := g.V1["cpuacct"]
	mem, hasMemory := g.V1["memory"]
	if !hasCPU || !hasMemory {
		return 0, 0, 0, 0, false
	}
	cpu = uint64(readNumber(filepath.Join(acct, "cpuacct.usage")))
	memory = readNumber(filepath.Join(mem, "memory.usage_in_bytes")) - readKeyed(filepath.Join(mem, "memory.stat"), "total_inactive_file")
	if path, ok := g.V1["blkio"]; ok {
		read, written = readBlkio(filepath.Join(path, "blkio.throttle.io_service_bytes"))
	}
	return cpu, max(memory, 0), read, written, true
}

func writeControl(path, value string) error {
	// Never creates: these files are the kernel's.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// readNumber is 0 where there is none.
func readNumber(path string) int64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// readKeyed reads "name number" lines.
func readKeyed(path, name string) int64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && key == name {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}

// readIO sums "8:0 rbytes=1 wbytes=2 …" lines.
func readIO(path string) (read, written int64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0
	}
	for field := range strings.FieldsSeq(string(data)) {
		name, value, _ := strings.Cut(field, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "rbytes":
			read += n
		case "wbytes":
			written += n
		}
	}
	return read, written
}

// readBlkio sums "8:0 Read 1" lines.
func readBlkio(path string) (read, written int64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		n, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			continue
		}
		switch fields[1] {
		case "Read":
			read += n
		case "Write":
			written += n
		}
	}
	return read, written
}
