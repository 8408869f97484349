package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	transferPrefix = ".cifixer-"
	maxFileSize    = 1 << 50
)

// writeRequest is one piece of a file that becomes visible only when it is whole.
type writeRequest struct {
	Path       text    `json:"path"`
	TransferID string  `json:"transfer_id"`
	Offset     int64   `json:"offset"`
	Mode       *uint32 `json:"mode"`
	Mkdir      bool    `json:"mkdir"`
	Commit     *struct {
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	} `json:"commit"`
}

func (w *writeRequest) check() error {
	if !isName(w.TransferID, "._-") {
		return faultf(codeInvalid, "transfer_id %q: 1 to 128 of A-Z a-z 0-9 . _ -", shorten(w.TransferID, 60))
	}
	if w.Offset < 0 || w.Offset > maxFileSize {
		return faultf(codeInvalid, "offset %d: it is not negative and not beyond any file", w.Offset)
	}
	if w.Mode != nil && *w.Mode > 0o7777 {
		return faultf(codeInvalid, "mode %o: at most 7777", *w.Mode)
	}
	return nil
}

type writeReply struct {
	ReceivedBytes int64 `json:"received_bytes"`
}

func (s *server) write(r *request) (any, error) {
	var args writeRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if err := args.check(); err != nil {
		return nil, err
	}
	p, err := s.locateEntry(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	size, err := args.write(p, r.document.body, &s.arrivals)
	if err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return writeReply{size}, nil
}

func temporaryName(p *place, transferID string) string {
	return filepath.Join(filepath.Dir(p.name), transferPrefix+transferID)
}

// arrivingName is the same file for whoever names it, by whatever way.
func arrivingName(p *place, transferID string) string {
	return filepath.Join(filepath.Dir(p.path), transferPrefix+transferID)
}

func (w *writeRequest) write(p *place, body []byte, arrivals *arrivals) (int64, error) {
	if info, err := p.root.Lstat(p.name); err == nil && info.IsDir() {
		return 0, faultf(codeIsDirectory, "%q is a directory", p.path)
	}
	if w.Mkdir {
		if err := p.root.MkdirAll(filepath.Dir(p.name), 0o755); err != nil {
			return 0, err
		}
	}
	temporary := temporaryName(p, w.TransferID)
	if w.Commit != nil && w.committedBefore(p, temporary) {
		return w.Commit.Size, nil
	}
	file, err := p.root.OpenFile(temporary, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	arriving := arrivingName(p, w.TransferID)
	arrived := arrivals.of(arriving)
	if _, err := file.WriteAt(body, w.Offset); err != nil {
		arrivals.forget(arriving)
		return 0, err
	}
	arrived.add(file, w.Offset, body)
	info, err := file.Stat()
	if err != nil || w.Commit == nil {
		return sizeOf(info), err
	}
	defer arrivals.forget(arriving)
	return info.Size(), w.commit(p, temporary, file, info, arrived)
}

func sizeOf(info fs.FileInfo) int64 {
	if info == nil {
		return 0
	}
	return info.Size()
}

// committedBefore is true for a commit that is repeated because its answer was lost.
func (w *writeRequest) committedBefore(p *place, temporary string) bool {
	if _, err := p.root.Lstat(temporary); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	info, err := p.root.Lstat(p.name)
	if err != nil || !info.Mode().IsRegular() || info.Size() != w.Commit.Size {
		return false
	}
	file, err := p.root.OpenFile(p.name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer file.Close()
	sum, err := checksum(file)
	return err == nil && strings.EqualFold(sum, w.Commit.SHA256) && w.setMode(file) == nil
}

// commit makes the file visible in one step, if it is what the client sent.
func (w *writeRequest) commit(p *place, temporary string, file *os.File, info fs.FileInfo, arrived *arrival) error {
	sum, err := arrived.total(file, info.Size())
	if err != nil {
		return err
	}
	if info.Size() != w.Commit.Size || !strings.EqualFold(sum, w.Commit.SHA256) {
		_ = p.root.Remove(temporary)
		return faultf(codeChecksum, "%q: %d bytes with sha256 %s arrived, %d bytes with %s were announced; send it again",
			p.path, info.Size(), sum, w.Commit.Size, shorten(w.Commit.SHA256, 64))
	}
	if err := w.setMode(file); err != nil {
		return err
	}
	return p.root.Rename(temporary, p.name)
}

// setMode sets exactly the mode asked for, whatever the umask is. fchmod(2)
func (w *writeRequest) setMode(file *os.File) error {
	mode := uint32(0o644)
	if w.Mode != nil {
		mode = *w.Mode
	}
	return syscall.Fchmod(int(file.Fd()), mode)
}

func checksum(content io.Reader) (string, error) {
	hash := sha256.New()
	buffer := takeBuffer(256 << 10)
	defer recyclePayload(buffer)
	if _, err := io.CopyBuffer(hash, struct{ io.Reader }{content}, buffer); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

func (s *server) abortWrite(r *request) (any, error) {
	var args writeRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if err := args.check(); err != nil {
		return nil, err
	}
	p, err := s.locateEntry(args.Path)
	if isMissing(err) {
		return nothing{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer p.close()
	s.arrivals.forget(arrivingName(p, args.TransferID))
	if err := p.root.Remove(temporaryName(p, args.TransferID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fileFault(err, string(args.Path))
	}
	return nothing{}, nil
}
