package main

import "time"

// requestKill begins a kill of the whole tree, or shortens the grace of the one that runs.
func (s *supervision) requestKill(grace time.Duration) {
	deadline := time.Now().Add(grace)
	s.hurry.Lock()
	defer s.hurry.Unlock()
	if !s.hurry.running {
		s.hurry.running = true
		s.hurry.deadline = deadline
		s.kills.Lock()
		go s.killTree()
		return
	}
	if deadline.Before(s.hurry.deadline) {
		s.hurry.deadline = deadline
		select {
		case s.hurry.changed <- struct{}{}:
		default:
		}
	}
}

// killTree ends with one report, whatever number of requests there were.
func (s *supervision) killTree() {
	defer s.kills.Unlock()
	hunt := newSlayer(s.members, s.empty)
	if s.graceLeft() > 0 {
		hunt.terminate()
		s.awaitGrace()
	}
	left := 0
	if !hunt.isGone() {
		left = hunt.destroy(destroyLimit)
	}
	s.hurry.Lock()
	s.hurry.running = false
	s.hurry.Unlock()
	s.send(message{kind: messageKilled, numbers: []int64{int64(len(hunt.killed)), int64(left)}})
}

func (s *supervision) graceLeft() time.Duration {
	s.hurry.Lock()
	defer s.hurry.Unlock()
	return time.Until(s.hurry.deadline)
}

func (s *supervision) awaitGrace() {
	for {
		left := s.graceLeft()
		if left <= 0 {
			return
		}
		select {
		case <-s.empty:
			return
		case <-s.hurry.changed:
		case <-time.After(left):
		}
	}
}
