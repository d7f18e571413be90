package inputs

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/yaml"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

func object(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "team-a", Name: name} }

func secret(name string, data map[string]string) *corev1.Secret {
	s := &corev1.Secret{ObjectMeta: object(name), Data: map[string][]byte{}}
	for k, v := range data {
		s.Data[k] = []byte(v)
	}
	return s
}

func dockerConfig(host, user, password string) string {
	return `{"auths":{"` + host + `":{"auth":"` + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + `"}}}`
}

// world is what a namespace holds, and a neighbour's that has the same names.
func world() client.Reader {
	neighbour := secret("only-neighbour", map[string]string{"k": "stolen"})
	neighbour.Namespace = "team-b"
	return fake.NewClientBuilder().WithObjects(
		neighbour,
		secret("npm", map[string]string{"token": "t0ken"}),
		secret("basic", map[string]string{"username": "u", "password": "p"}),
		secret("ssh", map[string]string{"ssh-privatekey": "PEM", "known_hosts": "hosts"}),
		secret("push", map[string]string{".dockerconfigjson": dockerConfig("https://registry.example.com", "pusher", "1")}),
		secret("pull", map[string]string{".dockerconfigjson": dockerConfig("registry.example.com", "puller", "2")}),
		secret("hub", map[string]string{".dockerconfigjson": dockerConfig("https://index.docker.io/v1/", "hub", "3:4")}),
		secret("broken", map[string]string{".dockerconfigjson": `{"auths": "canary"`}),
		&corev1.ConfigMap{ObjectMeta: object("files"), Data: map[string]string{"a.txt": "A"}, BinaryData: map[string][]byte{"b.bin": {0}}},
		&corev1.ConfigMap{ObjectMeta: object("large"), Data: map[string]string{"x": strings.Repeat("x", MaxFiles)}},
		&corev1.ServiceAccount{ObjectMeta: object("default"), ImagePullSecrets: []corev1.LocalObjectReference{{Name: "hub"}, {Name: "gone"}, {Name: "broken"}}},
	).Build()
}

func build(t *testing.T, text string) *v1alpha1.Build {
	t.Helper()
	b := &v1alpha1.Build{ObjectMeta: object("app")}
	require.NoError(t, yaml.UnmarshalStrict([]byte(text), &b.Spec))
	return b
}

func TestInputsOfABuild(t *testing.T) {
	in, err := Resolve(t.Context(), world(), build(t, `
source:
  git: {url: "https://git.example.com/a.git", secretRef: {name: ssh}}
output: {image: registry.example.com/a, pushSecret: {name: push}}
imagePullSecrets: [{name: pull}]
secrets: [{id: npm, secretRef: {name: npm, key: token}}]
strategy: {steps: {steps: [{name: a, image: b, env: [{name: T, valueFrom: {secretKeyRef: {name: npm, key: token}}}, {name: A, valueFrom: {configMapKeyRef: {name: files, key: a.txt}}}]}]}}
`))
	require.NoError(t, err)
	require.Equal(t, map[string][]byte{"npm": []byte("t0ken"), "kiln.env.npm.token": []byte("t0ken")}, in.Credentials.Secrets)
	require.Equal(t, map[v1alpha1.KeyReference]string{{Name: "files", Key: "a.txt"}: "A"}, in.Values)
	require.Equal(t, "PEM", string(in.Credentials.Git[GitCredential].SshPrivateKey))
	require.Equal(t, "hosts", string(in.Credentials.Git[GitCredential].SshKnownHosts))
	require.Len(t, in.Credentials.Registries, 2)
	require.Equal(t, "pusher", in.Credentials.Registries["registry.example.com"].Username, "the push secret counts before pull secrets")
	require.Equal(t, "3:4", in.Credentials.Registries["docker.io"].Password)
}

func TestFilesOfConfigMaps(t *testing.T) {
	in, err := Resolve(t.Context(), world(), build(t, `source: {configMaps: [{name: files}, {name: files, destinationDir: sub/dir}]}`))
	require.NoError(t, err)
	var paths []string
	for _, f := range in.Files {
		paths = append(paths, f.Path)
	}
	require.Equal(t, []string{"a.txt", "b.bin", "sub/dir/a.txt", "sub/dir/b.bin"}, paths)
}

func TestMissingInputsAreNamed(t *testing.T) {
	for spec, want := range map[string]string{
		`secrets: [{id: a, secretRef: {name: none, key: k}}]`:                         `spec.secrets[0].secretRef.name: Secret "none" does not exist`,
		`secrets: [{id: a, secretRef: {name: npm, key: k}}]`:                          `spec.secrets[0].secretRef.key: key "k" of Secret "npm" does not exist`,
		`secrets: [{id: a, secretRef: {name: only-neighbour, key: k}}]`:               `spec.secrets[0].secretRef.name: Secret "only-neighbour" does not exist`,
		`buildArgs: [{name: A, valueFrom: {configMapKeyRef: {name: none, key: k}}}]`:  `spec.buildArgs[0].valueFrom.configMapKeyRef.name: ConfigMap "none" does not exist`,
		`buildArgs: [{name: A, valueFrom: {configMapKeyRef: {name: files, key: k}}}]`: `spec.buildArgs[0].valueFrom.configMapKeyRef.key: key "k" of ConfigMap "files" does not exist`,
		`source: {git: {url: x, secretRef: {name: none}}}`:                            `spec.source.git.secretRef.name: Secret "none" does not exist`,
		`source: {configMaps: [{name: files}, {name: none}]}`:                         `spec.source.configMaps[1].name: ConfigMap "none" does not exist`,
		`output: {image: a, pushSecret: {name: none}}`:                                `spec.output.pushSecret.name: Secret "none" does not exist`,
		`imagePullSecrets: [{name: none}]`:                                            `spec.imagePullSecrets[0].name: Secret "none" does not exist`,
		`serviceAccountName: none`:                                                    `spec.serviceAccountName: ServiceAccount "none" does not exist`,
	} {
		_, err := Resolve(t.Context(), world(), build(t, spec))
		var missing *Missing
		require.ErrorAs(t, err, &missing, spec)
		require.EqualError(t, err, want)
	}
}

func TestUnusableInputsAreNamedWithoutTheirValues(t *testing.T) {
	for spec, want := range map[string]string{
		`source: {git: {url: x, secretRef: {name: npm}}}`:                        `spec.source.git.secretRef: Secret "npm" has neither`,
		`source: {configMaps: [{name: large}], inline: [{path: a, content: x}]}`: `spec.source: inline files and ConfigMaps have 1048577 bytes`,
		`output: {image: a, pushSecret: {name: npm}}`:                            `spec.output.pushSecret: Secret "npm": has no key ".dockerconfigjson"`,
		`imagePullSecrets: [{name: broken}]`:                                     `spec.imagePullSecrets[0]: Secret "broken": is not a Docker configuration`,
	} {
		_, err := Resolve(t.Context(), world(), build(t, spec))
		var invalid *Invalid
		require.ErrorAs(t, err, &invalid, spec)
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "canary")
		require.NotContains(t, err.Error(), "t0ken")
	}
}

// refusing is an API server that answers nothing.
type refusing struct{ client.Reader }

var errAway = errors.New("away")

func (refusing) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errAway
}

func TestServerThatIsAwayIsNoFaultOfTheBuild(t *testing.T) {
	_, err := Resolve(t.Context(), refusing{}, build(t, `{}`))
	require.ErrorIs(t, err, errAway)
	var missing *Missing
	var invalid *Invalid
	require.False(t, errors.As(err, &missing) || errors.As(err, &invalid))
}

func TestDockerConfig(t *testing.T) {
	got, err := ParseDockerConfig([]byte(`{"auths": {
		"ghcr.io/team": {"username": "path", "password": "1"}, "ghcr.io": {"username": "host", "password": "2"},
		"https://index.docker.io/v1/": {"identitytoken": "id"}, "https://r.example.com:5000/v2/": {"auth": "dTpw"}, "": {"username": "x"}}}`))
	require.NoError(t, err)
	require.Len(t, got, 3)
	require.Equal(t, "host", got["ghcr.io"].Username)
	require.Equal(t, "id", got["docker.io"].IdentityToken)
	require.Equal(t, "p", got["r.example.com:5000"].Password)
	for _, bad := range []string{``, `[]`, `{"auths": 1}`, `{"auths": {"a": {"auth": "%%"}}}`, `{"auths": {"a": {"auth": "bm9jb2xvbg=="}}}`} {
		_, err := ParseDockerConfig([]byte(bad))
		require.Error(t, err, bad)
	}
}

func FuzzParseDockerConfig(f *testing.F) {
	f.Add([]byte(dockerConfig("https://index.docker.io/v1/", "u", "canary")))
	f.Add([]byte(`{"auths":{"a/b":{"auth":"canary"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ParseDockerConfig(data)
		if err != nil {
			require.NotContains(t, err.Error(), "canary")
		}
		for host := range got {
			require.NotContains(t, host, "/")
			require.NotEmpty(t, host)
		}
	})
}
