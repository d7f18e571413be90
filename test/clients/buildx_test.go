package clients

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/registry"
)

func TestBuildxBuildsAndPushes(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	inEachSandbox(t, func(t *testing.T, a *agent) {
		a.useBuildx()
		require.Contains(t, a.buildx("ls"), "running")
		box := tools(t)
		secret := filepath.Join(t.TempDir(), "secret")
		require.NoError(t, os.WriteFile(secret, []byte("hunter2"), 0o600))
		dir := contextDir(t, base+`ARG WHO
COPY --from=other given /given
RUN --mount=type=secret,id=s --mount=type=cache,target=/cache \
    test "$(cat /run/secrets/s)" = hunter2 && echo "hello $WHO" > /greeting
CMD ["/bin/busybox", "cat", "/greeting"]
`, nil)
		other := contextDir(t, "", map[string]string{"given": "from a named context"})
		ref := reg + "/app-" + strings.ToLower(t.Name()[strings.LastIndex(t.Name(), "/")+1:]) + ":1"
		meta := filepath.Join(t.TempDir(), "metadata.json")
		args := []string{"build", "--progress", "plain", "--build-context", "tools=" + box, "--build-context", "other=" + other,
			"--secret", "id=s,src=" + secret, "--build-arg", "WHO=there"}
		a.buildx(append(args, "-t", ref, "--push", "--provenance", "mode=max", "--metadata-file", meta, dir)...)
		var facts map[string]any
		readJSON(t, &facts, meta)
		digest, _ := facts["containerimage.digest"].(string)
		require.NotEmpty(t, digest)
		raw, err := exec.Command("skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+reg+ref[len(reg):strings.LastIndex(ref, ":")]+"@"+digest).CombinedOutput()
		require.NoError(t, err, string(raw))
		require.Contains(t, string(raw), "attestation-manifest")
		require.NotContains(t, string(raw), "hunter2")

		out := filepath.Join(t.TempDir(), "out")
		a.buildx(append(args, "-o", "type=local,dest="+out, "--provenance=false", dir)...)
		require.Equal(t, "hello there", read(t, out, "greeting"))
		require.Equal(t, "from a named context", read(t, out, "given"))
		for kind, file := range map[string]string{"oci": "oci.tar", "docker": "docker.tar", "tar": "files.tar"} {
			file = filepath.Join(t.TempDir(), file)
			a.buildx(append(args, "-o", "type="+kind+",dest="+file, "--provenance=false", dir)...)
			want := map[string]string{"oci": "index.json", "docker": "manifest.json", "tar": "greeting"}[kind]
			require.Contains(t, names(t, file), want, kind)
		}
	})
}

func TestBuildxCacheGoesThroughTheRegistry(t *testing.T) {
	reg := registry.Start(t, registry.Config{})
	box := tools(t)
	dir := contextDir(t, base+"RUN cat /proc/sys/kernel/random/uuid > /id\n", nil)
	first, second := startAgent(t, "userns", ""), startAgent(t, "userns", "")
	ids := map[string]bool{}
	for i, a := range []*agent{first, second} {
		a.useBuildx()
		out := filepath.Join(t.TempDir(), "out")
		args := []string{"build", "--build-context", "tools=" + box, "-o", "type=local,dest=" + out}
		if i == 0 {
			args = append(args, "--cache-to", "type=registry,ref="+reg+"/cache,mode=max")
		} else {
			args = append(args, "--cache-from", "type=registry,ref="+reg+"/cache")
		}
		a.buildx(append(args, dir)...)
		ids[read(t, out, "id")] = true
	}
	require.Len(t, ids, 1, "the second agent takes the step from the cache of the first")
}

func TestBuildxMultiPlatformHistoryAndDisk(t *testing.T) {
	a := startAgent(t, "userns", "")
	a.useBuildx()
	layout := filepath.Join(t.TempDir(), "layout")
	dir := contextDir(t, "FROM scratch\nARG TARGETARCH\nCOPY file /$TARGETARCH\n", map[string]string{"file": "x"})
	a.buildx("build", "--platform", "linux/amd64,linux/arm64", "--provenance=false", "-o", "type=oci,tar=false,dest="+layout, dir)
	var index struct{ Manifests []struct{ Digest string } }
	readJSON(t, &index, layout, "index.json")
	var inner struct {
		Manifests []struct{ Platform struct{ Architecture string } }
	}
	readJSON(t, &inner, layout, "blobs", strings.Replace(index.Manifests[0].Digest, ":", "/", 1))
	require.Len(t, inner.Manifests, 2)

	require.Contains(t, a.buildx("history", "ls", "--format", "{{.Status}}"), "Completed")
	require.Contains(t, a.buildx("history", "inspect"), "linux/amd64, linux/arm64")
	require.Contains(t, a.buildx("du"), "Total")
	a.buildx("prune", "--all", "--force")
	require.Contains(t, a.buildx("du"), "0B")
	require.Contains(t, a.buildx("inspect", "--bootstrap"), "linux/amd64")
	require.Contains(t, a.buildx("build", "--call", "targets", contextDir(t, "FROM scratch AS only\nCOPY a /\n", nil)), "only (default)")
}

// TestTenantsDoNotSeeEachOther runs buildx as two users of the node.
func TestTenantsDoNotSeeEachOther(t *testing.T) {
	a := startAgent(t, "userns", `    mode: "0666"
    peers:
    - {uid: 20001, tenant: team-a}
    - {uid: 20002, tenant: team-b}
`)
	as := func(uid uint32) func(*exec.Cmd) {
		home := t.TempDir()
		require.NoError(t, os.Chown(home, int(uid), int(uid)))
		require.NoError(t, os.Chmod(filepath.Dir(home), 0o755))
		require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(home)), 0o755))
		return func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			cmd.Env = append(cmd.Env, "HOME="+home, "BUILDX_CONFIG="+home, "DOCKER_CONFIG="+home)
		}
	}
	dir, box := contextDir(t, base+"RUN --mount=type=cache,id=shared,target=/c cat /c/secret; echo team-$((41+1)) > /c/secret; cat /proc/sys/kernel/random/uuid > /id\n", nil), tools(t)
	for _, d := range []string{dir, box, filepath.Dir(dir), filepath.Dir(box), filepath.Dir(filepath.Dir(dir))} {
		require.NoError(t, os.Chmod(d, 0o755))
	}
	build := func(with func(*exec.Cmd)) string {
		r := a.run(with, "buildctl", "--addr", "unix://"+a.socket, "build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context="+dir,
			"--local", "dockerfile="+dir, "--local", "tools="+box, "--opt", "context:tools=local:tools")
		require.Zero(t, r.code, r.out)
		return r.out
	}
	teamA, teamB := as(20001), as(20002)
	require.NotContains(t, build(teamA), "team-42")
	out := build(teamB)
	require.NotContains(t, out, "CACHED", "another tenant's step is no cache hit")
	require.NotContains(t, out, "team-42", "another tenant's cache mount is not mounted")
	require.Contains(t, build(teamA), "CACHED")
	for _, with := range []func(*exec.Cmd){teamA, teamB} {
		r := a.run(with, "buildctl", "--addr", "unix://"+a.socket, "debug", "histories")
		require.Zero(t, r.code, r.out)
		require.Contains(t, r.out, "COMPLETE")
	}
	// A user that nobody listed is refused.
	r := a.run(as(20003), "buildctl", "--addr", "unix://"+a.socket, "du")
	require.NotZero(t, r.code)
	require.Contains(t, r.out, "PermissionDenied")
}
