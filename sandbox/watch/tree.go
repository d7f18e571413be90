package watch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tree is a directory or file that the step can write to.
type tree struct {
	dir string
	// fresh is set when all of it is the step's. Of other trees what has changed since
	// the step started counts: nobody can set the time of a change.
	fresh bool
	since unix.Timespec
}

// now returns the time as file systems write it.
func now() unix.Timespec {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts) // every kernel has it
	return ts
}

// inUse returns what all file systems of the trees have in use together.
func (w *Watch) inUse() (sum amount) {
	seen := map[unix.Fsid]bool{}
	for _, t := range w.trees {
		var st unix.Statfs_t
		if unix.Statfs(t.dir, &st) != nil || seen[st.Fsid] {
			continue // it is being removed
		}
		seen[st.Fsid] = true
		sum = sum.add(amount{int64(st.Blocks-st.Bfree) * st.Bsize, int64(st.Files - st.Ffree)})
	}
	return sum
}

// count returns what the tree has of the step. What cannot be read, because the step
// moves or removes it, does not count. It stops where enough says so, if it is not nil.
func (t tree) count(enough func(amount) bool) amount {
	c := counter{tree: t, enough: enough}
	fd, err := unix.Open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		var st unix.Stat_t
		if unix.Lstat(t.dir, &st) == nil {
			c.add(&st)
		}
		return c.sum
	}
	c.buf = make([]byte, 32<<10)
	if fd = c.directory(fd, 0); fd >= 0 {
		unix.Close(fd)
	}
	return c.sum
}

type counter struct {
	tree
	enough func(amount) bool
	sum    amount
	// links are inodes with several names that were counted.
	links map[[2]uint64]bool
	buf   []byte
}

func (c *counter) add(st *unix.Stat_t) {
	if !c.fresh && (st.Ctim.Sec < c.since.Sec || st.Ctim.Sec == c.since.Sec && st.Ctim.Nsec < c.since.Nsec) {
		return
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := [2]uint64{st.Dev, st.Ino}
		if c.links[key] {
			return
		}
		if c.links == nil {
			c.links = map[[2]uint64]bool{}
		}
		c.links[key] = true
	}
	c.sum = c.sum.add(amount{st.Blocks * 512, 1})
}

// maxHeld is how many directories are held open on the way down. Below it, one is
// opened again on the way up.
const maxHeld = 200

// directory counts what is in the directory that fd is open for, and takes fd over. It
// returns a descriptor of the same directory for the caller, or -1 when the directory
// was moved meanwhile or enough was counted.
func (c *counter) directory(fd, depth int) int {
	for _, name := range c.entries(fd) {
		if c.enough != nil && c.enough(c.sum) {
			break
		}
		child, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if depth >= maxHeld {
			if fd = c.below(fd, child, depth); fd < 0 {
				return -1
			}
		} else if child = c.directory(child, depth+1); child >= 0 {
			unix.Close(child)
		}
	}
	return fd
}

// below counts what is in child without holding its parent fd meanwhile, and returns a
// new descriptor of the parent, or -1 as directory does. It takes both over.
func (c *counter) below(fd, child, depth int) int {
	var before, after unix.Stat_t
	err := unix.Fstat(fd, &before)
	unix.Close(fd)
	if child = c.directory(child, depth+1); child < 0 {
		return -1
	}
	defer unix.Close(child)
	if err != nil {
		return -1
	}
	up, err := unix.Openat(child, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	if unix.Fstat(up, &after) != nil || after.Dev != before.Dev || after.Ino != before.Ino {
		unix.Close(up)
		return -1
	}
	return up
}

// entries counts what the directory has, and returns the names of directories in it.
func (c *counter) entries(fd int) (dirs []string) {
	for {
		n, err := unix.Getdents(fd, c.buf)
		if err != nil || n <= 0 || c.enough != nil && c.enough(c.sum) {
			return dirs
		}
		for rest := c.buf[:n]; len(rest) > 0; {
			size := binary.NativeEndian.Uint16(rest[unsafe.Offsetof(unix.Dirent{}.Reclen):])
			raw := rest[unsafe.Offsetof(unix.Dirent{}.Name):size]
			kind := rest[unsafe.Offsetof(unix.Dirent{}.Type)]
			rest = rest[size:]
			name := string(raw[:bytes.IndexByte(raw, 0)])
			if name == "." || name == ".." {
				continue
			}
			var st unix.Stat_t
			if unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue
			}
			c.add(&st)
			if kind == unix.DT_DIR || kind == unix.DT_UNKNOWN && st.Mode&unix.S_IFMT == unix.S_IFDIR {
				dirs = append(dirs, name)
			}
		}
	}
}

// maxOpen bounds how many descriptors of the step's processes are looked at.
const maxOpen = 20_000

// nameless returns what the step's processes have open that has no name any more. In
// memory, as in pipes, nothing has one; it does not count.
func (w *Watch) nameless() (sum amount) {
	pids, err := w.cfg.Processes()
	if err != nil {
		return sum // the step is ending
	}
	seen, looked := map[[2]uint64]bool{}, 0
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		f, err := os.Open(dir)
		if err != nil {
			continue
		}
		names, _ := f.Readdirnames(-1)
		f.Close()
		for _, name := range names {
			if looked++; looked > maxOpen {
				return sum
			}
			if _, err := strconv.Atoi(name); err != nil {
				continue
			}
			var st unix.Stat_t
			var fs unix.Statfs_t
			path := dir + "/" + name
			if unix.Stat(path, &st) != nil || st.Nlink > 0 || st.Mode&unix.S_IFMT != unix.S_IFREG || seen[[2]uint64{st.Dev, st.Ino}] {
				continue
			}
			seen[[2]uint64{st.Dev, st.Ino}] = true
			if unix.Statfs(path, &fs) == nil && fs.Type != unix.TMPFS_MAGIC {
				sum = sum.add(amount{st.Blocks * 512, 1})
			}
		}
	}
	return sum
}
