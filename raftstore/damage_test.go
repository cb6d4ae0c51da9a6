package raftstore

import (
	"bytes"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func openTestDisk(t *testing.T, dir string, kind LogKind) (*disk, *logStore, error) {
	t.Helper()
	d, err := openDisk(dir, kind, hclog.NewNullLogger(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	return d, newTestLogStore(d.logs), nil
}

func entryText(i uint64) string {
	return fmt.Sprintf("entry %d %s", i, strings.Repeat(fmt.Sprint(i%10), int(i*37%900)))
}

func appendEntries(t *testing.T, s *logStore, first, last uint64) {
	t.Helper()
	var logs []*raft.Log
	for i := first; i <= last; i++ {
		logs = append(logs, testLog(i, entryText(i)))
	}
	if err := s.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
}

// files reads a directory as a crash would leave it.
func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == spareFile {
			return err
		}
		data, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		all[name] = data
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func writeFiles(t *testing.T, dir string, all map[string][]byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "snapshots"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range all {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// readable returns how many entries from 1 on are there, and fails the test where
// one is there and wrong. damaged is the first error.
func readable(t *testing.T, s *logStore) (n uint64, damaged error) {
	t.Helper()
	last, err := s.LastIndex()
	if err != nil {
		return 0, err
	}
	for i := uint64(1); i <= last; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil {
			return i - 1, err
		}
		if l.Index != i || string(l.Data) != entryText(i) {
			t.Fatalf("entry %d reads as %d %q", i, l.Index, l.Data)
		}
	}
	return last, nil
}

// sectors copies a random part of what changed from before to after, as a disk may
// have written when the power went.
func sectors(r *rand.Rand, before, after []byte, from int) []byte {
	out := bytes.Clone(before)
	if len(out) < len(after) {
		out = append(out, make([]byte, len(after)-len(out))...)
	}
	for at := from; at < len(after); at += 512 {
		if r.IntN(2) == 0 {
			copy(out[at:min(at+512, len(out))], after[at:min(at+512, len(after))])
		}
	}
	return out
}

func TestTornWriteLosesNothingAcknowledged(t *testing.T) {
	const acknowledged, torn = 40, 48
	for _, kind := range []LogKind{LogBolt, LogWAL} {
		t.Run(string(kind), func(t *testing.T) {
			dir := t.TempDir()
			d, s, err := openTestDisk(t, dir, kind)
			if err != nil {
				t.Fatal(err)
			}
			for i := uint64(1); i <= acknowledged; i += 8 {
				appendEntries(t, s, i, i+7)
			}
			before := files(t, dir)
			appendEntries(t, s, acknowledged+1, torn)
			after := files(t, dir)
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
			r := rand.New(rand.NewPCG(1, 2))
			for round := range 12 {
				crashed := filepath.Join(t.TempDir(), fmt.Sprint(round))
				state := map[string][]byte{}
				for name, data := range before {
					// bbolt writes its first two pages after it has synced the rest.
					from := 0
					if strings.HasSuffix(name, ".db") {
						from = 2 * os.Getpagesize()
					}
					state[name] = sectors(r, data, after[name], from)
				}
				writeFiles(t, crashed, state)
				d, s, err := openTestDisk(t, crashed, kind)
				if err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				n, damaged := readable(t, s)
				if damaged != nil || n != acknowledged && n != torn {
					t.Errorf("round %d: %d entries, %v", round, n, damaged)
				}
				// And it goes on from there.
				appendEntries(t, s, n+1, n+3)
				if err := d.close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// A bit that flips at rest is noticed, or does not matter: no entry reads wrong and
// none is missing in silence.
func TestFlippedBitIsNoticed(t *testing.T) {
	const written = 60
	for _, kind := range []LogKind{LogBolt, LogWAL} {
		t.Run(string(kind), func(t *testing.T) {
			dir := t.TempDir()
			d, s, err := openTestDisk(t, dir, kind)
			if err != nil {
				t.Fatal(err)
			}
			for i := uint64(1); i <= written; i += 4 {
				appendEntries(t, s, i, i+3)
			}
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
			whole := files(t, dir)
			var log string
			for name := range whole {
				if kind == LogBolt && name == boltFile || kind == LogWAL && strings.HasSuffix(name, ".wal") {
					log = name
				}
			}
			end := len(bytes.TrimRight(whole[log], "\x00"))
			r := rand.New(rand.NewPCG(3, 4))
			noticed := 0
			for round := range 60 {
				flipped := filepath.Join(t.TempDir(), fmt.Sprint(round))
				state := map[string][]byte{}
				for name, data := range whole {
					state[name] = data
				}
				state[log] = bytes.Clone(whole[log])
				at := r.IntN(end)
				for kind == LogBolt && !inText(whole[log], at) {
					at = r.IntN(end)
				}
				state[log][at] ^= 1 << r.IntN(8)
				writeFiles(t, flipped, state)
				n, err := survey(t, flipped, kind)
				switch {
				case err != nil:
					noticed++
				case n != written:
					t.Errorf("bit flipped at %d: %d of %d entries, and nobody notices", at, n, written)
				}
			}
			if noticed == 0 {
				t.Error("no flip was noticed: the test flips nothing that matters")
			}
		})
	}
}

// inText reports whether the byte belongs to the text of an entry. Elsewhere in its
// file bbolt may panic in a goroutine of its own when it is opened: noticed, but by
// the whole test.
func inText(data []byte, at int) bool {
	if at < 4 || at+4 > len(data) {
		return false
	}
	return strings.Count(string(data[at-4:at+4]), string(data[at])) == 8 && data[at] >= '0' && data[at] <= '9'
}

// survey opens and reads a log; a panic counts as noticed, since the process ends
// with it.
func survey(t *testing.T, dir string, kind LogKind) (n uint64, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	d, s, err := openTestDisk(t, dir, kind)
	if err != nil {
		return 0, err
	}
	n, err = readable(t, s)
	if closeErr := d.close(); err == nil {
		err = closeErr
	}
	return n, err
}

// Whatever raft does to a log, it reads the same afterwards and after a restart: the
// store on disk is compared with a slice.
func TestLogStoresBehaveLikeASlice(t *testing.T) {
	for _, kind := range []LogKind{LogBolt, LogWAL} {
		t.Run(string(kind), func(t *testing.T) {
			for seed := range uint64(6) {
				dir := t.TempDir()
				d, s, err := openTestDisk(t, dir, kind)
				if err != nil {
					t.Fatal(err)
				}
				r := rand.New(rand.NewPCG(seed, 9))
				var model []*raft.Log // consecutive
				next := uint64(1)
				check := func(op string) {
					t.Helper()
					var first, last uint64
					if len(model) > 0 {
						first, last = model[0].Index, model[len(model)-1].Index
					}
					gotFirst, err1 := s.FirstIndex()
					gotLast, err2 := s.LastIndex()
					if err1 != nil || err2 != nil || gotFirst != first || gotLast != last {
						t.Fatalf("seed %d: after %s: log from %d to %d, want %d to %d (%v, %v)", seed, op, gotFirst, gotLast, first, last, err1, err2)
					}
					for _, want := range model {
						var l raft.Log
						if err := s.GetLog(want.Index, &l); err != nil || !bytes.Equal(l.Data, want.Data) || l.Term != want.Term {
							t.Fatalf("seed %d: after %s: entry %d is %q in term %d, want %q in term %d: %v",
								seed, op, want.Index, l.Data, l.Term, want.Data, want.Term, err)
						}
					}
				}
				cut := func(first, last uint64) {
					t.Helper()
					if err := s.DeleteRange(first, last); err != nil {
						t.Fatal(err)
					}
				}
				for step := range 60 {
					op := "append"
					switch n := r.IntN(10); {
					case n < 5 || len(model) < 3:
						var logs []*raft.Log
						for range 1 + r.IntN(5) {
							l := testLog(next, fmt.Sprint(step, " ", strings.Repeat("x", r.IntN(3000))))
							l.Term = uint64(step)
							logs = append(logs, l)
							next++
						}
						if err := s.StoreLogs(logs); err != nil {
							t.Fatal(err)
						}
						model = append(model, logs...)
					case n < 7:
						op = "cutting the end"
						keep := 1 + r.IntN(len(model)-1)
						cut(model[keep].Index, model[len(model)-1].Index)
						model = model[:keep]
						next = model[keep-1].Index + 1
					case n < 8:
						op = "compaction"
						drop := 1 + r.IntN(len(model)-1)
						cut(model[0].Index, model[drop-1].Index)
						model = model[drop:]
					case n < 9:
						op = "a snapshot in place of the log"
						cut(model[0].Index, model[len(model)-1].Index)
						model = nil
						next += uint64(r.IntN(100))
					default:
						op = "restart"
						if err := d.close(); err != nil {
							t.Fatal(err)
						}
						if d, s, err = openTestDisk(t, dir, kind); err != nil {
							t.Fatal(err)
						}
					}
					check(op)
				}
				if err := d.close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
