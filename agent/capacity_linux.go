package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// detectCapacity is what this machine has for work: its processors, its memory
// and the file system of dir, less reserve; override wins where it is not 0.
func detectCapacity(dir string, reserve, override *pb.NodeCapacity) (*pb.NodeCapacity, error) {
	memory, err := readMemory()
	if err != nil {
		return nil, fmt.Errorf("capacity: %w", err)
	}
	disk, err := readDisk(dir)
	if err != nil {
		return nil, fmt.Errorf("capacity: %w", err)
	}
	c := &pb.NodeCapacity{
		CpuMillis:   int64(runtime.NumCPU())*1000 - reserve.GetCpuMillis(),
		MemoryBytes: memory.total - reserve.GetMemoryBytes(),
		DiskBytes:   disk.total - reserve.GetDiskBytes(),
	}
	for _, field := range []struct {
		name     string
		detected *int64
		override int64
	}{
		{"cpu", &c.CpuMillis, override.GetCpuMillis()},
		{"memory", &c.MemoryBytes, override.GetMemoryBytes()},
		{"disk", &c.DiskBytes, override.GetDiskBytes()},
	} {
		if field.override != 0 {
			*field.detected = field.override
		}
		if *field.detected <= 0 {
			return nil, fmt.Errorf("capacity: nothing is left of %s after what is reserved", field.name)
		}
	}
	return c, nil
}

type amount struct{ total, used int64 }

// readMemory counts as used what could not be had without swapping.
func readMemory() (amount, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return amount{}, err
	}
	return parseMeminfo(data)
}

func parseMeminfo(data []byte) (amount, error) {
	values := map[string]int64{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			if kib, err := strconv.ParseInt(fields[0], 10, 64); err == nil {
				values[name] = kib * 1024
			}
		}
	}
	total, available := values["MemTotal"], values["MemAvailable"]
	if total <= 0 {
		return amount{}, fmt.Errorf("/proc/meminfo has no MemTotal")
	}
	return amount{total: total, used: total - available}, nil
}

// readDisk does not count what only root may fill.
func readDisk(dir string) (amount, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return amount{}, fmt.Errorf("file system of %s: %w", dir, err)
	}
	used := int64(fs.Blocks-fs.Bfree) * fs.Bsize
	return amount{total: used + int64(fs.Bavail)*fs.Bsize, used: used}, nil
}

// readCPU gives the time since boot that all processors were busy, and all of
// it, in ticks.
func readCPU() (busy, all int64, err error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	return parseStat(data)
}

func parseStat(data []byte) (busy, all int64, err error) {
	line, _, _ := strings.Cut(string(data), "\n")
	fields := strings.Fields(line)
	if len(fields) < 6 || fields[0] != "cpu" {
		return 0, 0, fmt.Errorf("/proc/stat does not begin with cpu times")
	}
	// user nice system idle iowait irq softirq steal; what follows is counted in
	// user already.
	for i, field := range fields[1:min(len(fields), 9)] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/stat: %w", err)
		}
		all += ticks
		if i != 3 && i != 4 {
			busy += ticks
		}
	}
	return busy, all, nil
}

// kernel release, as uname -r gives it.
func kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}
