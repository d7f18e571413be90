package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/test/registry"
)

func testPushSecret(t *testing.T, in *installation) {
	addr := registry.Start(t, registry.Config{Host: in.address.String(), User: "pusher", Password: "s3cret"})
	secret := func(name, password string) {
		auth := base64.StdEncoding.EncodeToString([]byte("pusher:" + password))
		config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, addr, auth)
		in.kubectl(t, "create", "secret", "generic", name, "-n", namespace, "--type=kubernetes.io/dockerconfigjson", "--from-literal=.dockerconfigjson="+config)
	}
	secret("push", "s3cret")
	secret("wrong", "guess")
	output := func(secret string) string {
		return fmt.Sprintf("  output: {image: \"%s/app:1\", insecure: true, pushSecret: {name: %s}}\n", addr, secret)
	}
	b := in.succeeds(t, "pushed", output("push")+in.inline("true"))
	require.Regexp(t, "^sha256:[0-9a-f]{64}$", b.Status.Output.Digest)
	out, err := exec.Command("skopeo", "inspect", "--tls-verify=false", "--creds", "pusher:s3cret", "--format", "{{.Digest}}",
		"docker://"+addr+"/app@"+b.Status.Output.Digest).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), b.Status.Output.Digest)
	raw, err := exec.Command("skopeo", "inspect", "--tls-verify=false", "--creds", "pusher:s3cret", "--raw", "docker://"+addr+"/app:1").Output()
	require.NoError(t, err)
	var m ocispecs.Manifest
	require.NoError(t, json.Unmarshal(raw, &m))
	size := m.Config.Size
	for _, l := range m.Layers {
		size += l.Size
	}
	require.Equal(t, size, b.Status.Output.Size)

	b = in.fails(t, "push-refused", output("wrong")+in.inline("true"))
	require.Equal(t, buildv1.ReasonPushFailed, b.Status.FailureDetails.Reason, explanation(b))
	require.NotContains(t, explanation(b), "guess")
}
