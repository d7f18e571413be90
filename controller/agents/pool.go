// Package agents knows the agents of the cluster and holds the connections to them.
//
// It promises that a connection is made to an agent's Pod only, proves the controller with
// its current client certificate, and accepts nothing but the agents' certificate; and that
// connections to Pods that are gone are closed. It never decides which agent does what.
package agents

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// ErrNoAgent says that a node has no running agent.
var ErrNoAgent = errors.New("no agent runs on the node")

// Config says where agents are found.
type Config struct {
	// Namespace of their Pods.
	Namespace string
	// Labels of their Pods.
	Labels map[string]string
	// Port that they listen on.
	Port int
}

// Agent is an agent's Pod.
type Agent struct {
	// Node that it runs on.
	Node string
	// Address to dial.
	Address string
	// Ready as kubelet says.
	Ready bool
}

// Pool finds agents and connects to them. Its methods may be called concurrently.
type Pool struct {
	config Config
	reader client.Reader
	creds  credentials.TransportCredentials

	// mu guards conns, by address.
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
}

// New returns a pool over the Pods that reader knows.
func New(cfg Config, reader client.Reader, creds credentials.TransportCredentials) *Pool {
	return &Pool{config: cfg, reader: reader, creds: creds, conns: map[string]*grpc.ClientConn{}}
}

// List returns the agents that have an address, in the order of their nodes, and closes
// connections to others.
func (p *Pool) List(ctx context.Context) ([]Agent, error) {
	pods := &corev1.PodList{}
	if err := p.reader.List(ctx, pods, client.InNamespace(p.config.Namespace), client.MatchingLabels(p.config.Labels)); err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	var out []Agent
	for i := range pods.Items {
		pod := &pods.Items[i]
		if pod.Spec.NodeName == "" || pod.Status.PodIP == "" || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
			continue
		}
		out = append(out, Agent{
			Node: pod.Spec.NodeName, Address: net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(p.config.Port)),
			Ready: pod.DeletionTimestamp == nil && ready(pod),
		})
	}
	slices.SortFunc(out, func(a, b Agent) int { return strings.Compare(a.Node, b.Node) })
	p.closeOthers(out)
	return out, nil
}

func ready(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func (p *Pool) closeOthers(agents []Agent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for addr, c := range p.conns {
		if !slices.ContainsFunc(agents, func(a Agent) bool { return a.Address == addr }) {
			_ = c.Close()
			delete(p.conns, addr)
		}
	}
}

// Client returns the API of a node's agent: of the ready one when there are several, such
// as in the middle of an update. ErrNoAgent is wrapped when there is none.
func (p *Pool) Client(ctx context.Context, node string) (agentv1.BuildServiceClient, error) {
	all, err := p.List(ctx)
	if err != nil {
		return nil, err
	}
	var found *Agent
	for i := range all {
		if all[i].Node == node && (found == nil || all[i].Ready) {
			found = &all[i]
		}
	}
	if found == nil {
		return nil, fmt.Errorf("connect to agent of node %q: %w", node, ErrNoAgent)
	}
	return p.Dial(found.Address)
}

// Dial returns the API of the agent at an address that List returned.
func (p *Pool) Dial(address string) (agentv1.BuildServiceClient, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	conn, ok := p.conns[address]
	if !ok {
		var err error
		conn, err = grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(p.creds),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}, MinConnectTimeout: 3 * time.Second}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
		if err != nil {
			return nil, fmt.Errorf("connect to agent at %s: %w", address, err)
		}
		p.conns[address] = conn
	}
	return agentv1.NewBuildServiceClient(conn), nil
}

// Close closes all connections.
func (p *Pool) Close() {
	p.closeOthers(nil)
}
