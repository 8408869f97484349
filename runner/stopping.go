package main

import (
	"syscall"
	"time"
)

// killRun is one kill of the tree, which several clients may wait for.
type killRun struct {
	done chan struct{}
}

func (c *command) treeKilled(killed, left int) {
	c.mu.Lock()
	c.result.Killed += killed
	c.othersLive = left > 0
	if left > 0 && !c.leaderDone {
		c.leaderDone, c.leaderAt = true, time.Now()
		c.result.Status = pointer(statusUnknown)
	}
	if left > 0 {
		c.result.Cause = pointer(notAllKilled)
	}
	saved := c.result.State == "finished"
	if saved {
		c.result.Background = left
	}
	c.endKill()
	c.mu.Unlock()
	if saved {
		c.save()
		return
	}
	c.advance()
}

// stop kills the tree: TERM, grace, KILL. It returns at once; the channel closes when it is done.
func (c *command) stop(grace time.Duration, as string) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.supervisor
	if s == nil {
		none := make(chan struct{})
		close(none)
		return none
	}
	c.consulted = true
	if c.kill == nil {
		c.kill = &killRun{done: make(chan struct{})}
	}
	if !c.leaderDone && c.stopAs == "" {
		c.stopAs = as
	}
	run := c.kill
	go c.enforce(s, run, grace)
	return run.done
}

// enforce asks the supervisor, and replaces it if it does not answer.
func (c *command) enforce(s *supervisor, run *killRun, grace time.Duration) {
	_ = syscall.Kill(s.pid, syscall.SIGCONT)
	if s.send(message{kind: messageKill, numbers: []int64{grace.Milliseconds()}}) != nil {
		return // it has ended; supervisorEnded follows
	}
	patience := time.NewTimer(grace + killPatience)
	defer patience.Stop()
	select {
	case <-run.done:
	case <-s.reaped:
	case <-patience.C:
		_ = syscall.Kill(s.pid, syscall.SIGKILL)
	}
}

// ask sends a request that is answered by one number; otherwise is for no answer in time.
func (c *command) ask(m message, patience time.Duration, otherwise int64) int64 {
	c.asking.Lock()
	defer c.asking.Unlock()
	c.mu.Lock()
	s := c.supervisor
	c.consulted = c.consulted || s != nil
	c.mu.Unlock()
	if s == nil {
		return 0
	}
	select {
	case <-c.counts: // an answer that came too late for an earlier question
	default:
	}
	if s.send(m) != nil {
		return 0
	}
	select {
	case count := <-c.counts:
		return count
	case <-time.After(patience):
		return otherwise
	}
}

// endKill wakes those who wait for a kill; c.mu is held.
func (c *command) endKill() {
	if c.kill != nil {
		close(c.kill.done)
		c.kill = nil
	}
}
