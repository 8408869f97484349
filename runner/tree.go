package main

import (
	"bytes"
	"strconv"
	"syscall"
	"time"
)

// process is what /proc/PID/stat says, as far as a process tree needs it. proc_pid_stat(5).
type process struct {
	pid, parent int
	start       uint64 // tells a process from a later one with the same pid
	stopped     bool
	dead        bool
}

// scanProcesses reads every process of the pid namespace. Plain system calls, no os.File: it
// must work with few file descriptors and without new threads while a fork bomb runs.
func scanProcesses() ([]process, error) {
	names, err := processIDs()
	if err != nil {
		return nil, err
	}
	found := make([]process, 0, len(names))
	buffer := make([]byte, 1024)
	for _, pid := range names {
		if p, ok := readProcess(pid, buffer); ok {
			found = append(found, p)
		}
	}
	return found, nil
}

func processIDs() ([]int, error) {
	dir, err := syscall.Open("/proc", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(dir)
	var pids []int
	var names []string
	buffer := make([]byte, 32<<10)
	for {
		size, err := syscall.ReadDirent(dir, buffer)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || size == 0 {
			return pids, err
		}
		_, _, names = syscall.ParseDirent(buffer[:size], -1, names[:0])
		for _, name := range names {
			if pid, err := strconv.Atoi(name); err == nil {
				pids = append(pids, pid)
			}
		}
	}
}

func readProcess(pid int, buffer []byte) (process, bool) {
	fd, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/stat", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return process{}, false
	}
	defer syscall.Close(fd)
	size, err := syscall.Read(fd, buffer)
	if err != nil {
		return process{}, false
	}
	return parseStat(pid, buffer[:size])
}

// parseStat begins after the last ')': a process can call itself anything, also "x) Z 1".
func parseStat(pid int, stat []byte) (process, bool) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return process{}, false
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < 20 {
		return process{}, false
	}
	state := fields[0][0] // fields[n] is field n+3 of the manual page
	threads := numberOf(fields[17])
	return process{
		pid: pid, parent: int(numberOf(fields[1])), start: numberOf(fields[19]),
		stopped: state == 'T' || state == 't',
		// A main thread that ended shows as a zombie while its other threads go on.
		dead: state == 'X' || state == 'Z' && threads <= 1,
	}, true
}

func numberOf(digits []byte) uint64 {
	value, _ := strconv.ParseUint(string(digits), 10, 64)
	return value
}

// descendants picks the living processes below root; skip names processes that are left
// out together with everything below them.
func descendants(all []process, root int, skip func(pid int) bool) []process {
	children := make(map[int][]process, len(all))
	for _, p := range all {
		children[p.parent] = append(children[p.parent], p)
	}
	var found []process
	queue := []int{root}
	for len(queue) > 0 {
		parent := queue[0]
		queue = queue[1:]
		for _, child := range children[parent] {
			if skip != nil && skip(child.pid) {
				continue
			}
			queue = append(queue, child.pid)
			if !child.dead {
				found = append(found, child)
			}
		}
		delete(children, parent)
	}
	return found
}

// signalProcess signals that very process, not one that got its pid meanwhile:
// pidfd_open(2), then compare the start time, then pidfd_send_signal(2).
func signalProcess(p process, signal syscall.Signal) bool {
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(p.pid), 0, 0)
	if errno == syscall.ENOSYS || errno == syscall.EPERM || errno == syscall.EMFILE || errno == syscall.ENFILE {
		return syscall.Kill(p.pid, signal) == nil // an old kernel or a strict seccomp filter
	}
	if errno != 0 {
		return false
	}
	defer syscall.Close(int(fd))
	var buffer [1024]byte
	now, alive := readProcess(p.pid, buffer[:])
	if !alive || now.start != p.start {
		return false
	}
	_, _, errno = syscall.Syscall6(sysPidfdSendSignal, fd, uintptr(signal), 0, 0, 0, 0)
	return errno == 0 || (errno == syscall.ENOSYS && syscall.Kill(p.pid, signal) == nil)
}

// slayer kills a set of processes that may go on forking while it works.
type slayer struct {
	find   func() []process // the living members now
	gone   <-chan struct{}  // closed when it is certain that none is left; may be nil
	killed map[processKey]bool
}

type processKey struct {
	pid   int
	start uint64
}

func newSlayer(find func() []process, gone <-chan struct{}) *slayer {
	return &slayer{find: find, gone: gone, killed: map[processKey]bool{}}
}

func (s *slayer) signal(p process, signal syscall.Signal) {
	if signalProcess(p, signal) {
		s.killed[processKey{p.pid, p.start}] = true
	}
}

// terminate asks politely. A stopped process can only react when it is continued.
func (s *slayer) terminate() {
	for _, p := range s.find() {
		s.signal(p, syscall.SIGTERM)
		if p.stopped {
			signalProcess(p, syscall.SIGCONT)
		}
	}
}

// destroy stops everything first, so that no fork can outrun the kills, and kills then;
// again until nothing is left. It gives the number of processes that survived the limit.
func (s *slayer) destroy(limit time.Duration) int {
	deadline := time.Now().Add(limit)
	clean := 0
	for {
		s.stopAll(deadline)
		left := s.find()
		for _, p := range left {
			s.signal(p, syscall.SIGKILL)
		}
		if len(left) == 0 {
			clean++
		} else {
			clean = 0
		}
		// One scan of /proc is not atomic and can miss a process whose parent just died.
		if s.isGone() || s.gone == nil && clean >= 2 {
			return 0
		}
		if time.Now().After(deadline) {
			return len(left)
		}
		s.pause(2 * time.Millisecond)
	}
}

func (s *slayer) stopAll(deadline time.Time) {
	for time.Now().Before(deadline) && !s.isGone() {
		running := 0
		for _, p := range s.find() {
			if !p.stopped {
				running++
				s.signal(p, syscall.SIGSTOP)
			}
		}
		if running == 0 {
			return
		}
	}
}

func (s *slayer) isGone() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

func (s *slayer) pause(d time.Duration) {
	select {
	case <-s.gone:
	case <-time.After(d):
	}
}
