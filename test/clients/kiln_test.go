package clients

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// kiln runs the kiln command on the agent.
func (a *agent) kiln(args ...string) result {
	a.t.Helper()
	return a.run(nil, "kiln", append(args, "--agent", "unix://"+a.socket)...)
}

func TestKilnBuildsOnAnAgent(t *testing.T) {
	a := startAgent(t, "gvisor", "")
	box := tools(t)
	dir := contextDir(t, base+"COPY file /copied\nRUN dmesg | grep -i gvisor > /kernel\n", map[string]string{"file": "from-here"})
	out := filepath.Join(t.TempDir(), "out")
	r := a.kiln("build", "--progress", "plain", "--build-context", "tools="+box, "-o", "type=local,dest="+out, dir)
	require.Zero(t, r.code, r.out)
	require.Equal(t, "from-here", read(t, out, "copied"))
	require.NotEmpty(t, read(t, out, "kernel"))
	// A list of destinations holds there too: such a step has a resolver of its own.
	resolver := func(args ...string) string {
		dir, out := contextDir(t, base+"RUN cat /etc/resolv.conf > /resolv.conf\n", nil), filepath.Join(t.TempDir(), "out")
		r := a.kiln(append([]string{"build", "--no-cache", "--build-context", "tools=" + box, "-o", "type=local,dest=" + out, dir}, args...)...)
		require.Zero(t, r.code, r.out)
		return read(t, out, "resolv.conf")
	}
	require.NotEqual(t, resolver(), resolver("--destination", "packages.example.com:443"))
	r = a.kiln("du")
	require.Zero(t, r.code, r.out)
	require.Contains(t, r.out, "COPY file /copied")
	r = a.kiln("prune", "--all", "--force")
	require.Zero(t, r.code, r.out)
	r = a.kiln("build", "--sandbox", "userns", dir)
	require.Equal(t, 2, r.code, "the agent's configuration chooses: %s", r.out)
}

// TestKilnFollowsAndCancelsBuildsOfAnAgent starts builds through the build API.
func TestKilnFollowsAndCancelsBuildsOfAnAgent(t *testing.T) {
	a := startAgent(t, "userns", "")
	conn, err := grpc.NewClient("unix://"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	api := agentv1.NewBuildServiceClient(conn)
	start := func(id, command string) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, err := api.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: &agentv1.BuildSpec{
			Source: &agentv1.Source{From: &agentv1.Source_Inline{Inline: &agentv1.InlineSource{Files: []*agentv1.InlineFile{{Path: "f", Content: []byte("x")}}}}},
			Strategy: &agentv1.BuildSpec_Dockerfile{Dockerfile: &agentv1.DockerfileStrategy{
				Inline: "FROM scratch\nCOPY f /f\n" + command,
			}},
		}})
		require.NoError(t, err)
	}
	start("good", "COPY f /g\n")
	r := a.kiln("logs", "-f", "good")
	require.Zero(t, r.code, r.out)
	require.Contains(t, r.out, "COPY f /g")
	start("bad", "RUN [\"/f\"]\n")
	r = a.kiln("logs", "-f", "bad")
	require.Equal(t, 1, r.code, r.out)
	r = a.kiln("ps")
	require.Zero(t, r.code, r.out)
	require.Regexp(t, `(?m)^good +Succeeded .*userns`, r.out)
	require.Regexp(t, `(?m)^bad +Failed`, r.out)
	r = a.kiln("cancel", "good")
	require.Zero(t, r.code, "it is over already, which is no error: %s", r.out)
	r = a.kiln("cancel", "none")
	require.Equal(t, 1, r.code, r.out)
	require.Contains(t, r.out, "none")
	r = a.kiln("logs", "none")
	require.Equal(t, 1, r.code, r.out)
}
