package cluster

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

func TestContextBecomesSource(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		context string
		want    buildv1.Source
		dir     string
	}{
		"directory":   {dir, buildv1.Source{Upload: &buildv1.UploadSource{}}, dir},
		"git https":   {"https://git.example/a/b.git", buildv1.Source{Git: &buildv1.GitSource{URL: "https://git.example/a/b.git"}}, ""},
		"git at ref":  {"https://git.example/a/b.git#v1:sub/dir", buildv1.Source{Git: &buildv1.GitSource{URL: "https://git.example/a/b.git", Revision: "v1"}, ContextDir: "sub/dir"}, ""},
		"git ssh":     {"git@git.example:a/b.git#main", buildv1.Source{Git: &buildv1.GitSource{URL: "git@git.example:a/b.git", Revision: "main"}}, ""},
		"archive URL": {"https://files.example/src.tar.gz", buildv1.Source{HTTP: &buildv1.HTTPSource{URL: "https://files.example/src.tar.gz"}}, ""},
	} {
		b, gotDir, err := (&Request{Context: c.context}).Build()
		require.NoError(t, err, name)
		require.Equal(t, c.want, *b.Spec.Source, name)
		require.Equal(t, c.dir, gotDir, name)
	}
}

func TestRequestBecomesBuild(t *testing.T) {
	b, _, err := (&Request{
		Context: t.TempDir(), Name: "x", Tags: []string{"r.example/a:1", "r.example/a:2"}, PushSecret: "push", Node: true,
		Secrets: []string{"id=npm,secret=tokens", "id=a,secret=b,key=c"}, CPU: "500m", Memory: "1Gi", Network: "none", RuntimeClass: "gvisor",
		Target: "t", Dockerfile: "d/Dockerfile", BuildArgs: map[string]string{"A": "1"},
	}).Build()
	require.NoError(t, err)
	require.Equal(t, "x", b.Name)
	require.Empty(t, b.GenerateName)
	require.Equal(t, "r.example/a:1", b.Spec.Output.Image)
	require.Equal(t, []string{"r.example/a:2"}, b.Spec.Output.AdditionalImages)
	require.True(t, *b.Spec.Output.Push)
	require.True(t, b.Spec.Output.Node)
	require.Equal(t, "push", b.Spec.Output.PushSecret.Name)
	require.Equal(t, []buildv1.BuildSecret{
		{ID: "npm", SecretRef: buildv1.KeyReference{Name: "tokens", Key: "npm"}},
		{ID: "a", SecretRef: buildv1.KeyReference{Name: "b", Key: "c"}},
	}, b.Spec.Secrets)
	require.Equal(t, "500m", b.Spec.Resources.Limits.Cpu().String())
	require.Equal(t, int64(1<<30), b.Spec.Resources.Limits.Memory().Value())
	require.NotContains(t, b.Spec.Resources.Limits, corev1.ResourceStorage)
	require.Equal(t, buildv1.NetworkNone, *b.Spec.Network)
	require.Equal(t, "gvisor", *b.Spec.RuntimeClassName)
	require.Equal(t, "d/Dockerfile", b.Spec.Strategy.Dockerfile.Path)
}

func TestRequestIsRefused(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		req  Request
		want string
	}{
		"no such context":     {Request{Context: "/does/not/exist"}, "/does/not/exist"},
		"credentials are hid": {Request{Context: "ftp://u:pass@h/x"}, "xxxxx"},
		"secret without name": {Request{Context: dir, Secrets: []string{"id=a"}}, "--secret"},
		"secret field":        {Request{Context: dir, Secrets: []string{"id=a,src=f"}}, `"src"`},
		"network":             {Request{Context: dir, Network: "host"}, "--network host"},
		"memory":              {Request{Context: dir, Memory: "lots"}, "--memory lots"},
		"node without tag":    {Request{Context: dir, Node: true}, "--tag"},
		"nowhere":             {Request{Context: dir, Tags: []string{"a"}, NoPush: true}, "--no-push"},
	} {
		_, _, err := c.req.Build()
		require.ErrorContains(t, err, c.want, name)
		require.NotContains(t, err.Error(), "pass@", name)
	}
}
