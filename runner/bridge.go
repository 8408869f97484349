package main

import (
	"flag"
	"io"
	"net"
	"os"
	"time"
)

// bridgeMain makes a channel of an exec: its standard input and output are given to serve, and it waits for the end.
func bridgeMain(args []string) int {
	flags := flag.NewFlagSet("bridge", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	socket := flags.String("socket", "", "")
	wait := flags.Float64("wait", 5, "") // seconds: the runner may still be starting
	textual := flags.Bool("text", false, "")
	if err := flags.Parse(args); err != nil || *socket == "" {
		return complain("bridge: needs --socket PATH")
	}
	conn, err := dialPatiently(*socket, seconds(*wait))
	if err != nil {
		return complain("bridge: %s", err)
	}
	if os.Geteuid() == 0 {
		_ = dropCapabilities() // a container engine gives an exec all that the container may have; what was needed is open
	}
	if *textual {
		return bridgeTextual(conn)
	}
	if err := handOverPipes(conn, os.Stdin, os.Stdout); err != nil {
		return complain("bridge: %s", err)
	}
	_, _ = io.Copy(io.Discard, conn)
	return 0
}

func dialPatiently(socket string, patience time.Duration) (*net.UnixConn, error) {
	deadline := time.Now().Add(patience)
	for {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
