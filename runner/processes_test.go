package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// limited is a sandbox whose commands may have so many processes together. Only a user that is not root is limited.
func limited(t *testing.T, most int, flags ...string) *sandbox {
	t.Helper()
	return isolated(t, nil, os.Getuid() == 0, append([]string{"--max-processes", strconv.Itoa(most)}, flags...)...)
}

// nproc has the option of this shell's ulimit for RLIMIT_NPROC in $u.
const nproc = "u=-u; ulimit $u >/dev/null 2>&1 || u=-p; "

// startable says how many processes one command can start when it tries to start 200 after a preparation; then they are killed.
func startable(t *testing.T, c *channel, preparation string) int {
	t.Helper()
	args := startArgs(preparation + `i=0; while [ $i -lt 200 ]; do sleep 300 >/dev/null 2>&1 & i=$((i + 1)); echo $i; done`)
	said := strings.Fields(string(c.do(args, nil).output[0]))
	c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil)
	if len(said) == 0 {
		return 0
	}
	count, err := strconv.Atoi(said[len(said)-1])
	if err != nil {
		t.Fatalf("a command said %q", said)
	}
	return count
}

func TestManyCommandsAtOnceWithinTheProcessLimit(t *testing.T) {
	c := limited(t, 100).dial(1)
	for range 3 {
		atOnce(t, c, 60, "exec sleep 0.5")
	}
}

func TestACommandKeepsItsProcessesWhileOthersStart(t *testing.T) {
	c := limited(t, 100).dial(1)
	early := startArgs(`read x; i=0; while [ $i -lt 20 ]; do sleep 300 & i=$((i + 1)); done; echo all; kill $(jobs -p)`, "stdin", "open")
	first := c.begin(early, nil)
	var others []*pending
	for range 50 {
		others = append(others, c.begin(startArgs("echo; read x", "stdin", "open"), nil))
	}
	eventually(t, "all run", func() bool {
		running, _ := c.do(object{"verb": "stats"}, nil).values["processes"].(float64)
		return running >= 51
	})
	c.do(object{"verb": "stdin", "op_id": early["op_id"], "offset": 0, "eof": true}, []byte("go\n"))
	if a := first.wait(); string(a.output[0]) != "all\n" {
		t.Errorf("the command that began first: %q %q", a.output[0], a.output[1])
	}
	for _, p := range others {
		c.send(frameCancel, p.id, object{}, nil)
	}
}

// atOnce runs the same script several times at once, and all of them have to succeed.
func atOnce(t *testing.T, c *channel, count int, script string) {
	t.Helper()
	var all []*pending
	for range count {
		all = append(all, c.begin(startArgs(script), nil))
	}
	for n, p := range all {
		a := p.wait()
		if a.kind != frameReply {
			t.Fatalf("command %d of %d: %v", n, count, a.values)
		}
		expect(t, a.record(t), "status", "exited", "exit_code", 0)
	}
}

// The shell that starts them is one of the processes.
func TestTheProcessLimitIsTheOneAskedFor(t *testing.T) {
	c := limited(t, 40).dial(1)
	if got := startable(t, c, ""); got < 30 || got > 39 { // some fewer while a supervisor is made for the next command
		t.Errorf("a command alone could start %d processes, not 39", got)
	}
	atOnce(t, c, 30, "exec sleep 0.2")
	if got := startable(t, c, ""); got < 35 {
		t.Errorf("right after many commands one could start %d processes", got)
	}
	eventually(t, "what supervisors had is taken back", func() bool { return startable(t, c, "") == 39 })
}

func TestALimitThatACommandRaisesIsBounded(t *testing.T) {
	c := limited(t, 20, "--max-commands", "2").dial(1)
	most := 20 + int(reserveFor(20, 2))
	late := "sleep 2; " + nproc + "ulimit -S $u $(ulimit -H $u); " // when nothing changes that would put it back
	if got := startable(t, c, late); got <= 20 || got >= most {
		t.Errorf("a command that raised its limit could start %d processes, the bound is %d", got, most)
	}
	if a := c.run(nproc + "ulimit -H $u 100000 && echo raised"); len(a.output[0]) > 0 {
		t.Errorf("a command raised its hard limit")
	}
}

func TestALowerLimitOfACommandsOwnStays(t *testing.T) {
	c := limited(t, 60).dial(1)
	args := startArgs(nproc+"ulimit -S $u 50; echo; read x; ulimit -S $u", "stdin", "open")
	first := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-first.bytes
	atOnce(t, c, 10, "exec sleep 0.2")
	c.do(object{"verb": "stdin", "op_id": args["op_id"], "offset": 0, "eof": true}, []byte("go\n"))
	if got := string(first.wait().output[0]); got != "\n50\n" {
		t.Errorf("the limit became %q", got)
	}
}

func TestALimitThatACommandRaisedIsPutBack(t *testing.T) {
	c := limited(t, 60).dial(1)
	args := startArgs(nproc+"ulimit -S $u $(ulimit -H $u); ulimit -H $u; read x; ulimit -S $u", "stdin", "open")
	first := c.begin(args, nil, func(p *pending) { p.bytes = make(chan int, 100) })
	<-first.bytes
	atOnce(t, c, 10, "exec sleep 1.5")
	c.do(object{"verb": "stdin", "op_id": args["op_id"], "offset": 0, "eof": true}, []byte("go\n"))
	var raised, later int
	if _, err := fmt.Sscan(string(first.wait().output[0]), &raised, &later); err != nil || later >= raised {
		t.Errorf("the limit was raised to %d and was %d later (%v)", raised, later, err)
	}
}

func TestCommandsThatDidNotStartLeaveNoFileOpen(t *testing.T) {
	c := limited(t, 60, "--max-open-files", "40").dial(1)
	for range 60 {
		expect(t, c.do(startArgs("", "argv", []string{"no-such-program"}, "stdin", "open"), nil).record(t), "exit_code", 127)
	}
	expect(t, c.run("exit 3").record(t), "exit_code", 3)
}
