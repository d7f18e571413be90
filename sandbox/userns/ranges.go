package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kiln-build/kiln/sandbox/stepfs"
)

const (
	// FirstID is the lowest ID on the node that a step ever has. It is far above
	// what distributions give to users and to /etc/subuid.
	FirstID = 2013265920
	// RangeSize is how many IDs a step has.
	RangeSize = 65536
	// maxRanges keeps the last ID below 2^31, which some programs take for signed.
	maxRanges = (1<<31 - FirstID) / RangeSize
)

// ranges gives each owner a range of IDs that nobody else on the node has.
//
// A range is taken by a lock on its file, which the kernel drops when the process
// dies. The user namespace that shifts IDs by it lives as long as it is taken.
type ranges struct {
	dir  string
	runc *runc

	mu      sync.Mutex
	byOwner map[string]*idRange
}

// idRange is a range in use.
type idRange struct {
	owner string
	first uint32
	users int
	lock  *os.File
	ns    *os.File
}

func newRanges(dir string, rc *runc) *ranges {
	return &ranges{dir: dir, runc: rc, byOwner: map[string]*idRange{}}
}

// acquire returns the range of owner. Every acquire needs a release.
func (r *ranges) acquire(owner string) (*idRange, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if got := r.byOwner[owner]; got != nil {
		got.users++
		return got, nil
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of uid ranges: %w", err)
	}
	for i := range uint32(maxRanges) {
		first := uint32(FirstID) + i*RangeSize
		lock, err := lockFile(filepath.Join(r.dir, strconv.FormatUint(uint64(first), 10)))
		if err != nil {
			return nil, fmt.Errorf("lock uid range: %w", err)
		}
		if lock == nil {
			continue
		}
		ns, err := newUserNS(r.runc, first)
		if err != nil {
			lock.Close()
			return nil, err
		}
		got := &idRange{owner: owner, first: first, users: 1, lock: lock, ns: ns}
		r.byOwner[owner] = got
		return got, nil
	}
	return nil, fmt.Errorf("all %d uid ranges of the node are in use: run fewer builds at once", maxRanges)
}

// release gives the range back when its last user does.
func (r *ranges) release(got *idRange) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if got.users--; got.users > 0 {
		return nil
	}
	delete(r.byOwner, got.owner)
	return errors.Join(got.ns.Close(), got.lock.Close())
}

func (r *ranges) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.byOwner); n > 0 {
		return fmt.Errorf("%d uid ranges are still in use", n)
	}
	return nil
}

// idMap returns the shift for mounts.
func (g *idRange) idMap() *stepfs.IDMap {
	return &stepfs.IDMap{UserNS: int(g.ns.Fd()), UID: g.first, GID: g.first}
}

// mapping returns the shift for a runtime spec.
func (g *idRange) mapping() []specs.LinuxIDMapping {
	return []specs.LinuxIDMapping{{ContainerID: 0, HostID: g.first, Size: RangeSize}}
}

// newUserNS returns a user namespace whose IDs start at first on the node.
//
// A namespace is made by a process. Any program does: it is killed at once, and
// its namespace is taken from it before it is waited for.
func newUserNS(rc *runc, first uint32) (*os.File, error) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(first), Size: RangeSize}}
	cmd := &exec.Cmd{Path: rc.path(), Args: []string{"runc", "--version"}, Env: []string{}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids,
		GidMappingsEnableSetgroups: true,
		Credential:                 &syscall.Credential{},
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make user namespace for IDs from %d: %w", first, err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // it was killed, or has printed its version: both are fine
	if err != nil {
		return nil, fmt.Errorf("open user namespace: %w", err)
	}
	return ns, nil
}
