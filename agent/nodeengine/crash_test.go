package nodeengine_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/auth"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

// agentRoot has the test binary be an agent on the unix socket <root>/socket until it
// is killed.
const agentRoot = "KILN_TEST_AGENT_ROOT"

func TestMain(m *testing.M) {
	// What a killed agent has mounted goes with it.
	if err := mountns.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	unix.Umask(0) // as in the agent
	if root := os.Getenv(agentRoot); root != "" {
		if err := beAgent(root); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func beAgent(root string) error {
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{
		Root: root, RunscPath: filepath.Join("..", "..", "bin", "runsc"),
	})
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		Root: root, Node: "node-1", Engines: nodeengine.New(node), Policy: agent.RulePolicy(agenttest.Anything), Sandboxes: agenttest.AllClasses,
	})
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", filepath.Join(root, "socket"))
	if err != nil {
		return err
	}
	id := auth.Identity{Name: "test", Role: auth.RoleTenant, Tenant: "a"}
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(auth.NewContext(ctx, id), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, asTenant{ss, id})
		}),
	)
	agentv1.RegisterBuildServiceServer(s, a)
	fmt.Println("serves")
	return s.Serve(l)
}

type asTenant struct {
	grpc.ServerStream
	id auth.Identity
}

func (s asTenant) Context() context.Context { return auth.NewContext(s.ServerStream.Context(), s.id) }

// startAgent starts a process that is an agent and returns a client of it and what
// kills it.
func startAgent(t *testing.T, root string) (agentv1.BuildServiceClient, func()) {
	t.Helper()
	require.NoError(t, os.RemoveAll(filepath.Join(root, "socket")))
	cmd := exec.Command(os.Args[0])
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), agentRoot+"="+root)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	kill := func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(unix.SIGKILL)
			_ = cmd.Wait()
		}
	}
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "serves\n", line)
	conn, err := grpc.NewClient("unix:"+filepath.Join(root, "socket"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return agentv1.NewBuildServiceClient(conn), kill
}

// TestManyBuildsAtOnce has 32 builds in one agent at once: none is lost.
func TestManyBuildsAtOnce(t *testing.T) {
	root := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c, _ := startAgent(t, root)
	const builds = 32
	var wg sync.WaitGroup
	began := time.Now()
	for i := range builds {
		archive := agenttest.BusyboxTar(t, map[string]string{"Dockerfile": base + sh(fmt.Sprintf("echo build %d > /one", i))})
		spec := agenttest.Uploaded(agenttest.SendAll(t, ctx, c, archive))
		spec.Sandbox = agentv1.SandboxClass_SANDBOX_CLASS_USERNS
		id := fmt.Sprint("b", i)
		wg.Go(func() {
			if _, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: id, Spec: spec}); err != nil {
				t.Error(err)
				return
			}
			result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, id, 0), 0)
			if result.GetState() != agentv1.BuildState_BUILD_STATE_SUCCEEDED {
				t.Errorf("%s: %v", id, result)
			}
		})
	}
	wg.Wait()
	t.Logf("%d builds in %s", builds, time.Since(began).Round(10*time.Millisecond))
	list, err := c.ListBuilds(ctx, &agentv1.ListBuildsRequest{States: []agentv1.BuildState{agentv1.BuildState_BUILD_STATE_SUCCEEDED}})
	require.NoError(t, err)
	require.Len(t, list.GetBuilds(), builds)
}

// TestKilledAgent kills an agent in the middle of a step, with another build in the
// queue: both end as interrupted, and the steps that had ended are cache hits.
func TestKilledAgent(t *testing.T) {
	agenttest.RepoBin(t, "runsc")
	eachClass(t, func(t *testing.T, class agentv1.SandboxClass, _ string) {
		root := t.TempDir()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		c, kill := startAgent(t, root)
		first := sh("echo made > /one")
		archive := agenttest.BusyboxTar(t, map[string]string{"Dockerfile": base + first + sh("echo second runs; sleep 60")})
		spec := agenttest.Uploaded(agenttest.SendAll(t, ctx, c, archive))
		spec.Sandbox = class
		for i := range 5 { // the last waits: four may run
			_, err := c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: fmt.Sprint("b", i), Spec: spec})
			require.NoError(t, err)
		}
		stream, err := c.WatchBuild(ctx, &agentv1.WatchBuildRequest{BuildId: "b0"})
		require.NoError(t, err)
		var seen uint64
		for {
			msg, err := stream.Recv()
			require.NoError(t, err)
			require.Equal(t, seen, msg.GetEvent().GetOffset())
			require.Nil(t, msg.GetEvent().GetResult(), "%v", msg)
			seen++
			if string(msg.GetEvent().GetLog().GetData()) == "second runs\n" {
				break
			}
		}
		kill()

		c, _ = startAgent(t, root)
		for i := range 5 {
			id := fmt.Sprint("b", i)
			events := agenttest.Watch(t, ctx, c, id, 0)
			result := agenttest.CheckEvents(t, events, 0)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_INTERRUPTED, result.GetState(), "%v", result)
			if i == 4 {
				require.Contains(t, result.GetFailure().GetMessage(), "never started")
			}
		}
		// A client that was cut off goes on where it was.
		agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "b0", seen), seen)

		archive = agenttest.BusyboxTar(t, map[string]string{"Dockerfile": base + first})
		spec = agenttest.Uploaded(agenttest.SendAll(t, ctx, c, archive))
		spec.Sandbox = class
		_, err = c.StartBuild(ctx, &agentv1.StartBuildRequest{BuildId: "again", Spec: spec})
		require.NoError(t, err)
		result := agenttest.CheckEvents(t, agenttest.Watch(t, ctx, c, "again", 0), 0)
		require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
		require.Len(t, cachedRuns(result), 1, "%v", result)
	})
}
