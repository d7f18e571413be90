package config

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

const head = "apiVersion: config.kiln.build/v1alpha1\nkind: ControllerConfiguration\n"

func TestFileOverDefaults(t *testing.T) {
	c, err := Decode([]byte(head + "namespace: builds\nbuilds: {nodeLossGrace: 5s}\nsandboxes: {handlers: {mine: userns}}\n"))
	require.NoError(t, err)
	require.NoError(t, c.Complete())
	require.Equal(t, "kiln-agent.builds.svc", c.Agents.ServerName)
	require.Equal(t, 5*time.Second, c.Builds.NodeLossGrace.Duration)
	require.Equal(t, 30*time.Second, c.Builds.MissingInputGrace.Duration)
	require.Equal(t, map[string]string{"mine": "userns"}, c.Sandboxes.Handlers, "a map replaces the default's")
	require.Equal(t, 7420, c.Agents.Port)
}

func TestFilesOfDeploy(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", "base", "config.yaml"))
	require.NoError(t, err)
	var m struct {
		Data map[string]string `json:"data"`
	}
	require.NoError(t, yaml.Unmarshal(data[:len(data)-len(data[indexOf(string(data), "\n---\n"):])], &m))
	c, err := Decode([]byte(m.Data["controller.yaml"]))
	require.NoError(t, err)
	require.NoError(t, c.Complete())
}

func indexOf(s, sep string) int {
	for i := range s {
		if len(s)-i >= len(sep) && s[i:i+len(sep)] == sep {
			return i
		}
	}
	return len(s)
}

func TestWrongFilesNameTheField(t *testing.T) {
	for text, want := range map[string]string{
		"": `apiVersion "config.kiln.build/v1alpha1"`,
		"kind: ControllerConfiguration\napiVersion: v1\n":                 "want \"config.kiln.build/v1alpha1\"",
		head + "agentz: {}\n":                                             `unknown field "agentz"`,
		head + "agents: {port: 1, port: 2}\n":                             `"port"`,
		head + "agents: {port: x}\n":                                      "agents.port",
		head + "agents: {port: 70000}\n":                                  "agents.port: Invalid value: 70000",
		head + "agents: {labels: {}}\n":                                   "agents.labels: Invalid value",
		head + "namespace: A_B\n":                                         "namespace: Invalid value",
		head + "builds: {retryInterval: 0s}\n":                            "builds.retryInterval",
		head + "builds: {retryInterval: 5}\n":                             "builds.retryInterval",
		head + "builds: {maxConcurrentReconciles: 0}\n":                   "builds.maxConcurrentReconciles",
		head + "sandboxes: {default: runc}\n":                             "sandboxes.default",
		head + "sandboxes: {handlers: {x: none}}\n":                       "sandboxes.handlers[x]",
		head + "leaderElection: {leaseDuration: 5s, renewDeadline: 5s}\n": "leaderElection.renewDeadline",
		head + "webhook: {address: nowhere}\n":                            "webhook.address",
		head + "subresources: {address: ':70000'}\n":                      "subresources.address",
		head + "subresources: {maxUploadBytes: -1}\n":                     "subresources.maxUploadBytes",
		head + "logging: {level: loud, format: xml}\n":                    "logging.format",
	} {
		c, err := Decode([]byte(text))
		if err == nil && text != "" {
			err = c.Complete()
		}
		if text == "" {
			require.NoError(t, err, "an empty file is the defaults")
			continue
		}
		require.ErrorContains(t, err, want, text)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(head + "builds: {nodeLossGrace: 5s}\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := Decode(data); err == nil {
			_ = c.Complete()
		}
	})
}
