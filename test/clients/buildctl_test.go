package clients

import (
	"archive/tar"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// solve builds a directory with buildctl.
func (a *agent) solve(dir, toolsDir string, args ...string) string {
	a.t.Helper()
	all := []string{"build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir,
		"--local", "tools=" + toolsDir, "--opt", "context:tools=local:tools"}
	return a.buildctl(append(all, args...)...)
}

func TestBuildctlBuilds(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, a *agent) {
		box := tools(t)
		secret := filepath.Join(t.TempDir(), "secret")
		require.NoError(t, os.WriteFile(secret, []byte("hunter2"), 0o600))
		dir := contextDir(t, base+`ARG WHO
RUN --mount=type=secret,id=s --mount=type=cache,target=/cache \
    test "$(cat /run/secrets/s)" = hunter2 && echo x >> /cache/n && wc -l < /cache/n > /count && echo "hello $WHO" > /greeting
`, nil)
		out := filepath.Join(t.TempDir(), "out")
		opts := []string{"--secret", "id=s,src=" + secret, "--opt", "build-arg:WHO=there", "--output", "type=local,dest=" + out}
		a.solve(dir, box, opts...)
		require.Equal(t, "hello there", read(t, out, "greeting"))
		require.Equal(t, "1", read(t, out, "count"))
		log := a.solve(dir, box, opts...)
		require.Contains(t, log, "CACHED")
		log = a.solve(dir, box, append(opts, "--opt", "build-arg:WHO=again")...)
		require.Contains(t, log, "CACHED", "what does not need the argument")
		require.Equal(t, "hello again", read(t, out, "greeting"))
		require.Equal(t, "2", read(t, out, "count"), "the cache mount outlives a build")

		archive := filepath.Join(t.TempDir(), "out.tar")
		a.solve(dir, box, "--secret", "id=s,src="+secret, "--opt", "build-arg:WHO=there", "--output", "type=tar,dest="+archive)
		require.Contains(t, names(t, archive), "greeting")
		layout := filepath.Join(t.TempDir(), "layout")
		a.solve(dir, box, "--secret", "id=s,src="+secret, "--opt", "build-arg:WHO=there", "--output", "type=oci,tar=false,dest="+layout)
		var index struct{ Manifests []struct{ Digest string } }
		readJSON(t, &index, layout, "index.json")
		require.Len(t, index.Manifests, 1)
	})
}

// names lists a tar archive.
func names(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	var out []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(t, err)
		out = append(out, h.Name)
	}
}

func TestBuildctlSeesAndPrunesTheCache(t *testing.T) {
	a := startAgent(t, "userns", "")
	box := tools(t)
	dir := contextDir(t, base+"RUN echo x > /x\n", nil)
	a.solve(dir, box)
	require.Contains(t, a.buildctl("debug", "workers", "-v"), "userns")
	require.Contains(t, a.buildctl("du", "-v"), "echo x")
	require.Contains(t, a.buildctl("debug", "histories"), "COMPLETE")
	a.buildctl("prune", "--all")
	require.NotContains(t, a.buildctl("du", "-v"), "echo x")
	require.NotContains(t, a.solve(dir, box), "CACHED")
}

func TestWhatTheSandboxForbidsIsRefused(t *testing.T) {
	a := startAgent(t, "userns", "")
	box := tools(t)
	for name, c := range map[string]struct {
		dockerfile, want string
		args             []string
	}{
		"privileged step":       {"RUN --security=insecure true\n", "security.insecure is not allowed", nil},
		"entitlement":           {"RUN true\n", "security.insecure", []string{"--allow", "security.insecure"}},
		"the node's network":    {"RUN --network=host true\n", "network.host is not allowed", nil},
		"network entitlement":   {"RUN true\n", "network.host", []string{"--allow", "network.host"}},
		"device":                {"RUN --device=vendor.com/gpu=all,required true\n", "device", nil},
		"front end of an image": {"", "is not allowed", []string{"--frontend", "gateway.v0", "--opt", "source=evil.example/frontend"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := contextDir(t, "# syntax=docker/dockerfile:1-labs\n"+base+c.dockerfile, nil)
			args := []string{"--addr", "unix://" + a.socket, "build", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir,
				"--local", "tools=" + box, "--opt", "context:tools=local:tools"}
			r := a.run(nil, "buildctl", append(args, c.args...)...)
			require.NotZero(t, r.code, r.out)
			require.Contains(t, r.out, c.want)
		})
	}
	a.solve(contextDir(t, base+"RUN true\n", nil), box) // it is as well as before
}

func TestSSHKeysReachAStep(t *testing.T) {
	inEachSandbox(t, func(t *testing.T, a *agent) {
		ask := filepath.Join(t.TempDir(), "sshask")
		cmd := exec.Command("go", "build", "-o", ask, "../integration/testdata/sshask")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		text, err := cmd.CombinedOutput()
		require.NoError(t, err, string(text))
		program, err := os.ReadFile(ask)
		require.NoError(t, err)
		dir := contextDir(t, base+"COPY --chmod=755 ask /ask\nRUN --mount=type=ssh /ask > /keys\n", map[string]string{"ask": string(program)})
		out := filepath.Join(t.TempDir(), "out")
		a.solve(dir, tools(t), "--ssh", "default="+privateKey(t), "--output", "type=local,dest="+out)
		require.Regexp(t, "^[0-9a-f]{8}0c00000001$", read(t, out, "keys"), "the agent's answer that it has one key")
	})
}

// privateKey returns a file with a new key.
func privateKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return file
}
