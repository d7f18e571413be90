// Package placement chooses the node for a build.
//
// It promises to choose among nodes whose agent says that it can run the build, the one
// that is expected to finish first: what is there already saves time, a queue costs it. It
// spreads builds that are placed at the same moment, and says for each node why it was not
// chosen when none can be. It starts nothing.
package placement

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/controller/agents"
)

// Agents is what placement needs of a pool of agents.
type Agents interface {
	// List returns the agents of the cluster.
	List(ctx context.Context) ([]agents.Agent, error)
	// Dial returns the API of an agent at an address of List.
	Dial(address string) (agentv1.BuildServiceClient, error)
}

// Question is a build to place.
type Question struct {
	// ID of the build, which decides between equal nodes.
	ID string
	// Tenant it is for.
	Tenant string
	// Spec that would be started.
	Spec *agentv1.BuildSpec
	// NodeSelector is labels that the node must have.
	NodeSelector map[string]string
	// Tolerations are taints that the build accepts.
	Tolerations []corev1.Toleration
	// Avoid is nodes that have refused it just now.
	Avoid map[string]bool
}

// Unplaceable says that no node can take a build at present.
type Unplaceable struct {
	// Reasons for each node, as "node: reason".
	Reasons []string
	// Refused is set when every agent that was asked refused the build for what it is: the
	// gRPC status of one of them, INVALID_ARGUMENT or PERMISSION_DENIED.
	Refused *status.Status
}

func (u *Unplaceable) Error() string {
	if len(u.Reasons) == 0 {
		return "no node has a ready agent"
	}
	return "no node can take the build: " + strings.Join(u.Reasons, "; ")
}

// Chooser chooses nodes. Its methods may be called concurrently.
type Chooser struct {
	// Agents of the cluster.
	Agents Agents
	// Reader reads Nodes; a cache will do.
	Reader client.Reader
	// Timeout of a Probe.
	Timeout time.Duration

	// mu guards placed: builds by node that were placed and that the node's agent may not
	// know yet.
	mu     sync.Mutex
	placed map[string]int
}

// candidate is an agent with what it answered.
type candidate struct {
	agent  agents.Agent
	probe  *agentv1.ProbeResponse
	reason string
	refuse *status.Status
}

// Choose returns a node, and a function to call once its agent knows the build or has
// refused it. The error is *Unplaceable when no node can take it.
func (c *Chooser) Choose(ctx context.Context, q Question) (node string, settled func(), err error) {
	all, err := c.Agents.List(ctx)
	if err != nil {
		return "", nil, err
	}
	candidates := make([]*candidate, 0, len(all))
	for _, a := range all {
		cand := &candidate{agent: a}
		if cand.reason, err = c.filter(ctx, a, &q); err != nil {
			return "", nil, err
		}
		candidates = append(candidates, cand)
	}
	c.probe(ctx, candidates, &q)
	if err := context.Cause(ctx); err != nil {
		return "", nil, err
	}
	return c.pick(candidates, &q)
}

// filter returns why an agent's node is out of the question, or "".
func (c *Chooser) filter(ctx context.Context, a agents.Agent, q *Question) (string, error) {
	if q.Avoid[a.Node] {
		return "it refused the build a moment ago", nil
	}
	if !a.Ready {
		return "its agent is not ready", nil
	}
	node := &corev1.Node{}
	if err := c.Reader.Get(ctx, types.NamespacedName{Name: a.Node}, node); apierrors.IsNotFound(err) {
		return "it is gone", nil
	} else if err != nil {
		return "", fmt.Errorf("read Node %q: %w", a.Node, err)
	}
	return NodeProblem(node, q.NodeSelector, q.Tolerations), nil
}

// NodeProblem returns why a node is out of the question for a build with a selector and
// tolerations, or "".
func NodeProblem(node *corev1.Node, selector map[string]string, tolerations []corev1.Toleration) string {
	for k, v := range selector {
		if node.Labels[k] != v {
			return fmt.Sprintf("it has not the label %s=%s", k, v)
		}
	}
	ready := slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
	if !ready {
		return "it is not ready"
	}
	taints := node.Spec.Taints
	if node.Spec.Unschedulable {
		taints = append(slices.Clone(taints), corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})
	}
	for i := range taints {
		t := &taints[i]
		if t.Effect != corev1.TaintEffectNoSchedule && t.Effect != corev1.TaintEffectNoExecute {
			continue
		}
		if !slices.ContainsFunc(tolerations, func(tol corev1.Toleration) bool { return tolerates(&tol, t) }) {
			return fmt.Sprintf("it has the taint %s that the build does not tolerate", t.ToString())
		}
	}
	return ""
}

func tolerates(tol *corev1.Toleration, t *corev1.Taint) bool {
	switch {
	case tol.Effect != "" && tol.Effect != t.Effect:
		return false
	case tol.Key != "" && tol.Key != t.Key:
		return false
	case tol.Operator == corev1.TolerationOpExists:
		return true
	case tol.Operator == "" || tol.Operator == corev1.TolerationOpEqual:
		return tol.Key != "" && tol.Value == t.Value
	}
	return false
}

// probe asks all candidates that are left, at once.
func (c *Chooser) probe(ctx context.Context, candidates []*candidate, q *Question) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	var group sync.WaitGroup
	for _, cand := range candidates {
		if cand.reason != "" {
			continue
		}
		group.Go(func() {
			api, err := c.Agents.Dial(cand.agent.Address)
			if err == nil {
				cand.probe, err = api.Probe(ctx, &agentv1.ProbeRequest{Tenant: q.Tenant, Spec: q.Spec})
			}
			switch {
			case err != nil:
				st := status.Convert(err)
				cand.reason = "its agent answers " + st.Code().String() + ": " + st.Message()
				cand.refuse = forGood(st)
			case !cand.probe.GetRunnable():
				cand.reason = strings.Join(cand.probe.GetRefusals(), ", ")
				if cand.reason == "" {
					cand.reason = "its agent refuses without a reason"
				}
				cand.refuse = forGood(status.New(codes.Code(cand.probe.GetRefusalCode()), cand.reason))
			}
		})
	}
	group.Wait()
}

// forGood returns a refusal that is one of the build, whenever it is asked; else nil.
func forGood(st *status.Status) *status.Status {
	if st.Code() == codes.InvalidArgument || st.Code() == codes.PermissionDenied {
		return st
	}
	return nil
}

func (c *Chooser) pick(candidates []*candidate, q *Question) (string, func(), error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var best *candidate
	var bestCost time.Duration
	var reasons []string
	var refused *status.Status
	onlyRefused := true
	for _, cand := range candidates {
		if cand.reason != "" {
			reasons = append(reasons, fmt.Sprintf("%s: %s", cand.agent.Node, cand.reason))
			if cand.refuse != nil {
				refused = cand.refuse
			} else {
				onlyRefused = false
			}
			continue
		}
		cost := Cost(cand.probe, c.placed[cand.agent.Node])
		if best == nil || cost < bestCost || (cost == bestCost && rank(q.ID, cand.agent.Node) < rank(q.ID, best.agent.Node)) {
			best, bestCost = cand, cost
		}
	}
	if best == nil {
		if !onlyRefused {
			refused = nil
		}
		return "", nil, &Unplaceable{Reasons: reasons, Refused: refused}
	}
	node := best.agent.Node
	if c.placed == nil {
		c.placed = map[string]int{}
	}
	c.placed[node]++
	return node, sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.placed[node]--; c.placed[node] <= 0 {
			delete(c.placed, node)
		}
	}), nil
}

// rank spreads builds over nodes that are equal otherwise.
func rank(id, node string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id + "\x00" + node))
	return h.Sum64()
}
