package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestTextRoundTrip(t *testing.T) {
	// What Python's json.dumps(os.fsdecode(name)) gives, with and without ensure_ascii.
	cases := map[string]string{
		`"plain"`: "plain", `"caf\u00e9"`: "café", `"café"`: "café", `"\udce9x"`: "\xe9x", `"\ud83d\ude00"`: "😀",
		`"\ud83d\udc80"`: "\U0001f480", `"\udced\udcb2\udc80"`: "\xed\xb2\x80", `"a\u0000\"\\\/\b\f\n\r\t"`: "a\x00\"\\/\b\f\n\r\t", `""`: "",
	}
	for literal, want := range cases {
		var got text
		if err := json.Unmarshal([]byte(literal), &got); err != nil || string(got) != want {
			t.Errorf("%s became %q, %v", literal, got, err)
		}
		encoded, err := json.Marshal(got)
		var again text
		if err != nil || json.Unmarshal(encoded, &again) != nil || again != got {
			t.Errorf("%q went through %s to %q", got, encoded, again)
		}
	}
	for _, wrong := range []string{"5", "[]", "{}", "true"} {
		var got text
		if json.Unmarshal([]byte(wrong), &got) == nil {
			t.Errorf("%s became %q", wrong, got)
		}
	}
}

func TestTextOfRandomBytes(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		raw := make([]byte, random.IntN(20))
		for i := range raw {
			raw[i] = byte(random.IntN(256))
		}
		encoded, err := json.Marshal(map[string]text{"k": text(raw)})
		var back map[string]text
		if err != nil || json.Unmarshal(encoded, &back) != nil || string(back["k"]) != string(raw) {
			t.Fatalf("%q went through %s to %q", raw, encoded, back["k"])
		}
	}
}

func TestRing(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, left := range []int64{0, 200 << 10, 32 << 20} {
		shared := &budget{left: left}
		r := ring{shared: shared}
		var all []byte
		for range 300 {
			piece := make([]byte, random.IntN(30_000))
			for i := range piece {
				piece[i] = byte(random.IntN(256))
			}
			r.append(piece)
			all = append(all, piece...)
			kept := make([]byte, r.filled)
			skip := random.IntN(r.filled + 1)
			if n := r.copyTo(kept, skip); n != r.filled-skip || !bytes.Equal(kept[:n], all[len(all)-n:]) {
				t.Fatalf("ring of %d, filled %d: wrong bytes after %d", len(r.bytes), r.filled, skip)
			}
		}
		if left == 32<<20 && r.filled != ringSize || left == 0 && r.filled != ringMinimum {
			t.Errorf("with %d: keeps %d", left, r.filled)
		}
		r.release()
		if shared.left != left {
			t.Errorf("%d of %d given back", shared.left, left)
		}
	}
}

func TestStreamOnAFullDisk(t *testing.T) {
	s := newStream("/dev/full-no-such-dir/stdout", 1<<20, &budget{left: 1 << 20})
	s.append([]byte("hello "))
	s.append([]byte("world"))
	buffer := make([]byte, 100)
	if n, at := s.readAt(buffer, 0); at != 0 || string(buffer[:n]) != "hello world" {
		t.Errorf("%q at %d", buffer[:n], at)
	}
	s.end()
	if n, at := s.readAt(buffer, 6); at != 6 || string(buffer[:n]) != "world" {
		t.Errorf("after the end %q at %d", buffer[:n], at)
	}
	if total, kept, cut := s.totals(); total != 11 || kept != 0 || !cut {
		t.Errorf("totals %d %d %v", total, kept, cut)
	}
}

func TestStreamWhoseFileWasDamaged(t *testing.T) {
	dir := t.TempDir()
	s := newStream(filepath.Join(dir, "stdout"), 10, &budget{left: 1 << 20})
	s.reader()
	s.append([]byte("0123456789abcdef"))
	if err := os.Truncate(s.path, 3); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 100)
	n, at := s.readAt(buffer, 0)
	if string(buffer[:n]) != "012" || at != 0 {
		t.Errorf("%q at %d", buffer[:n], at)
	}
	n, at = s.readAt(buffer, 3)
	if string(buffer[:n]) != "abcdef" || at != 10 {
		t.Errorf("%q at %d", buffer[:n], at)
	}
}

func TestRecordFiles(t *testing.T) {
	dir := t.TempDir()
	if _, ok := loadRecord(dir, "op"); ok {
		t.Error("a record out of nothing")
	}
	if err := saveStart(dir, "op", "digest", time.UnixMilli(5)); err != nil {
		t.Fatal(err)
	}
	if saved, ok := loadRecord(dir, "op"); !ok || *saved.Record.Status != statusUnknown || saved.Digest != "digest" {
		t.Errorf("started only: %v %v", saved, ok)
	}
	if _, ok := loadRecord(dir, "another"); ok {
		t.Error("a record under another name")
	}
	for code := range 2 {
		if err := saveRecord(dir, "digest", record{OpID: "op", State: "finished", Status: pointer(statusExited), ExitCode: pointer(code)}); err != nil {
			t.Fatal(err)
		}
	}
	if saved, ok := loadRecord(dir, "op"); !ok || *saved.Record.ExitCode != 1 {
		t.Errorf("finished: %v %v", saved, ok)
	}
	_ = os.Remove(filepath.Join(dir, recordFile))
	_ = syscall.Mkfifo(filepath.Join(dir, recordFile), 0o600) // hostile: must not block
	if saved, ok := loadRecord(dir, "op"); !ok || *saved.Record.Status != statusUnknown {
		t.Errorf("with a FIFO: %v %v", saved, ok)
	}
}

func TestParseStat(t *testing.T) {
	line := "42 (evil) Z 1 (x) S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 12345 1 2"
	p, ok := parseStat(42, []byte(line))
	if !ok || p.parent != 7 || p.start != 12345 || p.dead || p.stopped {
		t.Errorf("%+v %v", p, ok)
	}
	for _, wrong := range []string{"", "42", "42 (x", "42 (x) S 1"} {
		if p, ok := parseStat(42, []byte(wrong)); ok {
			t.Errorf("%q gave %+v", wrong, p)
		}
	}
}

func TestDescendants(t *testing.T) {
	all := []process{{pid: 1}, {pid: 2, parent: 1}, {pid: 3, parent: 2, dead: true}, {pid: 4, parent: 3}, {pid: 5, parent: 1}, {pid: 6, parent: 5}, {pid: 7, parent: 7}}
	found := descendants(all, 1, func(pid int) bool { return pid == 5 })
	if len(found) != 2 || found[0].pid != 2 || found[1].pid != 4 {
		t.Errorf("%v", found)
	}
}

func TestOpIDs(t *testing.T) {
	for _, good := range []string{"a", "0", "_", "a.b:c-d_E9", string(bytes.Repeat([]byte("x"), 128))} {
		if checkOpID(good) != nil {
			t.Errorf("%q refused", good)
		}
	}
	for _, bad := range []string{"", ".", "..", "-a", ":a", "a/b", "a b", "ä", "a\x00", string(bytes.Repeat([]byte("x"), 129))} {
		if checkOpID(bad) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestMessages(t *testing.T) {
	m := message{kind: messageStart, numbers: []int64{-1, 1 << 40}, strings: []string{"", "a\xff", string(make([]byte, 70_000))}}
	back, err := readMessage(bytes.NewReader(m.encode()), maxMessage)
	if err != nil || back.kind != m.kind || back.number(1) != 1<<40 || back.text(1) != "a\xff" || len(back.text(2)) != 70_000 || back.text(9) != "" {
		t.Errorf("%v %v", back, err)
	}
	if _, err := readMessage(bytes.NewReader(m.encode()), 100); err == nil {
		t.Error("a message above the limit was read")
	}
}

func TestPayloadCostsNothingBeforeItArrives(t *testing.T) {
	// One byte of two MiB: neither a hang nor the whole allocation.
	allocated := testing.AllocsPerRun(1, func() {
		if _, err := readPayload(bytes.NewReader([]byte{1}), maxFrameLength-5); err == nil {
			t.Error("a cut payload was read")
		}
	})
	if allocated > 10 {
		t.Errorf("%v allocations", allocated)
	}
	big := bytes.Repeat([]byte("abcdefg"), 200_000)
	for range 3 {
		payload, err := readPayload(bytes.NewReader(big), len(big))
		if err != nil || !bytes.Equal(payload, big) {
			t.Fatal("a big payload was damaged")
		}
		recyclePayload(payload)
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(rawFrame(frameRequest, 1, appendDocument(nil, 0, 0, object{"verb": "list"}, nil)[9:]))
	f.Add(rawFrame(frameCredit, 9, []byte{0, 0, 1, 0}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{0, 0, 0, 5, 7, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		reader := bytes.NewReader(raw)
		for {
			head, err := readFrameHead(reader)
			if err != nil {
				return
			}
			if head.size < 0 || head.size > maxFrameLength {
				t.Fatalf("size %d", head.size)
			}
			payload, err := readPayload(reader, head.size)
			if err != nil {
				return
			}
			if again := rawFrame(head.kind, head.call, payload); !bytes.Contains(raw, again) {
				t.Fatalf("%q is not what was read from %q", again, raw)
			}
		}
	})
}

func FuzzDocument(f *testing.F) {
	for _, seed := range []string{`{"verb":"start","argv":["a\udc80"],"env":{"A":"b"}}`, `{"path":"x","commit":{"size":1,"sha256":""}}`, `{}`, `[`, `{"path":5}`} {
		f.Add(append(binary.BigEndian.AppendUint32(nil, uint32(len(seed))), seed+"body"...))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		doc, err := parseDocument(raw)
		if err != nil {
			return
		}
		if 4+len(doc.json)+len(doc.body) != len(raw) {
			t.Fatalf("%d bytes became %d and %d", len(raw), len(doc.json), len(doc.body))
		}
		var start startRequest
		if doc.decode(&start) == nil {
			_ = start.check()
		}
		var write writeRequest
		if doc.decode(&write) == nil {
			_ = write.check()
		}
		var hello clientHello
		_ = doc.decode(&hello)
	})
}

func FuzzPath(f *testing.F) {
	for _, seed := range []string{"a", "../a", "/etc/passwd", "a/../../b", "link/x", "loop", "\xff", "a\x00b", "//", "./.", "deep/link/.."} {
		f.Add(seed)
	}
	dir, err := filepath.EvalSymlinks(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	root := filepath.Join(dir, "root")
	_ = os.MkdirAll(filepath.Join(root, "deep"), 0o755)
	_ = os.Symlink("/etc", filepath.Join(root, "link"))
	_ = os.Symlink("../..", filepath.Join(root, "deep/link"))
	_ = os.Symlink("loop", filepath.Join(root, "loop"))
	s := &server{options: &serveOptions{workspace: root}, roots: []string{root}}
	f.Fuzz(func(t *testing.T, path string) {
		for _, follow := range []bool{true, false} {
			p, err := s.resolve(path, follow)
			if err != nil {
				continue
			}
			if !within(p.path, root) || !filepath.IsLocal(p.name) {
				t.Errorf("%q led to %q, %q", path, p.path, p.name)
			}
			p.close()
		}
	})
}
