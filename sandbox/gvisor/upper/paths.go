package upper

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how deeply directories are nested.
const maxDepth = 2048

// clip keeps a hostile name from filling a log.
func clip(s string) string {
	if len(s) > 256 {
		return s[:256] + "…"
	}
	return s
}

// cleanName turns the name of an entry into a path relative to the root, "."
// for the root itself, and refuses names that lead elsewhere.
func cleanName(name string) (string, error) {
	name = strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/")
	if name == "" || name == "." {
		return ".", nil
	}
	if strings.HasPrefix(name, "/") || strings.IndexByte(name, 0) >= 0 || path.Clean(name) != name ||
		name == ".." || strings.HasPrefix(name, "../") || strings.Count(name, "/") > maxDepth {
		return "", errors.New("not a clean path below the root")
	}
	return name, nil
}

const resolveFlags = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV

func openat(dir int, name string, flags uint64) (int, error) {
	how := &unix.OpenHow{Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: resolveFlags}
	if len(name) < unix.PathMax {
		return unix.Openat2(dir, name, how)
	}
	// The kernel takes no longer path at once: go in steps.
	first, rest, _ := splitLong(name)
	fd, err := unix.Openat2(dir, first, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: resolveFlags,
	})
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	return openat(fd, rest, flags)
}

func splitLong(name string) (first, rest string, ok bool) {
	i := strings.LastIndexByte(name[:unix.PathMax-1], '/')
	if i <= 0 {
		return name[:unix.PathMax-1], name[unix.PathMax-1:], false
	}
	return name[:i], name[i+1:], true
}

// removeTree removes a directory with everything in it.
func removeTree(dir int, base string, depth int) error {
	if depth > maxDepth {
		return errors.New("directories are nested too deeply")
	}
	fd, err := openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		err := unix.Unlinkat(fd, n, 0)
		if errors.Is(err, unix.EISDIR) {
			err = removeTree(fd, n, depth+1)
		}
		if err != nil {
			return err
		}
	}
	return unix.Unlinkat(dir, base, unix.AT_REMOVEDIR)
}
