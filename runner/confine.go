package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// diskParts are the directories of a sandbox's disk, each shown at a place of its own: one size holds for all of them together.
var diskParts = []struct {
	name string
	mode uint32
}{{"workspace", 0o777}, {"home", 0o777}, {"tmp", 0o1777}}

// confineMain runs inside the new user namespace, as its root, before bubblewrap.
func confineMain(args []string) int {
	flags := flag.NewFlagSet("confine", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	forbid := flags.Bool("no-user-namespaces", false, "")
	disk := flags.String("disk", "", "")
	if err := flags.Parse(args); err != nil || flags.NArg() == 0 {
		return complain("confine: needs -- ARGV")
	}
	if *disk != "" {
		if err := mountDisk(*disk); err != nil {
			return complain("confine: disk %s: %s", *disk, err)
		}
	}
	// Nobody in the sandbox may make another one: a nested namespace gives capabilities that open much of the kernel to attack.
	if *forbid {
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0o644); err != nil {
			return complain("confine: forbid nested user namespaces: %s", err)
		}
	}
	argv := flags.Args()
	err := syscall.Exec(argv[0], argv, os.Environ())
	return complain("confine: %s: %s", argv[0], err)
}

// parseDisk reads DIR:BYTES.
func parseDisk(value string) (dir string, size uint64, err error) {
	at := strings.LastIndexByte(value, ':')
	if at > 0 {
		dir = value[:at]
		size, err = strconv.ParseUint(value[at+1:], 10, 63)
	}
	if at <= 0 || err != nil || size == 0 {
		return "", 0, fmt.Errorf("%q: a directory and a positive size, DIR:BYTES", value)
	}
	return dir, size, nil
}

// mountDisk makes the memory that is the sandbox's disk, in a mount namespace of its own: the host never sees it, and it goes with
// the last process. Its inodes are limited too: an empty file has no bytes, but costs the kernel about 1 KiB. tmpfs(5).
func mountDisk(value string) error {
	dir, size, err := parseDisk(value)
	if err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SLAVE, ""); err != nil {
		return os.NewSyscallError("make mounts private", err)
	}
	options := fmt.Sprintf("mode=0755,size=%d,nr_inodes=%d", size, size/4096+16384)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		return os.NewSyscallError("mount", err)
	}
	return makeDiskParts(dir)
}

func makeDiskParts(dir string) error {
	for _, part := range diskParts {
		path := filepath.Join(dir, part.name)
		if err := os.Mkdir(path, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		if err := syscall.Chmod(path, part.mode); err != nil { // the file mode creation mask does not count here
			return os.NewSyscallError("chmod "+path, err)
		}
	}
	return nil
}
