package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func sum(content []byte) string {
	digest := sha256.Sum256(content)
	return hex.EncodeToString(digest[:])
}

func commitOf(content []byte) object { return object{"size": len(content), "sha256": sum(content)} }

func (c *channel) writeFile(path text, content []byte) object {
	c.t.Helper()
	return c.do(object{"verb": "write", "path": path, "transfer_id": newOp(), "offset": 0, "mkdir": true, "commit": commitOf(content)}, content).values
}

func TestWriteAndRead(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	for _, content := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte{0, 1, 0xff}, 100_000)} {
		path := text(fmt.Sprintf("dir/file%d", len(content)))
		expect(t, c.writeFile(path, content), "received_bytes", len(content))
		a := c.do(object{"verb": "read", "path": path, "offset": 0, "length": 1 << 20, "etag": nil}, nil)
		if !bytes.Equal(a.body, content) {
			t.Errorf("%d bytes came back as %d", len(content), len(a.body))
		}
		expect(t, a.values, "size", len(content), "mode", 0o644)
		tag := a.values["etag"]
		a = c.do(object{"verb": "read", "path": path, "offset": len(content), "length": 10, "etag": tag}, nil)
		if len(a.body) != 0 {
			t.Errorf("%d bytes behind the end", len(a.body))
		}
		c.writeFile(path, append(content, '!'))
		c.fails(codeChanged, object{"verb": "read", "path": path, "offset": 0, "length": 10, "etag": tag}, nil)
	}
	if left, _ := filepath.Glob(filepath.Join(s.workspace, "dir", ".cifixer-*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestWriteInPieces(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	content := bytes.Repeat([]byte("0123456789"), 300_000)
	piece := func(from, to int, commit any) object {
		return object{"verb": "write", "path": "big", "transfer_id": "t1", "offset": from, "mode": 0o750, "commit": commit}
	}
	expect(t, c.do(piece(0, 1<<20, nil), content[:1<<20]).values, "received_bytes", 1<<20)
	c.do(piece(0, 1<<20, nil), content[:1<<20]) // repeated
	c.do(piece(1<<20, 2<<20, nil), content[1<<20:2<<20])
	last := piece(2<<20, 0, commitOf(content))
	for range 2 { // the answer to the first one was lost
		expect(t, c.do(last, content[2<<20:]).values, "received_bytes", len(content))
	}
	got, _ := os.ReadFile(filepath.Join(s.workspace, "big"))
	info, _ := os.Stat(filepath.Join(s.workspace, "big"))
	if !bytes.Equal(got, content) || info.Mode().Perm() != 0o750 {
		t.Errorf("%d bytes, mode %v", len(got), info.Mode())
	}
}

func TestWriteFailures(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	wrong := object{"verb": "write", "path": "f", "transfer_id": "t", "offset": 0, "commit": object{"size": 5, "sha256": sum([]byte("other"))}}
	c.fails(codeChecksum, wrong, []byte("hello"))
	if entries, _ := os.ReadDir(s.workspace); len(entries) != 0 {
		t.Errorf("a failed write left %v", entries)
	}
	c.fails(codeInvalid, object{"verb": "write", "path": "f", "transfer_id": "../t", "offset": 0}, nil)
	c.fails(codeInvalid, object{"verb": "write", "path": "f", "transfer_id": "t", "offset": -1}, nil)
	c.fails(codeNotFound, object{"verb": "write", "path": "no/f", "transfer_id": "t", "offset": 0}, nil)
	c.do(object{"verb": "mkdir", "path": "d", "parents": false}, nil)
	c.fails(codeIsDirectory, object{"verb": "write", "path": "d", "transfer_id": "t", "offset": 0}, nil)
	c.do(object{"verb": "write", "path": "f", "transfer_id": "t", "offset": 0}, []byte("x"))
	c.do(object{"verb": "abort_write", "path": "f", "transfer_id": "t"}, nil)
	c.do(object{"verb": "abort_write", "path": "f", "transfer_id": "t"}, nil)
	if entries, _ := os.ReadDir(s.workspace); len(entries) != 1 {
		t.Errorf("an aborted write left %v", entries)
	}
}

func TestPathsAreConfined(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	for name, target := range map[string]string{"up": "..", "etc": "/etc", "proc": "/proc/self/root/etc", "inside": "real", "absolute": s.workspace + "/real"} {
		if err := os.Symlink(target, filepath.Join(s.workspace, name)); err != nil {
			t.Fatal(err)
		}
	}
	c.writeFile("real/file", []byte("ok"))
	for _, path := range []string{"/etc/passwd", "../x", "/", "a/../../x", "etc/passwd", "proc/passwd", "up/x", s.workspace + "x/y"} {
		c.fails(codePathForbidden, object{"verb": "read", "path": path, "offset": 0, "length": 1}, nil)
		c.fails(codePathForbidden, object{"verb": "stat", "path": path}, nil)
		c.fails(codePathForbidden, object{"verb": "remove", "path": path, "recursive": true}, nil)
		c.fails(codePathForbidden, object{"verb": "write", "path": path, "transfer_id": "t", "offset": 0, "mkdir": true}, nil)
		c.fails(codePathForbidden, object{"verb": "mkdir", "path": path, "parents": true}, nil)
	}
	c.fails(codePathForbidden, object{"verb": "list_files", "path": "etc", "recursive": true, "limit": 5}, nil)
	c.fails(codePathForbidden, object{"verb": "pack", "path": "etc", "excludes": []string{}}, nil)
	c.fails(codePathForbidden, object{"verb": "remove", "path": s.workspace, "recursive": true}, nil)
	for _, path := range []string{"", "a\x00b", string(make([]byte, 5000))} {
		c.fails(codeInvalid, object{"verb": "stat", "path": path}, nil)
	}
	for _, path := range []string{"inside/file", "absolute/file", "./real/../real/file"} {
		if a := c.do(object{"verb": "read", "path": path, "offset": 0, "length": 10}, nil); string(a.body) != "ok" {
			t.Errorf("%s: %q", path, a.body)
		}
	}
	expect(t, c.do(object{"verb": "stat", "path": "etc"}, nil).values["file"].(object), "type", "symlink", "target", "/etc")
	c.do(object{"verb": "remove", "path": "etc", "recursive": true}, nil)
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Fatal("removing a symlink removed what it points to")
	}
}

func TestSpecialFiles(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	if err := syscall.Mkfifo(filepath.Join(s.workspace, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.fails(codeInvalid, object{"verb": "read", "path": "fifo", "offset": 0, "length": 1}, nil)
	c.fails(codeIsDirectory, object{"verb": "read", "path": ".", "offset": 0, "length": 1}, nil)
	c.fails(codeNotFound, object{"verb": "read", "path": "none", "offset": 0, "length": 1}, nil)
	c.fails(codeNotDirectory, object{"verb": "list_files", "path": "fifo", "recursive": false, "limit": 5}, nil)
	c.fails(codeInvalid, object{"verb": "read", "path": "fifo", "offset": 0, "length": 2 << 20}, nil)
	expect(t, c.do(object{"verb": "stat", "path": "fifo"}, nil).values["file"].(object), "type", "other", "mode", 0o600)
	expect(t, c.do(object{"verb": "remove", "path": "gone", "missing_ok": true}, nil).values, "removed", false)
	c.fails(codeNotFound, object{"verb": "remove", "path": "gone"}, nil)
	c.writeFile("d/f", nil)
	c.fails(codeExists, object{"verb": "remove", "path": "d"}, nil)
	c.fails(codeExists, object{"verb": "mkdir", "path": "d"}, nil)
	c.do(object{"verb": "mkdir", "path": "d", "parents": true}, nil)
	expect(t, c.do(object{"verb": "remove", "path": "d", "recursive": true}, nil).values, "removed", true)
}

func TestListing(t *testing.T) {
	c := serve(t).dial(1)
	for _, path := range []text{"a/b", "a-b", "a", "a/c/d", "z\xffz", "ä"} {
		if path != "a" {
			c.writeFile(path, []byte("x"))
		}
	}
	list := func(limit int, recursive bool) ([]string, any) {
		a := c.do(object{"verb": "list_files", "path": ".", "recursive": recursive, "limit": limit}, nil)
		var names []string
		for _, file := range a.values["files"].([]any) {
			names = append(names, file.(object)["name"].(string))
		}
		return names, a.values["truncated"]
	}
	names, truncated := list(100, true)
	if fmt.Sprint(names, truncated) != "[a a-b b c d z\ufffdz ä] false" { // encoding/json reads the surrogate as U+FFFD
		t.Errorf("list %q %v", names, truncated)
	}
	if names, truncated = list(3, true); fmt.Sprint(names, truncated) != "[a a-b b] true" {
		t.Errorf("list %q %v", names, truncated)
	}
	if names, _ = list(100, false); len(names) != 4 {
		t.Errorf("list %q", names)
	}
}

func TestNamesOfAnyBytes(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	name := text("caf\xe9 \x01\"\\ \xed\xb2\x80")
	c.writeFile(name, []byte("content"))
	if got, err := os.ReadFile(filepath.Join(s.workspace, string(name))); err != nil || string(got) != "content" {
		t.Errorf("%q %v", got, err)
	}
	if a := c.do(object{"verb": "read", "path": name, "offset": 0, "length": 100}, nil); string(a.body) != "content" {
		t.Errorf("%q", a.body)
	}
}

func TestPackAndUnpack(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	for _, path := range []text{"src/a", "src/sub/b", "src/caf\xe9", "src/node_modules/x", "src/sub/y.pyc", "src/keep/sub/z"} {
		c.writeFile(path, []byte("content of "+path))
	}
	_ = os.Symlink("sub/b", filepath.Join(s.workspace, "src/link"))
	_ = os.Symlink("/etc", filepath.Join(s.workspace, "src/outside"))
	_ = syscall.Mkfifo(filepath.Join(s.workspace, "src/fifo"), 0o600)
	_ = os.Chmod(filepath.Join(s.workspace, "src/sub"), 0o555)
	packed := c.do(object{"verb": "pack", "path": "src", "excludes": []string{"node_modules", "*.pyc", "keep/sub"}}, nil).values
	a := c.do(object{"verb": "read", "path": packed["archive"], "offset": 0, "length": 1 << 20}, nil)
	if len(a.body) != int(packed["size"].(float64)) {
		t.Errorf("%d bytes of %v", len(a.body), packed)
	}
	expect(t, c.do(object{"verb": "unpack", "archive": packed["archive"], "path": "out/new"}, nil).values, "files", 5)
	for _, path := range []string{"a", "sub/b", "caf\xe9"} {
		got, err := os.ReadFile(filepath.Join(s.workspace, "out/new", path))
		if string(got) != "content of src/"+path {
			t.Errorf("%s: %q %v", path, got, err)
		}
	}
	for _, path := range []string{"node_modules", "sub/y.pyc", "keep/sub", "fifo"} {
		if _, err := os.Lstat(filepath.Join(s.workspace, "out/new", path)); err == nil {
			t.Errorf("%s was packed", path)
		}
	}
	if target, _ := os.Readlink(filepath.Join(s.workspace, "out/new/outside")); target != "/etc" {
		t.Errorf("link to %q", target)
	}
	before, _ := os.Stat(filepath.Join(s.workspace, "src/sub"))
	after, _ := os.Stat(filepath.Join(s.workspace, "out/new/sub"))
	if before.Mode() != after.Mode() || !before.ModTime().Equal(after.ModTime()) {
		t.Errorf("directory %v %v, unpacked %v %v", before.Mode(), before.ModTime(), after.Mode(), after.ModTime())
	}
	expect(t, c.do(object{"verb": "remove", "path": packed["archive"]}, nil).values, "removed", true)
}

func archiveOf(t *testing.T, members ...tar.Header) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, header := range members {
		content := []byte("evil")
		header.Mode = 0o644
		if header.Typeflag == tar.TypeReg {
			header.Size = int64(len(content))
		}
		if err := w.WriteHeader(&header); err != nil {
			t.Fatal(err)
		}
		if header.Typeflag == tar.TypeReg {
			_, _ = w.Write(content)
		}
	}
	_ = w.Close()
	return out.Bytes()
}

func TestHostileArchives(t *testing.T) {
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(kind byte, name, target string) tar.Header {
		return tar.Header{Typeflag: kind, Name: name, Linkname: target}
	}
	s := serve(t)
	c := s.dial(1)
	_ = os.Mkdir(filepath.Join(s.workspace, "victim"), 0o755)
	secret := filepath.Join(s.workspace, "victim", "file")
	_ = os.WriteFile(secret, []byte("good"), 0o644)
	archives := map[string][]tar.Header{
		"absolute":          {file("ok"), file(secret)},
		"dots":              {file("ok"), file("../victim/file")},
		"inner dots":        {file("ok"), file("a/../../victim/file")},
		"through a link":    {link(tar.TypeSymlink, "l", "../victim"), file("l/file")},
		"absolute link":     {link(tar.TypeSymlink, "l", filepath.Dir(secret)), file("l/file")},
		"hard link outside": {link(tar.TypeLink, "h", "../victim/file"), file("h")},
		"hard link by link": {link(tar.TypeSymlink, "l", "../victim"), link(tar.TypeLink, "h", "l/file")},
		"device":            {{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}},
		"fifo":              {{Typeflag: tar.TypeFifo, Name: "fifo"}},
		"existing link":     {file("trap/file")},
	}
	for name, members := range archives {
		target := "out-" + name
		_ = os.Mkdir(filepath.Join(s.workspace, target), 0o755)
		_ = os.Symlink("../victim", filepath.Join(s.workspace, target, "trap"))
		c.writeFile("archive.tar", archiveOf(t, members...))
		c.fails(codePathForbidden, object{"verb": "unpack", "archive": "archive.tar", "path": target}, nil)
		if got, _ := os.ReadFile(secret); string(got) != "good" {
			t.Fatalf("%s: the archive wrote %q", name, got)
		}
	}
	replace := archiveOf(t, link(tar.TypeSymlink, "s", "../victim/file"), file("s"), file("d/x"), link(tar.TypeLink, "h", "d/x"))
	c.writeFile("archive.tar", replace)
	expect(t, c.do(object{"verb": "unpack", "archive": "archive.tar", "path": "fine"}, nil).values, "files", 4)
	if got, _ := os.ReadFile(secret); string(got) != "good" {
		t.Errorf("a file went through the link it replaces: %q", got)
	}
	c.writeFile("archive.tar", []byte("this is no archive, but it is longer than nothing"))
	c.fails(codeInvalid, object{"verb": "unpack", "archive": "archive.tar", "path": "out"}, nil)
	c.writeFile("archive.tar", replace[:700])
	c.fails(codeInvalid, object{"verb": "unpack", "archive": "archive.tar", "path": "out"}, nil)
}
