package escape

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
)

// bin is where the OCI runtimes are.
func (e *env) bin(t *testing.T) string { return filepath.Dir(agenttest.RepoBin(t, "runsc")) }

func sum(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

// output is a process's output that several may write to.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) Close() error { return nil }

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// clientOf calls f with a client of a tenant's engine.
func (e *env) clientOf(t *testing.T, tenant string, f func(ctx context.Context, c *client.Client)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	eng, release, err := e.Node.Engine(ctx, engine.Domain{Tenant: tenant, Sandbox: e.Class})
	require.NoError(t, err)
	defer release()
	c, err := eng.Client(ctx)
	require.NoError(t, err)
	defer c.Close()
	f(ctx, c)
}

// gateway calls f as a front end that has the attackers' root file system.
func (e *env) gateway(t *testing.T, f func(ctx context.Context, c gateway.Client, root gateway.Reference) error) error {
	t.Helper()
	var out error
	e.clientOf(t, attacker, func(ctx context.Context, c *client.Client) {
		tools, err := fsutil.NewFS(e.tools)
		require.NoError(t, err)
		scripts := e.dir(t)
		require.NoError(t, os.WriteFile(filepath.Join(scripts, "script"), []byte("#!/proc/self/exe\n"), 0o755))
		more, err := fsutil.NewFS(scripts)
		require.NoError(t, err)
		_, out = c.Build(ctx, client.SolveOpt{LocalMounts: map[string]fsutil.FS{"tools": tools, "more": more}}, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
			state := llb.Scratch().File(llb.Copy(llb.Local("tools"), "/", "/")).File(llb.Copy(llb.Local("more"), "/", "/"))
			def, err := state.Marshal(ctx)
			if err != nil {
				return nil, err
			}
			r, err := c.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB(), Evaluate: true})
			if err != nil {
				return nil, err
			}
			return gateway.NewResult(), f(ctx, c, r.Ref)
		}, nil)
	})
	return out
}

// inContainer starts one process in a container of a front end's, and a second one n
// times in the same container while the first runs. It returns what the first wrote. A
// process that fails ends the container.
func (e *env) inContainer(t *testing.T, first string, second []string, n int) (string, error) {
	t.Helper()
	var out output
	err := e.gateway(t, func(ctx context.Context, c gateway.Client, root gateway.Reference) error {
		ctr, err := c.NewContainer(ctx, gateway.NewContainerRequest{Mounts: []gateway.Mount{{Dest: "/", MountType: pb.MountType_BIND, Ref: root}}})
		if err != nil {
			return err
		}
		defer ctr.Release(context.WithoutCancel(ctx))
		p, err := ctr.Start(ctx, gateway.StartRequest{Args: strings.Fields(first), Cwd: "/", Env: []string{"PATH=/bin"}, Stdout: &out, Stderr: &out})
		if err != nil {
			return err
		}
		for range n {
			other, err := ctr.Start(ctx, gateway.StartRequest{Args: second, Cwd: "/", Env: []string{"PATH=/bin"}, Stdout: nopWriter{}, Stderr: nopWriter{}})
			if err == nil {
				_ = other.Wait()
			}
		}
		return p.Wait()
	})
	return out.String(), err
}

// historyOf returns all records that an engine has of builds, as text.
func historyOf(t *testing.T, ctx context.Context, c *client.Client) string {
	t.Helper()
	list, err := c.ControlClient().ListenBuildHistory(ctx, &control.BuildHistoryRequest{EarlyExit: true})
	require.NoError(t, err)
	var out strings.Builder
	for {
		ev, err := list.Recv()
		if err == io.EOF {
			return out.String()
		}
		require.NoError(t, err)
		out.WriteString(ev.String())
	}
}

type nopWriter struct{}

func (nopWriter) Write(b []byte) (int, error) { return io.Discard.Write(b) }
func (nopWriter) Close() error                { return nil }
