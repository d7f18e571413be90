package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often Lock looks whether the holder is gone.
const lockPoll = 50 * time.Millisecond

// lockNoteSize bounds what is read of a holder's note.
const lockNoteSize = 4096

// Lock takes the directory root for this process alone until the returned
// function is called or the process ends. While another process has it, Lock
// calls wait once with what that process said of itself, and waits until ctx
// ends.
func Lock(ctx context.Context, root string, wait func(holder string)) (unlock func() error, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for told := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", root, err)
		}
		if !told && wait != nil {
			wait(lockNote(f))
			told = true
		}
		select {
		case <-ctx.Done():
			holder := lockNote(f)
			f.Close()
			return nil, fmt.Errorf("%s is in use by %s: %w", root, holder, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
	note := fmt.Sprintf("process %d (%s)\n", os.Getpid(), filepath.Base(os.Args[0]))
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(note), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock: %w", err)
	}
	return f.Close, nil
}

// Holder returns what the process that has root says of itself, and whether
// there is one.
func Holder(root string) (string, bool) {
	f, err := os.Open(filepath.Join(root, "lock"))
	if err != nil {
		return "", false
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		return "", false
	}
	return lockNote(f), true
}

func lockNote(f *os.File) string {
	note, err := io.ReadAll(io.NewSectionReader(f, 0, lockNoteSize))
	if s := strings.TrimSpace(string(note)); err == nil && s != "" {
		return s
	}
	return "another process"
}
