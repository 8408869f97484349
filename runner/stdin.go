package main

import (
	"os"
	"sync"
	"time"
)

const (
	stdinBuffer = 1 << 20
	stdinWait   = time.Second
)

// stdinPipe feeds a command. Clients add bytes by offset, so a repeated request adds nothing twice.
type stdinPipe struct {
	mu       sync.Mutex
	changed  *sync.Cond
	pipe     *os.File
	buffer   []byte
	accepted int64
	eof      bool // all is accepted and the end was asked for
	broken   bool // the command no longer reads
}

func newStdinPipe(pipe *os.File, first []byte, eof bool) *stdinPipe {
	s := &stdinPipe{pipe: pipe, buffer: first, accepted: int64(len(first)), eof: eof}
	s.changed = sync.NewCond(&s.mu)
	return s
}

// pump writes until the end was written or the command stopped reading.
func (s *stdinPipe) pump() {
	defer s.pipe.Close()
	for {
		s.mu.Lock()
		for len(s.buffer) == 0 && !s.eof && !s.broken {
			s.changed.Wait()
		}
		piece, stop := s.buffer[:min(len(s.buffer), readStep)], s.broken || len(s.buffer) == 0
		s.mu.Unlock()
		if stop {
			return
		}
		n, err := s.pipe.Write(piece)
		s.mu.Lock()
		if s.buffer = s.buffer[min(n, len(s.buffer)):]; len(s.buffer) == 0 {
			s.buffer = nil
		}
		if err != nil {
			s.broken, s.buffer = true, nil
		}
		s.changed.Broadcast()
		s.mu.Unlock()
	}
}

// close is for a command that has ended; a write that blocks in pump ends too.
func (s *stdinPipe) close() {
	s.mu.Lock()
	s.broken, s.buffer = true, nil
	s.changed.Broadcast()
	s.mu.Unlock()
	_ = s.pipe.SetWriteDeadline(time.Now())
}

// accept takes bytes that begin at offset, waits a moment for room, and says how many it took.
func (s *stdinPipe) accept(body []byte, offset int64, eof bool) (accepted int64, closed bool, err error) {
	late := time.AfterFunc(stdinWait, func() {
		s.mu.Lock() // not between a waiter's look at the clock and its Wait
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer late.Stop()
	deadline := time.Now().Add(stdinWait)
	s.mu.Lock()
	defer s.mu.Unlock()
	end := offset + int64(len(body))
	for {
		if offset < 0 || offset > s.accepted {
			return 0, false, faultf(codeInvalid, "stdin offset %d: %d bytes were accepted before; send from there", offset, s.accepted)
		}
		if end > s.accepted && (s.broken || s.eof) {
			return 0, false, faultf(codeStdinClosed, "the command no longer reads its standard input after %d bytes", s.accepted)
		}
		if end > s.accepted {
			s.take(body[s.accepted-offset:])
		}
		if end <= s.accepted || !time.Now().Before(deadline) {
			break
		}
		s.changed.Wait()
	}
	if eof && end == s.accepted && !s.eof {
		s.eof = true
		s.changed.Broadcast()
	}
	return s.accepted, s.eof, nil
}

func (s *stdinPipe) take(body []byte) {
	n := min(len(body), stdinBuffer-len(s.buffer))
	if n <= 0 {
		return
	}
	s.buffer = append(s.buffer, body[:n]...)
	s.accepted += int64(n)
	s.changed.Broadcast()
}
