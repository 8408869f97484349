package main

import (
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"unsafe"
)

// Numbers that the syscall package does not have. <linux/prctl.h>, <asm-generic/unistd.h>.
const (
	prSetDumpable       = 4
	prSetNoNewPrivs     = 38
	prSetChildSubreaper = 36
	prCapAmbient        = 47
	prCapAmbientClear   = 4

	sysPidfdSendSignal = 424 // same number on every architecture since Linux 5.1
	sysPidfdOpen       = 434

	waitAll = 0x40000000 // __WALL, also children that were cloned with another exit signal

	rlimitNproc = 6
	rlimitCore  = 4
)

func prctl(option, value uintptr) error {
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, option, value, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func setDumpable(on bool) {
	var value uintptr
	if on {
		value = 1
	}
	_ = prctl(prSetDumpable, value)
}

func becomeSubreaper() error { return prctl(prSetChildSubreaper, 1) }

// prewarmThreads makes the Go runtime create OS threads now. A fork bomb can use up the process
// limit later; clone(2) then fails, and for the Go runtime a thread it cannot create is fatal.
// Threads that were created once stay parked for reuse, as long as no goroutine ends while locked.
func prewarmThreads(count int) {
	var all, done sync.WaitGroup
	release := make(chan struct{})
	all.Add(count)
	done.Add(count)
	for range count {
		go func() {
			defer done.Done()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			all.Done()
			<-release
		}()
	}
	all.Wait()
	close(release)
	done.Wait()
}

// memoryFile gives a file that has no name and is in no file system. memfd_create(2); executing one may be forbidden by
// vm.memfd_noexec, and is not wanted. Kernels before 6.3 do not know how to say that.
func memoryFile() (int, error) {
	const closeOnExec, noExecSeal = 1, 8
	number := map[string]uintptr{"amd64": 319, "arm64": 279}[runtime.GOARCH]
	name := [...]byte{'r', 'u', 'n', 'n', 'e', 'r', 0}
	fd, _, errno := syscall.Syscall(number, uintptr(unsafe.Pointer(&name)), closeOnExec|noExecSeal, 0)
	if errno == syscall.EINVAL {
		fd, _, errno = syscall.Syscall(number, uintptr(unsafe.Pointer(&name)), closeOnExec, 0)
	}
	if errno != 0 {
		return -1, os.NewSyscallError("memfd_create", errno)
	}
	return int(fd), nil
}

// threadsOf counts by the links of a directory: "task" has one subdirectory per thread (proc(5)).
func threadsOf(pid int) uint64 {
	var found syscall.Stat_t
	if syscall.Stat("/proc/"+strconv.Itoa(pid)+"/task", &found) != nil || found.Nlink < 2 {
		return 0
	}
	return uint64(found.Nlink) - 2
}

// limitsOf gives the limits that another process had, and sets new ones if there are any. prlimit(2).
func limitsOf(pid, resource int, set *syscall.Rlimit) (had syscall.Rlimit, err error) {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), uintptr(resource),
		uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(&had)), 0, 0)
	if errno != 0 {
		err = errno
	}
	return had, err
}

// setSoftLimit leaves the hard limit, up to which the soft one can be raised again.
func setSoftLimit(resource int, value uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(resource, &limit); err != nil {
		return err
	}
	limit.Cur = min(limit.Max, value)
	return syscall.Setrlimit(resource, &limit)
}

// lowerLimit sets soft and hard limit, never above the hard limit there is, and gives what they are now.
func lowerLimit(resource int, value uint64) (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(resource, &limit); err != nil {
		return 0, err
	}
	limit.Max = min(limit.Max, value)
	limit.Cur = limit.Max
	return limit.Max, syscall.Setrlimit(resource, &limit)
}

// bytesReadable says how many bytes wait in a pipe. ioctl_pipe(2), FIONREAD.
func bytesReadable(fd uintptr) int {
	var count int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCINQ, uintptr(unsafe.Pointer(&count)))
	if errno != 0 {
		return 0
	}
	return int(count)
}
