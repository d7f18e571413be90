package placement

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/controller/agents"
)

// fleet answers Probe for agents by address, which is the name of the node.
type fleet map[string]answer

type answer struct {
	probe *agentv1.ProbeResponse
	err   error
	hangs bool
}

func (f fleet) List(context.Context) ([]agents.Agent, error) {
	var out []agents.Agent
	for i := range len(f) {
		node := fmt.Sprintf("n%d", i+1)
		out = append(out, agents.Agent{Node: node, Address: node, Ready: true})
	}
	return out, nil
}

func (f fleet) Dial(address string) (agentv1.BuildServiceClient, error) {
	return prober{answer: f[address]}, nil
}

type prober struct {
	agentv1.BuildServiceClient
	answer answer
}

func (p prober) Probe(ctx context.Context, _ *agentv1.ProbeRequest, _ ...grpc.CallOption) (*agentv1.ProbeResponse, error) {
	if p.answer.hangs {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return p.answer.probe, p.answer.err
}

func chooser(f fleet) *Chooser {
	b := fake.NewClientBuilder()
	for i := range len(f) {
		b = b.WithObjects(readyNode(fmt.Sprintf("n%d", i+1)))
	}
	return &Chooser{Agents: f, Reader: b.Build(), Timeout: 100 * time.Millisecond}
}

func readyNode(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}}
}

func free(change func(*agentv1.ProbeResponse)) answer {
	p := &agentv1.ProbeResponse{Runnable: true, Slots: 4}
	if change != nil {
		change(p)
	}
	return answer{probe: p}
}

func TestNodeThatFinishesFirst(t *testing.T) {
	built := timestamppb.Now()
	for _, c := range []struct {
		name string
		f    fleet
		want string
	}{
		{"idle before busy", fleet{"n1": free(func(p *agentv1.ProbeResponse) { p.Running = 3 }), "n2": free(nil)}, "n2"},
		{"a slot before a queue", fleet{"n1": free(func(p *agentv1.ProbeResponse) { p.Running, p.Queued = 4, 2 }), "n2": free(func(p *agentv1.ProbeResponse) { p.Running = 3 })}, "n2"},
		{"built before, and not too busy", fleet{"n1": free(nil), "n2": free(func(p *agentv1.ProbeResponse) { p.Running, p.LastBuiltAt = 2, built })}, "n2"},
		{"built before, but a long queue", fleet{"n1": free(nil), "n2": free(func(p *agentv1.ProbeResponse) { p.Running, p.Queued, p.LastBuiltAt = 4, 20, built })}, "n1"},
		{"base image there", fleet{"n1": free(nil), "n2": free(func(p *agentv1.ProbeResponse) { p.LocalBaseBytes = 1 << 30 })}, "n2"},
		{"base image there, on the other", fleet{"n1": free(func(p *agentv1.ProbeResponse) { p.LocalBaseBytes = 1 << 20 }), "n2": free(nil)}, "n1"},
		{"more of the base images there", fleet{"n1": free(func(p *agentv1.ProbeResponse) { p.LocalBaseBytes = 3 << 20 }), "n2": free(func(p *agentv1.ProbeResponse) { p.LocalBaseBytes = 30 << 20 })}, "n2"},
		{"base image there, but a queue", fleet{"n1": free(nil), "n2": free(func(p *agentv1.ProbeResponse) { p.LocalBaseBytes, p.Running, p.Queued = 100<<20, 4, 4 })}, "n1"},
		{"a cache is worth only so much", fleet{"n1": free(nil), "n2": free(func(p *agentv1.ProbeResponse) { p.LocalCacheBytes, p.Running, p.Queued = 1<<50, 4, 40 })}, "n1"},
		{"the one that can", fleet{"n1": {probe: &agentv1.ProbeResponse{Refusals: []string{"no gVisor"}}}, "n2": free(nil)}, "n2"},
		{"one that hangs", fleet{"n1": {hangs: true}, "n2": free(func(p *agentv1.ProbeResponse) { p.Running = 4 })}, "n2"},
		{"hostile numbers", fleet{"n1": free(func(p *agentv1.ProbeResponse) { p.Slots, p.Running, p.LocalBaseBytes = -1, -5, -1<<60 }), "n2": {err: status.Error(codes.Internal, "x")}}, "n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			node, settled, err := chooser(c.f).Choose(t.Context(), Question{ID: "b"})
			require.NoError(t, err)
			settled()
			require.Equal(t, c.want, node)
		})
	}
}

func TestWhyNoNodeCanTakeIt(t *testing.T) {
	_, _, err := chooser(fleet{}).Choose(t.Context(), Question{})
	require.EqualError(t, err, "no node has a ready agent")
	_, _, err = chooser(fleet{"n1": {probe: &agentv1.ProbeResponse{Refusals: []string{"a", "b"}}}, "n2": {err: status.Error(codes.Unavailable, "gone")}}).Choose(t.Context(), Question{})
	require.EqualError(t, err, "no node can take the build: n1: a, b; n2: its agent answers Unavailable: gone")
	var none *Unplaceable
	require.ErrorAs(t, err, &none)
	require.Nil(t, none.Refused)
	denied := answer{err: status.Error(codes.PermissionDenied, "not for you")}
	_, _, err = chooser(fleet{"n1": denied, "n2": denied}).Choose(t.Context(), Question{})
	require.ErrorAs(t, err, &none)
	require.Equal(t, codes.PermissionDenied, none.Refused.Code(), "all refuse it for what it is")
	invalid := answer{probe: &agentv1.ProbeResponse{Refusals: []string{"spec.x: is wrong"}, RefusalCode: int32(codes.InvalidArgument)}}
	_, _, err = chooser(fleet{"n1": invalid, "n2": invalid}).Choose(t.Context(), Question{})
	require.ErrorAs(t, err, &none)
	require.Equal(t, "spec.x: is wrong", none.Refused.Message())
	_, _, err = chooser(fleet{"n1": denied, "n2": {hangs: true}}).Choose(t.Context(), Question{})
	require.ErrorAs(t, err, &none)
	require.Nil(t, none.Refused, "one might take it")
}

func TestBuildsPlacedAtOnceAreSpread(t *testing.T) {
	c := chooser(fleet{"n1": free(nil), "n2": free(nil), "n3": free(nil)})
	count := map[string]int{}
	var settle []func()
	for i := range 12 {
		node, settled, err := c.Choose(t.Context(), Question{ID: fmt.Sprint(i)})
		require.NoError(t, err)
		count[node]++
		settle = append(settle, settled)
	}
	require.Equal(t, map[string]int{"n1": 4, "n2": 4, "n3": 4}, count)
	for _, s := range settle {
		s()
		s()
	}
	require.Empty(t, c.placed)
}

func TestNodesOutOfTheQuestion(t *testing.T) {
	taint := func(key string, effect corev1.TaintEffect) func(*corev1.Node) {
		return func(n *corev1.Node) {
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Value: "v", Effect: effect})
		}
	}
	for _, c := range []struct {
		name        string
		change      func(*corev1.Node)
		selector    map[string]string
		tolerations []corev1.Toleration
		want        string
	}{
		{"good", func(*corev1.Node) {}, nil, nil, ""},
		{"not ready", func(n *corev1.Node) { n.Status.Conditions = nil }, nil, nil, "it is not ready"},
		{"label", func(*corev1.Node) {}, map[string]string{"a": "b"}, nil, "it has not the label a=b"},
		{"cordoned", func(n *corev1.Node) { n.Spec.Unschedulable = true }, nil, nil, "it has the taint node.kubernetes.io/unschedulable:NoSchedule that the build does not tolerate"},
		{"tainted", taint("k", corev1.TaintEffectNoSchedule), nil, nil, "it has the taint k=v:NoSchedule that the build does not tolerate"},
		{"rather not", taint("k", corev1.TaintEffectPreferNoSchedule), nil, nil, ""},
		{"tolerated", taint("k", corev1.TaintEffectNoSchedule), nil, []corev1.Toleration{{Key: "k", Value: "v"}}, ""},
		{"tolerated by existence", taint("k", corev1.TaintEffectNoExecute), nil, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}, ""},
		{"other value", taint("k", corev1.TaintEffectNoSchedule), nil, []corev1.Toleration{{Key: "k", Value: "w"}}, "it has the taint k=v:NoSchedule that the build does not tolerate"},
		{"other effect", taint("k", corev1.TaintEffectNoSchedule), nil, []corev1.Toleration{{Key: "k", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}}, "it has the taint k=v:NoSchedule that the build does not tolerate"},
		{"unknown operator", taint("k", corev1.TaintEffectNoSchedule), nil, []corev1.Toleration{{Key: "k", Value: "v", Operator: "Like"}}, "it has the taint k=v:NoSchedule that the build does not tolerate"},
	} {
		n := readyNode("n1")
		c.change(n)
		require.Equal(t, c.want, NodeProblem(n, c.selector, c.tolerations), c.name)
	}
}
