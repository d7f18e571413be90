package cgroup

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"version 1, controllers alone", "3:cpu:/a\n2:memory:/b\n1:name=systemd:/\n0::/u\n", "unified /u; cpu /a; memory /b"},
		{"version 1, controllers together", "4:cpu,cpuacct:/\n3:net_cls,net_prio:/\n2:pids:/x:y\n", "cpu,cpuacct /; pids /x:y"},
		{"version 2", "0::/user.slice\n", "unified /user.slice"},
		{"nonsense", "\nx\n1:2\n", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, h := range parse(tt.text) {
				name := strings.Join(h.controllers, ",")
				if h.unified {
					name = "unified"
				}
				got = append(got, name+" "+h.home)
			}
			require.Equal(t, tt.want, strings.Join(got, "; "))
		})
	}
}

func TestNumber(t *testing.T) {
	stat := "nr_periods 3\nnr_throttled 12\noom_kill 1\n"
	n, err := number(stat, "nr_throttled")
	require.NoError(t, err)
	require.EqualValues(t, 12, n)
	n, err = number(stat, "missing")
	require.NoError(t, err)
	require.Zero(t, n)
	n, err = number("77\n", "")
	require.NoError(t, err)
	require.EqualValues(t, 77, n)
	_, err = number("max\n", "")
	require.Error(t, err)
}

func newGroup(t *testing.T) (*Node, *Group, string) {
	t.Helper()
	n, err := Open()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	parent := fmt.Sprintf("/kiln-cgroup-test-%d", os.Getpid())
	name := parent + "/a/b"
	g, err := n.Make(name)
	require.NoError(t, err)
	t.Cleanup(func() {
		g.Close()
		require.NoError(t, n.Remove(name))
		require.NoError(t, n.Remove(name), "it is gone")
		n.Tidy(parent + "/a")
		n.Tidy(parent)
		left, err := filepath.Glob("/sys/fs/cgroup/*" + parent)
		require.NoError(t, err)
		require.Empty(t, left)
	})
	return n, g, name
}

func TestGroupHoldsProcesses(t *testing.T) {
	_, g, name := newGroup(t)
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	require.NoError(t, g.Add(cmd.Process.Pid))
	at, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	require.NoError(t, err)
	require.Equal(t, len(g.members), strings.Count(string(at), name+"\n"), "%s", at)
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
}

// A sandbox that was killed goes when the kernel has taken back what it had.
func TestRemoveWaitsForProcesses(t *testing.T) {
	n, g, name := newGroup(t)
	cmd := exec.Command("sleep", "1.2")
	require.NoError(t, cmd.Start())
	require.NoError(t, g.Add(cmd.Process.Pid))
	reaped := make(chan error, 1)
	go func() { reaped <- cmd.Wait() }()
	require.NoError(t, n.Remove(name))
	require.NoError(t, <-reaped)
}

func TestLimitsAreWritten(t *testing.T) {
	_, g, _ := newGroup(t)
	require.NoError(t, g.Limit(sandbox.Limits{}))
	require.NoError(t, g.Limit(sandbox.Limits{CPUMillis: math.MaxInt64, MemoryBytes: math.MaxInt64, PIDs: math.MaxInt64}))
	require.NoError(t, g.Limit(sandbox.Limits{CPUMillis: 1500, MemoryBytes: 64 << 20, PIDs: 7}))
	m, _ := g.with("pids")
	data, err := os.ReadFile(m.file("pids.max"))
	require.NoError(t, err)
	require.Equal(t, "7\n", string(data))
	m, _ = g.with("memory")
	file := "memory.limit_in_bytes"
	if m.unified {
		file = "memory.max"
	}
	data, err = os.ReadFile(m.file(file))
	require.NoError(t, err)
	require.Equal(t, "67108864\n", string(data))
	m, _ = g.with("cpu")
	file, want := "cpu.cfs_quota_us", "150000\n"
	weight, all := "cpu.shares", 1024
	if m.unified {
		file, want = "cpu.max", "150000 100000\n"
		weight, all = "cpu.weight", 100
	}
	data, err = os.ReadFile(m.file(file))
	require.NoError(t, err)
	require.Equal(t, want, string(data))
	data, err = os.ReadFile(m.file(weight))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintln(min(all, all*1500/1000/runtime.NumCPU())), string(data), "its part of the processors")
}

// inVersion2 returns a group whose files are those of version 2, in a directory.
func inVersion2(t *testing.T, files map[string]string) *Group {
	dir := t.TempDir()
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	f, err := os.Open(dir)
	require.NoError(t, err)
	g := &Group{members: []member{{dir: f, hierarchy: &hierarchy{unified: true, controllers: []string{"cpu", "memory", "pids", "io"}}}}}
	t.Cleanup(g.Close)
	return g
}

func TestVersion2(t *testing.T) {
	g := inVersion2(t, map[string]string{
		"cpu.max": "", "cpu.weight": "", "memory.max": "", "memory.swap.max": "", "pids.max": "", "cpu.stat": "usage_usec 2500\nnr_throttled 4\nthrottled_usec 70\n", "io.stat": "8:0 rbytes=5 wbytes=6\n",
		"memory.peak": "4096\n", "pids.events": "max 5\n", "memory.events": "low 0\nhigh 0\nmax 9\noom 1\noom_kill 2\n",
	})
	require.NoError(t, g.Limit(sandbox.Limits{CPUMillis: 500, MemoryBytes: 1 << 20, PIDs: 9}))
	for name, want := range map[string]string{"cpu.max": "50000 100000", "cpu.weight": fmt.Sprint(max(50/runtime.NumCPU(), 1)), "memory.max": "1048576", "memory.swap.max": "0", "pids.max": "9"} {
		got, err := os.ReadFile(g.members[0].file(name))
		require.NoError(t, err)
		require.Equal(t, want, string(got), name)
	}
	u, err := g.Usage()
	require.NoError(t, err)
	require.Equal(t, sandbox.Usage{CPU: 2500 * time.Microsecond, PeakMemory: 4096, Throttled: 4, ThrottledTime: 70 * time.Microsecond, IORead: 5, IOWrite: 6}, u)
	kills, refused, err := g.Events()
	require.NoError(t, err)
	require.EqualValues(t, 2, kills)
	require.EqualValues(t, 5, refused)
}

func TestMissingControllers(t *testing.T) {
	g := inVersion2(t, map[string]string{"cpu.max": "", "cpu.weight": "", "cpu.stat": ""})
	g.members[0].controllers = []string{"cpu"}
	require.NoError(t, g.Limit(sandbox.Limits{CPUMillis: 1}))
	got, err := os.ReadFile(g.members[0].file("cpu.max"))
	require.NoError(t, err)
	require.Equal(t, "1000 100000", string(got), "the least that the kernel takes")
	var missing *MissingError
	require.ErrorAs(t, g.Limit(sandbox.Limits{MemoryBytes: 1 << 20}), &missing)
	require.Equal(t, "memory", missing.Controller)
	require.ErrorAs(t, g.Limit(sandbox.Limits{PIDs: 1}), &missing)
	_, err = g.Usage()
	require.NoError(t, err)
	kills, refused, err := g.Events()
	require.NoError(t, err)
	require.Zero(t, kills+refused)
}

// TestDoorsAndEntrances has a process enter and leave.
func TestDoorsAndEntrances(t *testing.T) {
	_, g, name := newGroup(t)
	doors, err := g.Doors()
	require.NoError(t, err)
	for _, d := range doors {
		require.NoError(t, d.Close())
	}
	in, out, err := g.Entrances()
	require.NoError(t, err)
	require.Len(t, out, len(in))
	script := "for f in " + strings.Join(in, " ") + "; do echo 0 >$f; done; cat /proc/self/cgroup; for f in " + strings.Join(out, " ") + "; do echo 0 >$f; done; echo; cat /proc/self/cgroup"
	cmd := exec.Command("sh", "-ec", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	got, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", got)
	inside, after, _ := strings.Cut(string(got), "\n\n")
	require.Equal(t, len(in), strings.Count(inside+"\n", name+"\n"), "%s", got)
	own, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.Equal(t, string(own), after)
}

func TestLimitBelowUsage(t *testing.T) {
	_, g, _ := newGroup(t)
	cmd := exec.Command("sh", "-c", "read x; x=$(head -c 20000000 /dev/zero | tr '\\0' x); echo full; read x")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	require.NoError(t, g.Add(cmd.Process.Pid))
	_, err = in.Write([]byte("\n"))
	require.NoError(t, err)
	_, err = out.Read(make([]byte, 8))
	require.NoError(t, err)
	err = g.Limit(sandbox.Limits{MemoryBytes: 1 << 20})
	if err != nil {
		require.True(t, errors.Is(err, ErrInUse), "%v", err)
	}
	_ = cmd.Process.Kill() // version 2 has killed it
	require.Error(t, cmd.Wait())
	u, err := g.Usage()
	require.NoError(t, err)
	require.Greater(t, u.PeakMemory, int64(10<<20))
	require.Positive(t, u.CPU)
}

func TestTransfers(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       [2]int64
	}{
		{"version 1", "254:0 Read 4096\n254:0 Write 100\n254:0 Sync 1\n254:0 Total 4196\n8:0 Read 1\nTotal 4197\n", [2]int64{4097, 100}},
		{"version 2", "254:0 rbytes=4096 wbytes=100 rios=1 wios=2 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=0 rios=1\n7:0 \n", [2]int64{4097, 100}},
		{"none", "Total 0\n", [2]int64{}},
		{"cut off", "254:0 rbytes=4096 wbytes", [2]int64{4096, 0}},
		{"nonsense", "x=y=z\n=\n254:0 rbytes=x wbytes=1", [2]int64{0, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read, written := transfers(tt.text)
			require.Equal(t, tt.want, [2]int64{read, written})
		})
	}
}
