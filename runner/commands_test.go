package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestExits(t *testing.T) {
	c := serve(t).dial(1)
	a := c.run("echo out; echo err >&2; exit 7")
	expect(t, a.record(t), "state", "finished", "status", "exited", "exit_code", 7, "signal", nil, "stdout_bytes", 4, "cause", nil, "spool_truncated", false)
	if string(a.output[0]) != "out\n" || string(a.output[1]) != "err\n" {
		t.Errorf("output %q", a.output)
	}
	expect(t, c.run("kill -TERM $$").record(t), "status", "signaled", "signal", "TERM", "exit_code", nil)
	expect(t, c.run("", "argv", []string{"no-such-program"}).record(t), "status", "exited", "exit_code", 127, "pid", nil, "cause", "no-such-program: command not found")
	expect(t, c.run("", "argv", []string{"/etc/passwd"}).record(t), "status", "exited", "exit_code", 126)
	c.fails(codeInvalid, startArgs("true", "cwd", "/no/such/dir"), nil)
	c.fails(codeInvalid, startArgs("true", "argv", []string{}), nil)
	c.fails(codeInvalid, startArgs("true", "op_id", ".."), nil)
	c.fails(codeInvalid, startArgs("true", "op_id", 5), nil)
}

func TestScriptWithoutInterpreterLine(t *testing.T) {
	s := serve(t)
	path := filepath.Join(s.workspace, "script")
	if err := os.WriteFile(path, []byte("echo ran $1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := s.dial(1).run("", "argv", []string{"./script", "so"})
	if string(a.output[0]) != "ran so\n" {
		t.Errorf("output %q, %v", a.output[0], a.values)
	}
}

func TestBinaryOutputAndArguments(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	a := c.run(`printf '\000\377\200x'`)
	if !bytes.Equal(a.output[0], []byte{0, 0xff, 0x80, 'x'}) {
		t.Errorf("output %q", a.output[0])
	}
	a = c.do(startArgs("", "argv", []text{"printf", "%s", "a\xffb"}, "cwd", text("dir\xfe")), nil2(func() {
		_ = os.Mkdir(filepath.Join(s.workspace, "dir\xfe"), 0o755)
	}))
	if string(a.output[0]) != "a\xffb" {
		t.Errorf("output %q", a.output[0])
	}
}

func nil2(f func()) []byte { f(); return nil }

func TestNoDescriptorIsInherited(t *testing.T) {
	a := serve(t).dial(1).run("ls /proc/self/fd | tr '\\n' ' '; cat /proc/self/oom_score_adj")
	if got := string(a.output[0]); got != "0 1 2 3 1000\n" {
		t.Errorf("a command sees %q", got)
	}
}

func TestTheEnvironmentIsTheRunnersWithTheCommandsOverIt(t *testing.T) {
	t.Setenv("RUNNER_TEST_IMAGE", "from the image")
	t.Setenv("RUNNER_TEST_OVER", "from the image")
	c := serve(t, "--token-env", "RUNNER_TEST_TOKEN").dial(1)
	env := map[string]string{"PATH": os.Getenv("PATH"), "RUNNER_TEST_OVER": "from the command"}
	a := c.run(`echo "$RUNNER_TEST_IMAGE,$RUNNER_TEST_OVER,$RUNNER_TEST_TOKEN"; env | grep -c ^RUNNER_TEST_OVER`, "env", env)
	if got := string(a.output[0]); got != "from the image,from the command,\n1\n" {
		t.Errorf("a command sees %q", got)
	}
}

func TestTimeoutKillsEveryDescendant(t *testing.T) {
	scripts := map[string]string{
		"setsid":       "setsid sleep 300 & sleep 300",
		"double fork":  "(setsid sh -c 'sleep 300 & exec sleep 300' &) ; sleep 300",
		"ignores TERM": "trap '' TERM; (trap '' TERM; sleep 300; sleep 300) & sleep 300; sleep 300",
		"stopped":      "sleep 300 & kill -STOP $!; kill -STOP $$",
	}
	c := serve(t).dial(1)
	for name, script := range scripts {
		a := c.run("echo before; "+script, "timeout_s", 0.5, "grace_s", 0.2)
		expect(t, a.record(t), "status", "timed_out", "exit_code", nil, "background_processes", 0)
		if string(a.output[0]) != "before\n" {
			t.Errorf("%s: output before the deadline was lost: %q", name, a.output[0])
		}
		if left := survivors(0); len(left) > 0 {
			t.Errorf("%s: survivors %v", name, left)
		}
	}
}

func TestKill(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done", "grace_s", 30)
	p := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-p.bytes
	expect(t, c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 30}, nil).record(t), "status", "killed", "exit_code", nil, "state", "finished")
	if a := p.wait(); string(a.output[0]) != "up\nbye\n" {
		t.Errorf("output %q", a.output[0])
	}
	expect(t, c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil).record(t), "status", "killed")
	c.fails(codeOpUnknown, object{"verb": "kill", "op_id": "nobody", "grace_s": 0}, nil)
}

func TestSecondKillShortensTheGrace(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("trap '' TERM; echo up; while :; do sleep 0.05; done")
	p := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-p.bytes
	slow := c.begin(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 3000}, nil)
	c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil)
	expect(t, slow.wait().record(t), "status", "killed", "signal", "KILL")
}

func TestBackgroundProcesses(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("(sleep 300; echo late) & echo early")
	a := c.do(args, nil)
	expect(t, a.record(t), "status", "exited", "exit_code", 0)
	inBackground(t, a)
	if string(a.output[0]) != "early\n" {
		t.Errorf("output %q", a.output[0])
	}
	a = c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil)
	expect(t, a.record(t), "status", "exited", "exit_code", 0, "background_processes", 0)
	if left := survivors(0); len(left) > 0 {
		t.Errorf("survivors %v", left)
	}
	chatty := startArgs("(while :; do echo noise; sleep 0.02; done) & echo first")
	a = c.do(chatty, nil)
	expect(t, a.record(t), "status", "exited")
	inBackground(t, a)
	c.do(object{"verb": "kill", "op_id": chatty["op_id"], "grace_s": 0}, nil)
}

// inBackground: how many there are is up to the shell, that there are some is not.
func inBackground(t *testing.T, a *answer) {
	t.Helper()
	if a.record(t)["background_processes"].(float64) < 1 {
		t.Errorf("no background processes in %v", a.values)
	}
}

func TestIdempotentStart(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	args := startArgs("echo once >> log; echo said")
	if first := c.do(args, nil); first.values["created"] != true {
		t.Errorf("first start: %v", first.values)
	}
	again := c.do(args, nil)
	if again.values["created"] != false || string(again.output[0]) != "said\n" {
		t.Errorf("second start: %v %q", again.values, again.output[0])
	}
	args["digest"] = "other"
	c.fails(codeOpConflict, args, nil)
	if log, _ := os.ReadFile(filepath.Join(s.workspace, "log")); string(log) != "once\n" {
		t.Errorf("it ran like this: %q", log)
	}
}

func TestManyStartsOfOneOpAtOnce(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	args := startArgs("echo once >> log; sleep 0.2; echo said")
	var all []*pending
	for range 40 {
		all = append(all, c.begin(args, nil))
	}
	created := 0
	for _, p := range all {
		a := p.wait()
		if string(a.output[0]) != "said\n" {
			t.Errorf("output %q of %v", a.output[0], a.values)
		}
		if a.values["created"] == true {
			created++
		}
	}
	if log, _ := os.ReadFile(filepath.Join(s.workspace, "log")); string(log) != "once\n" || created != 1 {
		t.Errorf("created %d times, ran like this: %q", created, log)
	}
}

func TestSignal(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("trap 'echo got; exit 4' USR1; echo up; while :; do sleep 0.05; done")
	p := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-p.bytes
	c.fails(codeInvalid, object{"verb": "signal", "op_id": args["op_id"], "signal": "NOPE"}, nil)
	if n := c.do(object{"verb": "signal", "op_id": args["op_id"], "signal": "USR1"}, nil).values["signalled"].(float64); n < 1 {
		t.Errorf("signalled %v", n)
	}
	a := p.wait()
	expect(t, a.record(t), "status", "exited", "exit_code", 4)
	if string(a.output[0]) != "up\ngot\n" {
		t.Errorf("output %q", a.output[0])
	}
}

func TestStdin(t *testing.T) {
	c := serve(t).dial(1)
	a := c.do(startArgs("cat"), []byte("body, then the end"))
	if string(a.output[0]) != "body, then the end" {
		t.Errorf("output %q", a.output[0])
	}
	args := startArgs("cat; echo after", "stdin", "open")
	p := c.begin(args, []byte("first "), func(p *pending) { p.bytes = make(chan int, 100) })
	<-p.bytes
	feed := func(offset int, eof bool, body string) object {
		return c.do(object{"verb": "stdin", "op_id": args["op_id"], "offset": offset, "eof": eof}, []byte(body)).values
	}
	expect(t, feed(6, false, "second"), "accepted_bytes", 12, "closed", false)
	expect(t, feed(6, false, "second"), "accepted_bytes", 12, "closed", false)
	expect(t, feed(8, false, "cond third"), "accepted_bytes", 18, "closed", false)
	c.fails(codeInvalid, object{"verb": "stdin", "op_id": args["op_id"], "offset": 99, "eof": false}, []byte("x"))
	expect(t, feed(18, true, ""), "accepted_bytes", 18, "closed", true)
	expect(t, feed(18, true, ""), "accepted_bytes", 18, "closed", true)
	c.fails(codeStdinClosed, object{"verb": "stdin", "op_id": args["op_id"], "offset": 18, "eof": false}, []byte("x"))
	if a := p.wait(); string(a.output[0]) != "first second thirdafter\n" {
		t.Errorf("output %q", a.output[0])
	}
	c.fails(codeStdinClosed, object{"verb": "stdin", "op_id": args["op_id"], "offset": 18, "eof": false}, []byte("x"))
}

func TestStdinIsBounded(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("sleep 300", "stdin", "open", "attach", nil)
	c.do(args, nil)
	total := 0
	for total < 4<<20 {
		a := c.do(object{"verb": "stdin", "op_id": args["op_id"], "offset": total, "eof": false}, make([]byte, 1<<20))
		accepted := int(a.values["accepted_bytes"].(float64))
		if accepted == total {
			break
		}
		total = accepted
	}
	if total < 1<<20 || total > 1<<20+128<<10 {
		t.Errorf("accepted %d bytes that nobody reads", total)
	}
}

func TestSpoolLimitAndGap(t *testing.T) {
	c := serve(t).dial(1)
	const total, limit = 5 << 20, 100_000
	args := startArgs(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' a; printf END", total), "spool_limit_bytes", limit, "attach", nil)
	c.do(args, nil)
	eventually(t, "it ends", func() bool {
		return c.do(object{"verb": "status", "op_id": args["op_id"]}, nil).record(t)["state"] == "finished"
	})
	for range 2 {
		a := c.do(object{"verb": "attach", "op_id": args["op_id"], "stdout_offset": 0, "stderr_offset": 0, "window_bytes": 1 << 20, "follow": true}, nil)
		expect(t, a.record(t), "stdout_bytes", total+3, "stdout_kept_bytes", limit, "spool_truncated", true)
		if len(a.output[0]) != limit+ringSize || len(a.gaps[0]) != 1 || a.gaps[0][0] != total+3-ringSize || !bytes.HasSuffix(a.output[0], []byte("aEND")) {
			t.Errorf("%d bytes, gaps %v", len(a.output[0]), a.gaps)
		}
	}
	whole := c.run("head -c 3000 /dev/zero; echo e >&2", "spool_limit_bytes", 0)
	if len(whole.output[0]) != 3000 || len(whole.gaps[0]) != 0 {
		t.Errorf("with the ring alone: %d bytes, gaps %v", len(whole.output[0]), whole.gaps)
	}
}

func TestForgetAndList(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	done, running := startArgs("true"), startArgs("sleep 300", "attach", nil)
	c.do(running, nil)
	c.do(done, nil)
	records := c.do(object{"verb": "list"}, nil).values["records"].([]any)
	if len(records) != 2 || records[0].(object)["op_id"] != running["op_id"] {
		t.Errorf("list %v", records)
	}
	c.fails(codeBusy, object{"verb": "forget", "op_id": running["op_id"]}, nil)
	c.do(object{"verb": "forget", "op_id": done["op_id"]}, nil)
	c.fails(codeOpDropped, object{"verb": "status", "op_id": done["op_id"]}, nil)
	if _, err := os.Stat(filepath.Join(s.spool, "commands", done["op_id"].(string))); !os.IsNotExist(err) {
		t.Errorf("the spool of a forgotten command: %v", err)
	}
}

func TestMaxCommands(t *testing.T) {
	c := serve(t, "--max-commands", "2").dial(1)
	for range 2 {
		c.do(startArgs("sleep 300", "attach", nil), nil)
	}
	c.fails(codeBusy, startArgs("true"), nil)
}

func TestSupervisorKilled(t *testing.T) {
	c := serve(t).dial(1)
	for _, script := range []string{"kill -9 $PPID; sleep 300", "setsid sleep 300 & (setsid sh -c 'sleep 300 & sleep 300' &); sleep 0.1; kill -9 $PPID; exec sleep 300"} {
		a := c.run(script, "timeout_s", 100)
		expect(t, a.record(t), "status", "unknown", "exit_code", nil)
		if !strings.Contains(fmt.Sprint(a.record(t)["cause"]), "supervisor") {
			t.Errorf("cause %v", a.record(t)["cause"])
		}
	}
	if left := survivors(0); len(left) > 0 {
		t.Errorf("survivors %v", left)
	}
	expect(t, c.run("exit 5").record(t), "status", "exited", "exit_code", 5)
}

func TestSupervisorStopped(t *testing.T) {
	a := serve(t).dial(1).run("kill -STOP $PPID; sleep 300", "timeout_s", 0.5, "grace_s", 0)
	expect(t, a.record(t), "status", "timed_out")
}

func TestSupervisorKilledAfterItsLeader(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("(sleep 0.5; kill -9 $PPID; sleep 300) >/dev/null 2>&1 & exit 0")
	expect(t, c.do(args, nil).record(t), "status", "exited", "exit_code", 0)
	c.run("sleep 1")
	eventually(t, "its background processes are gone", func() bool { return len(survivors(0)) == 0 })
}

func TestExecutionStartsWithoutAttach(t *testing.T) {
	c := serve(t).dial(1)
	args := startArgs("echo x; sleep 300", "attach", nil)
	a := c.do(args, nil)
	expect(t, a.record(t), "state", "running", "status", nil)
	eventually(t, "output is there", func() bool {
		a := c.do(object{"verb": "attach", "op_id": args["op_id"], "stdout_offset": 0, "stderr_offset": 0, "window_bytes": 100, "follow": false}, nil)
		return string(a.output[0]) == "x\n" && a.record(t)["state"] == "running"
	})
}

func TestRestartedRunner(t *testing.T) {
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := serveIn(t, dir)
	c := s.dial(1)
	finished, running := startArgs("echo kept; exit 9"), startArgs("echo part; sleep 300", "attach", nil)
	c.do(finished, nil)
	c.do(running, nil)
	eventually(t, "output is there", func() bool {
		return c.do(object{"verb": "status", "op_id": running["op_id"]}, nil).record(t)["stdout_bytes"] == 5.0
	})
	_ = s.process.Process.Kill()
	<-s.exited
	eventually(t, "the tree dies with its runner", func() bool { return len(survivors(0)) == 0 })
	c = serveIn(t, dir).dial(1)
	a := c.do(finished, nil)
	expect(t, a.record(t), "status", "exited", "exit_code", 9)
	if a.values["created"] != false || string(a.output[0]) != "kept\n" {
		t.Errorf("after the restart: %v %q", a.values, a.output[0])
	}
	running["attach"] = attachArgs(0, 0, 1000)
	a = c.do(running, nil)
	expect(t, a.record(t), "status", "unknown", "cause", "the runner was restarted")
	if string(a.output[0]) != "part\n" {
		t.Errorf("output %q", a.output[0])
	}
}

func TestLeaseEnds(t *testing.T) {
	s := serve(t, "--expires-in", "1000")
	c := s.dial(1)
	if c.hello["expires_in_s"].(float64) < 900 {
		t.Errorf("hello %v", c.hello)
	}
	c.do(startArgs("setsid sleep 300 & sleep 300", "attach", nil), nil)
	c.fails(codeInvalid, object{"verb": "extend", "expires_in_s": -1}, nil)
	c.do(object{"verb": "extend", "expires_in_s": 0.2}, nil)
	select {
	case <-s.exited:
	case <-time.After(patience):
		t.Fatal("the lease did not end the runner")
	}
	if code := s.process.ProcessState.ExitCode(); code != exitExpired {
		t.Errorf("exit code %d", code)
	}
	if left := survivors(5 * time.Second); len(left) > 0 {
		t.Errorf("survivors %v", left)
	}
}

func TestShutdown(t *testing.T) {
	s := serve(t)
	c := s.dial(1)
	c.do(startArgs("trap '' TERM; setsid sleep 300 & sleep 300", "attach", nil), nil)
	c.do(object{"verb": "shutdown"}, nil)
	select {
	case <-s.exited:
	case <-time.After(patience):
		t.Fatal("shutdown did not end the runner")
	}
	if code := s.process.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if left := survivors(5 * time.Second); len(left) > 0 {
		t.Errorf("survivors %v", left)
	}
}
