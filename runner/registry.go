package main

import (
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
)

const maxFinished = 1000

// checkOpID: an op id is also a file name, so "." and ".." must not pass.
func checkOpID(id string) error { return checkID("op_id", id) }

func checkID(what, id string) error {
	if isName(id, "._:-") && !hasByte(".:-", id[0]) {
		return nil
	}
	return faultf(codeInvalid, "%s %q: 1 to 128 of A-Z a-z 0-9 . _ : -, beginning with a letter, digit or _", what, shorten(id, 80))
}

// isName is true for 1 to 128 letters, digits and extra characters. No regular expressions: to
// compile one costs every start of a supervisor a millisecond.
func isName(s, extra string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && !(c >= '0' && c <= '9') && !hasByte(extra, c) {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= 128
}

func hasNUL(s string) bool          { return hasByte(s, 0) }
func hasByte(s string, b byte) bool { return strings.IndexByte(s, b) >= 0 }

// registry knows every command of this sandbox, running and finished.
type registry struct {
	volatile  bool   // set once, before the first command
	dir       string // <spool>/commands
	workspace string
	limit     int
	children  *children
	disk      gate
	rings     *budget

	mu      sync.Mutex
	known   map[string]*command
	running int
	ended   []*command // finished, oldest first
	dropped *dropped
}

func newRegistry(spool, workspace string, limit int, c *children) *registry {
	return &registry{dir: filepath.Join(spool, commandsDir), workspace: workspace, limit: limit, children: c,
		disk: newGate(8), rings: &budget{left: ringsTotal}, known: map[string]*command{}, dropped: newDropped()}
}

// start runs a command, or finds the one that already has this op id.
func (r *registry) start(request *startRequest) (c *command, created bool, err error) {
	c, created, err = r.claim(request)
	if err != nil {
		return nil, false, err
	}
	if !created {
		<-c.started
		return c, false, c.startErr
	}
	c.prepare(r.makeDir(request.OpID), request.SpoolLimit)
	if err := c.launch(request, r.workspace); err != nil {
		r.withdraw(c)
		c.startErr = err
		close(c.started)
		return nil, false, err
	}
	close(c.started)
	return c, true, nil
}

func (r *registry) claim(request *startRequest) (*command, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if request.fenced() { // asked in here: an owner that comes later and finds no such command can rely on that
		return nil, false, errFenced
	}
	if c := r.known[request.OpID]; c != nil {
		if c.digest != request.Digest {
			return nil, false, opConflict(request.OpID)
		}
		return c, false, nil
	}
	if r.dropped.has(request.OpID) {
		if !r.dropped.sameDigest(request.OpID, request.Digest) {
			return nil, false, opConflict(request.OpID)
		}
		return r.ghost(request.OpID, request.Digest), false, nil
	}
	if r.running >= r.limit {
		return nil, false, faultf(codeBusy, "%d commands run in this sandbox, which is its limit; wait for one to end", r.running)
	}
	c := newCommand(r, request.OpID, request.Digest)
	r.known[c.id] = c
	r.running++
	return c, true, nil
}

func opConflict(id string) error {
	return faultf(codeOpConflict, "op_id %q already names another command; use a new op id", id)
}

// makeDir gives the command's spool directory, or "" on a full disk: a command that frees
// space must be able to run then.
func (r *registry) makeDir(id string) string {
	dir := filepath.Join(r.dir, id)
	if os.Mkdir(dir, 0o700) == nil {
		return dir
	}
	_ = os.RemoveAll(dir) // what is there belongs to no command we know
	if os.Mkdir(dir, 0o700) != nil {
		return ""
	}
	return dir
}

func (c *command) prepare(dir string, limit *int64) {
	c.dir = dir
	most := int64(defaultSpoolLimit)
	if limit != nil {
		most = *limit
	}
	for i, name := range []string{"stdout", "stderr"} {
		path := ""
		if dir != "" {
			path = filepath.Join(dir, name)
		}
		c.streams[i] = newStream(path, most, c.registry.rings)
	}
}

func (r *registry) withdraw(c *command) {
	r.mu.Lock()
	delete(r.known, c.id)
	r.running--
	r.mu.Unlock()
	if c.dir != "" {
		_ = os.RemoveAll(c.dir)
	}
}

// retire counts a command as finished and drops the oldest beyond the limit.
func (r *registry) retire(c *command) {
	r.mu.Lock()
	r.running--
	r.ended = append(r.ended, c)
	var old *command
	if len(r.ended) > maxFinished {
		old = r.ended[0]
		r.ended = r.ended[1:]
		r.drop(old)
	}
	r.mu.Unlock()
	if old != nil {
		old.discard()
	}
}

// drop forgets a finished command's record, but not that it ran; r.mu is held.
func (r *registry) drop(c *command) {
	delete(r.known, c.id)
	r.dropped.add(c)
}

func (c *command) discard() {
	for _, s := range c.streams {
		s.discard()
	}
	if c.dir != "" {
		_ = os.RemoveAll(c.dir)
	}
}

// find gives a command that was started.
func (r *registry) find(id string) (*command, error) {
	r.mu.Lock()
	c, gone := r.known[id], r.dropped.has(id)
	r.mu.Unlock()
	if c != nil {
		<-c.started
		if c.startErr == nil {
			return c, nil
		}
	}
	if gone {
		return nil, faultf(codeOpDropped, "command %q: %s", shorten(id, 140), droppedCause)
	}
	return nil, faultf(codeOpUnknown, "no command with op_id %q is known here", shorten(id, 140))
}

func (r *registry) forget(id string) error {
	c, err := r.find(id)
	if err != nil {
		return err
	}
	if !c.isFinished() {
		return faultf(codeBusy, "command %q is running; kill it first", id)
	}
	r.mu.Lock()
	present := r.known[id] == c
	if present {
		r.drop(c)
		for i, other := range r.ended {
			if other == c {
				r.ended = append(r.ended[:i:i], r.ended[i+1:]...)
				break
			}
		}
	}
	r.mu.Unlock()
	if present {
		c.discard()
	}
	return nil
}

// list gives records, running commands first, then the newest.
func (r *registry) list() []record {
	r.mu.Lock()
	all := make([]*command, 0, len(r.known))
	for _, c := range r.known {
		select {
		case <-c.started:
			if c.startErr == nil {
				all = append(all, c)
			}
		default:
		}
	}
	r.mu.Unlock()
	records := make([]record, len(all))
	for i, c := range all {
		records[i] = c.record()
	}
	sort.Slice(records, func(i, j int) bool {
		if (records[i].State == "running") != (records[j].State == "running") {
			return records[i].State == "running"
		}
		return records[i].StartedAtMillis > records[j].StartedAtMillis
	})
	return records[:min(len(records), maxFinished)]
}

func (r *registry) runningCount() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}

// load takes over what an earlier serve left in the spool.
func (r *registry) load() {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		dir := filepath.Join(r.dir, entry.Name())
		saved, ok := loadRecord(dir, entry.Name())
		if !ok || checkOpID(entry.Name()) != nil {
			_ = os.RemoveAll(dir)
			continue
		}
		r.adopt(dir, saved)
	}
	sort.Slice(r.ended, func(i, j int) bool {
		return r.ended[i].result.StartedAtMillis < r.ended[j].result.StartedAtMillis
	})
	for len(r.ended) > maxFinished {
		r.drop(r.ended[0])
		r.ended[0].discard()
		r.ended = r.ended[1:]
	}
}

func (r *registry) adopt(dir string, saved savedRecord) {
	c := newCommand(r, saved.Record.OpID, saved.Digest)
	c.dir, c.result = dir, saved.Record
	c.streams[0] = loadStream(dir, "stdout", saved.Record.StdoutBytes, r.rings)
	c.streams[1] = loadStream(dir, "stderr", saved.Record.StderrBytes, r.rings)
	c.measure(&c.result)
	close(c.counts)
	close(c.started)
	close(c.finished)
	_ = saveRecord(dir, c.digest, c.result)
	r.known[c.id] = c
	r.ended = append(r.ended, c)
}

// gate bounds how many goroutines sit in blocking file calls, each of which holds a thread.
type gate struct{ slots chan struct{} }

func newGate(n int) gate { return gate{slots: make(chan struct{}, n)} }

func (g gate) enter() (leave func()) {
	g.slots <- struct{}{}
	return func() { <-g.slots }
}
