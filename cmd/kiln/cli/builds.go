package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/cmd/kiln/cli/cluster"
)

// place says where builds are: on a cluster, or on one agent.
type place struct {
	cluster cluster.Config
	agent   string
	tls     tlsFlags
}

func (p *place) clusterFlags(fs *pflag.FlagSet) {
	fs.StringVarP(&p.cluster.Namespace, "namespace", "n", "", "Namespace of the cluster (default that of the kubeconfig)")
	fs.StringVar(&p.cluster.Kubeconfig, "kubeconfig", "", "The kubeconfig file (default $KUBECONFIG, else ~/.kube/config)")
	fs.StringVar(&p.cluster.Context, "context", "", "Context of the kubeconfig")
}

func (p *place) flags(fs *pflag.FlagSet) {
	p.clusterFlags(fs)
	fs.StringVar(&p.agent, "agent", "", "Ask the agent at this address (unix:///path or tcp://host:port) and not a cluster (default $KILN_AGENT)")
	p.tls.flags(fs)
}

// listed is a build in a list.
type listed struct {
	Namespace, Name, State, Node, Sandbox, Image string
	Created                                      time.Time
	Started, Ended                               *time.Time
}

// builds is where builds are kept.
type builds interface {
	// List returns the builds, in any order.
	List(ctx context.Context, all bool) ([]listed, error)
	// Events gives a build's events, in order, from the first.
	Events(ctx context.Context, name string, follow bool, fn func(*agentv1.Event) error) error
	// Cancel asks a build to end.
	Cancel(ctx context.Context, name string) error
	// Close releases the connection.
	Close() error
}

// open connects to where the flags say.
func (p *place) open(ctx context.Context) (builds, error) {
	if p.agent == "" && p.cluster == (cluster.Config{}) {
		p.agent = os.Getenv("KILN_AGENT")
	}
	if p.agent == "" {
		if p.tls.set() {
			return nil, usage(errors.New("--tls flags and --token-file are for an agent: give its address with --agent"))
		}
		c, err := cluster.New(p.cluster)
		if err != nil {
			return nil, err
		}
		return clusterBuilds{c}, nil
	}
	if p.cluster != (cluster.Config{}) {
		return nil, usage(errors.New("--agent excludes --namespace, --kubeconfig and --context"))
	}
	if err := p.tls.check(p.agent); err != nil {
		return nil, usage(err)
	}
	conn, err := dialBuilds(ctx, p.agent, &p.tls)
	if err != nil {
		return nil, err
	}
	return &agentBuilds{conn: conn, api: agentv1.NewBuildServiceClient(conn)}, nil
}

func (a *App) psCommand() *cobra.Command {
	var p place
	var all, quiet bool
	cmd := &cobra.Command{
		Use: "ps", Short: "List builds of a cluster or an agent", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := p.open(cmd.Context())
			if err != nil {
				return err
			}
			defer b.Close()
			list, err := b.List(cmd.Context(), all)
			if err != nil {
				return err
			}
			slices.SortFunc(list, func(x, y listed) int {
				return cmp.Or(y.Created.Compare(x.Created), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
			})
			if quiet {
				for _, l := range list {
					fmt.Fprintln(a.Stdout, l.Name)
				}
				return nil
			}
			return writeBuilds(a.Stdout, list, all, time.Now())
		},
	}
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "Builds of all namespaces, or of all tenants of an agent")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Print names only")
	p.flags(cmd.Flags())
	return cmd
}

func writeBuilds(w io.Writer, list []listed, all bool, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if all {
		fmt.Fprint(tw, "NAMESPACE\t")
	}
	fmt.Fprintln(tw, "NAME\tSTATE\tNODE\tSANDBOX\tDURATION\tAGE\tIMAGE")
	for _, l := range list {
		if all {
			fmt.Fprintf(tw, "%s\t", l.Namespace)
		}
		duration := ""
		if l.Started != nil {
			end := now
			if l.Ended != nil {
				end = *l.Ended
			}
			duration = max(0, end.Sub(*l.Started)).Round(100 * time.Millisecond).String()
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Name, l.State, l.Node, l.Sandbox, duration,
			units.HumanDuration(max(0, now.Sub(l.Created))), printable(l.Image))
	}
	return tw.Flush()
}

func oneBuild(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usage(fmt.Errorf("want the name of one build, but got %q; kiln ps lists them", args))
	}
	return nil
}

func (a *App) logsCommand() *cobra.Command {
	var p place
	var follow bool
	var progress string
	cmd := &cobra.Command{
		Use: "logs [-f] BUILD", Short: "Show the progress and output of a build", Args: oneBuild,
		Long: "Show the progress and output of a build.\n\n" +
			"With --follow it goes on until the build has ended, and the exit code tells how: 0 it succeeded, 1 it did not.",
		RunE: func(cmd *cobra.Command, args []string) error {
			display, err := newDisplay(a.Stderr, progress)
			if err != nil {
				return usage(err)
			}
			b, err := p.open(cmd.Context())
			if err != nil {
				return err
			}
			defer b.Close()
			r, err := replay(cmd.Context(), func(ctx context.Context, fn func(*agentv1.Event) error) error {
				return b.Events(ctx, args[0], follow, fn)
			}, display, nil)
			if err != nil || r == nil {
				return err
			}
			return resultError(r)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "Go on until the build has ended")
	cmd.Flags().StringVar(&progress, "progress", "plain", "Progress: auto, tty, plain or rawjson")
	p.flags(cmd.Flags())
	return cmd
}

func newDisplay(w io.Writer, mode string) (progressui.Display, error) {
	switch m := progressui.DisplayMode(mode); m {
	case progressui.AutoMode, progressui.TtyMode, progressui.PlainMode, progressui.RawJSONMode, progressui.QuietMode:
		f, ok := w.(*os.File)
		if !ok {
			if m == progressui.AutoMode {
				m = progressui.PlainMode
			}
			return progressui.NewDisplay(w, m)
		}
		return progressui.NewDisplay(f, m)
	}
	return progressui.Display{}, fmt.Errorf("unknown progress %q: want auto, tty, plain, rawjson or quiet", mode)
}

func (a *App) cancelCommand() *cobra.Command {
	var p place
	cmd := &cobra.Command{
		Use: "cancel BUILD...", Short: "End builds of a cluster or an agent",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(errors.New("want the name of a build; kiln ps lists them"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := p.open(cmd.Context())
			if err != nil {
				return err
			}
			defer b.Close()
			var errs []error
			for _, name := range args {
				if err := b.Cancel(cmd.Context(), name); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.Stdout, name)
			}
			return errors.Join(errs...)
		},
	}
	p.flags(cmd.Flags())
	return cmd
}

// clusterBuilds are the builds of a cluster.
type clusterBuilds struct{ *cluster.Client }

// List implements builds.
func (c clusterBuilds) List(ctx context.Context, all bool) ([]listed, error) {
	items, err := c.Client.List(ctx, all)
	if err != nil {
		return nil, err
	}
	out := make([]listed, len(items))
	for i := range items {
		out[i] = listedOf(&items[i])
	}
	return out, nil
}

func listedOf(b *buildv1.Build) listed {
	l := listed{
		Namespace: b.Namespace, Name: b.Name, State: string(b.Status.Phase), Node: b.Status.Node, Sandbox: b.Status.Sandbox,
		Created: b.CreationTimestamp.Time,
	}
	if l.State == "" {
		l.State = string(buildv1.PhasePending)
	}
	if b.Spec.Output != nil {
		l.Image = b.Spec.Output.Image
	}
	if t := b.Status.StartTime; t != nil {
		l.Started = &t.Time
	}
	if t := b.Status.CompletionTime; t != nil {
		l.Ended = &t.Time
	}
	return l
}

// Events implements builds.
func (c clusterBuilds) Events(ctx context.Context, name string, follow bool, fn func(*agentv1.Event) error) error {
	return c.Client.Events(ctx, name, 0, follow, fn)
}

// Close implements builds.
func (c clusterBuilds) Close() error { return nil }

// stateName returns a state as people write it.
func stateName(s agentv1.BuildState) string {
	n := strings.ToLower(strings.TrimPrefix(s.String(), "BUILD_STATE_"))
	return strings.ToUpper(n[:1]) + n[1:]
}
