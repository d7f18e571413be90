package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestManySandboxes has the same processes start many sandboxes.
func TestManySandboxes(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	const sandboxes, most = 200, 120
	for range sandboxes {
		e.ok(e.step("true"))
	}
	e.settle()
	require.EqualValues(t, sandboxes, e.r.boxes.Load())
	starters, err := os.ReadDir(e.r.startersDir())
	require.NoError(t, err)
	require.NotEmpty(t, starters)
	for _, s := range starters {
		fds, err := os.ReadDir(filepath.Join("/proc", s.Name(), "fd"))
		require.NoError(t, err)
		require.Less(t, len(fds), most, "the process that starts sandboxes keeps descriptors")
		// gVisor wants these for itself in a sandbox.
		for fd := 253; fd <= 255; fd++ {
			info, err := os.ReadFile(fmt.Sprintf("/proc/%s/fdinfo/%d", s.Name(), fd))
			require.NoError(t, err)
			_, flags, _ := strings.Cut(string(info), "flags:")
			n, err := strconv.ParseUint(strings.Fields(flags)[0], 8, 64)
			require.NoError(t, err)
			require.NotZero(t, n&0o2000000, "a sandbox would inherit descriptor %d", fd)
		}
	}
}
