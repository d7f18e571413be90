package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// marker is the file that makes a directory the state directory of a cluster.
// Nothing else is ever removed.
const marker = "kiln-cluster"

// record is what a state directory says about its cluster. The file is the truth:
// whoever changes it holds the directory's lock and reads it anew.
type record struct {
	// Ready is set when the start ended well.
	Ready    bool             `json:"ready"`
	Registry string           `json:"registry"`
	Bin      string           `json:"bin"`
	Machines []*machineRecord `json:"machines"`
}

type machineRecord struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	// Holder is process 1 of the machine.
	Holder     process            `json:"holder"`
	Components []*componentRecord `json:"components"`
}

type componentRecord struct {
	Name    string   `json:"name"`
	Args    []string `json:"args"`
	Process process  `json:"process"`
}

func (r *record) machine(name string) *machineRecord {
	for _, m := range r.Machines {
		if m.Name == name {
			return m
		}
	}
	return nil
}

func (m *machineRecord) component(name string) *componentRecord {
	for _, c := range m.Components {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func readRecord(dir string) (*record, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cluster.json"))
	if err != nil {
		return nil, err
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("read %s/cluster.json: %w", dir, err)
	}
	if len(r.Machines) == 0 {
		return nil, fmt.Errorf("read %s/cluster.json: it names no machine", dir)
	}
	return r, nil
}

func (r *record) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, "cluster.json.new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("record cluster: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, "cluster.json")); err != nil {
		return fmt.Errorf("record cluster: %w", err)
	}
	return nil
}

// update changes the record under the directory's lock.
func (c *Cluster) update(ctx context.Context, change func(*record) error) error {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := readRecord(c.dir)
	if err != nil {
		return err
	}
	if err := change(r); err != nil {
		return err
	}
	return r.write(c.dir)
}

// lock takes the lock of a state directory, which must exist. The lock ends with
// the returned function or with the process.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	for {
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "lock state directory", Path: dir, Err: err}
		}
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && sameFile(fd, dir) {
			return func() { unix.Close(fd) }, nil
		}
		unix.Close(fd)
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, &os.PathError{Op: "lock state directory", Path: dir, Err: err}
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, fmt.Errorf("lock state directory %s, which another process holds: %w", dir, err)
		}
	}
}

// sameFile tells whether the descriptor is still what the path names.
func sameFile(fd int, path string) bool {
	var a, b unix.Stat_t
	return unix.Fstat(fd, &a) == nil && unix.Stat(path, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// claim makes dir a state directory. It must be missing, empty, or one already.
func claim(dir string) error {
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make state directory: %w", err)
	}
	if err := checkOwned(dir); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, marker), nil, 0o600); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	return nil
}

// checkOwned refuses a directory that holds something else than a cluster.
func checkOwned(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read state directory: %w", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, marker)); err != nil && len(entries) > 0 {
		return fmt.Errorf("%s is not empty and holds no cluster; choose another directory", dir)
	}
	return nil
}

// removeState removes a state directory in which nothing is mounted.
func removeState(dir string) error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != dir && !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	if len(mounts) > 0 {
		return fmt.Errorf("remove %s: %s is mounted; unmount it first", dir, mounts[0].Mountpoint)
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove state directory: %w", err)
	}
	// The marker goes last: until then another Down may end what this one began.
	for _, e := range entries {
		if e.Name() == marker {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove state directory: %w", err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove state directory: %w", err)
	}
	return nil
}

// identity is the name by which everything outside the state directory is found.
func identity(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return fmt.Sprintf("%x", sum[:4])
}

// sleep waits for d or until the context ends, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
