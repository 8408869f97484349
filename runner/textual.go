package main

import (
	"encoding/base64"
	"io"
	"net"
	"os"
	"time"
)

// Textual is the channel over an exec whose output is text: each piece becomes a line of base64. What a login shell may have said before
// is not ours, so the first line says where we begin. Input stays as it is.
const textualBegin = "cifixer-exec:1\n"

const textualPiece = 48 * 1024 // of bytes, a multiple of 3: no padding but at the end of what there is

// textualSilence is much longer than the owner's between two pings: nobody is there any more. E2B's envd does not tell, and each bridge
// that is left over holds one of the runner's connections.
const textualSilence = time.Minute

// listener is input that says when there has been none for long.
type listener struct {
	in    io.Reader
	alarm *time.Timer
}

func (l *listener) Read(p []byte) (int, error) {
	n, err := l.in.Read(p)
	if err != nil {
		l.alarm.Stop() // told that there is no more; what comes out is still wanted
	} else {
		l.alarm.Reset(textualSilence)
	}
	return n, err
}

func copyTextual(conn *net.UnixConn, in io.Reader, out io.Writer) error {
	if _, err := io.WriteString(out, textualBegin); err != nil {
		return err
	}
	heard := &listener{in, time.AfterFunc(textualSilence, func() { conn.Close() })}
	go func() {
		_, _ = io.Copy(conn, heard)
		_ = conn.CloseWrite()
	}()
	piece := make([]byte, textualPiece)
	line := make([]byte, base64.StdEncoding.EncodedLen(textualPiece)+1)
	for {
		n, err := conn.Read(piece)
		if n > 0 {
			size := base64.StdEncoding.EncodedLen(n)
			base64.StdEncoding.Encode(line, piece[:n])
			line[size] = '\n'
			if _, err := out.Write(line[:size+1]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// bridgeTextual is the bridge that stays in between.
func bridgeTextual(conn *net.UnixConn) int {
	if err := copyTextual(conn, os.Stdin, os.Stdout); err != nil {
		return complain("bridge: %s", err)
	}
	return 0
}
