package main

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	quietAfterExit = 200 * time.Millisecond // without a byte, then a command counts as finished
	latestAfterEnd = 2 * time.Second        // also with a background child that writes on and on
	killPatience   = destroyLimit + 2*time.Second
	signalPatience = 5 * time.Second
	countPatience  = 2 * time.Second
)

// command is one started command, from start to forget.
type command struct {
	id, digest string
	dir        string // "" if the spool had no room for one
	registry   *registry
	streams    [2]*stream
	started    chan struct{} // closed when it runs or could not be started
	finished   chan struct{}
	lastByte   atomic.Int64 // UnixNano
	draining   atomic.Bool

	mu         sync.Mutex
	startErr   error
	supervisor *supervisor // nil when it has ended
	input      *stdinPipe
	pipes      [2]*os.File
	watchers   map[*attachment]struct{}
	open       int // pipes not yet at end of file
	leaderDone bool
	leaderAt   time.Time
	quiet      bool
	othersLive bool
	consulted  bool // the supervisor was asked something
	finishing  bool
	stopAs     string // killed or timed_out, once a kill began
	deadline   *time.Timer
	kill       *killRun
	oomBefore  int64
	begunAt    time.Time
	counts     chan int64 // answers to count and signal requests
	asking     sync.Mutex
	result     record
}

func newCommand(r *registry, id, digest string) *command {
	return &command{id: id, digest: digest, registry: r, started: make(chan struct{}), finished: make(chan struct{}),
		watchers: map[*attachment]struct{}{}, counts: make(chan int64, 1),
		result: record{OpID: id, State: "running"}}
}

func (c *command) isFinished() bool {
	select {
	case <-c.finished:
		return true
	default:
		return false
	}
}

func (c *command) watch(a *attachment) {
	c.mu.Lock()
	c.watchers[a] = struct{}{}
	c.mu.Unlock()
}

func (c *command) unwatch(a *attachment) {
	c.mu.Lock()
	delete(c.watchers, a)
	c.mu.Unlock()
}

func (c *command) notify() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for a := range c.watchers {
		a.wake()
	}
}

// record gives the state now.
func (c *command) record() record {
	c.mu.Lock()
	r := c.result
	if r.State == "running" {
		r.DurationSeconds = time.Since(c.begunAt).Seconds()
	}
	c.mu.Unlock()
	if r.State == "running" {
		c.measure(&r)
	}
	return r
}

func (c *command) measure(r *record) {
	var cut [2]bool
	r.StdoutBytes, r.StdoutKept, cut[0] = c.streams[0].totals()
	r.StderrBytes, r.StderrKept, cut[1] = c.streams[1].totals()
	r.SpoolTruncated = cut[0] || cut[1]
}

// pump moves one pipe into its stream. No buffer is held while nothing can be read.
func (c *command) pump(which int, pipe *os.File) {
	defer c.pipeEnded(pipe)
	raw, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	for ended := false; !ended; {
		err := raw.Read(func(fd uintptr) bool {
			var done bool
			done, ended = c.readPipe(which, int(fd))
			return done
		})
		if err != nil {
			return
		}
	}
}

// readPipe reads once; done is false if the pipe is empty now.
func (c *command) readPipe(which, fd int) (done, ended bool) {
	buffer := chunks.Get().(*[]byte)
	defer chunks.Put(buffer)
	n, err := syscall.Read(fd, *buffer)
	switch {
	case err == syscall.EAGAIN:
		return false, false
	case err == syscall.EINTR:
		return true, false
	case err != nil || n == 0:
		return true, true
	case c.draining.Load():
		return true, false
	}
	c.lastByte.Store(time.Now().UnixNano())
	release := c.registry.disk.enter()
	c.streams[which].append((*buffer)[:n])
	release()
	c.notify()
	return true, false
}

var chunks = sync.Pool{New: func() any { b := make([]byte, maxOutputBytes); return &b }}

func (c *command) pipeEnded(pipe *os.File) {
	pipe.Close()
	c.mu.Lock()
	c.open--
	c.mu.Unlock()
	c.advance()
}

// follow reads the supervisor's reports until it is done or dead.
func (c *command) follow(s *supervisor) {
	for {
		m, err := s.receive()
		if err != nil {
			s.socket.Close()
			c.supervisorDied(s)
			return
		}
		switch m.kind {
		case messageExited:
			c.leaderExited(m)
		case messageKilled:
			c.treeKilled(int(m.number(0)), int(m.number(1)))
		case messageCounted, messageSignaled:
			select {
			case c.counts <- m.number(0):
			default:
			}
		case messageDone:
			c.supervisorDone(s)
			return
		}
	}
}

// supervisorDone is the normal end: the tree is empty.
func (c *command) supervisorDone(s *supervisor) {
	c.mu.Lock()
	c.supervisor = nil
	c.othersLive = false
	// An answer may be under way to whoever asked it something; the next command must not get it.
	reusable := c.leaderDone && !c.consulted
	c.endKill()
	c.mu.Unlock()
	close(c.counts)
	if reusable && s.send(message{kind: messageRelease}) == nil {
		c.registry.children.giveBack(s)
	} else {
		s.socket.Close()
	}
	c.advance()
}

func (c *command) leaderExited(m message) {
	c.mu.Lock()
	c.setExit(int(m.number(0)), syscall.Signal(m.number(1)))
	c.othersLive = m.number(2) != 0
	c.mu.Unlock()
	c.advance()
}

// setExit notes how the leader ended; c.mu is held.
func (c *command) setExit(code int, signal syscall.Signal) {
	c.leaderDone = true
	c.leaderAt = time.Now()
	if c.deadline != nil {
		c.deadline.Stop()
	}
	if signal != 0 {
		c.result.Signal = pointer(signalName(signal))
		c.result.Status = pointer(statusSignaled)
	} else {
		c.result.ExitCode = pointer(code)
		c.result.Status = pointer(statusExited)
	}
}

// supervisorDied: hostile code killed it. Its tree is ours then, and nobody knows how the
// command would have ended.
func (c *command) supervisorDied(s *supervisor) {
	<-s.reaped // before that its orphans may not have been given to us yet
	killed, left := c.registry.children.sweep()
	c.mu.Lock()
	c.supervisor = nil
	c.othersLive = false
	c.result.Killed += killed
	if !c.leaderDone {
		c.leaderDone, c.leaderAt = true, time.Now()
		c.result.Status = pointer(statusUnknown)
		c.result.Cause = pointer("the command's supervisor was killed, so its end is not known; its processes were killed")
	}
	if left > 0 {
		c.result.Cause = pointer(notAllKilled)
	}
	c.endKill()
	c.mu.Unlock()
	close(c.counts)
	c.advance()
}

const notAllKilled = "some processes of the command could not be killed within 5 s"

// advance finishes the command when everything for it is there.
func (c *command) advance() {
	c.mu.Lock()
	if c.finishing || !c.leaderDone || c.kill != nil {
		c.mu.Unlock()
		return
	}
	if c.open > 0 && !c.quiet {
		time.AfterFunc(quietAfterExit, c.checkQuiet)
		c.mu.Unlock()
		return
	}
	c.finishing = true
	ask := c.othersLive
	c.mu.Unlock()
	background := 0
	if ask {
		background = int(c.ask(message{kind: messageCount}, countPatience, 1)) // at least one lived just now
	}
	c.finish(background)
}

func (c *command) checkQuiet() {
	c.mu.Lock()
	since := time.Since(c.leaderAt)
	calm := min(since, time.Since(time.Unix(0, c.lastByte.Load())))
	waiting := 0
	for _, pipe := range c.pipes {
		waiting += pipeBytes(pipe)
	}
	// What is still in a pipe was written; on a busy machine reading it may just be late.
	c.quiet = since >= latestAfterEnd || calm >= quietAfterExit && waiting == 0
	c.mu.Unlock()
	c.advance()
}

func pipeBytes(pipe *os.File) int {
	if pipe == nil {
		return 0
	}
	raw, err := pipe.SyscallConn()
	if err != nil {
		return 0
	}
	count := 0
	_ = raw.Control(func(fd uintptr) { count = bytesReadable(fd) })
	return count
}

// finish writes the record, last of all, and tells everybody.
func (c *command) finish(background int) {
	c.draining.Store(true)
	for _, s := range c.streams {
		s.end()
	}
	c.mu.Lock()
	if c.deadline != nil {
		c.deadline.Stop()
	}
	c.judge()
	c.measure(&c.result)
	c.result.DurationSeconds = c.leaderAt.Sub(c.begunAt).Seconds()
	c.result.Background = background
	c.result.State = "finished"
	stdin := c.input
	c.mu.Unlock()
	if stdin != nil {
		stdin.close()
	}
	c.save()
	close(c.finished)
	c.notify()
	c.registry.retire(c)
}

// judge settles the status; c.mu is held.
func (c *command) judge() {
	r := &c.result
	r.OOMKills = max(0, oomKills()-c.oomBefore)
	dead := r.Signal != nil && *r.Signal == "KILL" || r.ExitCode != nil && *r.ExitCode == 128+int(syscall.SIGKILL)
	switch {
	case c.stopAs != "":
		r.Status = pointer(c.stopAs)
		if r.Cause == nil {
			r.Cause = pointer(c.whyStopped())
		}
	case dead && r.OOMKills > 0:
		r.Status = pointer(statusOutOfMemory)
		r.Cause = pointer("the kernel killed a process of the command because the sandbox's memory limit was reached" + c.filesInMemory())
	}
	if *r.Status != statusExited {
		r.ExitCode = nil
	}
}

// filesInMemory says what of the memory is files: the command may have used little itself, and they stay.
func (c *command) filesInMemory() string {
	size := memoryFiles(c.registry.workspace)
	if size < 1<<20 {
		return ""
	}
	return fmt.Sprintf("; %d MiB of it are files, because this sandbox's disk is memory: remove some, or ask for more memory", size>>20)
}

// whyStopped says for a person how a kill ended the command; c.mu is held.
func (c *command) whyStopped() string {
	if c.stopAs == statusTimedOut {
		return fmt.Sprintf("its time-out had passed after %.1f s; its whole process tree was ended", c.leaderAt.Sub(c.begunAt).Seconds())
	}
	return "it was killed on request, with its whole process tree"
}

func (c *command) save() {
	if c.dir == "" || c.registry.volatile {
		return
	}
	release := c.registry.disk.enter()
	defer release()
	_ = saveRecord(c.dir, c.digest, c.recordCopy()) // on a full disk it is in memory still
}

func (c *command) recordCopy() record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.result
}
