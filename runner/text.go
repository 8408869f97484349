package main

import (
	"encoding/json"
	"errors"
	"unicode/utf16"
	"unicode/utf8"
)

// text is a string of any bytes. In JSON, bytes that are not UTF-8 travel as the lone
// surrogates U+DC80…U+DCFF, as Python's "surrogateescape" does (PEP 383). encoding/json
// would replace them with U+FFFD, and a file name would silently become another one.
type text string

// UnmarshalJSON gets the raw literal, before encoding/json could damage it.
func (t *text) UnmarshalJSON(raw []byte) error {
	if string(raw) == "null" {
		return nil
	}
	if len(raw) < 2 || raw[0] != '"' || raw[len(raw)-1] != '"' {
		return &json.UnmarshalTypeError{Value: "non-string", Field: "text"}
	}
	decoded, err := decodeLiteral(raw[1 : len(raw)-1])
	*t = text(decoded)
	return err
}

var simpleEscapes = map[byte]byte{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

func decodeLiteral(raw []byte) ([]byte, error) {
	out := make([]byte, 0, len(raw))
	for at := 0; at < len(raw); {
		if raw[at] != '\\' {
			out = append(out, raw[at])
			at++
			continue
		}
		if at+1 >= len(raw) {
			return nil, errors.New("a string ends in a backslash")
		}
		if raw[at+1] != 'u' {
			plain, known := simpleEscapes[raw[at+1]]
			if !known {
				return nil, errors.New("unknown escape in a string")
			}
			out = append(out, plain)
			at += 2
			continue
		}
		unit, used, err := decodeUnicodeEscape(raw[at:])
		if err != nil {
			return nil, err
		}
		out = appendUnit(out, unit)
		at += used
	}
	return out, nil
}

// decodeUnicodeEscape reads \uXXXX, or two of them that form one character.
func decodeUnicodeEscape(raw []byte) (unit rune, used int, err error) {
	first, err := hexUnit(raw)
	if err != nil {
		return 0, 0, err
	}
	if !utf16.IsSurrogate(first) || len(raw) < 12 || raw[6] != '\\' || raw[7] != 'u' {
		return first, 6, nil
	}
	second, err := hexUnit(raw[6:])
	if err != nil {
		return 0, 0, err
	}
	if joined := utf16.DecodeRune(first, second); joined != utf8.RuneError {
		return joined, 12, nil
	}
	return first, 6, nil
}

func hexUnit(raw []byte) (rune, error) {
	if len(raw) < 6 {
		return 0, errors.New("a \\u escape is cut short")
	}
	var value rune
	for _, digit := range raw[2:6] {
		value <<= 4
		switch {
		case digit >= '0' && digit <= '9':
			value |= rune(digit - '0')
		case digit|0x20 >= 'a' && digit|0x20 <= 'f':
			value |= rune(digit|0x20-'a') + 10
		default:
			return 0, errors.New("a \\u escape has a digit that is not hexadecimal")
		}
	}
	return value, nil
}

func appendUnit(out []byte, unit rune) []byte {
	if unit >= 0xdc80 && unit <= 0xdcff {
		return append(out, byte(unit-0xdc00))
	}
	return utf8.AppendRune(out, unit) // other lone surrogates name nothing: U+FFFD
}

const hexDigits = "0123456789abcdef"

// MarshalJSON escapes what is not UTF-8 the same way back.
func (t text) MarshalJSON() ([]byte, error) {
	out := make([]byte, 0, len(t)+2)
	out = append(out, '"')
	for at := 0; at < len(t); {
		r, size := utf8.DecodeRuneInString(string(t[at:]))
		switch {
		case r == utf8.RuneError && size == 1:
			out = appendEscape(out, 0xdc00+rune(t[at]))
		case r == '"' || r == '\\':
			out = append(out, '\\', byte(r))
		case r < 0x20 || r == 0x7f:
			out = appendEscape(out, r)
		default:
			out = append(out, t[at:at+size]...)
		}
		at += size
	}
	return append(out, '"'), nil
}

func appendEscape(out []byte, unit rune) []byte {
	return append(out, '\\', 'u', hexDigits[unit>>12&15], hexDigits[unit>>8&15], hexDigits[unit>>4&15], hexDigits[unit&15])
}

func plainStrings(values []text) []string {
	plain := make([]string, len(values))
	for i, value := range values {
		plain[i] = string(value)
	}
	return plain
}
