package main

import (
	"encoding/binary"
	"io"
	"slices"
)

// Frame types.
const (
	frameHello   = 1
	frameRequest = 2
	frameReply   = 3
	frameError   = 4
	frameOutput  = 5
	frameCredit  = 6
	frameCancel  = 7
	framePing    = 8
	framePong    = 9
)

const (
	maxFrameLength   = 2 << 20
	minFrameLength   = 5 // type and call
	maxDocumentJSON  = 1 << 20
	maxDocumentBody  = 1 << 20
	maxPingBytes     = 64
	maxOutputBytes   = 64 << 10
	outputHeaderSize = 4 + 1 + 4 + 1 + 8
	readStep         = 64 << 10
)

type frame struct {
	kind    byte
	call    uint32
	payload []byte
}

// frameHead is the part of a frame that is known before any memory is taken for it.
type frameHead struct {
	kind byte
	call uint32
	size int // of the payload
}

func readFrameHead(r io.Reader) (frameHead, error) {
	var raw [9]byte
	if _, err := io.ReadFull(r, raw[:4]); err != nil {
		return frameHead{}, err
	}
	length := binary.BigEndian.Uint32(raw[:4])
	if length < minFrameLength || length > maxFrameLength {
		return frameHead{}, faultf(codeProtocol, "a frame of %d bytes: a length is between %d and %d", length, minFrameLength, maxFrameLength)
	}
	if _, err := io.ReadFull(r, raw[4:]); err != nil {
		return frameHead{}, err
	}
	head := frameHead{kind: raw[4], call: binary.BigEndian.Uint32(raw[5:]), size: int(length) - minFrameLength}
	return head, head.check()
}

// check refuses what cannot be right before its payload is read.
func (h frameHead) check() error {
	switch h.kind {
	case frameHello:
		if h.call != 0 || h.size > readStep {
			return faultf(codeProtocol, "a HELLO has call 0 and at most %d bytes", readStep)
		}
	case frameRequest:
		if h.call == 0 {
			return faultf(codeProtocol, "a REQUEST needs a call id other than 0")
		}
	case frameCredit:
		if h.size != 4 {
			return faultf(codeProtocol, "a CREDIT of %d bytes: it has exactly 4", h.size)
		}
	case frameCancel:
		if h.size != 0 {
			return faultf(codeProtocol, "a CANCEL of %d bytes: it is empty", h.size)
		}
	case framePing, framePong:
		if h.size > maxPingBytes {
			return faultf(codeProtocol, "a PING of %d bytes: at most %d", h.size, maxPingBytes)
		}
	default:
		return faultf(codeProtocol, "frame type %d: a client sends HELLO, REQUEST, CREDIT, CANCEL, PING or PONG", h.kind)
	}
	return nil
}

// bigPayloads keeps the buffers of bulk transfers, so that an upload does not allocate one MiB per frame. It is no sync.Pool:
// the collector empties those, and with a heap as small as this one it comes every few frames.
var bigPayloads = make(chan []byte, 6)

// readPayload takes memory only as bytes arrive: a length that nothing follows costs one step.
func readPayload(r io.Reader, size int) ([]byte, error) {
	if size <= readStep {
		payload := make([]byte, size)
		_, err := io.ReadFull(r, payload)
		return payload, err
	}
	payload := keptBuffer()[:0]
	for len(payload) < size {
		from := len(payload)
		payload = slices.Grow(payload, min(readStep, size-from))
		payload = payload[:min(cap(payload), size)]
		if _, err := io.ReadFull(r, payload[from:]); err != nil {
			return nil, err
		}
	}
	return payload, nil
}

// recyclePayload may be called once nothing refers to the payload any more.
func recyclePayload(payload []byte) {
	if cap(payload) <= readStep {
		return
	}
	select {
	case bigPayloads <- payload:
	default:
	}
}

func keptBuffer() []byte {
	select {
	case buffer := <-bigPayloads:
		return buffer
	default:
		return nil
	}
}

// appendFrameHead starts a frame; finishFrame fills in its length.
func appendFrameHead(out []byte, kind byte, call uint32) []byte {
	out = append(out, 0, 0, 0, 0, kind)
	return binary.BigEndian.AppendUint32(out, call)
}

// finishFrame sets the length of the frame that begins at from; extra bytes will follow elsewhere.
func finishFrame(out []byte, from, extra int) {
	binary.BigEndian.PutUint32(out[from:], uint32(len(out)-from-4+extra))
}
