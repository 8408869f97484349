package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestEpochFencing(t *testing.T) {
	s := serve(t)
	old, twin := s.dial(5), s.dial(5)
	if low := s.dial(4); low.final["code"] != codeEpochStale {
		t.Errorf("a lower epoch got %v", low.hello)
	}
	twin.run("true")
	running := startArgs("sleep 300", "attach", nil)
	old.do(running, nil)
	newer := s.dial(6)
	for _, c := range []*channel{old, twin} {
		<-c.ended
		if c.final["code"] != codeEpochStale {
			t.Errorf("the older connection ended with %v", c.final)
		}
	}
	expect(t, newer.hello, "epoch", 6, "commands", 1)
	expect(t, newer.do(object{"verb": "status", "op_id": running["op_id"]}, nil).record(t), "state", "running")
}

func TestTokens(t *testing.T) {
	s := serve(t, "--token-env", "RUNNER_TEST_TOKEN")
	s.dial(1).run("true")
	for _, token := range []string{"", "wrong"} {
		c := s.dialHello(object{"protocol": 1, "epoch": 1 << 40, "client": "x", "token": token})
		if c.final["code"] != codeUnauthorized {
			t.Errorf("token %q got %v", token, c.hello)
		}
	}
	s.dial(1).run("true") // a stranger's epoch fences nobody
}

func TestTheFirstHelloSaysTheToken(t *testing.T) {
	s := serve(t, "--learn-token")
	hello := func(token string) *channel {
		return s.dialHello(object{"protocol": 1, "epoch": 1, "client": "x", "token": token})
	}
	if c := hello(""); c.final["code"] != codeUnauthorized {
		t.Errorf("an empty token got %v", c.hello)
	}
	hello("first").run("true")
	for _, token := range []string{"", "second"} {
		if c := hello(token); c.final["code"] != codeUnauthorized {
			t.Errorf("token %q got %v", token, c.hello)
		}
	}
	hello("first").run("true")
}

func TestInstalledItCanBeRunAndNotRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "runner")
	for range 2 { // an init container can be started again
		if out, err := exec.Command(builtRunner, "install", path).CombinedOutput(); err != nil {
			t.Fatalf("install: %v: %s", err, out)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o111 {
		t.Fatalf("%v, %v", info, err)
	}
	if out, err := exec.Command(path, "version").Output(); err != nil || !strings.Contains(string(out), runnerVersion) {
		t.Errorf("the copy said %q, %v", out, err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

// TestReattach cuts the connection again and again while a command writes, and puts the
// output together from the pieces.
func TestReattach(t *testing.T) {
	s := serve(t)
	const lines = 20_000
	args := startArgs(fmt.Sprintf("seq 1 %d; seq 1 %d >&2; sleep 0.3; echo end", lines, lines), "attach", nil)
	s.dial(1).do(args, nil)
	var whole [2][]byte
	for round := 1; ; round++ {
		c := s.dial(1)
		p := c.begin(object{"verb": "attach", "op_id": args["op_id"], "stdout_offset": len(whole[0]), "stderr_offset": len(whole[1]),
			"window_bytes": 700 * round, "follow": true}, nil, func(p *pending) {
			p.next = [2]int64{int64(len(whole[0])), int64(len(whole[1]))}
			p.manual = round < 30
		})
		finished := false
		select {
		case <-p.done:
			finished = true
		case <-time.After(20 * time.Millisecond):
			if !p.manual {
				p.wait()
				finished = true
			}
		}
		c.conn.Close()
		<-c.ended
		for i := range whole {
			if len(p.answer.gaps[i]) > 0 {
				t.Fatalf("gap at %v", p.answer.gaps)
			}
			whole[i] = append(whole[i], p.answer.output[i]...)
		}
		if finished && p.answer.kind == frameReply {
			break
		}
	}
	var wanted bytes.Buffer
	for i := 1; i <= lines; i++ {
		fmt.Fprintln(&wanted, i)
	}
	if !bytes.Equal(whole[1], wanted.Bytes()) || !bytes.Equal(whole[0], append(wanted.Bytes(), "end\n"...)) {
		t.Errorf("%d and %d bytes arrived, %d and 4 more were written", len(whole[1]), len(whole[0]), wanted.Len())
	}
}

func TestCreditIsObserved(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("head -c 1000000 /dev/zero", "attach", attachArgs(0, 0, 1000))
	p := c.begin(args, nil, func(p *pending) { p.manual, p.bytes = true, make(chan int, 10000) })
	eventually(t, "it is finished", func() bool {
		a := c.call(object{"verb": "status", "op_id": args["op_id"]}, nil)
		return a.kind == frameReply && a.record(t)["state"] == "finished"
	})
	time.Sleep(50 * time.Millisecond)
	received := 0
	take := func(limit int) {
		for received < limit {
			received += <-p.bytes
		}
		if received != limit || len(p.bytes) > 0 {
			t.Fatalf("%d bytes and %d frames more within a credit of %d", received, len(p.bytes), limit)
		}
	}
	take(1000)
	c.credit(p.id, 70_000)
	take(71_000)
	c.credit(p.id, 10_000_000)
	if a := p.wait(); len(a.output[0]) != 1_000_000 {
		t.Errorf("%d bytes", len(a.output[0]))
	}
}

// TestFairness: while a command floods the connection, a quiet one is answered; and a call
// without credit holds up nobody.
func TestFairness(t *testing.T) {
	c := serve(t).dial(1)
	flood := startArgs("yes", "spool_limit_bytes", 1<<20)
	chatty := c.begin(flood, nil)
	stuck := c.begin(startArgs("head -c 500000 /dev/zero", "attach", attachArgs(0, 0, 1)), nil, func(p *pending) { p.manual = true })
	for i := range 20 {
		if a := c.run(fmt.Sprintf("echo %d", i)); string(a.output[0]) != fmt.Sprintln(i) {
			t.Fatalf("output %q", a.output[0])
		}
	}
	c.do(object{"verb": "kill", "op_id": flood["op_id"], "grace_s": 0}, nil)
	chatty.wait()
	c.credit(stuck.id, 1<<20)
	if a := stuck.wait(); len(a.output[0]) != 500_000 {
		t.Errorf("%d bytes", len(a.output[0]))
	}
}

func TestSlowClientStallsNoCommand(t *testing.T) {
	s := serve(t)
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	args := startArgs("head -c 20000000 /dev/zero", "attach", attachArgs(0, 0, 1<<30))
	out := appendDocument(nil, frameHello, 0, object{"protocol": 1, "epoch": 1}, nil)
	_, _ = conn.Write(appendDocument(out, frameRequest, 1, args, nil)) // and never read
	c := s.dial(1)
	eventually(t, "the command ends although nobody reads", func() bool {
		a := c.call(object{"verb": "status", "op_id": args["op_id"]}, nil)
		return a.kind == frameReply && a.record(t)["state"] == "finished"
	})
	newer := s.dial(2) // fencing a peer that does not read takes no longer than a moment
	newer.run("true")
}

func TestCancel(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("sleep 300")
	p := c.begin(args, nil)
	eventually(t, "it runs", func() bool { return c.call(object{"verb": "status", "op_id": args["op_id"]}, nil).kind == frameReply })
	c.raw(rawFrame(frameCancel, p.id, nil))
	if a := p.wait(); a.kind != frameError || a.values["code"] != codeCancelled {
		t.Errorf("cancelled: %v", a.values)
	}
	c.raw(rawFrame(frameCancel, p.id, nil)) // late ones are harmless
	c.credit(p.id, 5)
	expect(t, c.do(object{"verb": "status", "op_id": args["op_id"]}, nil).record(t), "state", "running")
}

func TestPing(t *testing.T) {
	c := serve(t).dial(1)
	p := &pending{channel: c, id: 77, done: make(chan struct{})}
	c.mu.Lock()
	c.pending[77] = p
	c.mu.Unlock()
	c.raw(rawFrame(framePing, 77, []byte("are you there")))
	if a := p.wait(); string(a.body) != "are you there" {
		t.Errorf("pong %q", a.body)
	}
}

func TestMalformedFrames(t *testing.T) {
	doc := func(size int, rest string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(size)), rest...)
	}
	status := `{"verb":"status","op_id":"x"}`
	frames := map[string][]byte{
		"too short":          {0, 0, 0, 4, 8, 0, 0, 0},
		"length 0":           {0, 0, 0, 0, 8, 0, 0, 0, 0},
		"too long":           {0, 0x20, 0, 1, 2, 0, 0, 0, 1},
		"huge":               {0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 1},
		"type 0":             rawFrame(0, 1, nil),
		"type 99":            rawFrame(99, 1, nil),
		"a REPLY":            rawFrame(frameReply, 1, doc(2, "{}")),
		"an OUTPUT":          rawFrame(frameOutput, 1, make([]byte, 20)),
		"second HELLO":       rawFrame(frameHello, 0, doc(26, `{"protocol":1,"epoch":100}`)),
		"HELLO on a call":    rawFrame(frameHello, 3, doc(2, "{}")),
		"call 0":             rawFrame(frameRequest, 0, doc(len(status), status)),
		"no document":        rawFrame(frameRequest, 1, nil),
		"document too long":  rawFrame(frameRequest, 1, doc(99, status)),
		"document huge":      rawFrame(frameRequest, 1, doc(1<<31, status)),
		"not JSON":           rawFrame(frameRequest, 1, doc(3, "{x}")),
		"an array":           rawFrame(frameRequest, 1, doc(2, "[]")),
		"two objects":        rawFrame(frameRequest, 1, doc(4, "{}{}")),
		"not UTF-8":          rawFrame(frameRequest, 1, doc(9, "{\"a\":\"\xff\"}")),
		"body too long":      rawFrame(frameRequest, 1, append(doc(len(status), status), make([]byte, maxDocumentBody+1)...)),
		"short CREDIT":       rawFrame(frameCredit, 1, []byte{1, 2, 3}),
		"long CREDIT":        rawFrame(frameCredit, 1, []byte{1, 2, 3, 4, 5}),
		"CANCEL with a body": rawFrame(frameCancel, 1, []byte{1}),
		"long PING":          rawFrame(framePing, 1, make([]byte, 65)),
		"deep nesting":       rawFrame(frameRequest, 1, doc(200_006, `{"a":`+strings.Repeat("[", 200_000)+"}")),
	}
	s := serve(t)
	for name, bytes := range frames {
		c := s.dial(1)
		c.raw(bytes)
		select {
		case <-c.ended:
		case <-time.After(patience):
			t.Fatalf("%s: the connection stays open", name)
		}
		if c.final["code"] != codeProtocol {
			t.Errorf("%s: ended with %v", name, c.final)
		}
	}
	for _, first := range []object{{"protocol": 2, "epoch": 1}, {"protocol": 1}, {"protocol": 1, "epoch": -1}, {"protocol": 1, "epoch": "x"}, {}} {
		if c := s.dialHello(first); c.final["code"] != codeProtocol {
			t.Errorf("HELLO %v: %v", first, c.hello)
		}
	}
	s.dial(1).run("true")
}

func TestReusedCall(t *testing.T) {
	c := serve(t).dial(1)
	p := c.begin(startArgs("sleep 300"), nil)
	c.send(frameRequest, p.id, object{"verb": "list"}, nil)
	<-c.ended
	if c.final["code"] != codeProtocol {
		t.Errorf("ended with %v", c.final)
	}
}

func TestTooManyCalls(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("sleep 300")
	for range maxOpenCalls {
		c.begin(args, nil)
	}
	c.fails(codeBusy, object{"verb": "list"}, nil)
}

func TestUnknownVerbAndFields(t *testing.T) {
	c := serve(t).dial(1)
	c.fails(codeInvalid, object{"verb": "dance"}, nil)
	c.fails(codeInvalid, object{"verb": 7}, nil)
	c.fails(codeInvalid, object{}, nil)
	c.do(object{"verb": "list", "later": "more"}, nil)
	c.do(object{"verb": "stats"}, nil)
}

func TestManyBodiesAtOnce(t *testing.T) {
	c := serve(t).dial(1)
	body := bytes.Repeat([]byte("x"), 1<<20)
	var all []*pending
	for i := range 100 {
		all = append(all, c.begin(object{"verb": "write", "path": fmt.Sprintf("f%d", i%7), "transfer_id": fmt.Sprint(i), "offset": 0, "commit": nil}, body))
	}
	for _, p := range all {
		if a := p.wait(); a.kind != frameReply {
			t.Fatalf("write: %v", a.values)
		}
	}
}
