package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// The filter of system calls that every isolated command runs under: a deny list in the spirit of Docker's default profile
// (https://docs.docker.com/engine/security/seccomp/). Ordinary programs use none of these; each has opened the kernel to attack
// before, or reaches what belongs to no namespace: key rings, the clock, the hypervisor.

// Parts of classic BPF and of what it gives back; <linux/filter.h>, <linux/seccomp.h>, seccomp(2).
const (
	bpfLoadWord    = 0x20 // BPF_LD | BPF_W | BPF_ABS
	bpfJumpEqual   = 0x15 // BPF_JMP | BPF_JEQ | BPF_K
	bpfJumpAnyBit  = 0x45 // BPF_JMP | BPF_JSET | BPF_K
	bpfReturn      = 0x06 // BPF_RET | BPF_K
	seccompAllow   = 0x7fff0000
	seccompErrno   = 0x00050000
	seccompKillAll = 0x80000000

	dataNumber, dataArchitecture, dataFirstArgument = 0, 4, 16 // offsets in struct seccomp_data; little endian: the low half first

	x32Bit = 0x40000000 // __X32_SYSCALL_BIT

	// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; unshare has CLONE_NEWTIME too, which in clone is part of the exit signal.
	cloneNamespaces   = 0x7e020000
	unshareNamespaces = cloneNamespaces | 0x80

	afAlg, afVsock = 38, 40
)

type bpfInstruction struct {
	code      uint16
	yes, no   uint8
	parameter uint32
}

// systemCall has the number of one call by architecture; absent where there is no such call.
type systemCall struct {
	name         string
	amd64, arm64 uint32
}

const absent = ^uint32(0)

// deniedCalls fail with EPERM whatever their arguments are.
var deniedCalls = []systemCall{
	{"keyctl", 250, 219}, {"add_key", 248, 217}, {"request_key", 249, 218},
	{"io_uring_setup", 425, 425}, {"io_uring_enter", 426, 426}, {"io_uring_register", 427, 427},
	{"bpf", 321, 280}, {"perf_event_open", 298, 241}, {"userfaultfd", 323, 282}, {"fanotify_init", 300, 262},
	{"mount", 165, 40}, {"umount2", 166, 39}, {"pivot_root", 155, 41}, {"open_tree", 428, 428}, {"move_mount", 429, 429},
	{"fsopen", 430, 430}, {"fsconfig", 431, 431}, {"fsmount", 432, 432}, {"fspick", 433, 433}, {"mount_setattr", 442, 442},
	{"open_tree_attr", 467, 467}, {"setns", 308, 268},
	{"kexec_load", 246, 104}, {"kexec_file_load", 320, 294}, {"reboot", 169, 142},
	{"init_module", 175, 105}, {"finit_module", 313, 273}, {"delete_module", 176, 106},
	{"create_module", 174, absent}, {"get_kernel_syms", 177, absent}, {"query_module", 178, absent},
	{"swapon", 167, 224}, {"swapoff", 168, 225}, {"acct", 163, 89}, {"quotactl", 179, 60}, {"quotactl_fd", 443, 443},
	{"settimeofday", 164, 170}, {"clock_settime", 227, 112}, {"adjtimex", 159, 171}, {"clock_adjtime", 305, 266},
	{"iopl", 172, absent}, {"ioperm", 173, absent}, {"vhangup", 153, 58}, {"syslog", 103, 116}, {"kcmp", 312, 272},
	{"name_to_handle_at", 303, 264}, {"open_by_handle_at", 304, 265},
	{"nfsservctl", 180, 42}, {"lookup_dcookie", 212, 18}, {"uselib", 134, absent}, {"ustat", 136, absent}, {"sysfs", 139, absent},
	{"_sysctl", 156, absent},
}

// Calls that are judged by their first argument, and clone3, whose flags are behind a pointer that a filter cannot follow:
// libraries take ENOSYS for an old kernel and call clone.
var (
	callClone   = systemCall{"clone", 56, 220}
	callUnshare = systemCall{"unshare", 272, 97}
	callSocket  = systemCall{"socket", 41, 198}
	callClone3  = systemCall{"clone3", 435, 435}
)

// architecture is what a filter must know of a machine. AUDIT_ARCH_*, <linux/audit.h>.
type architecture struct {
	audit  uint32
	hasX32 bool
	number func(systemCall) uint32
}

var architectures = map[string]architecture{
	"amd64": {0xc000003e, true, func(c systemCall) uint32 { return c.amd64 }},
	"arm64": {0xc00000b7, false, func(c systemCall) uint32 { return c.arm64 }},
}

// seccompProgram is the filter for one architecture.
func (a architecture) seccompProgram() []bpfInstruction {
	const eperm, enosys = seccompErrno | uint32(syscall.EPERM), seccompErrno | uint32(syscall.ENOSYS)
	program := []bpfInstruction{
		{code: bpfLoadWord, parameter: dataArchitecture},
		{bpfJumpEqual, 1, 0, a.audit},
		{code: bpfReturn, parameter: seccompKillAll}, // the 32-bit calls have other numbers: one list cannot judge both
		{code: bpfLoadWord, parameter: dataNumber},
	}
	if a.hasX32 {
		program = append(program, bpfInstruction{bpfJumpAnyBit, 0, 1, x32Bit}, bpfInstruction{code: bpfReturn, parameter: enosys})
	}
	for _, call := range deniedCalls {
		if number := a.number(call); number != absent {
			program = append(program, bpfInstruction{bpfJumpEqual, 0, 1, number}, bpfInstruction{code: bpfReturn, parameter: eperm})
		}
	}
	program = append(program, bpfInstruction{bpfJumpEqual, 0, 1, a.number(callClone3)}, bpfInstruction{code: bpfReturn, parameter: enosys})
	program = append(program, a.judge(callClone, eperm, bpfInstruction{bpfJumpAnyBit, 0, 1, cloneNamespaces})...)
	program = append(program, a.judge(callUnshare, eperm, bpfInstruction{bpfJumpAnyBit, 0, 1, unshareNamespaces})...)
	program = append(program, a.judge(callSocket, eperm, bpfInstruction{bpfJumpEqual, 1, 0, afVsock}, bpfInstruction{bpfJumpEqual, 0, 1, afAlg})...)
	return append(program, bpfInstruction{code: bpfReturn, parameter: seccompAllow})
}

// judge ends the program for call: refused if one of tests on its first argument, the last of which skips one instruction else,
// comes to the refusal.
func (a architecture) judge(call systemCall, refusal uint32, tests ...bpfInstruction) []bpfInstruction {
	block := []bpfInstruction{{bpfJumpEqual, 0, uint8(len(tests) + 3), a.number(call)}, {code: bpfLoadWord, parameter: dataFirstArgument}}
	block = append(block, tests...)
	return append(block, bpfInstruction{code: bpfReturn, parameter: refusal}, bpfInstruction{code: bpfReturn, parameter: seccompAllow})
}

// filter is this machine's program as the kernel wants it; struct sock_filter.
func filter() ([]byte, error) {
	machine, known := architectures[runtime.GOARCH]
	if !known {
		return nil, fmt.Errorf("no seccomp filter for %s", runtime.GOARCH)
	}
	var buffer bytes.Buffer
	for _, i := range machine.seccompProgram() {
		_ = binary.Write(&buffer, binary.NativeEndian, struct {
			Code      uint16
			Yes, No   uint8
			Parameter uint32
		}{i.code, i.yes, i.no, i.parameter})
	}
	return buffer.Bytes(), nil
}

// installSeccomp puts this process under the filter for good, with all its threads and whatever it starts; seccomp(2).
func installSeccomp() error {
	program, err := filter()
	if err != nil {
		return err
	}
	header := struct {
		count   uint16
		program *byte
	}{uint16(len(program) / 8), &program[0]}
	const setModeFilter, allThreads = 1, 1
	number := architectures[runtime.GOARCH].number(systemCall{"seccomp", 317, 277})
	if _, _, errno := syscall.Syscall(uintptr(number), setModeFilter, allThreads, uintptr(unsafe.Pointer(&header))); errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	return nil
}

// openSeccomp gives a descriptor to read this machine's filter from, as bubblewrap's --seccomp wants it.
func openSeccomp() (int, error) {
	program, err := filter()
	if err != nil {
		return -1, err
	}
	var ends [2]int
	if err := syscall.Pipe2(ends[:], syscall.O_CLOEXEC); err != nil {
		return -1, os.NewSyscallError("pipe2", err)
	}
	defer syscall.Close(ends[1])
	if written, err := syscall.Write(ends[1], program); err != nil || written != len(program) { // far less than a pipe holds
		return -1, fmt.Errorf("seccomp filter: %d of %d bytes written: %w", written, len(program), err)
	}
	return ends[0], nil
}
