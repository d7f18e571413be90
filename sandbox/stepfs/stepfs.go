// Package stepfs shows the trees of a step (sandbox.Tree) at places on the node,
// from where a sandbox takes them.
//
// It promises that a mount is complete or not there at all: everything is built
// from detached mounts, which vanish with their descriptors, and attached in one
// call at the end. A subpath is resolved inside its tree, by descriptor, so that
// neither a symlink nor a concurrent change of the tree leads out of it. Device
// nodes never work on these mounts. With an IDMap the tree's IDs are shifted by
// the kernel while it is mounted; on disk they stay as they are.
package stepfs

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// Options change how a tree is shown.
type Options struct {
	// Readonly keeps everyone from writing through the mount.
	Readonly bool
	// Subpath selects a file or directory inside the tree.
	Subpath string
	// Suid lets setuid programs and file capabilities work. It is for the root
	// of a step only.
	Suid bool
	// Noexec keeps everyone from executing what is shown.
	Noexec bool
	// Volatile leaves out the flush of the whole file system that the unmount of
	// a writable overlay makes. Who sets it flushes what has to survive a crash
	// of the node.
	Volatile bool
	// IDMap shifts IDs; nil shows them as they are.
	IDMap *IDMap
}

// IDMap is the shift of a user namespace.
type IDMap struct {
	// UserNS is a descriptor of the user namespace. It belongs to the caller and
	// has to stay open during the call only.
	UserNS int
	// UID and GID are what the namespace's root is on the node.
	UID, GID uint32
}

// Make makes target, a directory or a file as what is shown needs it, and shows tree
// there. The function that it returns takes the mount away again and removes target;
// files written through the mount are complete when it has returned.
func Make(tree sandbox.Tree, target string, opts Options) (unmount func() error, err error) {
	fd, dir, err := detached(tree, opts)
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", target, err)
	}
	defer unix.Close(fd)
	if dir {
		err = os.Mkdir(target, 0o755)
	} else {
		err = makeFile(target)
	}
	if err != nil {
		return nil, fmt.Errorf("make mount point: %w", err)
	}
	detach, err := attach(fd, tree, target, opts)
	if err != nil {
		return nil, errors.Join(err, os.Remove(target))
	}
	return func() error {
		if err := detach(); err != nil {
			return err
		}
		return os.Remove(target)
	}, nil
}

func makeFile(target string) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// attach puts the detached mount at target.
func attach(fd int, tree sandbox.Tree, target string, opts Options) (func() error, error) {
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("attach mount at %s: %w", target, err)
	}
	return func() error {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			// Someone else's process looks into it; what the step wrote is
			// complete, as its own processes are gone.
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
		if opts.Volatile && tree.Upper != "" {
			return ClearVolatile(tree.Work)
		}
		return nil
	}, nil
}

// detached returns a descriptor of a detached mount of what tree and opts select,
// with all its attributes, and whether it is a directory.
func detached(tree sandbox.Tree, opts Options) (fd int, dir bool, err error) {
	fd = -1
	defer func() {
		if err != nil && fd >= 0 {
			unix.Close(fd)
		}
	}()
	var mapped bool
	switch {
	case tree.Dir != "":
		fd, err = bind(tree.Dir, opts.Subpath)
	case tree.Tmpfs != nil:
		fd, err = tmpfs(tree.Tmpfs, opts.IDMap)
		mapped = true
	case len(tree.Lower) == 1 && tree.Upper == "":
		opts.Readonly = true
		fd, err = bind(tree.Lower[0], opts.Subpath)
	case len(tree.Lower) > 0:
		fd, err = overlay(tree, opts)
		mapped = true
	default:
		err = errors.New("tree is empty")
	}
	if err != nil {
		return -1, false, err
	}
	if mapped && opts.Subpath != "" {
		whole := fd
		fd, err = cloneIn(whole, opts.Subpath)
		unix.Close(whole)
		if err != nil {
			return -1, false, err
		}
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if !opts.Suid {
		attr.Attr_set |= unix.MOUNT_ATTR_NOSUID
	}
	if opts.Readonly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if opts.Noexec {
		attr.Attr_set |= unix.MOUNT_ATTR_NOEXEC
	}
	if opts.IDMap != nil && !mapped {
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(opts.IDMap.UserNS)
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fd, false, fmt.Errorf("set attributes of the mount%s: %w", mapHint(opts.IDMap, err), err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fd, false, fmt.Errorf("stat mount: %w", err)
	}
	return fd, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// mapHint explains the usual reason why an ID shift is refused.
func mapHint(m *IDMap, err error) string {
	if m != nil && errors.Is(err, unix.EINVAL) {
		return " (the file system below it must support idmapped mounts, as ext4, xfs, btrfs and tmpfs do and overlay does not)"
	}
	return ""
}

// bind returns a detached mount of dir, or of subpath in it.
func bind(dir, subpath string) (int, error) {
	if subpath != "" {
		root, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", dir, err)
		}
		defer unix.Close(root)
		return cloneIn(root, subpath)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open tree %s: %w", dir, err)
	}
	return fd, nil
}

// cloneIn returns a detached mount of subpath, resolved as if root were the root
// directory.
func cloneIn(root int, subpath string) (int, error) {
	sub, err := openat2(root, subpath, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, fmt.Errorf("open %q in the tree: %w", subpath, err)
	}
	defer unix.Close(sub)
	fd, err := unix.OpenTree(sub, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("open %q as a tree: %w", subpath, err)
	}
	return fd, nil
}

// openat2 opens name below dir. A step out of a directory by ".." fails with EAGAIN when
// something is renamed or mounted anywhere on the node at that moment.
func openat2(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	for range 1000 {
		if fd, err = unix.Openat2(dir, name, how); !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
	return fd, err
}

// tmpfs returns a detached in-memory file system that the mapped root owns.
func tmpfs(t *sandbox.Tmpfs, m *IDMap) (int, error) {
	var uid, gid uint32
	if m != nil {
		uid, gid = m.UID, m.GID
	}
	options := [][2]string{
		{"mode", "1777"},
		{"uid", strconv.FormatUint(uint64(uid), 10)},
		{"gid", strconv.FormatUint(uint64(gid), 10)},
	}
	if t.Size > 0 {
		options = append(options, [2]string{"size", strconv.FormatInt(t.Size, 10)})
	}
	fs, err := newFS("tmpfs")
	if err != nil {
		return -1, err
	}
	defer fs.close()
	for _, o := range options {
		fs.set(o[0], o[1])
	}
	return fs.mount()
}
