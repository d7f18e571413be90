package gvisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/sandbox/stepfs"
)

// mountRoot mounts the root where the node sees it. Layers are shown below a
// scratch layer, which takes the mount points that the sandbox needs, and which
// nobody keeps.
func (s *stepRun) mountRoot() error {
	tree := s.step.Root
	tmp := s.tmp
	s.rootfs = filepath.Join(tmp, "rootfs")
	s.readonly = s.step.ReadonlyRoot || s.overlaid() && tree.Upper == ""
	opts := stepfs.Options{Suid: true, Volatile: true}
	if s.overlaid() {
		lower := tree.Lower
		if tree.Upper != "" && !emptyDir(tree.Upper) {
			lower = append([]string{tree.Upper}, lower...)
		}
		u, w := filepath.Join(tmp, "u"), filepath.Join(tmp, "w")
		if err := copyRootAttrs(u, tree); err != nil {
			return err
		}
		if err := os.Mkdir(w, 0o700); err != nil {
			return err
		}
		tree = sandbox.Tree{Lower: lower, Upper: u, Work: w}
	}
	unmount, err := stepfs.Make(tree, s.rootfs, opts)
	if err != nil {
		return err
	}
	s.defers = append(s.defers, unmount)
	return nil
}

// showRoot shows the root to the sandbox.
func (s *stepRun) showRoot() error {
	conf := mountConf{Lower: lowerServed, Upper: upperNone}
	if s.overlaid() && !s.readonly {
		conf.Upper, conf.Size = upperPrivate, sizeOf(s.step.Limits)
	}
	return s.show(s.rootfs, s.overlaid() || s.readonly, conf)
}

// show gives the sandbox a mount of its own of what is at path of the node.
func (s *stepRun) show(path string, readonly bool, conf mountConf) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open %s as a tree: %w", path, err)
	}
	root := os.NewFile(uintptr(fd), path)
	attrs := uint64(unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID)
	if readonly {
		attrs |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: attrs}); err != nil {
		root.Close()
		return fmt.Errorf("set what the sandbox may do with %s: %w", path, err)
	}
	server, err := serveFiles(root, s.box.kind.sockets)
	if err != nil {
		return fmt.Errorf("serve %s: %w", path, err)
	}
	s.defers = append(s.defers, server.close)
	s.conns, s.confs = append(s.conns, server.theirs), append(s.confs, conf)
	return nil
}

// makeStore makes the file that backs what the step writes to its root, if it may. It
// has no name: its space is free when the sandbox has ended.
func (s *stepRun) makeStore() error {
	if !s.overlaid() || s.readonly {
		return nil
	}
	f, err := os.CreateTemp(s.box.dir, "writes")
	if err != nil {
		return fmt.Errorf("make a file for writes: %w", err)
	}
	s.store = f
	s.defers = append(s.defers, f.Close)
	if err := os.Remove(f.Name()); err != nil {
		return fmt.Errorf("make a file for writes: %w", err)
	}
	return nil
}

// copyRootAttrs makes the scratch layer's root like the one that it hides.
func copyRootAttrs(dir string, tree sandbox.Tree) error {
	from := tree.Upper
	if from == "" {
		from = tree.Lower[0]
	}
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("stat %s: %w", from, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Chown(dir, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(dir, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func emptyDir(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	return errors.Is(err, io.EOF)
}
