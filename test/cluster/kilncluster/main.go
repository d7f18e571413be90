// Command kilncluster starts, shows and removes a one-machine Kubernetes cluster.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/kiln-build/kiln/test/cluster"
)

const usage = `Usage:
  kilncluster [flags] up                       start a cluster
  kilncluster [flags] down                     remove it and everything it left
  kilncluster [flags] exec MACHINE COMMAND...  run a command inside control, node1, ...
  kilncluster [flags] kill MACHINE COMPONENT   end a component, for instance node1 containerd
  kilncluster [flags] start MACHINE COMPONENT  start one that was killed
  kilncluster [flags] logs MACHINE COMPONENT   print a component's log
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(exit.ExitCode())
	}
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kilncluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var cfg cluster.Config
	flags := flag.NewFlagSet("kilncluster", flag.ContinueOnError)
	flags.StringVar(&cfg.Dir, "dir", cluster.DefaultDir, "state directory")
	flags.StringVar(&cfg.Bin, "bin", "", "directory with the programs (default bin in the source tree)")
	flags.IntVar(&cfg.Nodes, "nodes", 2, "number of nodes")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return flag.ErrHelp
	}
	switch args = flags.Args(); {
	case len(args) == 1 && args[0] == "up":
		cfg.Log = os.Stderr
		return up(ctx, cfg)
	case len(args) == 1 && args[0] == "down":
		return cluster.Down(ctx, cfg.Dir)
	case len(args) >= 3 && args[0] == "exec":
		return inside(ctx, cfg.Dir, args[1], args[2:])
	case len(args) == 3:
		return component(ctx, cfg.Dir, args[0], args[1], args[2])
	}
	flags.Usage()
	return flag.ErrHelp
}

// up ends by printing the command with which a shell uses the cluster.
func up(ctx context.Context, cfg cluster.Config) error {
	c, err := cluster.Up(ctx, cfg)
	if errors.Is(err, cluster.ErrRunning) {
		fmt.Fprintln(os.Stderr, "the cluster runs already")
		c, err = cluster.Open(cfg.Dir)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "registry: %s, with TLS %s\n", c.Registry(), c.SecureRegistry())
	fmt.Println("export KUBECONFIG=" + c.Kubeconfig())
	return nil
}

func inside(ctx context.Context, dir, machine string, args []string) error {
	m, err := find(dir, machine)
	if err != nil {
		return err
	}
	cmd := m.Command(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func component(ctx context.Context, dir, verb, machine, name string) error {
	m, err := find(dir, machine)
	if err != nil {
		return err
	}
	k, err := m.Component(name)
	if err != nil {
		return err
	}
	switch verb {
	case "kill":
		return k.Kill(ctx)
	case "start":
		return k.Start(ctx)
	case "logs":
		f, err := os.Open(k.LogPath())
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(os.Stdout, f)
		return err
	}
	return fmt.Errorf("unknown command %q", verb)
}

func find(dir, machine string) (*cluster.Machine, error) {
	c, err := cluster.Open(dir)
	if err != nil {
		return nil, err
	}
	return c.Machine(machine)
}
