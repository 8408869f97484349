package main

import (
	"encoding/binary"
	"sync"
)

// attachRequest is where a client wants to read on.
type attachRequest struct {
	StdoutOffset int64 `json:"stdout_offset"`
	StderrOffset int64 `json:"stderr_offset"`
	WindowBytes  int64 `json:"window_bytes"`
}

func (r attachRequest) check() error {
	if r.StdoutOffset < 0 || r.StderrOffset < 0 || r.WindowBytes < 0 {
		return faultf(codeInvalid, "offsets and window_bytes must not be negative")
	}
	return nil
}

// attachment is a call that follows a command's output. The connection's writer calls produce
// in turn; everything else only says that there may be something to produce.
type attachment struct {
	call    *call
	command *command
	created bool
	waiting bool // in line; owned by the outbox

	mu        sync.Mutex
	credit    int64
	cancelled bool
	over      bool

	next  [2]int64 // touched by the writer only
	ends  [2]int64 // without follow: where to stop
	fixed bool
	turn  int
}

func newAttachment(c *call, command *command, r attachRequest, created, follow bool) *attachment {
	a := &attachment{call: c, command: command, created: created, credit: r.WindowBytes, fixed: !follow}
	a.next = [2]int64{r.StdoutOffset, r.StderrOffset}
	for i, s := range command.streams {
		s.reader()
		a.ends[i], _, _ = s.totals()
	}
	return a
}

// begin makes the command and the client's credit wake this call.
func (a *attachment) begin() {
	a.call.attach(a)
	a.command.watch(a)
	a.wake()
}

func (a *attachment) wake() { a.call.connection.out.ready(a) }

func (a *attachment) grant(bytes uint32) {
	a.mu.Lock()
	a.credit += int64(bytes)
	a.mu.Unlock()
	a.wake()
}

func (a *attachment) cancel() {
	a.mu.Lock()
	a.cancelled = true
	a.mu.Unlock()
	a.wake()
}

// leave ends the part of the command in it; for the end of the call and of the connection.
func (a *attachment) leave() {
	a.mu.Lock()
	already := a.over
	a.over = true
	a.mu.Unlock()
	if already {
		return
	}
	a.command.unwatch(a)
	for _, s := range a.command.streams {
		s.done()
	}
}

// produce appends the frames of one turn and says whether there is more to send at once.
func (a *attachment) produce(out []byte) ([]byte, bool) {
	a.mu.Lock()
	credit, cancelled, over := a.credit, a.cancelled, a.over
	a.mu.Unlock()
	if over {
		return out, false
	}
	if cancelled {
		return a.conclude(out, frameError, faultf(codeCancelled, "the client cancelled the call; the command goes on")), false
	}
	final := a.fixed || a.command.isFinished() // looked at before the streams: then their totals are final
	room := min(credit, maxOutputBytes)
	sent := int64(0)
	for i := range 2 {
		which := (a.turn + i) % 2
		var n int64
		out, n = a.appendOutput(out, which, room-sent)
		sent += n
	}
	a.turn++
	a.mu.Lock()
	a.credit -= sent
	credit = a.credit
	a.mu.Unlock()
	more := a.behind(0) || a.behind(1)
	if final && !more {
		return a.conclude(out, frameReply, startReply{a.created, a.command.record()}), false
	}
	return out, more && credit > 0
}

func (a *attachment) end(which int) int64 {
	if a.fixed {
		return a.ends[which]
	}
	total, _, _ := a.command.streams[which].totals()
	return total
}

func (a *attachment) behind(which int) bool { return a.next[which] < a.end(which) }

// appendOutput reads straight into the write buffer, behind the room for the frame's head.
func (a *attachment) appendOutput(out []byte, which int, room int64) ([]byte, int64) {
	wanted := min(room, a.end(which)-a.next[which])
	if wanted <= 0 {
		return out, 0
	}
	from := len(out)
	out = appendFrameHead(out, frameOutput, a.call.id)
	out = append(out, byte(which+1))
	out = append(out, make([]byte, 8+wanted)...)
	space := out[from+outputHeaderSize:]
	n, at := a.command.streams[which].readAt(space, a.next[which])
	if a.fixed {
		n = int(min(int64(n), max(0, a.ends[which]-at)))
	}
	a.next[which] = at + int64(n)
	if n == 0 {
		return out[:from], 0
	}
	binary.BigEndian.PutUint64(out[from+10:], uint64(at))
	out = out[:from+outputHeaderSize+n]
	finishFrame(out, from, 0)
	return out, int64(n)
}

// startReply is the answer to start and attach.
type startReply struct {
	Created bool   `json:"created"`
	Record  record `json:"record"`
}

func (a *attachment) conclude(out []byte, kind byte, value any) []byte {
	a.leave()
	a.call.close()
	return appendDocument(out, kind, a.call.id, value, nil)
}
