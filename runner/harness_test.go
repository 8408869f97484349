package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for what must happen: long, because the machine may be busy.
const patience = 60 * time.Second

// marker is in the environment of every command, so that the end can look for survivors.
var marker = fmt.Sprintf("CIFIXER_RUNNER_TEST=%d-%d", os.Getpid(), time.Now().UnixNano())

var builtRunner string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "runner-test-")
	if err != nil {
		panic(err)
	}
	builtRunner = filepath.Join(dir, "runner")
	build := exec.Command("go", "build", "-o", builtRunner, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if os.Getenv("RUNNER_TEST_RACE") != "" { // the race detector in the runner too; needs a C compiler
		build = exec.Command("go", "build", "-race", "-o", builtRunner, ".")
	}
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %s\n%s", err, output)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	if left := survivors(5 * time.Second); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "processes were left behind: %v\n", left)
		code = 1
	}
	os.Exit(code)
}

// survivors lists processes that carry the marker, after giving them time to end.
func survivors(limit time.Duration) (left []string) {
	deadline := time.Now().Add(limit)
	for {
		left = nil
		paths, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, path := range paths {
			environ, _ := os.ReadFile(path)
			if path != "/proc/self/environ" && bytes.Contains(environ, []byte(marker)) {
				left = append(left, path)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// sandbox is a real `runner serve`, without any isolation around it.
type sandbox struct {
	t                        *testing.T
	process                  *exec.Cmd
	socket, spool, workspace string
	exited                   chan struct{}
	log                      *bytes.Buffer
}

func serveIn(t *testing.T, dir string, flags ...string) *sandbox {
	t.Helper()
	s := &sandbox{t: t, socket: filepath.Join(dir, "s"), spool: filepath.Join(dir, "spool"), workspace: filepath.Join(dir, "work"),
		exited: make(chan struct{}), log: &bytes.Buffer{}}
	args := append([]string{"serve", "--socket", s.socket, "--spool", s.spool, "--workspace", s.workspace, "--allow-root", s.workspace}, flags...)
	s.process = exec.Command(builtRunner, args...)
	s.process.Env = append(os.Environ(), "RUNNER_TEST_TOKEN=secret")
	s.process.Stderr = s.log
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.process.Wait(); close(s.exited) }()
	t.Cleanup(s.stop)
	s.awaitSocket()
	return s
}

func serve(t *testing.T, flags ...string) *sandbox {
	t.Helper()
	dir, err := os.MkdirTemp("", "rt") // short: a socket path holds 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return serveIn(t, dir, flags...)
}

func (s *sandbox) awaitSocket() {
	s.t.Helper()
	eventually(s.t, "the socket accepts", func() bool {
		select {
		case <-s.exited:
			s.t.Fatalf("serve ended: %s", s.log.String())
		default:
		}
		conn, err := net.Dial("unix", s.socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func (s *sandbox) stop() {
	_ = s.process.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(patience):
		_ = s.process.Process.Kill()
		s.t.Errorf("serve did not end on SIGTERM")
	}
	if strings.Contains(s.log.String(), "goroutine ") || strings.Contains(s.log.String(), "DATA RACE") {
		s.t.Errorf("serve crashed:\n%s", s.log.String())
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(3 * time.Millisecond)
	}
}

// object is decoded JSON.
type object = map[string]any

// answer is what a call got.
type answer struct {
	kind   byte
	values object
	body   []byte
	output [2][]byte
	gaps   [2][]int64 // offsets at which bytes were missing before
	frames []byte     // streams in the order of their frames
}

func (a *answer) record(t *testing.T) object {
	t.Helper()
	r, ok := a.values["record"].(object)
	if !ok {
		t.Fatalf("no record in %v", a.values)
	}
	return r
}

// channel is a client's connection.
type channel struct {
	t       *testing.T
	conn    net.Conn
	hello   object
	mu      sync.Mutex
	lastID  uint32
	pending map[uint32]*pending
	ended   chan struct{}
	final   object // the ERROR on call 0, if one came
}

type pending struct {
	channel *channel
	id      uint32
	answer  answer
	next    [2]int64
	manual  bool // no automatic CREDIT
	bytes   chan int
	done    chan struct{}
}

func (s *sandbox) dial(epoch uint64) *channel {
	s.t.Helper()
	return s.dialHello(object{"protocol": 1, "epoch": epoch, "client": "test", "token": "secret"})
}

func (s *sandbox) dialHello(hello object) *channel {
	s.t.Helper()
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	c := &channel{t: s.t, conn: conn, pending: map[uint32]*pending{}, ended: make(chan struct{})}
	s.t.Cleanup(func() { conn.Close() })
	c.send(frameHello, 0, hello, nil)
	reader := bufio.NewReader(conn)
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	kind, call, payload, err := readAnyFrame(reader)
	if err != nil || call != 0 {
		s.t.Fatalf("HELLO: call %d, %v", call, err)
	}
	_ = conn.SetReadDeadline(time.Time{})
	c.hello, _ = decodeAnswer(payload)
	if kind == frameError {
		c.final = c.hello
		close(c.ended)
		return c
	}
	go c.read(reader)
	return c
}

func readAnyFrame(r io.Reader) (kind byte, call uint32, payload []byte, err error) {
	var head [9]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return
	}
	payload = make([]byte, binary.BigEndian.Uint32(head[:])-5)
	_, err = io.ReadFull(r, payload)
	return head[4], binary.BigEndian.Uint32(head[5:]), payload, err
}

func decodeAnswer(payload []byte) (object, []byte) {
	size := binary.BigEndian.Uint32(payload)
	values := object{}
	_ = json.Unmarshal(payload[4:4+size], &values)
	return values, payload[4+size:]
}

func (c *channel) send(kind byte, call uint32, value any, body []byte) {
	c.raw(append(appendDocument(nil, kind, call, value, body), body...))
}

func (c *channel) raw(frame []byte) { _, _ = c.conn.Write(frame) }

func rawFrame(kind byte, call uint32, payload []byte) []byte {
	out := append(appendFrameHead(nil, kind, call), payload...)
	finishFrame(out, 0, 0)
	return out
}

func (c *channel) credit(call uint32, bytes int) {
	c.raw(rawFrame(frameCredit, call, binary.BigEndian.AppendUint32(nil, uint32(bytes))))
}

func (c *channel) read(reader io.Reader) {
	defer close(c.ended)
	for {
		kind, call, payload, err := readAnyFrame(reader)
		if err != nil {
			return
		}
		if call == 0 {
			if kind == frameError {
				c.final, _ = decodeAnswer(payload)
			}
			continue
		}
		c.mu.Lock()
		p := c.pending[call]
		c.mu.Unlock()
		if p == nil {
			continue
		}
		if kind == frameOutput {
			p.take(payload)
			continue
		}
		if kind == framePong {
			p.answer.body = payload
		} else {
			p.answer.values, p.answer.body = decodeAnswer(payload)
		}
		p.answer.kind = kind
		close(p.done)
	}
}

func (p *pending) take(payload []byte) {
	which := payload[0] - 1
	offset := int64(binary.BigEndian.Uint64(payload[1:]))
	if offset != p.next[which] {
		p.answer.gaps[which] = append(p.answer.gaps[which], offset)
	}
	p.answer.output[which] = append(p.answer.output[which], payload[9:]...)
	p.answer.frames = append(p.answer.frames, payload[0])
	p.next[which] = offset + int64(len(payload)-9)
	if p.bytes != nil {
		p.bytes <- len(payload) - 9
	}
	if !p.manual {
		p.channel.credit(p.id, len(payload)-9)
	}
}

// begin sends a request and does not wait.
func (c *channel) begin(args object, body []byte, prepare ...func(*pending)) *pending {
	c.mu.Lock()
	c.lastID++
	p := &pending{channel: c, id: c.lastID, done: make(chan struct{})}
	for _, f := range prepare {
		f(p)
	}
	c.pending[p.id] = p
	c.mu.Unlock()
	c.send(frameRequest, p.id, args, body)
	return p
}

func (p *pending) wait() *answer {
	p.channel.t.Helper()
	select {
	case <-p.done:
	case <-p.channel.ended:
		select {
		case <-p.done:
		default:
			p.channel.t.Fatalf("the connection ended before the answer: %v", p.channel.final)
		}
	case <-time.After(patience):
		p.channel.t.Fatalf("no answer to call %d", p.id)
	}
	return &p.answer
}

func (c *channel) call(args object, body []byte) *answer {
	c.t.Helper()
	return c.begin(args, body).wait()
}

// do is a call that must succeed; fails is one that must fail with a code.
func (c *channel) do(args object, body []byte) *answer {
	c.t.Helper()
	a := c.call(args, body)
	if a.kind != frameReply {
		c.t.Fatalf("%v failed: %v", args["verb"], a.values)
	}
	return a
}

func (c *channel) fails(code string, args object, body []byte) {
	c.t.Helper()
	if a := c.call(args, body); a.kind != frameError || a.values["code"] != code {
		c.t.Fatalf("%v: wanted %s, got %v %v", args["verb"], code, a.kind, a.values)
	}
}

var opCounter struct {
	sync.Mutex
	n int
}

func newOp() string {
	opCounter.Lock()
	defer opCounter.Unlock()
	opCounter.n++
	return fmt.Sprintf("op-%d", opCounter.n)
}

// command gives the arguments of a start; changes come as pairs of key and value.
func startArgs(script string, changes ...any) object {
	name, value, _ := strings.Cut(marker, "=")
	args := object{"verb": "start", "op_id": newOp(), "digest": "d", "argv": []string{"/bin/sh", "-c", script},
		"env": object{"PATH": "/usr/local/bin:/usr/bin:/bin", name: value}, "cwd": "", "timeout_s": nil, "grace_s": 0.3,
		"spool_limit_bytes": 64 << 20, "stdin": "none", "attach": attachArgs(0, 0, 1<<20)}
	for i := 0; i < len(changes); i += 2 {
		args[changes[i].(string)] = changes[i+1]
	}
	return args
}

func attachArgs(stdout, stderr int64, window int) object {
	return object{"stdout_offset": stdout, "stderr_offset": stderr, "window_bytes": window}
}

func (c *channel) run(script string, changes ...any) *answer {
	c.t.Helper()
	return c.do(startArgs(script, changes...), nil)
}

func expect(t *testing.T, values object, pairs ...any) {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		value := values[pairs[i].(string)]
		if number, ok := value.(float64); ok && number == float64(int64(number)) {
			value = int64(number)
		}
		got, want := fmt.Sprint(value), fmt.Sprint(pairs[i+1])
		if got != want {
			t.Errorf("%s is %s, not %s (in %v)", pairs[i], got, want, values)
		}
	}
}
