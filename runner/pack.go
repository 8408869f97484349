package main

import (
	"archive/tar"
	"crypto/rand"
	"encoding/hex"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"
)

type packRequest struct {
	Path     text   `json:"path"`
	Excludes []text `json:"excludes"`
}

type packReply struct {
	Archive text  `json:"archive"`
	Size    int64 `json:"size"`
}

func (s *server) pack(r *request) (any, error) {
	var args packRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	for _, pattern := range args.Excludes {
		if _, err := path.Match(string(pattern), ""); err != nil || pattern == "" {
			return nil, faultf(codeInvalid, "exclude %q is not a pattern", shorten(string(pattern), 100))
		}
	}
	p, err := s.locate(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	archive := filepath.Join(s.options.spool, transferDir, "pack-"+randomName()+".tar")
	size, err := packInto(archive, p, plainStrings(args.Excludes))
	if err != nil {
		_ = os.Remove(archive)
		return nil, fileFault(err, string(args.Path))
	}
	return packReply{text(archive), size}, nil
}

func randomName() string {
	name := make([]byte, 12)
	_, _ = rand.Read(name)
	return hex.EncodeToString(name)
}

func packInto(archive string, p *place, excludes []string) (int64, error) {
	base, err := p.root.OpenRoot(p.name)
	if err != nil {
		return 0, err
	}
	defer base.Close()
	file, err := os.OpenFile(archive, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	content := &packer{base: base, tar: tar.NewWriter(file), excludes: excludes}
	if err := content.walk("."); err != nil {
		return 0, err
	}
	if err := content.tar.Close(); err != nil {
		return 0, err
	}
	return file.Seek(0, io.SeekEnd)
}

// packer writes one directory's content.
type packer struct {
	base     *os.Root
	tar      *tar.Writer
	excludes []string
}

// walk goes through a directory by hand: io/fs refuses names that are not UTF-8.
func (k *packer) walk(directory string) error {
	dir, err := openDirectory(k.base, directory)
	if err != nil {
		return err
	}
	entries, err := dir.ReadDir(-1)
	dir.Close()
	if err != nil {
		return err
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() < entries[j].Name() })
	for _, entry := range entries {
		name := path.Join(directory, entry.Name())
		if k.excluded(name) {
			continue
		}
		if err := k.add(name); err != nil {
			return err
		}
		if !entry.IsDir() {
			continue
		}
		if err := k.walk(name); err != nil && !os.IsNotExist(err) { // gone meanwhile is no error
			return err
		}
	}
	return nil
}

// excluded: a pattern with a slash is for the whole relative path, one without for any name.
func (k *packer) excluded(name string) bool {
	for _, pattern := range k.excludes {
		subject := name
		if !strings.Contains(strings.TrimSuffix(pattern, "/"), "/") {
			subject = path.Base(name)
		}
		if matched, _ := path.Match(strings.TrimSuffix(pattern, "/"), subject); matched {
			return true
		}
	}
	return false
}

func (k *packer) add(name string) error {
	info, err := k.base.Lstat(name)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	target := ""
	switch {
	case info.Mode().IsRegular(), info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		if target, err = k.base.Readlink(name); err != nil {
			return err
		}
	default:
		return nil // sockets, FIFOs and devices mean nothing elsewhere
	}
	if info.Mode().IsRegular() {
		return k.addFile(name)
	}
	header, err := headerFor(name, info, target)
	if err != nil {
		return err
	}
	return k.tar.WriteHeader(header)
}

func headerFor(name string, info fs.FileInfo, target string) (*tar.Header, error) {
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return nil, err
	}
	header.Name = name
	if info.IsDir() {
		header.Name += "/"
	}
	header.Format = tar.FormatPAX // exact times and names of any length
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	// Owners inside a sandbox mean nothing outside.
	header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
	return header, nil
}

// addFile packs exactly the size the file has now, even while it grows.
func (k *packer) addFile(name string) error {
	file, err := k.base.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	header, err := headerFor(name, info, "")
	if err != nil {
		return err
	}
	if err := k.tar.WriteHeader(header); err != nil {
		return err
	}
	buffer := takeBuffer(256 << 10)
	defer recyclePayload(buffer)
	n, err := io.CopyBuffer(k.tar, struct{ io.Reader }{io.LimitReader(file, info.Size())}, buffer)
	if err == nil && n < info.Size() {
		return faultf(codeChanged, "%q got shorter while it was packed; pack again", name)
	}
	return err
}
