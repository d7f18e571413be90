package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

// Exit codes.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitInterrupted = 130
)

// Engine is a BuildKit that this process started.
type Engine interface {
	// Client returns a connection, which the caller closes.
	Client(ctx context.Context) (*client.Client, error)
	// Close ends the engine and releases what it holds.
	Close() error
}

// EngineConfig is what the flags say about the engine in this process.
type EngineConfig struct {
	// Root is the state directory.
	Root string
	// Sandbox is the class of sandbox for steps.
	Sandbox sandbox.Class
	// RunscPath is the OCI runtime of gVisor sandboxes, or empty when none was found.
	RunscPath string
	// Frontends are images of front ends that may run, by digest.
	Frontends []string
	// OnStep is told what a step used, by its digest, before its end is in the progress.
	// It is called concurrently.
	OnStep func(vertex string, u *agentv1.StepUsage)
	// OnLoss is told, before Start returns, when Root was emptied because the machine had
	// gone down before all of it was on the disk.
	OnLoss func()
}

// App is the command with what it takes from the process around it.
type App struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Version is what kiln version prints.
	Version string
	// Isolate moves this process away from the node's mounts, which may start it
	// anew: it is called at most once, before anything is read from Stdin.
	Isolate func() error
	// Start starts the engine in this process. The caller holds the lock of Root.
	Start func(ctx context.Context, cfg EngineConfig) (Engine, error)

	isolated bool
	// used is what steps of an engine in this process used.
	used usageFeed
}

// Main runs the command with args and returns its exit code. When ctx ends, what
// runs is cancelled.
func (a *App) Main(ctx context.Context, args []string) int {
	root := a.command()
	root.SetArgs(args)
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	cmd, err := root.ExecuteContextC(ctx)
	return a.report(ctx, cmd, err)
}

func (a *App) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "kiln",
		Short: "Build container images with every step in a sandbox",
		Long: "kiln builds container images. Every RUN step runs in a gVisor or user-namespace sandbox.\n\n" +
			"Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(a.buildCommand(), a.duCommand(), a.pruneCommand(), a.doctorCommand(), a.versionCommand(),
		a.submitCommand(), a.psCommand(), a.logsCommand(), a.cancelCommand())
	return root
}

func unknownCommand(cmd *cobra.Command, name string) error {
	msg := fmt.Sprintf("unknown command %q", name)
	if s := cmd.SuggestionsFor(name); len(s) > 0 {
		msg += fmt.Sprintf(": did you mean %s?", strings.Join(s, " or "))
	}
	return usage(errors.New(msg))
}

func (a *App) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(a.Stdout, "kiln", a.Version)
			return err
		},
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("%s takes no arguments, but got %q", cmd.CommandPath(), args))
	}
	return nil
}

// DefaultRoot is where kiln keeps its state when --root is not given.
func DefaultRoot() string {
	if os.Geteuid() == 0 {
		return "/var/lib/kiln"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kiln")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "share", "kiln")
	}
	return filepath.Join(os.TempDir(), "kiln")
}

// dockerConfig loads the user's Docker configuration, whose credentials builds
// use.
func (a *App) dockerConfig() *configfile.ConfigFile {
	return config.LoadDefaultConfigFile(a.Stderr)
}

// isTerminal tells whether w is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
