package main

import (
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// bridgeOf starts a real bridge to the sandbox, with pipes as a container engine gives them.
func (s *sandbox) bridgeOf(t *testing.T) (*exec.Cmd, *os.File, *os.File) {
	t.Helper()
	in, toIt, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromIt, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	bridge := exec.Command(builtRunner, "bridge", "--socket", s.socket)
	bridge.Stdin, bridge.Stdout = in, out
	if err := bridge.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	out.Close()
	t.Cleanup(func() {
		toIt.Close()
		fromIt.Close()
		_ = bridge.Process.Kill()
		_ = bridge.Wait()
	})
	return bridge, toIt, fromIt
}

func helloFrame() []byte {
	return appendDocument(nil, frameHello, 0, object{"protocol": 1, "epoch": 1, "client": "test", "token": ""}, nil)
}

func expectHello(t *testing.T, from io.Reader) {
	t.Helper()
	if kind, _, _, err := readAnyFrame(from); err != nil || kind != frameHello {
		t.Fatalf("no HELLO came: type %d, %v", kind, err)
	}
}

func TestABridgeEndsWhenItsInputEnds(t *testing.T) {
	s := serve(t)
	bridge, toIt, fromIt := s.bridgeOf(t)
	if _, err := toIt.Write(helloFrame()); err != nil {
		t.Fatal(err)
	}
	expectHello(t, fromIt)
	toIt.Close()
	ended := make(chan error, 1)
	go func() { ended <- bridge.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the bridge outlived its input")
	}
}

func TestAStreamEndsWithItsBridge(t *testing.T) {
	s := serve(t)
	bridge, toIt, fromIt := s.bridgeOf(t)
	if _, err := toIt.Write(helloFrame()); err != nil {
		t.Fatal(err)
	}
	expectHello(t, fromIt)
	_ = bridge.Process.Kill()
	_ = fromIt.SetReadDeadline(time.Now().Add(patience))
	rest := make([]byte, 4096)
	for {
		if _, err := fromIt.Read(rest); err != nil {
			if os.IsTimeout(err) {
				t.Fatal("serve kept the pipes of a bridge that was killed")
			}
			return
		}
	}
}

func TestOnlyPipesAndSocketsAreTakenOver(t *testing.T) {
	s := serve(t)
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	zero, err := os.OpenFile("/dev/zero", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	if err := handOverPipes(conn, zero, zero); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Fatalf("serve took a device for a stream: %d %v", n, err)
	}
}

func TestDescriptorsWithoutTheSignAreDropped(t *testing.T) {
	s := serve(t)
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if _, _, err := conn.WriteMsgUnix(helloFrame(), syscall.UnixRights(int(write.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	write.Close()
	expectHello(t, conn)
	_ = read.SetReadDeadline(time.Now().Add(patience))
	if _, err := read.Read(make([]byte, 1)); os.IsTimeout(err) {
		t.Fatal("serve keeps a descriptor that it has no use for")
	}
}
