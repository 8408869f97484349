package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// judged runs a filter as the kernel does, over one call.
func judged(t *testing.T, program []bpfInstruction, audit, number, firstArgument uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{dataNumber: number, dataArchitecture: audit, dataFirstArgument: firstArgument}
	var loaded uint32
	for at := 0; at < len(program); at++ {
		i := program[at]
		taken := false
		switch i.code {
		case bpfReturn:
			return i.parameter
		case bpfLoadWord:
			loaded = data[i.parameter]
			continue
		case bpfJumpEqual:
			taken = loaded == i.parameter
		case bpfJumpAnyBit:
			taken = loaded&i.parameter != 0
		default:
			t.Fatalf("instruction %d has the code %#x", at, i.code)
		}
		if taken {
			at += int(i.yes)
		} else {
			at += int(i.no)
		}
	}
	t.Fatal("the filter does not end")
	return 0
}

func TestSeccompFilter(t *testing.T) {
	const eperm, enosys = seccompErrno | 1, seccompErrno | 38
	for name, machine := range architectures {
		program := machine.seccompProgram()
		check := func(what string, want, audit, number, argument uint32) {
			if got := judged(t, program, audit, number, argument); got != want {
				t.Errorf("%s %s: %#x, not %#x", name, what, got, want)
			}
		}
		denied := []uint32{machine.number(callClone3), machine.number(callClone), machine.number(callUnshare), machine.number(callSocket)}
		for _, call := range deniedCalls {
			if number := machine.number(call); number != absent {
				check(call.name, eperm, machine.audit, number, 0)
				denied = append(denied, number)
			}
		}
		for number := range uint32(1024) {
			if !slices.Contains(denied, number) {
				check("an ordinary call", seccompAllow, machine.audit, number, ^uint32(0))
			}
		}
		check("clone3", enosys, machine.audit, machine.number(callClone3), 0)
		check("clone for fork", seccompAllow, machine.audit, machine.number(callClone), uint32(syscall.SIGCHLD))
		check("clone for a thread", seccompAllow, machine.audit, machine.number(callClone), 0x3d0f00)
		for _, flag := range []uint32{syscall.CLONE_NEWNS, 0x02000000, syscall.CLONE_NEWUTS, syscall.CLONE_NEWIPC, syscall.CLONE_NEWUSER, syscall.CLONE_NEWPID, syscall.CLONE_NEWNET} {
			check("clone into a namespace", eperm, machine.audit, machine.number(callClone), flag|uint32(syscall.SIGCHLD))
			check("unshare of a namespace", eperm, machine.audit, machine.number(callUnshare), flag)
		}
		check("unshare of the clock", eperm, machine.audit, machine.number(callUnshare), 0x80)
		check("unshare of files", seccompAllow, machine.audit, machine.number(callUnshare), syscall.CLONE_FILES)
		for family, want := range map[uint32]uint32{syscall.AF_UNIX: seccompAllow, syscall.AF_INET: seccompAllow, syscall.AF_INET6: seccompAllow,
			syscall.AF_NETLINK: seccompAllow, afVsock: eperm, afAlg: eperm} {
			check("a socket", want, machine.audit, machine.number(callSocket), family)
		}
		check("a call of i386", seccompKillAll, 0x40000003, 20, 0)
		check("a call of 32-bit arm", seccompKillAll, 0x40000028, 20, 0)
		if machine.hasX32 {
			check("a call of x32", enosys, machine.audit, x32Bit|39, 0)
		}
	}
}

// launched runs a shell line by `runner launch` and gives what it said.
func launched(t *testing.T, flags []string, argv ...string) string {
	t.Helper()
	dir := t.TempDir()
	args := append(append([]string{"launch", "--socket", dir + "/s", "--log", dir + "/log"}, flags...), "--")
	if output, err := exec.Command(builtRunner, append(args, argv...)...).CombinedOutput(); err != nil {
		t.Fatalf("launch: %s %s", err, output)
	}
	var log []byte
	eventually(t, "the line has run", func() bool {
		log, _ = os.ReadFile(dir + "/log")
		return strings.HasSuffix(string(log), "end\n")
	})
	return strings.TrimSuffix(string(log), "end\n")
}

func TestLaunchGivesTheFilterAndNothingElse(t *testing.T) {
	got := launched(t, []string{"--seccomp"}, "/bin/sh", "-c", "ls /proc/self/fd | tr '\\n' ' '; wc -c <&4; echo end")
	if want := "0 1 2 3 4 5 "; !strings.HasPrefix(got, want) { // 5 is ls looking
		t.Errorf("open files and the filter's size: %q", got)
	}
}

func TestFilterIsAppliedAndNotLeaked(t *testing.T) {
	bwrap := bubblewrap(t)
	got := launched(t, []string{"--seccomp"}, bwrap, "--seccomp", "4", "--unshare-user", "--unshare-pid", "--as-pid-1", "--ro-bind", "/", "/", "--proc", "/proc",
		"/bin/sh", "-c", "grep -h ^Seccomp: /proc/self/status; ls /proc/self/fd | tr '\\n' ' '; echo end")
	if got != "Seccomp:\t2\n0 1 2 3 4 " { // 3 is the channel, 4 is ls looking
		t.Errorf("%q", got)
	}
}

// addSessionKey puts a key into the session keyring of this process's thread and gives its description.
func addSessionKey(t *testing.T) string {
	t.Helper()
	const sessionKeyring = ^uintptr(2) // KEY_SPEC_SESSION_KEYRING, -3
	runtime.LockOSThread()             // never unlocked: the thread with this keyring ends with the test
	if _, _, errno := syscall.Syscall(syscall.SYS_KEYCTL, 1, 0, 0); errno != 0 {
		t.Skipf("no session keyring can be made: %s", errno)
	}
	kind, description, payload := []byte("user\x00"), []byte("cifixer-runner-test\x00"), []byte("hunter2")
	key, _, errno := syscall.Syscall6(syscall.SYS_ADD_KEY, uintptr(unsafe.Pointer(&kind[0])), uintptr(unsafe.Pointer(&description[0])),
		uintptr(unsafe.Pointer(&payload[0])), uintptr(len(payload)), sessionKeyring, 0)
	if errno != 0 {
		t.Skipf("no key can be added: %s", errno)
	}
	const setPermissions, possessorOnly = 5, 0x3f000000 // else /proc/keys would show it to every process of the user
	if _, _, errno := syscall.Syscall(syscall.SYS_KEYCTL, setPermissions, key, possessorOnly); errno != 0 {
		t.Fatal(errno)
	}
	return "cifixer-runner-test"
}

func TestLaunchLeavesTheSessionKeyring(t *testing.T) {
	if _, err := os.Stat("/proc/keys"); err != nil {
		t.Skip("no keyrings here")
	}
	secret := addSessionKey(t)
	if seen, err := exec.Command("cat", "/proc/keys").Output(); err != nil || !strings.Contains(string(seen), secret) {
		t.Fatalf("an ordinary child does not see the key: %v", err)
	}
	if got := launched(t, nil, "/bin/sh", "-c", "cat /proc/keys; echo end"); strings.Contains(got, secret) {
		t.Errorf("what was launched sees the key of who launched it:\n%s", got)
	}
}

func TestDiskIsOneAndNotTheHosts(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	line := "cd " + disk + `; head -c 700000 /dev/zero >workspace/a && echo first; head -c 700000 /dev/zero 2>/dev/null >tmp/b || echo full
		stat -c '%n %a' workspace home tmp; for i in $(seq 40000); do echo $i; done | (cd home; rm ../workspace/a ../tmp/b; xargs touch 2>/dev/null) || echo no more files; echo end`
	got := launched(t, []string{"--disk", disk + ":1048576"}, "/bin/sh", "-c", line)
	if want := "first\nfull\nworkspace 777\nhome 777\ntmp 1777\nno more files\n"; got != want {
		t.Errorf("%q", got)
	}
	if entries, err := os.ReadDir(disk); err != nil || len(entries) > 0 {
		t.Errorf("on the host the disk holds %v, %v", entries, err)
	}
}

func TestDiskArgument(t *testing.T) {
	for value, want := range map[string]bool{"/a:1": true, "/a:b:4096": true, "": false, "/a": false, ":1": false, "/a:": false, "/a:0": false, "/a:-1": false, "/a:x": false} {
		if _, _, err := parseDisk(value); (err == nil) != want {
			t.Errorf("%q: %v", value, err)
		}
	}
}
