package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// makeMountPoints makes what the view of the root lacks of the mounts'
// destinations. They are on the scratch layer of the view, never in the step's.
func makeMountPoints(rootfs string, mounts []specs.Mount) error {
	for _, m := range mounts {
		file := false
		if m.Type == "bind" {
			st, err := os.Lstat(m.Source)
			if err != nil {
				return err
			}
			file = !st.IsDir()
		}
		if err := makeMountPoint(rootfs, m.Destination, file, 0); err != nil {
			return fmt.Errorf("make mount point %s: %w", m.Destination, err)
		}
	}
	return nil
}

// resolveMountPoint returns where a mount point that exists really is: the sandbox
// follows no symlinks on the way to one.
func resolveMountPoint(rootfs, dest string) (string, error) {
	h, err := pathrs.OpenInRoot(rootfs, dest)
	if errors.Is(err, os.ErrNotExist) {
		return dest, nil // below another mount
	}
	if err != nil {
		return "", fmt.Errorf("resolve mount point %s: %w", dest, err)
	}
	defer h.Close()
	at, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(h.Fd())))
	if err != nil {
		return "", fmt.Errorf("resolve mount point %s: %w", dest, err)
	}
	return path.Join("/", strings.TrimPrefix(at, rootfs)), nil
}

// maxLinks bounds the dangling symlinks on the way to one mount point.
const maxLinks = 40

// makeMountPoint makes what is missing of dest. A dangling symlink on the way,
// as many images have for /etc/resolv.conf, is followed inside the root, because
// the mount will be made at its other end.
func makeMountPoint(rootfs, dest string, file bool, links int) error {
	if links > maxLinks {
		return unix.ELOOP
	}
	parts := strings.Split(strings.Trim(path.Clean("/"+dest), "/"), "/")
	parent := "/"
	for i, name := range parts {
		p := path.Join(parent, name)
		h, err := pathrs.OpenInRoot(rootfs, p)
		if err == nil {
			h.Close()
			parent = p
			continue
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		target, err := makeEntry(rootfs, parent, name, file && i == len(parts)-1)
		if err != nil {
			return err
		}
		if target != "" {
			return makeMountPoint(rootfs, path.Join(append([]string{target}, parts[i+1:]...)...), file, links+1)
		}
		parent = p
	}
	return nil
}

// makeEntry makes one directory or file and restores the times of the directory
// around it. If there is a symlink of that name it returns where that leads.
func makeEntry(rootfs, parent, name string, file bool) (target string, err error) {
	h, err := pathrs.OpenInRoot(rootfs, parent)
	if err != nil {
		return "", err
	}
	defer h.Close()
	dir, err := pathrs.Reopen(h, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	fd := int(dir.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if file {
		var made int
		if made, err = unix.Openat(fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644); err == nil {
			err = unix.Close(made)
		}
	} else {
		err = unix.Mkdirat(fd, name, 0o755)
	}
	if errors.Is(err, unix.EEXIST) {
		return danglingTarget(rootfs, fd, name)
	}
	if err != nil {
		return "", &os.PathError{Op: "make", Path: path.Join(parent, name), Err: err}
	}
	return "", unix.UtimesNanoAt(fd, "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
}

// danglingTarget returns the path in the root that the symlink called name in the
// directory dir leads to.
func danglingTarget(rootfs string, dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", fmt.Errorf("read link %s: %w", name, err)
	}
	target := string(buf[:n])
	if path.IsAbs(target) {
		return target, nil
	}
	// Only the kernel knows where the directory really is.
	at, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(dir))
	if err != nil {
		return "", err
	}
	return path.Join("/", strings.TrimPrefix(at, rootfs), target), nil
}
