package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"unicode/utf8"
)

// document is a JSON object with raw bytes after it.
type document struct {
	json []byte
	body []byte
}

func parseDocument(payload []byte) (document, error) {
	if len(payload) < 4 {
		return document{}, faultf(codeProtocol, "a document of %d bytes: it begins with the 4 bytes of a length", len(payload))
	}
	length := binary.BigEndian.Uint32(payload)
	rest := payload[4:]
	if length > maxDocumentJSON || int(length) > len(rest) {
		return document{}, faultf(codeProtocol, "a document says %d bytes of JSON, %d follow, at most %d are allowed", length, len(rest), maxDocumentJSON)
	}
	doc := document{json: rest[:length], body: rest[length:]}
	if len(doc.body) > maxDocumentBody {
		return document{}, faultf(codeProtocol, "a body of %d bytes: at most %d", len(doc.body), maxDocumentBody)
	}
	if !bytes.HasPrefix(bytes.TrimLeft(doc.json, " \t\r\n"), []byte("{")) || !utf8.Valid(doc.json) || !json.Valid(doc.json) {
		return document{}, faultf(codeProtocol, "a document is not one JSON object in UTF-8")
	}
	return doc, nil
}

// decode reads the object into a struct; a member of the wrong type is the caller's mistake.
func (d document) decode(into any) error {
	err := json.Unmarshal(d.json, into)
	var mismatch *json.UnmarshalTypeError
	if errors.As(err, &mismatch) {
		return faultf(codeInvalid, "%q must not be a %s", mismatch.Field, mismatch.Value)
	}
	if err != nil {
		return faultf(codeInvalid, "%s", err.Error())
	}
	return nil
}

// digest is the same for documents with the same members, in whatever order, and the same body. It tells a repetition
// from a mistake of ours, not from an attack: a quick hash is enough for a body of 1 MiB.
func (d document) digest(seed maphash.Seed) (uint64, error) {
	var members map[string]json.RawMessage
	if err := d.decode(&members); err != nil {
		return 0, err
	}
	var hash maphash.Hash
	hash.SetSeed(seed)
	fmt.Fprintf(&hash, "%d", len(members))
	for _, name := range slices.Sorted(maps.Keys(members)) {
		fmt.Fprintf(&hash, ",%d:%s,%d:%s", len(name), name, len(members[name]), members[name])
	}
	_, _ = hash.Write(d.body)
	return hash.Sum64(), nil
}

// appendDocument adds a whole frame with a document, but for the body, which is sent after it.
func appendDocument(out []byte, kind byte, call uint32, value any, body []byte) []byte {
	from := len(out)
	out = appendFrameHead(out, kind, call)
	encoded, err := json.Marshal(value)
	if err != nil { // only if a struct of ours cannot be encoded
		encoded = []byte(`{"code":"internal","message":"the answer could not be encoded"}`)
		out[from+4] = frameError
	}
	out = binary.BigEndian.AppendUint32(out, uint32(len(encoded)))
	out = append(out, encoded...)
	finishFrame(out, from, len(body))
	return out
}
