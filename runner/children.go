package main

import (
	"errors"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// selfExecutable still names this program when its file has been deleted or replaced.
const selfExecutable = "/proc/self/exe"

const (
	mostIdle     = 4
	idleFor      = 10 * time.Second
	refillDelay  = 10 * time.Millisecond
	respawnDelay = 50 * time.Millisecond
)

// supervisor is serve's side of one `runner supervise` process.
type supervisor struct {
	pid    int
	socket *net.UnixConn
	reaped chan struct{} // closed when wait4 returned it: its orphans are ours by then
	urgent bool          // a command waits for it
	sends  sync.Mutex
}

// children owns every child process of serve: the supervisors, and what is orphaned to it.
type children struct {
	mu          sync.Mutex // held from fork until registered, and from wait4 until looked up
	supervisors map[int]*supervisor
	idle        []*supervisor // warm: started, or done with a command that left nothing
	closed      bool
	flags       []string
	most        uint64 // processes that commands may have together, 0 for any number
	hard        uint64 // the kernel's count of processes and threads that no command gets beyond, whatever it does
	allowance   *sharedNumber
	settling    bool // settleSoon was called
	sweeping    sync.Mutex
}

func newChildren(maxProcesses, maxOpenFiles uint64, maxCommands int) (*children, error) {
	c := &children{supervisors: map[int]*supervisor{}, most: maxProcesses}
	if c.most > 0 {
		var err error
		if c.allowance, err = newSharedNumber(); err != nil {
			return nil, err
		}
		c.hard = c.most + reserveFor(c.most, maxCommands)
	}
	c.flags = []string{"runner", "supervise", "-hard-process-limit", strconv.FormatUint(c.hard, 10),
		"-max-open-files", strconv.FormatUint(maxOpenFiles, 10)}
	arrivals := make(chan os.Signal, 1)
	signal.Notify(arrivals, syscall.SIGCHLD)
	go func() {
		for range arrivals {
			c.reap()
		}
	}()
	return c, nil
}

// reap is the only wait4 in serve. It also sees supervisors that hostile code has stopped.
func (c *children) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG|syscall.WUNTRACED|waitAll, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		known := c.supervisors[pid]
		switch {
		case known == nil:
		case status.Stopped():
			if !c.closed { // else we did it
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
		default:
			c.bury(known)
		}
	}
}

func (c *children) bury(s *supervisor) {
	delete(c.supervisors, s.pid)
	close(s.reaped)
	c.settleSoon()
	for i, other := range c.idle {
		if other == s {
			c.idle = append(c.idle[:i:i], c.idle[i+1:]...)
			s.socket.Close()
			time.AfterFunc(respawnDelay, c.refill) // not at once: hostile code may kill in a loop
			return
		}
	}
}

// spawn starts a supervisor; c.mu is held.
func (c *children) spawn(urgent bool) (*supervisor, error) {
	if urgent {
		c.allow(supervisorThreads, supervisorThreads*uint64(len(c.supervisors)/4)) // in a burst not for each one
	}
	c.settleSoon()
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(ends[1])
	_ = syscall.SetNonblock(ends[0], true)
	file := os.NewFile(uintptr(ends[0]), "supervisor")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	null, err := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer syscall.Close(null)
	files := []uintptr{uintptr(null), uintptr(null), 2, uintptr(ends[1])}
	if c.most > 0 {
		files = append(files, c.allowance.file.Fd())
	}
	pid, err := syscall.ForkExec(selfExecutable, c.flags, &syscall.ProcAttr{
		Env:   []string{"GOMAXPROCS=1"}, // few threads, because commands pay for them; a supervisor mostly waits in the kernel
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	s := &supervisor{pid: pid, socket: conn.(*net.UnixConn), reaped: make(chan struct{}), urgent: urgent}
	c.supervisors[pid] = s
	return s, nil
}

// take gives the warm supervisor, or a fresh one.
func (c *children) take() (*supervisor, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("the runner is shutting down")
	}
	if last := len(c.idle) - 1; last >= 0 {
		s := c.idle[last]
		c.idle = c.idle[:last]
		return s, nil
	}
	return c.spawn(true)
}

// refillSoon has a supervisor ready for the next command. Not at once: a short command gives its
// own back first, and starting another one would only slow it down.
func (c *children) refillSoon() { time.AfterFunc(refillDelay, c.refill) }

func (c *children) refill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.idle) > 0 || c.closed {
		return
	}
	warm, err := c.spawn(false)
	if err != nil { // no processes left now; later there may be
		time.AfterFunc(time.Second, c.refill)
		return
	}
	c.idle = append(c.idle, warm)
	c.track(warm, 100)
}

// giveBack keeps a supervisor that has no command for the next one, or lets it end.
func (c *children) giveBack(s *supervisor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.idle) >= mostIdle || c.supervisors[s.pid] != s {
		s.socket.Close() // it ends when its socket does
		return
	}
	c.idle = append(c.idle, s)
	if len(c.idle) > 1 {
		time.AfterFunc(idleFor, c.trim)
	}
}

// trim lets go of what only a burst of commands needed.
func (c *children) trim() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if last := len(c.idle) - 1; last >= 1 {
		c.idle[last].socket.Close()
		c.idle = c.idle[:last]
	}
}

func (c *children) isSupervisor(pid int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.supervisors[pid] != nil
}

// orphans are processes below serve that belong to no living supervisor.
func (c *children) orphans() []process {
	all, err := scanProcesses()
	if err != nil {
		return nil
	}
	return descendants(all, os.Getpid(), c.isSupervisor)
}

// sweep kills what a dead supervisor left behind and gives how many it killed and how many survived.
func (c *children) sweep() (killed, left int) {
	c.sweeping.Lock()
	defer c.sweeping.Unlock()
	hunt := newSlayer(c.orphans, nil)
	left = hunt.destroy(destroyLimit)
	return len(hunt.killed), left
}

// killEverything is the end of the sandbox: all descendants, the supervisors too.
func (c *children) killEverything() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	hunt := newSlayer(func() []process {
		all, _ := scanProcesses()
		return descendants(all, os.Getpid(), nil)
	}, nil)
	hunt.destroy(destroyLimit)
}

// send passes a request to a supervisor, with file descriptors if there are any.
func (s *supervisor) send(m message, files ...int) error {
	s.sends.Lock()
	defer s.sends.Unlock()
	raw := m.encode()
	if len(files) > 0 {
		size, _, err := s.socket.WriteMsgUnix(raw, syscall.UnixRights(files...), nil)
		if err != nil {
			return err
		}
		raw = raw[size:]
	}
	if len(raw) == 0 {
		return nil
	}
	_, err := s.socket.Write(raw)
	return err
}

// receive reads one report. A supervisor is trusted little: what it sends is bounded.
func (s *supervisor) receive() (message, error) { return readMessage(s.socket, 16<<10) }
