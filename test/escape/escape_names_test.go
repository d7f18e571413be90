package escape

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

var _ = register(entry{
	ID: "escape/api-names", Severity: escapesToNode, Once: "it is the agent's API; no step runs",
	Threat: "The ID of a build, a tenant or the digest of an upload has .., a slash or NUL in it, and becomes the name of a file.",
	Test:   apiNames,
})

// apiNames calls as the controller, who chooses tenants too.
func apiNames(t *testing.T, e *env) {
	ctx := agenttest.Context(t, "controller")
	dropped := "dropped-" + random(t)[:16]
	up := strings.Repeat("../", 20) + strings.TrimPrefix(e.dir(t), "/") + "/" + dropped
	refused := func(err error, what string) {
		t.Helper()
		require.Contains(t, []codes.Code{codes.InvalidArgument, codes.NotFound, codes.PermissionDenied}, status.Code(err), "%s: %v", what, err)
	}
	for _, name := range []string{up, "../" + dropped, "/" + dropped, "..", ".", "a/../" + dropped, dropped + "\x00", dropped + "\n", ".." + "\\" + dropped, strings.Repeat("x", 5000), "A", "a.b", "-a", "a-"} {
		_, err := e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: name, Tenant: victim, Spec: agenttest.Dockerfile("FROM scratch\n")})
		refused(err, name)
		_, err = e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: dropped, Tenant: name, Spec: agenttest.Dockerfile("FROM scratch\n")})
		refused(err, name)
		_, err = e.Agent.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: name, Tenant: victim})
		refused(err, name)
		_, err = e.Agent.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: name, Tenant: name})
		refused(err, name)
		stream, err := e.Agent.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: name, Tenant: victim})
		require.NoError(t, err)
		_, err = stream.Recv()
		refused(err, name)
		for _, d := range []string{name, "sha256:" + name, "sha256:" + strings.Repeat("../", 21) + "x", name + ":" + digest.FromString("x").Encoded()} {
			_, err = agenttest.Send(ctx, e.Agent, &agentv1.UploadHeader{Tenant: victim, Digest: d, Size: 1}, []byte("x"))
			refused(err, d)
			_, err = agenttest.Send(ctx, e.Agent, &agentv1.UploadHeader{Tenant: name, Digest: digest.FromString("x").String(), Size: 1}, []byte("x"))
			refused(err, name)
			_, err = e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: dropped, Tenant: victim, Spec: agenttest.Uploaded(d)})
			refused(err, d)
		}
		_, _, err = e.Node.Engine(context.Background(), engine.Domain{Tenant: name, Sandbox: e.Class})
		require.Error(t, err, name)
	}
	require.Empty(t, find(t, filepath.Dir(e.Root), dropped, ""))
	require.Empty(t, find(t, e.temp, dropped, ""))
}
