package main

import (
	"encoding/binary"
	"errors"
	"io"
)

// Messages between serve and a supervisor, over a Unix socket pair. Length-prefixed and
// binary, so that a supervisor needs no JSON and arguments may be any bytes.
const (
	messageStart    = 'S' // → numbers: stdin passed (0|1); strings: cwd, count of argv, argv…, env…
	messageKill     = 'K' // → numbers: grace in ms
	messageSignal   = 'G' // → numbers: signal
	messageCount    = 'C' // →
	messageRelease  = 'R' // → forget this command and wait for the next
	messageStarted  = 's' // ← numbers: pid
	messageFailed   = 'f' // ← numbers: exit code (0: not a finished command but a fault); strings: code, message
	messageExited   = 'e' // ← numbers: exit code, signal, 1 if other processes of the tree live
	messageKilled   = 'k' // ← numbers: killed, left
	messageSignaled = 'g' // ← numbers: signalled
	messageCounted  = 'c' // ← numbers: processes that live
	messageDone     = 'd' // ← the tree is empty; the supervisor waits for the next command
)

const maxMessage = 4 << 20

type message struct {
	kind    byte
	numbers []int64
	strings []string
}

func (m message) number(index int) int64 {
	if index < len(m.numbers) {
		return m.numbers[index]
	}
	return 0
}

func (m message) text(index int) string {
	if index < len(m.strings) {
		return m.strings[index]
	}
	return ""
}

func (m message) encode() []byte {
	size := 16 + 9*len(m.numbers)
	for _, s := range m.strings {
		size += 5 + len(s)
	}
	out := make([]byte, 4, size)
	out = append(out, m.kind)
	out = binary.AppendUvarint(out, uint64(len(m.numbers)))
	for _, n := range m.numbers {
		out = binary.AppendVarint(out, n)
	}
	for _, s := range m.strings {
		out = binary.AppendUvarint(out, uint64(len(s)))
		out = append(out, s...)
	}
	binary.BigEndian.PutUint32(out, uint32(len(out)-4))
	return out
}

var errBadMessage = errors.New("malformed message between serve and supervise")

func decodeMessage(raw []byte) (message, error) {
	if len(raw) == 0 {
		return message{}, errBadMessage
	}
	m := message{kind: raw[0]}
	rest := raw[1:]
	count, used := binary.Uvarint(rest)
	if used <= 0 || count > 16 {
		return message{}, errBadMessage
	}
	rest = rest[used:]
	for range count {
		n, used := binary.Varint(rest)
		if used <= 0 {
			return message{}, errBadMessage
		}
		m.numbers = append(m.numbers, n)
		rest = rest[used:]
	}
	for len(rest) > 0 {
		size, used := binary.Uvarint(rest)
		if used <= 0 || size > uint64(len(rest)-used) {
			return message{}, errBadMessage
		}
		m.strings = append(m.strings, string(rest[used:used+int(size)]))
		rest = rest[used+int(size):]
	}
	return m, nil
}

// readMessage reads one message of at most limit bytes.
func readMessage(r io.Reader, limit uint32) (message, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return message{}, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > limit {
		return message{}, errBadMessage
	}
	raw := make([]byte, size)
	if _, err := io.ReadFull(r, raw); err != nil {
		return message{}, err
	}
	return decodeMessage(raw)
}
