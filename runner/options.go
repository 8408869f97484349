package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// serveOptions are the flags of `runner serve`.
type serveOptions struct {
	socket, spool, workspace string
	listenFD                 int
	allowed                  stringList
	user                     *identity
	maxProcesses             uint64
	maxOpenFiles             uint64
	maxCommands              int
	volatile                 bool // the spool goes with this process: records on disk would serve nobody
	disk, account            string
	keepSocket               bool // the socket stays the first user's: in a directory of that user's, no command can reach it
	keepCapabilities         bool // commands may do what the container may: for package managers
	expiresIn                time.Duration
	token                    string
	learnToken               bool // the first HELLO says the secret: before it, nothing of the sandbox can have run
}

// stringList is a flag that may be given several times.
type stringList []string

func (l *stringList) String() string         { return strings.Join(*l, ",") }
func (l *stringList) Set(value string) error { *l = append(*l, value); return nil }

func parseServe(args []string) (*serveOptions, error) {
	o := &serveOptions{}
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.socket, "socket", "", "")
	flags.IntVar(&o.listenFD, "listen-fd", -1, "")
	flags.StringVar(&o.spool, "spool", "", "")
	flags.StringVar(&o.workspace, "workspace", "", "")
	flags.Var(&o.allowed, "allow-root", "")
	user := flags.String("user", "", "")
	flags.Uint64Var(&o.maxProcesses, "max-processes", 0, "")
	flags.Uint64Var(&o.maxOpenFiles, "max-open-files", 0, "")
	expires := flags.Float64("expires-in", 0, "")
	flags.IntVar(&o.maxCommands, "max-commands", 256, "")
	flags.BoolVar(&o.volatile, "volatile-spool", false, "")
	flags.StringVar(&o.disk, "disk", "", "")
	flags.StringVar(&o.account, "account", "", "")
	flags.BoolVar(&o.keepSocket, "keep-socket", false, "")
	flags.BoolVar(&o.keepCapabilities, "keep-capabilities", false, "")
	tokenName := flags.String("token-env", "", "")
	flags.BoolVar(&o.learnToken, "learn-token", false, "")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if (o.socket == "") == (o.listenFD < 0) || o.spool == "" || o.workspace == "" || flags.NArg() > 0 {
		return nil, errUsage
	}
	if !(*expires >= 0 && *expires <= maxSeconds) || o.maxCommands < 1 {
		return nil, fmt.Errorf("--expires-in must not be negative and --max-commands is at least 1")
	}
	if o.learnToken && *tokenName != "" {
		return nil, fmt.Errorf("--learn-token and --token-env exclude each other")
	}
	o.expiresIn = seconds(*expires)
	return o, o.complete(*user, *tokenName)
}

func (o *serveOptions) complete(user, tokenName string) (err error) {
	if o.spool, err = filepath.Abs(o.spool); err != nil {
		return err
	}
	if o.workspace, err = filepath.Abs(o.workspace); err != nil {
		return err
	}
	if user != "" {
		if o.user, err = parseIdentity(user); err != nil {
			return err
		}
	}
	if tokenName != "" {
		if o.token = os.Getenv(tokenName); o.token == "" {
			return fmt.Errorf("--token-env %s: the variable is empty, and a channel without its secret would be open to the sandbox", tokenName)
		}
		os.Unsetenv(tokenName)
	}
	return nil
}

func (o *serveOptions) roots() []string {
	if len(o.allowed) > 0 {
		return o.allowed
	}
	return []string{o.workspace, "/tmp"}
}

func (o *serveOptions) listen() (net.Listener, error) {
	if o.listenFD >= 0 {
		file := os.NewFile(uintptr(o.listenFD), "listener")
		if file == nil {
			return nil, fmt.Errorf("--listen-fd %d is not open", o.listenFD)
		}
		defer file.Close()
		return net.FileListener(file)
	}
	// A socket that a killed runner left would make bind(2) fail for ever.
	if info, err := os.Lstat(o.socket); err == nil && info.Mode()&os.ModeSocket != 0 {
		_ = os.Remove(o.socket)
	}
	listener, err := net.Listen("unix", o.socket)
	if err != nil {
		return nil, err
	}
	if o.user != nil && !o.keepSocket {
		_ = os.Chown(o.socket, o.user.uid, o.user.gid)
	}
	return listener, os.Chmod(o.socket, 0o600)
}

// prepare makes the directories and gives up what privileges there are.
func (o *serveOptions) prepare() error {
	if o.disk != "" {
		if err := o.makeDisk(); err != nil {
			return fmt.Errorf("disk %s: %w", o.disk, err)
		}
	}
	if o.account != "" && o.user != nil {
		if err := o.writeAccount(); err != nil {
			return fmt.Errorf("account %s: %w", o.account, err)
		}
	}
	for _, dir := range []string{o.workspace, o.spool} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if o.user != nil {
			if err := o.user.own(dir); err != nil {
				return fmt.Errorf("chown %s: %w", dir, err)
			}
		}
	}
	if o.keepCapabilities {
		setDumpable(false) // else a command of the same user could read the secret out of /proc/1/environ; ptrace(2)
	} else if o.user != nil {
		if err := o.user.become(); err != nil {
			return err
		}
	}
	_ = os.Chmod(o.spool, 0o700) // fails where it stays root's; what matters is below it
	for _, name := range []string{commandsDir, transferDir} {
		if err := os.MkdirAll(filepath.Join(o.spool, name), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// makeDisk fills the empty disk that the container engine has mounted; again after a restart of the container.
func (o *serveOptions) makeDisk() error {
	if err := makeDiskParts(o.disk); err != nil {
		return err
	}
	if o.user == nil {
		return nil
	}
	for _, part := range diskParts {
		if err := o.user.own(filepath.Join(o.disk, part.name)); err != nil {
			return err
		}
	}
	return nil
}

// writeAccount gives the user a name: FROM:TO are the image's passwd(5) and the one to be seen. Programs such as ssh refuse a user without.
func (o *serveOptions) writeAccount() error {
	from, to, found := strings.Cut(o.account, ":")
	if !found {
		return errors.New("needs FROM:TO")
	}
	others, err := os.ReadFile(from)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	line := ""
	if o.user.uid != 0 {
		line = fmt.Sprintf("sandbox:x:%d:%d:sandbox:%s:/bin/sh\n", o.user.uid, o.user.gid, os.Getenv("HOME"))
	}
	if err := os.WriteFile(to, append([]byte(line), others...), 0o644); err != nil {
		return err
	}
	return os.Chmod(to, 0o644) // the file mode creation mask does not count here
}

// own makes a directory the user's. Without CAP_CHOWN, which the local backend does not give,
// an open mode must do; nobody else is in the sandbox.
func (i *identity) own(dir string) error {
	var stat syscall.Stat_t
	if err := syscall.Stat(dir, &stat); err != nil {
		return err
	}
	if int(stat.Uid) == i.uid && int(stat.Gid) == i.gid {
		return nil
	}
	err := syscall.Chown(dir, i.uid, i.gid)
	if err == syscall.EPERM {
		err = syscall.Chmod(dir, 0o777)
	}
	return err
}

// identity is a user and group to become.
type identity struct{ uid, gid int }

func parseIdentity(value string) (*identity, error) {
	user, group, found := strings.Cut(value, ":")
	uid, err1 := strconv.Atoi(user)
	gid, err2 := strconv.Atoi(group)
	if !found || err1 != nil || err2 != nil || uid < 0 || gid < 0 {
		return nil, fmt.Errorf("%q: two numbers UID:GID", value)
	}
	return &identity{uid, gid}, nil
}
