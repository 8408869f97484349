package main

import "sync"

const (
	ringSize    = 1 << 20
	ringMinimum = 64 << 10
	ringsTotal  = 32 << 20 // of all commands; minimum sizes are granted beyond it
)

// budget counts bytes that several holders share.
type budget struct {
	mu   sync.Mutex
	left int64
}

func (b *budget) take(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < n {
		return false
	}
	b.left -= n
	return true
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	b.left += n
	b.mu.Unlock()
}

// ring keeps the last bytes of a stream. It grows up to ringSize while the runner's budget
// allows, so that many chatty commands cannot eat the sandbox's memory.
type ring struct {
	bytes  []byte // len is the capacity of the ring
	next   int    // where the next byte goes
	filled int
	shared *budget
	taken  int64
}

func (r *ring) append(p []byte) {
	r.grow(len(p))
	if len(p) >= len(r.bytes) {
		copy(r.bytes, p[len(p)-len(r.bytes):])
		r.next, r.filled = 0, len(r.bytes)
		return
	}
	first := copy(r.bytes[r.next:], p)
	copy(r.bytes, p[first:])
	r.next = (r.next + len(p)) % len(r.bytes)
	r.filled = min(r.filled+len(p), len(r.bytes))
}

func (r *ring) grow(more int) {
	size := max(len(r.bytes), ringMinimum)
	for size < ringSize && r.filled+more > size {
		size *= 2
	}
	if size <= len(r.bytes) {
		return
	}
	cost := int64(size - max(len(r.bytes), ringMinimum))
	if cost > 0 && !r.shared.take(cost) {
		if len(r.bytes) > 0 {
			return
		}
		size, cost = ringMinimum, 0
	}
	grown := make([]byte, size)
	r.copyTo(grown, 0)
	r.bytes, r.next = grown, r.filled%size
	r.taken += cost
}

// copyTo copies from the skip-th kept byte on.
func (r *ring) copyTo(p []byte, skip int) int {
	if skip >= r.filled {
		return 0
	}
	start := (r.next - r.filled + skip + 2*len(r.bytes)) % len(r.bytes)
	wanted := min(len(p), r.filled-skip)
	first := copy(p[:wanted], r.bytes[start:])
	return first + copy(p[first:wanted], r.bytes)
}

func (r *ring) release() {
	if r.taken > 0 {
		r.shared.give(r.taken)
	}
	r.bytes, r.filled, r.next, r.taken = nil, 0, 0, 0
}
