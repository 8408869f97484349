package main

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Where the sandbox's cgroup shows, v2 and v1. cgroups(7).
const (
	eventsV2  = "/sys/fs/cgroup/memory.events"
	eventsV1  = "/sys/fs/cgroup/memory/memory.oom_control"
	currentV2 = "/sys/fs/cgroup/memory.current"
	currentV1 = "/sys/fs/cgroup/memory/memory.usage_in_bytes"
)

// oomKills reads the sandbox's counter of processes the kernel killed for memory; 0 if there is none.
func oomKills() int64 {
	for _, path := range []string{eventsV2, eventsV1} {
		for line := range bytes.Lines(readSmall(path)) {
			if rest, found := strings.CutPrefix(strings.TrimSpace(string(line)), "oom_kill "); found {
				count, _ := strconv.ParseInt(rest, 10, 64)
				return count
			}
		}
	}
	return 0
}

func readSmall(path string) []byte {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer syscall.Close(fd)
	buffer := make([]byte, 4096)
	size, err := syscall.Read(fd, buffer)
	if err != nil {
		return nil
	}
	return buffer[:size]
}

// memoryFiles is what the files of the disk at path take of the memory; 0 if it is no memory. statfs(2), tmpfs(5).
func memoryFiles(path string) int64 {
	const tmpfsMagic = 0x01021994
	var disk syscall.Statfs_t
	if syscall.Statfs(path, &disk) != nil || disk.Type != tmpfsMagic {
		return 0
	}
	return int64(disk.Blocks-disk.Bfree) * disk.Bsize
}

func memoryBytes() *int64 {
	for _, path := range []string{currentV2, currentV1} {
		if value, err := strconv.ParseInt(strings.TrimSpace(string(readSmall(path))), 10, 64); err == nil {
			return &value
		}
	}
	return nil
}

// statsReply is the answer to `stats`.
type statsReply struct {
	Processes      int    `json:"processes"`
	MemoryBytes    *int64 `json:"memory_bytes"`
	OOMKills       int64  `json:"oom_kills"`
	WorkspaceFree  int64  `json:"workspace_free_bytes"`
	WorkspaceTotal int64  `json:"workspace_size_bytes"`
}

func (s *server) stats() statsReply {
	reply := statsReply{MemoryBytes: memoryBytes(), OOMKills: oomKills()}
	if all, err := scanProcesses(); err == nil {
		for _, p := range descendants(all, os.Getpid(), nil) {
			if !s.children.isSupervisor(p.pid) {
				reply.Processes++
			}
		}
	}
	var disk syscall.Statfs_t
	if syscall.Statfs(s.options.workspace, &disk) == nil {
		reply.WorkspaceFree = int64(disk.Bavail) * disk.Bsize
		reply.WorkspaceTotal = int64(disk.Blocks) * disk.Bsize
	}
	return reply
}
