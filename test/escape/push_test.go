package escape

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent/agenttest"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/test/registry"
)

var _ = register(
	entry{
		ID: "registry/upload-location", Severity: readsNode, Once: noStep,
		Threat: "A registry that is pushed to names another place for the blobs: the node's loopback, the metadata service, or a host that is to get the registry's credentials.",
		Test:   uploadLocation,
		Off: func(t *testing.T, e *env) bool {
			e = e.unpoliced(t)
			for _, o := range internal(t, e) {
				_ = pushingTo(t, e, o.URL).push(t, e)
				if len(o.Requests()) == 0 {
					return false
				}
			}
			return true
		},
		Without: "the policy of what the agent connects to",
	},
	entry{
		ID: "registry/insecure", Severity: readsNode, Once: noStep,
		Threat: "A build calls a registry insecure, and pushes to it, or takes or leaves a cache there, where the registry is the node's loopback or the metadata service.",
		Test: func(t *testing.T, e *env) {
			for _, o := range internal(t, e) {
				for how, r := range insecurely(t, e, o.Address) {
					require.Empty(t, o.Requests(), "%s %s: %v", how, o.URL, r.Err)
					if how != "cache-from" { // which a build goes on without
						require.ErrorContains(t, r.Err, "denied for builds", "%s %s", how, o.URL)
					}
				}
			}
			for how, r := range insecurely(t, e, registry.Start(t, registry.Config{Host: allowedLoopback})) {
				require.NoError(t, r.Err, how)
			}
		},
		Off: func(t *testing.T, e *env) bool {
			e = e.unpoliced(t)
			for _, o := range internal(t, e) {
				for range insecurely(t, e, o.Address) {
					if len(o.Requests()) == 0 {
						return false
					}
				}
			}
			return true
		},
		Without: "the policy of what the agent connects to",
	},
	entry{
		ID: "fault/push-after-cancel", Severity: reachesTenant, Once: noStep,
		Threat: "A build is cancelled while it pushes, and its image gets its name all the same.",
		Test: func(t *testing.T, e *env) {
			require.False(t, pushes(t, e, true), "the image was named after the build was cancelled")
		},
		Off: func(t *testing.T, e *env) bool { return pushes(t, e, false) }, Without: "the cancellation",
	},
)

// insecurely has a registry used in each way that a build may call insecure.
func insecurely(t *testing.T, e *env, address string) map[string]result {
	t.Helper()
	attrs := map[string]string{"ref": address + "/cache:1", "registry.insecure": "true"}
	out := map[string]result{}
	for how, change := range map[string]func(*client.SolveOpt){
		"push": func(o *client.SolveOpt) {
			o.Exports = []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": address + "/pushed:1", "push": "true", "registry.insecure": ""}}}
		},
		"cache-to": func(o *client.SolveOpt) {
			o.CacheExports = []client.CacheOptionsEntry{{Type: "registry", Attrs: attrs}}
		},
		"cache-from": func(o *client.SolveOpt) {
			o.CacheImports = []client.CacheOptionsEntry{{Type: "registry", Attrs: attrs}}
		},
	} {
		out[how] = e.Build(t, build{Dockerfile: "FROM scratch\nCOPY <<X /x\n" + random(t) + "\nX\n", Change: change})
	}
	return out
}

// pushingTo is a registry with a password that has blobs sent to another place.
func pushingTo(t *testing.T, e *env, place string) *hostileRegistry {
	t.Helper()
	return registryOf(t, e, imageOf(t, nil), func(w http.ResponseWriter, r *http.Request, what string) bool {
		switch user, password, _ := r.BasicAuth(); {
		case user != "user" || password != e.Canary:
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
		case r.Method == http.MethodPost:
			w.Header().Set("Location", place+"/upload?x=y")
			w.WriteHeader(http.StatusAccepted)
		case r.Method == http.MethodPut:
			w.WriteHeader(http.StatusCreated)
		default:
			http.Error(w, "not here", http.StatusNotFound)
		}
		return true
	})
}

// push builds an image and pushes it to the registry, whose password the build has, and
// also for every other place.
func (reg *hostileRegistry) push(t *testing.T, e *env) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lieTime)
	defer cancel()
	return e.BuildContext(t, ctx, build{
		Dockerfile: "FROM scratch\nCOPY <<X /x\n" + random(t) + "\nX\n", Session: []session.Attachable{&credentials{of: map[string]string{reg.Address: e.Canary, outsideAddress: e.Canary}}},
		Change: func(o *client.SolveOpt) {
			o.Exports = []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": reg.Address + "/pushed:1", "push": "true", "registry.insecure": "true"}}}
		},
	})
}

func uploadLocation(t *testing.T, e *env) {
	for _, o := range internal(t, e) {
		r := pushingTo(t, e, o.URL).push(t, e)
		require.Empty(t, o.Requests(), "%s: %v", o.URL, r.Err)
		require.ErrorContains(t, r.Err, "denied for builds", o.URL)
		e.CheckNode(t, r)
	}
	away := e.outsideOracle(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	reg := pushingTo(t, e, away.URL)
	r := reg.push(t, e)
	require.True(t, reg.leaked(), "the registry itself gets them")
	require.NotEmpty(t, away.Requests(), "%v", r.Err)
	require.False(t, away.leaked(), "the credentials went to another host")
	e.CheckNode(t, r)
}

// pushes has the agent push to a registry that is slow to take a blob, and tells whether
// it was sent the manifest, which makes the image be there.
func pushes(t *testing.T, e *env, cancelled bool) bool {
	t.Helper()
	var manifest atomic.Bool
	sending, release := make(chan struct{}, 16), make(chan struct{})
	reg := registryOf(t, e, imageOf(t, nil), func(w http.ResponseWriter, r *http.Request, what string) bool {
		switch {
		case r.Method == http.MethodPost:
			w.Header().Set("Location", strings.TrimSuffix(r.URL.Path, "/")+"/1")
			w.WriteHeader(http.StatusAccepted)
		case r.Method == http.MethodPut && what == "manifests":
			manifest.Store(true)
			w.WriteHeader(http.StatusCreated)
		case r.Method == http.MethodPut:
			_, _ = io.Copy(io.Discard, r.Body)
			sending <- struct{}{}
			<-release
			w.WriteHeader(http.StatusCreated)
		case what != "":
			http.Error(w, "not here", http.StatusNotFound)
		}
		return true
	})
	ctx, id := agenttest.Context(t, attacker), "push-"+random(t)[:20]
	spec := agenttest.Dockerfile("FROM scratch\nCOPY <<X /x\n" + random(t) + "\nX\n")
	spec.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: reg.Address + "/pushed:1", Insecure: true}}}}
	_, err := e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec})
	require.NoError(t, err)
	select {
	case <-sending:
	case <-time.After(buildTimeout):
		t.Fatal("it does not push")
	}
	want := agentv1.BuildState_BUILD_STATE_SUCCEEDED
	if cancelled {
		want = agentv1.BuildState_BUILD_STATE_CANCELLED
		_, err = e.Agent.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id})
		require.NoError(t, err)
	}
	close(release)
	result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, e.Agent, id, 0), 0)
	require.Equal(t, want, result.GetState(), "%v", result)
	time.Sleep(time.Second) // for what goes on behind it
	return manifest.Load()
}
