package cluster

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
		Secrets: []string{"id=npm,secret=tokens", "id=a,secret=b,key=c"}, CPU: "500m", Memory: "1Gi", Disk: "10Gi", PIDs: "500", Shm: "128Mi", Ulimits: []string{"nofile=4096:4096"}, StepTimeout: metav1.Duration{Duration: time.Minute}, Network: "none", RuntimeClass: "gvisor",
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
	for name, want := range map[corev1.ResourceName]int64{
		corev1.ResourceEphemeralStorage: 10 << 30, buildv1.ResourcePIDs: 500, buildv1.ResourceShm: 128 << 20, buildv1.ResourceOpenFiles: 4096,
	} {
		q := b.Spec.Resources.Limits[name]
		require.Equal(t, want, q.Value(), name)
	}
	require.Equal(t, time.Minute, b.Spec.StepTimeout.Duration)
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
		"no processes":        {Request{Context: dir, PIDs: "-1"}, "--pids-limit -1: want more than 0"},
		"other ulimit":        {Request{Context: dir, Ulimits: []string{"nproc=5"}}, `--ulimit nproc=5: a Build has no limit "nproc"`},
		"two limits of files": {Request{Context: dir, Ulimits: []string{"nofile=5:6"}}, "--ulimit nofile=5:6: a Build has one limit"},
		"ulimit of nothing":   {Request{Context: dir, Ulimits: []string{"nofile"}}, "--ulimit nofile: want nofile=NUMBER"},
		"node without tag":    {Request{Context: dir, Node: true}, "--tag"},
		"nowhere":             {Request{Context: dir, Tags: []string{"a"}, NoPush: true}, "--no-push"},
	} {
		_, _, err := c.req.Build()
		require.ErrorContains(t, err, c.want, name)
		require.NotContains(t, err.Error(), "pass@", name)
	}
}
