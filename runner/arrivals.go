package main

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"sync"
)

// mostArrivals bounds the memory for transfers that nobody ends.
const mostArrivals = 64

// arrivals holds the checksum of each file that arrives, as far as it has arrived: so that the end of a big one does not wait
// until all of it was read again. What is not known is read again.
type arrivals struct {
	mu    sync.Mutex
	known map[string]*arrival
}

// arrival is the checksum of a file's first next bytes. Pieces that came out of turn wait in later, by their offset.
type arrival struct {
	mu     sync.Mutex
	hash   hash.Hash
	next   int64
	later  map[int64]int64
	broken bool // something was written twice
}

func newArrival() *arrival { return &arrival{hash: sha256.New(), later: map[int64]int64{}} }

func (s *arrivals) of(name string) *arrival {
	s.mu.Lock()
	defer s.mu.Unlock()
	if found := s.known[name]; found != nil {
		return found
	}
	if s.known == nil || len(s.known) >= mostArrivals {
		s.known = map[string]*arrival{}
	}
	s.known[name] = newArrival()
	return s.known[name]
}

func (s *arrivals) forget(name string) {
	s.mu.Lock()
	delete(s.known, name)
	s.mu.Unlock()
}

// add is told of each piece when it is in the file.
func (s *arrival) add(file io.ReaderAt, offset int64, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, twice := s.later[offset]; twice || offset < s.next || s.broken {
		s.broken = true
		return
	}
	if offset > s.next {
		s.later[offset] = int64(len(body))
		return
	}
	_, _ = s.hash.Write(body)
	s.next += int64(len(body))
	for length := s.later[s.next]; length > 0; length = s.later[s.next] {
		delete(s.later, s.next)
		if !s.read(file, length) {
			return
		}
	}
}

func (s *arrival) read(file io.ReaderAt, length int64) bool {
	buffer := takeBuffer(256 << 10)
	defer recyclePayload(buffer)
	n, err := io.CopyBuffer(struct{ io.Writer }{s.hash}, struct{ io.Reader }{io.NewSectionReader(file, s.next, length)}, buffer)
	s.next += n
	s.broken = s.broken || err != nil || n != length
	return !s.broken
}

// total is the checksum of the whole file of size bytes.
func (s *arrival) total(file io.ReaderAt, size int64) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken || s.next > size {
		return checksum(io.NewSectionReader(file, 0, size))
	}
	if !s.read(file, size-s.next) {
		return "", io.ErrUnexpectedEOF
	}
	return hex.EncodeToString(s.hash.Sum(nil)), nil
}
