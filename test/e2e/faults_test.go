package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/test/cluster"
)

// kills is how many times a component is killed at a random moment of a build.
const kills = 2

func testFaults(t *testing.T, in *installation) {
	// Nothing that an earlier run left is a cache hit.
	nonce := time.Now().UnixNano()
	short := in.inline(fmt.Sprintf("for i in 1 2 3 4 5 6; do sleep 0.5; echo $i; done; echo %d", nonce))
	t.Run("the API server is gone for a while", func(t *testing.T) {
		in.apply(t, manifest("no-api", in.inline(fmt.Sprintf("sleep 15; echo %d", nonce))))
		in.running(t, "no-api")
		api, err := in.Control().Component(cluster.APIServer)
		require.NoError(t, err)
		require.NoError(t, api.Kill(t.Context()))
		time.Sleep(30 * time.Second)
		require.NoError(t, api.Start(t.Context()))
		in.ready(t)
		require.Equal(t, buildv1.PhaseSucceeded, in.ended(t, "no-api").Status.Phase)
	})
	t.Run("the controllers are killed", func(t *testing.T) {
		for i := range kills {
			name := fmt.Sprintf("controller-killed-%d", i)
			in.applies(t, manifest(name, short))
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
			in.killProcess(t, "kiln-controller")
			b := in.ended(t, name)
			require.Equal(t, buildv1.PhaseSucceeded, b.Status.Phase, explanation(b))
		}
	})
	t.Run("the agent is killed", func(t *testing.T) {
		for i := range kills {
			fail, retry := fmt.Sprintf("agent-killed-%d", i), fmt.Sprintf("agent-killed-retry-%d", i)
			in.applies(t, manifest(fail, short))
			in.applies(t, manifest(retry, "  onNodeLoss: Retry\n"+short))
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
			in.killProcess(t, "kiln-agent")
			b := in.ended(t, fail)
			if b.Status.Phase != buildv1.PhaseSucceeded {
				require.Equal(t, buildv1.ReasonNodeLost, b.Status.FailureDetails.Reason, explanation(b))
			}
			b = in.ended(t, retry)
			require.Equal(t, buildv1.PhaseSucceeded, b.Status.Phase, explanation(b))
			in.ready(t)
		}
		in.noSteps(t)
	})
}

// applies applies a manifest as soon as the API server takes it: it refuses Builds
// while no controller checks them.
func (in *installation) applies(t *testing.T, manifest string) {
	t.Helper()
	var out string
	require.Eventually(t, func() bool {
		var err error
		out, err = in.tryKubectl(manifest, "apply", "-f", "-")
		return err == nil
	}, 2*time.Minute, time.Second, "the API server does not take a Build: %s", out)
}

// killProcess kills every process of this name on all nodes.
func (in *installation) killProcess(t *testing.T, name string) {
	t.Helper()
	killed := 0
	for _, n := range in.Nodes() {
		out, err := n.Command(t.Context(), "sh", "-c", fmt.Sprintf(
			`for p in /proc/[0-9]*; do case "$(tr '\0' ' ' < $p/cmdline 2>/dev/null)" in %[1]s\ *|*/%[1]s\ *) kill -9 ${p#/proc/} && echo killed;; esac; done; true`, name)).CombinedOutput()
		require.NoError(t, err, string(out))
		killed += strings.Count(string(out), "killed")
	}
	require.NotZero(t, killed, "no process %s runs", name)
}

// ready waits until kiln runs again.
func (in *installation) ready(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	require.NoError(t, in.WaitReady(ctx))
	for _, what := range []string{"deployment/kiln-controller", "daemonset/kiln-agent"} {
		// kubelet waits longer before each further start of what was killed.
		var out string
		require.Eventually(t, func() bool {
			var err error
			out, err = in.tryKubectl("", "rollout", "status", "-n", "kiln-system", "--timeout=30s", what)
			return err == nil
		}, 4*time.Minute, time.Second, "%s: %s", what, out)
	}
}
