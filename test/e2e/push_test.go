package e2e

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/bcrypt"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// startPrivateRegistry starts a registry that asks for a password, at the caller's
// address in the cluster's network.
func (in *installation) startPrivateRegistry(t *testing.T, user, password string) string {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(in.address, 0).String())
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	dir := t.TempDir()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "passwords"), fmt.Appendf(nil, "%s:%s\n", user, hash), 0o600))
	config := filepath.Join(dir, "config.yml")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: %[1]s/data}}
http: {addr: %[2]q}
auth: {htpasswd: {realm: private, path: %[1]s/passwords}}
`, dir, addr), 0o600))
	cmd := exec.Command("docker-registry", "serve", config)
	require.NoError(t, cmd.Start(), "Debian's docker-registry is missing; run `make deps`")
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		r, err := http.Get("http://" + addr + "/v2/")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusUnauthorized
	}, 10*time.Second, 20*time.Millisecond, "the registry does not answer")
	return addr
}

func testPushSecret(t *testing.T, in *installation) {
	registry := in.startPrivateRegistry(t, "pusher", "s3cret")
	secret := func(name, password string) {
		auth := base64.StdEncoding.EncodeToString([]byte("pusher:" + password))
		config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, registry, auth)
		in.kubectl(t, "create", "secret", "generic", name, "-n", namespace, "--type=kubernetes.io/dockerconfigjson", "--from-literal=.dockerconfigjson="+config)
	}
	secret("push", "s3cret")
	secret("wrong", "guess")
	output := func(secret string) string {
		return fmt.Sprintf("  output: {image: \"%s/app:1\", insecure: true, pushSecret: {name: %s}}\n", registry, secret)
	}
	b := in.succeeds(t, "pushed", output("push")+in.inline("true"))
	require.Regexp(t, "^sha256:[0-9a-f]{64}$", b.Status.Output.Digest)
	out, err := exec.Command("skopeo", "inspect", "--tls-verify=false", "--creds", "pusher:s3cret", "--format", "{{.Digest}}",
		"docker://"+registry+"/app@"+b.Status.Output.Digest).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), b.Status.Output.Digest)

	b = in.fails(t, "push-refused", output("wrong")+in.inline("true"))
	require.Equal(t, buildv1.ReasonPushFailed, b.Status.FailureDetails.Reason, explanation(b))
	require.NotContains(t, explanation(b), "guess")
}
