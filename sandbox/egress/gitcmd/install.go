package gitcmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/netns"
)

// Roles in which this program is started again; the first argument of the line
// that names an interpreter.
const (
	roleGit     = "kiln-git-in-namespace"
	roleSSH     = "kiln-git-ssh"
	roleConnect = "kiln-git-connect"
)

// settings are what the commands know. They are in the files that start them.
type settings struct {
	// Git is the path of the real git.
	Git string `json:"git"`
	// SSH is the path of the real ssh; empty: there is none.
	SSH string `json:"ssh,omitempty"`
	// Namespace is the path of the network namespace.
	Namespace string `json:"namespace"`
	// Proxy is the proxy's address in the namespace.
	Proxy string `json:"proxy"`
	// Bound is the address of the proxy that connects to one host only.
	Bound string `json:"bound"`
	// Connect is the path of the command for connections of other kinds.
	Connect string `json:"connect"`
}

// Installed is a git that is first on the PATH of this process.
type Installed struct {
	dir       string
	namespace *os.File
	proxy     *proxy
}

// Install puts a git that p holds for first on the PATH of this process, with
// files in dir, which it makes. Only one may be installed at a time. Without a git
// on the PATH there is nothing to do, and nil is returned, whose Close does nothing.
func Install(dir string, p *egress.Policy) (_ *Installed, err error) {
	git, err := find("git")
	if git == "" || err != nil {
		return nil, err
	}
	ssh, err := find("ssh")
	if err != nil {
		return nil, err
	}
	if !safe(dir) || strings.Contains(dir, ":") || !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("directory %q of git: want an absolute path without colons and what a shell takes for more than letters", dir)
	}
	in := &Installed{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.Close())
		}
	}()
	var listener, bound net.Listener
	in.namespace, err = netns.Isolated(func() (err error) {
		if listener, err = net.Listen("tcp4", "127.0.0.1:0"); err == nil {
			bound, err = net.Listen("tcp4", "127.0.0.1:0")
		}
		return err
	})
	if err != nil {
		if listener != nil {
			err = errors.Join(err, listener.Close())
		}
		return nil, fmt.Errorf("make network namespace of git: %w", err)
	}
	in.proxy = startProxy(listener, bound, p)
	s := settings{
		Git: git, SSH: ssh, Namespace: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), in.namespace.Fd()),
		Proxy: listener.Addr().String(), Bound: bound.Addr().String(), Connect: filepath.Join(dir, "connect"),
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory of git: %w", err)
	}
	for name, role := range map[string]string{"git": roleGit, "ssh": roleSSH, "connect": roleConnect} {
		if err := s.write(filepath.Join(dir, name), role); err != nil {
			return nil, err
		}
	}
	if err := os.Setenv("PATH", dir+":"+os.Getenv("PATH")); err != nil {
		return nil, fmt.Errorf("put git on the PATH: %w", err)
	}
	return in, nil
}

// find returns the path of a program, empty when there is none.
func find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrNotFound) {
		return "", nil
	}
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("find %s: %w", name, err)
	}
	return path, nil
}

// write makes a file that the kernel starts as this program in role.
func (s settings) write(path, role string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write settings of git: %w", err)
	}
	text := fmt.Sprintf("#!/proc/%d/exe %s\n%s\n", os.Getpid(), role, data)
	// Not the old file: a process may be reading it.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("replace command of git: %w", err)
	}
	if err := os.WriteFile(path, []byte(text), 0o500); err != nil {
		return fmt.Errorf("write command of git: %w", err)
	}
	return nil
}

// read reads what write wrote.
func (s *settings) read(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(data), "\n")
	return json.Unmarshal([]byte(rest), s)
}

// Close takes git off the PATH again and ends the proxy with its connections.
func (in *Installed) Close() error {
	if in == nil {
		return nil
	}
	var errs []error
	if rest, ok := strings.CutPrefix(os.Getenv("PATH"), in.dir+":"); ok {
		errs = append(errs, os.Setenv("PATH", rest))
	}
	if in.proxy != nil {
		errs = append(errs, in.proxy.close())
	}
	if in.namespace != nil {
		errs = append(errs, in.namespace.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(in.dir))...)
}
