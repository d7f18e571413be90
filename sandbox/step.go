package sandbox

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path"
	"regexp"
	"strings"
	"syscall"

	"github.com/kiln-build/kiln/sandbox/egress"
)

// ErrNotRunning is returned by Runtime.Exec for a step that does not run.
var ErrNotRunning = errors.New("step is not running")

// Step is one process to run in a sandbox, with everything that it may see.
type Step struct {
	// ID names the step on this node. It must match ValidID.
	ID string
	// Owner names the build that the step belongs to. Steps of one owner may
	// share a uid range; steps of two owners never run under the same range at
	// the same time. Empty means an owner of its own.
	Owner string

	// Build is what only steps of one build have, which nobody can guess. A step may be
	// run in the sandbox of the step whose result its root is, once that has ended, if
	// both have the same Build. Empty means that it has a sandbox of its own.
	Build string

	// Root is the root file system. Its upper directory, or its Dir when it is a
	// writable directory, receives what the step writes.
	Root Tree
	// ReadonlyRoot keeps the step from writing to its root.
	ReadonlyRoot bool
	// Mounts are mounted over the root, in this order.
	Mounts []Mount

	Process Process

	// Hostname is the step's host name; empty means DefaultHostname.
	Hostname string
	// Network selects what the step can reach.
	Network NetworkMode
	// Egress says what it can reach with NetworkEgress; nil: what the node's networks
	// were made with.
	Egress *egress.Policy
	// ExtraHosts are added to /etc/hosts.
	ExtraHosts []HostEntry

	// Limits bound what the step uses.
	Limits Limits
}

// DefaultHostname is the host name of a step that names none. It is the one that
// BuildKit gives, so that layers do not differ.
const DefaultHostname = "buildkitsandbox"

// Tree is a directory tree of the node that a step sees. Exactly one of Dir,
// Lower and Tmpfs is set. On disk every tree holds IDs as an image layer does,
// from 0 up; a runtime shifts them on the way in, never on disk.
type Tree struct {
	// Dir is one directory or file, shown as it is.
	Dir string
	// Lower are the directories of an overlay, topmost first. They are never
	// written to. Without Upper the overlay is read-only; a single Lower without
	// Upper is shown as it is.
	Lower []string
	// Upper and Work make the overlay writable. They are on one file system.
	Upper, Work string
	// Tmpfs is an empty in-memory file system that lives as long as the step.
	Tmpfs *Tmpfs
}

// Tmpfs describes an in-memory file system.
type Tmpfs struct {
	// Size limits it, in bytes; 0 means half of the node's memory.
	Size int64
}

// Mount shows a tree at a place in the step's file system.
type Mount struct {
	// Destination is an absolute path in the step. Missing directories on the way
	// are made, and are removed again from the layer when the step ends.
	Destination string
	Tree        Tree
	// Subpath selects a file or directory inside the tree. It is resolved inside
	// the tree: a symlink in the tree never leads out of it.
	Subpath  string
	Readonly bool
	// Socket is set when the tree is a unix socket of the node that the step may
	// connect to, as for --mount=type=ssh.
	Socket bool
}

// Process is a program to run in a step.
type Process struct {
	Args []string
	// Env has entries of the form NAME=value.
	Env []string
	// Cwd is an absolute path. It is made when it is missing.
	Cwd string
	// User is what a Dockerfile's USER takes: a name or ID, and after a colon a
	// group or its ID. It is looked up in the root's /etc/passwd and /etc/group.
	User string
	// Terminal asks for a pseudo-terminal; Stderr is not used then.
	Terminal bool
	// Resize delivers the terminal's size.
	Resize <-chan WindowSize
	// Signal delivers signals for the process.
	Signal <-chan syscall.Signal

	// Stdin, Stdout and Stderr may be nil. The runtime does not close Stdout and
	// Stderr; it closes Stdin when the process ends.
	Stdin          io.ReadCloser
	Stdout, Stderr io.Writer

	Rlimits []Rlimit
}

// WindowSize is the size of a terminal in characters.
type WindowSize struct{ Rows, Cols uint16 }

// Rlimit is a resource limit with the name that the OCI runtime spec gives it,
// such as RLIMIT_NOFILE.
type Rlimit struct {
	Type       string
	Soft, Hard uint64
}

// HostEntry is a line of /etc/hosts.
type HostEntry struct {
	Name string
	IP   netip.Addr
}

// NetworkMode says what a step can reach. The zero value is not valid: a network
// must be chosen. The node's own network is not a choice.
type NetworkMode string

const (
	// NetworkNone gives a network namespace with a loopback device only.
	NetworkNone NetworkMode = "none"
	// NetworkEgress gives a network namespace from which connections can be made
	// to the outside, and none into it.
	NetworkEgress NetworkMode = "egress"
)

var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_-]{0,99}$`)

// ValidID reports whether id can name a step. It excludes dots and slashes, so
// that an ID is safe as a file name, as a cgroup and as a container ID.
func ValidID(id string) bool { return validID.MatchString(id) }

// Validate refuses a step that no runtime may run. Every runtime calls it before
// it touches the node.
func (s *Step) Validate() error {
	if !ValidID(s.ID) {
		return fmt.Errorf("step ID %q: want letters, digits, - and _", s.ID)
	}
	if err := s.Root.validate(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if s.Root.Tmpfs != nil {
		return errors.New("root: a tmpfs cannot be the root")
	}
	switch s.Network {
	case NetworkNone, NetworkEgress:
	default:
		return fmt.Errorf("network %q: want %s or %s", s.Network, NetworkNone, NetworkEgress)
	}
	if err := s.Limits.Validate(); err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	for i, m := range s.Mounts {
		if err := m.validate(); err != nil {
			return fmt.Errorf("mount %d at %q: %w", i, m.Destination, err)
		}
	}
	return s.Process.Validate()
}

// Validate refuses a process that no runtime may run.
func (p *Process) Validate() error {
	if len(p.Args) == 0 {
		return errors.New("process has no command")
	}
	if !path.IsAbs(p.Cwd) {
		return fmt.Errorf("working directory %q is not absolute", p.Cwd)
	}
	for _, s := range append(append([]string{p.Cwd, p.User}, p.Args...), p.Env...) {
		if strings.IndexByte(s, 0) >= 0 {
			return fmt.Errorf("process has a NUL byte in %.40q", s)
		}
	}
	return nil
}

func (m *Mount) validate() error {
	switch {
	case !path.IsAbs(m.Destination) || path.Clean(m.Destination) == "/":
		return errors.New("destination must be an absolute path below /")
	case strings.IndexByte(m.Destination, 0) >= 0 || strings.IndexByte(m.Subpath, 0) >= 0:
		return errors.New("path has a NUL byte")
	case m.Socket && m.Tree.Dir == "":
		return errors.New("a socket must be a Dir")
	}
	return m.Tree.validate()
}

func (t *Tree) validate() error {
	forms := 0
	for _, set := range []bool{t.Dir != "", len(t.Lower) > 0, t.Tmpfs != nil} {
		if set {
			forms++
		}
	}
	switch {
	case forms != 1:
		return errors.New("want exactly one of a directory, lower directories and a tmpfs")
	case (t.Upper == "") != (t.Work == ""):
		return errors.New("upper and work directories go together")
	case t.Upper != "" && len(t.Lower) == 0:
		return errors.New("an upper directory needs a lower one")
	}
	for _, p := range append([]string{t.Dir, t.Upper, t.Work}, t.Lower...) {
		if p != "" && !path.IsAbs(p) {
			return fmt.Errorf("path %q on the node is not absolute", p)
		}
	}
	return nil
}
