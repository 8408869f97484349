package main

import "sync"

// reservoir is an amount of memory that takers wait for.
type reservoir struct {
	mu      sync.Mutex
	changed *sync.Cond
	left    int
	closed  bool
}

func newReservoir(size int) *reservoir {
	r := &reservoir{left: size}
	r.changed = sync.NewCond(&r.mu)
	return r
}

// take waits until n is there; false means that the connection has ended.
func (r *reservoir) take(n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.left < n && !r.closed {
		r.changed.Wait()
	}
	r.left -= n
	return !r.closed
}

func (r *reservoir) give(n int) {
	r.mu.Lock()
	r.left += n
	r.mu.Unlock()
	r.changed.Broadcast()
}

func (r *reservoir) drain() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.changed.Broadcast()
}
