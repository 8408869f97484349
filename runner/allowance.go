package main

import (
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// The kernel counts all processes and threads of a user together, so RLIMIT_NPROC of a command is what commands may have plus what
// the runner and its supervisors have (its allowance). That changes whenever a supervisor starts or ends, for commands that run
// already too: their soft limit follows, below a hard limit that has room for the supervisors of as many commands as there can be.
// A process may change the limits of another one of its user without any privilege while the hard one does not grow; prlimit(2).

const (
	serveReserve = 2*serveThreads + 16 // more threads than serve ever has
	settleDelay  = time.Second         // so long commands may have what an ended supervisor leaves
	trackDelay   = 3 * time.Millisecond
	mostPasses   = 5 // a process that is forked during one is found by the next
)

// reserveFor is the most that the runner can need: a command has at least one process, so there are never more of them than those.
func reserveFor(mostProcesses uint64, mostCommands int) uint64 {
	return serveReserve + supervisorThreads*(min(uint64(mostCommands), mostProcesses)+mostIdle+1)
}

// sharedNumber is in memory that serve shares with its supervisors: they read the allowance at the very moment of a fork.
type sharedNumber struct {
	*atomic.Uint64
	file *os.File
}

func newSharedNumber() (*sharedNumber, error) {
	fd, err := memoryFile()
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "allowance")
	if err := file.Truncate(8); err != nil {
		return nil, err
	}
	number, err := mapNumber(fd, syscall.PROT_READ|syscall.PROT_WRITE)
	return &sharedNumber{number, file}, err
}

func mapNumber(fd, protection int) (*atomic.Uint64, error) {
	memory, err := syscall.Mmap(fd, 0, 8, protection, syscall.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return (*atomic.Uint64)(unsafe.Pointer(&memory[0])), nil
}

// ownThreads counts the runner's threads and those of its supervisors; c.mu is held. A supervisor that a command waits for counts
// as complete from its start.
func (c *children) ownThreads() uint64 {
	own := threadsOf(os.Getpid())
	for pid, s := range c.supervisors {
		threads := threadsOf(pid)
		if s.urgent {
			threads = max(threads, supervisorThreads)
		}
		own += threads
	}
	return own
}

// allow gives room for what has grown and for so many threads more; where there is none, then for some to spare. c.mu is held.
func (c *children) allow(more, spare uint64) {
	if c.most == 0 {
		return
	}
	if needed := min(c.most+c.ownThreads()+more, c.hard); needed > c.allowance.Load() {
		limit := min(needed+spare, c.hard)
		c.allowance.Store(limit) // first: a leader that is forked from now on has it
		c.spread(limit)
	}
}

// track follows the threads of a supervisor that is started for later: commands shall not have what it does not need yet.
func (c *children) track(s *supervisor, steps int) {
	time.AfterFunc(trackDelay, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.allow(0, 0)
		if steps > 0 && c.supervisors[s.pid] == s && threadsOf(s.pid) < supervisorThreads {
			c.track(s, steps-1)
		}
	})
}

// refreshAllowance is for a command that is about to start.
func (c *children) refreshAllowance() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.allow(0, 0)
}

// settleSoon takes back what is no longer needed; c.mu is held.
func (c *children) settleSoon() {
	if c.settling || c.most == 0 {
		return
	}
	c.settling = true
	time.AfterFunc(settleDelay, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.settling = false
		limit := min(c.most+c.ownThreads(), c.hard)
		c.allowance.Store(limit)
		c.spread(limit)
	})
}

// spread gives the processes of all commands their new soft limit; c.mu is held, so no supervisor starts meanwhile.
func (c *children) spread(limit uint64) {
	if len(c.supervisors) == len(c.idle) {
		return // there is no command
	}
	for range mostPasses {
		changed := false
		for _, pid := range c.commandProcesses() {
			changed = c.follow(pid, limit) || changed
		}
		if !changed {
			return
		}
	}
}

func (c *children) commandProcesses() []int {
	all, err := scanProcesses()
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range descendants(all, os.Getpid(), func(int) bool { return false }) {
		if c.supervisors[p.pid] == nil {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// follow leaves a process alone that has lowered its own limit to less than commands may have.
func (c *children) follow(pid int, limit uint64) (changed bool) {
	now, err := limitsOf(pid, rlimitNproc, nil)
	limit = min(limit, now.Max)
	if err != nil || now.Max > c.hard || now.Cur < c.most || now.Cur == limit {
		return false
	}
	_, err = limitsOf(pid, rlimitNproc, &syscall.Rlimit{Cur: limit, Max: now.Max})
	return err == nil
}

// fork starts the leader with its allowance as soft limit. The supervisor takes it for the moment of the fork, so that the
// leader is born with it; then the hard limit is lowered from outside. (Code that raises its soft limit in the microseconds
// between finds the supervisor's own hard limit.)
func (l *processLimits) fork(path string, argv, env []string, files []uintptr) (int, error) {
	if l.hard == 0 {
		return forkLeader(path, argv, env, files)
	}
	for {
		soft := l.allowance.Load()
		_ = setSoftLimit(rlimitNproc, soft)
		pid, err := forkLeader(path, argv, env, files)
		_ = setSoftLimit(rlimitNproc, l.own)
		if err == nil {
			l.keep(pid, soft)
			return pid, nil
		}
		if err != syscall.EAGAIN || l.allowance.Load() <= soft { // else another supervisor has come since
			return 0, err
		}
	}
}

// keep sets the limits of a new leader, which has begun to work and may have lowered its own. Whoever changes the allowance looks
// for processes afterwards, so either that finds this one, or the change is seen here.
func (l *processLimits) keep(pid int, soft uint64) {
	born := soft
	for {
		had, err := limitsOf(pid, rlimitNproc, nil)
		if err != nil {
			return
		}
		limits := syscall.Rlimit{Cur: min(soft, l.hard), Max: min(had.Max, l.hard)}
		if had.Cur < born {
			limits.Cur = had.Cur
		}
		limits.Cur = min(limits.Cur, limits.Max)
		_, _ = limitsOf(pid, rlimitNproc, &limits)
		now := l.allowance.Load()
		if now == soft {
			return
		}
		soft = now
	}
}

// processLimits are a supervisor's: its own, and the hard limit and the allowance of its commands. hard 0: there are none.
type processLimits struct {
	own, hard uint64
	allowance *atomic.Uint64
}

// newProcessLimits is for a supervisor, which may have some more than its commands: they must not be able to use up what it needs.
func newProcessLimits(hard uint64) (*processLimits, error) {
	if hard == 0 {
		return &processLimits{}, nil
	}
	defer syscall.Close(supervisorAllowance)
	allowance, err := mapNumber(supervisorAllowance, syscall.PROT_READ)
	if err != nil {
		return nil, err
	}
	own, err := lowerLimit(rlimitNproc, hard+serveReserve)
	return &processLimits{own: own, hard: min(hard, own), allowance: allowance}, err
}
