package agent

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// TestManyBuildsAtOnce has 32 builds in one agent at once, with the slots that it has
// by default and with one for each: none is lost.
func TestManyBuildsAtOnce(t *testing.T) {
	const builds = 32
	for _, slots := range []int{0, builds} {
		t.Run(fmt.Sprintf("slots %d", slots), func(t *testing.T) {
			n := newNode(t, slots)
			a := n.start(t)
			idle := a.memory(t, "VmRSS")
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
			defer cancel()
			began := time.Now()
			var wg sync.WaitGroup
			for i := range builds {
				archive := agenttest.BusyboxTar(t, map[string]string{"Dockerfile": base + sh(fmt.Sprintf("echo build %d > /one", i)) + sh("sleep 0.2")})
				wg.Go(func() {
					b, err := a.acknowledge(ctx, fmt.Sprint("b", i), archive)
					if err != nil {
						t.Errorf("build %d: %v", i, err)
						return
					}
					if err := a.follow(ctx, b); err != nil {
						t.Errorf("follow build %d: %v", i, err)
					}
				})
			}
			wg.Wait()
			took := time.Since(began)
			for i := range builds {
				events := agenttest.Watch(t, ctx, a, fmt.Sprint("b", i), 0)
				result := agenttest.CheckEvents(t, events, 0)
				require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
			}
			t.Logf("%d builds in %s; memory: %d MiB when idle, %d MiB at most", builds, took.Round(10*time.Millisecond), idle>>20, a.memory(t, "VmHWM")>>20)
			a.end(t, syscall.SIGTERM)
			n.checkNothingLeft(t)
		})
	}
}

// memory reads one of the agent's memory figures, in bytes.
func (a *agent) memory(t *testing.T, figure string) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(text), figure+":")
	require.True(t, ok, "%s", text)
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	require.NoError(t, err)
	return kib << 10
}
