package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	supervisorSocket    = 3 // where serve puts the socket pair,
	supervisorAllowance = 4 // and what is shared; only where there is a process limit
	supervisorThreads   = 8 // three prewarmed ones, and what the Go runtime has anyway; seldom it makes one more
	destroyLimit        = 5 * time.Second
	leaderOOMScore      = "1000" // a command is to be the kernel's victim and not the runner, which has up to 999 in a Pod
)

// supervision is one command: its process tree, from the start until nothing of it lives.
type supervision struct {
	leader int
	empty  chan struct{} // closed when no descendant is left
	next   chan bool     // obey has ended: whether there may be another command
	kills  sync.Mutex    // held while a tree kill runs
	sends  sync.Mutex
	hurry  struct { // a second kill request can only shorten the grace
		sync.Mutex
		running  bool
		deadline time.Time
		changed  chan struct{}
	}
}

// superviseMain waits, warm, for a command, runs it until its tree is gone, and waits for the next.
func superviseMain(args []string) int {
	flags := flag.NewFlagSet("supervise", flag.ContinueOnError)
	hardLimit := flags.Uint64("hard-process-limit", 0, "")
	maxOpenFiles := flags.Uint64("max-open-files", 0, "")
	if flags.Parse(args) != nil {
		return 2
	}
	debug.SetGCPercent(50)
	prepareSupervisor(*maxOpenFiles)
	limits, err := newProcessLimits(*hardLimit)
	if err != nil {
		return complain("supervise: process limits: %s", err)
	}
	buffer := make([]byte, 64<<10)
	for supervise(buffer, limits) {
	}
	return 0
}

// supervise runs one command until its whole tree is gone. Only a supervisor whose tree ended by
// itself is used again: nothing of that command is left then, which wait4(2) has proved.
func supervise(buffer []byte, limits *processLimits) (again bool) {
	start, files, err := receiveStart(buffer)
	if err != nil {
		return false // serve has gone or no longer needs us
	}
	s := &supervision{empty: make(chan struct{}), next: make(chan bool, 1)}
	s.hurry.changed = make(chan struct{}, 1)
	if failure := s.start(start, files, limits); failure != nil {
		s.send(*failure)
		return true
	}
	go s.obey()
	s.reap()
	s.kills.Lock() // a kill that runs reports first
	s.kills.Unlock()
	s.send(message{kind: messageDone})
	return <-s.next
}

func prepareSupervisor(maxOpenFiles uint64) {
	syscall.CloseOnExec(supervisorSocket) // the command must not speak for its supervisor
	_ = becomeSubreaper()
	// A polite "kill $PPID" from the command must not end its supervisor. The handlers are
	// gone in the command: execve(2) sets caught signals to their default.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGPIPE, syscall.SIGVTALRM, syscall.SIGXCPU, syscall.SIGTSTP)
	syscall.Umask(0o022)
	prewarmThreads(3)
	_, _ = lowerLimit(rlimitCore, 0)
	if maxOpenFiles > 0 {
		_, _ = lowerLimit(syscall.RLIMIT_NOFILE, maxOpenFiles)
	}
}

// receiveStart blocks until serve hands over the command and its pipes. recvmsg(2), unix(7) SCM_RIGHTS.
func receiveStart(buffer []byte) (message, []int, error) {
	rights := make([]byte, syscall.CmsgSpace(3*4))
	size, rightsSize, err := 0, 0, error(syscall.EINTR)
	for err == syscall.EINTR {
		size, rightsSize, _, _, err = syscall.Recvmsg(supervisorSocket, buffer, rights, syscall.MSG_CMSG_CLOEXEC)
	}
	if err != nil || size == 0 {
		return message{}, nil, io.EOF
	}
	files, err := receivedFiles(rights[:rightsSize])
	if err != nil {
		return message{}, nil, err
	}
	for size < 4 || size < 4+int(binary.BigEndian.Uint32(buffer)) {
		more := make([]byte, 256<<10)
		count, err := syscall.Read(supervisorSocket, more)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || count == 0 {
			return message{}, nil, io.EOF
		}
		buffer = append(buffer[:size], more[:count]...)
		size += count
	}
	start, err := decodeMessage(buffer[4 : 4+int(binary.BigEndian.Uint32(buffer))])
	return start, files, err
}

func receivedFiles(rights []byte) ([]int, error) {
	controls, err := syscall.ParseSocketControlMessage(rights)
	if err != nil || len(controls) != 1 {
		return nil, errBadMessage
	}
	return syscall.ParseUnixRights(&controls[0])
}

// start runs the leader; a failure is what serve has to be told instead.
func (s *supervision) start(start message, files []int, limits *processLimits) *message {
	defer closeDescriptors(files) // end of file comes when the command's copies are closed
	count, err := strconv.Atoi(start.text(1))
	if err != nil || count < 1 || 2+count > len(start.strings) || len(files) < 2+int(start.number(0)) {
		return failed(0, codeInternal, "the supervisor got a malformed command")
	}
	dir, argv, env := start.strings[0], start.strings[2:2+count], start.strings[2+count:]
	if start.number(0) != 1 {
		null, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return failed(0, codeInternal, "/dev/null: "+err.Error())
		}
		defer syscall.Close(null)
		files = append([]int{null}, files...)
	}
	if err := os.Chdir(dir); err != nil {
		return failed(0, codeInvalid, fmt.Sprintf("cwd %q: %s; make the directory first", dir, reason(err)))
	}
	path, code := findExecutable(argv[0], env)
	if code != 0 {
		return failed(int64(code), "", notRunnable(argv[0], code))
	}
	s.leader, err = limits.fork(path, argv, env, []uintptr{uintptr(files[0]), uintptr(files[1]), uintptr(files[2])})
	if err != nil {
		return startFailure(argv[0], err)
	}
	s.send(message{kind: messageStarted, numbers: []int64{int64(s.leader)}})
	raiseOOMScore(s.leader)
	return nil
}

func closeDescriptors(files []int) {
	for _, fd := range files {
		syscall.Close(fd)
	}
}

func forkLeader(path string, argv, env []string, files []uintptr) (int, error) {
	attributes := &syscall.ProcAttr{Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	pid, err := syscall.ForkExec(path, argv, attributes)
	if err == syscall.ENOEXEC { // a script without #!: execvp(3) and every shell run it with sh
		pid, err = syscall.ForkExec("/bin/sh", append([]string{"sh", path}, argv[1:]...), attributes)
	}
	return pid, err
}

func startFailure(name string, err error) *message {
	switch err {
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE:
		return failed(0, codeBusy, "nothing was started: "+err.Error()+" (the sandbox's limit on processes, memory or open files is reached); wait for commands to end or kill some")
	case syscall.ENOENT: // the file is there, its interpreter is not
		return failed(127, "", shorten(name, 200)+": its interpreter does not exist")
	}
	return failed(126, "", shorten(name, 200)+": "+err.Error())
}

func notRunnable(name string, code int) string {
	if code == 127 {
		return shorten(name, 200) + ": command not found"
	}
	return shorten(name, 200) + ": found, but it is not executable"
}

func failed(exitCode int64, code, text string) *message {
	return &message{kind: messageFailed, numbers: []int64{exitCode}, strings: []string{code, text}}
}

func reason(err error) string {
	if path, ok := err.(*os.PathError); ok {
		return path.Err.Error()
	}
	return err.Error()
}

func raiseOOMScore(pid int) {
	fd, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = syscall.Write(fd, []byte(leaderOOMScore))
	syscall.Close(fd)
}

func (s *supervision) send(m message) {
	s.sends.Lock()
	defer s.sends.Unlock()
	raw := m.encode()
	for len(raw) > 0 {
		count, err := syscall.Write(supervisorSocket, raw)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return // serve has gone; obey() sees that too
		}
		raw = raw[count:]
	}
}

// reap collects every process of the tree until wait4(2) says ECHILD. For a child subreaper
// that is proof that no descendant is left, which no scan of /proc can be.
func (s *supervision) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, waitAll, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			close(s.empty)
			return
		case pid == s.leader:
			s.send(exitMessage(status))
		}
	}
}

func exitMessage(status syscall.WaitStatus) message {
	var code, number, others int64
	if status.Signaled() {
		number = int64(status.Signal())
	} else {
		code = int64(status.ExitStatus())
	}
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG|waitAll, nil)
		if err == nil && pid > 0 || err == syscall.EINTR {
			continue // another zombie
		}
		if err == nil {
			others = 1
		}
		return message{kind: messageExited, numbers: []int64{code, number, others}}
	}
}

// socketReader reads serve's requests with plain blocking reads.
type socketReader struct{}

func (socketReader) Read(p []byte) (int, error) {
	for {
		count, err := syscall.Read(supervisorSocket, p)
		if err == syscall.EINTR {
			continue
		}
		if err == nil && count == 0 {
			return 0, io.EOF
		}
		return count, err
	}
}

func (s *supervision) obey() {
	for {
		m, err := readMessage(socketReader{}, maxMessage)
		if err != nil { // serve died: nobody may outlive it
			s.requestKill(0)
			s.next <- false
			return
		}
		switch m.kind {
		case messageRelease:
			s.next <- true
			return
		case messageKill:
			s.requestKill(time.Duration(m.number(0)) * time.Millisecond)
		case messageSignal:
			s.signalAll(syscall.Signal(m.number(0)))
		case messageCount:
			s.send(message{kind: messageCounted, numbers: []int64{int64(len(s.members()))}})
		}
	}
}

func (s *supervision) members() []process {
	all, err := scanProcesses()
	if err != nil { // no /proc, or no file descriptor: at least the leader can be reached
		return []process{{pid: s.leader}}
	}
	return descendants(all, os.Getpid(), nil)
}

func (s *supervision) signalAll(number syscall.Signal) {
	var count int64
	for _, p := range s.members() {
		if signalProcess(p, number) {
			count++
		}
	}
	s.send(message{kind: messageSignaled, numbers: []int64{count}})
}
