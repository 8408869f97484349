package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// privileged gives a directory for a serve that starts as root and becomes the user 1234.
func privileged(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func ownerAndMode(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d %o", stat.Uid, stat.Gid, stat.Mode&0o7777)
}

func TestTheDiskIsMadeForTheUserAndAgainAfterARestart(t *testing.T) {
	dir := privileged(t)
	disk := filepath.Join(dir, "disk")
	_ = os.Mkdir(disk, 0o755)
	for range 2 {
		s := serveIn(t, dir, "--user", "1234:1234", "--disk", disk)
		c := s.dial(1) // the socket is there before the disk
		for name, want := range map[string]string{"": "0:0 755", "workspace": "1234:1234 777", "home": "1234:1234 777", "tmp": "1234:1234 1777"} {
			if got := ownerAndMode(t, filepath.Join(disk, name)); got != want {
				t.Errorf("%q is %s, not %s", name, got, want)
			}
		}
		a := c.run("",
			"argv", []string{"/bin/sh", "-c", `cd "$0" && id -u && touch workspace/file home/file tmp/file && ! mv workspace other 2>/dev/null`, disk})
		if got := string(a.output[0]); got != "1234\n" {
			t.Errorf("a command: %q %q", got, a.output[1])
		}
		expect(t, a.record(t), "exit_code", 0)
		s.stop()
	}
}

func TestAKeptSocketIsNotTheUsers(t *testing.T) {
	for flag, want := range map[string]string{"--keep-socket": "0:0 600", "--keep-socket=false": "1234:1234 600"} {
		s := serveIn(t, privileged(t), "--user", "1234:1234", flag)
		if got := ownerAndMode(t, s.socket); got != want {
			t.Errorf("with %s the socket is %s, not %s", flag, got, want)
		}
		expect(t, s.dial(1).run("exit 3").record(t), "exit_code", 3)
	}
}

func TestTheAccountComesBeforeTheImagesAndOnlyOnce(t *testing.T) {
	t.Setenv("HOME", "/home/sandbox")
	dir := privileged(t)
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	const ours, others = "sandbox:x:1234:1234:sandbox:/home/sandbox:/bin/sh\n", "root:x:0:0::/root:/bin/sh\nsandbox:x:1:1::/:/bin/sh\n"
	for _, users := range []string{"", others} { // an image may have none
		if users != "" {
			_ = os.WriteFile(from, []byte(users), 0o600)
		}
		s := serveIn(t, dir, "--user", "1234:1234", "--account", from+":"+to)
		s.dial(1)
		s.stop()
		if got, _ := os.ReadFile(to); string(got) != ours+users {
			t.Errorf("the accounts are %q", got)
		}
		if got := ownerAndMode(t, to); got != "0:0 644" {
			t.Errorf("the file of the accounts is %s", got)
		}
	}
}

func TestServeEndsWithOneLineWhenItCannotPrepare(t *testing.T) {
	dir := privileged(t)
	for want, flags := range map[string][]string{
		"needs FROM:TO": {"--account", "nonsense"}, "account": {"--account", dir + "/none:" + dir + "/no/such/directory"},
		"disk": {"--disk", dir + "/no/such/directory"},
	} {
		args := append([]string{"serve", "--socket", dir + "/s", "--spool", dir + "/spool", "--workspace", dir + "/work", "--user", "1234:1234"}, flags...)
		output, err := exec.Command(builtRunner, args...).CombinedOutput()
		if err == nil || strings.Count(string(output), "\n") != 1 || !strings.Contains(string(output), want) {
			t.Errorf("serve %v: %v %q", flags, err, output)
		}
	}
}

func TestABridgeOfRootsHasNoCapabilities(t *testing.T) {
	privileged(t)
	bridge := exec.Command(builtRunner, "bridge", "--socket", serve(t).socket)
	in, _ := bridge.StdinPipe()
	if err := bridge.Start(); err != nil {
		t.Fatal(err)
	}
	status := fmt.Sprintf("/proc/%d/status", bridge.Process.Pid)
	eventually(t, "the bridge has given up what it had", func() bool {
		said, _ := os.ReadFile(status)
		lines := strings.Split(string(said), "\n")
		found := 0
		for _, line := range lines {
			name, value, _ := strings.Cut(line, ":\t")
			switch name {
			case "CapInh", "CapPrm", "CapEff", "CapAmb":
				if value == "0000000000000000" {
					found++
				}
			case "NoNewPrivs":
				if value == "1" {
					found++
				}
			}
		}
		return found == 5
	})
	in.Close()
	if err := bridge.Wait(); err != nil {
		t.Errorf("bridge: %v", err)
	}
}

func TestABridgeToNothingSaysSo(t *testing.T) {
	for _, args := range [][]string{{}, {"--socket", "/no/such/socket", "--wait", "0.1"}, {"--nonsense"}} {
		output, err := exec.Command(builtRunner, append([]string{"bridge"}, args...)...).CombinedOutput()
		if err == nil || strings.Count(string(output), "\n") != 1 {
			t.Errorf("bridge %v: %v %q", args, err, output)
		}
	}
}

func TestABridgeWaitsForARunnerThatStarts(t *testing.T) {
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bridge := exec.Command(builtRunner, "bridge", "--socket", filepath.Join(dir, "s"), "--wait", "30")
	in, _ := bridge.StdinPipe()
	out, _ := bridge.StdoutPipe()
	if err := bridge.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = in.Write(appendDocument(nil, frameHello, 0, object{"protocol": 1, "epoch": 1}, nil))
	serveIn(t, dir)
	if kind, _, _, err := readAnyFrame(out); err != nil || kind != frameHello {
		t.Errorf("the first frame is %d (%v)", kind, err)
	}
	in.Close()
	_ = bridge.Wait()
}

func TestFilesInMemoryAreMeasured(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=10485760"); err != nil {
		t.Skipf("no memory file system can be mounted: %s", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, 0) })
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := memoryFiles(dir); got != 3<<20 {
		t.Errorf("%d bytes", got)
	}
	if got := memoryFiles("/proc"); got != 0 {
		t.Errorf("%d bytes of what is no memory", got)
	}
}
