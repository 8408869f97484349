package main

import (
	"sync"
	"time"
)

// lease is the runner's own end of life, in case nobody is left to end it.
type lease struct {
	mu      sync.Mutex
	timer   *time.Timer
	expires time.Time // zero: never
	expired func()
}

func newLease(duration time.Duration, expired func()) *lease {
	l := &lease{expired: expired}
	if duration > 0 {
		l.extend(duration)
	}
	return l
}

func (l *lease) extend(duration time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expires = time.Now().Add(duration)
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(duration, l.check)
}

// check looks again: a timer that was about to fire cannot be stopped.
func (l *lease) check() {
	l.mu.Lock()
	left := time.Until(l.expires)
	l.mu.Unlock()
	if left <= 0 {
		l.expired()
	}
}

func (l *lease) left() *float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.expires.IsZero() {
		return nil
	}
	return pointer(max(0, time.Until(l.expires).Seconds()))
}
