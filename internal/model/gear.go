package model

import (
	"fmt"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Limits of devices and storage pools, of nodes and of what is asked for.
const (
	maxDevices         = 1024
	maxStoragePools    = 64
	maxStorageRequests = 8
	deviceIDAllowed    = "at most 253 letters, digits and -_./:+@"
)

// EnvSuffix is the end of the variable that tells of a device or a pool:
// PERSYS_DEVICES_NVIDIA_A100 for nvidia/a100.
func EnvSuffix(name string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, name)
}

func checkDeviceRequests(errs *FieldErrors, devices []*pb.DeviceRequest) {
	seen := map[string]bool{}
	for i, d := range devices {
		at := fmt.Sprintf("resources.devices[%d]", i)
		checkDeviceName(errs, at+".name", d.Name)
		if seen[EnvSuffix(d.Name)] {
			errs.add(at+".name", "%q is listed twice, or differs from another in punctuation only", clip(d.Name))
		}
		seen[EnvSuffix(d.Name)] = true
		checkRange(errs, at+".count", d.Count, 0, maxDevices)
		for j, c := range d.Constraints {
			checkConstraint(errs, fmt.Sprintf("%s.constraints[%d]", at, j), c)
		}
	}
}

func checkDeviceName(errs *FieldErrors, at, name string) {
	if !isLabelKey(name) {
		errs.add(at, "%q is not allowed; allowed: %s", clip(name), labelKeyAllowed)
	}
}

func checkStorageRequests(errs *FieldErrors, storage []*pb.StorageRequest) {
	if len(storage) > maxStorageRequests {
		errs.add("resources.storage", "has %d entries; allowed: %d", len(storage), maxStorageRequests)
	}
	type what struct{ pool, driver string }
	seen := map[what]bool{}
	for i, s := range storage {
		at := fmt.Sprintf("resources.storage[%d]", i)
		for _, f := range []struct{ name, value string }{{"pool", s.Pool}, {"driver", s.Driver}} {
			if f.value != "" {
				checkID(errs, at+"."+f.name, f.value)
			}
		}
		key := what{pool: s.Pool}
		if s.Pool == "" {
			key.driver = s.Driver
		}
		if seen[key] {
			errs.add(at, "the same storage is listed twice; allowed: once, with all that is needed of it")
		}
		seen[key] = true
		if s.Size == "" {
			errs.add(at+".size", "missing; allowed: %s", bytesAllowed)
		}
		checkBytes(errs, at+".size", s.Size, 1)
	}
}

// ValidateGear says what is wrong with the devices and storage pools of a node,
// as FieldErrors.
func ValidateGear(devices []*pb.Device, pools []*pb.StoragePool) error {
	var errs FieldErrors
	checkDevices(&errs, devices)
	if len(pools) > maxStoragePools {
		errs.add("storage_pools", "has %d entries; allowed: %d", len(pools), maxStoragePools)
	}
	seen := map[string]bool{}
	for i, p := range pools {
		at := fmt.Sprintf("storage_pools[%d]", i)
		checkID(&errs, at+".name", p.GetName())
		if p.GetDriver() != "" {
			checkID(&errs, at+".driver", p.GetDriver())
		}
		if seen[EnvSuffix(p.GetName())] {
			errs.add(at+".name", "%q is listed twice", clip(p.GetName()))
		}
		seen[EnvSuffix(p.GetName())] = true
		if p.GetCapacityBytes() < 1 || p.GetCapacityBytes() > maxResourceBytes {
			errs.add(at+".capacity", "%d bytes are out of range; allowed: 1 to %s", p.GetCapacityBytes(), FormatBytes(maxResourceBytes))
		}
		checkAbsolute(&errs, at+".path", p.GetPath())
	}
	return errs.err()
}

func checkDevices(errs *FieldErrors, devices []*pb.Device) {
	type device struct{ name, id string }
	seen := map[device]bool{}
	for i, d := range devices {
		at := fmt.Sprintf("devices[%d]", i)
		checkDeviceName(errs, at+".name", d.GetName())
		if len(d.GetIds()) == 0 {
			errs.add(at+".ids", "missing; allowed: one for each device")
		}
		for j, id := range d.GetIds() {
			here := fmt.Sprintf("%s.ids[%d]", at, j)
			if id == "" || len(id) > maxLabel || !consistsOf(id, "-_./:+@") {
				errs.add(here, "%q is not allowed; allowed: %s", clip(id), deviceIDAllowed)
			}
			if seen[device{d.GetName(), id}] {
				errs.add(here, "%q is listed twice", clip(id))
			}
			seen[device{d.GetName(), id}] = true
		}
		if n := len(d.GetPaths()); n != 0 && n != len(d.GetIds()) {
			errs.add(at+".paths", "has %d entries; allowed: one for each of the %d ids, or none", n, len(d.GetIds()))
		}
		for j, p := range d.GetPaths() {
			checkAbsolute(errs, fmt.Sprintf("%s.paths[%d]", at, j), p)
		}
		checkLabels(errs, at+".attributes", d.GetAttributes())
	}
	if len(seen) > maxDevices {
		errs.add("devices", "has %d devices; allowed: %d", len(seen), maxDevices)
	}
}
