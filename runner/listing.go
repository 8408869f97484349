package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
)

const (
	maxListed   = 100_000
	listingStep = 1024
)

// listing collects FILEs in the order of their paths, within a number and a size.
type listing struct {
	root      *os.Root
	recursive bool
	after     string // only paths behind it: where the last answer was cut
	limit     int
	room      int
	files     []json.RawMessage
	truncated bool
}

func (s *server) listFiles(r *request) (any, error) {
	var args struct {
		Path      text `json:"path"`
		Recursive bool `json:"recursive"`
		Limit     *int `json:"limit"`
		After     text `json:"after"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	limit := maxListed
	if args.Limit != nil {
		limit = min(*args.Limit, maxListed)
	}
	if limit < 1 {
		return nil, faultf(codeInvalid, "limit %d: at least 1", limit)
	}
	p, err := s.locate(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	l := &listing{root: p.root, recursive: args.Recursive, after: string(args.After), limit: limit, room: maxDocumentJSON - 1024, files: []json.RawMessage{}}
	if err := l.walk(p.name, p.path); err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return struct {
		Files     []json.RawMessage `json:"files"`
		Truncated bool              `json:"truncated"`
	}{l.files, l.truncated}, nil
}

// step is one thing to do in a directory: list an entry, or go into it. Sorted by key this gives
// the order of whole paths: "a-b" comes before "a/b", because '-' comes before '/'.
type step struct {
	key     string
	descend bool
}

func (l *listing) walk(name, path string) error {
	steps, err := l.steps(name, path)
	if err != nil {
		return err
	}
	for _, next := range steps {
		if l.truncated {
			return nil
		}
		if next.descend {
			inner := next.key[:len(next.key)-1]
			// Directories come and go while a sandbox works; only the first one must be there.
			_ = l.walk(filepath.Join(name, inner), filepath.Join(path, inner))
			continue
		}
		l.add(filepath.Join(name, next.key), filepath.Join(path, next.key))
	}
	return nil
}

func (l *listing) add(name, path string) {
	file, err := describe(l.root, name, path)
	if err != nil {
		return // it has gone meanwhile
	}
	encoded, err := json.Marshal(file)
	if err != nil {
		return
	}
	if l.room -= len(encoded) + 1; len(l.files) >= l.limit || l.room < 0 {
		l.truncated = true
		return
	}
	l.files = append(l.files, encoded)
}

// steps reads a directory in pieces and keeps only what can still be listed, so that a
// directory with millions of names does not fill the memory.
func (l *listing) steps(name, path string) ([]step, error) {
	dir, err := openDirectory(l.root, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	most := 2 * (l.limit - len(l.files) + 1)
	var steps []step
	for {
		entries, err := dir.ReadDir(listingStep)
		for _, entry := range entries {
			whole := filepath.Join(path, entry.Name())
			if whole > l.after {
				steps = append(steps, step{entry.Name(), false})
			}
			if inside := whole + "/"; l.recursive && entry.IsDir() && (inside > l.after || strings.HasPrefix(l.after, inside)) {
				steps = append(steps, step{entry.Name() + "/", true})
			}
		}
		if len(steps) > 2*most+2*listingStep {
			steps = smallest(steps, most)
		}
		if errors.Is(err, io.EOF) {
			return smallest(steps, most), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// openDirectory does not block on a FIFO that took the directory's place.
func openDirectory(root *os.Root, name string) (*os.File, error) {
	return root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
}

func smallest(steps []step, most int) []step {
	sort.Slice(steps, func(i, j int) bool { return steps[i].key < steps[j].key })
	return steps[:min(len(steps), most)]
}
