package main

import (
	"archive/tar"
	"bufio"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

const maxMembers = 1_000_000

type unpackRequest struct {
	Archive text `json:"archive"`
	Path    text `json:"path"`
}

type unpackReply struct {
	Files int `json:"files"`
}

func (s *server) unpack(r *request) (any, error) {
	var args unpackRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	archive, info, err := s.openForReading(args.Archive)
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	p, err := s.locate(args.Path)
	if err != nil {
		return nil, err
	}
	defer p.close()
	files, err := unpackInto(archive, info.Size(), p)
	if err != nil {
		return nil, fileFault(err, string(args.Path))
	}
	return unpackReply{files}, nil
}

// unpackInto looks at all of the archive first: one that is refused for a name leaves nothing.
func unpackInto(archive *os.File, size int64, p *place) (int, error) {
	err := eachMember(archive, size, func(header *tar.Header, _ io.Reader) error { return checkMember(header) })
	if err != nil {
		return 0, err
	}
	if err := p.root.MkdirAll(p.name, 0o755); err != nil {
		return 0, err
	}
	base, err := p.root.OpenRoot(p.name)
	if err != nil {
		return 0, err
	}
	defer base.Close()
	u := &unpacker{base: base}
	if err := eachMember(archive, size, u.extract); err != nil {
		return 0, err
	}
	return u.files, u.settle()
}

func eachMember(archive *os.File, size int64, visit func(*tar.Header, io.Reader) error) error {
	// Buffered, or the many small headers would each cost several system calls.
	reader := tar.NewReader(bufio.NewReaderSize(io.NewSectionReader(archive, 0, size), 128<<10))
	for count := 0; ; count++ {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return faultf(codeInvalid, "the archive is not a valid tar file: %s", err.Error())
		}
		if count >= maxMembers {
			return faultf(codeInvalid, "the archive has more than %d members", maxMembers)
		}
		if err := visit(header, reader); err != nil {
			return err
		}
	}
}

// checkMember refuses what must not be unpacked, whatever the directory holds already.
func checkMember(header *tar.Header) error {
	if err := checkMemberName(header.Name); err != nil {
		return err
	}
	for key := range header.PAXRecords { // a few bytes could claim to be a terabyte
		if strings.HasPrefix(key, "GNU.sparse.") {
			return faultf(codeInvalid, "%q is a sparse file; pack it without --sparse", header.Name)
		}
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeXGlobalHeader:
		return nil
	case tar.TypeLink:
		return checkMemberName(header.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return faultf(codePathForbidden, "%q is a device or FIFO", header.Name)
	}
	return faultf(codeInvalid, "%q has type %q: files, directories and links can be unpacked", header.Name, string(header.Typeflag))
}

func checkMemberName(name string) error {
	if name == "" || hasNUL(name) || len(name) > maxPathLength {
		return faultf(codeInvalid, "a member is called %q", shorten(name, 100))
	}
	if strings.HasPrefix(name, "/") {
		return faultf(codePathForbidden, "member %q has an absolute path", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return faultf(codePathForbidden, "member %q goes up with ..", name)
		}
	}
	return nil
}

// unpacker writes members through os.Root, which does not follow a symlink out of the directory,
// whether it was there before or came out of the archive.
type unpacker struct {
	base        *os.Root
	files       int
	directories []*tar.Header
}

func (u *unpacker) extract(header *tar.Header, content io.Reader) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := checkMember(header); err != nil { // the archive may have been changed meanwhile
		return err
	}
	name := path.Clean(header.Name)
	if err := u.place(name, header, content); err != nil {
		return fileFault(err, header.Name)
	}
	return nil
}

func (u *unpacker) place(name string, header *tar.Header, content io.Reader) error {
	if header.Typeflag == tar.TypeDir {
		u.directories = append(u.directories, header)
		return u.base.MkdirAll(name, 0o700|permissionBits(header)&0o755)
	}
	if name == "." {
		return faultf(codeInvalid, "member %q is not a directory", header.Name)
	}
	if err := u.base.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	// A new file each time: an old one may be a link to something else.
	if err := u.base.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	u.files++
	switch header.Typeflag {
	case tar.TypeSymlink:
		return u.base.Symlink(header.Linkname, name)
	case tar.TypeLink:
		return u.base.Link(path.Clean(header.Linkname), name)
	}
	return u.writeFile(name, header, content)
}

func (u *unpacker) writeFile(name string, header *tar.Header, content io.Reader) error {
	file, err := u.base.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer := takeBuffer(256 << 10)
	defer recyclePayload(buffer)
	n, err := io.CopyBuffer(struct{ io.Writer }{file}, content, buffer)
	if err != nil {
		return err
	}
	if n != header.Size {
		return faultf(codeInvalid, "%q is cut short in the archive", header.Name)
	}
	if err := file.Chmod(permissionBits(header)); err != nil {
		return err
	}
	return u.base.Chtimes(name, time.Time{}, header.ModTime)
}

// permissionBits leaves out set-user-ID and its kin.
func permissionBits(header *tar.Header) fs.FileMode { return fs.FileMode(header.Mode) & 0o777 }

// settle sets modes and times of directories last: a read-only one could not be filled, and
// every member in it would change its time.
func (u *unpacker) settle() error {
	for i := len(u.directories) - 1; i >= 0; i-- {
		header := u.directories[i]
		name := path.Clean(header.Name)
		if info, err := u.base.Lstat(name); err != nil || !info.IsDir() {
			continue // a later member took its place
		}
		if err := u.base.Chmod(name, permissionBits(header)); err != nil && name != "." {
			return err
		}
		if err := u.base.Chtimes(name, time.Time{}, header.ModTime); err != nil && name != "." {
			return err
		}
	}
	return nil
}
