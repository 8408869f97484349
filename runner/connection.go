package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"
)

const (
	maxOpenCalls   = 512
	bodiesInFlight = 64 << 20
	repliesInQueue = 16 << 20
	helloPatience  = 10 * time.Second
	lastPatience   = 250 * time.Millisecond // for a peer to take the frame that closes its connection
	maxPongsQueued = 1024
)

// call is one open request of a connection.
type call struct {
	id         uint32
	connection *connection
	cancelled  chan struct{}
	attachment *attachment // set for calls that follow a command
	cancelOnce sync.Once
}

// connection is one channel: frames in, frames out, calls in between.
type connection struct {
	server  *server
	net     net.Conn
	in      *bufio.Reader
	out     *outbox
	epoch   uint64
	bodies  *reservoir
	replies *reservoir

	mu    sync.Mutex
	calls map[uint32]*call
	stale bool // fenced: nothing it asks is done any more
}

func newConnection(s *server, conn net.Conn) *connection {
	return &connection{server: s, net: conn, in: bufio.NewReaderSize(conn, 32<<10), out: newOutbox(),
		bodies: newReservoir(bodiesInFlight), replies: newReservoir(repliesInQueue), calls: map[uint32]*call{}}
}

// serve reads frames until the peer goes or breaks the protocol.
func (c *connection) serve() {
	go c.out.run(c.net)
	err := c.greet()
	for err == nil {
		err = c.step()
	}
	var known *fault
	if errors.As(err, &known) {
		c.expel(known)
	} else {
		c.net.Close()
		c.out.nudge()
	}
	c.server.leave(c)
	c.abandonCalls()
	c.bodies.drain()
	c.replies.drain()
	c.out.drop()
	c.out.nudge()
}

// expel sends the frame that closes the connection, and waits until it is out or late.
func (c *connection) expel(f *fault) {
	c.out.shut(c.net, outFrame{bytes: appendDocument(nil, frameError, 0, f, nil)}, lastPatience)
	select {
	case <-c.out.closed:
	case <-time.After(2 * lastPatience):
		c.net.Close()
	}
}

// fence ends a connection whose epoch is no longer the highest.
func (c *connection) fence(highest uint64) {
	c.mu.Lock()
	c.stale = true
	c.mu.Unlock()
	c.expel(faultf(codeEpochStale, "epoch %d: the sandbox has a newer owner with epoch %d", c.epoch, highest))
}

func (c *connection) isStale() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stale
}

func (c *connection) abandonCalls() {
	c.mu.Lock()
	var open []*call
	for _, call := range c.calls {
		open = append(open, call)
	}
	c.mu.Unlock()
	for _, call := range open {
		call.abandon()
	}
}

type clientHello struct {
	Protocol int     `json:"protocol"`
	Epoch    *uint64 `json:"epoch"`
	Client   string  `json:"client"`
	Token    string  `json:"token"`
}

type runnerHello struct {
	Protocol      int      `json:"protocol"`
	RunnerVersion string   `json:"runner_version"`
	BootID        string   `json:"boot_id"`
	Epoch         uint64   `json:"epoch"`
	ExpiresIn     *float64 `json:"expires_in_s"`
	Commands      int      `json:"commands"`
}

// greet does the first frame each way.
func (c *connection) greet() error {
	_ = c.net.SetReadDeadline(time.Now().Add(helloPatience))
	head, err := readFrameHead(c.in)
	if err != nil {
		return err
	}
	if head.kind != frameHello {
		return faultf(codeProtocol, "the first frame has type %d: it must be a HELLO", head.kind)
	}
	hello, err := c.readHello(head)
	if err != nil {
		return err
	}
	_ = c.net.SetReadDeadline(time.Time{})
	c.epoch = *hello.Epoch
	return c.server.join(c)
}

func (c *connection) readHello(head frameHead) (clientHello, error) {
	var hello clientHello
	payload, err := readPayload(c.in, head.size)
	if err != nil {
		return hello, err
	}
	doc, err := parseDocument(payload)
	if err != nil {
		return hello, err
	}
	if err := doc.decode(&hello); err != nil {
		return hello, faultf(codeProtocol, "HELLO: %s", asFault(err).Message)
	}
	if !c.server.knows(hello.Token) {
		return hello, faultf(codeUnauthorized, "the token is not this sandbox's")
	}
	if hello.Protocol != protocolVersion {
		return hello, faultf(codeProtocol, "protocol %d: this runner speaks %d", hello.Protocol, protocolVersion)
	}
	if hello.Epoch == nil {
		return hello, faultf(codeProtocol, "HELLO has no epoch: a number from 0")
	}
	return hello, nil
}

// step handles one frame.
func (c *connection) step() error {
	head, err := readFrameHead(c.in)
	if err != nil {
		return err
	}
	if head.kind == frameRequest {
		return c.request(head)
	}
	payload, err := readPayload(c.in, head.size)
	if err != nil {
		return err
	}
	switch head.kind {
	case frameCredit:
		if call := c.find(head.call); call != nil {
			call.grant(binary.BigEndian.Uint32(payload))
		}
	case frameCancel:
		if call := c.find(head.call); call != nil {
			call.cancel()
		}
	case framePing:
		c.pong(head.call, payload)
	case framePong: // an answer to a PING we do not send
	case frameHello:
		return faultf(codeProtocol, "a second HELLO")
	}
	return nil
}

func (c *connection) pong(call uint32, payload []byte) {
	if !c.replies.take(maxPongsQueued) { // backpressure for a peer that pings and does not read
		return
	}
	out := append(appendFrameHead(nil, framePong, call), payload...)
	finishFrame(out, 0, 0)
	c.out.post(outFrame{bytes: out, release: func() { c.replies.give(maxPongsQueued) }})
}

// request reads a REQUEST and runs its verb beside the others.
func (c *connection) request(head frameHead) error {
	if !c.bodies.take(head.size) {
		return net.ErrClosed
	}
	payload, err := readPayload(c.in, head.size)
	if err != nil {
		return err
	}
	doc, err := parseDocument(payload)
	if err != nil {
		return err
	}
	call, err := c.open(head.call)
	if err != nil {
		return err
	}
	r := &request{call: call, document: doc, payload: payload, connection: c}
	if call == nil {
		r.release()
		busy := faultf(codeBusy, "%d calls are open on this connection; wait for one to end", maxOpenCalls)
		c.out.post(outFrame{bytes: appendDocument(nil, frameError, head.call, busy, nil)})
		return nil
	}
	go c.server.handle(r)
	return nil
}

// open registers a call; nil means that there are too many.
func (c *connection) open(id uint32) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stale {
		return nil, net.ErrClosed
	}
	if c.calls[id] != nil {
		return nil, faultf(codeProtocol, "call %d is open already", id)
	}
	if len(c.calls) >= maxOpenCalls {
		return nil, nil
	}
	opened := &call{id: id, connection: c, cancelled: make(chan struct{})}
	c.calls[id] = opened
	return opened, nil
}

func (c *connection) find(id uint32) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[id]
}

// close forgets the call; its id is free from here on, so it comes before the last frame.
func (k *call) close() bool {
	c := k.connection
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[k.id] != k {
		return false
	}
	delete(c.calls, k.id)
	return true
}

func (k *call) reply(value any, body []byte, release func()) {
	if !k.close() { // cancelled and answered meanwhile
		if release != nil {
			release()
		}
		return
	}
	k.connection.out.post(outFrame{bytes: appendDocument(nil, frameReply, k.id, value, body), body: body, release: release})
}

func (k *call) fail(err error) {
	if k.close() {
		k.connection.out.post(outFrame{bytes: appendDocument(nil, frameError, k.id, asFault(err), nil)})
	}
}

// attach makes the call one that follows a command. A CANCEL may have been faster.
func (k *call) attach(a *attachment) {
	k.connection.mu.Lock()
	k.attachment = a
	k.connection.mu.Unlock()
	select {
	case <-k.cancelled:
		a.cancel()
	default:
	}
}

func (k *call) following() *attachment {
	k.connection.mu.Lock()
	defer k.connection.mu.Unlock()
	return k.attachment
}

func (k *call) grant(bytes uint32) {
	if a := k.following(); a != nil {
		a.grant(bytes)
	}
}

// cancel answers at once; a verb that runs goes on and its answer is dropped.
func (k *call) cancel() {
	k.cancelOnce.Do(func() { close(k.cancelled) })
	if a := k.following(); a != nil {
		a.cancel()
		return
	}
	k.fail(faultf(codeCancelled, "the client cancelled the call"))
}

// abandon is for the end of the connection.
func (k *call) abandon() {
	k.cancelOnce.Do(func() { close(k.cancelled) })
	k.close()
	if a := k.following(); a != nil {
		a.leave()
	}
}
