package main

import (
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// stream is what one command wrote to stdout or stderr: a head in a file, then a ring of
// the last bytes. One goroutine appends; any number read by offset.
type stream struct {
	path  string // "" if there is no directory to keep anything in
	limit int64  // of the head

	mu      sync.Mutex
	file    *os.File
	kept    int64 // bytes of the head
	total   int64
	full    bool // nothing more goes into the head
	tail    ring
	dumped  int64 // bytes of the tail that were moved to path+".tail" at the end
	readers int
	ended   bool
}

func newStream(path string, limit int64, rings *budget) *stream {
	return &stream{path: path, limit: limit, tail: ring{shared: rings}, full: path == ""}
}

// append never fails: what the head cannot take goes into the ring. The file is written
// outside the lock, so that readers of other commands never wait for a slow disk.
func (s *stream) append(p []byte) {
	headed := 0
	if !s.full {
		headed = s.writeHead(p[:min(int64(len(p)), s.limit-s.kept)])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept += int64(headed)
	s.total += int64(len(p))
	if headed < len(p) {
		s.full = true
		s.tail.append(p[headed:])
	}
}

// writeHead gives the number of bytes that the file took; a full disk counts as the limit.
func (s *stream) writeHead(p []byte) int {
	if len(p) == 0 {
		return 0
	}
	if s.file == nil {
		file, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return 0
		}
		s.mu.Lock()
		s.file = file
		s.mu.Unlock()
	}
	n, _ := s.file.WriteAt(p, s.kept)
	return n
}

func (s *stream) totals() (total, kept int64, truncated bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total, s.kept, s.total > s.kept
}

// readAt reads at offset or, where bytes are no longer kept, at the next kept one: `at`.
func (s *stream) readAt(p []byte, offset int64) (n int, at int64) {
	s.mu.Lock()
	file, kept := s.file, s.kept
	s.mu.Unlock()
	if offset < kept && len(p) > 0 {
		if file != nil {
			n, _ = file.ReadAt(p[:min(int64(len(p)), kept-offset)], offset)
		}
		if n > 0 {
			return n, offset
		}
		offset = kept // the file is gone: hostile code may delete its own spool
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dumped > 0 {
		return s.readDumped(p, offset)
	}
	first := s.total - int64(s.tail.filled)
	at = max(offset, first)
	if at >= s.total {
		return 0, s.total
	}
	return s.tail.copyTo(p, int(at-first)), at
}

func (s *stream) readDumped(p []byte, offset int64) (int, int64) {
	first := s.total - s.dumped
	at := max(offset, first)
	file, err := openRegular(s.path + ".tail")
	if err != nil {
		return 0, s.total
	}
	defer file.Close()
	n, _ := file.ReadAt(p[:min(int64(len(p)), s.total-at)], at-first)
	if n <= 0 {
		return 0, s.total
	}
	return n, at
}

func openRegular(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		file.Close()
		return nil, syscall.EINVAL
	}
	return file, nil
}

// end is called when the command is finished: memory and file descriptors go back.
func (s *stream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.dump()
	s.closeIdle()
}

// dump moves the ring into a file; on a full disk it stays in memory while that is cheap.
func (s *stream) dump() {
	if s.tail.filled == 0 {
		return
	}
	rest := make([]byte, s.tail.filled)
	s.tail.copyTo(rest, 0)
	if s.path != "" && os.WriteFile(s.path+".tail", rest, 0o600) == nil {
		s.dumped = int64(len(rest))
		s.tail.release()
	} else if cost := int64(len(s.tail.bytes)) - s.tail.taken; !s.tail.shared.take(cost) {
		s.tail.release()
	} else {
		s.tail.taken += cost
	}
}

// reader and done frame the time in which an attached call reads a finished stream.
func (s *stream) reader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers++
	if s.file == nil && s.ended && s.kept > 0 {
		s.file, _ = openRegular(s.path)
	}
}

func (s *stream) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers--
	s.closeIdle()
}

func (s *stream) closeIdle() {
	if s.ended && s.readers == 0 && s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// discard gives back what a forgotten stream holds.
func (s *stream) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tail.release()
	s.dumped = 0
}

// loadStream is a finished stream of an earlier serve.
func loadStream(dir, name string, total int64, rings *budget) *stream {
	s := newStream(filepath.Join(dir, name), 0, rings)
	s.full, s.ended, s.total = true, true, total
	s.kept = regularSize(s.path)
	s.total = max(s.total, s.kept)
	s.dumped = min(regularSize(s.path+".tail"), s.total-s.kept)
	return s
}

func regularSize(path string) int64 {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	return info.Size()
}
