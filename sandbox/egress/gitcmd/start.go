package gitcmd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxRefusal bounds what a command repeats of the proxy's refusal, in bytes.
const maxRefusal = 4096

// This program was started as one of the commands when its arguments are those
// that the kernel makes of their first line. main must not run then.
func init() {
	if len(os.Args) < 3 {
		return
	}
	var run func(settings, []string) error
	switch os.Args[1] {
	case roleGit:
		run = becomeGit
	case roleSSH:
		run = becomeSSH
	case roleConnect:
		run = connect
	default:
		return
	}
	var s settings
	err := s.read(os.Args[2])
	if err == nil {
		err = run(s, os.Args[3:])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "fatal: %v\n", err)
		os.Exit(128)
	}
	os.Exit(0)
}

// becomeGit enters the namespace and executes the real git. It returns only an
// error.
func becomeGit(s settings, args []string) error {
	// The thread that enters is the one whose process executes git.
	runtime.LockOSThread()
	ns, err := os.Open(s.Namespace)
	if err != nil {
		return fmt.Errorf("open network namespace of git: %w", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace of git: %w", err)
	}
	if err := syscall.Exec(s.Git, append([]string{"git"}, args...), s.environ(os.Environ(), args)); err != nil {
		return fmt.Errorf("execute %s: %w", s.Git, err)
	}
	return nil
}

// environ returns env for git with args, without what leads it past the proxy.
func (s settings) environ(env, args []string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "GIT_PROXY_COMMAND" || strings.HasSuffix(strings.ToLower(name), "_proxy")
	})
	proxy := "http://" + s.Proxy
	if host := credentialsFor(args); host != "" {
		proxy = "http://" + boundTo(host) + "@" + s.Bound
		env = append(env, "GIT_HTTP_PROXY_AUTHMETHOD=basic")
	}
	return append(env, "http_proxy="+proxy, "https_proxy="+proxy, "all_proxy="+proxy, "GIT_PROXY_COMMAND="+s.Connect)
}

// becomeSSH executes the real ssh, which gets its connection from the proxy. It
// returns only an error.
func becomeSSH(s settings, args []string) error {
	if s.SSH == "" {
		return errors.New("the agent has no ssh; install it beside git, or use an HTTPS URL")
	}
	// Old versions of ssh give the host's name to a shell as it is. Only the last
	// argument, the remote command, is quoted by git.
	for _, a := range args[:max(0, len(args)-1)] {
		if !safe(a) {
			return fmt.Errorf("argument %q of ssh: host and user names are letters, digits, dots and dashes", a)
		}
	}
	all := append([]string{"ssh", "-o", "ProxyCommand=" + s.Connect + " %h %p"}, args...)
	if err := syscall.Exec(s.SSH, all, os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", s.SSH, err)
	}
	return nil
}

// safe tells whether a shell takes arg for one word as it is written.
func safe(arg string) bool {
	for _, c := range []byte(arg) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-_./:@=,+[]", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// connect asks the proxy for a connection to args, a host and a port, and joins it
// to standard input and output.
func connect(s settings, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("connect for git: want a host and a port")
	}
	to := net.JoinHostPort(strings.Trim(args[0], "[]"), args[1])
	conn, err := net.Dial("tcp", s.Proxy)
	if err != nil {
		return fmt.Errorf("reach proxy of git: %w", err)
	}
	req, err := http.NewRequest(http.MethodConnect, "http://"+to, nil)
	if err != nil {
		return fmt.Errorf("connect for git: %w", err)
	}
	req.Header.Set(directHeader, "1")
	if err := req.Write(conn); err != nil {
		return fmt.Errorf("ask proxy of git: %w", err)
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return fmt.Errorf("ask proxy of git: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
		return fmt.Errorf("%s", strings.TrimSpace(string(why)))
	}
	go func() {
		_, _ = io.Copy(conn, os.Stdin)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, in)
	return err
}
