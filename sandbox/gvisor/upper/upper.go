// Package upper writes the upper layer of a gVisor sandbox, which the sandbox
// gives out as a tar stream, into the upper directory of an overlay.
//
// The stream is hostile: it comes from the process that runs the step. The
// package promises that nothing outside of the directory is touched whatever
// the stream holds, that no symlink is followed, and that the directory then
// looks as if the node's own overlay had taken the step's writes: whiteouts are
// 0/0 character devices and a replaced directory is opaque.
package upper

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options tell what the directory belongs to.
type Options struct {
	// Lower are the directories below the upper directory, topmost first. A
	// directory is only marked opaque where one of them has a directory of that
	// name.
	Lower []string
}

const opaqueXattr = "trusted.overlay.opaque"

// Size is how much a stream holds.
type Size struct {
	// Bytes is the content of all files in whole pages, Inodes the number of files,
	// directories and so on.
	Bytes, Inodes int64
}

// Apply reads a tar stream from r and writes it into the directory dir. On error
// the directory holds a part of the stream.
func Apply(ctx context.Context, dir string, r io.Reader, opts Options) (Size, error) {
	root, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_RDONLY, 0)
	if err != nil {
		return Size{}, fmt.Errorf("open upper directory %s: %w", dir, err)
	}
	a := &applier{root: root, dirFD: -1, seen: map[string]bool{}, whiteouts: map[string]bool{}}
	defer a.close()
	for _, l := range opts.Lower {
		fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return Size{}, fmt.Errorf("open layer %s: %w", l, err)
		}
		a.lower = append(a.lower, fd)
	}
	tr := tar.NewReader(r)
	for {
		if ctx.Err() != nil {
			return a.size, context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return a.size, fmt.Errorf("read the sandbox's upper layer: %w", err)
		}
		if err := a.entry(h, tr); err != nil {
			return a.size, fmt.Errorf("write %q of the sandbox's upper layer: %w", clip(h.Name), err)
		}
	}
	return a.size, a.finish()
}

type dirTime struct {
	name  string
	mtime time.Time
}

type applier struct {
	root  int
	lower []int
	// dirFD is the open directory named dirName: most entries follow a sibling.
	dirFD   int
	dirName string
	times   []dirTime
	// seen are the paths that this stream made; an entry for one of them is a
	// second one, which no sandbox writes.
	seen map[string]bool
	// whiteouts are those of them that hide something; the sandbox links them to
	// each other.
	whiteouts map[string]bool
	buf       []byte
	size      Size
}

func (a *applier) close() {
	a.closeDir()
	unix.Close(a.root)
	for _, fd := range a.lower {
		unix.Close(fd)
	}
}

func (a *applier) closeDir() {
	if a.dirFD >= 0 {
		unix.Close(a.dirFD)
		a.dirFD = -1
	}
}

// parent opens the directory that holds name. The result stays open until the
// next call.
func (a *applier) parent(name string) (int, string, error) {
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	if dir == "" {
		return a.root, base, nil
	}
	if a.dirFD >= 0 && a.dirName == dir {
		return a.dirFD, base, nil
	}
	a.closeDir()
	fd, err := openat(a.root, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return -1, "", fmt.Errorf("open its directory: %w", err)
	}
	a.dirFD, a.dirName = fd, dir
	return fd, base, nil
}

func (a *applier) entry(h *tar.Header, content io.Reader) error {
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	// No sandbox writes sparse entries: with one, a few bytes could become more
	// than any disk holds.
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return errors.New("sparse entries are not accepted")
		}
	}
	if a.seen[name] {
		return errors.New("the stream has it twice")
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return errors.New("the root is not a directory")
		}
		a.seen[name] = true
		return a.setDir(a.root, name, h)
	}
	dir, base, err := a.parent(name)
	if err != nil {
		return err
	}
	if h.Typeflag != tar.TypeDir {
		if err := a.clear(dir, base); err != nil {
			return err
		}
	}
	a.seen[name] = true
	if h.Typeflag != tar.TypeLink {
		a.size.Inodes++
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return a.directory(dir, base, name, h)
	case tar.TypeReg:
		return a.file(dir, base, h, content)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, dir, base); err != nil {
			return err
		}
		return setPath(dir, base, h, false)
	case tar.TypeLink:
		return a.link(dir, base, name, h)
	case tar.TypeFifo:
		kind := uint32(unix.S_IFIFO)
		if h.PAXRecords[recordSocket] != "" {
			kind = unix.S_IFSOCK
		}
		if err := unix.Mknodat(dir, base, kind|0o600, 0); err != nil {
			return err
		}
		return setPath(dir, base, h, true)
	case tar.TypeChar:
		if h.Devmajor == 0 && h.Devminor == 0 {
			return a.whiteout(dir, base, name)
		}
		return errors.New("device files cannot be part of a layer")
	default:
		return fmt.Errorf("entries of type %q cannot be part of a layer", h.Typeflag)
	}
}

// clear removes what is at base, to be replaced.
func (a *applier) clear(dir int, base string) error {
	err := unix.Unlinkat(dir, base, 0)
	if errors.Is(err, unix.EISDIR) {
		err = removeTree(dir, base, 0)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (a *applier) directory(dir int, base, name string, h *tar.Header) error {
	err := unix.Mkdirat(dir, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || isOpaque(h) {
			// An opaque directory hides what was here before.
			if err := a.clear(dir, base); err != nil {
				return err
			}
			err = unix.Mkdirat(dir, base, 0o700)
		} else {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	fd, err := openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if isOpaque(h) && a.lowerHasDir(name) {
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			return fmt.Errorf("make it opaque: %w", err)
		}
	}
	return a.setDir(fd, name, h)
}

func isOpaque(h *tar.Header) bool {
	_, value, err := xattr(h, recordOpaque)
	return err == nil && string(value) == "y"
}

var recordOpaque = recordXattr + base64.RawURLEncoding.EncodeToString([]byte(opaqueXattr))

// lowerHasDir tells whether a layer below has a directory called name: only then
// does the overlay mark the upper one opaque.
func (a *applier) lowerHasDir(name string) bool {
	for _, l := range a.lower {
		fd, err := openat(l, name, unix.O_PATH|unix.O_DIRECTORY)
		if err == nil {
			unix.Close(fd)
			return true
		}
	}
	return false
}

func (a *applier) setDir(fd int, name string, h *tar.Header) error {
	a.times = append(a.times, dirTime{name, h.ModTime})
	return setFD(fd, h)
}

func (a *applier) file(dir int, base string, h *tar.Header, content io.Reader) error {
	fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	if err := a.content(f, h, content); err != nil {
		return err
	}
	if err := setFD(fd, h); err != nil {
		return err
	}
	if err := setTimes(fd, h.ModTime); err != nil {
		return err
	}
	return f.Close()
}

// whiteout hides name of the layers below. Where they have nothing of that name,
// what it hid was in the upper directory itself and is gone now.
func (a *applier) whiteout(dir int, base, name string) error {
	a.whiteouts[name] = true
	for _, l := range a.lower {
		fd, err := openat(l, name, unix.O_PATH)
		if err == nil {
			unix.Close(fd)
			return unix.Mknodat(dir, base, unix.S_IFCHR, 0)
		}
	}
	return nil
}

// content writes a file's content with holes where it has none or is all zeros, so
// that a sparse file of the step does not fill the node's disk.
func (a *applier) content(f *os.File, h *tar.Header, content io.Reader) error {
	size, parts, err := partsOf(h)
	if err != nil {
		return err
	}
	if a.buf == nil {
		a.buf = make([]byte, len(zeros))
	}
	end := int64(0)
	for _, p := range parts {
		a.size.Bytes += (p.length + pageSize - 1) / pageSize * pageSize
		for off := p.offset; off < p.offset+p.length; {
			n := min(p.offset+p.length-off, int64(len(a.buf)))
			// The reader tells when the stream ends within the file.
			if _, err := io.ReadFull(content, a.buf[:n]); err != nil {
				return err
			}
			if !bytes.Equal(a.buf[:n], zeros[:n]) {
				if _, err := f.WriteAt(a.buf[:n], off); err != nil {
					return err
				}
				end = off + n
			}
			off += n
		}
	}
	if end < size {
		return f.Truncate(size)
	}
	return nil
}

var zeros [128 << 10]byte

// pageSize is the unit in which the sandbox keeps content, in bytes.
const pageSize = 4096

func (a *applier) link(dir int, base, name string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", clip(h.Linkname), err)
	}
	if a.whiteouts[target] {
		return a.whiteout(dir, base, name)
	}
	if !a.seen[target] {
		return fmt.Errorf("hard link to %q, which the stream does not have", clip(target))
	}
	fd, err := openat(a.root, target, unix.O_PATH)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", clip(target), err)
	}
	defer unix.Close(fd)
	return unix.Linkat(fd, "", dir, base, unix.AT_EMPTY_PATH)
}

// finish sets the times of directories, now that nothing is added to them. The
// deepest come first, though times of a parent do not change with its children's.
func (a *applier) finish() error {
	for i := len(a.times) - 1; i >= 0; i-- {
		d := a.times[i]
		fd := a.root
		if d.name != "." {
			var err error
			if fd, err = openat(a.root, d.name, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
				return fmt.Errorf("set time of %q: %w", clip(d.name), err)
			}
		}
		err := setTimes(fd, d.mtime)
		if fd != a.root {
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("set time of %q: %w", clip(d.name), err)
		}
	}
	return nil
}
