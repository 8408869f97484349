package main

import (
	"fmt"
	"syscall"
	"unsafe"
)

// become drops to the user for good: uid, gid, groups, every capability, and the way back
// through set-user-ID programs. Capabilities and no_new_privs belong to threads, so all of the
// runtime's threads have to do it; threads(7), capabilities(7), prctl(2).
func (i *identity) become() error {
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := syscall.Setresgid(i.gid, i.gid, i.gid); err != nil {
		return fmt.Errorf("setresgid %d: %w", i.gid, err)
	}
	if err := syscall.Setresuid(i.uid, i.uid, i.uid); err != nil {
		return fmt.Errorf("setresuid %d: %w", i.uid, err)
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	setDumpable(false) // a change of uid resets it to /proc/sys/fs/suid_dumpable
	return nil
}

// capabilityHeader and capabilitySet are the structs of capset(2), version 3.
type capabilityHeader struct {
	version uint32
	pid     int32
}

type capabilitySet struct{ effective, permitted, inheritable uint32 }

const capabilityVersion3 = 0x20080522

func dropCapabilities() error {
	if _, _, errno := syscall.AllThreadsSyscall6(syscall.SYS_PRCTL, prCapAmbient, prCapAmbientClear, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("clear ambient capabilities: %w", errno)
	}
	header := &capabilityHeader{version: capabilityVersion3}
	var none [2]capabilitySet
	_, _, errno := syscall.AllThreadsSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(&none)), 0)
	if errno != 0 {
		return fmt.Errorf("capset: %w", errno)
	}
	if _, _, errno := syscall.AllThreadsSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	return nil
}
