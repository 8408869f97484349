// Runner is the small program inside every sandbox of cifixer-exec. It starts
// commands, watches them and records how they ended. docs/protocol.md is its contract.
package main

import (
	"fmt"
	"os"
)

const (
	runnerVersion   = "1.0.0"
	protocolVersion = 1
)

const usage = `usage: runner serve|bridge|stop|install|enclose|supervise|launch|confine|version [flags]

  serve      run commands for workers that connect to a Unix socket
  bridge     join standard input and output to that socket
  stop       end serve, and the sandbox with it; only from outside of the sandbox
  install    copy this program to where a sandbox finds it
  enclose    start serve as PID 1 of a namespace of its own, in a virtual machine
  launch     open the socket on the host and start a sandbox that serves it
  version    print the version
(supervise, confine, keep and enclosed are started by these only; see docs/protocol.md)
`

func main() {
	// Sandboxed code has the same uid: without this it could ptrace the runner or read its
	// memory and file descriptors. prctl(2), ptrace(2) "Ptrace access mode checking".
	setDumpable(false)
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	subcommands := map[string]func([]string) int{
		"serve": serveMain, "bridge": bridgeMain, "supervise": superviseMain, "install": installMain, "stop": stopMain,
		"launch": launchMain, "confine": confineMain, "version": versionMain,
		"enclose": encloseMain, "keep": keepMain, "enclosed": enclosedMain,
	}
	run, known := subcommands[os.Args[1]]
	if !known {
		fmt.Fprintf(os.Stderr, "runner: unknown subcommand %q\n%s", os.Args[1], usage)
		os.Exit(2)
	}
	os.Exit(run(os.Args[2:]))
}

func versionMain([]string) int {
	fmt.Printf("{\"runner_version\":%q,\"protocol\":%d}\n", runnerVersion, protocolVersion)
	return 0
}

// complain prints one line on stderr and gives the exit status of a failed subcommand.
func complain(format string, values ...any) int {
	fmt.Fprintf(os.Stderr, "runner: "+format+"\n", values...)
	return 1
}
