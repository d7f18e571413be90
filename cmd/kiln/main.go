// Command kiln builds container images with every step in a sandbox.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/sirupsen/logrus"

	"github.com/kiln-build/kiln/cmd/internal/program"
	"github.com/kiln-build/kiln/cmd/kiln/cli"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

func main() {
	if os.Getenv("KILN_DEBUG") == "" {
		// The libraries log what the progress output and errors tell already.
		logrus.SetOutput(io.Discard)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		s := <-signals
		cancel(errors.New("interrupted by signal: " + s.String()))
		<-signals
		os.Exit(cli.ExitInterrupted)
	}()
	app := &cli.App{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Version: program.Version(),
		// Only commands that start an engine enter a mount namespace, and only once:
		// the App calls it, and not main, because it has read the flags.
		Isolate: mountns.Enter, Start: startEngine,
	}
	os.Exit(app.Main(ctx, os.Args[1:]))
}
