package userns

import (
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
	"github.com/kiln-build/kiln/sandbox/userns/script"
)

// entry is what a step finds in its sandbox.
type entry struct {
	root     *stepfs.Detached
	readonly bool
	places   []place
	hostname string
	shmSize  int64
	cwd      string
}

// place is a mount in the step.
type place struct {
	mount       *stepfs.Detached
	destination string
}

// run makes the process behind conn enter the step. Only the execution of p remains.
func (e *entry) run(conn *script.Conn, p *program, streams *streams) error {
	s := script.New()
	fds := []int{int(e.root.File.Fd())}
	for _, p := range e.places {
		fds = append(fds, int(p.mount.File.Fd()))
	}
	got := s.Receive(append(fds, streams.fds()...)...)
	e.enter(s, got[0], got[1:len(fds)])
	e.finish(s)
	return streams.plug(conn, s, got[len(fds):], p.user.UID, true)
}

// join makes the process behind conn enter the sandbox of another process.
func (p *program) join(conn *script.Conn, target *os.File, doors []*os.File, streams *streams) error {
	s := script.New()
	fds := append([]int{int(target.Fd())}, descriptors(doors)...)
	got := s.Receive(append(fds, streams.fds()...)...)
	enterCgroup(s, got[1:len(fds)])
	s.For("hide memory")
	s.Do(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	s.For("enter sandbox")
	s.Do(unix.SYS_SETNS, got[0], unix.CLONE_NEWUSER|unix.CLONE_NEWNS|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS|unix.CLONE_NEWNET|unix.CLONE_NEWCGROUP)
	become(s)
	s.For("set umask")
	s.Do(unix.SYS_UMASK, 0o022)
	return streams.plug(conn, s, got[len(fds):], p.user.UID, false)
}

// enter adds to s what puts the step's root and mounts in place.
func (e *entry) enter(s *script.Script, root script.FD, places []script.FD) {
	s.For("mount root")
	s.Do(unix.SYS_MOVE_MOUNT, root, "", unix.AT_FDCWD, rootNew, unix.MOVE_MOUNT_F_EMPTY_PATH)
	top := s.Do(unix.SYS_OPENAT, unix.AT_FDCWD, rootNew, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	in := inRoot{s, top}
	for _, dir := range []string{rootProc, rootDev, rootSys} {
		s.For("mount %s", dir)
		s.Do(unix.SYS_MOVE_MOUNT, unix.AT_FDCWD, dir, in.point(dir, true, dir != rootDev), "", unix.MOVE_MOUNT_T_EMPTY_PATH)
	}
	for i, p := range e.places {
		s.For("mount %s", p.destination)
		s.Do(unix.SYS_MOVE_MOUNT, places[i], "", in.point(p.destination, p.mount.Dir, false), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	}
	s.For("enter root")
	s.Do(unix.SYS_FCHDIR, top)
	s.Do(unix.SYS_PIVOT_ROOT, ".", ".")
	s.Do(unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
	s.Do(unix.SYS_CHDIR, "/")
	s.For("set host name")
	s.Do(unix.SYS_SETHOSTNAME, e.hostname, len(e.hostname))
	if e.shmSize != 0 && e.shmSize != sandbox.DefaultShmBytes {
		s.For("set size of /dev/shm")
		s.Do(unix.SYS_MOUNT, "", "/dev/shm", "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("size=%d", e.shmSize))
	}
}

// finish adds what comes after the last change of the root.
func (e *entry) finish(s *script.Script) {
	s.For("make working directory")
	for dir := range prefixes(e.cwd) {
		s.Do(unix.SYS_MKDIRAT, unix.AT_FDCWD, "/"+dir, 0o755).Expect(unix.EEXIST)
	}
	if e.readonly {
		s.For("make root read-only")
		attr := s.Words(unix.MOUNT_ATTR_RDONLY, 0, 0, 0)
		s.Do(unix.SYS_MOUNT_SETATTR, unix.AT_FDCWD, "/", 0, attr, 32)
	}
}

// inRoot resolves paths of the step while it is not in its root yet.
type inRoot struct {
	s   *script.Script
	top *script.Call
}

// point opens the mount point at destination, which it makes if it is missing. No
// symlink leads out of the step's root; a strict point must not be one.
func (r inRoot) point(destination string, dir, strict bool) *script.Call {
	parent := ""
	for p := range prefixes(destination) {
		in := r.top
		if parent != "" {
			in = r.open(parent, 0)
		}
		if len(p) == len(strings.Trim(path.Clean(destination), "/")) && !dir {
			r.s.Do(unix.SYS_OPENAT, in, path.Base(p), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644).Expect(unix.EEXIST)
		} else {
			r.s.Do(unix.SYS_MKDIRAT, in, path.Base(p), 0o755).Expect(unix.EEXIST)
		}
		parent = p
	}
	var resolve uint64
	if strict {
		resolve = unix.RESOLVE_NO_SYMLINKS
	}
	return r.open(parent, resolve)
}

func (r inRoot) open(name string, resolve uint64) *script.Call {
	how := r.s.Words(unix.O_PATH|unix.O_CLOEXEC, 0, resolve|unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	return r.s.Do(unix.SYS_OPENAT2, r.top, name, how, 24).Retry()
}

// prefixes yields the paths of the directories on the way to p and p itself,
// without the leading slash.
func prefixes(p string) func(func(string) bool) {
	return func(yield func(string) bool) {
		p := strings.Trim(path.Clean("/"+p), "/")
		if p == "" {
			return
		}
		for i := range p {
			if p[i] == '/' && !yield(p[:i]) {
				return
			}
		}
		yield(p)
	}
}
