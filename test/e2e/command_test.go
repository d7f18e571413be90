package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// testCommand uses the kiln command as its users do: it has nothing but the
// kubeconfig.
func testCommand(t *testing.T, in *installation) {
	dir := t.TempDir()
	write := func(name, content string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
	write("file", "from-my-machine")
	write("not-sent", "x")
	write(".dockerignore", "not-sent\n")
	write("Dockerfile", in.dockerfile("grep from-my-machine /src/file && test ! -e /src/not-sent && echo it-is-built"))
	image := in.SecureRegistry() + "/team-a/submitted:1"
	out, progress, err := in.kiln("submit", "-n", namespace, "--progress", "plain", "-t", image, "--name", "submitted", dir)
	require.NoError(t, err, progress)
	require.Regexp(t, "^"+image+"@sha256:[0-9a-f]{64}$", out)
	require.Contains(t, progress, "it-is-built")

	out, _, err = in.kiln("ps", "-n", namespace)
	require.NoError(t, err)
	require.Regexp(t, `(?m)^submitted +Succeeded`, out)
	_, progress, err = in.kiln("logs", "-n", namespace, "submitted")
	require.NoError(t, err)
	require.Contains(t, progress, "it-is-built", "a build that has ended still has its log")

	write("Dockerfile", in.dockerfile("echo the-reason >&2; exit 4"))
	_, progress, err = in.kiln("submit", "-n", namespace, "--progress", "plain", "--name", "submit-fails", dir)
	exit := &exec.ExitError{}
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 1, exit.ExitCode(), progress)
	require.Contains(t, progress, "the-reason")
	require.Contains(t, progress, "StepFailed")

	// Following starts again where the build is, and cancel ends it.
	write("Dockerfile", in.dockerfile("echo it-runs; sleep 300"))
	out, progress, err = in.kiln("submit", "-n", namespace, "--detach", "--name", "detached", dir)
	require.NoError(t, err, progress)
	require.Equal(t, "detached", out)
	in.running(t, "detached")
	followed := make(chan string)
	go func() {
		_, progress, _ := in.kiln("logs", "-f", "-n", namespace, "detached")
		followed <- progress
	}()
	out, progress, err = in.kiln("cancel", "-n", namespace, "detached")
	require.NoError(t, err, progress)
	require.Equal(t, "detached", out)
	select {
	case text := <-followed:
		require.Contains(t, text, "cancelled")
	case <-time.After(time.Minute):
		t.Fatal("kiln logs -f does not end")
	}
	require.Equal(t, buildv1.PhaseCancelled, in.ended(t, "detached").Status.Phase)

	// Somebody with the role edit in a namespace may do the same there, and not elsewhere.
	in.kubectl(t, "create", "serviceaccount", "dev", "-n", namespace)
	in.kubectl(t, "create", "rolebinding", "dev", "-n", namespace, "--clusterrole=edit", "--serviceaccount="+namespace+":dev")
	config := in.userConfig(t, "dev")
	write("Dockerfile", in.dockerfile("true"))
	_, progress, err = in.kiln("submit", "--kubeconfig", config, "-n", namespace, "--name", "by-dev", dir)
	require.NoError(t, err, progress)
	_, progress, err = in.kiln("submit", "--kubeconfig", config, "-n", "default", "--name", "by-dev", dir)
	require.Error(t, err)
	require.Contains(t, progress, "forbidden")
	_, progress, err = in.kiln("logs", "--kubeconfig", config, "-n", restricted, "allowed")
	require.Error(t, err)
	require.Contains(t, progress, "forbidden")
}

// userConfig returns a kubeconfig of a ServiceAccount.
func (in *installation) userConfig(t *testing.T, account string) string {
	t.Helper()
	return in.userConfigAt(t, account, in.server(t))
}

// server is the URL of the API server.
func (in *installation) server(t *testing.T) string {
	t.Helper()
	config, err := in.RESTConfig()
	require.NoError(t, err)
	return config.Host
}

// userConfigAt returns a kubeconfig of a ServiceAccount for an address of the API server.
func (in *installation) userConfigAt(t *testing.T, account, server string) string {
	t.Helper()
	token := in.kubectl(t, "create", "token", account, "-n", namespace)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	require.NoError(t, os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: %q}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, server, in.CAFile(), token), 0o600))
	return file
}
