package main

import (
	"flag"
	"io"
	"net"
	"os"
	"time"
)

// bridgeMain makes a channel of an exec: standard input and output joined to the socket.
func bridgeMain(args []string) int {
	flags := flag.NewFlagSet("bridge", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	socket := flags.String("socket", "", "")
	wait := flags.Float64("wait", 5, "") // seconds: the runner may still be starting
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
	ended := make(chan struct{}, 2)
	join := func(to io.Writer, from io.Reader) {
		_, _ = io.Copy(to, from)
		ended <- struct{}{}
	}
	go join(conn, os.Stdin)
	go join(os.Stdout, conn)
	<-ended
	return 0
}

func dialPatiently(socket string, patience time.Duration) (net.Conn, error) {
	deadline := time.Now().Add(patience)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
