package main

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// The error codes of the protocol.
const (
	codeProtocol      = "protocol_error"
	codeEpochStale    = "epoch_stale"
	codeUnauthorized  = "unauthorized"
	codeInvalid       = "invalid"
	codeOpUnknown     = "op_unknown"
	codeOpDropped     = "op_dropped"
	codeOpConflict    = "op_conflict"
	codeBusy          = "busy"
	codeCancelled     = "cancelled"
	codeNotFound      = "not_found"
	codeExists        = "exists"
	codeNotDirectory  = "not_a_directory"
	codeIsDirectory   = "is_a_directory"
	codePermission    = "permission"
	codeNoSpace       = "no_space"
	codePathForbidden = "path_not_allowed"
	codeChecksum      = "checksum_mismatch"
	codeChanged       = "changed"
	codeStdinClosed   = "stdin_closed"
	codeInternal      = "internal"
)

// fault is an error that a client gets to see: an ERROR frame's document.
type fault struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (f *fault) Error() string { return f.Code + ": " + f.Message }

func faultf(code, format string, values ...any) *fault {
	return &fault{Code: code, Message: shorten(fmt.Sprintf(format, values...), 600)}
}

// shorten keeps messages and causes small whatever a sandbox puts into a path or name.
func shorten(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return text[:limit] + "…"
}

// errnoCodes says which code a failed system call on a file becomes.
var errnoCodes = map[syscall.Errno]string{
	syscall.ENOENT: codeNotFound, syscall.EEXIST: codeExists, syscall.ENOTEMPTY: codeExists,
	syscall.ENOTDIR: codeNotDirectory, syscall.EISDIR: codeIsDirectory,
	syscall.EACCES: codePermission, syscall.EPERM: codePermission, syscall.EROFS: codePermission,
	syscall.ETXTBSY: codePermission, syscall.EBUSY: codePermission,
	syscall.ENOSPC: codeNoSpace, syscall.EDQUOT: codeNoSpace, syscall.EFBIG: codeNoSpace,
	syscall.ELOOP: codeInvalid, syscall.ENAMETOOLONG: codeInvalid, syscall.EINVAL: codeInvalid,
	syscall.EMFILE: codeBusy, syscall.ENFILE: codeBusy, syscall.ENOMEM: codeBusy, syscall.EAGAIN: codeBusy,
}

// fileFault turns an error of a file operation into a fault about the path the client named.
func fileFault(err error, path string) *fault {
	var already *fault
	if errors.As(err, &already) {
		return already
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if code, known := errnoCodes[errno]; known {
			return faultf(code, "%q: %s", path, errno.Error())
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return faultf(codeNotFound, "%q does not exist", path)
	case errors.Is(err, fs.ErrExist):
		return faultf(codeExists, "%q exists", path)
	case isEscape(err):
		return faultf(codePathForbidden, "%q leads out of the allowed directories", path)
	}
	return faultf(codeInternal, "%q: %s", path, err.Error())
}

// asFault makes sure that whatever a verb returns can be sent.
func asFault(err error) *fault {
	var known *fault
	if errors.As(err, &known) {
		return known
	}
	return faultf(codeInternal, "%s", err.Error())
}
