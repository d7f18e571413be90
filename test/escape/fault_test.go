package escape

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/engine"
)

var _ = register(
	entry{
		ID: "fault/sandbox-killed", Severity: slowsOthers,
		Threat: "The first process of a sandbox is killed at any moment, also while a neighbour builds.",
		Test:   sandboxKilled,
	},
	entry{
		ID: "fault/starters-killed", Severity: takesNodeDown,
		Threat: "The processes that start sandboxes are killed, as when the node has no memory left.",
		Test:   startersKilled,
	},
	entry{
		ID: "fault/full-disk", Severity: takesNodeDown,
		Threat: "The node's disk is full at any write of a build.",
		Test:   fullDisk,
	},
)

// ours lists the processes below this one that word is in the command line of.
func ours(t *testing.T, word string) []int {
	t.Helper()
	parents := map[int]int{}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(t, err)
	for _, name := range stats {
		data, _ := os.ReadFile(name) // it may have ended
		_, rest, _ := strings.Cut(string(data), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			parents[pid], _ = strconv.Atoi(f[1])
		}
	}
	var out []int
	for pid := range parents {
		p := parents[pid]
		for p > 1 && p != os.Getpid() {
			p = parents[p]
		}
		if data, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); p == os.Getpid() && strings.Contains(string(data), word) {
			out = append(out, pid)
		}
	}
	return out
}

// sandboxKilled kills a sandbox before, while and after its step runs.
func sandboxKilled(t *testing.T, e *env) {
	node, root := e.limitedNode(t)
	word := "86398"
	if e.Class == "gvisor" {
		word = "runsc-sandbox\x00--" // and its flags, of which one has the directory
	}
	for _, delay := range []time.Duration{0, 100 * time.Millisecond, 300 * time.Millisecond, time.Second} {
		ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
		done := make(chan result, 2)
		go func() {
			done <- e.BuildContext(t, ctx, build{Tenant: bomber, Node: node, NoExport: true, Dockerfile: "FROM tools\nRUN echo " + delay.String() + "\nRUN sleep 86398\n"})
		}()
		var r result
		for ended := false; !ended; {
			select {
			case r = <-done:
				ended = true
			case <-time.After(delay + 20*time.Millisecond):
				for _, pid := range ours(t, word) {
					cmdline, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
					if e.Class == "userns" || strings.Contains(string(cmdline), root) {
						_ = syscall.Kill(pid, syscall.SIGKILL)
					}
				}
			}
		}
		cancel()
		require.Error(t, r.Err)
		t.Logf("killed after %v: %v", delay, r.Err)
		after := e.MustBuild(t, build{Tenant: bomber, Node: node, Dockerfile: "FROM tools\nRUN echo after-" + delay.String() + " > /after\n"})
		require.Equal(t, "after-"+delay.String()+"\n", after.Read(t, "after"))
	}
	noProcess(t, "86398")
}

// startersKilled kills what starts sandboxes between builds, and while one starts.
func startersKilled(t *testing.T, e *env) {
	word := map[string]string{"userns": "kiln-zygote", "gvisor": "kiln-starter"}[string(e.Class)]
	before := ours(t, word)
	node, _ := e.limitedNode(t)
	one := func(text string) result {
		return e.Build(t, build{Tenant: bomber, Node: node, Dockerfile: "FROM tools\nRUN echo " + text + " > /after\n"})
	}
	require.NoError(t, one("first").Err)
	killed := 0
	for range 3 {
		for _, pid := range ours(t, word) {
			if !slices.Contains(before, pid) {
				killed++
				require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
			}
		}
		// gVisor's take the sandbox with them that they are starting; what comes next is well.
		r := one("next" + strconv.Itoa(killed))
		if e.Class == "gvisor" {
			t.Logf("the build right after it: %v", r.Err)
		} else {
			require.NoError(t, r.Err)
		}
		r = one("later" + strconv.Itoa(killed))
		require.NoError(t, r.Err)
		require.Equal(t, "later"+strconv.Itoa(killed)+"\n", r.Read(t, "after"))
	}
	require.NotZero(t, killed)
}

// fullDisk has builds fill a disk, and others find it full. The node is none the worse
// for it.
func fullDisk(t *testing.T, e *env) {
	root := smallDisk(t, 96)
	node := e.open(t, filepath.Join(root, "root"), func(c *engine.NodeConfig) { c.Space = engine.Space{MaxUsed: 64 << 20} })
	small := func(name string) result {
		return e.Build(t, build{Node: node, Dockerfile: "FROM tools\nRUN echo " + name + " > /small\n"})
	}
	require.NoError(t, small("first").Err)
	r := e.Build(t, build{Node: node, NoExport: true, Dockerfile: "FROM tools\nRUN head -c 200000000 /dev/zero > /big && echo written\n"})
	require.Error(t, r.Err)
	t.Logf("filling the disk: %v", r.Err)
	// A sandbox and its files may go some moments after its step.
	require.Eventually(t, func() bool {
		r = small("second")
		return r.Err == nil
	}, 20*time.Second, 100*time.Millisecond, "what was written is given back: %v", r.Err)
	require.Equal(t, "second\n", r.Read(t, "small"))

	for _, free := range []int64{0, 64 << 10, 512 << 10, 2 << 20} {
		filler := filepath.Join(root, "filler")
		fill(t, filler, root, free)
		r := e.Build(t, build{Node: node, NoExport: true, Dockerfile: "FROM tools\nRUN echo " + strconv.FormatInt(free, 10) + "; head -c 4000000 /dev/zero > /more\n"})
		t.Logf("with %d KiB free: %v", free>>10, r.Err)
		require.Error(t, r.Err)
		require.NoError(t, os.Remove(filler))
		require.Eventually(t, func() bool {
			r = small("after-" + strconv.FormatInt(free, 10))
			return r.Err == nil
		}, 20*time.Second, 100*time.Millisecond, "with space again: %v", r.Err)
	}
}

// smallDisk mounts a file system of megabytes for the test.
func smallDisk(t *testing.T, megabytes int64) string {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "disk"), filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, megabytes<<20))
	for _, c := range [][]string{{"mkfs.ext4", "-q", "-N", "8192", image}, {"mount", "-o", "loop", image, dir}} {
		out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
		require.NoError(t, err, "%s: %s", c[0], out)
	}
	t.Cleanup(func() {
		// An engine that is closed does not wait for the last calls to it, and Go closes
		// some files when it collects them.
		for deadline := time.Now().Add(time.Minute); exec.Command("umount", dir).Run() != nil; time.Sleep(50 * time.Millisecond) {
			require.True(t, time.Now().Before(deadline), "the disk stays in use: %v", openBelow(dir))
			runtime.GC()
		}
	})
	return dir
}

// openBelow lists what any process has open below dir.
func openBelow(dir string) (out []string) {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dir) {
			out = append(out, link+" is "+target)
		}
	}
	return out
}

// fill fills a file system with one file until free bytes are left.
func fill(t *testing.T, file, dir string, free int64) {
	t.Helper()
	f, err := os.Create(file)
	require.NoError(t, err)
	defer f.Close()
	var st syscall.Statfs_t
	require.NoError(t, syscall.Statfs(dir, &st))
	size := int64(st.Bfree)*st.Bsize - free // root may take what is reserved
	for block := make([]byte, 1<<20); size > 0; size -= int64(len(block)) {
		if _, err := f.Write(block[:min(size, int64(len(block)))]); err != nil {
			return // full
		}
	}
}
