package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/persys-dev/persys/agent"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// followEvery is how often a log that is followed is looked at.
const followEvery = 100 * time.Millisecond

// Logs reads the files of an instance, oldest first.
func (r *Runtime) Logs(ctx context.Context, in agent.Instance, req *pb.WorkloadLogsRequest, send func(*pb.LogChunk) error) error {
	path := filepath.Join(r.dir(in.ID), outputFile)
	var since time.Time
	if req.Since != nil {
		since = req.GetSince().AsTime()
	}
	tail := newTail(req.GetTail(), send)
	take := func(chunk *pb.LogChunk) error {
		if chunk.GetTime().AsTime().Before(since) {
			return nil
		}
		return tail.take(chunk)
	}
	// The newest file is opened first: should it be rotated meanwhile, its lines
	// are read by the handle, and none twice.
	newest, err := os.Open(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("logs: %w", err)
	}
	reader := &logReader{path: path, file: newest}
	defer reader.close()
	if err := readOld(path, r.cfg.LogFiles, newest, take); err != nil {
		return err
	}
	if err := reader.read(take); err != nil {
		return err
	}
	if err := tail.flush(); err != nil {
		return err
	}
	timer := time.NewTicker(followEvery)
	defer timer.Stop()
	for req.GetFollow() {
		// Asked before reading: what it wrote at the end is read then.
		_, held, err := r.supervised(in.ID)
		if err != nil {
			return fmt.Errorf("logs: %w", err)
		}
		if err := reader.read(take); err != nil || !held {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
	}
	return nil
}

// readOld reads the files before newest, oldest first. One that is rotated while
// it is read may be passed over.
func readOld(path string, files int, newest *os.File, take func(*pb.LogChunk) error) error {
	for n := files - 1; n > 0; n-- {
		f, err := os.Open(numbered(path, n))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("logs: %w", err)
		}
		if same(f, newest) {
			f.Close()
			return nil
		}
		err = (&logReader{path: path, file: f}).drain(take)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func same(a, b *os.File) bool {
	if a == nil || b == nil {
		return false
	}
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// logReader reads whole lines, and goes on in the next file where the log was
// rotated.
type logReader struct {
	path string
	file *os.File
	rest []byte
}

func (l *logReader) close() {
	if l.file != nil {
		l.file.Close()
	}
}

// read takes all there is.
func (l *logReader) read(take func(*pb.LogChunk) error) error {
	if l.file != nil {
		if err := l.drain(take); err != nil {
			return err
		}
	}
	next, err := os.Open(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("logs: %w", err)
	}
	if same(l.file, next) {
		return next.Close()
	}
	if l.file != nil {
		// Written to until the moment it was rotated.
		if err := l.drain(take); err != nil {
			return errors.Join(err, next.Close())
		}
		l.file.Close()
	}
	l.file, l.rest = next, nil
	return l.drain(take)
}

func (l *logReader) drain(take func(*pb.LogChunk) error) error {
	r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(bytes.Clone(l.rest)), l.file), 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			l.rest = line
			return nil
		}
		if err != nil {
			return fmt.Errorf("logs: %w", err)
		}
		if chunk, ok := parseLine(line); ok {
			if err := take(chunk); err != nil {
				return err
			}
		}
	}
}

// parseLine reads what logFile wrote.
func parseLine(line []byte) (*pb.LogChunk, bool) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	when, rest, ok := bytes.Cut(line, []byte(" "))
	stream, text, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 || len(stream) != 1 {
		return nil, false
	}
	at, err := time.Parse(stamp, string(when))
	if err != nil {
		return nil, false
	}
	return &pb.LogChunk{Stderr: stream[0] == 'e', Line: bytes.Clone(text), Time: timestamppb.New(at)}, true
}

// tail passes on the last n of what it takes until flush, and all from then on; 0
// is no bound.
type tail struct {
	n     int64
	send  func(*pb.LogChunk) error
	kept  []*pb.LogChunk
	begin int
}

func newTail(n int64, send func(*pb.LogChunk) error) *tail { return &tail{n: n, send: send} }

func (t *tail) take(chunk *pb.LogChunk) error {
	switch {
	case t.n <= 0:
		return t.send(chunk)
	case int64(len(t.kept)) < t.n:
		t.kept = append(t.kept, chunk)
	default:
		t.kept[t.begin] = chunk
		t.begin = (t.begin + 1) % len(t.kept)
	}
	return nil
}

func (t *tail) flush() error {
	t.n = 0
	for i := range t.kept {
		if err := t.send(t.kept[(t.begin+i)%len(t.kept)]); err != nil {
			return err
		}
	}
	t.kept = nil
	return nil
}
