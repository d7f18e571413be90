package upper

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// aclXattr begins the names of access control lists.
const aclXattr = "system.posix_acl_"

// modeBits are the permission bits that a layer keeps.
const modeBits = 0o7777

// maxID is the largest owner: a larger one would read as "unchanged".
const maxID = 1<<32 - 2

func owner(h *tar.Header) (int, int, error) {
	if h.Uid < 0 || h.Gid < 0 || h.Uid > maxID || h.Gid > maxID {
		return 0, 0, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	return h.Uid, h.Gid, nil
}

// setFD sets owner, mode and extended attributes, in the order in which none
// takes away another: chown clears setuid bits and capabilities.
func setFD(fd int, h *tar.Header) error {
	uid, gid, err := owner(h)
	if err != nil {
		return err
	}
	if err := unix.Fchown(fd, uid, gid); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	if err := setXattrs(h, func(name string, value []byte) error {
		return unix.Fsetxattr(fd, name, value, 0)
	}); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, uint32(h.Mode)&modeBits); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	return nil
}

// setPath does the same for what cannot be opened; nothing else works below the
// directory meanwhile.
func setPath(dir int, base string, h *tar.Header, chmod bool) error {
	uid, gid, err := owner(h)
	if err != nil {
		return err
	}
	if err := unix.Fchownat(dir, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", dir, base)
	if err := setXattrs(h, func(name string, value []byte) error {
		return unix.Lsetxattr(at, name, value, 0)
	}); err != nil {
		return err
	}
	if chmod {
		if err := unix.Fchmodat(dir, base, uint32(h.Mode)&modeBits, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	return unix.UtimesNanoAt(dir, base, times(h.ModTime), unix.AT_SYMLINK_NOFOLLOW)
}

// setXattrs calls set for the attributes that a layer keeps. What belongs to the
// overlay or to the node (trusted., security. but file capabilities) is dropped.
func setXattrs(h *tar.Header, set func(string, []byte) error) error {
	for key := range h.PAXRecords {
		name, value, err := xattr(h, key)
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay."), name == "security.capability",
			strings.HasPrefix(name, aclXattr):
		default:
			continue
		}
		err = set(name, value)
		if errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") {
			// Only files and directories take user attributes on this node.
			continue
		}
		if err != nil {
			return fmt.Errorf("set attribute %s: %w", clip(name), err)
		}
	}
	return nil
}

// recordXattr begins the records of extended attributes. What follows is the name
// in base64, and the record's value is a colon and the attribute's, in base64: a
// record can hold neither every byte nor nothing.
const recordXattr = "KILN.xattr."

// xattr decodes the attribute in the record called key. The name is empty when
// the record is of something else.
func xattr(h *tar.Header, key string) (name string, value []byte, err error) {
	encoded, ok := strings.CutPrefix(key, recordXattr)
	if !ok {
		return "", nil, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || len(raw) == 0 || bytes.IndexByte(raw, 0) >= 0 {
		return "", nil, fmt.Errorf("name of an attribute %q is not valid", clip(encoded))
	}
	content, ok := strings.CutPrefix(h.PAXRecords[key], ":")
	if ok {
		value, err = base64.RawURLEncoding.DecodeString(content)
	}
	if !ok || err != nil {
		return "", nil, fmt.Errorf("value of attribute %s is not valid", clip(string(raw)))
	}
	return string(raw), value, nil
}

func times(t time.Time) []unix.Timespec {
	ts := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return []unix.Timespec{ts, ts}
}

func setTimes(fd int, t time.Time) error {
	ts := times(t)
	err := unix.UtimesNanoAt(fd, "", ts, unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}
