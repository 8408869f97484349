package main

import (
	"encoding/json"
	"errors"
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

// verb handles a request: run returns the answer, or has arranged for it (answerLater).
type verb struct {
	run   func(s *server, r *request) (any, error)
	turns bool // it waits for its turn with the file system
	once  bool // a repetition would do something again, so it may carry a request_id; its answers are small
}

// answerLater is what a verb returns whose call is answered by an attachment or by itself.
type answerLater struct{}

type nothing struct{} // {}

var verbs = map[string]verb{
	"start":       {run: (*server).start},
	"attach":      {run: (*server).attach},
	"status":      {run: (*server).status},
	"list":        {run: (*server).list},
	"stdin":       {run: (*server).stdin},
	"signal":      {run: (*server).signal, once: true},
	"kill":        {run: (*server).kill},
	"forget":      {run: (*server).forget, once: true},
	"write":       {run: (*server).write, turns: true, once: true},
	"abort_write": {run: (*server).abortWrite, turns: true, once: true},
	"read":        {run: (*server).read}, // it waits for room for its answer first
	"stat":        {run: (*server).stat, turns: true},
	"list_files":  {run: (*server).listFiles, turns: true},
	"mkdir":       {run: (*server).mkdir, turns: true, once: true},
	"remove":      {run: (*server).remove, turns: true, once: true},
	"pack":        {run: (*server).pack, turns: true, once: true},
	"unpack":      {run: (*server).unpack, turns: true, once: true},
	"extend":      {run: (*server).extend},
	"stats":       {run: (*server).statsVerb},
	"shutdown":    {run: (*server).shutdownVerb},
}

func (s *server) handle(r *request) {
	defer r.release()
	answer, err := s.dispatch(r)
	if errors.Is(err, errFenced) {
		return
	}
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
	v, known := verbs[named.Verb]
	if !known {
		return nil, faultf(codeInvalid, "verb %q is not known to this runner", shorten(named.Verb, 40))
	}
	if v.once {
		return s.performOnce(named.Verb, v, r)
	}
	return s.perform(v, r)
}

// performOnce heeds the request's id, if it has one.
func (s *server) performOnce(name string, v verb, r *request) (any, error) {
	var args struct {
		RequestID *string `json:"request_id"`
	}
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	if args.RequestID == nil {
		return s.perform(v, r)
	}
	if err := checkID("request_id", *args.RequestID); err != nil {
		return nil, err
	}
	digest, err := r.document.digest(s.answers.seed)
	if err != nil {
		return nil, err
	}
	key := requestKey{name, *args.RequestID}
	return s.answers.once(key, digest, r.call.cancelled, func() (any, error) { return s.perform(v, r) })
}

// perform runs a verb when its turn has come, unless its connection was fenced meanwhile.
func (s *server) perform(v verb, r *request) (any, error) {
	if v.turns {
		defer s.files.enter()()
	}
	if r.connection.isStale() {
		return nil, errFenced
	}
	return v.run(s, r)
}

func (s *server) start(r *request) (any, error) {
	var args startRequest
	if err := r.document.decode(&args); err != nil {
		return nil, err
	}
	args.body, args.fenced = r.document.body, r.connection.isStale
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
