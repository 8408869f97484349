package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const maxReadLength = 1 << 20

// fileInfo is FILE in docs/protocol.md.
type fileInfo struct {
	Path       text   `json:"path"`
	Name       text   `json:"name"`
	Type       string `json:"type"`
	Size       int64  `json:"size"`
	Mode       uint32 `json:"mode"`
	ModifiedNs int64  `json:"mtime_ns"`
	Target     *text  `json:"target"`
}

func describe(root *os.Root, name, path string) (fileInfo, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return fileInfo{}, err
	}
	file := fileInfo{Path: text(path), Name: text(filepath.Base(path)), Type: "other", Size: info.Size(),
		Mode: permissions(info), ModifiedNs: info.ModTime().UnixNano()}
	switch {
	case info.Mode().IsRegular():
		file.Type = "file"
	case info.IsDir():
		file.Type = "directory"
	case info.Mode()&fs.ModeSymlink != 0:
		file.Type = "symlink"
		if target, err := root.Readlink(name); err == nil {
			file.Target = pointer(text(target))
		}
	}
	return file, nil
}

// permissions gives the 12 bits of chmod(2), as os.FileMode spreads three of them.
func permissions(info fs.FileInfo) uint32 {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return stat.Mode & 0o7777
	}
	return uint32(info.Mode().Perm())
}

// pathRequest is a verb about one path.
type pathRequest struct {
	Path      text `json:"path"`
	Parents   bool `json:"parents"`
	Recursive bool `json:"recursive"`
	MissingOK bool `json:"missing_ok"`
}

func (s *server) stat(r *request) (any, error) {
	var args pathRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	p, err := s.locateEntry(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	file, err := describe(p.root, p.name, p.path)
	if err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return struct {
		File fileInfo `json:"file"`
	}{file}, nil
}

func (s *server) mkdir(r *request) (any, error) {
	var args pathRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	p, err := s.locateEntry(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	if args.Parents {
		err = p.root.MkdirAll(p.name, 0o755)
	} else {
		err = p.root.Mkdir(p.name, 0o755)
	}
	if err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return nothing{}, nil
}

func (s *server) remove(r *request) (any, error) {
	var args pathRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	p, err := s.locateEntry(args.Path)
	if args.MissingOK && isMissing(err) {
		return removeReply{false}, nil
	}
	if err != nil {
		return nil, err
	}
	defer p.close()
	if p.isRoot() {
		return nil, faultf(codePathForbidden, "%q is an allowed root itself; remove what is in it", string(args.Path))
	}
	return s.removeAt(p, args)
}

type removeReply struct {
	Removed bool `json:"removed"`
}

func (s *server) removeAt(p *place, args pathRequest) (any, error) {
	_, err := p.root.Lstat(p.name)
	if args.MissingOK && errors.Is(err, fs.ErrNotExist) {
		return removeReply{false}, nil
	}
	if err == nil && args.Recursive {
		err = p.root.RemoveAll(p.name)
	} else if err == nil {
		err = p.root.Remove(p.name)
	}
	if err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return removeReply{true}, nil
}

func isMissing(err error) bool {
	var known *fault
	return errors.As(err, &known) && known.Code == codeNotFound
}

type readReply struct {
	Size int64  `json:"size"`
	Etag string `json:"etag"`
	Mode uint32 `json:"mode"`
}

func (s *server) read(r *request) (any, error) {
	var args struct {
		Path   text    `json:"path"`
		Offset int64   `json:"offset"`
		Length int     `json:"length"`
		Etag   *string `json:"etag"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if args.Offset < 0 || args.Length < 0 || args.Length > maxReadLength {
		return nil, faultf(codeInvalid, "offset %d, length %d: neither is negative and length is at most %d", args.Offset, args.Length, maxReadLength)
	}
	replies := r.connection.replies
	if !replies.take(args.Length) {
		return nil, faultf(codeCancelled, "the connection has ended")
	}
	answer, body, err := s.readPiece(args.Path, args.Offset, args.Length, args.Etag)
	if err != nil {
		replies.give(args.Length)
		return nil, err
	}
	r.call.reply(answer, body, func() {
		recyclePayload(body)
		replies.give(args.Length)
	})
	return answerLater{}, nil
}

func (s *server) readPiece(path text, offset int64, length int, etag *string) (readReply, []byte, error) {
	defer s.files.enter()()
	file, info, err := s.openForReading(path)
	if err != nil {
		return readReply{}, nil, err
	}
	defer file.Close()
	answer := readReply{Size: info.Size(), Etag: etagOf(info), Mode: permissions(info)}
	if etag != nil && *etag != answer.Etag {
		return answer, nil, faultf(codeChanged, "%q changed while it was read; begin again", string(path))
	}
	length = int(max(0, min(int64(length), info.Size()-offset)))
	body := takeBuffer(length)
	n, err := file.ReadAt(body, offset)
	if err != nil && err != io.EOF {
		return answer, nil, fileFault(err, string(path))
	}
	if n < length {
		return answer, nil, faultf(codeChanged, "%q got shorter while it was read; begin again", string(path))
	}
	return answer, body, nil
}

// takeBuffer gives n bytes, recycled if that is worth it.
func takeBuffer(n int) []byte {
	if n <= readStep {
		return make([]byte, n)
	}
	buffer := keptBuffer()
	if cap(buffer) < n {
		return make([]byte, n)
	}
	return buffer[:n]
}

// openForReading opens regular files only, and without blocking on what turns out to be a FIFO.
func (s *server) openForReading(path text) (*os.File, fs.FileInfo, error) {
	p, err := s.locate(path)
	if err != nil {
		return nil, nil, err
	}
	defer p.close()
	file, err := p.root.OpenFile(p.name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fileFault(err, string(path))
	}
	info, err := file.Stat()
	if err == nil && info.Mode().IsRegular() {
		return file, info, nil
	}
	file.Close()
	switch {
	case err != nil:
		return nil, nil, fileFault(err, string(path))
	case info.IsDir():
		return nil, nil, faultf(codeIsDirectory, "%q is a directory; use list_files or pack", string(path))
	}
	return nil, nil, faultf(codeInvalid, "%q is not a regular file", string(path))
}

func etagOf(info fs.FileInfo) string {
	var inode uint64
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = stat.Ino
	}
	return fmt.Sprintf("%x-%x-%x", inode, info.ModTime().UnixNano(), info.Size())
}
