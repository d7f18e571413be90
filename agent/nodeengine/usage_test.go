package nodeengine_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// limitedAgent returns a client of an agent over real engines whose steps are held to the
// rules of a tenant, and its metrics.
func limitedAgent(t *testing.T, rules agent.RulePolicy) (agentv1.BuildServiceClient, *prometheus.Registry) {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir()) // the node changes it
	root, registry := t.TempDir(), prometheus.NewRegistry()
	metrics := agent.NewMetrics(registry)
	steps := agent.NewSteps(metrics)
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RunscPath: agenttest.RepoBin(t, "runsc"), OnStep: nodeengine.Reporter(steps),
		Rules: func(d engine.Domain) engine.StepRules {
			return engine.StepRules{Rules: rules(d.Tenant).Rules, Defaults: rules(d.Tenant).Defaults}
		},
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	a := agenttest.New(t, nodeengine.New(node), func(c *agent.Config) {
		c.Root, c.Policy, c.Steps, c.Metrics = root, rules, steps, metrics
	})
	return agenttest.Serve(t, a), registry
}

// forks starts 100 processes that wait.
var forks = sh("i=0; while [ $i -lt 100 ]; do /bin/busybox sleep 2 & i=$((i+1)); done; wait")

// TestLimitsOfABuildReachItsSteps has builds of both kinds ask for processes, which
// BuildKit has no words for.
func TestLimitsOfABuildReachItsSteps(t *testing.T) {
	c, _ := limitedAgent(t, func(string) agent.TenantRules { return agent.TenantRules{} })
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		pids := func(n int64) func(*agentv1.BuildSpec) {
			return func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{Pids: n} }
		}
		result := agenttest.CheckEvents(t, build(t, ctx, c, "few-"+name, class, base+forks, pids(60)), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_PROCESS_LIMIT, result.GetFailure().GetReason(), "%v", result)
		require.Contains(t, result.GetFailure().GetMessage(), "the limit of 60 processes and threads was reached")
		require.Contains(t, result.GetFailure().GetMessage(), "Give the build more processes")

		result = agenttest.CheckEvents(t, build(t, ctx, c, "more-"+name, class, base+forks, pids(400)), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		result = agenttest.CheckEvents(t, build(t, ctx, c, "cached-"+name, class, base+forks, pids(60)), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "a limit is no part of a step: %v", result)
	})
}

// TestUsageOfSteps has a step that computes and writes, and looks at all places that tell.
func TestUsageOfSteps(t *testing.T) {
	c, registry := limitedAgent(t, func(string) agent.TenantRules { return agent.TenantRules{} })
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		file := base + sh("/bin/busybox dd if=/dev/zero of=/written bs=1M count=8; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
		events := build(t, ctx, c, "use-"+name, class, file, nil)
		result := agenttest.CheckEvents(t, events, 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		of := func(steps []*agentv1.StepResult) *agentv1.StepUsage {
			for _, s := range steps {
				if strings.Contains(s.GetName(), "count=8") && s.GetEndedAt() != nil {
					return s.GetUsage()
				}
			}
			return nil
		}
		var told []*agentv1.StepResult
		for _, ev := range events {
			if s := ev.GetStep().GetStep(); s != nil {
				told = append(told, s)
			}
		}
		for _, u := range []*agentv1.StepUsage{of(result.GetSteps()), of(told)} {
			require.NotNil(t, u, "%v", result)
			require.Positive(t, u.GetCpu().AsDuration())
			require.Empty(t, u.GetLimitsReached())
		}
		for _, s := range result.GetSteps() {
			require.Equal(t, strings.Contains(s.GetName(), "RUN"), s.GetUsage() != nil, "%v", s)
		}

		result = agenttest.CheckEvents(t, build(t, ctx, c, "again-"+name, class, file, nil), 0)
		require.Nil(t, of(result.GetSteps()), "a step from the cache has used nothing")
		require.Equal(t, 1, observed(t, registry, "kiln_agent_step_cpu_seconds", name))
		require.Equal(t, 1, observed(t, registry, "kiln_agent_step_written_bytes", name))
	})
}

// TestPolicyHoldsForSteps has a policy that holds for steps whose build nobody
// has refused.
func TestPolicyHoldsForSteps(t *testing.T) {
	c, registry := limitedAgent(t, func(string) agent.TenantRules {
		return agent.TenantRules{
			Rules:    []policy.Rules{{Name: "small", Max: policy.Limits{PIDs: 200}, Mounts: []string{policy.MountSecret}}},
			Defaults: policy.Limits{PIDs: 60},
		}
	})
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		ctx := agenttest.Context(t, "a")
		result := agenttest.CheckEvents(t, build(t, ctx, c, "default-"+name, class, base+forks, nil), 0)
		require.Contains(t, result.GetFailure().GetMessage(), "the limit of 60 processes", "%v", result)
		require.Equal(t, 1, counted(t, registry, "kiln_agent_step_limits_reached_total", name, "pids"))

		cache := base + strings.Replace(sh("true"), "RUN ", "RUN --mount=type=cache,target=/c ", 1)
		result = agenttest.CheckEvents(t, build(t, ctx, c, "cache-"+name, class, cache, nil), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_DENIED, result.GetFailure().GetReason(), "%v", result)
		require.Contains(t, result.GetFailure().GetMessage(), `denied by SandboxPolicy "small", rule mounts.allowed: mounts of type cache may not be used`)
	})
}

// TestLimitsEndSteps has a build for each limit that ends a step, and tells why.
func TestLimitsEndSteps(t *testing.T) {
	c, registry := limitedAgent(t, func(string) agent.TenantRules { return agent.TenantRules{} })
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		for _, tt := range []struct {
			limit, step string
			resources   *agentv1.Resources
			reason      agentv1.FailureReason
			message     string
		}{
			{
				"timeout", "/bin/busybox sleep 100", &agentv1.Resources{StepTimeout: durationpb.New(time.Second)},
				agentv1.FailureReason_FAILURE_REASON_TIMEOUT, "timed out: the limit of 1s was reached",
			},
			{
				"disk", "/bin/busybox dd if=/dev/zero of=/big bs=1M count=64", &agentv1.Resources{DiskBytes: 16 << 20},
				agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT, "out of disk: the limit of 16MiB was reached",
			},
			{
				"inodes", "i=0; while [ $i -lt 2000 ]; do : > /f$i || exit 1; i=$((i+1)); done", &agentv1.Resources{Inodes: 500},
				agentv1.FailureReason_FAILURE_REASON_DISK_LIMIT, "out of disk: the limit of 500 files was reached",
			},
		} {
			ctx := agenttest.Context(t, "a")
			change := func(s *agentv1.BuildSpec) { s.Resources = tt.resources }
			result := agenttest.CheckEvents(t, build(t, ctx, c, tt.limit+"-"+name, class, base+sh(tt.step), change), 0)
			f := result.GetFailure()
			require.Equal(t, tt.reason, f.GetReason(), "%v", result)
			require.Contains(t, f.GetMessage(), tt.message)
			require.Contains(t, f.GetStep(), "RUN")
			require.NotZero(t, f.GetExitCode())
			last := result.GetSteps()[len(result.GetSteps())-1]
			require.Equal(t, []string{tt.limit}, last.GetUsage().GetLimitsReached(), "%v", last)
			require.Equal(t, 1, counted(t, registry, "kiln_agent_step_limits_reached_total", name, tt.limit))
		}
	})
}

// TestLimitsThatStepsSee has a step look at what it was given.
func TestLimitsThatStepsSee(t *testing.T) {
	c, _ := limitedAgent(t, func(string) agent.TenantRules { return agent.TenantRules{} })
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, name string) {
		file := base + sh("echo files=$(ulimit -Hn); echo shm=$(/bin/busybox df -k /dev/shm | /bin/busybox tail -1)")
		change := func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{OpenFiles: 100, ShmBytes: 8 << 20} }
		events := build(t, agenttest.Context(t, "a"), c, "see-"+name, class, file, change)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, agenttest.CheckEvents(t, events, 0).GetState())
		require.Contains(t, agenttest.Output(events), "files=100\n")
		require.Regexp(t, `shm=\S+\s+8192 `, agenttest.Output(events))
	})
}

// TestFrontendsOfPolicy has a policy that allows front ends of one place only.
func TestFrontendsOfPolicy(t *testing.T) {
	c, _ := limitedAgent(t, func(tenant string) agent.TenantRules {
		allowed := map[string][]string{"a": {"r.example.com/frontends"}, "b": {policy.BuiltIn}}
		return agent.TenantRules{Rules: []policy.Rules{{Name: "frontends", Frontends: allowed[tenant]}}}
	})
	denied := func(tenant, id, dockerfile, want string) {
		result := agenttest.CheckEvents(t, build(t, agenttest.Context(t, tenant), c, id, agentv1.SandboxClass_SANDBOX_CLASS_USERNS, dockerfile, nil), 0)
		require.Equal(t, agentv1.FailureReason_FAILURE_REASON_DENIED, result.GetFailure().GetReason(), "%v", result)
		require.Contains(t, result.GetFailure().GetMessage(), `denied by SandboxPolicy "frontends", rule frontends.allowed: `+want)
	}
	denied("a", "builtin", base, "the built-in Dockerfile front end may not be used")
	denied("a", "docker", "# syntax=docker/dockerfile:1\n"+base, "the built-in Dockerfile front end may not be used")
	denied("b", "other", "# syntax=r.example.com/frontends/x\n"+base, "front end r.example.com/frontends/x may not be used")
	result := agenttest.CheckEvents(t, build(t, agenttest.Context(t, "b"), c, "allowed", agentv1.SandboxClass_SANDBOX_CLASS_USERNS, "# syntax=docker/dockerfile:1\n"+base, nil), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
}

// observed returns how many observations a histogram has for a class.
func observed(t *testing.T, r *prometheus.Registry, name, class string) int {
	t.Helper()
	all, err := r.Gather()
	require.NoError(t, err)
	for _, f := range all {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == class {
				return int(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return 0
}

// counted returns the value of a counter for a class and a limit.
func counted(t *testing.T, r *prometheus.Registry, name, class, limit string) int {
	t.Helper()
	all, err := r.Gather()
	require.NoError(t, err)
	for _, f := range all {
		for _, m := range f.GetMetric() {
			if l := m.GetLabel(); f.GetName() == name && l[0].GetValue() == limit && l[1].GetValue() == class {
				return int(m.GetCounter().GetValue())
			}
		}
	}
	return 0
}
