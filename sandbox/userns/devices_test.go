package userns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestDeviceFilterAmongSignals loads the filter while the thread gets signals all the time,
// as it may from Go's scheduler.
func TestDeviceFilterAmongSignals(t *testing.T) {
	var mount string
	for _, m := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(m, "cgroup.controllers")); err == nil {
			mount = m
			break
		}
	}
	require.NotEmpty(t, mount, "cgroups of version 2 are mounted nowhere")
	dir, err := os.MkdirTemp(mount, "kiln-test-")
	require.NoError(t, err)
	defer func() { require.NoError(t, os.Remove(dir)) }()
	cgroup, err := os.Open(dir)
	require.NoError(t, err)
	defer cgroup.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				tasks, _ := os.ReadDir("/proc/self/task")
				for _, task := range tasks {
					var tid int
					for _, c := range task.Name() {
						tid = tid*10 + int(c-'0')
					}
					_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // what Go sends
				}
			}
		}
	}()
	var failed error
	for i := 0; i < 50 && failed == nil; i++ { // a cgroup takes 64 programs
		failed = limitDevices(cgroup)
	}
	close(stop)
	<-stopped
	require.NoError(t, failed)
}
