package controller

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

func TestFailureOfAStepIsToldInDetail(t *testing.T) {
	runController(t, testConfig(t))
	startAgent(t, 1)
	b := create(t, newBuild(namespace(t, nil), "app", "fail"))
	got := await(t, b, v1alpha1.ReasonStepFailed)
	require.Equal(t, metav1.ConditionFalse, condition(got).Status)
	require.Equal(t, v1alpha1.PhaseFailed, got.Status.Phase)
	d := got.Status.FailureDetails
	require.Equal(t, "RUN play: exit code 3", d.Message)
	require.Equal(t, "[1/1] RUN play", d.Step)
	require.EqualValues(t, 3, *d.ExitCode)
	require.Equal(t, v1alpha1.FailureLocation{File: "Dockerfile", Line: 2}, *d.Location)
	require.Equal(t, "playing[31m\n", d.LogTail, "a terminal shall not be driven by it")
}

func TestControllerThatStartsAgainFollowsTheSameBuild(t *testing.T) {
	cfg := testConfig(t)
	first := runController(t, cfg)
	twin := startAgent(t, 1)
	b := create(t, newBuild(namespace(t, nil), "app", "hang"))
	running := await(t, b, v1alpha1.ReasonRunning)
	first.stop()
	runController(t, testConfig(t))
	patchSpec(t, b, func(b *v1alpha1.Build) { b.Spec.State = v1alpha1.StateCancelled })
	got := await(t, b, v1alpha1.ReasonCancelled)
	require.Equal(t, v1alpha1.PhaseCancelled, got.Status.Phase)
	require.Equal(t, running.Status.BuildID, got.Status.BuildID)
	require.Equal(t, 1, twin.Started())
	require.Empty(t, twin.Running())
}

func TestDeletedBuildEndsOnItsAgent(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	b := create(t, newBuild(namespace(t, nil), "app", "hang"))
	await(t, b, v1alpha1.ReasonRunning)
	require.NoError(t, api.Delete(t.Context(), b))
	require.Eventually(t, func() bool { return gone(t, b) && len(twin.Running()) == 0 }, waitLong, waitShort)
}

func TestBuildDeletedWhileItsAgentIsAwayIsSwept(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	b := create(t, newBuild(namespace(t, nil), "app", "hang"))
	id := await(t, b, v1alpha1.ReasonRunning).Status.BuildID
	twin.Pause()
	require.NoError(t, api.Delete(t.Context(), b))
	require.Eventually(t, func() bool { return gone(t, b) }, waitLong, waitShort)
	require.NoError(t, twin.Resume())
	require.Eventually(t, func() bool { return len(twin.Running()) == 0 }, waitLong, waitShort)
	build, _ := twin.Build(id)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_CANCELLED, build.State)
}

func TestAgentThatDies(t *testing.T) {
	for _, c := range []struct {
		name   string
		policy v1alpha1.NodeLossPolicy
		back   bool
	}{
		{"and comes back, build fails", v1alpha1.FailOnNodeLoss, true},
		{"and stays away, build fails", v1alpha1.FailOnNodeLoss, false},
		{"and comes back, build runs again", v1alpha1.RetryOnNodeLoss, true},
		{"and stays away, build runs again elsewhere", v1alpha1.RetryOnNodeLoss, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			runController(t, testConfig(t))
			one, two := startAgent(t, 1), startAgent(t, 2)
			b := newBuild(namespace(t, nil), "app", "hang")
			b.Spec.OnNodeLoss = c.policy
			create(t, b)
			before := await(t, b, v1alpha1.ReasonRunning)
			lost, other := one, two
			if before.Status.Node == two.Node {
				lost, other = two, one
			}
			lost.Kill()
			if c.back {
				require.NoError(t, lost.Restart())
			}
			if c.policy == v1alpha1.FailOnNodeLoss {
				got := await(t, b, v1alpha1.ReasonNodeLost)
				require.Equal(t, v1alpha1.PhaseFailed, got.Status.Phase)
				require.Contains(t, condition(got).Message, lost.Node)
				return
			}
			require.Eventually(t, func() bool {
				got := get(t, b)
				return got.Status.Retries == 1 && condition(got).Reason == v1alpha1.ReasonRunning
			}, waitLong, waitShort)
			got := get(t, b)
			require.Equal(t, string(b.UID)+"-1", got.Status.BuildID)
			if !c.back {
				require.Equal(t, other.Node, got.Status.Node)
			}
			// The second loss is the last.
			for _, twin := range []interface {
				Kill()
				Restart() error
			}{one, two} {
				twin.Kill()
				require.NoError(t, twin.Restart())
			}
			await(t, b, v1alpha1.ReasonNodeLost)
		})
	}
}

func TestAgentThatLostItsRecords(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	b := create(t, newBuild(namespace(t, nil), "app", "hang"))
	await(t, b, v1alpha1.ReasonRunning)
	twin.Kill()
	twin.Forget()
	require.NoError(t, twin.Restart())
	got := await(t, b, v1alpha1.ReasonNodeLost)
	require.Contains(t, condition(got).Message, "no longer knows")
}

func TestNodeThatRefusesIsGivenUp(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	twin.Refuse(status.Error(codes.ResourceExhausted, "the queue is full"))
	b := create(t, newBuild(namespace(t, nil), "app", "ok"))
	require.Eventually(t, func() bool {
		got := get(t, b)
		return condition(got).Reason == v1alpha1.ReasonNoNode && got.Status.Node == "" && got.Status.BuildID == ""
	}, waitLong, 10*time.Millisecond)
	twin.Refuse(nil)
	await(t, b, v1alpha1.ReasonSucceeded)
	require.Equal(t, 1, twin.Started())
}

func TestRefusalsOfAgents(t *testing.T) {
	for _, c := range []struct {
		code   codes.Code
		reason string
	}{
		{codes.InvalidArgument, v1alpha1.ReasonInvalidInput},
		{codes.PermissionDenied, v1alpha1.ReasonDenied},
	} {
		t.Run(c.code.String(), func(t *testing.T) {
			runController(t, testConfig(t))
			startAgent(t, 1).Refuse(status.Error(c.code, "spec.network: not this one"))
			b := create(t, newBuild(namespace(t, nil), "app", "ok"))
			got := await(t, b, c.reason)
			require.Equal(t, "spec.network: not this one", condition(got).Message)
		})
	}
}

func TestNoNode(t *testing.T) {
	runController(t, testConfig(t))
	ns := namespace(t, nil)
	b := create(t, newBuild(ns, "app", "ok"))
	require.Equal(t, "no node has a ready agent", condition(await(t, b, v1alpha1.ReasonNoNode)).Message)
	picky := newBuild(ns, "picky", "ok")
	picky.Spec.NodeSelector = map[string]string{"disk": "fast"}
	create(t, picky)
	startAgent(t, 1)
	await(t, b, v1alpha1.ReasonSucceeded)
	require.Eventually(t, func() bool {
		return condition(get(t, picky)).Message == "no node can take the build: node-1: it has not the label disk=fast"
	}, waitLong, waitShort)
	patchSpec(t, picky, func(b *v1alpha1.Build) { b.Spec.State = v1alpha1.StateCancelled })
	await(t, picky, v1alpha1.ReasonCancelled)
}

func TestTwoControllersAndManyBuilds(t *testing.T) {
	a := runController(t, testConfig(t))
	runController(t, testConfig(t))
	twins := []interface{ Started() int }{startAgent(t, 1), startAgent(t, 2)}
	ns := namespace(t, nil)
	const builds = 30
	for i := range builds {
		create(t, newBuild(ns, fmt.Sprintf("app-%d", i), []string{"ok", "fail"}[i%2]))
		if i == builds/2 {
			a.stop() // The leader or not: the other goes on.
		}
	}
	require.Eventually(t, func() bool {
		list := &v1alpha1.BuildList{}
		require.NoError(t, api.List(t.Context(), list, client.InNamespace(ns)))
		for i := range list.Items {
			if !list.Items[i].Ended() {
				return false
			}
		}
		return len(list.Items) == builds
	}, time.Minute, 100*time.Millisecond)
	require.Equal(t, builds, twins[0].Started()+twins[1].Started(), "each build was started once")
	require.NotZero(t, twins[0].Started())
	require.NotZero(t, twins[1].Started())
}

func TestRetention(t *testing.T) {
	runController(t, testConfig(t))
	startAgent(t, 1)
	ns := namespace(t, nil)
	short := newBuild(ns, "short", "ok")
	short.Spec.Retention = &v1alpha1.Retention{TTLAfterSucceeded: &metav1.Duration{Duration: time.Second}}
	other := newBuild(ns, "other", "fail")
	other.Spec.Retention = short.Spec.Retention
	create(t, short)
	create(t, other)
	require.Eventually(t, func() bool { return gone(t, short) }, waitLong, waitShort)
	await(t, other, v1alpha1.ReasonStepFailed)
	require.False(t, gone(t, other))
}

func TestPodOfAgentThatIsNotReadyGetsNoBuild(t *testing.T) {
	runController(t, testConfig(t))
	startAgent(t, 1)
	pod := &corev1.Pod{}
	require.NoError(t, api.Get(t.Context(), types.NamespacedName{Namespace: "kiln-system", Name: "kiln-agent-node-1"}, pod))
	setPodReady(t, pod, "127.0.77.1", corev1.ConditionFalse)
	require.Eventually(t, func() bool {
		b := create(t, newBuild(namespace(t, nil), "app", "ok"))
		return condition(await(t, b, v1alpha1.ReasonNoNode)).Message == "no node can take the build: node-1: its agent is not ready"
	}, waitLong, waitShort)
}

func gone(t *testing.T, b *v1alpha1.Build) bool {
	err := api.Get(context.WithoutCancel(t.Context()), client.ObjectKeyFromObject(b), &v1alpha1.Build{})
	return client.IgnoreNotFound(err) == nil && err != nil
}

func patchSpec(t *testing.T, b *v1alpha1.Build, change func(*v1alpha1.Build)) {
	t.Helper()
	before := get(t, b)
	after := before.DeepCopy()
	change(after)
	require.NoError(t, api.Patch(t.Context(), after, client.MergeFrom(before)))
}

func TestInputThatGoesAwayBetweenPlacementAndStart(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	twin.Refuse(status.Error(codes.Unavailable, "not now"))
	ns := namespace(t, nil)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "s"}, StringData: map[string]string{"k": "v"}}
	require.NoError(t, api.Create(t.Context(), secret))
	b := newBuild(ns, "app", "ok")
	b.Spec.Secrets = []v1alpha1.BuildSecret{{ID: "s", SecretRef: v1alpha1.KeyReference{Name: "s", Key: "k"}}}
	create(t, b)
	await(t, b, v1alpha1.ReasonNodeUnreachable)
	require.NoError(t, api.Delete(t.Context(), secret))
	got := await(t, b, v1alpha1.ReasonMissingInput)
	require.Equal(t, `spec.secrets[0].secretRef.name: Secret "s" does not exist`, condition(got).Message)
	require.Zero(t, twin.Started())
}

func TestInputThatAppearsInTime(t *testing.T) {
	runController(t, testConfig(t))
	twin := startAgent(t, 1)
	ns := namespace(t, nil)
	b := newBuild(ns, "app", "ok")
	b.Spec.Secrets = []v1alpha1.BuildSecret{{ID: "s", SecretRef: v1alpha1.KeyReference{Name: "s", Key: "k"}}}
	b.Spec.RuntimeClassName = new("userns")
	create(t, b)
	await(t, b, v1alpha1.ReasonWaitingForInput)
	require.NoError(t, api.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "s"}, StringData: map[string]string{"k": "v"}}))
	require.Equal(t, "userns", await(t, b, v1alpha1.ReasonSucceeded).Status.Sandbox)
	_, creds := twin.Build(string(b.UID))
	require.Equal(t, "v", string(creds.Secrets["s"]))
}
