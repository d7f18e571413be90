// Command kiln builds container images with every step in a sandbox.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/cmd/internal/program"
	"github.com/kiln-build/kiln/cmd/kiln/cli"
	"github.com/kiln-build/kiln/sandbox/mountns"
)

// A short build ends before its garbage is worth a collection: until youth is over, the
// heap may grow to youngHeap percent of what lives. The environment's GOGC counts more.
const (
	youth     = 2 * time.Second
	youngHeap = 400
)

func init() {
	// mountns.EnterInPlace needs main to run on the first thread.
	runtime.LockOSThread()
}

func main() {
	if os.Getenv("GOGC") == "" {
		usual := debug.SetGCPercent(youngHeap)
		time.AfterFunc(youth, func() { debug.SetGCPercent(usual) })
	}
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
		Isolate: isolate, Start: startEngine,
	}
	os.Exit(app.Main(ctx, os.Args[1:]))
}

// isolate gives this process a mount namespace of its own, and lets main run on any
// thread.
func isolate() error {
	defer runtime.UnlockOSThread()
	// The engine would do it, but later than EnterInPlace allows.
	unix.Umask(0)
	return mountns.EnterInPlace()
}
