package cluster

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
)

// takeCensus compares what the machine holds before the test and after it.
func takeCensus(t *testing.T, dir string) {
	t.Helper()
	before := census(t, dir)
	t.Cleanup(func() {
		// The kernel takes network namespaces away some time after their last
		// process, and whoever is process 1 reaps when it likes.
		var after []string
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			if after = census(t, dir); slices.Equal(before, after) {
				return
			}
		}
		require.Equal(t, strings.Join(before, "\n"), strings.Join(after, "\n"), "something is left on the machine")
	})
}

// traces matches the names of what Kubernetes, containerd and network plugins
// leave on a machine. Other tests may be at work on it, so no other name counts.
var traces = regexp.MustCompile(`kube|containerd|\bcni|\bnri|\bcdi|etcd|coredns|^(pods|containers|netns)$`)

// mountTraces matches the lines of such mounts.
var mountTraces = regexp.MustCompile(`/kubelet/|(/run|/var/lib)/(containerd|kiln-cluster)/|/netns/cni-`)

// census lists what a cluster with this state directory may leave: files, mounts,
// network devices (with their routes), packet-filter tables, kernel settings, cgroups,
// processes and namespaces.
func census(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	if _, err := os.Lstat(dir); err == nil {
		out = append(out, "directory "+dir)
	}
	for _, d := range []string{"/run", "/var/lib", "/var/log", "/etc", "/opt", "/usr/libexec"} {
		entries, err := os.ReadDir(d)
		if err == nil {
			for _, e := range entries {
				if traces.MatchString(e.Name()) {
					out = append(out, "file "+filepath.Join(d, e.Name()))
				}
			}
		}
	}
	for name := range tunables {
		data, err := os.ReadFile(filepath.Join("/proc/sys", name))
		require.NoError(t, err)
		out = append(out, "setting "+name+" "+string(data))
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) || mountTraces.MatchString(line) {
			out = append(out, "mount "+line)
		}
	}
	links, err := settled(netlink.LinkList)
	require.NoError(t, err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, linkName(dir)) {
			out = append(out, "device "+l.Attrs().Name)
		}
	}
	tables, err := exec.Command("nft", "list", "tables").Output()
	require.NoError(t, err)
	for table := range strings.Lines(string(tables)) {
		if traces.MatchString(table) {
			out = append(out, table)
		}
	}
	out = append(out, cgroupCensus(t, dir)...)
	slices.Sort(out)
	return out
}

// cgroupCensus lists the cluster's cgroups, and the processes that are in them or
// that name the state directory in their environment, with their namespaces.
func cgroupCensus(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	g, err := findCgroup(dir)
	require.NoError(t, err)
	for _, h := range g.hierarchies {
		require.NoError(t, g.walk(h, func(path string) error {
			out = append(out, "cgroup "+path)
			return nil
		}))
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	require.NoError(t, err)
	for _, p := range procs {
		group, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		env, _ := os.ReadFile(filepath.Join(p, "environ"))
		args, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		if filepath.Base(p) == fmt.Sprint(os.Getpid()) || !strings.Contains(string(group)+string(env)+string(args), g.name) &&
			!strings.Contains(string(env)+string(args), dir) {
			continue
		}
		net, _ := os.Readlink(filepath.Join(p, "ns/net"))
		out = append(out, fmt.Sprintf("process %s %q in %s", p, args, net))
	}
	return out
}

// An Up that is killed at any moment leaves what Down removes.
func TestInterruptedUpIsRemoved(t *testing.T) {
	for _, after := range []struct {
		name, line string
		delay      time.Duration
	}{
		{"while it makes machines", "starting 2 nodes", 15 * time.Millisecond},
		{"while it starts components", "starting the control plane", 300 * time.Millisecond},
		{"while it waits for nodes", "waiting for the nodes", 0},
	} {
		t.Run(after.name, func(t *testing.T) {
			ctx := testContext(t)
			dir := filepath.Join(t.TempDir(), "state")
			takeCensus(t, dir)
			t.Cleanup(func() { require.NoError(t, Down(context.WithoutCancel(ctx), dir)) })
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), upVariable+"="+dir)
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			for lines := bufio.NewScanner(out); lines.Scan() && !strings.Contains(lines.Text(), after.line); {
			}
			time.Sleep(after.delay)
			require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
			_ = cmd.Wait()

			_, err = Open(dir)
			require.ErrorContains(t, err, "take it down first")
			_, err = Up(ctx, Config{Dir: dir})
			require.ErrorContains(t, err, "take it down first")
			require.NoError(t, Down(ctx, dir))
			require.NoError(t, Down(ctx, dir), "a second Down")
			_, err = Open(dir)
			require.ErrorIs(t, err, fs.ErrNotExist)
		})
	}
}

// A component that does not start is named, with what it said.
func TestFailedUpLeavesNothing(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "state")
	takeCensus(t, dir)
	bin := t.TempDir()
	real, err := findBin()
	require.NoError(t, err)
	for _, p := range programs {
		require.NoError(t, os.Symlink(filepath.Join(real, p), filepath.Join(bin, p)))
	}
	broken := filepath.Join(bin, "kube-apiserver")
	require.NoError(t, os.Remove(broken))
	require.NoError(t, os.WriteFile(broken, []byte("#!/bin/sh\necho no luck\nexit 1\n"), 0o755))
	_, err = Up(ctx, Config{Dir: dir, Bin: bin})
	require.ErrorContains(t, err, "control/kube-apiserver ended")
	require.ErrorContains(t, err, "no luck")
}

// When its context ends, Up removes what it made.
func TestCancelledUpLeavesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	takeCensus(t, dir)
	ctx, cancel := context.WithTimeout(testContext(t), 1500*time.Millisecond)
	defer cancel()
	_, err := Up(ctx, Config{Dir: dir})
	require.ErrorIs(t, err, context.DeadlineExceeded)
}
