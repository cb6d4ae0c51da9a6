package server

import (
	"context"
	"os"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

const (
	mebibyte = 1 << 20
	// paceEvery is how often the garbage collector is set to what lives.
	paceEvery = time.Second
)

// paceGC lets the garbage collector work seldom while little is stored, and keeps a
// server that stores much from taking twice as much: Go's own pace is a heap of twice
// what lives. Whoever sets GOGC has chosen otherwise.
func paceGC(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		<-ctx.Done()
		return ctx.Err()
	}
	tick := time.NewTicker(paceEvery)
	defer tick.Stop()
	live := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}}
	for set := 100; ; {
		runtimemetrics.Read(live)
		// Each change stops the world for a moment.
		if percent := gcPercent(live[0].Value.Uint64()); percent < set*9/10 || percent > set*11/10 {
			debug.SetGCPercent(percent)
			set = percent
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// gcPercent is what GOGC should be for so many bytes that live: as much again, but at
// least 64 MiB, and beyond 256 MiB no more than that or half.
func gcPercent(live uint64) int {
	live = max(live, mebibyte)
	room := max(live, 64*mebibyte)
	if live > 256*mebibyte {
		room = max(256*mebibyte, live/2)
	}
	return int(room * 100 / live)
}
