package mountns

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the process that enters a namespace.
func TestMain(m *testing.M) {
	dir := os.Getenv("MOUNTNS_TEST_DIR")
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := Enter(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Print(os.Getpid(), " ", os.Getenv(marker) == "")
	os.Stdout.Sync()
	// Nothing is unmounted: the process dies with its mount in place.
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

func TestMountsOfAKilledProcessAreGone(t *testing.T) {
	before, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for _, left := range []string{"", "1"} {
		var out bytes.Buffer
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "MOUNTNS_TEST_DIR="+t.TempDir(), marker+"="+left)
		cmd.Stdout = &out
		require.NoError(t, cmd.Start())
		require.Error(t, cmd.Wait(), "the process kills itself")
		require.Equal(t, fmt.Sprint(cmd.Process.Pid, " true"), out.String(), "the process keeps its ID, and the mark is removed")
	}
	after, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
}
