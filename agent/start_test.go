package agent

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

func TestStartBuildIsIdempotent(t *testing.T) {
	checkGoroutines(t)
	c := serve(t, newAgent(t, &faultyEngines{}, nil))
	ctx := testContext(t, "a")
	req := &agentv1.StartBuildRequest{BuildId: "one", Spec: dockerfile("FROM scratch")}
	first, err := c.StartBuild(ctx, req)
	require.NoError(t, err)
	result := checkEvents(t, watch(t, ctx, c, "one", 0), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState())
	require.Equal(t, []string{"r.example/a:1", "r.example/b:1"}, result.GetImageNames())

	second, err := c.StartBuild(ctx, req)
	require.NoError(t, err)
	require.Equal(t, first.GetBuild().GetCreatedAt().AsTime(), second.GetBuild().GetCreatedAt().AsTime())
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, second.GetBuild().GetState())

	_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "one", Spec: dockerfile("FROM scratch AS other")})
	require.Equal(t, codes.AlreadyExists, status.Code(err), "%v", err)

	// Another tenant's build of that name is another build.
	_, err = c.GetBuild(testContext(t, "b"), &agentv1.GetBuildRequest{BuildId: "one"})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
}
