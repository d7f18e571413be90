package snapshot

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// bootID is what the kernel calls this run of the node; see proc_sys_kernel(5).
const bootID = "/proc/sys/kernel/random/boot_id"

// mountID returns what differs between two mounts of the file system that dir is on, as
// far as the kernel tells: the node's boot, and of file systems with an object in sysfs
// for each mount that object's inode number. It is the same in every container.
func mountID(dir string) (string, error) {
	boot, err := readLine(bootID)
	if err != nil {
		return "", err
	}
	if boot == "" {
		return "", fmt.Errorf("%s is empty", bootID)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", err
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil { // it is on no block device, or on several
		return boot, nil
	}
	for _, kind := range []string{"ext4", "xfs", "f2fs"} {
		var object unix.Stat_t
		if unix.Stat(filepath.Join("/sys/fs", kind, filepath.Base(device)), &object) == nil {
			return fmt.Sprintf("%s %s:%d", boot, kind, object.Ino), nil
		}
	}
	return boot, nil
}
