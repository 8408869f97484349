package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const (
	statusExited      = "exited"
	statusSignaled    = "signaled"
	statusTimedOut    = "timed_out"
	statusKilled      = "killed"
	statusOutOfMemory = "out_of_memory"
	statusUnknown     = "unknown"
)

// record is what a client learns about a command; docs/protocol.md, RECORD.
type record struct {
	OpID            string  `json:"op_id"`
	State           string  `json:"state"`
	Status          *string `json:"status"`
	ExitCode        *int    `json:"exit_code"`
	Signal          *string `json:"signal"`
	StdoutBytes     int64   `json:"stdout_bytes"`
	StderrBytes     int64   `json:"stderr_bytes"`
	StdoutKept      int64   `json:"stdout_kept_bytes"`
	StderrKept      int64   `json:"stderr_kept_bytes"`
	SpoolTruncated  bool    `json:"spool_truncated"`
	StartedAtMillis int64   `json:"started_at_ms"`
	DurationSeconds float64 `json:"duration_s"`
	PID             *int    `json:"pid"`
	Cause           *string `json:"cause"`
	Killed          int     `json:"killed_processes"`
	Background      int     `json:"background_processes"`
	OOMKills        int64   `json:"oom_kills"`
}

// savedStart and savedRecord are the files start.json and record.json of a command.
type savedStart struct {
	OpID            string `json:"op_id"`
	Digest          string `json:"digest"`
	StartedAtMillis int64  `json:"started_at_ms"`
}

type savedRecord struct {
	Digest string `json:"digest"`
	Record record `json:"record"`
}

const (
	startFile  = "start.json"
	recordFile = "record.json"
)

func saveStart(dir, opID, digest string, startedAt time.Time) error {
	encoded, err := json.Marshal(savedStart{opID, digest, startedAt.UnixMilli()})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, startFile), encoded, 0o600)
}

// saveRecord replaces record.json in one step: a reader sees the old one or the new one.
func saveRecord(dir, digest string, r record) error {
	encoded, err := json.Marshal(savedRecord{digest, r})
	if err != nil {
		return err
	}
	temporary := filepath.Join(dir, recordFile+".new")
	if err := os.WriteFile(temporary, encoded, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(dir, recordFile))
}

// readSaved reads one small JSON file of a spool that hostile code may have touched.
func readSaved(path string, into any) error {
	file, err := openRegular(path)
	if err != nil {
		return err
	}
	defer file.Close()
	encoded := make([]byte, 64<<10)
	size, _ := file.ReadAt(encoded, 0)
	return json.Unmarshal(encoded[:size], into)
}

// loadRecord gives what an earlier serve left of a command; started without a record is unknown.
func loadRecord(dir, opID string) (savedRecord, bool) {
	var saved savedRecord
	if readSaved(filepath.Join(dir, recordFile), &saved) == nil && saved.Record.OpID == opID && saved.Record.State == "finished" {
		return saved, true
	}
	var start savedStart
	if readSaved(filepath.Join(dir, startFile), &start) != nil || start.OpID != opID {
		return savedRecord{}, false
	}
	saved = savedRecord{Digest: start.Digest, Record: record{
		OpID: opID, State: "finished", Status: pointer(statusUnknown),
		Cause: pointer("the runner was restarted"), StartedAtMillis: start.StartedAtMillis,
	}}
	return saved, true
}

func pointer[T any](value T) *T { return &value }

var signalNames = map[syscall.Signal]string{
	syscall.SIGHUP: "HUP", syscall.SIGINT: "INT", syscall.SIGQUIT: "QUIT", syscall.SIGILL: "ILL", syscall.SIGTRAP: "TRAP",
	syscall.SIGABRT: "ABRT", syscall.SIGBUS: "BUS", syscall.SIGFPE: "FPE", syscall.SIGKILL: "KILL", syscall.SIGUSR1: "USR1",
	syscall.SIGSEGV: "SEGV", syscall.SIGUSR2: "USR2", syscall.SIGPIPE: "PIPE", syscall.SIGALRM: "ALRM", syscall.SIGTERM: "TERM",
	syscall.SIGSTKFLT: "STKFLT", syscall.SIGCHLD: "CHLD", syscall.SIGCONT: "CONT", syscall.SIGSTOP: "STOP", syscall.SIGTSTP: "TSTP",
	syscall.SIGTTIN: "TTIN", syscall.SIGTTOU: "TTOU", syscall.SIGURG: "URG", syscall.SIGXCPU: "XCPU", syscall.SIGXFSZ: "XFSZ",
	syscall.SIGVTALRM: "VTALRM", syscall.SIGPROF: "PROF", syscall.SIGWINCH: "WINCH", syscall.SIGIO: "IO", syscall.SIGPWR: "PWR", syscall.SIGSYS: "SYS",
}

func signalNamed(name string) (syscall.Signal, bool) {
	for number, known := range signalNames {
		if known == name {
			return number, true
		}
	}
	return 0, false
}

func signalName(number syscall.Signal) string {
	if name, known := signalNames[number]; known {
		return name
	}
	return "RT" + strconv.Itoa(int(number)) // real-time signals have no fixed names
}
