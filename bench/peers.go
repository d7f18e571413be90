package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// request is one build.
type request struct {
	dir     string            // context, with a Dockerfile
	bases   map[string]string // named contexts: OCI layouts
	noCache bool
	push    string // reference to push to, or nothing
}

// usage is what one build cost.
type usage struct {
	elapsed time.Duration
	peak    int64 // bytes of memory of the builder, without its sandboxes
}

// peer is a builder under measurement.
type peer interface {
	Name() string
	Build(ctx context.Context, r request) (usage, error)
	// Reset forgets everything that was built.
	Reset(ctx context.Context) error
	// StartTime is how long its daemon took to serve; 0 without one.
	StartTime() time.Duration
	Close() error
}

type peerKind struct {
	name, note string
	start      func(ctx context.Context, c config, dir string) (peer, error)
}

func peerKinds() []peerKind {
	return []peerKind{
		{"kiln-userns", "kiln build --sandbox userns: one process for each build, no daemon", startKiln("userns")},
		{"kiln-gvisor", "kiln build --sandbox gvisor: one process for each build, no daemon", startKiln("gvisor")},
		{"agent-buildctl", "kiln-agent as a daemon, sandbox userns, with the same buildctl and arguments as BuildKit", startAgent},
		{"agent-kiln", "kiln-agent as a daemon, sandbox userns, with kiln build --agent", startAgentCLI("agent-kiln", "userns")},
		{"agent-gvisor", "the same with sandbox gvisor", startAgentCLI("agent-gvisor", "gvisor")},
		{"buildkit-runc", "stock buildkitd as a daemon, OCI worker with runc, its default host network, steps as the node's root", startBuildKit(false)},
		{"buildkit-runsc", "the same with runsc by a wrapper that drops run --keep; --overlay2=none --ignore-cgroups --network=host", startBuildKit(true)},
	}
}

// command runs a program to its end. On failure the error has the end of what it
// said. watch, if not nil, gets the process as soon as it runs.
func command(ctx context.Context, watch func(pid int), name string, args ...string) error {
	return commandAs(ctx, 0, watch, name, args...)
}

// commandAs is command as a user.
func commandAs(ctx context.Context, uid uint32, watch func(pid int), name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	if uid > 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Env = append(os.Environ(), "HOME=/nonexistent")
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	if watch != nil {
		watch(cmd.Process.Pid)
	}
	if err := cmd.Wait(); err != nil {
		text := out.Bytes()
		return fmt.Errorf("run %s: %w\n%s", strings.Join(cmd.Args, " "), err, text[max(0, len(text)-4000):])
	}
	return nil
}

// peakOf reads the high-water mark of a process's memory; 0 when it is gone.
func peakOf(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, ok := strings.Cut(string(status), "VmHWM:")
	if !ok {
		return 0
	}
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		return 0
	}
	return kib << 10
}

// watchPeak follows the memory of a process until the returned function is
// called. The kernel's figure in wait4 would start with the parent's size.
func watchPeak(pid int) (stop func() int64) {
	var peak atomic.Int64
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			peak.Store(max(peak.Load(), peakOf(pid)))
			select {
			case <-quit:
				return
			case <-tick.C:
			}
		}
	}()
	return func() int64 { close(quit); <-done; return peak.Load() }
}
