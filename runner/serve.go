package main

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"
)

const (
	serveThreads   = 24
	maxConnections = 128
	exitExpired    = 3
	exitStopped    = 4
)

// server is one sandbox's runner.
type server struct {
	options  *serveOptions
	bootID   string
	children *children
	commands *registry
	answers  *answers
	lease    *lease
	roots    []string
	files    gate
	arrivals arrivals
	exit     chan int

	mu          sync.Mutex
	epoch       uint64
	connections map[*connection]struct{}
	strangers   int // connections before their HELLO
	joining     sync.Mutex
}

func serveMain(args []string) int {
	options, err := parseServe(args)
	if err != nil {
		return complain("serve: %s", err)
	}
	closeOnExec() // whatever the container engine left open is not the commands'
	runtime.GOMAXPROCS(2)
	debug.SetGCPercent(50)
	listener, err := options.listen()
	if err != nil {
		return complain("serve: %s", err)
	}
	if err := options.prepare(); err != nil {
		return complain("serve: %s", err)
	}
	if os.Getpid() != 1 {
		_ = becomeSubreaper()
	}
	prewarmThreads(serveThreads)
	s, err := newServer(options)
	if err != nil {
		return complain("serve: %s", err)
	}
	go s.accept(listener)
	go s.awaitSignal()
	code := <-s.exit
	listener.Close()
	if os.Getpid() != 1 { // when PID 1 ends the kernel kills its whole namespace; pid_namespaces(7)
		s.children.killEverything()
	}
	return code
}

func newServer(options *serveOptions) (*server, error) {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	s := &server{options: options, bootID: hex.EncodeToString(id), connections: map[*connection]struct{}{},
		exit: make(chan int, 1), files: newGate(6), answers: newAnswers()}
	var err error
	if s.children, err = newChildren(options.maxProcesses, options.maxOpenFiles, options.maxCommands); err != nil {
		return nil, err
	}
	s.commands = newRegistry(options.spool, options.workspace, options.maxCommands, s.children)
	s.commands.volatile = options.volatile
	s.commands.load()
	s.roots = resolvedRoots(append(options.roots(), filepath.Join(options.spool, transferDir)))
	s.lease = newLease(options.expiresIn, func() { s.end(exitExpired) })
	s.children.refill()
	return s, nil
}

func (s *server) end(code int) {
	select {
	case s.exit <- code:
	default:
	}
}

// awaitSignal ends in order when the runner is told to, unless it is PID 1: then any signal may come from hostile code of the
// sandbox. The kernel shields an init from signals without a handler, but the Go runtime has one for each and would die of
// SIGSEGV or SIGQUIT; caught here they do nothing (os/signal: signals sent by another process are only delivered).
// Who ends such a sandbox sends SIGKILL from outside.
func (s *server) awaitSignal() {
	arrivals := make(chan os.Signal, 1)
	if os.Getpid() == 1 {
		signal.Notify(arrivals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL,
			syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGSYS, syscall.SIGSTKFLT, syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGALRM, syscall.SIGVTALRM,
			syscall.SIGPROF, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGIO, syscall.SIGPWR, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU)
		signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
		return
	}
	signal.Notify(arrivals, syscall.SIGTERM, syscall.SIGINT)
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	<-arrivals
	s.end(0)
}

func (s *server) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors: later there may be some
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if !s.admit() {
			conn.Close()
			continue
		}
		go s.welcome(conn)
	}
}

// welcome serves what comes over a connection, or over the pipes of the bridge that made it.
func (s *server) welcome(conn net.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(helloPatience))
	stream, err := takeOver(conn)
	if errors.Is(err, errStopped) {
		s.end(exitStopped)
	}
	if err != nil {
		conn.Close()
		s.leave(nil)
		return
	}
	newConnection(s, stream).serve()
}

func (s *server) admit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.connections)+s.strangers >= maxConnections {
		return false
	}
	s.strangers++
	return true
}

// knows says whether the token of a HELLO is the sandbox's; with --learn-token the first one becomes it.
func (s *server) knows(token string) bool {
	s.joining.Lock()
	defer s.joining.Unlock()
	if s.options.learnToken {
		if token == "" {
			return false
		}
		s.options.token, s.options.learnToken = token, false
	}
	known := s.options.token
	return known == "" || subtle.ConstantTimeCompare([]byte(known), []byte(token)) == 1
}

// join checks a connection's epoch and answers its HELLO. Of two owners at once the newer wins:
// the older one's connections are gone before the newer one hears anything.
func (s *server) join(c *connection) error {
	s.joining.Lock()
	defer s.joining.Unlock()
	s.mu.Lock()
	highest := s.epoch
	if c.epoch < highest {
		s.mu.Unlock()
		return faultf(codeEpochStale, "epoch %d: the sandbox has a newer owner with epoch %d", c.epoch, highest)
	}
	s.epoch = c.epoch
	var stale []*connection
	for other := range s.connections {
		if other.epoch < c.epoch {
			stale = append(stale, other)
		}
	}
	s.strangers--
	s.connections[c] = struct{}{}
	s.mu.Unlock()
	s.fence(stale, c.epoch)
	hello := runnerHello{protocolVersion, runnerVersion, s.bootID, c.epoch, s.lease.left(), s.commands.runningCount()}
	c.out.post(outFrame{bytes: appendDocument(nil, frameHello, 0, hello, nil)})
	return nil
}

func (s *server) fence(stale []*connection, epoch uint64) {
	var all sync.WaitGroup
	for _, c := range stale {
		all.Go(func() { c.fence(epoch) })
	}
	all.Wait()
}

func (s *server) leave(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, joined := s.connections[c]; joined {
		delete(s.connections, c)
	} else {
		s.strangers--
	}
}

var errUsage = fmt.Errorf("needs --socket PATH or --listen-fd N, --spool DIR and --workspace DIR")
