// Command kiln-agent builds container images on one node, for the cluster's
// controller, for kiln, and for BuildKit's clients.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/cmd/internal/program"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

// Exit codes.
const (
	exitOK = iota
	exitFailed
	// exitUsage: the command line or the configuration is wrong.
	exitUsage
)

func main() { os.Exit(execute(os.Args[1:])) }

// usageError is a mistake of the command line or the configuration.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func execute(args []string) int {
	cmd := newCommand()
	cmd.SetArgs(args)
	err := cmd.Execute()
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "kiln-agent:", err)
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func newCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "kiln-agent",
		Short: "Build container images on this node, every step in a sandbox",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unexpected argument %q", args[0])}
			}
			return nil
		},
		Version: program.Version(), SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load()
			if err != nil {
				return usageError{err}
			}
			if f.printConfig {
				out, err := cfg.Encode()
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(out)
				return err
			}
			return serve(cfg)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f.register(cmd.Flags())
	return cmd
}

// serve is the agent's life in its own mount namespace, until a signal ends it. A
// second signal ends it at once.
func serve(cfg *config.Agent) error {
	if err := mountns.Enter(); err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	log := newLogger(cfg.Logging, os.Stderr)
	limitMemory(log)
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	go func() {
		log.Info("signal; the agent ends when its builds have", "signal", (<-signals).String())
		cancel(errSignal)
		log.Error("second signal; the agent ends at once", "signal", (<-signals).String())
		os.Exit(exitFailed)
	}()
	err := run(ctx, cfg, log)
	if errors.Is(err, errSignal) {
		log.Info("the agent was told to end before it had started", "error", err)
		return nil
	}
	return err
}

// errSignal is why the agent's context ends when it is told to end.
var errSignal = errors.New("the agent was told to end")
