package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// UserIDs are the numeric IDs that a process runs with, as seen in the step.
type UserIDs struct {
	UID, GID uint32
	Groups   []uint32
}

// maxIDFile bounds what is read of an image's passwd and group files, so that a
// huge one cannot fill the memory of the node.
const maxIDFile = 16 << 20

// ResolveUser looks name up in the passwd and group files of the root file
// system mounted at rootfs. name has the form of a Dockerfile's USER. Files are
// resolved inside rootfs: a symlink in the image never leads out of it.
func ResolveUser(rootfs, name string) (UserIDs, error) {
	passwd, err := readInRoot(rootfs, "etc/passwd")
	if err != nil {
		return UserIDs{}, err
	}
	group, err := readInRoot(rootfs, "etc/group")
	if err != nil {
		return UserIDs{}, err
	}
	u, err := user.GetExecUser(name, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return UserIDs{}, fmt.Errorf("look up user %q in the image: %w", name, err)
	}
	ids := UserIDs{}
	if ids.UID, err = validUnixID(u.Uid); err != nil {
		return UserIDs{}, fmt.Errorf("user %q: %w", name, err)
	}
	if ids.GID, err = validUnixID(u.Gid); err != nil {
		return UserIDs{}, fmt.Errorf("user %q: group: %w", name, err)
	}
	for _, g := range u.Sgids {
		gid, err := validUnixID(g)
		if err != nil {
			return UserIDs{}, fmt.Errorf("user %q: supplementary group: %w", name, err)
		}
		ids.Groups = append(ids.Groups, gid)
	}
	return ids, nil
}

// HomeDir returns the home directory of uid in the passwd file of the root file
// system mounted at rootfs, or "/" when it names none.
func HomeDir(rootfs string, uid uint32) string {
	passwd, err := readInRoot(rootfs, "etc/passwd")
	if err != nil {
		return "/"
	}
	entries, err := user.ParsePasswdFilter(bytes.NewReader(passwd), func(u user.User) bool { return u.Uid == int(uid) })
	if err != nil || len(entries) == 0 {
		return "/"
	}
	return entries[0].Home
}

// maxUnixID is the largest ID inside a step: a step's range has 65536 of them.
const maxUnixID = math.MaxUint16

func validUnixID(id int) (uint32, error) {
	if id < 0 || id > maxUnixID {
		return 0, fmt.Errorf("ID %d is outside of 0 to %d, the range that a step has", id, maxUnixID)
	}
	return uint32(id), nil
}

// readInRoot reads a regular file below root, at most maxIDFile bytes of it. A
// missing file reads as empty.
func readInRoot(root, name string) ([]byte, error) {
	f, err := openInRoot(root, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open /%s of the image: %w", name, err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("open /%s of the image: not a regular file", name)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxIDFile+1))
	if err != nil {
		return nil, fmt.Errorf("read /%s of the image: %w", name, err)
	}
	if len(data) > maxIDFile {
		return nil, fmt.Errorf("read /%s of the image: larger than %d bytes", name, maxIDFile)
	}
	return data, nil
}

// openInRoot opens name as if root were the root directory. Only after it is
// known to be a regular file or directory is it opened for reading, so that a
// device or fifo of the image is never touched.
func openInRoot(root, name string, flags int) (*os.File, error) {
	h, err := pathrs.OpenInRoot(root, name)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && !st.IsDir() {
		return nil, fmt.Errorf("%s is a %v", name, st.Mode().Type())
	}
	return pathrs.Reopen(h, flags)
}

// programDirs are where distributions install setuid programs.
var programDirs = []string{"bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin", "usr/lib/openssh", "usr/lib/dbus-1.0"}

// NeedsSetuid reports whether the root file system mounted at rootfs has setuid
// or setgid programs where distributions put them. Only then may a step gain
// privileges inside its sandbox through execve; all others run with no_new_privs.
func NeedsSetuid(rootfs string) bool {
	for _, dir := range programDirs {
		f, err := openInRoot(rootfs, dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			continue
		}
		found := hasSetuid(f)
		f.Close()
		if found {
			return true
		}
	}
	return false
}

func hasSetuid(dir *os.File) bool {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return true
	}
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			return true
		}
	}
	return false
}
