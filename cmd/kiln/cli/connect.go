package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/spf13/pflag"

	"github.com/kiln-build/kiln/cmd/internal/program"
	"github.com/kiln-build/kiln/sandbox"
	"github.com/kiln-build/kiln/snapshot"
)

// dialTimeout bounds how long an agent may take to answer the first call.
const dialTimeout = 10 * time.Second

// target says which engine a command talks to.
type target struct {
	agent, root, sandbox string
	tls                  tlsFlags
	// frontends are images of front ends that may run.
	frontends []string
}

func (t *target) flags(fs *pflag.FlagSet) {
	fs.StringVar(&t.agent, "agent", "", "Work on the agent at this address (unix:///path or tcp://host:port) and not in this process (default $KILN_AGENT)")
	t.tls.flags(fs)
	fs.StringVar(&t.root, "root", "", "State directory (default "+DefaultRoot()+")")
	fs.StringVar(&t.sandbox, "sandbox", "", "Sandbox of every step: gvisor or userns (default gvisor)")
}

// check reports combinations that make no sense, and returns the class.
func (t *target) check() (sandbox.Class, error) {
	if t.agent == "" && t.root == "" {
		t.agent = os.Getenv("KILN_AGENT")
	}
	if t.agent != "" {
		if t.root != "" {
			return "", usage(errors.New("--root and --agent exclude each other: an agent has its own state directory"))
		}
		if t.sandbox != "" {
			return "", usage(errors.New("--sandbox and --agent exclude each other: the agent's configuration chooses the sandbox"))
		}
		if len(t.frontends) > 0 {
			return "", usage(errors.New("--frontend and --agent exclude each other: the agent's configuration lists the front ends"))
		}
		return "", usage(t.tls.check(t.agent))
	}
	if t.tls.set() {
		return "", usage(errors.New("--tls flags and --token-file are for an agent: give its address with --agent"))
	}
	if t.sandbox == "" {
		return sandbox.GVisor, nil
	}
	class, err := sandbox.ParseClass(t.sandbox)
	if err != nil {
		return "", usage(fmt.Errorf("--sandbox: %w", err))
	}
	return class, nil
}

func (t *target) rootDir() string {
	if t.root != "" {
		return t.root
	}
	return DefaultRoot()
}

// connect dials the agent, or starts an engine in this process while it holds
// the lock of the state directory. The returned function releases everything.
func (a *App) connect(ctx context.Context, t *target) (_ *client.Client, release func() error, err error) {
	class, err := t.check()
	if err != nil {
		return nil, nil, err
	}
	if t.agent != "" {
		return dial(ctx, t.agent, &t.tls)
	}
	if err := a.isolate(t); err != nil {
		return nil, nil, err
	}
	root := t.rootDir()
	unlock, err := snapshot.Lock(ctx, root, func(holder string) {
		fmt.Fprintf(a.Stderr, "kiln: %s is in use by %s; waiting for it to end\n", root, holder)
	})
	if err != nil {
		return nil, nil, err
	}
	cfg := EngineConfig{Root: root, Sandbox: class, RunscPath: findTool("runsc"), Frontends: t.frontends, OnStep: a.used.note, OnLoss: func() {
		fmt.Fprintf(a.Stderr, "kiln: the machine went down before the cache in %s was on its disk: the cache was removed\n", root)
	}}
	e, err := a.Start(ctx, cfg)
	if err != nil {
		return nil, nil, errors.Join(err, unlock())
	}
	c, err := e.Client(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, e.Close(), unlock())
	}
	return c, func() error { return errors.Join(ignoreCanceled(c.Close()), e.Close(), unlock()) }, nil
}

// isolate prepares this process for an engine, if it is to have one.
func (a *App) isolate(t *target) error {
	if t.agent != "" || a.isolated || a.Isolate == nil {
		return nil
	}
	if err := a.Isolate(); err != nil {
		return fmt.Errorf("prepare to build in this process: %w; build as root, or on an agent with --agent", err)
	}
	a.isolated = true
	return nil
}

// dial connects to an agent and checks that it answers.
func dial(ctx context.Context, addr string, tls *tlsFlags) (*client.Client, func() error, error) {
	c, err := client.New(ctx, addr, tls.clientOptions(addr)...)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to agent %s: %w", addr, err)
	}
	call, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if _, err := c.Info(call); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("connect to agent %s: %w (is it running?)", addr, err), c.Close())
	}
	return c, c.Close, nil
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// findTool returns the path of an OCI runtime: the one that KILN_NAME names, else
// where program.Find finds it, else an empty string.
func findTool(name string) string {
	return program.Find(os.Getenv("KILN_"+strings.ToUpper(name)), name)
}
