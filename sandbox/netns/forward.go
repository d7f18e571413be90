package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const ipForward = "/proc/sys/net/ipv4/ip_forward"

// withForwardLock runs fn while no other process looks at the forwarding state.
func withForwardLock(dir string, fn func() error) error {
	f, err := os.OpenFile(filepath.Join(dir, "forward.lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// enableForwarding turns IPv4 forwarding on. When it was off, a file says so: to
// the last process that closes, even when this one is killed.
func enableForwarding(dir string) error {
	return withForwardLock(dir, func() error {
		now, err := os.ReadFile(ipForward)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(now)) != "0" {
			return nil
		}
		if err := os.WriteFile(filepath.Join(dir, "forward.was-off"), nil, 0o600); err != nil {
			return err
		}
		if err := os.WriteFile(ipForward, []byte("1"), 0); err != nil {
			return fmt.Errorf("turn on IPv4 forwarding: %w: set net.ipv4.ip_forward=1 on the node", err)
		}
		return nil
	})
}

// restoreForwarding turns forwarding off again when it was off before the first
// of us, and none of us is left. own is the claim of the caller, which counts
// for nobody.
func restoreForwarding(dir, own string) error {
	return withForwardLock(dir, func() error {
		mark := filepath.Join(dir, "forward.was-off")
		if _, err := os.Stat(mark); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		locks, err := filepath.Glob(filepath.Join(dir, "*-*.lock"))
		if err != nil {
			return err
		}
		for _, path := range locks {
			if path == own {
				continue
			}
			f, err := lockFile(path)
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil
			}
			if err != nil {
				return err
			}
			f.Close()
		}
		if err := os.WriteFile(ipForward, []byte("0"), 0); err != nil {
			return err
		}
		return os.Remove(mark)
	})
}
