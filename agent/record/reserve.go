package record

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	reserveName = "reserve"
	// reserveBytes is what the results of builds that run need on a full disk.
	reserveBytes = 8 << 20
)

// holdReserve takes the space that results need on a full disk. Without it the
// store works, and says so in the log.
func (s *Store) holdReserve() {
	f, err := s.root.OpenFile(reserveName, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), 0, 0, reserveBytes)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		s.log.Warn("no space is held for results on a full disk", "error", err)
	}
}

// releaseReserve gives the space up, and tells whether there was any.
func (s *Store) releaseReserve() bool {
	err := s.root.Remove(reserveName)
	if err == nil {
		s.log.Warn("the disk is full; space that was held for results is used")
	}
	return err == nil
}

// isFull tells whether err says that the disk, or a quota of it, is full.
func isFull(err error) bool {
	if err == nil {
		return false
	}
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || strings.Contains(err.Error(), unix.ENOSPC.Error())
}

func syncDir(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return fmt.Errorf("open directory of events: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory of events: %w", err)
	}
	return nil
}
