package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/cmd/kiln/cli/buildopt"
	"github.com/kiln-build/kiln/cmd/kiln/cli/cluster"
)

// submitFlags has the flags of kiln submit. Those that kiln build has too mean the
// same.
type submitFlags struct {
	cluster.Request
	place             place
	buildArgs, labels []string
	timeout           time.Duration
	stepTimeout       time.Duration
	progress          string
	detach, quiet     bool
}

func (a *App) submitCommand() *cobra.Command {
	f := &submitFlags{}
	cmd := &cobra.Command{
		Use:   "submit [flags] PATH | URL",
		Short: "Build on a Kubernetes cluster",
		Long: "Create a Build on a Kubernetes cluster, send it the directory when the context is one,\n" +
			"and follow it to its end. An interrupt stops following only: the build goes on, kiln logs -f\n" +
			"follows it again and kiln cancel ends it.\n\n" +
			"The digest of the image is printed when the build has succeeded; the exit code is 1 when it has not.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(fmt.Errorf("want one build context, a directory or a URL, but got %q", args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f.Context = args[0]
			return a.submit(cmd.Context(), f)
		},
		DisableFlagsInUseLine: true,
	}
	fs := cmd.Flags()
	list := func(p *[]string, name, short, text string) { fs.StringArrayVarP(p, name, short, nil, text) }
	list(&f.buildArgs, "build-arg", "", "Set build argument KEY=VALUE; KEY alone takes the environment's value")
	fs.StringVar(&f.CPU, "cpu", "", "Limit of CPUs of every step, such as 2 or 500m")
	fs.BoolVarP(&f.detach, "detach", "d", false, "Do not follow the build: print its name when it has all that it needs")
	fs.BoolVar(&f.Dry, "dry-run", false, "Print the Build in YAML and create nothing")
	fs.StringVarP(&f.Dockerfile, "file", "f", "", "Dockerfile, below the context (default Dockerfile)")
	fs.StringVar(&f.GitSecret, "git-secret", "", "Secret of the namespace with the credentials for the git URL")
	fs.BoolVar(&f.Insecure, "insecure", false, "Accept plain HTTP and unverified certificates of the registry that is pushed to")
	list(&f.labels, "label", "", "Set label KEY=VALUE of the image")
	fs.StringVar(&f.Disk, "disk", "", "Limit of what every step may write, such as 10Gi")
	fs.StringVar(&f.Memory, "memory", "", "Limit of memory of every step, such as 2Gi")
	fs.StringVar(&f.Name, "name", "", "Name of the Build (default a generated one)")
	fs.StringVar(&f.Network, "network", "", "Network of the steps: default or none")
	fs.BoolVar(&f.NoCache, "no-cache", false, "Run every step again")
	fs.BoolVar(&f.NoPush, "no-push", false, "Do not push the image; with --node it is on its node only")
	fs.BoolVar(&f.Node, "node", false, "Put the image into the image store of the node that builds it")
	fs.StringVar(&f.PIDs, "pids-limit", "", "Limit of processes and threads of every step")
	list(&f.Platforms, "platform", "", "Platforms to build for, such as linux/amd64,linux/arm64")
	fs.StringVar(&f.progress, "progress", "auto", "Progress: auto, tty, plain, rawjson or quiet")
	fs.BoolVar(&f.Pull, "pull", false, "Ask the registry for every base image, even when it is there")
	fs.StringVar(&f.PushSecret, "push-secret", "", "Secret of the namespace with the credentials for the push")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "Print the digest only")
	fs.StringVar(&f.RuntimeClass, "runtime-class", "", "RuntimeClass that selects the sandbox of every step")
	list(&f.Secrets, "secret", "", "Secret for the steps: id=ID,secret=NAME[,key=KEY], where NAME is a Secret of the namespace")
	fs.StringVar(&f.ServiceAccount, "service-account", "", "ServiceAccount whose image pull secrets are used (default default)")
	fs.StringVar(&f.Shm, "shm-size", "", "Size of /dev/shm in the steps, such as 128Mi")
	fs.DurationVar(&f.stepTimeout, "step-timeout", 0, "How long every step may run")
	list(&f.Tags, "tag", "t", "Name of the image: [REGISTRY/]NAME[:TAG]")
	fs.StringVar(&f.Target, "target", "", "Build this stage")
	list(&f.Ulimits, "ulimit", "", "Limit of every process of the steps: nofile=NUMBER")
	fs.DurationVar(&f.timeout, "timeout", 0, "How long the build may run")
	f.place.clusterFlags(fs)
	return cmd
}

func (a *App) submit(ctx context.Context, f *submitFlags) error {
	build, dir, err := f.build()
	if err != nil {
		return usage(err)
	}
	if f.quiet {
		f.progress = string(progressui.QuietMode)
	}
	display, err := newDisplay(a.Stderr, f.progress)
	if err != nil {
		return usage(err)
	}
	var archive *cluster.Archive
	if dir != "" {
		if archive, err = cluster.Pack(ctx, dir, f.Dockerfile); err != nil {
			return err
		}
		defer archive.Close()
		build.Spec.Source.Upload.Digest = archive.Digest
	}
	if f.Dry {
		text, err := yaml.Marshal(build)
		if err == nil {
			_, err = a.Stdout.Write(text)
		}
		return err
	}
	c, err := cluster.New(f.place.cluster)
	if err != nil {
		return err
	}
	created, err := c.Create(ctx, build)
	if err != nil {
		return err
	}
	if !f.quiet {
		fmt.Fprintf(a.Stderr, "kiln: created build %s in namespace %s\n", created.Name, created.Namespace)
	}
	err = a.follow(ctx, c, created.Name, archive, f, display)
	if ctx.Err() != nil {
		fmt.Fprintf(a.Stderr, "kiln: build %[1]s goes on: follow it with 'kiln logs -f -n %[2]s %[1]s', end it with 'kiln cancel -n %[2]s %[1]s'\n", created.Name, created.Namespace)
	}
	return err
}

func (f *submitFlags) build() (_ *buildv1.Build, dir string, err error) {
	if f.BuildArgs, err = buildopt.ParsePairs(f.buildArgs, true); err != nil {
		return nil, "", fmt.Errorf("--build-arg: %w", err)
	}
	if f.labels != nil {
		if f.Labels, err = buildopt.ParsePairs(f.labels, false); err != nil {
			return nil, "", fmt.Errorf("--label: %w", err)
		}
	}
	if f.Platforms, err = buildopt.ParsePlatforms(f.Platforms); err != nil {
		return nil, "", fmt.Errorf("--platform: %w", err)
	}
	f.Request.Timeout = metav1.Duration{Duration: f.timeout}
	f.Request.StepTimeout = metav1.Duration{Duration: f.stepTimeout}
	return f.Request.Build()
}

// follow sends the build what it waits for and shows it to its end.
func (a *App) follow(ctx context.Context, c *cluster.Client, name string, archive *cluster.Archive, f *submitFlags, display progressui.Display) error {
	notice := newNotices(a, f.quiet)
	if archive != nil {
		b, err := c.Wait(ctx, name, func(b *buildv1.Build) bool {
			return b.Ended() || reason(b) == buildv1.ReasonAwaitingUpload
		}, notice.say)
		if err != nil {
			return err
		}
		if b.Ended() {
			return ended(a, b, f.quiet)
		}
		if err := c.Upload(ctx, name, archive.File, archive.Size); err != nil {
			// A source that never comes must not hold its place on the node.
			return errors.Join(err, c.Cancel(context.WithoutCancel(ctx), name))
		}
	}
	if f.detach {
		_, err := fmt.Fprintln(a.Stdout, name)
		return err
	}
	b, err := c.Wait(ctx, name, func(b *buildv1.Build) bool { return b.Ended() || b.Status.StartTime != nil }, notice.say)
	if err != nil {
		return err
	}
	if b.Status.StartTime != nil {
		_, err = replay(ctx, func(ctx context.Context, fn func(*agentv1.Event) error) error {
			return c.Events(ctx, name, 0, true, fn)
		}, display, nil)
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			fmt.Fprintf(a.Stderr, "kiln: %v\n", err)
		}
	}
	// The status tells how it ended, not the log, which may be gone.
	if b, err = c.Wait(ctx, name, (*buildv1.Build).Ended, nil); err != nil {
		return err
	}
	return ended(a, b, f.quiet)
}

// ended prints the result of a build that has ended, or returns why it failed.
func ended(a *App, b *buildv1.Build, quiet bool) error {
	for _, cond := range b.Status.Conditions {
		if cond.Type == buildv1.ConditionSucceeded && cond.Status != metav1.ConditionTrue {
			where := ""
			if d := b.Status.FailureDetails; d != nil && d.Location != nil && d.Location.File != "" {
				where = fmt.Sprintf("%s:%d: ", d.Location.File, d.Location.Line)
			}
			return fmt.Errorf("build %s: %s: %s%s", b.Name, cond.Reason, where, cond.Message)
		}
	}
	out := b.Status.Output
	if out == nil || out.Digest == "" {
		return nil
	}
	if quiet || out.Image == "" {
		_, err := fmt.Fprintln(a.Stdout, out.Digest)
		return err
	}
	_, err := fmt.Fprintf(a.Stdout, "%s@%s\n", out.Image, out.Digest)
	return err
}

func reason(b *buildv1.Build) string {
	for _, cond := range b.Status.Conditions {
		if cond.Type == buildv1.ConditionSucceeded {
			return cond.Reason
		}
	}
	return ""
}

// notices tells what a build waits for, each thing once.
type notices struct {
	app   *App
	quiet bool
	last  string
}

func newNotices(a *App, quiet bool) *notices { return &notices{app: a, quiet: quiet} }

func (n *notices) say(b *buildv1.Build) {
	for _, cond := range b.Status.Conditions {
		if cond.Type != buildv1.ConditionSucceeded || n.quiet || cond.Message == "" || cond.Message == n.last {
			continue
		}
		switch cond.Reason {
		case buildv1.ReasonPending, buildv1.ReasonScheduled, buildv1.ReasonRunning, buildv1.ReasonAwaitingUpload:
		default:
			n.last = cond.Message
			fmt.Fprintf(n.app.Stderr, "kiln: build %s waits: %s\n", b.Name, printable(cond.Message))
		}
	}
}
