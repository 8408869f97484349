package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// launchOptions are the flags of `runner launch`.
type launchOptions struct {
	socket, log       string
	cgroups           stringList
	mapUser, mapGroup string
	disk              string
	seccomp           bool
	users, groups     []syscall.SysProcIDMap
	argv              []string
}

// launchMain opens the socket, starts the sandbox behind it and leaves it alone.
func launchMain(args []string) int {
	o, err := parseLaunch(args)
	if err != nil {
		return complain("launch: %s", err)
	}
	pid, err := o.launch()
	if err != nil {
		return complain("launch: %s", err)
	}
	var buffer [1024]byte
	started, _ := readProcess(pid, buffer[:])
	fmt.Printf("{\"pid\":%d,\"start_time\":%d}\n", pid, started.start)
	return 0
}

func parseLaunch(args []string) (*launchOptions, error) {
	o := &launchOptions{}
	flags := flag.NewFlagSet("launch", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.socket, "socket", "", "")
	flags.StringVar(&o.log, "log", "", "")
	flags.Var(&o.cgroups, "cgroup", "")
	flags.StringVar(&o.mapUser, "map-user", "", "")
	flags.StringVar(&o.mapGroup, "map-group", "", "")
	flags.StringVar(&o.disk, "disk", "", "")
	flags.BoolVar(&o.seccomp, "seccomp", false, "")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	o.argv = flags.Args()
	if o.socket == "" || o.log == "" || len(o.argv) == 0 || (o.mapUser == "") != (o.mapGroup == "") {
		return nil, fmt.Errorf("needs --socket PATH, --log PATH, both or none of --map-user and --map-group, and -- ARGV")
	}
	if o.disk != "" {
		if _, _, err := parseDisk(o.disk); err != nil {
			return nil, err
		}
	}
	if o.mapUser == "" {
		return o, nil
	}
	var err error
	if o.users, err = parseMapping(o.mapUser); err != nil {
		return nil, err
	}
	o.groups, err = parseMapping(o.mapGroup)
	return o, err
}

// parseMapping maps root to the caller's root and ID to HOSTID; user_namespaces(7).
func parseMapping(value string) ([]syscall.SysProcIDMap, error) {
	inside, outside, found := strings.Cut(value, ":")
	id, err1 := strconv.Atoi(inside)
	host, err2 := strconv.Atoi(outside)
	if !found || err1 != nil || err2 != nil || id <= 0 || host <= 0 {
		return nil, fmt.Errorf("%q: two positive numbers ID:HOSTID", value)
	}
	return []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: id, HostID: host, Size: 1}}, nil
}

func (o *launchOptions) launch() (int, error) {
	log, err := filepath.Abs(o.log)
	if err != nil {
		return 0, err
	}
	output, err := syscall.Open(log, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_APPEND|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return 0, fmt.Errorf("log %s: %w", log, err)
	}
	input, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	for _, dir := range o.cgroups {
		if err := joinCgroup(dir); err != nil {
			return 0, err
		}
	}
	back, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	listener, err := listenIn(o.socket)
	if err != nil {
		return 0, fmt.Errorf("socket %s: %w", o.socket, err)
	}
	if err := os.Chdir(back); err != nil {
		return 0, err
	}
	files := []uintptr{uintptr(input), uintptr(output), uintptr(output), uintptr(listener)}
	if o.seccomp {
		filter, err := openSeccomp()
		if err != nil {
			return 0, err
		}
		files = append(files, uintptr(filter)) // becomes descriptor 4; bubblewrap reads and closes it
	}
	closeOnExec()
	pid, err := o.fork(files)
	if err != nil {
		_ = os.Remove(o.socket)
	}
	return pid, err
}

// listenIn binds the base name from inside the directory: sun_path holds 108 bytes, unix(7).
func listenIn(path string) (int, error) {
	if err := os.Chdir(filepath.Dir(path)); err != nil {
		return -1, err
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	syscall.Umask(0o177) // mode 0600 from the first moment on
	err = syscall.Bind(fd, &syscall.SockaddrUnix{Name: filepath.Base(path)})
	syscall.Umask(0o022)
	if err != nil {
		return -1, err
	}
	return fd, syscall.Listen(fd, 128)
}

func joinCgroup(dir string) error {
	path := filepath.Join(dir, "cgroup.procs")
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(strconv.Itoa(os.Getpid()))
	return err
}

// closeOnExec keeps whatever this process was started with from those it starts.
func closeOnExec() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

func (o *launchOptions) fork(files []uintptr) (int, error) {
	attributes := &syscall.ProcAttr{Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	argv := o.argv
	path, code := findExecutable(argv[0], attributes.Env)
	if code != 0 {
		return 0, fmt.Errorf("%s", notRunnable(argv[0], code))
	}
	if o.users != nil || o.disk != "" {
		path, argv = selfExecutable, append(append(o.confine(attributes.Sys), "--", path), argv[1:]...)
	}
	// A session keyring belongs to the thread that joins it, and to what that thread starts.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := leaveSessionKeyring(); err != nil {
		return 0, err
	}
	return syscall.ForkExec(path, argv, attributes)
}

// confine sets the namespaces in which `runner confine` starts, and gives its command line up to and without the "--".
func (o *launchOptions) confine(sys *syscall.SysProcAttr) []string {
	argv := []string{"runner", "confine"}
	sys.Cloneflags = syscall.CLONE_NEWUSER
	if o.users != nil {
		sys.UidMappings, sys.GidMappings = o.users, o.groups
		sys.GidMappingsEnableSetgroups = true
		sys.Credential = &syscall.Credential{Uid: 0, Gid: 0}
		argv = append(argv, "--no-user-namespaces")
	} else { // one's own user is the only one that an ordinary user can map; bubblewrap makes its namespace below this one
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
		setDumpable(true) // else /proc/PID/uid_map of the child, which shares this memory until it execs, is root's alone; proc(5)
	}
	if o.disk != "" {
		sys.Cloneflags |= syscall.CLONE_NEWNS
		argv = append(argv, "--disk", o.disk)
	}
	return argv
}

// leaveSessionKeyring joins a new, empty session keyring, so that the sandbox does not possess the keys of its worker's session
// (Kerberos tickets, fscrypt keys, …). keyctl(2), session-keyring(7). Where there are no keyrings, or a filter forbids them, or the
// user has no room for one more, the sandbox's own filter still forbids it to use any.
func leaveSessionKeyring() error {
	const joinSessionKeyring = 1
	_, _, errno := syscall.RawSyscall(syscall.SYS_KEYCTL, joinSessionKeyring, 0, 0)
	switch errno {
	case 0, syscall.ENOSYS, syscall.EPERM, syscall.EDQUOT:
		return nil
	}
	return fmt.Errorf("join a new session keyring: %w", errno)
}
