package main

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// handOver is the one byte with which a bridge gives its standard input and output to serve. No frame begins with it: as the
// first byte of a length it would be far too long.
const handOver = 0xff

// stopAsked is the one byte with which `runner stop` asks serve to end.
const stopAsked = 0xfe

var errStopped = errors.New("asked to stop")

// handOverPipes gives serve both descriptors, so that what they carry has no process in between. unix(7), SCM_RIGHTS
func handOverPipes(conn *net.UnixConn, in, out *os.File) error {
	_, _, err := conn.WriteMsgUnix([]byte{handOver}, syscall.UnixRights(int(in.Fd()), int(out.Fd())), nil)
	return err
}

// takeOver looks at how a connection begins. It gives the stream to serve: that of a bridge's pipes, or the connection itself.
func takeOver(conn net.Conn) (net.Conn, error) {
	local, ok := conn.(*net.UnixConn)
	if !ok {
		return conn, nil
	}
	first, oob := make([]byte, 1), make([]byte, syscall.CmsgSpace(2*4))
	n, oobn, _, _, err := local.ReadMsgUnix(first, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	files, err := pipesOf(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if first[0] == stopAsked && isFromOutside(local) {
		return nil, errStopped
	}
	if first[0] == handOver && len(files) == 2 {
		p := &pipes{bridge: local, in: files[0], out: files[1]}
		go p.watch()
		return p, nil
	}
	closeAll(files)
	return &begun{Conn: conn, first: first}, nil
}

// pipesOf takes pipes and sockets only: whatever else a stranger sends could block a read for ever.
func pipesOf(oob []byte) ([]*os.File, error) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, message := range messages {
		descriptors, err := syscall.ParseUnixRights(&message)
		if err != nil {
			continue
		}
		for _, fd := range descriptors {
			var status syscall.Stat_t
			kind := uint32(0)
			if syscall.Fstat(fd, &status) == nil {
				kind = status.Mode & syscall.S_IFMT
			}
			if kind != syscall.S_IFIFO && kind != syscall.S_IFSOCK || syscall.SetNonblock(fd, true) != nil {
				err = errors.New("neither a pipe nor a socket")
			}
			files = append(files, os.NewFile(uintptr(fd), "pipe"))
		}
		if err != nil {
			closeAll(files)
			return nil, err
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}

// begun is a connection of which one byte was read already.
type begun struct {
	net.Conn
	first []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.first) == 0 {
		return b.Conn.Read(p)
	}
	n := copy(p, b.first)
	b.first = b.first[n:]
	return n, nil
}

// pipes is the stream of a bridge, which waits for the end of the connection and ends with it. The connection is no embedded
// field: net.Buffers would find its way around Write.
type pipes struct {
	bridge  *net.UnixConn
	in, out *os.File
}

func (p *pipes) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p *pipes) Write(b []byte) (int, error) { return p.out.Write(b) }

func (p *pipes) SetReadDeadline(t time.Time) error  { return p.in.SetReadDeadline(t) }
func (p *pipes) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *pipes) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}
func (p *pipes) LocalAddr() net.Addr  { return p.bridge.LocalAddr() }
func (p *pipes) RemoteAddr() net.Addr { return p.bridge.RemoteAddr() }

func (p *pipes) Close() error { return errors.Join(p.in.Close(), p.out.Close(), p.bridge.Close()) }

// watch ends the stream when its bridge has ended.
func (p *pipes) watch() {
	_ = p.bridge.SetReadDeadline(time.Time{})
	_, _ = p.bridge.Read(make([]byte, 1))
	p.Close()
}
