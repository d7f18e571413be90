package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
)

// pruneFlags has the flags of kiln prune.
type pruneFlags struct {
	target                  target
	all, force              bool
	filters                 []string
	keep, maxUsed, reserved string
	minFree                 string
}

func (a *App) pruneCommand() *cobra.Command {
	f := &pruneFlags{}
	cmd := &cobra.Command{
		Use: "prune", Short: "Free space in the build store", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts, err := f.options()
			if err != nil {
				return usage(err)
			}
			if err := a.confirm(f); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), &f.target, func(ctx context.Context, c *client.Client) error {
				return a.prune(ctx, c, opts)
			})
		},
	}
	fs := cmd.Flags()
	fs.BoolVarP(&f.all, "all", "a", false, "Free also what is internal and what front ends left")
	fs.BoolVarP(&f.force, "force", "f", false, "Do not ask")
	fs.StringArrayVar(&f.filters, "filter", nil, "Free only matching records, such as until=24h or type==exec.cachemount")
	fs.StringVar(&f.reserved, "reserved-space", "", "Always leave this much, such as 2GB")
	fs.StringVar(&f.keep, "keep-storage", "", "The same as --reserved-space")
	fs.StringVar(&f.maxUsed, "max-used-space", "", "Free until the store uses no more than this")
	fs.StringVar(&f.minFree, "min-free-space", "", "Free until the disk has this much free")
	f.target.flags(fs)
	return cmd
}

// options turns the flags into those of the engine.
func (f *pruneFlags) options() ([]client.PruneOption, error) {
	if f.keep != "" && f.reserved != "" {
		return nil, errors.New("--keep-storage and --reserved-space are the same: give one")
	}
	if f.keep != "" {
		f.reserved = f.keep
	}
	var sizes [3]int64
	for i, v := range []struct{ flag, value string }{{"--reserved-space", f.reserved}, {"--max-used-space", f.maxUsed}, {"--min-free-space", f.minFree}} {
		if v.value == "" {
			continue
		}
		n, err := units.RAMInBytes(v.value)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%s %q: want a size such as 2GB", v.flag, v.value)
		}
		sizes[i] = n
	}
	var age time.Duration
	var filters []string
	for _, s := range f.filters {
		until, ok := strings.CutPrefix(s, "until=")
		if !ok {
			filters = append(filters, s)
			continue
		}
		d, err := time.ParseDuration(until)
		if err != nil || d < 0 {
			return nil, fmt.Errorf("--filter %q: want a duration such as until=24h", s)
		}
		age = d
	}
	if err := checkFilters(filters); err != nil {
		return nil, err
	}
	opts := []client.PruneOption{client.WithKeepOpt(age, sizes[0], sizes[1], sizes[2])}
	if len(filters) > 0 {
		opts = append(opts, client.WithFilter(filters))
	}
	if f.all {
		opts = append(opts, client.PruneAll)
	}
	return opts, nil
}

// confirm asks before anything is freed. Who cannot be asked has to say --force.
func (a *App) confirm(f *pruneFlags) error {
	if f.force {
		return nil
	}
	if !isTerminal(a.Stdin) {
		return usage(errors.New("prune asks before it frees anything, and stdin is not a terminal: add --force"))
	}
	what := "This removes the build cache that nothing uses"
	if f.all {
		what = "This removes the whole build cache"
	}
	fmt.Fprintf(a.Stderr, "%s. Continue? [y/N] ", what)
	line, _ := bufio.NewReader(a.Stdin).ReadString('\n')
	if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
		fmt.Fprintln(a.Stderr, "Nothing was removed.")
		return silentError{}
	}
	return nil
}

func (a *App) prune(ctx context.Context, c *client.Client, opts []client.PruneOption) error {
	ch := make(chan client.UsageInfo)
	var freed []*client.UsageInfo
	var total int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for r := range ch {
			total += r.Size
			freed = append(freed, &r)
		}
	})
	err := c.Prune(ctx, ch, opts...)
	close(ch)
	wg.Wait()
	for _, r := range freed {
		fmt.Fprintf(a.Stdout, "%s\t%s\t%s\n", r.ID, size(r.Size), shorten(r.Description))
	}
	fmt.Fprintf(a.Stdout, "Freed %s in %d records\n", size(total), len(freed))
	return err
}
