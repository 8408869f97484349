package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// bubblewrap finds bwrap: in PATH, or where BWRAP says (with BWRAP_LIBRARIES for its libraries).
func bubblewrap(t *testing.T) string {
	if path := os.Getenv("BWRAP"); path != "" {
		return path
	}
	path, err := exec.LookPath("bwrap")
	if err != nil {
		t.Skip("bwrap is not installed: set BWRAP to its path to run this test")
	}
	return path
}

// isolated starts serve as the local backend does: launch, bubblewrap, PID 1.
func isolated(t *testing.T, launch []string, mapped bool, flags ...string) *sandbox {
	t.Helper()
	bwrap := bubblewrap(t)
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	_ = os.Chmod(dir, 0o755)
	s := &sandbox{t: t, socket: filepath.Join(dir, "s"), workspace: "/workspace", spool: "/run/cifixer/spool"}
	args := append([]string{"launch", "--socket", s.socket, "--log", filepath.Join(dir, "log")}, launch...)
	if mapped {
		args = append(args, "--map-user", "1000:1234567", "--map-group", "1000:1234567")
	}
	args = append(args, "--", bwrap)
	if !mapped {
		args = append(args, strings.Fields("--unshare-user --uid 1000 --gid 1000 --disable-userns")...)
	}
	args = append(args, strings.Fields(`--unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try
		--hostname sandbox --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc
		--dev /dev --size 50000000 --tmpfs /tmp --chmod 1777 /tmp --size 50000000 --tmpfs /workspace --chmod 0777 /workspace
		--tmpfs /run/cifixer/spool --ro-bind `+builtRunner+` /run/cifixer/runner --as-pid-1 --clearenv --setenv PATH /usr/bin:/bin --cap-drop ALL`)...)
	if mapped {
		args = append(args, strings.Fields("--cap-add CAP_SETUID --cap-add CAP_SETGID")...)
	}
	args = append(args, strings.Fields("--new-session -- /run/cifixer/runner serve --listen-fd 3 --spool /run/cifixer/spool --workspace /workspace")...)
	if mapped {
		args = append(args, "--user", "1000:1000")
	}
	command := exec.Command(builtRunner, append(args, flags...)...)
	if libraries := os.Getenv("BWRAP_LIBRARIES"); libraries != "" {
		command.Env = append(os.Environ(), "LD_LIBRARY_PATH="+libraries)
	}
	output, err := command.CombinedOutput()
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "log"))
		t.Fatalf("launch: %s %s %s", err, output, log)
	}
	var started struct {
		PID       int    `json:"pid"`
		StartTime uint64 `json:"start_time"`
	}
	if json.Unmarshal(output, &started) != nil || started.PID == 0 || started.StartTime == 0 {
		t.Fatalf("launch printed %q", output)
	}
	t.Cleanup(func() { awaitEnd(t, s, started.PID) })
	return s
}

func awaitEnd(t *testing.T, s *sandbox, pid int) {
	defer killAll(pid)
	if t.Failed() {
		return
	}
	s.dial(1<<30).call(object{"verb": "shutdown"}, nil)
	eventually(t, "the sandbox ends", func() bool {
		var buffer [1024]byte
		p, alive := readProcess(pid, buffer[:])
		return !alive || p.dead
	})
}

// killAll is for a sandbox that a failed test leaves: its PID 1 outlives the bubblewrap that made it.
func killAll(pid int) {
	if all, err := scanProcesses(); err == nil {
		for _, p := range descendants(all, pid, nil) {
			signalProcess(p, syscall.SIGKILL)
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

func eachIsolation(t *testing.T, test func(t *testing.T, mapped bool)) {
	bubblewrap(t)
	t.Run("own user namespace", func(t *testing.T) { test(t, false) })
	t.Run("mapped by root", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("only root can map another user into a namespace")
		}
		test(t, true)
	})
}

func TestIsolatedRunnerIsOutOfReach(t *testing.T) {
	eachIsolation(t, func(t *testing.T, mapped bool) {
		c := isolated(t, nil, mapped).dial(1)
		a := c.run(`id -u; for f in environ mem fd/0 maps; do cat /proc/1/$f /proc/$PPID/$f >/dev/null 2>&1 && echo "read $f"; done
			unshare -U true 2>/dev/null && echo "a nested namespace"
			grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status | grep -v 0000000000000000; grep NoNewPrivs /proc/self/status
			: >/workspace/file && echo "can write"`)
		if got := string(a.output[0]); got != "1000\nNoNewPrivs:\t1\ncan write\n" {
			t.Errorf("a command sees %q (%q)", got, a.output[1])
		}
	})
}

func TestKillAllFromInside(t *testing.T) {
	eachIsolation(t, func(t *testing.T, mapped bool) {
		c := isolated(t, nil, mapped).dial(1)
		bystander := c.begin(startArgs("sleep 300"), nil)
		eventually(t, "the bystander runs", func() bool { return len(c.do(object{"verb": "list"}, nil).values["records"].([]any)) == 1 })
		expect(t, c.run("kill -9 -1; sleep 300").record(t), "status", "unknown")
		expect(t, bystander.wait().record(t), "status", "unknown")
		eventually(t, "all are dead", func() bool { return c.do(object{"verb": "stats"}, nil).values["processes"] == 0.0 })
		for range 3 {
			expect(t, c.run("kill -9 $PPID; kill -9 -1").record(t), "status", "unknown")
			expect(t, c.run("exit 6").record(t), "status", "exited", "exit_code", 6)
		}
	})
}

// bombs are fork bombs; none of them ends by itself.
var bombs = []string{
	"f() { f | f & }; f; f; sleep 1000",
	`trap "" TERM; while :; do setsid sh -c 'trap "" TERM; while :; do (sleep 1000 &); done' >/dev/null 2>&1 & done; sleep 1000`,
}

func testForkBombs(t *testing.T, s *sandbox) {
	c := s.dial(1)
	for i, bomb := range bombs {
		args := startArgs(bomb, "timeout_s", 2, "grace_s", 0.2)
		p := c.begin(args, nil)
		time.Sleep(time.Second)
		if a := c.call(startArgs("true"), nil); a.kind == frameError && a.values["code"] != codeBusy {
			t.Errorf("bomb %d: a command meanwhile got %v", i, a.values)
		}
		p.wait()
		// A shell that cannot fork may have ended by itself, with its bomb in the background.
		c.do(object{"verb": "kill", "op_id": args["op_id"], "grace_s": 0}, nil)
		// A supervisor that was just forked for the next command counts until it is known as one.
		eventually(t, fmt.Sprintf("nothing of bomb %d is left", i), func() bool {
			return c.do(object{"verb": "stats"}, nil).values["processes"] == 0.0
		})
		expect(t, c.run("exit 5").record(t), "status", "exited", "exit_code", 5)
	}
}

func TestForkBombWithinProcessLimit(t *testing.T) {
	if os.Getuid() == 0 {
		testForkBombs(t, isolated(t, nil, true, "--max-processes", "300"))
	} else {
		testForkBombs(t, isolated(t, nil, false, "--max-processes", "600"))
	}
}

func TestForkBombWithinCgroup(t *testing.T) {
	group := fmt.Sprintf("/sys/fs/cgroup/pids/cifixer-runner-test-%d", os.Getpid())
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("no cgroup for a process limit can be made: %s", err)
	}
	t.Cleanup(func() {
		eventually(t, "the cgroup is empty", func() bool { return os.Remove(group) == nil })
	})
	if err := os.WriteFile(filepath.Join(group, "pids.max"), []byte("300"), 0o644); err != nil {
		t.Skipf("no process limit can be set: %s", err)
	}
	testForkBombs(t, isolated(t, []string{"--cgroup", group}, true))
}

func TestLaunchFailures(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{
		{}, {"--socket", dir + "/s"}, {"--socket", dir + "/s", "--log", dir + "/log", "--", "/no/such/program"},
		{"--socket", dir + "/none/s", "--log", dir + "/log", "--", "true"}, {"--socket", dir + "/s", "--log", dir + "/log", "--cgroup", dir + "/none", "--", "true"},
		{"--socket", dir + "/s", "--log", dir + "/log", "--map-user", "x", "--map-group", "1:2", "--", "true"},
	} {
		output, err := exec.Command(builtRunner, append([]string{"launch"}, args...)...).CombinedOutput()
		if err == nil || strings.Count(string(output), "\n") != 1 {
			t.Errorf("launch %v: %v %q", args, err, output)
		}
	}
}

func TestLaunchWithALongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 150))
	_ = os.Mkdir(dir, 0o755)
	output, err := exec.Command(builtRunner, "launch", "--socket", dir+"/runner.sock", "--log", dir+"/log", "--", "/bin/sh", "-c", "ls /proc/self/fd | tr '\\n' ' '").CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s", err, output)
	}
	info, err := os.Stat(dir + "/runner.sock")
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", info, err)
	}
	eventually(t, "the log has the open files", func() bool {
		log, _ := os.ReadFile(dir + "/log")
		return string(log) == "0 1 2 3 4 " // 4 is ls looking
	})
}

func TestBridge(t *testing.T) {
	s := serve(t)
	bridge := exec.Command(builtRunner, "bridge", "--socket", s.socket)
	in, _ := bridge.StdinPipe()
	out, _ := bridge.StdoutPipe()
	if err := bridge.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = in.Write(appendDocument(nil, frameHello, 0, object{"protocol": 1, "epoch": 1}, nil))
	_, _ = in.Write(appendDocument(nil, frameRequest, 1, startArgs("echo bridged"), nil))
	for {
		kind, _, payload, err := readAnyFrame(out)
		if err != nil {
			t.Fatal(err)
		}
		if kind == frameOutput && string(payload[9:]) != "bridged\n" {
			t.Errorf("output %q", payload[9:])
		}
		if kind == frameReply {
			break
		}
	}
	in.Close()
	if err := bridge.Wait(); err != nil {
		t.Errorf("bridge: %v", err)
	}
}
