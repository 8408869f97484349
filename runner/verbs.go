package main

import (
	"encoding/json"
	"sync"
)

// request is one REQUEST on its way through a verb.
type request struct {
	call       *call
	connection *connection
	document   document
	payload    []byte
	once       sync.Once
}

// release gives back the memory of the request, once nothing refers to its body.
func (r *request) release() {
	r.once.Do(func() {
		size := len(r.payload)
		recyclePayload(r.payload)
		r.document, r.payload = document{}, nil
		r.connection.bodies.give(size)
	})
}

// verb handles a request: it returns the answer, or has arranged for it (answerLater).
type verb func(s *server, r *request) (any, error)

// answerLater is what a verb returns whose call is answered by an attachment or by itself.
type answerLater struct{}

type nothing struct{} // {}

var verbs = map[string]verb{
	"start": (*server).start, "attach": (*server).attach, "status": (*server).status, "list": (*server).list,
	"stdin": (*server).stdin, "signal": (*server).signal, "kill": (*server).kill, "forget": (*server).forget,
	"write": (*server).write, "abort_write": (*server).abortWrite, "read": (*server).read, "stat": (*server).stat,
	"list_files": (*server).listFiles, "mkdir": (*server).mkdir, "remove": (*server).remove,
	"pack": (*server).pack, "unpack": (*server).unpack,
	"extend": (*server).extend, "stats": (*server).statsVerb, "shutdown": (*server).shutdownVerb,
}

func (s *server) handle(r *request) {
	defer r.release()
	answer, err := s.dispatch(r)
	if err != nil {
		r.call.fail(err)
		return
	}
	if _, later := answer.(answerLater); !later {
		r.call.reply(answer, nil, nil)
	}
}

func (s *server) dispatch(r *request) (any, error) {
	var named struct {
		Verb string `json:"verb"`
	}
	if err := r.document.decode(&named); err != nil {
		return nil, err
	}
	run, known := verbs[named.Verb]
	if !known {
		return nil, faultf(codeInvalid, "verb %q is not known to this runner", shorten(named.Verb, 40))
	}
	return run(s, r)
}

func (s *server) start(r *request) (any, error) {
	var args startRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	args.body = r.document.body
	if err := args.check(); err != nil {
		return nil, err
	}
	c, created, err := s.commands.start(&args)
	r.release()
	if err != nil {
		return nil, err
	}
	if args.Attach == nil {
		return startReply{created, c.record()}, nil
	}
	newAttachment(r.call, c, *args.Attach, created, true).begin()
	return answerLater{}, nil
}

func (s *server) attach(r *request) (any, error) {
	var args struct {
		OpID   string `json:"op_id"`
		Follow *bool  `json:"follow"`
		attachRequest
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if err := args.check(); err != nil {
		return nil, err
	}
	c, err := s.commands.find(args.OpID)
	if err != nil {
		return nil, err
	}
	follow := args.Follow == nil || *args.Follow
	newAttachment(r.call, c, args.attachRequest, false, follow).begin()
	return answerLater{}, nil
}

// opRequest is a verb about one command.
type opRequest struct {
	OpID string `json:"op_id"`
}

func (s *server) named(r *request) (*command, error) {
	var args opRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	return s.commands.find(args.OpID)
}

type recordReply struct {
	Record record `json:"record"`
}

func (s *server) status(r *request) (any, error) {
	c, err := s.named(r)
	if err != nil {
		return nil, err
	}
	return recordReply{c.record()}, nil
}

func (s *server) list(*request) (any, error) {
	return struct {
		Records []json.RawMessage `json:"records"`
	}{fitting(s.commands.list(), maxDocumentJSON-1024)}, nil
}

// fitting encodes as many values as a document holds.
func fitting[T any](values []T, room int) []json.RawMessage {
	encoded := make([]json.RawMessage, 0, len(values))
	for _, value := range values {
		one, err := json.Marshal(value)
		if room -= len(one) + 1; err != nil || room < 0 {
			break
		}
		encoded = append(encoded, one)
	}
	return encoded
}

func (s *server) stdin(r *request) (any, error) {
	var args struct {
		OpID   string `json:"op_id"`
		Offset int64  `json:"offset"`
		EOF    bool   `json:"eof"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	c, err := s.commands.find(args.OpID)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	pipe := c.input
	c.mu.Unlock()
	if pipe == nil {
		return nil, faultf(codeStdinClosed, "command %q was started without an open standard input", args.OpID)
	}
	accepted, closed, err := pipe.accept(r.document.body, args.Offset, args.EOF)
	if err != nil {
		return nil, err
	}
	return struct {
		Accepted int64 `json:"accepted_bytes"`
		Closed   bool  `json:"closed"`
	}{accepted, closed}, nil
}

func (s *server) signal(r *request) (any, error) {
	var args struct {
		OpID   string `json:"op_id"`
		Signal string `json:"signal"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	number, known := signalNamed(args.Signal)
	if !known {
		return nil, faultf(codeInvalid, "signal %q: a name without SIG, such as INT, TERM or USR1", shorten(args.Signal, 40))
	}
	c, err := s.commands.find(args.OpID)
	if err != nil {
		return nil, err
	}
	return struct {
		Signalled int64 `json:"signalled"`
	}{c.ask(message{kind: messageSignal, numbers: []int64{int64(number)}}, signalPatience, 0)}, nil
}

func (s *server) kill(r *request) (any, error) {
	var args struct {
		OpID   string  `json:"op_id"`
		GraceS float64 `json:"grace_s"`
		Status string  `json:"status"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if args.Status == "" {
		args.Status = statusKilled
	}
	if args.Status != statusKilled && args.Status != statusTimedOut {
		return nil, faultf(codeInvalid, "status %q: it is killed or timed_out", shorten(args.Status, 40))
	}
	if err := checkGrace(args.GraceS); err != nil {
		return nil, err
	}
	c, err := s.commands.find(args.OpID)
	if err != nil {
		return nil, err
	}
	<-c.stop(seconds(args.GraceS), args.Status)
	<-c.finished
	return recordReply{c.record()}, nil
}

func (s *server) forget(r *request) (any, error) {
	var args opRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	return nothing{}, s.commands.forget(args.OpID)
}

func (s *server) extend(r *request) (any, error) {
	var args struct {
		ExpiresInS float64 `json:"expires_in_s"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if !(args.ExpiresInS > 0 && args.ExpiresInS <= maxSeconds) {
		return nil, faultf(codeInvalid, "expires_in_s %v: it must be positive", args.ExpiresInS)
	}
	s.lease.extend(seconds(args.ExpiresInS))
	return struct {
		ExpiresIn *float64 `json:"expires_in_s"`
	}{s.lease.left()}, nil
}

func (s *server) statsVerb(*request) (any, error) { return s.stats(), nil }

func (s *server) shutdownVerb(r *request) (any, error) {
	r.call.reply(nothing{}, nil, func() { s.end(0) })
	return answerLater{}, nil
}
