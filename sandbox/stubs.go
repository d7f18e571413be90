package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runtimeMountPoints are the places that every runtime mounts something at.
var runtimeMountPoints = []string{"/dev", "/etc/hosts", "/etc/resolv.conf", "/proc", "/sys"}

// Stubs are the mount points that did not exist before a step and that its
// runtime makes in the writable directory of its root.
type Stubs struct {
	writable string
	// missing are paths relative to the root, parents before children.
	missing []string
	// parents holds the modification time of each directory that existed before
	// and gets an entry.
	parents map[string]time.Time
}

// RecordStubs notes which of destinations, and of the mount points of every
// step, are missing in root. Call it before the step runs.
//
// A destination that leads through a symlink is left alone: what the runtime
// makes at the other end stays in the layer.
func RecordStubs(root Tree, destinations []string) *Stubs {
	layers := append([]string{root.Upper}, root.Lower...)
	if root.Dir != "" {
		layers = []string{root.Dir}
	}
	return recordStubs(root, destinations, func(p string) (fs.FileInfo, bool) { return lookup(layers, p) })
}

// RecordStubsIn is RecordStubs for a root that is mounted at rootfs, where nothing is
// mounted over it yet. It need not look through all layers.
func RecordStubsIn(rootfs string, root Tree, destinations []string) (*Stubs, error) {
	r, err := os.OpenRoot(rootfs)
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	defer r.Close()
	return recordStubs(root, destinations, func(p string) (fs.FileInfo, bool) {
		st, err := r.Lstat(p)
		return st, err == nil
	}), nil
}

func recordStubs(root Tree, destinations []string, lookup func(string) (fs.FileInfo, bool)) *Stubs {
	s := &Stubs{writable: root.Upper, parents: map[string]time.Time{}}
	if root.Dir != "" {
		s.writable = root.Dir
	}
	seen := map[string]bool{}
	for _, dest := range append(append([]string{}, runtimeMountPoints...), destinations...) {
		parts := strings.Split(strings.Trim(path.Clean("/"+dest), "/"), "/")
		for i := range parts {
			p := strings.Join(parts[:i+1], "/")
			if seen[p] {
				continue
			}
			st, ok := lookup(p)
			if ok && st.Mode()&fs.ModeSymlink != 0 {
				break
			}
			if ok {
				continue
			}
			seen[p] = true
			s.missing = append(s.missing, p)
			parent := path.Dir(p)
			if pst, ok := lookup(parent); ok {
				s.parents[parent] = pst.ModTime()
			}
		}
	}
	return s
}

// lookup finds p in the topmost of layers that has it.
func lookup(layers []string, p string) (fs.FileInfo, bool) {
	for _, l := range layers {
		if l == "" {
			continue
		}
		r, err := os.OpenRoot(l)
		if err != nil {
			continue
		}
		st, err := r.Lstat(p)
		r.Close()
		if errors.Is(err, syscall.ENOTDIR) {
			// A file or whiteout of this layer hides everything below.
			return nil, false
		}
		if err != nil {
			continue
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok && st.Mode()&fs.ModeCharDevice != 0 && sys.Rdev == 0 {
			return nil, false
		}
		return st, true
	}
	return nil, false
}

// Remove deletes the recorded mount points that are still empty from the
// writable directory, and restores the times of the directories around them.
// Call it when nothing is mounted over the root any more.
func (s *Stubs) Remove() error {
	if s.writable == "" || len(s.missing) == 0 {
		return nil
	}
	root, err := os.OpenRoot(s.writable)
	if err != nil {
		return fmt.Errorf("remove mount points: %w", err)
	}
	defer root.Close()
	removed := map[string]bool{}
	for i := len(s.missing) - 1; i >= 0; i-- {
		p := s.missing[i]
		st, err := root.Lstat(p)
		if err != nil || !(st.IsDir() || st.Mode().IsRegular() && st.Size() == 0) {
			continue
		}
		err = root.Remove(p)
		if err == nil {
			removed[path.Dir(p)] = true
			continue
		}
		if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove mount point /%s: %w", p, err)
		}
	}
	for dir, mtime := range s.parents {
		if removed[dir] {
			if err := root.Chtimes(dir, mtime, mtime); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("restore time of /%s: %w", dir, err)
			}
		}
	}
	return nil
}
