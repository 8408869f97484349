package main

import (
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
	expiresIn                time.Duration
	token                    string
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
	tokenName := flags.String("token-env", "", "")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if (o.socket == "") == (o.listenFD < 0) || o.spool == "" || o.workspace == "" || flags.NArg() > 0 {
		return nil, errUsage
	}
	if !(*expires >= 0 && *expires <= maxSeconds) || o.maxCommands < 1 {
		return nil, fmt.Errorf("--expires-in must not be negative and --max-commands is at least 1")
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
	if o.user != nil {
		_ = os.Chown(o.socket, o.user.uid, o.user.gid)
	}
	return listener, os.Chmod(o.socket, 0o600)
}

// prepare makes the directories and gives up what privileges there are.
func (o *serveOptions) prepare() error {
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
	if o.user != nil {
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
