package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// defaultPath is where a command without PATH is looked for, as execvp(3) does.
const defaultPath = "/usr/local/bin:/usr/bin:/bin"

// findExecutable gives the file to execute, in the current directory's view and with the
// command's own PATH. Exit codes 127 and 126 as in POSIX shells.
func findExecutable(name string, env []string) (path string, exitCode int) {
	if strings.ContainsRune(name, '/') {
		return name, executableCode(name)
	}
	best := 127
	for _, dir := range filepath.SplitList(variable(env, "PATH", defaultPath)) {
		candidate := filepath.Join(dir, name)
		if dir == "" {
			candidate = "./" + name
		}
		switch executableCode(candidate) {
		case 0:
			return candidate, 0
		case 126:
			best = 126
		}
	}
	return "", best
}

func executableCode(path string) int {
	info, err := os.Stat(path)
	switch {
	case err != nil && !os.IsPermission(err):
		return 127
	case err != nil || info.IsDir() || syscall.Access(path, 1) != nil:
		return 126
	}
	return 0
}

func variable(env []string, name, otherwise string) string {
	for _, entry := range env {
		if value, found := strings.CutPrefix(entry, name+"="); found {
			return value
		}
	}
	return otherwise
}
