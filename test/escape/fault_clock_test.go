package escape

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var _ = register(entry{
	ID: "fault/clock-jumps", Severity: takesNodeDown,
	Threat: "The node's clock goes a year ahead, and two years back, while builds run and between the lives of an agent.",
	Test:   clockJumps,
})

const year = 365 * 24 * time.Hour

// wallClock is the clock of an agent that startAgent starts with its wrap.
type wallClock struct {
	file string
	wrap []string
}

// wallClockOf makes one; see testdata/clock.
func wallClockOf(t *testing.T, dir string) *wallClock {
	t.Helper()
	c := &wallClock{file: filepath.Join(dir, "clock.offset")}
	program := filepath.Join(dir, "clock")
	compile(t, "testdata/clock/*.c", program)
	c.jump(t, 0)
	c.wrap = []string{program, c.file, "2"} // it executes itself again, in a mount namespace
	return c
}

// jump has the clock be so far from the machine's.
func (c *wallClock) jump(t *testing.T, by time.Duration) {
	t.Helper()
	f, err := os.OpenFile(c.file, os.O_CREATE|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(int64(by/time.Second))), 0)
	require.NoError(t, err)
	time.Sleep(100 * time.Millisecond) // the program looks at the file every few milliseconds
}

func clockJumps(t *testing.T, e *env) {
	if runtime.GOARCH != "amd64" {
		t.Skip("testdata/clock has machine code of amd64")
	}
	dir := e.dir(t)
	// What ages by the clock has its usual age: a week for a record, an hour for an upload.
	e.agentFiles(t, dir, "tenants: {defaults: {maxTimeout: 1m, defaultTimeout: 1m, defaultResources: {stepTimeout: 40s}}}\n")
	clock := wallClockOf(t, dir)
	p := e.startAgent(t, dir, clock.wrap...)
	ctx := agenttest.Context(t, attacker)
	before := p.begin(t, ctx, busybox+"RUN echo before\n", nil)
	p.succeeds(t, ctx, before)
	ended := []string{before}

	for i, by := range []time.Duration{year, -year, 0} {
		name := strconv.Itoa(i)
		uploaded := agenttest.SendAll(t, ctx, p, agenttest.BusyboxTar(t, map[string]string{"Dockerfile": busybox + "RUN echo uploaded " + name + "\n"}))
		running := p.begin(t, ctx, busybox+"RUN echo before; i=0; while [ $i -lt 30 ]; do /bin/busybox sleep 0.1; echo line $i "+name+"; i=$((i+1)); done; echo the end\n", nil)
		p.until(t, ctx, running, "before")
		clock.jump(t, by)

		events := agenttest.Watch(t, ctx, p, running, 0)
		result := agenttest.CheckEvents(t, events, 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		require.Contains(t, agenttest.Output(events), "line 29 "+name+"\nthe end", "the log is whole")
		require.NotContains(t, agenttest.Output(events), "clipped")
		fromUpload := p.beginOf(t, ctx, uploaded, nil)
		p.succeeds(t, ctx, fromUpload)
		p.seesTime(t, ctx, fromUpload, by)
		next := p.begin(t, ctx, busybox+"RUN echo before\n", nil)
		require.True(t, cachedRun(p.succeeds(t, ctx, next)), "the cache is as it was")

		ended = append(ended, running, fromUpload, next)
		p.knows(t, ctx, ended)
	}

	// The next life begins in the past of the last, and one after that in its future.
	for _, by := range []time.Duration{-year, year} {
		p.end(syscall.SIGTERM)
		require.NotContains(t, p.output(t), "panic")
		clock.jump(t, by)
		p = e.startAgent(t, dir, clock.wrap...)
		p.knows(t, ctx, ended)
		id := p.begin(t, ctx, busybox+"RUN echo before\n", nil)
		require.True(t, cachedRun(p.succeeds(t, ctx, id)), "the cache is as it was")
		p.seesTime(t, ctx, id, by)
		ended = append(ended, id)
	}
}

// seesTime makes sure that the clock of the agent is the one of the test.
func (p *process) seesTime(t *testing.T, ctx context.Context, id string, by time.Duration) {
	t.Helper()
	got, err := p.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: id})
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(by), got.GetBuild().GetCreatedAt().AsTime(), time.Minute)
}

// knows wants the agent to tell the end of each build.
func (p *process) knows(t *testing.T, ctx context.Context, ids []string) {
	t.Helper()
	for _, id := range ids {
		p.succeeds(t, ctx, id)
	}
	list, err := p.ListBuilds(ctx, &agentv1.ListBuildsRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetBuilds(), len(ids))
}

// cachedRun tells whether the steps of a build were found in the cache.
func cachedRun(r *agentv1.BuildResult) bool {
	for _, s := range r.GetSteps() {
		if strings.Contains(s.GetName(), "] RUN") && !s.GetCached() {
			return false
		}
	}
	return true
}
