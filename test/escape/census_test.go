package escape

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// takeCensus compares what the node has before the test and after it.
func takeCensus(t *testing.T) {
	t.Helper()
	before := census(t)
	t.Cleanup(func() {
		var after []string
		// The kernel takes devices and processes away some moments late.
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			if after = census(t); slices.Equal(before, after) {
				return
			}
		}
		require.Equal(t, strings.Join(before, "\n"), strings.Join(after, "\n"), "something is left on the node")
	})
}

// census lists mounts, network devices, packet-filter tables and children.
func census(t *testing.T) []string {
	t.Helper()
	var out []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		out = append(out, "mount "+strings.Fields(line)[4])
	}
	devices, err := net.Interfaces()
	require.NoError(t, err)
	for _, d := range devices {
		out = append(out, "device "+d.Name)
	}
	tables, err := exec.Command("nft", "list", "tables").Output()
	require.NoError(t, err, "Debian's nftables is missing; run `make deps`")
	for line := range strings.Lines(string(tables)) {
		out = append(out, "nft "+strings.TrimSpace(line))
	}
	children, err := filepath.Glob("/proc/self/task/*/children")
	require.NoError(t, err)
	for _, c := range children {
		data, _ := os.ReadFile(c) // threads come and go
		for pid := range strings.FieldsSeq(string(data)) {
			cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			out = append(out, fmt.Sprintf("child %q", cmdline))
		}
	}
	sort.Strings(out)
	return out
}
