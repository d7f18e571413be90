package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// agentBuilds are the builds of one agent.
type agentBuilds struct {
	conn *grpc.ClientConn
	api  agentv1.BuildServiceClient
}

// List implements builds. The agent decides which tenants the caller may see.
func (a *agentBuilds) List(ctx context.Context, _ bool) ([]listed, error) {
	var out []listed
	for token := ""; ; {
		page, err := a.api.ListBuilds(ctx, &agentv1.ListBuildsRequest{PageToken: token, PageSize: 1000})
		if err != nil {
			return nil, fmt.Errorf("list builds: %w", err)
		}
		for _, b := range page.GetBuilds() {
			l := listed{
				Namespace: b.GetTenant(), Name: b.GetBuildId(), State: stateName(b.GetState()), Node: b.GetNode(),
				Sandbox: sandboxName(b.GetSandbox()), Created: b.GetCreatedAt().AsTime(),
				Started: timeOf(b.GetStartedAt()), Ended: timeOf(b.GetEndedAt()),
			}
			if names := b.GetResult().GetImageNames(); len(names) > 0 {
				l.Image = names[0]
			}
			out = append(out, l)
		}
		if token = page.GetNextPageToken(); token == "" {
			return out, nil
		}
	}
}

func sandboxName(c agentv1.SandboxClass) string {
	switch c {
	case agentv1.SandboxClass_SANDBOX_CLASS_GVISOR:
		return "gvisor"
	case agentv1.SandboxClass_SANDBOX_CLASS_USERNS:
		return "userns"
	}
	return ""
}

const (
	// reconnectInterval is the pause before an agent is called again.
	reconnectInterval = 500 * time.Millisecond
	// reconnectLimit is how often in a row, without news, it is called again.
	reconnectLimit = 60
)

// Events implements builds. It comes back with the offset when the agent was
// restarted.
func (a *agentBuilds) Events(ctx context.Context, name string, follow bool, fn func(*agentv1.Event) error) error {
	var offset uint64
	for failures := 0; ; failures++ {
		err := a.watch(ctx, name, &offset, follow, func(ev *agentv1.Event) error {
			failures = 0
			return fn(ev)
		})
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if status.Code(err) != codes.Unavailable || failures == reconnectLimit {
			return fmt.Errorf("watch build %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(reconnectInterval):
		}
	}
}

func (a *agentBuilds) watch(ctx context.Context, name string, offset *uint64, follow bool, fn func(*agentv1.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := a.api.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: name, Offset: *offset, NoFollow: !follow})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := fn(m.GetEvent()); err != nil {
			return err
		}
		*offset = m.GetEvent().GetOffset() + 1
	}
}

// Cancel implements builds.
func (a *agentBuilds) Cancel(ctx context.Context, name string) error {
	if _, err := a.api.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: name, Reason: "cancelled with kiln cancel"}); err != nil {
		return fmt.Errorf("cancel build %s: %w", name, err)
	}
	return nil
}

// Close implements builds.
func (a *agentBuilds) Close() error { return a.conn.Close() }
