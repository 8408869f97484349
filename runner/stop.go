package main

import (
	"flag"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// stopMain ends the sandbox: for a hook that a container engine runs in it before it stops it, because the runner as PID 1 heeds no
// signal that code of the sandbox could send, and the engine would wait for the whole of its grace.
func stopMain(args []string) int {
	flags := flag.NewFlagSet("stop", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	socket := flags.String("socket", "", "")
	if err := flags.Parse(args); err != nil || *socket == "" {
		return complain("stop: needs --socket PATH")
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: *socket, Net: "unix"})
	if err != nil {
		return complain("stop: %s", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{stopAsked}); err != nil {
		return complain("stop: %s", err)
	}
	_, _ = io.Copy(io.Discard, conn)
	return 0
}

// isFromOutside says whether a container engine has put the peer into the sandbox: its parent is not of the sandbox then, so it has
// none here. Whatever the sandbox itself starts has a parent, and when that dies PID 1; pid_namespaces(7), unix(7) SO_PEERCRED.
func isFromOutside(conn *net.UnixConn) bool {
	if os.Getpid() != 1 {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	var peer *syscall.Ucred
	failed := raw.Control(func(fd uintptr) {
		peer, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if failed != nil || err != nil || peer.Pid <= 1 {
		return false
	}
	return parentOf(int(peer.Pid)) == "0"
}

// parentOf reads the fourth field of /proc/PID/stat; the second may have anything in it, in brackets. proc(5)
func parentOf(pid int) string {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	rest := string(stat)[strings.LastIndexByte(string(stat), ')')+1:]
	if fields := strings.Fields(rest); len(fields) > 1 {
		return fields[1]
	}
	return ""
}
