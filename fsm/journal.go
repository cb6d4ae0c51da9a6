package fsm

// chunkLen trades the memory that a nearly empty journal takes against the
// number of chunks in a long one.
const chunkLen = 256

// journal is a queue that is appended to at its end and forgotten from its
// front. Elements are addressed by position, which never changes. A copy of the
// struct is a snapshot of the queue: the original goes on writing only where
// no copy reads. Only the original may be changed.
type journal[T any] struct {
	chunks     []*[chunkLen]T
	base       uint64 // position of chunks[0][0]
	start, end uint64 // positions held: start <= p < end
}

func (j *journal[T]) len() int { return int(j.end - j.start) }

func (j *journal[T]) at(p uint64) T {
	i := p - j.base
	return j.chunks[i/chunkLen][i%chunkLen]
}

func (j *journal[T]) append(v T) {
	i := j.end - j.base
	if i/chunkLen == uint64(len(j.chunks)) {
		j.chunks = append(j.chunks, new([chunkLen]T))
	}
	j.chunks[i/chunkLen][i%chunkLen] = v
	j.end++
}

// forget drops what is before position p. The chunk that holds p stays whole.
func (j *journal[T]) forget(p uint64) {
	j.start = p
	if n := (p - j.base) / chunkLen; n > 0 {
		// A fresh slice: the old one may be a snapshot's, and keeps all alive.
		j.chunks = append([]*[chunkLen]T(nil), j.chunks[n:]...)
		j.base += n * chunkLen
	}
}

// search finds the first position whose element satisfies the condition, which
// must be false for a prefix of the queue and true for the rest.
func (j *journal[T]) search(cond func(T) bool) uint64 {
	lo, hi := j.start, j.end
	for lo < hi {
		mid := lo + (hi-lo)/2
		if cond(j.at(mid)) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}
