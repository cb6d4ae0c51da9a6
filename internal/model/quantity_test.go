package model

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseCPU(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int64
		err  string
	}{
		{"1", 1000, ""}, {"1.5", 1500, ""}, {"0.001", 1, ""}, {"500m", 500, ""}, {"0", 0, ""}, {"1.500", 1500, ""},
		{"9223372036854775807m", math.MaxInt64, ""},
		{"", 0, "not a quantity"}, {"-1", 0, "negative"}, {"-5m", 0, "negative"}, {"1.5m", 0, "finer"}, {"0.0001", 0, "finer"},
		{"m", 0, "not a quantity"}, {"1e3", 0, "not a quantity"}, {"+1", 0, "not a quantity"}, {" 1", 0, "not a quantity"},
		{"1.", 0, "not a quantity"}, {".5", 0, "not a quantity"}, {"0x10", 0, "not a quantity"}, {"1/2", 0, "not a quantity"},
		{"1_0", 0, "not a quantity"}, {"9223372036854775808m", 0, "too large"}, {"9223372036854775807", 0, "too large"},
		{strings.Repeat("1", 100), 0, "too long"}, {"half", 0, "allowed: cores"}, {"٣", 0, "not a quantity"},
	} {
		got, err := ParseCPU(tt.in)
		check(t, tt.in, got, tt.want, err, tt.err)
	}
}

func TestParseBytes(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int64
		err  string
	}{
		{"0", 0, ""}, {"1024", 1024, ""}, {"256Mi", 256 << 20, ""}, {"1.5Gi", 3 << 29, ""}, {"10G", 1e10, ""}, {"5k", 5000, ""},
		{"1Ki", 1024, ""}, {"2Ti", 2 << 40, ""}, {"3T", 3e12, ""}, {"8388607Ti", 8388607 << 40, ""},
		{"", 0, "not a quantity"}, {"-1Gi", 0, "negative"}, {"1MB", 0, "suffix k, M, G"}, {"1m", 0, "not a quantity"},
		{"1.5", 0, "whole number of bytes"}, {"0.3Ki", 0, "whole number of bytes"}, {"8388608Ti", 0, "too large"}, {"9223372036854775808", 0, "too large"},
		{"1 Gi", 0, "not a quantity"}, {"lots", 0, "not a quantity"}, {"1K", 0, "not a quantity"},
	} {
		got, err := ParseBytes(tt.in)
		check(t, tt.in, got, tt.want, err, tt.err)
	}
}

func check(t *testing.T, in string, got, want int64, err error, wantErr string) {
	t.Helper()
	switch {
	case wantErr == "" && err != nil:
		t.Errorf("%q: %v", in, err)
	case wantErr != "" && (err == nil || !strings.Contains(err.Error(), wantErr)):
		t.Errorf("%q: error %v, want one with %q", in, err, wantErr)
	case got != want:
		t.Errorf("%q: %d, want %d", in, got, want)
	}
}

func TestFormatIsInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(0, math.MaxInt64).Draw(t, "n") << rapid.IntRange(0, 40).Draw(t, "shift") & math.MaxInt64
		if got, err := ParseCPU(FormatCPU(n)); err != nil || got != n {
			t.Fatalf("cpu %d: %q → %d, %v", n, FormatCPU(n), got, err)
		}
		if got, err := ParseBytes(FormatBytes(n)); err != nil || got != n {
			t.Fatalf("bytes %d: %q → %d, %v", n, FormatBytes(n), got, err)
		}
	})
}
