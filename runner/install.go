package main

import (
	"io"
	"os"
)

// installMain copies this program to a path. Who cannot read a program runs it non-dumpable from its first instruction on
// (execve(2), prctl(2) PR_SET_DUMPABLE): with another owner than the sandbox's user, none of its commands can look into a bridge.
func installMain(args []string) int {
	if len(args) != 1 {
		return complain("install: needs one PATH to copy this program to")
	}
	if err := install(args[0]); err != nil {
		return complain("install: %s", err)
	}
	return 0
}

func install(path string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	from, err := os.Open(self)
	if err != nil {
		return err
	}
	defer from.Close()
	half := path + ".new"
	to, err := os.OpenFile(half, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(half)
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	if err := to.Chmod(0o111); err != nil { // another file system could forbid it
		return err
	}
	if err := to.Close(); err != nil {
		return err
	}
	return os.Rename(half, path)
}
