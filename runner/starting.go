package main

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// startRequest is the verb `start`.
type startRequest struct {
	OpID       string         `json:"op_id"`
	Digest     string         `json:"digest"`
	Argv       []text         `json:"argv"`
	Env        map[text]text  `json:"env"`
	Cwd        text           `json:"cwd"`
	TimeoutS   *float64       `json:"timeout_s"`
	GraceS     float64        `json:"grace_s"`
	SpoolLimit *int64         `json:"spool_limit_bytes"`
	Stdin      string         `json:"stdin"`
	Attach     *attachRequest `json:"attach"`
	body       []byte
	fenced     func() bool // whether a newer owner has come since
}

const (
	defaultSpoolLimit = 64 << 20
	maxSeconds        = 10 * 365 * 24 * 3600
)

func (r *startRequest) check() error {
	if err := checkOpID(r.OpID); err != nil {
		return err
	}
	if len(r.Argv) == 0 || r.Argv[0] == "" {
		return faultf(codeInvalid, "argv is empty: it names the program and its arguments")
	}
	for _, argument := range r.Argv {
		if hasNUL(string(argument)) {
			return faultf(codeInvalid, "an argument holds a NUL byte")
		}
	}
	for name, value := range r.Env {
		if name == "" || hasNUL(string(name)) || hasNUL(string(value)) || hasByte(string(name), '=') {
			return faultf(codeInvalid, "environment variable %q: a name has no '=' and is not empty, and nothing holds a NUL byte", string(name))
		}
	}
	if r.Stdin != "" && r.Stdin != "none" && r.Stdin != "open" {
		return faultf(codeInvalid, "stdin %q: it is \"none\" or \"open\"", r.Stdin)
	}
	if r.TimeoutS != nil && !(*r.TimeoutS > 0 && *r.TimeoutS <= maxSeconds) {
		return faultf(codeInvalid, "timeout_s must be positive, or null for none")
	}
	if err := checkGrace(r.GraceS); err != nil {
		return err
	}
	if r.SpoolLimit != nil && *r.SpoolLimit < 0 {
		return faultf(codeInvalid, "spool_limit_bytes must not be negative")
	}
	if r.Attach != nil {
		return r.Attach.check()
	}
	return nil
}

func checkGrace(seconds float64) error {
	if seconds >= 0 && seconds <= 3600 {
		return nil
	}
	return faultf(codeInvalid, "grace_s %v: it is between 0 and 3600", seconds)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// launchPlan is what crosses to the supervisor, with the runner's ends of the pipes.
type launchPlan struct {
	theirs []int // stdin, if any, stdout, stderr
	ours   [3]*os.File
}

func (p *launchPlan) closeTheirs() {
	for _, fd := range p.theirs {
		syscall.Close(fd)
	}
	p.theirs = nil
}

func (p *launchPlan) closeAll() {
	p.closeTheirs()
	for _, file := range p.ours {
		if file != nil {
			file.Close()
		}
	}
}

func openPipes(withStdin bool) (*launchPlan, error) {
	plan := &launchPlan{}
	first := 1
	if withStdin {
		first = 0
	}
	for i := first; i < 3; i++ {
		var ends [2]int
		if err := syscall.Pipe2(ends[:], syscall.O_CLOEXEC); err != nil {
			plan.closeAll()
			return nil, err
		}
		ours, theirs := ends[0], ends[1]
		if i == 0 {
			ours, theirs = ends[1], ends[0]
		}
		// Only our end is non-blocking: programs expect theirs to block.
		_ = syscall.SetNonblock(ours, true)
		plan.ours[i] = os.NewFile(uintptr(ours), "pipe")
		plan.theirs = append(plan.theirs, theirs)
	}
	return plan, nil
}

// launch starts the command and returns when it runs. The error says that nothing was started;
// a command that was not found is finished, not an error.
func (c *command) launch(r *startRequest, workspace string) error {
	withStdin := r.Stdin == "open" || len(r.body) > 0
	plan, err := openPipes(withStdin)
	if err != nil {
		return faultf(codeBusy, "no pipes for the command: %s (open files limit of the sandbox)", err.Error())
	}
	c.begunAt = time.Now()
	c.result.StartedAtMillis = c.begunAt.UnixMilli()
	c.lastByte.Store(c.begunAt.UnixNano())
	c.oomBefore = oomKills()
	if c.dir != "" && !c.registry.volatile {
		_ = saveStart(c.dir, c.id, c.digest, c.begunAt)
	}
	c.registry.children.refreshAllowance()
	s, err := c.hand(startMessage(r, workspace, withStdin), plan)
	plan.closeTheirs()
	if err != nil {
		plan.closeAll()
		return err
	}
	return c.confirm(s, r, plan)
}

func startMessage(r *startRequest, workspace string, withStdin bool) message {
	m := message{kind: messageStart, numbers: []int64{0}}
	if withStdin {
		m.numbers[0] = 1
	}
	m.strings = make([]string, 0, 2+len(r.Argv)+len(r.Env))
	dir := underWorkspace(workspace, string(r.Cwd))
	m.strings = append(m.strings, dir, strconv.Itoa(len(r.Argv)))
	m.strings = append(m.strings, plainStrings(r.Argv)...)
	m.strings = append(m.strings, inherited(r.Env)...)
	if _, set := r.Env["PWD"]; !set { // a shell shows it instead of where a link on the way leads to; POSIX, pwd
		m.strings = append(m.strings, "PWD="+dir)
	}
	for name, value := range r.Env {
		m.strings = append(m.strings, string(name)+"="+string(value))
	}
	return m
}

// inherited is the runner's own environment without what the command sets itself: the ENV of an image counts, as for a plain exec.
func inherited(own map[text]text) []string {
	var kept []string
	for _, pair := range os.Environ() {
		name, _, _ := strings.Cut(pair, "=")
		if _, set := own[text(name)]; !set && name != "PWD" {
			kept = append(kept, pair)
		}
	}
	return kept
}

// hand gives the command to a supervisor. One that was killed while it waited is replaced.
func (c *command) hand(m message, plan *launchPlan) (*supervisor, error) {
	for range 3 {
		s, err := c.registry.children.take()
		if err != nil {
			return nil, faultf(codeBusy, "no process for the command: %s (the sandbox's limit on processes or memory)", err.Error())
		}
		if s.send(m, plan.theirs...) == nil {
			return s, nil
		}
		s.socket.Close()
	}
	return nil, faultf(codeBusy, "the command's supervisor is killed again and again by another process of the sandbox")
}

// confirm waits for the supervisor's word.
func (c *command) confirm(s *supervisor, r *startRequest, plan *launchPlan) error {
	m, err := s.receive()
	c.registry.children.refillSoon()
	if err == nil && m.kind == messageFailed {
		plan.closeAll()
		c.registry.children.giveBack(s)
		return c.notStarted(m)
	}
	c.mu.Lock()
	c.supervisor = s
	c.pipes = [2]*os.File{plan.ours[1], plan.ours[2]}
	c.open = 2
	if err == nil && m.kind == messageStarted {
		c.result.PID = pointer(int(m.number(0)))
	}
	c.feed(r, plan.ours[0])
	if r.TimeoutS != nil {
		grace := seconds(r.GraceS)
		c.deadline = time.AfterFunc(seconds(*r.TimeoutS), func() { c.stop(grace, statusTimedOut) })
	}
	c.mu.Unlock()
	go c.pump(0, plan.ours[1])
	go c.pump(1, plan.ours[2])
	go c.follow(s)
	return nil
}

// feed connects standard input; what fits into the pipe needs no goroutine.
func (c *command) feed(r *startRequest, pipe *os.File) {
	if pipe == nil {
		return
	}
	eof := r.Stdin != "open"
	body := append([]byte(nil), r.body...)
	c.input = newStdinPipe(pipe, body, eof)
	go c.input.pump()
}

// notStarted turns a supervisor's refusal into an error, or into a finished record like a shell's.
func (c *command) notStarted(m message) error {
	if m.number(0) == 0 {
		return faultf(m.text(0), "%s", m.text(1))
	}
	c.mu.Lock()
	c.setExit(int(m.number(0)), 0)
	c.result.Cause = pointer(shorten(m.text(1), 300))
	c.finishing = true
	c.mu.Unlock()
	c.finish(0)
	return nil
}
