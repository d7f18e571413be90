package controller

import (
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/agenttwin"
)

func TestBuildRunsOnANodeAndEndsWithItsResult(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	b := newBuild(namespace(t, nil), "app", "ok")
	b.Spec.Source = &v1alpha1.Source{Git: &v1alpha1.GitSource{URL: "https://git.example.com/app.git", Revision: "main"}}
	b.Spec.Strategy = v1alpha1.Strategy{}
	create(t, b)
	got := await(t, b, v1alpha1.ReasonSucceeded)
	require.Equal(t, metav1.ConditionTrue, condition(got).Status)
	s := got.Status
	require.Equal(t, v1alpha1.PhaseSucceeded, s.Phase)
	require.Equal(t, "node-1", s.Node)
	require.Equal(t, "gvisor", s.Sandbox)
	require.Equal(t, string(got.UID), s.BuildID)
	require.Equal(t, agenttwin.Digest, s.Output.Digest)
	require.Equal(t, "5891b5b522d5", s.Output.ShortDigest)
	require.Equal(t, []string{"registry.example.com/team/app:1"}, s.Output.Names)
	require.Equal(t, "0123456789abcdef0123456789abcdef01234567", s.Source.Git.Revision)
	require.Len(t, s.Steps, 1)
	require.NotNil(t, s.Steps[0].DurationMilliseconds)
	require.NotNil(t, s.StartTime)
	require.NotNil(t, s.CompletionTime)
	require.NotEmpty(t, s.Duration)
	started, _ := twin.Build(s.BuildID)
	require.Equal(t, got.Namespace, started.Tenant)
	require.Equal(t, "git:https://git.example.com/app.git#", started.Spec.CacheScope)
	require.Eventually(t, func() bool { return len(get(t, b).Finalizers) == 0 }, waitLong, waitShort)
}
