package gvisor

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// bound counts, for each process of the runtime's sandboxes, the threads that may run on
// one processor only.
func (e *env) bound() map[string]int {
	one := regexp.MustCompile(`(?m)^Cpus_allowed_list:\s*\d+$`)
	found := map[string]int{}
	tasks, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/status")
	require.NoError(e.t, err)
	for _, status := range tasks {
		process := strings.Join(strings.Split(status, "/")[:3], "/")
		group, err := os.ReadFile(process + "/cgroup")
		if err != nil || !bytes.Contains(group, []byte(e.r.cfg.CgroupParent)) {
			continue
		}
		if data, err := os.ReadFile(status); err == nil && one.Match(data) {
			found[process]++
		}
	}
	return found
}

// TestProgramsArePlaced looks at the threads of a sandbox while its step asks for
// something all the time, and while it computes.
func TestProgramsArePlaced(t *testing.T) {
	const loop = "; do i=$((i+1)); done"
	for _, tt := range []struct {
		name, script string
		processes    int // with bound threads: the sentry, the sandbox's own, and the program
	}{
		{"asks", "i=0; while test ! -e /stop" + loop, 3},
		{"computes", "i=0; while test $i -ge 0" + loop, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := newEnvWith(t, Config{Prepared: -1})
			want := tt.processes
			if runtime.NumCPU() == 1 || runtime.NumCPU() > fewCPUs {
				want = 0
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := e.r.Run(ctx, e.step(tt.script), nil)
				done <- err
			}()
			same := 0
			require.Eventually(t, func() bool {
				if len(e.bound()) == want {
					same++
				} else {
					same = 0
				}
				return same == 5
			}, time.Minute, 50*time.Millisecond)
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)
			require.Empty(t, e.bound())
		})
	}
}

// TestTaskKeepsItsThread looks at which threads of a sandbox work for a program that asks
// for something all the time, after it has started another one.
func TestTaskKeepsItsThread(t *testing.T) {
	if runtime.NumCPU() == 1 || runtime.NumCPU() > fewCPUs {
		t.Logf("programs are not placed on %d processors: any thread may work for one", runtime.NumCPU())
		return
	}
	e := newEnvWith(t, Config{Prepared: -1})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := e.r.Run(ctx, e.step("for i in 1 2 3 4 5; do busybox true; done; while test ! -e /stop; do i=$((i+1)); done"), nil)
		done <- err
	}()
	var process string
	require.Eventually(t, func() bool {
		found := sentries(t, e.r.cfg.StateDir)
		if len(found) == 1 {
			process = found[0]
		}
		return process != ""
	}, time.Minute, 50*time.Millisecond)
	time.Sleep(2 * time.Second)
	before := threadTimes(t, process)
	time.Sleep(4 * time.Second)
	var most, all int
	for thread, ticks := range threadTimes(t, process) {
		ticks -= before[thread]
		most, all = max(most, ticks), all+ticks
	}
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	t.Logf("%d of %d hundredths of a second", most, all)
	require.Greater(t, all, 20, "the sandbox has nothing to do")
	require.Greater(t, most, all*8/10)
}

// threadTimes is how long each thread of a process has worked, in hundredths of a second.
func threadTimes(t *testing.T, process string) map[string]int {
	names, err := filepath.Glob(filepath.Join(process, "task", "*", "stat"))
	require.NoError(t, err)
	times := map[string]int{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		for _, field := range fields[11:13] {
			ticks, err := strconv.Atoi(field)
			require.NoError(t, err)
			times[name] += ticks
		}
	}
	return times
}

// TestManyProcesses has more processes at once than are placed.
func TestManyProcesses(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	out := e.ok(e.step(`busybox mkfifo /wait
i=0; while [ $i -lt 150 ]; do { read -r line </wait; test -e /sh; echo $i; } & i=$((i+1)); done
exec 3<>/wait; i=0; while [ $i -lt 150 ]; do echo >&3; i=$((i+1)); done; wait`))
	require.Len(t, strings.Fields(out), 150)
}

// TestMonitorSleepsLonger looks at the thread of a sandbox that takes care of goroutines
// in the kernel, while programs in turn compute and ask for something.
func TestMonitorSleepsLonger(t *testing.T) {
	e := newEnvWith(t, Config{Prepared: -1})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := e.r.Run(ctx, e.step(`work() { while test ! -e /stop; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; done; }
work & work & work & work & wait`), nil)
		done <- err
	}()
	var relaxed, exact int
	var woke string
	require.Eventually(t, func() bool {
		relaxed, exact = 0, 0
		for _, process := range sentries(t, e.r.cfg.StateDir) {
			threads, err := os.ReadDir(filepath.Join(process, "task"))
			require.NoError(t, err)
			for _, thread := range threads {
				slack, err := os.ReadFile(filepath.Join("/proc", thread.Name(), "timerslack_ns"))
				switch {
				case err == nil && string(slack) == "5000000\n":
					relaxed++
					woke = filepath.Join("/proc", thread.Name(), "status")
				case err == nil && string(slack) == "50000\n":
					exact++
				}
			}
		}
		return relaxed > 0
	}, time.Minute, 20*time.Millisecond)
	require.Equal(t, 1, relaxed)
	require.Greater(t, exact, 2)
	before, begin := wakeUps(t, woke), time.Now()
	time.Sleep(2 * time.Second)
	n := float64(wakeUps(t, woke)-before) / time.Since(begin).Seconds()
	t.Logf("%.0f times a second", n)
	require.Greater(t, n, 20., "this is not the monitor")
	require.Less(t, n, 500.)
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}

// wakeUps is how often a thread has slept.
func wakeUps(t *testing.T, status string) (n int) {
	data, err := os.ReadFile(status)
	require.NoError(t, err)
	_, count, found := strings.Cut(string(data), "\nvoluntary_ctxt_switches:")
	require.True(t, found)
	n, err = strconv.Atoi(strings.Fields(count)[0])
	require.NoError(t, err)
	return n
}
