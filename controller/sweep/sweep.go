// Package sweep ends what runs on agents for Builds that are gone.
//
// It promises to end only builds that a controller of kiln started (their labels say so)
// and that the API server, asked after the agent, does not know as going on there. It is
// how a build ends whose Build was deleted, lost or placed elsewhere while its agent could not
// be reached.
package sweep

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/agents"
	"github.com/kiln-build/kiln/controller/translate"
)

// Sweeper asks every agent in turn.
type Sweeper struct {
	// Pool of agents.
	Pool *agents.Pool
	// Live reads Builds from the API server itself.
	Live client.Reader
	// Interval between two rounds.
	Interval time.Duration
	// Log takes what was ended.
	Log *slog.Logger
}

// Start sweeps until ctx ends.
func (s *Sweeper) Start(ctx context.Context) error {
	tick := time.NewTicker(s.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if _, err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
				s.Log.Warn("look for builds without a Build", "error", err)
			}
		}
	}
}

// Sweep asks every agent once and returns how many builds it ended. An agent that does not
// answer is left for the next time.
func (s *Sweeper) Sweep(ctx context.Context) (int, error) {
	all, err := s.Pool.List(ctx)
	if err != nil {
		return 0, err
	}
	ended := 0
	var firstErr error
	for _, a := range all {
		n, err := s.agent(ctx, a)
		ended += n
		if err != nil && firstErr == nil {
			firstErr = fmt.Errorf("agent of node %q: %w", a.Node, err)
		}
	}
	return ended, firstErr
}

func (s *Sweeper) agent(ctx context.Context, a agents.Agent) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	api, err := s.Pool.Dial(a.Address)
	if err != nil {
		return 0, err
	}
	ended, token := 0, ""
	for {
		page, err := api.ListBuilds(ctx, &agentv1.ListBuildsRequest{
			States: []agentv1.BuildState{agentv1.BuildState_BUILD_STATE_QUEUED, agentv1.BuildState_BUILD_STATE_RUNNING}, PageSize: 500, PageToken: token,
		})
		if err != nil {
			return ended, fmt.Errorf("list builds: %w", err)
		}
		for _, b := range page.GetBuilds() {
			wanted, err := s.wanted(ctx, a.Node, b)
			if err != nil {
				return ended, err
			}
			if wanted {
				continue
			}
			if _, err := api.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: b.BuildId, Tenant: b.Tenant, Reason: "no Build of the cluster has it"}); err != nil {
				return ended, fmt.Errorf("cancel build %q: %w", b.BuildId, err)
			}
			s.Log.Info("ended a build that no Build has", "node", a.Node, "tenant", b.Tenant, "build", b.BuildId)
			ended++
		}
		if token = page.GetNextPageToken(); token == "" {
			return ended, nil
		}
	}
}

// wanted tells whether a Build has b as its run, or b is not a controller's.
func (s *Sweeper) wanted(ctx context.Context, node string, b *agentv1.Build) (bool, error) {
	labels := b.GetSpec().GetLabels()
	uid := labels[translate.LabelUID]
	if uid == "" || labels[translate.LabelNamespace] != b.GetTenant() {
		return true, nil
	}
	obj := &v1alpha1.Build{}
	err := s.Live.Get(ctx, types.NamespacedName{Namespace: b.GetTenant(), Name: labels[translate.LabelName]}, obj)
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read Build %q: %w", labels[translate.LabelName], err)
	}
	return string(obj.UID) == uid && !obj.Ended() && obj.Status.Node == node && obj.Status.BuildID == b.GetBuildId(), nil
}
