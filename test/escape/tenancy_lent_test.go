package escape

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(entry{
	ID: "tenancy/lent-images", Severity: reachesTenant,
	Threat: "A tenant takes, or finds out about, a private image that the node has pulled for another: by its name, or by its digests in a manifest of a registry of the tenant's own.",
	Test: func(t *testing.T, e *env) {
		for how, answers := range lentTo(t, e, "wrong") {
			require.NotContains(t, answers[0], lentCanary, how)
			require.NotContains(t, answers[0], "BUILD_STATE_SUCCEEDED", how)
			require.Equal(t, answers[1], answers[0], "%s: what the node has is answered as what it has not", how)
		}
	},
	Off: func(t *testing.T, e *env) bool {
		return strings.Contains(lentTo(t, e, lentPassword)["by name"][0], lentCanary)
	},
	Without: "that the registry is asked: the attacker has its password",
})

const lentCanary, lentPassword = "canary-of-a-private-image", "password-of-the-owner"

// lentTo has a tenant with a password, which may be wrong, ask for an image that the node
// has pulled, and for one that it has not. It returns both answers for each way.
func lentTo(t *testing.T, e *env, password string) map[string][2]string {
	t.Helper()
	node := e.containerd(t)
	dir := e.dir(t)
	e.agentFiles(t, dir, "nodeRuntime: {socket: "+node.socket+"}\n")
	p := e.startAgent(t, dir)
	ctx := agenttest.Context(t, attacker)
	out := map[string][2]string{}
	for i := range 2 { // the second is not on the node
		im := large(t)
		im = withLayer(t, im)
		private := registryOf(t, e, im, func(w http.ResponseWriter, r *http.Request, _ string) bool {
			if _, got, _ := r.BasicAuth(); got == lentPassword {
				return false
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return true
		})
		if i == 0 {
			node.pull(t, private.Address+"/image:latest", lentPassword)
		}
		// The attacker's own says that it has every blob, and gives none but the configuration.
		mine := registryOf(t, e, im, func(w http.ResponseWriter, r *http.Request, what string) bool {
			for d, data := range im.Blobs {
				if what == "blobs" && strings.HasSuffix(r.URL.Path, d.String()) && len(data) > 4<<10 && r.Method == http.MethodGet {
					http.Error(w, "not here", http.StatusNotFound)
					return true
				}
			}
			return false
		})
		// The own registry comes last: who has a manifest from somewhere is asked for no other.
		for _, way := range [][2]string{
			{"by name", private.Address + "/image"}, {"by digest", private.Address + "/image@" + im.Manifest.Digest.String()},
			{"by a registry of its own", mine.Address + "/image"}, {"by digest from its own", mine.Address + "/image@" + im.Manifest.Digest.String()},
		} {
			how, image := way[0], way[1]
			id := "b-" + random(t)[6:]
			_, err := p.StartBuild(ctx, &agentv1.StartBuildRequest{
				BuildId: id, Spec: agenttest.Dockerfile("FROM " + image + "\nRUN [\"/bin/busybox\", \"cat\", \"/private\"]\n"),
				Credentials: &agentv1.Credentials{Registries: map[string]*agentv1.RegistryCredential{private.Address: {Username: "user", Password: password}}},
			})
			require.NoError(t, err)
			events := agenttest.Watch(t, ctx, p, id, 0)
			result := agenttest.CheckEvents(t, events, 0)
			answer := result.GetState().String() + " " + result.GetFailure().GetMessage() + agenttest.Output(events)
			for _, unlike := range []string{private.Address, mine.Address, im.Manifest.Digest.String()} {
				answer = strings.ReplaceAll(answer, unlike, "…")
			}
			for d := range im.Blobs {
				answer = strings.ReplaceAll(answer, d.String(), "…")
			}
			both := out[how]
			both[i] = answer
			out[how] = both
		}
	}
	t.Logf("%q", out)
	return out
}

// withLayer adds a private file on top of an image.
func withLayer(t *testing.T, im hostile.Image) hostile.Image {
	t.Helper()
	var below []byte
	for _, data := range im.Blobs {
		if len(data) > len(below) {
			below = data
		}
	}
	return hostile.NewImage([][]byte{below, hostile.Tar(hostile.Plain, hostile.Entry{Type: hostile.File, Name: "private", Mode: 0o644, Body: lentCanary + strings.Repeat(random(t), 1000)})}, nil)
}
