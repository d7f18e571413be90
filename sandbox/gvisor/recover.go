package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// recover releases what a killed process left in the state directory. Its
// sandboxes die with it; what is left of them are processes on their way out,
// mounts, and files.
func (r *Runtime) recover(ctx context.Context) error {
	starters, err := os.ReadDir(r.startersDir())
	if err != nil {
		return err
	}
	for _, e := range starters {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := killOurs(ctx, pid, r.stepsDir()); err != nil {
			return err
		}
		if err := os.Remove(r.starterFile(pid)); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(r.stepsDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(r.stepsDir(), e.Name())
		for _, pid := range recordedPIDs(dir) {
			if err := killOurs(ctx, pid, dir); err != nil {
				return err
			}
		}
	}
	if err := unmountBelow(r.cfg.StateDir); err != nil {
		return err
	}
	for _, e := range entries {
		if err := r.cgroups.Remove(r.cgroupOf(e.Name())); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(r.stepsDir(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// recordedPIDs are the processes of the sandbox whose directory is dir, as far as
// they are known.
func recordedPIDs(dir string) []int {
	st, err := readState(filepath.Join(dir, "runsc"))
	if err != nil {
		return nil
	}
	return []int{st.Sandbox.PID}
}

// state is what runsc writes about a container, as far as it is needed.
type state struct {
	Sandbox struct {
		PID int `json:"pid"`
	} `json:"sandbox"`
}

func readState(runscRoot string) (state, error) {
	var st state
	data, err := os.ReadFile(filepath.Join(runscRoot, containerID+"_sandbox:"+containerID+".state"))
	if err != nil {
		return st, fmt.Errorf("read state of the sandbox: %w", err)
	}
	if err := json.Unmarshal(data, &st); err != nil {
		return st, fmt.Errorf("read state of the sandbox: %w", err)
	}
	return st, nil
}

// killOurs kills a process whose command line names dir, and waits until it is
// gone. A process that has another one's ID now is left alone.
func killOurs(ctx context.Context, pid int, dir string) error {
	fd, err := killNamed(pid, dir)
	if fd < 0 || err != nil {
		return err
	}
	defer unix.Close(fd)
	return waitPidfd(ctx, fd, pid)
}

// signalOurs is killOurs without the wait.
func signalOurs(pid int, dir string) error {
	fd, err := killNamed(pid, dir)
	if fd >= 0 {
		unix.Close(fd)
	}
	return err
}

// killNamed kills a process whose command line names dir and returns a descriptor
// of it, or less than 0 when there is none such.
func killNamed(pid int, dir string) (int, error) {
	if pid <= 1 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, nil // gone
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(cmdline), dir+"/") {
		unix.Close(fd)
		return -1, nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		unix.Close(fd)
		return -1, fmt.Errorf("kill process %d: %w", pid, err)
	}
	return fd, nil
}

// waitPidfd waits until the process behind fd has ended.
func waitPidfd(ctx context.Context, fd, pid int) error {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", pid, err)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("process %d does not end although it is killed", pid)
}

// unmountBelow takes away every mount below dir, the deepest first.
func unmountBelow(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(real))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	sort.SliceStable(mounts, func(i, j int) bool { return len(mounts[i].Mountpoint) > len(mounts[j].Mountpoint) })
	for _, m := range mounts {
		if m.Mountpoint == real {
			continue
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// releaseShared takes away the network namespace that runsc keeps for the file
// servers of all sandboxes. Sandboxes that start together mount it more than once.
func (r *Runtime) releaseShared() error {
	if err := unmountBelow(r.sharedDir()); err != nil {
		return err
	}
	return os.RemoveAll(r.sharedDir())
}
