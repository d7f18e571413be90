package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/queue"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/policy"
)

// subjects returns the fields, rules and reasons that the details of an error name.
func subjects(t *testing.T, err error) string {
	t.Helper()
	st, ok := status.FromError(err)
	require.True(t, ok, "%v", err)
	require.NotEmpty(t, st.Details(), "%v has no details", err)
	var out []string
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				out = append(out, v.GetField())
			}
		case *errdetails.ErrorInfo:
			require.Equal(t, "agent.kiln.build", d.GetDomain())
			out = append(out, d.GetReason())
			for _, v := range d.GetMetadata() {
				out = append(out, v)
			}
		case *errdetails.QuotaFailure:
			out = append(out, d.GetViolations()[0].GetSubject())
		}
	}
	return strings.Join(out, " ")
}

func TestStartBuildIsIdempotent(t *testing.T) {
	agenttest.CheckGoroutines(t)
	engines := &faultyEngines{}
	c := agenttest.Serve(t, agenttest.New(t, engines, nil))
	ctx := agenttest.Context(t, "a")
	req := &agentv1.StartBuildRequest{BuildId: "one", Spec: agenttest.Dockerfile("FROM scratch")}
	for _, image := range []string{"r.example/a:1", "b"} {
		req.Spec.Outputs = append(req.Spec.Outputs, &agentv1.Output{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: image}}})
	}
	first, err := c.StartBuild(ctx, req)
	require.NoError(t, err)
	require.Equal(t, "node-1", first.GetBuild().GetNode())
	require.Equal(t, "a", first.GetBuild().GetTenant())
	result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "one", 0), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState())
	require.Equal(t, []string{"r.example/a:1", "docker.io/library/b:latest"}, result.GetImageNames())
	require.Equal(t, digest.FromString("image").String(), result.GetImageDigest())

	second, err := c.StartBuild(ctx, req)
	require.NoError(t, err)
	require.Equal(t, first.GetBuild().GetCreatedAt().AsTime(), second.GetBuild().GetCreatedAt().AsTime())
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, second.GetBuild().GetState())

	_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "one", Spec: agenttest.Dockerfile("FROM scratch AS other")})
	require.Equal(t, codes.AlreadyExists, status.Code(err), "%v", err)
	require.Len(t, engines.opened, 1, "it was built once")
}

func TestTenantsDoNotMeet(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, nil))
	a, b, controller := agenttest.Context(t, "a"), agenttest.Context(t, "b"), agenttest.Context(t, "controller")
	_, err := c.StartBuild(a, &agentv1.StartBuildRequest{BuildId: "one", Spec: agenttest.Dockerfile("FROM scratch")})
	require.NoError(t, err)
	agenttest.Watch(t, a, c, "one", 0)

	for _, tenant := range []string{"", "a"} {
		want := codes.NotFound
		if tenant == "a" {
			want = codes.PermissionDenied
		}
		_, err = c.GetBuild(b, &agentv1.GetBuildRequest{BuildId: "one", Tenant: tenant})
		require.Equal(t, want, status.Code(err), "%v", err)
		_, err = c.CancelBuild(b, &agentv1.CancelBuildRequest{BuildId: "one", Tenant: tenant})
		require.Equal(t, want, status.Code(err), "%v", err)
		stream, err := c.WatchBuild(b, &agentv1.WatchBuildRequest{BuildId: "one", Tenant: tenant})
		require.NoError(t, err)
		_, err = stream.Recv()
		require.Equal(t, want, status.Code(err), "%v", err)
	}
	list, err := c.ListBuilds(b, &agentv1.ListBuildsRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetBuilds())
	_, err = c.StartBuild(b, &agentv1.StartBuildRequest{BuildId: "one", Spec: agenttest.Dockerfile("FROM scratch AS other")})
	require.NoError(t, err, "an ID is free in another tenant")
	agenttest.Watch(t, b, c, "one", 0)

	list, err = c.ListBuilds(controller, &agentv1.ListBuildsRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetBuilds(), 2)
	_, err = c.GetBuild(controller, &agentv1.GetBuildRequest{BuildId: "one"})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	_, err = c.GetBuild(agenttest.Context(t, "nobody"), &agentv1.GetBuildRequest{BuildId: "one"})
	require.Equal(t, codes.Unauthenticated, status.Code(err), "%v", err)
	usage, err := c.DiskUsage(a, &agentv1.DiskUsageRequest{})
	require.NoError(t, err)
	require.Len(t, usage.GetCaches(), 2)
	usage, err = c.DiskUsage(controller, &agentv1.DiskUsageRequest{})
	require.NoError(t, err)
	require.Len(t, usage.GetCaches(), 3)
	require.EqualValues(t, 18, usage.GetCaches()[0].GetSize())
	require.EqualValues(t, 13, usage.GetCaches()[0].GetReclaimable())
	require.NotZero(t, usage.GetDiskFree())
	pruned, err := c.Prune(a, &agentv1.PruneRequest{All: true, KeepBytes: 1})
	require.NoError(t, err)
	require.EqualValues(t, 30, pruned.GetFreed())
	require.EqualValues(t, 4, pruned.GetRecords())
}

// TestRefusals are requests that are refused with nothing stored.
func TestRefusals(t *testing.T) {
	agenttest.CheckGoroutines(t)
	rules := func(string) agent.TenantRules {
		return agent.TenantRules{
			Rules: []policy.Rules{{
				Name: "strict", RequiredClass: "gvisor", Networks: []string{"none"}, MaxTimeout: time.Minute,
				Max: policy.Limits{MemoryBytes: 64 << 20}, Pull: []string{"good.example"}, Push: []string{"good.example"},
			}},
			NodeImages: []string{"node.example"},
		}
	}
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, func(cfg *agent.Config) {
		cfg.Policy = agent.RulePolicy(rules)
		cfg.Queue.Total.CPUMillis = 4000
		cfg.Sandboxes = func() []*agentv1.SandboxInfo {
			return []*agentv1.SandboxInfo{{Class: agentv1.SandboxClass_SANDBOX_CLASS_GVISOR, Available: true}}
		}
	}))
	ctx := agenttest.Context(t, "a")
	with := func(change func(*agentv1.BuildSpec)) *agentv1.BuildSpec {
		spec := agenttest.Dockerfile("FROM scratch")
		change(spec)
		return spec
	}
	nodeOutput := func(image string) *agentv1.BuildSpec {
		return with(func(s *agentv1.BuildSpec) {
			s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: image}}}}
		})
	}
	tests := []struct {
		name string
		req  *agentv1.StartBuildRequest
		code codes.Code
		want string
	}{
		{"no ID", &agentv1.StartBuildRequest{Spec: agenttest.Dockerfile("FROM scratch")}, codes.InvalidArgument, "build_id"},
		{"an ID that is a path", &agentv1.StartBuildRequest{BuildId: "../x", Spec: agenttest.Dockerfile("FROM scratch")}, codes.InvalidArgument, "build_id"},
		{"no spec", &agentv1.StartBuildRequest{BuildId: "x"}, codes.InvalidArgument, "spec"},
		{"an empty spec", &agentv1.StartBuildRequest{BuildId: "x", Spec: &agentv1.BuildSpec{}}, codes.InvalidArgument, "spec.strategy"},
		{"a large spec", &agentv1.StartBuildRequest{BuildId: "x", Spec: agenttest.Dockerfile(strings.Repeat("#", 3<<20))}, codes.InvalidArgument, "spec"},
		{"a class that does not exist", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Sandbox = 77 })}, codes.InvalidArgument, "spec.sandbox"},
		{"a class that policy refuses", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Sandbox = agentv1.SandboxClass_SANDBOX_CLASS_USERNS })}, codes.PermissionDenied, "spec.sandbox"},
		{"a network that policy refuses", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Network = agentv1.NetworkMode_NETWORK_MODE_EGRESS })}, codes.PermissionDenied, "spec.network"},
		{"more memory than policy allows", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{MemoryBytes: 64<<20 + 1} })}, codes.PermissionDenied, "spec.resources.memory_bytes"},
		{"more CPU than the node has", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Resources = &agentv1.Resources{CpuMillis: 4001} })}, codes.FailedPrecondition, "spec.resources.cpu_millis"},
		{"a longer timeout", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Timeout = durationpb.New(time.Hour) })}, codes.PermissionDenied, "spec.timeout"},
		{"a registry to pull from", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) {
			s.Source = &agentv1.Source{NamedContexts: map[string]string{"base": "docker-image://bad.example/x:1"}}
		})}, codes.PermissionDenied, "spec.source.named_contexts[base]"},
		{"a registry to push to", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) {
			s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: "bad.example/x:1"}}}}
		})}, codes.PermissionDenied, "spec.outputs[0].registry.image"},
		{"a name that Pods have", &agentv1.StartBuildRequest{BuildId: "x", Spec: nodeOutput("registry.k8s.io/kube-proxy:v1")}, codes.PermissionDenied, "spec.outputs[0].node.image"},
		{"no node runtime", &agentv1.StartBuildRequest{BuildId: "x", Spec: nodeOutput("node.example/x:1")}, codes.FailedPrecondition, "spec.outputs[0].node"},
		{"a secret that is not there", &agentv1.StartBuildRequest{BuildId: "x", Spec: with(func(s *agentv1.BuildSpec) { s.Secrets = []*agentv1.SecretRef{{Id: "s"}} })}, codes.InvalidArgument, `credentials.secrets["s"]`},
		{"an upload that is not there", &agentv1.StartBuildRequest{BuildId: "x", Spec: agenttest.Uploaded(digest.FromString("x").String())}, codes.FailedPrecondition, "spec.source.upload.digest"},
		{"another tenant", &agentv1.StartBuildRequest{BuildId: "x", Tenant: "b", Spec: agenttest.Dockerfile("FROM scratch")}, codes.PermissionDenied, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.StartBuild(ctx, tt.req)
			require.Equal(t, tt.code, status.Code(err), "%v", err)
			if tt.want != "" {
				require.Contains(t, subjects(t, err), tt.want)
			}
			if tt.req.GetSpec() != nil && tt.req.GetBuildId() == "x" && tt.req.GetTenant() == "" && tt.code != codes.InvalidArgument {
				probe, err := c.Probe(ctx, &agentv1.ProbeRequest{Spec: tt.req.GetSpec()})
				require.NoError(t, err)
				require.False(t, probe.GetRunnable())
				require.NotEmpty(t, probe.GetRefusals()[0])
			}
		})
	}
	list, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetBuilds())
	probe, err := c.Probe(ctx, &agentv1.ProbeRequest{Spec: agenttest.Dockerfile("FROM scratch")})
	require.NoError(t, err)
	require.True(t, probe.GetRunnable(), "%v", probe.GetRefusals())
}

func TestCallsWithBadArguments(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, nil))
	ctx := agenttest.Context(t, "a")
	tests := map[string]struct {
		call func() error
		want string
	}{
		"page size":  {func() error { _, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{PageSize: -1}); return err }, "page_size"},
		"large page": {func() error { _, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{PageSize: 1001}); return err }, "page_size"},
		"page token": {func() error { _, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{PageToken: "!"}); return err }, "page_token"},
		"state": {func() error {
			_, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{States: []agentv1.BuildState{99}})
			return err
		}, "states[0]"},
		"build ID": {func() error { _, err := c.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: "a/b"}); return err }, "build_id"},
		"reason": {func() error {
			_, err := c.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: "a", Reason: strings.Repeat("x", 1025)})
			return err
		}, "reason"},
		"probe of no spec": {func() error { _, err := c.Probe(ctx, &agentv1.ProbeRequest{}); return err }, "spec"},
		"keep bytes":       {func() error { _, err := c.Prune(ctx, &agentv1.PruneRequest{KeepBytes: -1}); return err }, "keep_bytes"},
		"keep duration": {func() error {
			_, err := c.Prune(ctx, &agentv1.PruneRequest{KeepDuration: durationpb.New(-1)})
			return err
		}, "keep_duration"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := tt.call()
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
			require.Contains(t, subjects(t, err), tt.want)
		})
	}
}

// blocked is a build that goes on until its context ends.
func blocked(ctx context.Context, _ func(*client.SolveStatus)) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestAFullQueueSaysSo(t *testing.T) {
	agenttest.CheckGoroutines(t)
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{do: blocked}, func(cfg *agent.Config) { cfg.Queue = queue.Limits{Slots: 1, Queued: 2, QueuedPerTenant: 1} }))
	a, b := agenttest.Context(t, "a"), agenttest.Context(t, "b")
	start := func(ctx context.Context, id string) error {
		_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: agenttest.Dockerfile("FROM scratch")})
		return err
	}
	require.NoError(t, start(a, "runs"))
	require.NoError(t, start(a, "waits"))
	err := start(a, "too-many")
	require.Equal(t, codes.ResourceExhausted, status.Code(err), "%v", err)
	require.Contains(t, subjects(t, err), "queue-per-tenant")
	require.NoError(t, start(b, "waits"))
	err = start(b, "too-many")
	require.Contains(t, subjects(t, err), "QUEUE")
	_, err = c.GetBuild(b, &agentv1.GetBuildRequest{BuildId: "too-many"})
	require.Equal(t, codes.NotFound, status.Code(err))
	require.NoError(t, start(a, "waits"), "one that is there is no new one")

	probe, err := c.Probe(a, &agentv1.ProbeRequest{Spec: agenttest.Dockerfile("FROM scratch")})
	require.NoError(t, err)
	require.EqualValues(t, []int32{1, 2, 1}, []int32{probe.GetRunning(), probe.GetQueued(), probe.GetSlots()})
	require.Contains(t, probe.GetRefusals()[0], "try another node")
	got, err := c.GetBuild(b, &agentv1.GetBuildRequest{BuildId: "waits"})
	require.NoError(t, err)
	require.EqualValues(t, 2, got.GetBuild().GetQueuePosition()+1)
}

// TestWhoIsToldWhatTheNodeHas keeps tenants from asking for others' images.
func TestWhoIsToldWhatTheNodeHas(t *testing.T) {
	agenttest.CheckGoroutines(t)
	var asked [][]string
	c := agenttest.Serve(t, agenttest.New(t, &faultyEngines{}, func(cfg *agent.Config) {
		cfg.LocalBytes = func(_ context.Context, images []string) int64 {
			asked = append(asked, images)
			return 42
		}
	}))
	spec := agenttest.Dockerfile("FROM registry.example.com/private:1")
	probe, err := c.Probe(agenttest.Context(t, "a"), &agentv1.ProbeRequest{Spec: spec})
	require.NoError(t, err)
	require.Zero(t, probe.GetLocalBaseBytes())
	require.Empty(t, asked, "how long an answer takes tells nothing either")

	probe, err = c.Probe(agenttest.Context(t, "controller"), &agentv1.ProbeRequest{Tenant: "a", Spec: spec})
	require.NoError(t, err)
	require.EqualValues(t, 42, probe.GetLocalBaseBytes())
	require.Equal(t, [][]string{{"registry.example.com/private:1"}}, asked)
	_, err = c.Probe(agenttest.Context(t, "controller"), &agentv1.ProbeRequest{Tenant: "a", Spec: agenttest.Dockerfile("FROM scratch")})
	require.NoError(t, err)
	require.Len(t, asked, 1, "nothing is fetched for it")
}
