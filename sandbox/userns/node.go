package userns

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// removeStepDir removes a step's directory. It never goes into a directory in it:
// those are mount points, and what is mounted is not the step's to delete.
func removeStepDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read step directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
	}
	if err := errors.Join(append(errs, os.Remove(dir))...); err != nil {
		return fmt.Errorf("remove step directory: %w", err)
	}
	return nil
}

// recover removes what killed processes left: sandboxes with their cgroups, of this
// state directory, and of others that nobody has opened again.
func (r *Runtime) recover() error {
	dir, own := r.cgroupDir(r.cfg.CgroupParent), path.Base(r.cgroupParent())
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read cgroups of former sandboxes: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() || !cgroupName.MatchString(e.Name()) {
			continue
		}
		// Who has sandboxes holds a lock.
		lock, err := lockDir(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if lock != nil {
			r.removeSandboxes(path.Join(r.cfg.CgroupParent, e.Name()), e.Name() == own)
			lock.Close()
		}
	}
	return nil
}

// cgroupName matches the cgroup of a runtime's sandboxes.
var cgroupName = regexp.MustCompile("^[0-9a-f]{12}$")

// removeSandboxes ends the sandboxes in a cgroup and removes it. If it is not our own,
// it must hold nothing but sandboxes.
func (r *Runtime) removeSandboxes(parent string, own bool) {
	entries, err := os.ReadDir(r.cgroupDir(parent))
	if err != nil {
		return // it is gone
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && (own || strings.HasPrefix(e.Name(), sandboxPrefix)) {
			names = append(names, e.Name())
		} else if e.IsDir() {
			return
		}
	}
	for _, name := range names {
		r.killCgroup(path.Join(parent, name))
		_ = r.cgroups.Remove(path.Join(parent, name)) // the next runtime tries again
	}
	r.cgroups.Tidy(parent)
}

// claimCgroup makes the cgroup of our sandboxes and locks it for as long as the file is
// open.
func (r *Runtime) claimCgroup() (*os.File, error) {
	dir := r.cgroupDir(r.cgroupParent())
	for range 100 {
		// Another process may be removing the one above it.
		if err := os.MkdirAll(dir, 0o755); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("make cgroup of sandboxes: %w", err)
		}
		lock, err := lockDir(dir)
		if err != nil {
			return nil, err
		}
		if lock == nil {
			// Another process looks whether it was left.
			time.Sleep(20 * time.Millisecond)
			continue
		}
		// Another process may have taken it for one that was left.
		now, err := os.Stat(dir)
		locked, lerr := lock.Stat()
		if err == nil && lerr == nil && os.SameFile(now, locked) {
			return lock, nil
		}
		lock.Close()
	}
	return nil, fmt.Errorf("make cgroup of sandboxes: another process of the node uses or removes %s", r.cgroupParent())
}

// lockDir locks a directory. It returns nil when it is not there, or when someone else
// has locked it.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open cgroup of sandboxes: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock cgroup of sandboxes: %w", err)
}

// cgroupParent is the cgroup of the steps of this runtime. Its name comes from the
// state directory, so that the next runtime with it finds them. The directory's
// inode is part of it: in another mount namespace the same path is another
// directory.
func (r *Runtime) cgroupParent() string {
	var st unix.Stat_t
	_ = unix.Stat(r.cfg.StateDir, &st) // New has made it
	sum := sha256.Sum256(fmt.Appendf(nil, "%d:%d:%s", st.Dev, st.Ino, r.cfg.StateDir))
	return path.Join(r.cfg.CgroupParent, hex.EncodeToString(sum[:6]))
}

// unmountBelow takes away every mount below dir, the last made first.
func unmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i].Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err)
		}
	}
	return nil
}

// killCgroup kills the processes of a cgroup, and waits until they are gone.
func (r *Runtime) killCgroup(name string) {
	for range 100 {
		data, _ := os.ReadFile(filepath.Join(r.cgroupDir(name), "cgroup.procs"))
		pids := strings.Fields(string(data))
		if len(pids) == 0 {
			return
		}
		for _, field := range pids {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// cgroupDir returns the directory of a cgroup in the unified hierarchy.
func (r *Runtime) cgroupDir(name string) string {
	return filepath.Join(pathOf(r.cgroups.Unified()), name)
}

// removeCgroups removes the cgroups around those of sandboxes.
func (r *Runtime) removeCgroups() {
	r.cgroups.Tidy(r.cgroupParent())
	r.cgroups.Tidy(r.cfg.CgroupParent)
}

// mountState mounts an in-memory file system at dir. The files of a step are
// short-lived, which disks are slow at.
func mountState(dir string) error {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open tmpfs: %w", err)
	}
	defer unix.Close(fs)
	for _, o := range [][2]string{{"mode", "0711"}, {"size", "128m"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return fmt.Errorf("set %s of tmpfs: %w", o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("make tmpfs: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach tmpfs at %s: %w", dir, err)
	}
	return nil
}

// unmountState takes the mount of mountState away, and its files with it.
func unmountState(dir string) error {
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// sysfsOf returns a detached read-only mount of the sysfs of a network namespace.
func sysfsOf(netns string) (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		fd, err := mountSysfs(netns, func(err error) {
			if err == nil {
				runtime.UnlockOSThread()
			} // else the thread ends with the goroutine
		})
		done <- result{fd, err}
	}()
	r := <-done
	return r.fd, r.err
}

// mountSysfs mounts sysfs from inside netns and calls back with how the return to
// the thread's own namespace went.
func mountSysfs(netns string, back func(error)) (int, error) {
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		back(nil)
		return -1, fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(own)
	ns, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		back(nil)
		return -1, fmt.Errorf("open network namespace: %w", err)
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		back(nil)
		return -1, fmt.Errorf("enter network namespace: %w", err)
	}
	defer func() { back(unix.Setns(own, unix.CLONE_NEWNET)) }()
	fs, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open sysfs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return -1, fmt.Errorf("make sysfs read-only: %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("make sysfs: %w", err)
	}
	const attrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, fmt.Errorf("mount sysfs: %w", err)
	}
	return fd, nil
}
