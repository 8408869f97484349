package main

import (
	"net"
	"runtime"
	"sync"
	"time"
)

// outFrame is a frame that is ready to go: bytes and, for a document, its body.
type outFrame struct {
	bytes   []byte
	body    []byte
	release func() // what the body held, given back when it is written
}

// outbox is the sending half of a connection: one goroutine writes. Attached calls do not
// queue their output here; they stand in line, and each gives one chunk in its turn. So memory
// is one chunk per connection, and a chatty command cannot crowd out a quiet one.
type outbox struct {
	mu     sync.Mutex
	wake   chan struct{}
	frames []outFrame
	line   []*attachment
	last   bool // nothing is taken any more; the writer ends when the frames are out
	closed chan struct{}
}

func newOutbox() *outbox {
	return &outbox{wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

func (o *outbox) post(f outFrame) {
	o.mu.Lock()
	refused := o.last
	if !refused {
		o.frames = append(o.frames, f)
	}
	o.mu.Unlock()
	if refused && f.release != nil {
		f.release()
	}
	o.nudge()
}

// ready puts a call in line, if it does not stand there.
func (o *outbox) ready(a *attachment) {
	o.mu.Lock()
	if a.waiting || o.last {
		o.mu.Unlock()
		return
	}
	a.waiting = true
	o.line = append(o.line, a)
	o.mu.Unlock()
	o.nudge()
}

// finish makes f the last frame of the connection.
func (o *outbox) finish(f outFrame) {
	o.mu.Lock()
	if !o.last {
		o.frames = append(o.frames, f)
		o.last = true
		o.line = nil
	}
	o.mu.Unlock()
	o.nudge()
}

func (o *outbox) nudge() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// next gives a frame and a call whose turn it is, either may be nil.
func (o *outbox) next() (f *outFrame, a *attachment, last bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.frames) > 0 {
		f = &o.frames[0]
		o.frames = o.frames[1:]
	}
	if len(o.line) > 0 {
		a = o.line[0]
		o.line[0] = nil
		o.line = o.line[1:]
		a.waiting = false
	}
	return f, a, o.last && len(o.frames) == 0
}

// run writes until the connection breaks or its last frame is out, and closes it then.
func (o *outbox) run(conn net.Conn) {
	defer close(o.closed)
	defer conn.Close()
	w := &batch{conn: conn, buffer: make([]byte, 0, batchSize)}
	yielded := false
	for w.err == nil {
		f, a, last := o.next()
		if f != nil {
			w.frame(*f)
		}
		if a != nil && w.err == nil {
			w.room(maxOutputBytes + 2*outputHeaderSize)
			var more bool
			if w.buffer, more = a.produce(w.buffer); more {
				o.ready(a)
			}
		}
		if f != nil || a != nil {
			yielded = false
			if !last {
				continue
			}
		}
		if !yielded && !last && len(w.buffer) > 0 { // others may be about to add to this write
			yielded = true
			runtime.Gosched()
			continue
		}
		w.flush()
		if last {
			return
		}
		<-o.wake
	}
	w.written()
	o.drop()
}

// drop releases what can no longer be sent.
func (o *outbox) drop() {
	o.mu.Lock()
	o.last = true
	frames := o.frames
	o.frames, o.line = nil, nil
	o.mu.Unlock()
	for _, f := range frames {
		if f.release != nil {
			f.release()
		}
	}
}

const batchSize = maxOutputBytes + 4096

// batch collects small frames into one write.
type batch struct {
	conn     net.Conn
	buffer   []byte
	releases []func() // of frames in the buffer, for when they are out
	err      error
}

func (w *batch) room(n int) {
	if len(w.buffer)+n > cap(w.buffer) {
		w.flush()
	}
}

func (w *batch) frame(f outFrame) {
	w.room(len(f.bytes))
	w.buffer = append(w.buffer, f.bytes...)
	if len(f.body) > 0 {
		buffers := net.Buffers{w.buffer, f.body}
		if w.err == nil {
			_, w.err = buffers.WriteTo(w.conn)
		}
	}
	if f.release != nil {
		w.releases = append(w.releases, f.release)
	}
	if len(f.body) > 0 {
		w.written()
	}
}

func (w *batch) flush() {
	if len(w.buffer) > 0 && w.err == nil {
		_, w.err = w.conn.Write(w.buffer)
	}
	w.written()
}

func (w *batch) written() {
	w.buffer = w.buffer[:0]
	for _, release := range w.releases {
		release()
	}
	w.releases = w.releases[:0]
}

// shut gives a peer that does not read a moment to take the last frame.
func (o *outbox) shut(conn net.Conn, f outFrame, patience time.Duration) {
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	o.finish(f)
}
