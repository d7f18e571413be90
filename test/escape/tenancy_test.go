package escape

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// cacheable is a base whose steps are found in caches again: a directory that a client
// sends is not, but what is copied from it.
const cacheable = "FROM scratch\nENV PATH=/bin\nCOPY --from=tools / /\n"

const scope = "the tenant's own engine: the attacker is of the same tenant"

var _ = register(
	entry{
		ID: "tenancy/proxy-arguments", Threat: "A tenant runs a step of another's Dockerfile first, with a proxy of its own, which is in no key of the step cache.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.NotContains(t, poison(t, e, attacker), "http://evil.example") },
		Without:  scope,
		Off:      func(t *testing.T, e *env) bool { return strings.Contains(poison(t, e, victim), "http://evil.example") },
	},
	entry{
		ID: "tenancy/cache-mounts", Threat: "A tenant puts files into a cache mount that another names the same.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.NotContains(t, poisonCache(t, e, attacker), "poisoned") },
		Without:  scope,
		Off:      func(t *testing.T, e *env) bool { return strings.Contains(poisonCache(t, e, victim), "poisoned") },
	},
	entry{
		ID: "tenancy/cache-import", Threat: "A tenant imports a cache that names layers of another by their digests, without having their bytes.",
		Severity: reachesTenant,
		Test: func(t *testing.T, e *env) {
			want, got := importCache(t, e, false)
			require.NotEmpty(t, want)
			require.NotEqual(t, want, got)
		},
		Without: "having to bring the bytes: the import has them",
		Off: func(t *testing.T, e *env) bool {
			want, got := importCache(t, e, true)
			return want == got
		},
	},
	entry{
		ID: "tenancy/blobs", Threat: "A tenant asks the store by digest for what another has built or pulled, or whether it is there.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.Zero(t, askForBlobs(t, e, attacker)) },
		Without:  scope,
		Off:      func(t *testing.T, e *env) bool { return askForBlobs(t, e, victim) > 0 },
	},
	entry{
		ID: "tenancy/sessions", Threat: "A tenant names the session of another's client, to read its files and get its secrets.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.False(t, useSession(t, e, attacker)) },
		Without:  scope,
		Off:      func(t *testing.T, e *env) bool { return useSession(t, e, victim) },
	},
	entry{
		ID: "tenancy/image-names", Threat: "A tenant gives an image the name of another's, or takes the other's image by its name.",
		Severity: reachesTenant,
		Test: func(t *testing.T, e *env) {
			name := nameImage(t, e)
			require.False(t, hasImage(t, e, attacker, name))
		},
		Without: scope,
		Off: func(t *testing.T, e *env) bool {
			name := nameImage(t, e)
			return hasImage(t, e, victim, name)
		},
	},
	entry{
		ID: "tenancy/weaker-sandbox", Threat: "What a step wrote in a weaker class of sandbox is the cached result of it in a stronger one.",
		Severity: reachesTenant, Once: "it is about both classes",
		Test: func(t *testing.T, e *env) {
			unique := random(t)
			require.NotEqual(t, runID(t, &env{e.world, sandbox.Userns}, unique), runID(t, &env{e.world, sandbox.GVisor}, unique))
		},
		Without: "an engine for each class: both are of one",
		Off: func(t *testing.T, e *env) bool {
			unique := random(t)
			first := runID(t, e, unique)
			return first == runID(t, e, unique)
		},
	},
	entry{
		ID: "tenancy/builds-of-others", Threat: "A tenant reads, watches, cancels or lists a build of another's by its ID.",
		Severity: reachesTenant, Once: "it is the agent's API; no step runs",
		Test: func(t *testing.T, e *env) {
			id := e.victimsBuild(t)
			seen, errs := callsAbout(t, e, attacker, id)
			require.False(t, seen)
			for _, err := range errs {
				require.Contains(t, []codes.Code{codes.NotFound, codes.PermissionDenied}, status.Code(err), "%v", err)
			}
		},
		Without: "the caller's identity: the controller's is taken",
		Off: func(t *testing.T, e *env) bool {
			id := e.victimsBuild(t)
			seen, _ := callsAbout(t, e, "controller", id)
			return seen
		},
	},
	entry{
		ID: "tenancy/uploads", Threat: "A tenant builds the source that another has uploaded, which it names by its digest.",
		Severity: reachesTenant, Once: "it is the agent's API; no step runs",
		Test: func(t *testing.T, e *env) {
			require.Equal(t, codes.FailedPrecondition, status.Code(buildUpload(t, e, attacker)))
		},
		Without: scope, Off: func(t *testing.T, e *env) bool { return buildUpload(t, e, victim) == nil },
	},
	entry{
		ID: "tenancy/history", Threat: "A tenant lists the builds of another, with their Dockerfiles, by BuildKit's history.",
		Severity: reachesTenant,
		Test:     func(t *testing.T, e *env) { require.False(t, inHistory(t, e, attacker)) },
		Without:  scope, Off: func(t *testing.T, e *env) bool { return inHistory(t, e, victim) },
	},
)

// poison has a tenant run a step before the victim does, and returns what the victim
// gets.
func poison(t *testing.T, e *env, who string) string {
	t.Helper()
	file := cacheable + "RUN : " + random(t) + "; echo $HTTP_PROXY > /from\n"
	e.MustBuild(t, build{Tenant: who, Dockerfile: file, Args: map[string]string{"HTTP_PROXY": "http://evil.example"}})
	return e.MustBuild(t, build{Tenant: victim, Dockerfile: file, Args: map[string]string{"HTTP_PROXY": "http://good.example"}}).Read(t, "from")
}

func poisonCache(t *testing.T, e *env, who string) string {
	t.Helper()
	mount := "FROM tools\nRUN --mount=type=cache,id=shared-" + random(t) + ",sharing=shared,target=/c "
	e.MustBuild(t, build{Tenant: who, Dockerfile: mount + "echo poisoned > /c/file\n", NoExport: true})
	return e.MustBuild(t, build{Tenant: victim, Dockerfile: mount + "cat /c/file > /found; true\n"}).Read(t, "found")
}

// importCache has the victim export its cache, and the attacker import it, with its
// layers or without. It returns what a step of random output gave to each.
func importCache(t *testing.T, e *env, layers bool) (want, got string) {
	t.Helper()
	file := cacheable + "RUN : " + random(t) + "; head -c 16 /dev/urandom | hexdump -C > /random\n"
	dir := filepath.Join(e.dir(t), "cache")
	want = e.MustBuild(t, build{Tenant: victim, Dockerfile: file, Change: func(o *client.SolveOpt) {
		o.CacheExports = []client.CacheOptionsEntry{{Type: "local", Attrs: map[string]string{"dest": dir, "mode": "max"}}}
	}}).Read(t, "random")
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	require.NoError(t, err)
	for _, b := range blobs {
		data, err := os.ReadFile(b)
		require.NoError(t, err)
		if !layers && !strings.HasPrefix(string(data), "{") {
			require.NoError(t, os.Remove(b))
		}
	}
	r := e.Build(t, build{Dockerfile: file, Change: func(o *client.SolveOpt) {
		o.CacheImports = []client.CacheOptionsEntry{{Type: "local", Attrs: map[string]string{"src": dir}}}
	}})
	if r.Err != nil {
		return want, ""
	}
	return want, r.Read(t, "random")
}

// askForBlobs tells how many of the victim's blobs a tenant gets to know.
func askForBlobs(t *testing.T, e *env, who string) int {
	t.Helper()
	dir := filepath.Join(e.dir(t), "cache")
	e.MustBuild(t, build{Tenant: victim, Dockerfile: cacheable + "RUN echo " + random(t) + " > /random\n", NoExport: true, Change: func(o *client.SolveOpt) {
		o.CacheExports = []client.CacheOptionsEntry{{Type: "local", Attrs: map[string]string{"dest": dir, "mode": "max"}}}
	}})
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	require.NoError(t, err)
	require.NotEmpty(t, blobs)
	found := 0
	e.clientOf(t, who, func(ctx context.Context, c *client.Client) {
		for _, b := range blobs {
			_, err := c.ContentClient().Info(ctx, &contentapi.InfoRequest{Digest: "sha256:" + filepath.Base(b)})
			if err == nil {
				found++
			}
		}
	})
	return found
}

// useSession has the victim's client offer a directory in a session, and tells whether
// a build of a tenant gets it.
func useSession(t *testing.T, e *env, who string) bool {
	t.Helper()
	secret := e.dir(t)
	require.NoError(t, os.WriteFile(filepath.Join(secret, "file"), []byte("of the victim"), 0o600))
	files, err := fsutil.NewFS(secret)
	require.NoError(t, err)
	got := false
	e.clientOf(t, victim, func(ctx context.Context, c *client.Client) {
		s, err := session.NewSession(ctx, "")
		require.NoError(t, err)
		s.Allow(filesync.NewFSSyncProvider(filesync.StaticDirSource{"private": files}))
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx, c.Dialer()) }()
		defer func() {
			require.NoError(t, s.Close())
			<-ran
		}()
		def, err := llb.Local("private", llb.SessionID(s.ID()), llb.SharedKeyHint(random(t))).Marshal(ctx)
		require.NoError(t, err)
		short, cancel := context.WithTimeout(ctx, 8*time.Second)
		defer cancel()
		r := e.BuildContext(t, short, build{Tenant: who, LLB: def, Contexts: map[string]string{"private": e.dir(t)}})
		got = r.Err == nil && r.Read(t, "file") == "of the victim"
	})
	return got
}

// nameImage has the victim make an image with a name of its own.
func nameImage(t *testing.T, e *env) string {
	t.Helper()
	name := "registry.example/" + random(t) + ":1"
	e.MustBuild(t, build{Tenant: victim, Dockerfile: "FROM tools\n", Change: func(o *client.SolveOpt) {
		o.Exports = []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": name}}}
	}})
	return name
}

func hasImage(t *testing.T, e *env, who, name string) bool {
	t.Helper()
	eng, release, err := e.Node.Engine(t.Context(), engine.Domain{Tenant: who, Sandbox: e.Class})
	require.NoError(t, err)
	defer release()
	_, _, err = eng.Image(t.Context(), name)
	return err == nil
}

func runID(t *testing.T, e *env, unique string) string {
	t.Helper()
	return e.MustBuild(t, build{Dockerfile: cacheable + "RUN : " + unique + "; head -c 16 /dev/urandom | hexdump -C > /id\n"}).Read(t, "id")
}

// victimsBuild is a build of the victim's by the agent's API.
func (e *env) victimsBuild(t *testing.T) string {
	t.Helper()
	ctx := agenttest.Context(t, victim)
	id := "build-" + random(t)[:20]
	_, err := e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: agenttest.Dockerfile("FROM scratch\nLABEL a=b\n")})
	require.NoError(t, err)
	agenttest.Watch(t, ctx, e.Agent, id, 0)
	return id
}

// callsAbout makes every call about a build, and tells whether one showed it.
func callsAbout(t *testing.T, e *env, who, id string) (seen bool, errs []error) {
	t.Helper()
	ctx := agenttest.Context(t, who)
	tenant := ""
	if who == "controller" {
		tenant = victim
	}
	_, err := e.Agent.GetBuild(ctx, &agentv1.GetBuildRequest{BuildId: id, Tenant: tenant})
	seen = err == nil
	errs = append(errs, err)
	stream, err := e.Agent.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: id, Tenant: tenant})
	require.NoError(t, err)
	_, err = stream.Recv()
	seen = seen || err == nil
	errs = append(errs, err)
	_, err = e.Agent.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id, Tenant: tenant})
	errs = append(errs, err)
	list, err := e.Agent.ListBuilds(ctx, &agentv1.ListBuildsRequest{Tenant: tenant})
	require.NoError(t, err)
	for _, b := range list.GetBuilds() {
		seen = seen || b.GetBuildId() == id
	}
	return seen, errs
}

func buildUpload(t *testing.T, e *env, who string) error {
	t.Helper()
	data := agenttest.BusyboxTar(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY Dockerfile /" + random(t) + "\n"})
	digest := agenttest.SendAll(t, agenttest.Context(t, victim), e.Agent, data)
	ctx, id := agenttest.Context(t, who), "upload-"+random(t)[:20]
	_, err := e.Agent.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: agenttest.Uploaded(digest)})
	if err == nil {
		agenttest.Watch(t, ctx, e.Agent, id, 0)
	}
	return err
}

// inHistory tells whether a tenant's history has a build of the victim's.
func inHistory(t *testing.T, e *env, who string) bool {
	t.Helper()
	mark := random(t)
	e.MustBuild(t, build{Tenant: victim, Dockerfile: "FROM scratch\nLABEL a=" + mark + "\n", Attrs: map[string]string{"label:mark": mark}, NoExport: true})
	found := false
	e.clientOf(t, who, func(ctx context.Context, c *client.Client) {
		found = strings.Contains(historyOf(t, ctx, c), mark)
	})
	return found
}
