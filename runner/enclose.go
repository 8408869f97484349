package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// What is in the directory of an enclosed sandbox: the keeper's, and of no use to the sandbox's user.
const (
	enclosedSocket  = "channel/socket"
	enclosedLog     = "log"
	enclosedEnd     = "ended" // one line that says how serve has ended
	enclosePatience = 20 * time.Second
)

// encloseMain starts serve where no container engine does it: as PID 1 of a namespace of its own, so that no command can end it, and
// with a keeper outside of that, which writes down how it ended. Started again it finds what there is; of several at once one starts it.
func encloseMain(args []string) int {
	flags := flag.NewFlagSet("enclose", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	dir := flags.String("directory", "", "")
	if err := flags.Parse(args); err != nil || *dir == "" || flags.NArg() == 0 {
		return complain("enclose: needs --directory DIR, and -- FLAGS of serve")
	}
	if err := enclose(*dir, flags.Args()); err != nil {
		return complain("enclose: %s", err)
	}
	return 0
}

func enclose(dir string, serve []string) error {
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(enclosedSocket)), 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return os.NewSyscallError("flock", err)
	}
	if listens(dir) {
		return nil
	}
	if how := howEnded(dir); how != "" {
		return fmt.Errorf("the sandbox has ended: %s", how)
	}
	if err := startKeeper(dir, serve); err != nil {
		return err
	}
	return awaitEnclosed(dir)
}

func listens(dir string) bool {
	conn, err := net.Dial("unix", filepath.Join(dir, enclosedSocket))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func howEnded(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, enclosedEnd))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

func awaitEnclosed(dir string) error {
	for deadline := time.Now().Add(enclosePatience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if listens(dir) {
			return nil
		}
		if how := howEnded(dir); how != "" {
			said, _ := os.ReadFile(filepath.Join(dir, enclosedLog))
			return fmt.Errorf("the runner has ended at once: %s: %s", how, strings.TrimSpace(string(said)))
		}
	}
	return errors.New("the runner does not listen in time")
}

// startKeeper leaves a process that belongs to nobody: what has started this one may be killed with all its children.
func startKeeper(dir string, serve []string) error {
	log, err := os.OpenFile(filepath.Join(dir, enclosedLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	keeper := exec.Command("/proc/self/exe", append([]string{"keep", dir}, serve...)...)
	keeper.Dir, keeper.Stdout, keeper.Stderr = "/", log, log
	keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return keeper.Start()
}

// keepMain waits for the end of serve in its namespace, and writes it down.
func keepMain(args []string) int {
	if len(args) < 2 {
		return complain("keep: is started by enclose only")
	}
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o644) // its child inherits it; commands get their own
	serve := exec.Command("/proc/self/exe", append([]string{"enclosed"}, args[1:]...)...)
	serve.Stdout, serve.Stderr = os.Stdout, os.Stderr
	serve.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC}
	how := "it could not be started"
	if err := serve.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "runner: keep: %s\n", err)
	} else {
		how = endOf(serve.Wait())
	}
	half := filepath.Join(args[0], enclosedEnd+".new")
	if err := os.WriteFile(half, []byte(how+"\n"), 0o600); err != nil {
		return complain("keep: %s", err)
	}
	if err := os.Rename(half, filepath.Join(args[0], enclosedEnd)); err != nil {
		return complain("keep: %s", err)
	}
	return 0
}

func endOf(err error) string {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return "exit 0"
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return fmt.Sprintf("signal %d", status.Signal())
	}
	return fmt.Sprintf("exit %d", exit.ExitCode())
}

// enclosedMain is PID 1 of the new namespaces, and shows itself and what it will start in /proc, and nothing else; pid_namespaces(7).
func enclosedMain(args []string) int {
	if os.Getpid() != 1 {
		return complain("enclosed: is started by keep only")
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SLAVE, ""); err != nil {
		return complain("enclosed: make mounts private: %s", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return complain("enclosed: mount /proc: %s", err)
	}
	if err := installSeccomp(); err != nil {
		return complain("enclosed: %s", err)
	}
	return serveMain(args)
}
