package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/cmd/kiln/cli/buildopt"
)

// buildFlags has the flags of kiln build.
type buildFlags struct {
	buildopt.Flags
	target             target
	progress, metadata string
	call               string
	frontends          []string
	check, quiet       bool
}

func (a *App) buildCommand() *cobra.Command {
	f := &buildFlags{}
	cmd := &cobra.Command{
		Use:   "build [flags] PATH | URL | -",
		Short: "Build an image from a Dockerfile",
		Long: "Build an image from a Dockerfile. The flags are those of docker buildx build.\n\n" +
			"Without --output the image stays in kiln's store, for later builds.",
		Args: func(_ *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				return usage(errors.New("the build context is missing: give a directory, a URL or - (for the current directory: .)"))
			case 1:
				return nil
			}
			return usage(fmt.Errorf("want one build context, but got %q", args))
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f.Context = args[0]
			return a.build(cmd.Context(), f)
		},
		DisableFlagsInUseLine: true,
	}
	fs := cmd.Flags()
	list := func(p *[]string, name, short, text string) { fs.StringArrayVarP(p, name, short, nil, text) }
	list(&f.Hosts, "add-host", "", "Add a line HOST:IP to /etc/hosts of every step")
	list(&f.Allow, "allow", "", "Refused: entitlements do not exist in kiln")
	list(&f.Annotations, "annotation", "", "Add annotation KEY=VALUE to the image")
	list(&f.Attests, "attest", "", "Attestation, such as type=sbom,generator=IMAGE")
	list(&f.BuildArgs, "build-arg", "", "Set build argument KEY=VALUE; KEY alone takes the environment's value")
	list(&f.Contexts, "build-context", "", "Additional context NAME=DIR, URL, docker-image://REF, oci-layout://DIR[:TAG] or target:STAGE")
	list(&f.CacheFrom, "cache-from", "", "Import cache: REF, or type=registry,ref=REF, or type=local,src=DIR")
	list(&f.CacheTo, "cache-to", "", "Export cache: REF, or type=registry,ref=REF[,mode=max], or type=local,dest=DIR, or type=inline")
	fs.StringVar(&f.call, "call", "build", "What to do: build, check, outline or targets; [,format=json][,ignorestatus=true]")
	fs.BoolVar(&f.check, "check", false, "Shorthand for --call check: check the Dockerfile and build nothing")
	fs.StringVar(&f.CPUs, "cpus", "", "Limit of CPUs of every step, such as 1.5")
	list(&f.Destinations, "destination", "", "All that the steps may connect to: a CIDR, an address, a host name or *.DOMAIN, each with :PORT if need be (default what is not denied)")
	fs.StringVar(&f.Disk, "disk", "", "Limit of what every step may write, such as 10g; a step that writes more fails")
	fs.StringVarP(&f.Dockerfile, "file", "f", "", "Dockerfile, its URL, or - for stdin (default PATH/Dockerfile)")
	list(&f.frontends, "frontend", "", "Image NAME@sha256:DIGEST of a front end that the Dockerfile's syntax line may name; it runs in a sandbox")
	fs.StringVar(&f.ImageIDFile, "iidfile", "", "Write the image ID to this file")
	list(&f.Labels, "label", "", "Set label KEY=VALUE of the image")
	fs.BoolVar(&f.Load, "load", false, "Refused: kiln needs no Docker daemon; use --output type=docker,dest=FILE")
	fs.StringVar(&f.Memory, "memory", "", "Limit of memory of every step, such as 2g; a step that needs more fails")
	fs.StringVar(&f.metadata, "metadata-file", "", "Write facts about the result to this file, in JSON")
	fs.StringVar(&f.Network, "network", "default", "Network of the steps: default or none")
	fs.BoolVar(&f.NoCache, "no-cache", false, "Run every step again")
	list(&f.NoCacheFilter, "no-cache-filter", "", "Run the steps of this stage again")
	list(&f.Outputs, "output", "o", "Output: DIR, -, or type=image|registry|oci|docker|local|tar|cacheonly[,dest=PATH][,KEY=VALUE]")
	fs.StringVar(&f.PIDsLimit, "pids-limit", "", "Limit of processes and threads of every step")
	list(&f.Platforms, "platform", "", "Platforms to build for, such as linux/amd64,linux/arm64")
	fs.StringVar(&f.progress, "progress", "auto", "Progress: auto, tty, plain, rawjson, quiet or none")
	fs.StringVar(&f.Provenance, "provenance", "", "Shorthand for --attest type=provenance: true, false or mode=max")
	fs.BoolVar(&f.Pull, "pull", false, "Ask the registry for every base image, even when it is here")
	fs.BoolVar(&f.Push, "push", false, "Shorthand for --output type=registry")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "Print the image ID only")
	fs.StringVar(&f.SBOM, "sbom", "", "Shorthand for --attest type=sbom: true, false or generator=IMAGE")
	list(&f.Secrets, "secret", "", "Secret for the steps: id=ID[,src=FILE][,env=VARIABLE]")
	fs.StringVar(&f.ShmSize, "shm-size", "", "Size of /dev/shm in the steps, such as 64m")
	fs.StringVar(&f.StepTimeout, "step-timeout", "", "How long every step may run, such as 10m; a step that takes longer fails")
	list(&f.SSH, "ssh", "", "SSH agent or keys for the steps: default or ID[=SOCKET|KEY[,KEY]]")
	list(&f.Tags, "tag", "t", "Name of the image: [REGISTRY/]NAME[:TAG]")
	fs.StringVar(&f.Target, "target", "", "Build this stage")
	list(&f.Ulimits, "ulimit", "", "Limit of every process of the steps: TYPE=SOFT[:HARD], such as nofile=1024:4096")
	f.target.flags(fs)
	return cmd
}

// displayMode returns how to show progress. BuildKit calls quiet what Docker
// calls none.
func (f *buildFlags) displayMode() (progressui.DisplayMode, error) {
	switch f.progress {
	case "quiet":
		f.quiet = true
	case "none":
		return progressui.QuietMode, nil
	case "auto", "":
		if v := os.Getenv("BUILDKIT_PROGRESS"); v != "" && !f.quiet {
			f.progress = v
			return (&buildFlags{progress: v}).explicitMode()
		}
	}
	return f.explicitMode()
}

func (f *buildFlags) explicitMode() (progressui.DisplayMode, error) {
	if f.quiet {
		if f.progress != "auto" && f.progress != "quiet" {
			return "", fmt.Errorf("--quiet and --progress %s exclude each other", f.progress)
		}
		return progressui.QuietMode, nil
	}
	switch m := progressui.DisplayMode(f.progress); m {
	case progressui.AutoMode, progressui.TtyMode, progressui.PlainMode, progressui.RawJSONMode, progressui.QuietMode:
		return m, nil
	case "none":
		return progressui.QuietMode, nil
	}
	return "", fmt.Errorf("unknown progress %q: want auto, tty, plain, rawjson, quiet or none", f.progress)
}

// build checks the flags, runs the build and writes its results.
func (a *App) build(ctx context.Context, f *buildFlags) error {
	mode, err := f.displayMode()
	if err != nil {
		return usage(err)
	}
	if f.check {
		f.call = "check"
	}
	question, err := parseCall(f.call)
	if err != nil {
		return usage(err)
	}
	f.target.frontends = f.frontends
	if _, err := f.target.check(); err != nil {
		return err
	}
	// This comes before stdin is read. Whether it failed matters only when the
	// command line is right: connect reports it then.
	_ = a.isolate(&f.target)
	if v := os.Getenv("DOCKER_DEFAULT_PLATFORM"); v != "" && len(f.Platforms) == 0 {
		f.Platforms = []string{v}
	}
	req, err := buildopt.New(f.Flags, buildopt.Env{
		Stdin:  a.Stdin,
		Stdout: buildopt.Stdout{Writer: a.Stdout, Terminal: isTerminal(a.Stdout)},
		Docker: a.dockerConfig(),
	})
	if err != nil {
		return usage(err)
	}
	display, err := progressui.NewDisplay(a.Stderr, mode)
	if err != nil {
		return usage(fmt.Errorf("--progress %s: %w", mode, err))
	}
	for _, name := range []string{f.ImageIDFile, f.metadata} {
		// A file of an earlier build must not be taken for that of a failed one.
		if name == "" {
			continue
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return usage(fmt.Errorf("replace result file: %w", err))
		}
	}
	c, release, err := a.connect(ctx, &f.target)
	if err != nil {
		return err
	}
	if question != nil {
		return errors.Join(a.ask(ctx, c, question, req, display), release())
	}
	// The engine's record of a build is read for its provenance alone, and takes half
	// the time of a build whose steps are all cached.
	req.Solve.Internal = f.metadata == ""
	feed := &a.used
	if mode == progressui.RawJSONMode {
		feed = &usageFeed{} // programs read BuildKit's own news there
	}
	resp, err := solve(ctx, c, req, display, a.warner(mode), feed)
	if err == nil {
		err = a.results(ctx, c, f, mode, req, resp)
	}
	return errors.Join(err, release())
}

// solve runs the build and shows its progress until both have ended.
func solve(ctx context.Context, c *client.Client, req *buildopt.Request, display progressui.Display, warn func([]client.VertexWarning), feed *usageFeed) (map[string]string, error) {
	req.Solve.Ref = identity.NewID()
	ch := make(chan *client.SolveStatus)
	var resp *client.SolveResponse
	eg := errgroup.Group{}
	eg.Go(func() (err error) {
		resp, err = c.Solve(ctx, nil, req.Solve, ch)
		return err
	})
	eg.Go(func() error {
		// The display drains the channel also after a signal: Solve closes it.
		warnings, err := display.UpdateFrom(context.WithoutCancel(ctx), feed.through(ch))
		warn(warnings)
		return err
	})
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	return resp.ExporterResponse, nil
}

// imageID returns what identifies the image that resp describes.
func imageID(resp map[string]string) string {
	if v := resp[exptypes.ExporterImageConfigDigestKey]; v != "" {
		return v
	}
	return resp[exptypes.ExporterImageDigestKey]
}
