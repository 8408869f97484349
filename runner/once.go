package main

import (
	"encoding/json"
	"errors"
	"hash/maphash"
	"sync"
)

const (
	mostAnswers    = 4096
	maxAnswerBytes = 4 << 10 // of a reply that is remembered; those of verbs that change something have a few dozen
)

// errFenced is for a request that waited while a newer owner came: it begins nothing and is
// answered by the ERROR that ends its connection.
var errFenced = faultf(codeEpochStale, "the sandbox has a newer owner")

// requestKey names a request that a client may send again, over any connection and under any epoch.
type requestKey struct{ verb, id string }

// answers remembers how requests were answered: whoever sent one and did not hear its answer, or
// takes over from one who died, asks again and gets that answer instead of a second deed.
type answers struct {
	seed maphash.Seed

	mu    sync.Mutex
	known map[requestKey]*answered
	order []requestKey // those that are answered, oldest first
}

// answered is one request, at work until done is closed. Nothing but digest is set before that.
type answered struct {
	digest uint64
	done   chan struct{}
	final  bool // false: nothing was done, so a repetition is as good as the first
	reply  json.RawMessage
	err    error
}

func newAnswers() *answers {
	return &answers{seed: maphash.MakeSeed(), known: map[requestKey]*answered{}}
}

// once does the work, or gives the answer that it had before. A repetition waits for a first that is still at work.
func (a *answers) once(key requestKey, digest uint64, cancelled <-chan struct{}, work func() (any, error)) (any, error) {
	for {
		entry, mine, err := a.claim(key, digest)
		if err != nil {
			return nil, err
		}
		if mine {
			answer, err := work()
			a.settle(key, entry, answer, err)
			return answer, err
		}
		select {
		case <-entry.done:
		case <-cancelled:
			return nil, faultf(codeCancelled, "the client cancelled the call")
		}
		if entry.final {
			return entry.reply, entry.err
		}
	}
}

func (a *answers) claim(key requestKey, digest uint64) (entry *answered, mine bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if entry = a.known[key]; entry == nil {
		entry = &answered{digest: digest, done: make(chan struct{})}
		a.known[key] = entry
		return entry, true, nil
	}
	if entry.digest != digest {
		return nil, false, faultf(codeOpConflict, "request_id %q already names another %s; use a new one", key.id, key.verb)
	}
	return entry, false, nil
}

// settle keeps the answer and drops the oldest beyond the limit. Those who wait get one that is too big to keep, too.
func (a *answers) settle(key requestKey, entry *answered, answer any, err error) {
	entry.err = err
	entry.final = !isPassing(err)
	if err == nil {
		entry.reply, entry.err = json.Marshal(answer)
	}
	a.mu.Lock()
	if entry.final && len(entry.reply) <= maxAnswerBytes {
		a.order = append(a.order, key)
	} else {
		delete(a.known, key)
	}
	if len(a.order) > mostAnswers {
		delete(a.known, a.order[0])
		a.order = a.order[1:]
	}
	a.mu.Unlock()
	close(entry.done)
}

// isPassing is true for faults of the moment. They say nothing of the request itself: it may be tried again.
func isPassing(err error) bool {
	var known *fault
	if !errors.As(err, &known) {
		return err != nil
	}
	switch known.Code {
	case codeBusy, codeCancelled, codeEpochStale, codeInternal:
		return true
	}
	return false
}
