package stepfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// newFS opens a file system that is still to be configured. Layers are given by
// descriptor, one call each: a mount's option string could hold only a page of
// them.
func newFS(name string) (*filesystem, error) {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open file system %s: %w", name, err)
	}
	return &filesystem{name: name, fd: fd}, nil
}

// filesystem collects the first error, so that callers check once.
type filesystem struct {
	name string
	fd   int
	err  error
}

func (f *filesystem) close() { unix.Close(f.fd) }

func (f *filesystem) set(key, value string) {
	if f.err == nil {
		f.fail("option "+key+"="+value, unix.FsconfigSetString(f.fd, key, value))
	}
}

func (f *filesystem) setFlag(key string) {
	if f.err == nil {
		f.fail("option "+key, unix.FsconfigSetFlag(f.fd, key))
	}
}

func (f *filesystem) setFd(key string, fd int) {
	if f.err == nil {
		f.fail("option "+key, unix.FsconfigSetFd(f.fd, key, fd))
	}
}

func (f *filesystem) fail(what string, err error) {
	if err != nil {
		f.err = fmt.Errorf("%s %s: %w%s", f.name, what, err, f.log())
	}
}

// mount makes the file system and returns a detached mount of it.
func (f *filesystem) mount() (int, error) {
	if f.err != nil {
		return -1, f.err
	}
	if err := unix.FsconfigCreate(f.fd); err != nil {
		return -1, fmt.Errorf("make %s: %w%s", f.name, err, f.log())
	}
	fd, err := unix.Fsmount(f.fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make mount of %s: %w%s", f.name, err, f.log())
	}
	return fd, nil
}

// log returns what the kernel says about a refused option.
func (f *filesystem) log() string {
	var lines []string
	buf := make([]byte, 4096)
	for range 16 {
		n, err := unix.Read(f.fd, buf)
		if err != nil || n == 0 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[:n])))
	}
	if len(lines) == 0 {
		return ""
	}
	return " (" + strings.Join(lines, "; ") + ")"
}

// overlay returns a detached overlay of the tree's directories.
func overlay(tree sandbox.Tree, opts Options) (_ int, err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	layer := func(dir string) (int, error) {
		fd, err := mappedTree(dir, opts.IDMap)
		if err == nil {
			fds = append(fds, fd)
		}
		return fd, err
	}
	fs, err := newFS("overlay")
	if err != nil {
		return -1, err
	}
	defer fs.close()
	for _, dir := range tree.Lower {
		fd, err := layer(dir)
		if err != nil {
			return -1, err
		}
		fs.setFd("lowerdir+", fd)
	}
	if tree.Upper != "" {
		// Both are reached through one mount: the kernel wants to rename
		// between them.
		parent := commonParent(tree.Upper, tree.Work)
		top, err := layer(parent)
		if err != nil {
			return -1, err
		}
		for _, o := range [][2]string{{"upperdir", tree.Upper}, {"workdir", tree.Work}} {
			rel, err := filepath.Rel(parent, o[1])
			if err != nil {
				return -1, fmt.Errorf("%s: %w", o[0], err)
			}
			fd, err := openat2(top, rel, &unix.OpenHow{
				Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
				Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
			})
			if err != nil {
				return -1, fmt.Errorf("open %s %s: %w", o[0], o[1], err)
			}
			fds = append(fds, fd)
			fs.setFd(o[0], fd)
		}
		// A layer must mean the same to everyone who unpacks it: no redirects
		// and no references to lower files in its extended attributes.
		fs.set("index", "off")
		fs.set("metacopy", "off")
		fs.set("redirect_dir", "off")
		if opts.Volatile {
			if err := ClearVolatile(tree.Work); err != nil {
				return -1, err
			}
			fs.setFlag("volatile")
		}
	}
	if opts.IDMap == nil {
		return fs.mount()
	}
	return mountAs(fs, opts.IDMap)
}

// mappedTree returns a detached mount of dir with its IDs shifted by m.
func mappedTree(dir string, m *IDMap) (int, error) {
	fd, err := bind(dir, "")
	if err != nil || m == nil {
		return fd, err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(m.UserNS), Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("shift IDs of %s%s: %w", dir, mapHint(m, err), err)
	}
	return fd, nil
}

// mountAs makes the file system as the mapped root with all capabilities. The
// kernel keeps these credentials for its own work on the layers; the node's root
// has no ID there, so that it could not create anything.
//
// A thread that cannot get its own credentials back stays locked to the calling
// goroutine and ends with it, so that no other goroutine ever runs on it.
func mountAs(fs *filesystem, m *IDMap) (int, error) {
	runtime.LockOSThread()
	fd, err := -1, become(m.UID, m.GID)
	if err == nil {
		fd, err = fs.mount()
	}
	if back := become(0, 0); back != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return -1, errors.Join(err, fmt.Errorf("become root again: %w", back))
	}
	runtime.UnlockOSThread()
	return fd, err
}

// become gives the calling thread these file system IDs, and gives back the
// capabilities that the kernel takes away for it.
func become(uid, gid uint32) error {
	// The calls report the former ID, never an error; a second one that asks
	// for an impossible ID reports the current one.
	const probe = -1
	if _, err := unix.SetfsgidRetGid(int(gid)); err != nil {
		return fmt.Errorf("take group ID %d: %w", gid, err)
	}
	if now, _ := unix.SetfsgidRetGid(probe); uint32(now) != gid {
		return fmt.Errorf("take group ID %d: refused (needs CAP_SETGID)", gid)
	}
	if _, err := unix.SetfsuidRetUid(int(uid)); err != nil {
		return fmt.Errorf("take user ID %d: %w", uid, err)
	}
	if now, _ := unix.SetfsuidRetUid(probe); uint32(now) != uid {
		return fmt.Errorf("take user ID %d: refused (needs CAP_SETUID)", uid)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("get capabilities: %w", err)
	}
	for i := range caps {
		caps[i].Effective = caps[i].Permitted
	}
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}

// commonParent returns the deepest directory that holds both paths.
func commonParent(a, b string) string {
	a, b = filepath.Clean(a), filepath.Clean(b)
	for dir := filepath.Dir(a); ; dir = filepath.Dir(dir) {
		if rel, err := filepath.Rel(dir, b); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
			return dir
		}
	}
}

// ClearVolatile removes the mark with which the kernel refuses to use a work
// directory again after a volatile mount. A work directory that is gone has none.
func ClearVolatile(work string) error {
	root, err := os.OpenRoot(work)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open work directory: %w", err)
	}
	defer root.Close()
	if err := root.RemoveAll("work/incompat"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("clear work directory: %w", err)
	}
	return nil
}
