package server

import "testing"

func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{
		0:               6400,
		16 * mebibyte:   400,
		64 * mebibyte:   100,
		256 * mebibyte:  100,
		512 * mebibyte:  50,
		2048 * mebibyte: 50,
	} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d MiB live: %d, want %d", live/mebibyte, got, want)
		}
	}
}
