package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func with(args object, changes ...any) object {
	changed := object{}
	for name, value := range args {
		changed[name] = value
	}
	for i := 0; i < len(changes); i += 2 {
		changed[changes[i].(string)] = changes[i+1]
	}
	return changed
}

func (s *sandbox) has(name string) bool {
	_, err := os.Lstat(filepath.Join(s.workspace, name))
	return err == nil
}

func TestRepeatedRemove(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	remove := object{"verb": "remove", "path": "f", "recursive": false, "missing_ok": false, "request_id": "r1"}
	c.writeFile("f", []byte("first"))
	expect(t, c.do(remove, nil).values, "removed", true)
	c.writeFile("f", []byte("of somebody else"))
	for _, epoch := range []uint64{1, 1, 2} { // the connection died, then the worker
		c = s.dial(epoch)
		expect(t, c.do(remove, nil).values, "removed", true)
	}
	if !s.has("f") {
		t.Error("a repeated remove removed another file")
	}
	expect(t, c.do(with(remove, "request_id", "r2"), nil).values, "removed", true)
	c.fails(codeNotFound, with(remove, "request_id", "r3"), nil)
	c.writeFile("f", nil)
	c.fails(codeNotFound, with(remove, "request_id", "r3"), nil) // that is how it ended
	expect(t, c.do(with(remove, "request_id", nil), nil).values, "removed", true)
	c.fails(codeNotFound, with(remove, "request_id", nil), nil)
}

func TestRepeatedSignalIsDeliveredOnce(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	args := startArgs("exec 2>/dev/null; trap 'n=$((n+1)); echo $n' USR1; echo up; while :; do sleep 0.05; done")
	p := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-p.bytes
	signal := object{"verb": "signal", "op_id": args["op_id"], "signal": "USR1", "request_id": "r1"}
	first := c.do(signal, nil).values["signalled"]
	for _, c := range []*channel{c, s.dial(1)} {
		expect(t, c.do(signal, nil).values, "signalled", first)
	}
	<-p.bytes
	c.do(with(signal, "request_id", "r2"), nil)
	<-p.bytes
	c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil)
	if got := string(p.wait().output[0]); got != "up\n1\n2\n" {
		t.Errorf("output %q", got)
	}
}

func TestRepeatedCommitLeavesWhatCameAfterIt(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	write := object{"verb": "write", "path": "f", "transfer_id": "t", "offset": 0, "commit": commitOf([]byte("old")), "request_id": "r1"}
	expect(t, c.do(write, []byte("old")).values, "received_bytes", 3)
	c.run("printf newer > f")
	expect(t, c.do(write, []byte("old")).values, "received_bytes", 3)
	if got, _ := os.ReadFile(filepath.Join(s.workspace, "f")); string(got) != "newer" {
		t.Errorf("a repeated commit wrote %q", got)
	}
	c.fails(codeOpConflict, write, []byte("odd"))
	c.fails(codeOpConflict, with(write, "path", "g"), []byte("old"))
	c.do(object{"verb": "mkdir", "path": "d", "parents": false, "request_id": "r1"}, nil) // another verb, another request
	c.do(object{"verb": "mkdir", "path": "d", "parents": false, "request_id": "r1"}, nil)
	c.fails(codeExists, object{"verb": "mkdir", "path": "d", "parents": false, "request_id": "r2"}, nil)
}

func (s *sandbox) archives() []string {
	found, _ := filepath.Glob(filepath.Join(s.spool, transferDir, "pack-*"))
	return found
}

func TestRepetitionsAtOnceDoItOnce(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	c.writeFile("src/big", make([]byte, 1<<20))
	pack := object{"verb": "pack", "path": "src", "excludes": []string{}, "request_id": "r1"}
	var all []*pending
	for _, c := range []*channel{c, s.dial(1)} {
		for range 20 {
			all = append(all, c.begin(pack, nil))
		}
	}
	for _, p := range all {
		if a := p.wait(); a.kind != frameReply || a.values["archive"] != all[0].wait().values["archive"] {
			t.Errorf("%v", a.values)
		}
	}
	if found := s.archives(); len(found) != 1 {
		t.Errorf("archives %v", found)
	}
}

func TestAnAdopterGetsTheAnswerOfTheDead(t *testing.T) {
	s := serve(t)
	s.dial(1).writeFile("src/big", make([]byte, 1<<20))
	for round := range 20 { // the first is at work, done, or not even begun when its connection ends
		epoch := uint64(2 * round)
		pack := object{"verb": "pack", "path": "src", "excludes": []string{}, "request_id": fmt.Sprint("round-", round)}
		first := s.dial(epoch + 1)
		first.begin(pack, nil)
		if round%2 == 0 {
			first.conn.Close()
		}
		s.dial(epoch+2).do(pack, nil)
		if found := s.archives(); len(found) != round+1 {
			t.Fatalf("round %d: archives %v", round, found)
		}
	}
}

func TestRequestIDs(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	for _, wrong := range []any{5, "", "..", "a/b", strings.Repeat("x", 129)} {
		c.fails(codeInvalid, object{"verb": "mkdir", "path": "d", "request_id": wrong}, nil)
		c.fails(codeNotFound, object{"verb": "stat", "path": "d", "request_id": wrong}, nil) // reading verbs ignore it
	}
	running := startArgs("sleep 300", "attach", nil)
	c.do(running, nil)
	forget := object{"verb": "forget", "op_id": running["op_id"], "request_id": "r1"}
	c.fails(codeBusy, forget, nil)
	c.do(object{"verb": "kill", "op_id": running["op_id"], "grace_s": 0}, nil)
	for range 2 { // busy says try again; what was forgotten then stays so
		c.do(forget, nil)
	}
}

func TestAnswersAreBounded(t *testing.T) {
	a := newAnswers()
	done := 0
	ask := func(id string, digest uint64, answer any, fails error) error {
		_, err := a.once(requestKey{"remove", id}, digest, nil, func() (any, error) { done++; return answer, fails })
		return err
	}
	for i := range mostAnswers + 10 {
		_ = ask(fmt.Sprint(i), 1, nothing{}, nil)
	}
	if len(a.known) != mostAnswers || len(a.order) != mostAnswers {
		t.Errorf("%d answers, %d in order", len(a.known), len(a.order))
	}
	count := func(id string, answer any, fails error) int {
		before := done
		for range 3 {
			_ = ask(id, 1, answer, fails)
		}
		return done - before
	}
	if n := count("4000", nothing{}, nil); n != 0 {
		t.Errorf("a remembered request was done %d times again", n)
	}
	if n := count("0", nothing{}, nil); n != 1 {
		t.Errorf("the oldest was done %d times again", n)
	}
	if n := count("big", strings.Repeat("x", maxAnswerBytes), nil); n != 3 {
		t.Errorf("an answer that is too big was kept: %d", n)
	}
	for code, wanted := range map[string]int{codeBusy: 3, codeInternal: 3, codeCancelled: 3, codeNotFound: 1, codeNoSpace: 1, codeInvalid: 1} {
		if n := count("fault-"+code, nil, faultf(code, "x")); n != wanted {
			t.Errorf("%s: done %d times", code, n)
		}
	}
	if n := count("odd", nil, errors.New("x")); n != 3 {
		t.Errorf("an unknown error: done %d times", n)
	}
	var known *fault
	if err := ask("4000", 2, nil, nil); !errors.As(err, &known) || known.Code != codeOpConflict {
		t.Errorf("another request under the same id: %v", err)
	}
}

func TestDigestOfADocument(t *testing.T) {
	seed := maphash.MakeSeed()
	of := func(json, body string) uint64 {
		digest, err := document{json: []byte(json), body: []byte(body)}.digest(seed)
		if err != nil {
			t.Error(err)
		}
		return digest
	}
	first := of(`{"a":1,"b":{"c":"x"}}`, "body")
	if of(` { "b": {"c":"x"}, "a": 1 } `, "body") != first {
		t.Error("the order of members counts")
	}
	for _, other := range [][2]string{{`{"a":1,"b":{"c":"x"}}`, "bodz"}, {`{"a":2,"b":{"c":"x"}}`, "body"}, {`{"a":1}`, "body"}, {`{}`, ""}} {
		if of(other[0], other[1]) == first {
			t.Errorf("%q has the same digest", other)
		}
	}
}

// waiting is a request at a server without a socket, as it is when it was just read.
func waiting(t *testing.T, s *server, args object) *request {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	c := newConnection(s, ours)
	call, err := c.open(1)
	if err != nil {
		t.Fatal(err)
	}
	payload := appendDocument(nil, frameRequest, 1, args, nil)[9:]
	doc, err := parseDocument(payload)
	if err != nil {
		t.Fatal(err)
	}
	return &request{call: call, connection: c, document: doc, payload: payload}
}

func TestAFencedRequestDoesNotBegin(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	_ = os.WriteFile(path, nil, 0o600)
	for _, id := range []any{nil, "r1"} {
		s := &server{options: &serveOptions{workspace: dir}, roots: []string{dir}, files: newGate(1), answers: newAnswers()}
		r := waiting(t, s, object{"verb": "remove", "path": "f", "request_id": id})
		leave, handled := s.files.enter(), make(chan struct{})
		go func() { s.handle(r); close(handled) }()
		eventually(t, "the first is named", func() bool {
			s.answers.mu.Lock()
			defer s.answers.mu.Unlock()
			return id == nil || len(s.answers.known) == 1
		})
		r.connection.mu.Lock()
		r.connection.stale = true
		r.connection.mu.Unlock()
		leave()
		<-handled
		if _, err := os.Stat(path); err != nil || r.connection.find(1) == nil {
			t.Errorf("a fenced request was carried out: %v", err)
		}
	}
}

func TestWhoWaitedForAFencedRequestDoesIt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	_ = os.WriteFile(path, nil, 0o600)
	s := &server{options: &serveOptions{workspace: dir}, roots: []string{dir}, files: newGate(1), answers: newAnswers()}
	remove := object{"verb": "remove", "path": "f", "request_id": "r1"}
	stale, adopters := waiting(t, s, remove), make(chan any)
	leave := s.files.enter()
	go s.handle(stale)
	eventually(t, "the first is named", func() bool {
		s.answers.mu.Lock()
		defer s.answers.mu.Unlock()
		return len(s.answers.known) == 1
	})
	for range 5 {
		r := waiting(t, s, remove)
		go func() {
			answer, err := s.dispatch(r)
			adopters <- fmt.Sprintf("%s %v", encoded(answer), err)
		}()
	}
	stale.connection.mu.Lock()
	stale.connection.stale = true
	stale.connection.mu.Unlock()
	leave()
	for range 5 {
		if got := <-adopters; got != `{"removed":true} <nil>` {
			t.Errorf("an adopter got %s", got)
		}
	}
}

func encoded(value any) []byte {
	raw, _ := json.Marshal(value)
	return raw
}

func TestADroppedCommandDoesNotRunAgain(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	args := startArgs("echo ran >> log; echo said")
	c.do(args, nil)
	c.do(object{"verb": "forget", "op_id": args["op_id"]}, nil)
	for _, attach := range []any{nil, attachArgs(0, 0, 1000), attachArgs(5, 0, 1000)} {
		a := c.do(with(args, "attach", attach), nil)
		expect(t, a.record(t), "op_id", args["op_id"], "state", "finished", "status", "unknown", "exit_code", nil, "cause", droppedCause)
		if a.values["created"] != false || len(a.output[0]) != 0 {
			t.Errorf("%v %q", a.values, a.output[0])
		}
	}
	c.fails(codeOpConflict, with(args, "digest", "other"), nil)
	for _, verb := range []string{"status", "attach", "kill", "forget", "stdin"} {
		c.fails(codeOpDropped, object{"verb": verb, "op_id": args["op_id"]}, nil)
	}
	if log, _ := os.ReadFile(filepath.Join(s.workspace, "log")); string(log) != "ran\n" {
		t.Errorf("it ran like this: %q", log)
	}
}

func TestTheOldestRecordsAreDropped(t *testing.T) {
	c := serve(t).dial(1)
	missing := func(id string) object {
		return startArgs("", "op_id", id, "argv", []string{"no-such-program"})
	}
	for i := range maxFinished + 1 {
		expect(t, c.do(missing(fmt.Sprint("n", i)), nil).values, "created", true)
	}
	expect(t, c.do(missing("n0"), nil).record(t), "status", "unknown", "cause", droppedCause)
	expect(t, c.do(missing("n1"), nil).record(t), "status", "exited", "exit_code", 127)
}

func TestDroppedIDsAreBounded(t *testing.T) {
	d := newDropped()
	for i := range mostDropped + 10 {
		d.add(&command{id: fmt.Sprint(i), digest: "d"})
	}
	if len(d.digests) != mostDropped || len(d.order) != mostDropped {
		t.Errorf("%d ids, %d in order", len(d.digests), len(d.order))
	}
	if d.has("9") || !d.has("10") || !d.sameDigest("10", "d") || d.sameDigest("10", "e") || d.has("never") {
		t.Error("the wrong ones are remembered")
	}
}
