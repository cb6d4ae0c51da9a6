package model

import (
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// What is allowed, as said in refusals.
const (
	cpuAllowed   = `cores ("2", "1.5") or thousandths ("500m")`
	bytesAllowed = `bytes with an optional suffix k, M, G, T, Ki, Mi, Gi or Ti ("256Mi", "10G")`

	// Longer texts are no quantities; the bound keeps big numbers small.
	maxQuantityLength = 40
)

var byteUnits = []struct {
	suffix string
	bytes  int64
}{
	{"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10},
	{"T", 1e12}, {"G", 1e9}, {"M", 1e6}, {"k", 1e3},
}

// ParseCPU reads an amount of cpu, in thousandths of a core. Zero is read;
// whether it makes sense is for the caller. Nothing finer than a thousandth is
// accepted, so that what is reserved is what was written.
func ParseCPU(s string) (millis int64, err error) {
	number, unit := s, int64(1000)
	if n, ok := strings.CutSuffix(s, "m"); ok {
		number, unit = n, 1
	}
	v, err := scale(number, unit)
	if err != nil {
		if errors.Is(err, errFiner) {
			err = errors.New("finer than a thousandth of a core")
		}
		return 0, fmt.Errorf("cpu %q: %w; allowed: %s", clip(s), err, cpuAllowed)
	}
	return v, nil
}

// ParseBytes reads an amount of memory or disk.
func ParseBytes(s string) (int64, error) {
	number, unit := s, int64(1)
	for _, u := range byteUnits {
		if n, ok := strings.CutSuffix(s, u.suffix); ok {
			number, unit = n, u.bytes
			break
		}
	}
	v, err := scale(number, unit)
	if err != nil {
		if errors.Is(err, errFiner) {
			err = errors.New("not a whole number of bytes")
		}
		return 0, fmt.Errorf("quantity %q: %w; allowed: %s", clip(s), err, bytesAllowed)
	}
	return v, nil
}

// FormatCPU is the inverse of ParseCPU: "2" or "1500m".
func FormatCPU(millis int64) string {
	if millis%1000 == 0 {
		return strconv.FormatInt(millis/1000, 10)
	}
	return strconv.FormatInt(millis, 10) + "m"
}

// FormatBytes is the inverse of ParseBytes: exact, with the largest suffix that
// divides the amount, binary ones first.
func FormatBytes(n int64) string {
	if n == 0 {
		return "0"
	}
	for _, u := range byteUnits {
		if n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

// ParseResources reads all quantities of r; an empty one is 0: nothing is
// reserved and nothing is limited.
func ParseResources(r *pb.Resources) (*pb.NodeCapacity, error) {
	var out pb.NodeCapacity
	var err error
	if s := r.GetCpu(); s != "" {
		if out.CpuMillis, err = ParseCPU(s); err != nil {
			return nil, err
		}
	}
	if s := r.GetMemory(); s != "" {
		if out.MemoryBytes, err = ParseBytes(s); err != nil {
			return nil, fmt.Errorf("memory: %w", err)
		}
	}
	if s := r.GetDisk(); s != "" {
		if out.DiskBytes, err = ParseBytes(s); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
	}
	return &out, nil
}

var (
	errFiner  = errors.New("not a whole multiple of the unit")
	errSyntax = errors.New("not a quantity")
)

// scale reads a plain decimal number and multiplies it with unit, exactly.
func scale(number string, unit int64) (int64, error) {
	if number == "" {
		return 0, errSyntax
	}
	if number[0] == '-' {
		return 0, errors.New("negative")
	}
	if len(number) > maxQuantityLength {
		return 0, errors.New("too long")
	}
	whole, fraction, dotted := strings.Cut(number, ".")
	if whole == "" || dotted && fraction == "" || !digits(whole) || !digits(fraction) {
		return 0, errSyntax
	}
	v, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, errSyntax
	}
	v.Mul(v, new(big.Rat).SetInt64(unit))
	if !v.IsInt() {
		return 0, errFiner
	}
	if !v.Num().IsInt64() {
		return 0, errors.New("too large")
	}
	return v.Num().Int64(), nil
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// clip shortens user input for a message.
func clip(s string) string {
	const most = 60
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
