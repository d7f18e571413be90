package userns

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/kiln-build/kiln/sandbox/userns/script"
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

// ranges gives each sandbox a range of IDs that no other one on the node has.
//
// A range is taken by a lock on its file, which the kernel drops when the process
// dies.
type ranges struct {
	dir string

	// mu guards taken, the ranges of this process by number.
	mu    sync.Mutex
	taken map[uint32]bool
}

// idRange is a range in use.
type idRange struct {
	number, first uint32
	lock          *os.File
}

func newRanges(dir string) *ranges { return &ranges{dir: dir, taken: map[uint32]bool{}} }

// acquire takes a range. Every acquire needs a release.
func (r *ranges) acquire() (*idRange, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of uid ranges: %w", err)
	}
	for i := range uint32(maxRanges) {
		if r.taken[i] {
			continue
		}
		first := uint32(FirstID) + i*RangeSize
		lock, err := lockFile(filepath.Join(r.dir, strconv.FormatUint(uint64(first), 10)))
		if err != nil {
			return nil, fmt.Errorf("lock uid range: %w", err)
		}
		if lock != nil {
			r.taken[i] = true
			return &idRange{i, first, lock}, nil
		}
	}
	return nil, fmt.Errorf("all %d uid ranges of the node are in use: run fewer builds at once", maxRanges)
}

// release gives a range back. No process has its IDs any more.
func (r *ranges) release(got *idRange) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.taken, got.number)
	return got.lock.Close()
}

func (r *ranges) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.taken); n > 0 {
		return fmt.Errorf("%d uid ranges are still in use", n)
	}
	return nil
}

// newUserNS returns a user namespace whose IDs start at first on the node.
//
// A namespace is made by a process. It is killed at once, and its namespace is taken
// from it before it is waited for.
func newUserNS(first uint32) (*os.File, error) {
	program, err := script.Program()
	if err != nil {
		return nil, err
	}
	defer program.Close()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(first), Size: RangeSize}}
	cmd := &exec.Cmd{Path: pathOf(program), Args: []string{"init"}, Env: []string{}}
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
	_ = cmd.Wait() // it was killed, or has ended as nobody talks to it
	if err != nil {
		return nil, fmt.Errorf("open user namespace: %w", err)
	}
	return ns, nil
}
