package main

import (
	"bufio"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// enclosure is a real `runner enclose`, ended behind the test.
type enclosure struct {
	t   *testing.T
	dir string
}

func newEnclosure(t *testing.T) *enclosure {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes namespaces without a user namespace, as in a virtual machine")
	}
	dir, err := os.MkdirTemp("", "encl-")
	if err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(dir, 0o711) // its user passes through
	e := &enclosure{t, dir}
	t.Cleanup(func() {
		e.killServe()
		_ = os.RemoveAll(dir)
	})
	return e
}

func (e *enclosure) path(name string) string { return filepath.Join(e.dir, name) }

func (e *enclosure) start(more ...string) (string, error) {
	args := []string{"enclose", "--directory", e.dir, "--", "--socket", e.path(enclosedSocket), "--spool", e.path("spool"), "--workspace", e.path("work")}
	command := exec.Command(builtRunner, append(args, more...)...)
	command.Env = append(os.Environ(), marker)
	output, err := command.CombinedOutput()
	return string(output), err
}

// serve finds the host's pid of PID 1 within.
func (e *enclosure) serve() int {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		line, _ := os.ReadFile(path)
		words := strings.Split(string(line), "\x00")
		if len(words) > 3 && words[1] == "enclosed" && strings.Contains(string(line), e.dir) {
			var pid int
			_, _ = fmt.Sscanf(path, "/proc/%d/cmdline", &pid)
			return pid
		}
	}
	return 0
}

func (e *enclosure) killServe() {
	if pid := e.serve(); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

func (e *enclosure) ended() string {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if how := howEnded(e.dir); how != "" {
			return how
		}
	}
	e.t.Fatal("nobody wrote down how it ended")
	return ""
}

// run sends a command over a bridge of text and gives its output.
func (e *enclosure) run(script string) string {
	e.t.Helper()
	bridge := exec.Command(builtRunner, "bridge", "--text", "--socket", e.path(enclosedSocket))
	in, _ := bridge.StdinPipe()
	out, _ := bridge.StdoutPipe()
	if err := bridge.Start(); err != nil {
		e.t.Fatal(err)
	}
	lines := bufio.NewReaderSize(out, 1<<20)
	if first, _ := lines.ReadString('\n'); first != textualBegin {
		e.t.Fatalf("the bridge began with %q", first)
	}
	reader, writer := io.Pipe()
	go func() {
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				writer.CloseWithError(err)
				return
			}
			data, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(line, "\n"))
			if err != nil {
				writer.CloseWithError(err)
				return
			}
			_, _ = writer.Write(data)
		}
	}()
	_, _ = in.Write(appendDocument(nil, frameHello, 0, object{"protocol": 1, "epoch": 1}, nil))
	_, _ = in.Write(appendDocument(nil, frameRequest, 1, startArgs(script), nil))
	var output []byte
	for {
		kind, _, payload, err := readAnyFrame(reader)
		if err != nil {
			e.t.Fatalf("behind %d bytes of output: %v", len(output), err)
		}
		if kind == frameOutput && payload[0] == 1 {
			output = append(output, payload[9:]...)
		}
		if kind == frameOutput {
			_, _ = in.Write(rawFrame(frameCredit, 1, binary.BigEndian.AppendUint32(nil, uint32(len(payload)-9))))
		}
		if kind == frameReply {
			break
		}
	}
	in.Close()
	if err := bridge.Wait(); err != nil {
		e.t.Errorf("bridge: %v", err)
	}
	return string(output)
}

func TestEnclosedServeIsPidOneAndSeesOnlyItsOwn(t *testing.T) {
	e := newEnclosure(t)
	if said, err := e.start(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	// The shell of the command, ls, its supervisor and the runner: nothing of the host.
	if count := strings.Count(e.run("ls -d /proc/[0-9]*"), "/proc/"); count < 3 || count > 12 {
		t.Errorf("%d processes are seen in it", count)
	}
	e.run("kill -9 -1 2>/dev/null; kill -9 1; kill -TERM 1")
	if got := e.run("echo still here"); got != "still here\n" {
		t.Errorf("behind kill -9 -1 a command said %q", got)
	}
}

func TestEnclosedCommandsMakeNoNamespaces(t *testing.T) {
	e := newEnclosure(t)
	if said, err := e.start("--user", "1000:1000"); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	if got := e.run("grep Seccomp: /proc/self/status; unshare -U true 2>/dev/null || echo refused"); got != "Seccomp:\t2\nrefused\n" {
		t.Errorf("%q", got)
	}
}

func TestEncloseAgainFindsTheOneThereIs(t *testing.T) {
	e := newEnclosure(t)
	var all sync.WaitGroup
	for range 4 {
		all.Add(1)
		go func() {
			defer all.Done()
			if said, err := e.start(); err != nil {
				t.Errorf("%v: %s", err, said)
			}
		}()
	}
	all.Wait()
	first := e.serve()
	if said, err := e.start(); err != nil || e.serve() != first || first == 0 {
		t.Errorf("pid %d, then %d: %v %s", first, e.serve(), err, said)
	}
}

func TestHowAnEnclosedServeEndedIsWrittenDown(t *testing.T) {
	for name, test := range map[string]struct {
		more []string
		die  func(*enclosure)
		want string
	}{
		"killed":  {nil, (*enclosure).killServe, "signal 9"},
		"expired": {[]string{"--expires-in", "0.2"}, func(*enclosure) {}, "exit 3"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnclosure(t)
			if said, err := e.start(test.more...); err != nil {
				t.Fatalf("%v: %s", err, said)
			}
			test.die(e)
			if how := e.ended(); how != test.want {
				t.Errorf("it ended by %q, not %q", how, test.want)
			}
			if said, err := e.start(); err == nil || !strings.Contains(said, "the sandbox has ended: "+test.want) {
				t.Errorf("started again: %v %s", err, said)
			}
		})
	}
}

func TestAnEnclosedServeThatCannotStartSaysWhy(t *testing.T) {
	e := newEnclosure(t)
	if said, err := e.start("--max-commands", "0"); err == nil || !strings.Contains(said, "--max-commands is at least 1") {
		t.Errorf("%v: %s", err, said)
	}
}

func TestTextualOutputIsExactForEveryByte(t *testing.T) {
	e := newEnclosure(t)
	if said, err := e.start(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	want := strings.Repeat("\x00\xff\xc3\n\r\x80", 40_000)
	if err := os.WriteFile(e.path("bytes"), []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := e.run("cat " + e.path("bytes")); got != want {
		t.Errorf("%d bytes came for %d", len(got), len(want))
	}
}
